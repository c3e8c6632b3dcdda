"""Command lines in processes of their own, forked from one that has imported what they import.

`python -m experiments.main` takes some three seconds before its first line runs, and the tests call such commands a
hundred times. Each runs here as `python -m` would run it, with flags, output, signals and exit status of its own, but
in a fork of a process whose imports are done and whose JAX has not begun. Some tests of every command start it with a
new interpreter nevertheless, by `real=True`.
"""

import atexit
import contextlib
import faulthandler
import importlib.metadata
import multiprocessing
import os
import pathlib
import runpy
import signal
import subprocess
import sys
import tempfile
import types

ROOT = pathlib.Path(__file__).resolve().parent.parent
PRELOADED = [
    "experiments.cli",
    "experiments.outputs.hooks",
    "matplotlib.pyplot",
    "safetensors.numpy",
    "sklearn.model_selection",
]
QUICK_COMPILATION = [  # XLA's, for the tests: their programs are small and run a few times, so compiling takes the time
    "--xla_backend_optimization_level=0",
    "--xla_cpu_parallel_codegen_split_count=1",  # one module of LLVM for each program
]
if importlib.metadata.version("jaxlib").startswith("0.10."):  # 0.12 has no such flag
    QUICK_COMPILATION.append("--xla_cpu_use_fusion_emitters=false")  # the older emitters compile three times as fast
SECONDS = 300  # that a command may take
_FORKS = multiprocessing.get_context("forkserver")


class Command:
    """One run of a command.

    Args:
      what: a module of this repository, such as `experiments.main`, or a file, such as `tests/killed.py`.
      arguments: of its command line.
      devices: how many CPU devices it sees.
      real: whether a new interpreter runs it.
      long: whether it computes for so long that XLA had better optimise its programs.
    """

    def __init__(
        self, what: str | pathlib.Path, *arguments: object, devices: int = 1, real: bool = False, long: bool = False
    ):
        self._output = tempfile.TemporaryDirectory()
        paths = [f"{self._output.name}/{name}" for name in ("stdout", "stderr")]
        for path in paths:  # a fork may be killed before it opens them
            pathlib.Path(path).touch()
        line, environment = [*map(str, (what, *arguments))], _environment(devices, long)
        if real:
            start = [] if line[0].endswith(".py") else ["-m"]
            with open(paths[0], "wb") as out, open(paths[1], "wb") as err:
                self._process = subprocess.Popen(
                    [sys.executable, *start, *line], cwd=ROOT, env=os.environ | environment, stdout=out, stderr=err
                )
            self._wait, self._status = self._process.wait, self._process.poll
        else:
            with contextlib.chdir(ROOT):  # where the forking process looks for modules, once it is started
                _FORKS.set_forkserver_preload(PRELOADED)
                self._process = _FORKS.Process(target=_run, args=(line, environment, paths))
                self._process.start()
            self._wait, self._status = self._process.join, lambda: self._process.exitcode
        self.pid, self.kill = self._process.pid, self._process.kill

    def running(self) -> bool:
        return self._status() is None

    def finish(self) -> types.SimpleNamespace:
        """What it left when it ended: `returncode` (minus the signal that killed it), `stdout`, `stderr`, `output`."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._wait(SECONDS)
        if self.running():
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGUSR1)  # a fork writes where each of its threads is
            self._wait_a_little()
            self.kill()
            self._wait()
            raise TimeoutError(f"killed after {SECONDS} s: {self._texts()}")
        out, err = self._texts()
        self._output.cleanup()
        return types.SimpleNamespace(returncode=self._status(), stdout=out, stderr=err, output=out + err)

    def _wait_a_little(self) -> None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._wait(2)

    def _texts(self) -> list[str]:
        return [pathlib.Path(self._output.name, name).read_text() for name in ("stdout", "stderr")]


def run(what: str | pathlib.Path, *arguments: object, **options: object) -> types.SimpleNamespace:
    """`Command(...).finish()`."""
    return Command(what, *arguments, **options).finish()


def _environment(devices: int, long: bool) -> dict[str, str]:
    flags = [*([] if long else QUICK_COMPILATION), f"--xla_force_host_platform_device_count={devices}"]
    return {"PYTHONPATH": str(ROOT), "XLA_FLAGS": " ".join(flags)}


def _run(line: list[str], environment: dict[str, str], paths: list[str]) -> None:
    """In the fork: what a new interpreter would do with this line."""
    for descriptor, path in enumerate(paths, start=1):
        with open(path, "wb") as file:
            os.dup2(file.fileno(), descriptor)
    faulthandler.register(signal.SIGUSR1, sys.__stderr__, chain=False)
    os.environ.update(environment)
    sys.argv[:] = line
    try:
        if line[0].endswith(".py"):
            sys.path.insert(0, str(ROOT / "tests"))
            runpy.run_path(line[0], run_name="__main__")
        else:
            runpy.run_module(line[0], run_name="__main__", alter_sys=True)
    finally:
        atexit._run_exitfuncs()  # which processes of multiprocessing leave out
