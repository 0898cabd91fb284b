"""COCO's AP of resampled images from the matches of one evaluation, and arms compared by it.

A resample draws as many images as there are, with replacement, and AP on it is what pycocotools
would say of a dataset that holds an image as often as it was drawn. Which detection matches which
object does not depend on the other images, so the images are evaluated once; a resample only
weights their detections (Efron and Tibshirani 1993, chapters 6 and 13).
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain, pairwise
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import sparse
from tqdm import tqdm

from repr_det.detection.coco_results import IOU_75, METRICS
from repr_det.detection.matching import ClassMatches, Matches
from repr_det.errors import UserError

RECALLS = 101
"""pycocotools' recall levels: 0, 0.01, ..., 1."""

_BLOCK = 2**20
"""Matched detections times resamples that are worked on at once: more need memory, fewer time."""


class Difference(NamedTuple):
    """A metric of two arms, as shares of 1; None where no image holds an object that counts.

    Attributes:
        first: mean over the runs of the first arm, all images once.
        second: the same of the second.
        difference: second minus first.
        low: lower end of the percentile interval of the difference.
        high: upper end.
        better: share of resamples in which the second is strictly better.
    """

    first: float | None
    second: float | None
    difference: float | None
    low: float | None
    high: float | None
    better: float | None


class Comparison(NamedTuple):
    """Two arms by metric, overall (mean over classes, as COCO's) and by class."""

    overall: dict[str, Difference]
    classes: dict[str, dict[str, Difference]]


def resample_counts(images: int, resamples: int, seed: int) -> NDArray[np.int32]:
    """How often each image is drawn.

    Args:
        images: I, drawn I times with replacement.
        resamples: R.
        seed: of the draws.

    Returns:
        (R, I), rows sum up to I.
    """
    generator = np.random.default_rng(seed)
    counts = np.empty((resamples, images), dtype=np.int32)
    for row in counts:
        row[:] = np.bincount(generator.integers(images, size=images), minlength=images)
    return counts


def average_precision(
    matches: Matches,
    counts: NDArray[np.int32],
    *,
    label: str = "Resampling",
    progress: bool = False,
) -> NDArray[np.float64]:
    """AP by resample, class and metric: what pycocotools says of images that occur repeatedly.

    Args:
        matches: of I images.
        counts: (R, I), how often each image occurs; ones for AP as usual.
        label: of the progress bar.
        progress: show one.

    Returns:
        (R, classes, :data:`METRICS`), shares of 1; NaN where a class has no objects. The overall AP
        is the mean over classes without NaN.
    """
    values = np.empty((len(counts), len(matches.classes), len(METRICS)))

    def one(number: int, found: ClassMatches) -> None:
        values[:, number] = _class_precision(found, counts)

    # NumPy works outside of Python's lock, so threads share the classes.
    with (
        ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool,
        tqdm(total=len(matches.classes), desc=label, unit="class", disable=not progress) as bar,
    ):
        jobs = [pool.submit(one, *pair) for pair in enumerate(matches.classes.values())]
        for job in jobs:
            job.result()
            bar.update()
    return values


def _class_precision(found: ClassMatches, counts: NDArray[np.int32]) -> NDArray[np.float64]:
    """(R, METRICS) of a class in each of R resamples."""
    columns = _Columns(found, int(counts.max(initial=0)))
    areas = [
        _Area(columns, objects, positives, falses)
        for objects, positives, falses in zip(
            found.objects,
            found.positives[..., columns.detections],
            found.falses[..., columns.detections],
            strict=True,
        )
    ]
    rows = max(1, _BLOCK // max(1, *(len(area.matched) for area in areas)))
    values = np.empty((len(counts), len(METRICS)))
    for begin in range(0, len(counts), rows):
        block = counts[begin : begin + rows]
        weights = columns.weights(block)
        everything, *sized = (area.precision(block, weights) for area in areas)
        values[begin : begin + rows] = np.stack(
            [
                *(everything.mean(axis=1), everything[:, 0], everything[:, IOU_75]),
                *(precision.mean(axis=1) for precision in sized),
            ],
            axis=1,
        )
    return values


class _Columns:
    """The detections of a class, and how often each occurs in a resample.

    A detection occurs as often as its image. Where the order of an image's copies matters, see
    :func:`_expand_ties`, a column is one copy, which occurs or does not.

    Attributes:
        detections: (C,) indices of the columns' detections.
        sources: (C,) indices of what :meth:`weights` returns.
    """

    def __init__(self, found: ClassMatches, copies: int) -> None:
        self.detections, copy = _expand_ties(found, copies)
        pairs = found.images[self.detections] * (copies + 1) + copy
        occurring, self.sources = np.unique(pairs, return_inverse=True)
        self._images, self._copies = np.divmod(occurring, copies + 1)

    def weights(self, counts: NDArray[np.int32]) -> NDArray[np.int32]:
        """(R, S), how often each of S images or copies of them occurs."""
        weights = counts.take(self._images, axis=1)
        tied = np.flatnonzero(self._copies)
        weights[:, tied] = weights[:, tied] >= self._copies[tied]
        return weights


class _Area:
    """A range of area of one class.

    Precision matters at matched detections alone. Of the detections between these, only the number
    of false positives matters. It is the same at every IoU threshold, except for detections that
    are matched at another threshold.

    Attributes:
        matched: (M,) columns that are a true positive at some threshold, or false positives at some
            thresholds and ignored at others.
    """

    def __init__(
        self,
        columns: _Columns,
        objects: NDArray[np.int64],
        positives: NDArray[np.bool_],
        falses: NDArray[np.bool_],
    ) -> None:
        base = falses.any(axis=0)
        self._objects = objects
        self.matched = np.flatnonzero((positives | (falses != base)).any(axis=0))
        self._sources = columns.sources[self.matched]
        # (M, S), how many false positives of an image stand after a matched column and up to the
        # next.
        false = np.flatnonzero(base)
        segment = np.searchsorted(self.matched, false)
        inside = segment < len(self.matched)
        shape = len(self.matched), int(columns.sources.max(initial=-1)) + 1
        entries = np.ones(int(inside.sum()), dtype=np.int32)
        places = segment[inside], columns.sources[false[inside]]
        self._between = sparse.csr_matrix((entries, places), shape=shape, dtype=np.int32)
        self._thresholds = []
        for positive, false_here in zip(
            positives[:, self.matched], falses[:, self.matched], strict=True
        ):
            # What a column counts as a detection, less what it counts among the false positives.
            shift = (positive | false_here).astype(np.int32) - base[self.matched]
            chosen = np.flatnonzero(positive | (shift != 0))
            self._thresholds.append((chosen, positive[chosen].astype(np.int32), shift[chosen]))

    def precision(
        self, counts: NDArray[np.int32], weights: NDArray[np.int32]
    ) -> NDArray[np.float64]:
        """(R, IoU thresholds), AP in each of R resamples; NaN in those without objects.

        Args:
            counts: (R, I), how often each image occurs.
            weights: from :meth:`_Columns.weights` for the same resamples.
        """
        objects = counts.take(self._objects, axis=1).sum(axis=1)
        values = np.zeros((len(counts), len(self._thresholds)))
        values[objects == 0] = np.nan
        if not objects.any() or not len(self.matched):
            return values
        levels = _levels(objects)
        falses = np.cumsum((self._between @ weights.T).T, axis=1, dtype=np.int32)
        occurring = weights.take(self._sources, axis=1)
        rows = np.arange(len(counts), dtype=np.int32)[:, None] * np.int32(levels.shape[1])
        for number, (chosen, positive, shift) in enumerate(self._thresholds):
            if not positive.any():
                continue
            here = occurring.take(chosen, axis=1)
            hits = here if positive.all() else here * positive
            hits = np.cumsum(hits, axis=1, dtype=np.int32)
            total = falses.take(chosen, axis=1)
            if shift.any():
                total += np.cumsum(here * shift, axis=1, dtype=np.int32)
            precision = hits / (total + np.spacing(1))
            np.maximum.accumulate(precision[:, ::-1], axis=1, out=precision[:, ::-1])
            # Recall grows at true positives only, and each level takes the best precision from
            # where recall first reaches it: a detection's counts once for each level it reaches.
            reached = levels.ravel().take(hits + rows)
            reached[:, 1:] -= reached[:, :-1].copy()
            values[:, number] += np.einsum("re,re->r", precision, reached) / RECALLS
        return values


def _expand_ties(found: ClassMatches, copies: int) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
    """Columns for the detections, where ties inside an image are kept apart.

    pycocotools' stable order of a doubled image with a tie a, b is a, b, a, b. Weights alone would
    make it a, a, b, b; so the tie gets a column for each copy and detection. Ties between images
    stay as they are, and so do ties without a true positive, in which the order does not matter.

    Args:
        found: D detections.
        copies: how often an image occurs at most.

    Returns:
        (C,) indices of detections, and (C,) the copy that a column stands for, 0 for all.
    """
    size = len(found.images)
    every = np.arange(size), np.zeros(size, dtype=np.int32)
    if copies < 2 or size < 2:
        return every
    new = (np.diff(found.scores) != 0) | (np.diff(found.images) != 0)
    starts = np.flatnonzero(np.concatenate([[True], new]))
    group = np.repeat(np.arange(len(starts)), np.diff(starts, append=size))
    hits = np.logical_or.reduceat(found.positives.any(axis=(0, 1)), starts)
    expanded = (hits & (np.bincount(group) > 1))[group]
    if not expanded.any():
        return every
    order = np.repeat(every[0], np.where(expanded, copies, 1))
    numbers = np.arange(len(order)) - np.searchsorted(order, order) + 1
    copy = np.where(expanded[order], numbers, 0).astype(np.int32)
    sorting = np.lexsort((order, copy, group[order]))
    return order[sorting], copy[sorting]


def _levels(objects: NDArray[np.int64]) -> NDArray[np.float64]:
    """How many recall levels are reached with each number of objects found.

    Args:
        objects: (R,) in each resample.

    Returns:
        (R, max(objects) + 1) by resample and number of objects found.
    """
    recalls = np.linspace(0, 1, RECALLS)
    size = np.maximum(objects, 1)[:, None]
    # The comparison is pycocotools' own, so that 0.29 and 29 / 100 are equal or not as they are
    # there; the product that finds the number may be one off.
    needed = np.ceil(recalls * size).astype(np.int64)
    needed -= (needed > 0) & ((needed - 1) / size >= recalls)
    needed += needed / size < recalls
    width = int(size.max()) + 1
    flat = needed + np.arange(len(objects))[:, None] * width
    first = np.bincount(flat.ravel(), minlength=len(objects) * width)
    return np.cumsum(first.reshape(-1, width), axis=1).astype(float)


def paired_bootstrap(
    arms: Mapping[str, Sequence[Matches]],
    baseline: str,
    *,
    resamples: int = 1000,
    seed: int = 0,
    level: float = 0.95,
    progress: bool = False,
) -> dict[str, Comparison]:
    """Compare arms with one of them on the same resamples of the images.

    The intervals say how far a difference depends on which images were evaluated. Runs (seeds) are
    not resampled: an arm's value is the mean over its runs inside each resample.

    Args:
        arms: by name, a run or more of each, all of the same images and classes.
        baseline: the name of the arm that all others are compared with.
        resamples: R.
        seed: of the resamples.
        level: of each interval; see :func:`corrected_level`.
        progress: show a bar for each run.

    Returns:
        By arm, the baseline left out: the baseline first, the arm second.

    Raises:
        UserError: no runs, runs of different images or classes, or an argument out of range.
    """
    check_arms(arms, baseline)
    _check(arms, resamples, level)
    every = list(chain.from_iterable(arms.values()))
    images = len(every[0].image_ids)
    # The first row is every image once, so that it goes the same way.
    once = np.ones((1, images), dtype=np.int32)
    counts = np.concatenate([once, resample_counts(images, resamples, seed)])
    values = {}
    for name, runs in arms.items():
        total = np.zeros((len(counts), len(every[0].classes), len(METRICS)))
        for number, run in enumerate(runs, 1):
            label = f"Resampling {name}, run {number}"
            total += average_precision(run, counts, label=label, progress=progress)
        values[name] = total / len(runs)
    first = values[baseline]
    return {
        name: Comparison(
            _differences(class_mean(first), class_mean(second), level),
            {
                category: _differences(first[:, number], second[:, number], level)
                for number, category in enumerate(every[0].classes)
            },
        )
        for name, second in values.items()
        if name != baseline
    }


def _check(arms: Mapping[str, Sequence[Matches]], resamples: int, level: float) -> None:
    if resamples < 1 or not 0 < level < 1:
        raise UserError(
            f"There is no bootstrap with {resamples} resamples and level {level}. Set at least "
            "1 and a level between 0 and 1."
        )
    for one, other in pairwise(chain.from_iterable(arms.values())):
        if one.image_ids != other.image_ids or list(one.classes) != list(other.classes):
            raise UserError(
                "Evaluations of different images or classes cannot be compared. Evaluate all "
                "runs on the same annotations."
            )


def check_arms(arms: Mapping[str, Sequence[Any]], baseline: str) -> None:
    """Refuse arms that cannot be compared.

    Raises:
        UserError: there are fewer than two arms, an arm has no runs, or the baseline is not an arm.
    """
    if len(arms) < 2:
        raise UserError(f"There are {len(arms)} arms. Set at least two to compare.")
    for name, runs in arms.items():
        if isinstance(runs, (str, bytes)) or not runs:
            raise UserError(f"Arm {name} is {runs!r}. Set a list of one or more runs.")
    if baseline not in arms:
        raise UserError(f"The baseline {baseline} is not an arm. Set one of {', '.join(arms)}.")


def corrected_level(comparisons: int, level: float = 0.95) -> float:
    """The level of each interval at which all of them together have a level (Bonferroni)."""
    return 1 - (1 - level) / max(comparisons, 1)


def class_mean(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """(R, METRICS) from (R, classes, METRICS); NaN where no class has objects."""
    present = ~np.isnan(values)
    number = present.sum(axis=1)
    total = np.where(present, values, 0).sum(axis=1)
    return np.divide(total, number, out=np.full_like(total, np.nan), where=number > 0)


def _differences(
    first: NDArray[np.float64], second: NDArray[np.float64], level: float
) -> dict[str, Difference]:
    """By metric, from (1 + R, METRICS) of each arm; the first row is without resampling."""
    found = {}
    for metric, one, other in zip(METRICS, first.T, second.T, strict=True):
        difference = other - one
        numbers: list[float | None] = [None] * 6
        if not math.isnan(difference[0]):
            numbers[:3] = float(one[0]), float(other[0]), float(difference[0])
        # A class of few images may have no object in a resample, which says nothing about it.
        drawn = difference[1:][~np.isnan(difference[1:])]
        if numbers[0] is not None and len(drawn):
            ends = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2])
            numbers[3:] = *ends.tolist(), float((drawn > 0).mean())
        found[metric] = Difference(*numbers)
    return found
