"""COCO's annotation and results files, and pycocotools' evaluation of one on the other."""

from __future__ import annotations

import contextlib
import io
import json
import math
from collections import defaultdict
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from pycocotools.mask import area
from tqdm import tqdm

from repr_det.detection.datasets import check_annotations, is_mask, read_coco
from repr_det.errors import UserError

BBOX, SEGM = "bbox", "segm"

TITLES = {BBOX: "Boxes", SEGM: "Masks"}

_KEYS = {BBOX: "bbox", SEGM: "segmentation"}
"""What detections and annotations hold them under."""

METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl")
"""As Detectron2 calls them."""

IOU_75 = 5
"""Where the IoU threshold 0.75 stands among pycocotools' 0.5, 0.55, ..., 0.95."""

RESULTS = Path("inference", "coco_instances_results.json")
"""Where a run folder holds the results of its last evaluation."""


class Annotations(NamedTuple):
    """Annotations of a dataset.

    Attributes:
        path: the file.
        images: ids of the images of it that count; None for all.
    """

    path: Path
    images: frozenset[int] | None = None


def read_truth(annotations: str | Path, images: Collection[int] | None = None) -> COCO:
    """Annotations to compare on, completed; see :func:`complete`.

    Args:
        annotations: path of the file.
        images: ids of the images that count; None for all.

    Raises:
        UserError: no such file, or not COCO's JSON, or without what the evaluation needs.
    """
    content = read_coco(str(annotations))
    check_annotations(str(annotations), content)
    if images is not None:
        for part, key in (("images", "id"), ("annotations", "image_id")):
            content[part] = [entry for entry in content[part] if entry[key] in images]
    names = [category["name"] for category in content["categories"]]
    twice = {name for name in names if names.count(name) > 1}
    if twice:
        raise UserError(f"{annotations} has two categories {min(twice)!r}: give them other names.")
    truth = _indexed(content)
    complete(truth)
    return truth


def complete(truth: COCO) -> None:
    """Give annotations what pycocotools needs and other tools leave out, in place.

    Objects are no crowds, and as large as their mask or else their box, where nothing is said of
    that. They are numbered from 1: pycocotools takes a match with an object of id 0 for none.
    """
    for number, entry in enumerate(truth.dataset.get("annotations", ()), 1):
        entry.setdefault("iscrowd", 0)
        if "area" not in entry:
            *_, width, height = entry["bbox"]
            has_mask = is_mask(entry.get("segmentation"))
            entry["area"] = float(area(truth.annToRLE(entry))) if has_mask else width * height
        entry["id"] = number
    with contextlib.redirect_stdout(io.StringIO()):
        truth.createIndex()


def results_path(path: str | Path) -> Path:
    """The results file that is meant by a file or by a run folder.

    Raises:
        UserError: neither is there.
    """
    path = Path(path)
    if path.is_dir():
        if not (path / RESULTS).is_file():
            raise UserError(
                f"Run folder {path} holds no {RESULTS}: evaluate the run on a COCO-format dataset "
                "first, or give a results file."
            )
        return path / RESULTS
    if not path.is_file():
        raise UserError(f"Results {path} do not exist: give a COCO results file or a run folder.")
    return path


def read_results(path: str | Path, truth: COCO) -> list[dict[str, Any]]:
    """Detections of a results file or run folder, checked against the annotations.

    Args:
        path: of COCO's results format, a list of ``image_id``, ``category_id``, ``score`` and
            ``bbox`` (x, y, width, height in pixels) or ``segmentation`` (compressed RLE).
        truth: the annotations.

    Raises:
        UserError: no such file, or not results, or results for other images or categories.
    """
    path = results_path(path)
    try:
        results = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError):
        raise UserError(f"{path} is not JSON: give a COCO results file.") from None
    if not isinstance(results, list):
        raise UserError(
            f"{path} is not a COCO results file: it must be a list of detections, not "
            f"{'annotations' if 'annotations' in results else type(results).__name__}."
        )
    for index, result in enumerate(results):
        try:
            problem = _problem(result, truth)
        except (KeyError, TypeError) as error:
            problem = f"lacks what a detection has ({type(error).__name__}: {error})"
        if problem:
            raise UserError(
                f"{path}: detection {index} {problem}: give COCO results for these annotations."
            )
    return results


def _problem(result: dict[str, Any], truth: COCO) -> str | None:
    """What is wrong with a detection, if anything."""
    if result["image_id"] not in truth.imgs:
        return f"is for image {result['image_id']}, which the annotations do not have"
    if result["category_id"] not in truth.cats:
        return f"is of category {result['category_id']}, which the annotations do not have"
    if not math.isfinite(result["score"]):
        return f"has the score {result['score']}"
    if "bbox" not in result and "segmentation" not in result:
        return "has neither bbox nor segmentation"
    if "bbox" in result:
        box = result["bbox"]
        if len(box) != 4 or not all(map(math.isfinite, box)):
            return f"has the bbox {box} instead of x, y, width, height"
    if "segmentation" in result:
        image, mask = truth.imgs[result["image_id"]], result["segmentation"]
        if mask["size"] != [image["height"], image["width"]]:
            return f"has a mask of size {mask['size']}, unlike its image"
        if not isinstance(mask["counts"], str):
            return "has a mask that is not compressed RLE"
    return None


def evaluable_types(results: Sequence[dict[str, Any]], truth: COCO) -> tuple[str, ...]:
    """What results and annotations can be compared by: boxes, masks or both.

    Results without any detection are compared by boxes: nobody knows what they would have held.
    """
    entries = [*results, *truth.dataset["annotations"]]
    return tuple(
        iou_type
        for iou_type, key in _KEYS.items()
        if all(entry.get(key) for entry in entries) and (results or iou_type == BBOX)
    )


def check_iou_type(results: Sequence[dict[str, Any]], iou_type: str, truth: COCO) -> None:
    """Refuse to evaluate boxes or masks that are not there.

    Raises:
        UserError: a detection or an object without.
    """
    key = _KEYS[iou_type]
    is_there = is_mask if iou_type == SEGM else bool
    for whose, entries in (
        ("a detection", results),
        ("an annotation", truth.dataset["annotations"]),
    ):
        missing = next((entry for entry in entries if not is_there(entry.get(key))), None)
        if missing is not None:
            raise UserError(
                f"IoU type {iou_type} needs {key} everywhere, but {whose} of image "
                f"{missing['image_id']} has none: take the other type, or other files."
            )


def _indexed(content: dict[str, Any]) -> COCO:
    coco = COCO()
    coco.dataset = content
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
    return coco


def _detections(truth: COCO, results: Sequence[dict[str, Any]], iou_type: str) -> COCO:
    # A box beside a mask would decide whether the mask counts as small: Detectron2 drops it, too.
    left_out = "bbox" if iou_type == SEGM else "segmentation"
    results = [{k: v for k, v in result.items() if k != left_out} for result in results]
    if not results:
        return _indexed({**truth.dataset, "annotations": []})
    with contextlib.redirect_stdout(io.StringIO()):
        return truth.loadRes(results)


def evaluated_classes(
    truth: COCO,
    results: Sequence[dict[str, Any]],
    iou_type: str,
    *,
    label: str = "Evaluating",
    progress: bool = False,
) -> Iterator[tuple[str, COCOeval]]:
    """Evaluate class by class, so that only what is needed stays in memory.

    Args:
        truth: from :func:`read_truth`.
        results: from :func:`read_results`.
        iou_type: ``"bbox"`` or ``"segm"``. As in Detectron2, masks are small or large by their own
            area, not by that of a box beside them.
        label: of the progress bar.
        progress: show one.

    Yields:
        Name and evaluation of each class, in the order of category ids. It is one evaluation, which
        the next class overwrites; ``evalImgs`` is empty for a class that nothing is of.

    Raises:
        UserError: a detection or an object has no such box or mask.
    """
    check_iou_type(results, iou_type, truth)
    found = _detections(truth, results, iou_type)
    images_of = defaultdict(set)
    for entry in (*truth.dataset["annotations"], *found.dataset["annotations"]):
        images_of[entry["category_id"]].add(entry["image_id"])
    evaluation = COCOeval(truth, found, iou_type)
    for category in tqdm(sorted(truth.getCatIds()), label, unit="class", disable=not progress):
        evaluation.params.catIds = [category]
        evaluation.params.imgIds = sorted(images_of[category])
        # Without images pycocotools would load all of them.
        if evaluation.params.imgIds:
            with contextlib.redirect_stdout(io.StringIO()):
                evaluation.evaluate()
        else:
            evaluation.evalImgs = []
        yield truth.cats[category]["name"], evaluation
