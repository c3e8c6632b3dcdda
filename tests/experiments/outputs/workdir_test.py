"""A run's directory: it is overwritten whole or not at all, and goes on with the data it began with."""

import errno
import json
import os
import pathlib

import numpy as np
import pytest
from criteo_test import make_lines, tabbed
from data_test import write_idx, write_tar

from configs import mnist
from experiments.data import catalog
from experiments.data.criteo.prepare import prepare
from experiments.data.fingerprints import fingerprint
from experiments.outputs import workdir
from experiments.training import setup as parts
from experiments.training import weights


@pytest.fixture
def run(tmp_path):
    """The directory of a finished run, as far as deleting it goes."""
    path = tmp_path / "run"
    path.mkdir()
    workdir.record_config(path, mnist.get_config())
    workdir.record_data(path, {"table.csv": "1"})
    for name in (workdir.RESULT, workdir.METRICS, workdir.FEATURES, workdir.WEIGHTS, workdir.PICTURE):
        (path / name).write_text("old")
    for name in (workdir.CHECKPOINTS, workdir.TWIN, "tensorboard", "profile"):
        (path / name / "300").mkdir(parents=True)
        (path / name / "300" / "file").write_text("old")
    (path / "notes.txt").write_text("mine")
    return path


def content(path):
    return {str(f.relative_to(path)): f.read_text() for f in sorted(path.rglob("*")) if f.is_file()}


def test_a_run_is_deleted_whole_and_nothing_else(run):
    workdir.clear(run)
    assert content(run) == {"notes.txt": "mine"}
    workdir.clear(run)
    (run / workdir.RESULT).write_text("not a run's")
    workdir.clear(run)
    assert content(run) == {"notes.txt": "mine", workdir.RESULT: "not a run's"}


@pytest.mark.parametrize("name", [workdir.CHECKPOINTS, workdir.RESULT, workdir.CONFIG, "tensorboard", workdir.TWIN])
@pytest.mark.parametrize("dangling", [False, True])
def test_links_go_and_what_they_lead_to_stays(run, name, dangling):
    target = run.parent / "elsewhere"
    (run / name).rename(target)
    if dangling and name != workdir.CONFIG:
        target = run.parent / "nowhere"
    (run / name).symlink_to(target)
    before = {path: path.stat().st_size for path in run.parent.joinpath("elsewhere").rglob("*") if path.is_file()}
    workdir.clear(run)
    assert content(run) == {"notes.txt": "mine"}
    assert not os.path.lexists(run / name)
    assert all(path.stat().st_size == size for path, size in before.items())
    assert run.parent.joinpath("elsewhere").exists()


@pytest.mark.parametrize("name", [workdir.RESULT, workdir.CHECKPOINTS, workdir.CONFIG])
def test_what_cannot_be_moved_away_leaves_all_as_it_was(run, name, monkeypatch):
    before, rename = content(run), pathlib.Path.rename

    def busy(path, target):  # as for a mount point
        if path == run / name:
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), str(path))
        return rename(path, target)

    monkeypatch.setattr(pathlib.Path, "rename", busy)
    with pytest.raises(
        OSError, match=rf"cannot overwrite the run in {run}: {name} cannot be moved away, .* busy; noth"
    ):
        workdir.clear(run)
    assert content(run) == before
    assert not (run / ".overwritten").exists()


def test_what_cannot_be_deleted_is_said_and_is_not_found_again(run, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(os, "unlink", lambda *_, **__: (_ for _ in ()).throw(PermissionError(1, "not permitted")))
        with pytest.raises(OSError, match=r"/\.overwritten, the rest of a run .* cannot be deleted: .*not permitted"):
            workdir.clear(run)
    assert {p.name for p in run.iterdir()} == {".overwritten", "notes.txt"}
    workdir.record_config(run, mnist.get_config())
    workdir.clear(run)
    assert content(run) == {"notes.txt": "mine"}


def test_what_comes_back_is_an_error(run, monkeypatch):
    delete = workdir._delete

    def and_saves(old):
        delete(old)
        (run / workdir.CHECKPOINTS).mkdir()

    monkeypatch.setattr(workdir, "_delete", and_saves)
    with pytest.raises(OSError, match="holds checkpoints again, just deleted: does another program write there"):
        workdir.clear(run)


def test_the_rest_of_a_run_without_its_config_is_refused(run):
    (run / workdir.CONFIG).unlink()
    with pytest.raises(ValueError, match=r"holds result\.json but no config\.json"):
        workdir.record_config(run, mnist.get_config())
    (run / workdir.CONFIG).write_text("")
    with pytest.raises(ValueError, match=r"config\.json is damaged.*--overwrite"):
        workdir.record_config(run, mnist.get_config())
    workdir.clear(run)
    workdir.record_config(run, mnist.get_config())


def table(folder):
    (folder / "t.csv").write_text("x,y\n" + "".join(f"{i},{'ab'[i % 2]}\n" for i in range(20)))
    return lambda: catalog.table(str(folder / "t.csv")), folder / "t.csv"


def idx(folder):
    write_idx(folder, compress=True)
    return lambda: catalog.mnist(str(folder)), folder / "t10k-labels-idx1-ubyte.gz"


def tar(folder):
    write_tar(folder / "a.tar", ["train/cat/1.png", "test/cat/1.png"])
    return lambda: catalog.cifar10(str(folder / "a.tar")), folder / "a.tar"


def text(folder):
    for i in range(9):
        (folder / f"{i}.txt").write_text(f"{i} " * 99)
    return lambda: catalog.text(str(folder), context=8, held_out=0.4), folder / "4.txt"


def images(folder):
    for part in ("train", "val"):
        (folder / part / "n01").mkdir(parents=True)
        (folder / part / "n01" / "1.jpg").write_bytes(b"1")
    return lambda: catalog.image_folder(str(folder)), folder / "val" / "n01" / "1.jpg"


def clicks(folder):
    (folder / "log").write_bytes(tabbed(make_lines(200)))
    prepare(folder / "log", folder / "out")
    return lambda: catalog.criteo(str(folder / "out")), folder / "out" / "manifest.json"


@pytest.mark.parametrize("make", [table, idx, tar, text, images, clicks])
def test_a_file_that_changes_is_named_when_the_run_goes_on(tmp_path, make):
    (tmp_path / "data").mkdir()
    (tmp_path / "run").mkdir()
    read, file = make(tmp_path / "data")
    found = fingerprint(read().files)
    workdir.record_data(tmp_path / "run", found)
    workdir.record_data(tmp_path / "run", fingerprint(read().files))
    (tmp_path / "data").rename(tmp_path / "moved")  # the same content in another place is the same
    named = {str(path).replace("/data/", "/moved/"): digest for path, digest in found.items()}
    workdir.record_data(tmp_path / "run", named)
    (tmp_path / "moved").rename(tmp_path / "data")
    now = file.read_bytes()
    file.write_bytes(now[:-1] + bytes([now[-1] ^ 1]) if make is not images else now + b"1")
    changed = fingerprint([pathlib.Path(path) for path in found])
    place = file.parent if make is images else file
    with pytest.raises(ValueError, match=rf"^{place} changed since the run in .* began: .*--resume_changed"):
        workdir.record_data(tmp_path / "run", changed)
    workdir.record_data(tmp_path / "run", changed, change=True)
    workdir.record_data(tmp_path / "run", changed)


def test_files_that_change_places_have_changed(tmp_path):
    workdir.record_data(tmp_path, {"train": "1", "test": "2"})
    with pytest.raises(ValueError, match="train and 1 more changed"):
        workdir.record_data(tmp_path, {"train": "2", "test": "1"})


def test_another_teacher_is_noticed():
    setup = parts.Setup(*[None] * 9)
    setup = setup._replace(task=parts.tasks.Task("m", None, catalog.mnist5k(), None, None))
    one, other = (setup._replace(teacher=weights.Variables({"w": np.float32([x])}, {})) for x in (1, 2))
    assert setup.fingerprint() == {}
    assert one.fingerprint() == one.fingerprint() != other.fingerprint()


def test_damaged_rows_of_metrics_are_dropped(tmp_path):
    path = tmp_path / workdir.METRICS
    path.write_bytes(b'{"step": 1}\n\xff\0\n5\n[]\n{"loss": 2}\n{"step": 2}\n{"st')
    metrics = workdir.Metrics(path, step=9)
    metrics.close()
    assert metrics.rows == [{"step": 1}, {"step": 2}]
    assert [json.loads(line) for line in path.read_text().splitlines()] == [{"step": 1}, {"step": 2}]
