"""Datasets of detection: any COCO-format one by its files, and checks of those a config names."""

from __future__ import annotations

import argparse
import json
import logging
import math
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.data.detection_utils import SizeMismatchError
from PIL import Image

from repr_det.engine.data import check_depth, datasets_root
from repr_det.errors import UserError

logger = logging.getLogger(f"detectron2.{__name__}")

NUM_CLASSES_KEYS = {"RetinaNet": "MODEL.RETINANET.NUM_CLASSES"}
"""Where an architecture reads its number of classes, if not from MODEL.ROI_HEADS.NUM_CLASSES."""


def num_classes_key(cfg: CfgNode) -> str:
    """The config key from which the model reads its number of classes."""
    return NUM_CLASSES_KEYS.get(cfg.MODEL.META_ARCHITECTURE, "MODEL.ROI_HEADS.NUM_CLASSES")


def num_classes(cfg: CfgNode) -> int:
    """The model's number of classes."""
    node: Any = cfg
    for part in num_classes_key(cfg).split("."):
        node = node[part]
    return node


def read_coco(annotations: str) -> dict[str, Any]:
    """The content of a COCO annotation file.

    Raises:
        UserError: no such file, or it cannot be read, or is not COCO's JSON.
    """
    try:
        content = json.loads(Path(annotations).read_text())
        for part, keys in (
            ("images", ("id", "file_name", "width", "height")),
            ("annotations", ("id", "image_id", "category_id", "bbox")),
            ("categories", ("id", "name")),
        ):
            for entry in content[part]:
                for key in keys:
                    entry[key]
                if part == "annotations" and len(entry["bbox"]) != 4:
                    raise TypeError(f"annotation {entry['id']} has a box of other than 4 numbers")
        return content
    except FileNotFoundError:
        raise UserError(
            f"Annotation file {annotations} does not exist: give the path of a COCO-format JSON."
        ) from None
    except OSError as error:
        raise UserError(
            f"Annotation file {annotations} cannot be read ({error.strerror}): give the path of a "
            "COCO-format JSON."
        ) from None
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise UserError(
            f"{annotations} is not a COCO annotation file ({type(error).__name__}: {error}): it "
            f"needs images, annotations and categories."
        ) from error


def category_names(content: dict[str, Any]) -> list[str]:
    """Names of the categories of COCO's JSON, by ascending id."""
    return [c["name"] for c in sorted(content["categories"], key=lambda c: c["id"])]


def check_annotations(annotations: str, content: dict[str, Any]) -> None:
    """Refuse annotations that cannot be trained or evaluated on; warn of boxes without area.

    Args:
        annotations: path of the file, to be named.
        content: of the file.

    Raises:
        UserError: no images, no annotations, ids that point nowhere or are not unique, images
            without a size, boxes that are no numbers, objects to ignore.
    """
    images = {image["id"]: image for image in content["images"]}
    categories = {category["id"] for category in content["categories"]}
    if not images or not content["annotations"]:
        what = "annotations" if images else "images"
        raise UserError(f"{annotations} holds no {what}: give a file that does.")
    for part in ("images", "annotations", "categories"):
        numbers = Counter(entry["id"] for entry in content[part])
        if numbers.total() > len(numbers):
            number, times = numbers.most_common(1)[0]
            raise UserError(
                f"{annotations}: {times} {part} have the id {number}: number them anew."
            )
    for image in content["images"]:
        sides = (image["width"], image["height"])
        if not all(isinstance(side, (int, float)) and side > 0 for side in sides):
            raise UserError(
                f"{annotations}: image {image['id']} has the width and height {sides}: give them "
                f"in pixels."
            )
    useless = []
    for entry in content["annotations"]:
        for key, known in (("image_id", images), ("category_id", categories)):
            if entry[key] not in known:
                raise UserError(
                    f"{annotations}: annotation {entry['id']} has {key} {entry[key]}, which the "
                    f"file does not define: correct or remove it."
                )
        if not all(isinstance(v, (int, float)) and math.isfinite(v) for v in entry["bbox"]):
            raise UserError(
                f"{annotations}: the box of annotation {entry['id']} is {entry['bbox']}: give four "
                f"numbers."
            )
        if entry.get("ignore"):
            raise UserError(
                f"{annotations}: annotation {entry['id']} has the key ignore, which COCO's format "
                f"does not know: give it iscrowd 1, or remove it."
            )
        image = images[entry["image_id"]]
        x, y, width, height = entry["bbox"]
        right, bottom = min(x + width, image["width"]), min(y + height, image["height"])
        if right <= max(x, 0) or bottom <= max(y, 0):
            useless.append(entry["id"])
    if useless:
        logger.warning(
            f"{annotations}: {len(useless)} boxes have no area inside their image, for example "
            f"annotation {useless[0]}: training leaves them out, evaluation counts them as missed."
        )
    empty = len(images) - len({entry["image_id"] for entry in content["annotations"]})
    if empty:
        logger.warning(
            f"{annotations}: {empty} of {len(images)} images have no annotations; training leaves "
            f"them out unless DATALOADER.FILTER_EMPTY_ANNOTATIONS is False."
        )


def is_mask(segmentation: Any) -> bool:
    """Whether it is a mask as COCO writes them: RLE, or polygons of three points or more."""
    if isinstance(segmentation, list):
        return bool(segmentation) and all(len(polygon) >= 6 for polygon in segmentation)
    return isinstance(segmentation, dict)


def check_training_masks(cfg: CfgNode, records: Sequence[dict[str, Any]]) -> None:
    """Refuse objects that cannot train a model with masks.

    Args:
        cfg: the model's config.
        records: in Detectron2's format.

    Raises:
        UserError: an object without a mask, or with RLE where polygons are asked for.
    """
    for record in records:
        for entry in record["annotations"]:
            if entry.get("iscrowd"):
                continue
            whose = f"An object of {record['file_name']} has"
            if "segmentation" not in entry:
                raise UserError(
                    f"{whose} no mask: give it a segmentation, or set MODEL.MASK_ON False."
                )
            if isinstance(entry["segmentation"], dict) and cfg.INPUT.MASK_FORMAT == "polygon":
                raise UserError(
                    f"{whose} a mask in RLE: set INPUT.MASK_FORMAT bitmask, or give polygons."
                )


def check_test_masks(datasets: Sequence[str]) -> None:
    """Refuse annotation files on which masks cannot be evaluated.

    Raises:
        UserError: an object without a mask.
    """
    for name in datasets:
        metadata = MetadataCatalog.get(name)
        path = None if metadata.get("drawn_on_first_use") else metadata.get("json_file")
        for entry in read_coco(path)["annotations"] if path else ():
            if not is_mask(entry.get("segmentation")):
                raise UserError(
                    f"{path}: annotation {entry['id']} has no mask to evaluate masks on: give it a "
                    f"segmentation, or set MODEL.MASK_ON False."
                )


class NamedImages:
    """A dataset mapper that says which image could not be read.

    Args:
        mapper: Detectron2's.
        skip: return None for such an image, for which the loader takes another, and count it.

    Raises:
        UserError: when called with an image of more than 8 bits a channel, or with one that cannot
            be read, unless they are skipped.
    """

    def __init__(self, mapper: Callable[[dict], dict], *, skip: bool) -> None:
        self._mapper, self._skip, self._skipped = mapper, skip, 0

    def __call__(self, record: dict[str, Any]) -> dict[str, Any] | None:
        """Map a record of the dataset to a training example."""
        try:
            with Image.open(record["file_name"]) as image:
                check_depth(image, record["file_name"])
            return self._mapper(record)
        except (OSError, SyntaxError, SizeMismatchError, Image.DecompressionBombError) as error:
            reason = str(error).splitlines()[0]
            if not self._skip:
                raise UserError(
                    f"Image {record['file_name']} cannot be read ({reason}): replace it, take it "
                    f"out of the annotations, or, in training, set INPUT.SKIP_BAD_IMAGES True."
                ) from error
            self._skipped += 1
            logger.warning(
                f"Image {record['file_name']} cannot be read ({reason}) and is skipped, "
                f"{self._skipped} so far in this process."
            )
            return None


def add_coco_argument(parser: argparse._ActionsContainer, split: str) -> None:
    """Add ``--train-data`` or ``--test-data``, the arguments of :func:`use_coco_data`."""
    parser.add_argument(
        f"--{split}-data",
        nargs=3,
        metavar=("NAME", "JSON", "IMAGES"),
        help=f"a COCO-format dataset to {split} on: a name, annotation file and image folder",
    )


def use_coco_data(cfg: CfgNode, split: str, name: str, annotations: str, images: str) -> None:
    """Register a COCO-format dataset and make the config train or test on it, in place.

    Args:
        cfg: the config.
        split: ``"TRAIN"`` or ``"TEST"``.
        name: to register it under.
        annotations: path of its JSON.
        images: its image folder.

    Raises:
        UserError: files that do not exist, are not COCO's or contradict
            themselves; a name in use.
    """
    check_annotations(annotations, read_coco(annotations))
    if not Path(images).is_dir():
        raise UserError(f"Image folder {images} does not exist: give the folder of {name}.")
    known = MetadataCatalog.get(name)
    if name not in DatasetCatalog.list():
        register_coco_instances(name, {}, annotations, images)
    elif known.get("json_file") != annotations or known.get("image_root") != images:
        raise UserError(f"A dataset called {name} is registered already: give it another name.")
    cfg.DATASETS[split] = (name,)


def check_same_categories(train: str, test: str) -> None:
    """Refuse two annotation files of different categories: labels would not mean the same.

    Raises:
        UserError: names or their order by id differ.
    """
    names = [category_names(read_coco(path)) for path in (train, test)]
    if names[0] != names[1]:
        raise UserError(
            f"{test} has other categories than {train} ({len(names[1])} and {len(names[0])}, or "
            f"other names): give both the same categories."
        )


def take_num_classes(cfg: CfgNode, annotations: str, overrides: Sequence[str]) -> None:
    """Set the number of classes to that of an annotation file, unless an override gives it."""
    key = num_classes_key(cfg)
    if key not in overrides:
        cfg.merge_from_list([key, len(category_names(read_coco(annotations)))])


def check_datasets(cfg: CfgNode) -> None:
    """Refuse a config whose datasets are not there; see :func:`check_dataset`."""
    for name in (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST):
        check_dataset(name)


def check_dataset(name: str) -> None:
    """Refuse a dataset that is not there.

    Raises:
        UserError: a name that nobody registered, or annotations or images that do not exist.
    """
    if name not in DatasetCatalog.list():
        raise UserError(
            f"Dataset {name} is not registered: register it, or give its files with --train-data "
            f"or --test-data NAME JSON IMAGES."
        )
    metadata = MetadataCatalog.get(name)
    if metadata.get("drawn_on_first_use"):
        return
    for kind in ("json_file", "image_root"):
        path = metadata.get(kind)
        if path is not None and not Path(path).exists():
            raise UserError(
                f"Dataset {name} needs {Path(path).resolve()}, which does not exist: set "
                f"DETECTRON2_DATASETS to the folder that holds {_folder_of(path)} (make demo needs "
                f"no data)."
            )


def _folder_of(path: str) -> str:
    """Which folder of the datasets' root a file of a dataset is in: ``coco/`` for COCO's."""
    try:
        return f"{Path(path).relative_to(datasets_root()).parts[0]}/"
    except ValueError:
        return "it"


def check_classes(cfg: CfgNode, datasets: Sequence[str]) -> None:
    """Refuse datasets of other classes than the model's, or than each other's; reads them.

    Raises:
        UserError: their number differs, or their names.
    """
    count = num_classes(cfg)
    first: tuple[str, Sequence[str]] | None = None
    for name in datasets:
        metadata = MetadataCatalog.get(name)
        if metadata.get("thing_classes") is None:
            DatasetCatalog.get(name)  # only then does the catalog know the classes of a file
        classes: Sequence[str] | None = metadata.get("thing_classes")
        if classes is None:
            continue
        if count != len(classes):
            raise UserError(
                f"{num_classes_key(cfg)} is {count}, but dataset {name} has {len(classes)} "
                f"classes: set it to {len(classes)}, or give another dataset."
            )
        first = first or (name, classes)
        if list(classes) != list(first[1]):
            raise UserError(
                f"Dataset {name} has other classes than {first[0]}, or in another order: give both "
                f"the same ones."
            )
