"""Comparison of results files in arms, in a form that can be written as JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from repr_det.detection.bootstrap import (
    Comparison,
    check_arms,
    corrected_level,
    paired_bootstrap,
)
from repr_det.detection.coco_results import (
    Truth,
    check_iou_type,
    evaluable_types,
    read_results,
    read_truth,
    results_path,
)
from repr_det.detection.matching import match
from repr_det.errors import UserError


def compare_results(
    annotations: str | Path,
    arms: Mapping[str, Sequence[str | Path]],
    baseline: str,
    *,
    iou_type: str | None = None,
    resamples: int = 1000,
    seed: int = 0,
    progress: bool = False,
) -> dict[str, Any]:
    """Compare arms with a baseline by :func:`repr_det.detection.bootstrap.paired_bootstrap`.

    Args:
        annotations: COCO-format file.
        arms: results files or run folders of each arm by its name.
        baseline: one of the arms.
        iou_type: ``"bbox"`` or ``"segm"``; None for all that results and annotations hold.
        resamples: of the images.
        seed: of the resamples.
        progress: show bars.

    Returns:
        ``"images"``, their number; ``"undetected"``, on how many of them a result has no detection,
        the most of any result; ``"level"`` of each interval, see
        :func:`repr_det.detection.bootstrap.corrected_level`; and under ``"compared"`` by IoU type
        and arm ``"overall"`` and ``"classes"``: per cent by metric, and by class and metric.

    Raises:
        UserError: files that are not there or do not fit one another.
    """
    check_arms(arms, baseline)
    paths = {name: [results_path(path) for path in files] for name, files in arms.items()}
    truth = read_truth(annotations)
    read = {name: [read_results(path, truth) for path in files] for name, files in paths.items()}
    every = [results for arm in read.values() for results in arm]
    level = corrected_level(len(arms) - 1)
    compared = {}
    for each in _iou_types(every, truth, iou_type):
        matches = {
            name: [
                match(truth, results, each, label=f"Evaluating {path}", progress=progress)
                for path, results in zip(paths[name], arm, strict=True)
            ]
            for name, arm in read.items()
        }
        found = paired_bootstrap(
            matches, baseline, resamples=resamples, seed=seed, level=level, progress=progress
        )
        compared[each] = {name: _as_record(comparison) for name, comparison in found.items()}
    undetected = max(
        len(truth.imgs.keys() - {entry["image_id"] for entry in results}) for results in every
    )
    return {
        "images": len(truth.imgs), "undetected": undetected, "level": level, "compared": compared,
    }  # fmt: skip


def _iou_types(
    every: Sequence[Sequence[dict[str, Any]]], truth: Truth, iou_type: str | None
) -> Sequence[str]:
    """What all results can be compared by: the given one, or all that there are.

    Raises:
        UserError: results without it, or nothing is shared.
    """
    found = (iou_type,) if iou_type else evaluable_types([d for each in every for d in each], truth)
    if not found:
        raise UserError(
            "Results and annotations share neither boxes nor masks. Set files that all hold one "
            "of them."
        )
    for each in found:
        for results in every:
            check_iou_type(results, each, truth)
    return found


def _as_record(comparison: Comparison) -> dict[str, Any]:
    overall, *classes = (
        {metric: in_per_cent(difference._asdict()) for metric, difference in table.items()}
        for table in (comparison.overall, *comparison.classes.values())
    )
    return {"overall": overall, "classes": dict(zip(comparison.classes, classes, strict=True))}


def in_per_cent(shares: Mapping[str, float | None]) -> dict[str, float | None]:
    """Shares of 1 in per cent; None stays None."""
    return {name: None if share is None else 100 * share for name, share in shares.items()}
