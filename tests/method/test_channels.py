"""The table of rules against what operations really do, without a network."""

from __future__ import annotations

import re

import pytest
import torch
import torchvision  # noqa: F401  (its operations)
from torch import Tensor

from repr_det.method.channels import RULES, Call, Tag

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
            "hardtanh_",
        )
    },
    "hardtanh above zero": (ATEN.hardtanh.default, (0.5, 2.0)),
    "hardtanh below zero": (ATEN.hardtanh.default, (-2.0, -0.5)),
    "squared": (ATEN.pow.Tensor_Scalar, (2,)),
    "square in place": (ATEN.pow_.Scalar, (2,)),
    "to the power of zero": (ATEN.pow.Tensor_Scalar, (0,)),
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


@pytest.mark.parametrize("name", EXAMPLES)
def test_rule_agrees_with_the_operation(name):
    """A channel said to be zero is; without a channel that may go, the others are as they were."""
    func, rest = EXAMPLES[name]
    tried = 0
    for shape in SHAPES:
        for dim in range(len(shape)):
            try:
                func(tensor(*shape), *rest)
            except (RuntimeError, IndexError, ValueError):
                continue  # not for this number of dimensions
            tried += 1
            _check(func, rest, shape, dim)
    assert tried


def _check(func, rest, shape, dim):
    x = tensor(*shape)
    call, found = follow(func, (x, *rest), [(x, tag(x, dim))])
    pinned = {f for one in call.pinned for s in one.sources for f in s or ()}
    for gone in range(shape[dim]):
        filters = frozenset([("conv", gone)])
        y = tensor(*shape)
        y.select(dim, gone).zero_()
        outs = func(y, *rest)
        outs = outs if isinstance(outs, (list, tuple)) else [outs]
        for out, known in zip(outs, found, strict=False):
            if known is not None:
                dead = [i for i, s in enumerate(known.sources) if s == filters]
                assert not out.index_select(known.dim, torch.tensor(dead, dtype=int)).any()
        # A single channel that is left would be repeated where sizes are written as numbers.
        if ("conv", gone) not in pinned and shape[dim] > 2:
            kept = [i for i in range(shape[dim]) if i != gone]
            try:
                fewer = func(tensor(*shape).index_select(dim, torch.tensor(kept)), *rest)
            except RuntimeError as error:  # a size that is written as a number fails aloud
                assert re.search("for input of size|expanded size|out of bounds", str(error))
                continue
            _assert_rest_is_the_same(two(outs), two(fewer), found[0], filters)
    assert any(found) or pinned == {("conv", i) for i in range(shape[dim])}


def _assert_rest_is_the_same(out, fewer, known, filters):
    kept = [i for i, sources in enumerate(known.sources) if sources != filters]
    expected = out.index_select(known.dim, torch.tensor(kept))
    torch.testing.assert_close(fewer, expected.reshape(fewer.shape), rtol=1e-12, atol=1e-12)


SEVERAL = {
    "cat of channels": (lambda a, b: (ATEN.cat.default, ([a, b], 1)), (1, 1)),
    "cat from the back": (lambda a, b: (ATEN.cat.default, ([a, b], -3)), (1, 1)),
    "cat of rows": (lambda a, b: (ATEN.cat.default, ([a, b], 0)), (1, 1)),
    "cat of different dimensions": (lambda a, b: (ATEN.cat.default, ([a, b], 1)), (1, 2)),
    "cat with an unknown one": (lambda a, b: (ATEN.cat.default, ([a, b], 1)), (1, None)),
    **{
        op: (lambda a, b, op=op: (getattr(ATEN, op).Tensor, (a, b)), (1, 1))
        for op in ("add", "add_", "sub", "sub_", "mul", "mul_", "div", "div_")
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
            lambda a, b, op=op: (getattr(ATEN, op).default, (a, [torch.tensor([0, 1, 2, 3])], b)),
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
    """Whatever is pruned, a channel whose sources are all pruned is zero."""
    build, dims = SEVERAL[name]
    a, b = tensor(4, 4, 4, 4), tensor(4, 4, 4, 4, seed=1)
    func, args = build(a, b)
    tags = [
        (x, tag(x, d, n)) for x, d, n in ((a, dims[0], "a"), (b, dims[1], "b")) if d is not None
    ]
    _, (found, *_) = follow(func, args, tags)
    for gone in ([("a", 1)], [("b", 1)], [("a", 1), ("b", 1)]):
        a, b = tensor(4, 4, 4, 4), tensor(4, 4, 4, 4, seed=1)
        for x, d, n in ((a, dims[0], "a"), (b, dims[1], "b")):
            if (n, 1) in gone and d is not None:
                x.select(d, 1).zero_()
        func, args = build(a, b)
        out = two(func(*args))
        for channel, sources in enumerate(found.sources if found else ()):
            if sources and sources <= set(gone):
                assert not out.select(found.dim, channel).nan_to_num().any()


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
