"""What other hooks keep in step with the model without RePr's knowledge is named."""

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
from repr_det.engine.hook import weights_alike
from tests.method.nets import batch, chain, loss


class Hook:
    """Holds whatever it is given."""

    def __init__(self, **attributes):
        vars(self).update(attributes)


FORMS = {
    "module": AveragedModel,
    "state dict": lambda model: copy.deepcopy(model.state_dict()),
    "prefix": lambda model: copy.deepcopy(DataParallel(model).state_dict()),
    "object": lambda model: SimpleNamespace(state=copy.deepcopy(model.state_dict())),
}


@pytest.mark.parametrize("form", FORMS)
def test_average_is_named(form):
    model = chain()
    hook = Hook(weights=FORMS[form](model), steps=3, model=model)
    name = "Hook.SimpleNamespace.state" if form == "object" else "Hook.weights"
    assert list(weights_alike([hook], DataParallel(model))) == [name]


def test_model_itself_known_copies_and_other_networks_are_none():
    model = chain()
    average = AveragedModel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    other = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3))
    gradients = [torch.zeros(2)] * 30
    holder = Hook(a=model, b=model.state_dict(keep_vars=True), c=average, d=optimizer, e=other)
    assert weights_alike([holder, Hook(f=gradients)], model, [average.module]) == {}


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


class Keeps(HookBase):
    """Keeps an average in step, in one of several forms, or a teacher that never changes."""

    def __init__(self, form, model):
        self.form = form
        network = copy.deepcopy(model.network)
        self.held = {
            "module": network,
            "teacher": network.requires_grad_(False),
            "prefix": {f"module.network.{k}": v.clone() for k, v in network.state_dict().items()},
            "new dict": network.state_dict(),
        }[form]

    def after_step(self):
        state = self.trainer.model.network.state_dict()
        if self.form == "module":
            for mine, theirs in zip(self.held.state_dict().values(), state.values(), strict=True):
                mine.copy_(theirs)
        elif self.form == "prefix":
            for key, value in state.items():
                self.held[f"module.network.{key}"].copy_(value)
        elif self.form == "new dict":
            self.held = {key: value.clone() for key, value in state.items()}


def run(form, passed=False):
    torch.manual_seed(0)
    model = Trains()
    keeper = Keeps(form, model)
    data = [batch(i, torch.float32) for i in range(4)]
    trainer = SimpleTrainer(model, data * 4, torch.optim.SGD(model.parameters(), lr=0.01))
    copies = {"copies": [SimpleCopy(keeper.held)]} if passed else {}
    hook = RePrHook(RePrSchedule(2, 2, 1), **copies)
    trainer.register_hooks([hook, keeper])
    trainer.train(0, 6)
    return hook


class SimpleCopy(Trains):
    def __init__(self, network):
        super().__init__()
        self.network = network


@pytest.mark.parametrize("form", ["module", "prefix", "new dict"])
def test_an_average_that_moves_is_named_and_filters_stay(form, caplog):
    """Its next update would meet weights of another size, in the middle of a run."""
    with caplog.at_level(logging.WARNING):
        hook = run(form)
    assert "Keeps.held has the shapes of the model's weights, as an average of" in caplog.text
    assert hook.state_dict()["compact"] is False


def test_an_average_that_the_trainer_holds_is_named_by_the_trainers_class(caplog):
    """Detectron2 hands hooks a proxy of it."""

    class KeepsItself(SimpleTrainer):
        def after_step(self):
            super().after_step()
            for mine, theirs in zip(
                self.held.state_dict().values(),
                self.model.network.state_dict().values(),
                strict=True,
            ):
                mine.copy_(theirs)

    torch.manual_seed(0)
    model = Trains()
    data = [batch(i, torch.float32) for i in range(4)]
    trainer = KeepsItself(model, data * 4, torch.optim.SGD(model.parameters(), lr=0.01))
    trainer.held = copy.deepcopy(model.network)
    trainer.register_hooks([RePrHook(RePrSchedule(2, 2, 1))])
    with caplog.at_level(logging.WARNING):
        trainer.train(0, 6)
    assert "KeepsItself.held has the shapes of the model's weights, as an average of" in caplog.text


@pytest.mark.parametrize("moves", [True, False])
def test_a_list_that_goes_along_with_the_parameters_is_named(moves, caplog):
    """An average, or the weights that training began with, for a penalty."""

    class Lists(HookBase):
        def __init__(self, model):
            self.shadow = [p.detach().clone() for p in model.parameters()]
            self.parameters = list(model.parameters())

        def after_step(self):
            for mine, theirs in zip(self.shadow, self.parameters, strict=True):
                if moves:
                    mine.lerp_(theirs, 0.5)

    torch.manual_seed(0)
    model = Trains()
    data = [batch(i, torch.float32) for i in range(4)]
    trainer = SimpleTrainer(model, data * 4, torch.optim.SGD(model.parameters(), lr=0.01))
    trainer.register_hooks([RePrHook(RePrSchedule(2, 2, 1)), Lists(model)])
    with caplog.at_level(logging.WARNING):
        trainer.train(0, 6)
    assert "RePr: Lists.shadow has the shapes of the model's weights, as" in caplog.text


@pytest.mark.parametrize(("form", "passed"), [("teacher", False), ("module", True)])
def test_a_frozen_teacher_and_a_known_copy_are_not_named(form, passed, caplog):
    with caplog.at_level(logging.WARNING):
        run(form, passed)
    assert "has the shapes of the model's weights" not in caplog.text
