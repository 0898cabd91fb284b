"""Parts of tensors that belong to a filter: rows of weights, channels of norms, read columns."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvTransposeNd

from repr_det.method.modules import num_filters


class Slot(NamedTuple):
    """A part of a tensor that belongs to some filters: indices along one dimension.

    Attributes:
        tensor: the parameter or buffer.
        rows: restricts the first dimension to one group, or None for all of it.
        dim: the dimension that ``index`` counts along.
        index: indices along ``dim``, int64.
    """

    tensor: Tensor
    rows: slice | None
    dim: int
    index: Tensor

    def _view(self, like: Tensor | None) -> Tensor:
        tensor = self.tensor if like is None else like
        if tensor.requires_grad:
            tensor = tensor.detach()
        return tensor if self.rows is None else tensor[self.rows]

    def read(self, like: Tensor | None = None) -> Tensor:
        """A copy of this part, of ``tensor`` or of another tensor of its shape."""
        return self._view(like).index_select(self.dim, self.index)

    def fill(self, value: float, like: Tensor | None = None) -> None:
        """Set this part to one value, in place."""
        self._view(like).index_fill_(self.dim, self.index, value)

    def write(self, values: Tensor, like: Tensor | None = None) -> None:
        """Set this part to values of the shape that :meth:`read` returns, in place."""
        view = self._view(like)
        view.index_copy_(self.dim, self.index, values.to(view.device, view.dtype))


@dataclass(frozen=True, eq=False)
class NormLink:
    """Channels of one norm, each of which belongs to one filter of a layer.

    Attributes:
        name: dotted name of the norm.
        module: the norm.
        filters: indices of filters, int64 of shape (n,).
        channels: the norm's channel of each, int64 of shape (n,).
        dim: the dimension of the norm's input and output that counts channels.
    """

    name: str
    module: nn.Module
    filters: Tensor
    channels: Tensor
    dim: int = 1

    def channels_of(self, chosen: Tensor) -> Tensor:
        """The norm's channels that belong to the chosen filters (bool of shape (J,))."""
        return self.channels[chosen.cpu()[self.filters]]

    @property
    def affine(self) -> dict[str, Tensor]:
        """``gamma`` and ``beta``, the norm's scale and shift, where it has them.

        They are parameters, or buffers where the norm is frozen.
        """
        names = (("gamma", "weight"), ("beta", "bias"))
        both = {key: getattr(self.module, name, None) for key, name in names}
        return {key: tensor for key, tensor in both.items() if tensor is not None}

    @property
    def trains(self) -> bool:
        """Whether gamma and beta train. In FrozenBatchNorm2d they are constants."""
        gamma = self.affine.get("gamma")
        return isinstance(gamma, nn.Parameter) and gamma.requires_grad

    @property
    def constant_statistics(self) -> bool:
        """Whether training uses the running statistics and never updates them."""
        if not any(True for _ in self.running_statistics()):
            return False
        learns = [m.training for m in self.module.modules() if isinstance(m, _NormBase)]
        return not all(learns) or not learns

    def begin_average(self) -> None:
        """Start a cumulative average (``momentum=None``) again with the next batch.

        It has one count of batches for all channels. After many batches, the statistics of a new
        channel would hardly change.
        """
        for module in self.module.modules():
            cumulative = isinstance(module, _NormBase) and module.momentum is None
            if cumulative and module.num_batches_tracked is not None:
                module.num_batches_tracked.zero_()

    def running_statistics(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Pairs (running mean, running variance), each of shape (channels,)."""
        for module in self.module.modules():
            mean = getattr(module, "running_mean", None)
            if mean is not None:
                yield mean, module.running_var


@dataclass(frozen=True, eq=False)
class FilterLayer:
    """A layer that takes part: a conv or a linear layer whose output channels are filters.

    Attributes:
        name: dotted name, without wrappers.
        module: the conv or linear layer.
        norms: the norm channels that follow its filters.
    """

    name: str
    module: nn.Module
    norms: tuple[NormLink, ...] = ()

    @property
    def weight(self) -> nn.Parameter:
        """The layer's weight."""
        return self.module.weight

    @property
    def bias(self) -> nn.Parameter | None:
        """The layer's bias, None where it has none."""
        return getattr(self.module, "bias", None)

    @property
    def per_filter(self) -> dict[str, nn.Parameter]:
        """Other parameters with one value for each filter, by name, such as gains of weights."""
        return {
            name: parameter
            for name, parameter in self.module._parameters.items()
            if name not in ("weight", "bias")
            and parameter is not None
            and parameter.dim() > 0
            and len(parameter) == parameter.numel() == self.num_filters
        }

    @property
    def num_filters(self) -> int:
        """J, the number of output channels."""
        return num_filters(self.module)

    @property
    def groups(self) -> int:
        """Groups of the convolution. Filters are compared only inside their group."""
        return getattr(self.module, "groups", 1)

    @property
    def transposed(self) -> bool:
        """Whether the conv is transposed."""
        return isinstance(self.module, _ConvTransposeNd)

    @property
    def dimension(self) -> int:
        """Length d of a flattened filter: c_in / groups * kernel elements."""
        return self.weight.numel() // self.num_filters

    def matrix(self, tensor: Tensor | None = None) -> Tensor:
        """Filters as rows, shape (J, d), of the weight or of a tensor of its shape.

        The rows of a transposed conv are a copy: its weight holds the output channels of a group in
        its second dimension.
        """
        tensor = (self.weight if tensor is None else tensor).detach()
        if not self.transposed:
            return tensor.reshape(self.num_filters, -1)
        grouped = tensor.reshape(self.groups, -1, *tensor.shape[1:])
        return grouped.transpose(1, 2).reshape(self.num_filters, -1)

    def write_rows(self, chosen: Tensor, rows: Tensor, tensor: Tensor | None = None) -> None:
        """Set the chosen filters (bool of shape (J,)) to rows of shape (chosen, d), in place.

        Writes into the weight, or into a tensor of its shape.
        """
        counts = chosen.reshape(self.groups, -1).sum(dim=1)
        parts = rows.split(counts[counts > 0].tolist() if self.transposed else [len(rows)])
        kernel = self.weight.shape[2:]
        inputs = self.dimension // kernel.numel()
        for slot, part in zip(self.weight_slots(chosen), parts, strict=True):
            kernels = part.reshape(len(part), inputs, *kernel)
            slot.write(kernels.transpose(0, slot.dim), like=tensor)

    def weight_slots(self, chosen: Tensor) -> list[Slot]:
        """Where the chosen filters (bool of shape (J,)) are in the weight."""
        if not self.transposed:
            return [Slot(self.weight, None, 0, _indices(chosen, self.weight))]
        inputs = self.weight.shape[0] // self.groups
        return [
            Slot(self.weight, slice(g * inputs, (g + 1) * inputs), 1, _indices(part, self.weight))
            for g, part in enumerate(chosen.reshape(self.groups, -1))
            if part.any()
        ]

    def filter_slots(self, chosen: Tensor) -> list[Slot]:
        """All parts that belong to the chosen filters: weight rows, bias, gains, norms."""
        return self.weight_slots(chosen) + self.affine_slots(chosen)

    def affine_slots(self, chosen: Tensor) -> list[Slot]:
        """Bias, gains, gamma and beta of the chosen filters (bool of shape (J,))."""
        own = [*([] if self.bias is None else [self.bias]), *self.per_filter.values()]
        slots = [Slot(tensor, None, 0, _indices(chosen, tensor)) for tensor in own]
        for link in self.norms:
            channels = link.channels_of(chosen)
            slots += [Slot(t, None, 0, channels.to(t.device)) for t in link.affine.values()]
        return slots


def row_lengths(rows: Tensor) -> Tensor:
    """Euclidean lengths along the last dimension: float64 of shape (..., 1)."""
    # Squares of small weights underflow in float32.
    return torch.linalg.vector_norm(rows, dim=-1, keepdim=True, dtype=torch.float64)


def unit_rows(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Rows scaled to length one, and their lengths. Zero rows stay zero.

    Args:
        rows: shape (..., J, d), float32 or float64.

    Returns:
        (..., J, d), and float64 of shape (..., J).
    """
    lengths = row_lengths(rows)
    scales = lengths.masked_fill(lengths == 0, 1.0).reciprocal().to(rows.dtype)
    return rows * scales, lengths.squeeze(-1)


def _indices(chosen: Tensor, tensor: Tensor) -> Tensor:
    """Where ``chosen`` is True, on the device of a tensor. A mask on the CPU waits for no GPU."""
    return chosen.cpu().nonzero().flatten().to(tensor.device)


def column_slots(module: nn.Module, dead: Tensor) -> list[Slot]:
    """Where a layer's weight reads the dead input channels (bool of shape (c_in,)).

    Args:
        module: a conv (plain, grouped, transposed, deformable) or a linear layer.
        dead: its input channels (features, for a linear layer) that are zero.
    """
    weight = module.weight
    groups = getattr(module, "groups", 1)
    rows = weight.shape[0] // groups  # of a transposed conv these are input channels
    return [
        Slot(
            weight,
            None if groups == 1 else slice(g * rows, (g + 1) * rows),
            0 if isinstance(module, _ConvTransposeNd) else 1,
            _indices(part, weight),
        )
        for g, part in enumerate(dead.reshape(groups, -1))
        if part.any()
    ]


def column_layout(module: nn.Module) -> tuple:
    """What decides which weights multiply which input channel."""
    groups = getattr(module, "groups", 1)
    return isinstance(module, _ConvTransposeNd), groups
