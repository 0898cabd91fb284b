"""What: the conv layers that take part, and what belongs to a filter."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

_WRAPPERS = (DataParallel, DistributedDataParallel, AveragedModel)


def unwrap(model: nn.Module) -> nn.Module:
    """The model in DataParallel, DistributedDataParallel, AveragedModel or ``torch.compile``."""
    while True:
        if isinstance(model, _WRAPPERS):
            model = model.module
        elif hasattr(model, "_orig_mod"):
            model = model._orig_mod
        else:
            return model


def named_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Like ``model.named_modules()``, each module once, wrappers looked through.

    No name contains ``module.`` of a parallel wrapper or ``_orig_mod.`` of ``torch.compile``.
    """
    seen: set[int] = set()

    def walk(prefix: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        module = unwrap(module)
        if id(module) in seen:
            return
        seen.add(id(module))
        yield prefix, module
        for name, child in module.named_children():
            yield from walk(f"{prefix}.{name}" if prefix else name, child)

    yield from walk("", model)


def is_conv(module: nn.Module) -> bool:
    """Whether a module is a convolution.

    Besides torch's own classes, anything that carries their attributes and a weight with
    spatial dimensions: the deformable convolutions of torchvision and Detectron2.
    """
    if isinstance(module, _ConvNd):
        return True
    weight = getattr(module, "weight", None)
    attributes = ("in_channels", "out_channels", "kernel_size", "groups")
    return (
        isinstance(weight, Tensor)
        and weight.dim() >= 3
        and all(hasattr(module, a) for a in attributes)
    )


def is_norm(module: nn.Module) -> bool:
    """Whether a module normalises channels.

    torch's own classes, and by their tensors the ones that are no subclass of them: a module
    with one-dimensional ``weight`` and ``bias`` of one length (FrozenBatchNorm2d, Detectron2's
    channel-first LayerNorm and its norm per feature level).
    """
    if isinstance(module, (_NormBase, nn.GroupNorm, nn.LayerNorm)):
        return True
    weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
    return (
        isinstance(weight, Tensor)
        and isinstance(bias, Tensor)
        and weight.dim() == bias.dim() == 1
        and len(weight) == len(bias)
        and not is_conv(module)
        and not isinstance(module, nn.Linear)
    )


def mixes_channels(norm: nn.Module) -> bool:
    """Whether a norm computes its statistics over several channels at once."""
    if isinstance(norm, (nn.GroupNorm, nn.LayerNorm)):
        return True
    has_statistics = any(
        getattr(m, "running_mean", None) is not None or isinstance(m, _NormBase)
        for m in norm.modules()
    )
    return not has_statistics


def norm_channels(norm: nn.Module) -> int | None:
    """Number of channels a norm expects, or None where it does not say."""
    weight = getattr(norm, "weight", None)
    if isinstance(weight, Tensor):
        return len(weight) if weight.dim() == 1 else None
    return getattr(norm, "num_features", getattr(norm, "num_channels", None))


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
        tensor = (self.tensor if like is None else like).detach()
        return tensor if self.rows is None else tensor[self.rows]

    def read(self, like: Tensor | None = None) -> Tensor:
        """A copy of this part, of ``tensor`` or of another tensor of its shape."""
        return self._view(like).index_select(self.dim, self.index)

    def fill(self, value: float, like: Tensor | None = None) -> None:
        """Set this part to one value, in place."""
        self._view(like).index_fill_(self.dim, self.index, value)

    def write(self, values: Tensor, like: Tensor | None = None) -> None:
        """Set this part to values of the shape that :meth:`read` gives, in place."""
        view = self._view(like)
        view.index_copy_(self.dim, self.index, values.to(view.device, view.dtype))


@dataclass(frozen=True, eq=False)
class NormLink:
    """Channels of one norm that each belong to one filter of a layer.

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
    def gamma(self) -> Tensor | None:
        """The norm's scale: a parameter, a buffer where it is frozen, None where it has none."""
        return self.module.weight

    @property
    def beta(self) -> Tensor | None:
        """The norm's shift, likewise."""
        return self.module.bias

    @property
    def trains(self) -> bool:
        """Whether gamma and beta train; in FrozenBatchNorm2d they are constants."""
        return isinstance(self.gamma, nn.Parameter) and self.gamma.requires_grad

    @property
    def constant_statistics(self) -> bool:
        """Whether training uses the running statistics as they are and never corrects them."""
        if not any(True for _ in self.running_statistics()):
            return False
        learns = [m.training for m in self.module.modules() if isinstance(m, _NormBase)]
        return not all(learns) or not learns

    def running_statistics(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Pairs (running mean, running variance), each of shape (channels,)."""
        for module in self.module.modules():
            mean = getattr(module, "running_mean", None)
            if mean is not None:
                yield mean, module.running_var


@dataclass(frozen=True, eq=False)
class FilterLayer:
    """A conv layer that takes part: its filters are its output channels.

    Attributes:
        name: dotted name, wrappers left out.
        module: the conv.
        norms: the norm channels that follow its filters.
    """

    name: str
    module: nn.Module
    norms: tuple[NormLink, ...] = ()

    @property
    def weight(self) -> nn.Parameter:
        """The conv's weight."""
        return self.module.weight

    @property
    def bias(self) -> nn.Parameter | None:
        """The conv's bias, None where it has none."""
        return getattr(self.module, "bias", None)

    @property
    def num_filters(self) -> int:
        """J, the number of output channels."""
        return self.module.out_channels

    @property
    def groups(self) -> int:
        """Groups of the convolution; filters are compared inside one."""
        return self.module.groups

    @property
    def transposed(self) -> bool:
        """Whether the conv is transposed."""
        return isinstance(self.module, _ConvTransposeNd)

    @property
    def dimension(self) -> int:
        """Length d of a flattened filter: c_in / groups * kernel elements."""
        return self.weight.numel() // self.num_filters

    @property
    def shape(self) -> tuple[int, int, int]:
        """How many filters there are, their dimension, and groups."""
        return self.num_filters, self.dimension, self.groups

    def matrix(self, tensor: Tensor | None = None) -> Tensor:
        """Filters as rows, shape (J, d), of the weight or of a tensor of its shape.

        For a transposed conv, whose weight holds the output channels of one group in its second
        dimension, the rows are gathered into a copy.
        """
        tensor = (self.weight if tensor is None else tensor).detach()
        if not self.transposed:
            return tensor.reshape(self.num_filters, -1)
        grouped = tensor.reshape(self.groups, -1, *tensor.shape[1:])
        return grouped.transpose(1, 2).reshape(self.num_filters, -1)

    def write_rows(self, chosen: Tensor, rows: Tensor, tensor: Tensor | None = None) -> None:
        """Set the chosen filters (bool of shape (J,)) to rows of shape (chosen, d), in place."""
        counts = chosen.reshape(self.groups, -1).sum(dim=1)
        parts = rows.split(counts[counts > 0].tolist() if self.transposed else [len(rows)])
        kernel = self.weight.shape[2:]
        inputs = self.dimension // kernel.numel()
        for slot, part in zip(self.weight_slots(chosen), parts, strict=True):
            kernels = part.reshape(len(part), inputs, *kernel)
            slot.write(kernels.transpose(0, slot.dim), like=tensor)

    def weight_slots(self, chosen: Tensor) -> list[Slot]:
        """Where the chosen filters (bool of shape (J,)) lie in the weight."""
        if not self.transposed:
            return [Slot(self.weight, None, 0, _indices(chosen, self.weight))]
        inputs = self.weight.shape[0] // self.groups
        return [
            Slot(self.weight, slice(g * inputs, (g + 1) * inputs), 1, _indices(part, self.weight))
            for g, part in enumerate(chosen.reshape(self.groups, -1))
            if part.any()
        ]

    def filter_slots(self, chosen: Tensor) -> list[Slot]:
        """Everything that belongs to the chosen filters: weight rows, bias, gamma and beta."""
        return self.weight_slots(chosen) + self.affine_slots(chosen)

    def affine_slots(self, chosen: Tensor) -> list[Slot]:
        """Bias, gamma and beta of the chosen filters (bool of shape (J,))."""
        slots = []
        if self.bias is not None:
            slots.append(Slot(self.bias, None, 0, _indices(chosen, self.bias)))
        for link in self.norms:
            tensors = [tensor for tensor in (link.gamma, link.beta) if tensor is not None]
            if tensors:
                channels = link.channels_of(chosen).to(tensors[0].device)
                slots += [Slot(tensor, None, 0, channels) for tensor in tensors]
        return slots


def row_lengths(rows: Tensor) -> Tensor:
    """Euclidean lengths of the last dimension, which is kept: float64 of shape (..., 1)."""
    lengths = torch.linalg.vector_norm(rows, dim=-1, keepdim=True).double()
    small = lengths < 1e-15  # squares underflow in float32
    # A GPU computes both sooner than it could be asked which is needed.
    if rows.is_cuda or small.any():
        exact = torch.linalg.vector_norm(rows, dim=-1, keepdim=True, dtype=torch.float64)
        lengths = torch.where(small, exact, lengths)
    return lengths


def unit_rows(rows: Tensor, out: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Rows of length one, zero ones as they are, and their lengths.

    Args:
        rows: shape (..., J, d), float32 or float64.
        out: where to write the former; ``rows`` itself, say.

    Returns:
        (..., J, d), and float64 of shape (..., J).
    """
    lengths = row_lengths(rows)
    scales = lengths.masked_fill(lengths == 0, 1.0).reciprocal().to(rows.dtype)
    return torch.mul(rows, scales, out=out), lengths.squeeze(-1)


class SharedIndices:
    """Index tensors, one for all that are equal, as those of many layers are."""

    def __init__(self, dtype: torch.dtype = torch.int64) -> None:
        self._dtype = dtype
        self._made: dict[tuple[int, ...], Tensor] = {}

    def __call__(self, values: Iterable[int]) -> Tensor:
        """A tensor of shape (n,) that must not be changed."""
        key = tuple(values)
        if key not in self._made:
            self._made[key] = torch.tensor(key, dtype=self._dtype)
        return self._made[key]


def _indices(chosen: Tensor, tensor: Tensor) -> Tensor:
    """Where ``chosen`` is True, on the device of a tensor; found without waiting for that."""
    return chosen.cpu().nonzero().flatten().to(tensor.device)


def column_slots(module: nn.Module, dead: Tensor) -> list[Slot]:
    """Where a layer's weight reads the dead input channels (bool of shape (c_in,)).

    Args:
        module: a conv (plain, grouped, transposed, deformable) or a linear layer.
        dead: which of its input channels (features, for a linear layer) are dead.
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


def matches(name: str, patterns: Sequence[str]) -> bool:
    """Whether a dotted name, or a module that it lies in, matches a shell-style pattern."""
    parts = name.split(".")
    ancestors = [".".join(parts[: i + 1]) for i in range(len(parts))]
    return any(fnmatchcase(a, p) for p in patterns for a in ancestors)


def names_itself(name: str, patterns: Sequence[str]) -> bool:
    """Whether one of the patterns matches the dotted name itself, not only what it lies in."""
    return any(fnmatchcase(name, p) for p in patterns)


def select_layers(
    convs: dict[str, nn.Module],
    *,
    stems: Collection[str],
    heads: Collection[str],
    gates: Collection[str],
    trained: Collection[int],
    has_backbone: bool,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
) -> list[str]:
    """Names of the conv layers that take part.

    Default: below ``backbone`` where the model has one, else everywhere, without the stem, without
    prediction layers and without gates. With ``include``, what the patterns match; these layers
    then only where a pattern matches their own name. Never: depthwise and single-filter
    layers (a filter has no other to be compared with), and layers whose weight does not train.

    Args:
        convs: all convs of the model by dotted name.
        stems: names of convs that read the image.
        heads: names of prediction layers.
        gates: names of convs whose output other channels are multiplied by, behind a sigmoid.
        trained: ``id`` of every parameter that the optimizer trains.
        has_backbone: whether the model has a module called ``backbone``.
        include: shell-style patterns; a pattern also takes everything below what it matches.
        exclude: likewise; wins over ``include``.

    Raises:
        ValueError: a pattern that matches no conv; nothing trainable or comparable matched.
    """
    for key, patterns in (("INCLUDE", include), ("EXCLUDE", exclude)):
        for pattern in patterns or ():
            if not any(matches(name, [pattern]) for name in convs):
                some = ", ".join(list(convs)[:: max(1, len(convs) // 5)][:6])
                raise ValueError(
                    f"RePr {key} pattern {pattern!r} matches no conv layer; "
                    f"names that exist are, for example: {some}."
                )
    if include:
        special = {*stems, *heads, *gates}
        names = [
            name
            for name in convs
            if matches(name, include) and (name not in special or names_itself(name, include))
        ]
    elif has_backbone:
        names = [n for n in convs if n.startswith("backbone.") and n not in {*stems, *gates}]
    else:
        names = [n for n in convs if n not in {*stems, *heads, *gates}]
    names = [n for n in names if not matches(n, exclude or ())]
    trainable = [n for n in names if id(convs[n].weight) in trained]
    if not trainable:
        raise ValueError(
            f"RePr found nothing to train: of the {len(names)} conv layers that match, none has a "
            f"weight that requires gradients and is in the optimizer; "
            f"change INCLUDE/EXCLUDE or unfreeze layers."
        )
    comparable = [n for n in trainable if convs[n].out_channels // convs[n].groups > 1]
    if not comparable:
        raise ValueError(
            f"RePr found nothing to compare: all {len(trainable)} matching conv layers are "
            f"depthwise or have a single filter; change INCLUDE/EXCLUDE."
        )
    return comparable


def separable(layers: Sequence[FilterLayer], names: Collection[str]) -> list[FilterLayer]:
    """Those layers of the given names whose filters can be dropped without touching any others.

    Convs that share a weight become one layer: the first that holds it, with the norms behind all
    that do. Left out is what is shared with a conv that does not take part: a weight, or a channel
    of a norm that is called behind several convs; likewise convs that share a weight but not their
    bias, since a filter has one bias here.

    Args:
        layers: of all convs.
        names: of those that are to take part.
    """
    by_weight: dict[Tensor, list[FilterLayer]] = {}
    owners: dict[tuple[str, int], set[Tensor]] = {}
    for layer in layers:
        by_weight.setdefault(layer.weight, []).append(layer)
        for link in layer.norms:
            for channel in link.channels.tolist():
                owners.setdefault((link.name, channel), set()).add(layer.weight)
    not_alone = {weight for weights in owners.values() if len(weights) > 1 for weight in weights}
    found = []
    for weight, (first, *others) in by_weight.items():
        one_bias = all(other.bias is first.bias for other in others)
        selected = all(layer.name in names for layer in (first, *others))
        if one_bias and selected and weight not in not_alone:
            # Behind several convs, one norm may have a part of its channels for each.
            norms = {
                (link.name, *link.channels.tolist()): link
                for layer in (first, *others)
                for link in layer.norms
            }
            found.append(replace(first, norms=tuple(norms.values())))
    return found


def extremes(values: Tensor) -> Tensor:
    """The smallest and the largest value, NaN where there is one: shape (2,)."""
    return torch.stack(torch.aminmax(values.detach()))
