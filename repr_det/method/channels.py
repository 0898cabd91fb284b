"""What each operation does with channels: a table of small rules.

While a filter is pruned, its channel is exactly zero. The channel then meets other operations, and
two questions are asked of each. Is the channel still zero in the result, and where is it? Do all
other channels stay the same if this one is removed? A :class:`Tag` answers the first question: it
says which dimension of a tensor counts its channels, and from which filters each is computed.
Pinning a channel answers the second with no: a pinned channel is held at zero and never removed.

**An operation without a rule is unknown**: its result has no tag, and the channels of all its
arguments are pinned. This is always safe, so a rule is only needed where an operation is common.

To add a rule, first find the operation. Its name is the one that torch's dispatcher sees, and may
differ from the Python function: ``x.reshape`` runs as ``aten::view``, or ``aten::clone`` and a
view. This prints the operations of any code, with the names and defaults of their arguments::

    from torch.utils._python_dispatch import TorchDispatchMode

    class Show(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            print(func._schema)
            return func(*args, **(kwargs or {}))

    with torch.no_grad(), Show():
        nn.functional.pixel_shuffle(torch.rand(1, 8, 4, 4), 2)

Then write a function that takes a :class:`Call`. This one is of a mean over some dimensions::

    @rule("aten::mean")
    def _mean(call: Call) -> Tag | None:
        tag = call.tag("self")  # of the argument that is called "self"
        if tag is None or tag.dim in [call.axis(dim) for dim in call["dim"]]:
            return None  # not known
        ...
        return Tag(dim, tag.sources)  # where the same channels are in the result

A rule runs after the operation, and only if an argument has a tag. It uses

- ``call.tag(name)``, the tag that an argument had before the operation. A rule that asks for a tag
  and returns one is responsible for its channels. Tags that it does not ask for are pinned;
- ``call[name]``, the value of an argument or its default, ``call.shape(name)``, the shape of a
  tensor before the operation, and ``call.out``, the result;
- ``call.tags(name)`` and ``call.shapes(name)``, the same of an argument that is a list of tensors;
- ``call.axis(dim)``, a dimension counted from the front: -1 of a 4-d tensor is 3. ``Tag.dim`` is
  always counted from the front;
- ``call.pin(tag)``, which pins channels and may be followed by returning a tag. It is for
  operations that keep zeros but treat the other channels differently if there are fewer. Dropout
  keeps zeros, but draws other random numbers then;
- ``call.tie(a, b)``, for operations that combine two lists of channels one by one, such as a sum:
  the channels are removed together or not at all. It returns the sources of the results.
  Both may be parts of one tag, such as ``tag.sources[::2]``, and more than two are tied in turn.

A rule returns the tag of the result. None means that nothing is known: the channels of all
arguments are pinned. For several results it returns a list with a tag or None for each; a single
tag is for the first of them.

**Every rule must return None for the dimensions in which the operation mixes entries.** A 2-d
pooling mixes the last two, so a tag whose ``dim`` is one of these must not come out.

Last, add an example of the operation to ``EXAMPLES`` in ``tests/method/test_channels.py``, and
remove it from ``UNKNOWN`` there if it is in it. The test puts the channels in every dimension, and
compares the rule with what the operation really does when channels change, are zero or are removed.
Check that a shape in ``SHAPES`` leaves the result two channels or more, or their order is not
tested.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

Filter = tuple[str, int]
"""A filter: the dotted name of its layer and its index."""

Sources = frozenset[Filter] | None
"""The filters that a channel is computed from. It is exactly zero while all of them are pruned.
Empty: always zero (padding). None: unknown, so never assumed to be zero."""

Channels = tuple[Sources, ...]
"""The sources of each channel of a tensor."""


class Tag(NamedTuple):
    """What is known about the channels of a tensor.

    Attributes:
        dim: the dimension that counts channels, from the front.
        sources: the sources of each channel, as many as the dimension is long.
    """

    dim: int
    sources: Channels


class Call:
    """One operation on tensors: its arguments, their tags, and its result.

    Args:
        func: the operation, an overload such as ``torch.ops.aten.mean.dim``.
        args: its arguments.
        kwargs: its keyword arguments.
        tag_of: returns the tag of a tensor, or None.

    Attributes:
        op: name of the operation without its overload, such as ``aten::mean``.
        out: the result, after :meth:`run`.
        given: tags of the arguments before the operation, by name of each argument that is a tensor
            or a list of tensors.
        pinned: tags whose channels must not be removed.
        tied: pairs of lists of channels that are removed together.
    """

    def __init__(
        self, func: Any, args: tuple, kwargs: dict[str, Any], tag_of: Callable[[Any], Tag | None]
    ) -> None:
        self._run = lambda: func(*args, **kwargs)
        self._schema = func._schema
        self.op: str = func._schema.name
        self.out: Any = None
        self.pinned: list[Tag] = []
        self.tied: list[tuple[Channels, Channels]] = []
        self._arguments: dict[str, Any] = {}
        for place, argument in enumerate(func._schema.arguments):
            given = kwargs.get(argument.name, argument.default_value)
            self._arguments[argument.name] = args[place] if place < len(args) else given
        # Recorded before the operation, which may write into its arguments.
        self.given: dict[str, list[Tag | None]] = {}
        self._shapes: dict[str, list[torch.Size]] = {}
        for name, value in self._arguments.items():
            if tensors := _tensors(value):
                self.given[name] = [tag_of(tensor) for tensor in tensors]
                self._shapes[name] = [tensor.shape for tensor in tensors]
        self._asked: set[str] = set()

    def __getitem__(self, name: str) -> Any:
        """The value of an argument; None where this overload does not have it."""
        return self._arguments.get(name)

    def tags(self, name: str) -> list[Tag | None]:
        """The tags of an argument that is a list of tensors. The rule is responsible for them."""
        self._asked.add(name)
        return self.given.get(name, [])

    def tag(self, name: str) -> Tag | None:
        """The tag that an argument had before the operation. The rule is responsible for it."""
        tags = self.tags(name)
        return tags[0] if len(tags) == 1 else None

    def shapes(self, name: str) -> list[torch.Size]:
        """The shapes of an argument that is a list of tensors."""
        return self._shapes.get(name, [])

    def shape(self, name: str) -> torch.Size:
        """The shape of an argument before the operation."""
        return self._shapes[name][0]

    def written(self) -> list[Tensor]:
        """Tensors that the operation writes into."""
        return [
            tensor
            for argument in self._schema.arguments
            if argument.alias_info is not None and argument.alias_info.is_write
            for tensor in _tensors(self._arguments[argument.name])
        ]

    def axis(self, dim: int) -> int:
        """A dimension of the argument "self", counted from the front."""
        return dim % max(1, len(self.shape("self")))

    def pin(self, *tags: Tag | None) -> None:
        """Forbid that these channels are removed. Nothing happens for None."""
        self.pinned += [tag for tag in tags if tag is not None]

    def tie(self, a: Channels, b: Channels) -> Channels:
        """Remove channels ``a[i]`` and ``b[i]`` together only; returns their merged sources."""
        if a != b:
            self.tied.append((a, b))
        return merged(a, b)

    def run(self) -> list[Tag | None]:
        """Run the operation and its rule; returns a tag or None for each tensor in the result."""
        self.out = self._run()
        outputs = _tensors(self.out)
        known = any(tag is not None for tags in self.given.values() for tag in tags)
        found = RULES[self.op](self) if self.op in RULES and (known or self.op in _ZEROS) else None
        for name, tags in self.given.items():
            if (found is None or name not in self._asked) and self.op not in SHAPE_ONLY:
                self.pin(*tags)
        listed = found if isinstance(found, list) else [found]
        listed = [*listed, *[None] * len(outputs)][: len(outputs)]
        return [self._checked(tag, out) for tag, out in zip(listed, outputs, strict=True)]

    def _checked(self, tag: Tag | None, out: Tensor) -> Tag | None:
        """The tag; where it does not fit its tensor, None, and its channels are pinned."""
        if tag is None or (tag.dim < out.dim() and out.shape[tag.dim] == len(tag.sources)):
            return tag
        self.pin(tag)
        return None


Rule = Callable[[Call], "Tag | list[Tag | None] | None"]
"""Decides after an operation what is known about its result."""

RULES: dict[str, Rule] = {}
"""The rule of each operation, by its name."""

R = TypeVar("R", bound=Rule)


def rule(*operations: str) -> Callable[[R], R]:
    """Enter a function into :data:`RULES` for some operations."""

    def enter(function: R) -> R:
        RULES.update(dict.fromkeys(operations, function))
        return function

    return enter


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [v for v in value if isinstance(v, Tensor)] if isinstance(value, (list, tuple)) else []


def merged(a: Channels, b: Channels) -> Channels:
    """The sources of channels that are computed from two others each, such as sums."""
    if a == b:
        return a
    pairs = zip(a, b, strict=True)
    return tuple(None if x is None or y is None else x | y for x, y in pairs)


def filters_of(channels: Channels) -> set[Filter]:
    """All filters that channels are known to be computed from."""
    return {one for sources in channels for one in sources or ()}


# --- kinds of operations

CONVOLUTIONS = {
    "aten::convolution", "aten::_convolution", "aten::mkldnn_convolution",
    "aten::miopen_convolution", "aten::cudnn_convolution", "torchvision::deform_conv2d",
}  # fmt: skip
"""Operations that a conv layer runs. Their result is the layer's filters."""

CONTRACTIONS = CONVOLUTIONS | {
    "aten::mm", "aten::bmm", "aten::addmm", "aten::baddbmm", "aten::addbmm", "aten::matmul",
    "aten::linear", "aten::mv", "aten::dot", "aten::mkldnn_rnn_layer", "aten::lstm", "aten::gru",
}  # fmt: skip
"""Operations that sum over products of entries. One that takes a weight does what a layer does."""

GATES = {
    "aten::sigmoid", "aten::sigmoid_", "aten::hardsigmoid", "aten::hardsigmoid_", "aten::_softmax",
    "aten::softplus", "aten::exp", "aten::log_sigmoid_forward", "aten::glu",
}  # fmt: skip
"""Operations that turn zero into a constant, which mostly multiplies other channels."""

ROOTS = {
    "aten::sqrt", "aten::sqrt_", "aten::rsqrt", "aten::rsqrt_", "aten::log", "aten::log_",
    "aten::log2", "aten::log2_", "aten::log10", "aten::log10_", "aten::hypot", "aten::hypot_",
    "aten::reciprocal", "aten::reciprocal_", "aten::atan2", "aten::atan2_", "aten::logit",
    "aten::logit_",
}  # fmt: skip
"""Operations that are always infinite at zero, or have an infinite slope there."""


def infinite_at_zero(call: Call) -> list[Tag | None]:
    """Tags of channels that an operation makes infinite at zero, or gives an infinite slope."""
    if call.op in DIVISIONS:
        return call.given.get("other", [])
    exponent = call["exponent"] if call.op in ("aten::pow", "aten::pow_") else None
    is_below_one = isinstance(exponent, (int, float)) and exponent < 1 and exponent != 0
    return call.given["self"] if is_below_one or call.op in ROOTS else []


NORMS = {
    "aten::native_batch_norm", "aten::_native_batch_norm_legit", "aten::_batch_norm_with_update",
    "aten::_native_batch_norm_legit_no_training", "aten::cudnn_batch_norm",
    "aten::miopen_batch_norm", "aten::native_group_norm", "aten::native_layer_norm",
    "aten::_fused_rms_norm",
}  # fmt: skip
"""Norms that are written as operations, on any device."""


def is_own_norm(call: Call) -> bool:
    """Whether an operation is a norm with parameters or statistics of its own.

    It is asked outside of norms that are modules. Nobody could hold these parameters at zero.
    """
    return call.op in NORMS and bool({"weight", "bias", "running_mean"} & call.given.keys())


SHIFTS = {"aten::add", "aten::add_", "aten::sub", "aten::sub_", "aten::rsub"}
"""Operations that may add a constant to a channel, as in ``1 + scale``."""

PRODUCTS = {"aten::mul", "aten::mul_"}

DIVISIONS = {"aten::div", "aten::div_"}

READS = {
    "aten::index": ("self",), "aten::index_select": ("self",), "aten::gather": ("self",),
    "aten::index_put": ("self", "values"), "aten::index_put_": ("self", "values"),
    "aten::_index_put_impl_": ("self", "values"), "torchvision::roi_align": ("input",),
    "torchvision::roi_pool": ("input",),
}  # fmt: skip
"""Arguments whose values are in the result. The other arguments only say which values to take:
RoIAlign gets its boxes from the RPN, and that does not make the RPN's predictions hidden."""

SHAPE_ONLY = {
    "aten::zeros_like", "aten::ones_like", "aten::empty_like", "aten::full_like", "aten::rand_like",
    "aten::randn_like", "aten::randint_like", "aten::new_zeros", "aten::new_ones", "aten::new_full",
    "aten::new_empty", "aten::new_empty_strided",
}  # fmt: skip
"""Operations that use only the shape of their first argument."""

PARTS = {
    "aten::slice", "aten::split", "aten::split_with_sizes", "aten::chunk", "aten::select",
    "aten::unbind",
}  # fmt: skip
"""Operations whose result may be a part of their argument. They do not use the rest."""

_ZEROS = {"aten::zeros", "aten::zeros_like", "aten::new_zeros"}


# --- entry by entry


@rule(
    "aten::relu", "aten::relu_", "aten::leaky_relu", "aten::leaky_relu_", "aten::elu", "aten::elu_",
    "aten::gelu", "aten::gelu_", "aten::silu", "aten::silu_", "aten::mish", "aten::mish_",
    "aten::tanh", "aten::tanh_", "aten::hardswish", "aten::hardswish_", "aten::neg", "aten::neg_",
    "aten::abs", "aten::abs_", "aten::sign", "aten::sign_", "aten::clone", "aten::contiguous",
    "aten::detach", "aten::alias", "aten::lift_fresh", "aten::_to_copy",
)  # fmt: skip
def _entrywise(call: Call) -> Tag | None:
    return call.tag("self")


@rule(
    "aten::hardtanh", "aten::hardtanh_", "aten::clamp", "aten::clamp_", "aten::clamp_min",
    "aten::clamp_min_", "aten::clamp_max", "aten::clamp_max_",
)  # fmt: skip
def _clamped(call: Call) -> Tag | None:
    names = ("min", "max") if "clamp" in call.op else ("min_val", "max_val")
    low, high = (call[name] for name in names)
    if isinstance(low, Tensor) or isinstance(high, Tensor):
        return None
    # Otherwise zero becomes one of the limits.
    keeps_zeros = (low is None or low <= 0) and (high is None or high >= 0)
    return call.tag("self") if keeps_zeros else None


def keeps_places(op: str) -> bool:
    """Whether tags stay right where an operation writes into a part of a tensor."""
    return RULES.get(op) in (_entrywise, _clamped)


@rule("aten::pow", "aten::pow_")
def _power(call: Call) -> Tag | None:
    # Zero to the power of zero is one. Below one, the slope at zero is infinite.
    exponent = call["exponent"]
    is_known = isinstance(exponent, (int, float)) and exponent >= 1
    return call.tag("self") if is_known else None


@rule("aten::prelu", "aten::_prelu_kernel")
def _prelu(call: Call) -> Tag | None:
    if call["weight"].numel() > 1:
        call.pin(call.tag("self"))  # its weight has a slope for each channel
    return call.tag("self")


@rule("aten::native_dropout", "aten::rrelu_with_noise")
def _random(call: Call) -> Tag | None:
    tag = call.tag("input" if "dropout" in call.op else "self")
    call.pin(tag)  # with fewer entries, other random numbers are drawn for the rest
    return tag


# --- operations on the last dimensions


def _spatial(dims: int) -> Rule:
    """The rule of an operation that mixes entries of the last ``dims`` dimensions alone."""

    def follow(call: Call) -> Tag | None:
        tag = call.tag("self")
        return tag if tag is not None and tag.dim < len(call.shape("self")) - dims else None

    return follow


rule(
    "aten::upsample_nearest1d", "aten::_upsample_nearest_exact1d", "aten::upsample_linear1d",
    "aten::reflection_pad1d", "aten::replication_pad1d",
)(_spatial(1))  # fmt: skip
rule(
    "aten::max_pool2d_with_indices", "aten::avg_pool2d", "aten::adaptive_max_pool2d",
    "aten::_adaptive_avg_pool2d", "aten::mkldnn_adaptive_avg_pool2d", "aten::upsample_nearest2d",
    "aten::_upsample_nearest_exact2d", "aten::upsample_bilinear2d", "aten::upsample_bicubic2d",
    "aten::reflection_pad2d", "aten::replication_pad2d",
)(_spatial(2))  # fmt: skip
rule(
    "aten::max_pool3d_with_indices", "aten::avg_pool3d", "aten::adaptive_max_pool3d",
    "aten::_adaptive_avg_pool3d", "aten::upsample_nearest3d", "aten::_upsample_nearest_exact3d",
    "aten::upsample_trilinear3d", "aten::reflection_pad3d", "aten::replication_pad3d",
)(_spatial(3))  # fmt: skip


@rule("aten::grid_sampler_2d", "torchvision::roi_align", "torchvision::roi_pool")
def _sampled(call: Call) -> Tag | None:
    # One result for each box or point of the grid: only dimension 1 stays the same.
    tag = call.tag("input")
    return tag if tag is not None and tag.dim == 1 else None


@rule("aten::constant_pad_nd")
def _padded(call: Call) -> Tag | None:
    tag, pad = call.tag("self"), call["pad"]
    if tag is None or call["value"]:
        return None
    position = 2 * (len(call.shape("self")) - 1 - tag.dim)
    if position >= len(pad):
        return tag
    before, after = pad[position], pad[position + 1]
    if before < 0 or after < 0:
        return None
    zero: tuple[Sources, ...] = (frozenset(),)
    return Tag(tag.dim, zero * before + tag.sources + zero * after)


@rule(
    "aten::mean", "aten::sum", "aten::amax", "aten::amin", "aten::linalg_vector_norm",
    "aten::var", "aten::std",
)  # fmt: skip
def _reduced(call: Call) -> Tag | None:
    tag = call.tag("self")
    if tag is None or not call["dim"]:
        return None  # of all entries
    dims = {call.axis(d) for d in call["dim"]}
    if tag.dim in dims:
        return None
    if call.out.isnan().any():
        return None  # the variance of one entry is not zero
    gone = 0 if call["keepdim"] else sum(d < tag.dim for d in dims)
    return Tag(tag.dim - gone, tag.sources)


# --- shapes


@rule(
    "aten::view", "aten::_unsafe_view", "aten::reshape", "aten::_reshape_alias", "aten::squeeze",
    "aten::squeeze_", "aten::unsqueeze", "aten::unsqueeze_",
)  # fmt: skip
def _reshaped(call: Call) -> Tag | None:
    """A view that keeps the channels or flattens them together with what follows them."""
    tag, before, after = call.tag("self"), call.shape("self"), call.out.shape
    if tag is None:
        return None
    lead, inner = math.prod(before[: tag.dim]), math.prod(before[tag.dim + 1 :])
    dims = [d for d in range(len(after)) if math.prod(after[:d]) == lead]
    for dim in reversed(dims):
        if after[dim] == before[tag.dim] and math.prod(after[dim + 1 :]) == inner:
            return Tag(dim, tag.sources)
    last = len(after) - 1
    if last in dims and after[last] == before[tag.dim] * inner:
        return Tag(last, tuple(s for s in tag.sources for _ in range(inner)))
    return None


@rule("aten::roll", "aten::flip")
def _moved(call: Call) -> Tag | None:
    """Entries move within some dimensions, as in shifted windows."""
    tag = call.tag("self")
    # Without dimensions, roll moves entries through all of them.
    dims = {call.axis(d) for d in call["dims"]}
    return tag if tag is not None and dims and tag.dim not in dims else None


@rule("aten::expand")
def _expanded(call: Call) -> Tag | None:
    tag = call.tag("self")
    if tag is None:
        return None
    # New dimensions come first. A single channel that is repeated has another length: no tag.
    return Tag(tag.dim + call.out.dim() - len(call.shape("self")), tag.sources)


@rule("aten::permute", "aten::transpose", "aten::transpose_", "aten::t", "aten::t_")
def _permuted(call: Call) -> Tag | None:
    tag, order = call.tag("self"), list(range(len(call.shape("self"))))
    if tag is None:
        return None
    if call.op == "aten::permute":
        order = [call.axis(d) for d in call["dims"]]
    elif len(order) > 1:
        is_t = call.op in ("aten::t", "aten::t_")
        a, b = (0, 1) if is_t else (call.axis(call["dim0"]), call.axis(call["dim1"]))
        order[a], order[b] = order[b], order[a]
    return Tag(order.index(tag.dim), tag.sources)


# --- parts


@rule("aten::slice")
def _sliced(call: Call) -> Tag | None:
    tag = call.tag("self")
    if tag is None or call.axis(call["dim"]) != tag.dim:
        return tag
    call.pin(tag)
    return Tag(tag.dim, tag.sources[slice(call["start"], call["end"], call["step"])])


@rule("aten::select")
def _one(call: Call) -> Tag | None:
    tag, dim = call.tag("self"), call.axis(call["dim"])
    if tag is None or tag.dim == dim:
        return None
    return Tag(tag.dim - (dim < tag.dim), tag.sources)


@rule("aten::unbind")
def _unbound(call: Call) -> list[Tag | None] | None:
    tag = _one(call)
    return None if tag is None else [tag] * len(call.out)


@rule("aten::split", "aten::split_with_sizes", "aten::chunk")
def _split(call: Call) -> list[Tag | None] | None:
    tag = call.tag("self")
    if tag is None:
        return None
    if call.axis(call["dim"]) != tag.dim:
        return [tag] * len(call.out)
    call.pin(tag)
    parts: list[Tag | None] = []
    start = 0
    for part in call.out:
        end = start + part.shape[tag.dim]
        parts.append(Tag(tag.dim, tag.sources[start:end]))
        start = end
    return parts


@rule("aten::index")
def _indexed(call: Call) -> Tag | None:
    tag, indices = call.tag("self"), call["indices"]
    used = [place for place, index in enumerate(indices) if index is not None]
    only_rows = used == [0] and indices[0].dim() == 1
    return tag if tag is not None and only_rows and tag.dim > 0 else None


@rule("aten::index_select")
def _selected(call: Call) -> Tag | None:
    tag = call.tag("self")
    return tag if tag is not None and call.axis(call["dim"]) != tag.dim else None


# --- several tensors


@rule("aten::cat")
def _concatenated(call: Call) -> Tag | None:
    given = list(zip(call.tags("tensors"), call.shapes("tensors"), strict=True))
    parts = [(tag, shape) for tag, shape in given if math.prod(shape)] or given
    dim = call["dim"] % call.out.dim()
    tags = [tag for tag, _ in parts]
    if all(tag is None or tag.dim == dim for tag in tags):
        sources: list[Sources] = []
        for tag, shape in parts:
            sources += (None,) * shape[dim] if tag is None else tag.sources
        return Tag(dim, tuple(sources))
    first = tags[0]
    if any(tag is None or tag.dim == dim or tag.dim != first.dim for tag in tags):
        return None
    merge = first.sources
    for tag in tags[1:]:
        merge = call.tie(merge, tag.sources)
    return Tag(first.dim, merge)


@rule("aten::add", "aten::add_", "aten::sub", "aten::sub_", "aten::maximum", "aten::minimum")
def _sum(call: Call) -> Tag | None:
    a, b = call.tag("self"), call.tag("other")
    if a is None or b is None or a.dim != b.dim:
        return None
    if call.shape("self")[a.dim :] != call.shape("other")[b.dim :]:
        return None
    return Tag(a.dim, call.tie(a.sources, b.sources))


@rule("aten::mul", "aten::mul_", "aten::div", "aten::div_")
def _product(call: Call) -> Tag | None:
    """A factor that has at least as many dimensions as the other one: its channels stay zero."""
    if call.op in DIVISIONS and call.tag("other") is not None:
        return None  # by zero
    for name, other in (("self", "other"), ("other", "self")):
        tag = call.tag(name)
        if tag is None:
            continue
        shape = call.shapes(other)
        if not shape:
            return tag  # times a number
        added = len(call.shape(name)) - len(shape[0])  # dimensions in front that are broadcast
        if added >= 0:
            call.pin(call.tag(other))
            if tag.dim >= added and shape[0][tag.dim - added] > 1:
                call.pin(tag)  # the other one has a value for each channel
            return tag
    return None


@rule(
    "aten::_scaled_dot_product_flash_attention_for_cpu",
    "aten::_scaled_dot_product_flash_attention", "aten::_scaled_dot_product_cudnn_attention",
    "aten::_scaled_dot_product_efficient_attention",
)  # fmt: skip
def _attended(call: Call) -> Tag | None:
    """Weighted sums of values, with the same weights in every channel; mixes queries and keys."""
    tag = call.tag("value")
    return tag if tag is not None and tag.dim == len(call.shape("value")) - 1 else None


@rule("aten::copy", "aten::copy_")
def _copied(call: Call) -> Tag | None:
    tag, old = call.tag("src"), call.tag("self")
    # Into a part of a tensor, or over other channels.
    if call.out._is_view() or (old is not None and any(old.sources)):
        call.pin(tag, old)
    return tag if call.shape("src") == call.shape("self") else None


@rule("aten::index_put", "aten::index_put_", "aten::_index_put_impl_")
def _put(call: Call) -> Tag | None:
    a, b, indices = call.tag("self"), call.tag("values"), call["indices"]
    only_rows = sum(i is not None for i in indices) == 1 and indices[0] is not None
    if a is None or b is None or not only_rows or a.dim != b.dim or a.dim == 0:
        return None
    if indices[0].dim() != 1 or len(a.sources) != len(b.sources):
        return None
    # Where ``a`` is all zeros, only the written values have sources.
    return Tag(a.dim, call.tie(a.sources, b.sources) if any(a.sources) else b.sources)


@rule(*_ZEROS)
def _zeros(call: Call) -> Tag | None:
    if call.out.dim() < 2:
        return None
    # Dimension 1 counts the channels of images. Where another one does, no rule keeps this tag.
    return Tag(1, (frozenset(),) * call.out.shape[1])
