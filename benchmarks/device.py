#!/usr/bin/env python3
"""What RePr costs on this machine's GPU, or CPU, in a given time: the most valuable figures first.

    python benchmarks/device.py --output DIR [--minutes 6] [--device cuda|cpu] [--only NAME ...]

It needs PyTorch 2.11 or newer and Detectron2's Python files: no compiler, no network, no dataset
(pack_wheels.py packs what else is missing). Each figure is written to DIR/NAME.json when it is
there. When the time is up, the measurement in progress is ended and what is missing is listed.
On a CPU networks and batches are small, which rehearses everything in a minute.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).resolve().parent

PLAN = {
    "changes-resnet50": 25,
    "changes-faster_rcnn_2": 25,
    "changes-faster_rcnn_8": 30,
    "steps-resnet50": 20,
    "steps-resnet50-amp": 20,
    "steps-faster_rcnn_2": 25,
    "steps-faster_rcnn_2-amp": 25,
    "steps-resnet20": 10,
    "memory-resnet50": 10,
    "memory-faster_rcnn_2": 15,
    "whole-c3_32": 30,
    "whole-resnet20": 60,
    "loading-demo": 15,
    "loading-faster_rcnn": 20,
    "steps-faster_rcnn_8": 40,
    "steps-faster_rcnn_8-amp": 40,
    "steps-resnet20-amp": 10,
    "steps-c3_32-amp": 5,
    "memory-faster_rcnn_8": 20,
}
"""Measurements in order of value, and the seconds of six minutes that each may take.

KIND-NETWORK, ``-amp`` for mixed precision; device_jobs.py says what each kind is."""

MINUTES = 6.0


def run_worker(names: Sequence[str], args: argparse.Namespace, until: float) -> int:
    """Measure in a process that is killed when the time is up.

    Returns:
        Its exit status; 0 where it was killed.
    """
    path = os.pathsep.join([str(HERE.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": path}
    if args.device == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""
    options = [str(args.output), repr(until), str(args.minutes / MINUTES), args.device, args.size]
    command = [sys.executable, "-W", "ignore", str(HERE / "device_jobs.py"), *options, *names]
    worker = subprocess.Popen(command, env=environment, start_new_session=True)
    try:
        return worker.wait(max(until - time.time(), 0.0))
    except subprocess.TimeoutExpired:
        return 0
    finally:
        # With the processes that load data for it.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(worker.pid, signal.SIGKILL)
        worker.wait()


def measure(args: argparse.Namespace, until: float) -> list[str]:
    """Measure until the time is up; a new process goes on where one failed.

    Returns:
        The names that failed.
    """
    waiting, failed = list(args.only), []
    while waiting and time.time() < until:
        status = run_worker(waiting, args, until)
        found = {name: args.output / f"{name}.json" for name in waiting}
        done = [name for name, path in found.items() if path.exists()]
        failed += [name for name in done if "error" in json.loads(found[name].read_text())]
        waiting = waiting[len(done) :]
        if status == 0:
            break
        if not (args.output / "environment.json").exists():
            sys.exit("The measurements could not begin. See the message above.")
        if not done or done[-1] not in failed:  # it was killed
            failed.append(waiting.pop(0))
            text = json.dumps({"error": f"the process ended with status {status}"})
            (args.output / f"{failed[-1]}.json").write_text(text)
    return failed


def main() -> int:
    """Measure, and print what is missing."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="DIR")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="default: %(default)s")
    parser.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto")
    parser.add_argument(
        "--size", choices=("auto", "full", "small"), default="auto", help="auto: small on a CPU"
    )
    parser.add_argument("--only", nargs="+", choices=PLAN, default=list(PLAN), metavar="NAME")
    args = parser.parse_args()
    until = time.time() + 60 * args.minutes
    args.output.mkdir(parents=True, exist_ok=True)
    if there := sorted(args.output.glob("*.json")):
        parser.error(f"{there[0]} is there already. Set another --output.")
    failed = measure(args, until)
    missing = [name for name in args.only if not (args.output / f"{name}.json").exists()]
    print(f"\nResults: {args.output}")
    print("Left out:", *(missing or ["nothing"]))
    print("Failed:", *(failed or ["nothing"]))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
