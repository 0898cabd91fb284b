"""The device of tests marked ``gpu``: set by ``pytest --device``, for subprocesses, too."""

from __future__ import annotations

import os

import torch

DEVICE = torch.device(os.environ.get("REPR_DET_TEST_DEVICE", "cpu"))
