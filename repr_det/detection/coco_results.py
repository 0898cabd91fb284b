"""COCO's annotation and results files."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from pycocotools.coco import COCO

from repr_det.detection.annotations import MASKS, CocoFile, read_coco, read_json
from repr_det.detection.masks import are_pixels, rle_fault
from repr_det.engine.files import write_text_whole
from repr_det.errors import UserError, shown

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

_RECORDED = {"category": ("categories", "name"), "image": ("images", "file_name")}
"""What is recorded next to the results, by id: the part of the annotations and its key."""

_HIGHEST_SCORE = 1e30


class Truth(COCO):
    """Annotations to compare on, by pycocotools' class; objects are numbered from 1.

    To pycocotools, a match with an object of id 0 is none.

    Args:
        file: checked.
        images: ids of the images that count; None for all.
    """

    def __init__(self, file: CocoFile, images: Collection[int] | None = None) -> None:
        super().__init__()
        self.file = file
        kept = file.content["annotations"]
        self.dataset = dict(file.content)
        if images is not None:
            kept = [entry for entry in kept if entry["image_id"] in images]
            self.dataset["images"] = [i for i in file.content["images"] if i["id"] in images]
        self.dataset["annotations"] = [{**e, "id": number} for number, e in enumerate(kept, 1)]
        with contextlib.redirect_stdout(io.StringIO()):
            self.createIndex()


def read_truth(annotations: str | Path, images: Collection[int] | None = None) -> Truth:
    """Annotations to compare on.

    Args:
        annotations: path of the file.
        images: ids of the images that count; None for all.

    Raises:
        UserError: see :func:`repr_det.detection.annotations.check`.
    """
    return Truth(read_coco(annotations), images)


def results_path(path: str | Path) -> Path:
    """The results file that a path names: itself, or in a run folder.

    Raises:
        UserError: there is no such file.
    """
    path = Path(path)
    if path.is_dir():
        if not (path / RESULTS).is_file():
            raise UserError(
                f"Run folder {path} holds no {RESULTS}. Evaluate the run on a COCO-format dataset "
                "first, or set a results file."
            )
        return path / RESULTS
    if not path.is_file():
        raise UserError(f"Results {path} do not exist. Set a COCO results file or a run folder.")
    return path


def read_results(path: str | Path, truth: Truth) -> list[dict[str, Any]]:
    """Detections of a results file or run folder, checked against the annotations.

    Args:
        path: of COCO's results format, a list of ``image_id``, ``category_id``, ``score`` and
            ``bbox`` (x, y, width, height in pixels) or ``segmentation`` (compressed RLE).
        truth: the annotations.

    Raises:
        UserError: no such file, not results, or results for other images or categories.
    """
    path = results_path(path)
    results = read_json(path, "Results file")
    if type(results) is not list:
        there = shown(results)
        if type(results) is dict and "annotations" in results:
            there = "annotations"
        raise UserError(
            f"{path} is not a COCO results file: it is {there}. Set a file with a list of "
            f"detections."
        )
    _check_dataset(path, truth)
    for index, result in enumerate(results):
        if problem := _problem(result, truth):
            raise UserError(
                f"{path}: detection {index} {problem}. Set COCO results for these annotations."
            )
    return results


def _problem(result: Any, truth: Truth) -> str | None:
    """What is wrong with a detection, if anything."""
    if type(result) is not dict:
        return f"is {shown(result)}"
    for key in ("image_id", "category_id", "score"):
        if key not in result:
            return f"has no {key}"
    for key, known in (("image_id", truth.imgs), ("category_id", truth.cats)):
        if type(result[key]) not in (int, float, str) or result[key] not in known:
            return f"has {key} {shown(result[key])}, which the annotations do not have"
    if not are_pixels([result["score"]], _HIGHEST_SCORE):
        return f"has the score {shown(result['score'])}"
    if "bbox" not in result and "segmentation" not in result:
        return "has neither bbox nor segmentation"
    box = result.get("bbox", [0, 0, 0, 0])
    if type(box) is not list or len(box) != 4 or not are_pixels(box) or min(box[2:]) < 0:
        return f"has the bbox {shown(box)} instead of x, y, width, height"
    if "segmentation" in result:
        image, mask = truth.imgs[result["image_id"]], result["segmentation"]
        if type(mask) is not dict or type(mask.get("counts")) is not str:
            return f"has a mask that is not compressed RLE, {shown(mask)}"
        fault = rle_fault(mask, image["height"], image["width"])
        return fault and fault.split(". Set ")[0]
    return None


def record_dataset(folder: str | Path, truth: COCO) -> None:
    """Write ids and names of categories and images next to a run's results.

    Args:
        folder: of the results.
        truth: what was evaluated on. Images are recorded only of annotations that
            :func:`read_truth` has read: Detectron2 converts others, and renames their images.
    """
    for part, key in _RECORDED.values():
        path = Path(folder) / _record(part)
        if part == "images" and not isinstance(truth, Truth):
            path.unlink(missing_ok=True)  # of an earlier evaluation
            continue
        entries = [{"id": e["id"], key: e[key]} for e in truth.dataset[part]]
        write_text_whole(path, json.dumps(entries, indent=1) + "\n")


def _record(part: str) -> str:
    return f"coco_instances_{part}.json"


def _check_dataset(results: Path, truth: Truth) -> None:
    """Refuse results of other categories or images than the annotations', where these are recorded.

    Raises:
        UserError: one has another name, or is not there.
    """
    for one, (part, key) in _RECORDED.items():
        path = results.with_name(_record(part))
        if results.name != RESULTS.name or not path.is_file():
            continue
        try:
            recorded = {e["id"]: e[key] for e in read_json(path, f"Record of {part}")}
        except (KeyError, TypeError):
            raise UserError(f"{path} is damaged. Evaluate the run again, or remove it.") from None
        there = {e["id"]: e[key] for e in truth.dataset[part]}
        advice = "Set the annotations that the run was evaluated on."
        for number in recorded | there:
            if number not in recorded or number not in there:
                which = "only the annotations have" if number in there else "only the results know"
                raise UserError(
                    f"{results} does not fit {truth.file.path}: {which} {one} {shown(number)}. "
                    f"{advice}"
                )
            if recorded[number] != there[number]:
                raise UserError(
                    f"{results} was made where {one} {shown(number)} is "
                    f"{shown(recorded[number])}, but in {truth.file.path} it is "
                    f"{shown(there[number])}. {advice}"
                )


def evaluable_types(results: Sequence[dict[str, Any]], truth: Truth) -> tuple[str, ...]:
    """What results and annotations can be compared by: boxes, masks or both.

    Results without any detection are compared by boxes: nobody knows what they would have held.

    Raises:
        UserError: all results have masks, and a mask of the annotations is damaged.
    """
    found = []
    for iou_type, key in _KEYS.items():
        if not all(entry.get(key) for entry in results) or (not results and iou_type != BBOX):
            continue
        if iou_type == SEGM and MASKS in truth.file.damaged:
            truth.file.require([MASKS])
        if all(entry.get(key) for entry in truth.dataset["annotations"]):
            found.append(iou_type)
    return tuple(found)


def check_iou_type(results: Sequence[dict[str, Any]], iou_type: str, truth: Truth) -> None:
    """Refuse to evaluate boxes or masks that are not there.

    Raises:
        UserError: a detection or an object without.
    """
    key = _KEYS[iou_type]
    missing = next((index for index, entry in enumerate(results) if not entry.get(key)), None)
    if missing is not None:
        raise UserError(
            f"IoU type {iou_type} needs {key} everywhere, but detection {missing} has none. Set "
            f"the other type, or other results."
        )
    if iou_type == SEGM:
        truth.file.require([MASKS])
