"""Compute COCO's metrics of a detector or of a results file, on any COCO-format dataset.

  repr-det eval output/repr
  repr-det eval output/repr --test-data my_val val.json images/ --json metrics.json
  repr-det eval --config-file repr_mask_rcnn.yaml MODEL.WEIGHTS model_final.pth
  repr-det eval --results results.json --annotations val.json

A run is evaluated with its last checkpoint, on the test sets of its config. The config of any
Detectron2 detector works, with RePr or without. Boxes are evaluated, and masks where there are any,
with at most 100 detections per image. Numbers are in per cent. A class without objects has no
number. To evaluate a classifier, run `repr-det train --eval-only`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from repr_det.cli.arguments import (
    add_coco_data,
    add_json,
    add_overrides,
    add_trained_model,
    words_after_run,
)
from repr_det.errors import UserError

if TYPE_CHECKING:
    from repr_det.detection.evaluation import Detections, Evaluation

BOXES_ONLY_WITHOUT_MASK_ON = ("GeneralizedRCNN", "PanopticFPN", "RetinaNet")
"""Detectron2's architectures, which have no masks if MODEL.MASK_ON is False. Others may."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command line."""
    add_trained_model(parser)
    parser.add_argument(
        "--results",
        type=Path,
        metavar="FILE",
        help="in place of a model: COCO results, or a run that holds them",
    )
    data = parser.add_mutually_exclusive_group()
    data.add_argument("--dataset", metavar="NAME", help="a registered dataset to test on")
    add_coco_data(data, "test")
    data.add_argument(
        "--annotations", type=Path, metavar="JSON", help="annotation file of --results"
    )
    parser.add_argument(
        "--iou-type",
        choices=("bbox", "segm"),
        help="evaluate only boxes or only masks (default: all there is)",
    )
    add_json(parser, "the metrics")
    parser.add_argument(
        "--save-results",
        type=Path,
        metavar="FILE",
        help="write the detections to this file, as COCO results",
    )
    add_overrides(parser)


def run(args: argparse.Namespace) -> None:
    """Evaluate, print one table per dataset and kind, and write what is asked for.

    Raises:
        UserError: a mistake in the command line, the data or the model.
    """
    from repr_det.detection.coco_results import TITLES, evaluable_types, results_path
    from repr_det.detection.comparison import in_per_cent
    from repr_det.detection.evaluation import evaluate
    from repr_det.engine.files import check_output, write_text_whole

    args.opts = words_after_run(args, args.opts, args.results)
    models = [args.run_folder, args.config_file, args.results]
    if sum(map(bool, models)) != 1:
        raise UserError("Pass one of RUN, --config-file FILE and --results FILE.")
    results = args.results and results_path(args.results)
    reads = [results, args.annotations, args.test_data and args.test_data[1]]
    check_output("--json", args.json, [*reads, args.save_results])
    check_output("--save-results", args.save_results, [*reads, args.json])
    tables, records = [], {}
    for found in _from_file(args) if args.results else _from_model(args):
        iou_types = (
            [args.iou_type] if args.iou_type else evaluable_types(found.results, found.truth)
        )
        if not iou_types:
            raise UserError(
                f"Detections and annotations of {found.dataset} share neither boxes nor masks. "
                "Pass results or annotations that have both."
            )
        if args.save_results:
            write_text_whole(args.save_results, json.dumps(found.results))
        record: dict[str, Any] = {
            "source": found.source,
            "annotations": found.truth.file.path,
            "images": len(found.truth.imgs),
            "detections": len(found.results),
        }
        for iou_type in iou_types:
            title = f"{TITLES[iou_type]}, {found.dataset}"
            evaluation = evaluate(
                found.truth, found.results, iou_type, label=f"Evaluating {title}", progress=True
            )
            record[iou_type] = {
                "overall": in_per_cent(evaluation.overall),
                "classes": {name: in_per_cent(t) for name, t in evaluation.classes.items()},
            }
            tables.append(_table(title, evaluation))
        records[found.dataset] = record
    print("\n\n".join(tables))
    if args.json:
        content = {"unit": "per cent", "datasets": records}
        write_text_whole(args.json, json.dumps(content, indent=2) + "\n")


def _from_file(args: argparse.Namespace) -> Iterator[Detections]:
    from repr_det.detection.evaluation import annotation_file, read_detections

    if args.opts:
        raise UserError(
            f"--results has no config that {args.opts[0]} could override. Leave {args.opts[0]} out."
        )
    if args.test_data:
        dataset, annotations = args.test_data[0], Path(args.test_data[1])
    elif args.dataset:
        dataset, annotations = args.dataset, annotation_file(args.dataset)
    elif args.annotations:
        dataset, annotations = args.annotations.stem, args.annotations
    else:
        raise UserError("--results needs annotations. Set --annotations JSON or --dataset NAME.")
    yield read_detections(args.results, annotations, dataset)


def _from_model(args: argparse.Namespace) -> Iterator[Detections]:
    from repr_det.detection.datasets import take_num_classes, use_coco_data
    from repr_det.detection.evaluation import detect
    from repr_det.tasks import trained_detector_cfg

    if args.annotations:
        raise UserError("A model needs images. Set --test-data NAME JSON IMAGES.")
    cfg = trained_detector_cfg(args.run_folder, args.config_file, args.opts)
    if args.test_data:
        use_coco_data(cfg, "TEST", *args.test_data)
        if args.config_file:
            take_num_classes(cfg, args.test_data[0], args.opts)
    elif args.dataset:
        cfg.DATASETS.TEST = (args.dataset,)
    if not cfg.DATASETS.TEST:
        raise UserError("The config names no dataset to test on. Set --dataset or --test-data.")
    if args.save_results and len(cfg.DATASETS.TEST) > 1:
        raise UserError("--save-results is for the detections of one dataset. Set --dataset.")
    model = cfg.MODEL
    no_masks = model.META_ARCHITECTURE in BOXES_ONLY_WITHOUT_MASK_ON and not model.MASK_ON
    if args.iou_type == "segm" and no_masks:
        raise UserError("MODEL.MASK_ON is False, so the model finds no masks. Set --iou-type bbox.")
    yield from detect(cfg, args.iou_type, progress=True)


def _table(title: str, evaluation: Evaluation) -> str:
    from tabulate import tabulate

    from repr_det.detection.coco_results import METRICS
    from repr_det.detection.comparison import in_per_cent

    rows = [
        [name, *in_per_cent(metrics).values()]
        for name, metrics in (("all classes", evaluation.overall), *evaluation.classes.items())
    ]
    return tabulate(rows, [title, *METRICS], tablefmt="github", floatfmt=".2f", missingval="")
