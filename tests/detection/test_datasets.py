"""Datasets by their files, and what is refused before anything is trained."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog

from repr_det.detection.datasets import (
    check_classes,
    check_datasets,
    take_num_classes,
    use_coco_data,
)
from repr_det.errors import UserError
from repr_det.tasks import get_cfg


@pytest.fixture
def coco(tmp_path):
    """An annotation file with three classes, whose ids have gaps, and an image folder."""
    (tmp_path / "images").mkdir()
    path = tmp_path / "train.json"
    names = {7: "bolt", 2: "nut", 40: "washer"}
    content = {
        "images": [{"id": 1, "file_name": "1.png", "width": 40, "height": 30}],
        "annotations": [{"id": 5, "image_id": 1, "category_id": 7, "bbox": [1, 2, 10, 10]}],
        "categories": [{"id": i, "name": name} for i, name in names.items()],
    }
    path.write_text(json.dumps(content))
    return str(path), str(tmp_path / "images")


def changed(path, change):
    """The same file with something else in it."""
    content = json.loads(Path(path).read_text())
    change(content)
    Path(path).write_text(json.dumps(content))


@pytest.fixture
def cfg():
    return get_cfg()


@pytest.fixture
def name(request):
    name = f"parts_{request.node.name}"
    yield name
    if name in DatasetCatalog.list():
        DatasetCatalog.remove(name)
    if name in MetadataCatalog.list():
        MetadataCatalog.remove(name)


@pytest.mark.parametrize("bbox", [[1, 2, 0, 5], [1, 2, 5, 0], [50, 2, 5, 5], [1, -9, 5, 5]])
def test_boxes_that_do_not_count_are_warned_of(cfg, coco, name, caplog, bbox):
    logging.getLogger("detectron2").propagate = True
    other = {"id": 6, "image_id": 1, "category_id": 2, "bbox": bbox}
    changed(coco[0], lambda c: c["annotations"].append(other))
    use_coco_data(cfg, "TRAIN", name, *coco)
    assert "1 boxes have no area inside their image" in caplog.text
    assert "annotation 6" in caplog.text


def test_images_without_annotations_are_warned_of(cfg, coco, name, caplog):
    logging.getLogger("detectron2").propagate = True
    extra = {"id": 2, "file_name": "2.png", "width": 4, "height": 4}
    changed(coco[0], lambda c: c["images"].append(extra))
    use_coco_data(cfg, "TRAIN", name, *coco)
    assert "1 of 2 images have no annotations" in caplog.text


def test_use_and_number_of_classes(cfg, coco, name):
    use_coco_data(cfg, "TRAIN", name, *coco)
    assert (name,) == cfg.DATASETS.TRAIN
    take_num_classes(cfg, name, [])
    assert cfg.MODEL.ROI_HEADS.NUM_CLASSES == 3
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = 5
    take_num_classes(cfg, name, ["MODEL.ROI_HEADS.NUM_CLASSES", "5"])
    assert cfg.MODEL.ROI_HEADS.NUM_CLASSES == 5
    cfg.MODEL.META_ARCHITECTURE = "RetinaNet"
    take_num_classes(cfg, name, [])
    assert cfg.MODEL.RETINANET.NUM_CLASSES == 3


def test_same_name_for_other_files(cfg, coco, name, tmp_path):
    use_coco_data(cfg, "TRAIN", name, *coco)
    use_coco_data(cfg, "TEST", name, *coco)
    with pytest.raises(ValueError, match="registered already. Set another name"):
        use_coco_data(cfg, "TEST", name, coco[0], str(tmp_path))


def test_no_image_folder(cfg, coco, name):
    with pytest.raises(UserError, match="Image folder nowhere does not exist"):
        use_coco_data(cfg, "TRAIN", name, coco[0], "nowhere")


def test_unregistered(cfg):
    cfg.DATASETS.TRAIN = ("nobody_registered_this",)
    with pytest.raises(ValueError, match="nobody_registered_this is not registered"):
        check_datasets(cfg)


def test_wrong_number_of_classes(cfg, name):
    MetadataCatalog.get(name).thing_classes = ["a", "b"]
    with pytest.raises(ValueError, match=f"NUM_CLASSES is 80, but dataset {name} has 2 classes"):
        check_classes(cfg, [name])
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = 2
    check_classes(cfg, [name])


def test_classes_in_another_order(cfg, coco, name):
    use_coco_data(cfg, "TRAIN", name, *coco)
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = 3
    other = f"{name}_other"
    MetadataCatalog.get(other).thing_classes = ["bolt", "nut", "washer"]
    try:
        with pytest.raises(ValueError, match=f"{other} has other classes than {name}, or in ano"):
            check_classes(cfg, [name, other])
    finally:
        MetadataCatalog.remove(other)
