"""Every shipped config trains through a drop and a return, in one process and in two."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

import pytest

from tests.documents import ROOT
from tests.every_config import CONFIGS


def command(processes, folder, *words):
    return [sys.executable, "-m", "tests.every_config", *map(str, (processes, folder, *words))]


def environment(folder):
    changes = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return os.environ | changes | {"REPR_DET_CACHE": str(folder / "cache")}


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_every_config_trains(tmp_path, processes):
    done = subprocess.run(
        command(processes, tmp_path),
        cwd=ROOT,
        env=environment(tmp_path),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert [line for line in done.stdout.splitlines() if line.endswith(".yaml: trained")] == [
        f"{name}: trained" for name in CONFIGS
    ]


@pytest.mark.slow
def test_two_machines_over_the_loopback_end_with_equal_weights(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"tcp://127.0.0.1:{free.getsockname()[1]}"
    configs = ("cifar10_c3_32.yaml", "demo_faster_rcnn.yaml")
    machines = [
        subprocess.Popen(
            command(1, tmp_path / str(rank), *configs, "--machines", 2, rank, url),
            cwd=ROOT,
            env=environment(tmp_path),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in (0, 1)
    ]
    printed = [machine.communicate(timeout=600)[0] for machine in machines]
    assert [machine.returncode for machine in machines] == [0, 0], printed[0][-3000:]
    assert all(f"{name}: trained" in printed[0] for name in configs)
