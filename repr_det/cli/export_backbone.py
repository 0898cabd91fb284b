"""Make a trained classifier the backbone of a Detectron2 detector.

  repr-det export-backbone output/imagenet_resnet50 -o backbone.pth

SOURCE is a classification run, one of its checkpoints, or a file of torchvision's weights. The
network is a ResNet, ResNeXt or wide ResNet. The settings that the detector needs are written next
to the weights, as backbone.yaml, and printed as overrides for `repr-det train`.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path

import yaml

from repr_det.cli.arguments import add_config_file
from repr_det.errors import UserError

# What torchvision's weights were trained with, times 255.
TORCHVISION_MEAN = [123.675, 116.28, 103.53]
TORCHVISION_STD = [58.395, 57.12, 57.375]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command line."""
    parser.add_argument("source", type=Path, metavar="SOURCE", help="a run, or a file of weights")
    parser.add_argument("old_target", type=Path, nargs="?", help=argparse.SUPPRESS)
    parser.add_argument(
        "-o", "--output", type=Path, metavar="FILE.pth", help="write the backbone to this file"
    )
    add_config_file(
        parser,
        "config of the classifier (default: config.yaml next to the weights; without one, "
        "torchvision's pixel statistics and RGB)",
    )
    parser.add_argument(
        "--format", choices=("RGB", "BGR"), default="RGB", help="channel order of the detector"
    )


def run(args: argparse.Namespace) -> None:
    """Write the backbone and its settings.

    Raises:
        UserError: no such weights or config, or a network that Detectron2 does not have.
    """
    from repr_det.classification.export import export_backbone
    from repr_det.engine.checkpoint import has_run, last_checkpoint
    from repr_det.engine.config import flat_settings
    from repr_det.engine.files import check_output, write_text_whole

    target = args.output or args.old_target
    if target is None:
        raise UserError("Nothing would be written. Set --output FILE.pth.")
    if args.old_target:
        print(
            "repr-det export-backbone: TARGET without an option will be removed in 0.3. "
            "Use --output.",
            file=sys.stderr,
        )
    source = args.source
    if source.is_dir():
        if not has_run(source):
            raise UserError(f"{source} has no last_checkpoint. Pass the OUTPUT_DIR of a run.")
        source = last_checkpoint(source)
    settings_file = target.with_suffix(".yaml")
    check_output("--output", target, [source])
    check_output("the settings", settings_file)
    if settings_file.is_file() and not _is_ours(settings_file):
        raise UserError(
            f"The settings would replace {settings_file}, which is another file. Set another "
            "--output."
        )
    config = Path(args.config_file) if args.config_file else source.with_name("config.yaml")
    if args.config_file or config.is_file():
        mean, std, order = classifier_input(config)
    else:
        mean, std, order = TORCHVISION_MEAN, TORCHVISION_STD, "RGB"
    settings = export_backbone(source, target, mean, std, order, args.format)
    text = yaml.safe_dump(settings, sort_keys=False, default_flow_style=None)
    write_text_whole(settings_file, text)
    print(f"Wrote {target} and {settings_file}. Settings for the detector:")
    words = (word for key, value in flat_settings(settings).items() for word in (key, str(value)))
    print(shlex.join(words))


_KEYS = {"WEIGHTS", "PIXEL_MEAN", "PIXEL_STD", "RESNETS"}
"""What the settings hold below ``MODEL``."""


def _is_ours(path: Path) -> bool:
    """Whether a file has the keys that this command writes."""
    try:
        settings = yaml.safe_load(path.read_text())
        return {*settings} == {"MODEL", "INPUT"} and {*settings["MODEL"]} == _KEYS
    except (TypeError, yaml.YAMLError, UnicodeDecodeError):
        return False


def classifier_input(config: Path) -> tuple[list[float], list[float], str]:
    """Mean, standard deviation and channel order that a classifier was trained with.

    Raises:
        UserError: no such file, or a config that does not hold them.
    """
    if not config.is_file():
        raise UserError(f"Config {config} does not exist. Set --config-file to the classifier's.")
    try:
        settings = yaml.safe_load(config.read_text())
        model = settings["MODEL"]
        return model["PIXEL_MEAN"], model["PIXEL_STD"], settings["INPUT"]["FORMAT"]
    except (KeyError, TypeError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(
            f"{config} does not hold MODEL.PIXEL_MEAN, MODEL.PIXEL_STD and INPUT.FORMAT. Set "
            "--config-file to the config.yaml of the classifier's run."
        ) from error
