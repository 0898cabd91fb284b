"""The images that a config trains on, and those that it holds out."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog, get_detection_dataset_dicts

from repr_det.detection.datasets import check_all_same_classes
from repr_det.engine.data import check_held_out_name, held_out_name, part_indices
from repr_det.errors import UserError

_OF_CLASSES = ("thing_classes", "thing_dataset_id_to_contiguous_id")


def training_records(cfg: CfgNode) -> list[dict[str, Any]]:
    """What a config trains on, in Detectron2's format.

    Raises:
        UserError: ``DATASETS.HELD_OUT`` or ``TRAIN_SHARE`` out of range, nothing to train on,
            training sets of different classes, or a sampler that needs whole datasets.
    """
    if not cfg.DATASETS.TRAIN:
        raise UserError(
            "DATASETS.TRAIN is empty. Set registered datasets, or images with --train-data."
        )
    check_all_same_classes(cfg.DATASETS.TRAIN)
    try:
        records = get_detection_dataset_dicts(
            cfg.DATASETS.TRAIN,
            filter_empty=cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS,
            min_keypoints=_least_keypoints(cfg),
            proposal_files=cfg.DATASETS.PROPOSAL_FILES_TRAIN if cfg.MODEL.LOAD_PROPOSALS else None,
        )
    except AssertionError as error:
        if reason := _why_nothing(cfg):
            raise UserError(reason) from error
        raise
    held_out, share = cfg.DATASETS.HELD_OUT, cfg.DATASETS.TRAIN_SHARE
    if not held_out and share == 1:
        return records
    if (sampler := cfg.DATALOADER.SAMPLER_TRAIN).startswith("Weighted"):
        raise UserError(
            f"{sampler} weighs the images of whole datasets. With DATASETS.HELD_OUT or "
            "TRAIN_SHARE, set DATALOADER.SAMPLER_TRAIN to TrainingSampler."
        )
    # Positions count the images without annotations, too: those to be held out must not depend on
    # what training leaves out.
    files = _files(record for name in cfg.DATASETS.TRAIN for record in DatasetCatalog.get(name))
    chosen = {files[position] for position in part_indices(len(files), held_out, share)[0]}
    records = [record for record in records if record["file_name"] in chosen]
    if not records:
        raise UserError(
            f"DATASETS.TRAIN_SHARE {share} leaves no image with annotations. Set a larger share."
        )
    return records


def _least_keypoints(cfg: CfgNode) -> int:
    """How many labelled keypoints an image must have to be trained on."""
    least = cfg.MODEL.ROI_KEYPOINT_HEAD.MIN_KEYPOINTS_PER_IMAGE
    return least if cfg.MODEL.KEYPOINT_ON else 0


def _why_nothing(cfg: CfgNode) -> str | None:
    """Why no image is left to train on; None where some are."""
    for name in cfg.DATASETS.TRAIN:
        if not len(DatasetCatalog.get(name)):
            return f"Dataset {name} is empty. Set another dataset."
    records = [record for name in cfg.DATASETS.TRAIN for record in DatasetCatalog.get(name)]
    objects = [record.get("annotations", ()) for record in records]
    single = [[o for o in found if not o.get("iscrowd")] for found in objects]
    if cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS and not any(single):
        return (
            f"None of the {len(objects)} images in DATASETS.TRAIN has an object: {len(objects)} "
            f"have nothing but crowds or no annotations. Set iscrowd 0 for single objects."
        )
    least = _least_keypoints(cfg)
    labelled = [sum(v > 0 for o in found for v in o.get("keypoints", ())[2::3]) for found in single]
    if least and max(labelled) < least:
        return (
            f"None of the {len(objects)} images in DATASETS.TRAIN has {least} labelled keypoints; "
            f"the most are {max(labelled)}. Set "
            f"MODEL.ROI_KEYPOINT_HEAD.MIN_KEYPOINTS_PER_IMAGE lower."
        )
    return None


def register_held_out(cfg: CfgNode) -> None:
    """Register the held-out part of the training set, if the config asks for one.

    Its name is :func:`repr_det.engine.data.held_out_name`'s. What another config registered
    under it is replaced.

    Raises:
        UserError: more than one training set, a name in use, or a test set that is held out from
            nothing.
    """
    count = cfg.DATASETS.HELD_OUT
    if not count:
        for name in map(held_out_name, cfg.DATASETS.TRAIN):
            used = name in cfg.DATASETS.TEST
            check_held_out_name(name, count, is_users=_is_foreign(name), is_used=used)
        return
    if not cfg.DATASETS.TRAIN:
        return
    if len(cfg.DATASETS.TRAIN) != 1:
        raise UserError(
            f"DATASETS.HELD_OUT takes images out of one training set, but DATASETS.TRAIN is "
            f"{tuple(cfg.DATASETS.TRAIN)}. Set one, or DATASETS.HELD_OUT 0."
        )
    train = cfg.DATASETS.TRAIN[0]
    name = held_out_name(train)
    check_held_out_name(name, count, is_users=_is_foreign(name), is_used=True)
    if name in DatasetCatalog.list():
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)

    def load() -> list[dict[str, Any]]:
        records = DatasetCatalog.get(train)
        of_train = MetadataCatalog.get(train)
        # Without a file, Detectron2 converts the records. Those of LVIS count classes differently.
        file = ("json_file",) if of_train.get("evaluator_type") == "coco" else ()
        shared = {key: of_train.get(key) for key in (*_OF_CLASSES, *file)}
        MetadataCatalog.get(name).set(**{k: v for k, v in shared.items() if v is not None})
        files = _files(records)
        held_out = {files[position] for position in part_indices(len(files), count)[1]}
        return [record for record in records if record["file_name"] in held_out]

    DatasetCatalog.register(name, load)
    MetadataCatalog.get(name).set(evaluator_type="coco", held_out_of=train)


def held_out_images(dataset: str) -> set[int] | None:
    """The ids of the images of a held-out part, which is read; None for any other dataset."""
    if not MetadataCatalog.get(dataset).get("held_out_of"):
        return None
    return {record["image_id"] for record in DatasetCatalog.get(dataset)}


def _files(records: Iterable[dict[str, Any]]) -> list[str]:
    """The image files of a dataset, each once: a dataset may list a file once for each object."""
    return list(dict.fromkeys(record["file_name"] for record in records))


def _is_foreign(name: str) -> bool:
    """Whether a dataset of a name is registered and is not a held-out part of ours."""
    return name in DatasetCatalog.list() and not MetadataCatalog.get(name).get("held_out_of")
