"""Names images that a loader cannot read, or skips them."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from detectron2.data.detection_utils import SizeMismatchError
from PIL import Image

from repr_det.engine.data import check_depth, first_line, image_fault, is_too_thin
from repr_det.errors import UserError

logger = logging.getLogger(f"detectron2.{__name__}")


class NamedImages:
    """A dataset mapper that says which image could not be read.

    Args:
        mapper: Detectron2's.
        skip: return None for such an image, so that the loader takes another, and count it.
        longest: of the sides of an image as the model sees it, in pixels; None where images are not
            resized.
        images: how many different images there are, which cannot all be skipped; None where
            unknown.

    Raises:
        UserError: when called with an image of more than 8 bits a channel, or with one that cannot
            be read, unless they are skipped and others are left. What the mapper raises for a sound
            image is its own.
    """

    def __init__(
        self,
        mapper: Callable[[dict], dict],
        *,
        skip: bool,
        longest: int | None = None,
        images: int | None = None,
    ) -> None:
        self._mapper, self._skip, self._longest, self._images = mapper, skip, longest, images
        self._skipped: set[str] = set()

    def __call__(self, record: dict[str, Any]) -> dict[str, Any] | None:
        """Map a record of the dataset to a training example."""
        path = record["file_name"]
        try:
            with Image.open(path) as image:
                size = image.size
                check_depth(image, path)
            if self._longest is not None and is_too_thin(*size, self._longest):
                return self._bad(path, f"it is too thin, {size[0]} x {size[1]}", None)
            return self._mapper(record)
        except SizeMismatchError as error:
            return self._bad(path, first_line(error), error)
        except UserError:
            raise
        except Exception as error:
            # Decoders raise what they like; the mapper may be at fault, too.
            reason = image_fault(path)
            if reason is None:
                raise
            return self._bad(path, reason, error)

    def _bad(self, path: str, reason: str, error: Exception | None) -> None:
        if not self._skip:
            raise UserError(
                f"Image {path} cannot be read ({reason}). Replace it, take it out of the "
                f"annotations, or, in training, set INPUT.SKIP_BAD_IMAGES True."
            ) from error
        self._skipped.add(path)
        logger.warning(
            f"Image {path} cannot be read ({reason}) and is skipped. Images skipped so far in this "
            f"process: {len(self._skipped)}."
        )
        if len(self._skipped) == self._images:
            raise UserError("None of the training images can be read. See the warnings above.")
