"""What convs share: which of them take part, and that nothing else is touched."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from repr_det import RePr, RePrSchedule
from tests.method.nets import batch, loss


class Branches(nn.Module):
    """Two convs beside each other, and norms behind them."""

    def __init__(self, *, one_weight: bool, norms: int, width: int = 8) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.a, self.b = (nn.Conv2d(8, 8, 3, padding=1, bias=False) for _ in range(2))
        if one_weight:
            self.b.weight = self.a.weight
        self.norms = nn.ModuleList(nn.BatchNorm2d(width) for _ in range(norms))
        for norm in self.norms:
            nn.init.uniform_(norm.bias, 0.1, 0.3)
        self.then = nn.Conv2d(16, 8, 3, padding=1)
        self.last = nn.Linear(8, 5)

    def branches(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        x, y = self.a(x), self.b(x)
        if self.norms[0].num_features == 16:
            return self.norms[0](torch.cat([x, y], 1))
        return torch.cat([self.norms[0](x), self.norms[-1](y)], 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.then(self.branches(x).relu()).mean((2, 3)))


def trained(model: Branches, **arguments) -> RePr:
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    method = RePr(model, optimizer, RePrSchedule(1, 9, 1), **arguments)
    for i in range(4):
        method.step(i)
        optimizer.zero_grad()
        loss(model, batch(i, torch.float32)).backward()
        optimizer.step()
    return method


@pytest.mark.parametrize(("norms", "width"), [(2, 8), (1, 16)])
def test_dropped_filter_of_a_shared_weight_is_zero_behind_every_norm(norms, width):
    model = Branches(one_weight=True, norms=norms, width=width)
    gone = trained(model, include=["a", "b"]).pruned["a"]
    assert 0 < gone.sum() < 8
    result = model.branches(batch(9, torch.float32)[0])
    assert not result[:, gone.repeat(2)].any() and result[:, ~gone.repeat(2)].any()


def test_a_weight_that_a_conv_left_out_holds_as_well_is_left_alone():
    method = trained(Branches(one_weight=True, norms=2), exclude=["b"])
    assert [layer.name for layer in method.layers] == ["then"]


def test_convs_in_front_of_one_norm_are_left_alone():
    """A channel dropped for the one would be missing in the other."""
    method = trained(Branches(one_weight=False, norms=1))
    assert [layer.name for layer in method.layers] == ["then"]
    apart = trained(Branches(one_weight=False, norms=1, width=16))
    assert [layer.name for layer in apart.layers] == ["a", "b", "then"]
