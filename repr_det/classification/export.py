"""Exports a classifier as the backbone of a Detectron2 detector."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from repr_det.engine.checkpoint import read_checkpoint
from repr_det.engine.files import write_whole, writing
from repr_det.errors import UserError

_PREFIX = "network."
# Depth by the numbers of blocks in the four stages and whether they are bottlenecks.
_DEPTHS = {
    ((2, 2, 2, 2), False): 18,
    ((3, 4, 6, 3), False): 34,
    ((3, 4, 6, 3), True): 50,
    ((3, 4, 23, 3), True): 101,
    ((3, 8, 36, 3), True): 152,
}
_BLOCK = re.compile(r"layer(\d)\.(\d+)\.(.+)")
_INSIDE = {"downsample.0": "shortcut", "downsample.1": "shortcut.norm"}


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """The weights of a torchvision network from a checkpoint of ours or a plain state dict.

    Nothing in the file is executed.

    Args:
        path: a checkpoint written by training an ``ImageClassifier``, or torchvision's weights.

    Raises:
        UserError: no such file, or a file of another kind.
    """
    state = read_checkpoint(path)
    state = state.get("model", state)
    weights = {k.removeprefix(_PREFIX): v for k, v in state.items() if isinstance(v, Tensor)}
    if "conv1.weight" not in weights or "layer4.0.conv1.weight" not in weights:
        raise UserError(
            f"{path} holds no ResNet of torchvision's form. Set a checkpoint of resnet*, resnext* "
            f"or wide_resnet*."
        )
    return weights


def backbone_weights(weights: dict[str, Tensor], bgr: bool = False) -> dict[str, Tensor]:
    """Rename a torchvision ResNet's weights to those of Detectron2's.

    The classifier's last layer is left out.

    Args:
        weights: state dict of a torchvision ResNet.
        bgr: reverse the first layer's input channels, for a detector that reads the channels in
            the other order than the classifier.

    Returns:
        State dict with Detectron2's names: ``stem.conv1.weight``, ``res2.0.conv1.norm.bias``, ...
    """
    result = {}
    for name, value in weights.items():
        module, _, parameter = name.rpartition(".")
        if module == "fc" or parameter == "num_batches_tracked":
            continue
        block = _BLOCK.fullmatch(module)
        inside = block[3] if block else module
        inside = _INSIDE.get(inside, re.sub(r"bn(\d)", r"conv\1.norm", inside))
        place = f"res{int(block[1]) + 1}.{block[2]}" if block else "stem"
        result[f"{place}.{inside}.{parameter}"] = value
    if bgr:
        result["stem.conv1.weight"] = result["stem.conv1.weight"].flip(1)
    return result


def backbone_settings(weights: dict[str, Tensor]) -> dict[str, Any]:
    """The keys below ``MODEL.RESNETS`` with which Detectron2 builds this network.

    Args:
        weights: state dict of a torchvision ResNet.

    Raises:
        UserError: numbers of blocks that Detectron2 has no depth for.
    """
    stages = [
        len({k.split(".")[1] for k in weights if k.startswith(f"layer{stage}.")})
        for stage in range(1, 5)
    ]
    bottleneck = "layer1.0.conv3.weight" in weights
    depth = _DEPTHS.get((tuple(stages), bottleneck))
    if depth is None:
        raise UserError(
            f"Detectron2 has no ResNet with {stages} blocks in its four stages. Set another one."
        )
    settings = {"DEPTH": depth, "STRIDE_IN_1X1": False}
    if not bottleneck:
        return {**settings, "RES2_OUT_CHANNELS": 64}
    width, per_group = weights["layer1.0.conv2.weight"].shape[:2]
    groups = width // per_group
    return {**settings, "NUM_GROUPS": groups, "WIDTH_PER_GROUP": width // groups}


def export_backbone(
    source: str | Path,
    target: str | Path,
    pixel_mean: list[float],
    pixel_std: list[float],
    input_format: str = "RGB",
    target_format: str = "RGB",
) -> dict[str, Any]:
    """Write a classifier as a file that ``MODEL.WEIGHTS`` of a Detectron2 detector may name.

    The detector must be built and fed as the classifier was; the returned settings say how.

    Args:
        source: see :func:`read_weights`.
        target: a ``.pth`` file to write; it holds tensors and strings only.
        pixel_mean: what the classifier subtracts from its pixels, in its channel order.
        pixel_std: what it divides them by.
        input_format: the classifier's channel order, ``"RGB"`` or ``"BGR"``.
        target_format: the detector's channel order.

    Returns:
        Settings of the detector in the shape of a config: ``MODEL`` and ``INPUT``.

    Raises:
        UserError: no such source, one of another kind, or a target that is no ``.pth`` file or
            cannot be written.
    """
    if Path(target).suffix != ".pth":
        raise UserError(f"{target} must end in .pth, which Detectron2 reads as plain weights.")
    weights = read_weights(source)
    settings = backbone_settings(weights)
    swap = input_format != target_format
    contents = {
        "model": backbone_weights(weights, bgr=swap),
        "__author__": "repr_det",
        # Detectron2 matches names by their ends, so one file serves FPN and C4 detectors.
        "matching_heuristics": True,
    }
    with writing(Path(target)):
        write_whole(Path(target), lambda file: torch.save(contents, file))
    order = -1 if swap else 1
    return {
        "MODEL": {
            "WEIGHTS": str(target),
            "PIXEL_MEAN": [float(x) for x in pixel_mean][::order],
            "PIXEL_STD": [float(x) for x in pixel_std][::order],
            "RESNETS": settings,
        },
        "INPUT": {"FORMAT": target_format},
    }
