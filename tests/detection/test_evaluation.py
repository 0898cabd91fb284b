"""COCO's metrics against pycocotools and Detectron2's evaluator called directly."""

from __future__ import annotations

import json

import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog

from repr_det.detection.coco_results import BBOX, METRICS, SEGM
from repr_det.detection.evaluation import (
    annotation_file,
    evaluate,
    instances_of,
)
from repr_det.detection.evaluator import CocoEvaluator
from repr_det.detection.trainer import DetectionTrainer
from repr_det.tasks import get_cfg
from tests.coco_files import CLASSES, direct, make_results, make_truth, read


@pytest.mark.parametrize("iou_type", [BBOX, SEGM])
def test_metrics_are_those_of_pycocotools(tmp_path, iou_type):
    content = make_truth(20)
    results = make_results(content, 1)
    found = evaluate(read(tmp_path, content), results, iou_type)
    assert list(found.classes) == list(CLASSES.values())
    tables = [[table[m] for m in METRICS] for table in (found.overall, *found.classes.values())]
    ours = np.array(tables, dtype=float)  # None becomes NaN
    np.testing.assert_allclose(ours, direct(content, results, iou_type), rtol=0, atol=1e-12)
    assert found.classes["never seen"]["AP"] is None and found.classes["never found"]["AP"] == 0


def test_no_detections(tmp_path):
    found = evaluate(read(tmp_path, make_truth()), [], BBOX)
    assert found.overall["AP"] == 0 and found.classes["never seen"]["AP"] is None


def test_no_detector():
    with pytest.raises(ValueError, match="does not answer with instances but with sem_seg. Set"):
        instances_of({"sem_seg": None})


def test_no_coco_dataset():
    DatasetCatalog.register("not_coco", list)
    try:
        with pytest.raises(ValueError, match="not_coco has no COCO-format annotation file"):
            annotation_file("not_coco")
    finally:
        DatasetCatalog.remove("not_coco")
        MetadataCatalog.remove("not_coco")
    with pytest.raises(ValueError, match="Dataset nobody_knows is not registered"):
        annotation_file("nobody_knows")


def test_a_panoptic_test_set_is_said_to_be_evaluated_in_part(tmp_path, caplog):
    path = tmp_path / "truth.json"
    path.write_text(json.dumps(make_truth()))
    MetadataCatalog.get("of_panoptic").set(
        evaluator_type="coco_panoptic_seg", json_file=str(path), thing_classes=["things"]
    )
    cfg = get_cfg()
    try:
        CocoEvaluator(cfg, "of_panoptic")
    finally:
        MetadataCatalog.remove("of_panoptic")
    assert "boxes and masks are evaluated, panoptic quality is not" in caplog.text


def test_a_test_set_of_lvis():
    """Its classes count from 1, and COCO's evaluation would take each for the one before it."""
    DatasetCatalog.register("of_lvis", list)
    MetadataCatalog.get("of_lvis").set(evaluator_type="lvis", json_file=__file__)
    cfg = get_cfg()
    try:
        cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = ("of_lvis",), ()
        DetectionTrainer.check_to_train(cfg)
        cfg.DATASETS.TEST = ("of_lvis",)
        for use in (lambda: DetectionTrainer.check(cfg), lambda: annotation_file("of_lvis")):
            with pytest.raises(ValueError, match="of_lvis is evaluated by LVIS's .* set its files"):
                use()
    finally:
        DatasetCatalog.remove("of_lvis")
        MetadataCatalog.remove("of_lvis")
