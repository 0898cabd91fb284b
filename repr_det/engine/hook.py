"""RePr as a hook of any Detectron2 trainer."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.engine import HookBase
from detectron2.engine.hooks import EvalHook, PeriodicWriter
from detectron2.engine.train_loop import AMPTrainer, TrainerBase
from detectron2.utils import comm
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from repr_det.engine import recording
from repr_det.engine.amp import MixedPrecisionTrainer
from repr_det.engine.averages import unknown_averages
from repr_det.engine.batches import own_batches, training_loss
from repr_det.engine.randomness import RandomStream
from repr_det.errors import UserError
from repr_det.method.compact import MODES, Compact, Shrunk, rewrapped
from repr_det.method.controller import PhaseChange, RePr
from repr_det.method.criteria import mean_overlap
from repr_det.method.layers import FilterLayer
from repr_det.method.reinit import Reinit
from repr_det.method.schedule import FULL, SUB, RePrSchedule
from repr_det.method.settings import check_whole

logger = logging.getLogger(f"detectron2.{__name__}")

MEASURING_PAYS_FROM = 600
"""Iterations in S2 from which on ``compact="auto"`` measures: it takes the time of about 16."""

WORTHWHILE = 1.03
"""Factor by which the smaller network must be faster for ``compact="auto"`` to use it."""

LONG_ENOUGH = 20_000
"""Iterations from which on a run from loaded weights is not warned: shorter ones lost accuracy."""

STATE_KEY = "RePrHook"
"""Where this hook's state lies in a checkpoint: ``trainer.hooks[STATE_KEY]``."""


class RePrHook(HookBase):
    """Trains with RePr in any trainer that has ``.model`` and ``.optimizer``.

    Register it before ``resume_or_load``; it looks at the trainer then and refuses what cannot
    work.
    It acts before a step, so a checkpoint written after any step resumes exactly there.

    Scalars: ``repr/phase`` (0 full, 1 sub), ``repr/cycle`` and ``repr/num_pruned`` at every step;
    ``repr/overlap`` (mean plain Ortho score over surviving filters) and ``repr/overlap/<layer>``
    before each drop, after each return and at every evaluation. For TensorBoard, at drops and
    returns: histograms ``repr/filter_overlap/<layer>``, and the image ``repr/dropped``, the share
    of each layer (down) that each drop (across) took.
    Which filters each drop took, and the overlap around it, is written to ``repr_history.json`` in
    the ``OUTPUT_DIR`` of the trainer's config, if it has one.

    Args:
        schedule: when, in iterations.
        compact: whether the pruned filters are taken out of the network physically during S2:
            ``"on"``, ``"off"``, or ``"auto"``: where a measurement at the first drop shows that it
            is faster. Which it is may differ from run to run and then so do the last digits;
            hence ``"auto"`` means off where torch's deterministic algorithms are on, and where S2
            is too short for the measurement to pay. See :mod:`repr_det.method.compact`.
        arguments: every argument of :class:`repr_det.RePr` after the schedule, by keyword;
            ``batches`` and ``loss`` default to the trainer's data and the model's losses (where its
            loader is not one of torch's, Detectron2's or this package's, pass ``batches``, from a
            loader of its own), ``progress`` to a bar on the main process.

    Raises:
        UserError: on registration, whatever :class:`repr_det.RePr` refuses; a schedule that would
            end the run pruned; AMP on a trainer that cannot run it; a run that was resumed already;
            an unknown value of ``compact``.
    """

    def __init__(self, schedule: RePrSchedule, *, compact: str = "auto", **arguments: Any) -> None:
        if compact not in MODES:
            raise UserError(
                f"RePr: compact (REPR.COMPACT) is {compact!r}; give one of {', '.join(MODES)}."
            )
        for name in ("seed", "warmup"):
            check_whole(name, arguments.get(name, 0))
        self.schedule = schedule
        self._mode = compact
        # Whether to take pruned filters out; None: not decided yet.
        self._compacts = {"auto": None, "on": True, "off": False}[compact]
        self._compact: Compact
        self._resized = False  # since the model was wrapped, if only for a while
        self.method: RePr
        self._arguments = arguments
        self._trainer: TrainerBase | None = None
        self._has_state = False
        self._eval_period = 0
        self._after_writers = False
        self._overlaps: list[recording.Overlap] = []
        self._num_pruned = 0  # kept, since counting costs more than the rest of a step
        self._sums_at_start: dict[str, float] = {}  # of weights, to see what is loaded afterwards

    @classmethod
    def from_config(cls, cfg: CfgNode) -> RePrHook | None:
        """The hook that ``cfg.REPR`` describes, S1 and S2 in iterations; None if not enabled.

        Raises:
            UserError: values out of range, or a unit that is not iterations.
        """
        if not cfg.REPR.ENABLED:
            return None
        keys = cfg.REPR
        if keys.UNIT != "iteration":
            raise UserError(
                f"REPR.UNIT is {keys.UNIT!r}, which this task cannot turn into iterations: "
                f"give S1 and S2 in iterations and REPR.UNIT iteration."
            )
        return cls(
            RePrSchedule(keys.S1, keys.S2, keys.N),
            prune_ratio=keys.PRUNE_RATIO,
            criterion=keys.CRITERION,
            include=list(keys.INCLUDE),
            exclude=list(keys.EXCLUDE),
            max_layer_ratio=keys.MAX_LAYER_RATIO,
            compact=keys.COMPACT,
            warmup=keys.WARMUP,
            seed=keys.SEED,
            reinit=Reinit(**{key.lower(): value for key, value in keys.REINIT.items()}),
        )

    @property
    def trainer(self) -> TrainerBase | None:
        """The trainer; setting it, as ``register_hooks`` does, builds the method for it."""
        return self._trainer

    @trainer.setter
    def trainer(self, trainer: TrainerBase) -> None:
        self._trainer = trainer
        if isinstance(getattr(trainer, "_trainer", trainer), AMPTrainer) and not (
            torch.cuda.is_available()
        ):
            raise UserError(
                "SOLVER.AMP.ENABLED needs a GPU in Detectron2's own AMPTrainer and there is none: "
                "turn AMP off, or train with repr_det's trainer, which runs bfloat16 on a CPU."
            )
        # A checkpointer of one's own may set the one or the other.
        resumed = max(getattr(trainer, "start_iter", 0), getattr(trainer, "iter", 0))
        if resumed > 0:
            raise UserError(
                f"RePrHook was registered after the run was resumed at iteration {resumed}, so it "
                f"has no state: register it before resume_or_load."
            )
        if hasattr(trainer, "max_iter"):
            self.check_fits(trainer.max_iter)
        seed = self._arguments.get("seed", 0) + comm.get_rank()
        if self._mode == "on" and _deeply_wrapped(trainer.model):
            raise UserError(
                "RePr: compact (REPR.COMPACT) is on, but the model's DistributedDataParallel lies "
                "inside another wrapper and cannot be renewed: wrap it last, or turn compact off."
            )
        defaults: dict[str, Any] = {"loss": training_loss, "progress": filter_progress}
        defaults["batches"] = own_batches(getattr(trainer, "data_loader", None), seed)
        arguments = {**defaults, **self._arguments}
        self.method = RePr(trainer.model, trainer.optimizer, self.schedule, **arguments)
        self._compact = Compact(
            trainer.model,
            trainer.optimizer,
            copies=arguments.get("copies", ()),
            batches=arguments.get("batches"),
            loss=arguments["loss"],
            precision=_precision(trainer),
            agree=lambda found: comm.all_gather(found)[0],
        )
        layers = self.method.layers
        self._sums_at_start = _sums(layers)
        logger.info(
            f"RePr: {sum(layer.num_filters for layer in layers)} filters of {len(layers)} conv "
            f"layers take part; {self.schedule.cycles} cycles of {self.schedule.s1} + "
            f"{self.schedule.s2} iterations, then full training from {self.schedule.end}."
        )

    def check_fits(self, max_iter: int) -> None:
        """Refuse a training length that the schedule does not fit; see :class:`RePrSchedule`.

        Raises:
            UserError: it does not.
        """
        self.schedule.check_fits(max_iter, self._arguments.get("warmup", 0))

    def before_train(self) -> None:
        """Check what only the start of training shows, and look for evaluations to follow."""
        self.check_fits(self.trainer.max_iter)
        self.check_resumed(self.trainer.start_iter)
        self._num_pruned = self.method.num_pruned
        self._look_for_averages()
        self._warn_of_loaded_weights()
        self._begin_history()
        zero = self.method.count_zero_filters()
        if zero:
            names = ", ".join(f"{name} ({count})" for name, count in list(zero.items())[:5])
            logger.warning(
                f"RePr: the starting weights hold {sum(zero.values())} filters of zero norm; they "
                f"are dropped first: {names}{', ...' if len(zero) > 5 else ''}."
            )
        hooks = self.trainer._hooks
        self._after_writers = any(isinstance(h, PeriodicWriter) for h in hooks[: hooks.index(self)])
        periods = [h._period for h in hooks if isinstance(h, EvalHook)]
        self._eval_period = periods[0] if periods else 0

    def check_resumed(self, start_iter: int) -> None:
        """Refuse to go on with a run whose checkpoint held no state of this hook.

        Raises:
            UserError: the run goes on at a later iteration than 0 and no state was loaded.
        """
        if start_iter > 0 and not self._has_state:
            raise UserError(
                f"This run goes on at iteration {start_iter}, but its checkpoint holds no RePr "
                f"state (made without RePr?): start a new run with it as MODEL.WEIGHTS."
            )

    def _warn_of_loaded_weights(self) -> None:
        """Warn of a short run that starts from loaded weights, which the default would destroy."""
        short = self.trainer.max_iter - self.trainer.start_iter < LONG_ENOUGH
        if self.trainer.start_iter > 0 or not short or self.method.reinit.as_it_was:
            return
        sums = _sums(self.method.layers)
        loaded = [
            layer.name
            for layer in self.method.layers
            if sums[layer.name] != self._sums_at_start[layer.name] or _has_statistics(layer)
        ]
        if loaded:
            logger.warning(
                f"RePr: {len(loaded)} of {len(sums)} layers that take part start from loaded "
                f"weights, and the run has fewer than {LONG_ENOUGH:,} iterations. In a first look "
                f"(one seed, 252 images, 600 iterations) new orthogonal filters lost a third to a "
                f"half of a pretrained detector's AP (20.8 instead of 29.5). Set "
                f"REPR.REINIT.DIRECTION to previous, in code reinit=Reinit(direction='previous'), "
                f"or train without RePr (REPR.ENABLED False)."
            )

    def _look_for_averages(self) -> None:
        """Say where something is kept in step with the model by others, which RePr cannot."""
        trainer = self.trainer
        others = [hook for hook in trainer._hooks if hook is not self]
        holders = [trainer, getattr(trainer, "_trainer", None), *others]
        known = self._arguments.get("copies", ())
        mine = unknown_averages(holders, trainer.model, known)
        # Some hooks are the first rank's alone, and all must go on alike.
        averages = sorted(set().union(*comm.all_gather(mine)))
        if not averages:
            return
        stays = ""
        if self._mode == "auto":
            self._compacts = False
            stays = "; pruned filters stay in the network as zeros (REPR.COMPACT auto)"
        logger.warning(
            f"RePr: {', '.join(averages)} looks like an average of the model's weights, and at "
            f"drops and returns it is left behind: pass it to RePrHook as copies=[...], or take no "
            f"notice if it is none{stays}."
        )

    def before_step(self) -> None:
        """Do what is due, log it, and record the phase."""
        iteration = self.trainer.iter
        if self.schedule.phase(iteration).name == SUB and self.method.phase == FULL:
            self._record_overlap(detailed=True)
        if self.method.due(iteration):
            self._grow()
        for change in self.method.step(iteration):
            self._num_pruned = self.method.num_pruned
            logger.info(_one_line(change))
            for line in _layer_lines(change):
                logger.info(line)
            if change.kind == "return":
                self._record_overlap(detailed=True)
            self._write_history()
            if change.kind == "drop":
                picture = recording.picture(self._history())
                self.trainer.storage.put_image("repr/dropped", picture)
        if self.method.phase == SUB and self._takes_out() and not self._compact.active:
            self._shrink()
        if self._resized:
            if isinstance(self.trainer.model, DistributedDataParallel):
                self.trainer.model = rewrapped(self.trainer.model)
            self._resized = False
        self.trainer.storage.put_scalars(
            **{
                "repr/phase": float(self.method.phase == SUB),
                "repr/cycle": self.method.cycle,
                "repr/num_pruned": self._num_pruned,
            },
            smoothing_hint=False,
        )

    def after_step(self) -> None:
        """Record the overlap where an evaluation is due, and at the end.

        Under the next iteration where the writers, done with this one, come before this hook.
        """
        done = self.trainer.iter + 1
        due = self._eval_period and done % self._eval_period == 0
        if due or done == self.trainer.max_iter:
            self.trainer.storage.iter = done if self._after_writers else self.trainer.iter
            self._record_overlap()
            self.trainer.storage.iter = self.trainer.iter

    def after_train(self) -> None:
        """Leave a full-size model behind, also where training was interrupted in S2."""
        self._grow()

    def state_dict(self) -> dict[str, Any]:
        """The method's state, and what ``compact="auto"`` decided."""
        decided = self._compacts if self._mode == "auto" else None
        return {**self.method.state_dict(), "compact": decided}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from the method's state; raises ValueError where it does not fit."""
        self._grow()
        self.method.load_state_dict(state)
        if self._mode == "auto":
            self._compacts = state.get("compact")
        self._has_state = True

    # --- the physically smaller network

    def _grow(self) -> None:
        self._resized |= self._compact.active
        self._compact.grow()

    def _takes_out(self) -> bool:
        if self._compacts is None:
            self._compacts = self._measure()
        return self._compacts

    def _shrink(self) -> None:
        problem = ""
        self._resized = True
        try:
            with RandomStream(0).active():
                shrunk = self._compact.shrink(self.method)
        except RuntimeError as error:
            problem = str(error)
        if problems := [found for found in comm.all_gather(problem) if found]:
            self._compact.grow()
            self._compacts = False
            logger.warning(f"RePr: {problems[0]}; pruned filters stay in the network as zeros.")
            return
        logger.info(_cost_line(shrunk))

    def _measure(self) -> bool:
        """Whether the smaller network is faster, on average over ranks; the same on all of them."""
        stays = "pruned filters stay in the network as zeros (REPR.COMPACT auto)."
        if torch.are_deterministic_algorithms_enabled():
            logger.info(f"RePr: a deterministic run measures no times, so {stays}")
            return False
        if self._arguments.get("copies"):
            logger.info(f"RePr: an average may be updated through its state dict, so {stays}")
            return False
        if _deeply_wrapped(self.trainer.model):
            logger.info(
                f"RePr: DistributedDataParallel lies inside another wrapper and cannot be renewed "
                f"for a smaller network, so {stays}"
            )
            return False
        total = self.schedule.s2 * self.schedule.cycles
        if total < MEASURING_PAYS_FROM:
            logger.info(f"RePr: {total} iterations in S2 are too few to measure times, so {stays}")
            return False
        self._resized = True
        try:
            with RandomStream(0).active():
                mine = self._compact.speedup(self.method)
        except Exception as error:  # what a foreign model raises when it cannot be made smaller
            logger.warning(f"RePr: {type(error).__name__}: {error}; {stays}")
            mine = 0.0
        speedups = comm.all_gather(mine)
        speedup = sum(speedups) / len(speedups) if min(speedups) > 0 else 0.0
        logger.info(f"RePr: measured, the smaller network of S2 is {speedup:.2f} times as fast.")
        return speedup >= WORTHWHILE

    # --- the history of the run

    def _history(self) -> recording.History:
        return recording.of_state(self.method.state_dict(), self._overlaps)

    @property
    def _folder(self) -> Path | None:
        """Where the history is written; None in a process that does not write."""
        folder = getattr(getattr(self.trainer, "cfg", None), "OUTPUT_DIR", "")
        return Path(folder) if folder and comm.is_main_process() else None

    def _begin_history(self) -> None:
        """Forget what came after the checkpoint of a resumed run, or is of another run."""
        start, folder = self.trainer.start_iter, self._folder
        self._overlaps = []
        if folder is not None and start > 0:
            try:
                found = recording.read(folder)
            except ValueError as error:
                logger.warning(f"RePr: {error}")
                found = None
            if found is not None:
                self._overlaps = [o for o in found.overlaps if o.iteration < start]
        self._write_history()

    def _write_history(self) -> None:
        if (folder := self._folder) is None:
            return
        try:
            folder.mkdir(parents=True, exist_ok=True)
            recording.write(folder, self._history())
        except OSError as error:  # the checkpoints hold it, too
            logger.warning(f"RePr: {recording.FILE} could not be written ({error}).")

    def _record_overlap(self, detailed: bool = False) -> None:
        by_filter = self.method.filter_overlap()
        overlap = mean_overlap(by_filter)
        if detailed:
            self._overlaps.append(recording.Overlap(self.trainer.iter, overlap))
        if detailed and comm.is_main_process():
            for name, values in by_filter.items():
                values = values[~values.isnan()].cpu()
                if len(values):
                    self.trainer.storage.put_histogram(f"repr/filter_overlap/{name}", values, 30)
        scalars = {f"repr/overlap/{name}": value for name, value in overlap.items()}
        surviving = {name: int((~mask).sum()) for name, mask in self.method.pruned.items()}
        scalars["repr/overlap"] = sum(
            value * surviving[name] for name, value in overlap.items()
        ) / sum(surviving.values())
        self.trainer.storage.put_scalars(**scalars, smoothing_hint=False)


def _sums(layers: Sequence[FilterLayer]) -> dict[str, float]:
    return {layer.name: float(layer.weight.detach().double().sum()) for layer in layers}


def _has_statistics(layer: FilterLayer) -> bool:
    """Whether the layer's norms have seen data: weights loaded before the hook was registered."""
    means = [mean for link in layer.norms for mean, _ in link.running_statistics()]
    return any(bool(mean.any()) for mean in means)


def filter_progress(filters: Sequence[Any]) -> Iterable[Any]:
    """A bar over filters that a criterion goes through, on the main process."""
    return tqdm(
        filters, "RePr oracle", unit="filter", leave=False, disable=not comm.is_main_process()
    )


def _precision(trainer: TrainerBase) -> Callable[[], Any]:
    """What a trainer runs its model in."""
    trainer = getattr(trainer, "_trainer", trainer)
    if isinstance(trainer, MixedPrecisionTrainer):
        return trainer.autocast
    if isinstance(trainer, AMPTrainer):
        return partial(torch.autocast, "cuda", dtype=trainer.precision)
    return nullcontext


def _deeply_wrapped(model: nn.Module) -> bool:
    """Whether there is a DistributedDataParallel that is not the outermost module."""
    return any(isinstance(m, DistributedDataParallel) for m in model.modules() if m is not model)


def _cost_line(shrunk: Shrunk) -> str:
    before, after = shrunk.before, shrunk.after
    return (
        f"RePr: {shrunk.removed} of {shrunk.removed + shrunk.kept} pruned filters are out of the "
        f"network during S2, the others stay as zeros: {before.parameters:,} parameters become "
        f"{after.parameters:,}, and {before.multiply_adds / 1e6:,.1f} million multiply-adds of a "
        f"forward pass {after.multiply_adds / 1e6:,.1f} million."
    )


def _one_line(change: PhaseChange) -> str:
    touched = [layer for layer in change.layers if layer.pruned]
    filters = sum(layer.pruned for layer in touched)
    total = sum(layer.filters for layer in change.layers)
    most = max(touched, key=lambda layer: layer.pruned / layer.filters)
    what = "dropped" if change.kind == "drop" else "brought back"
    return (
        f"RePr cycle {change.cycle}: {what} {filters} of {total} filters in {len(touched)} of "
        f"{len(change.layers)} layers, the largest share {most.pruned}/{most.filters} in "
        f"{most.name}."
    )


def _layer_lines(change: PhaseChange) -> Sequence[str]:
    if change.kind != "drop":
        return []
    return [
        f"  {layer.name}: {layer.filters} filters, {layer.pruned} pruned, "
        f"mean score {layer.mean_score:.4f}"
        for layer in change.layers
    ]
