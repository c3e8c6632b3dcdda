"""The compiled kernel, the version, and the README as PyPI shows it; all else is in pyproject.toml."""

import concurrent.futures
import importlib.util
import os
import pathlib
import platform
import re
import runpy
import shutil
import subprocess
import sys
import tempfile
import tomllib

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from setuptools.command.sdist import sdist
from setuptools.errors import CompileError

VERSION = pathlib.Path("sa_plus_plus/_version.py")
SOURCES = pathlib.Path("sa_plus_plus/sparse/csrc")
FLAGS = ["-O3", "-g0", "-std=c++17", "-DNDEBUG", "-ffp-contract=fast"]


class BuildKernels(build_ext):
    """Compiles each source with the flags it needs; where that fails the package is installed without."""

    def build_extension(self, ext: Extension) -> None:
        if self.compiler.compiler_type != "unix":
            raise CompileError("the kernel is written for gcc and clang")
        if not shutil.which(self.compiler.compiler[0]):  # what Python itself was made with is not here
            found = {"compiler": "cc", "compiler_so": "cc -fPIC", "linker_so": "c++ -shared"}
            found |= {"compiler_cxx": "c++", "compiler_so_cxx": "c++ -fPIC", "linker_so_cxx": "c++ -shared"}
            known = self.compiler.executables
            self.compiler.set_executables(**{name: command for name, command in found.items() if name in known})
        jaxlib = importlib.util.find_spec("jaxlib")
        # System headers to the compiler, which gives no warnings about those.
        headers = ["-isystem", str(pathlib.Path(jaxlib.origin).parent / "include")] if jaxlib and jaxlib.origin else []
        targets = runpy.run_path(str(SOURCES / "targets.py"))["flags"](platform.machine())
        each = {name: [str(SOURCES / "target.cc"), name, flags] for name, flags in targets.items()}
        rest = [[source, "", []] for source in ext.sources if pathlib.Path(source).name != "target.cc"]

        def compiled(job: tuple[str, str, list[str]]) -> list[str]:
            source, folder, flags = job
            where, flags = str(pathlib.Path(self.build_temp, folder)), FLAGS + flags
            return self.compiler.compile([source], where, extra_postargs=headers + flags, depends=ext.depends)

        for folder in ("", *targets):
            pathlib.Path(self.build_temp, folder, SOURCES).mkdir(parents=True, exist_ok=True)
        with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:  # threads that wait for compilers
            objects = [file for files in pool.map(compiled, [*each.values(), *rest]) for file in files]
        target = pathlib.Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        self.compiler.link_shared_object(objects, str(target), target_lang="c++")


class BuildPython(build_py):
    """Writes the version into the package, but for an editable install, whose commits go on."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            write_version(pathlib.Path(self.build_lib), self.distribution.get_version())


class Sdist(sdist):
    """The same for an sdist."""

    def make_release_tree(self, base_dir: str, files: list[str]) -> None:
        super().make_release_tree(base_dir, files)
        write_version(pathlib.Path(base_dir), self.distribution.get_version())


def write_version(folder: pathlib.Path, version: str) -> None:
    """Make a copy of the package say that it has this version."""
    file = folder / VERSION
    text = file.read_text()
    file.unlink()  # it may be a hard link to the one in the checkout
    file.write_text(re.sub(r'^_BUILT = ".*"', f'_BUILT = "{version}"', text, count=1, flags=re.M))


class Wheel(bdist_wheel):
    """Names the Linux systems that the wheel is for, as PyPI wants it: manylinux and the oldest glibc, by auditwheel.

    Where auditwheel finds none, or is not installed, the wheel stays one for this system alone.
    """

    def run(self) -> None:
        super().run()
        if sys.platform != "linux" or importlib.util.find_spec("auditwheel") is None:
            return
        for command, _, name in self.distribution.dist_files:
            if command == "bdist_wheel" and "-linux_" in name:
                self.repair(pathlib.Path(name))

    def repair(self, wheel: pathlib.Path) -> None:
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, "-m", "auditwheel", "repair", "--only-plat", "-w", folder, str(wheel)]
            done = subprocess.run(command, capture_output=True, text=True)
            repaired = list(pathlib.Path(folder).glob("*.whl"))
            if done.returncode or len(repaired) != 1:
                self.announce(f"auditwheel: {done.stderr.strip()[-500:]}", level=3)
                return
            wheel.unlink()
            shutil.move(repaired[0], wheel.parent)


def long_description(version: str) -> str:
    """The README with addresses in place of paths, which PyPI does not know."""
    source = tomllib.loads(pathlib.Path("pyproject.toml").read_text())["project"]["urls"]["Source"]
    commit = re.search(r"\+g([0-9a-f]+)", version)
    at = commit[1] if commit else "main" if "dev" in version else f"v{version}"
    parts = pathlib.Path("README.md").read_text().split("```")  # prose and code alternate
    for i in range(0, len(parts), 2):
        parts[i] = re.sub(r"(!\[[^\]]*\])\(([\w./-]+)\)", rf"\1({source}/raw/{at}/\2)", parts[i])
        parts[i] = re.sub(r"\]\(([\w./-]+(#[\w-]+)?)\)", rf"]({source}/blob/{at}/\1)", parts[i])
    return "```".join(parts)


def main() -> None:
    version = runpy.run_path(str(VERSION))["version"](pathlib.Path.cwd())
    kernel = Extension(
        "sa_plus_plus.sparse._native",
        sources=sorted(map(str, SOURCES.glob("*.cc"))),
        depends=sorted(str(file) for end in ("h", "inc", "def") for file in SOURCES.glob(f"*.{end}")),
        optional=True,
        py_limited_api=True,  # it uses nothing of Python's at all
    )
    setup(
        version=version,
        long_description=long_description(version),
        long_description_content_type="text/markdown",
        ext_modules=[kernel],
        cmdclass={"build_ext": BuildKernels, "build_py": BuildPython, "sdist": Sdist, "bdist_wheel": Wheel},
        options={"bdist_wheel": {"py_limited_api": "cp311"}},
    )


if __name__ == "__main__":
    main()
