"""The command behind `make bench` runs, and what it prints says what it measured."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.mark.slow
def test_quick_size():
    recorded = {path: path.read_bytes() for path in BENCHMARKS.iterdir() if path.is_file()}
    parts = ["--parts", "steps", "whole", "ranking", "growth", "loading", "memory"]
    command = [sys.executable, BENCHMARKS / "bench.py", "quick", *parts]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    steps = re.search(
        r"\| C\^3\(32\), 64 x 32 px \| ([^|]*)\|([^|]*)\|([^|]*)\| 0\.(\d\d) \|", printed
    )
    ratios = [float(cell.split()[0]) for cell in steps.groups()[:3]]
    assert all(0.5 < ratio < 2 for ratio in ratios)
    # 30 % of 64 filters are gone, 0.7 * 0.7 of what lies between them.
    assert 70 <= int(steps[4]) <= 80
    memory = re.search(r"peak memory.*\n.*\n\| C[^|]*\|" + r" (\d+) \|" * 4, printed)
    assert all(100 < int(mebibytes) < 4000 for mebibytes in memory.groups())
    # Only the full size records.
    assert all(path.read_bytes() == before for path, before in recorded.items())
