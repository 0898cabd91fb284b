"""Arguments that several sub-commands share, so that each thing has one name."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from repr_det.errors import UserError

if TYPE_CHECKING:
    from repr_det.report.arms import Arms
    from repr_det.report.run import RunFolder


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Keeps the lines of a description, and prints defaults that say something."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default is None or action.default is False or action.default in ("", []):
            return action.help
        return super()._get_help_string(action)


class _Renamed(argparse.Action):
    """Takes an option of version 0.1 and says which one replaces it."""

    def __init__(self, *, instead: str, **options: Any) -> None:
        super().__init__(help=argparse.SUPPRESS, default=argparse.SUPPRESS, **options)
        self.instead = instead

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        print(
            f"{parser.prog}: {option_string} will be removed in 0.3. Use {self.instead}.",
            file=sys.stderr,
        )
        setattr(namespace, self.dest, values)


def add_renamed(
    parser: argparse._ActionsContainer, option: str, instead: str, dest: str, **options: Any
) -> None:
    """Add an option of version 0.1, hidden from the help, that sets what another one sets now."""
    parser.add_argument(option, action=_Renamed, instead=instead, dest=dest, **options)


def add_config_file(
    parser: argparse._ActionsContainer, text: str = "a config file, or the name of one in configs/"
) -> None:
    """Add ``--config-file`` and its alias ``--config``; the default is an empty string."""
    parser.add_argument(
        "--config-file",
        "--config",
        default="",
        metavar="FILE",
        help=text,
    )


def add_overrides(parser: argparse._ActionsContainer) -> None:
    """Add the trailing ``KEY VALUE`` pairs as ``opts``, Detectron2's name for them."""
    parser.add_argument(
        "opts",
        nargs="*",
        metavar="KEY VALUE",
        help="values for config keys, at the end of the line",
    )


def add_json(parser: argparse._ActionsContainer, content: str) -> None:
    """Add ``--json FILE``."""
    parser.add_argument("--json", type=Path, metavar="FILE", help=f"write {content} to this file")


def add_coco_data(parser: argparse._ActionsContainer, split: str) -> None:
    """Add ``--train-data`` or ``--test-data``: a COCO-format dataset by its files."""
    parser.add_argument(
        f"--{split}-data",
        nargs=3,
        metavar=("NAME", "JSON", "IMAGES"),
        help=f"a COCO-format dataset to {split} on: a name, its annotation file, its image folder",
    )


def add_data(parser: argparse._ActionsContainer) -> None:
    """Add the arguments that :func:`repr_det.tasks.use_data` takes: datasets by their files."""
    for split in ("train", "test"):
        add_coco_data(parser, split)
        parser.add_argument(
            f"--{split}-folder",
            nargs=2,
            metavar=("NAME", "FOLDER"),
            help=f"images to {split} a classifier on: a name, and a folder with one folder a class",
        )


def add_num_images(parser: argparse._ActionsContainer) -> None:
    """Add ``--num-images`` and its old name ``--images``."""
    parser.add_argument(
        "--num-images",
        type=int,
        default=32,
        metavar="N",
        help="number of test images that networks are run on",
    )
    add_renamed(parser, "--images", "--num-images", "num_images", type=int)


def add_trained_model(parser: argparse._ActionsContainer) -> None:
    """Add what names a trained model: a RUN, or a config file with ``MODEL.WEIGHTS``."""
    parser.add_argument(
        "run_folder",
        nargs="?",
        type=Path,
        metavar="RUN",
        help="OUTPUT_DIR of a run: its config and its last checkpoint",
    )
    add_renamed(parser, "--run", "RUN as the first argument", "old_run", type=Path)
    add_config_file(
        parser,
        "in place of RUN, with MODEL.WEIGHTS: a config file, or the name of one in configs/",
    )


def words_after_run(
    args: argparse.Namespace, others: Sequence[str], instead: object = None
) -> list[str]:
    """The positional words of a command line without its RUN.

    Args:
        args: with what :func:`add_trained_model` adds. Changed in place: ``run_folder`` is None
            where an option names the model.
        others: the words after the first, which argparse takes for the RUN.
        instead: an option of the sub-command that takes the place of a RUN, if it was set.
    """
    first, old_run = args.run_folder, getattr(args, "old_run", None)
    if first is None or not (old_run or args.config_file or instead):
        return list(others)
    args.run_folder = old_run
    return [str(first), *others]


def add_arms(parser: argparse._ActionsContainer, what: str) -> None:
    """Add ``--arm NAME RUN...``, repeated, and ``--baseline NAME``.

    Args:
        parser: of a command line.
        what: metavar of what an arm consists of.
    """
    parser.add_argument(
        "--arm",
        nargs="+",
        action="append",
        default=[],
        metavar=("NAME", what),
        help=f"an arm: its name, then one {what} for each seed; repeat for each arm",
    )
    parser.add_argument(
        "--baseline",
        metavar="NAME",
        help="the arm that others are compared with (default: the first)",
    )


def named_arms(args: argparse.Namespace) -> dict[str, list[str]]:
    """What ``--arm`` names, by arm.

    Raises:
        UserError: an arm without runs, a name set twice, or a baseline without arms.
    """
    if args.baseline is not None and not args.arm:
        raise UserError("--baseline names an arm, but there are none. Set --arm NAME RUN...")
    found: dict[str, list[str]] = {}
    for name, *members in args.arm:
        if not members:
            raise UserError(f"Arm {name} has no runs. Set --arm {name} RUN...")
        if name in found:
            raise UserError(f"Arm {name} is set twice. Set another name for one of them.")
        found[name] = members
    return found


def baseline_of(groups: Mapping[str, object], baseline: str | None) -> str:
    """The name of the baseline, by default the first arm.

    Raises:
        UserError: no such arm.
    """
    if baseline is None:
        return next(iter(groups))
    if baseline not in groups:
        raise UserError(f"There is no arm {baseline!r}. Set --baseline to {' or '.join(groups)}.")
    return baseline


def data_files(args: argparse.Namespace) -> list[str]:
    """Annotation files that ``--train-data`` and ``--test-data`` name."""
    return [data[1] for data in (args.train_data, args.test_data) if data]


def read_arms(args: argparse.Namespace, *, as_recorded: bool = False) -> Arms:
    """The runs of a command line, by ``--arm``, or by method where only runs are named.

    Args:
        args: with ``runs``, and what :func:`add_arms` and :func:`add_data` add.
        as_recorded: refuse data of another name than a run's test set, since recorded metrics are
            of that.

    Raises:
        UserError: runs that are not there or cannot be compared, or both ways at once.
    """
    from repr_det.report.arms import arms_of, by_method
    from repr_det.report.run import read_run
    from repr_det.tasks import use_data

    def read(folders: Sequence[str]) -> list[RunFolder]:
        runs = [read_run(folder) for folder in folders]
        for run in runs:
            tested, named = run.cfg.DATASETS.TEST, args.test_data or args.test_folder
            if as_recorded and named and tested and named[0] not in tested:
                raise UserError(
                    f"{run.folder} was evaluated on {' and '.join(tested)}, not on {named[0]}. Set "
                    f"{tested[-1]} as the name."
                )
            use_data(run.cfg, args)
        return runs

    named = named_arms(args)
    if not named:
        return by_method(read(args.runs))
    if args.runs:
        raise UserError(f"{args.runs[0]} belongs to no arm. Set --arm NAME {args.runs[0]}.")
    baseline = baseline_of(named, args.baseline)
    return arms_of({name: read(folders) for name, folders in named.items()}, baseline)
