"""A small network, its schedule and one run of them with RePr."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from repr_det import RePr, RePrSchedule
from tests.method.nets import OPTIMIZERS, batch, loss, net

S1, S2, CYCLES = 3, 2, 2
SCHEDULE = RePrSchedule(S1, S2, CYCLES)
LENGTH = SCHEDULE.end + 2


def endless():
    i = 500
    while True:
        yield batch(i, torch.float32)
        i += 1


def build(name="chain", optimizer="momentum", dtype=torch.float32, **arguments):
    model = net(name, dtype)
    trainer = OPTIMIZERS[optimizer](model.parameters())
    arguments = {"schedule": SCHEDULE, "batches": endless, "loss": loss} | arguments
    return model, trainer, RePr(model, trainer, **arguments)


def train(model, trainer, index, dtype=torch.float32):
    trainer.zero_grad()
    loss(model, batch(index, dtype)).backward()
    trainer.step()


def weights(model):
    return {k: v.detach().clone() for k, v in model.state_dict().items()}


def assert_bits(a, b):
    assert a.keys() == b.keys()
    for key in a:
        assert torch.equal(a[key], b[key]), key


def cosines(a, b):
    a, b = (F.normalize(x.double(), dim=1) for x in (a, b))
    return (a @ b.T).abs()
