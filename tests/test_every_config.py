"""Every shipped config trains through a drop and a return, in one process and in two."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.documents import ROOT
from tests.every_config import CONFIGS


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_every_config_trains(tmp_path, processes):
    command = [sys.executable, "-m", "tests.every_config", str(processes), str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    environment["REPR_DET_CACHE"] = str(tmp_path / "cache")
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    assert [line for line in done.stdout.splitlines() if line.endswith(".yaml: trained")] == [
        f"{name}: trained" for name in CONFIGS
    ]
