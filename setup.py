"""The compiled kernel; all else about the package is in pyproject.toml."""

import importlib.util
import pathlib
import platform
import shutil

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

SOURCES = pathlib.Path("sa_plus_plus/sparse/csrc")
FLAGS = ["-O3", "-g0", "-std=c++17", "-DNDEBUG", "-ffp-contract=fast"]
AVX2 = ["-mavx2", "-mfma", "-mprfchw"]  # processors that cannot prefetch for writing skip the instruction
AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mprfchw", "-mprefer-vector-width=512"]
INSTRUCTIONS = {  # one source, compiled for several processors; which of them runs is decided there
    "kernel_avx2": AVX2,
    "kernel_avxvnni": [*AVX2, "-mavxvnni"],
    "kernel_avx512": AVX512,
    "kernel_avx512vnni": [*AVX512, "-mavx512vnni"],
    "kernel_avx512bf16": [*AVX512, "-mavx512bf16"],
    "kernel_amx": [*AVX512, "-mamx-tile", "-mamx-int8", "-mamx-bf16"],
}


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
        headers = [str(pathlib.Path(jaxlib.origin).parent / "include")] if jaxlib and jaxlib.origin else []
        x86 = platform.machine() in ("x86_64", "AMD64")
        objects = []
        for source in ext.sources:
            flags = FLAGS + (INSTRUCTIONS.get(pathlib.Path(source).stem, []) if x86 else [])
            objects += self.compiler.compile(
                [source], self.build_temp, include_dirs=headers, extra_postargs=flags, depends=ext.depends
            )
        target = pathlib.Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        self.compiler.link_shared_object(objects, str(target), target_lang="c++")


setup(
    ext_modules=[
        Extension(
            "sa_plus_plus.sparse._native",
            sources=sorted(map(str, SOURCES.glob("*.cc"))),
            depends=sorted(map(str, [*SOURCES.glob("*.h"), *SOURCES.glob("*.inc")])),
            optional=True,
            py_limited_api=True,  # it uses nothing of Python's at all
        )
    ],
    cmdclass={"build_ext": BuildKernels},
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
