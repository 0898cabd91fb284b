"""Zeroes filters, holds them at exactly zero, and restores the weights that read them.

A pruned filter's parameters (weight row, bias, gamma, beta) become zero, and so does their
optimizer state. Their gradients are set to zero as backward accumulates them. An accepted optimizer
then leaves all of it at exactly zero: weight decay and momentum of zero are zero. So nothing is
added to the forward pass, and any loop that calls ``optimizer.step()`` is supported.

Every pruned filter is held, also where nothing but zeros reads it: what reads it may change.

The weights that read a pruned channel become zero, too, with their optimizer state. They read
zeros, so their gradients are zero by themselves. They come back as they were, times a factor.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple
from weakref import ReferenceType, ref

from torch import Tensor, nn
from torch.optim import Optimizer

from repr_det.method.graph import Reader
from repr_det.method.layers import FilterLayer, Slot, column_slots
from repr_det.method.optimizers import SECOND_MOMENTS, state_tensors


class _Held:
    """A parameter of which parts are held."""

    def __init__(self, parameter: nn.Parameter) -> None:
        self.parameter = parameter
        self.slots: list[Slot] = []
        # The gradient that was set to zero last, and its version then.
        self._done: ReferenceType[Tensor] | None = None
        self._version = 0

    def fill(self, _: Tensor | None = None) -> None:
        """Set the held parts of the gradient to zero."""
        gradient = self.parameter.grad
        for slot in self.slots:
            slot.fill(0.0, like=gradient)
        self._done, self._version = ref(gradient), gradient._version

    def fill_again(self) -> None:
        """The same, unless nothing was written to the gradient since then."""
        gradient = self.parameter.grad
        if gradient is None:
            return
        same = self._done is not None and self._done() is gradient
        if not same or gradient._version != self._version:
            self.fill()

    def hook(self) -> Any:
        """Call :meth:`fill` after each accumulation, even if the parameter trains only later.

        Torch refuses to hook a parameter that does not train yet.
        """
        trains = self.parameter.requires_grad
        self.parameter.requires_grad_(True)
        handle = self.parameter.register_post_accumulate_grad_hook(self.fill)
        self.parameter.requires_grad_(trains)
        return handle


class GradientMask:
    """Sets the gradients of pruned filters to zero as soon as backward has accumulated them.

    That is before clipping, unscaling and the step, wherever these happen, and before
    DistributedDataParallel averages them. What was written since then, or by hand, is set to zero
    when the optimizer steps.

    Args:
        slots: what is held. A parameter that does not train is held once it does.
        optimizer: trains the parameters.
    """

    def __init__(self, slots: Iterable[Slot], optimizer: Optimizer) -> None:
        held: dict[Tensor, _Held] = {}
        for slot in slots:
            if isinstance(slot.tensor, nn.Parameter):
                held.setdefault(slot.tensor, _Held(slot.tensor)).slots.append(slot)
        self.held = list(held.values())
        self._handles = [one.hook() for one in self.held]
        self._handles.append(optimizer.register_step_pre_hook(self.apply))

    def apply(self, *_: Any) -> None:
        """Set them to zero now: for loops that clip gradients which they wrote by hand."""
        for one in self.held:
            one.fill_again()

    def remove(self) -> None:
        """Let gradients through again."""
        for handle in self._handles:
            handle.remove()


def _zero(slot: Slot, optimizer: Optimizer | None) -> None:
    """Set a slot to zero, with its optimizer state and what was accumulated of its gradient."""
    slot.fill(0.0)
    if optimizer is None:
        return
    if slot.tensor.grad is not None:
        slot.fill(0.0, like=slot.tensor.grad)
    for state in state_tensors(optimizer, slot.tensor).values():
        slot.fill(0.0, like=state)


def zero_filters(layer: FilterLayer, pruned: Tensor, optimizer: Optimizer | None) -> None:
    """Set the pruned filters (bool of shape (J,)) of a layer to zero.

    With an optimizer that trains them, their state in it and their gradient as well.
    """
    for slot in layer.filter_slots(pruned):
        _zero(slot, optimizer)
    for link in layer.norms:
        # A zero channel has mean zero; a norm without gamma and beta would shift it otherwise.
        channels = link.channels_of(pruned)
        for mean, _ in link.running_statistics():
            mean.detach()[channels.to(mean.device)] = 0.0


def moved(layer: FilterLayer, pruned: Tensor) -> bool:
    """Whether pruned filters (bool of shape (J,)) of a layer are no longer zero.

    What does not train counts as well, for example shifts of a frozen norm.
    """
    return any(bool(slot.read().any()) for slot in layer.filter_slots(pruned))


def columns_moved(reader: Reader, pruned: dict[str, Tensor]) -> bool:
    """Whether weights that read pruned filters (bool of shape (J,) by layer) are not zero."""
    slots = column_slots(reader.module, reader.dead(pruned))
    return any(bool(slot.read().any()) for slot in slots)


class _Columns(NamedTuple):
    """Weights that read pruned channels.

    Attributes:
        slot: where they are.
        staying: the filters of the slot that are not pruned themselves, int64; None for all. The
            others return as new ones, so their weights are not copied.
        factor: on what comes back.
    """

    slot: Slot
    staying: Tensor | None
    factor: float

    def read(self, like: Tensor | None = None) -> Tensor:
        values = self.slot.read(like)
        # The filters are counted along the other one of a weight's first two dimensions.
        return values if self.staying is None else values.index_select(self._filters, self.staying)

    def write(self, values: Tensor, like: Tensor | None = None) -> None:
        if self.staying is not None:
            whole = self.slot.read(like)
            values = whole.index_copy_(self._filters, self.staying, values.to(whole))
        self.slot.write(values, like)

    @property
    def _filters(self) -> int:
        return 1 - self.slot.dim


def _columns(
    reader: Reader, pruned: dict[str, Tensor], factors: Mapping[str, float]
) -> Iterator[_Columns]:
    """Where a layer reads pruned channels, and the factor on what comes back there.

    Filters that read nothing else (depthwise) come back as they were. At zero they would have no
    output whatever their inputs are, and a norm after them would magnify their gradients.
    """
    dead = reader.dead(pruned)
    groups = getattr(reader.module, "groups", 1)
    inputs = len(dead) // groups
    filters = pruned.get(reader.name)
    for slot in column_slots(reader.module, dead):
        staying = None
        if filters is not None and filters.any():
            rows = slot.rows or slice(0, len(slot.tensor))  # of one group
            group = rows.start // (rows.stop - rows.start)
            kept = ~filters.reshape(groups, -1)[group].to(slot.index.device)
            staying = kept.nonzero().flatten()
        factor = 1.0 if len(slot.index) == inputs else factors[reader.name]
        yield _Columns(slot, staying, factor)


def set_aside(
    readers: Sequence[Reader],
    pruned: dict[str, Tensor],
    optimizer: Optimizer | None,
    factors: Mapping[str, float],
    keep_moments: bool = True,
) -> dict[str, list[dict[str, Any]]]:
    """Copy the weights that read pruned channels, with their optimizer state, and set them to zero.

    Args:
        readers: the layers that read filters.
        pruned: bool of shape (J,) by layer name.
        optimizer: whose state is treated in the same way; None for a model that is not trained.
        factors: by reader name, the same as for :func:`put_back`. With 0, values that it would not
            use are not copied, and neither are those of filters that are pruned themselves.
        keep_moments: whether first moments come back with the weights; else they start at zero.

    Returns:
        By reader and weight slot, ``{"value": ..., "state": {name: ...}}``; for :func:`put_back`.
    """
    found = {}
    for reader in readers:
        entries = []
        for columns in _columns(reader, pruned, factors):
            slot, factor = columns.slot, columns.factor
            states = state_tensors(optimizer, slot.tensor) if optimizer is not None else {}
            kept = {
                key: columns.read(like=state)
                for key, state in states.items()
                if (factor and keep_moments) or key in SECOND_MOMENTS
            }
            entries.append({"value": columns.read(), "state": kept} if factor else {"state": kept})
            _zero(slot, optimizer)
        if entries:
            found[reader.name] = entries
    return found


def put_back(
    readers: Sequence[Reader],
    pruned: dict[str, Tensor],
    optimizer: Optimizer | None,
    aside: dict[str, list[dict[str, Any]]],
    factors: Mapping[str, float],
) -> None:
    """Undo :func:`set_aside`, with a factor on weights and on their first moments."""
    for reader in readers:
        found = _columns(reader, pruned, factors)
        for columns, entry in zip(found, aside.get(reader.name, []), strict=True):
            slot, factor = columns.slot, columns.factor
            if factor:
                columns.write(factor * entry["value"])
            else:
                slot.fill(0.0)
            if optimizer is None:
                continue
            for key, state in state_tensors(optimizer, slot.tensor).items():
                if key not in entry["state"]:
                    slot.fill(0.0, like=state)
                elif key in SECOND_MOMENTS:
                    columns.write(entry["state"][key], like=state)
                else:
                    columns.write(factor * entry["state"][key], like=state)
