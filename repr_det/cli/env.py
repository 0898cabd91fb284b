"""Print what a bug report needs: versions, devices, how PyTorch was built."""

from __future__ import annotations

import argparse
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import repr_det

OTHERS = ("matplotlib", "pandas", "pycocotools", "faster-coco-eval", "scipy", "tensorboard")
"""Packages that the commands use and that Detectron2's collector does not print."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command has no arguments."""


def run(args: argparse.Namespace) -> None:
    """Print what Detectron2's collector finds, or torch's where there is no Detectron2."""
    print(f"repr_det {repr_det.__version__} @{Path(repr_det.__file__).parent}")
    print(f"Python {sys.version}")
    for name in OTHERS:
        print(f"{name} {_version(name)}")
    try:
        from detectron2.utils.collect_env import collect_env_info
    except ImportError as error:
        print(f"Detectron2 is missing ({error}). Run `repr-det install-detectron2`.")
    else:
        print(collect_env_info())
        return
    try:
        from torch.utils.collect_env import get_pretty_env_info
    except ImportError as error:
        print(f"PyTorch is missing ({error}).")
    else:
        print(get_pretty_env_info())


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "is not installed"
