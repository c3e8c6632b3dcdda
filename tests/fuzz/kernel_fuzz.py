"""Builds the random tests of the compiled code under sanitizers: `kernel_fuzz.cc`, `calls_fuzz.cc`."""

import pathlib
import shutil
import subprocess

ROOT = pathlib.Path(__file__).resolve().parents[2]
SOURCE = ROOT / "sa_plus_plus/sparse/csrc"
PROGRAMS = ("kernel_fuzz", "calls_fuzz")  # random products; random calls, most of them malformed


def instructions() -> dict[str, list[str]]:
    """The compiler's flags for each source, from setup.py, which cannot be imported without being run."""
    lines = (ROOT / "setup.py").read_text().split("class ")[0].split("FLAGS = ")[1]
    values: dict[str, object] = {}
    exec("FLAGS = " + lines, values)
    return values["INSTRUCTIONS"]


def build(directory: pathlib.Path, optimisation: str = "-O0") -> list[pathlib.Path]:
    """The programs, in the order of `PROGRAMS`.

    Args:
      directory: where they are built.
      optimisation: the compiler's flag: "-O1" takes minutes and makes them several times as fast.

    Raises:
      LookupError: there is no C++ compiler, or it has no sanitizers.
      subprocess.CalledProcessError: the sources do not compile without warnings.
    """
    compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        raise LookupError("no C++ compiler")
    machine = subprocess.run([compiler, "-dumpmachine"], capture_output=True, text=True).stdout
    sanitizers = ["-fsanitize=address,undefined,float-cast-overflow", "-fno-sanitize-recover=all"]
    flags = [optimisation, "-std=c++17", *sanitizers, f"-I{SOURCE}"]
    probe = directory / "probe.cc"
    probe.write_text("int main() {}")
    if subprocess.run([compiler, *flags, probe, "-o", directory / "probe"], capture_output=True).returncode:
        raise LookupError(f"{compiler} has no sanitizers")
    files = [file for file in SOURCE.glob("*.cc") if file.stem != "ffi"]
    files += [ROOT / f"tests/fuzz/{name}.cc" for name in PROGRAMS]
    objects = {file.stem: directory / f"{file.stem}.o" for file in files}
    jobs = []
    for file in files:
        extra = instructions().get(file.stem, []) if machine.startswith("x86_64") else []
        # What gcc says of its own headers is left out.
        strict = ["-Wall", "-Wextra", "-Werror", "-Wno-maybe-uninitialized", "-Wno-uninitialized"]
        jobs.append(subprocess.Popen([compiler, *flags, *extra, *strict, "-c", file, "-o", objects[file.stem]]))
    for job in jobs:
        if job.wait():
            raise subprocess.CalledProcessError(job.returncode, job.args)
    shared = [path for name, path in objects.items() if name not in PROGRAMS]
    for name in PROGRAMS:
        linked = [*shared, objects[name], "-pthread", "-o", directory / name]
        subprocess.run([compiler, *flags, *linked], check=True)
    return [directory / name for name in PROGRAMS]
