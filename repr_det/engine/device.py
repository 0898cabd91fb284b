"""The device of a config."""

from __future__ import annotations

import torch

from repr_det.errors import UserError


def check_device(name: str) -> None:
    """Refuse a ``MODEL.DEVICE`` that PyTorch does not know, or a GPU that is not there.

    Raises:
        UserError: what is wrong.
    """
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"MODEL.DEVICE is {name!r}. Set cpu or cuda.") from error
    if device.type != "cuda":
        return
    if not torch.cuda.is_available():
        raise UserError(f"MODEL.DEVICE is {name}, but there is no GPU. Set MODEL.DEVICE to cpu.")
    if device.index is not None and device.index >= (count := torch.cuda.device_count()):
        raise UserError(
            f"MODEL.DEVICE is {name}, but GPUs are numbered from 0 to {count - 1}. Set one of them."
        )
