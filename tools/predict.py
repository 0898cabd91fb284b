#!/usr/bin/env python3
r"""A trained detector on images, folders of images and videos.

tools/predict.py photos/ --run output/repr --output drawn/
tools/predict.py photo.jpg clip.mp4 --run output/repr --output drawn/ --json found.json
tools/predict.py photos/ --config repr_faster_rcnn.yaml --json found.json \
    --opts MODEL.WEIGHTS model_final.pth

Pictures keep their names (small ones are enlarged), videos become .mp4. The JSON holds COCO's
results, each with file_name and, in videos, frame (from 0). Class names, and ids of classes and
images in it, are those of --annotations; without it, classes are those of a registered dataset
that the config names, and otherwise numbers from 1. Images that cannot be read are left out and
named at the end; the exit status is 1 then.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from repr_det.detection.prediction import Detector, find_sources, labels_for, predict
from repr_det.engine.command_line import exit_status
from repr_det.engine.files import check_folder_of, write_text_whole
from repr_det.engine.trained import add_model_arguments
from repr_det.errors import UserError
from repr_det.tasks import trained_detector_cfg


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("inputs", nargs="+", type=Path, metavar="INPUT")
    add_model_arguments(parser.add_mutually_exclusive_group(required=True))
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="draw pictures there")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the detections there")
    parser.add_argument("--score-threshold", type=float, default=0.5, metavar="S", help="0.5")
    parser.add_argument(
        "--annotations", type=Path, metavar="JSON", help="COCO-format file with the class names"
    )
    parser.add_argument("--batch-size", type=int, default=1, metavar="N", help="images at once, 1")
    parser.add_argument(
        "--opts", nargs=argparse.REMAINDER, default=[], metavar="KEY VALUE", help="of the config"
    )
    args = parser.parse_args(arguments)
    return exit_status(
        "predict.py", lambda: _predict(args), stopped="Stopped; what is drawn so far stays."
    )


def _predict(args: argparse.Namespace) -> int:
    if not args.output and not args.json:
        raise UserError("Nothing would be written: give --output FOLDER, --json OUT, or both.")
    if args.batch_size < 1:
        raise UserError(f"--batch-size is {args.batch_size}; give at least 1.")
    check_folder_of("--json", args.json)
    sources = find_sources(args.inputs, args.output)
    cfg = trained_detector_cfg(args.run, args.config, args.opts)
    labels = labels_for(cfg, args.annotations)
    detector = Detector(cfg, args.score_threshold)
    outcome = predict(
        detector,
        labels,
        sources,
        args.output,
        batch_size=args.batch_size,
        longest=detector.longest,
        progress=True,
    )
    if args.json:
        write_text_whole(args.json, json.dumps(outcome.entries))
    print(f"{len(outcome.entries):,} detections on {outcome.images:,} images.")
    if outcome.faults:
        faults = ", ".join(outcome.faults)
        print(f"predict.py: {len(outcome.faults)} could not be read: {faults}.", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
