"""Annotation and results files that do not fit, and what can be evaluated."""

from __future__ import annotations

import json

import numpy as np
import pytest

from repr_det.detection.coco_results import (
    BBOX,
    METRICS,
    SEGM,
    check_iou_type,
    evaluable_types,
    read_results,
)
from repr_det.detection.evaluation import evaluate
from tests.coco_files import SIZE, direct, make_results, make_truth, read, rectangle


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"image_id": 1}, "has image_id 1, which the annotations do not have"),
        ({"category_id": 1}, "has category_id 1, which the annotations do not have"),
        ({"score": float("nan")}, "has the score NaN"),
        ({"score": None}, "has the score null"),
        ({"score": True}, "has the score true"),
        ({"bbox": [1, 2, -3, 4]}, "instead of x, y, width, height"),
        ({"bbox": [1, 2, 3]}, "instead of x, y, width, height"),
        ({"bbox": [1, 2, 3, float("inf")]}, "instead of x, y, width, height"),
        ({"segmentation": {"size": [1, 2], "counts": "abc"}}, "but its image has"),
        ({"segmentation": {"size": [SIZE, SIZE], "counts": [1]}}, "not compressed RLE"),
        ({"segmentation": rectangle([0, 0, 5, 5])}, "not compressed RLE"),
        ({"segmentation": {"size": [SIZE, SIZE], "counts": "abc"}}, "damaged or cut off"),
    ],
)
def test_results_that_do_not_fit(tmp_path, change, sentence):
    content = make_truth()
    results = make_results(content, 1)
    results[2].update(change)
    path = tmp_path / "results.json"
    path.write_text(json.dumps(results))
    with pytest.raises(ValueError, match=sentence) as error:
        read_results(path, read(tmp_path, content))
    assert f"{path}: detection 2" in str(error.value)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda content: content["categories"][0].update(name="wolf"), 'both called "wolf"'),
        (lambda content: content["images"].pop(), "image_id"),
    ],
)
def test_annotations_that_do_not_fit(tmp_path, change, sentence):
    content = make_truth()
    change(content)
    with pytest.raises(ValueError, match=sentence):
        read(tmp_path, content)


@pytest.mark.parametrize("iou_type", [BBOX, SEGM])
def test_what_other_tools_leave_out(tmp_path, iou_type):
    """Neither crowds nor areas are said, and objects are numbered from 0."""
    content = make_truth()
    content["annotations"] = [e for e in content["annotations"] if not e["iscrowd"]]
    results = make_results(content, 1)
    expected = direct(content, results, iou_type)
    for number, entry in enumerate(content["annotations"]):
        entry["id"] = number
        del entry["iscrowd"], entry["area"]
        if iou_type == BBOX:
            del entry["segmentation"]
    found = evaluate(read(tmp_path, content), results, iou_type)
    overall = np.array([found.overall[metric] for metric in METRICS], dtype=float)
    np.testing.assert_allclose(overall, expected[0], rtol=0, atol=1e-12)


def test_only_what_all_results_hold_is_compared(tmp_path):
    content = make_truth()
    both = make_results(content, 1)
    boxes = [{k: v for k, v in result.items() if k != "segmentation"} for result in both]
    truth = read(tmp_path, content)
    assert evaluable_types(both, truth) == (BBOX, SEGM)
    assert evaluable_types([], truth) == evaluable_types([*both, *boxes], truth) == (BBOX,)
    with pytest.raises(
        ValueError, match="segm needs segmentation everywhere, but detection 0 has none"
    ):
        check_iou_type(boxes, SEGM, truth)
    number = content["annotations"][0]["id"]
    content["annotations"][0]["segmentation"] = []  # as some programs write
    assert evaluable_types(both, read(tmp_path, content)) == (BBOX,)
    content["annotations"][0].pop("segmentation")
    assert evaluable_types(both, read(tmp_path, content)) == (BBOX,)
    with pytest.raises(ValueError, match=f"annotation {number} has no mask"):
        check_iou_type(both, SEGM, read(tmp_path, content))
