#!/usr/bin/env python3
"""COCO's metrics of a trained detector, or of a results file, on any COCO-format dataset.

tools/evaluate_coco.py --run output/repr
tools/evaluate_coco.py --run output/repr --test-data my_val val.json images/ --json metrics.json
tools/evaluate_coco.py --config repr_mask_rcnn.yaml MODEL.WEIGHTS model_final.pth
tools/evaluate_coco.py --results results.json --annotations val.json

A run is evaluated with its last checkpoint, on the datasets that its config tests on. Any config of
a Detectron2 detector will do, with RePr or without. Boxes and, where there are any, masks; 100
detections an image. Table and JSON are in per cent; empty and null where no object counts.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from repr_det.detection.coco_results import METRICS, SEGM, TITLES, evaluable_types
from repr_det.detection.datasets import add_coco_argument, take_num_classes, use_coco_data
from repr_det.detection.evaluation import (
    Detections,
    Evaluation,
    Metrics,
    annotation_file,
    detect,
    evaluate,
    read_detections,
)
from repr_det.engine.command_line import exit_status
from repr_det.engine.files import check_folder_of, write_text_whole
from repr_det.engine.trained import add_model_arguments
from repr_det.errors import UserError
from repr_det.report.markdown import aligned_table
from repr_det.tasks import trained_detector_cfg

OF_DETECTRON2 = ("GeneralizedRCNN", "PanopticFPN", "RetinaNet", "FCOS")
"""Architectures that give no masks without MODEL.MASK_ON; of somebody else's nobody knows."""


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    what = parser.add_mutually_exclusive_group(required=True)
    add_model_arguments(what)
    what.add_argument(
        "--results", type=Path, metavar="FILE", help="COCO results, or a run folder with them"
    )
    on = parser.add_mutually_exclusive_group()
    on.add_argument("--dataset", metavar="NAME", help="a registered dataset")
    add_coco_argument(on, "test")
    on.add_argument(
        "--annotations", type=Path, metavar="JSON", help="with --results: an annotation file"
    )
    parser.add_argument(
        "--iou-type", choices=TITLES, help="boxes or masks only; default: what there is"
    )
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the metrics to a JSON file")
    parser.add_argument(
        "--save-results", type=Path, metavar="OUT", help="write the detections as COCO results"
    )
    parser.add_argument("opts", nargs="*", metavar="KEY VALUE", help="overrides of the config")
    args = parser.parse_args(arguments)
    return exit_status("evaluate_coco.py", lambda: print(_evaluate(args)), stopped="Stopped.")


def _evaluate(args: argparse.Namespace) -> str:
    for option, path in (("--json", args.json), ("--save-results", args.save_results)):
        check_folder_of(option, path)
    parts, records = [], {}
    for found in _from_file(args) if args.results else _from_model(args):
        if args.save_results:
            write_text_whole(args.save_results, json.dumps(found.results))
        iou_types = (
            [args.iou_type] if args.iou_type else evaluable_types(found.results, found.truth)
        )
        if not iou_types:
            raise UserError(
                f"Detections and annotations of {found.dataset} share neither boxes nor masks: "
                "give results or annotations with both."
            )
        record: dict[str, Any] = {
            "source": found.source,
            "annotations": str(found.annotations),
            "images": len(found.truth.imgs),
            "detections": len(found.results),
        }
        for iou_type in iou_types:
            title = f"{TITLES[iou_type]}, {found.dataset}"
            evaluation = evaluate(
                found.truth, found.results, iou_type, label=f"Evaluating {title}", progress=True
            )
            record[iou_type] = {
                "overall": _in_per_cent(evaluation.overall),
                "classes": {name: _in_per_cent(t) for name, t in evaluation.classes.items()},
            }
            parts.append(_table(title, evaluation))
        records[found.dataset] = record
    if args.json:
        content = {"unit": "per cent", "datasets": records}
        write_text_whole(args.json, json.dumps(content, indent=2) + "\n")
    return "\n\n".join(parts)


def _from_file(args: argparse.Namespace) -> Iterator[Detections]:
    if args.opts:
        raise UserError(
            f"--results has no config that {args.opts[0]} could override: leave it out."
        )
    if args.test_data:
        dataset, annotations = args.test_data[0], Path(args.test_data[1])
    elif args.dataset:
        dataset, annotations = args.dataset, annotation_file(args.dataset)
    elif args.annotations:
        dataset, annotations = args.annotations.stem, args.annotations
    else:
        raise UserError("--results needs annotations: give --annotations JSON or --dataset NAME.")
    yield read_detections(args.results, annotations, dataset)


def _from_model(args: argparse.Namespace) -> Iterator[Detections]:
    if args.annotations:
        raise UserError("A model needs images: give --test-data NAME JSON IMAGES.")
    cfg = trained_detector_cfg(args.run, args.config, args.opts)
    if args.test_data:
        use_coco_data(cfg, "TEST", *args.test_data)
        if args.config:
            take_num_classes(cfg, args.test_data[0], args.opts)
    elif args.dataset:
        cfg.DATASETS.TEST = (args.dataset,)
    if not cfg.DATASETS.TEST:
        raise UserError("The config names no dataset to test on: give --dataset or --test-data.")
    if args.save_results and len(cfg.DATASETS.TEST) > 1:
        raise UserError("--save-results is for the detections of one dataset: give --dataset.")
    model = cfg.MODEL
    if args.iou_type == SEGM and model.META_ARCHITECTURE in OF_DETECTRON2 and not model.MASK_ON:
        raise UserError(
            "The model gives no masks (MODEL.MASK_ON False): give --iou-type bbox or leave it out."
        )
    yield from detect(cfg, args.iou_type, progress=True)


def _in_per_cent(metrics: Metrics) -> Metrics:
    return {name: None if value is None else 100 * value for name, value in metrics.items()}


def _table(title: str, evaluation: Evaluation) -> str:
    cells = [[title, *METRICS]]
    for name, metrics in (("all classes", evaluation.overall), *evaluation.classes.items()):
        values = _in_per_cent(metrics).values()
        cells.append([name, *("" if value is None else f"{value:.2f}" for value in values)])
    return aligned_table(cells)


if __name__ == "__main__":
    sys.exit(main())
