"""The paper's vanilla ConvNets ``C^n(32)``."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from repr_det.errors import UserError

POOLED_LAYERS = 3


class PlainConvNet(nn.Module):
    """``C^n(w)``: n convs of w filters with ReLU, the first three pooled, one linear layer.

    RePr paper, section 6 (``C^3(32)`` there). Every conv has a bias, also in front of a
    BatchNorm: only so do the parameter counts of the paper (20k, 66k, 113k, 159k for n = 3, 8,
    13, 18 and w = 32) come out, with BatchNorm; the variant without norm is a little smaller.

    Args:
        depth: n, number of conv layers, at least 1.
        width: filters in each conv layer.
        num_classes: length of the output.
        norm: a BatchNorm between conv and ReLU.
        kernel_size: odd side of the kernels; the authors' public code has 5.
        image_size: side of the square input in pixels; the linear layer depends on it.

    Input ``(B, 3, image_size, image_size)``, output logits ``(B, num_classes)``.

    Raises:
        UserError: an image smaller than the poolings can halve.
    """

    def __init__(
        self,
        depth: int,
        width: int,
        num_classes: int,
        norm: bool = False,
        kernel_size: int = 3,
        image_size: int = 32,
    ) -> None:
        super().__init__()
        side = image_size >> min(depth, POOLED_LAYERS)
        if side < 1:
            raise UserError(
                f"Images of {image_size} x {image_size} pixels are too small for C^{depth}({width})"
                f", which halves them {min(depth, POOLED_LAYERS)} times. Set larger ones."
            )
        layers: list[nn.Module] = []
        for index in range(depth):
            layers.append(nn.Conv2d(width if index else 3, width, kernel_size, padding="same"))
            if norm:
                layers.append(nn.BatchNorm2d(width))
            # ReLU of the maxima is the maximum of the ReLUs, to the bit, and so are the gradients;
            # in this order it has a quarter of the numbers to go through.
            if index < POOLED_LAYERS:
                layers.append(nn.MaxPool2d(2))
            layers.append(nn.ReLU(inplace=True))
        self.features = nn.Sequential(*layers)
        self.fc = nn.Linear(width * side * side, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Images ``(B, 3, H, W)`` to logits ``(B, num_classes)``."""
        return self.fc(torch.flatten(self.features(x), 1))
