"""Builds `kernel_fuzz.cc`, random products through the compiled kernels, under sanitizers."""

import pathlib
import shutil
import subprocess

ROOT = pathlib.Path(__file__).resolve().parent.parent
SOURCE = ROOT / "sa_plus_plus/sparse/csrc"
INSTRUCTIONS = {
    "kernel_avx2": ["-mavx2", "-mfma"],
    "kernel_avx512": ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma"],
}


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
        extra = INSTRUCTIONS.get(file.stem, []) if machine.startswith("x86_64") else []
        strict = ["-Wall", "-Wextra", "-Werror"]
        jobs.append(subprocess.Popen([compiler, *flags, *extra, *strict, "-c", file, "-o", result]))
    for job in jobs:
        if job.wait():
            raise subprocess.CalledProcessError(job.returncode, job.args)
    subprocess.run([compiler, *flags, *objects, "-o", directory / "fuzz"], check=True)
    return directory / "fuzz"
