"""Does what Detectron2's ``default_setup`` does in two steps: first the process, then the folder.

Everything is built and checked between the two, so a mistake leaves no file.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from logging.handlers import MemoryHandler
from pathlib import Path

import torch
from detectron2.config import CfgNode
from detectron2.utils import comm
from detectron2.utils.collect_env import collect_env_info
from detectron2.utils.env import seed_all_rng
from detectron2.utils.logger import setup_logger

from repr_det.engine.allocator import keep_freed_memory
from repr_det.engine.device import check_device
from repr_det.errors import UserError

logger = logging.getLogger(f"detectron2.{__name__}")

_LOGGERS = ("detectron2", "fvcore")


def set_up_process(cfg: CfgNode, args: argparse.Namespace) -> MemoryHandler:
    """Set up logging to standard output, the random seed, and memory on a CPU. Write no file.

    Returns:
        Collects the log lines from now on, for :func:`open_run_folder`.

    Raises:
        UserError: ``OUTPUT_DIR`` cannot be a folder, or there is no such device.
    """
    check_device(cfg.MODEL.DEVICE)
    _check_output_dir(cfg.OUTPUT_DIR)
    rank = comm.get_rank()
    lines = MemoryHandler(sys.maxsize, flushLevel=sys.maxsize, flushOnClose=False)
    for name in _LOGGERS:
        setup_logger(distributed_rank=rank, name=name).addHandler(lines)
    logger.info(f"Rank of current process: {rank}. World size: {comm.get_world_size()}")
    logger.info(f"Environment info:\n{collect_env_info()}")
    logger.info(f"Command line arguments: {args}")
    logger.info(f"Running with full config:\n{cfg.dump()}")
    seed_all_rng(None if cfg.SEED < 0 else cfg.SEED + rank)
    if torch.device(cfg.MODEL.DEVICE).type == "cpu":
        keep_freed_memory()
    if not args.eval_only:
        torch.backends.cudnn.benchmark = cfg.CUDNN_BENCHMARK
    return lines


def open_run_folder(cfg: CfgNode, lines: MemoryHandler, *, keep_config: bool = False) -> None:
    """Make ``OUTPUT_DIR``, and write the log so far and the config into it.

    Args:
        cfg: the config; the main process writes it to ``config.yaml``.
        lines: what :func:`set_up_process` returned.
        keep_config: do not overwrite ``config.yaml``: it is that of the evaluated run.

    Raises:
        UserError: the folder cannot be written to.
    """
    folder, rank = Path(cfg.OUTPUT_DIR), comm.get_rank()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = logging.FileHandler(folder / ("log.txt" if rank == 0 else f"log.txt.rank{rank}"))
        config = folder / "config.yaml"
        if rank == 0 and not (keep_config and config.is_file()):
            config.write_text(cfg.dump())
    except OSError as error:
        raise UserError(
            f"OUTPUT_DIR {folder} cannot be written to ({error.strerror}). Set another one."
        ) from error
    file.setFormatter(
        logging.Formatter(
            "[%(asctime)s] %(name)s %(levelname)s: %(message)s", datefmt="%m/%d %H:%M:%S"
        )
    )
    lines.setTarget(file)
    lines.flush()
    for name in _LOGGERS:
        logging.getLogger(name).removeHandler(lines)
        logging.getLogger(name).addHandler(file)


def _check_output_dir(name: str) -> None:
    if not name:
        raise UserError("OUTPUT_DIR is empty. Set a folder.")
    folder = Path(name)
    # Path.exists raises where a folder may not be read.
    there = next(path for path in (folder, *folder.absolute().parents) if os.path.exists(path))
    if not os.path.isdir(there):
        raise UserError(f"OUTPUT_DIR {folder} is below {there}, which is a file. Set another one.")
