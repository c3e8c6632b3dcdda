"""What a release says of itself in several places is the same in all of them."""

import io
import pathlib
import re
import runpy
import shutil
import subprocess
import tarfile
import tomllib

import pytest
import yaml
from packaging.version import Version

from sa_plus_plus import _version

ROOT = pathlib.Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def workflow(name: str) -> dict:
    return yaml.safe_load((ROOT / ".github/workflows" / name).read_text())["jobs"]


def test_every_supported_python_is_tested_and_gets_the_wheel():
    lines = PROJECT["project"]["classifiers"]
    supported = [
        line.split(" :: ")[-1] for line in lines if re.fullmatch(r"Programming Language :: Python :: 3\.\d+", line)
    ]
    assert PROJECT["project"]["requires-python"] == f">={supported[0]}"
    assert workflow("ci.yml")["check"]["strategy"]["matrix"]["python"] == supported
    wheels = PROJECT["tool"]["cibuildwheel"]["build"]
    assert wheels == [f"cp{python.replace('.', '')}-*" for python in supported]


def test_the_citation_has_the_version_and_the_address():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == _version.RELEASE
    assert citation["repository-code"] == PROJECT["project"]["urls"]["Source"]
    assert [author["name"] for author in citation["authors"]] == [a["name"] for a in PROJECT["project"]["authors"]]
    assert f"## {citation['version']}" in (ROOT / "CHANGELOG.md").read_text()


def test_what_publishes_waits_for_everything_and_may_do_nothing_else():
    jobs = workflow("wheels.yml")
    assert set(jobs["publish"]["needs"]) == set(jobs) - {"publish"}
    assert jobs["publish"]["permissions"] == {"id-token": "write"}
    assert not [name for name, job in jobs.items() if name != "publish" and "permissions" in job]


def test_actions_are_pinned_to_commits():
    for file in sorted((ROOT / ".github/workflows").glob("*.yml")):
        for used in re.findall(r"uses: (.*)", file.read_text()):
            assert re.fullmatch(r"\./.*|[\w./-]+@[0-9a-f]{40}  # v[\d.]+", used), f"{file.name}: {used}"


SETUP = runpy.run_path(str(ROOT / "setup.py"), run_name="setup")


def git(folder, *command):
    options = ("-c", "user.name=A", "-c", "user.email=a@example.org", "-c", "protocol.file.allow=always")
    done = subprocess.run(["git", *options, *command], cwd=folder, capture_output=True, check=True)
    return done.stdout


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A repository with two commits of the file that knows the version."""
    folder = tmp_path_factory.mktemp("checkout")
    file = folder / "sa_plus_plus" / "_version.py"
    file.parent.mkdir()
    shutil.copy(_version.__file__, file)
    shutil.copy(ROOT / ".gitattributes", folder)
    git(folder, "init", "-q")
    for name in ("a", "b"):
        (folder / name).touch()
        git(folder, "add", ".")
        git(folder, "commit", "-qm", name)
    return folder


def version_of(folder):
    return runpy.run_path(str(folder / "sa_plus_plus" / "_version.py"))["version"]()


def test_a_version_tells_commits_apart(checkout, tmp_path):
    commit = git(checkout, "log", "-1", "--format=%h").decode().strip()
    version = version_of(checkout)
    assert re.fullmatch(rf"{_version.RELEASE}\.dev\d{{14}}\+g{commit}", version)
    assert Version("0.0.9") < Version(version) < Version(_version.RELEASE)
    git(tmp_path, "clone", "-q", "--depth=1", f"file://{checkout}", "shallow")
    assert version_of(tmp_path / "shallow") == version
    (tmp_path / "shallow" / "a").write_text("changed")
    assert version_of(tmp_path / "shallow") == f"{version}.modified"

    with tarfile.open(fileobj=io.BytesIO(git(checkout, "archive", "HEAD"))) as archive:
        archive.extractall(tmp_path / "archive", filter="data")
    assert version_of(tmp_path / "archive") == version
    shutil.rmtree(tmp_path / "shallow" / ".git")
    assert version_of(tmp_path / "shallow") == f"{_version.RELEASE}.dev0+unknown"

    SETUP["write_version"](tmp_path / "shallow", version)  # as a wheel and an sdist have it
    assert version_of(tmp_path / "shallow") == version


def test_the_tagged_commit_is_the_release(checkout, tmp_path):
    git(tmp_path, "clone", "-q", f"file://{checkout}", "tagged")
    tagged = tmp_path / "tagged"
    for tag in ("v9", f"v{_version.RELEASE}"):
        assert version_of(tagged) != _version.RELEASE
        git(tagged, "tag", tag)
    assert version_of(tagged) == _version.RELEASE
    assert _version.of_commit(git(tagged, "log", "-1", "--format=%ct %h %D").decode().strip()) == _version.RELEASE
    (tagged / "a").write_text("changed")
    assert version_of(tagged).endswith(".modified")


def test_the_readme_of_the_package_has_addresses(monkeypatch):
    monkeypatch.chdir(ROOT)
    readme, text = (ROOT / "README.md").read_text(), SETUP["long_description"]("0.1.0.dev1+gabc123")
    source = PROJECT["project"]["urls"]["Source"]
    paths = re.findall(r"\]\((?!https://)([^)#]+)", readme)
    assert len(paths) > 5
    assert re.findall(r"\]\((?!https://).*", text) == []
    for path in paths:
        assert (ROOT / path).exists()
        kind = "raw" if path.endswith(".png") else "blob"
        assert f"]({source}/{kind}/abc123/{path}" in text
    assert re.findall(r"```.*?```", text, flags=re.S) == re.findall(r"```.*?```", readme, flags=re.S)
    for version, at in (("0.1.0", "v0.1.0"), ("0.1.0.dev0+unknown", "main")):
        assert f"{source}/blob/{at}/docs/" in SETUP["long_description"](version)


def test_every_extra_is_on_the_page_and_every_extra_that_is_named_is_one():
    extras, files = set(PROJECT["project"]["optional-dependencies"]), [ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
    files += [ROOT / ".ci/run", ROOT / "noxfile.py", ROOT / "pyproject.toml"]
    for folder, kind in (("docs", "*.md"), ("configs", "*.py"), ("experiments", "*.py"), ("benchmarks", "*.py")):
        files += (ROOT / folder).rglob(kind)
    named = {
        extra.strip()
        for file in files
        for names in re.findall(r"(?:\.|sa_plus_plus)\[([a-z, ]+)\]", file.read_text())
        for extra in names.split(",")
    }
    assert named <= extras
    assert {"experiments", "dev"} <= named
    table = re.findall(r"^\| (`.*) \| .* \|$", (ROOT / "docs/getting_started.md").read_text(), flags=re.M)
    assert extras <= {name.strip(" `") for row in table for name in row.split(",")}
    by_name = {
        extra: {re.split(r"[>\[]", package)[0] for package in packages}
        for extra, packages in PROJECT["project"]["optional-dependencies"].items()
    }
    fixed = {"flax", "orbax-checkpoint", "tensorflow-datasets", "ml-collections", "chex", "absl-py"}
    assert fixed <= by_name["all"] | by_name["experiments"] | by_name["tfds"]
