"""Promise 4: ranks whose batches differ do not wait for each other, and agree."""

from __future__ import annotations

import time

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from repr_det import RePr, RePrSchedule
from tests.method.nets import batch, loss, net, norm

LIMIT_S = 90
"""Ranks that wait for each other are ended after this time."""


def in_a_process(rank, work, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder / 'group'}", rank=rank, world_size=2)
    torch.save(work(rank), folder / f"{rank}.pth")
    dist.barrier()
    dist.destroy_process_group()


def in_two_processes(work, folder):
    """What ``work(rank)`` returns on each of two ranks."""
    context = torch.multiprocessing.spawn(in_a_process, (work, folder), nprocs=2, join=False)
    end = time.monotonic() + LIMIT_S
    while not context.join(timeout=1):
        if time.monotonic() > end:
            for process in context.processes:
                process.kill()
            pytest.fail(f"The ranks still wait for each other after {LIMIT_S} s.")
    return [torch.load(folder / f"{rank}.pth", weights_only=True) for rank in range(2)]


class Repeated(nn.Module):
    """A block that a batch goes through as often as its first pixel says, or not at all."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), norm("frozen", 8), nn.SiLU())
        self.block = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), norm("frozen", 8), nn.SiLU())
        self.head = nn.Linear(8, 5)

    def forward(self, images):
        x = self.body(images)
        for _ in range(1 + int(images[0, 0, 0, 0])):
            x = self.block(x)
        return self.head(x.mean(dim=(2, 3)))


def marked(index, times):
    images, labels = batch(index, torch.float32)
    images[0, 0, 0, 0] = times - 1
    return images, labels


def calibrate_through_other_branches(rank):
    times = ((1, 0, 1), (1, 3, 2))[rank]
    torch.manual_seed(0)
    model = Repeated()
    method = RePr(
        model,
        torch.optim.SGD(model.parameters(), 0.1),
        RePrSchedule(1, 1, 1),
        include=["body.0", "block.0"],
        batches=lambda: iter([marked(10 * rank + i, n) for i, n in enumerate(times)]),
        loss=loss,
    )
    method.step(1)
    gone = method.pruned
    method.step(2)
    return {"gone": gone, "state": model.state_dict()}


def test_calibration_of_ranks_that_take_other_branches(tmp_path):
    first, second = in_two_processes(calibrate_through_other_branches, tmp_path)
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    for name, gone in first["gone"].items():
        running = first["state"][name.replace(".0", ".1") + ".running_var"]
        assert gone.any() and (running[gone] > 0).all() and (running[gone] != 1).all()


CRITERIA = ("activations", "apoz", "gradients", "taylor", "hessian", "oracle")


def rank_by(criterion, batches):
    model = net("chain", torch.float64)
    method = RePr(
        model,
        torch.optim.SGD(model.parameters(), 0.1),
        RePrSchedule(1, 1, 1),
        criterion=criterion,
        batches=lambda: iter(batches),
        loss=loss,
    )
    (change,) = method.step(1)
    return {
        "pruned": method.pruned,
        "means": [layer.mean_score for layer in change.layers],
    }


def rank_without_batches(rank):
    batches = [batch(i) for i in range(3)] if rank == 0 else []
    return {criterion: rank_by(criterion, batches) for criterion in CRITERIA}


@pytest.mark.slow
def test_ranking_where_one_rank_has_no_batches(tmp_path):
    first, second = in_two_processes(rank_without_batches, tmp_path)
    alone = rank_without_batches(0)
    for criterion in CRITERIA:
        assert first[criterion]["means"] == second[criterion]["means"]
        assert first[criterion]["means"] == pytest.approx(alone[criterion]["means"], rel=1e-9)
        for name, mask in alone[criterion]["pruned"].items():
            assert torch.equal(first[criterion]["pruned"][name], mask)
            assert torch.equal(second[criterion]["pruned"][name], mask)


def rank_unequal_numbers(rank):
    batches = [batch(i) for i in ((0, 1, 2), (3,))[rank]]
    return {criterion: rank_by(criterion, batches) for criterion in CRITERIA[:4]}


def test_every_batch_counts_alike_whatever_rank_it_is_on(tmp_path):
    first, second = in_two_processes(rank_unequal_numbers, tmp_path)
    for criterion in CRITERIA[:4]:
        alone = rank_by(criterion, [batch(i) for i in range(4)])
        assert first[criterion]["means"] == second[criterion]["means"]
        assert first[criterion]["means"] == pytest.approx(alone["means"], rel=1e-9)


def change_phase_in_a_group_of_its_own(rank):
    groups = [dist.new_group([0]), dist.new_group([1])]
    if rank:  # trains something else
        return {}
    model = DistributedDataParallel(net("chain-frozen"), process_group=groups[0])
    method = RePr(
        model,
        torch.optim.SGD(model.parameters(), 0.1),
        RePrSchedule(1, 1, 1),
        criterion="taylor",
        batches=lambda: iter([batch(0)]),
        loss=loss,
    )
    return {"changes": len(method.step(1)) + len(method.step(2))}


def test_only_ranks_of_the_models_group_take_part(tmp_path):
    assert in_two_processes(change_phase_in_a_group_of_its_own, tmp_path)[0] == {"changes": 2}


class Perceptron(nn.Sequential):
    """Hidden units after a conv."""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(3, 8, 8), nn.Flatten(), nn.Linear(8, 20), nn.GELU(), nn.Linear(20, 16),
            nn.GELU(), nn.Linear(16, 5),
        )  # fmt: skip


def train_with_linear_layers(rank):
    torch.manual_seed(0)
    model = DistributedDataParallel(Perceptron())
    trainer = torch.optim.AdamW(model.parameters(), 0.01)
    batches = [batch(10 * rank + i, torch.float32) for i in range(2)]
    method = RePr(
        model, trainer, RePrSchedule(3, 3, 2), linear=True, criterion="activations",
        batches=lambda: iter(batches), loss=loss,
    )  # fmt: skip
    dropped = []
    for i in range(13):
        method.step(i)
        dropped.append(method.pruned)
        trainer.zero_grad()
        loss(model, batches[i % 2]).backward()
        trainer.step()
    return {"dropped": dropped, "weights": model.module.state_dict()}


def test_ranks_drop_and_return_the_same_hidden_units(tmp_path):
    first, second = in_two_processes(train_with_linear_layers, tmp_path)
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    assert first["dropped"][3].keys() == {"2", "4"}
    assert all(
        masks["4"].any() == (i in (3, 4, 5, 9, 10, 11)) for i, masks in enumerate(first["dropped"])
    )
