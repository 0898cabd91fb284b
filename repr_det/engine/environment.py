"""The machine and the versions that a measurement was made with."""

from __future__ import annotations

import importlib.metadata
import platform
import re
from pathlib import Path
from typing import Any

import detectron2
import torch

_PACKAGES = ("torchvision", "numpy", "pycocotools", "repr_det")


def environment(device: str) -> dict[str, Any]:
    """The name of a device and the versions of packages, for JSON.

    Args:
        device: torch's name of it, ``"cpu"`` or ``"cuda"``.

    Returns:
        ``{"device": name, "versions": {"python": ..., "torch": ..., ...}}``. The version of a
        package that runs from its source folder is ``"not installed"``.
    """
    # torch.__version__ includes the CUDA version. Detectron2 is packaged under several names.
    versions = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "detectron2": detectron2.__version__,
    }
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return {"device": _name_of(device), "versions": versions}


def _name_of(device: str) -> str:
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file() and (found := re.search(r"model name\s*: (.*)", info.read_text())):
        name = found[1].strip()
    # A name may be the same for several generations; the width of their vectors is not.
    widest = torch.backends.cpu.get_cpu_capability()
    return f"{name}, {widest}, {torch.get_num_threads()} thread(s)"
