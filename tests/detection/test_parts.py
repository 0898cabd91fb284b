"""Parts of a training set of detection: what is trained on and what is evaluated."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances

from repr_det.detection.evaluation import truth_of
from repr_det.detection.parts import training_records
from repr_det.detection.trainer import DetectionTrainer
from repr_det.tasks import get_cfg
from tests.detectors import shrink
from tests.report.folders import write_detection_data

NAMES = ("pets_train", "pets_heldout")


@pytest.fixture
def cfg(tmp_path):
    """Trains on eight images and holds three out."""
    annotations, images = write_detection_data(tmp_path / "data")
    register_coco_instances(NAMES[0], {}, str(annotations), str(images))
    cfg = shrink(get_cfg(), tmp_path)
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = 2
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = NAMES[:1], NAMES[1:]
    cfg.DATASETS.HELD_OUT = 3
    yield cfg
    for name in NAMES:
        for catalog in (DatasetCatalog, MetadataCatalog):
            if name in catalog.list():
                catalog.remove(name)


def ids(records):
    return {record["image_id"] for record in records}


@pytest.mark.parametrize("deterministic", [False, True])
def test_what_is_trained_on_and_what_is_tested(cfg, deterministic):
    cfg.DETERMINISTIC = deterministic
    cfg.DATASETS.TRAIN_SHARE = 0.6
    DetectionTrainer.check(cfg)
    assert DetectionTrainer.training_images(cfg) == 3
    loader = DetectionTrainer.build_train_loader(cfg)
    trained = ids(itertools.chain.from_iterable(itertools.islice(loader, 12)))
    tested = ids(x for batch in DetectionTrainer.build_test_loader(cfg, NAMES[1]) for x in batch)
    assert len(trained) == len(tested) == 3 and not trained & tested
    # A smaller share of the same images.
    cfg.DATASETS.TRAIN_SHARE = 0.2
    assert ids(training_records(cfg)) < trained


def ap_of_all_found(cfg, dataset):
    """AP by the trainer's evaluator, of one right box on each image and nothing else."""
    records = DatasetCatalog.get(dataset)
    evaluator = DetectionTrainer.build_evaluator(cfg, dataset)
    evaluator.reset()
    evaluator._predictions = [
        {
            "image_id": record["image_id"],
            "instances": [
                {
                    "image_id": record["image_id"],
                    "category_id": record["annotations"][0]["category_id"],
                    "bbox": [20, 10, 30, 30],
                    "score": 0.9,
                }
            ],
        }
        for record in records
    ]
    return evaluator.evaluate()["bbox"]["AP"]


def test_only_held_out_images_are_evaluated(cfg):
    """Right on all of them, and wrong nowhere: AP would be lower if others counted."""
    DetectionTrainer.check(cfg)
    assert ap_of_all_found(cfg, NAMES[1]) == pytest.approx(100)
    held_out = ids(DatasetCatalog.get(NAMES[1]))
    truth = truth_of(cfg, NAMES[1])
    assert set(truth.imgs) == held_out and len(truth.anns) == 3
    # Another config holds other images out under the same name.
    cfg.DATASETS.HELD_OUT = 5
    DetectionTrainer.check(cfg)
    assert len(DetectionTrainer.build_evaluator(cfg, NAMES[1])._coco_api.imgs) == 5


def test_held_out_annotations_are_those_of_the_file(cfg):
    """Ids may be text, and sizes go by the area that the file says."""
    path = Path(MetadataCatalog.get(NAMES[0]).json_file)
    content = json.loads(path.read_text())
    for category in content["categories"]:
        category["id"] = f"no. {category['id']}"
    for entry in content["annotations"]:
        entry.update(category_id=f"no. {entry['category_id']}", area=123.0)
    path.write_text(json.dumps(content))
    DetectionTrainer.check(cfg)
    assert ap_of_all_found(cfg, NAMES[1]) == pytest.approx(100)
    truth = DetectionTrainer.build_evaluator(cfg, NAMES[1])._coco_api
    assert len(truth.anns) == 3 and {entry["area"] for entry in truth.anns.values()} == {123.0}


def test_images_without_annotations_are_left_out_of_training_only(cfg):
    DetectionTrainer.check(cfg)
    held_out = ids(DatasetCatalog.get(NAMES[1]))
    every = DatasetCatalog.get(NAMES[0])
    empty = min(ids(every) - held_out)
    for record in every:
        if record["image_id"] == empty:
            record["annotations"] = []
    DatasetCatalog.remove(NAMES[0])
    DatasetCatalog.register(NAMES[0], lambda: every)
    assert ids(training_records(cfg)) == ids(every) - held_out - {empty}
    assert ids(DatasetCatalog.get(NAMES[1])) == held_out


def test_entries_of_one_file_stay_on_one_side(cfg):
    every = DatasetCatalog.get(NAMES[0])
    twice = [{**record, "image_id": 100 * n + i} for i, record in enumerate(every) for n in (1, 2)]
    DatasetCatalog.remove(NAMES[0])
    DatasetCatalog.register(NAMES[0], lambda: twice)
    DetectionTrainer.check(cfg)
    held_out, trained = DatasetCatalog.get(NAMES[1]), training_records(cfg)
    assert len(held_out) == 6 and len(trained) == 10
    assert not {r["file_name"] for r in held_out} & {r["file_name"] for r in trained}


def test_nothing_to_train_on(cfg):
    cfg.DATASETS.TRAIN = cfg.DATASETS.TEST = ()
    with pytest.raises(ValueError, match="DATASETS.TRAIN is empty. Set registered"):
        DetectionTrainer(cfg)


def test_settings_of_held_out_images_that_cannot_be_are_refused(cfg):
    cfg.DATASETS.HELD_OUT = 8
    DetectionTrainer.check(cfg)
    with pytest.raises(ValueError, match="DATASETS.HELD_OUT is 8, but the training set has 8"):
        training_records(cfg)
    cfg.DATASETS.HELD_OUT, cfg.DATALOADER.SAMPLER_TRAIN = 3, "WeightedTrainingSampler"
    with pytest.raises(ValueError, match="WeightedTrainingSampler weighs the images of whole"):
        training_records(cfg)
    cfg.DATASETS.HELD_OUT = 0
    with pytest.raises(ValueError, match="pets_heldout is empty. Set DATASETS.HELD_OUT"):
        DetectionTrainer.check(cfg)
    cfg.DATASETS.HELD_OUT, cfg.DATASETS.TRAIN = 2, (NAMES[0], "other")
    with pytest.raises(ValueError, match="one training set, but DATASETS.TRAIN is .*other"):
        DetectionTrainer.check(cfg)
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = (), ()
    DetectionTrainer.check(cfg)  # nothing is trained
    cfg.DATASETS.TRAIN = ("squares_train",)
    DatasetCatalog.register("squares_heldout", list)
    try:
        with pytest.raises(ValueError, match="squares_heldout is registered already"):
            DetectionTrainer.check(cfg)
    finally:
        DatasetCatalog.remove("squares_heldout")


def test_evaluation_needs_no_more_than_training_does(cfg):
    """Files of other tools say neither crowds nor areas, and number objects from 0."""
    path = Path(MetadataCatalog.get(NAMES[0]).json_file)
    content = json.loads(path.read_text())
    for entry in content["annotations"]:
        del entry["area"], entry["iscrowd"]
        entry["id"] -= 1
    path.write_text(json.dumps(content))
    assert ap_of_all_found(cfg, NAMES[0]) == pytest.approx(100)


def test_a_part_of_a_dataset_without_category_ids(cfg):
    DetectionTrainer.check(cfg)
    records = DatasetCatalog.get(NAMES[0])
    for catalog in (DatasetCatalog, MetadataCatalog):
        catalog.remove(NAMES[0])
    DatasetCatalog.register(NAMES[0], lambda: records)
    MetadataCatalog.get(NAMES[0]).set(thing_classes=["cat", "dog"])
    assert ap_of_all_found(cfg, NAMES[1]) == pytest.approx(100)
