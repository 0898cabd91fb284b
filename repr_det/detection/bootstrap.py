"""COCO's AP of resampled images from the matches of one evaluation, and two sides compared by it.

A resample draws as many images as there are, with replacement, and AP on it is what pycocotools
would say of a dataset that holds an image as often as it was drawn. Which detection matches which
object does not depend on the other images, so the images are evaluated once; a resample only
weights their detections (Efron and Tibshirani 1993, chapters 6 and 13).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pycocotools.coco import COCO
from tqdm import tqdm

from repr_det.detection.coco_results import IOU_75, METRICS, evaluated_classes
from repr_det.errors import UserError

AREAS = 4
"""pycocotools' ranges of area: all, small, medium, large."""

RECALLS = 101
"""pycocotools' recall levels: 0, 0.01, ..., 1."""

_BLOCK = 2**20
"""Detections times resamples that are worked on at once: more need memory, fewer need time."""


@dataclass(frozen=True)
class ClassMatches:
    """Matches of one class; D detections in the order in which pycocotools counts them.

    Attributes:
        images: (D,) integers, position of a detection's image among all images.
        scores: (D,) falling; equal ones by image, and inside an image as the evaluation has them.
        positives: (areas, IoU thresholds, D) booleans, counts as a true positive.
        falses: (areas, IoU thresholds, D) booleans, counts as a false positive. A detection that is
            neither is ignored (a crowd, or an area out of range).
        objects: by area (G,) integers, images of the objects that are to be found.
    """

    images: NDArray[np.int64]
    scores: NDArray[np.float64]
    positives: NDArray[np.bool_]
    falses: NDArray[np.bool_]
    objects: tuple[NDArray[np.int64], ...]


@dataclass(frozen=True)
class Matches:
    """One evaluation.

    Attributes:
        image_ids: all images, ascending.
        classes: by name, in the order of category ids.
    """

    image_ids: tuple[int, ...]
    classes: dict[str, ClassMatches]


class Difference(NamedTuple):
    """A metric of two sides, as shares of 1; None where no image holds an object that counts.

    Attributes:
        first: mean over the runs of the first side, all images once.
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


@dataclass(frozen=True)
class Comparison:
    """Two sides by metric, overall (mean over classes, as COCO's) and by class."""

    overall: dict[str, Difference]
    classes: dict[str, dict[str, Difference]]


def match(
    truth: COCO,
    results: Sequence[dict[str, Any]],
    iou_type: str,
    *,
    label: str = "Evaluating",
    progress: bool = False,
) -> Matches:
    """Evaluate once, with pycocotools.

    Args:
        truth: from :func:`repr_det.detection.coco_results.read_truth`.
        results: from :func:`repr_det.detection.coco_results.read_results`.
        iou_type: ``"bbox"`` or ``"segm"``. As in Detectron2, masks are small or large by their own
            area, not by that of a box beside them.
        label: of the progress bar.
        progress: show one.

    Raises:
        UserError: a detection or an object has no such box or mask.
    """
    image_ids = tuple(sorted(truth.getImgIds()))
    positions = {image: position for position, image in enumerate(image_ids)}
    classes = {
        name: _class_matches(
            evaluation.evalImgs, positions, thresholds=len(evaluation.params.iouThrs)
        )
        for name, evaluation in evaluated_classes(
            truth, results, iou_type, label=label, progress=progress
        )
    }
    return Matches(image_ids, classes)


def _class_matches(
    entries: Sequence[dict[str, Any]], positions: dict[int, int], thresholds: int
) -> ClassMatches:
    """What pycocotools' ``evalImgs`` of one class say, all images of one area after another."""
    by_area = np.array(entries, dtype=object).reshape(AREAS, -1)
    images = _repeated(by_area[0], positions, [len(e["dtScores"]) for e in by_area[0]])
    scores = np.array([s for e in by_area[0] for s in e["dtScores"]], dtype=float)
    order = np.argsort(-scores, kind="mergesort")

    def sorted_flags(key: str) -> NDArray[np.bool_]:
        nothing = np.zeros((thresholds, 0))
        flags = [np.concatenate([nothing, *(e[key] for e in area)], axis=1) for area in by_area]
        return np.stack(flags)[..., order].astype(bool)

    matched, counted = sorted_flags("dtMatches"), ~sorted_flags("dtIgnore")
    objects = tuple(
        _repeated(area, positions, [np.count_nonzero(e["gtIgnore"] == 0) for e in area])
        for area in by_area
    )
    return ClassMatches(
        images[order], scores[order], matched & counted, ~matched & counted, objects
    )


def _repeated(
    entries: Sequence[dict[str, Any]], positions: dict[int, int], times: Sequence[int]
) -> NDArray[np.int64]:
    images = np.array([positions[entry["image_id"]] for entry in entries], dtype=np.int64)
    return np.repeat(images, np.array(times, dtype=np.int64))


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
    copies = int(counts.max(initial=0))
    bar = tqdm(matches.classes.values(), label, unit="class", disable=not progress)
    for number, found in enumerate(bar):
        areas = _prepare(found, copies)
        rows = max(1, _BLOCK // max(1, len(found.images)))
        for begin in range(0, len(counts), rows):
            block = slice(begin, begin + rows)
            values[block, number] = _class_precision(areas, counts[block])
    return values


def _class_precision(areas: Sequence[_Area], counts: NDArray[np.int32]) -> NDArray[np.float64]:
    """(R, METRICS) of a class in each of R resamples."""
    everything, *sized = (_area_precision(area, counts) for area in areas)
    metrics = [everything.mean(axis=1), everything[:, 0], everything[:, IOU_75]]
    return np.stack([*metrics, *(precision.mean(axis=1) for precision in sized)], axis=1)


class _Columns(NamedTuple):
    """Some detections, whose weights in a resample are how often their image occurs.

    Attributes:
        images: (C,)
        tied: where a column stands for one copy only.
        copies: that copy, from 1.
    """

    images: NDArray[np.int64]
    tied: NDArray[np.int64]
    copies: NDArray[np.int32]

    def weights(self, counts: NDArray[np.int32]) -> NDArray[np.int32]:
        """(rows of counts, C)."""
        weights = counts.take(self.images, axis=1)
        if self.tied.size:
            weights[:, self.tied] = weights[:, self.tied] >= self.copies
        return weights


class _Threshold(NamedTuple):
    """The detections of an IoU threshold that are more than one false positive among others.

    Attributes:
        columns: E detections.
        positive: (E,) 1 for true positives.
        shift: (E,) what the detection counts, less what it counts in the area's columns.
        before: (E,) how many of the area's columns stand before and at the detection.
    """

    columns: _Columns
    positive: NDArray[np.int32]
    shift: NDArray[np.int32]
    before: NDArray[np.int64]


class _Area(NamedTuple):
    """A range of area: the detections that are false positives at some threshold, and the rest.

    A detection out of range is no false positive at any threshold. So the area's columns are nearly
    right for every threshold, and only the few matched detections are looked at for each.
    """

    objects: NDArray[np.int64]
    columns: _Columns
    thresholds: tuple[_Threshold, ...]


def _prepare(found: ClassMatches, copies: int) -> list[_Area]:
    order, copy = _expand_ties(found, copies)
    images = found.images[order]

    def columns(chosen: NDArray[np.int64]) -> _Columns:
        tied = np.flatnonzero(copy[chosen])
        return _Columns(images[chosen], tied, copy[chosen][tied])

    areas = []
    for objects, positives, falses in zip(
        found.objects, found.positives[..., order], found.falses[..., order], strict=True
    ):
        base = falses.any(axis=0)
        before = np.cumsum(base)
        thresholds = []
        for positive, false in zip(positives, falses, strict=True):
            shift = (positive | false).astype(np.int32) - base
            chosen = np.flatnonzero(positive | (shift != 0))
            gain = positive[chosen].astype(np.int32)
            thresholds.append(_Threshold(columns(chosen), gain, shift[chosen], before[chosen]))
        areas.append(_Area(objects, columns(np.flatnonzero(base)), tuple(thresholds)))
    return areas


def _expand_ties(found: ClassMatches, copies: int) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
    """Columns for the detections, where detections of one image with one score are told apart.

    pycocotools' stable order of a doubled image with a tie a, b is a, b, a, b. Weights alone would
    make it a, a, b, b; so the tie gets a column for each copy and detection. Ties between images
    stay as they are, and so do ties without a true positive, in which the order does not matter.

    Args:
        found: D detections.
        copies: an image occurs at most so many times.

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


def _area_precision(area: _Area, counts: NDArray[np.int32]) -> NDArray[np.float64]:
    """(R, IoU thresholds), AP in each of R resamples; NaN in those without objects."""
    objects = counts.take(area.objects, axis=1).sum(axis=1)
    values = np.zeros((len(counts), len(area.thresholds)))
    values[objects == 0] = np.nan
    if not objects.any():
        return values
    levels = _levels(objects)
    counted = np.zeros((len(counts), len(area.columns.images) + 1), dtype=np.int32)
    weights = area.columns.weights(counts)
    np.cumsum(weights, axis=1, dtype=np.int32, out=counted[:, 1:])
    rows = np.arange(len(counts), dtype=np.int32)[:, None] * np.int32(levels.shape[1])
    for number, threshold in enumerate(area.thresholds):
        if not threshold.positive.any():
            continue
        weights = threshold.columns.weights(counts)
        positives = weights if threshold.positive.all() else weights * threshold.positive
        positives = np.cumsum(positives, axis=1, dtype=np.int32)
        total = counted.take(threshold.before, axis=1)
        if threshold.shift.any():
            total += np.cumsum(weights * threshold.shift, axis=1, dtype=np.int32)
        precision = positives / (total + np.spacing(1))
        np.maximum.accumulate(precision[:, ::-1], axis=1, out=precision[:, ::-1])
        # Recall grows at true positives only, and each level takes the best precision from where
        # recall first reaches it: a detection's counts once for each level that it reaches.
        reached = levels.ravel().take(positives + rows)
        reached[:, 1:] -= reached[:, :-1].copy()
        values[:, number] += np.einsum("re,re->r", precision, reached) / RECALLS
    return values


def _levels(objects: NDArray[np.int64]) -> NDArray[np.float64]:
    """How many of the recall levels are reached when so many objects are found.

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
    first: Sequence[Matches],
    second: Sequence[Matches],
    *,
    resamples: int = 1000,
    seed: int = 0,
    level: float = 0.95,
    progress: bool = False,
) -> Comparison:
    """Compare two sides on the same resamples of the images.

    The intervals say how far the difference depends on which images were evaluated. Runs (seeds)
    are not resampled: a side's value is the mean over its runs inside each resample.

    Args:
        first: a run or more, of the same images and classes as all others.
        second: a run or more.
        resamples: R.
        seed: of the resamples.
        level: of the interval.
        progress: show a bar for each run.

    Raises:
        UserError: no runs, runs of different images or classes, or an argument out of range.
    """
    if resamples < 1 or not 0 < level < 1:
        raise UserError(
            f"There is no bootstrap with {resamples} resamples and level {level}: give at least 1 "
            "and a level between 0 and 1."
        )
    if not first or not second:
        raise UserError("A side without runs cannot be compared: give at least one for each.")
    for one, other in pairwise([*first, *second]):
        if one.image_ids != other.image_ids or list(one.classes) != list(other.classes):
            raise UserError(
                "Evaluations of different images or classes cannot be compared: evaluate all runs "
                "on the same annotations."
            )
    images = len(first[0].image_ids)
    # The first row is every image once, so that it goes the same way.
    once = np.ones((1, images), dtype=np.int32)
    counts = np.concatenate([once, resample_counts(images, resamples, seed)])
    sides = []
    for name, runs in (("first", first), ("second", second)):
        total = np.zeros((len(counts), len(first[0].classes), len(METRICS)))
        for number, run in enumerate(runs, 1):
            label = f"Resampling {name}, run {number}"
            total += average_precision(run, counts, label=label, progress=progress)
        sides.append(total / len(runs))
    overall = [_class_mean(side) for side in sides]
    return Comparison(
        _differences(*overall, level),
        {
            name: _differences(*(side[:, number] for side in sides), level)
            for number, name in enumerate(first[0].classes)
        },
    )


def _class_mean(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """(R, METRICS) from (R, classes, METRICS); NaN where no class has objects."""
    present = ~np.isnan(values)
    number = present.sum(axis=1)
    total = np.where(present, values, 0).sum(axis=1)
    return np.divide(total, number, out=np.full_like(total, np.nan), where=number > 0)


def _differences(
    first: NDArray[np.float64], second: NDArray[np.float64], level: float
) -> dict[str, Difference]:
    """From (1 + R, METRICS) of each side, the first row without resampling."""
    return {
        metric: _difference(first[:, column], second[:, column], level)
        for column, metric in enumerate(METRICS)
    }


def _difference(
    first: NDArray[np.float64], second: NDArray[np.float64], level: float
) -> Difference:
    difference = second - first
    if math.isnan(difference[0]):
        return Difference(None, None, None, None, None, None)
    numbers = float(first[0]), float(second[0]), float(difference[0])
    # A class of few images may have no object in a resample, which then says nothing about it.
    drawn = difference[1:][~np.isnan(difference[1:])]
    if not len(drawn):
        return Difference(*numbers, None, None, None)
    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2])
    return Difference(*numbers, float(low), float(high), float((drawn > 0).mean()))
