"""COCO's metrics of any detector or results file on any COCO-format dataset."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation.coco_evaluation import instances_to_coco_json
from detectron2.structures import Instances
from numpy.typing import NDArray
from torch import nn
from tqdm import tqdm

from repr_det.detection.bootstrap import average_precision, class_mean
from repr_det.detection.builtin import register_builtin
from repr_det.detection.coco_results import (
    METRICS,
    Truth,
    check_iou_type,
    read_results,
    read_truth,
    results_path,
)
from repr_det.detection.datasets import (
    check_classes,
    check_dataset,
    check_metrics,
    check_test_images,
    check_trained_classes,
)
from repr_det.detection.matching import match
from repr_det.detection.parts import held_out_images, register_held_out
from repr_det.detection.trainer import DetectionTrainer
from repr_det.engine.data import held_out_name
from repr_det.engine.trained import load_trained
from repr_det.errors import UserError

Metrics = dict[str, float | None]
"""By :data:`METRICS`, as shares of 1; None where no object counts."""


@dataclass(frozen=True)
class Evaluation:
    """Metrics overall (mean over classes, as COCO's) and by class."""

    overall: Metrics
    classes: dict[str, Metrics]


class Detections(NamedTuple):
    """Detections, in COCO's format of results, and the dataset that they are on.

    Attributes:
        dataset: its name.
        truth: its annotations.
        source: results file or checkpoint that the detections are of.
        results: of :func:`repr_det.detection.coco_results.read_results`'s form.
    """

    dataset: str
    truth: Truth
    source: str
    results: list[dict[str, Any]]


def annotation_file(dataset: str) -> Path:
    """The COCO-format annotations of a registered dataset; draws the built-in one if need be.

    Raises:
        UserError: no such dataset, or its files do not exist or are not COCO's; a test set of LVIS.
    """
    register_builtin()
    check_dataset(dataset)
    check_metrics(dataset)
    metadata = MetadataCatalog.get(dataset)
    if metadata.get("drawn_on_first_use"):
        DatasetCatalog.get(dataset)
    if metadata.get("json_file") is None:
        raise UserError(
            f"Dataset {dataset} has no COCO-format annotation file. Write its annotations as one."
        )
    return Path(metadata.json_file)


def truth_of(cfg: CfgNode, dataset: str) -> Truth:
    """The annotations of a dataset that a config names, its held-out part included.

    Raises:
        UserError: see :func:`annotation_file`, :func:`register_held_out` and :func:`read_truth`.
    """
    train = None
    if dataset in map(held_out_name, cfg.DATASETS.TRAIN):
        register_held_out(cfg)
        # None for a user's own dataset of that name.
        train = MetadataCatalog.get(dataset).get("held_out_of")
    return read_truth(annotation_file(train or dataset), held_out_images(dataset))


def evaluate(
    truth: Truth,
    results: Sequence[dict[str, Any]],
    iou_type: str,
    *,
    label: str = "Evaluating",
    progress: bool = False,
) -> Evaluation:
    """COCO's metrics, at most 100 detections an image; see :mod:`repr_det.detection.matching`."""
    found = match(truth, results, iou_type, label=label, progress=progress)
    once = np.ones((1, len(found.image_ids)), dtype=np.int32)
    values = average_precision(found, once)
    classes = {name: _metrics(row) for name, row in zip(found.classes, values[0], strict=True)}
    return Evaluation(_metrics(class_mean(values)[0]), classes)


def _metrics(values: NDArray[np.float64]) -> Metrics:
    return {
        metric: None if np.isnan(value) else float(value)
        for metric, value in zip(METRICS, values, strict=True)
    }


def read_detections(results: Path, annotations: Path, dataset: str) -> Detections:
    """Detections of a results file or of a run folder that holds one.

    Raises:
        UserError: see :func:`read_truth` and :func:`read_results`.
    """
    path = results_path(results)
    truth = read_truth(annotations)
    return Detections(dataset, truth, str(path), read_results(path, truth))


def detect(
    cfg: CfgNode, iou_type: str | None = None, *, progress: bool = False
) -> Iterator[Detections]:
    """Run a trained detector on every dataset that its config tests on.

    Everything is checked before the first image.

    Args:
        cfg: of any Detectron2 model that answers with ``instances``.
        iou_type: what the detections are to be evaluated by; None for what there is.
        progress: show a bar for each dataset.

    Raises:
        UserError: datasets, annotations or weights that are not there or do not fit one another;
            an image that cannot be read.
    """
    truths = {dataset: truth_of(cfg, dataset) for dataset in cfg.DATASETS.TEST}
    for truth in truths.values():
        if iou_type is not None:
            check_iou_type([], iou_type, truth)
    model = load_trained(cfg)
    check_test_images(cfg)
    loaders = {dataset: DetectionTrainer.build_test_loader(cfg, dataset) for dataset in truths}
    check_classes(cfg, cfg.DATASETS.TEST)
    check_trained_classes(cfg.MODEL.WEIGHTS, cfg.DATASETS.TEST)
    for dataset, truth in truths.items():
        bar = tqdm(loaders[dataset], f"Detecting on {dataset}", unit="image", disable=not progress)
        results = _detect(model, bar, category_ids(dataset))
        yield Detections(dataset, truth, cfg.MODEL.WEIGHTS, results)


def _detect(
    model: nn.Module, batches: Iterable[list[dict[str, Any]]], of_dataset: Sequence[int]
) -> list[dict[str, Any]]:
    results = []
    for inputs in batches:
        with torch.no_grad():
            outputs = model(inputs)
        for image, output in zip(inputs, outputs, strict=True):
            results += coco_entries(instances_of(output), image["image_id"], of_dataset)
    return results


def instances_of(output: dict[str, Any]) -> Instances:
    """What a Detectron2 model has detected on an image, on the CPU.

    Raises:
        UserError: the model does not answer with instances.
    """
    if "instances" not in output:
        raise UserError(
            f"The model does not answer with instances but with {', '.join(output)}. Set the "
            f"config of a detector."
        )
    return output["instances"].to("cpu")


def coco_entries(
    instances: Instances, image_id: int, of_dataset: Sequence[int]
) -> list[dict[str, Any]]:
    """Detections on an image as COCO's results.

    Args:
        instances: on the CPU. Detectron2 moves their keypoints by half a pixel, in place.
        image_id: of the image.
        of_dataset: the category id of each contiguous class id.
    """
    entries = instances_to_coco_json(instances, image_id)
    return [{**entry, "category_id": of_dataset[entry["category_id"]]} for entry in entries]


def category_ids(dataset: str) -> list[int]:
    """The category id of each contiguous class id of a dataset that was read.

    Where a dataset has none, these are the contiguous ids, as in Detectron2.
    """
    metadata = MetadataCatalog.get(dataset)
    contiguous = metadata.get("thing_dataset_id_to_contiguous_id")
    if contiguous is None:
        return list(range(len(metadata.thing_classes)))
    return sorted(contiguous, key=contiguous.__getitem__)
