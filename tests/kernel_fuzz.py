"""Builds `kernel_fuzz.cc`, random products through the compiled kernels, under sanitizers."""

import pathlib
import shutil
import subprocess

ROOT = pathlib.Path(__file__).resolve().parent.parent
SOURCE = ROOT / "sa_plus_plus/sparse/csrc"


def instructions() -> dict[str, list[str]]:
    """The compiler's flags for each source, from setup.py, which cannot be imported without being run."""
    lines = (ROOT / "setup.py").read_text().split("class ")[0].split("FLAGS = ")[1]
    values: dict[str, object] = {}
    exec("FLAGS = " + lines, values)
    return values["INSTRUCTIONS"]


def build(directory: pathlib.Path) -> pathlib.Path:
    """The program, below `directory`.

    Raises:
      LookupError: there is no C++ compiler, or it has no sanitizers.
      subprocess.CalledProcessError: the sources do not compile without warnings.
    """
    compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        raise LookupError("no C++ compiler")
    machine = subprocess.run([compiler, "-dumpmachine"], capture_output=True, text=True).stdout
    flags = ["-O0", "-std=c++17", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", f"-I{SOURCE}"]
    probe = directory / "probe.cc"
    probe.write_text("int main() {}")
    if subprocess.run([compiler, *flags, probe, "-o", directory / "probe"], capture_output=True).returncode:
        raise LookupError(f"{compiler} has no sanitizers")
    files = [file for file in SOURCE.glob("*.cc") if file.stem != "ffi"] + [ROOT / "tests/kernel_fuzz.cc"]
    objects = [directory / f"{file.stem}.o" for file in files]
    jobs = []
    for file, result in zip(files, objects, strict=True):
        extra = instructions().get(file.stem, []) if machine.startswith("x86_64") else []
        # What gcc says of its own headers is left out.
        strict = ["-Wall", "-Wextra", "-Werror", "-Wno-maybe-uninitialized", "-Wno-uninitialized"]
        jobs.append(subprocess.Popen([compiler, *flags, *extra, *strict, "-c", file, "-o", result]))
    for job in jobs:
        if job.wait():
            raise subprocess.CalledProcessError(job.returncode, job.args)
    subprocess.run([compiler, *flags, *objects, "-pthread", "-o", directory / "fuzz"], check=True)
    return directory / "fuzz"
