"""Detectron2's DefaultTrainer with RePr, for any task."""

from __future__ import annotations

import logging
import os
import re
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.engine import DefaultTrainer, HookBase, SimpleTrainer, create_ddp_model, hooks
from detectron2.engine.train_loop import TrainerBase
from detectron2.solver import LRMultiplier
from detectron2.utils import comm
from detectron2.utils.events import CommonMetricPrinter, EventWriter, TensorboardXWriter
from detectron2.utils.file_io import PathManager
from detectron2.utils.logger import setup_logger
from torch.optim import Optimizer

from repr_det.engine import solver
from repr_det.engine.amp import MixedPrecisionTrainer, amp_precision
from repr_det.engine.checkpoint import SafeCheckpointer, last_checkpoint
from repr_det.engine.data import check_batch_size
from repr_det.engine.hook import STATE_KEY, RePrHook
from repr_det.engine.hooks import LossNormalizer, RecordKeeper, SeedEveryStep, SharedStatistics
from repr_det.engine.randomness import use_deterministic_algorithms
from repr_det.engine.recording import LateJSONWriter
from repr_det.errors import UserError
from repr_det.method.schedule import SUB

logger = logging.getLogger(f"detectron2.{__name__}")


class RePrTrainer(DefaultTrainer):
    """The trainer of every task: Detectron2's, with RePr as ``cfg.REPR`` says.

    In addition to DefaultTrainer, it has mixed precision and DistributedDataParallel on a CPU,
    optimizers and schedules of this package, the RePr hook, and checks before training. A task
    adds its loaders and its evaluator.

    Args:
        cfg: a config from :func:`repr_det.engine.config.get_cfg` with the keys of the task.

    Raises:
        UserError: the config cannot work.
    """

    LENGTHS: tuple[str, ...] = ("SOLVER.CYCLE_ITERS", "REPR.S1", "REPR.S2", "REPR.WARMUP")
    """This package's keys that are lengths in iterations. A task adds its own."""

    def __init__(self, cfg: CfgNode) -> None:
        TrainerBase.__init__(self)
        if not logging.getLogger("detectron2").isEnabledFor(logging.INFO):
            setup_logger()
        self.check_to_train(cfg)
        cfg = _scaled_to(self.in_iterations(cfg), comm.get_world_size(), self.LENGTHS)
        _check_solver(cfg)
        device = torch.device(cfg.MODEL.DEVICE).type
        precision = None
        if cfg.SOLVER.AMP.ENABLED:
            precision = amp_precision(cfg.SOLVER.AMP.PRECISION, device)
        hook = RePrHook.from_config(cfg)
        if hook is not None:
            hook.check_fits(cfg.SOLVER.MAX_ITER)
        if cfg.DETERMINISTIC:
            if cfg.SEED < 0:
                raise UserError("DETERMINISTIC needs a seed. Set SEED to 0 or more.")
            if cfg.TEST.PRECISE_BN.ENABLED:
                raise UserError(
                    "TEST.PRECISE_BN reads batches whose order depends on the past, which "
                    "DETERMINISTIC excludes. Turn one of them off."
                )
            use_deterministic_algorithms()

        model = self.build_model(cfg)
        if cfg.MODEL.CHANNELS_LAST:
            model.to(memory_format=torch.channels_last)
        if cfg.MODEL.COMPILE:
            # In place, so that names in checkpoints do not change.
            getattr(model, "backbone", getattr(model, "network", model)).compile()
        optimizer = self.build_optimizer(cfg, model)
        data_loader = self.build_train_loader(cfg)
        device_ids = [comm.get_local_rank()] if device == "cuda" else None
        # Some parameters get no gradient (FPN levels that no head reads), or not on every image.
        # To look for them also stops DDP from rebuilding its buckets after the first backward. A
        # resumed run would rebuild them at another time and add gradients in another order.
        model = create_ddp_model(
            model, broadcast_buffers=False, device_ids=device_ids, find_unused_parameters=True
        )
        self._trainer = (
            SimpleTrainer(model, data_loader, optimizer)
            if precision is None
            else MixedPrecisionTrainer(
                model, data_loader, optimizer, device_type=device, precision=precision
            )
        )
        self.scheduler = self.build_lr_scheduler(cfg, optimizer)
        self.checkpointer = SafeCheckpointer(model, cfg.OUTPUT_DIR, trainer=weakref.proxy(self))
        self.start_iter = 0
        self.max_iter = cfg.SOLVER.MAX_ITER
        self.cfg = cfg
        self._repr_hook = hook
        self.register_hooks(self.build_hooks())

    @classmethod
    def check(cls, cfg: CfgNode) -> None:
        """Refuse a config whose data cannot be used. A task overrides this.

        Raises:
            UserError: what is wrong.
        """

    @classmethod
    def check_to_train(cls, cfg: CfgNode) -> None:
        """:meth:`check`, and further checks of the data before training.

        Raises:
            UserError: what is wrong.
        """
        cls.check(cfg)

    @classmethod
    def check_to_evaluate(cls, cfg: CfgNode, weights: str) -> None:
        """:meth:`check`, and further checks of the data before evaluation.

        Args:
            cfg: the config.
            weights: path of the checkpoint that is to be evaluated.

        Raises:
            UserError: what is wrong.
        """
        cls.check(cfg)

    @classmethod
    def training_images(cls, cfg: CfgNode) -> int:
        """The number of training images of a config; reads the data."""
        raise NotImplementedError

    @classmethod
    def in_iterations(cls, cfg: CfgNode) -> CfgNode:
        """The config with every length in iterations; may read the data."""
        return cfg

    def build_hooks(self) -> list[HookBase]:
        """Detectron2's hooks, with RePr's before those that save, evaluate and write."""
        built = super().build_hooks()
        before = next(
            i
            for i, hook in enumerate(built)
            if isinstance(hook, (hooks.PeriodicCheckpointer, hooks.EvalHook))
        )
        if self._repr_hook is not None:
            built.insert(before, self._repr_hook)
        if comm.get_world_size() > 1:
            # After PreciseBN, which changes the statistics.
            built.insert(before, SharedStatistics(self.cfg))
        if self.cfg.DETERMINISTIC:
            built.insert(0, SeedEveryStep(self.cfg.SEED))
        built.append(LossNormalizer())
        built.append(RecordKeeper(Path(self.cfg.OUTPUT_DIR) / "metrics.json"))
        return built

    def build_writers(self) -> list[EventWriter]:
        """Detectron2's writers, which make their files when they first write."""
        folder = Path(self.cfg.OUTPUT_DIR)
        return [
            CommonMetricPrinter(self.max_iter),
            LateJSONWriter(str(folder / "metrics.json")),
            TensorboardXWriter(str(folder)),
        ]

    def train(self) -> Any:
        """Train. A new run first renames ``last_checkpoint`` of an earlier run in its folder."""
        if comm.is_main_process():
            Path(self.cfg.OUTPUT_DIR).mkdir(parents=True, exist_ok=True)
            if self.start_iter == 0:
                # Until this run has a checkpoint, the earlier run's would be resumed and reported.
                self.checkpointer.set_aside_last_checkpoint()
        # TorchScript optimises a function after some runs, which changes the rounding. A resumed
        # run would do so at another iteration (RetinaNet's focal loss is scripted).
        with torch.jit.optimized_execution(not self.cfg.DETERMINISTIC):
            return super().train()

    def after_train(self) -> None:
        """Detectron2's hooks after the last iteration, or after an error.

        A run that is resumed after its last iteration writes its final checkpoint here: it may have
        been killed before it had one.
        """
        if self.iter > self.max_iter:  # only there; Detectron2 counts one too many
            if last_checkpoint(self.cfg.OUTPUT_DIR).name != "model_final.pth":
                self.iter: int = self.max_iter - 1
                self.storage.iter = self.iter
                self.checkpointer.save("model_final", iteration=self.iter)
            self.iter = self.max_iter
        super().after_train()

    @classmethod
    def build_model(cls, cfg: CfgNode) -> torch.nn.Module:
        """Detectron2's model of a config, on ``MODEL.DEVICE``.

        Raises:
            UserError: the config names something that is not registered.
        """
        try:
            return super().build_model(cfg)
        except KeyError as error:
            if not re.fullmatch(r"No object named '.*' found in '.*' registry!", error.args[0]):
                raise
            raise UserError(
                f"{error.args[0]} Correct MODEL.META_ARCHITECTURE or another name under MODEL, or "
                f"import what registers it."
            ) from error

    @classmethod
    def build_optimizer(cls, cfg: CfgNode, model: torch.nn.Module) -> Optimizer:
        """See :func:`repr_det.engine.solver.build_optimizer`."""
        return solver.build_optimizer(cfg, model)

    @classmethod
    def build_lr_scheduler(cls, cfg: CfgNode, optimizer: Optimizer) -> LRMultiplier:
        """See :func:`repr_det.engine.solver.build_lr_scheduler`."""
        return solver.build_lr_scheduler(cfg, optimizer)

    def resume_or_load(self, resume: bool = True) -> None:
        """Load the last checkpoint of ``OUTPUT_DIR`` if asked to and if there is one, else weights.

        Raises:
            UserError: the weights cannot be loaded, or this run cannot resume from the checkpoint.
        """
        resuming = resume and self.checkpointer.has_checkpoint()
        if resume and not resuming and self.checkpointer.has_set_aside():
            logger.warning(
                "There is no checkpoint to resume from, so training starts at iteration 0. To "
                "resume the earlier run in this folder, rename last_checkpoint.earlier to "
                "last_checkpoint."
            )
        if not resuming:
            check_weights(self.cfg.MODEL.WEIGHTS)
        super().resume_or_load(resume=resume)
        if resuming and self.start_iter > self.max_iter:
            raise UserError(
                f"SOLVER.MAX_ITER is {self.max_iter}, but the run in {self.cfg.OUTPUT_DIR} has "
                f"done {self.start_iter} iterations. Set as many or more, or another OUTPUT_DIR."
            )
        if resuming and self._repr_hook is not None:
            self._repr_hook.check_resumed(self.start_iter)
        if resuming and hasattr(self.data_loader, "set_iteration"):
            self.data_loader.set_iteration(self.start_iter)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the trainer's state from a checkpoint.

        Raises:
            UserError: the checkpoint was written in S2 and this run is without RePr, or with
                another optimizer or other options of it.
        """
        state = state_dict.get("hooks", {}).get(STATE_KEY, {})
        if self._repr_hook is None and state.get("phase") == SUB:
            raise UserError(
                "This checkpoint was written in S2 of a RePr run, with filters dropped, and "
                "REPR.ENABLED is False. Resume with RePr, or start a new run from it as "
                "MODEL.WEIGHTS."
            )
        solver.check_resumed(self.optimizer, state_dict["_trainer"]["optimizer"])
        super().load_state_dict(state_dict)


def check_weights(weights: str, *, required: bool = False) -> None:
    """Refuse weights that do not exist.

    Args:
        weights: a path or URL as in ``MODEL.WEIGHTS``.
        required: whether to refuse an empty path, too.

    Raises:
        UserError: they are not on disk, or cannot be downloaded.
    """
    if not weights:
        if required:
            raise UserError("MODEL.WEIGHTS is empty. Set the checkpoint of a trained model.")
        return
    try:
        path = PathManager.get_local_path(weights.partition("?")[0])
    except Exception as error:  # whatever the network layer raises
        raise UserError(
            f"MODEL.WEIGHTS {weights} could not be downloaded ({type(error).__name__}). Fetch it "
            f"where there is a network and set its path, or train from scratch with "
            f"MODEL.WEIGHTS ''."
        ) from error
    if not os.path.isfile(path):
        raise UserError(
            f"MODEL.WEIGHTS {weights} does not exist. Set the path of a checkpoint, or train from "
            f"scratch with MODEL.WEIGHTS ''."
        )


def _check_solver(cfg: CfgNode) -> None:
    """Refuse lengths and batches that Detectron2 divides by, where they are zero or do not fit."""
    for key in ("MAX_ITER", "CHECKPOINT_PERIOD"):
        if cfg.SOLVER[key] < 1:
            raise UserError(f"SOLVER.{key} is {cfg.SOLVER[key]}. Set 1 or more.")
    if cfg.DATALOADER.NUM_WORKERS < 0:
        raise UserError(f"DATALOADER.NUM_WORKERS is {cfg.DATALOADER.NUM_WORKERS}. Set 0 or more.")
    check_batch_size(cfg.SOLVER.IMS_PER_BATCH, comm.get_world_size())


def _scaled_to(cfg: CfgNode, num_workers: int, lengths: Sequence[str]) -> CfgNode:
    """Scale to the number of workers as Detectron2 does, also these lengths in iterations."""
    reference, batch_size = cfg.SOLVER.REFERENCE_WORLD_SIZE, cfg.SOLVER.IMS_PER_BATCH
    if reference and batch_size % reference:
        raise UserError(
            f"SOLVER.IMS_PER_BATCH is {batch_size}. Set a multiple of "
            f"SOLVER.REFERENCE_WORLD_SIZE, {reference}."
        )
    scaled = DefaultTrainer.auto_scale_workers(cfg, num_workers)
    if scaled is cfg:
        return cfg
    frozen = scaled.is_frozen()
    scaled.defrost()
    scale = num_workers / reference
    for length in lengths:
        section, key = length.split(".")
        scaled[section][key] = round(scaled[section][key] / scale)
    scaled.SOLVER.CYCLE_AMPLITUDE *= scale
    if frozen:
        scaled.freeze()
    return scaled
