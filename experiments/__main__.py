"""Print a table of the paper with its numbers and ours, or a study of our own.

python -m experiments --list                          which tables there are
python -m experiments criteria --scale quick          minutes: everything runs, but no result
python -m experiments criteria --seeds 5              trains what is missing, records it, prints it
python -m experiments criteria --show --output experiments/results  prints what is recorded there
python -m experiments criteria --show --plot curves.png             draws it over time, too
python -m experiments --page docs/results.md          writes all that is recorded as one page

Run it in the root of the repository. It may be stopped at any moment; the same command goes on
where it stopped.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from experiments.contrasts import again_in_markdown, choice_tables, over_grid, study_in_markdown
from experiments.run_studies import read_values
from experiments.runs import (
    DEFAULT_OUTPUT,
    FULL,
    QUICK,
    alone_in,
    execute,
    missing,
    plan,
    read_records,
    table_folder,
    write_record,
)
from experiments.summarise import over_time, results_page, table_in_markdown
from experiments.tables import TABLES, Table, only
from repr_det.engine.files import check_output, write_text_whole
from repr_det.errors import UserError, exit_status
from repr_det.report import plots

SEEDS = {FULL: 3, QUICK: 1}
RESULTS = Path(__file__).parent / "results"


def write_table(table: Table, scale: str, output: Path) -> str:
    """Write ``table.md`` with all rows of the whole table; returns the text of ``table`` alone."""

    def text(of: Table) -> str:
        return table_in_markdown(of, scale == QUICK, read_records(of, scale, output))

    path = table_folder(output, table, scale) / "table.md"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text(table.whole or table))
    return text(table)


def reproduce(table: Table, seeds: Sequence[int], scale: str, output: Path) -> str:
    """Train and record what is missing of a table, and write the table.

    It may be stopped at any moment. Called again, it resumes the run that was stopped. The table is
    written after every run.

    Args:
        table: the rows to train.
        seeds: of the runs; each row is trained once with each.
        scale: :data:`FULL` or :data:`QUICK`.
        output: folder of all tables.

    Returns:
        The table in Markdown.

    Raises:
        UserError: before anything is trained. A config or its data are wrong or missing, records
            have other settings, or another process trains this table.
    """
    wanted = [(row, seed) for seed in seeds for row in table.rows]
    wanted += [
        (table.row(row.teacher), seed + row.teacher_seed)
        for row, seed in wanted
        if row.teacher_seed and seed + row.teacher_seed not in seeds
    ]
    # Teachers first: they may be of a later seed.
    wanted.sort(key=lambda pair: pair[0].teacher is not None)
    todo = missing([plan(table, row, seed, scale, output) for row, seed in wanted])
    interval = 0.5 if sys.stderr.isatty() else 30.0
    total = sum(run.max_iter for run in todo)
    with (
        alone_in(table_folder(output, table, scale)),
        tqdm(total=total, unit="it", mininterval=interval, disable=not todo) as bar,
    ):
        for number, run in enumerate(todo, 1):
            name = f"{run.row.name} seed {run.seed}"
            bar.set_description(f"run {number}/{len(todo)} {name}")
            record = execute(run, bar)
            write_record(run.record_path, record)
            value = run.measure.value(record)
            outcome = "diverged" if value is None else f"{value:.2f} %"
            line = f"{table.name} {name}: {outcome}, {record['wall_seconds']:.0f} s"
            bar.write(line, file=sys.stderr)
            write_table(table, scale, output)
    return write_table(table, scale, output)


def check_recorded(folder: Path) -> None:
    """Refuse a folder of records that is not there.

    Raises:
        UserError: it is not.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} does not exist, so no run is recorded there: check --output.")


def write_page(path: Path, output: Path) -> None:
    """Write all that is recorded as a page, and its pictures into the folder ``images`` next to it.

    Args:
        path: of the page, in Markdown.
        output: folder of all records.

    Raises:
        UserError: there is no such folder.
    """
    check_recorded(output)
    values = read_values(output)
    tables = [*TABLES.values(), *choice_tables(values)]
    parts = [results_page(tables, lambda table: read_records(table, FULL, output))]
    for study in sorted({cell.study for cell in values}):
        picture = path.parent / "images" / f"{study}.png"
        picture.parent.mkdir(exist_ok=True)
        plots.save(over_grid(study, values), picture)
        parts.append(study_in_markdown(study, values, f"images/{picture.name}"))
    parts.append(again_in_markdown(output))
    write_text_whole(path, "\n".join(part for part in parts if part))


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="experiments",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("table", nargs="?", choices=TABLES, metavar="TABLE", help="see --list")
    parser.add_argument("--list", action="store_true", help="print names and titles of all tables")
    parser.add_argument(
        "--page",
        type=Path,
        metavar="PAGE.md",
        help="write every table that is recorded, and pictures into images/ next to it",
    )
    parser.add_argument(
        "--seeds", type=int, metavar="K", help="seeds 0 to K - 1 (default: 3, quick 1)"
    )
    parser.add_argument(
        "--scale",
        choices=(QUICK, FULL),
        default=FULL,
        help="full: the paper's lengths; quick: few images, a tenth of the length (default: full)",
    )
    parser.add_argument(
        "--rows",
        nargs="+",
        default=[],
        metavar="PATTERN",
        help="only these rows and what they are compared with, for example 'cifar10-*'",
    )
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        help=f"folder of runs, records and tables (default: {DEFAULT_OUTPUT}; with --page: "
        "experiments/results)",
    )
    parser.add_argument(
        "--plot",
        type=Path,
        metavar="FIGURE.png|svg",
        help="draw every row and its standard training over time, mean and spread over seeds",
    )
    parser.add_argument(
        "--show",
        action="store_true",
        help="train nothing; print what is recorded, and write it to table.md",
    )
    args = parser.parse_args(arguments)
    return exit_status(
        "experiments",
        lambda: _run(args),
        stopped="Stopped; the same command goes on where it stopped.",
    )


def _run(args: argparse.Namespace) -> None:
    if args.list:
        print("\n".join(f"{name:20} {table.title}" for name, table in TABLES.items()))
        return
    if args.page:
        check_output("--page", args.page)
        write_page(args.page, args.output or RESULTS)
        print(args.page)
        return
    if args.table is None:
        raise UserError("No table was named. Name one of those that --list prints.")
    _table(args)


def _table(args: argparse.Namespace) -> None:
    seeds = SEEDS[args.scale] if args.seeds is None else args.seeds
    if seeds < 1:
        raise UserError(f"--seeds is {seeds}. Set at least 1.")
    if args.plot:
        plots.check_suffix(args.plot)
        check_output("--plot", args.plot)
    output = args.output or DEFAULT_OUTPUT
    table = only(TABLES[args.table], args.rows)
    if args.show:
        folder = table_folder(output, table, args.scale)
        check_recorded(folder)
        text = write_table(table, args.scale, output)
    else:
        text = reproduce(table, range(seeds), args.scale, output)
    print(text)
    if args.plot:
        plots.save(over_time(table, read_records(table, args.scale, output)), args.plot)
        print(args.plot)


if __name__ == "__main__":
    sys.exit(main())
