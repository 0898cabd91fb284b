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
    parts = ["--parts", "steps", "whole", "kept", "ranking", "growth", "loading", "memory"]
    command = [sys.executable, BENCHMARKS / "bench.py", "quick", *parts]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    line = next(line for line in printed.splitlines() if line.startswith("| C^3(32), 64"))
    full, masked, holding, smaller, multiply_adds = (
        float(cell.split()[0]) for cell in line.split("|")[2:-1]
    )
    assert all(0.5 < ratio < 2 for ratio in (full, masked, smaller))
    # All that reads a filter of this network is known.
    assert holding == 0
    # The stem is whole; 19 of the other 64 filters are gone, and what read them.
    assert 0.7 <= multiply_adds <= 0.8
    cells = r" +([\d.]+) \((\d+)\) \|" * 4 + r" +([\d.]+) \|"
    memory = re.search(r"peak memory.*\n.*\n\| C[^|]*\|" + cells, printed)
    *variants, pruned = map(float, memory.groups())
    tensors, processes = variants[::2], variants[1::2]
    # At least the images and what the first conv makes of them, forward and backward.
    assert all(16 < peak <= tensors[0] + pruned + 0.2 for peak in tensors)
    assert all(100 < peak < 4000 for peak in processes)
    kept = re.search(r"memory kept.*\n.*\n\| on a CPU +\| +([\d.]+) \(", printed)
    assert 0.3 < float(kept[1]) < 1.5
    # Only the full size records.
    assert all(path.read_bytes() == before for path, before in recorded.items())
