"""A step in mixed precision on any device."""

from __future__ import annotations

import time
from typing import Any

import torch
from detectron2.engine import SimpleTrainer
from torch import nn
from torch.optim import Optimizer

from repr_det.errors import UserError

PRECISIONS = {"float16": torch.float16, "bfloat16": torch.bfloat16}


def amp_precision(name: str, device: str) -> torch.dtype:
    """The precision that a value of ``SOLVER.AMP.PRECISION`` means on a device.

    Raises:
        UserError: an unknown name, or float16 on a CPU.
    """
    on_gpu = device.startswith("cuda")
    if name == "auto":
        return torch.float16 if on_gpu else torch.bfloat16
    if name not in PRECISIONS:
        raise UserError(f"SOLVER.AMP.PRECISION is {name!r}. Set auto, {' or '.join(PRECISIONS)}.")
    if name == "float16" and not on_gpu:
        raise UserError(
            "SOLVER.AMP.PRECISION float16 needs a GPU, and MODEL.DEVICE is the CPU. "
            "Set bfloat16, or SOLVER.AMP.ENABLED False."
        )
    return PRECISIONS[name]


class MixedPrecisionTrainer(SimpleTrainer):
    """Detectron2's training step under autocast, on a GPU or a CPU.

    Detectron2's own AMPTrainer needs CUDA. Losses are scaled only in float16, where small gradients
    would underflow.

    Args:
        model: returns a dict of losses in training mode.
        data_loader: iterable of batches.
        optimizer: trains the model.
        device_type: ``"cuda"`` or ``"cpu"``.
        precision: of the forward pass.
    """

    def __init__(
        self,
        model: nn.Module,
        data_loader: Any,
        optimizer: Optimizer,
        *,
        device_type: str,
        precision: torch.dtype,
    ) -> None:
        super().__init__(model, data_loader, optimizer)
        self._device_type = device_type
        self._precision = precision
        self.grad_scaler = torch.amp.GradScaler(device_type, enabled=precision == torch.float16)

    def autocast(self) -> torch.autocast:
        """The context that the model runs in."""
        return torch.autocast(self._device_type, dtype=self._precision)

    def run_step(self) -> None:
        """One iteration."""
        start = time.perf_counter()
        data = next(self._data_loader_iter)
        data_time = time.perf_counter() - start
        with self.autocast():
            losses = self.model(data)
            total = losses if isinstance(losses, torch.Tensor) else sum(losses.values())
        self.optimizer.zero_grad()
        self.grad_scaler.scale(total).backward()
        self.after_backward()
        self._write_metrics(
            {"total_loss": total} if isinstance(losses, torch.Tensor) else losses, data_time
        )
        self.grad_scaler.step(self.optimizer)
        self.grad_scaler.update()

    def state_dict(self) -> dict[str, Any]:
        """Detectron2's state and the loss scale."""
        return {**super().state_dict(), "grad_scaler": self.grad_scaler.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore :meth:`state_dict`. Without a loss scale in it, start with a new one."""
        super().load_state_dict(state_dict)
        scale = state_dict.get("grad_scaler")
        if self.grad_scaler.is_enabled() and scale:
            self.grad_scaler.load_state_dict(scale)
