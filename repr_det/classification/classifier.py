"""Image classification as a Detectron2 meta-architecture."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.utils.events import get_event_storage, has_event_storage
from torch import Tensor, nn

from repr_det.classification.models import build_classifier
from repr_det.classification.schemes import Distillation, OrthogonalityLoss, load_teacher
from repr_det.errors import UserError

ExtraLoss = Callable[[Tensor, Tensor], Tensor]
Batch = Mapping[str, Tensor] | Sequence[Mapping[str, Any]] | Tensor


def labels_of(batch: Batch, device: torch.device) -> Tensor:
    """The labels of a batch, int64 ``(B,)`` on the device.

    Raises:
        UserError: a batch of images alone.
    """
    if isinstance(batch, Tensor):
        raise UserError("A batch of images without labels cannot be trained on or evaluated.")
    if isinstance(batch, Mapping):
        return batch["label"].to(device, non_blocking=True)
    return torch.tensor([int(item["label"]) for item in batch], device=device)


def _record_accuracy(logits: Tensor, labels: Tensor) -> None:
    if has_event_storage():
        top1 = (logits.detach().argmax(1) == labels).float().mean().item()
        get_event_storage().put_scalar("train/top1", 100 * top1)


@META_ARCH_REGISTRY.register()
class ImageClassifier(nn.Module):
    """A network for whole images with the interface of Detectron2's models.

    A batch is a mapping ``{"image": (B, 3, H, W), "label": (B,)}`` of tensors (what this package's
    loaders yield; no work per image), or Detectron2's list of one dict per image with ``"image"``
    ``(3, H, W)`` and, for training, ``"label"``, or, in evaluation mode, just images
    ``(B, 3, H, W)``. Pixels are 0 to 255 in the order ``cfg.INPUT.FORMAT``; the model subtracts
    ``pixel_mean`` and divides by ``pixel_std``.

    In training mode the model returns ``{"loss_cls": scalar, ...}`` and, where an EventStorage is
    open, records the batch's accuracy in per cent as ``train/top1``, as Detectron2's heads do. In
    evaluation mode it returns the logits ``(B, num_classes)``, one row per image for either kind
    of batch.

    Args:
        network: images ``(B, 3, H, W)`` to logits ``(B, C)``; in training mode it may return a
            tuple of logits and auxiliary logits.
        pixel_mean, pixel_std: one value per channel.
        aux_weight: weight of each auxiliary output's loss.
        label_weight: weight of the losses on the labels, auxiliary outputs' included.
        extra_losses: further losses by name, each a callable of the normalised images and the
            logits.
        channels_last: pass the images to the network channels last in memory.
    """

    @configurable
    def __init__(
        self,
        *,
        network: nn.Module,
        pixel_mean: Sequence[float],
        pixel_std: Sequence[float],
        aux_weight: float = 0.3,
        label_weight: float = 1.0,
        extra_losses: Mapping[str, ExtraLoss] | None = None,
        channels_last: bool = False,
    ) -> None:
        super().__init__()
        self.network = network
        self.register_buffer("pixel_mean", torch.tensor(pixel_mean).view(-1, 1, 1), False)
        self.register_buffer("pixel_std", torch.tensor(pixel_std).view(-1, 1, 1), False)
        self.aux_weight = aux_weight
        self.label_weight = label_weight
        self.extra_losses = dict(extra_losses or {})
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        """Arguments of the constructor from a config.

        Raises:
            UserError: an unknown network, an image size that it cannot take, settings of a loss
                that are out of range, or a teacher's checkpoint that cannot be loaded.
        """
        keys = cfg.MODEL.CLASSIFIER
        size = cfg.INPUT.IMAGE_SIZE
        network = build_classifier(keys.NAME, keys.NUM_CLASSES, keys.DROPOUT, size)
        extra_losses: dict[str, ExtraLoss] = {}
        label_weight = 1.0
        if keys.ORTHO_LOSS:
            extra_losses["loss_ortho"] = OrthogonalityLoss(network, keys.ORTHO_LOSS)
        if cfg.DISTILL.TEACHER:
            teacher = build_classifier(cfg.DISTILL.TEACHER, keys.NUM_CLASSES, image_size=size)
            load_teacher(teacher, cfg.DISTILL.WEIGHTS)
            extra_losses["loss_distill"] = Distillation(
                teacher, cfg.DISTILL.TEMPERATURE, cfg.DISTILL.ALPHA
            )
            label_weight = 1 - cfg.DISTILL.ALPHA
        return {
            "network": network,
            "pixel_mean": cfg.MODEL.PIXEL_MEAN,
            "pixel_std": cfg.MODEL.PIXEL_STD,
            "aux_weight": keys.AUX_WEIGHT,
            "label_weight": label_weight,
            "extra_losses": extra_losses,
            "channels_last": cfg.MODEL.CHANNELS_LAST,
        }

    @property
    def device(self) -> torch.device:
        """Where the model computes; batches are moved there."""
        return self.pixel_mean.device

    def preprocess_image(self, batch: Batch) -> Tensor:
        """The normalised images of a batch, ``(B, 3, H, W)``, on the model's device.

        Raises:
            UserError: images of different sizes in one batch.
        """
        if isinstance(batch, Tensor):
            images = batch
        elif isinstance(batch, Mapping):
            images = batch["image"]
        else:
            sizes = {tuple(item["image"].shape) for item in batch}
            if len(sizes) > 1:
                raise UserError(
                    f"A batch holds images of different shapes {sorted(sizes)}. Resize them to one."
                )
            images = torch.stack([item["image"] for item in batch])
        images = images.to(self.device, non_blocking=True)
        # Here, before they are normalised to float32: all later tensors keep this memory format.
        images = images.contiguous(memory_format=self.memory_format)
        return (images - self.pixel_mean) / self.pixel_std

    def forward(self, batch: Batch) -> dict[str, Tensor] | Tensor:
        """Losses in training mode, logits in evaluation mode; see the class."""
        images = self.preprocess_image(batch)
        outputs = self.network(images)
        if not self.training:
            return outputs
        labels = labels_of(batch, self.device)
        logits, *auxiliary = (outputs,) if isinstance(outputs, Tensor) else outputs
        losses = {"loss_cls": self.label_weight * F.cross_entropy(logits, labels)}
        _record_accuracy(logits, labels)
        aux_weight = self.label_weight * self.aux_weight
        for index, aux_logits in enumerate(auxiliary):
            losses[f"loss_aux{index}"] = aux_weight * F.cross_entropy(aux_logits, labels)
        for name, loss in self.extra_losses.items():
            losses[name] = loss(images, logits)
        return losses
