#!/usr/bin/env python3
"""Make a trained classifier the backbone of a Detectron2 detector.

    export_backbone.py output/imagenet_resnet50/model_final.pth backbone.pth

Takes a checkpoint of a torchvision ResNet (also ResNeXt and wide ResNet) that this package trained,
whose config.yaml lies beside it, or plain torchvision weights. Beside the weights it writes the
settings that the detector needs as a config, backbone.yaml, and prints them as overrides for the
command line of train_net.py.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path
from typing import Any

import yaml

from repr_det.classification.export import export_backbone
from repr_det.engine.command_line import exit_status
from repr_det.engine.files import check_folder_of, write_text_whole
from repr_det.errors import UserError

# What torchvision's weights were trained with, times 255.
TORCHVISION_MEAN = [123.675, 116.28, 103.53]
TORCHVISION_STD = [58.395, 57.12, 57.375]


def classifier_input(config: Path) -> tuple[list[float], list[float], str]:
    """Mean, standard deviation and channel order that a classifier was trained with.

    Raises:
        UserError: no such file, or a config that does not hold them.
    """
    if not config.is_file():
        raise UserError(f"Config {config} does not exist: give that of the classifier.")
    try:
        settings = yaml.safe_load(config.read_text())
        model = settings["MODEL"]
        return model["PIXEL_MEAN"], model["PIXEL_STD"], settings["INPUT"]["FORMAT"]
    except (KeyError, TypeError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(
            f"{config} does not hold MODEL.PIXEL_MEAN, MODEL.PIXEL_STD and INPUT.FORMAT: give the "
            "config.yaml of the classifier's run."
        ) from error


def overrides(settings: dict[str, Any], prefix: str = "") -> list[str]:
    """Nested settings as ``KEY VALUE`` pairs of a command line."""
    pairs = []
    for key, value in settings.items():
        if isinstance(value, dict):
            pairs += overrides(value, f"{prefix}{key}.")
        else:
            pairs += [prefix + key, str(value)]
    return pairs


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", type=Path, help="checkpoint or torchvision weights")
    parser.add_argument("target", type=Path, help="file to write, ending in .pth")
    parser.add_argument(
        "--config",
        type=Path,
        help="config the classifier was trained with; by default config.yaml beside the source, "
        "and without one torchvision's pixel statistics and RGB",
    )
    parser.add_argument(
        "--format", choices=("RGB", "BGR"), default="RGB", help="channel order of the detector"
    )
    args = parser.parse_args(arguments)
    return exit_status(
        "export_backbone.py", lambda: _export(args), stopped="Stopped; nothing was written."
    )


def _export(args: argparse.Namespace) -> None:
    config = args.target.with_suffix(".yaml")
    check_folder_of("the weights", args.target)
    check_folder_of("the settings", config)
    beside = args.source.with_name("config.yaml")
    if args.config or beside.is_file():
        mean, std, order = classifier_input(args.config or beside)
    else:
        mean, std, order = TORCHVISION_MEAN, TORCHVISION_STD, "RGB"
    settings = export_backbone(args.source, args.target, mean, std, order, args.format)
    write_text_whole(config, yaml.safe_dump(settings, sort_keys=False, default_flow_style=None))
    print(f"Wrote {args.target} and {config}. Settings for the detector:")
    print(shlex.join(overrides(settings)))


if __name__ == "__main__":
    sys.exit(main())
