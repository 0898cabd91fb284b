#!/usr/bin/env python3
"""Time and peak memory of the command lines, each in a process of its own.

    python benchmarks/tools.py [--images 5000] [--resamples 1000] [--pictures 16] [--json FILE]

compare_coco.py and evaluate_coco.py get the made-up annotations and results of the size of COCO
val2017 that benchmarks/compare_coco.py makes. predict.py draws on images of coco/val2017 under
DETECTRON2_DATASETS, with Faster R-CNN R50-FPN whose weights are all zero: every anchor is as good
as any other then, so that 100 detections an image are drawn, the most there can be. Peak memory is
that of the largest process of a command. Where the machine does other work at the same time, the
seconds of CPU say more than the others.
"""

from __future__ import annotations

import argparse
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
from compare_coco import make_results, make_truth
from detectron2.modeling import build_model

from repr_det.engine.checkpoint import SafeCheckpointer
from repr_det.engine.config import config_path
from repr_det.engine.environment import environment
from repr_det.tasks import get_cfg

TOOLS = Path(__file__).resolve().parents[1] / "tools"
CONFIG = "repr_faster_rcnn.yaml"


def measure(tool: str, *arguments: object) -> dict[str, Any]:
    """Run a tool to its end.

    Raises:
        RuntimeError: it failed; it has said why.
    """
    begin = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, str(TOOLS / tool), *map(str, arguments)], stdout=subprocess.DEVNULL
    )
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != 0:
        raise RuntimeError(f"{tool} ended with exit status {process.returncode}.")
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


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--resamples", type=int, default=1000)
    parser.add_argument("--pictures", type=int, default=16)
    parser.add_argument("--json", type=Path, default=Path(__file__).with_suffix(".json"))
    args = parser.parse_args()

    datasets = Path(os.environ.get("DETECTRON2_DATASETS", "datasets"))
    pictures = sorted((datasets / "coco" / "val2017").glob("*.jpg"))[: args.pictures]
    if len(pictures) < args.pictures:
        sys.exit(
            f"{datasets / 'coco/val2017'} holds {len(pictures)} images: set DETECTRON2_DATASETS to "
            f"the folder that holds coco/, or give fewer --pictures."
        )
    record: dict[str, Any] = {
        "images": args.images,
        "resamples": args.resamples,
        "pictures": args.pictures,
        "tools": {},
    }
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        annotations, sides = write_coco(folder, args.images)
        weights = write_weights(folder / "weights.pth")
        record["tools"] = {
            "compare_coco.py": measure(
                "compare_coco.py", annotations, *sides, "--resamples", args.resamples
            ),
            "evaluate_coco.py": measure(
                "evaluate_coco.py", "--results", sides[0], "--annotations", annotations
            ),
            "predict.py": measure(
                *("predict.py", *pictures, "--config", CONFIG, "--score-threshold", 0),
                *("--output", folder / "drawn", "--json", folder / "found.json"),
                *("--opts", "MODEL.WEIGHTS", weights, "MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.0),
            ),
        }
        found = json.loads((folder / "found.json").read_text())
        record["detections_drawn"] = len(found)
    record |= environment("cpu")
    args.json.write_text(json.dumps(record, indent=2) + "\n")
    print(json.dumps(record, indent=2))


if __name__ == "__main__":
    main()
