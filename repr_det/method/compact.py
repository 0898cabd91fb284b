"""The sub-network of S2 as a physically smaller network.

While a filter is pruned, its weights are zeros that are multiplied all the same. :class:`Compact`
removes them during S2: rows of the conv, channels of its norm, columns of the layers that read it,
and their gradients and optimizer state. Before the return everything is put back in place. What was
taken out is exactly zero, so it is filled up with zeros; only norm buffers are kept aside. A
running variance that training would have moved stays as it was at the drop: nothing reads it, and
the return resets it. Losses and weights are those of the masked network up to the order in which
floating-point numbers are added.

Parameters stay the same objects with other data, so optimizers, schedules and clipping go on with
them, and so do averages that are passed as ``copies`` and are updated through their parameters.
State dicts of the model and the optimizer are full-size, both written and loaded. So an average
that is updated in place through its own state dict does not change during S2.
``torch.compile`` compiles again for the shapes of each S2. What keeps sizes of parameters must
be renewed, as :func:`repr_det.engine.parallel.renew_buckets` does for DistributedDataParallel.

Which filters can go is found in :mod:`repr_det.method.removal`. Nothing here needs Detectron2.
"""

from __future__ import annotations

import itertools
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvTransposeNd
from torch.optim import Optimizer
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import FlopCounterMode

from repr_det.errors import UserError
from repr_det.method.controller import RePr
from repr_det.method.layers import FilterLayer, NormLink
from repr_det.method.modules import eager, named_modules, unchanged
from repr_det.method.optimizers import state_tensors
from repr_det.method.ranks import objects_of_all_ranks
from repr_det.method.removal import Removal

MODES = ("auto", "on", "off")


class Cost(NamedTuple):
    """What a network costs.

    Attributes:
        parameters: number of trained values.
        multiply_adds: of convolutions and matrix products in one forward pass; None where they
            could not be counted.
    """

    parameters: int
    multiply_adds: int | None


class Shrunk(NamedTuple):
    """What :meth:`Compact.shrink` did: cost before and after, and the filters it concerned.

    Attributes:
        before: with all pruned filters in place.
        after: as it is now.
        removed: number of pruned filters that were removed.
        kept: number of pruned filters that stay as zeros.
    """

    before: Cost
    after: Cost
    removed: int
    kept: int


class Speed(NamedTuple):
    """How fast the smaller network is, as :meth:`Compact.speedup` measured.

    Attributes:
        lowest: time of the masked network / of the smaller one, in the worst of the turns.
        ratio: the same of the medians over turns.
        price: what the smaller network's first run costs (taking out, compiling, choosing kernels),
            in runs of the masked network.
    """

    lowest: float
    ratio: float
    price: float


@dataclass
class _Cut:
    """A tensor of a module that is smaller for a while.

    Attributes:
        module: whose tensor it is.
        name: attribute of the module.
        index: what is kept: ``full[index]`` is the smaller tensor.
        shape: of the full tensor.
        aside: the full tensor where what is cut is not zero (norm buffers, and what was loaded
            meanwhile), else None.
        states: the full optimizer state that was loaded meanwhile, by name.
    """

    module: nn.Module
    name: str
    index: tuple[Tensor, ...]
    shape: torch.Size
    aside: Tensor | None = None
    states: dict[str, Tensor] = field(default_factory=dict)

    @property
    def tensor(self) -> Tensor:
        return getattr(self.module, self.name)

    def take(self, full: Tensor) -> Tensor:
        """The part of a full-size tensor that is kept, a copy in the same memory format."""
        index = tuple(i.to(full.device) for i in self.index)
        return full[index].contiguous(memory_format=_memory_format(full))

    def fill(self, small: Tensor, aside: Tensor | None = None) -> Tensor:
        """A full-size tensor of the kept part, zeros or ``aside`` around it."""
        if aside is not None:
            full = aside.to(small.device, small.dtype, copy=True)
        else:
            full = small.new_zeros(self.shape).contiguous(memory_format=_memory_format(small))
        full[tuple(i.to(small.device) for i in self.index)] = small
        return full


def _memory_format(tensor: Tensor) -> torch.memory_format:
    if tensor.dim() == 4 and not tensor.is_contiguous():
        return torch.channels_last
    return torch.contiguous_format


_DIFFERS = (
    "the smaller network differs from the masked one, as where code reads a number of channels"
)


def _failed(error: Exception) -> str:
    return f"the smaller network could not be run ({type(error).__name__}: {error})"


class Compact:
    """Takes pruned filters out of a network physically and puts them back.

    Args:
        method: prunes the network. Its copies shrink and grow with the network, and it works on the
            smaller layers until :meth:`grow`. Without its batches and loss, the network is run on
            the example that the method followed.
        precision: returns a context to run the network in: that of mixed precision.
    """

    def __init__(self, method: RePr, precision: Callable[[], Any] = nullcontext) -> None:
        self._method = method
        self._model = method.model
        self._batches, self._loss = method.batches, method.loss
        self._precision = precision
        self._warned = False
        self._bodies: list[_Body] = []

    @property
    def active(self) -> bool:
        """Whether the network is physically smaller now."""
        return bool(self._bodies)

    def shrink(self) -> Shrunk:
        """Take out what can go of the filters that are pruned now.

        Raises:
            RuntimeError: what would go is not zero, or the smaller network cannot be run or differs
                from the masked one. The network is then as it was before.
        """
        removal = self._choose()
        runs: list[Callable[[], Any]] = []
        problem = ""
        # Rounding may change what a detector samples, or grow in a deep network. In float64 it is
        # too small for that, but slow.
        for arithmetic in (nullcontext, _Float64):
            shrunk, error = None, None
            try:
                runs = runs or self._runs()
                shrunk = self._remove_and_compare(removal, runs, arithmetic)
            except Exception as raised:  # what running an unknown model raises
                error = raised
            mine = "" if shrunk else _DIFFERS if error is None else _failed(error)
            problems = [found for found in objects_of_all_ranks(mine, self._method.group) if found]
            if not problems and shrunk:
                return shrunk
            self.grow()
            problem = problem or problems[0]
            if problem != _DIFFERS:
                break
        raise RuntimeError(problem) from error

    def _remove_and_compare(
        self, removal: Removal, runs: Sequence[Callable[[], Any]], arithmetic: Callable[[], Any]
    ) -> Shrunk | None:
        """Take out what goes; None where the smaller network differs from the masked one."""
        masked = [self._outputs(run, arithmetic) for run in runs]
        evaluated = self._evaluated(runs[0], arithmetic)
        before = _cost(self._model, runs[0])
        self._remove(removal)
        # All runs, whatever is found: the norms of other ranks may wait for those of this one.
        after = _cost(self._model, runs[0])
        differ = [
            _differ(whole, self._outputs(run, arithmetic))
            for whole, run in zip(masked, runs, strict=True)
        ]
        differ_evaluated = [
            _differ(whole, self._outputs(run, arithmetic)) for run, whole in evaluated
        ]
        # One batch that agrees is enough, since another may be sampled differently.
        if all(differ) or any(differ_evaluated):
            return None
        gone = (removal.filters[name] for name in self._method.pruned if name in removal.filters)
        removed = sum(int(mask.sum()) for mask in gone)
        return Shrunk(before, after, removed, self._method.num_pruned - removed)

    def _choose(self) -> Removal:
        """What can go. All ranks choose the same, since they have the same graph and masks."""
        method = self._method
        if method.graph.not_run and not self._warned:
            self._warned = True
            names = method.graph.not_run
            warnings.warn(
                f"RePr: {', '.join(names[:3])}{' ...' * (len(names) > 3)} did not run when the "
                f"model was followed and may read any filter, so none is removed physically. "
                f"Delete what is never used, or set compact to off.",
                stacklevel=3,
            )
        multiple = _multiple(method.layers[0].weight.device, self._precision)
        return method.removable.choose(method.pruned, multiple)

    def _remove(self, removal: Removal) -> None:
        method = self._method
        self._bodies = [
            _Body(self._model, removal, method.optimizer),
            *(_Body(copy, removal, None) for copy in method.copies),
        ]
        for body in self._bodies:
            body.shrink()
        method.stand_in(*_smaller_layers(method.layers, method.pruned, removal))
        torch.clear_autocast_cache()  # of weights in their full size

    def grow(self) -> None:
        """Put everything back in its place; nothing happens where nothing was taken out."""
        if self._bodies:
            for body in self._bodies:
                body.grow()
            self._bodies = []
            self._method.full_size()
            torch.clear_autocast_cache()

    def _runs(self) -> list[Callable[[], Any]]:
        """Runs of the network forward, on two batches, or on the example that was followed."""
        if self._batches is None or self._loss is None:
            if self._method.graph.example is None:
                raise ValueError("there is no input")
            return [self._method.graph.example]
        batches = list(itertools.islice(self._batches(), 2))
        if not batches:
            raise ValueError("there are no batches")
        return [partial(self._loss, self._model, batch) for batch in batches]

    def _evaluated(
        self, first: Callable[[], Any], arithmetic: Callable[[], Any]
    ) -> list[tuple[Callable[[], Any], list[Tensor]]]:
        """The first run and the example in evaluation mode, where they work, and their results."""

        def in_evaluation(run: Callable[[], Any]) -> Any:
            self._model.eval()
            return run()

        found = []
        for run in filter(None, (first, self._method.graph.example)):
            evaluation = partial(in_evaluation, run)
            with suppress(Exception):  # detectors have no loss there
                found.append((evaluation, self._outputs(evaluation, arithmetic)))
        return found

    def _outputs(self, run: Callable[[], Any], arithmetic: Callable[[], Any]) -> list[Tensor]:
        """What a run returns, in the precision of the weights; mixed precision if that fails."""
        for precision in (nullcontext, self._precision):
            try:
                with unchanged(self._model), torch.no_grad(), eager(), precision(), arithmetic():
                    found = tree_leaves(run())
                return [x for x in found if isinstance(x, Tensor) and x.is_floating_point()]
            except Exception:  # a model may need its autocast
                if precision is self._precision:
                    raise
        raise AssertionError

    def speedup(self, rounds: int = 5) -> Speed:
        """Compare forward and backward of the smaller network with those of the masked one.

        Both take turns on one batch. Gradients, buffers and torch's random state stay as they are,
        and so does the network, which is full-size before and after.

        Args:
            rounds: turns of each; each is a run to warm up and one that counts.

        Raises:
            UserError: there is no batch to measure on.
            Exception: the smaller network cannot be run.
        """
        if self._batches is None or self._loss is None:
            raise UserError("there are no batches to measure on")
        removal = self._choose()
        batch = next(self._batches())
        parameters = list(self._model.parameters())
        gradients = [p.grad for p in parameters]
        masked, smaller, first = [], [], []
        try:
            for _ in range(rounds):
                masked.append([self._seconds(batch) for _ in range(2)][1])
                start = time.perf_counter()
                self._remove(removal)
                self._seconds(batch)
                first.append(time.perf_counter() - start)
                smaller.append(self._seconds(batch))
                self.grow()
        finally:
            self.grow()
            for p, gradient in zip(parameters, gradients, strict=True):
                p.grad = gradient
        return Speed(
            min(a / b for a, b in zip(masked, smaller, strict=True)),
            statistics.median(masked) / statistics.median(smaller),
            max(first[0] - smaller[0], 0.0) / statistics.median(masked),
        )

    def _seconds(self, batch: Any) -> float:
        device = next(self._model.parameters()).device
        self._model.zero_grad(set_to_none=True)
        with unchanged(self._model), torch.enable_grad(), self._precision():
            self._model.train()
            _wait(device)
            start = time.perf_counter()
            self._loss(self._model, batch).backward()
            _wait(device)
            seconds = time.perf_counter() - start
        self._model.zero_grad(set_to_none=True)
        return seconds


class _Body:
    """One network that can be made smaller: its tensors, attributes and state-dict hooks.

    Raises:
        RuntimeError: what would be taken out is not zero.
    """

    def __init__(self, model: nn.Module, removal: Removal, optimizer: Optimizer | None) -> None:
        self._optimizer = optimizer
        self._cuts, self._smaller = _cuts(dict(named_modules(model)), removal)
        self._attributes = [(m, key, getattr(m, key)) for m, key, _ in self._smaller]
        self._handles: list[Any] = []
        self._taken: list[_Cut] = []
        self._check_zero()

    def shrink(self) -> None:
        """Make it smaller; where that fails halfway, :meth:`grow` puts back what was done."""
        for cut in self._cuts:
            if isinstance(cut.tensor, nn.Parameter):
                self._resize(cut, lambda full, _, cut=cut: cut.take(full))
            else:
                cut.aside = cut.tensor.detach()
                cut.tensor.data = cut.take(cut.aside)
            self._taken.append(cut)
        for module, key, value in self._smaller:
            setattr(module, key, value)
        self._watch_states()

    def grow(self) -> None:
        """Put everything back."""
        for handle in self._handles:
            handle.remove()
        for cut in self._taken:
            if isinstance(cut.tensor, nn.Parameter):
                self._resize(cut, cut.fill)
            else:
                cut.tensor.data = cut.fill(cut.tensor.detach(), cut.aside)
        for module, key, value in self._attributes:
            setattr(module, key, value)

    def _states(self, parameter: Tensor) -> dict[str, Tensor]:
        return {} if self._optimizer is None else state_tensors(self._optimizer, parameter)

    def _check_zero(self) -> None:
        """What goes must be zero, or taking it out would change the network."""
        if any(
            not _same_nonzero(cut.tensor, cut.take(cut.tensor.detach()))
            for cut in self._cuts
            if isinstance(cut.tensor, nn.Parameter)
        ):
            raise RuntimeError("pruned filters are not zero")

    def _resize(self, cut: _Cut, change: Callable[[Tensor, Tensor | None], Tensor]) -> None:
        """Change a parameter, its gradient and its optimizer state alike.

        ``change`` gets the tensor and the full-size values that were set aside for it.
        """
        parameter = cut.tensor
        data = change(parameter.detach(), cut.aside)
        gradient = None if parameter.grad is None else change(parameter.grad, None)
        states = {
            key: change(state, cut.states.get(key))
            for key, state in self._states(parameter).items()
        }
        parameter.grad = None
        # Whatever keeps the node alive that accumulates the gradient (an old loss, a replaced
        # DistributedDataParallel) would keep its shape; another type makes torch drop the node.
        other = torch.float64 if data.dtype != torch.float64 else torch.float32
        parameter.data = torch.empty(0, dtype=other, device=data.device)
        parameter.data = data
        parameter.grad = gradient
        for key, state in states.items():
            self._optimizer.state[parameter][key] = state

    # --- full-size state dicts

    def _watch_states(self) -> None:
        by_module: dict[nn.Module, list[_Cut]] = {}
        for cut in self._cuts:
            by_module.setdefault(cut.module, []).append(cut)
        for module, cuts in by_module.items():
            writes, loads = _model_hooks(cuts)
            self._handles.append(module._register_state_dict_hook(writes))
            self._handles.append(module.register_load_state_dict_pre_hook(loads))
        if self._optimizer is not None:
            hooks = _optimizer_hooks(self._cuts)
            self._handles.append(self._optimizer.register_state_dict_post_hook(hooks[0]))
            self._handles.append(self._optimizer.register_load_state_dict_pre_hook(hooks[1]))


def _same_nonzero(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors, of which one is a part of the other, differ only by zeros."""
    return int(one.count_nonzero()) == int(other.count_nonzero())


def _model_hooks(cuts: list[_Cut]) -> tuple[Callable, Callable]:
    """What makes a module write full-size tensors into a state dict, and accept them."""

    def writes(module: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
        for cut in cuts:
            key = prefix + cut.name
            if key in state:
                state[key] = cut.fill(state[key].detach(), cut.aside)

    def loads(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
        for cut in cuts:
            whole = state.get(prefix + cut.name)
            if whole is None or whole.shape != cut.shape:
                continue
            smaller = cut.take(whole)
            if module is cut.module:
                cut.aside = whole.detach().clone()
            elif isinstance(cut.tensor, nn.Parameter) and not _same_nonzero(whole, smaller):
                # A copy has the same hooks. It cannot hold filters that are not pruned, so torch
                # refuses them by their size.
                continue
            state[prefix + cut.name] = smaller

    return writes, loads


def _optimizer_hooks(cuts: list[_Cut]) -> tuple[Callable, Callable]:
    """The same for the state of an optimizer."""
    by_parameter = {id(cut.tensor): cut for cut in cuts}

    def changed(
        optimizer: Optimizer, state: dict[str, Any], change: Callable[[_Cut, str, Tensor], Tensor]
    ) -> dict[str, Any]:
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        numbers = [n for group in state["param_groups"] for n in group["params"]]
        entries = dict(state["state"])
        for number, parameter in zip(numbers, parameters, strict=False):
            cut = by_parameter.get(id(parameter))
            if cut is not None and number in entries:
                entries[number] = {
                    key: change(cut, key, value) if isinstance(value, Tensor) else value
                    for key, value in entries[number].items()
                }
        return {**state, "state": entries}

    def filled(cut: _Cut, key: str, value: Tensor) -> Tensor:
        return cut.fill(value, cut.states.get(key)) if value.shape == cut.tensor.shape else value

    def taken(cut: _Cut, key: str, value: Tensor) -> Tensor:
        if value.shape != cut.shape:
            return value
        cut.states[key] = value.detach().clone()
        return cut.take(value)

    return (
        lambda optimizer, state: changed(optimizer, state, filled),
        lambda optimizer, state: changed(optimizer, state, taken),
    )


# --- what a removal means for modules

Attribute = tuple[nn.Module, str, int]


def _cuts(modules: dict[str, nn.Module], removal: Removal) -> tuple[list[_Cut], list[Attribute]]:
    """The tensors that get smaller, and the modules' numbers that say how large they are."""
    cuts: list[_Cut] = []
    attributes: list[Attribute] = []
    for name in removal.filters.keys() | removal.inputs.keys():
        module = modules[name]
        rows, columns = removal.filters.get(name), removal.inputs.get(name)
        index = _weight_index(module, rows, columns)
        cuts.append(_Cut(module, "weight", index, module.weight.shape))
        if rows is not None and getattr(module, "bias", None) is not None:
            cuts.append(_Cut(module, "bias", (_kept(rows),), module.bias.shape))
        for gone, keys in (
            (rows, ("out_channels", "out_features")), (columns, ("in_channels", "in_features"))
        ):  # fmt: skip
            if gone is not None:
                attributes += [(module, k, int((~gone).sum())) for k in keys if hasattr(module, k)]
    for name, gone in removal.norms.items():
        for module in modules[name].modules():
            for key, tensor in (*module._parameters.items(), *module._buffers.items()):
                if tensor is not None and tensor.shape == gone.shape:
                    cuts.append(_Cut(module, key, (_kept(gone),), tensor.shape))
            if getattr(module, "num_features", None) == len(gone):
                attributes.append((module, "num_features", int((~gone).sum())))
    return cuts, attributes


def _kept(gone: Tensor) -> Tensor:
    return (~gone).nonzero().flatten()


def _weight_index(
    module: nn.Module, rows: Tensor | None, columns: Tensor | None
) -> tuple[Tensor, ...]:
    """What is kept of a weight, as indices of its first two dimensions.

    Args:
        module: a conv (plain, grouped, transposed) or a linear layer.
        rows: output channels that go, or None.
        columns: input channels that go, or None; equally many in every group, as of ``rows``.
    """
    weight, groups = module.weight, getattr(module, "groups", 1)
    outer, inner = (columns, rows) if isinstance(module, _ConvTransposeNd) else (rows, columns)
    if outer is None:
        outer = torch.zeros(weight.shape[0], dtype=torch.bool)
    if inner is None:
        inner = torch.zeros(weight.shape[1] * groups, dtype=torch.bool)
    first = _kept(outer)
    second = torch.stack([_kept(part) for part in inner.reshape(groups, -1)])
    second = second[first // (len(outer) // groups)] if groups > 1 else second
    return first[:, None].to(weight.device), second.to(weight.device)


def _smaller_layers(
    layers: Sequence[FilterLayer], pruned: dict[str, Tensor], removal: Removal
) -> tuple[list[FilterLayer], dict[str, Tensor]]:
    """The layers in the smaller network, and which filters were removed, by layer name."""
    smaller, all_gone = [], {}
    for layer in layers:
        gone = removal.filters.get(layer.name, torch.zeros_like(pruned[layer.name]))
        norms = tuple(
            NormLink(
                link.name,
                link.module,
                *_renumbered(link, gone, removal.norms.get(link.name)),
                link.dim,
            )
            for link in layer.norms
        )
        smaller.append(FilterLayer(layer.name, layer.module, norms))
        all_gone[layer.name] = gone
    return smaller, all_gone


def _renumbered(link: NormLink, filters: Tensor, channels: Tensor | None) -> tuple[Tensor, Tensor]:
    """Filters and channels of a link, numbered without those that were removed."""
    stays = ~filters[link.filters]
    new_filters = (~filters).cumsum(0)[link.filters[stays]] - 1
    if channels is None:
        return new_filters, link.channels[stays]
    return new_filters, (~channels).cumsum(0)[link.channels[stays]] - 1


# --- what it costs


def _multiple(device: torch.device, precision: Callable[[], Any]) -> int:
    """What the number of filters should be a multiple of: tensor cores work in blocks."""
    if device.type != "cuda":
        return 1
    with precision():
        return 16 if torch.is_autocast_enabled() else 8


def _cost(model: nn.Module, run: Callable[[], Any]) -> Cost:
    parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    counter = FlopCounterMode(display=False)
    try:
        with unchanged(model), torch.no_grad(), eager(), counter:
            run()
    except Exception:  # a number for a log line
        return Cost(parameters, None)
    return Cost(parameters, counter.get_total_flops() // 2)


class _Float64(TorchFunctionMode):
    """Computes in float64, whatever the precision of weights and inputs is.

    What is written into a tensor of another precision stays in that precision.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name = func.__name__
        writes = name in ("__setitem__", "__set__") or (name[-1] == "_" and name[-2:] != "__")
        if writes and isinstance(args[0], Tensor) and args[0].dtype != torch.float64:
            return func(*args, **(kwargs or {}))
        args, kwargs = tree_map(_as_float64, (tuple(args), kwargs or {}))
        return tree_map(_as_float64, func(*args, **kwargs))


def _as_float64(value: Any) -> Any:
    is_float = isinstance(value, Tensor) and value.is_floating_point()
    return value.double() if is_float else value


def _differ(masked: Sequence[Tensor], smaller: Sequence[Tensor]) -> bool:
    """Whether outputs differ by more than rounding.

    Half of the digits must agree: sums in another order differ by some units in the last place, and
    norms may magnify that some hundred times. TF32 is allowed three per mille, and no precision
    more than three per cent.
    """
    if [x.shape for x in masked] != [x.shape for x in smaller]:
        return True
    for a, b in zip(masked, smaller, strict=True):
        allowed = min(torch.finfo(a.dtype).eps ** 0.5, 0.03)
        if a.is_cuda:
            allowed = max(allowed, 0.003)
        a, b = a.double(), b.double()
        if not torch.equal(a.isfinite(), b.isfinite()):
            return True
        a, b = a[a.isfinite()], b[b.isfinite()]
        if (a - b).norm() > allowed * a.norm():
            return True
    return False


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
