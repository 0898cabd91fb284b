r"""Write one HTML page that shows what RePr did in a run, or how arms of runs differ.

  repr-det report output/repr -o report.html
  repr-det report output/standard_* output/repr_* -o report.html
  repr-det report -o report.html --arm standard output/standard_* --arm N-1 output/n1_* \
      --arm N-5 output/n5_* --baseline standard
  repr-det report output/repr -o report.html --test-data my_val val.json images/

A run may still be training. The page says what its folder lacks. Without --arm, runs with RePr are
compared with runs without it.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from repr_det.cli.arguments import add_arms, add_data, add_num_images, data_files, read_arms


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command line."""
    parser.add_argument("runs", nargs="*", metavar="RUN", help="OUTPUT_DIR of a run")
    add_arms(parser, "RUN")
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        required=True,
        metavar="PAGE.html",
        help="write the page to this file",
    )
    add_num_images(parser)
    parser.add_argument(
        "--resamples",
        type=int,
        default=1000,
        metavar="N",
        help="resamples of the paired bootstrap; 0 for no interval",
    )
    add_data(parser)


def run(args: argparse.Namespace) -> None:
    """Write the page and print its path."""
    from repr_det.engine.files import check_output
    from repr_det.report.page import write_report

    check_output("--output", args.output, data_files(args))
    page = write_report(
        read_arms(args, as_recorded=True),
        args.output,
        images=args.num_images,
        resamples=args.resamples,
    )
    print(page)
