"""Registers COCO-format datasets by their files, and checks the datasets that a config names."""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, Metadata, MetadataCatalog
from detectron2.structures import BoxMode

from repr_det.detection import keypoints
from repr_det.detection.annotations import (
    BOXES,
    KEYPOINTS,
    MASKS,
    as_rle,
    category_names,
    read_coco,
)
from repr_det.engine.class_names import check_names, difference, recorded_names
from repr_det.engine.data import datasets_root
from repr_det.errors import UserError, shown

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


def uses_of(cfg: CfgNode) -> tuple[str, ...]:
    """What a config's model needs of annotations; see :class:`annotations.CocoFile`."""
    masks, points = cfg.MODEL.MASK_ON, cfg.MODEL.KEYPOINT_ON
    return (BOXES, *([MASKS] if masks else []), *([KEYPOINTS] if points else []))


def records_of(content: dict[str, Any], folder: str) -> list[dict[str, Any]]:
    """The content of a checked file in Detectron2's format, by ascending image id.

    As :func:`detectron2.data.datasets.load_coco_json`, but an object without a sound mask keeps
    its box.

    Args:
        content: of a :class:`repr_det.detection.annotations.CocoFile`.
        folder: of the images.

    Raises:
        UserError: a file name that is a URL or a path of another system.
    """
    classes = {number: i for i, number in enumerate(sorted(c["id"] for c in content["categories"]))}
    objects: dict[Any, list[dict[str, Any]]] = {image["id"]: [] for image in content["images"]}
    sizes = {image["id"]: (image["height"], image["width"]) for image in content["images"]}
    for entry in content["annotations"]:
        known = {key: entry[key] for key in ("iscrowd", "bbox")}
        known |= {"category_id": classes[entry["category_id"]], "bbox_mode": BoxMode.XYWH_ABS}
        if "segmentation" in entry:
            mask = entry["segmentation"]
            is_rle = type(mask) is dict
            known["segmentation"] = as_rle(mask, *sizes[entry["image_id"]]) if is_rle else mask
        if "keypoints" in entry:
            # From the index of a pixel to the coordinate of its middle, as in Detectron2.
            known["keypoints"] = [
                value if i % 3 == 2 else value + 0.5 for i, value in enumerate(entry["keypoints"])
            ]
        objects[entry["image_id"]].append(known)
    check_file_names(content, folder)
    return [
        {
            "file_name": os.path.join(folder, image["file_name"]),
            "height": image["height"],
            "width": image["width"],
            "image_id": image["id"],
            "annotations": objects[image["id"]],
        }
        for image in sorted(content["images"], key=lambda image: image["id"])
    ]


def check_file_names(content: dict[str, Any], folder: str) -> None:
    """Refuse file names that cannot be found because they are URLs or paths of Windows.

    Args:
        content: of COCO's JSON.
        folder: of the images.

    Raises:
        UserError: such a name.
    """
    for image in content["images"]:
        name = image["file_name"]
        if ("\\" in name or "://" in name) and not os.path.exists(os.path.join(folder, name)):
            advice = (
                "Download the images, and set the file's path below the image folder"
                if "://" in name
                else "Set the path with slashes"
            )
            raise UserError(
                f"Image {shown(image['id'])} has the file_name {shown(name)}, which is not in "
                f"{folder}. {advice}."
            )


def check_images(name: str, paths: Sequence[str]) -> None:
    """Refuse images that do not exist.

    Args:
        name: of their dataset.
        paths: of the images.

    Raises:
        UserError: how many, and which is the first.
    """
    # A folder that is listed once is faster than a question for each file, above all on a network.
    listed: dict[str, set[str]] = {}
    missing = []
    for path in paths:
        folder, file = os.path.split(path)
        if folder not in listed:
            listed[folder] = set(os.listdir(folder)) if os.path.isdir(folder) else set()
        # Some file systems find a name that is written otherwise.
        if file not in listed[folder] and not os.path.isfile(path):
            missing.append(path)
    if missing:
        raise UserError(
            f"Dataset {name}: {len(missing)} of {len(paths)} images do not exist, for example "
            f"{missing[0]}. Set the folder that the file names are relative to, or take them out "
            f"of the annotations."
        )


def check_test_images(cfg: CfgNode) -> None:
    """Refuse test sets with images that do not exist; reads them.

    Raises:
        UserError: see :func:`check_images`.
    """
    for name in cfg.DATASETS.TEST:
        check_images(name, [record["file_name"] for record in DatasetCatalog.get(name)])


def register_coco(name: str, annotations: str, images: str, uses: Collection[str]) -> None:
    """Register a COCO-format dataset that is checked whenever it is read.

    Args:
        name: to register it under; what was registered under it is replaced.
        annotations: path of its JSON.
        images: its image folder.
        uses: what it is for; see :meth:`repr_det.detection.annotations.CocoFile.require`.
    """

    def load() -> list[dict[str, Any]]:
        return records_of(_read(name, annotations, uses), images)

    if name in DatasetCatalog:
        DatasetCatalog.pop(name)
    DatasetCatalog.register(name, load)
    MetadataCatalog.get(name).set(json_file=annotations, image_root=images, evaluator_type="coco")


def _read(name: str, annotations: str, uses: Collection[str]) -> dict[str, Any]:
    """The content of a dataset's file, whose classes and keypoints the metadata then have."""
    file = read_coco(annotations)
    file.require(uses)
    metadata, names = MetadataCatalog.get(name), category_names(file.content)
    if list(metadata.get("thing_classes", names)) != names:
        raise UserError(
            f"{annotations} has other classes than dataset {name}, or in another order. Set the "
            f"file of that dataset, or another name."
        )
    ids = sorted(category["id"] for category in file.content["categories"])
    metadata.set(
        thing_classes=metadata.get("thing_classes", names),
        thing_dataset_id_to_contiguous_id={number: i for i, number in enumerate(ids)},
    )
    if KEYPOINTS in uses:
        keypoints.set_metadata(metadata, annotations, file.content)
    return file.content


def _has_coco_reader(name: str) -> bool:
    """Whether :func:`register_coco` or Detectron2 reads a dataset, and not a user's own code."""
    of_loader = DatasetCatalog[name].__module__
    return of_loader in (__name__, "detectron2.data.datasets.coco")


def check_annotations(cfg: CfgNode, datasets: Sequence[str]) -> None:
    """Read annotation files and refuse those that the config's model cannot use.

    Args:
        cfg: of the model.
        datasets: names. Those without a known COCO file are left out.

    Raises:
        UserError: see :func:`repr_det.detection.annotations.check`.
    """
    for name in dict.fromkeys(datasets):
        metadata = MetadataCatalog.get(name)
        if metadata.get("json_file") and is_coco(metadata):
            content = _read(name, metadata.json_file, uses_of(cfg))
            check_file_names(content, metadata.get("image_root", ""))


def is_coco(metadata: Metadata) -> bool:
    """Whether a dataset has a COCO-format file of its own: not drawn, held out or of LVIS."""
    own = not metadata.get("drawn_on_first_use") and not metadata.get("held_out_of")
    return own and metadata.get("evaluator_type") == "coco"


def use_coco_data(cfg: CfgNode, split: str, name: str, annotations: str, images: str) -> None:
    """Register a COCO-format dataset and make the config train or test on it, in place.

    Args:
        cfg: the config.
        split: ``"TRAIN"`` or ``"TEST"``.
        name: to register it under.
        annotations: path of its JSON.
        images: its image folder.

    Raises:
        UserError: files that do not exist, are not COCO's or contradict themselves; a name in use.
    """
    known = MetadataCatalog.get(name)
    files = known.get("json_file"), known.get("image_root")
    if name in DatasetCatalog and files != (annotations, images):
        raise UserError(f"A dataset called {name} is registered already. Set another name.")
    if not Path(images).is_dir():
        raise UserError(f"Image folder {images} does not exist. Set the folder of {name}.")
    try:
        content = _read(name, annotations, uses_of(cfg))
        check_file_names(content, images)
    except UserError:
        if name not in DatasetCatalog:
            MetadataCatalog.remove(name)
        raise
    register_coco(name, annotations, images, uses_of(cfg))
    cfg.DATASETS[split] = (name,)


def check_same_classes(train: str, test: str) -> None:
    """Refuse two datasets that were read where their classes differ.

    Raises:
        UserError: names or their order by id differ.
    """
    names = [list(MetadataCatalog.get(name).thing_classes) for name in (train, test)]
    if names[0] != names[1]:
        raise UserError(
            f"Dataset {test} has other classes than {train}, or in another order "
            f"({difference(names[0], names[1])}). Set annotations with the same ones."
        )


def take_num_classes(cfg: CfgNode, name: str, overrides: Sequence[str]) -> None:
    """Set the model's numbers of classes and keypoints to those of a dataset that was read.

    Args:
        cfg: changed in place.
        name: of the dataset.
        overrides: keys and values of the command line, which win.
    """
    metadata = MetadataCatalog.get(name)
    if num_classes_key(cfg) not in overrides:
        cfg.merge_from_list([num_classes_key(cfg), len(metadata.thing_classes)])
    if cfg.MODEL.KEYPOINT_ON:
        keypoints.take_number(cfg, metadata, overrides)


def check_metrics(name: str) -> None:
    """Refuse to evaluate a dataset that COCO's metrics of boxes and masks do not fit.

    Raises:
        UserError: it is of LVIS, whose classes count from 1, which COCO's evaluation does not
            expect; or it is labelled for semantic segmentation.
    """
    kind = MetadataCatalog.get(name).get("evaluator_type") or ""
    if kind == "lvis":
        raise UserError(
            f"Dataset {name} is evaluated by LVIS's metrics, which are not here. For COCO's, set "
            f"its files with --test-data NAME JSON IMAGES."
        )
    if kind.endswith("sem_seg"):
        raise UserError(
            f"Dataset {name} is evaluated by metrics of semantic segmentation, which are not here. "
            f"Set DATASETS.TEST () to train without evaluation."
        )


def check_dataset(name: str, uses: Collection[str] = (BOXES,)) -> None:
    """Refuse a dataset that is not there.

    From then on, :func:`register_coco` reads a COCO file that Detectron2 would have read.

    Args:
        name: of the dataset.
        uses: what it is for.

    Raises:
        UserError: a name that is not registered, or annotations or images that do not exist.
    """
    if name not in DatasetCatalog.list():
        raise UserError(
            f"Dataset {name} is not registered. Register it, or set its files with --train-data or "
            f"--test-data NAME JSON IMAGES."
        )
    metadata = MetadataCatalog.get(name)
    if metadata.get("drawn_on_first_use"):
        return
    if metadata.get("held_out_of"):  # a part of another one
        return check_dataset(metadata.held_out_of, uses)
    for kind in ("json_file", "image_root"):
        path = metadata.get(kind)
        if path is not None and not Path(path).exists():
            raise UserError(
                f"Dataset {name} needs {Path(path).resolve()}, which does not exist. "
                f"{_where_to_put(path)}"
            )
    if is_coco(metadata) and _has_coco_reader(name):
        register_coco(name, metadata.json_file, metadata.image_root, uses)


def _where_to_put(path: str) -> str:
    """What to do about a file of a registered dataset that does not exist."""
    try:
        folder = Path(path).relative_to(datasets_root()).parts[0]  # "coco" for COCO's
    except ValueError:
        return "Correct the path that the dataset is registered with."
    return (
        f"Set DETECTRON2_DATASETS to the folder that holds {folder}/. `repr-det demo` needs no "
        f"data."
    )


def check_classes(cfg: CfgNode, datasets: Sequence[str]) -> None:
    """Refuse datasets of other classes than the model's, or than each other's; reads them.

    Raises:
        UserError: their number differs, or their names.
    """
    check_all_same_classes(datasets)
    count = num_classes(cfg)
    for name in datasets:
        classes = _classes_of(name)
        if classes is not None and len(classes) != count:
            raise UserError(
                f"{num_classes_key(cfg)} is {count}, but dataset {name} has {len(classes)} "
                f"classes. Set it to {len(classes)}, or another dataset."
            )


def check_all_same_classes(datasets: Sequence[str]) -> None:
    """Refuse datasets whose classes differ from each other's; reads them where there are several.

    Raises:
        UserError: names or their order by id differ.
    """
    if len(datasets) > 1:
        known = [name for name in datasets if _classes_of(name) is not None]
        for name in known[1:]:
            check_same_classes(known[0], name)


def _classes_of(name: str) -> Sequence[str] | None:
    """The classes of a dataset, which is read if need be; None where nothing tells them."""
    metadata = MetadataCatalog.get(name)
    if metadata.get("thing_classes") is None:
        DatasetCatalog.get(name)  # only then does the catalog know the classes of a file
    return metadata.get("thing_classes")


def check_trained_classes(weights: str, datasets: Sequence[str]) -> None:
    """Refuse datasets that were read and have other classes than a checkpoint was trained on.

    Args:
        weights: path of the checkpoint.
        datasets: names.

    Raises:
        UserError: names or their order differ.
    """
    recorded = recorded_names(weights)
    for name in datasets:
        check_names(recorded, MetadataCatalog.get(name).get("thing_classes"), f"Dataset {name}")


def check_training_objects(cfg: CfgNode, records: Sequence[dict[str, Any]]) -> None:
    """Refuse objects that cannot train a model with masks or keypoints.

    Args:
        cfg: the model's config.
        records: in Detectron2's format, from any reader.

    Raises:
        UserError: an object without a mask, or with RLE where ``INPUT.MASK_FORMAT`` is
            polygon, or another number of keypoints than the model's.
    """
    if cfg.MODEL.KEYPOINT_ON:
        for name in (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST):
            keypoints.check_number(cfg, name, MetadataCatalog.get(name))
    if not cfg.MODEL.MASK_ON:
        return
    for record in records:
        for entry in record["annotations"]:
            if entry.get("iscrowd"):
                continue
            whose = f"An object of {record['file_name']} has"
            if "segmentation" not in entry:
                raise UserError(f"{whose} no mask. Set a segmentation, or MODEL.MASK_ON False.")
            if isinstance(entry["segmentation"], dict) and cfg.INPUT.MASK_FORMAT == "polygon":
                raise UserError(
                    f"{whose} a mask in RLE. Set INPUT.MASK_FORMAT bitmask, or polygons."
                )
