"""What a measurement was made on and with."""

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
    """The device's name and the versions of what computes, as JSON holds them.

    Args:
        device: what torch calls it, ``"cpu"`` or ``"cuda"``.

    Returns:
        ``{"device": name, "versions": {"python": ..., "torch": ..., ...}}``; a package that runs
        from its source folder is ``"not installed"``.
    """
    # torch's own word also says for which CUDA it was built, and Detectron2 has many packagers.
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
    # Names do not tell generations apart; what they can do at once makes the difference.
    widest = torch.backends.cpu.get_cpu_capability()
    return f"{name}, {widest}, {torch.get_num_threads()} thread(s)"
