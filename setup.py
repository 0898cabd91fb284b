"""The package ``repr-det``. Settings of ruff and pytest are in ``pyproject.toml``."""

from __future__ import annotations

from setuptools import find_packages, setup

setup(
    name="repr-det",
    version="0.1.0",
    description="RePr, training with filters that are dropped and come back, for Detectron2",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.10",
    # configs/ lies beside the package in a checkout, where people look for it, and inside the
    # package in a wheel, so that bare names such as repr_faster_rcnn.yaml work in both.
    packages=[*find_packages(include=["repr_det", "repr_det.*"]), "repr_det.configs"],
    package_dir={"repr_det.configs": "configs"},
    package_data={
        "repr_det.configs": ["*.yaml", "**/*.yaml"],
        "repr_det.report": ["templates/*.html"],
    },
    # Detectron2 is not listed: it has no release on the package index, so pip could not install it
    # from here. tools/install_detectron2.py does, and lists what Detectron2 itself depends on.
    install_requires=[
        "fvcore>=0.1.5",
        "iopath>=0.1.9",
        "Jinja2>=3.0",
        "matplotlib>=3.5",
        "numpy>=1.22",
        "opencv-python>=4.5",
        "Pillow>=7.1",
        "pycocotools>=2.0.6",
        "PyYAML>=5.1",
        "tensorboard>=2.10",
        "torch>=2.3",
        "torchvision>=0.18",
        "tqdm>=4.60",
    ],
    extras_require={
        "dev": [
            "hypothesis>=6.80",
            "pytest>=8.0",
            "pytest-xdist>=3.5",
            # One minor version, because the formatter's style may change with the next.
            "ruff>=0.17,<0.18",
            "scipy>=1.9",
            # From 70.1 on setuptools builds wheels by itself; up to 80 it brings the pkg_resources
            # that Detectron2's model zoo imports.
            "setuptools>=70.1,<81",
            "wheel>=0.40",
        ],
    },
)
