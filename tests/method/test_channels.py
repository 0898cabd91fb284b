"""The table of rules against what operations really do, without a network."""

from __future__ import annotations

import re

import pytest
import torch
import torchvision  # noqa: F401  (its operations)
from torch import Tensor

from repr_det.method.channels import RULES, Call, Tag, merged

ATEN = torch.ops.aten


def tensor(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def follow(func, args, tags, kwargs=None):
    """Run an operation; returns its result, the tags of that, and what was pinned and tied.

    Args:
        tags: pairs of a tensor among the arguments and its tag.
    """
    call = Call(func, args, kwargs or {}, lambda t: next((g for x, g in tags if x is t), None))
    return call, call.run()


def tag(x: Tensor, dim: int, name: str = "conv") -> Tag:
    return Tag(dim, tuple(frozenset([(name, i)]) for i in range(x.shape[dim])))


def two(out):
    return out[0] if isinstance(out, (list, tuple)) else out


X = (3, 4, 6, 5)
"""Sizes differ, so that no dimension is taken for another by its length."""

EXAMPLES = {
    # An operation with all but its first argument. It is tried on tensors of several ranks.
    **{
        f"{name}.default": (getattr(ATEN, name).default, ())
        for name in (
            "relu", "relu_", "elu", "elu_", "gelu", "gelu_", "silu", "silu_", "mish", "mish_",
            "tanh", "tanh_", "hardswish", "hardswish_", "neg", "neg_", "abs", "abs_", "clone",
            "detach", "alias", "lift_fresh", "_to_copy", "leaky_relu", "leaky_relu_", "hardtanh",
            "hardtanh_", "sign", "sign_",
        )
    },
    "hardtanh above zero": (ATEN.hardtanh.default, (0.5, 2.0)),
    "hardtanh below zero": (ATEN.hardtanh.default, (-2.0, -0.5)),
    "clamp": (ATEN.clamp.default, (-0.5, None)),
    "clamp_": (ATEN.clamp_.default, (None, 0.5)),
    "clamp_min": (ATEN.clamp_min.default, (0,)),
    "clamp_min_": (ATEN.clamp_min_.default, (-0.5,)),
    "clamp_max": (ATEN.clamp_max.default, (0.5,)),
    "clamp_max_": (ATEN.clamp_max_.default, (0,)),
    "clamp above zero": (ATEN.clamp.default, (0.5, 2.0)),
    "clamp_min above zero": (ATEN.clamp_min.default, (1e-6,)),
    "clamp_max below zero": (ATEN.clamp_max.default, (-1e-6,)),
    "clamp by tensors": (ATEN.clamp.Tensor, (tensor(1), None)),
    "squared": (ATEN.pow.Tensor_Scalar, (2,)),
    "square in place": (ATEN.pow_.Scalar, (2,)),
    "to the power of zero": (ATEN.pow.Tensor_Scalar, (0,)),
    "root": (ATEN.pow.Tensor_Scalar, (0.5,)),
    "relu6": (ATEN.hardtanh.default, (0.0, 6.0)),
    "one slope": (ATEN._prelu_kernel.default, (tensor(1),)),
    "prelu": (ATEN.prelu.default, (tensor(1),)),
    "max_pool2d": (ATEN.max_pool2d_with_indices.default, ([2, 2],)),
    "max_pool2d of one size": (ATEN.max_pool2d_with_indices.default, ([3, 3], [1, 1], [1, 1])),
    "avg_pool2d of one size": (ATEN.avg_pool2d.default, ([3, 3], [1, 1], [1, 1])),
    "max_pool3d of one size": (ATEN.max_pool3d_with_indices.default, ([3] * 3, [1] * 3, [1] * 3)),
    "avg_pool3d of one size": (ATEN.avg_pool3d.default, ([3] * 3, [1] * 3, [1] * 3)),
    "max_pool3d": (ATEN.max_pool3d_with_indices.default, ([2, 2, 2],)),
    "avg_pool2d": (ATEN.avg_pool2d.default, ([2, 2],)),
    "avg_pool3d": (ATEN.avg_pool3d.default, ([2, 2, 2],)),
    "adaptive_max_pool2d": (ATEN.adaptive_max_pool2d.default, ([2, 2],)),
    "adaptive_max_pool3d": (ATEN.adaptive_max_pool3d.default, ([2, 2, 2],)),
    "adaptive_avg_pool2d": (ATEN._adaptive_avg_pool2d.default, ([2, 2],)),
    "adaptive_avg_pool3d": (ATEN._adaptive_avg_pool3d.default, ([2, 2, 2],)),
    "nearest1d": (ATEN.upsample_nearest1d.default, ([9],)),
    "nearest2d": (ATEN.upsample_nearest2d.default, ([9, 9],)),
    "nearest3d": (ATEN.upsample_nearest3d.default, ([9, 9, 9],)),
    "exact1d": (ATEN._upsample_nearest_exact1d.default, ([9],)),
    "exact2d": (ATEN._upsample_nearest_exact2d.default, ([9, 9],)),
    "exact3d": (ATEN._upsample_nearest_exact3d.default, ([9, 9, 9],)),
    "linear1d": (ATEN.upsample_linear1d.default, ([9], False)),
    "bilinear2d": (ATEN.upsample_bilinear2d.default, ([9, 9], False)),
    "bicubic2d": (ATEN.upsample_bicubic2d.default, ([9, 9], False)),
    "trilinear3d": (ATEN.upsample_trilinear3d.default, ([9, 9, 9], False)),
    "reflection1d": (ATEN.reflection_pad1d.default, ([1, 2],)),
    "reflection2d": (ATEN.reflection_pad2d.default, ([1, 2, 2, 1],)),
    "reflection3d": (ATEN.reflection_pad3d.default, ([1, 1, 1, 1, 1, 1],)),
    "replication1d": (ATEN.replication_pad1d.default, ([1, 2],)),
    "replication2d": (ATEN.replication_pad2d.default, ([1, 2, 2, 1],)),
    "replication3d": (ATEN.replication_pad3d.default, ([1, 1, 1, 1, 1, 1],)),
    "pad": (ATEN.constant_pad_nd.default, ([1, 2, 0, 1],)),
    "pad with ones": (ATEN.constant_pad_nd.default, ([1, 2, 0, 1], 1.0)),
    "cut by padding": (ATEN.constant_pad_nd.default, ([-1, 0],)),
    "mean of the last two": (ATEN.mean.dim, ([-1, -2],)),
    "mean that keeps": (ATEN.mean.dim, ([2], True)),
    "mean of the first": (ATEN.mean.dim, ([0],)),
    "sum": (ATEN.sum.dim_IntList, ([-1, 0], True)),
    "sum of all": (ATEN.sum.default, ()),
    "largest": (ATEN.amax.default, ([-1],)),
    "smallest": (ATEN.amin.default, ([-1], True)),
    "length": (ATEN.linalg_vector_norm.default, (2, [-1, -2])),
    "sum of sizes": (ATEN.linalg_vector_norm.default, (1, [-1], True)),
    "variance": (ATEN.var.correction, ([-1, -2],)),
    "deviation": (ATEN.std.correction, ([0],)),
    "mean of all": (ATEN.mean.dim, ([],)),
    "mean": (ATEN.mean.default, ()),
    "flattened": (ATEN.view.default, ([3, -1],)),
    "view of all": (ATEN.view.default, ([-1],)),
    "view that splits": (ATEN.view.default, ([3, 2, 2, -1],)),
    "unsafe view": (ATEN._unsafe_view.default, ([3, 4, -1],)),
    "reshape": (ATEN.reshape.default, ([12, -1],)),
    "squeeze": (ATEN.squeeze.default, ()),
    "squeeze_": (ATEN.squeeze_.default, ()),
    "unsqueeze": (ATEN.unsqueeze.default, (-1,)),
    "unsqueeze_": (ATEN.unsqueeze_.default, (1,)),
    "expand": (ATEN.expand.default, ([2, 3, 4, 6, 5],)),
    "permute": (ATEN.permute.default, ([0, 2, -1, 1],)),
    "transpose": (ATEN.transpose.int, (1, -1)),
    "transpose_": (ATEN.transpose_.default, (0, 2)),
    "t": (ATEN.t.default, ()),
    "t_": (ATEN.t_.default, ()),
    "slice": (ATEN.slice.Tensor, (1, 1, -1)),
    "slice with a step": (ATEN.slice.Tensor, (-1, 0, None, 2)),
    "split": (ATEN.split.Tensor, (2, 1)),
    "split unequally": (ATEN.split_with_sizes.default, ([1, 4], -1)),
    "chunk": (ATEN.chunk.default, (2, 1)),
    "index": (ATEN.index.Tensor, ([torch.tensor([2, 0, 1])],)),
    "index of channels": (ATEN.index.Tensor, ([None, torch.tensor([2, 0])],)),
    "index by a mask": (ATEN.index.Tensor, ([tensor(*X) > 0],)),
    "index_select": (ATEN.index_select.default, (-1, torch.tensor([2, 0]))),
    "twice": (ATEN.mul.Tensor, (2.0,)),
    "twice in place": (ATEN.mul_.Tensor, (2.0,)),
    "times a map": (ATEN.mul.Tensor, (tensor(3, 1, 6, 5, seed=1),)),
    "times a factor for each of the last": (ATEN.mul.Tensor, (tensor(5, seed=1),)),
    "half": (ATEN.div.Tensor, (2.0,)),
    "half in place": (ATEN.div_.Tensor, (2.0,)),
    "plus one": (ATEN.add.Tensor, (1.0,)),
    "plus something": (ATEN.add.Tensor, (tensor(*X, seed=1),)),
    # What transformers and ConvNeXt do.
    "layer scale": (ATEN.mul.Tensor, (tensor(4, 1, 1, seed=1),)),
    "stochastic depth": (ATEN.mul.Tensor, (tensor(3, 1, 1, 1, seed=1),)),
    "stochastic depth in place": (ATEN.div_.Tensor, (tensor(3, 1, 1, 1, seed=1),)),
    "windows shifted": (ATEN.roll.default, ([1, -1], [1, 2])),
    "roll of all": (ATEN.roll.default, ([1],)),
    "flip": (ATEN.flip.default, ([1],)),
    "windows": (ATEN.view.default, ([3, 2, 2, 3, 2, -1],)),
    "every second row": (ATEN.slice.Tensor, (-2, 1, None, 2)),
    "class token": (ATEN.select.int, (1, 0)),
    "class token of the last": (ATEN.select.int, (-1, 1)),
    "unbound": (ATEN.unbind.int, (0,)),
    "unbound from the back": (ATEN.unbind.int, (-1,)),
    "relative position": (ATEN.add.Tensor, (tensor(6, 5, seed=1),)),
    # Without a rule: all of these must be unknown.
    "cumsum": (ATEN.cumsum.default, (1,)),
    "sort": (ATEN.sort.default, (1,)),
    "softmax": (ATEN._softmax.default, (1, False)),
    "layer_norm": (ATEN.native_layer_norm.default, ([5], None, None, 1e-5)),
    "matmul": (ATEN.matmul.default, (tensor(5, 5, seed=1),)),
    "sigmoid": (ATEN.sigmoid.default, ()),
    "pixel_shuffle": (ATEN.pixel_shuffle.default, (2,)),
}  # fmt: skip

SHAPES = [X, X[1:], X[2:], (2, *X), (3, 4, 1, 1), (3, 1, 1), (12, 4)]

UNKNOWN = {
    # Zero does not stay zero.
    "hardtanh above zero", "hardtanh below zero", "clamp above zero", "clamp_min above zero",
    "clamp_max below zero", "clamp by tensors", "to the power of zero", "pad with ones",
    "plus one", "plus something", "relative position",
    # The slope at zero is infinite.
    "root",
    # Entries of all dimensions are mixed.
    "mean", "mean of all", "sum of all", "roll of all",
    # Which entries are taken may depend on the channels, or be other channels.
    "index of channels", "index by a mask",
    # There is no rule.
    "cumsum", "sort", "softmax", "layer_norm", "matmul", "sigmoid", "pixel_shuffle",
}  # fmt: skip
"""Examples whose result must be unknown, in whatever dimension the channels are."""


@pytest.mark.parametrize("name", EXAMPLES)
def test_rule_agrees_with_the_operation(name):
    check_in_all_dimensions(name)


def check_in_all_dimensions(name):
    func, rest = EXAMPLES[name]
    tried = followed = 0
    for shape in SHAPES:
        for dim in range(len(shape)):
            try:
                func(tensor(*shape), *rest)
            except (RuntimeError, IndexError, ValueError):
                continue  # not for this number of dimensions
            tried += 1
            followed += check(lambda x: (func, (x, *rest)), [tensor(*shape)], [dim])
    assert tried
    assert bool(followed) == (name not in UNKNOWN), f"{followed} results are followed, see UNKNOWN"


def check(build, tensors, dims):
    """Compare what a rule says with what happens when channels change, are zero or are gone.

    Args:
        build: returns the operation and its arguments, from tensors as the given ones.
        dims: where the channels of each tensor are; None: it has no tag.

    Returns:
        Whether the rule knows anything of a result.
    """
    given = [x.clone() for x in tensors]
    func, args = build(*given)
    tags = [(x, tag(x, d, n)) for x, d, n in zip(given, dims, "ab", strict=False) if d is not None]
    call, found = follow(func, args, tags)
    filters = {one for _, t in tags for sources in t.sources for one in sources}
    pinned = {one for t in call.pinned for sources in t.sources for one in sources or ()}
    assert any(found) or pinned == filters
    outputs = run(build, [x.clone() for x in tensors])
    results = [
        (place, known.dim, channel, sources)
        for place, known in enumerate(found)
        if known is not None and outputs[place].numel()
        for channel, sources in enumerate(known.sources)
        if sources is not None
    ]
    for place, dim, channel, sources in results:
        out = run(build, changed(tensors, dims, sources, torch.zeros_like))
        assert not out[place].select(dim, channel).any(), "not zero while its filters are"
    for one in filters:
        seen = what_changes(build, tensors, dims, one, results)
        listed = {(p, c) for p, _, c, sources in results if one in sources}
        assert listed <= seen, "a filter is listed that is not in the channel"
        assert listed == seen or one in pinned, "a filter is in the channel and not listed"
    for group in groups(filters - pinned, call.tied):
        check_removal(build, tensors, dims, group, found)
    return any(found)


def run(build, tensors):
    func, args = build(*tensors)
    out = func(*args)
    return out if isinstance(out, (list, tuple)) else [out]


def changed(tensors, dims, filters, change):
    """Copies of the tensors in which the channels of some filters are others."""
    tensors = [x.clone() for x in tensors]
    for name, index in filters:
        x, dim = tensors["ab".index(name)], dims["ab".index(name)]
        x.select(dim, index).copy_(change(x.select(dim, index)))
    return tensors


def what_changes(build, tensors, dims, one, results):
    """Which channels of the results depend on a filter: place of the result and channel."""
    before, seen = run(build, [x.clone() for x in tensors]), set()
    for seed in range(8):  # ReLU shows no change below zero

        def other(x, seed=seed):
            return tensor(*x.shape, seed=10 + seed) * 3

        after = run(build, changed(tensors, dims, [one], other))
        for place, dim, channel, _ in results:
            a, b = before[place].select(dim, channel), after[place].select(dim, channel)
            if not torch.allclose(a, b, rtol=0, atol=1e-12, equal_nan=True):
                seen.add((place, channel))
    return seen


def groups(filters, tied):
    """Filters that can be removed, each with those that it is tied to."""
    pairs = {(*x, *y) for a, b in tied for x, y in zip(a, b, strict=True) if x and y and x != y}
    left = {frozenset([one]) for one in filters}
    for pair in pairs:
        joined = [group for group in left if group.intersection(pair)]
        left = (left - set(joined)) | {frozenset().union(*joined)}
    return left


def check_removal(build, tensors, dims, group, found):
    """Without the channels of a group the others are as they were while these were zero."""
    fewer = []
    for x, dim, name in zip(tensors, dims, "ab", strict=False):
        kept = [i for i in range(x.shape[dim or 0]) if dim is None or (name, i) not in group]
        if len(kept) < 2:
            return  # a single channel would be repeated where sizes are written as numbers
        fewer.append(x.index_select(dim or 0, torch.tensor(kept)).clone())
    try:
        without = run(build, fewer)
    except RuntimeError as error:  # a size that is written as a number fails aloud
        assert re.search("for input of size|expanded size|out of bounds|same head size", str(error))
        return
    zeroed = run(build, changed(tensors, dims, group, torch.zeros_like))
    for known, out, small in zip(found, zeroed, without, strict=False):
        if known is not None:
            kept = [i for i, sources in enumerate(known.sources) if not (sources or set()) & group]
            expected = out.index_select(known.dim, torch.tensor(kept, dtype=int))
            assert small.numel() == expected.numel(), "another number of entries"
            # Sizes that are written as numbers may shape the same entries in another way.
            torch.testing.assert_close(small, expected.reshape(small.shape), rtol=0, atol=1e-12)


SEVERAL = {
    "cat of channels": (lambda a, b: (ATEN.cat.default, ([a, b], 1)), (1, 1)),
    "cat from the back": (lambda a, b: (ATEN.cat.default, ([a, b], -3)), (1, 1)),
    "cat of rows": (lambda a, b: (ATEN.cat.default, ([a, b], 0)), (1, 1)),
    "cat of different dimensions": (lambda a, b: (ATEN.cat.default, ([a, b], 1)), (1, 2)),
    "cat with an unknown one": (lambda a, b: (ATEN.cat.default, ([a, b], 1)), (1, None)),
    **{
        op: (lambda a, b, op=op: (getattr(ATEN, op).Tensor, (a, b)), (1, 1))
        for op in ("add", "add_", "sub", "sub_", "mul", "mul_")
    },
    **{
        name: (lambda a, b: (ATEN.div.Tensor, (a, b)), dims)
        for name, dims in (("div", (1, None)), ("division by zero", (1, 1)))
    },
    "maximum": (lambda a, b: (ATEN.maximum.default, (a, b)), (1, 1)),
    "minimum": (lambda a, b: (ATEN.minimum.default, (a, b)), (1, 1)),
    "sum of different dimensions": (lambda a, b: (ATEN.add.Tensor, (a, b)), (1, 2)),
    "product of different dimensions": (lambda a, b: (ATEN.mul.Tensor, (a, b)), (1, 2)),
    "sum with an unknown one": (lambda a, b: (ATEN.add.Tensor, (a, b)), (1, None)),
    "copy": (lambda a, b: (ATEN.copy.default, (a, b)), (1, 1)),
    "copy_": (lambda a, b: (ATEN.copy_.default, (a, b)), (1, 1)),
    **{
        op: (
            lambda a, b, op=op: (getattr(ATEN, op).default, (a, [torch.tensor([0, 2])], b)),
            (1, 1),
        )
        for op in ("index_put", "index_put_", "_index_put_impl_")
    },
    "roi_align": (
        lambda a, b: (
            torch.ops.torchvision.roi_align.default,
            (a, tensor(4, 5).abs(), 1.0, 4, 4, 2, False),
        ),
        (1, None),
    ),
    "roi_pool": (
        lambda a, b: (torch.ops.torchvision.roi_pool.default, (a, tensor(4, 5).abs(), 1.0, 2, 2)),
        (1, None),
    ),
    "boxes across channels": (
        lambda a, b: (
            torch.ops.torchvision.roi_align.default,
            (a, tensor(4, 5).abs(), 1.0, 4, 4, 2, False),
        ),
        (2, None),
    ),
    "attention to values": (
        lambda a, b: (ATEN._scaled_dot_product_flash_attention_for_cpu.default, (b, b, a)),
        (3, None),
    ),
    "attention by queries": (
        lambda a, b: (ATEN._scaled_dot_product_flash_attention_for_cpu.default, (a, b, b)),
        (3, None),
    ),
    "attention across values": (
        lambda a, b: (ATEN._scaled_dot_product_flash_attention_for_cpu.default, (b, b, a)),
        (2, None),
    ),
    "grid": (
        lambda a, b: (ATEN.grid_sampler_2d.default, (a, tensor(4, 4, 4, 2), 0, 0, False)),
        (1, None),
    ),
    "grid across channels": (
        lambda a, b: (ATEN.grid_sampler_2d.default, (a, tensor(4, 4, 4, 2), 0, 0, False)),
        (3, None),
    ),
}


@pytest.mark.parametrize("name", SEVERAL)
def test_rule_of_several_tensors_agrees_with_the_operation(name):
    check_several(name)


def check_several(name):
    build, dims = SEVERAL[name]
    rows = 2 if "index_put" in name else 4  # the other rows stay those of a
    tensors = [tensor(4, 4, 4, 4), tensor(rows, 4, 4, 4, seed=1)]
    assert check(build, tensors, dims) == (name not in UNKNOWN_SUMS)


UNKNOWN_SUMS = {
    "cat of different dimensions", "sum of different dimensions", "sum with an unknown one",
    "boxes across channels", "attention by queries", "attention across values",
    "grid across channels", "division by zero",
}  # fmt: skip


def _with(change):
    """A rule that returns the right tag with other sources."""

    def broken(call):
        found = RIGHT[call.op](call)
        return found and found._replace(sources=change(found.sources))

    return broken


def _keeps(call):
    return call.tag("self")


def _lists_one_summand(call):
    call.tie(call.tag("self").sources, call.tag("other").sources)
    return call.tag("self")


def _does_not_tie(call):
    a, b = call.tag("self"), call.tag("other")
    return Tag(a.dim, merged(a.sources, b.sources))


def _does_not_pin(call):
    found = RIGHT[call.op](call)
    call.pinned.clear()
    return found


def _tiles(call):
    found, tag = RIGHT[call.op](call), call.tag("self")
    return found and found._replace(sources=tag.sources * (len(found.sources) // len(tag.sources)))


RIGHT = dict(RULES)
NOT_ZERO = "not zero while its filters are"
TOO_MANY = "a filter is listed that is not in the channel"
NOT_LISTED = "a filter is in the channel and not listed"
BROKEN = {
    "one summand is listed": ("add", _lists_one_summand, NOT_ZERO),
    "the next filter is listed, too": (
        "add",
        _with(lambda s: merged(s, s[1:] + s[:1])),
        TOO_MANY,
    ),
    "parts of a concatenation are exchanged": (
        "cat of channels",
        _with(lambda s: s[::-1]),
        NOT_ZERO,
    ),
    "channels are counted backwards": ("mean that keeps", _with(lambda s: s[::-1]), NOT_ZERO),
    "a flattened map repeats all channels": ("flattened", _tiles, NOT_ZERO),
    "a pooled dimension is kept": ("max_pool2d of one size", _keeps, NOT_ZERO),
    "a constant is zero": ("sigmoid", _keeps, NOT_ZERO),
    "a channel is always zero": ("neg.default", _with(lambda s: (frozenset(), *s[1:])), NOT_ZERO),
    "a factor is not pinned": ("mul", _does_not_pin, NOT_LISTED),
    "a scale of channels is not pinned": ("layer scale", _does_not_pin, "must match"),
    "a slice of channels is not pinned": ("slice", _does_not_pin, "number of entries"),
    "channels of a sum are not tied": ("add", _does_not_tie, "must match"),
    "nothing is known": (
        "neg.default",
        lambda call: call.tag("self") and None,
        "0 results are followed",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_checks_find_a_broken_rule(name, monkeypatch):
    example, broken, message = BROKEN[name]
    func = (
        EXAMPLES[example][0] if example in EXAMPLES else SEVERAL[example][0](*[tensor(*X)] * 2)[0]
    )
    monkeypatch.setitem(RULES, func._schema.name, broken)
    with pytest.raises(AssertionError, match=message):
        (check_in_all_dimensions if example in EXAMPLES else check_several)(example)


@pytest.mark.parametrize("name", ["mul", "sum with an unknown one"])
def test_channels_that_something_else_counts_are_pinned(name):
    build, dims = SEVERAL[name]
    a, b = tensor(4, 4, 4, 4), tensor(4, 4, 4, 4, seed=1)
    func, args = build(a, b)
    call, _ = follow(func, args, [(a, tag(a, dims[0], "a"))])
    assert call.pinned


def test_values_say_where_and_channels_of_places_are_pinned():
    """A rule takes care of the arguments that it asks for; the others are pinned."""
    x, grid = tensor(4, 4, 4, 4), tensor(4, 3, 3, 2)
    call, (found,) = follow(
        ATEN.grid_sampler_2d.default,
        (x, grid, 0, 0, False),
        [(x, tag(x, 1)), (grid, tag(grid, 3, "places"))],
    )
    assert found == tag(x, 1)
    assert call.pinned == [tag(grid, 3, "places")]


def test_sum_ties_channels():
    a, b = tensor(*X), tensor(*X, seed=1)
    call, (found,) = follow(ATEN.add.Tensor, (a, b), [(a, tag(a, 1, "a")), (b, tag(b, 1, "b"))])
    assert found.sources[2] == {("a", 2), ("b", 2)}
    assert call.tied == [(tag(a, 1, "a").sources, tag(b, 1, "b").sources)]
    call, (found,) = follow(ATEN.add.Tensor, (a, a), [(a, tag(a, 1, "a"))])
    assert found == tag(a, 1, "a") and not call.tied


def test_dropout_keeps_zeros_and_pins_channels():
    x = tensor(*X)
    for func, args in (
        (ATEN.native_dropout.default, (x, 0.5, True)),
        (ATEN.rrelu_with_noise.default, (x, torch.zeros_like(x), 0.1, 0.3, True)),
        (ATEN._prelu_kernel.default, (x, tensor(1, 4, 1, 1))),
        (ATEN.prelu.default, (x, tensor(4))),
    ):
        call, found = follow(func, args, [(x, tag(x, 1))])
        assert found[0] == tag(x, 1)
        assert tag(x, 1) in call.pinned


@pytest.mark.parametrize("name", ["zeros", "zeros_like", "new_zeros"])
def test_zeros_are_made_of_no_filter(name):
    x = tensor(*X)
    args = {"zeros": (list(X),), "zeros_like": (x,), "new_zeros": (x, list(X))}[name]
    call, (found,) = follow(getattr(ATEN, name).default, args, [(x, tag(x, 1))])
    assert found == Tag(1, (frozenset(),) * 4)
    assert not call.pinned  # the values of x were not looked at


def test_every_rule_has_an_example():
    """Those left out run on other devices only, or not below torch's dispatcher."""
    tested = {func._schema.name for func, _ in EXAMPLES.values()}
    a = tensor(4, 4, 4, 4)
    tested |= {build(a, a)[0]._schema.name for build, _ in SEVERAL.values()}
    tested |= {f"aten::{n}" for n in ("zeros", "zeros_like", "new_zeros")}
    tested |= {"aten::native_dropout", "aten::rrelu_with_noise"}
    left = {"aten::contiguous", "aten::_reshape_alias", "aten::mkldnn_adaptive_avg_pool2d"}
    left |= {name for name in RULES if "dot_product" in name}
    assert RULES.keys() - tested <= left
