#!/usr/bin/env python3
"""Compare two detectors on one COCO-format annotation file, with intervals.

tools/compare_coco.py annotations.json results_a.json results_b.json
tools/compare_coco.py annotations.json output/standard output/repr --json comparison.json
tools/compare_coco.py annotations.json std_0,std_1,std_2 repr_0,repr_1,repr_2 --iou-type bbox

A side is one results file or run folder, or several (seeds) with commas between them, whose mean is
compared. The interval is a paired bootstrap over images: both sides are seen on the same resamples.
It says how far the difference depends on the images; runs are not resampled. The table has AP by
class, the JSON every metric by class; both are in per cent.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from repr_det.detection.bootstrap import Comparison, Difference, match, paired_bootstrap
from repr_det.detection.coco_results import (
    TITLES,
    check_iou_type,
    evaluable_types,
    read_results,
    read_truth,
    results_path,
)
from repr_det.engine.command_line import exit_status
from repr_det.engine.files import check_folder_of, write_text_whole
from repr_det.errors import UserError
from repr_det.report.markdown import aligned_table


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("annotations", type=Path, metavar="ANNOTATIONS")
    for side in ("A", "B"):
        parser.add_argument(f"results_{side.lower()}", metavar=f"RESULTS_{side}[,MORE]")
    parser.add_argument(
        "--iou-type", choices=TITLES, help="boxes or masks only; default: what all results hold"
    )
    parser.add_argument("--resamples", type=int, default=1000, metavar="R", help="default 1000")
    parser.add_argument("--seed", type=int, default=0, help="of the resamples, default 0")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write everything to a JSON file")
    args = parser.parse_args(arguments)
    return exit_status(
        "compare_coco.py",
        lambda: print(_compare(args)),
        stopped="Stopped; nothing was written.",
    )


def _compare(args: argparse.Namespace) -> str:
    if args.resamples < 1:
        raise UserError(f"--resamples is {args.resamples}; give at least 1.")
    if args.seed < 0:
        raise UserError(f"--seed is {args.seed}; give 0 or more.")
    check_folder_of("--json", args.json)
    paths = [
        [results_path(path) for path in side.split(",")]
        for side in (args.results_a, args.results_b)
    ]
    truth = read_truth(args.annotations)
    sides = [[read_results(path, truth) for path in side] for side in paths]
    detected = [found for side in sides for results in side for found in results]
    iou_types = (args.iou_type,) if args.iou_type else evaluable_types(detected, truth)
    if not iou_types:
        raise UserError(
            "Results and annotations share neither boxes nor masks: give files that all hold one "
            "of them."
        )
    for iou_type in iou_types:
        for results in (results for side in sides for results in side):
            check_iou_type(results, iou_type, truth)
    record: dict[str, Any] = {
        "annotations": str(args.annotations),
        "first": [str(path) for path in paths[0]],
        "second": [str(path) for path in paths[1]],
        "images": len(truth.imgs),
        "resamples": args.resamples,
        "seed": args.seed,
        "level": 0.95,
        "unit": "per cent",
    }
    parts = []
    for iou_type in iou_types:
        evaluated = [
            [
                match(truth, results, iou_type, label=f"Evaluating {path}", progress=True)
                for path, results in zip(side_paths, side, strict=True)
            ]
            for side_paths, side in zip(paths, sides, strict=True)
        ]
        found = paired_bootstrap(
            *evaluated, resamples=args.resamples, seed=args.seed, progress=True
        )
        record[iou_type] = {
            "overall": _in_per_cent(found.overall),
            "classes": {name: _in_per_cent(table) for name, table in found.classes.items()},
        }
        parts.append(_table(TITLES[iou_type], found))
    caption = (
        f"In per cent. First: {_runs(paths[0])}; second: {_runs(paths[1])}. Interval: 95 %, "
        f"{args.resamples:,} paired resamples of {len(truth.imgs):,} images. Second better: share "
        "of resamples in which it is strictly better. Do not trust the interval of a class with "
        "objects in a few images only: resamples of them show too little."
    )
    if args.json:
        write_text_whole(args.json, json.dumps(record, indent=2) + "\n")
    return "\n\n".join([*parts, caption])


def _runs(paths: list[Path]) -> str:
    names = ", ".join(map(str, paths))
    return names if len(paths) == 1 else f"mean of {len(paths)} runs ({names})"


def _in_per_cent(table: dict[str, Difference]) -> dict[str, dict[str, float | None]]:
    return {
        metric: {
            name: None if value is None else 100 * value
            for name, value in difference._asdict().items()
        }
        for metric, difference in table.items()
    }


def _table(title: str, found: Comparison) -> str:
    rows = list(found.overall.items())
    rows += [(f"AP, {name}", table["AP"]) for name, table in found.classes.items()]
    cells = [[title, "First", "Second", "Difference", "95 % interval", "Second better"]]
    cells += [[name, *_cells(row)] for name, row in rows]
    return aligned_table(cells)


def _cells(row: Difference) -> list[str]:
    """Empty where there are no objects, or none in any resample."""
    interval = "" if row.low is None else f"{100 * row.low:+.2f} {100 * row.high:+.2f}"
    numbers = ((row.first, ".2f"), (row.second, ".2f"), (row.difference, "+.2f"))
    first, second, difference = (
        "" if value is None else format(100 * value, form) for value, form in numbers
    )
    better = "" if row.better is None else f"{100 * row.better:.1f}"
    return [first, second, difference, interval, better]


if __name__ == "__main__":
    sys.exit(main())
