#!/usr/bin/env python3
"""Wall-clock time, CPU time and peak memory of eval, compare and predict, each in its own process.

    python benchmarks/tools.py                  eval and compare at the size of COCO val2017
    python benchmarks/tools.py --pictures 16    predict, too

The data is made up: 36,000 boxes of 80 classes on 5,000 images, classes as unequal as COCO's, and
100 detections an image on each of two sides, some right, some nearly, most wrong, with scores of
four digits so that there are ties. predict draws on images of coco/val2017 under
DETECTRON2_DATASETS, with Faster R-CNN R50-FPN whose weights are all zero: every anchor is as good
as any other then, so that 100 detections an image are drawn, the most there can be. Peak memory is
that of the largest process of a command. On a machine that does other work at the same time, only
the seconds of CPU count. What is measured replaces its entry in the record.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.modeling import build_model
from pycocotools.coco import COCO

from repr_det.engine.checkpoint import SafeCheckpointer
from repr_det.engine.config import config_path
from repr_det.engine.environment import environment
from repr_det.tasks import get_cfg

CONFIG = "repr_faster_rcnn.yaml"
AIMS = {"eval": 15, "compare": 45}
"""Seconds of wall-clock time on two cores, at the full size."""

CLASSES, BOXES_AN_IMAGE, DETECTIONS_AN_IMAGE = 80, 7.2, 100
WIDTH, HEIGHT = 640, 480

Entries = list[dict[str, Any]]


def make_truth(images: int, generator: np.random.Generator) -> COCO:
    """Boxes of all sizes; the most frequent class has 30 % of them, the rarest 0.1 %."""
    shares = 1 / np.arange(1, CLASSES + 1)
    shares = np.concatenate([[0.3], 0.7 * shares[1:] / shares[1:].sum()])
    number = round(images * BOXES_AN_IMAGE)
    sides = np.exp(generator.uniform(np.log(8), np.log(400), (number, 2)))
    corners = generator.uniform(0, 1, (number, 2)) * (WIDTH, HEIGHT) * 0.5
    coco = COCO()
    coco.dataset = {
        "images": [
            {"id": i, "file_name": f"{i}.jpg", "width": WIDTH, "height": HEIGHT}
            for i in range(1, images + 1)
        ],
        "categories": [{"id": i, "name": f"class {i}"} for i in range(1, CLASSES + 1)],
        "annotations": [
            {
                "id": i + 1,
                "image_id": int(image),
                "category_id": int(category),
                "bbox": [*corners[i].tolist(), *sides[i].tolist()],
                "area": float(sides[i].prod()),
                "iscrowd": int(generator.random() < 0.01),
            }
            for i, (image, category) in enumerate(
                zip(
                    generator.integers(1, images + 1, number),
                    generator.choice(CLASSES, number, p=shares) + 1,
                    strict=True,
                )
            )
        ],
    }
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
    return coco


def make_results(truth: COCO, noise: float, generator: np.random.Generator) -> Entries:
    """An object has five detections around it; the others repeat its class or have any class."""
    results = []
    for image in truth.imgs:
        objects = truth.imgToAnns[image]
        for number in range(DETECTIONS_AN_IMAGE):
            near = number < 5 * len(objects)
            category = int(generator.integers(1, CLASSES + 1))
            box = generator.uniform(20, 200, 4)
            if objects:
                entry = objects[number % len(objects)]
                if near or generator.random() < 0.5:
                    category = entry["category_id"]
                if near:
                    x, y, w, h = entry["bbox"]
                    box = (x, y, w, h) + generator.normal(0, noise, 4) * (w, h, w, h)
            score = generator.beta(2, 2) if near else generator.beta(1, 6)
            results.append(
                {
                    "image_id": image,
                    "category_id": category,
                    "bbox": np.maximum(box, 1).tolist(),
                    "score": round(float(score), 4),
                }
            )
    return results


def measure(*words: object) -> dict[str, Any]:
    """Run a sub-command to its end.

    Raises:
        RuntimeError: it failed; it has said why.
    """
    begin = time.perf_counter()
    command = [sys.executable, "-m", "repr_det", *map(str, words)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != 0:
        raise RuntimeError(f"{words[0]} ended with exit status {process.returncode}.")
    return {
        "wall_seconds": round(time.perf_counter() - begin, 1),
        "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 1),
        "peak_memory_mib": round(usage.ru_maxrss / 1024),
    }


def write_coco(folder: Path, images: int) -> tuple[Path, list[Path]]:
    """Annotations, and the results of two sides."""
    generator = np.random.default_rng(0)
    truth = make_truth(images, generator)
    annotations = folder / "annotations.json"
    annotations.write_text(json.dumps(truth.dataset))
    sides = []
    for name, noise in (("first", 0.12), ("second", 0.1)):
        sides.append(folder / f"{name}.json")
        sides[-1].write_text(json.dumps(make_results(truth, noise, generator)))
    return annotations, sides


def write_weights(path: Path) -> Path:
    """Weights of :data:`CONFIG`'s model, all zero."""
    cfg = get_cfg()
    cfg.merge_from_file(config_path(CONFIG))
    cfg.MODEL.DEVICE = "cpu"
    model = build_model(cfg)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    SafeCheckpointer(model, str(path.parent)).save(path.stem)
    return path


def predict(folder: Path, number: int) -> dict[str, Any]:
    """Measure predict on some pictures of COCO."""
    datasets = Path(os.environ.get("DETECTRON2_DATASETS", "datasets"))
    pictures = sorted((datasets / "coco" / "val2017").glob("*.jpg"))[:number]
    if len(pictures) < number:
        sys.exit(
            f"{datasets / 'coco/val2017'} holds {len(pictures)} images. Set DETECTRON2_DATASETS to "
            "the folder that holds coco/, or fewer --pictures."
        )
    found = folder / "found.json"
    measured = measure(
        *("predict", "--config-file", CONFIG, *pictures, "--score-threshold", 0),
        *("--output", folder / "drawn", "--json", found, "MODEL.WEIGHTS"),
        *(write_weights(folder / "weights.pth"), "MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.0),
    )
    return measured | {"pictures": number, "detections_drawn": len(json.loads(found.read_text()))}


def main() -> None:
    """Measure, print and record."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--resamples", type=int, default=1000)
    parser.add_argument("--pictures", type=int, default=0)
    parser.add_argument("--json", type=Path, default=Path(__file__).with_suffix(".json"))
    args = parser.parse_args()

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        annotations, sides = write_coco(folder, args.images)
        found = {"eval": measure("eval", "--results", sides[0], "--annotations", annotations)}
        found["compare"] = measure("compare", annotations, *sides, "--resamples", args.resamples)
        found["compare"]["resamples"] = args.resamples
        for command, entry in found.items():
            entry |= {"images": args.images, "aim_seconds": AIMS[command]}
        if args.pictures:
            found["predict"] = predict(folder, args.pictures)
    on = environment("cpu")
    record = json.loads(args.json.read_text()) if args.json.is_file() else {}
    record |= {command: entry | on for command, entry in found.items()}
    args.json.write_text(json.dumps(record, indent=2) + "\n")
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
