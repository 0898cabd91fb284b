"""Promise 5: killed at any moment and resumed, a run ends with the bits of the run never killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.engine import killed_run

pytestmark = pytest.mark.gpu

ROOT = Path(__file__).parents[2]
FIRST_DROP = killed_run.S1
FIRST_RETURN = killed_run.S1 + killed_run.S2
MOMENTS = [
    ("before_step", FIRST_DROP),
    ("after_step", FIRST_DROP),
    ("before_step", FIRST_RETURN),
    ("after_step", FIRST_RETURN),
    ("before_step", FIRST_DROP + 3),
    ("write", 9),
    ("tag", 14),
    ("after_step", 29),
    ("after_step", killed_run.MAX_ITER - 1),
]
TIMES = ("time", "eta_seconds")


def start(task, output, *moment):
    environment = {
        **os.environ,
        # What was there may hold Detectron2, on a machine where it is not installed.
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        "OMP_NUM_THREADS": "1",
        "DETECTRON2_DATASETS": str(output.parent / "data"),
        "REPR_DET_CACHE": str(output.parent / "cache"),
    }
    command = [sys.executable, "-W", "ignore", str(ROOT / "tests/engine/killed_run.py")]
    return subprocess.run(
        [*command, task, str(output), *map(str, moment)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


def finish(task, output):
    done = start(task, output)
    assert done.returncode == 0, done.stderr[-2000:]


def record(output):
    """metrics.json without times."""
    lines = [json.loads(line) for line in (output / "metrics.json").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.endswith(TIMES)} for line in lines]


def assert_same(a, b, where=""):
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_same(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, list):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{where}[{i}]")
    else:
        # COCO's AP of a size that no object has is not a number.
        assert a == b or (a != a and b != b), where


def assert_same_run(output, reference):
    final = [torch.load(f / "model_final.pth", weights_only=True) for f in (output, reference)]
    for state in final:
        # Times of steps are part of the smoothing windows.
        scalars = state["trainer"]["hooks"]["RecordKeeper"]["scalars"]
        for name in [n for n in scalars if n.endswith(TIMES)]:
            del scalars[name]
    assert_same(*final)
    assert_same(record(output), record(reference))


@pytest.fixture(
    scope="module",
    params=[pytest.param("detection", marks=pytest.mark.slow), "classification"],
)
def reference(request, tmp_path_factory):
    """A run that was never killed."""
    output = tmp_path_factory.mktemp(request.param) / "reference"
    finish(request.param, output)
    return request.param, output


@pytest.mark.slow
def test_same_seed_same_bits(reference):
    task, output = reference
    again = output.parent / "again"
    finish(task, again)
    assert_same_run(again, output)


@pytest.mark.parametrize(
    ("moment", "iteration"),
    [
        pytest.param(*moment, marks=[] if moment == MOMENTS[4] else pytest.mark.slow)
        for moment in MOMENTS
    ],
)
def test_killed_and_resumed(reference, moment, iteration):
    task, expected = reference
    output = expected.parent / f"{moment}-{iteration}"
    killed = start(task, output, moment, iteration)
    assert killed.returncode == -signal.SIGKILL, killed.stderr[-2000:]
    finish(task, output)
    assert_same_run(output, expected)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("task", "moment"),
    [
        ("retinanet", MOMENTS[4]),  # resumes with its loss normaliser
        ("detection-compact", ("after_step", 11)),  # the network is smaller then
        ("classification-compact", ("after_step", 11)),
        ("detection-previous", ("after_step", 11)),
        ("classification-previous", ("after_step", 11)),
    ],
)
def test_other_tasks_resume(tmp_path, task, moment):
    expected, output = tmp_path / "reference", tmp_path / "killed"
    finish(task, expected)
    assert start(task, output, *moment).returncode == -signal.SIGKILL
    finish(task, output)
    assert_same_run(output, expected)


@pytest.mark.slow
def test_a_damaged_newest_checkpoint_is_passed_over(reference):
    task, expected = reference
    output = expected.parent / "damaged"
    assert start(task, output, "before_step", 20).returncode == -signal.SIGKILL
    newest = output / (output / "last_checkpoint").read_text()
    newest.write_bytes(newest.read_bytes()[:1000])
    done = start(task, output)
    assert done.returncode == 0, done.stderr[-2000:]
    assert f"{newest} is damaged" in done.stdout + done.stderr
    assert_same_run(output, expected)
