"""What is asked of an image before it is decoded, the same for every task."""

from __future__ import annotations

from PIL import Image

from repr_det.errors import UserError


def check_depth(image: Image.Image, path: str) -> None:
    """Refuse an image of more than 8 bits a channel: Pillow would cut all bright values to white.

    Args:
        image: opened, and decoded or not.
        path: of its file, to be named.

    Raises:
        UserError: too many bits.
    """
    if image.mode.startswith(("I", "F")):
        raise UserError(
            f"Image {path} has more than 8 bits a channel (Pillow's mode {image.mode}): convert it "
            f"to 8."
        )
