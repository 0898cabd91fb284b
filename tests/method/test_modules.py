"""What a module is, and names that look through wrappers."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.parallel import DataParallel

from repr_det.method.modules import (
    is_conv,
    is_norm,
    mixes_channels,
    named_modules,
    unchanged,
    unwrap,
)
from tests.method.nets import Residual


def compiled(module):
    return torch.compile(module, backend="eager")


@pytest.mark.parametrize("wrap", [DataParallel, compiled, lambda m: DataParallel(compiled(m))])
def test_names_look_through_wrappers(wrap):
    plain = Residual()
    expected = [name for name, _ in plain.named_modules()]
    assert unwrap(wrap(plain)) is plain
    assert [name for name, _ in named_modules(wrap(plain))] == expected
    # Wrapped below the top as well.
    plain.block1 = wrap(plain.block1)
    found = [name for name, _ in named_modules(plain)]
    assert found == expected
    assert not any("module." in name or "_orig_mod" in name for name in found)


class Grid(nn.Module):
    """Weights positions by a grid whose rows share their memory, made at once or when first run."""

    def __init__(self, cached):
        super().__init__()
        self.grid = None if cached else torch.arange(8.0).expand(8, 8)

    def forward(self, x):
        if self.grid is None:
            self.grid = torch.arange(8.0).expand(8, 8)
        return x * (1 + 0.01 * self.grid)


@pytest.mark.parametrize("cached", [True, False])
def test_tensors_whose_entries_share_memory_are_left_alone(cached):
    """Torch refuses to write to them, so nothing has to be restored."""
    model = nn.Sequential(Grid(cached), nn.BatchNorm2d(3))
    for _ in range(2):
        before = {key: value.clone() for key, value in model.state_dict().items()}
        with unchanged(model):
            model(torch.randn(2, 3, 8, 8))
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
        model[0](torch.randn(2, 3, 8, 8))
    assert torch.equal(model[0].grid, torch.arange(8.0).expand(8, 8))


def test_a_module_called_module_keeps_its_name():
    model = nn.Sequential()
    model.add_module("module", nn.Conv2d(3, 4, 1))
    assert [name for name, _ in named_modules(model)] == ["", "module"]


def test_module_used_twice_has_its_first_name():
    shared = nn.Conv2d(3, 3, 1)
    assert [n for n, _ in named_modules(nn.Sequential(shared, nn.ReLU(), shared))] == ["", "0", "1"]


def test_what_is_a_conv_and_what_a_norm():
    from torchvision.ops import DeformConv2d
    from torchvision.ops.misc import FrozenBatchNorm2d

    convs = [
        nn.Conv1d(1, 1, 1),
        nn.Conv3d(1, 1, 1),
        nn.ConvTranspose2d(1, 1, 1),
        DeformConv2d(1, 1, 1),
    ]
    norms = [
        nn.BatchNorm2d(2), nn.SyncBatchNorm(2), nn.InstanceNorm2d(2),
        nn.BatchNorm2d(2, affine=False), nn.GroupNorm(1, 2), nn.LayerNorm(2), FrozenBatchNorm2d(2),
    ]  # fmt: skip
    neither = [nn.Linear(1, 1), nn.PReLU(2), nn.Embedding(2, 2), nn.ReLU()]
    assert all(is_conv(m) and not is_norm(m) for m in convs)
    assert all(is_norm(m) and not is_conv(m) for m in norms)
    assert not any(is_conv(m) or is_norm(m) for m in neither)
    assert [mixes_channels(m) for m in norms] == [False] * 4 + [True] * 2 + [False]
