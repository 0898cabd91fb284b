"""The method and the smaller network on a GPU as on a CPU; without one, it is pretended."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from detectron2.utils.events import EventStorage
from torch import Tensor
from torch.utils._pytree import tree_map

from repr_det import Reinit, RePr, RePrSchedule
from repr_det.method import compact
from repr_det.method.compact import Compact
from repr_det.method.criteria import CRITERIA
from tests.device import DEVICE
from tests.method.nets import NETS, OPTIMIZERS, batch, loss, net
from tests.pretended_gpu import GPU, OnGpu, a_gpu, moved_to_gpu

pytestmark = pytest.mark.gpu

SCHEDULE = RePrSchedule(3, 2, 2)
LENGTH = SCHEDULE.end + 2
REAL = DEVICE.type == "cuda"
# A real one adds in another order, so float64 there: ten steps amplify rounding.
DTYPE = torch.float64 if REAL else torch.float32
KEPT = Reinit(norm="previous", gamma="previous", beta="survivors", outgoing=0.5)


class Training:
    """A network that trains by RePr, on the pretended GPU or on the CPU."""

    def __init__(self, name: str, optimizer: str, *, gpu: bool, **arguments: Any) -> None:
        self.place = on_gpu if gpu else lambda x: x.cpu()
        models = [net(name, DTYPE).cpu() for _ in range(2)]
        self.model, self.copy = [moved_to_gpu(m) if gpu else m for m in models]
        self.optimizer = OPTIMIZERS[optimizer](self.model.parameters())
        of_data = {"batches": self.batches, "loss": loss}
        self.method = RePr(
            self.model, self.optimizer, SCHEDULE, copies=[self.copy], **of_data, **arguments
        )
        self.compact = Compact(self.method)

    def batches(self) -> Iterator[tuple[Tensor, ...]]:
        for index in range(500, 600):
            yield tuple(map(self.place, batch(index, DTYPE)))

    def step(self, iteration: int, *, smaller: bool = False) -> None:
        if self.method.due(iteration):
            self.compact.grow()
        changes = self.method.step(iteration)
        if smaller and any(change.kind == "drop" for change in changes):
            self.compact.speedup(rounds=1)
            self.compact.shrink()
        self.method.overlap()
        self.optimizer.zero_grad()
        x, y = map(self.place, batch(iteration, DTYPE))
        loss(self.model, (x, y)).backward()
        self.optimizer.step()

    def parts(self) -> list[Any]:
        return [self.model, self.copy, self.optimizer, self.method]

    def saved(self) -> list[Any]:
        """All of its state on the CPU, as a checkpoint would be loaded."""
        return tree_map(on_cpu, [part.state_dict() for part in self.parts()])


def on_gpu(x: Tensor) -> Tensor:
    return x.to(GPU) if REAL else OnGpu(x)


def on_cpu(x: Any) -> Any:
    return x.to("cpu").detach().clone() if isinstance(x, Tensor) else x


def assert_close(on_gpu: Training, on_the_cpu: Training) -> None:
    """Up to rounding: on a GPU, scores are computed in float64."""
    for ours, other in ((on_gpu.model, on_the_cpu.model), (on_gpu.copy, on_the_cpu.copy)):
        for key, value in ours.state_dict().items():
            expected = other.state_dict()[key]
            torch.testing.assert_close(on_cpu(value), expected, msg=f"{key} differs")


# Where a tensor lies does not depend on the activation: on a CPU, those with ReLU are enough.
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if REAL or not name.endswith("lu") else pytest.mark.slow)
        for name in NETS
    ],
)
def test_two_cycles_and_a_resumed_run(name):
    """As on the CPU, and continued to the bit from a checkpoint of S2."""
    alone = Training(name, "adamw", gpu=False, reinit=KEPT)
    for i in range(LENGTH):
        alone.step(i)
    with a_gpu():
        run = Training(name, "adamw", gpu=True, reinit=KEPT)
        for i in range(LENGTH):
            if i == 4:
                assert run.method.phase == "sub"
                state = run.saved()
            run.step(i)
        assert_close(run, alone)
        assert all(p.device.type == "cuda" for p in run.model.parameters())
        resumed = Training(name, "adamw", gpu=True, reinit=KEPT)
        for part, saved in zip(resumed.parts(), state, strict=True):
            part.load_state_dict(saved)
        for i in range(4, LENGTH):
            resumed.step(i)
        for ours, other in ((run.model, resumed.model), (run.copy, resumed.copy)):
            for key, value in ours.state_dict().items():
                assert torch.equal(on_cpu(value), on_cpu(other.state_dict()[key])), key


@pytest.mark.parametrize("criterion", sorted(set(CRITERIA) - {"ortho", "hessian"}))
def test_criteria(criterion):
    """Second derivatives go through tensors that the engine of autograd makes on the CPU here."""
    with a_gpu():
        run = Training("chain", "momentum", gpu=True, criterion=criterion)
        for i in range(4):
            run.step(i)
        assert run.method.num_pruned > 0


@pytest.mark.parametrize("name", ["chain", "residual-frozen", "residual-grouped", "dense"])
def test_the_smaller_network(name, monkeypatch):
    # It is counted by running operations that were taken apart, which asks for a real GPU.
    if not REAL:
        monkeypatch.setattr(compact, "_cost", lambda model, run: compact.Cost(1, 1))
    monkeypatch.setattr(compact, "_multiple", lambda device, precision: 1)
    with EventStorage():
        on_the_cpu = Training(name, "momentum", gpu=False)
        for i in range(SCHEDULE.end):
            on_the_cpu.step(i, smaller=True)
        with a_gpu():
            run = Training(name, "momentum", gpu=True)
            for i in range(LENGTH):
                if i == SCHEDULE.end:
                    run.compact.grow()
                    on_the_cpu.compact.grow()
                    assert_close(run, on_the_cpu)
                run.step(i, smaller=True)


def test_what_a_gpu_refuses_is_refused():
    with a_gpu() as gpu:
        x, index = gpu(torch.ones(3)), torch.tensor([0])
        assert x[index].tolist() == [1.0]
        for wrong in (
            lambda: x + torch.ones(3),
            lambda: x.index_fill_(0, index, 0.0),
            lambda: torch.ones(3)[gpu(index)],
            lambda: torch.randn(3, device=x.device, generator=torch.Generator()),
            lambda: x.numpy(),
        ):
            with pytest.raises((RuntimeError, TypeError)):
                wrong()
