"""Packaging: kernels/ and patches/ at the top level install inside the megatron_mhc package."""

import re
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).resolve().parent
version = re.search(r'__version__ = "(.+)"', (here / "megatron_mhc/__init__.py").read_text())[1]

setup(
    name="megatron-mhc",
    version=version,
    description="Manifold-constrained hyper-connections (mHC) for Megatron-core on Hopper GPUs",
    long_description=(here / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.12",
    packages=[
        *find_packages(include=["megatron_mhc", "megatron_mhc.*"]),
        "megatron_mhc.kernels",
        "megatron_mhc.patches",
    ],
    package_dir={"megatron_mhc.kernels": "kernels", "megatron_mhc.patches": "patches"},
    install_requires=[
        "torch>=2.11",
        "megatron-core>=0.19,<0.20",
        "numpy",
        "packaging",
        "psutil",
        "tensorboard",
        "matplotlib",
        "rich",
    ],
    extras_require={
        "te": ["transformer-engine[core_cu13,pytorch]>=2.20"],
        "modelopt": ["nvidia-modelopt>=0.47"],
        "convert": ["safetensors", "transformers>=5.17"],
        "dev": [
            "greenlet",
            "hypothesis",
            "pytest",
            "pytest-timeout",
            "pytest-xdist",
            "ruff",
            "sentencepiece",
            "transformers>=5.17",
        ],
    },
)
