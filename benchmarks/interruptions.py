#!/usr/bin/env python3
"""Kill training processes at random moments and count the runs that end with the same bits.

    python benchmarks/interruptions.py --task classification --runs 25

Every run is killed by SIGKILL once, resumed until it is done, and compared with the run that was
never killed: weights, optimizer, RePr state, and metrics.json apart from times. A kill comes,
with equal chances, at a moment of the clock, before or after the step of an iteration drawn at
random, or at a marked moment (in the middle of the write of a checkpoint, between its rename and
its tag, around a drop and a return, in S2).
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tests.engine import killed_run
from tests.engine.test_interruption import MOMENTS, assert_same_run

# Every process is forked from one that has imported what is needed and done nothing else.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["repr_det.tasks", "tests.engine.killed_run"])


def train(log: Path, *arguments: str) -> None:
    """Body of a process: a run of :mod:`tests.engine.killed_run`, its console in a file."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    killed_run.main(*arguments)


def start(task: str, output: Path, *moment: str | int) -> multiprocessing.Process:
    """A process that trains or resumes."""
    arguments = (output.with_suffix(".log"), task, str(output), *map(str, moment))
    process = PROCESSES.Process(target=train, args=arguments)
    process.start()
    return process


def finish(task: str, output: Path) -> float:
    """Train or resume to the end; the seconds it took.

    Raises:
        RuntimeError: the run ended with an error.
    """
    begin = time.perf_counter()
    process = start(task, output)
    process.join()
    if process.exitcode != 0:
        raise RuntimeError(f"{output} failed: {output.with_suffix('.log').read_text()[-2000:]}")
    return time.perf_counter() - begin


def kill_once(task: str, output: Path, draw: random.Random, seconds: float) -> dict:
    """Train until killed; what the moment was, and the last checkpoint there was then."""
    kind = draw.choice(["clock", "step", "marked"])
    if kind == "clock":
        # Counted from the first sign of life, so that it falls into the training.
        after = draw.uniform(0, seconds)
        process = start(task, output)
        while process.is_alive() and not (output / "metrics.json").exists():
            time.sleep(0.01)
        process.join(after)
        process.kill()
        entry = {"moment": "clock", "seconds": round(after, 2)}
    else:
        last = max(iteration for _, iteration in MOMENTS)
        marked = draw.choice(MOMENTS)
        drawn = draw.choice(["before_step", "after_step"]), draw.randint(0, last)
        moment, iteration = marked if kind == "marked" else drawn
        process = start(task, output, moment, iteration)
        entry = {"moment": moment, "iteration": iteration}
    process.join()
    entry["killed"] = process.exitcode == -signal.SIGKILL
    tag = output / "last_checkpoint"
    entry["checkpoint"] = tag.read_text() if tag.exists() else None
    return entry


def main() -> None:
    """Run the program."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--task", choices=tuple(killed_run.TASKS), required=True)
    parser.add_argument("--runs", type=int, default=25)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    args = parser.parse_args()
    draw = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["DETECTRON2_DATASETS"] = os.environ["REPR_DET_CACHE"] = folder
        reference = Path(folder) / "reference"
        seconds = finish(args.task, reference)
        runs = []
        while len(runs) < args.runs:
            output = Path(folder) / f"run{len(runs)}"
            entry = kill_once(args.task, output, draw, seconds)
            # One that was done before its moment came is no interruption.
            if entry.pop("killed"):
                finish(args.task, output)
                try:
                    assert_same_run(output, reference)
                    entry["identical"] = True
                except AssertionError as error:
                    entry["identical"] = False
                    entry["where"] = str(error)[:200]
                runs.append(entry)
                _record(args, runs)
                same = sum(run["identical"] for run in runs)
                print(f"{len(runs)}/{args.runs}: {entry}, {same} identical", flush=True)
            shutil.rmtree(output, ignore_errors=True)


def _record(args: argparse.Namespace, runs: list[dict]) -> None:
    record = {
        "command": f"python benchmarks/interruptions.py --task {args.task} --runs {args.runs} "
        f"--seed {args.seed}",
        "torch": torch.__version__,
        "runs": runs,
    }
    path = Path(__file__).with_name(f"interruptions_{args.task}.json")
    path.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
