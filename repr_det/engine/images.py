"""What is asked of an image file before it is decoded, the same for every task."""

from __future__ import annotations

from PIL import Image


def check_depth(path: str) -> None:
    """Refuse an image of more than 8 bits a channel: Pillow would cut all bright values to white.

    Raises:
        OSError: a file that is no image.
        ValueError: too many bits.
    """
    with Image.open(path) as image:
        if image.mode.startswith(("I", "F")):
            raise ValueError(
                f"Image {path} has more than 8 bits a channel (Pillow's mode {image.mode}): "
                f"convert it to 8."
            )
