"""Config keys for detection."""

from __future__ import annotations

from detectron2.config import CfgNode

# Registers the backbone that the keys below describe.
from repr_det.detection import convnext  # noqa: F401


def add_detection_config(cfg: CfgNode) -> None:
    """Add the keys that only detection reads to a Detectron2 config, in place."""
    # Skip training images that cannot be read, instead of stopping at the first.
    cfg.INPUT.SKIP_BAD_IMAGES = False
    cfg.MODEL.CONVNEXT = CfgNode()
    # Blocks of each stage of MODEL.BACKBONE.NAME build_convnext_fpn_backbone; ConvNeXt-T's.
    cfg.MODEL.CONVNEXT.DEPTHS = [3, 3, 9, 3]
    # Channels of each stage.
    cfg.MODEL.CONVNEXT.WIDTHS = [96, 192, 384, 768]
    # How often the last block is skipped in training; earlier blocks are skipped less often.
    cfg.MODEL.CONVNEXT.STOCHASTIC_DEPTH = 0.0
