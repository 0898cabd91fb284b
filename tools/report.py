#!/usr/bin/env python3
"""Write one HTML page that shows what RePr did in a run, or in runs with and without it.

tools/report.py output/demo -o report.html
tools/report.py output/standard output/repr -o report.html
tools/report.py output/standard_* output/repr_* -o report.html --test-data my_val val.json images/

A run is its OUTPUT_DIR; it may still be going. What it does not hold, the page says.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from repr_det.cli.arguments import add_data
from repr_det.engine.command_line import exit_status
from repr_det.report.page import write_report
from repr_det.report.run import read_run
from repr_det.tasks import use_data


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a run's OUTPUT_DIR")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="PAGE.html")
    parser.add_argument(
        "--images", type=int, default=32, help="held-out images to run networks on, default 32"
    )
    parser.add_argument(
        "--resamples", type=int, default=1000, help="of the bootstrap, default 1000; 0: none"
    )
    add_data(parser)
    args = parser.parse_args(arguments)
    return exit_status("report.py", lambda: _report(args), stopped="Stopped; nothing was written.")


def _report(args: argparse.Namespace) -> None:
    runs = [read_run(folder) for folder in args.runs]
    for run in runs:
        use_data(run.cfg, args)
    page = write_report(
        runs,
        args.output,
        images=args.images,
        resamples=args.resamples,
        progress=sys.stderr.isatty(),
    )
    print(page)


if __name__ == "__main__":
    sys.exit(main())
