"""The detection datasets that this package registers, in addition to Detectron2's."""

from __future__ import annotations

from detectron2.data import DatasetCatalog
from detectron2.data.datasets import register_coco_instances

from repr_det.detection.shapes import register_shapes
from repr_det.engine.data import datasets_root

NEU_DET = {"neu_det_train": "instances_train.json", "neu_det_test": "instances_val.json"}
"""Annotation files of NEU-DET below ``neu_det/annotations/``, the images being in
``neu_det/images/``: defects of hot-rolled steel, Song and Yan 2013, 200 x 200 pixels."""


def register_builtin() -> None:
    """Register the drawn shapes and NEU-DET. A name that is registered stays as it is.

    Files are drawn or looked for when a dataset is first read.
    """
    register_shapes()
    folder = datasets_root() / "neu_det"
    for name, file in NEU_DET.items():
        if name not in DatasetCatalog.list():
            register_coco_instances(
                name, {}, str(folder / "annotations" / file), str(folder / "images")
            )
