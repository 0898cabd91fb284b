r"""Run a detector on images, folders of images and videos.

  repr-det predict output/repr photos/ -o drawn/
  repr-det predict output/repr photo.jpg clip.mp4 -o drawn/ --json found.json
  repr-det predict --config-file repr_faster_rcnn.yaml photos/ --json found.json \
      MODEL.WEIGHTS model_final.pth

Drawn pictures keep their file names, and videos become .mp4. Small pictures are enlarged. The JSON
holds COCO results with file_name and, for videos, frame (from 0).

Class names, class ids and image ids come from --annotations. Without it, they come from the
config's dataset if that is registered. Otherwise the class names are those of the run, with ids
from 1.

Hidden files in a folder are skipped. Images that cannot be read are skipped and listed at the end.
The exit status is then 1.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from repr_det.cli.arguments import (
    add_json,
    add_overrides,
    add_renamed,
    add_trained_model,
    words_after_run,
)
from repr_det.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command line."""
    add_trained_model(parser)
    parser.add_argument("inputs", nargs="*", metavar="INPUT", help="an image, folder or video")
    parser.add_argument(
        "-o", "--output", type=Path, metavar="FOLDER", help="write drawn pictures to this folder"
    )
    add_json(parser, "the detections")
    parser.add_argument(
        "--score-threshold",
        type=float,
        default=0.5,
        metavar="X",
        help="leave out detections with a score below X",
    )
    parser.add_argument(
        "--annotations", type=Path, metavar="JSON", help="COCO-format file with the class names"
    )
    parser.add_argument(
        "--batch-size", type=int, default=1, metavar="N", help="images in one forward pass"
    )
    instead = "KEY VALUE at the end, without --opts"
    add_renamed(parser, "--opts", instead, "old_opts", nargs=argparse.REMAINDER)
    add_overrides(parser)


def run(args: argparse.Namespace) -> int:
    """Detect, draw and write; returns 1 if something could not be read.

    Raises:
        UserError: a mistake in the command line, the inputs or the model.
    """
    from repr_det.detection.prediction import Detector, find_sources, labels_for, predict
    from repr_det.engine.files import check_output, write_text_whole
    from repr_det.tasks import get_cfg, trained_detector_cfg

    words = words_after_run(args, [*args.inputs, *args.opts])
    keys = get_cfg()
    first = next(
        (
            k
            for k, word in enumerate(words)
            if word.split(".")[0] in keys and not Path(word).exists()
        ),
        len(words),
    )
    inputs, overrides = words[:first], words[first:] + getattr(args, "old_opts", [])
    if not args.run_folder and not args.config_file:
        raise UserError("No model is named. Pass a RUN, or --config-file FILE and MODEL.WEIGHTS.")
    if not inputs:
        raise UserError("There is no INPUT. Pass images, folders or videos after the RUN.")
    if not args.output and not args.json:
        raise UserError("Nothing would be written. Set --output FOLDER, --json FILE, or both.")
    if args.batch_size < 1:
        raise UserError(f"--batch-size is {args.batch_size}. Set it to 1 or more.")
    check_output("--json", args.json, [*inputs, args.annotations])
    sources = find_sources([Path(word) for word in inputs], args.output)
    cfg = trained_detector_cfg(args.run_folder, args.config_file, overrides)
    labels = labels_for(cfg, args.annotations)
    detector = Detector(cfg, args.score_threshold)
    outcome = predict(
        detector,
        labels,
        sources,
        args.output,
        batch_size=args.batch_size,
        progress=True,
    )
    if args.json:
        write_text_whole(args.json, json.dumps(outcome.entries))
    print(f"{len(outcome.entries):,} detections on {outcome.images:,} images.")
    if outcome.faults:
        faults = ", ".join(outcome.faults)
        print(f"{len(outcome.faults)} could not be read: {faults}.", file=sys.stderr)
        return 1
    return 0
