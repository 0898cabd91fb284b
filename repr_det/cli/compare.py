r"""Compare detectors on one COCO-format annotation file, with confidence intervals.

  repr-det compare annotations.json results_a.json results_b.json
  repr-det compare annotations.json output/standard output/repr --json comparison.json
  repr-det compare annotations.json --arm standard output/standard_* --arm N-1 output/n1_* \
      --arm N-5 output/n5_* --baseline standard

An arm is one results file or run folder, or several: one for each seed, whose mean is compared.
Each arm is compared with the baseline by a paired bootstrap over images. All arms are evaluated on
the same resamples. An interval says how much a difference depends on the images, not on the seeds.
With three arms or more the intervals are wider, so that all intervals of one metric hold together
with 95 % (Bonferroni). The tables show AP by class, and --json writes every metric by class. Both
are in per cent.
"""

from __future__ import annotations

import argparse
import json
import sys
from itertools import chain
from pathlib import Path
from typing import Any

from repr_det.cli.arguments import add_arms, add_json, baseline_of, named_arms
from repr_det.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command line."""
    parser.add_argument("annotations", type=Path, metavar="ANNOTATIONS", help="COCO-format JSON")
    parser.add_argument(
        "results",
        nargs="*",
        metavar="RESULTS",
        help="two arms, the baseline first: results files or run folders",
    )
    add_arms(parser, "RESULTS")
    parser.add_argument(
        "--iou-type",
        choices=("bbox", "segm"),
        help="compare only boxes or only masks (default: all that every result holds)",
    )
    parser.add_argument(
        "--resamples", type=int, default=1000, metavar="N", help="resamples of the images"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the resamples")
    add_json(parser, "every metric by class")


def _arms(args: argparse.Namespace) -> dict[str, list[str]]:
    """Results by arm, of the two ways to name them."""
    named = named_arms(args)
    if bool(named) == bool(args.results) or (args.results and len(args.results) != 2):
        raise UserError("Set two results, or --arm NAME RESULTS... for each arm.")
    if args.results:
        sides = [[s] if Path(s).exists() else s.split(",") for s in args.results]
        for side, files in zip(args.results, sides, strict=True):
            if len(files) > 1:
                print(
                    f"repr-det compare: {side} will be refused in 0.3. Use --arm NAME RESULTS...",
                    file=sys.stderr,
                )
        return dict(zip(("first", "second"), sides, strict=True))
    if len(named) < 2:
        raise UserError("One arm cannot be compared. Set a second one.")
    return named


def run(args: argparse.Namespace) -> None:
    """Compare, print the tables and write the JSON."""
    from repr_det.detection.coco_results import TITLES, results_path
    from repr_det.detection.comparison import compare_results
    from repr_det.engine.files import check_output, write_text_whole

    if args.resamples < 1:
        raise UserError(f"--resamples is {args.resamples}. Set at least 1.")
    if args.seed < 0:
        raise UserError(f"--seed is {args.seed}. Set 0 or more.")
    arms = _arms(args)
    baseline = baseline_of(arms, args.baseline)
    files = {name: [str(results_path(path)) for path in arm] for name, arm in arms.items()}
    check_output("--json", args.json, [args.annotations, *chain(*files.values())])
    found = compare_results(
        args.annotations,
        arms,
        baseline,
        iou_type=args.iou_type,
        resamples=args.resamples,
        seed=args.seed,
        progress=True,
    )
    tables = []
    for iou_type, by_arm in found["compared"].items():
        for name, comparison in by_arm.items():
            title = f"{TITLES[iou_type]}, {name}" if args.arm else TITLES[iou_type]
            tables.append(_table(title, comparison, found["level"]))
    print("\n\n".join([*tables, _caption(arms, baseline, args.resamples, found)]))
    if args.json:
        record = {
            "annotations": str(args.annotations),
            **({"baseline": baseline, "arms": files} if args.arm else files),
            "images": found["images"],
            "resamples": args.resamples,
            "seed": args.seed,
            "level": found["level"],
            "unit": "per cent",
        }
        for iou_type, by_arm in found["compared"].items():
            record[iou_type] = by_arm if args.arm else by_arm["second"]
        write_text_whole(args.json, json.dumps(record, indent=2) + "\n")


def _caption(
    arms: dict[str, list[str]], baseline: str, resamples: int, found: dict[str, Any]
) -> str:
    runs = "; ".join(f"{name}: {_runs(paths)}" for name, paths in arms.items())
    count, level = len(arms) - 1, f"{100 * found['level']:.4g} %"
    several = (
        f" The {count} intervals of one metric hold together with 95 % (Bonferroni: each has "
        f"{level})."
        if count > 1
        else ""
    )
    undetected = found["undetected"]
    without = (
        f", up to {undetected:,} of them without a detection in a result" if undetected else ""
    )
    return (
        f"In per cent; compared with {baseline}. {runs}. Interval: {level}, {resamples:,} paired "
        f"resamples of {found['images']:,} images{without}.{several} Better: share of resamples in "
        "which the arm is strictly better. Do not trust the interval of a class with objects in a "
        "few images only: resamples of them show too little."
    )


def _runs(paths: list[str]) -> str:
    names = ", ".join(paths)
    return names if len(paths) == 1 else f"mean of {len(paths)} runs ({names})"


def _table(title: str, comparison: dict[str, Any], level: float) -> str:
    from tabulate import tabulate

    rows = list(comparison["overall"].items())
    rows += [(f"AP, {name}", table["AP"]) for name, table in comparison["classes"].items()]
    head = [title, "Baseline", "Arm", "Difference", f"{100 * level:.4g} % interval", "Better"]
    align = ("left", *["right"] * (len(head) - 1))
    cells = [[name, *_cells(row)] for name, row in rows]
    return tabulate(cells, head, tablefmt="github", disable_numparse=True, colalign=align)


def _cells(row: dict[str, float | None]) -> list[str]:
    """Empty where there are no objects, or none in any resample."""
    forms = {"first": ".2f", "second": ".2f", "difference": "+.2f"}
    numbers = ["" if row[key] is None else format(row[key], form) for key, form in forms.items()]
    interval = "" if row["low"] is None else f"{row['low']:+.2f} {row['high']:+.2f}"
    return [*numbers, interval, "" if row["better"] is None else f"{row['better']:.1f}"]
