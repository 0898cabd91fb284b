"""Warnings that no user can act on are silent, where they really arise; others are not."""

from __future__ import annotations

import subprocess
import sys

import pytest

PROVOKE = """
import warnings
from torch import fx

fx._symbolic_trace.is_fx_tracing()
warnings.warn("of the user's own code")
"""


@pytest.mark.parametrize("silent", [False, True])
def test_noise_is_silent_and_other_warnings_are_not(silent):
    code = f"import repr_det.cli\n{PROVOKE}" if silent else PROVOKE
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ("is_fx_tracing will return" in done.stderr) != silent
    assert "of the user's own code" in done.stderr
