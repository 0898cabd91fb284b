"""Configuration keys of detection."""

from __future__ import annotations

from detectron2.config import CfgNode


def add_detection_config(cfg: CfgNode) -> None:
    """Add the keys that only detection reads to a Detectron2 config, in place."""
    # Skip training images that cannot be read, instead of stopping at the first.
    cfg.INPUT.SKIP_BAD_IMAGES = False
