"""Datasets by their files, and what is refused before anything is trained."""

from __future__ import annotations

import json
import logging
from contextlib import nullcontext
from pathlib import Path

import cv2
import numpy as np
import pytest
from detectron2.data import DatasetCatalog, DatasetMapper, MetadataCatalog
from PIL import Image

from repr_det.detection.datasets import (
    NamedImages,
    category_names,
    check_classes,
    check_datasets,
    check_test_masks,
    check_training_masks,
    read_coco,
    take_num_classes,
    use_coco_data,
)
from repr_det.errors import UserError
from repr_det.tasks import get_cfg
from tests.images import written_in_many_ways


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


def test_categories_by_id(coco):
    assert category_names(read_coco(coco[0])) == ["nut", "bolt", "washer"]


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", "not json", '{"categories": [{"name": "x"}]}', "\xff\xfe"]
)
def test_not_coco(tmp_path, content):
    path = tmp_path / "bad.json"
    path.write_text(content, encoding="latin-1")
    with pytest.raises(ValueError, match="bad.json is not a COCO annotation file"):
        read_coco(str(path))


def test_annotations_that_are_a_folder(tmp_path):
    with pytest.raises(ValueError, match=r"cannot be read \(Is a directory\): give the path"):
        read_coco(str(tmp_path))


def test_no_annotation_file(tmp_path):
    with pytest.raises(UserError, match=r"no.json does not exist: give the path"):
        read_coco(str(tmp_path / "no.json"))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda c: c["images"].clear(), r"train.json holds no images"),
        (lambda c: c["annotations"].clear(), r"train.json holds no annotations"),
        (
            lambda c: c["annotations"][0].update(category_id=3),
            r"train.json: annotation 5 has category_id 3, which the file does not define",
        ),
        (
            lambda c: c["annotations"][0].update(image_id=9),
            r"train.json: annotation 5 has image_id 9, which the file does not define",
        ),
        (lambda c: c["annotations"][0].pop("bbox"), r"train.json is not a COCO annotation file"),
        (lambda c: c.pop("categories"), r"train.json is not a COCO annotation file"),
        (
            lambda c: c["annotations"].append(c["annotations"][0]),
            r"train.json: 2 annotations have the id 5: number them anew",
        ),
        (
            lambda c: c["images"].append({**c["images"][0], "file_name": "2.png"}),
            r"train.json: 2 images have the id 1: number them anew",
        ),
        (
            lambda c: c["categories"].append({"id": 2, "name": "screw"}),
            r"train.json: 2 categories have the id 2: number them anew",
        ),
        *(
            (
                lambda c, side=side: c["images"][0].update(width=side),
                r"train.json: image 1 has the width and height .*: give them in pixels",
            )
            for side in (None, 0, "40")
        ),
        (
            lambda c: c["annotations"][0].update(ignore=1),
            r"train.json: annotation 5 has the key ignore, .* iscrowd 1",
        ),
        *(
            (
                lambda c, box=box: c["annotations"][0].update(bbox=box),
                r"train.json: the box of annotation 5 is .*: give four numbers",
            )
            for box in (["1", "2", "3", "4"], [1, 2, None, 4], [1, 2, float("nan"), 4])
        ),
    ],
)
def test_contradictions(cfg, coco, name, change, sentence):
    changed(coco[0], change)
    with pytest.raises(ValueError, match=sentence):
        use_coco_data(cfg, "TRAIN", name, *coco)
    assert name not in DatasetCatalog.list()


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


class TestUnreadableImages:
    @pytest.fixture(params=["missing", "truncated", "text", "other size", "huge"])
    def record(self, request, tmp_path, monkeypatch):
        path = tmp_path / "photo.jpg"
        if request.param != "missing":
            cv2.imwrite(str(path), np.random.default_rng(0).integers(0, 255, (60, 80, 3)))
        if request.param == "truncated":
            path.write_bytes(path.read_bytes()[:500])
        if request.param == "text":
            path.write_text("not an image")
        if request.param == "huge":  # Pillow refuses twice as many pixels as this
            monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 2000)
        size = (60, 81) if request.param == "other size" else (60, 80)
        return {"file_name": str(path), "height": size[0], "width": size[1], "annotations": []}

    def test_is_named(self, cfg, record):
        mapper = NamedImages(DatasetMapper(cfg, is_train=True), skip=False)
        with pytest.raises(ValueError, match=r"Image .*photo.jpg cannot be read .*SKIP_BAD_IMAGES"):
            mapper(record)

    def test_is_skipped_and_counted(self, cfg, record, caplog):
        logging.getLogger("detectron2").propagate = True
        mapper = NamedImages(DatasetMapper(cfg, is_train=True), skip=True)
        assert mapper(dict(record)) is None
        assert mapper(dict(record)) is None
        assert "2 so far" in caplog.text


@pytest.mark.parametrize("order", ["RGB", "BGR"])
def test_images_are_seen_as_they_are_meant(cfg, tmp_path, order):
    """Grey, of a palette, transparent, or turned by EXIF; the annotations have the upright size."""
    cfg.INPUT.FORMAT = order
    cfg.INPUT.MIN_SIZE_TEST = 30  # as they are
    mapper = NamedImages(DatasetMapper(cfg, is_train=False), skip=False)
    pixels = np.random.default_rng(0).integers(0, 255, (30, 40, 3), dtype=np.uint8)
    for path, seen in written_in_many_ways(tmp_path, pixels):
        image = mapper({"file_name": str(path), "height": 30, "width": 40})["image"]
        channels = seen if order == "RGB" else seen[:, :, ::-1]
        assert np.array_equal(image.permute(1, 2, 0).numpy(), channels), path.name


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


@pytest.mark.parametrize("mode", ["I;16", "F"])
def test_an_image_of_more_than_8_bits_is_named(tmp_path, mode):
    """Pillow would make it white."""
    path = tmp_path / "x_ray.tiff"
    ramp = np.linspace(0, 60_000, 64).reshape(8, 8)
    Image.fromarray(ramp.astype({"I;16": np.uint16, "F": np.float32}[mode])).save(path)
    mapper = NamedImages(lambda record: record, skip=True)
    with pytest.raises(ValueError, match=r"x_ray.tiff has more than 8 bits a channel .*convert it"):
        mapper({"file_name": str(path)})


POLYGON = [[1, 2, 11, 2, 11, 12]]
RLE = {"size": [30, 40], "counts": "abc"}


@pytest.mark.parametrize(
    ("segmentation", "mask_format", "training", "test"),
    [
        (POLYGON, "polygon", None, None),
        (RLE, "bitmask", None, None),
        (RLE, "polygon", "has a mask in RLE: set INPUT.MASK_FORMAT bitmask", None),
        (None, "polygon", "has no mask: give it a segmentation", "annotation 5 has no mask"),
        ([], "polygon", "has no mask: give it a segmentation", "annotation 5 has no mask"),
        # Detectron2 leaves such an object out of training.
        ([[]], "polygon", None, "annotation 5 has no mask"),
    ],
)
def test_masks_that_a_model_needs(cfg, coco, name, segmentation, mask_format, training, test):
    other = {"id": 6, "image_id": 1, "category_id": 7, "bbox": [1, 2, 10, 10]}
    crowd = {"iscrowd": 1, "segmentation": RLE}

    def change(content):
        if segmentation is not None:
            content["annotations"][0]["segmentation"] = segmentation
        content["annotations"] += [{**other, **crowd}]

    changed(coco[0], change)
    cfg.INPUT.MASK_FORMAT = mask_format
    use_coco_data(cfg, "TRAIN", name, *coco)
    for wrong, check in (
        (training, lambda: check_training_masks(cfg, DatasetCatalog.get(name))),
        (test, lambda: check_test_masks([name])),
    ):
        with pytest.raises(ValueError, match=wrong) if wrong else nullcontext():
            check()
