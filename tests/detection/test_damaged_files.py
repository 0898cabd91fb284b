"""Damaged annotation and results files: the right result or one sentence, the same everywhere."""

from __future__ import annotations

import contextlib
import io
import json
import re

import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data import transforms as T
from detectron2.data.detection_utils import (
    annotations_to_instances,
    filter_empty_instances,
    transform_instance_annotations,
)
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

from repr_det.detection.annotations import read_labels
from repr_det.detection.coco_results import (
    BBOX,
    METRICS,
    SEGM,
    check_iou_type,
    read_results,
    read_truth,
)
from repr_det.detection.datasets import use_coco_data
from repr_det.detection.evaluation import evaluate
from repr_det.errors import UserError
from repr_det.tasks import get_cfg
from tests.coco_damage import damaged, damages, meant, sound, sound_results
from tests.coco_files import direct

# pycocotools and numpy 2, in mask.decode
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

NAME = "damaged_file"


def outcome(work):
    """What work returns, or the one sentence that it ends with."""
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            return work(), None
    except UserError as error:
        return None, str(error)


def trained_on(path, folder, masks):
    """What training makes of a file: records, mapped as Detectron2 maps them."""
    cfg = get_cfg()
    cfg.MODEL.MASK_ON = masks
    try:
        use_coco_data(cfg, "TRAIN", NAME, str(path), str(folder))
        for record in DatasetCatalog.get(NAME):
            size = record["height"], record["width"]
            resize = T.TransformList([T.ResizeTransform(*size, 32, 48)])
            objects = []
            for entry in record["annotations"]:
                if entry["iscrowd"]:
                    continue
                entry.pop("keypoints", None)  # the model has no use for them
                if not masks:
                    entry.pop("segmentation", None)
                objects.append(transform_instance_annotations(entry, resize, (32, 48)))
            kept = filter_empty_instances(annotations_to_instances(objects, (32, 48), "bitmask"))
            boxes = kept.gt_boxes.tensor.numpy()
            assert np.isfinite(boxes).all() and (boxes >= 0).all()
    finally:
        for catalog in (DatasetCatalog, MetadataCatalog):
            if NAME in catalog.list():
                catalog.remove(NAME)


def check_sentence(sentence, path):
    assert "\n" not in sentence and len(sentence) < 600 and sentence.encode()
    assert str(path) in sentence or "has the file_name" in sentence
    assert re.search(r"(images?|annotations?|categor(y|ies)|detection)(\[\d+\]|[ ,.])", sentence)
    assert re.search(r"\. (Set|Correct|Remove|Download)", sentence)


def check_annotations(path, folder, damage):
    content, results = sound(), sound_results(sound())
    for step in damage:
        content = damaged(content, step)
    path.write_text(json.dumps(content))
    for iou_type in (BBOX, SEGM):

        def compared(iou_type=iou_type):
            truth = read_truth(path)
            check_iou_type([], iou_type, truth)
            return truth

        truth, sentence = outcome(compared)
        _, in_training = outcome(lambda masks=iou_type == SEGM: trained_on(path, folder, masks))
        if in_training and "has the file_name" in in_training:
            return  # evaluation of results reads no images
        assert in_training == sentence
        if sentence is not None:
            check_sentence(sentence, path)
            continue
        event(f"accepted for {iou_type}")
        _, of_labels = outcome(lambda: read_labels(path))
        assert of_labels is None
        known = [
            r
            for r in results
            if r["image_id"] in truth.imgs
            and r["category_id"] in truth.cats
            and [truth.imgs[r["image_id"]][side] for side in ("height", "width")]
            == r["segmentation"]["size"]
        ]
        if not known:
            return
        wanted = direct(meant(content), known, iou_type)[0]
        found = evaluate(truth, known, iou_type).overall
        found = np.array([found[metric] for metric in METRICS], dtype=float)
        np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-12)


def check_results(path, damage):
    results = {"annotations": sound_results(sound())}
    for step in damage:
        results = damaged(results, (step[0], "annotations", *step[2:]))
    truth_file = path.with_name("sound.json")
    truth_file.write_text(json.dumps(sound()))
    path.write_text(json.dumps(results["annotations"]))
    truth = read_truth(truth_file)
    found, sentence = outcome(lambda: read_results(path, truth))
    if sentence is not None:
        check_sentence(sentence, path)
        return
    for iou_type in (BBOX, SEGM):
        _, sentence = outcome(lambda iou_type=iou_type: check_iou_type(found, iou_type, truth))
        if sentence is None:
            known = ("image_id", "category_id", "score", "bbox", "segmentation")
            event(f"accepted for {iou_type}")
            results = [{k: r[k] for k in known if k in r} for r in found]
            wanted = direct(meant(sound()), results, iou_type)[0]
            overall = evaluate(truth, found, iou_type).overall
            overall = np.array([overall[metric] for metric in METRICS], dtype=float)
            np.testing.assert_allclose(overall, wanted, rtol=0, atol=1e-12)


some = settings(
    max_examples=150,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)
many = settings(some, max_examples=2_000, derandomize=False)
few_damages = st.lists(damages(), min_size=1, max_size=3)


@some
@given(few_damages)
def test_damaged_annotations_are_understood_or_refused(tmp_path_factory, damage):
    folder = tmp_path_factory.getbasetemp()
    check_annotations(folder / "damaged.json", folder, damage)


@some
@given(few_damages)
def test_damaged_results_are_understood_or_refused(tmp_path_factory, damage):
    check_results(tmp_path_factory.getbasetemp() / "results.json", damage)


@pytest.mark.slow
@many
@given(few_damages)
def test_two_thousand_damaged_annotation_files(tmp_path_factory, damage):
    folder = tmp_path_factory.getbasetemp()
    check_annotations(folder / "damaged.json", folder, damage)


@pytest.mark.slow
@many
@given(few_damages)
def test_two_thousand_damaged_results_files(tmp_path_factory, damage):
    check_results(tmp_path_factory.getbasetemp() / "results.json", damage)
