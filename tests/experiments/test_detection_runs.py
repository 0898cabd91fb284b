"""Tables of detectors: planned, shortened, recorded."""

from __future__ import annotations

import json

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances

from experiments.__main__ import reproduce
from experiments.runs import FULL, QUICK, plan, read_evaluations
from experiments.tables import AP, Row, Table
from repr_det.tasks import get_cfg
from tests.detectors import shrink
from tests.experiments.settings import squeezed
from tests.report.folders import write_detection_data


@pytest.fixture
def table(tmp_path):
    """Standard training and RePr of a tiny detector on eight images, two of them held out."""
    annotations, images = write_detection_data(tmp_path / "data")
    register_coco_instances("pets_train", {}, str(annotations), str(images))
    cfg = get_cfg()
    cfg.MODEL.BACKBONE.NAME = "build_resnet_fpn_backbone"
    cfg.MODEL.RESNETS.OUT_FEATURES = ["res2", "res3", "res4", "res5"]
    cfg.MODEL.FPN.IN_FEATURES = ["res2", "res3", "res4", "res5"]
    cfg.MODEL.ROI_HEADS.NAME = "StandardROIHeads"
    cfg.MODEL.ROI_BOX_HEAD.NAME = "FastRCNNConvFCHead"
    cfg.MODEL.ROI_BOX_HEAD.NUM_FC = 1
    for node in (cfg.MODEL.RPN, cfg.MODEL.ROI_HEADS):
        node.IN_FEATURES = ["p4"]
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = 2
    shrink(cfg, tmp_path)
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = ("pets_train",), ("pets_heldout",)
    cfg.DATASETS.HELD_OUT = 2
    cfg.SOLVER.MAX_ITER, cfg.SOLVER.STEPS = 30, (25,)
    cfg.TEST.EVAL_PERIOD = 20
    cfg.REPR.ENABLED, cfg.REPR.S1, cfg.REPR.S2, cfg.REPR.N = True, 10, 5, 1
    config = tmp_path / "tiny.yaml"
    config.write_text(cfg.dump())
    rows = (
        Row("standard", "Standard", None, str(config), {"REPR.ENABLED": False}),
        Row("repr", "RePr", None, str(config), {}, "standard"),
    )
    yield Table("tiny", "A tiny detector", rows, AP, quick_images=4)
    for name in ("pets_train", "pets_heldout"):
        for catalog in (DatasetCatalog, MetadataCatalog):
            if name in catalog.list():
                catalog.remove(name)


def test_evaluations_are_read_from_metrics(table, tmp_path):
    """With masks where there are some; nothing detected is nothing right."""
    run = plan(table, table.row("repr"), 0, FULL, tmp_path)
    assert run.images == 6
    nothing = {"bbox/AP": float("nan"), "bbox/AP50": float("nan"), "bbox/AP75": float("nan")}
    lines = [
        {"iteration": 19, "total_loss": 2.0, **nothing},
        {"iteration": 30, "bbox/AP": 20.0, "bbox/AP50": 40.0, "bbox/AP75": 10.0, "segm/AP": 15.0},
    ]
    (tmp_path / "metrics.json").write_text("\n".join(map(json.dumps, lines)))
    assert read_evaluations(run, tmp_path) == {
        "pets_heldout": [
            {"iteration": 20, "epoch": 3.33, "AP": 0.0, "AP50": 0.0, "AP75": 0.0},
            {"iteration": 30, "epoch": 5.0, "AP": 20.0, "AP50": 40.0, "AP75": 10.0, "mask_AP": 15},
        ]
    }


def test_shortened(table, tmp_path):
    run = plan(table, table.row("repr"), 0, QUICK, tmp_path)
    solver, keys = run.resolved.SOLVER, run.resolved.REPR
    assert (run.images, run.cfg.DATASETS.HELD_OUT) == (4, 4)
    assert (solver.MAX_ITER, solver.STEPS, keys.S1, keys.S2) == (3, (3,), 1, 1)
    assert run.resolved.TEST.EVAL_PERIOD == 0


@pytest.mark.slow
def test_a_pair_is_trained_recorded_and_compared(table, tmp_path, capsys):
    text = reproduce(table, [0], FULL, tmp_path / "output")
    lines = [line for line in squeezed(text).splitlines() if line.startswith("| ")]
    assert lines[0].startswith("| | AP | AP50 | Seeds | Gain in AP")
    assert [line.split(" | ")[0] for line in lines[1:]] == ["| Standard", "| RePr"]
    record = json.loads((tmp_path / "output" / "tiny" / "repr" / "seed_0.json").read_text())
    ((name, entries),) = record["evaluations"].items()
    assert name == "pets_heldout" and [entry["iteration"] for entry in entries] == [20, 30]
    assert {"AP", "AP50", "AP75"} <= set(entries[-1])
    assert record["training_images"] == 6 and record["settings"]["DATASETS"]["HELD_OUT"] == 2
    # What pycocotools prints goes to the run's log.
    assert capsys.readouterr().out == ""
    log = (tmp_path / "output" / "tiny" / "repr" / "seed_0" / "log.txt").read_text()
    assert "Average Precision" in log
