#!/usr/bin/env python3
"""Everything about speed: `make bench` (an hour) or `make bench SIZE=quick` (minutes).

    python benchmarks/bench.py full [--parts steps whole ...] [--networks resnet50 ...]
    python benchmarks/bench.py quick

Times are ratios of steps that ran one after the other in one process; see networks.py, speed.py
and ranking.py. The full size writes benchmarks/speed.json, part by part, by device and version, so
it may be stopped; `make docs` makes tables of it. The quick one prints its tables.
"""

from __future__ import annotations

import argparse
import datetime
import json
import logging
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import ranking
import speed
from networks import NETWORKS, PHASES
from tabulate import tabulate

from repr_det import __version__
from repr_det.engine.environment import environment

HERE = Path(__file__).resolve().parent
RESULT = HERE / "speed.json"

FULL, QUICK = "full", "quick"
SMALL = ("c3_32", "resnet20", "demo")
ROUNDS = {"c3_32": 100, "resnet20": 12, "resnet50": 16, "demo": 30}
DETECTOR_ROUNDS = 8
GPU_ROUNDS = 60
REMOVED = ("REPR.COMPACT", "on")
CYCLES = {"resnet50": 7, "demo": 7, "x101": 1}
EPOCH = {"c3_32": 20, "demo": 8, "resnet50": 20}
"""Iterations that stand for an epoch in whole runs, which are much shorter than real ones."""


def jobs(size: str) -> dict[str, dict[str, Callable[[], Any]]]:
    """What is measured, by part and name."""
    if size == QUICK:
        return {
            "steps": {"c3_32": partial(speed.step_ratios, NETWORKS["c3_32"], 6)},
            "whole": {"c3_32": partial(speed.whole_run, NETWORKS["c3_32"], 2, *REMOVED)},
            "options": {"c3_32": partial(speed.option_ratios, "c3_32", 6)},
            "phases": {"demo": partial(speed.phase_changes, PHASES["demo"], 1)},
            "ranking": {"ResNet-18": partial(ranking.drop_and_return, "ResNet-18")},
            "growth": {"3 x 3": partial(ranking.growth, (64, 128, 256))},
            "kept": {"c3_32": partial(speed.kept_memory_ratio, "c3_32", 1, 12)},
            "loading": {"demo": partial(speed.loading_share, "demo_faster_rcnn.yaml", 4)},
            "memory": {"c3_32": partial(speed.peak_memory, "c3_32")},
        }
    rounds = ROUNDS if ranking.DEVICE == "cpu" else dict.fromkeys(NETWORKS, GPU_ROUNDS)
    return {
        "steps": {
            name: partial(speed.step_ratios, network, rounds.get(name, DETECTOR_ROUNDS))
            for name, network in NETWORKS.items()
        },
        "whole": {
            name: partial(speed.whole_run, NETWORKS[name], epoch, *REMOVED)
            for name, epoch in EPOCH.items()
        },
        "options": {name: partial(speed.option_ratios, name, 12) for name in SMALL},
        "phases": {
            name: partial(speed.phase_changes, network, CYCLES.get(name, 3))
            for name, network in PHASES.items()
        },
        "kept": {name: partial(speed.kept_memory_ratio, name, 4, 12) for name in SMALL},
        "ranking": {name: partial(ranking.drop_and_return, name) for name in ranking.MODELS},
        "growth": {"3 x 3": partial(ranking.growth, (64, 128, 256, 512, 1024))},
        "loading": {"demo": partial(speed.loading_share, "demo_faster_rcnn.yaml", 30)},
        "memory": {name: partial(speed.peak_memory, name) for name in NETWORKS},
    }


# --- tables


def _table(cells: Sequence[Sequence[str]]) -> str:
    """A Markdown table of rows, the heading first."""
    align = ("left", *["right"] * (len(cells[0]) - 1))
    return tabulate(cells[1:], cells[0], tablefmt="github", disable_numparse=True, colalign=align)


def _times(found: dict[str, Any]) -> str:
    low, high = found["interval"]
    return f"{found['ratio']:.2f} ({low:.2f} to {high:.2f})"


def _steps(found: dict[str, Any]) -> str:
    head = ["step / standard", "full phase", "S2, filters as zeros", "of it, holding them",
            "S2, physically smaller", "its multiply-adds"]  # fmt: skip
    rows = [
        [NETWORKS[name].title, _times(one["full"]), _times(one["masked"]),
         f"{100 * one['holding']:.2f} %", _times(one["smaller"]), f"{one['multiply_adds']:.2f}"]
        for name, one in found.items()
    ]  # fmt: skip
    return _table([head, *rows])


def _whole(found: dict[str, Any]) -> str:
    head = ["whole run / standard", "measured", "step ratio r in S2", "1.02 (80 + 30 r) / 110",
            "iterations"]  # fmt: skip
    rows = [
        [NETWORKS[name].title, f"{one['ratio']:.3f}", f"{one['step_ratio_in_s2']:.2f}",
         f"{one['bound']:.3f}", f"{one['iterations']}"]
        for name, one in found.items()
    ]  # fmt: skip
    return _table([head, *rows])


def _options(found: dict[str, Any]) -> str:
    head = ["standard step with the option / without", *(NETWORKS[name].title for name in found)]
    rows = [
        [option, *(_times(one[option]) if option in one else "" for one in found.values())]
        for option in speed.OPTIONS
    ]
    return _table([head, *rows])


def _kept(found: dict[str, Any]) -> str:
    head = ["standard step, memory kept / given back", *(NETWORKS[name].title for name in found)]
    return _table([head, ["on a CPU", *(_times(one[speed.KEPT]) for one in found.values())]])


def _phases(found: dict[str, Any]) -> str:
    head = ["in full-phase steps", "drop", "return", "cycles", "load of the machine"]
    rows = [
        [PHASES[name].title, _times(one["drop"]), _times(one["return"]), f"{one['cycles']}",
         f"{one['load']}"]
        for name, one in found.items()
    ]  # fmt: skip
    return _table([head, *rows])


def _ranking(found: dict[str, Any]) -> str:
    head = ["filters of", "layers", "filters", "drop, s", "return, s", "pivoted QR (SciPy), s",
            "times"]  # fmt: skip
    return _table([head, *([name, *map(str, one.values())] for name, one in found.items())])


def _growth(found: dict[str, Any]) -> str:
    head = ["width of a 3 x 3 layer", "ranking, s", "re-initialisation, s"]
    (one,) = found.values()
    rows = [[width, f"{times['rank']:.4f}", f"{times['back']:.4f}"] for width, times in one.items()]
    return _table([head, *rows])


def _loading_line(found: dict[str, Any]) -> str:
    return "Waiting for data, share of a step: " + ", ".join(
        f"{NETWORKS[name].title} {100 * one['share']:.1f} %" for name, one in found.items()
    )


def _memory(found: dict[str, Any]) -> str:
    variants = {"standard": "standard", "full": "full phase", "masked": "S2, filters as zeros",
                "smaller": "S2, smaller"}  # fmt: skip
    head = ["peak memory of tensors (of the process), MiB", *variants.values(), "pruned weights"]
    rows = [
        [NETWORKS[name].title,
         *(f"{one[v][speed.TENSORS]:.2f} ({one[v][speed.PROCESS]:.0f})" for v in variants),
         f"{one[speed.PRUNED]:.2f}"]
        for name, one in found.items()
    ]  # fmt: skip
    return _table([head, *rows])


TABLES = {
    "steps": _steps, "whole": _whole, "options": _options, "kept": _kept, "phases": _phases,
    "ranking": _ranking, "growth": _growth, "loading": _loading_line, "memory": _memory,
}  # fmt: skip


def tables(record: dict[str, Any]) -> str:
    """All tables of one device in Markdown."""
    made = [TABLES[part](record[part]) for part in TABLES if record.get(part)]
    about = record["environment"]
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    dates = {date for part in record["dates"].values() for date in part.values()}
    when = " to ".join(sorted({min(dates), max(dates)}))
    made.append(f"{about['device']}; {versions}; {when}.")
    return "\n\n".join(made)


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("size", choices=(FULL, QUICK))
    parser.add_argument("--parts", nargs="+", choices=TABLES, default=list(TABLES))
    parser.add_argument("--networks", nargs="+", help="only these names in each part")
    args = parser.parse_args()
    chosen = {part: named for part, named in jobs(args.size).items() if part in args.parts}
    known = {name for named in chosen.values() for name in named}
    if unknown := set(args.networks or ()) - known:
        parser.error(f"--networks {min(unknown)}: these parts know {', '.join(sorted(known))}")
    logging.disable(logging.WARNING)
    warnings.filterwarnings("ignore")
    keep = args.size == FULL
    records = json.loads(RESULT.read_text()) if keep and RESULT.exists() else {}
    about = environment(ranking.DEVICE)
    record = records.setdefault(f"{about['device']}; repr_det {__version__}", {})
    record["environment"] = about
    for part, named in chosen.items():
        for name, measure in named.items():
            if args.networks and name not in args.networks:
                continue
            record.setdefault(part, {})[name] = measure()
            dates = record.setdefault("dates", {}).setdefault(part, {})
            dates[name] = datetime.date.today().isoformat()
            print(part, name, json.dumps(record[part][name]), flush=True)
            if keep:
                RESULT.write_text(json.dumps(records, indent=1) + "\n")
    print(tables(record))


if __name__ == "__main__":
    main()
