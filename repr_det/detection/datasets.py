"""Datasets of detection: any COCO-format one by its files, and checks of those a config names."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances

NUM_CLASSES_KEYS = {
    "RetinaNet": ("MODEL.RETINANET.NUM_CLASSES",),
    "FCOS": ("MODEL.RETINANET.NUM_CLASSES",),
}
"""Where an architecture reads its number of classes, if not from MODEL.ROI_HEADS.NUM_CLASSES."""


def num_classes_key(cfg: CfgNode) -> str:
    """The config key from which the model reads its number of classes."""
    keys = NUM_CLASSES_KEYS.get(cfg.MODEL.META_ARCHITECTURE, ("MODEL.ROI_HEADS.NUM_CLASSES",))
    return keys[0]


def read_categories(annotations: str) -> list[str]:
    """Names of the categories of a COCO annotation file, by ascending id.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not COCO's JSON.
    """
    try:
        content = json.loads(Path(annotations).read_text())
        categories = sorted(content["categories"], key=lambda c: c["id"])
        content["images"], content["annotations"]
        return [c["name"] for c in categories]
    except FileNotFoundError:
        raise FileNotFoundError(
            f"Annotation file {annotations} does not exist: give the path of a COCO-format JSON."
        ) from None
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise ValueError(
            f"{annotations} is not a COCO annotation file ({type(error).__name__}: {error}): it "
            f"needs images, annotations and categories."
        ) from error


def use_coco_data(cfg: CfgNode, split: str, name: str, annotations: str, images: str) -> None:
    """Register a COCO-format dataset and make the config train or test on it, in place.

    Args:
        cfg: the config.
        split: ``"TRAIN"`` or ``"TEST"``.
        name: to register it under.
        annotations: path of its JSON.
        images: its image folder.

    Raises:
        FileNotFoundError, ValueError: files that do not exist or are not COCO's; a name in use.
    """
    read_categories(annotations)
    if not Path(images).is_dir():
        raise FileNotFoundError(f"Image folder {images} does not exist: give the folder of {name}.")
    known = MetadataCatalog.get(name)
    if name not in DatasetCatalog.list():
        register_coco_instances(name, {}, annotations, images)
    elif known.get("json_file") != annotations or known.get("image_root") != images:
        raise ValueError(f"A dataset called {name} is registered already: give it another name.")
    cfg.DATASETS[split] = (name,)


def take_num_classes(cfg: CfgNode, annotations: str, overrides: Sequence[str]) -> None:
    """Set the number of classes to that of an annotation file, unless an override gives it."""
    key = num_classes_key(cfg)
    if key not in overrides:
        cfg.merge_from_list([key, len(read_categories(annotations))])


def check_datasets(cfg: CfgNode) -> None:
    """Refuse datasets that are not there.

    Raises:
        ValueError: a name that nobody registered.
        FileNotFoundError: annotations or images that do not exist.
    """
    for name in (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST):
        if name not in DatasetCatalog.list():
            raise ValueError(
                f"Dataset {name} is not registered: register it, or give --train-data and "
                f"--test-data NAME JSON IMAGES."
            )
        metadata = MetadataCatalog.get(name)
        if metadata.get("drawn_on_first_use"):
            continue
        for kind in ("json_file", "image_root"):
            path = metadata.get(kind)
            if path is not None and not Path(path).exists():
                raise FileNotFoundError(
                    f"Dataset {name} needs {Path(path).resolve()}, which does not exist: set "
                    f"DETECTRON2_DATASETS to the folder that holds coco/ (make demo needs no data)."
                )


def check_num_classes(cfg: CfgNode, dataset: str) -> None:
    """Refuse a model whose number of classes differs from the dataset's.

    Raises:
        ValueError: they differ.
    """
    classes: Sequence[str] | None = MetadataCatalog.get(dataset).get("thing_classes")
    key = num_classes_key(cfg)
    node: Any = cfg
    for part in key.split("."):
        node = node[part]
    if classes is not None and node != len(classes):
        raise ValueError(
            f"{key} is {node}, but dataset {dataset} has {len(classes)} classes: set it to "
            f"{len(classes)}."
        )
