"""Train or evaluate a detector or a classifier, with RePr or without.

  repr-det train --config-file repr_faster_rcnn.yaml --num-gpus 8 OUTPUT_DIR output/repr
  repr-det train --config-file repr_faster_rcnn.yaml --num-gpus 8 OUTPUT_DIR output/repr --resume
  repr-det train --config-file repr_faster_rcnn.yaml REPR.ENABLED False OUTPUT_DIR output/standard
  repr-det train --config-file repr_faster_rcnn.yaml --eval-only MODEL.WEIGHTS model_final.pth

With torchrun, its processes are used: torchrun --nproc-per-node 8 -m repr_det train ...
"""

from __future__ import annotations

import argparse

from repr_det.cli.arguments import add_config_file, add_data, add_overrides
from repr_det.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command line: Detectron2's arguments, and datasets by their files."""
    add_config_file(parser)
    parser.add_argument(
        "--resume", action="store_true", help="continue from the last checkpoint in OUTPUT_DIR"
    )
    parser.add_argument("--eval-only", action="store_true", help="evaluate without training")
    parser.add_argument(
        "--num-gpus", type=int, default=1, metavar="N", help="processes on each machine, one a GPU"
    )
    parser.add_argument(
        "--num-machines", type=int, default=1, metavar="N", help="number of machines"
    )
    parser.add_argument(
        "--machine-rank", type=int, default=0, metavar="K", help="number of this machine, from 0"
    )
    parser.add_argument(
        "--dist-url",
        default="auto",
        metavar="URL",
        help="address where processes meet: tcp://HOST:PORT, or auto on one machine",
    )
    add_data(parser)
    add_overrides(parser)


def run(args: argparse.Namespace) -> None:
    """Train or evaluate in as many processes as the command line says.

    Raises:
        UserError: a mistake that is found before processes start. Later ones end the program with
            exit status 2.
    """
    for option in ("num_gpus", "num_machines"):
        if getattr(args, option) < 1:
            name = "--" + option.replace("_", "-")
            raise UserError(f"{name} is {getattr(args, option)}. Set it to 1 or more.")
    if not 0 <= args.machine_rank < args.num_machines:
        raise UserError(
            f"--machine-rank is {args.machine_rank} for --num-machines {args.num_machines}. "
            f"Set it to a number from 0 to {args.num_machines - 1}."
        )
    if args.num_machines > 1 and args.dist_url == "auto":
        raise UserError(
            f"--num-machines is {args.num_machines}, and --dist-url is auto. "
            "Set --dist-url tcp://HOST:PORT, the same on every machine."
        )
    from repr_det.engine import command_line
    from repr_det.tasks import configure, trainer_for

    command_line.run(args, configure, trainer_for)
