"""Made-up annotations and results of COCO's format, and what pycocotools itself says of them."""

from __future__ import annotations

import contextlib
import copy
import io
import json

import numpy as np
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from repr_det.detection.coco_results import SEGM, read_truth

SIZE = 200
CLASSES = {3: "never seen", 5: "sheep", 8: "wolf", 11: "only crowds", 12: "never found"}


def rectangle(box):
    x, y, w, h = box
    return [[x, y, x + w, y, x + w, y + h, x, y + h]]


def rle(box):
    found = coco_mask.frPyObjects(rectangle(box), SIZE, SIZE)[0]
    return {"size": found["size"], "counts": found["counts"].decode()}


def make_truth(images=12, seed=0):
    """Objects of all sizes, crowds among them, and images without any."""
    generator = np.random.default_rng(seed)
    annotations = []
    for image in range(images):
        for _ in range(generator.integers(0, 5)):
            w, h = generator.choice([12, 30, 32, 60, 110], size=2) + generator.integers(0, 8, 2)
            x, y = generator.integers(0, SIZE - 120, 2)
            category = int(generator.choice([5, 8, 11, 12], p=[0.5, 0.3, 0.1, 0.1]))
            crowd = int(category == 11 or generator.random() < 0.1)
            box = [float(v) for v in (x, y, w, h)]
            segmentation = rle(box) if crowd else rectangle(box)
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image * 7 + 2,
                    "category_id": category,
                    "bbox": box,
                    "area": float(w * h),
                    "iscrowd": crowd,
                    "segmentation": segmentation,
                }
            )
    return {
        "images": [
            {"id": image * 7 + 2, "file_name": f"{image}.png", "width": SIZE, "height": SIZE}
            for image in reversed(range(images))
        ],
        "annotations": annotations,
        "categories": [{"id": number, "name": name} for number, name in CLASSES.items()],
    }


def make_results(truth, seed, digits=6, noise=0.05):
    """Moved, doubled and invented detections; with one digit nearly all scores are ties."""
    generator = np.random.default_rng(seed)
    places = [
        (entry["image_id"], entry["category_id"], entry["bbox"], 1.0)
        for entry in truth["annotations"]
        if entry["category_id"] != 12
        for _ in range(generator.integers(0, 4))
    ]
    for image in truth["images"]:
        for _ in range(generator.integers(0, 6)):
            box = [*generator.uniform(0, 90, 2), *generator.uniform(10, 110, 2)]
            places.append((image["id"], int(generator.choice([5, 8, 11])), box, 0.5))
    results = []
    for image, category, (x, y, w, h), best in places:
        dx, dy, dw, dh = generator.normal(0, noise, 4)
        box = [x + dx * w, y + dy * h, w * np.exp(dw), h * np.exp(dh)]
        results.append(
            {
                "image_id": image,
                "category_id": category,
                "bbox": [float(v) for v in box],
                "score": round(float(generator.uniform(0, best)), digits),
                "segmentation": rle(box),
            }
        )
    return results


def indexed(content):
    coco = COCO()
    coco.dataset = content
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
    return coco


def read(tmp_path, content):
    path = tmp_path / "truth.json"
    path.write_text(json.dumps(content))
    return read_truth(path)


def direct(content, results, iou_type):
    """(1 + classes, METRICS) from pycocotools; NaN for its -1."""
    truth = indexed(copy.deepcopy(content))
    unused = "bbox" if iou_type == SEGM else "segmentation"
    with contextlib.redirect_stdout(io.StringIO()):
        found = truth.loadRes([{k: v for k, v in r.items() if k != unused} for r in results])
        evaluation = COCOeval(truth, found, iou_type)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    rows = [evaluation.stats[:6]]
    precision = evaluation.eval["precision"][..., -1]
    for number in range(len(content["categories"])):
        own = precision[:, :, number]
        kinds = [own[..., 0], own[0, :, 0], own[5, :, 0], *np.moveaxis(own[..., 1:], -1, 0)]
        rows.append([kind.mean() for kind in kinds])
    rows = np.array(rows)
    return np.where(rows == -1, np.nan, rows)
