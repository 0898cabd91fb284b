"""The package ``repr-det``. Settings of the tools are in ``pyproject.toml``."""

from __future__ import annotations

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = re.search(
    r'^__version__ = "(.+)"$', (HERE / "repr_det" / "__init__.py").read_text(), re.MULTILINE
)[1]

setup(
    name="repr-det",
    version=VERSION,
    author="repr_det maintainers",
    description="RePr for Detectron2: train, drop redundant filters, bring them back orthogonal",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    keywords=[
        "RePr",
        "Detectron2",
        "object detection",
        "pruning",
        "orthogonal initialization",
        "training schedule",
        "COCO evaluation",
        "PyTorch",
    ],
    classifiers=[
        "Development Status :: 4 - Beta",
        "Environment :: Console",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.10",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Topic :: Scientific/Engineering :: Image Recognition",
        "Typing :: Typed",
    ],
    python_requires=">=3.10",
    # configs/ is next to the package in a checkout, where people look for it, and inside the
    # package in a wheel, so that bare names such as repr_faster_rcnn.yaml work in both.
    packages=[*find_packages(include=["repr_det", "repr_det.*"]), "repr_det.configs"],
    package_dir={"repr_det.configs": "configs"},
    package_data={
        "repr_det": ["py.typed"],
        "repr_det.configs": ["*.yaml", "**/*.yaml"],
        "repr_det.report": ["templates/*.html"],
    },
    entry_points={"console_scripts": ["repr-det = repr_det.cli:main"]},
    # Detectron2 is not listed: it has no release on the package index, so pip could not install it
    # from here. `repr-det install-detectron2` does, and lists what Detectron2 itself depends on.
    # `make test-lowest` runs the tests with the lowest versions of this list.
    install_requires=[
        "faster-coco-eval>=1.6.5",
        "fvcore>=0.1.5.post20221221",
        "iopath>=0.1.9",
        "Jinja2>=3.1",
        "matplotlib>=3.9",
        "numpy>=1.26",
        "opencv-python>=4.9",
        "pandas>=2.2.1",
        "Pillow>=10.1",
        "pycocotools>=2.0.7",
        "PyYAML>=6.0.1",
        "scipy>=1.12",
        "seaborn>=0.13.2",
        "tabulate>=0.9",
        "tensorboard>=2.14",
        # Before 2.9 a model with torch.cond cannot be traced (pytorch/pytorch#158077). Before 2.8
        # the end of a run in several processes may hang (pytorch/pytorch#154976).
        "torch>=2.9",
        "torchvision>=0.24",
        "tqdm>=4.66",
    ],
    extras_require={
        "dev": [
            "hypothesis>=6.80",
            "mypy>=1.18",
            "pytest>=8.0",
            "pytest-xdist>=3.8",
            # One minor version, because the formatter's style may change with the next.
            "ruff>=0.17,<0.18",
            # For benchmarks/models.py.
            "timm>=1.0",
            # From 70.1 on setuptools builds wheels by itself; up to 80 it brings the pkg_resources
            # that Detectron2's model zoo imports.
            "setuptools>=70.1,<81",
            "types-PyYAML",
            "types-tabulate",
            "wheel>=0.40",
        ],
        "docs": [
            "furo>=2024.8.6",
            "myst-parser>=4.0",
            "sphinx>=7.4",
        ],
    },
)
