"""Ways to run an unknown model on an example input."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import nn

_IMAGE_SIZES = (64, 32, 28, 224, 16, 8, 48, 96, 128, 256, 299, 384, 448, 512)
"""Image sizes to try, since a model may take only one size."""

_LARGEST_EXAMPLE = 2**21
"""Most elements of an example input. It allows a cube of 64 voxels or a square of 512 pixels."""


class Example(NamedTuple):
    """A way to run an unknown model.

    Attributes:
        run: runs it.
        kind: what the model is called with, and the number of channels; not the size.
    """

    run: Callable[[], Any]
    kind: tuple[str, int]


def examples(model: nn.Module, first: nn.Module, seen: torch.Size | None) -> Iterator[Example]:
    """Ways to run an unknown model, the likeliest first.

    Args:
        model: the model.
        first: its first conv, or its first linear layer where it has no conv.
        seen: shape of the input of the first conv that ran on a batch; None if none did.
    """
    device, dtype = first.weight.device, first.weight.dtype
    is_linear = isinstance(first, nn.Linear)
    spatial = 2 if is_linear else first.weight.dim() - 2
    is_detector = isinstance(getattr(model, "backbone", None), nn.Module)
    # The first layer in the order of modules may not be the one that reads the image.
    read = first.in_features if is_linear else first.in_channels
    widths = list(dict.fromkeys([3, read, 1]))
    shapes = [(size,) * spatial for size in _IMAGE_SIZES]
    if is_detector:
        del shapes[1:]  # takes any size
    elif is_linear:
        shapes.insert(0, ())  # rows of features
    elif seen is not None and len(seen) == spatial + 2:
        widths, shapes = [seen[1]], [tuple(seen[2:])]
    for shape, width in itertools.product(shapes, widths):
        if 2 * width * math.prod(shape) > _LARGEST_EXAMPLE:
            continue
        # Expanded from one number, since a graph keeps the example in memory.
        blank = torch.zeros((), device=device, dtype=dtype).expand(2, width, *shape)
        size = {"height": shape[0], "width": shape[-1]} if shape else {}
        runs = [
            Example(lambda x=blank: model(x.clone()), ("batch", width)),
            Example(
                lambda x=blank, s=size: model([{"image": x[0].clone(), **s}]), ("dicts", width)
            ),
        ]
        yield from reversed(runs) if is_detector else runs
        if is_detector:
            yield Example(lambda x=blank: model.backbone(x.clone()), ("backbone", width))
