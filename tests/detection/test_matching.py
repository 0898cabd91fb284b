"""Matches by faster-coco-eval, against those by pycocotools."""

from __future__ import annotations

import contextlib
import io

import numpy as np
import pytest
from pycocotools.cocoeval import COCOeval

from repr_det.detection.coco_results import BBOX, SEGM
from repr_det.detection.matching import match, with_faster_coco_eval
from tests.coco_files import make_results, make_truth, read, rle


def with_pycocotools(objects, detections, iou_type):
    """The reference; takes and returns what an Engine does."""
    evaluation = COCOeval(objects, detections, iou_type)
    evaluation.params.imgIds = sorted(detections.imgs)
    evaluation.params.maxDets = [100]
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation.evaluate()
    # COCOeval's own ranges of area, and one class.
    by_area = np.array(evaluation.evalImgs, dtype=object).reshape(4, -1)
    return tuple(
        np.stack([np.concatenate([entry[key] for entry in area], axis=1) for area in by_area]) != 0
        for key in ("dtMatches", "dtIgnore")
    )


def assert_equal(ours, theirs):
    assert ours.image_ids == theirs.image_ids
    assert list(ours.classes) == list(theirs.classes)
    for name, found in ours.classes.items():
        for field in ("images", "scores", "positives", "falses"):
            np.testing.assert_array_equal(
                getattr(found, field), getattr(theirs.classes[name], field)
            )
        for area, other in zip(found.objects, theirs.classes[name].objects, strict=True):
            np.testing.assert_array_equal(area, other)


def both(truth, results, iou_type):
    return [
        match(truth, results, iou_type, engine=engine)
        for engine in (with_faster_coco_eval, with_pycocotools)
    ]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("digits", [6, 1])
@pytest.mark.parametrize("iou_type", [BBOX, SEGM])
def test_matches_are_those_of_pycocotools(tmp_path, iou_type, digits, seed):
    """Crowds, all areas, ties, classes without objects and classes without detections."""
    content = make_truth(30, seed=seed)
    assert any(entry["iscrowd"] for entry in content["annotations"])
    ours, theirs = both(read(tmp_path, content), make_results(content, seed, digits), iou_type)
    assert_equal(ours, theirs)
    positives, falses = (
        np.concatenate([getattr(found, kind) for found in ours.classes.values()], axis=2)
        for kind in ("positives", "falses")
    )
    # The data reaches what is special: objects of several sizes, and detections to be ignored.
    assert positives[:3, 0].any(axis=1).all() and falses.any(axis=2).all()
    assert not (positives | falses)[0].all()


@pytest.mark.parametrize("iou_type", [BBOX, SEGM])
def test_only_the_best_hundred_detections_count(tmp_path, iou_type):
    content = make_truth(3, seed=3)
    chosen = content["annotations"][0]
    x, y, w, h = chosen["bbox"]
    results = []
    for number in range(150):
        box = [x + number % 7, y, w, h]
        results.append(
            {
                **{"image_id": chosen["image_id"], "category_id": chosen["category_id"]},
                **{"bbox": box, "segmentation": rle(box), "score": 0.9 - number % 50 / 100},
            }
        )
    ours, theirs = both(read(tmp_path, content), results, iou_type)
    assert_equal(ours, theirs)
    assert sum(len(found.images) for found in ours.classes.values()) == 100


@pytest.mark.parametrize("iou_type", [BBOX, SEGM])
def test_nothing_detected_and_nothing_there(tmp_path, iou_type):
    content = make_truth(12)
    results = make_results(content, 4)
    assert_equal(*both(read(tmp_path, content), [], iou_type))
    # One object is left, on an image without detections.
    content["annotations"] = [e for e in content["annotations"] if not e["iscrowd"]][:1]
    there = content["annotations"][0]["image_id"]
    results = [found for found in results if found["image_id"] != there]
    ours, theirs = both(read(tmp_path, content), results, iou_type)
    assert_equal(ours, theirs)
    assert not any(found.positives.any() for found in ours.classes.values())


@pytest.mark.parametrize("engine", [with_faster_coco_eval, with_pycocotools])
@pytest.mark.parametrize("iou_type", [BBOX, SEGM])
@pytest.mark.parametrize(
    "ids",
    [
        lambda i: f"image {i:03d}",
        lambda i: 20_260_101_120_000_000 + i,  # a time; as floats, neighbours are equal
        lambda i: -i,
    ],
)
def test_ids_may_be_text_or_large(tmp_path, ids, iou_type, engine):
    """Matches are those under small ids; in ascending order, which turns negative ones round."""
    content = make_truth(12)
    results = make_results(content, 4)
    expected = match(read(tmp_path, content), results, iou_type)
    for image in content["images"]:
        image["id"] = ids(image["id"])
    for entry in [*content["annotations"], *results]:
        entry["image_id"], entry["category_id"] = ids(entry["image_id"]), str(entry["category_id"])
    for category in content["categories"]:
        category["id"] = str(category["id"])
    found = match(read(tmp_path, content), results, iou_type, engine=engine)
    assert set(found.image_ids) == {ids(image) for image in expected.image_ids}
    places = {image: place for place, image in enumerate(found.image_ids)}
    moved = np.array([places[ids(image)] for image in expected.image_ids])
    assert found.classes.keys() == expected.classes.keys()
    for name, matches in found.classes.items():
        theirs = expected.classes[name]
        assert sorted(
            zip(matches.images, matches.scores, *matches.positives[0], strict=True)
        ) == sorted(zip(moved[theirs.images], theirs.scores, *theirs.positives[0], strict=True))
        for area, other in zip(matches.objects, theirs.objects, strict=True):
            np.testing.assert_array_equal(area, np.sort(moved[other]))


def test_ids_of_results_may_be_written_as_floats(tmp_path):
    content = make_truth(12)
    truth, results = read(tmp_path, content), make_results(content, 4)
    expected = match(truth, results, BBOX)
    for entry in results:
        entry["image_id"], entry["category_id"] = map(
            float, (entry["image_id"], entry["category_id"])
        )
    assert_equal(match(truth, results, BBOX), expected)
