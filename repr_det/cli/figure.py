r"""Draw one figure of a report as PNG or SVG, of runs or of any checkpoint.

  repr-det figure curves output/standard output/repr -o curves.svg
  repr-det figure cca output/repr -o cca.png
  repr-det figure overlap_by_layer --config-file repr_faster_rcnn.yaml -o overlap.png \
      MODEL.WEIGHTS model.pth
  repr-det figure contributions output/repr -o contributions.png

FIGURE is one of:
  curves             loss and metrics over training
  drops              which filters were dropped when
  times              how often filters were dropped
  overlap            filter overlap over training
  overlap_over_time  filter overlap over training, by layer
  overlap_by_layer   filter overlap by layer, before and after
  cca_by_layer       correlation of filters, by layer
  cca                correlation of filters inside a layer
  svcca              the same by SVCCA
  similarity         the networks of two arms, compared layer by layer
  contributions      what each filter contributes (the greedy oracle)
  filters            filters of the first layer
  classes            AP by class
  sizes              AP by object size
  detections         images on which the arms differ most

The last checkpoint of a run is used. `contributions` runs the network once for each filter and
batch. It keeps its result in the run's folder, where the report finds it.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from repr_det.cli.arguments import (
    add_arms,
    add_config_file,
    add_data,
    add_json,
    add_num_images,
    add_renamed,
    data_files,
    read_arms,
)
from repr_det.errors import UserError

if TYPE_CHECKING:
    from repr_det.report.arms import Arms

DETECTIONS = "detections"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command line."""
    parser.add_argument("figure", metavar="FIGURE", help="one of those above")
    parser.add_argument("runs", nargs="*", metavar="RUN", help="OUTPUT_DIR of a run")
    add_arms(parser, "RUN")
    add_config_file(
        parser,
        "in place of RUN, with MODEL.WEIGHTS FILE at the end: a config file, or the name of one in "
        "configs/",
    )
    add_renamed(parser, "--weights", "MODEL.WEIGHTS FILE at the end", "weights")
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        required=True,
        metavar="FIGURE.png|svg",
        help="write the figure to this file",
    )
    add_json(parser, "the numbers by layer")
    add_num_images(parser)
    add_data(parser)


def _arms(args: argparse.Namespace) -> Arms:
    from repr_det.report.arms import by_method
    from repr_det.report.run import of_checkpoint
    from repr_det.tasks import use_data

    weights, words = getattr(args, "weights", None), args.runs
    if len(words) == 2 and words[0] == "MODEL.WEIGHTS":
        weights, words = words[1], []
    if not (args.config_file or weights):
        return read_arms(args)
    if words or args.arm or not (args.config_file and weights):
        raise UserError("Set either runs, or --config-file FILE and MODEL.WEIGHTS FILE together.")
    run = of_checkpoint(args.config_file, Path(weights))
    use_data(run.cfg, args)
    return by_method([run])


def run(args: argparse.Namespace) -> None:
    """Draw the figure, print its caption and its path."""
    from repr_det.detection.drawing import draw_detections
    from repr_det.engine.files import check_output, write_text_whole
    from repr_det.report import plots
    from repr_det.report.gallery import FIGURES
    from repr_det.report.material import Material, compute_contributions

    if args.figure not in (*FIGURES, DETECTIONS):
        raise UserError(
            f"There is no figure {args.figure!r}. Set one of {', '.join((*FIGURES, DETECTIONS))}."
        )
    plots.check_suffix(args.output)
    check_output("--output", args.output, [args.json, *data_files(args)])
    check_output("--json", args.json, data_files(args))
    by_layer = [name for name, entry in FIGURES.items() if entry.by_layer]
    if args.json and args.figure not in by_layer:
        raise UserError(
            f"{args.figure} has no numbers by layer, as {', '.join(by_layer)} have. Leave --json "
            "out."
        )
    if args.figure == DETECTIONS and args.output.suffix != ".png":
        raise UserError(f"{DETECTIONS} is a picture. Set --output to a name that ends in .png.")
    material = Material(_arms(args), args.num_images)
    if args.figure == DETECTIONS:
        examples = [(e.image, e.truth, *e.found) for e in material.examples]
        titles = ("ground truth", *material.arms.groups)
        draw_detections(examples, material.class_names, args.output, titles)
        print(args.output)
        return
    if args.figure == "contributions":
        for group in material.arms.groups.values():
            compute_contributions(group[0])
    drawn = FIGURES[args.figure].draw(material)
    if args.json:
        # A layer may have no number, and JSON knows no NaN.
        values = json.loads(json.dumps(drawn.values), parse_constant=lambda _: None)
        write_text_whole(args.json, json.dumps(values, indent=1) + "\n")
    plots.save(drawn.figure, args.output)
    print(drawn.caption)
    print(args.output)
