"""Keypoints as categories describe them: names, skeleton, and pairs that a flip swaps."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import Metadata

from repr_det.errors import UserError

logger = logging.getLogger(f"detectron2.{__name__}")

SIGMA = 0.05
"""The sigma of COCO's keypoint similarity where none was measured for a dataset. COCO's own sigmas
were measured for people and are 0.025 to 0.107."""

_OF_PEOPLE = 17
"""How many keypoints COCO's people have: pycocotools knows the sigmas of these."""

_BONE = (255, 153, 51)
_SIDE = re.compile(r"(?<![a-z])(left|right|l|r)(?![a-z])", re.IGNORECASE)
_OTHER = {"left": "right", "right": "left", "l": "r", "r": "l"}


def flip_pairs(names: Sequence[str]) -> list[tuple[str, str]]:
    """Keypoints that change places in a mirror: ``left_eye`` and ``right_eye``, ``ear L``, ``r``.

    Args:
        names: of the keypoints of an object.

    Returns:
        Pairs, each once, the one that comes first among the names first.
    """
    lower = {name.lower(): name for name in names}
    pairs = []
    for name in names:
        mirrored = _SIDE.sub(lambda found: _OTHER[found[0].lower()], name).lower()
        if mirrored in lower and mirrored != name.lower():
            pairs.append((name, lower[mirrored]))
    order = {name: i for i, name in enumerate(names)}
    return [pair for pair in pairs if order[pair[0]] < order[pair[1]]]


def set_metadata(metadata: Metadata, path: str, content: dict[str, Any]) -> None:
    """Set the names, pairs and skeleton of keypoints, unless the metadata have names.

    Args:
        metadata: of the dataset, changed in place.
        path: of its annotation file, to be named.
        content: of the file, checked.

    Raises:
        UserError: neither the metadata nor the file have names.
    """
    if metadata.get("keypoint_names"):
        return
    category = next((c for c in content["categories"] if c.get("keypoints")), None)
    if category is None:
        raise UserError(
            f"{path}: no category has keypoints. Set their names in the categories, or "
            f"MODEL.KEYPOINT_ON False."
        )
    names = category["keypoints"]
    pairs = flip_pairs(names)
    metadata.set(
        keypoint_names=names,
        keypoint_flip_map=pairs,
        keypoint_connection_rules=[
            (names[start - 1], names[end - 1], _BONE)
            for start, end in category.get("skeleton") or ()
        ],
    )
    if not pairs:
        logger.warning(
            f"{path}: no two keypoints are a left and a right one by their names. If a mirror "
            f"swaps some, set names such as left_eye and right_eye, or INPUT.RANDOM_FLIP none."
        )


def take_number(cfg: CfgNode, metadata: Metadata, overrides: Sequence[str]) -> None:
    """Set the number of keypoints to the dataset's, and the sigmas of the evaluation if need be.

    Args:
        cfg: changed in place.
        metadata: of a dataset that was read.
        overrides: keys and values of the command line, which win.
    """
    count = len(metadata.keypoint_names)
    key = "MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS"
    if key not in overrides:
        cfg.merge_from_list([key, count])
    if count != _OF_PEOPLE and not cfg.TEST.KEYPOINT_OKS_SIGMAS:
        cfg.TEST.KEYPOINT_OKS_SIGMAS = [SIGMA] * count
        logger.warning(
            f"TEST.KEYPOINT_OKS_SIGMAS is empty and becomes {SIGMA} for each of {count} keypoints. "
            f"Set it to compare with others' numbers."
        )


def check_number(cfg: CfgNode, name: str, metadata: Metadata) -> None:
    """Refuse a model of another number of keypoints than a dataset's.

    Raises:
        UserError: the numbers differ, or the evaluation has no sigmas for them.
    """
    names = metadata.get("keypoint_names")
    if not names:
        return
    count, sigmas = cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS, cfg.TEST.KEYPOINT_OKS_SIGMAS
    if count != len(names):
        raise UserError(
            f"MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS is {count}, but dataset {name} has "
            f"{len(names)} keypoints. Set it to {len(names)}."
        )
    if len(sigmas or range(_OF_PEOPLE)) != len(names):
        raise UserError(
            f"TEST.KEYPOINT_OKS_SIGMAS has {len(sigmas)} numbers, but dataset {name} has "
            f"{len(names)} keypoints. Set one for each, for example {SIGMA}."
        )
