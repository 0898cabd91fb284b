"""Train Faster R-CNN without and with RePr on a built-in dataset, and compare the two.

  repr-det demo
  repr-det demo -o output/longer SOLVER.MAX_ITER 600 SOLVER.STEPS "(460, 550)" REPR.S1 80 REPR.S2 40

It needs no data and no GPU, and takes about three minutes on two cores. The output folder then
holds the runs, in standard and repr, and report.html. If it holds a demo already, a new folder with
a number is made.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from itertools import count
from pathlib import Path

from repr_det.cli.arguments import add_overrides

CONFIG = "demo_faster_rcnn.yaml"
ENABLED = {"standard": "False", "repr": "True"}
"""The runs by their folder, with the value of REPR.ENABLED."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command line."""
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        default=Path("output/demo"),
        metavar="FOLDER",
        help="write the runs and their report to this folder",
    )
    add_overrides(parser)


def run(args: argparse.Namespace) -> int:
    """Train the pair, write its report and print the difference; returns the exit status."""
    output = unused(args.output)
    folders = [output / name for name in ENABLED]
    for folder, enabled in zip(folders, ENABLED.values(), strict=True):
        print(f"Training with REPR.ENABLED {enabled} in {folder} ...", flush=True)
        # A process of its own, since a process has one log file and one seed.
        words = ["train", "--config-file", CONFIG, *args.opts]
        words += ["REPR.ENABLED", enabled, "OUTPUT_DIR", str(folder)]
        done = subprocess.run([sys.executable, "-m", "repr_det", *words])
        if done.returncode:
            return done.returncode  # the process has said why
    from tabulate import tabulate

    from repr_det.report.arms import by_method
    from repr_det.report.compare import outcome
    from repr_det.report.page import write_report
    from repr_det.report.run import read_run

    arms = by_method([read_run(folder) for folder in folders])
    page = write_report(arms, output / "report.html")
    found = outcome(arms)
    rows = []
    for row in found.rows.values():
        means = [f"{estimate.mean:.1f}" for estimate in row.arms.values()]
        (difference,) = row.differences.values()
        _, low, high = difference
        interval = "" if low is None else f"{low:+.1f} to {high:+.1f}"
        rows.append([row.title, *means, f"{difference.mean:+.1f}", interval])
    headers = ["in %", "standard", "RePr", "difference", "95 % interval"]
    print(f"\n{tabulate(rows, headers, disable_numparse=True)}\n\n{found.interval}")
    print(f"Report: {page}")
    return 0


def unused(folder: Path) -> Path:
    """The folder, or with -2, -3 ... after its name the first that holds no demo."""
    folder = folder if folder.name else folder.absolute()  # of "."
    names = (folder if n == 1 else folder.with_name(f"{folder.name}-{n}") for n in count(1))
    return next(path for path in names if not any((path / name).exists() for name in ENABLED))
