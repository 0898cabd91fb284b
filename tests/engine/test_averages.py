"""What a trainer keeps in step with the model without RePr's knowledge is found."""

from __future__ import annotations

import copy
import logging
from types import SimpleNamespace

import pytest
import torch
from detectron2.engine import HookBase, SimpleTrainer
from torch import nn
from torch.nn.parallel import DataParallel
from torch.optim.swa_utils import AveragedModel

from repr_det import RePrHook, RePrSchedule
from repr_det.engine.averages import unknown_averages
from tests.method.nets import batch, chain, loss


class Hook:
    """Holds whatever it is given."""

    def __init__(self, **attributes):
        vars(self).update(attributes)


FORMS = {
    "module": AveragedModel,
    "state dict": lambda model: copy.deepcopy(model.state_dict()),
    "list": lambda model: [p.detach().clone() for p in model.parameters()],
    "object": lambda model: SimpleNamespace(state=copy.deepcopy(model.state_dict())),
}


@pytest.mark.parametrize("form", FORMS)
def test_average_is_named(form):
    model = chain()
    hook = Hook(weights=FORMS[form](model), steps=3, model=model)
    name = "Hook.weights.state" if form == "object" else "Hook.weights"
    assert unknown_averages([None, hook], DataParallel(model)) == [name]


def test_model_itself_known_copies_and_other_networks_are_none():
    model = chain()
    average = AveragedModel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    other = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3))
    gradients = [torch.zeros(2)] * 30
    holder = Hook(a=model, b=model.state_dict(keep_vars=True), c=average, d=optimizer, e=other)
    assert unknown_averages([holder, Hook(f=gradients)], model, [average.module]) == []


class KeepsAverage(HookBase):
    def __init__(self, average):
        self.average = average

    def after_step(self):
        self.average.update_parameters(self.trainer.model.network)


class Trains(nn.Module):
    def __init__(self):
        super().__init__()
        self.network = chain()

    def forward(self, data):
        if isinstance(data, torch.Tensor):
            return self.network(data)
        return {"loss": loss(self.network, data)}


@pytest.mark.parametrize("passed", [False, True])
def test_hook_tells_and_leaves_the_network_its_size(passed, caplog):
    """Or the average's next update would meet weights of another size, in the middle of a run."""
    torch.manual_seed(0)
    model = Trains()
    average = AveragedModel(model.network)
    data = [batch(i, torch.float32) for i in range(4)]
    trainer = SimpleTrainer(model, data * 200, torch.optim.SGD(model.parameters(), lr=0.01))
    copies = {"copies": [Trains()]} if passed else {}
    if passed:
        copies["copies"][0].network = average.module
    hook = RePrHook(RePrSchedule(1, 600, 1), **copies)
    trainer.register_hooks([hook, KeepsAverage(average)])
    trainer.max_iter = 602
    with caplog.at_level(logging.WARNING):
        hook.before_train()
    assert ("KeepsAverage.average looks like an average" in caplog.text) != passed
    assert hook._compacts is (None if passed else False)
