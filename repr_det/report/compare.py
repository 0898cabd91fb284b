"""How arms of runs differ: final metrics, differences with their intervals, and time."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
from scipy import stats

from repr_det.detection.bootstrap import (
    average_precision,
    class_mean,
    corrected_level,
    paired_bootstrap,
)
from repr_det.detection.coco_results import (
    evaluable_types,
    read_results,
)
from repr_det.detection.evaluation import truth_of
from repr_det.detection.matching import Matches, match
from repr_det.errors import UserError, sentence
from repr_det.report.arms import Arms, last_common_evaluation, value_at
from repr_det.report.metrics import BY_NAME, MAIN, METRICS
from repr_det.report.run import RunFolder, training_seconds
from repr_det.tasks import CLASSIFICATION


class Estimate(NamedTuple):
    """A mean with its spread.

    Attributes:
        mean: of the values.
        deviation: sample standard deviation (n - 1); None for a single value.
        half_width: half of Student's t-interval of the mean; None for a single value.
    """

    mean: float
    deviation: float | None
    half_width: float | None


def estimate(values: Sequence[float], level: float = 0.95) -> Estimate:
    """Mean, standard deviation and t-interval of the mean with n - 1 degrees of freedom.

    Args:
        values: n numbers, at least one.
        level: of the interval.
    """
    count, mean = len(values), float(np.mean(values))
    if count == 1:
        return Estimate(mean, None, None)
    width = stats.t.ppf((1 + level) / 2, count - 1) * stats.sem(values)
    return Estimate(mean, float(np.std(values, ddof=1)), float(width))


def paired_difference(
    ours: Mapping[int, float], reference: Mapping[int, float], level: float = 0.95
) -> Estimate | None:
    """The difference of two arms, taken seed by seed.

    Args:
        ours: a value by seed.
        reference: a value by seed, subtracted.
        level: of the interval.

    Returns:
        Over the seeds that both have; None where there are none.
    """
    seeds = sorted(ours.keys() & reference.keys())
    return estimate([ours[s] - reference[s] for s in seeds], level) if seeds else None


class Difference(NamedTuple):
    """An arm minus the baseline, both means; without ends where there is no interval."""

    mean: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Row:
    """A metric of all arms at one iteration.

    Attributes:
        title: of the metric.
        unit: ``"%"`` or empty.
        arms: mean and spread of each arm: over its runs, or over the seeds that all arms have.
        differences: by arm, the baseline left out.
    """

    title: str
    unit: str
    arms: dict[str, Estimate]
    differences: dict[str, Difference] = field(default_factory=dict)


@dataclass(frozen=True)
class Outcome:
    """What is known of the differences.

    Attributes:
        iteration: of the evaluations that are compared; None where there is none that all have.
        rows: by metric.
        interval: in words, what the intervals are or why there are none.
        level: of each interval.
    """

    iteration: int | None
    rows: dict[str, Row]
    interval: str
    level: float = 0.95


def outcome(arms: Arms, resamples: int = 1000) -> Outcome:
    """Final metrics by arm, and intervals of their differences where there can be any.

    The intervals are paired over seeds if all arms share at least two and no arm has two runs of
    one seed. Runs of other seeds are left out then. Otherwise, those of detectors come from a
    paired bootstrap over the images of the last evaluation, and classifiers have none. Several
    comparisons widen the intervals; see :func:`repr_det.detection.bootstrap.corrected_level`.

    Args:
        arms: comparable runs.
        resamples: of the bootstrap; 0 leaves it out.
    """
    runs, task = arms.runs, arms.runs[0].task
    iteration = last_common_evaluation(runs)
    if iteration is None:
        return Outcome(None, {}, "There is no evaluation yet that all runs have.")
    rows = {}
    for metric in METRICS[task]:
        values = {
            name: [value_at(run, metric.name, iteration) for run in group]
            for name, group in arms.groups.items()
        }
        if any(value is None for group in values.values() for value in group):
            continue
        means = {name: estimate(group) for name, group in values.items()}
        differences = {
            n: Difference(means[n].mean - means[arms.baseline].mean) for n in arms.others
        }
        rows[metric.name] = Row(metric.title, metric.unit, means, differences)
    found = Outcome(iteration, rows, "", corrected_level(len(arms.others)))
    if not arms.others:
        words = f"There is one arm, {arms.baseline}, so there is no difference to look at."
        return replace(found, interval=words)
    if (by_seed := _with_seeds(found, arms)) is not None:
        return by_seed
    if task == CLASSIFICATION:
        words = (
            "One run each has no interval: seeds alone can make such a difference."
            if len(runs) == len(arms.groups)
            else "There is no interval: the arms share fewer than two seeds (SEED, one run each)."
        )
        return replace(found, interval=words)
    try:
        return _with_bootstrap(found, arms, resamples)
    except UserError as error:
        return replace(found, interval=f"No interval could be computed. {sentence(error)}")


def _level_in_words(outcome: Outcome, arms: Arms) -> tuple[str, str]:
    """The level of each interval, and a sentence about several."""
    count = len(arms.others)
    level = f"{100 * outcome.level:.4g} %"
    if count == 1:
        return level, ""
    return level, (
        f" Each of the {count} differences from {arms.baseline} has an interval of {level}, so "
        "that all of one metric hold together with 95 % (Bonferroni)."
    )


def _with_seeds(outcome: Outcome, arms: Arms) -> Outcome | None:
    """Over the seeds of all arms; None where these are fewer than two, or an arm has one twice."""
    by_seed = {
        name: {run.cfg.SEED: run for run in group if run.cfg.SEED >= 0}
        for name, group in arms.groups.items()
    }
    if sum(map(len, by_seed.values())) < sum(run.cfg.SEED >= 0 for run in arms.runs):
        return None
    seeds = sorted(set.intersection(*(set(runs) for runs in by_seed.values())))
    if len(seeds) < 2:
        return None
    rows = {}
    for metric, row in outcome.rows.items():
        values = {
            name: {seed: value_at(runs[seed], metric, outcome.iteration) for seed in seeds}
            for name, runs in by_seed.items()
        }
        means = {name: estimate(list(found.values())) for name, found in values.items()}
        differences = {}
        for name in arms.others:
            mean, _, half = paired_difference(values[name], values[arms.baseline], outcome.level)
            differences[name] = Difference(mean, mean - half, mean + half)
        rows[metric] = replace(row, arms=means, differences=differences)
    level, several = _level_in_words(outcome, arms)
    left_out = len(arms.runs) - len(seeds) * len(arms.groups)
    others = f" Runs of other seeds, or of none, are left out: {left_out}." if left_out else ""
    words = (
        f"Means, differences and intervals ({level}, Student's t) are over the {len(seeds)} seeds "
        f"that all arms have.{others}{several}"
    )
    return replace(outcome, rows=rows, interval=words)


def _with_bootstrap(outcome: Outcome, arms: Arms, resamples: int) -> Outcome:
    if not resamples:
        return replace(outcome, interval="The bootstrap was left out, so there is no interval.")
    runs = arms.runs
    for run in runs:
        last = int(run.evaluations(MAIN[run.task]).index[-1])
        if last != outcome.iteration:
            raise UserError(
                f"{run.folder} was evaluated last at iteration {last}, not at {outcome.iteration}, "
                "so its detections are those of another iteration."
            )
    truth = truth_of(runs[0].cfg, runs[0].test_set)
    # One after another: together, the detections of many runs may not fit into memory.
    kinds = [
        evaluable_types(found, truth) for run in runs if (found := read_results(run.folder, truth))
    ] or [evaluable_types([], truth)]
    rows = dict(outcome.rows)
    for iou_type in (kind for kind in kinds[0] if all(kind in each for each in kinds)):
        compared = paired_bootstrap(
            {
                name: [matches_of(run, iou_type) for run in group]
                for name, group in arms.groups.items()
            },
            arms.baseline,
            resamples=resamples,
            level=outcome.level,
            progress=sys.stderr.isatty(),
        )
        for name, comparison in compared.items():
            for metric, found in comparison.overall.items():
                row = rows.get(f"{iou_type}/{metric}")
                if row is not None and found.low is not None:
                    ends = Difference(row.differences[name].mean, 100 * found.low, 100 * found.high)
                    differences = {**row.differences, name: ends}
                    rows[f"{iou_type}/{metric}"] = replace(row, differences=differences)
    level, several = _level_in_words(outcome, arms)
    mean, seeds = "", "with one run each they say nothing about other seeds"
    if len(runs) > len(arms.groups):
        mean, seeds = ", an arm being the mean of its runs", "seeds are not resampled"
    words = (
        f"Intervals ({level}) are of a paired bootstrap of {resamples:,} resamples of the "
        f"{len(truth.imgs):,} images{mean}. They say how far a difference depends on the images; "
        f"{seeds}.{several}"
    )
    return replace(outcome, rows=rows, interval=words)


def matches_of(run: RunFolder, iou_type: str) -> Matches:
    """The matches of the detections that a run left in its folder, computed once.

    Args:
        run: of a detector.
        iou_type: ``"bbox"`` or ``"segm"``.

    Raises:
        UserError: there are no detections or annotations, or they are not those of the run's last
            evaluation.
    """
    if iou_type in run.matches:
        return run.matches[iou_type]
    truth, metric = truth_of(run.cfg, run.test_set), f"{iou_type}/AP"
    found = match(truth, read_results(run.folder, truth), iou_type)
    series = run.evaluations(metric)
    once = np.ones((1, len(found.image_ids)), dtype=np.int32)
    here = 100 * float(class_mean(average_precision(found, once))[0, 0])
    if series is not None and abs(here - series.iloc[-1]) > 0.05:
        raise UserError(
            f"The detections in {run.folder} have {BY_NAME[metric].title} {here:.1f} on "
            f"{truth.file.path}, but the run recorded {series.iloc[-1]:.1f}. The dataset or the "
            "detections have changed. Evaluate the run again."
        )
    run.matches[iou_type] = found
    return found


def seconds_per_step(run: RunFolder) -> dict[str, float]:
    """Median time of a training step in seconds, by phase (``"full"``, ``"S2"``)."""
    seconds = run.series("time")
    if seconds is None:
        return {}
    inside = np.zeros(len(seconds), dtype=bool)
    for begin, end in run.spans:
        inside |= (seconds.index >= begin) & (seconds.index < end)
    phases = {"full": seconds[~inside], "S2": seconds[inside]}
    return {name: float(found.median()) for name, found in phases.items() if len(found)}


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
