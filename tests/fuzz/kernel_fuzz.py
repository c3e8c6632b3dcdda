"""Builds the random tests of the compiled code under sanitizers: `kernel_fuzz.cc`, `calls_fuzz.cc`."""

import pathlib
import runpy
import shutil
import subprocess

ROOT = pathlib.Path(__file__).resolve().parents[2]
SOURCE = ROOT / "sa_plus_plus/sparse/csrc"
target_flags = runpy.run_path(str(SOURCE / "targets.py"))["flags"]
PROGRAMS = ("kernel_fuzz", "calls_fuzz")  # random products; random calls, most of them malformed


def shared_symbols(file: pathlib.Path, target: str) -> list[str]:
    """What the linker could take from the object of one target for another: all that it defines beyond its functions.

    Args:
      file: the object.
      target: its name.
    """
    command = ["nm", "--extern-only", "--defined-only", "--format=posix", file]
    names = [
        line.split()[0]
        for line in subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    ]
    own = f"_ZN12sa_plus_plus{len(target)}{target}9functionsE"
    assert own in names, f"{file} does not define {own}"
    return [name for name in names if name.removeprefix("__odr_asan.") != own]


def build(directory: pathlib.Path, optimisation: str = "-O0", compiler: str | None = None) -> list[pathlib.Path]:
    """The programs, in the order of `PROGRAMS`.

    Args:
      directory: where they are built.
      optimisation: the compiler's flag: "-O1" takes minutes and makes them several times as fast.
      compiler: for another machine; by default the one that is here.

    Raises:
      LookupError: there is no C++ compiler, or it has no sanitizers.
      subprocess.CalledProcessError: the sources do not compile without warnings.
    """
    compiler = compiler or shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        raise LookupError("no C++ compiler")
    machine = subprocess.run([compiler, "-dumpmachine"], capture_output=True, text=True).stdout
    sanitizers = ["-fsanitize=address,undefined,float-cast-overflow", "-fno-sanitize-recover=all"]
    flags = [optimisation, "-std=c++17", *sanitizers, f"-I{SOURCE}"]
    probe = directory / "probe.cc"
    probe.write_text("int main() {}")
    if subprocess.run([compiler, *flags, probe, "-o", directory / "probe"], capture_output=True).returncode:
        raise LookupError(f"{compiler} has no sanitizers")
    files = [file for file in SOURCE.glob("*.cc") if file.stem not in ("ffi", "target")]
    files += [ROOT / f"tests/fuzz/{name}.cc" for name in PROGRAMS]
    sources: dict[str, list[object]] = {file.stem: [file] for file in files}
    sources |= {f"target_{name}": [SOURCE / "target.cc", *own] for name, own in target_flags(machine).items()}
    objects = {name: directory / f"{name}.o" for name in sources}
    # What gcc says of its own headers is left out.
    strict = ["-Wall", "-Wextra", "-Werror", "-Wno-maybe-uninitialized", "-Wno-uninitialized"]
    jobs = [
        subprocess.Popen([compiler, *flags, *strict, "-c", *sources[name], "-o", objects[name]]) for name in sources
    ]
    failed = [job for job in jobs if job.wait()]
    if failed:
        raise subprocess.CalledProcessError(failed[0].returncode, failed[0].args)
    shared = [path for name, path in objects.items() if name not in PROGRAMS]
    for name in PROGRAMS:
        linked = [*shared, objects[name], "-pthread", "-o", directory / name]
        subprocess.run([compiler, *flags, *linked], check=True)
    return [directory / name for name in PROGRAMS]
