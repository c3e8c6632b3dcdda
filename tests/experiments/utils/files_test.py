"""Files appear completely or not at all, on the disk, with the permissions of any other file."""

import os
import pathlib

import pytest

from experiments.utils import files


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o002, 0o664), (0o027, 0o640), (0o077, 0o600)])
def test_permissions_are_those_of_any_new_file(tmp_path, umask, mode):
    path = tmp_path / "file"
    before = os.umask(umask)
    try:
        for _ in range(2):  # a new file, and one that takes the place of another
            files.write_text(path, "text")
            assert path.stat().st_mode & 0o777 == mode
            path.chmod(0o666)
        assert os.umask(umask) == umask  # still what it was
    finally:
        os.umask(before)


def test_a_file_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    path, events = tmp_path / "file", []
    sync, replace = os.fsync, pathlib.Path.replace

    def synced(handle):
        events.append(("sync", os.readlink(f"/proc/self/fd/{handle}"), [p.name for p in tmp_path.iterdir()]))
        sync(handle)

    def replaced(source, target):
        events.append(("replace", str(source), source.read_text()))
        return replace(source, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(pathlib.Path, "replace", replaced)
    files.write_text(path, "text")
    (first, written, there), (second, moved, text), (third, directory, after) = events
    assert (first, second, third) == ("sync", "replace", "sync")
    assert written == moved
    assert there == [pathlib.Path(written).name]
    assert text == "text"
    assert directory == str(tmp_path)
    assert after == ["file"]


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
def test_an_interrupted_write_leaves_what_was_there(tmp_path, error):
    path = tmp_path / ("x" * 255)  # as long as a name may be
    files.write_text(path, "before")

    def fails(file):
        file.write(b"half")
        raise error

    with pytest.raises(type(error)):
        files.write_atomically(path, fails)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    assert path.read_text() == "before"


def test_where_nothing_can_be_written(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none/file cannot be written: there is no directory .*none$"):
        files.write_text(tmp_path / "none/file", "text")
    (tmp_path / "folder").mkdir()
    with pytest.raises(IsADirectoryError, match="folder cannot be written: it is a directory"):
        files.write_text(tmp_path / "folder", "text")
    assert [p.name for p in tmp_path.iterdir()] == ["folder"]
