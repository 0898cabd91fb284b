"""The command line of training and evaluation, the same for every task."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import yaml
from detectron2.config import CfgNode
from detectron2.evaluation import verify_results
from detectron2.utils import comm
from torch.multiprocessing import ProcessExitedException

from repr_det.engine.checkpoint import SafeCheckpointer, has_run, last_checkpoint
from repr_det.engine.config import config_path, flat_settings
from repr_det.engine.processes import launch
from repr_det.engine.run_folder import open_run_folder, set_up_process
from repr_det.engine.trainer import RePrTrainer, check_weights
from repr_det.errors import UserError, tell

GRACE_S = 60.0
"""How long a process waits for the main process to report a mistake that both have made."""

TrainerFor = Callable[[CfgNode], type[RePrTrainer]]
Configure = Callable[[argparse.Namespace], CfgNode]


def merge_config_file(cfg: CfgNode, name: str, *, trusted: bool = True) -> str:
    """Merge a config file into a config, in place; returns its path.

    Args:
        cfg: the config.
        name: a path, or the bare name of a file in ``configs/``.
        trusted: allow YAML that executes code, as Detectron2 does. A run's own config never needs
            it.

    Raises:
        UserError: no such file, or it is not YAML, or the config does not accept it.
    """
    path = config_path(name)
    before = flat_settings(cfg)
    try:
        cfg.merge_from_file(path, allow_unsafe=trusted)
        if trusted:  # a run's own config has been used
            _check_no_none(cfg, before)
    except (
        *(yaml.YAMLError, UnicodeDecodeError),  # it is not YAML
        *(AttributeError, TypeError),  # it is YAML but no mapping
        *(KeyError, ValueError),  # the config does not know a key, or cannot take a value
        *(OSError, AssertionError, RecursionError),  # its _BASE_
    ) as error:
        raise UserError(f"Config {path} cannot be read ({_reason(error)}). Correct it.") from error
    return path


def merge_overrides(cfg: CfgNode, overrides: Sequence[str]) -> None:
    """Merge ``KEY VALUE`` pairs into a config, in place.

    Raises:
        UserError: an override that the config does not accept.
    """
    before = flat_settings(cfg)
    try:
        cfg.merge_from_list(list(overrides))
        _check_no_none(cfg, before)
    except (KeyError, ValueError, TypeError) as error:  # TypeError: below a key that is no section
        raise UserError(f"An override is wrong: {_reason(error)}. Correct it.") from error
    except AssertionError as error:
        raise UserError(f"Overrides must be KEY VALUE pairs of the config: {error}.") from error


def _check_no_none(cfg: CfgNode, before: dict[str, Any]) -> None:
    """Refuse None, which a config accepts for every key, unless it has a meaning."""
    for key, value in flat_settings(cfg).items():
        # None is "as SOLVER.WEIGHT_DECAY" in WEIGHT_DECAY_NORM and WEIGHT_DECAY_BIAS.
        if value is None and before.get(key) is not None and "WEIGHT_DECAY" not in key:
            raise ValueError(f"{key} is None")


def _reason(error: Exception) -> str:
    """The text of an error in one line, without the quotes of a KeyError."""
    text = error.args[0] if isinstance(error, KeyError) and error.args else error
    return " ".join(str(text).split()).rstrip(".")


def run(args: argparse.Namespace, configure: Configure, trainer_for: TrainerFor) -> None:
    """Train or evaluate as the command line says, in the number of processes that it says.

    Also joins processes that ``torchrun`` has started.

    Args:
        args: arguments that :mod:`repr_det.cli.train` has parsed.
        configure: makes the whole config from the parsed arguments.
        trainer_for: picks the trainer for a config.
    """
    try:
        launch(
            _in_process,
            args.num_gpus,
            num_machines=args.num_machines,
            machine_rank=args.machine_rank,
            dist_url=args.dist_url,
            args=(args, configure, trainer_for),
        )
    except ProcessExitedException as error:
        if error.exit_code != 2:
            raise
        sys.exit(2)  # the process itself has said why


def _in_process(args: argparse.Namespace, configure: Configure, trainer_for: TrainerFor) -> None:
    with _mistakes_in_one_sentence():
        cfg = configure(args)
        cfg.freeze()
        trainer_class = trainer_for(cfg)
        trainer_class.check(cfg)
        lines = set_up_process(cfg, args)
        if args.eval_only:
            resumed = args.resume and has_run(cfg.OUTPUT_DIR)
            weights = str(last_checkpoint(cfg.OUTPUT_DIR)) if resumed else cfg.MODEL.WEIGHTS
            if not cfg.DATASETS.TEST:
                raise UserError("DATASETS.TEST is empty. Set what to evaluate on.")
            trainer_class.check_to_evaluate(cfg, weights)
            model = trainer_class.build_model(cfg)
            check_weights(weights, required=True)
            SafeCheckpointer(model).load_whole(weights)
        else:
            trainer = trainer_class(cfg)
            trainer.resume_or_load(resume=args.resume)
            if trainer.cfg.SOLVER.REFERENCE_WORLD_SIZE != cfg.SOLVER.REFERENCE_WORLD_SIZE:
                cfg = trainer.cfg  # scaled to the processes; so are the iterations of all records
        open_run_folder(cfg, lines, keep_config=args.eval_only)
        # A loader may still meet a damaged file.
        results = trainer_class.test(cfg, model) if args.eval_only else trainer.train()
    if args.eval_only and comm.is_main_process():
        verify_results(cfg, results)


@contextmanager
def _mistakes_in_one_sentence() -> Iterator[None]:
    """Turn a user's mistake into one sentence, printed by one process, and exit status 2."""
    try:
        yield
    except UserError as error:
        if not comm.is_main_process():
            # The first process to end ends the others, so the main process must be first. If this
            # one is still running after a while, the mistake is its own.
            time.sleep(GRACE_S)
        tell("repr-det train", error)
        sys.exit(2)
