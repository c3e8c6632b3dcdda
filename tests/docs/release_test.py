"""What a release says of itself in several places is the same in all of them."""

import pathlib
import re
import tomllib

import yaml

import sa_plus_plus

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
    assert citation["version"] == sa_plus_plus.__version__
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
