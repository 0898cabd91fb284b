"""Pages that are written from the code: config keys from their comments, options from parsers."""

from __future__ import annotations

import argparse
import inspect
import json
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode

from repr_det.classification.config import add_classification_config, add_scheme_config
from repr_det.cli import COMMANDS, PROGRAM, build_parser
from repr_det.detection.config import add_detection_config
from repr_det.engine.config import add_repr_config, add_trainer_config
from repr_det.engine.solver import add_solver_config
from repr_det.tasks import get_cfg

SECTIONS: dict[str, tuple[Callable[[CfgNode], None], ...]] = {
    "RePr": (add_repr_config,),
    "Training of any task": (add_trainer_config, add_solver_config),
    "Detection": (add_detection_config,),
    "Classification": (add_classification_config, add_scheme_config),
}
_KEY = re.compile(r"cfg\.([A-Z][A-Z0-9_.]*) = (?!CfgNode)")
_WIDTH = "90"


def keys_of(function: Callable[[CfgNode], None]) -> dict[str, str]:
    """The keys that a function adds to a config, each with the comment above it."""
    keys, comment = {}, []
    for line in map(str.strip, inspect.getsource(function).splitlines()):
        if line.startswith("# "):
            comment.append(line[2:])
        elif match := _KEY.match(line):
            keys[match[1]] = " ".join(comment)
            comment = []
        else:
            comment = []
    return keys


def value_of(cfg: CfgNode, key: str) -> Any:
    """The value of a dotted key."""
    node = cfg
    for part in key.split("."):
        node = node[part]
    return node


def configuration() -> str:
    """The keys that this package adds to Detectron2's config, as Markdown tables."""
    cfg = get_cfg()
    lines = []
    for title, functions in SECTIONS.items():
        lines += [f"## {title}", "", "| key | default | meaning |", "|---|---|---|"]
        for function in functions:
            for key, comment in keys_of(function).items():
                default = value_of(cfg, key)
                shown = '""' if default == "" else str(default)
                meaning = comment.replace("|", "\\|")
                lines.append(f"| `{key}` | `{shown}` | {meaning} |")
        lines.append("")
    return "\n".join(lines)


def command_line() -> str:
    """The help of every sub-command, as Markdown."""
    before, os.environ["COLUMNS"] = os.environ.get("COLUMNS"), _WIDTH
    try:
        parser = build_parser()
        (commands,) = parser._subparsers._group_actions  # type: ignore[union-attr]
        assert isinstance(commands, argparse._SubParsersAction)
        parts = []
        for name in COMMANDS:
            text = commands.choices[name].format_help()
            parts += [f"## {PROGRAM} {name}", "", "```text", text.rstrip(), "```", ""]
        return "\n".join(parts)
    finally:
        os.environ.pop("COLUMNS")
        if before is not None:
            os.environ["COLUMNS"] = before


def performance() -> str:
    """The tables of ``benchmarks/speed.json``, as ``make bench`` prints them."""
    benchmarks = Path(__file__).resolve().parents[1] / "benchmarks"
    sys.path.append(str(benchmarks))
    from bench import tables

    records = json.loads((benchmarks / "speed.json").read_text())
    parts = [f"## {device}\n\n{tables(record)}" for device, record in records.items()]
    return "\n\n".join(parts)


def linear() -> str:
    """The tables of ``benchmarks/linear.json``."""
    record = json.loads((Path(__file__).parents[1] / "benchmarks/linear.json").read_text())
    columns = {
        "share of weights before": "share of weights, convs alone",
        "share of weights after": "with linear layers",
        "filters": "filters",
        "linear units": "of them linear units",
        "linear layers": "linear layers",
        "share of pruned filters removable": "share of dropped filters that can be removed",
        "drop in steps": "drop in steps",
        "return in steps": "return in steps",
    }
    lines = [f"| model | {' | '.join(columns.values())} |", "|---" * (1 + len(columns)) + "|"]
    for model, row in record["models"].items():
        cells = [str(row.get(key, "")) for key in columns]
        lines.append(f"| {model} | {' | '.join(cells) if 'failed' not in row else row['failed']} |")
    lines += ["", "| model | masked / standard step | removed / standard step |", "|---|---|---|"]
    for model, row in record["steps"].items():
        lines.append(f"| {model} | {row['masked / plain']} | {row['smaller / plain']} |")
    return "\n".join(lines)


def write(folder: Path) -> None:
    """Write each page into a folder, under its function's name."""
    folder.mkdir(exist_ok=True)
    for function in (configuration, command_line, performance, linear):
        (folder / f"{function.__name__}.md").write_text(function() + "\n", encoding="utf-8")
