"""Folders of datasets, their held-out parts, and what is refused, for every task."""

from __future__ import annotations

import os
import re
from pathlib import Path

import numpy as np
import torch
from detectron2.data import detection_utils
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from repr_det.errors import UserError

SUFFIXES = (
    ".avif", ".bmp", ".gif", ".jfif", ".jpe", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif",
    ".tiff", ".webp",
)  # fmt: skip
"""Suffixes of image files."""


def datasets_root() -> Path:
    """The folder in ``DETECTRON2_DATASETS``, by default ``./datasets``."""
    return Path(os.environ.get("DETECTRON2_DATASETS", "datasets")).expanduser()


def check_held_out_name(name: str, held_out: int, *, is_users: bool, is_used: bool) -> None:
    """Refuse a held-out part whose name is taken, or that is empty and used.

    Args:
        name: of the part; see :func:`held_out_name`.
        held_out: how many images it has.
        is_users: the user has registered another dataset under this name.
        is_used: the config trains or tests on a dataset of this name.

    Raises:
        UserError: it is one of these.
    """
    if held_out and is_users:
        raise UserError(
            f"A dataset called {name} is registered already, but the images of DATASETS.HELD_OUT "
            f"need that name. Set another one for it."
        )
    if is_used and not held_out and not is_users:
        raise UserError(
            f"{name} is empty. Set DATASETS.HELD_OUT to the number of training images to hold out."
        )


def held_out_name(train_name: str) -> str:
    """The name of the held-out part of a training set: ``cifar10_heldout`` of ``cifar10_train``."""
    return train_name.removesuffix("_train") + "_heldout"


def part_indices(size: int, held_out: int = 0, share: float = 1.0) -> tuple[Tensor, Tensor]:
    """Which images are trained on and which are held out.

    They are the same for every seed and run. A larger held-out part contains the smaller ones. For
    one held-out part, a larger share contains the smaller ones.

    Args:
        size: number of images of the training set, N.
        held_out: number of images in the held-out part, at least 0 and below N.
        share: share of the other images to train on, in (0, 1]; at least one image.

    Returns:
        Positions to train on and held-out positions, int64, increasing.

    Raises:
        UserError: an argument out of range.
    """
    if not 0 <= held_out < size:
        raise UserError(
            f"DATASETS.HELD_OUT is {held_out}, but the training set has {size} images. Hold "
            "out fewer."
        )
    if not 0 < share <= 1:
        raise UserError(
            f"DATASETS.TRAIN_SHARE is {share}. Set a share above 0 and at most 1, the whole."
        )
    order = torch.randperm(size, generator=torch.Generator().manual_seed(0))
    count = max(1, round(share * (size - held_out)))
    return order[held_out : held_out + count].sort().values, order[:held_out].sort().values


def check_batch_size(batch_size: int, processes: int) -> None:
    """Refuse a batch that processes cannot share evenly.

    Args:
        batch_size: images of one iteration, over all processes.
        processes: how many there are.

    Raises:
        UserError: the batch size is not a positive multiple of their number.
    """
    if batch_size < 1 or batch_size % processes:
        raise UserError(
            f"SOLVER.IMS_PER_BATCH is {batch_size}. Set a positive multiple of the number of "
            f"processes, {processes}."
        )


def is_hidden(path: Path) -> bool:
    """Whether a file or folder is hidden, as ``._photo.jpg`` and ``.ipynb_checkpoints`` are."""
    return path.name.startswith(".") and path.name != ".."


def is_image(path: Path) -> bool:
    """Whether the name of a file is that of an image."""
    return path.suffix.lower() in SUFFIXES and not is_hidden(path)


def images_below(folder: Path) -> list[Path]:
    """Image files in a folder and its subfolders, sorted; without hidden ones."""
    found = []
    for parent, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not is_hidden(Path(name))]
        found += [Path(parent, name) for name in files if is_image(Path(name))]
    return sorted(path for path in found if path.is_file())


def check_depth(image: Image.Image, path: str) -> None:
    """Refuse an image of more than 8 bits a channel, of which Pillow would clip or cut the values.

    Args:
        image: an image that is opened and not decoded yet.
        path: of its file, for the error.

    Raises:
        UserError: it has more than 8 bits.
    """
    # Pillow's mode of 16-bit colours is RGB. Only what its decoder is to read has the bits, such as
    # "RGB;16B". "BGR;16" has 16 for all three channels.
    deep = image.mode.startswith(("I", "F"))
    for codec, _, _, stored in getattr(image, "tile", ()):
        deep |= re.search(";16[BLN]", str(stored)) is not None
        deep |= codec.startswith("ppm") and stored[1] > 255
    if deep:
        raise UserError(f"Image {path} has more than 8 bits a channel. Convert it to 8.")


def read_rgb(path: str | Path) -> NDArray[np.uint8]:
    """The pixels of an image (height, width, 3), RGB, turned upright as EXIF says.

    Raises:
        UserError: it has more than 8 bits a channel.
        Exception: of any type, where it cannot be decoded.
    """
    with Image.open(path) as image:
        check_depth(image, str(path))
    return detection_utils.read_image(str(path), format="RGB")


def read_image(path: str | Path) -> NDArray[np.uint8]:
    """:func:`read_rgb` where any image that cannot be read is a user's mistake.

    Raises:
        UserError: a file that is no image or is truncated, too large, or of more than 8 bits.
    """
    try:
        return read_rgb(path)
    except UserError:
        raise
    except Exception as error:  # each decoder has its own
        raise UserError(
            f"Image {path} cannot be read ({first_line(error)}). Replace it or take it out."
        ) from error


def first_line(error: BaseException) -> str:
    """The first line of an error's text, or its type where the text is empty."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def image_fault(path: str | Path) -> str | None:
    """Why an image cannot be decoded, in one line; None where it can."""
    try:
        detection_utils.read_image(str(path), format="RGB")
    except Exception as error:  # each decoder has its own
        return first_line(error)
    return None


def is_too_thin(width: int, height: int, longest: int) -> bool:
    """Whether the shorter side of an image has no pixel left when the longer one is shrunk.

    Args:
        width: in pixels.
        height: in pixels.
        longest: what the longer side is shrunk to at most, in pixels.
    """
    return min(width, height) * longest / max(width, height) < 0.5
