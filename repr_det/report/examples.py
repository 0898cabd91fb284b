"""Held-out images on which detectors differ, with what each of them found."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pycocotools.mask
import torch
from detectron2.structures import Boxes, Instances

from repr_det.detection.drawing import ground_truth
from repr_det.detection.matching import Matches
from repr_det.engine.data import read_image

MIN_SCORE = 0.5
"""Detections with a lower score neither count nor show."""


class Example(NamedTuple):
    """An image with its objects and what each arm detects.

    Attributes:
        image: uint8 (height, width, 3), RGB.
        truth: the objects.
        found: by arm, the detections with a score of at least :data:`MIN_SCORE`.
        mistakes: by arm, the number of missed objects and wrong detections.
    """

    image: np.ndarray
    truth: Instances
    found: list[Instances]
    mistakes: list[int]


def mistakes(matches: Matches) -> np.ndarray:
    """Objects missed and detections that match none, (images,), at IoU 0.5 and all areas.

    Detections below :data:`MIN_SCORE` do not count.
    """
    counts = np.zeros(len(matches.image_ids), dtype=int)
    for found in matches.classes.values():
        sure = found.scores >= MIN_SCORE
        np.add.at(counts, found.objects[0], 1)
        np.add.at(counts, found.images[sure & found.positives[0, 0]], -1)
        np.add.at(counts, found.images[sure & found.falses[0, 0]], 1)
    return counts


def choose(first: np.ndarray, second: np.ndarray, number: int) -> list[int]:
    """Positions of the images on which two arms differ most, those in favour of the second first.

    Args:
        first: (images,) mistakes of the first arm.
        second: (images,) mistakes of the second arm.
        number: how many at most; images without a difference are left out.
    """
    difference = first - second
    order = np.argsort(difference, kind="stable")
    for_first = [int(i) for i in order if difference[i] < 0]
    for_second = [int(i) for i in order[::-1] if difference[i] > 0]
    half = number // 2
    chosen = for_second[: max(half, number - len(for_first))]
    chosen += for_first[: number - len(chosen)]
    return chosen


def example(
    record: dict[str, Any],
    to_contiguous: dict[int, int],
    results: Sequence[Sequence[dict[str, Any]]],
    counts: Sequence[int],
) -> Example:
    """Read an image with its detections.

    Args:
        record: of the image in Detectron2's format.
        to_contiguous: classes by category id of the results.
        results: COCO results by arm.
        counts: mistakes by arm.

    Raises:
        UserError: the image cannot be read.
    """
    image = read_image(record["file_name"])
    found = [
        _instances(
            # A decoded mask is as large as the image, so only masks that are drawn are decoded.
            [
                result
                for result in of_arm
                if result["image_id"] == record["image_id"] and result["score"] >= MIN_SCORE
            ],
            image.shape[:2],
            to_contiguous,
        )
        for of_arm in results
    ]
    there = ground_truth(record, masks=all(each.has("pred_masks") for each in found))
    return Example(image, there, found, list(counts))


def _instances(
    results: Sequence[dict[str, Any]], size: tuple[int, int], to_contiguous: dict[int, int]
) -> Instances:
    found = Instances(size)
    boxes = [
        r["bbox"] if "bbox" in r else pycocotools.mask.toBbox(r["segmentation"]) for r in results
    ]
    corners = [(x, y, x + w, y + h) for x, y, w, h in boxes]
    found.pred_boxes = Boxes(torch.tensor(corners, dtype=torch.float32).reshape(-1, 4))
    found.pred_classes = torch.tensor(
        [to_contiguous[r["category_id"]] for r in results], dtype=torch.long
    )
    found.scores = torch.tensor([r["score"] for r in results])
    if results and all("segmentation" in r for r in results):
        masks = np.stack([pycocotools.mask.decode(r["segmentation"]) for r in results])
        found.pred_masks = torch.from_numpy(masks.astype(bool))
    return found
