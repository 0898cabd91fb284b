"""Datasets by their files, and what is refused before anything is trained."""

from __future__ import annotations

import json

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog

from repr_det.detection.datasets import (
    check_datasets,
    check_num_classes,
    read_categories,
    take_num_classes,
    use_coco_data,
)
from repr_det.engine.config import get_cfg


@pytest.fixture
def coco(tmp_path):
    """An annotation file with three classes, whose ids have gaps, and an image folder."""
    (tmp_path / "images").mkdir()
    path = tmp_path / "train.json"
    names = {7: "bolt", 2: "nut", 40: "washer"}
    categories = [{"id": i, "name": name} for i, name in names.items()]
    path.write_text(json.dumps({"images": [], "annotations": [], "categories": categories}))
    return str(path), str(tmp_path / "images")


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


def test_categories_by_id(coco):
    assert read_categories(coco[0]) == ["nut", "bolt", "washer"]


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", "not json", '{"categories": [{"name": "x"}]}', "\xff\xfe"]
)
def test_not_coco(tmp_path, content):
    path = tmp_path / "bad.json"
    path.write_text(content, encoding="latin-1")
    with pytest.raises(ValueError, match="bad.json is not a COCO annotation file"):
        read_categories(str(path))


def test_no_annotation_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no.json does not exist: give the path"):
        read_categories(str(tmp_path / "no.json"))


def test_use_and_number_of_classes(cfg, coco, name):
    use_coco_data(cfg, "TRAIN", name, *coco)
    assert (name,) == cfg.DATASETS.TRAIN
    take_num_classes(cfg, coco[0], [])
    assert cfg.MODEL.ROI_HEADS.NUM_CLASSES == 3
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = 5
    take_num_classes(cfg, coco[0], ["MODEL.ROI_HEADS.NUM_CLASSES", "5"])
    assert cfg.MODEL.ROI_HEADS.NUM_CLASSES == 5
    cfg.MODEL.META_ARCHITECTURE = "RetinaNet"
    take_num_classes(cfg, coco[0], [])
    assert cfg.MODEL.RETINANET.NUM_CLASSES == 3


def test_same_name_for_other_files(cfg, coco, name, tmp_path):
    use_coco_data(cfg, "TRAIN", name, *coco)
    use_coco_data(cfg, "TEST", name, *coco)
    with pytest.raises(ValueError, match="registered already: give it another name"):
        use_coco_data(cfg, "TEST", name, coco[0], str(tmp_path))


def test_no_image_folder(cfg, coco, name):
    with pytest.raises(FileNotFoundError, match="Image folder nowhere does not exist"):
        use_coco_data(cfg, "TRAIN", name, coco[0], "nowhere")


def test_unregistered(cfg):
    cfg.DATASETS.TRAIN = ("nobody_registered_this",)
    with pytest.raises(ValueError, match="nobody_registered_this is not registered"):
        check_datasets(cfg)


def test_wrong_number_of_classes(cfg, name):
    MetadataCatalog.get(name).thing_classes = ["a", "b"]
    with pytest.raises(ValueError, match=f"NUM_CLASSES is 80, but dataset {name} has 2 classes"):
        check_num_classes(cfg, name)
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = 2
    check_num_classes(cfg, name)
