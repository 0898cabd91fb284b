"""States: what they hold, with the same bits after a resume, and what is refused."""

from __future__ import annotations

import copy
import io
from collections import OrderedDict

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from repr_det import Reinit, RePr, RePrSchedule
from repr_det.errors import UserError
from tests.grids import covering
from tests.method.nets import OPTIMIZERS, loss, net
from tests.method.runs import LENGTH, S1, SCHEDULE, assert_bits, build, endless, train, weights


def snapshot(model, trainer, method, copies=()):
    """Through a file, as a checkpoint goes, without executing anything from it."""
    file = io.BytesIO()
    state = {
        "model": model.state_dict(), "optimizer": trainer.state_dict(),
        "method": method.state_dict(), "copies": [c.state_dict() for c in copies],
    }  # fmt: skip
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def update(copy_of, model):
    with torch.no_grad():
        for mine, theirs in zip(copy_of.parameters(), model.parameters(), strict=True):
            mine.lerp_(theirs, 0.1)


@pytest.mark.parametrize(
    ("name", "direction"),
    covering(["residual-grouped", "chain-frozen"], ["orthogonal", "previous"]),
)
def test_resumed_at_every_iteration_with_the_same_bits(name, direction):
    """Saved before and after each phase check; continued in fresh objects."""
    optimizer = "adam" if name == "residual-grouped" else "momentum"

    def start():
        model = net(name, torch.float32)
        average = copy.deepcopy(model)
        trainer = OPTIMIZERS[optimizer](model.parameters())
        method = RePr(
            model, trainer, SCHEDULE, batches=endless, loss=loss, copies=[average], seed=5,
            reinit=Reinit(direction=direction),
        )  # fmt: skip
        return model, average, trainer, method

    def go_on(objects, begin, keep=None):
        model, average, trainer, method = objects
        for i in range(begin, LENGTH):
            if keep is not None:
                keep.append((i, snapshot(model, trainer, method, [average])))
            method.step(i)
            if keep is not None and i in (3, 5, 8, 10):
                keep.append((i, snapshot(model, trainer, method, [average])))
            train(model, trainer, i)
            update(average, model)
        return weights(model), weights(average), trainer.state_dict()["state"], method.state_dict()

    saved = []
    straight = go_on(start(), 0, saved)
    assert len(saved) == LENGTH + 4
    for iteration, state in saved:
        objects = model, average, trainer, method = start()
        model.load_state_dict(state["model"])
        average.load_state_dict(state["copies"][0])
        # The order in which Detectron2 restores is not ours to choose: RePr first here.
        method.load_state_dict(state["method"])
        trainer.load_state_dict(state["optimizer"])
        resumed = go_on(objects, iteration)
        assert_bits(resumed[0], straight[0])
        assert_bits(resumed[1], straight[1])
        for key, values in straight[2].items():
            for entry, value in values.items():
                same = torch.equal(torch.as_tensor(resumed[2][key][entry]), torch.as_tensor(value))
                assert same, (iteration, key, entry)
        assert str(resumed[3]) == str(straight[3])


def test_state_holds_only_plain_values():
    def check(value):
        if isinstance(value, dict):
            assert all(isinstance(k, str) for k in value)
            [check(v) for v in value.values()]
        elif isinstance(value, list):
            [check(v) for v in value]
        else:
            assert value is None or type(value) in (torch.Tensor, int, float, str, bool), value

    for name in ("residual", "chain-frozen", "chain-bias"):
        model, trainer, method = build(name, "adam")
        train(model, trainer, 0)
        for i in (0, 3, 5):
            method.step(i)
            check(method.state_dict())


@pytest.mark.parametrize("name", ["chain", "residual-bias", "residual-grouped"])
@pytest.mark.parametrize("optimizer", ["momentum", "adamw"])
def test_what_is_kept_is_no_larger_than_the_pruned_weights(name, optimizer):
    """With the default return. Weights that read a pruned filter alone count as pruned."""
    model, trainer, method = build(name, optimizer)
    for i in range(4):
        method.step(i)
        train(model, trainer, i)
    state = method.state_dict()
    kept = sum(t.nbytes for t in tree_leaves([state["before"], state["aside"]]))
    assert 0 < kept <= sum(int((p == 0).sum()) * p.element_size() for p in model.parameters())


def test_numbers_of_numpy_leave_a_state_that_loads_without_executing_code():
    kept = {"prune_ratio": np.float64(0.3), "max_layer_ratio": np.float64(0.5), "seed": np.int64(3)}
    reinit = Reinit(scale=np.float64(0.5), outgoing=np.float64(0.0))
    method = build(reinit=reinit, **kept)[2]
    file = io.BytesIO()
    torch.save(method.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    build(reinit=Reinit(scale=0.5), seed=3)[2].load_state_dict(state)


def test_states_of_version_1_between_cycles_are_read():
    method = build()[2]
    build()[2].load_state_dict(method.state_dict() | {"version": 1})
    method.step(S1)
    with pytest.raises(ValueError, match="state has version 1"):
        build()[2].load_state_dict(method.state_dict() | {"version": 1})


def test_resumed_pruned_run_holds_its_filters():
    model, trainer, method = build()
    method.step(3)
    state = snapshot(model, trainer, method)
    model, trainer, method = build()
    model.load_state_dict(state["model"])
    method.load_state_dict(state["method"])
    train(model, trainer, 4)
    assert method.num_pruned > 0
    for layer in method.layers:
        assert layer.matrix()[method.pruned[layer.name]].abs().sum() == 0


@pytest.mark.parametrize(
    ("different", "told"),
    [
        ({"schedule": RePrSchedule(4, 2, 2)}, "s1 was 3, is 4"),
        ({"schedule": RePrSchedule(3, 1, 2)}, "s2 was 2, is 1"),
        ({"schedule": RePrSchedule(3, 2, 9)}, "cycles was 2, is 9"),
        ({"prune_ratio": 0.2}, "prune_ratio was 0.3, is 0.2"),
        ({"criterion": "weights"}, "criterion was 'ortho', is 'weights'"),
        ({"include": ["3"]}, r"include was \[\], is \['3'\]"),
        ({"exclude": ["3"]}, r"exclude was \[\], is \['3'\]"),
        ({"max_layer_ratio": 0.9}, "max_layer_ratio was 0.5, is 0.9"),
        ({"seed": 3}, "seed was 0, is 3"),
        ({"reinit": Reinit(outgoing=0.5)}, "reinit.outgoing was 0.0, is 0.5"),
        ({"seed": 3, "prune_ratio": 0.2}, "prune_ratio was 0.3, is 0.2; seed was 0, is 3"),
    ],
)
def test_resume_with_other_settings_says_which(different, told):
    state = build()[2].state_dict()
    with pytest.raises(ValueError, match=told):
        build(**different)[2].load_state_dict(state)


def test_resume_refuses_another_model_copies_and_version():
    model, trainer, method = build(copies=[net("chain", torch.float32)])
    method.step(3)
    state = method.state_dict()
    changed = state["layers"] | {"block1.conv1": 6}
    with pytest.raises(ValueError, match="layers differ .*for example block1.conv1"):
        build()[2].load_state_dict(state | {"layers": changed})
    with pytest.raises(ValueError, match="written with 1 copies of the model, now there are 0"):
        build()[2].load_state_dict(state)
    with pytest.raises(ValueError, match="state has version 7, this is version 2"):
        build()[2].load_state_dict(state | {"version": 7})


def test_resume_refuses_a_model_whose_filters_others_read():
    """Its filter layers are the same, but the head that reads them has another name."""
    method = build()[2]
    *body, (_, head) = net("chain", torch.float32).named_children()
    other = nn.Sequential(OrderedDict([*body, ("head", head)]))
    resumed = RePr(other, torch.optim.SGD(other.parameters(), 0.1), SCHEDULE)
    for iteration in (0, S1):
        method.step(iteration)
        with pytest.raises(UserError, match="layers differ .*for example 12"):
            resumed.load_state_dict(method.state_dict())


def test_state_does_not_go_on_with_the_run():
    _, _, method = build()
    state = method.state_dict()
    method.step(3)
    assert state["history"] == [] and len(method.history) == 1


def test_checkpoints_from_before_there_was_a_warmup():
    _, _, method = build()
    state = method.state_dict()
    del state["settings"]["warmup"]
    method.load_state_dict(state)
