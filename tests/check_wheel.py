"""Build the wheel, check its tag, install it for every Python found, without a compiler in reach, and use it.

    python tests/check_wheel.py [dist/sa_plus_plus-0.1.0-cp311-abi3-*.whl] [python3.11 python3.12 ...]

Takes minutes. Not collected by pytest. A wheel that is given is not built. auditwheel, if it is installed, says on
which Linux systems the wheel runs. Without Pythons: this one and those of pyenv from 3.11 on,
one for each minor version.
"""

import importlib.util
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile

ROOT = pathlib.Path(__file__).resolve().parent.parent


def main(arguments: list[str]) -> None:
    wheels = [pathlib.Path(argument).resolve() for argument in arguments if argument.endswith(".whl")]
    pythons = [argument for argument in arguments if not argument.endswith(".whl")]
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        started = time.perf_counter()
        [wheel] = wheels or [build(folder)]
        check_contents(wheel)
        print(f"{wheel.name}, {wheel.stat().st_size:,} bytes, after {time.perf_counter() - started:.0f} s")
        for python in pythons or found():
            started = time.perf_counter()
            check(python, wheel, folder)
            print(f"  {time.perf_counter() - started:.0f} s")


def build(folder: pathlib.Path) -> pathlib.Path:
    """The wheel, from a copy without what was compiled in place."""
    source = folder / "source"
    ignored = shutil.ignore_patterns(".*", "build", "*.egg-info", "_native.*", "results", "shared", "__pycache__")
    shutil.copytree(ROOT, source, ignore=ignored)
    subprocess.run([sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", folder, source], check=True)
    [wheel] = folder.glob("*.whl")
    return wheel


def check_contents(wheel: pathlib.Path) -> None:
    """The tag, the compiled kernel, and nothing but the library."""
    assert "-cp311-abi3-" in wheel.name, wheel.name
    names = zipfile.ZipFile(wheel).namelist()
    assert [n for n in names if "_native" in n and n.endswith(".so")], f"no compiled kernel in {wheel.name}"
    if sys.platform == "linux":
        assert "-manylinux_2_" in wheel.name, f"{wheel.name} is for this system alone: PyPI refuses it"
        check_tag(wheel)
    assert all(n.startswith(("sa_plus_plus/", "sa_plus_plus-")) and not n.endswith((".cc", ".h")) for n in names), names


def check_tag(wheel: pathlib.Path) -> None:
    """auditwheel finds that the wheel runs where its tag says."""
    if importlib.util.find_spec("auditwheel") is None:
        print("the tag is not checked: pip install auditwheel")
        return
    shown = subprocess.run(
        [sys.executable, "-m", "auditwheel", "show", wheel], capture_output=True, text=True, check=True
    )
    tag = re.search(r'consistent\s+with\s+the\s+following\s+platform\s+tag:\s+"(\w+)"', shown.stdout)
    assert tag, shown.stdout
    assert tag[1] in wheel.stem, f"{wheel.name}, but auditwheel says {tag[1]}"


def found() -> list[str]:
    """This Python and one of pyenv for each other minor version."""
    versions = pathlib.Path(os.environ.get("PYENV_ROOT", pathlib.Path.home() / ".pyenv"), "versions")
    here = f"{sys.version_info.major}.{sys.version_info.minor}"
    pythons = {here: sys.executable}
    for file in sorted(versions.glob("3.*/bin/python")):
        minor = ".".join(file.parent.parent.name.split(".")[:2])
        if int(minor.split(".")[1].rstrip("t")) >= 11 and not minor.endswith("t"):
            pythons.setdefault(minor, str(file))
    return list(pythons.values())


def check(python: str, wheel: pathlib.Path, folder: pathlib.Path) -> None:
    """Install the wheel into a fresh environment of that Python and run `use_wheel.py` there, with no other PATH."""
    print(python, flush=True)
    environment = pathlib.Path(tempfile.mkdtemp(dir=folder))
    subprocess.run([python, "-m", "venv", environment], check=True)
    inside = str(environment / "bin" / "python")
    bare = {"PATH": str(environment / "bin"), "HOME": str(folder)}
    packages = ["--only-binary=:all:", str(wheel), "safetensors", "flatbuffers"]
    kept = {k: v for k, v in os.environ.items() if k.startswith("PIP_") or k.lower().endswith("_proxy") or "CERT" in k}
    home = {"HOME": os.environ.get("HOME", str(folder))}  # of pip's settings
    subprocess.run([inside, "-m", "pip", "install", "-qq", *packages], check=True, env={**kept, **bare, **home})
    subprocess.run([inside, "-P", ROOT / "tests" / "use_wheel.py"], check=True, env=bare, cwd=folder)
    shutil.rmtree(environment)


if __name__ == "__main__":
    main(sys.argv[1:])
