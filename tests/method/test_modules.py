"""What a module is, and names that look through wrappers."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.parallel import DataParallel

from repr_det.method.modules import is_conv, is_norm, mixes_channels, named_modules, unwrap
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
