#!/usr/bin/env python3
"""Kill training processes at random moments and count the runs that end with the same bits.

    python benchmarks/interruptions.py --task classification --runs 50

Every run is killed by SIGKILL once, before or after the step of an iteration drawn at random
or at a marked moment (in the middle of the write of a checkpoint, between its rename and its tag,
around a drop and a return, in S2), resumed until it is done, and compared with the run that
was never killed: weights, optimizer, RePr state, and metrics.json apart from times.
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import sys
import tempfile
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tests.engine.test_interruption import MOMENTS, assert_same_run, finish, start

RESULT = Path(__file__).with_name("interruptions.json")


def kill_once(task: str, output: Path, draw: random.Random) -> dict:
    """Run until killed; what the moment was."""
    last = max(iteration for _, iteration in MOMENTS)
    if draw.random() < 0.5:
        moment, iteration = draw.choice(MOMENTS)
    else:
        moment, iteration = draw.choice(["before_step", "after_step"]), draw.randint(0, last)
    killed = start(task, output, moment, iteration)
    assert killed.returncode == -signal.SIGKILL, killed.stderr[-2000:]
    return {"moment": moment, "iteration": iteration}


def main() -> None:
    """Run the program."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--task", choices=("classification", "detection"), required=True)
    parser.add_argument("--runs", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    args = parser.parse_args()
    draw = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as folder:
        reference = Path(folder) / "reference"
        finish(args.task, reference)
        done = []
        for number in range(args.runs):
            output = Path(folder) / f"run{number}"
            entry = kill_once(args.task, output, draw)
            finish(args.task, output)
            try:
                assert_same_run(output, reference)
                entry["identical"] = True
            except AssertionError as error:
                entry["identical"] = False
                entry["where"] = str(error)[:200]
            done.append(entry)
            record = json.loads(RESULT.read_text()) if RESULT.exists() else {}
            record[args.task] = {
                "command": f"python benchmarks/interruptions.py --task {args.task} "
                f"--runs {args.runs} --seed {args.seed}",
                "torch": torch.__version__,
                "runs": done,
            }
            RESULT.write_text(json.dumps(record, indent=1) + "\n")
            same = sum(e["identical"] for e in done)
            print(f"{number + 1}/{args.runs}: {entry}, {same} identical", flush=True)


if __name__ == "__main__":
    main()
