"""DenseNets for 32 x 32 images, without bottleneck and compression (Huang et al. 2017)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from repr_det.errors import UserError

STEM_CHANNELS = 16
SHALLOW = 5


class DenseLayer(nn.Module):
    """Norm, ReLU, 3x3 conv; the new channels are appended to the input."""

    def __init__(self, in_channels: int, growth: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(in_channels)
        self.conv = nn.Conv2d(in_channels, growth, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, C, H, W)`` to ``(B, C + growth, H, W)``."""
        return torch.cat([x, self.conv(F.relu(self.norm(x)))], 1)


class Transition(nn.Module):
    """Norm, ReLU, 1x1 conv that keeps the number of channels, 2x2 average pooling."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(channels)
        self.conv = nn.Conv2d(channels, channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, C, H, W)`` to ``(B, C, H / 2, W / 2)``."""
        return F.avg_pool2d(self.conv(F.relu(self.norm(x))), 2)


class CifarDenseNet(nn.Module):
    """DenseNet of ``3 n + 4`` layers: stem, three dense blocks of n layers, two transitions.

    The paper's 5-layer DenseNet is not of that form and not described; ours is the stem, one
    dense block of three layers, global pooling and the linear layer.

    Before the last layer, with growth 12, 40 layers have 1,015,232 parameters and 100 layers
    6,967,952; the paper prints 1,016k and 6,968k.

    Args:
        depth: number of weighted layers, 5 or ``3 n + 4``.
        num_classes: length of the output.
        growth: k, channels that each layer adds.

    Input ``(B, 3, H, W)``, usually 32 x 32; output logits ``(B, num_classes)``.

    Raises:
        UserError: a depth of another form.
    """

    def __init__(self, depth: int, num_classes: int, growth: int = 12) -> None:
        super().__init__()
        if depth == SHALLOW:
            block_lengths = [depth - 2]
        elif depth > 4 and (depth - 4) % 3 == 0:
            block_lengths = [(depth - 4) // 3] * 3
        else:
            raise UserError(
                f"A CIFAR DenseNet has 3 n + 4 layers or {SHALLOW}, not {depth}. Set 40 or 100."
            )
        channels = STEM_CHANNELS
        layers: list[nn.Module] = [nn.Conv2d(3, channels, 3, padding=1, bias=False)]
        for block, length in enumerate(block_lengths):
            if block:
                layers.append(Transition(channels))
            for _ in range(length):
                layers.append(DenseLayer(channels, growth))
                channels += growth
        self.features = nn.Sequential(*layers)
        self.norm = nn.BatchNorm2d(channels)
        self.fc = nn.Linear(channels, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Images ``(B, 3, H, W)`` to logits ``(B, num_classes)``."""
        x = F.relu(self.norm(self.features(x)))
        return self.fc(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))
