"""Checkpoints of version 0.1.0 resume.

``state_0_1_0.pt`` was written by that version in the middle of S2: the five first iterations of the
network and the schedule below, on random images, with Adam.
"""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

from repr_det import Reinit, RePr, RePrSchedule
from repr_det.errors import UserError
from tests.method.nets import check_held

STATE = Path(__file__).with_name("state_0_1_0.pt")
S1, S2, WRITTEN = 3, 4, 5


def start(state, **arguments):
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.SiLU(), nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), nn.SiLU(),
        nn.Conv2d(6, 6, 3), nn.SiLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 2),
    )  # fmt: skip
    trainer = torch.optim.Adam(model.parameters(), 1e-2)
    reinit = Reinit(outgoing=0.5)
    method = RePr(model, trainer, RePrSchedule(S1, S2, 2), 0.4, reinit=reinit, **arguments)
    for target, part in zip((model, trainer, method), state.values(), strict=True):
        target.load_state_dict(part)
    return model, trainer, method


def train(model, trainer, index):
    generator = torch.Generator().manual_seed(index)
    images = torch.randn(4, 3, 9, 9, generator=generator)
    labels = torch.randint(0, 2, (4,), generator=generator)
    trainer.zero_grad()
    nn.functional.cross_entropy(model(images), labels).backward()
    trainer.step()


@pytest.fixture
def state():
    return torch.load(STATE, weights_only=True)


def test_a_state_written_in_s2_goes_on(state):
    """Its filters stay zero, return orthogonal, and the weights that read them come back."""
    assert "graph" not in state["method"] and "reinit.direction" not in state["method"]["settings"]
    before = copy.deepcopy(state["method"])
    model, trainer, method = start(state)
    assert method.phase == "sub" and method.num_pruned == 4
    pruned = method.pruned
    assert all(torch.equal(mask, before["pruned"][name]) for name, mask in pruned.items())
    for i in range(WRITTEN, S1 + S2):
        assert method.step(i) == []
        train(model, trainer, i)
        check_held(method)
    assert [change.kind for change in method.step(S1 + S2)] == ["return"]
    for layer in method.layers:
        rows, mask = nn.functional.normalize(layer.matrix().double()), pruned[layer.name]
        old = nn.functional.normalize(before["before"][layer.name]["weight"].double())
        assert (rows[mask] @ rows[~mask].T).abs().max() < 1e-5
        assert (rows[mask] @ old.T).abs().max() < 1e-5
    [entry] = before["aside"][0]["9"]
    assert torch.equal(model[9].weight[:, pruned["5"]], 0.5 * entry["value"])
    for i in range(S1 + S2, 2 * (S1 + S2) + 1):
        method.step(i)
        train(model, trainer, i)
    assert len(method.history) == 2 and method.phase == "full"


def test_a_state_written_in_s2_goes_on_as_its_own_copy_does(state):
    """Written again by this version and read once more, with the same bits."""
    first = start(state)
    written = copy.deepcopy([part.state_dict() for part in first])
    second = start(dict(zip(state, written, strict=True)))
    for model, trainer, method in (first, second):
        for i in range(WRITTEN, 2 * (S1 + S2) + 1):
            method.step(i)
            train(model, trainer, i)
    for a, b in zip(first[0].parameters(), second[0].parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_state_of_other_layers_is_refused(state):
    del state["method"]["layers"]["5"]
    state["method"]["layers"]["7"] = 6
    with pytest.raises(UserError, match="layers differ from the checkpoint's .*example 7"):
        start(state)
