"""RePr as a hook of any Detectron2 trainer."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.engine import HookBase
from detectron2.engine.hooks import EvalHook, PeriodicWriter
from detectron2.engine.train_loop import AMPTrainer, TrainerBase
from detectron2.utils import comm
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from repr_det.engine.amp import MixedPrecisionTrainer
from repr_det.engine.batches import own_batches, training_loss
from repr_det.engine.parallel import reason_against_other_sizes, renew_buckets
from repr_det.engine.randomness import RandomStream
from repr_det.engine.recording import Recorder
from repr_det.errors import UserError
from repr_det.method.compact import MODES, Compact, Shrunk, Speed
from repr_det.method.controller import PhaseChange, RePr
from repr_det.method.layers import FilterLayer
from repr_det.method.modules import unwrap
from repr_det.method.ranks import group_of, objects_of_all_ranks, rank_in
from repr_det.method.reinit import Reinit
from repr_det.method.schedule import FULL, SUB, RePrSchedule
from repr_det.method.settings import check_whole

logger = logging.getLogger(f"detectron2.{__name__}")

MEASURING_PAYS_FROM = 600
"""Iterations in S2, over all cycles, from which ``compact="auto"`` measures the smaller network's
speed. To measure takes as long as about 25 iterations, so about 4 % of S2 at most."""

WORTHWHILE = 1.03
"""Factor by which the smaller network must be faster for ``compact="auto"`` to use it."""

SHORT_RUN = 20_000
"""A run of fewer iterations from loaded weights gets a warning: such runs lost accuracy."""

SMALL_SHARE = 0.1
"""Share of the trainable weights below which the log says how little takes part."""

STATE_KEY = "RePrHook"
"""Where Detectron2 puts this hook's state in a checkpoint: ``trainer.hooks[STATE_KEY]``."""


class RePrHook(HookBase):
    """Trains with RePr in any trainer that has ``.model`` and ``.optimizer``.

    Register it before ``resume_or_load``. Registration checks the trainer and refuses what cannot
    work. The hook changes the model only before a step, so a checkpoint that is written after a
    step never holds half a change.

    It writes these scalars: ``repr/phase`` (0 full, 1 sub), ``repr/cycle`` and ``repr/num_pruned``
    at every step; ``repr/overlap`` and ``repr/overlap/<layer>`` before each drop, after each
    return, at every evaluation and at the end. The overlap is the mean over surviving filters of
    :func:`repr_det.method.criteria.filter_overlap`. For TensorBoard, drops and returns add
    histograms ``repr/filter_overlap/<layer>``. Drops add the image ``repr/dropped``: rows are
    layers, columns are drops, values are the share of the layer that was dropped.
    ``repr_history.json`` in the ``OUTPUT_DIR`` of the trainer's config, if it has one, lists the
    filters of each drop, and the overlap before and after it.

    Args:
        schedule: when filters are dropped and returned, in iterations. In each cycle, S1 trains all
            filters, and S2 trains without those that are dropped.
        compact: whether the pruned filters are removed from the network physically during S2:
            ``"on"``, ``"off"``, or ``"auto"``, which measures at the first drop whether that is
            faster. The measurement may come out differently from run to run, and the last digits
            of the weights with it. So ``"auto"`` means off where torch's deterministic algorithms
            are on. It also means off where S2 is too short for the measurement to pay, and where
            ``copies`` are passed. See :mod:`repr_det.method.compact`.
        arguments: every argument of :class:`repr_det.RePr` after the schedule, by keyword. By
            default, ``batches`` are the trainer's data, ``loss`` is the sum of the model's losses,
            and ``progress`` is a bar on the main process. Pass ``batches``, from a loader of its
            own, where the trainer's loader is not torch's, Detectron2's or this package's.

    Raises:
        UserError: an unknown value of ``compact``. On registration: what :class:`repr_det.RePr`
            refuses, a schedule that would end in S2, AMP on a trainer that cannot run it, or a
            run that was already resumed.
    """

    def __init__(self, schedule: RePrSchedule, *, compact: str = "auto", **arguments: Any) -> None:
        if compact not in MODES:
            raise UserError(
                f"RePr: compact (REPR.COMPACT) is {compact!r}. Set one of {', '.join(MODES)}."
            )
        for name in ("seed", "warmup"):  # used here before RePr checks them
            check_whole(name, arguments.get(name, 0))
        self.schedule = schedule
        self._mode = compact
        # Whether to remove pruned filters physically. None: the measurement will decide.
        self._removal_decision: bool | None = {"auto": None, "on": True, "off": False}[compact]
        # Whether parameters changed their sizes since DistributedDataParallel made its buckets.
        self._resized = False
        self._arguments = arguments
        self._trainer: TrainerBase | None = None
        self._has_state = False  # whether a state was loaded
        self._num_pruned = 0  # counted when it changes, not at every step
        # Sums of weights on registration. Where one differs later, weights were loaded.
        self._sums_at_registration: dict[str, float] = {}
        # What weights_alike() found at the start. What differs later may be an average of weights.
        self._maybe_averages_at_start: dict[str, Any] = {}
        # These three are made on registration. ``_compact`` removes filters and puts them back.
        self.method: RePr
        self._compact: Compact
        self._recorder: Recorder

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
                f"REPR.UNIT is {keys.UNIT!r}, which this trainer cannot turn into iterations. "
                f"Set S1 and S2 in iterations and REPR.UNIT iteration."
            )
        return cls(
            RePrSchedule(keys.S1, keys.S2, keys.N),
            prune_ratio=keys.PRUNE_RATIO,
            criterion=keys.CRITERION,
            include=list(keys.INCLUDE),
            exclude=list(keys.EXCLUDE),
            linear=keys.LINEAR,
            max_layer_ratio=keys.MAX_LAYER_RATIO,
            compact=keys.COMPACT,
            warmup=keys.WARMUP,
            seed=keys.SEED,
            reinit=Reinit(**{key.lower(): value for key, value in keys.REINIT.items()}),
        )

    @property
    def trainer(self) -> TrainerBase | None:
        """The trainer. Setting it builds the method for it; ``register_hooks`` does so."""
        return self._trainer

    @trainer.setter
    def trainer(self, trainer: TrainerBase) -> None:
        self._trainer = trainer
        self._check(trainer)
        self._build(trainer)

    def _check(self, trainer: TrainerBase) -> None:
        """Refuse a trainer that this hook cannot work with."""
        if isinstance(_stepper(trainer), AMPTrainer) and not torch.cuda.is_available():
            raise UserError(
                "SOLVER.AMP.ENABLED needs a GPU in Detectron2's own AMPTrainer and there is none. "
                "Turn AMP off, or train with repr_det's trainer, which runs bfloat16 on a CPU."
            )
        # A custom checkpointer may set only one of the two when it resumes.
        resumed = max(getattr(trainer, "start_iter", 0), getattr(trainer, "iter", 0))
        if resumed > 0:
            raise UserError(
                f"RePrHook was registered after the run was resumed at iteration {resumed}, so it "
                f"has no state. Register it before resume_or_load."
            )
        if hasattr(trainer, "max_iter"):  # others get it in train(), before before_train()
            self.check_fits(trainer.max_iter)
        if self._mode == "on" and (reason := reason_against_other_sizes(trainer.model)):
            raise UserError(
                f"RePr: compact (REPR.COMPACT) is on, but {reason}, so the network cannot become "
                f"smaller. Set compact to off."
            )

    def _build(self, trainer: TrainerBase) -> None:
        """Build the method for the trainer's model, its recorder and what makes it smaller."""
        self._group = group_of(trainer.model)
        # Each rank has its own batches.
        seed = self._arguments.get("seed", 0) + rank_in(self._group)
        defaults: dict[str, Any] = {"loss": training_loss, "progress": filter_progress}
        defaults["batches"] = own_batches(getattr(trainer, "data_loader", None), seed)
        arguments = {**defaults, **self._arguments}
        self.method = RePr(trainer.model, trainer.optimizer, self.schedule, **arguments)
        self._recorder = Recorder(self.method, trainer)
        self._compact = Compact(self.method, _precision(trainer))
        layers = self.method.layers
        self._sums_at_registration = _sums(layers)
        logger.info(
            f"RePr: {sum(layer.num_filters for layer in layers)} filters of {_kinds(self.method)} "
            f"layers take part; {self.schedule.cycles} cycles of {self.schedule.s1} + "
            f"{self.schedule.s2} iterations, then full training from {self.schedule.end}."
        )
        if line := _small_share(self.method, trainer.model):
            logger.info(line)

    def check_fits(self, max_iter: int) -> None:
        """Refuse a training length that the schedule does not fit; callable before registration.

        Raises:
            UserError: it does not; see :meth:`RePrSchedule.check_fits`.
        """
        self.schedule.check_fits(max_iter, self._arguments.get("warmup", 0))

    def before_train(self) -> None:
        """Check what is known only when training starts."""
        self.check_fits(self.trainer.max_iter)
        self.check_resumed(self.trainer.start_iter)
        self._num_pruned = self.method.num_pruned
        self._maybe_averages_at_start = self._maybe_averages()
        self._warn_of_loaded_weights()
        self._recorder.begin()
        zero = self.method.count_zero_filters()
        if zero:
            names = ", ".join(f"{name} ({count})" for name, count in list(zero.items())[:5])
            logger.warning(
                f"RePr: the starting weights hold {sum(zero.values())} filters of zero norm; most "
                f"criteria drop them first: {names}{', ...' if len(zero) > 5 else ''}."
            )

    def check_resumed(self, start_iter: int) -> None:
        """Refuse to resume from a checkpoint without a state of this hook.

        Raises:
            UserError: the run does not start at iteration 0 and no state was loaded.
        """
        if start_iter > 0 and not self._has_state:
            raise UserError(
                f"This run resumes at iteration {start_iter}, but its checkpoint holds no RePr "
                f"state (made without RePr?). Start a new run with it as MODEL.WEIGHTS."
            )

    def _warn_of_loaded_weights(self) -> None:
        """Warn of a short run that starts from loaded weights, where new filters lose accuracy."""
        resumed, short = self.trainer.start_iter > 0, self.trainer.max_iter < SHORT_RUN
        # With Reinit(direction="previous"), filters return as they were.
        if resumed or not short or self.method.reinit.as_it_was:
            return
        # Weights that were loaded since registration have other sums. Those that were loaded before
        # are known by statistics of norms.
        sums = _sums(self.method.layers)
        loaded = [
            layer.name
            for layer in self.method.layers
            if sums[layer.name] != self._sums_at_registration[layer.name] or _has_statistics(layer)
        ]
        if loaded:
            logger.warning(
                f"RePr: {len(loaded)} of {len(sums)} layers that take part start from loaded "
                f"weights, and the run has fewer than {SHORT_RUN:,} iterations. On 252 images for "
                f"600 iterations, new orthogonal filters lost a third of a pretrained "
                f"detector's AP (17.95 instead of 27.41, three seeds). Filters that return as they "
                f"were lost less (24.83 instead of 27.22, ten seeds). Train without RePr "
                f"(REPR.ENABLED False), or set REPR.REINIT.DIRECTION to previous, in code "
                f"reinit=Reinit(direction='previous')."
            )

    def _maybe_averages(self) -> dict[str, Any]:
        """What the trainer and other hooks hold that has the shapes of the model's weights."""
        trainer = self.trainer
        others = [hook for hook in trainer._hooks if hook is not self]
        copies = self._arguments.get("copies", ())
        return weights_alike([trainer, _stepper(trainer), *others], trainer.model, copies)

    def _warn_of_averages(self) -> None:
        """Warn where another hook averages the model's weights: drops do not reach the average.

        A frozen teacher has the same shapes, but has not changed since training began. What was
        made since then counts as changed.
        """
        before, now = self._maybe_averages_at_start, self._maybe_averages()
        mine = [name for name in now if now[name] != before.get(name)]
        # Some hooks exist on the first rank only, but all ranks must decide the same.
        averages = sorted(set().union(*objects_of_all_ranks(mine, self._group)))
        if not averages:
            return
        stays = ""
        if self._mode == "auto":  # "on" is the user's decision
            self._removal_decision = False
            stays = " Pruned filters stay in the network as zeros (REPR.COMPACT auto)."
        logger.warning(
            f"RePr: {', '.join(averages)} has the shapes of the model's weights, as an average of "
            f"them has. Drops and returns do not reach it. If it is an average, keep it as a "
            f"module, and pass that to RePrHook as copies=[...].{stays}"
        )

    def before_step(self) -> None:
        """Do what is due before this iteration, in this order.

        1. Record the overlap before a drop.
        2. Bring the network to full size, which phase changes need.
        3. Drop filters or bring them back, and record it.
        4. Remove pruned filters physically.
        5. Give DistributedDataParallel buckets of the new sizes.
        """
        iteration = self.trainer.iter
        if self.method.due(iteration):
            # Not where skipped iterations make a return and a drop due at once.
            if self.method.phase == FULL and self.schedule.phase(iteration).name == SUB:
                self._recorder.overlap(detailed=True)
            self._grow()
        for change in self.method.step(iteration):
            self._report(change)
        # Also where a run is resumed in S2: checkpoints always hold the full-size network.
        if self.method.phase == SUB and not self._compact.active and self._decide_removal():
            self._shrink()
        if self._resized:
            if isinstance(self.trainer.model, DistributedDataParallel):
                renew_buckets(self.trainer.model)
            self._resized = False
        self.trainer.storage.put_scalars(
            **{
                "repr/phase": float(self.method.phase == SUB),
                "repr/cycle": self.method.cycle,
                "repr/num_pruned": self._num_pruned,
            },
            smoothing_hint=False,
        )

    def _report(self, change: PhaseChange) -> None:
        """Log and record a change of phase."""
        self._num_pruned = self.method.num_pruned
        logger.info(_one_line(change))
        if change.kind == "drop":
            for layer in change.layers:
                logger.info(
                    f"  {layer.name}: {layer.filters} filters, {layer.pruned} pruned, "
                    f"mean score {layer.mean_score:.4f}"
                )
            self._warn_of_averages()
        self._recorder.change(change)

    def after_step(self) -> None:
        """Record the overlap where an evaluation is due, and at the end.

        If writers come before this hook, they have already written this iteration. The overlap is
        then recorded under the next one.
        """
        done, hooks = self.trainer.iter + 1, self.trainer._hooks
        periods = [h._period for h in hooks if isinstance(h, EvalHook) and h._period > 0]
        if done == self.trainer.max_iter or any(done % period == 0 for period in periods):
            written = any(isinstance(h, PeriodicWriter) for h in hooks[: hooks.index(self)])
            self.trainer.storage.iter = done if written else self.trainer.iter
            self._recorder.overlap()
            self.trainer.storage.iter = self.trainer.iter

    def after_train(self) -> None:
        """Bring the network to full size, also where training was interrupted in S2."""
        self._grow()

    def state_dict(self) -> dict[str, Any]:
        """The method's state, and what ``compact="auto"`` decided."""
        decided = self._removal_decision if self._mode == "auto" else None
        return {**self.method.state_dict(), "compact": decided}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from the method's state.

        Raises:
            UserError: it does not fit; see :meth:`repr_det.RePr.load_state_dict`.
        """
        self._grow()  # the state is of the network of full size
        self.method.load_state_dict(state)
        if self._mode == "auto":
            self._removal_decision = state.get("compact")
        self._has_state = True

    # --- the physically smaller network

    def _grow(self) -> None:
        """Bring the network to full size; nothing happens where it is."""
        self._resized |= self._compact.active
        self._compact.grow()

    def _decide_removal(self) -> bool:
        """Whether to remove pruned filters physically; ``"auto"`` measures when first asked."""
        if self._removal_decision is None:
            self._removal_decision = self._measure()
        return self._removal_decision

    def _shrink(self) -> None:
        """Remove pruned filters physically, or warn why not."""
        self._resized = True  # also where it fails halfway
        try:
            with _own_random_numbers():
                shrunk = self._compact.shrink()
        except RuntimeError as error:  # all that shrink() raises, on every rank or on none
            self._removal_decision = False
            logger.warning(f"RePr: {error}; pruned filters stay in the network as zeros.")
            return
        logger.info(_cost_line(shrunk))

    def _measure(self) -> bool:
        """Whether the smaller network is faster on every rank; the same on all of them."""
        stays = "pruned filters stay in the network as zeros (REPR.COMPACT auto)."
        if reason := self._reason_not_to_measure():
            logger.info(f"RePr: {reason}, so {stays}")
            return False
        self._resized = True  # to measure, it is made smaller and full again
        try:
            with _own_random_numbers():
                mine = self._compact.speedup()
        except Exception as error:  # what a foreign model raises when it cannot be made smaller
            logger.warning(f"RePr: {type(error).__name__}: {error}; {stays}")
            mine = Speed(0.0, 0.0, 0.0)  # does not pay, whatever other ranks measured
        speeds = objects_of_all_ranks(mine, self._group)
        if all(speed.ratio for speed in speeds):
            logger.info(
                f"RePr: measured, the smaller network of S2 is {min(s.ratio for s in speeds):.2f} "
                f"times as fast, {min(s.lowest for s in speeds):.2f} in the worst comparison."
            )
        return all(pays(one, self.schedule.s2) for one in speeds)

    def _reason_not_to_measure(self) -> str:
        """A reason to keep pruned filters without measuring, or an empty string."""
        if torch.are_deterministic_algorithms_enabled():
            return "a deterministic run measures no times"
        if self._arguments.get("copies"):
            return "a copy that reads the model's state dict would find tensors of other sizes"
        if reason := reason_against_other_sizes(self.trainer.model):
            return reason
        total = self.schedule.s2 * self.schedule.cycles
        if total < MEASURING_PAYS_FROM:
            return f"{total} iterations in S2 are too few to measure times"
        return ""


def pays(speed: Speed, s2: int) -> bool:
    """Whether to train the smaller network for ``s2`` iterations, from what was measured.

    The measurement times pairs of a forward and a backward pass: of the network with pruned filters
    as zeros, and of the smaller network. The smaller one must be faster in every pair, so that
    chance seldom decides, and by :data:`WORTHWHILE` in the median. What it saves must exceed the
    cost of its first pass (``price``), which is large where ``torch.compile`` compiles again. Both
    are counted in passes of the network with zeros.
    """
    if speed.lowest <= 1.0 or speed.ratio < WORTHWHILE:
        return False
    return (1 - 1 / speed.ratio) * s2 > speed.price


def _own_random_numbers() -> AbstractContextManager[None]:
    """A context in which draws do not advance the run's own random numbers."""
    return RandomStream(0).active()


def _kinds(method: RePr) -> str:
    """How many conv layers, and how many linear ones where there are some, take part."""
    linear = sum(layer.name in method.graph.linears for layer in method.layers)
    conv = len(method.layers) - linear
    return f"{conv} conv and {linear} linear" if linear else f"{conv} conv"


def _small_share(method: RePr, model: nn.Module) -> str | None:
    """A line for the log where only a small part of the model takes part, else None."""
    total = sum(p.numel() for p in model.parameters() if p.requires_grad)
    mine = sum(layer.weight.numel() for layer in method.layers)
    if mine >= SMALL_SHARE * total:
        return None
    taken = {layer.name for layer in method.layers}
    # Linear layers in ``visible`` have no hidden units, so they cannot take part.
    left_out = method.graph.linears.keys() - method.graph.visible.keys() - taken
    sizes: list[int] = [method.graph.linears[name].weight.numel() for name in left_out]
    line = f"RePr: the layers that take part hold {mine / total:.1%} of the trainable weights."
    if sizes:
        line += (
            f" Linear layers with hidden units hold {sum(sizes) / total:.1%} more. Set REPR.LINEAR "
            f"to True, in code linear=True, so that they take part."
        )
    return line


def _sums(layers: Sequence[FilterLayer]) -> dict[str, float]:
    """The sum of each layer's weight, by its name: to see whether the weight has changed."""
    return {layer.name: float(layer.weight.detach().double().sum()) for layer in layers}


def _has_statistics(layer: FilterLayer) -> bool:
    """Whether a norm of the layer has running means other than 0, as after training."""
    means = [mean for link in layer.norms for mean, _ in link.running_statistics()]
    return any(bool(mean.any()) for mean in means)


def filter_progress(filters: Sequence[Any]) -> Iterable[Any]:
    """A progress bar over the filters that a criterion tries, on the main process."""
    return tqdm(
        filters, "RePr oracle", unit="filter", leave=False, disable=not comm.is_main_process()
    )


def _stepper(trainer: TrainerBase) -> TrainerBase:
    """The trainer that runs the steps: DefaultTrainer keeps one for them in ``_trainer``."""
    return getattr(trainer, "_trainer", trainer)


def _precision(trainer: TrainerBase) -> Callable[[], Any]:
    """A function that makes the context of the trainer's mixed precision, or an empty one."""
    trainer = _stepper(trainer)
    if isinstance(trainer, MixedPrecisionTrainer):  # this package's, no AMPTrainer
        return trainer.autocast
    if isinstance(trainer, AMPTrainer):
        return partial(torch.autocast, "cuda", dtype=trainer.precision)
    return nullcontext


def weights_alike(
    holders: Iterable[Any], model: nn.Module, known: Iterable[nn.Module] = ()
) -> dict[str, Any]:
    """Attributes of objects that hold tensors shaped as the parameters of a model.

    Looked at are modules, dictionaries and lists of tensors that are attributes of an object, or of
    an object that it holds.

    Args:
        holders: the objects.
        model: the model; what shares memory with it is left out.
        known: further modules, likewise.

    Returns:
        By name as in :func:`_attributes`, a value that differs after the tensors changed. That of a
        list always differs: it goes along with the parameters, whatever it is for.
    """
    shapes = [p.shape for p in unwrap(model).parameters()]
    own = {p.data_ptr() for one in (model, *known) for p in one.parameters()}
    found = {}
    for name, value in _attributes(holders):
        state = value.state_dict() if isinstance(value, nn.Module) else value
        if isinstance(state, Mapping):
            state = state.values()
        elif not isinstance(state, (list, tuple)):
            continue
        tensors = [t for t in state if isinstance(t, Tensor)]
        # The shapes must come in this order; buffers may be between them. ``in`` consumes an
        # iterator up to a match.
        others = iter([t.shape for t in tensors])
        alike = all(shape in others for shape in shapes)
        if alike and own.isdisjoint(t.data_ptr() for t in tensors):
            versions = [(t.data_ptr(), t._version) for t in tensors]
            found[name] = object() if isinstance(value, (list, tuple)) else versions
    return found


def _attributes(holders: Iterable[Any]) -> Iterator[tuple[str, Any]]:
    """Attributes of objects, ``Class.attribute``, and of what they hold, ``Class.Held.attribute``.

    The attributes of modules are left out, being their own weights or parts of them.
    """
    for holder in holders:
        name = holder.__class__.__name__  # of a proxy's object, which the trainer is given as
        for key, value in list(vars(holder).items()):
            if key == "trainer":  # of a hook; it is a holder itself
                continue
            yield f"{name}.{key}", value
            if hasattr(value, "__dict__") and not isinstance(value, (nn.Module, type)):
                for inner_key, inner in list(vars(value).items()):
                    yield f"{name}.{type(value).__name__}.{inner_key}", inner


def _cost_line(shrunk: Shrunk) -> str:
    """A line for the log about the network that became smaller."""
    before, after = shrunk.before, shrunk.after
    line = (
        f"RePr: {shrunk.removed} of {shrunk.removed + shrunk.kept} pruned filters are out of the "
        f"network during S2, the others stay as zeros: {before.parameters:,} parameters become "
        f"{after.parameters:,}"
    )
    if None in (before.multiply_adds, after.multiply_adds):
        return f"{line}. Multiply-adds could not be counted."
    return (
        f"{line}, and {before.multiply_adds / 1e6:,.1f} million multiply-adds of a forward pass "
        f"{after.multiply_adds / 1e6:,.1f} million."
    )


def _one_line(change: PhaseChange) -> str:
    """A line for the log about a drop or a return."""
    touched = [layer for layer in change.layers if layer.pruned]
    filters = sum(layer.pruned for layer in touched)
    total = sum(layer.filters for layer in change.layers)
    # A drop prunes a filter at least, and a return brings back what a drop pruned.
    most = max(touched, key=lambda layer: layer.pruned / layer.filters)
    what = "dropped" if change.kind == "drop" else "brought back"
    return (
        f"RePr cycle {change.cycle}: {what} {filters} of {total} filters in {len(touched)} of "
        f"{len(change.layers)} layers, the largest share {most.pruned}/{most.filters} in "
        f"{most.name}."
    )
