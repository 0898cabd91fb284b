"""What runs came to: final metrics by side, their difference, its interval, and time."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from repr_det.detection.bootstrap import Matches, average_precision, match, paired_bootstrap
from repr_det.detection.coco_results import (
    BBOX,
    METRICS,
    SEGM,
    Annotations,
    evaluable_types,
    read_results,
    read_truth,
)
from repr_det.detection.evaluation import annotations_of
from repr_det.errors import UserError, sentence
from repr_det.report.plots import REPR, STANDARD
from repr_det.report.run import CLASSIFICATION, RunFolder, training_seconds
from repr_det.report.statistics import Estimate, estimate, paired_difference

Sides = dict[str, list[RunFolder]]

_TITLES = {
    **{
        f"{kind}/{m}": f"{word} {m}"
        for kind, word in ((BBOX, "box"), (SEGM, "mask"))
        for m in METRICS
    },
    "accuracy/top1": "top-1 accuracy",
    "accuracy/top5": "top-5 accuracy",
    "accuracy/loss": "held-out loss",
}
"""The metrics of the summary, best known first."""

MAIN = {False: f"{BBOX}/AP", True: "accuracy/top1"}
"""The metric that a run is judged by, by whether it is of classification."""


class Row(NamedTuple):
    """A metric of both sides at one iteration.

    Attributes:
        title: of the metric.
        unit: ``"%"`` or empty.
        sides: mean and spread over the runs of each side.
        difference: RePr minus standard, means over runs; None with one side only.
        low: lower end of its 95 % interval; None where there is no interval.
        high: upper end.
    """

    title: str
    unit: str
    sides: dict[str, Estimate]
    difference: float | None
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Outcome:
    """What is known of the difference.

    Attributes:
        iteration: of the evaluations that are compared; None where there is none that all have.
        rows: by metric.
        interval: in words, what the intervals are or why there are none.
    """

    iteration: int | None
    rows: dict[str, Row]
    interval: str


def by_side(runs: Sequence[RunFolder]) -> Sides:
    """Standard runs and RePr runs, a side without runs left out."""
    sides = {
        STANDARD: [run for run in runs if not run.uses_repr],
        REPR: [run for run in runs if run.uses_repr],
    }
    return {side: found for side, found in sides.items() if found}


def check_comparable(runs: Sequence[RunFolder]) -> None:
    """Refuse runs whose metrics do not mean the same.

    Raises:
        UserError: no runs, one given twice, or of different tasks or test sets; a held-out part
            of another size holds other images.
    """
    if not runs:
        raise UserError("There are no runs to report on: give at least one folder.")
    folders = [run.folder.resolve() for run in runs]
    for folder in folders:
        if folders.count(folder) > 1:
            raise UserError(f"{folder} was given twice: give each run once.")
    for run in runs[1:]:
        for what, mine, first in (
            ("task", run.task, runs[0].task),
            ("test set", run.test_set, runs[0].test_set),
            ("number of held-out images", run.held_out, runs[0].held_out),
        ):
            if mine != first:
                raise UserError(
                    f"The {what} of {run.folder} is {mine}, that of {runs[0].folder} {first}: "
                    "their metrics cannot be compared, so report on them one by one."
                )


def last_common_evaluation(runs: Sequence[RunFolder]) -> int | None:
    """The last iteration at which all runs were evaluated; None where there is none."""
    metric = MAIN[runs[0].task == CLASSIFICATION]
    found = [run.evaluations(metric) for run in runs]
    if any(series is None for series in found):
        return None
    common = set.intersection(*(set(series[0].astype(int).tolist()) for series in found))
    return max(common, default=None)


def value_at(run: RunFolder, metric: str, iteration: int) -> float | None:
    """A metric as it was evaluated at an iteration; None where it was not, or is not finite."""
    series = run.evaluations(metric)
    if series is None:
        return None
    values = series[1][series[0] == iteration]
    return float(values[0]) if len(values) and np.isfinite(values[0]) else None


def outcome(runs: Sequence[RunFolder], resamples: int = 1000, progress: bool = False) -> Outcome:
    """Final metrics by side, and intervals of their differences where there can be any.

    They are paired over the seeds that both sides have, where these are at least two and no side
    has two runs of one seed. Else detection has a paired bootstrap over the images of the last
    evaluation.

    Args:
        runs: comparable ones, see :func:`check_comparable`.
        resamples: of the bootstrap; 0 leaves it out.
        progress: show bars.
    """
    sides = by_side(runs)
    iteration = last_common_evaluation(runs)
    if iteration is None:
        return Outcome(None, {}, "There is no evaluation yet that all runs have.")
    rows = {}
    for metric, title in _TITLES.items():
        values = {
            side: [value_at(run, metric, iteration) for run in group]
            for side, group in sides.items()
        }
        if any(value is None for group in values.values() for value in group):
            continue
        estimates = {side: estimate(group) for side, group in values.items()}
        difference = None
        if len(sides) == 2:
            difference = estimates[REPR].mean - estimates[STANDARD].mean
        unit = "" if metric.endswith("loss") else "%"
        rows[metric] = Row(title, unit, estimates, difference)
    if len(sides) < 2:
        return Outcome(iteration, rows, _one_side(sides))
    if (found := _with_seeds(iteration, rows, sides)) is not None:
        return found
    if runs[0].task == CLASSIFICATION:
        words = (
            "One run each has no interval: seeds alone can make such a difference."
            if len(runs) == 2
            else "There is no interval: the sides share fewer than two seeds (SEED, one run each)."
        )
        return Outcome(iteration, rows, words)
    try:
        return _with_bootstrap(iteration, rows, sides, resamples, progress)
    except UserError as error:
        return Outcome(iteration, rows, f"No interval could be computed. {sentence(error)}")


def _one_side(sides: Sides) -> str:
    (side,) = sides
    return f"Only {side} runs were given, so there is no difference to look at."


def _with_seeds(iteration: int, rows: dict[str, Row], sides: Sides) -> Outcome | None:
    """Paired over seeds; None where the sides share fewer than two, or have several runs of one."""
    seeds = {side: [run.cfg.SEED for run in group] for side, group in sides.items()}
    common = set(seeds[STANDARD]) & set(seeds[REPR]) - {-1}
    unique = all(numbers.count(seed) == 1 for numbers in seeds.values() for seed in common)
    if len(common) < 2 or not unique:
        return None
    found = {}
    for metric, row in rows.items():
        by_seed = {
            side: {
                run.cfg.SEED: value_at(run, metric, iteration)
                for run in group
                if run.cfg.SEED in common
            }
            for side, group in sides.items()
        }
        paired = paired_difference(by_seed[REPR], by_seed[STANDARD])
        low, high = paired.mean - paired.half_width, paired.mean + paired.half_width
        found[metric] = row._replace(difference=paired.mean, low=low, high=high)
    words = (
        f"Differences and intervals (95 %, Student's t) are over {len(common)} pairs of runs with "
        "the same seed."
    )
    return Outcome(iteration, found, words)


def _with_bootstrap(
    iteration: int, rows: dict[str, Row], sides: Sides, resamples: int, progress: bool
) -> Outcome:
    if not resamples:
        return Outcome(iteration, rows, "The bootstrap was left out, so there is no interval.")
    runs = [run for group in sides.values() for run in group]
    for run in runs:
        last = int(run.evaluations(MAIN[False])[0][-1])
        if last != iteration:
            raise UserError(
                f"{run.folder} was evaluated last at iteration {last}, not at {iteration}, so its "
                "detections are of another moment."
            )
    truth = read_truth(*annotations_of(runs[0].cfg, runs[0].test_set))
    results = [[read_results(run.folder, truth) for run in group] for group in sides.values()]
    found, images = dict(rows), len(truth.imgs)
    detected = [each for side in results for found_by_run in side for each in found_by_run]
    for iou_type in evaluable_types(detected, truth):
        matches = [[matches_of(run, iou_type) for run in sides[side]] for side in (STANDARD, REPR)]
        compared = paired_bootstrap(*matches, resamples=resamples, progress=progress).overall
        for metric, difference in compared.items():
            row = found.get(f"{iou_type}/{metric}")
            if row is not None and difference.low is not None:
                low, high = 100 * difference.low, 100 * difference.high
                found[f"{iou_type}/{metric}"] = row._replace(low=low, high=high)
    several = "" if len(runs) == 2 else ", a side being the mean of its runs"
    words = (
        f"Intervals (95 %) are of a paired bootstrap of {resamples:,} resamples of the {images:,} "
        f"images{several}. They say how far a difference depends on the images; "
        + (
            "with one run each they say nothing about other seeds."
            if len(runs) == 2
            else "seeds are not resampled."
        )
    )
    return Outcome(iteration, found, words)


def matches_of(run: RunFolder, iou_type: str) -> Matches:
    """The evaluation of the detections that a run left in its folder.

    Raises:
        UserError: no detections or no annotations, or others than those of the
            run's last evaluation.
    """
    annotations = annotations_of(run.cfg, run.test_set)
    found = _matches(annotations, run.folder, iou_type)
    series = run.evaluations(f"{iou_type}/AP")
    once = np.ones((1, len(found.image_ids)), dtype=np.int32)
    here = 100 * float(np.nanmean(average_precision(found, once)[..., 0]))
    if series is not None and abs(here - series[1][-1]) > 0.05:
        raise UserError(
            f"The detections of {run.folder} have {_TITLES[f'{iou_type}/AP']} {here:.1f} on "
            f"{annotations.path}, but {series[1][-1]:.1f} was recorded: the dataset has changed, "
            "or they are of another evaluation, so evaluate the run again."
        )
    return found


@functools.lru_cache(maxsize=16)
def _matches(annotations: Annotations, folder: Path, iou_type: str) -> Matches:
    truth = read_truth(*annotations)
    return match(truth, read_results(folder, truth), iou_type)


def seconds_per_step(run: RunFolder) -> dict[str, float]:
    """Median time of a training step in seconds, by phase (``"full"``, ``"S2"``)."""
    if "time" not in run.metrics:
        return {}
    iterations, seconds = run.metrics["time"]
    inside = np.zeros(len(iterations), dtype=bool)
    for begin, end in run.spans:
        inside |= (iterations >= begin) & (iterations < end)
    phases = {"full": seconds[~inside], "S2": seconds[inside]}
    return {name: float(np.median(found)) for name, found in phases.items() if len(found)}


def duration(run: RunFolder) -> str:
    """Time of a run's training steps in words; empty where none was recorded."""
    seconds = training_seconds(run.metrics)
    if seconds is None:
        return ""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
