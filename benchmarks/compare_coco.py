#!/usr/bin/env python3
"""Time and memory of the paired bootstrap on detections of the size of COCO val2017.

    python benchmarks/compare_coco.py [--images 5000] [--resamples 1000] [--json FILE]

The data is made up: 36,000 boxes of 80 classes on 5,000 images, classes as unequal as COCO's, and
100 detections an image on each of two sides, some right, some nearly, most wrong, with scores of
four digits so that there are ties. Evaluation is once for each side; resampling is what the bound
is about. Where the machine does other work at the same time, the seconds of CPU say
more than the others. Peak memory is that of the whole process.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import resource
import time
from pathlib import Path
from typing import Any

import numpy as np
from pycocotools.coco import COCO

from repr_det.detection.bootstrap import paired_bootstrap
from repr_det.detection.coco_results import BBOX
from repr_det.detection.matching import match
from repr_det.engine.environment import environment

BOUND = 120.0
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


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--resamples", type=int, default=1000)
    parser.add_argument("--json", type=Path, default=Path(__file__).with_suffix(".json"))
    args = parser.parse_args()

    generator = np.random.default_rng(0)
    truth = make_truth(args.images, generator)
    sides, evaluation = [], []
    for noise in (0.12, 0.1):
        results = make_results(truth, noise, generator)
        begin = time.perf_counter()
        sides.append(match(truth, results, BBOX, progress=True))
        evaluation.append(round(time.perf_counter() - begin, 1))
    begin, cpu = time.perf_counter(), time.process_time()
    arms = {"first": sides[:1], "second": sides[1:]}
    found = paired_bootstrap(arms, "first", resamples=args.resamples, progress=True)["second"]
    seconds, cpu = time.perf_counter() - begin, time.process_time() - cpu
    ap = found.overall["AP"]
    record = {
        "images": args.images,
        "boxes": len(truth.anns),
        "classes": CLASSES,
        "detections_an_image": DETECTIONS_AN_IMAGE,
        "resamples": args.resamples,
        "evaluation_seconds": evaluation,
        "resampling_seconds": round(seconds, 1),
        "resampling_cpu_seconds": round(cpu, 1),
        "bound_seconds": BOUND,
        "peak_memory_mib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
        "ap": {name: round(value, 4) for name, value in ap._asdict().items()},
    } | environment("cpu")
    args.json.write_text(json.dumps(record, indent=2) + "\n")
    print(json.dumps(record, indent=2))


if __name__ == "__main__":
    main()
