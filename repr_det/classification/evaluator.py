"""Accuracy as a Detectron2 evaluator."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from detectron2.evaluation import DatasetEvaluator
from detectron2.utils import comm
from torch import Tensor

from repr_det.classification.classifier import Batch, labels_of
from repr_det.errors import UserError


class AccuracyEvaluator(DatasetEvaluator):
    """Top-1 and top-5 accuracy in per cent and the mean cross-entropy, over all processes.

    :meth:`evaluate` returns ``{"accuracy": {"top1": ..., "top5": ..., "loss": ...}}`` in the main
    process and None in the others. With fewer than five classes, top-5 is 100.
    """

    def reset(self) -> None:
        """Forget what was counted."""
        self._sums: Tensor | None = None

    def process(self, inputs: Batch, outputs: Tensor) -> None:
        """Count a batch.

        Args:
            inputs: a batch as ``ImageClassifier`` takes it, with labels.
            outputs: logits ``(B, C)``.
        """
        labels = labels_of(inputs, outputs.device)
        best = outputs.topk(min(5, outputs.shape[1]), dim=1).indices
        hits = best == labels[:, None]
        loss = F.cross_entropy(outputs.float(), labels, reduction="sum")
        # Sums stay on the device: reading them for every batch would wait for it each time.
        sums = torch.stack(
            [hits[:, 0].sum(), hits.sum(), loss, torch.tensor(len(labels), device=loss.device)]
        ).double()
        self._sums = sums if self._sums is None else self._sums + sums

    def evaluate(self) -> dict[str, dict[str, float]] | None:
        """The result over all processes; see the class.

        Raises:
            UserError: no images at all.
        """
        mine = [0.0] * 4 if self._sums is None else self._sums.tolist()
        gathered = comm.gather(mine)
        if not comm.is_main_process():
            return None
        top1, top5, loss, count = (sum(values) for values in zip(*gathered, strict=True))
        if not count:
            raise UserError("The test set has no images. Set another one in DATASETS.TEST.")
        return {
            "accuracy": {
                "top1": 100 * top1 / count,
                "top5": 100 * top5 / count,
                "loss": loss / count,
            }
        }
