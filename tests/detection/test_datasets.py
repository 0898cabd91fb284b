"""Datasets by their files, and what is refused before anything is trained."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances

from repr_det.detection.datasets import (
    check_annotations,
    check_classes,
    check_dataset,
    check_same_classes,
    check_test_images,
    check_training_objects,
    take_num_classes,
    use_coco_data,
)
from repr_det.detection.trainer import DetectionTrainer
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
    other = {"id": 6, "image_id": 1, "category_id": 2, "bbox": bbox}
    changed(coco[0], lambda c: c["annotations"].append(other))
    use_coco_data(cfg, "TRAIN", name, *coco)
    assert "1 boxes have no area inside their image" in caplog.text
    assert "annotation 6" in caplog.text


def test_images_without_annotations_are_warned_of(cfg, coco, name, caplog):
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


def test_unregistered(cfg, coco, name):
    use_coco_data(cfg, "TEST", name, *coco)
    cfg.DATASETS.TRAIN = ("nobody_registered_this",)
    DetectionTrainer.check(cfg)  # all that evaluation needs
    with pytest.raises(ValueError, match="nobody_registered_this is not registered"):
        DetectionTrainer.check_to_train(cfg)
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = (), cfg.DATASETS.TRAIN
    with pytest.raises(ValueError, match="nobody_registered_this is not registered"):
        DetectionTrainer.check(cfg)


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


@pytest.fixture
def registered(coco, name):
    """A file with a polygon of one point, registered as a user's own code does."""
    polygon = {"segmentation": [[1, 2]]}
    changed(coco[0], lambda c: c["annotations"][0].update(polygon))
    register_coco_instances(name, {}, *coco)
    return name


def test_what_detectron2_registered_is_read_by_the_same_reader(cfg, registered):
    """Detectron2's own leaves the object out, for boxes, too."""
    assert not DatasetCatalog.get(registered)[0]["annotations"]
    check_dataset(registered)
    (entry,) = DatasetCatalog.get(registered)[0]["annotations"]
    assert entry["bbox"] == [1, 2, 10, 10] and "segmentation" not in entry
    cfg.DATASETS.TRAIN = cfg.DATASETS.TEST = (registered,)
    cfg.MODEL.MASK_ON = True
    DetectionTrainer.check(cfg)
    for read in (
        lambda: DatasetCatalog.get(registered),
        lambda: check_annotations(cfg, [registered]),
    ):
        with pytest.raises(UserError, match=r"annotation 5 has the polygon \[1, 2\]"):
            read()


def test_a_loader_of_the_users_own_is_kept(cfg, coco, name):
    """Only the annotation file, on which it is evaluated, is checked."""
    records = [{"file_name": "1.png"}]
    DatasetCatalog.register(name, lambda: records)
    MetadataCatalog.get(name).set(json_file=coco[0], evaluator_type="coco")
    check_dataset(name)
    assert DatasetCatalog.get(name) is records
    changed(coco[0], lambda c: c["annotations"][0].update(bbox=None))
    with pytest.raises(UserError, match="annotation 5 has the bbox null"):
        check_annotations(cfg, [name])


def test_files_of_other_classes_than_the_dataset_has(cfg, coco, name):
    register_coco_instances(name, {"thing_classes": ["bolt", "nut", "washer"]}, *coco)
    with pytest.raises(UserError, match=f"has other classes than dataset {name}, or in another"):
        check_annotations(cfg, [name])


@pytest.mark.parametrize("other", ["nut,washer,bolt", "nut,bolt", "nut,bolt,washer"])
def test_training_and_test_files_have_the_same_classes(cfg, coco, name, other):
    use_coco_data(cfg, "TRAIN", name, *coco)
    MetadataCatalog.get("other_classes").thing_classes = other.split(",")
    try:
        if other == "nut,bolt,washer":
            return check_same_classes(name, "other_classes")
        with pytest.raises(UserError, match="or in another order"):
            check_same_classes(name, "other_classes")
    finally:
        MetadataCatalog.remove("other_classes")


@pytest.mark.parametrize("count", [2, 3])
def test_classes_are_compared_before_they_are_counted(cfg, coco, name, count):
    """Whatever number is set, one of the two datasets does not have it."""
    use_coco_data(cfg, "TRAIN", name, *coco)
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = count
    cfg.DATASETS.TRAIN = (name, "other_classes")
    DatasetCatalog.register("other_classes", list)
    MetadataCatalog.get("other_classes").thing_classes = ["nut", "bolt"]
    try:
        with pytest.raises(UserError, match="Dataset other_classes has other classes than"):
            check_classes(cfg, cfg.DATASETS.TRAIN)
        with pytest.raises(UserError, match="Dataset other_classes has other classes than"):
            DetectionTrainer.training_images(cfg)
    finally:
        DatasetCatalog.remove("other_classes")
        MetadataCatalog.remove("other_classes")


@pytest.mark.parametrize("kind", ["sem_seg", "cityscapes_sem_seg"])
def test_semantic_segmentation_is_not_evaluated(cfg, name, kind):
    DatasetCatalog.register(name, list)
    MetadataCatalog.get(name).set(evaluator_type=kind, stuff_classes=["sky"])
    cfg.DATASETS.TEST = (name,)
    with pytest.raises(UserError, match=r"semantic segmentation.* Set DATASETS.TEST \(\)"):
        DetectionTrainer.check(cfg)


def test_a_trainer_of_ones_own_may_bring_the_metrics(cfg, name):
    class Segments(DetectionTrainer):
        @classmethod
        def build_evaluator(cls, cfg, dataset_name):
            raise NotImplementedError

    DatasetCatalog.register(name, list)
    MetadataCatalog.get(name).set(evaluator_type="sem_seg", stuff_classes=["sky"])
    cfg.DATASETS.TEST = (name,)
    Segments.check(cfg)


def test_images_are_looked_for_where_a_reader_of_ones_own_says(cfg, coco, name):
    """The file and the folder of the metadata may be for other things."""
    image = Path(coco[1]) / "1.png"
    record = {"file_name": str(image), "image_id": 1, "height": 30, "width": 40, "annotations": []}
    DatasetCatalog.register(name, lambda: [record])
    MetadataCatalog.get(name).set(
        json_file=coco[0], image_root="nowhere", evaluator_type="coco", thing_classes=["a"]
    )
    cfg.DATASETS.TEST = (name,)
    with pytest.raises(UserError, match=f"1 of 1 images do not exist, for example {image}"):
        check_test_images(cfg)
    image.touch()
    check_test_images(cfg)


def test_files_of_a_registered_dataset_that_are_missing(cfg, coco, name):
    register_coco_instances(name, {}, f"{coco[0]}.gone", coco[1])
    with pytest.raises(UserError, match="gone, which does not exist. Correct the path that the"):
        check_dataset(name)


@pytest.mark.parametrize(
    ("file_name", "advice"),
    [("train\\1.png", "Set the path with slashes"), ("http://a.org/1.png", "Download the images")],
)
def test_paths_of_windows_and_urls_are_hinted_at(cfg, coco, name, file_name, advice):
    changed(coco[0], lambda c: c["images"][0].update(file_name=file_name))
    with pytest.raises(UserError, match=rf"Image 1 has the file_name .*{advice}"):
        use_coco_data(cfg, "TRAIN", name, *coco)
    assert name not in DatasetCatalog.list() and name not in MetadataCatalog.list()
    if "\\" in file_name:  # a name like any other where it is there
        (Path(coco[1]) / file_name).touch()
        use_coco_data(cfg, "TRAIN", name, *coco)


@pytest.mark.parametrize(
    ("segmentation", "mask_format", "sentence"),
    [
        ([[1, 2, 11, 2, 11, 12]], "polygon", None),
        ({"size": [30, 40], "counts": b"x"}, "bitmask", None),
        ({"size": [30, 40], "counts": b"x"}, "polygon", "has a mask in RLE. Set INPUT.MASK_FORMAT"),
        (None, "polygon", "has no mask. Set a segmentation, or MODEL.MASK_ON False"),
    ],
)
def test_masks_that_a_model_needs(cfg, segmentation, mask_format, sentence):
    """Of records by a loader of the user's."""
    cfg.INPUT.MASK_FORMAT, cfg.MODEL.MASK_ON = mask_format, True
    entry = {"iscrowd": 0} if segmentation is None else {"segmentation": segmentation}
    records = [{"file_name": "1.png", "annotations": [entry, {"iscrowd": 1}]}]
    with pytest.raises(UserError, match=sentence) if sentence else nullcontext():
        check_training_objects(cfg, records)
