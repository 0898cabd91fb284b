"""repr-det demo to its end, in a few iterations."""

from __future__ import annotations

import subprocess
import sys

import pytest

from repr_det.cli.demo import unused
from repr_det.report.run import read_run

SHORT = (
    *("SOLVER.MAX_ITER", "8", "SOLVER.STEPS", "()", "SOLVER.WARMUP_ITERS", "0"),
    *("SOLVER.CHECKPOINT_PERIOD", "8", "TEST.EVAL_PERIOD", "8", "SOLVER.IMS_PER_BATCH", "2"),
    *("REPR.S1", "2", "REPR.S2", "2", "REPR.N", "1"),
)


def demo(*words):
    command = [sys.executable, "-m", "repr_det", "demo", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    return folder, demo("-o", folder, *SHORT)


@pytest.mark.slow
def test_the_pair_is_trained_and_compared(finished):
    folder, done = finished
    assert done.returncode == 0, done.stderr[-3000:]
    runs = [read_run(folder / name) for name in ("standard", "repr")]
    assert [run.uses_repr for run in runs] == [False, True]
    assert all(run.finished and run.iterations == 8 for run in runs)
    for words in ("box AP", "difference", "95 % interval", f"Report: {folder / 'report.html'}"):
        assert words in done.stdout
    page = (folder / "report.html").read_text()
    assert page.startswith("<!DOCTYPE html>") and "standard" in page


@pytest.mark.slow
def test_a_mistake_ends_it_and_nothing_is_written(finished):
    folder, _ = finished
    before = sorted(folder.parent.rglob("*"))
    done = demo("-o", folder, *SHORT, "REPR.NO_KEY", "1")
    assert done.returncode == 2 and "NO_KEY" in done.stderr and "Traceback" not in done.stderr
    assert sorted(folder.parent.rglob("*")) == before


def test_an_earlier_demo_is_not_overwritten(tmp_path):
    assert unused(tmp_path / "demo") == tmp_path / "demo"
    for name in ("demo", "demo-2"):
        (tmp_path / name / "standard").mkdir(parents=True)
    assert unused(tmp_path / "demo") == tmp_path / "demo-3"
