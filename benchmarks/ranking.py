"""Time of a drop and of a return, against a full pivoted QR decomposition per layer by SciPy."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import scipy.linalg
import torch
import torchvision
from clock import seconds
from detectron2 import model_zoo
from detectron2.modeling import build_model
from torch import nn

from repr_det import RePr, RePrSchedule
from repr_det.method.criteria import ortho
from repr_det.method.layers import FilterLayer, unit_rows
from repr_det.method.reinit import orthogonal_directions

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROUNDS = 3
SHARE = 0.3


def _fpn() -> nn.Module:
    cfg = model_zoo.get_config("COCO-Detection/faster_rcnn_R_101_FPN_3x.yaml")
    cfg.MODEL.WEIGHTS, cfg.MODEL.DEVICE, cfg.MODEL.BACKBONE.FREEZE_AT = "", DEVICE, 0
    return build_model(cfg)


MODELS: dict[str, Callable[[], nn.Module]] = {
    **{f"ResNet-{n}": getattr(torchvision.models, f"resnet{n}") for n in (18, 34, 50, 101, 152)},
    "ResNet-101-FPN": _fpn,
}


def drop_and_return(name: str) -> dict[str, Any]:
    """Seconds of a drop (ranking) and of a return (re-initialisation) of a network's filters.

    SciPy's decompositions take their turn after each pair of them; medians over rounds, of the
    ratio as well. Weights are drawn anew before each, since those of a filter that has just come
    back are special.

    Args:
        name: in :data:`MODELS`.
    """
    torch.manual_seed(0)
    model = MODELS[name]().to(DEVICE)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    method = RePr(model, optimizer, RePrSchedule(1, 1, ROUNDS + 1), SHARE)
    rounds = []
    for cycle in range(ROUNDS + 1):
        for layer in method.layers:
            nn.init.kaiming_normal_(layer.weight)
        took = [seconds(lambda now=now: method.step(now)) for now in (2 * cycle + 1, 2 * cycle + 2)]
        if cycle > 0:  # the first also builds what the later ones use
            baseline = _pivoted_qr(method.layers)
            rounds.append((*took, baseline, baseline / sum(took)))
    drop, back, baseline, ratio = map(statistics.median, zip(*rounds, strict=True))
    return {
        "layers": len(method.layers),
        "filters": sum(layer.num_filters for layer in method.layers),
        "drop": round(drop, 3),
        "return": round(back, 3),
        "scipy": round(baseline, 1),
        "ratio": round(ratio, 1),
    }


def _pivoted_qr(layers: list[FilterLayer]) -> float:
    """Seconds of a decomposition of all layers; layers of one shape are measured once."""
    shapes: dict[tuple[int, int], int] = {}
    for layer in layers:
        shape = (layer.dimension, layer.num_filters)
        shapes[shape] = shapes.get(shape, 0) + 1
    total = 0.0
    for shape, count in shapes.items():
        matrix = torch.randn(shape).numpy()
        decompose = partial(scipy.linalg.qr, matrix, pivoting=True, check_finite=False)
        total += count * seconds(decompose)
    return total


def growth(widths: tuple[int, ...]) -> dict[str, Any]:
    """Seconds for one 3 x 3 convolution, by its width: as many channels in as out."""
    generator = torch.Generator().manual_seed(0)
    found: dict[str, Any] = {}
    for width in widths:
        layer = FilterLayer("layer", nn.Conv2d(width, width, 3).to(DEVICE))
        (rows, _), dropped = unit_rows(layer.matrix()), torch.arange(width) < SHARE * width
        values = []
        for _ in range(ROUNDS + 1):
            rank = seconds(lambda layer=layer: ortho([layer]))
            back = seconds(
                lambda rows=rows, dropped=dropped: orthogonal_directions(rows, dropped, generator)
            )
            values.append((rank, back))
        rank, back = (statistics.median(v) for v in zip(*values[1:], strict=True))
        found[str(width)] = {"rank": round(rank, 5), "back": round(back, 5)}
    return found
