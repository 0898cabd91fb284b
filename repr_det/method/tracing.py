"""Around a filter: which norm follows a conv, which layers read its channels, and what else does.

Found by running the model once on an example input and following every channel through the
operations, since neither symbolic tracing (Detectron2's backbones branch on their inputs) nor
module types (its FrozenBatchNorm2d is no torch BatchNorm) nor names would tell.
"""

from __future__ import annotations

import gc
import itertools
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, MutableMapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

from repr_det.errors import UserError
from repr_det.method.layers import NormLink, SharedIndices
from repr_det.method.modules import (
    eager,
    is_conv,
    is_norm,
    mixes_channels,
    named_modules,
    norm_channels,
    unchanged,
    unwrap,
)

Filter = tuple[str, int]
"""A filter: the dotted name of its conv and its index."""

Sources = frozenset[Filter] | None
"""What a channel is made of: it is exactly zero while all of these filters are. None: anything."""

Channels = tuple[Sources, ...]
"""What each channel of a tensor is made of."""

_SAME = {
    "aten::relu", "aten::relu_", "aten::leaky_relu", "aten::leaky_relu_", "aten::elu", "aten::elu_",
    "aten::gelu", "aten::silu", "aten::silu_", "aten::mish", "aten::mish_", "aten::tanh",
    "aten::hardtanh", "aten::hardtanh_", "aten::hardswish", "aten::hardswish_", "aten::prelu",
    "aten::_prelu_kernel", "aten::rrelu_with_noise", "aten::neg", "aten::abs",
    "aten::native_dropout", "aten::clone", "aten::contiguous", "aten::detach", "aten::alias",
    "aten::lift_fresh", "aten::_to_copy", "aten::max_pool2d_with_indices",
    "aten::max_pool3d_with_indices", "aten::avg_pool2d", "aten::avg_pool3d", "aten::max_pool2d",
    "aten::_adaptive_avg_pool2d", "aten::_adaptive_avg_pool3d", "aten::adaptive_max_pool2d",
    "aten::mkldnn_adaptive_avg_pool2d", "aten::upsample_nearest2d", "aten::upsample_bilinear2d",
    "aten::upsample_bicubic2d", "aten::upsample_nearest1d", "aten::upsample_linear1d",
    "aten::upsample_nearest3d", "aten::upsample_trilinear3d", "aten::_upsample_nearest_exact2d",
    "torchvision::roi_align", "torchvision::roi_pool", "aten::reflection_pad2d",
    "aten::replication_pad2d", "aten::grid_sampler_2d",
}  # fmt: skip
"""Operations that map a zero channel to a zero channel at the same place."""

_CONVS = {
    "aten::convolution", "aten::_convolution", "aten::mkldnn_convolution",
    "aten::miopen_convolution", "aten::cudnn_convolution", "torchvision::deform_conv2d",
}  # fmt: skip


_VALUES = {
    "aten::index": (0,), "aten::index_select": (0,), "aten::index_put": (0, 2),
    "aten::index_put_": (0, 2), "aten::_index_put_impl_": (0, 2), "torchvision::roi_align": (0,),
    "torchvision::roi_pool": (0,),
}  # fmt: skip
"""Arguments that say what is read, of operations that are also told where to read it."""


_GATES = {
    "aten::sigmoid", "aten::sigmoid_", "aten::hardsigmoid", "aten::hardsigmoid_",
}  # fmt: skip
"""Operations that make of zero a constant for other channels to be multiplied by."""

_RANDOM = {"aten::native_dropout", "aten::rrelu_with_noise"}
"""Operations of :data:`_SAME` that draw a number for every entry: fewer entries, other draws."""

_SHAPE_ONLY = re.compile(r"aten::(new_\w+|\w+_like)$")
"""Operations that look at no value of their first argument."""


class Tag(NamedTuple):
    """Where the channels of a tensor lie (``dim``) and what each is made of (``sources``)."""

    dim: int
    sources: Channels


class _Step(NamedTuple):
    """Filters of one layer that kinds of channels are made of, one each, both at even distances."""

    kinds: slice
    filters: slice


@dataclass
class Reader:
    """A conv or linear layer and what each of its input channels is made of.

    Attributes:
        name: dotted name.
        module: the layer.
        sources: one entry an input channel (feature); the union over all calls.
    """

    name: str
    module: nn.Module
    sources: Channels

    def dead(self, pruned: dict[str, Tensor]) -> Tensor:
        """Which input channels are zero while the given filters are pruned.

        Args:
            pruned: bool of shape (J,) by layer name; layers left out are not pruned.

        Returns:
            bool of shape (c_in,).
        """
        unknown, made_of = self._made_of
        alive = unknown.clone()
        for name, steps in made_of.items():
            if name not in pruned:
                for step in steps:
                    alive[step.kinds].fill_(True)
                continue
            there = ~pruned[name].cpu()
            for step in steps:
                alive[step.kinds].logical_or_(there[step.filters])
        return self.by_channel(~alive)

    @cached_property
    def kinds(self) -> Channels:
        """What channels are made of, each once: that is the same for all pixels of a map."""
        return tuple(dict.fromkeys(self.sources))

    def by_channel(self, by_kind: Tensor) -> Tensor:
        """Values for :attr:`kinds` as values for channels."""
        order, counts = self._order
        if order is not None:
            by_kind = by_kind[order]
        return by_kind if counts is None else by_kind.repeat_interleave(counts)

    @cached_property
    def _order(self) -> tuple[Tensor | None, Tensor | None]:
        """The kinds in the order of channels and how many channels follow one another of each.

        None where that is each once, or one of each.
        """
        numbers = {sources: kind for kind, sources in enumerate(self.kinds)}
        runs = itertools.groupby(numbers[sources] for sources in self.sources)
        pairs = [(kind, len(list(run))) for kind, run in runs]
        order, counts = [kind for kind, _ in pairs], [count for _, count in pairs]
        return (
            None if order == list(range(len(order))) else torch.tensor(order, dtype=torch.int32),
            None if set(counts) <= {1} else torch.tensor(counts, dtype=torch.int32),
        )

    @cached_property
    def _made_of(self) -> tuple[Tensor, dict[str, list[_Step]]]:
        """Which kinds are of unknown or of no filters, and what the others are made of, by layer.

        No filter makes the former zero. Layers are mostly read channel by channel, so a few steps
        name what would be thousands of pairs.
        """
        pairs: dict[tuple[str, int], list[tuple[int, int]]] = {}
        for kind, sources in enumerate(self.kinds):
            ranks: Counter[str] = Counter()
            for name, index in sorted(sources or ()):
                pairs.setdefault((name, ranks[name]), []).append((kind, index))
                ranks[name] += 1
        unknown = torch.tensor([not sources for sources in self.kinds], dtype=torch.bool)
        steps: dict[str, list[_Step]] = {}
        for (name, _), some in pairs.items():
            steps.setdefault(name, []).extend(_steps(some))
        return unknown, steps


def _steps(pairs: list[tuple[int, int]]) -> Iterator[_Step]:
    """Pairs of a kind and a filter, kinds in ascending order, in few :class:`_Step`."""
    while pairs:
        (kind, index), end = pairs[0], 1
        apart = (1, 1)
        if len(pairs) > 1 and pairs[1][1] > index:  # a slice only goes forward
            apart = (pairs[1][0] - kind, pairs[1][1] - index)
            while end < len(pairs) and pairs[end] == (
                kind + apart[0] * end, index + apart[1] * end
            ):  # fmt: skip
                end += 1
        yield _Step(
            slice(kind, kind + apart[0] * (end - 1) + 1, apart[0]),
            slice(index, index + apart[1] * (end - 1) + 1, apart[1]),
        )
        pairs = pairs[end:]


@dataclass
class ChannelGraph:
    """What one or several example runs of a model showed.

    Attributes:
        convs: every conv that ran, by dotted name.
        norms: by conv, the norm channels that each belong to one of its filters.
        readers: every conv and linear layer that ran, by dotted name.
        stems: convs that read the image: no layer with weights before them.
        heads: prediction layers: convs with no layer with weights between them and the output.
        gates: convs that are read through a sigmoid alone (squeeze-and-excitation): their zero is
            a constant, not nothing.
        tied: pairs of channel lists that must stay of one length, channel by channel: what a sum,
            a shared layer or a batch of several inputs brought together.
        fixed: channels whose number must stay, since something sees them that is not known to work
            alike with fewer of them.
        example: runs the model on the example input on which it was followed.
    """

    convs: dict[str, nn.Module] = field(default_factory=dict)
    norms: dict[str, list[NormLink]] = field(default_factory=dict)
    readers: dict[str, Reader] = field(default_factory=dict)
    stems: set[str] = field(default_factory=set)
    heads: set[str] = field(default_factory=set)
    gates: set[str] = field(default_factory=set)
    tied: list[tuple[Channels, Channels]] = field(default_factory=list)
    fixed: list[Channels] = field(default_factory=list)
    example: Callable[[], Any] | None = None


def _union(a: Sources, b: Sources) -> Sources:
    return None if a is None or b is None else a | b


def _convs_of(channels: Channels) -> set[str]:
    """The convs that channels are known to be made of."""
    return {name for sources in channels for name, _ in sources or ()}


def _merge(a: Channels, b: Channels) -> Channels:
    return a if a == b else tuple(_union(x, y) for x, y in zip(a, b, strict=True))


class _Tracer(TorchDispatchMode):
    """Follows channels through one run of a model.

    Module hooks say where a conv, a norm or another layer with weights begins and ends; between
    them every operation on tensors passes through :meth:`__torch_dispatch__`.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.modules = dict(named_modules(model))
        self.convs = {n: m for n, m in self.modules.items() if is_conv(m)}
        self.ran: dict[str, nn.Module] = {}
        self.readers: dict[str, Reader] = {}
        self.links: dict[tuple[str, str], dict[int, int]] = {}
        self.link_dims: dict[tuple[str, str], int] = {}
        self.read: set[str] = set()
        self.stems: set[str] = set()
        self.squashed: set[str] = set()  # by one of _GATES
        self.tied: list[tuple[Channels, Channels]] = []
        self.fixed: list[Channels] = []
        # Norm channels that were seen with something else than one filter in them.
        self.blind: dict[str, set[int]] = {}
        self._owners, self.exposed = _owners(self.modules)
        # By identity, and without keeping a tensor for longer than the model does: all of a batch's
        # would need more memory than a training step.
        self._tags: MutableMapping[Tensor, Tag] = WeakTensorKeyDictionary()
        self._behind: MutableMapping[Tensor, frozenset[str]] = WeakTensorKeyDictionary()
        # Convs being run: name, whether the convolution was seen, and what is known of the input.
        self._open: list[tuple[str, bool, Tag | None]] = []
        self._inside_norm = 0
        self._inside_linear = 0

    def record(self) -> tuple:
        """A copy of what was found so far."""
        return (
            dict(self.ran), dict(self.readers), {k: dict(v) for k, v in self.links.items()},
            set(self.read), set(self.stems), set(self.squashed), list(self.tied), list(self.fixed),
            {k: set(v) for k, v in self.blind.items()}, set(self.exposed),
        )  # fmt: skip

    def restore(self, record: tuple) -> None:
        """Go back to what :meth:`record` gave."""
        (
            self.ran, self.readers, self.links, self.read, self.stems, self.squashed, self.tied,
            self.fixed, self.blind, self.exposed,
        ) = record  # fmt: skip

    def forget_tensors(self) -> None:
        """End a run."""
        self._open.clear()
        self._inside_norm = self._inside_linear = 0
        self._tags.clear()
        self._behind.clear()

    # --- what is known of a tensor

    def _tag(self, tensor: Any) -> Tag | None:
        return self._tags.get(tensor) if isinstance(tensor, Tensor) else None

    def _set_tag(self, tensor: Tensor, tag: Tag | None) -> None:
        if tag is None or tag.dim >= tensor.dim() or tensor.shape[tag.dim] != len(tag.sources):
            self._tags.pop(tensor, None)
            self._fix(tag)
        else:
            self._tags[tensor] = tag

    def _follow(self, tag: Tag, tensor: Tensor, after: Tag | None) -> None:
        """Set what became of a tag; where nothing is known of that, its channels must stay."""
        self._set_tag(tensor, after)
        if after is None:
            self._fix(tag)

    def _fix(self, *tags: Tag | None) -> None:
        self.fixed += [tag.sources for tag in tags if tag is not None]

    def fix_all(self, values: Any) -> None:
        """The channels of all tensors in some values must stay, attributes of objects included."""
        seen: set[int] = set()
        waiting = tree_leaves(values)
        while waiting:
            value = waiting.pop()
            if id(value) in seen:
                continue
            seen.add(id(value))
            if isinstance(value, Tensor):
                self._fix(self._tag(value))
            elif hasattr(value, "__dict__") and not isinstance(value, (type, nn.Module)):
                waiting += tree_leaves(list(vars(value).values()))

    def fix_what_is_left(self) -> None:
        """So must those of tensors that outlive the run: someone keeps them to look at them.

        A forward hook for a loss on features, or the model as an attribute.
        """
        if any(True for _ in self._tags):
            gc.collect()  # what only a cycle of references keeps is looked at by nobody
        self._fix(*self._tags.values())

    def _tie(self, a: Channels, b: Channels) -> Channels:
        """Channels that became one: what each is made of."""
        if a != b:
            self.tied.append((a, b))
        return _merge(a, b)

    def _weights_behind(self, values: Any) -> frozenset[str]:
        tensors = [t for t in tree_leaves(values) if isinstance(t, Tensor)]
        return frozenset().union(*(self._behind.get(t, frozenset()) for t in tensors))

    def _set_behind(self, values: Any, names: frozenset[str]) -> None:
        for tensor in tree_leaves(values):
            if isinstance(tensor, Tensor):
                self._behind[tensor] = names

    # --- layers

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Attach the hooks for one run."""
        handles = []
        for name, module in self.modules.items():
            if is_conv(module):
                enter, leave = self._enter_conv, self._leave_conv
            elif is_norm(module):
                enter, leave = self._enter_norm, self._leave_norm
            elif any(p.dim() > 1 for p in module.parameters(recurse=False)):
                enter, leave = self._enter_weighted, self._leave_weighted
            else:
                continue
            handles.append(module.register_forward_pre_hook(_named(enter, name)))
            handles.append(module.register_forward_hook(_named(leave, name)))
        try:
            with self:
                yield
        finally:
            for handle in handles:
                handle.remove()

    def _read_by(self, name: str, inputs: Any) -> None:
        self.read |= self._weights_behind(inputs)

    def _enter_conv(self, name: str, module: nn.Module, args: Any) -> None:
        if name in self.exposed or module.in_channels == module.groups:
            # A group of its own keeps its input, since its filters have no other.
            self._fix(self._tag(args[0]))
        self.ran[name] = module
        if not self._weights_behind(args):
            self.stems.add(name)
        self._read_by(name, args)
        self._add_reader(name, module, args[0], module.in_channels, channel_dim=1)
        self._open.append((name, False, self._tag(args[0])))

    def _leave_conv(self, name: str, module: nn.Module, args: Any, out: Any) -> None:
        seen = self._open.pop()[1]
        if not seen and isinstance(out, Tensor):
            # The convolution ran outside torch's dispatcher (a compiled extension).
            self._set_tag(out, self._fresh(name, module))
            self._fix(self._tag(args[0]), self._tag(out))
        self._set_behind(out, frozenset([name]))

    def _fresh(self, name: str, module: nn.Module) -> Tag:
        return Tag(1, tuple(frozenset([(name, i)]) for i in range(module.out_channels)))

    def _enter_weighted(self, name: str, module: nn.Module, args: Any) -> None:
        self._read_by(name, args)
        if isinstance(module, nn.Linear):
            self._add_reader(name, module, args[0], module.in_features, args[0].dim() - 1)
        if not _is_plain_linear(module) or name in self.exposed:
            self.fix_all(args)
        self._inside_linear += _is_plain_linear(module)

    def _leave_weighted(self, name: str, module: nn.Module, args: Any, out: Any) -> None:
        self._inside_linear -= _is_plain_linear(module)
        self.fix_all(out)
        self._set_behind(out, frozenset([name]))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._set_tag(tensor, None)

    def _add_reader(
        self, name: str, module: nn.Module, x: Tensor, width: int, channel_dim: int
    ) -> None:
        tag = self._tag(x)
        known = tag is not None and tag.dim == channel_dim and len(tag.sources) == width
        sources = tag.sources if known else (None,) * width
        if not known:
            self._fix(tag)
        if name in self.readers:
            sources = self._tie(self.readers[name].sources, sources)
        self.readers[name] = Reader(name, module, sources)

    def _enter_norm(self, name: str, module: nn.Module, args: Any) -> None:
        x = args[0]
        if not self._inside_norm and self._open and self._tag(x) is None and not self._open[-1][1]:
            # A norm inside a conv whose convolution the dispatcher did not see.
            conv = self.modules[self._open[-1][0]]
            self._set_tag(x, self._fresh(self._open[-1][0], conv))
        self._inside_norm += 1

    def _leave_norm(self, name: str, module: nn.Module, args: Any, out: Any) -> None:
        self._inside_norm -= 1
        if self._inside_norm or not isinstance(out, Tensor):
            return
        self._set_behind(out, self._weights_behind(args))
        self._set_tag(out, self._through_norm(name, module, self._tag(args[0])))

    def _through_norm(self, name: str, module: nn.Module, tag: Tag | None) -> Tag | None:
        if tag is None or norm_channels(module) != len(tag.sources):
            self._fix(tag)
            self.blind.setdefault(name, set()).update(range(norm_channels(module) or 0))
            return None
        if mixes_channels(module) or name in self.exposed:
            self._fix(tag)
        if mixes_channels(module) and getattr(module, "weight", None) is None:
            return None  # other channels shift a zero one, and there is no scale to hold at zero
        sources: list[Sources] = []
        for channel, source in enumerate(tag.sources):
            if source is None or len(source) != 1:
                self.fixed.append((source,))
                self.blind.setdefault(name, set()).add(channel)
                sources.append(None)
                continue
            (conv, index) = next(iter(source))
            self.links.setdefault((conv, name), {})[channel] = index
            self.link_dims[conv, name] = tag.dim
            sources.append(source)
        return Tag(tag.dim, tuple(sources))

    # --- operations

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        op = func._schema.name
        # Boxes from a prediction layer say where another looks: they are an output all the same.
        values = [args[i] for i in _VALUES[op]] if op in _VALUES else (args, kwargs)
        behind = self._weights_behind(values)
        if self._inside_norm or self._inside_linear:
            return func(*args, **kwargs)
        # Read before the operation: in-place ones change what their first argument is.
        tag = self._result(op, args, kwargs)
        self._notice(op, args, kwargs, followed=tag is not None)
        out = func(*args, **kwargs)
        self._set_behind(out, behind)
        if func._schema.is_mutable and op not in _SAME:
            self._changed_through(func, args, behind)
        if callable(tag):
            tag(out)
        else:
            for i, tensor in enumerate(t for t in tree_leaves(out) if isinstance(t, Tensor)):
                self._set_tag(tensor, tag if i == 0 else None)
        return out

    def _changed_through(self, func: Any, args: tuple, behind: frozenset[str]) -> None:
        """What shares memory with a tensor that was written into is not known any more."""
        written = [
            tensor
            for tensor, argument in zip(args, func._schema.arguments, strict=False)
            if isinstance(tensor, Tensor) and argument.alias_info and argument.alias_info.is_write
        ]
        memory = {tensor.untyped_storage()._cdata for tensor in written}
        for other in list(self._behind):
            shares = other.untyped_storage()._cdata in memory
            if shares and not any(other is tensor for tensor in written):
                self._behind[other] |= behind
                self._fix(self._tag(other))
                self._set_tag(other, None)

    def _notice(self, op: str, args: tuple, kwargs: dict, *, followed: bool) -> None:
        """Channels that an unknown operation sees must stay, and weights used outside a layer."""
        opened = {name for name, _, _ in self._open}
        for tensor in tree_leaves((args, kwargs)):
            if not isinstance(tensor, Tensor):
                continue
            owner = self._owners.get(id(tensor))
            if owner is not None and owner not in opened:
                self.exposed.add(owner)
            if not followed and not _SHAPE_ONLY.match(op):
                self._fix(self._tag(tensor))

    def _convolved(self, args: tuple) -> Tag:
        """The tag of a convolution's result, inside a conv."""
        name, again, given = self._open[-1]
        self._open[-1] = (name, True, given)
        module, x = self.modules[name], self._tag(args[0])
        fresh = self._fresh(name, module)
        plain = args[1] is module._parameters.get("weight")
        if again or not plain or x != given:
            self.exposed.add(name)
            self._fix(x)
        # What says where to read, of a deformable convolution.
        self._fix(*(self._tag(a) for a in args[2:] if isinstance(a, Tensor)))
        return fresh

    def _result(self, op: str, args: tuple, kwargs: dict) -> Tag | None | Callable[[Any], None]:
        """The tag of an operation's result, or what sets it once the result is there."""
        if op in _CONVS:
            return self._convolved(args) if self._open else None
        x = args[0] if args else None
        tag = self._tag(x)
        if op in ("aten::cat", "aten::stack"):
            return self._cat(args) if op == "aten::cat" else None
        if op in ("aten::zeros", "aten::zeros_like", "aten::new_zeros"):
            return self._zeros
        if op in ("aten::add", "aten::add_", "aten::sub", "aten::sub_", "aten::maximum"):
            return self._sum(x, args[1])
        if op in ("aten::index_put_", "aten::index_put", "aten::_index_put_impl_"):
            return self._index_put(x, args[1], args[2])
        if op in ("aten::copy", "aten::copy_"):
            if x._is_view():
                self._fix(self._tag(args[1]))
            return self._tag(args[1])
        if op in ("aten::mul", "aten::mul_", "aten::div", "aten::div_"):
            return self._product(op, x, args[1])
        if tag is None:
            return None
        if op in _GATES:
            self.squashed |= _convs_of(tag.sources)
            return None
        if op in _SAME:
            per_channel = "prelu" in op and args[1].numel() > 1
            if op in _RANDOM or per_channel:
                self._fix(tag)
            return tag
        if op in ("aten::view", "aten::_unsafe_view", "aten::reshape", "aten::_reshape_alias"):
            return lambda out: self._follow(tag, out, _reshaped(tag, x.shape, out.shape))
        if op == "aten::mean":
            return self._reduced(tag, x, args[1:], kwargs)
        if op in ("aten::permute", "aten::transpose", "aten::t", "aten::transpose_"):
            return _permuted(op, tag, x, args)
        if op in ("aten::squeeze", "aten::unsqueeze", "aten::expand"):
            return lambda out: self._follow(tag, out, _reshaped(tag, x.shape, out.shape))
        if op == "aten::slice":
            if args[1] % x.dim() == tag.dim:
                self._fix(tag)
            return _sliced(tag, x, *args[1:])
        if op in ("aten::split", "aten::split_with_sizes", "aten::chunk"):
            dim = (args[2] if len(args) > 2 else kwargs.get("dim", 0)) % x.dim()
            return lambda out: self._split(tag, dim, out)
        if op == "aten::index":
            return self._indexed(tag, args[1])
        if op == "aten::index_select":
            return tag if args[1] % x.dim() != tag.dim else None
        if op == "aten::constant_pad_nd":
            return _padded(tag, x, args[1], args[2] if len(args) > 2 else kwargs.get("value", 0))
        return None

    def _zeros(self, out: Any) -> None:
        if isinstance(out, Tensor) and out.dim() > 1:
            self._set_tag(out, Tag(1, (frozenset(),) * out.shape[1]))

    def _sum(self, x: Any, y: Any) -> Tag | None:
        a, b = self._tag(x), self._tag(y)
        if a is None or b is None or x.shape[a.dim :] != y.shape[b.dim :] or a.dim != b.dim:
            return None
        return Tag(a.dim, self._tie(a.sources, b.sources))

    def _product(self, op: str, x: Any, y: Any) -> Tag | None:
        a, b = self._tag(x), self._tag(y)
        for tag, mine, other in ((a, x, y), (b, y, x)):
            if tag is None or (mine is y and op.startswith("aten::div")):
                continue
            if not isinstance(other, Tensor):
                return tag
            if other.dim() <= mine.dim():
                at = tag.dim - (mine.dim() - other.dim())
                if at >= 0 and other.shape[at] > 1:
                    self._fix(a, b)
                return tag
        return None

    def _index_put(self, x: Tensor, indices: Any, values: Tensor) -> Tag | None:
        a, b = self._tag(x), self._tag(values)
        rows_only = sum(i is not None for i in indices) == 1 and indices[0] is not None
        if a is None or b is None or not rows_only or a.dim != b.dim or a.dim == 0:
            return None
        if len(a.sources) != len(b.sources):
            return None
        # Zeros that are written into have the shape of what is written.
        return Tag(a.dim, self._tie(a.sources, b.sources) if any(a.sources) else b.sources)

    def _indexed(self, tag: Tag, indices: Any) -> Tag | None:
        touched = [i for i, index in enumerate(indices) if index is not None]
        if touched != [0] or indices[0].dim() != 1 or tag.dim == 0:
            return None
        return tag

    def _cat(self, args: tuple) -> Tag | None:
        tensors = [t for t in args[0] if t.numel()] or list(args[0])
        dim = (args[1] if len(args) > 1 else 0) % tensors[0].dim()
        tags = [self._tag(t) for t in tensors]
        if dim == 1 and any(tags) and all(t is None or t.dim == 1 for t in tags):
            sources: list[Sources] = []
            for tensor, tag in zip(tensors, tags, strict=True):
                sources += tag.sources if tag else (None,) * tensor.shape[1]
            return Tag(1, tuple(sources))
        if any(t is None or t.dim == dim or t.dim != tags[0].dim for t in tags):
            return None
        merged = tags[0].sources
        for tag in tags[1:]:
            merged = self._tie(merged, tag.sources)
        return Tag(tags[0].dim, merged)

    def _split(self, tag: Tag, dim: int, out: Any) -> None:
        start = 0
        if dim == tag.dim:
            self._fix(tag)
        for part in out:
            if dim == tag.dim:
                width = part.shape[dim]
                self._set_tag(part, Tag(dim, tag.sources[start : start + width]))
                start += width
            else:
                self._set_tag(part, tag)

    def _reduced(self, tag: Tag, x: Tensor, rest: tuple, kwargs: dict) -> Tag | None:
        dims = rest[0] if rest else kwargs.get("dim")
        keep = rest[1] if len(rest) > 1 else kwargs.get("keepdim", False)
        if dims is None:
            return None
        dims = {d % x.dim() for d in ([dims] if isinstance(dims, int) else dims)}
        if tag.dim in dims:
            return None
        return Tag(tag.dim if keep else tag.dim - sum(d < tag.dim for d in dims), tag.sources)


def _is_plain_linear(module: nn.Module) -> bool:
    return type(module).forward is nn.Linear.forward


def _owners(modules: dict[str, nn.Module]) -> tuple[dict[int, str], set[str]]:
    """Which layer owns a tensor, by id; and layers whose tensors are not theirs alone."""
    owners: dict[int, str] = {}
    exposed: set[str] = set()
    for name, module in modules.items():
        if not (is_conv(module) or is_norm(module) or isinstance(module, nn.Linear)):
            continue
        if not is_norm(module) and module._parameters.get("weight") is None:
            exposed.add(name)  # computed from others
        for tensor in itertools.chain(module._parameters.values(), module._buffers.values()):
            if tensor is not None and owners.setdefault(id(tensor), name) != name:
                exposed |= {name, owners[id(tensor)]}
    return owners, exposed


def _named(function: Callable, name: str) -> Callable:
    return lambda *args: function(name, *args)


def _reshaped(tag: Tag, before: torch.Size, after: torch.Size) -> Tag | None:
    """A view that keeps the channels or flattens them together with what follows them."""
    lead = math.prod(before[: tag.dim])
    channels = before[tag.dim]
    dims = [d for d in range(len(after)) if math.prod(after[:d]) == lead]
    for dim in reversed(dims):
        if after[dim] == channels and math.prod(after[dim + 1 :]) == math.prod(
            before[tag.dim + 1 :]
        ):
            return Tag(dim, tag.sources)
    inner = math.prod(before[tag.dim + 1 :])
    for dim in dims:
        if after[dim] == channels * inner and dim == len(after) - 1:
            return Tag(dim, tuple(s for s in tag.sources for _ in range(inner)))
    return None


def _permuted(op: str, tag: Tag, x: Tensor, args: tuple) -> Tag | None:
    if op == "aten::permute":
        order = [d % x.dim() for d in args[1]]
    else:
        a, b = (0, 1) if op == "aten::t" else (args[1] % x.dim(), args[2] % x.dim())
        order = list(range(x.dim()))
        order[a], order[b] = order[b], order[a]
    return Tag(order.index(tag.dim), tag.sources)


def _sliced(
    tag: Tag,
    x: Tensor,
    dim: int = 0,
    start: int | None = None,
    end: int | None = None,
    step: int = 1,
) -> Tag:
    if dim % x.dim() != tag.dim:
        return tag
    return Tag(tag.dim, tag.sources[slice(start, end, step)])


def _padded(tag: Tag, x: Tensor, pad: list[int], value: float | None) -> Tag | None:
    if value:
        return None
    position = 2 * (x.dim() - 1 - tag.dim)
    if position >= len(pad):
        return tag
    before, after = pad[position], pad[position + 1]
    if before < 0 or after < 0:
        return None
    zero: tuple[Sources, ...] = (frozenset(),)
    return Tag(tag.dim, zero * before + tag.sources + zero * after)


_IMAGE_SIZES = (64, 32, 28, 224, 16, 8, 48, 96, 128, 256, 299, 384, 448, 512)
"""Image sizes to try, for models that take only one."""


def _example_runs(model: nn.Module, convs: list[nn.Module]) -> Iterator[Callable[[], Any]]:
    """Ways to run an unknown model, the likeliest first."""
    first = convs[0]
    device, dtype = first.weight.device, first.weight.dtype
    spatial = first.weight.dim() - 2
    is_detector = isinstance(getattr(model, "backbone", None), nn.Module)
    # The first conv in the order of modules need not be the one that reads the image.
    channels = dict.fromkeys([3, first.in_channels, 1])
    sizes = _IMAGE_SIZES[:1] if is_detector else _IMAGE_SIZES  # a detector takes any size
    for size, width in itertools.product(sizes, channels):
        # One number seen as an image: a graph keeps the run, and what it holds, while it lives.
        blank = torch.zeros((), device=device, dtype=dtype).expand(2, width, *[size] * spatial)
        runs = [
            lambda x=blank: model(x.clone()),
            lambda x=blank, n=size: model([{"image": x[0].clone(), "height": n, "width": n}]),
        ]
        yield from reversed(runs) if is_detector else runs
        if is_detector:
            yield lambda x=blank: model.backbone(x.clone())


def trace(
    model: nn.Module,
    run: Callable[[], Any] | None = None,
    also: Callable[[], Any] | None = None,
) -> ChannelGraph:
    """Follow the channels of every conv through a model.

    The model runs without gradients, in evaluation mode and, where that works too, in training mode
    (which may use further heads). Buffers, modes and random state are as before afterwards.

    Args:
        model: any module with convs; wrappers are looked through.
        run: runs the model on an input of its own, for a model that no zero image fits, or that
            uses convs in training alone and does not train on zero images.
        also: a run in training mode to follow besides, such as one on a training batch, which may
            use parts that no example reaches.

    Returns:
        ChannelGraph: a channel whose way leads through an operation that is not known to keep
        zeros at zero has unknown sources from there on.

    Raises:
        UserError: the model has no conv, or could not be run.
    """
    model = unwrap(model)
    tracer = _Tracer(model)
    if not tracer.convs:
        raise UserError(f"RePr needs convolutions, but {type(model).__name__} has none.")
    runs = itertools.chain(_example_runs(model, list(tracer.convs.values())), [run] if run else [])
    reasons = []
    for attempt in runs:
        ran = False
        for training in (False, True):
            try:
                _run(tracer, model, attempt, training)
                ran = True
            except Exception as error:  # an unknown model may raise anything
                reasons.append(f"{type(error).__name__}: {error}".splitlines()[0])
        if ran:
            if run not in (None, attempt) and tracer.convs.keys() > tracer.ran.keys():
                with suppress(Exception):  # there may be no batch to run it on
                    _run(tracer, model, run, training=True)
            if also is not None:
                _run(tracer, model, also, training=True)
            graph = _graph(tracer)
            graph.example = attempt
            return graph
    raise UserError(
        f"RePr could not run {type(model).__name__} on an example image ({reasons[0]}); "
        f"pass batches= and loss= so that it can use real ones."
    )


def _run(tracer: _Tracer, model: nn.Module, run: Callable[[], Any], training: bool) -> None:
    """Follow one run; what it showed counts only if it succeeds."""
    record = tracer.record()
    try:
        with unchanged(model), torch.no_grad(), eager(), tracer.watching():
            model.train(training)
            tracer.fix_all(run())
            tracer.fix_what_is_left()
    except Exception:
        tracer.restore(record)
        raise
    finally:
        tracer.forget_tensors()


def _graph(tracer: _Tracer) -> ChannelGraph:
    norms: dict[str, list[NormLink]] = {}
    indices = SharedIndices()
    for (conv, norm), pairs in tracer.links.items():
        channels = sorted(pairs)
        norms.setdefault(conv, []).append(
            NormLink(
                norm,
                tracer.modules[norm],
                indices(pairs[c] for c in channels),
                indices(channels),
                tracer.link_dims[conv, norm],
            )
        )
    heads = {n for n in tracer.ran if n not in tracer.read}
    tied, fixed = _around_norms(tracer)
    for name in (heads | tracer.exposed) & set(tracer.ran):
        fixed.append(tracer._fresh(name, tracer.modules[name]).sources)
    fixed += [tracer.readers[name].sources for name in tracer.exposed if name in tracer.readers]
    return ChannelGraph(
        convs={n: m for n, m in tracer.convs.items() if n in tracer.ran},
        norms=norms,
        readers=_one_per_weight(tracer.readers),
        stems=tracer.stems,
        heads=heads,
        gates=tracer.squashed.difference(*(_convs_of(r.sources) for r in tracer.readers.values())),
        tied=tracer.tied + tied,
        fixed=tracer.fixed + fixed,
    )


def _around_norms(tracer: _Tracer) -> tuple[list[tuple[Channels, Channels]], list[Channels]]:
    """What shares a norm's channel is tied; what shares it with something unknown is fixed."""
    tied: list[tuple[Channels, Channels]] = []
    fixed: list[Channels] = []
    first: dict[tuple[str, int], Sources] = {}
    for (conv, norm), pairs in tracer.links.items():
        for channel, index in pairs.items():
            source: Sources = frozenset([(conv, index)])
            if channel in tracer.blind.get(norm, ()) or norm in tracer.exposed:
                fixed.append((source,))
            tied.append(((first.setdefault((norm, channel), source),), (source,)))
    return tied, fixed


def _one_per_weight(readers: dict[str, Reader]) -> dict[str, Reader]:
    """Readers that share one weight as one reader of what any of them reads."""
    # By tensor and not by its id: one that is computed at every access lives no longer than that.
    first: dict[Tensor, Reader] = {}
    for reader in readers.values():
        shared = first.setdefault(reader.module.weight, reader)
        if shared is not reader:
            shared.sources = _merge(shared.sources, reader.sources)
    return {reader.name: reader for reader in first.values()}
