"""Which detections match which objects, as COCO's evaluation decides it.

An image's matches do not depend on other images, so they are found once and then counted, once or
as often as a resample draws the image. faster-coco-eval finds them; pycocotools is the reference
of the tests.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from faster_coco_eval.core.faster_eval_api import COCOeval_faster
from numpy.typing import NDArray
from pycocotools import mask
from pycocotools.coco import COCO
from tqdm import tqdm

from repr_det.detection.coco_results import SEGM, check_iou_type

AREAS = ((0, 1e10), (0, 32**2), (32**2, 96**2), (96**2, 1e10))
"""pycocotools' ranges of area in square pixels: all, small, medium, large."""

THRESHOLDS = 10
"""pycocotools' IoU thresholds: 0.5, 0.55, ..., 0.95."""

MOST_DETECTIONS = 100
"""Of an image and class, those with the highest scores count."""

_CATEGORY = 1
"""Engines see one class at a time under this id, and images under their positions. Ids of files may
be text or large numbers, at which faster-coco-eval fails."""

Entries = Sequence[dict[str, Any]]
Flags = NDArray[np.bool_]
Engine = Callable[[COCO, COCO, str], tuple[Flags, Flags]]
"""From objects and detections of one class: what is matched and what is ignored, both (areas, IoU
thresholds, D), for the detections by image and, inside an image, by falling score."""


@dataclass(frozen=True)
class ClassMatches:
    """Matches of one class; D detections in the order in which pycocotools counts them.

    Attributes:
        images: (D,) integers, position of a detection's image among all images.
        scores: (D,) falling; equal ones by image, and inside an image as the results have them.
        positives: (areas, IoU thresholds, D) booleans, counts as a true positive.
        falses: (areas, IoU thresholds, D) booleans, counts as a false positive. A detection that is
            neither is ignored (a crowd, or an area out of range).
        objects: by area (G,) integers, images of the objects that are to be found.
    """

    images: NDArray[np.int64]
    scores: NDArray[np.float64]
    positives: Flags
    falses: Flags
    objects: tuple[NDArray[np.int64], ...]


@dataclass(frozen=True)
class Matches:
    """One evaluation.

    Attributes:
        image_ids: all images, ascending.
        classes: by name, in the order of category ids.
    """

    image_ids: tuple[int | str, ...]
    classes: dict[str, ClassMatches]


def with_faster_coco_eval(objects: COCO, detections: COCO, iou_type: str) -> tuple[Flags, Flags]:
    """See :data:`Engine`."""
    evaluation = COCOeval_faster(
        objects, detections, iou_type, print_function=lambda _: None, separate_eval=True
    )
    evaluation.params.imgIds = sorted(detections.imgs)
    evaluation.params.catIds = [_CATEGORY]
    evaluation.params.maxDets = [MOST_DETECTIONS]
    evaluation.evaluate()
    # The matches themselves are only in what an image's evaluation is pickled as: object ids by
    # threshold and detection, then (among others) what is ignored, by area and then by image.
    states = [entry.__getstate__() for entry in evaluation._evalImgs_cpp]
    found = []
    for part in (0, 4):
        flags = [np.array(state[part], dtype=np.int64).reshape(THRESHOLDS, -1) for state in states]
        by_area = np.split(np.concatenate(flags, axis=1), len(AREAS), axis=1)
        found.append(np.stack(by_area) != 0)
    return found[0], found[1]


def match(
    truth: COCO,
    results: Entries,
    iou_type: str,
    *,
    engine: Engine = with_faster_coco_eval,
    label: str = "Evaluating",
    progress: bool = False,
) -> Matches:
    """Evaluate once.

    Args:
        truth: from :func:`repr_det.detection.coco_results.read_truth`.
        results: from :func:`repr_det.detection.coco_results.read_results`.
        iou_type: ``"bbox"`` or ``"segm"``. As in Detectron2, masks are small or large by their own
            area, not by that of their box.
        engine: finds the matches.
        label: of the progress bar.
        progress: show one.

    Raises:
        UserError: a detection or an object has no such box or mask.
    """
    check_iou_type(results, iou_type, truth)
    image_ids = tuple(sorted(truth.getImgIds()))
    positions = {image: position for position, image in enumerate(image_ids)}
    images = np.array([positions[r["image_id"]] for r in results], dtype=np.int64)
    ids = sorted(truth.getCatIds())
    numbers = {category: number for number, category in enumerate(ids)}
    categories = np.array([numbers[r["category_id"]] for r in results], dtype=np.int64)
    found = _Detections(
        results, iou_type, images, np.array([r["score"] for r in results], dtype=float)
    )
    order = np.lexsort((-found.scores, images, categories))
    of_class = np.split(order, np.searchsorted(categories[order], range(len(ids)))[1:])
    objects: dict[int, list[dict[str, Any]]] = {category: [] for category in ids}
    for entry in truth.dataset["annotations"]:
        place = {"image_id": positions[entry["image_id"]], "category_id": _CATEGORY}
        objects[entry["category_id"]].append(entry | place)
    numbered = [{**truth.imgs[image], "id": place} for place, image in enumerate(image_ids)]
    classes = {}
    bar = tqdm(ids, label, unit="class", disable=not progress)
    for category, chosen in zip(bar, of_class, strict=True):
        # The place of a detection among those of its image.
        begins = np.searchsorted(images[chosen], images[chosen])
        chosen = chosen[np.arange(len(chosen)) - begins < MOST_DETECTIONS]
        classes[truth.cats[category]["name"]] = _class_matches(
            numbered, objects[category], found, chosen, engine
        )
    return Matches(image_ids, classes)


class _Detections:
    """All detections of an evaluation.

    Attributes:
        images: (N,) positions of their images.
        scores: (N,)
        areas: (N,) of the boxes, or of the masks.
    """

    def __init__(
        self,
        results: Entries,
        iou_type: str,
        images: NDArray[np.int64],
        scores: NDArray[np.float64],
    ) -> None:
        self._results = results
        self._shape = "segmentation" if iou_type == SEGM else "bbox"
        self.iou_type, self.images, self.scores = iou_type, images, scores
        shapes = [result[self._shape] for result in results]
        if iou_type == SEGM:
            self.areas = np.array(mask.area(shapes) if shapes else [], dtype=float)
        else:
            boxes = np.array(shapes, dtype=float).reshape(-1, 4)
            self.areas = boxes[:, 2] * boxes[:, 3]

    def entries(self, chosen: NDArray[np.int64]) -> list[dict[str, Any]]:
        """Some of them as the engines take them. Of box and mask only the one that counts."""
        chosen_parts = (part[chosen].tolist() for part in (self.images, self.scores, self.areas))
        return [
            {
                "id": i + 1,
                "image_id": image,
                "category_id": _CATEGORY,
                "score": score,
                self._shape: self._results[i][self._shape],
                "iscrowd": 0,
                "area": area,
            }
            for i, image, score, area in zip(chosen.tolist(), *chosen_parts, strict=True)
        ]


def _class_matches(
    numbered: Entries,
    objects: Entries,
    found: _Detections,
    chosen: NDArray[np.int64],
    engine: Engine,
) -> ClassMatches:
    """Of one class, whose detections are ``chosen``, by image and falling score.

    Images ``numbered``, and those of ``objects``, have their positions as ids.
    """
    images, scores, areas = found.images[chosen], found.scores[chosen], found.areas[chosen]
    outside = np.array([(areas < low) | (areas > high) for low, high in AREAS])
    matched = np.zeros((len(AREAS), THRESHOLDS, len(chosen)), dtype=bool)
    ignored = np.repeat(outside[:, None], THRESHOLDS, axis=1)
    places = np.array([entry["image_id"] for entry in objects], dtype=np.int64)
    # Only where there are objects is anything to be matched.
    shared = np.isin(images, places)
    if shared.any():
        with_detections = np.isin(places, images)
        matched[..., shared], ignored[..., shared] = engine(
            _indexed(numbered, [objects[i] for i in np.flatnonzero(with_detections)]),
            _indexed(numbered, found.entries(chosen[shared])),
            found.iou_type,
        )
    sizes = np.array([entry["area"] for entry in objects], dtype=float)
    whole = np.array([not entry["iscrowd"] for entry in objects], dtype=bool)
    counted = tuple(
        np.sort(places[whole & (low <= sizes) & (sizes <= high)]) for low, high in AREAS
    )
    order = np.argsort(-scores, kind="stable")
    matched, ignored = matched[..., order], ignored[..., order]
    return ClassMatches(
        images[order], scores[order], matched & ~ignored, ~matched & ~ignored, counted
    )


def _indexed(images: Entries, annotations: Entries) -> COCO:
    """Some annotations of one class, and those of all images that they are on."""
    places = dict.fromkeys(entry["image_id"] for entry in annotations)
    coco = COCO()
    coco.dataset = {
        "images": [images[place] for place in places],
        "categories": [{"id": _CATEGORY}],
        "annotations": list(annotations),
    }
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
    return coco
