"""Two processes train the pruned and the smaller network with Detectron2's naiveSyncBN.

python sync_bn.py
"""

from __future__ import annotations

from unittest import mock

import torch
from detectron2.layers import NaiveSyncBatchNorm
from detectron2.utils import comm
from torch import distributed, nn

from repr_det.engine.processes import launch
from tests.method import nets
from tests.method.side_by_side import assert_same, side_by_side


def average_gradients(model: nn.Module) -> None:
    """What DistributedDataParallel does."""
    for parameter in model.parameters():
        if parameter.grad is not None:
            distributed.all_reduce(parameter.grad)
            parameter.grad /= comm.get_world_size()


def run() -> None:
    torch.set_num_threads(1)
    own_batches = 100 * comm.get_rank()

    def batch(index: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        return nets.batch(own_batches + index, dtype)

    with mock.patch.object(nets, "norm", lambda kind, channels: NaiveSyncBatchNorm(channels)):
        model, reference, losses, _ = side_by_side(
            "residual", "momentum", torch.float64, average_gradients, batch=batch
        )
    assert_same(model, reference, losses)
    norms = [m for m in model.modules() if isinstance(m, NaiveSyncBatchNorm)]
    statistics = comm.all_gather([norm.running_mean for norm in norms])
    for mine, other in zip(*statistics, strict=True):
        assert mine.abs().sum() > 0
        torch.testing.assert_close(mine, other, rtol=0, atol=0)
    batches_differ = len({round(value[0], 9) for value in comm.all_gather(losses[0])}) == 2
    assert batches_differ


if __name__ == "__main__":
    launch(run, 2)
