"""Folders of runs that were never trained: the files of a run, written by hand."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path

import cv2
import numpy as np

from repr_det.report.run import read_run
from repr_det.tasks import get_cfg, use_data

HALF = 100 * 51 / 101
"""AP of half of the objects, found without a mistake."""


def write_metrics(folder: Path, records: list[dict]) -> Path:
    path = folder / "metrics.json"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def write_run(folder: Path, settings: dict | None = None, length: int = 200) -> Path:
    """A classification run's config, and metrics of every 20th iteration.

    Its accuracy rises by 5 every 50 iterations, from 50 plus its seed.
    """
    folder.mkdir(parents=True)
    settings = {"MODEL.META_ARCHITECTURE": "ImageClassifier", "SEED": 0, **(settings or {})}
    settings = {"DATASETS.TEST": ("corners_test",), **settings}
    cfg = get_cfg()
    cfg.merge_from_list([part for pair in settings.items() for part in pair])
    (folder / "config.yaml").write_text(cfg.dump())
    records = []
    for last in range(19, length, 20):
        record = {"iteration": last, "total_loss": 3 - last / length, "lr": 0.1, "time": 0.5}
        records.append(record)
    for number, last in enumerate(range(49, length, 50)):
        top1 = 50 + cfg.SEED + 5 * number
        records.append(
            {"iteration": last, "accuracy/top1": top1, "accuracy/loss": 1 / (number + 1)}
        )
    write_metrics(folder, records)
    return folder


def write_detection_data(folder: Path) -> tuple[Path, Path]:
    """Annotations and images: eight grey ones with a bright square each, a cat or a dog."""
    images = folder / "images"
    images.mkdir(parents=True)
    content = {"images": [], "annotations": [], "categories": []}
    content["categories"] = [{"id": 3, "name": "cat"}, {"id": 7, "name": "dog"}]
    for number in range(1, 9):
        picture = np.full((60, 80, 3), 90, np.uint8)
        picture[10:40, 20:50] = 220
        cv2.imwrite(str(images / f"{number}.png"), picture)
        content["images"].append(
            {"id": number, "file_name": f"{number}.png", "width": 80, "height": 60}
        )
        content["annotations"].append(
            {
                **{"id": number, "image_id": number, "category_id": 3 if number % 2 else 7},
                **{"bbox": [20, 10, 30, 30], "area": 900, "iscrowd": 0},
                "segmentation": [[20, 10, 50, 10, 50, 40, 20, 40]],
            }
        )
    path = folder / "truth.json"
    path.write_text(json.dumps(content))
    return path, images


def detections(found: list[int], wrong: list[int] = ()) -> list[dict]:
    """Right detections in some of the images, and wrong ones in some."""
    return [
        {
            **{"image_id": number, "category_id": 3 if number % 2 else 7, "score": 0.9},
            "bbox": [20, 10, 30, 30] if right else [55, 40, 20, 15],
        }
        for right, numbers in ((True, found), (False, wrong))
        for number in numbers
    ]


def write_detection_run(
    folder: Path, results: list[dict], ap: float, settings: dict | None = None
) -> Path:
    """A finished detection run without checkpoints, evaluated once, on the data named ``squares``.

    Args:
        folder: to write.
        results: its detections.
        ap: what it recorded as AP.
        settings: of its config.
    """
    (folder / "inference").mkdir(parents=True)
    settings = {"DATASETS.TEST": ("squares",), "DATASETS.TRAIN": ("elsewhere",), **(settings or {})}
    cfg = get_cfg()
    cfg.merge_from_list([part for pair in settings.items() for part in pair])
    (folder / "config.yaml").write_text(cfg.dump())
    (folder / "inference" / "coco_instances_results.json").write_text(json.dumps(results))
    sizes = {"bbox/APs": ap, "bbox/APm": float("nan"), "bbox/APl": float("nan")}
    classes = {"bbox/AP-cat": ap, "bbox/AP-dog": ap}
    records = [
        {"iteration": 99, "total_loss": 1.0, "lr": 0.1, "time": 0.5},
        {"iteration": 100, "bbox/AP": ap, "bbox/AP50": ap, **sizes, **classes},
    ]
    write_metrics(folder, records)
    return folder


def squares(tmp_path, *runs):
    """Runs on the squares, registered for this test."""
    annotations, images = write_detection_data(tmp_path / "data")
    name = f"squares_{tmp_path.name}"
    args = Namespace(
        **{"train_data": None, "train_folder": None, "test_folder": None},
        test_data=[name, str(annotations), str(images)],
    )
    read = []
    for number, (results, ap, uses_repr) in enumerate(runs):
        folder = write_detection_run(
            tmp_path / f"run_{number}",
            results,
            ap,
            {"DATASETS.TEST": (name,), "REPR.ENABLED": uses_repr},
        )
        read.append(read_run(folder))
        use_data(read[-1].cfg, args)
    return read
