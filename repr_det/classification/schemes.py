"""The training schemes that the paper compares RePr with.

Orthogonality loss and knowledge distillation are losses of ``ImageClassifier``; Dense-Sparse-Dense
is a hook. Born-Again networks (Furlanello et al. 2018) are distillation from a trained network of
the student's own architecture at temperature 1, so they need no code of their own: each generation
is a run whose ``DISTILL.WEIGHTS`` is the checkpoint of the one before. Dropout is an argument of
the network.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from detectron2.engine import HookBase
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from repr_det.engine.checkpoint import read_checkpoint
from repr_det.errors import UserError
from repr_det.method.modules import unwrap
from repr_det.method.optimizers import SECOND_MOMENTS, state_tensors
from repr_det.method.settings import check_same_settings


def orthogonality_penalty(weight: Tensor) -> Tensor:
    """How far the filters of one layer are from orthogonal: ``sum |Ŵ Ŵᵀ - I|``.

    Rows of ``Ŵ`` are the flattened filters of unit length, as in the paper's ranking (section 4).
    A filter of zero norm (RePr has dropped it) counts as if it were not there.

    Args:
        weight: ``(filters, ...)``.

    Returns:
        A scalar, from 0 (orthogonal) to ``filters * (filters - 1)`` (all parallel).
    """
    rows = F.normalize(weight.flatten(1), dim=1)
    return (rows @ rows.T).fill_diagonal_(0).abs().sum()


class OrthogonalityLoss:
    """The penalty above over all ungrouped conv layers, weighted (paper, section 6; weight 0.01).

    Args:
        network: whose layers are penalised.
        weight: factor of the sum, at least 0.

    Raises:
        UserError: a negative weight.
    """

    def __init__(self, network: nn.Module, weight: float) -> None:
        if weight < 0:
            raise UserError(f"MODEL.CLASSIFIER.ORTHO_LOSS is {weight}. Set 0 or more.")
        self.network = network
        self.weight = weight

    def __call__(self, images: Tensor, logits: Tensor) -> Tensor:
        """The weighted penalty, a scalar; the arguments do not matter."""
        # Looked up at every call: a copied or moved network has parameters of its own.
        convs = [m for m in self.network.modules() if isinstance(m, nn.Conv2d) and m.groups == 1]
        return self.weight * torch.stack([orthogonality_penalty(m.weight) for m in convs]).sum()


def distillation_loss(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """``T² KL(softmax(teacher / T) || softmax(student / T))``, mean over images.

    Hinton et al. 2015, section 2.

    Args:
        student: logits ``(B, C)``.
        teacher: logits ``(B, C)``.
        temperature: T.
    """
    return temperature**2 * F.kl_div(
        F.log_softmax(student / temperature, 1),
        F.log_softmax(teacher / temperature, 1),
        reduction="batchmean",
        log_target=True,
    )


class Distillation:
    """The teacher's part of the loss, ``alpha`` times :func:`distillation_loss`.

    The teacher sees the same augmented images as the student and never trains; it is no part of
    the student's parameters or checkpoints.

    Args:
        teacher: images ``(B, 3, H, W)`` to logits ``(B, C)``.
        temperature: T, above 0.
        alpha: share of the teacher in the loss, in ``[0, 1]``.

    Raises:
        UserError: temperature or alpha out of range.
    """

    def __init__(self, teacher: nn.Module, temperature: float, alpha: float) -> None:
        if temperature <= 0:
            raise UserError(f"DISTILL.TEMPERATURE is {temperature}. Set a value above 0.")
        if not 0 <= alpha <= 1:
            raise UserError(f"DISTILL.ALPHA is {alpha}. Set a share from 0 to 1.")
        self.teacher = teacher.eval().requires_grad_(False)
        self.temperature = temperature
        self.alpha = alpha

    def __call__(self, images: Tensor, logits: Tensor) -> Tensor:
        """The weighted loss of normalised images ``(B, 3, H, W)`` and the student's logits."""
        with torch.no_grad():
            teacher_logits = self.teacher.to(images.device)(images)
        return self.alpha * distillation_loss(logits, teacher_logits, self.temperature)


def load_teacher(teacher: nn.Module, path: str) -> None:
    """Load a checkpoint written by training an ``ImageClassifier`` into a bare network, in place.

    Nothing in the file is executed.

    Raises:
        UserError: no such file, or a file that is no such checkpoint, or one of another network.
    """
    if not path or not Path(path).is_file():
        raise UserError(
            f"DISTILL.WEIGHTS {path!r} does not exist. Train the teacher first and set it to the "
            f"teacher's model_final.pth."
        )
    state, prefix = read_checkpoint(path), "network."
    try:
        teacher.load_state_dict(
            {k.removeprefix(prefix): v for k, v in state["model"].items() if k.startswith(prefix)}
        )
    except (RuntimeError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path} is no checkpoint of a {type(teacher).__name__} teacher with these classes. "
            f"Set DISTILL.TEACHER and DISTILL.WEIGHTS that belong together."
        ) from error


def sparsity_masks(model: nn.Module, sparsity: float) -> dict[str, Tensor]:
    """Which weights stay when the smallest of each conv and linear layer go.

    Han et al. 2017, section 2: a layer keeps the weights whose size is above the quantile of its
    own weights.

    Args:
        model: whose layers are looked at.
        sparsity: share of each layer's weights that goes.

    Returns:
        By name of each such layer's weight that trains, a bool tensor of its shape, True where a
        weight stays; exactly ``int(sparsity * n)`` entries of ``n`` are False.
    """
    masks = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear) and module.weight.requires_grad:
            size = module.weight.detach().abs().flatten()
            mask = torch.ones_like(size, dtype=torch.bool)
            mask[size.argsort()[: int(sparsity * len(size))]] = False
            masks[f"{name}.weight"] = mask.view_as(module.weight)
    return masks


class DenseSparseDenseHook(HookBase):
    """Dense-Sparse-Dense training (Han et al. 2017) in one run.

    After ``dense_iters`` iterations the smallest weights of each layer become zero and stay zero
    for ``sparse_iters`` iterations; then all train again, the returned ones from zero. The authors
    lower the learning rate for the last part: use ``SOLVER.STEPS``.

    Removed weights are held as RePr holds its filters: the weights, their optimizer state and
    their gradients are zero, which an optimizer that works element by element leaves at zero.

    The masks are in the trainer's checkpoint, so a run may stop and resume anywhere.

    Args:
        dense_iters, sparse_iters: lengths of the first two parts in iterations.
        sparsity: share of each layer's weights that is removed, in ``(0, 1)``.

    Raises:
        UserError: a length or share out of range.
    """

    def __init__(self, dense_iters: int, sparse_iters: int, sparsity: float) -> None:
        if dense_iters < 1 or sparse_iters < 1:
            raise UserError(
                f"DSD.DENSE_ITERS is {dense_iters} and DSD.SPARSE_ITERS is {sparse_iters}. Set 1 "
                f"or more for both."
            )
        if not 0 < sparsity < 1:
            raise UserError(f"DSD.SPARSITY is {sparsity}. Set a share above 0 and below 1.")
        self.dense_iters = dense_iters
        self.sparse_iters = sparse_iters
        self.sparsity = sparsity
        self.masks: dict[str, Tensor] = {}
        self._handles: list[RemovableHandle] = []

    def check_fits(self, max_iter: int) -> None:
        """Refuse a training length that would end before the last dense part.

        Raises:
            UserError: ``dense_iters + sparse_iters`` is not smaller than ``max_iter``.
        """
        end = self.dense_iters + self.sparse_iters
        if end >= max_iter:
            raise UserError(
                f"DSD needs {self.dense_iters} + {self.sparse_iters} = {end} iterations and then "
                f"some of the dense network, but training ends after {max_iter}. Lower "
                f"DSD.DENSE_ITERS or DSD.SPARSE_ITERS, or raise SOLVER.MAX_ITER."
            )

    def before_train(self) -> None:
        """Hold what a run that is resumed had removed.

        Raises:
            UserError: the run resumes in its sparse part and no state was loaded.
        """
        start, end = self.trainer.start_iter, self.dense_iters + self.sparse_iters
        if self.dense_iters < start < end and not self.masks:
            raise UserError(
                f"This run resumes at iteration {start}, in the sparse part of DSD, but its "
                f"checkpoint holds no masks (made without DSD?). Start a new run with it as "
                f"MODEL.WEIGHTS."
            )
        self._hold()

    def before_step(self) -> None:
        """Remove weights, or let them train again, where it is time."""
        iteration = self.trainer.iter
        if iteration == self.dense_iters:
            self.masks = sparsity_masks(unwrap(self.trainer.model), self.sparsity)
            self._hold()
        elif iteration == self.dense_iters + self.sparse_iters:
            self._bring_back()

    def after_train(self) -> None:
        """Let gradients through again."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def state_dict(self) -> dict[str, Any]:
        """The settings, and the masks by parameter name; these are empty outside S of D-S-D."""
        return {"settings": self._settings(), "masks": dict(self.masks)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the masks of :meth:`state_dict`.

        Raises:
            UserError: the state was written with other settings.
        """
        check_same_settings("DSD", self._settings(), state.get("settings", {}))
        self.masks = dict(state["masks"])

    def _settings(self) -> dict[str, Any]:
        return {
            "DSD.DENSE_ITERS": self.dense_iters,
            "DSD.SPARSE_ITERS": self.sparse_iters,
            "DSD.SPARSITY": self.sparsity,
        }

    def _masked(self) -> Iterator[tuple[nn.Parameter, Tensor, dict[str, Tensor]]]:
        """Each masked parameter, where its weights are removed, and its optimizer state."""
        for name, mask in self.masks.items():
            parameter = unwrap(self.trainer.model).get_parameter(name)
            state = state_tensors(self.trainer.optimizer, parameter)
            yield parameter, ~mask.to(parameter.device), state

    @torch.no_grad()
    def _hold(self) -> None:
        for parameter, removed, state in self._masked():
            for tensor in (parameter, *state.values()):
                tensor.masked_fill_(removed, 0)
            # As backward accumulates them, so before any clipping.
            handle = parameter.register_post_accumulate_grad_hook(partial(_zero_gradient, removed))
            self._handles.append(handle)

    def _bring_back(self) -> None:
        for _, removed, state in self._masked():
            for key in SECOND_MOMENTS & state.keys():
                # At zero, an adaptive optimizer's first steps would be several times too long.
                state[key][removed] = state[key][~removed].mean()
        self.after_train()
        self.masks = {}


def _zero_gradient(removed: Tensor, parameter: Tensor) -> None:
    parameter.grad.masked_fill_(removed, 0)
