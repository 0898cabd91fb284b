"""RePr as one object: called before every training step, it does what is due."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import asdict
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from repr_det.errors import UserError
from repr_det.method.calibration import calibrate
from repr_det.method.choice import agreed_scores, check_reachable, check_shares, choose
from repr_det.method.criteria import (
    CRITERIA,
    Criterion,
    Data,
    Scores,
    check_criterion,
    filter_overlap,
    mean_overlap,
    name_of,
)
from repr_det.method.data_criteria import DIFFERENTIATES, check_derivatives
from repr_det.method.graph import ChannelGraph, Reader, in_copy
from repr_det.method.holding import (
    GradientMask,
    columns_moved,
    moved,
    put_back,
    set_aside,
    zero_filters,
)
from repr_det.method.layers import FilterLayer, column_slots, row_lengths
from repr_det.method.modules import eager, own_gradients, still, unchanged, unwrap
from repr_det.method.optimizers import check_optimizer, reset_state
from repr_det.method.ranks import group_of, object_of_first_rank, objects_of_all_ranks
from repr_det.method.reinit import Reinit, reinit_of
from repr_det.method.removal import Removable
from repr_det.method.returning import (
    Values,
    hand_over,
    new_rows,
    reset_statistics,
    restore,
    values_of,
    write_affine,
)
from repr_det.method.schedule import FULL, SUB, RePrSchedule
from repr_det.method.selection import followed, list_of, select_layers, separable, trained_elsewhere
from repr_det.method.settings import (
    NO_BATCHES,
    check_data,
    check_losses,
    check_same_settings,
    check_whole,
    checked_copies,
)
from repr_det.method.tracing import trace
from repr_det.method.warmup import RateWarmup

CALIBRATION_BATCHES = 4
"""Number of batches on which a returned channel is measured where a frozen norm follows it."""

_STATE_VERSION = 2

_DROP, _RETURN = 0, 1
"""Part of the seed of a phase change's random numbers."""

_LATER_SETTINGS = {"warmup": 0, "reinit.direction": "orthogonal", "linear": False}
"""Settings that older checkpoints lack, with the values that those runs had."""


class LayerReport(NamedTuple):
    """What a phase change did to one layer.

    Attributes:
        name: dotted name of the layer.
        filters: number of filters.
        pruned: how many of them were dropped or came back.
        mean_score: mean over its filters, without scores of infinity, which a criterion may set
            for a filter that must go or stay; NaN if all are infinite, None on a return.
    """

    name: str
    filters: int
    pruned: int
    mean_score: float | None


class PhaseChange(NamedTuple):
    """What :meth:`RePr.step` did.

    Attributes:
        kind: ``"drop"`` or ``"return"``.
        cycle: of the filters that were dropped or came back.
        layers: all that take part.
    """

    kind: str
    cycle: int
    layers: list[LayerReport]


class _Network(NamedTuple):
    """What RePr works on in the model or in a copy of it.

    Attributes:
        layers: those that take part.
        readers: modules with weights whose inputs are outputs of filters.
        optimizer: None for a copy.
    """

    layers: list[FilterLayer]
    readers: list[Reader]
    optimizer: Optimizer | None


class RePr:
    """Trains any model with convolutions by RePr (paper, Algorithm 1).

    Call :meth:`step` before every training step; the rest of the training loop does not change.

    Args:
        model: the model, in the mode in which it trains. Wrappers (DistributedDataParallel,
            ``torch.compile``) are looked through.
        optimizer: trains the model; :mod:`repr_det.method.optimizers` says which are accepted. What
            it trains is looked up at each drop. A layer is left out if parameters of its own, of
            its norm or of a module that reads its output require gradients but are not in this
            optimizer.
        schedule: when filters are dropped and returned, in iterations.
        prune_ratio: share of all filters that a drop prunes, in (0, 1). The paper's p is 0.3.
        criterion: a name in :data:`repr_det.method.criteria.CRITERIA` or a function of the same
            signature.
        include: patterns of layers that take part. The default is described at
            :func:`repr_det.method.selection.select_layers`.
        exclude: patterns of layers that do not take part.
        max_layer_ratio: largest share of one layer that a drop prunes, in (0, 1]. A layer always
            keeps a filter.
        seed: of the new filters and of the random criterion.
        batches: returns a new iterator of training batches. It must not take them from the training
            loop's own iterator.
        loss: ``loss(model, batch)`` returns a scalar. Data-driven criteria use ``batches`` and
            ``loss``, and so does the measurement of constant statistics, those of frozen norms.
        copies: further models that follow the weights, such as an EMA. The same filters are dropped
            and returned in them.
        reinit: what returned filters start with.
        warmup: iterations over which the learning rate rises linearly to its usual value after each
            return, at most ``schedule.s1``; 0 for none.
        progress: shows the progress of a slow criterion (``oracle``). It takes a sequence of
            filters and returns an iterable of them, as ``tqdm`` does.
        linear: whether linear layers with hidden units take part: units that only other layers
            with weights read. Otherwise only those that ``include`` names take part.

    Raises:
        UserError: an argument is out of range, patterns match nothing, the optimizer is not
            accepted, or the model could not be run on an example.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        schedule: RePrSchedule,
        prune_ratio: float = 0.3,
        criterion: str | Criterion = "ortho",
        include: Sequence[str] | None = None,
        exclude: Sequence[str] | None = None,
        max_layer_ratio: float = 0.5,
        seed: int = 0,
        batches: Callable[[], Iterator[Any]] | None = None,
        loss: Callable[[nn.Module, Any], Tensor] | None = None,
        copies: Sequence[nn.Module] = (),
        reinit: Reinit | None = None,
        warmup: int = 0,
        progress: Callable[[Sequence[Any]], Iterable[Any]] = iter,
        linear: bool = False,
    ) -> None:
        self.batches, self.loss, self._progress = batches, loss, progress
        check_shares(prune_ratio, max_layer_ratio)
        needs_data = check_criterion(criterion, self._has_data)
        # A user's own criterion may run the model.
        self._reads_only_weights = isinstance(criterion, str) and not needs_data
        check_whole("seed", seed)
        self._scales_by_length = check_optimizer(optimizer)
        self.schedule = schedule
        self.optimizer = optimizer
        self._num_checked_groups = len(optimizer.param_groups)  # more may be added later
        self.prune_ratio = prune_ratio
        self.max_layer_ratio = max_layer_ratio
        self.seed = int(seed)
        self.reinit = reinit_of(reinit)
        self._warmup = RateWarmup(optimizer, schedule, warmup)
        self._criterion = CRITERIA[criterion] if isinstance(criterion, str) else criterion
        self._criterion_name = name_of(criterion)
        self._include, self._exclude = list_of(include), list_of(exclude)
        self._linear = bool(linear)
        self.model, self.group = unwrap(model), group_of(model)  # the group of its ranks
        self.copies = [unwrap(copy) for copy in checked_copies(copies)]
        with still(self.model):
            self._build(self._traced())
            check_reachable(self.layers, self.prune_ratio, self.max_layer_ratio)
            self._check_data(criterion, needs_data)
        self._phase, self._cycle = FULL, 0
        self._pruned: dict[str, Tensor] = self._none_pruned()
        # The pruned filters' values before the drop, by name of the layers that lost some.
        self._old_filters: dict[str, Values] = {}
        # The same of each copy where filters return as they were (``reinit.as_it_was``). Otherwise
        # copies get the model's new filters.
        self._old_filters_in_copies: list[dict[str, Values]] = []
        # For the model and then each copy, what set_aside() returned: the columns (weights that
        # read pruned filters) before the drop and their optimizer state, by name of the reader.
        self._old_columns: list[dict[str, Any]] = []
        self._history: list[dict[str, Any]] = []
        self._mask: GradientMask | None = None
        # The arguments of stand_in() while the network is physically smaller.
        self._smaller: tuple[Sequence[FilterLayer], dict[str, Tensor]] | None = None

    # --- what takes part

    @property
    def _has_data(self) -> bool:
        return self.batches is not None and self.loss is not None

    def _traced(self) -> ChannelGraph:
        """The channel graph of the model, the first rank's on all ranks.

        Ranks have different batches, which may use different parts of the model.
        """
        check_data(self.batches, self.loss)
        found, failure = None, None
        try:
            found = trace(self.model, self._run_on_a_batch if self._has_data else None)
        except (UserError, RuntimeError) as error:
            # All that trace() raises. Other ranks wait for this one, so it is raised below, and
            # only if the first rank failed, too. Otherwise that rank's graph is enough.
            failure = error
        state = object_of_first_rank(found.state_dict() if found else None, self.group)
        if state is None:
            raise failure or UserError("RePr could not run the model in the first process.")
        # The example, a function, was not sent. Here it is this rank's own, if it found one.
        return ChannelGraph.from_state(state, self.model, found.example if found else None)

    def _build(self, graph: ChannelGraph, names: Collection[str] | None = None) -> None:
        """Set everything that depends on the channel graph; ``names`` as in _set_layers()."""
        self.graph = graph
        self.removable = Removable(graph)
        self._readers = list(graph.readers.values())
        self._set_layers(names)

    def _set_layers(self, names: Collection[str] | None = None) -> None:
        """Set the layers that take part: those of a checkpoint, or those that train now.

        This is done again at each drop, since layers may be frozen, unfrozen or passed to the
        optimizer at any time.

        Args:
            names: names of the layers in a checkpoint; None for those that train now.
        """
        self.layers: list[FilterLayer] = self._find_layers(names)
        # By reader, the factor with which weights that read a returned filter come back.
        self._factors = self._factors_on_readers()
        self._copy_networks = [
            _Network(*in_copy(copy, self.layers, self._readers), None) for copy in self.copies
        ]

    @property
    def _networks(self) -> list[_Network]:
        """The model, then its copies."""
        return [_Network(self.layers, self._readers, self.optimizer), *self._copy_networks]

    def _run_on_a_batch(self) -> None:
        """Compute the loss of the first batch."""
        for batch in self.batches():
            self.loss(self.model, batch)
            return
        raise UserError(NO_BATCHES)

    def _check_data(self, criterion: str | Criterion, needs_data: bool) -> None:
        """Refuse batches and a loss that fail, and warn where they are missing."""
        # Filters that return as they were have the statistics that they had.
        must_measure = not self.reinit.as_it_was and any(
            link.constant_statistics for layer in self.layers for link in layer.norms
        )
        if self._has_data and (must_measure or needs_data):
            self._check_loss(criterion == "oracle" or criterion in DIFFERENTIATES)
        if isinstance(criterion, str) and criterion in DIFFERENTIATES:  # needs derivatives
            with unchanged(self.model), eager():
                check_derivatives(criterion, self.layers, self._data(cycle=0))
        if must_measure and not self._has_data:
            warnings.warn(
                "RePr: the model has norms whose statistics do not train. Those of new filters can "
                "be measured on batches. Pass batches= and loss=, or new filters keep the "
                "statistics of the dropped ones.",
                stacklevel=3,  # at the call of RePr()
            )

    def _check_loss(self, needs_value: bool) -> None:
        """Run one batch now. Otherwise an error would come hours later, at a phase change."""
        try:
            with unchanged(self.model), torch.no_grad(), eager():
                self.model.train()
                losses = [self.loss(self.model, b) for b in itertools.islice(self.batches(), 1)]
        except Exception as error:  # foreign loaders and models may raise anything
            raise RuntimeError(
                f"RePr could not run the model on a training batch ({type(error).__name__}: "
                f"{error}), which it needs at phase changes. Pass batches= and loss= that fit."
            ) from error
        if not any(objects_of_all_ranks(bool(losses), self.group)):  # some ranks may have none
            raise UserError(NO_BATCHES)
        if needs_value:
            check_losses(losses)

    def _find_layers(self, names: Collection[str] | None) -> list[FilterLayer]:
        """The layers of these names, by default the selected ones, if they are separable()."""
        layers = [
            FilterLayer(name, layer, tuple(self.graph.norms.get(name, ())))
            for name, layer in self.graph.layers.items()
        ]
        if names is not None:
            return separable(layers, names)
        # ChannelGraph says what stems, heads, gates and the others are.
        selected = select_layers(
            self.graph.convs,
            self.graph.linears,
            visible=self.graph.visible,
            linear=self._linear,
            stems=self.graph.stems,
            heads=self.graph.heads,
            gates=self.graph.gates,
            trained=self._trained(),
            has_backbone=isinstance(getattr(self.model, "backbone", None), nn.Module),
            include=self._include,
            exclude=self._exclude,
        )
        # By layer, the name of a module that the optimizer should train and does not.
        elsewhere = trained_elsewhere(layers, self._readers, self._trained())
        names = followed(selected, self.graph.partly, self._scales_by_length)
        # Filters of unsuitable layers would not stay zero.
        found = separable(layers, names - self.graph.unsuitable - elsewhere.keys())
        if left_out := (elsewhere.keys() - self.graph.unsuitable) & set(selected):
            name = min(left_out)
            message = (
                f"RePr: {name}{' and others' * (len(left_out) > 1)} cannot lose filters, because "
                f"the optimizer does not train {elsewhere[name]}, which requires gradients. Add it "
                f"to the optimizer, or freeze it with requires_grad_(False)."
            )
            if not found:
                raise UserError(message)
            warnings.warn(message, stacklevel=5)  # at the call of RePr() or step()
        elif not found:
            raise UserError(
                f"RePr: {min(selected)} cannot lose filters, because something else uses its "
                f"weight, bias or norm, its norm does not keep zeros or is no module, or zeros "
                f"become infinite. Change INCLUDE/EXCLUDE."
            )
        return found

    def _factors_on_readers(self) -> dict[str, float]:
        trained = self._trained()
        outgoing = 1.0 if self.reinit.as_it_was else float(self.reinit.outgoing)
        # A frozen reader could not learn again what a factor below 1 takes away.
        return {
            reader.name: outgoing if id(reader.module.weight) in trained else 1.0
            for reader in self._readers
        }

    def _trained(self) -> set[int]:
        """``id`` of every parameter that the optimizer trains now."""
        groups = self.optimizer.param_groups
        return {id(p) for group in groups for p in group["params"] if p.requires_grad}

    def _none_pruned(self) -> dict[str, Tensor]:
        """Masks by layer name, all False."""
        return {
            layer.name: torch.zeros(layer.num_filters, dtype=torch.bool) for layer in self.layers
        }

    # --- what is pruned now, and was before

    @property
    def phase(self) -> str:
        """The phase that the network is in, ``"full"`` or ``"sub"``; :meth:`step` changes it."""
        return self._phase

    @property
    def cycle(self) -> int:
        """The cycle that the network is in; :meth:`step` changes it."""
        return self._cycle

    @property
    def pruned(self) -> dict[str, Tensor]:
        """The pruned filters: bool of shape (num_filters,) by layer name, all False when full."""
        return {name: mask.clone() for name, mask in self._pruned.items()}

    @property
    def num_pruned(self) -> int:
        """Number of filters that are pruned now."""
        return sum(int(mask.sum()) for mask in self._pruned.values())

    @property
    def history(self) -> list[dict[str, Any]]:
        """Every drop so far: ``{"cycle", "iteration", "pruned"}``, pruned as in :attr:`pruned`."""
        return list(self._history)

    def count_zero_filters(self) -> dict[str, int]:
        """Number of filters of zero norm that are not pruned, by name of the layers with some."""
        layers, pruned = self._present()
        counts = {
            layer.name: int((row_lengths(layer.matrix()) == 0).sum())
            - int(pruned[layer.name].sum())
            for layer in layers
        }
        return {name: count for name, count in counts.items() if count > 0}

    def overlap(self) -> dict[str, float]:
        """Mean of :meth:`filter_overlap` over surviving filters, by layer name."""
        return mean_overlap(self.filter_overlap())

    def filter_overlap(self) -> Scores:
        """:func:`repr_det.method.criteria.ortho_paper` among surviving filters.

        Returns:
            float64 of shape (num_filters,) by layer name, NaN for pruned filters.
        """
        found = filter_overlap(*self._present())
        if self._smaller is None:
            return found
        _, removed = self._smaller
        full = {}  # with the removed filters
        for name, scores in found.items():
            full[name] = scores.new_full((len(removed[name]),), float("nan"))
            full[name][~removed[name].to(scores.device)] = scores
        return full

    def mask_gradients(self) -> None:
        """Set the gradients of pruned filters to zero now.

        This already happens in backward and in the optimizer's step. Call it only in loops that
        write ``.grad`` by hand and read it before the step, for example to clip it.
        """
        if self._mask is not None:
            self._mask.apply()

    # --- while the network is physically smaller

    def stand_in(self, layers: Sequence[FilterLayer], removed: dict[str, Tensor]) -> None:
        """Hold pruned filters in smaller layers, from which the caller removed others physically.

        :attr:`layers` and :attr:`pruned` still describe the layers of full size. Call
        :meth:`full_size` before the next phase change and before :meth:`load_state_dict`.

        Args:
            layers: the smaller layers, with the same names.
            removed: the removed filters, bool of shape (num_filters,) by layer name. Pruned filters
                that are not removed are held at zero.
        """
        self._release()
        self._smaller = (layers, removed)
        self._hold()

    def full_size(self) -> None:
        """End :meth:`stand_in`. Call it when the layers have their full size again."""
        self._smaller = None
        self._release()
        self._hold()

    def _present(self) -> tuple[Sequence[FilterLayer], dict[str, Tensor]]:
        """The layers in their present size, and which of their present filters are pruned."""
        if self._smaller is None:
            return self.layers, self._pruned
        layers, removed = self._smaller
        return layers, {name: mask[~removed[name]] for name, mask in self._pruned.items()}

    # --- phase changes

    def due(self, iteration: int) -> bool:
        """Whether :meth:`step` would change something before this iteration."""
        phase = self.schedule.phase(iteration)
        # If the caller skipped iterations, filters of an earlier cycle may still be pruned.
        other_cycle = phase.name == SUB and self._cycle != phase.cycle
        return self._phase != phase.name or other_cycle

    def step(self, iteration: int) -> list[PhaseChange]:
        """Do what is due before the training step of this iteration, counted from 0.

        The model must be in the mode in which it trains. ``module.training`` decides whether a
        norm's running statistics are learned or constant. With a warmup, this also decides the
        learning rate of the training step.

        Returns:
            The phase changes that happened. At almost every step there are none.

        Raises:
            FloatingPointError: weights that are not finite or scores of NaN at a phase change.
            RuntimeError: a phase change is due between :meth:`stand_in` and :meth:`full_size`.
        """
        self._warmup.set_iteration(iteration)
        phase = self.schedule.phase(iteration)
        changes = []
        if self.due(iteration):
            if self._smaller is not None:
                raise RuntimeError("RePr: bring the network to full size before a phase change.")
            with torch.no_grad(), still(self.model):
                # A return and a drop at once happen only if the caller skipped iterations.
                if self._phase == SUB:
                    changes.append(self._return())  # of the cycle until now
                if phase.name == SUB:
                    changes.append(self._drop(phase.cycle, iteration))
        self._cycle = phase.cycle
        return changes

    def _generator(self, cycle: int, event: int) -> torch.Generator:
        """Random numbers of a cycle's drop or return (``_DROP`` or ``_RETURN``).

        They do not depend on what was drawn before, so a resumed run draws the same.
        """
        # A prime keeps seeds apart; a generator's seed has 64 bits.
        seed = ((self.seed * 1_000_003 + cycle) * 2 + event) % 2**64
        return torch.Generator().manual_seed(seed)

    def _data(self, cycle: int) -> Data:
        return Data(
            model=self.model,
            batches=self.batches,
            loss=self.loss,
            generator=self._generator(cycle, _DROP),  # criteria are for drops
            progress=self._progress,
            group=self.group,
        )

    def _scores(self, cycle: int) -> Scores:
        if self._reads_only_weights:
            return self._criterion(self.layers, self._data(cycle))
        with unchanged(self.model), own_gradients(self.model), eager():
            return self._criterion(self.layers, self._data(cycle))

    def _drop(self, cycle: int, iteration: int) -> PhaseChange:
        self._set_layers()
        check_reachable(self.layers, self.prune_ratio, self.max_layer_ratio)
        if len(self.optimizer.param_groups) != self._num_checked_groups:  # some were added
            self._scales_by_length = check_optimizer(self.optimizer)
            self._num_checked_groups = len(self.optimizer.param_groups)
        self._pruned = self._none_pruned()  # of the layers that take part now
        self._check_finite("rank")
        scores = agreed_scores(self._scores(cycle), self.layers, self._criterion_name, self.group)
        pruned = choose(self.layers, scores, self.prune_ratio, self.max_layer_ratio)
        self._old_filters = values_of(self.layers, pruned, self.reinit, self.group)
        if self.reinit.as_it_was:
            self._old_filters_in_copies = [
                values_of(copy.layers, pruned, self.reinit, self.group)
                for copy in self._copy_networks
            ]
        # Filters that return as they were start without first moments in the optimizer, and so do
        # the weights that read them.
        keep_moments = not self.reinit.as_it_was
        self._old_columns = []
        for layers, readers, optimizer in self._networks:
            columns = set_aside(readers, pruned, optimizer, self._factors, keep_moments)
            self._old_columns.append(columns)
            for layer in layers:
                zero_filters(layer, pruned[layer.name], optimizer)
        self._pruned = pruned
        self._history.append({"cycle": cycle, "iteration": int(iteration), "pruned": self.pruned})
        self._phase = SUB
        self._hold()
        return PhaseChange("drop", cycle, self._report(scores))

    def _return(self) -> PhaseChange:
        self._check_finite("bring back")
        self._warn_of_moved()
        self._release()  # what is held now would be set to zero at the next step
        returned = self._pruned
        # First, since new filters are orthogonal to the survivors with these columns.
        for network, columns in zip(self._networks, self._old_columns, strict=True):
            put_back(network.readers, returned, network.optimizer, columns, self._factors)
        if self.reinit.as_it_was:
            old_filters = [self._old_filters, *self._old_filters_in_copies]
            for network, old in zip(self._networks, old_filters, strict=True):
                restore(network.layers, returned, old)
        else:
            self._renew(returned)
        for layer in self.layers:  # copies have no optimizer
            reset_state(layer, returned[layer.name], self.optimizer)
        report = self._report(None)
        self._pruned, self._old_filters, self._old_columns = self._none_pruned(), {}, []
        self._old_filters_in_copies = []
        self._phase = FULL
        return PhaseChange("return", self._cycle, report)

    def _check_finite(self, action: str) -> None:
        """Refuse weights that are not finite; the error says that RePr cannot ``action`` them."""
        for layer in self.layers:
            if not layer.weight.isfinite().all():
                raise FloatingPointError(
                    f"RePr cannot {action} the filters of {layer.name}: its weight holds NaN or "
                    f"infinity. Training has diverged. Lower the learning rate or resume an "
                    f"earlier checkpoint."
                )

    def _warn_of_moved(self) -> None:
        """Warn where pruned filters did not stay zero, since not every cause can be refused."""
        names = [layer.name for layer in self.layers if moved(layer, self._pruned[layer.name])]
        if names:
            warnings.warn(
                f"RePr: dropped filters of {', '.join(names[:3])}{' ...' * (len(names) > 3)} did "
                f"not stay zero, so the sub-network was not exactly a smaller one. Let nothing but "
                f"this optimizer write to their weights, and nothing to their gradients through "
                f".data.",
                stacklevel=4,  # at the call of step()
            )
        if names := [r.name for r in self._readers if columns_moved(r, self._pruned)]:
            warnings.warn(
                f"RePr: weights of {', '.join(names[:3])}{' ...' * (len(names) > 3)} that read "
                f"dropped filters did not stay zero, so the sub-network was not exactly a smaller "
                f"one. Other batches use these filters in other ways than the first, or something "
                f"else writes to these weights. Exclude the layers before them (REPR.EXCLUDE).",
                stacklevel=4,
            )

    def _hold(self) -> None:
        """Keep pruned filters at zero through backward and steps, until :meth:`_release`."""
        layers, pruned = self._present()
        # A slot is a parameter and the entries of it that belong to filters.
        slots = [
            slot
            for layer in layers
            if pruned[layer.name].any()
            for slot in layer.filter_slots(pruned[layer.name])
        ]
        self._mask = GradientMask(slots, self.optimizer)

    def _release(self) -> None:
        if self._mask is not None:
            self._mask.remove()
            self._mask = None

    def _report(self, scores: dict[str, Tensor] | None) -> list[LayerReport]:
        return [
            LayerReport(
                layer.name,
                layer.num_filters,
                int(self._pruned[layer.name].sum()),
                None if scores is None else _finite_mean(scores[layer.name]),
            )
            for layer in self.layers
        ]

    # --- coming back

    def _renew(self, returned: dict[str, Tensor]) -> None:
        """Set returned filters to new ones, also in the copies."""
        generator = self._generator(self._cycle, _RETURN)
        rows = new_rows(
            self.layers, returned, self._old_filters, self.reinit, generator, self.group
        )
        trained = self._trained()
        for layer in self.layers:
            if layer.name in rows:  # it lost filters
                pruned, old = returned[layer.name], self._old_filters[layer.name]
                # What was frozen since the drop could not train as new, so it returns as it was.
                # write_affine() sees to bias, gamma and beta.
                is_trained = id(layer.weight) in trained
                layer.write_rows(pruned, rows[layer.name] if is_trained else old["weight"])
                write_affine(layer, pruned, old, self.reinit)
        # Running statistics that train are reset. Those that do not are measured, given data.
        to_measure = reset_statistics(self.layers, returned, self._old_filters)
        if to_measure and self._has_data:
            batches = itertools.islice(self.batches(), CALIBRATION_BATCHES)
            calibrate(self.model, to_measure, batches, self.loss, self.group)
        for copy in self._copy_networks:
            hand_over(self.layers, copy.layers, returned)

    # --- state

    def settings(self) -> dict[str, Any]:
        """What a resumed run must share with the run that wrote the checkpoint."""
        return {
            "s1": self.schedule.s1,
            "s2": self.schedule.s2,
            "cycles": self.schedule.cycles,
            # torch.load(weights_only=True) refuses other numbers, such as NumPy's.
            "prune_ratio": float(self.prune_ratio),
            "criterion": self._criterion_name,
            "include": self._include,
            "exclude": self._exclude,
            "linear": self._linear,
            "max_layer_ratio": float(self.max_layer_ratio),
            "seed": self.seed,
            "warmup": self._warmup.length,
            **{
                f"reinit.{key}": value if isinstance(value, str) else float(value)
                for key, value in asdict(self.reinit).items()
            },
        }

    def state_dict(self) -> dict[str, Any]:
        """All of RePr's state: tensors, numbers, strings, lists and dicts."""
        return {  # some keys are older than the names of the attributes
            "version": _STATE_VERSION,
            "settings": self.settings(),
            "graph": self.graph.state_dict(),
            # A layer's own number of filters may be that of the smaller network.
            "layers": {name: len(mask) for name, mask in self._pruned.items()},
            "phase": self._phase,
            "cycle": self._cycle,
            "pruned": self.pruned if self._phase == SUB else {},
            "before": self._old_filters,
            "before_in_copies": self._old_filters_in_copies,
            "aside": self._old_columns,
            "outgoing": self._factors,
            "history": self.history,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a state. Load the states of the model and the optimizer separately.

        Raises:
            UserError: the state was written with other settings, for another model, with another
                number of copies, or by another version.
        """
        version = state.get("version")
        # Version 1 differs only while filters are pruned.
        if version != _STATE_VERSION and not (version == 1 and state["phase"] == FULL):
            raise UserError(
                f"RePr state has version {version}, this is version {_STATE_VERSION}. "
                f"Resume with the version of repr_det that wrote the checkpoint."
            )
        check_same_settings("RePr", self.settings(), {**_LATER_SETTINGS, **state["settings"]})
        with still(self.model):
            self._build_as_written(state)
        copies = len(state["aside"]) - 1  # the first columns are the model's
        if state["phase"] == SUB and copies != len(self.copies):
            raise UserError(
                f"RePr state was written with {copies} copies of the model, "
                f"now there are {len(self.copies)}. Pass the same copies."
            )
        self._release()
        self._phase, self._cycle = state["phase"], state["cycle"]
        self._old_filters, self._old_columns = state["before"], state["aside"]
        # Two keys that checkpoints of repr_det 0.1.0 may lack.
        self._old_filters_in_copies = state.get("before_in_copies", [])
        self._factors = state.get("outgoing", self._factors)
        self._history = list(state["history"])
        self._pruned = self._none_pruned()
        if self._phase == SUB:
            self._pruned = {name: mask.cpu() for name, mask in state["pruned"].items()}
            self._hold()

    def _build_as_written(self, state: dict[str, Any]) -> None:
        """Use the checkpoint's channel graph.

        The present one is of another batch, which may run other parts of the model.
        """
        mine = graph = self.graph
        if "graph" in state:  # not in checkpoints of repr_det 0.1.0
            try:
                graph = ChannelGraph.from_state(state["graph"], self.model, mine.example)
            except KeyError as missing:
                raise _other_model(missing.args[0]) from missing
        self._build(graph, state["layers"].keys())
        found = {layer.name: layer.num_filters for layer in self.layers}
        if changed := state["layers"].items() ^ found.items():
            self._build(mine)  # as it was before
            raise _other_model(min(changed)[0])
        if "graph" not in state and state["phase"] == SUB and not _fits(self._readers, state):
            raise UserError(
                "RePr finds other readers of the dropped filters than the version that wrote the "
                "checkpoint. Resume with that version until the filters have come back."
            )


def _other_model(layer: str) -> UserError:
    return UserError(
        f"RePr layers differ from the checkpoint's (for example {layer}). Resume with the same "
        f"model, or start a new run."
    )


def _fits(readers: Sequence[Reader], state: dict[str, Any]) -> bool:
    """Whether the state has columns for all readers of the pruned filters, and no others."""
    pruned = {name: mask.cpu() for name, mask in state["pruned"].items()}
    return all(
        len(column_slots(reader.module, reader.dead(pruned))) == len(entries.get(reader.name, []))
        for entries in state["aside"]
        for reader in readers
    )


def _finite_mean(scores: Tensor) -> float:
    scores = scores[scores.isfinite()]
    return float(scores.double().mean()) if len(scores) else float("nan")
