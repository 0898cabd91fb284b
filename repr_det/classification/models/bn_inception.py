"""BN-Inception, also called Inception v2 (Ioffe & Szegedy 2015, figure 5)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torchvision.models.googlenet import BasicConv2d

# Filters of each module: 1x1; 3x3 reduce, 3x3; double 3x3 reduce, double 3x3; pool projection.
# Without a 1x1 branch and projection the module halves the image and passes its pooled input on.
# For 4c and 4d the figure prints a projection of 128, which contradicts the 576 output channels
# next to it; 96 makes 576.
MODULES: dict[str, tuple[int, int, int, int, int, int]] = {
    "3a": (64, 64, 64, 64, 96, 32),
    "3b": (64, 64, 96, 64, 96, 64),
    "3c": (0, 128, 160, 64, 96, 0),
    "4a": (224, 64, 96, 96, 128, 128),
    "4b": (192, 96, 128, 96, 128, 128),
    "4c": (160, 128, 160, 128, 160, 96),
    "4d": (96, 128, 192, 160, 192, 96),
    "4e": (0, 128, 192, 192, 256, 0),
    "5a": (352, 192, 320, 160, 224, 128),
    "5b": (352, 192, 320, 192, 224, 128),
}


class InceptionV2Module(nn.Module):
    """Branches over one input, concatenated; see :data:`MODULES`."""

    def __init__(
        self,
        in_channels: int,
        one: int,
        reduce3: int,
        three: int,
        reduce_double: int,
        double: int,
        projection: int,
        max_pool: bool,
    ) -> None:
        super().__init__()
        stride = 1 if projection else 2
        branches = []
        if one:
            branches.append(BasicConv2d(in_channels, one, kernel_size=1))
        branches.append(
            nn.Sequential(
                BasicConv2d(in_channels, reduce3, kernel_size=1),
                BasicConv2d(reduce3, three, kernel_size=3, stride=stride, padding=1),
            )
        )
        branches.append(
            nn.Sequential(
                BasicConv2d(in_channels, reduce_double, kernel_size=1),
                BasicConv2d(reduce_double, double, kernel_size=3, padding=1),
                BasicConv2d(double, double, kernel_size=3, stride=stride, padding=1),
            )
        )
        pool: nn.Module = (nn.MaxPool2d if max_pool else nn.AvgPool2d)(3, stride, padding=1)
        if projection:
            pool = nn.Sequential(pool, BasicConv2d(in_channels, projection, kernel_size=1))
        branches.append(pool)
        self.branches = nn.ModuleList(branches)
        self.out_channels = one + three + double + (projection or in_channels)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, in_channels, H, W)`` to ``(B, out_channels, H, W)``, or half the size."""
        return torch.cat([branch(x) for branch in self.branches], 1)


class BNInception(nn.Module):
    """BN-Inception from torchvision's conv-norm-ReLU block; torchvision has no such model.

    Input ``(B, 3, H, W)``, 224 x 224 for ImageNet; output logits ``(B, num_classes)``.

    Args:
        num_classes: length of the output.
    """

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            BasicConv2d(3, 64, kernel_size=7, stride=2, padding=3),
            nn.MaxPool2d(3, 2, padding=1),
            BasicConv2d(64, 64, kernel_size=1),
            BasicConv2d(64, 192, kernel_size=3, padding=1),
            nn.MaxPool2d(3, 2, padding=1),
        )
        channels = 192
        modules = []
        for name, filters in MODULES.items():
            # Halving modules and the very last one pool by maximum, the others by average.
            module = InceptionV2Module(
                channels, *filters, max_pool=filters[-1] == 0 or name == "5b"
            )
            channels = module.out_channels
            modules.append(module)
        self.features = nn.Sequential(*modules)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Images ``(B, 3, H, W)`` to logits ``(B, num_classes)``."""
        return self.fc(torch.flatten(self.pool(self.features(self.stem(x))), 1))
