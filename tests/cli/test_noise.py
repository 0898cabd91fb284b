"""Warnings that no user can act on are silent, where they really arise; others are not."""

from __future__ import annotations

import subprocess
import sys

import pytest

PROVOKE = """
import warnings
import torch
from torch import fx

torch.meshgrid(torch.zeros(1), torch.zeros(1))
fx._symbolic_trace.is_fx_tracing()  # says something since some version
warnings.warn("of the user's own code")
"""


@pytest.mark.parametrize("silent", [False, True])
def test_noise_is_silent_and_other_warnings_are_not(silent):
    code = f"import repr_det.cli\n{PROVOKE}" if silent else PROVOKE
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ("in an upcoming release" in done.stderr) != silent
    assert not (silent and "is_fx_tracing will return" in done.stderr)
    assert "of the user's own code" in done.stderr
