"""Random schedules, layers, ratios and moments of interruption: what holds at every step."""

from __future__ import annotations

import io
import math

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from repr_det import Reinit, RePr, RePrSchedule

OPTIMIZERS = {
    "momentum": lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, weight_decay=0.01),
    "adam": lambda p: torch.optim.Adam(p, 0.01, weight_decay=0.01),
}


@st.composite
def networks(draw):
    """A chain of convs of random widths, kernels, groups, kinds and norms."""
    groups = [1, *(draw(st.sampled_from([1, 1, 2, 3])) for _ in range(draw(st.integers(1, 3))))]
    layers, inputs = [], 3
    for i, group in enumerate(groups):
        following = groups[i + 1] if i + 1 < len(groups) else 1
        unit = math.lcm(group, following)
        outputs = unit * draw(st.integers(max(1, math.ceil(2 / unit)), max(2, 8 // unit)))
        layers.append(
            {
                "inputs": inputs,
                "outputs": outputs,
                "groups": group,
                "kernel": draw(st.sampled_from([1, 3])),
                "transposed": draw(st.booleans()),
                "norm": draw(st.booleans()),
                "bias": draw(st.booleans()),
            }  # fmt: skip
        )
        inputs = outputs
    return layers


def make(layers, seed):
    torch.manual_seed(seed)
    modules = []
    for x in layers:
        kind = nn.ConvTranspose2d if x["transposed"] else nn.Conv2d
        modules.append(
            kind(
                x["inputs"],
                x["outputs"],
                x["kernel"],
                padding=x["kernel"] // 2,
                groups=x["groups"],
                bias=x["bias"],
            )  # fmt: skip
        )
        if x["norm"]:
            modules.append(nn.BatchNorm2d(x["outputs"]))
        modules.append(nn.ReLU())
    return nn.Sequential(
        *modules, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * layers[-1]["outputs"], 3)
    )


def train(model, optimizer, index):
    generator = torch.Generator().manual_seed(index)
    x = torch.randn(4, 3, 5, 5, generator=generator)
    y = torch.randint(0, 3, (4,), generator=generator)
    optimizer.zero_grad()
    F.cross_entropy(model(x), y).backward()
    optimizer.step()


def through_a_file(*objects):
    file = io.BytesIO()
    torch.save([x.state_dict() for x in objects], file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def check(method, schedule, iteration, ratio, limit, before):
    """What must hold after ``step(iteration)`` and after the training step behind it."""
    phase = schedule.phase(iteration)
    assert (method.phase, method.cycle) == phase
    total = sum(layer.num_filters for layer in method.layers)
    assert method.num_pruned == (math.floor(ratio * total + 1e-9) if phase.name == "sub" else 0)
    for layer in method.layers:
        mask = method.pruned[layer.name]
        assert int(mask.sum()) <= min(limit * layer.num_filters + 1e-9, layer.num_filters - 1)
        if before is not None:
            assert torch.equal(mask, before[layer.name])
        for slot in layer.filter_slots(mask):
            assert not slot.read().any()
            state = method.optimizer.state.get(slot.tensor, {})
            for value in state.values():
                if value.shape == slot.tensor.shape:
                    assert not slot.read(like=value).any()
        assert layer.weight.isfinite().all()


def check_returned(layer, old, mask):
    """New filters are orthogonal to the rest of their group where there is room."""
    for group, part in enumerate(mask.reshape(layer.groups, -1)):
        rows = slice(group * len(part), (group + 1) * len(part))
        if not part.any() or len(part) + int(part.sum()) > layer.dimension:
            continue
        new = F.normalize(layer.matrix()[rows].double(), dim=1)
        gone = F.normalize(old[rows].double(), dim=1)
        others = torch.cat([new[~part], gone[part]])
        assert (new[part] @ others.T).abs().max() <= 1e-5
        # With outgoing 0, survivors that read nothing but returned filters are zero for now.
        known = gone[part].any(dim=1) | new[~part].any()
        assert new[part].any(dim=1)[known].all()


@pytest.mark.slow
@settings(
    max_examples=30, deadline=None, derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)  # fmt: skip
@given(
    layers=networks(),
    s1=st.integers(1, 3),
    s2=st.integers(1, 3),
    cycles=st.integers(1, 2),
    ratio=st.sampled_from([0.1, 0.25, 0.3, 0.5, 0.7]),
    limit=st.sampled_from([0.3, 0.5, 0.75, 1.0]),
    criterion=st.sampled_from(["ortho", "ortho_paper", "ortho_authors", "weights", "random"]),
    optimizer=st.sampled_from(sorted(OPTIMIZERS)),
    outgoing=st.sampled_from([0.0, 0.5, 1.0]),
    seed=st.integers(0, 2**31),
    data=st.data(),
)
def test_invariants_hold_at_every_step(
    layers, s1, s2, cycles, ratio, limit, criterion, optimizer, outgoing, seed, data
):
    schedule = RePrSchedule(s1, s2, cycles)

    def start():
        model = make(layers, seed % 1000)
        trainer = OPTIMIZERS[optimizer](model.parameters())
        method = RePr(
            model, trainer, schedule, ratio, criterion, include=["*"], max_layer_ratio=limit,
            seed=seed, reinit=Reinit(outgoing=outgoing),
        )  # fmt: skip
        return model, trainer, method

    try:
        model, trainer, method = start()
    except ValueError as error:  # what cannot be is said so when it is built
        message = str(error)
        assert "less than one filter" in message or "max_layer_ratio" in message
        assume(False)
    length = schedule.end + 1
    save_at = data.draw(st.integers(0, length - 1), label="saved before iteration")
    load_at = data.draw(st.integers(save_at, length - 1), label="killed before iteration")
    saved, i, killed = None, 0, False
    straight, gone = {}, {}
    while i < length:
        if i == save_at and saved is None:
            saved = through_a_file(model, trainer, method)
        if i == load_at and not killed:
            killed = True
            model, trainer, method = start()
            for target, state in zip((model, trainer, method), saved, strict=True):
                target.load_state_dict(state)
            i = save_at
        old = {layer.name: layer.matrix().clone() for layer in method.layers}
        masks = method.pruned
        for change in method.step(i):
            if change.kind == "drop":
                gone[change.cycle] = old
            else:
                for layer in method.layers:
                    check_returned(layer, gone[change.cycle][layer.name], masks[layer.name])
        check(method, schedule, i, ratio, limit, None)
        masks = method.pruned
        train(model, trainer, i)
        check(method, schedule, i, ratio, limit, masks)
        bits = torch.cat([p.detach().flatten() for p in model.parameters()])
        # What was computed before the kill is computed again with the same bits.
        assert torch.equal(straight.setdefault(i, bits), bits)
        i += 1
