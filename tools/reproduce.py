#!/usr/bin/env python3
"""Print a table of the paper with its numbers and ours side by side, or a study of our own.

tools/reproduce.py criteria --scale quick          minutes: everything runs, but no result
tools/reproduce.py criteria --seeds 5              trains what is missing, records it, prints it
tools/reproduce.py criteria --together 20          the same, up to 20 runs at once; for a GPU
tools/reproduce.py criteria --show --output experiments/results      prints what is recorded there
tools/reproduce.py criteria --show --plot curves.png                draws it over time, too
tools/reproduce.py criteria --rows ortho --import-run output/mine   records a run of train_net.py

It may be stopped at any moment; the same command goes on where it stopped.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # experiments/ is not part of the package

from experiments import studies, tables  # noqa: E402
from experiments.over_time import over_time  # noqa: E402
from experiments.runs import (  # noqa: E402
    DEFAULT_OUTPUT,
    FULL,
    QUICK,
    import_run,
    read_records,
    reproduce,
    table_folder,
    write_table,
)
from repr_det.engine.command_line import exit_status  # noqa: E402
from repr_det.engine.files import check_folder_of  # noqa: E402
from repr_det.errors import UserError  # noqa: E402
from repr_det.report import plots  # noqa: E402

TABLES = tables.TABLES | studies.STUDIES
SEEDS = {FULL: 3, QUICK: 1}


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("table", choices=TABLES, metavar="TABLE", help=", ".join(TABLES))
    parser.add_argument(
        "--seeds", type=int, metavar="K", help="seeds 0 to K - 1; by default 3, quick 1"
    )
    parser.add_argument(
        "--scale",
        choices=(QUICK, FULL),
        default=FULL,
        help="full (default): the paper's lengths; quick: few images and a tenth of the length",
    )
    parser.add_argument(
        "--rows",
        nargs="+",
        default=[],
        metavar="PATTERN",
        help="only these rows and what they are compared with, for example 'cifar10-*'",
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=DEFAULT_OUTPUT,
        help=f"folder of runs, records and tables, by default {DEFAULT_OUTPUT}",
    )
    parser.add_argument(
        "--together",
        type=int,
        default=1,
        metavar="K",
        help="train up to K runs at once that differ only in seed and REPR keys, on arrays of "
        "images, as one batched network; others are trained alone, and it is said why. Each "
        "gets an equal share of the time in its record. A batch that is stopped starts again",
    )
    parser.add_argument(
        "--plot",
        type=Path,
        metavar="FIGURE.png|svg",
        help="draw every row beside its standard training over time, mean and spread over seeds",
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        "--show",
        action="store_true",
        help="train nothing; print what is recorded, and write it to table.md",
    )
    what.add_argument(
        "--import-run",
        type=Path,
        metavar="DIR",
        help="record a finished run of tools/train_net.py as the one row that --rows names",
    )
    args = parser.parse_args(arguments)
    but = ", but for runs that were trained at once, which start again" if args.together > 1 else ""
    return exit_status(
        "reproduce.py",
        lambda: _reproduce(args),
        stopped=f"Stopped; the same command goes on where it stopped{but}.",
    )


def _reproduce(args: argparse.Namespace) -> None:
    seeds = SEEDS[args.scale] if args.seeds is None else args.seeds
    if seeds < 1:
        raise UserError(f"--seeds is {seeds}; give at least 1.")
    if args.together < 1:
        raise UserError(f"--together is {args.together}; give at least 1.")
    if args.plot:
        plots.check_suffix(args.plot)
        check_folder_of("--plot", args.plot)
    table = TABLES[args.table]
    if args.import_run:
        if len(args.rows) != 1:
            raise UserError("--import-run needs --rows with the one row that the run is of.")
        import_run(args.import_run, table, table.row(args.rows[0]), args.scale, args.output)
        args.show = True
    else:
        table = tables.only(table, args.rows)
    if args.show:
        folder = table_folder(args.output, table, args.scale)
        if not folder.is_dir():
            raise UserError(
                f"{folder} does not exist, so no run is recorded there: check --output."
            )
        text = write_table(table, args.scale, args.output)
    else:
        text = reproduce(table, range(seeds), args.scale, args.output, args.together)
    print(text)
    if args.plot:
        records = read_records(table, args.scale, args.output)
        plots.save(over_time(table, records), args.plot)
        print(args.plot)


if __name__ == "__main__":
    sys.exit(main())
