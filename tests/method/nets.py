"""Small networks that the tests of the method train."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops.misc import FrozenBatchNorm2d

from repr_det import RePr
from repr_det.method.layers import FilterLayer
from tests.device import DEVICE


def norm(kind: str, channels: int) -> nn.Module:
    if kind == "BN":
        return nn.BatchNorm2d(channels)
    if kind == "plain":
        return nn.BatchNorm2d(channels, affine=False)
    if kind == "frozen":
        layer = FrozenBatchNorm2d(channels)
        generator = torch.Generator().manual_seed(channels)
        layer.weight.uniform_(0.5, 1.5, generator=generator)
        layer.bias.uniform_(-0.5, 0.5, generator=generator)
        layer.running_mean.uniform_(-0.5, 0.5, generator=generator)
        layer.running_var.uniform_(0.5, 1.5, generator=generator)
        return layer
    if kind == "GN":
        return nn.GroupNorm(2, channels)
    return nn.Identity()


ACTIVATIONS = {"relu": nn.ReLU, "silu": nn.SiLU, "gelu": nn.GELU}
"""ReLU's slope at zero is zero, which hides a filter that is not held; the others' is one half."""


def chain(kind: str = "BN", width: int = 8, activation: str = "relu") -> nn.Module:
    """Three convs in a row, pooled, and a linear layer."""
    act = ACTIVATIONS[activation]
    bias = kind == "none"
    return nn.Sequential(
        nn.Conv2d(3, width, 3, padding=1, bias=bias), norm(kind, width), act(),
        nn.Conv2d(width, width, 3, padding=1, bias=bias), norm(kind, width), act(),
        nn.MaxPool2d(2),
        nn.Conv2d(width, width, 3, padding=1, bias=bias), norm(kind, width), act(),
        nn.MaxPool2d(2), nn.Flatten(), nn.Linear(width * 4, 5),
    )  # fmt: skip


Activation = Callable[..., Tensor]

# Looked up at each call: the reference replaces ReLU by the identity.
FUNCTIONS: dict[str, Activation] = {
    "relu": lambda x, inplace=False: F.relu_(x) if inplace else F.relu(x),
    "silu": lambda x, inplace=False: F.silu(x, inplace=inplace),
    "gelu": lambda x, inplace=False: F.gelu(x),
}


class Bottleneck(nn.Module):
    """1x1, 3x3 (grouped), 1x1 with a projection shortcut, and no activation after the sum."""

    def __init__(
        self, inputs: int, width: int, outputs: int, kind: str, groups: int, act: Activation
    ) -> None:
        super().__init__()
        self.act = act
        bias = kind == "none"
        self.conv1 = nn.Conv2d(inputs, width, 1, bias=bias)
        self.norm1 = norm(kind, width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, groups=groups, bias=bias)
        self.norm2 = norm(kind, width)
        self.conv3 = nn.Conv2d(width, outputs, 1, bias=bias)
        self.norm3 = norm(kind, outputs)
        self.shortcut = nn.Conv2d(inputs, outputs, 1, bias=bias) if inputs != outputs else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.act(self.norm1(self.conv1(x)), inplace=True)
        y = self.act(self.norm2(self.conv2(y)), inplace=True)
        y = self.norm3(self.conv3(y))
        y += x if self.shortcut is None else self.shortcut(x)
        return y


class Residual(nn.Module):
    """Two bottlenecks, a small pyramid with a top-down sum, and a transposed conv."""

    def __init__(self, kind: str = "BN", groups: int = 1, activation: str = "relu") -> None:
        super().__init__()
        self.act = FUNCTIONS[activation]
        bias = kind == "none"
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=bias)
        self.stem_norm = norm(kind, 8)
        self.block1 = Bottleneck(8, 6, 12, kind, groups, self.act)
        self.block2 = Bottleneck(12, 6, 12, kind, groups, self.act)
        self.down = nn.Conv2d(12, 12, 3, stride=2, padding=1)
        self.lateral1 = nn.Conv2d(12, 6, 1)
        self.lateral2 = nn.Conv2d(12, 6, 1)
        self.output = nn.Conv2d(6, 6, 3, padding=1)
        self.up = nn.ConvTranspose2d(6, 6, 2, stride=2)
        self.head = nn.Conv2d(6, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.stem_norm(self.stem(x)))
        x = self.block2(self.block1(x))
        top = self.lateral2(self.down(x))
        merged = self.lateral1(x) + F.interpolate(top, scale_factor=2.0, mode="nearest")
        y = self.head(self.act(self.up(self.output(merged))))
        return y.mean((2, 3))


class PreActivation(nn.Module):
    """A dense block: norm and activation before each conv, whose output is concatenated."""

    def __init__(self, growth: int = 4, layers: int = 3, activation: str = "relu") -> None:
        super().__init__()
        self.act = FUNCTIONS[activation]
        self.stem = nn.Conv2d(3, 6, 3, padding=1, bias=False)
        widths = [6 + i * growth for i in range(layers + 1)]
        self.norms = nn.ModuleList(nn.BatchNorm2d(w) for w in widths)
        self.convs = nn.ModuleList(
            nn.Conv2d(w, growth, 3, padding=1, bias=False) for w in widths[:-1]
        )
        self.linear = nn.Linear(widths[-1], 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for conv, layer in zip(self.convs, self.norms, strict=False):
            x = torch.cat([x, conv(self.act(layer(x)))], 1)
        return self.linear(self.act(self.norms[-1](x)).mean((2, 3)))


NETS = {
    "chain": lambda: chain("BN"),
    "chain-bias": lambda: chain("none"),
    "chain-frozen": lambda: chain("frozen"),
    "residual": lambda: Residual("BN"),
    "residual-bias": lambda: Residual("none"),
    "residual-frozen": lambda: Residual("frozen"),
    "residual-plain": lambda: Residual("plain"),
    "residual-grouped": lambda: Residual("BN", groups=3),
    "dense": PreActivation,
    "chain-silu": lambda: chain("BN", activation="silu"),
    "chain-bias-gelu": lambda: chain("none", activation="gelu"),
    "residual-gelu": lambda: Residual("BN", activation="gelu"),
    "residual-bias-silu": lambda: Residual("none", activation="silu"),
    "residual-frozen-silu": lambda: Residual("frozen", activation="silu"),
    "residual-plain-gelu": lambda: Residual("plain", activation="gelu"),
    "residual-grouped-silu": lambda: Residual("BN", groups=3, activation="silu"),
    "dense-silu": lambda: PreActivation(activation="silu"),
}
"""Networks whose pruned form is exactly a smaller network."""


def net(name: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    return NETS[name]().to(DEVICE, dtype)


def batch(index: int, dtype: torch.dtype = torch.float64, size: int = 8) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1000 + index)
    x = torch.randn(6, 3, size, size, generator=generator, dtype=dtype)
    return x.to(DEVICE), torch.randint(0, 2, (6,), generator=generator).to(DEVICE)


def loss(model: nn.Module, data: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(data[0]), data[1])


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.02, momentum=0.9, weight_decay=1e-2),
    "nesterov": lambda p: torch.optim.SGD(
        p, lr=0.02, momentum=0.9, weight_decay=1e-2, nesterov=True
    ),
    "adam": lambda p: torch.optim.Adam(p, lr=1e-2, weight_decay=1e-2, amsgrad=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=1e-1),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=1e-3, momentum=0.9, weight_decay=1e-2),
}


def check_held(method: RePr) -> None:
    """Every layer has pruned filters, and all that belongs to them is zero."""
    for layer in method.layers:
        gone = method.pruned[layer.name]
        assert gone.any()
        assert not any(slot.read().any() for slot in layer.filter_slots(gone))


def layer_of(rows, groups=1, name="conv", dtype=torch.float64) -> FilterLayer:
    """A 1x1 conv whose filters are the given rows."""
    rows = torch.as_tensor(rows, dtype=dtype)
    conv = nn.Conv2d(rows.shape[1] * groups, len(rows), 1, groups=groups, bias=False, dtype=dtype)
    conv.weight.data = rows[:, :, None, None].clone()
    return FilterLayer(name, conv)
