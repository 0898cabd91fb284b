"""The program ``repr-det``: one module a sub-command.

A module's docstring is its help. Its ``add_arguments(parser)`` describes the command line and its
``run(args)`` does the work and returns an exit status, or nothing for 0. Modules import torch and
Detectron2 in ``run`` alone, so that ``--help`` is fast and works before they are installed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module
from types import ModuleType

import repr_det
from repr_det.cli.arguments import HelpFormatter
from repr_det.cli.noise import silence
from repr_det.errors import exit_status

silence()  # here, since processes that a command starts import this module and run no main()

PROGRAM = "repr-det"
COMMANDS = {
    "train": "repr_det.cli.train",
    "eval": "repr_det.cli.evaluate",
    "predict": "repr_det.cli.predict",
    "report": "repr_det.cli.report",
    "figure": "repr_det.cli.figure",
    "compare": "repr_det.cli.compare",
    "export-backbone": "repr_det.cli.export_backbone",
    "demo": "repr_det.cli.demo",
    "install-detectron2": "repr_det.cli.install_detectron2",
    "env": "repr_det.cli.env",
}


def build_parser() -> argparse.ArgumentParser:
    """The parser of the whole program, for its help, the documentation and shell completion."""
    parser = argparse.ArgumentParser(
        prog=PROGRAM,
        description="RePr for Detectron2: train, evaluate, compare and look at the result.",
        epilog=f"{PROGRAM} COMMAND --help describes a command.",
    )
    version = f"%(prog)s {repr_det.__version__}"
    parser.add_argument("--version", action="version", version=version)
    commands = parser.add_subparsers(
        dest="command", metavar="COMMAND", required=True, title="commands"
    )
    for name, module_name in COMMANDS.items():
        module = import_module(module_name)
        first_line = (module.__doc__ or "").partition("\n")[0]
        describe(commands.add_parser(name, help=first_line), module)
    return parser


def describe(parser: argparse.ArgumentParser, module: ModuleType) -> argparse.ArgumentParser:
    """Give a parser the help and the arguments of a sub-command; returns it."""
    parser.description = module.__doc__
    parser.formatter_class = HelpFormatter
    module.add_arguments(parser)
    return parser


def parse(words: Sequence[str]) -> argparse.Namespace:
    """Parse a command line that starts with the name of a sub-command.

    Options may stand between RUNs and KEY VALUE pairs, which argparse allows without sub-parsers
    only.
    """
    module = import_module(COMMANDS[words[0]])
    parser = describe(argparse.ArgumentParser(prog=f"{PROGRAM} {words[0]}"), module)
    return parser.parse_intermixed_args(list(words[1:]))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program; returns the exit status.

    It is 2 after a user's mistake, 130 when interrupted.

    Args:
        arguments: the command line, ``sys.argv[1:]`` by default.
    """
    words = sys.argv[1:] if arguments is None else list(arguments)
    if not words or words[0] not in COMMANDS:
        build_parser().parse_args(words)  # prints the help or the mistake, and exits
    program = f"{PROGRAM} {words[0]}"
    return exit_status(
        program,
        lambda: import_module(COMMANDS[words[0]]).run(parse(words)),
        stopped=f"{program}: interrupted.",
    )
