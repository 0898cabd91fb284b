#!/usr/bin/env python3
"""Draw one figure of a report as PNG or SVG, of runs or of any checkpoint.

tools/analyze.py curves output/standard output/repr -o curves.svg
tools/analyze.py cca output/demo -o cca.png
tools/analyze.py overlap_by_layer --config repr_faster_rcnn.yaml --weights model.pth -o overlap.png
tools/analyze.py contributions output/repr -o contributions.png

Of a run, its newest checkpoint is looked at. contributions, the greedy oracle, runs the network
once a filter and batch and keeps what it finds in the run's folder, for the report.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from repr_det.cli.arguments import add_data
from repr_det.detection.drawing import draw_detections
from repr_det.engine.command_line import exit_status
from repr_det.engine.files import check_folder_of, write_text_whole
from repr_det.errors import UserError
from repr_det.report import plots
from repr_det.report.compare import check_comparable
from repr_det.report.gallery import FIGURES, Material, class_names, compute_contributions
from repr_det.report.run import RunFolder, of_checkpoint, read_run
from repr_det.tasks import use_data

DETECTIONS = "detections"


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("figure", choices=[*FIGURES, DETECTIONS], metavar="FIGURE",
                        help=", ".join([*FIGURES, DETECTIONS]))  # fmt: skip
    parser.add_argument("runs", nargs="*", type=Path, metavar="RUN", help="a run's OUTPUT_DIR")
    parser.add_argument("--config-file", "--config", metavar="FILE", help="in place of runs")
    parser.add_argument("--weights", type=Path, metavar="FILE", help="a checkpoint for the config")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="FIGURE.png|svg")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the numbers by layer, too")
    parser.add_argument(
        "--images", type=int, default=32, help="held-out images to run networks on, default 32"
    )
    add_data(parser)
    args = parser.parse_args(arguments)
    return exit_status("analyze.py", lambda: _draw(args), stopped="Stopped; nothing was written.")


def _runs(args: argparse.Namespace) -> list[RunFolder]:
    if args.config_file or args.weights:
        if args.runs or not (args.config_file and args.weights):
            raise UserError("Give either runs, or --config and --weights together.")
        return [of_checkpoint(args.config_file, args.weights)]
    return [read_run(folder) for folder in args.runs]


def _draw(args: argparse.Namespace) -> None:
    plots.check_suffix(args.output)
    for option, path in (("--output", args.output), ("--json", args.json)):
        check_folder_of(option, path)
    by_layer = [name for name, entry in FIGURES.items() if entry.by_layer]
    if args.json and args.figure not in by_layer:
        raise UserError(
            f"{args.figure} has no numbers by layer, as {', '.join(by_layer)} have: leave --json "
            "out."
        )
    if args.figure == DETECTIONS and args.output.suffix != ".png":
        raise UserError(f"{DETECTIONS} is a picture: give --output a name that ends in .png.")
    runs = _runs(args)
    for run in runs:
        use_data(run.cfg, args)
    check_comparable(runs)
    material = Material(runs, args.images, sys.stderr.isatty())
    if args.figure == DETECTIONS:
        examples = [(e.image, e.truth, *e.found) for e in material.examples]
        titles = ("ground truth", *material.sides)
        names = class_names(runs[0])
        draw_detections(examples, names, args.output, titles, columns=1)
        print(args.output)
        return
    if args.figure == "contributions":
        for group in material.sides.values():
            compute_contributions(group[0])
    drawn = FIGURES[args.figure].draw(material)
    if args.json:
        # A layer may have no number, and JSON knows no NaN.
        values = json.loads(json.dumps(drawn.values), parse_constant=lambda _: None)
        write_text_whole(args.json, json.dumps(values, indent=1) + "\n")
    plots.save(drawn.figure, args.output)
    print(drawn.caption)
    print(args.output)


if __name__ == "__main__":
    sys.exit(main())
