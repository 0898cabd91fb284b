"""RePr as one object: its life, its state, what comes back, and every refusal."""

from __future__ import annotations

import copy
import io
import warnings
from collections import Counter, OrderedDict

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves

from repr_det import Reinit, RePr, RePrSchedule
from repr_det.errors import UserError
from repr_det.method import choice, ranks
from repr_det.method.criteria import chance_overlap
from tests.grids import covering
from tests.method.nets import NETS, OPTIMIZERS, batch, check_held, loss, net
from tests.operations import Operations

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


# --- life


@pytest.mark.parametrize("name", NETS)
def test_two_whole_cycles(name):
    model, trainer, method = build(name, prune_ratio=0.3, max_layer_ratio=0.5)
    total = sum(layer.num_filters for layer in method.layers)
    happened = []
    for i in range(LENGTH):
        for change in method.step(i):
            happened.append((i, change.kind, change.cycle))
            assert sum(layer.pruned for layer in change.layers) == int(0.3 * total + 1e-9)
            assert [layer.name for layer in change.layers] == [x.name for x in method.layers]
        phase = SCHEDULE.phase(i)
        assert (method.phase, method.cycle) == phase
        assert method.num_pruned == (int(0.3 * total + 1e-9) if phase.name == "sub" else 0)
        for layer in method.layers:
            mask = method.pruned[layer.name]
            assert mask.shape == (layer.num_filters,)
            assert int(mask.sum()) <= layer.num_filters // 2
            assert layer.matrix()[mask].abs().sum() == 0
        train(model, trainer, i)
        for layer in method.layers:
            rows = layer.matrix()
            assert rows[method.pruned[layer.name]].abs().sum() == 0
            assert (rows[~method.pruned[layer.name]].norm(dim=1) > 0).all()
    assert happened == [(3, "drop", 0), (5, "return", 0), (8, "drop", 1), (10, "return", 1)]
    assert [(h["cycle"], h["iteration"]) for h in method.history] == [(0, 3), (1, 8)]


def test_pruned_is_a_copy_and_false_when_full():
    _, _, method = build()
    assert method.pruned.keys() == {"3", "7"}
    assert not any(mask.any() for mask in method.pruned.values())
    method.step(S1)
    method.pruned["3"].fill_(True)
    assert 0 < method.num_pruned < 16
    assert sum(int(m.sum()) for m in method.history[0]["pruned"].values()) == method.num_pruned


def test_step_that_is_not_due_changes_nothing():
    model, _, method = build()
    for i in (0, 1, 2):
        before = weights(model)
        assert method.step(i) == []
        assert_bits(weights(model), before)
    assert len(method.step(3)) == 1
    before = weights(model)
    assert method.step(3) == method.step(4) == []
    assert_bits(weights(model), before)


def operations(model, trainer, method=None):
    """What torch is asked to do in each step; what is due at phase changes is left out."""
    steps = []
    for i in range(LENGTH):
        if method is not None and method.due(i):
            method.step(i)
        with Operations() as recorded:
            if method is not None:
                method.step(i)
            train(model, trainer, i)
        steps.append(recorded.seen)
    return steps


@pytest.mark.parametrize("optimizer", ["momentum", "adam"])
@pytest.mark.parametrize("name", ["chain", "residual", "residual-grouped"])
def test_a_step_of_the_full_phase_is_that_of_plain_training(name, optimizer):
    """Operation by operation, before the first drop, between two, and after the last return."""
    model, trainer, method = build(name, optimizer)
    plain = net(name, torch.float32)
    expected = operations(plain, OPTIMIZERS[optimizer](plain.parameters()))
    found = operations(model, trainer, method)
    for i in range(LENGTH):
        if SCHEDULE.phase(i).name == "full":
            assert found[i] == expected[i]


class Branch(nn.Module):
    """A conv that one conv alone reads, and that conv, which is added to something else."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.first = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.first_norm = nn.BatchNorm2d(8)
        self.second = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.second_norm = nn.BatchNorm2d(8)
        self.linear = nn.Linear(8, 2)

    def forward(self, x):
        x = self.stem(x)
        y = F.relu(self.first_norm(self.first(x)))
        return self.linear(F.relu(x + self.second_norm(self.second(y))).mean((2, 3)))


@pytest.mark.parametrize("optimizer", ["momentum", "adam"])
def test_a_step_of_s2_costs_one_operation_for_each_tensor_that_is_held(optimizer):
    """Each of the two layers has three tensors: weight, gamma and beta."""

    def first_two(layers, data):
        return {layer.name: (torch.arange(8) < 2).double() for layer in layers}

    torch.manual_seed(0)
    plain = Branch()
    model = copy.deepcopy(plain)
    expected = operations(plain, OPTIMIZERS[optimizer](plain.parameters()))
    trainer = OPTIMIZERS[optimizer](model.parameters())
    method = RePr(model, trainer, RePrSchedule(3, 4, 1), prune_ratio=0.25, criterion=first_two)
    found = operations(model, trainer, method)
    assert method.history[0]["pruned"].keys() == {"first", "second"}
    extra = [
        Counter(name for name, _ in seen) - Counter(name for name, _ in usual)
        for seen, usual in zip(found, expected, strict=True)
    ]
    holds = {"index_fill_": 6}
    # Nothing among it waits for a GPU.
    assert extra[3:7] == [holds] * 4
    assert [len(seen) for seen in found[3:7]] == [len(usual) + 6 for usual in expected[3:7]]
    assert not any(extra[:3] + extra[7:])


def test_iterations_may_jump():
    """A return that was missed is made up for, then the drop that is due."""
    _, _, method = build()
    method.step(3)
    assert [c.kind for c in method.step(8)] == ["return", "drop"]
    assert method.cycle == 1
    assert [c.kind for c in method.step(100)] == ["return"]


def test_overlap_is_the_plain_score_of_survivors():
    _, _, method = build()
    for i in (0, 3):
        method.step(i)
        for layer in method.layers:
            rows = layer.matrix()[~method.pruned[layer.name]]
            found = cosines(rows, rows)
            expected = (found.sum() - len(rows)) / len(rows) ** 2
            assert method.overlap()[layer.name] == pytest.approx(expected.item(), rel=1e-4)


def test_random_state_outside_is_untouched():
    model, trainer, method = build("chain-frozen")
    state = torch.get_rng_state()
    for i in range(LENGTH):
        method.step(i)
    assert torch.equal(torch.get_rng_state(), state)


def test_seed_decides_what_comes_back():
    results = []
    for seed in (0, 0, 1):
        model, _, method = build(seed=seed)
        method.step(3), method.step(5)
        results.append(weights(model))
    assert_bits(results[0], results[1])
    assert any(not torch.equal(results[0][key], results[2][key]) for key in results[0])


@pytest.mark.parametrize("backend", ["aot_eager"])
def test_compiled_model_gives_the_same_and_compiles_once(backend):
    """The phases differ in values alone, so nothing is compiled again at a phase change."""
    results = []
    for compiled in (False, True):
        model, trainer, method = build("chain")
        run = torch.compile(model, backend=backend) if compiled else model
        if compiled:
            method = RePr(run, trainer, SCHEDULE, batches=endless, loss=loss)
            torch._dynamo.utils.counters.clear()
        for i in range(LENGTH):
            method.step(i)
            with torch._dynamo.config.patch(error_on_recompile=i > 0):
                train(run, trainer, i)
        results.append(weights(model))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    for key in results[0]:
        torch.testing.assert_close(results[1][key], results[0][key], rtol=1e-4, atol=1e-5)


def test_compiled_in_place_model_is_calibrated():
    """Hooks that measure reach a model whose forward is compiled."""
    results = []
    for compiled in (False, True):
        model, trainer, method = build("chain-frozen")
        if compiled:
            model.compile(backend="aot_eager")
            loss(model, batch(0, torch.float32))
        method.step(3), method.step(5)
        results.append(weights(model))
    for key in results[0]:
        torch.testing.assert_close(results[1][key], results[0][key], rtol=1e-4, atol=1e-5)


# --- state


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


class UpAndDown(nn.Sequential):
    """A transposed conv in groups between two others."""

    def __init__(self):
        super().__init__(
            nn.Conv2d(3, 8, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(8, 8, 3, padding=1),
            nn.ReLU(),
            nn.ConvTranspose2d(8, 12, 2, stride=2, groups=2),
            nn.ReLU(),
            nn.Conv2d(12, 6, 3, groups=3, bias=False),
            nn.Flatten(),
            nn.Linear(6 * 14 * 14, 2),
        )


def test_what_survives_is_untouched_when_nothing_is_trained_in_between():
    torch.manual_seed(0)
    model = UpAndDown()
    trainer = torch.optim.Adam(model.parameters(), lr=1e-2)
    method = RePr(model, trainer, SCHEDULE, 0.5, "random", reinit=Reinit(outgoing=1.0))
    for i in range(3):
        train(model, trainer, i)

    def values():
        tensors = {layer.name: [layer.weight] for layer in method.layers}
        for some in tensors.values():
            some += [v for v in trainer.state[some[0]].values() if v.dim() > 0]
        return {
            layer.name: torch.stack([layer.matrix(t) for t in tensors[layer.name]])
            for layer in method.layers
        }

    before, read_out = values(), model[-1].weight.detach().clone()
    method.step(S1)
    pruned = method.pruned
    assert all(mask.any() for mask in pruned.values())
    assert (model[-1].weight == 0).any()
    method.step(S1 + S2)
    for name, after in values().items():
        assert torch.equal(after[:, ~pruned[name]], before[name][:, ~pruned[name]]), name
        assert not torch.equal(after[:, pruned[name]], before[name][:, pruned[name]]), name
    assert torch.equal(model[-1].weight, read_out)


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


def test_an_average_of_torch_is_looked_through():
    model = net("chain", torch.float32)
    average = torch.optim.swa_utils.AveragedModel(model)
    trainer = OPTIMIZERS["momentum"](model.parameters())
    method = RePr(model, trainer, SCHEDULE, copies=[average])
    method.step(S1)
    assert method.num_pruned > 0
    for layer in method.layers:
        theirs = average.module.get_submodule(layer.name).weight.flatten(1)
        assert torch.equal((theirs == 0).all(1), method.pruned[layer.name])


def test_every_cycle_draws_anew():
    method = build(criterion="random")[2]
    for i in (S1, S1 + S2, 2 * S1 + S2):
        method.step(i)
    first, second = (drop["pruned"] for drop in method.history)
    assert any(not torch.equal(first[name], second[name]) for name in first)


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


# --- coming back


def drop_and_return(name="chain", optimizer="momentum", warm_up=S1, **arguments):
    """Before the drop, the pruned masks, and the method right after the return."""
    model, trainer, method = build(name, optimizer, **arguments)
    for i in range(warm_up):
        method.step(i)
        train(model, trainer, i)
    before = copy.deepcopy(model)
    method.step(3)
    pruned = method.pruned
    for i in (3, 4):
        train(model, trainer, i)
    method.step(5)
    return before, pruned, model, trainer, method


@pytest.mark.parametrize("name", NETS)
def test_new_filters_are_orthogonal_to_survivors_and_old_values(name):
    before, pruned, _, _, method = drop_and_return(name)
    checked = 0
    for layer in method.layers:
        old = layer.matrix(before.get_submodule(layer.name).weight)
        per_group = layer.num_filters // layer.groups
        for group in range(layer.groups):
            rows = slice(group * per_group, (group + 1) * per_group)
            mask = pruned[layer.name][rows]
            if not mask.any() or per_group + int(mask.sum()) > layer.dimension:
                continue
            new = layer.matrix()[rows]
            assert (cosines(new[mask], new[~mask]) <= 1e-5).all()
            assert cosines(new[mask], old[rows][mask]).max() <= 1e-5
            checked += 1
    assert checked


def test_lengths_gamma_beta_and_statistics_of_a_returned_filter():
    _, pruned, model, trainer, method = drop_and_return()
    for layer, position in zip(method.layers, (4, 8), strict=True):
        mask = pruned[layer.name]
        if not mask.any():
            continue
        norm, lengths = model[position], layer.matrix().norm(dim=1)
        torch.testing.assert_close(lengths[mask], lengths[~mask].mean().expand(int(mask.sum())))
        assert (norm.weight[mask] == norm.weight[~mask].mean()).all()
        assert (norm.bias[mask] == 0).all()
        assert (norm.running_mean[mask] == 0).all()
        assert (norm.running_var[mask] == 1).all()
        assert (norm.running_var[~mask] != 1).all()
        for tensor in (layer.weight, norm.weight, norm.bias):
            momentum = trainer.state[tensor]["momentum_buffer"]
            assert momentum[mask].abs().sum() == 0
            assert (momentum[~mask] != 0).any()


def test_choices_of_what_comes_back():
    reinit = Reinit(norm="previous", scale=0.5, gamma="previous", beta="previous", outgoing=0.25)
    before, pruned, model, _, method = drop_and_return(reinit=reinit)
    for layer, position in zip(method.layers, (4, 8), strict=True):
        mask = pruned[layer.name]
        old = before.get_submodule(layer.name).weight.flatten(1)[mask].norm(dim=1)
        torch.testing.assert_close(layer.matrix()[mask].norm(dim=1), old / 2)
        assert torch.equal(model[position].weight[mask], before[position].weight[mask])
        assert torch.equal(model[position].bias[mask], before[position].bias[mask])
    features = pruned["7"].repeat_interleave(4)
    torch.testing.assert_close(model[-1].weight[:, features], before[-1].weight[:, features] / 4)
    _, pruned, model, _, _ = drop_and_return(reinit=Reinit(gamma="one", beta="survivors"))
    assert (model[8].weight[pruned["7"]] == 1).all()
    assert (model[8].bias[pruned["7"]] == model[8].bias[~pruned["7"]].mean()).all()


def test_outgoing_zero_changes_nothing_for_the_network():
    """By default a returned filter starts without influence on what lies behind."""
    model, trainer, method = build("chain-bias")
    method.step(3)
    expected = model(batch(0, torch.float32)[0])
    method.step(5)
    torch.testing.assert_close(model(batch(0, torch.float32)[0]), expected, rtol=1e-5, atol=1e-6)


def step_ratios(amsgrad=False, zeroed=False, late=2000):
    """Mean |step| of returned filters over their neighbours', at each of the first 100 steps.

    Gradients are the same noise at every step, so what is stationary is known.
    """
    model = net("chain-bias", torch.float32)
    trainer = torch.optim.Adam(model.parameters(), 1e-4, amsgrad=amsgrad)
    method = RePr(model, trainer, RePrSchedule(late, 10, 1), 0.3)
    generator = torch.Generator().manual_seed(0)
    ratios = []
    for i in range(late + 110):
        pruned = method.pruned if i == late + 10 else None
        method.step(i)
        if pruned is not None:
            returned = pruned
            for layer in method.layers if zeroed else ():
                for key in {"exp_avg_sq", "max_exp_avg_sq"} & trainer.state[layer.weight].keys():
                    trainer.state[layer.weight][key][returned[layer.name]] = 0
        before = {layer.name: layer.matrix().clone() for layer in method.layers}
        for parameter in model.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        method.mask_gradients()
        trainer.step()
        for layer in method.layers if i >= late + 10 else ():
            mask = returned[layer.name]
            if mask.any():
                moved = (layer.matrix() - before[layer.name]).abs().mean(dim=1)
                ratios.append((moved[mask].mean() / moved[~mask].mean()).item())
    assert len(ratios) >= 100
    return ratios


SCALES = {
    "SGD": ({"momentum": 0.9}, set()),
    "Adam": ({"amsgrad": True}, {"exp_avg_sq", "max_exp_avg_sq"}),
    "AdamW": ({}, {"exp_avg_sq"}),
    "NAdam": ({}, {"exp_avg_sq"}),
    "RAdam": ({}, {"exp_avg_sq"}),
    "Adamax": ({}, {"exp_inf"}),
    "Adagrad": ({}, {"sum"}),
    "Adadelta": ({}, {"square_avg", "acc_delta"}),
    "RMSprop": ({"momentum": 0.9, "centered": True}, {"square_avg"}),
    "Rprop": ({}, {"step_size"}),
}
"""Options of optimizers, and which of their states scale a step; the others point somewhere."""


@pytest.mark.parametrize(
    ("kind", "name", "outgoing"), covering(SCALES, ["chain", "chain-bias"], [0.0, 0.25])
)
def test_optimizer_state_after_a_return(kind, name, outgoing):
    """By hand: new filters scale their steps as survivors do, what reads them as at the drop."""
    options, scales = SCALES[kind]
    model = net(name)
    trainer = getattr(torch.optim, kind)(model.parameters(), lr=1e-3, **options)
    method = RePr(model, trainer, SCHEDULE, 0.5, reinit=Reinit(outgoing=outgoing))

    def states(parameter):
        found = trainer.state[parameter].items()
        return {key: value.clone() for key, value in found if value.shape == parameter.shape}

    at_drop = {}
    for i in range(S1 + S2):
        if i == S1:
            at_drop = {parameter: states(parameter) for parameter in model.parameters()}
        method.step(i)
        train(model, trainer, i, torch.float64)
    gone, before = method.pruned, {parameter: states(parameter) for parameter in model.parameters()}
    method.step(S1 + S2)
    assert scales <= states(model[3].weight).keys()

    for reader, columns, rows in (
        (model[7].weight, gone["3"], ~gone["7"]),
        (model[-1].weight, gone["7"].repeat_interleave(4), slice(None)),
    ):
        for key, state in states(reader).items():
            old = at_drop[reader][key][rows][:, columns]
            assert old.abs().sum() > 0
            assert torch.equal(state[rows][:, columns], old if key in scales else outgoing * old)
            untouched = before[reader][key][rows][:, ~columns]
            assert torch.equal(state[rows][:, ~columns], untouched)
    for position, mask in ((3, gone["3"]), (7, gone["7"])):
        assert 0 < mask.sum() < len(mask)
        for parameter in (*model[position].parameters(), *model[position + 1].parameters()):
            for key, state in states(parameter).items():
                mean = state[~mask].mean(0) if key in scales else torch.zeros_like(state[0])
                torch.testing.assert_close(state[mask], mean.expand_as(state[mask]))
                if parameter is not model[7].weight:
                    assert torch.equal(state[~mask], before[parameter][key][~mask])


@pytest.mark.parametrize("amsgrad", [False, True])
def test_late_in_training_adam_moves_a_returned_filter_like_its_neighbours(amsgrad):
    assert max(step_ratios(amsgrad)) <= 2
    # What the second moment of the survivors is for: zeroed, it would be several times as far.
    if not amsgrad:
        assert max(step_ratios(zeroed=True)) > 4


def test_second_moments_in_a_norm_of_several_layers_are_those_of_the_own_survivors():
    model, trainer, method = build("dense", "adam", prune_ratio=0.5, max_layer_ratio=0.8)
    for i in range(S1 + S2):
        method.step(i)
        train(model, trainer, i)
    gone = method.pruned
    expected = [
        (link, link.channels_of(gone[layer.name]), moments, moments[survivors].mean())
        for layer in method.layers
        for link in layer.norms
        for survivors in [link.channels_of(~gone[layer.name])]
        for moments in [trainer.state[link.affine["gamma"]]["exp_avg_sq"]]
    ]
    method.step(S1 + S2)
    assert len(expected) > len({link.name for link, *_ in expected}) > 1
    for _, channels, moments, mean in expected:
        assert (moments[channels] == mean).all()


@pytest.mark.parametrize(("name", "criterion"), [("chain", "taylor"), ("chain-frozen", "ortho")])
def test_batches_that_yield_nothing_are_refused_where_needed(name, criterion):
    """Not at the first phase change, hours later."""
    with pytest.raises(UserError, match=r"batches\(\) yields nothing. Pass batches="):
        build(name, criterion=criterion, batches=lambda: iter(()))


@pytest.mark.parametrize("missing", ["batches", "loss"])
def test_frozen_norms_without_data_are_warned_of(missing):
    model = net("chain-frozen")
    data = {"batches": lambda: iter([batch(0)]), "loss": loss, missing: None}
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with pytest.warns(UserWarning, match="Pass batches= and loss=, or new filters keep"):
        RePr(model, optimizer, RePrSchedule(4, 2, 1), **data)


def test_frozen_norm_is_calibrated_on_the_batches():
    """A returned channel's statistics are those of the conv's output, pooled over the batches."""
    _, pruned, model, _, method = drop_and_return("chain-frozen")
    batches = [b for _, b in zip(range(4), endless(), strict=False)]
    features = [x for x, _ in batches]
    for position, layer in ((0, model[0]), (3, model[3]), (7, model[7])):
        del layer
        outputs = []
        for i, x in enumerate(features):
            while not isinstance(model[position], nn.Conv2d):
                position += 1
            outputs.append(model[position](x))
            y = model[position + 2](model[position + 1](outputs[-1]))
            features[i] = model[6](y) if position == 3 else y
        if str(position) not in pruned:
            continue
        mask = pruned[str(position)]
        pooled = torch.cat(outputs).transpose(0, 1).flatten(1).double()
        norm = model[position + 1]
        mean, var = pooled.mean(1).float(), pooled.var(1, correction=0).float()
        torch.testing.assert_close(norm.running_mean[mask], mean[mask], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(norm.running_var[mask], var[mask], rtol=1e-4, atol=1e-5)
        assert not torch.allclose(norm.running_var[~mask], var[~mask], rtol=1e-2)


def test_frozen_norm_keeps_gamma_and_beta():
    before, pruned, model, _, _ = drop_and_return("chain-frozen")
    for position in (4, 8):
        assert torch.equal(model[position].weight, before[position].weight)
        assert torch.equal(model[position].bias, before[position].bias)


def test_without_batches_frozen_norms_keep_their_statistics_and_say_so():
    with pytest.warns(UserWarning, match="Pass batches= and loss="):
        before, pruned, model, _, _ = drop_and_return("chain-frozen", batches=None, loss=None)
    for position in (4, 8):
        assert torch.equal(model[position].running_mean, before[position].running_mean)
        assert torch.equal(model[position].running_var, before[position].running_var)


@pytest.mark.parametrize("name", ["chain", "chain-frozen", "residual-grouped"])
def test_copies_are_kept_in_step(name):
    model = net(name, torch.float32)
    average = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in average.parameters():
            parameter.mul_(0.9)
    start = weights(average)
    trainer = OPTIMIZERS["momentum"](model.parameters())
    method = RePr(model, trainer, SCHEDULE, batches=endless, loss=loss, copies=[average])
    method.step(3)
    pruned = method.pruned
    for layer in method.layers:
        theirs = layer.matrix(average.get_submodule(layer.name).weight)
        assert theirs[pruned[layer.name]].abs().sum() == 0
    method.step(5)
    for layer in method.layers:
        theirs = layer.matrix(average.get_submodule(layer.name).weight)
        mask = pruned[layer.name]
        assert torch.equal(theirs[mask], layer.matrix()[mask])
        for link in layer.norms:
            norm, channels = average.get_submodule(link.name), link.channels_of(mask)
            for key in ("weight", "bias", "running_mean", "running_var"):
                mine = getattr(link.module, key)[channels]
                assert torch.equal(getattr(norm, key)[channels], mine)
    if name == "chain":  # what reads survivors was the copy's own and is so again
        kept = ~pruned["7"].repeat_interleave(4)
        assert torch.equal(average[-1].weight[:, kept], start["12.weight"][:, kept])
        assert average[-1].weight[:, ~kept].abs().sum() == 0


# --- mistakes


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"prune_ratio": 0.0}, "prune_ratio is 0.0. Set a share above 0 and below 1"),
        ({"prune_ratio": 1.0}, "prune_ratio is 1.0"),
        ({"prune_ratio": -0.1}, "prune_ratio is -0.1"),
        ({"prune_ratio": float("nan")}, "prune_ratio is nan"),
        ({"prune_ratio": 0.05}, "prune_ratio 0.05 of 16 filters is less than one filter"),
        ({"max_layer_ratio": 0.0}, "max_layer_ratio is 0.0. Set a share above 0 and up to 1"),
        ({"max_layer_ratio": 1.1}, "max_layer_ratio is 1.1"),
        ({"max_layer_ratio": 0.2}, "of 16 filters is 4, but max_layer_ratio 0.2 allows 2 at most"),
        ({"prune_ratio": 0.6}, "of 16 filters is 9, but max_layer_ratio 0.5 allows 8 at most"),
        ({"criterion": "orto"}, "criterion is 'orto'. Set one of ortho, ortho_paper"),
        ({"include": ["nothing"]}, "INCLUDE pattern 'nothing' matches no conv or linear layer"),
        ({"exclude": ["*"]}, "no filters to drop: of the 3 conv layers, all .* match no pattern"),
    ],
)
def test_arguments_out_of_range(arguments, told):
    with pytest.raises(ValueError, match=told):
        build(**arguments)


def test_no_layer_ever_loses_all_filters():
    with pytest.raises(ValueError, match="of 16 filters is 15, .* allows 14 at most"):
        build(prune_ratio=0.95, max_layer_ratio=1.0)
    _, _, method = build(prune_ratio=0.88, max_layer_ratio=1.0)
    method.step(3)
    assert [int(m.sum()) for m in method.pruned.values()] == [7, 7]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_finite_are_named(value):
    model, _, method = build()
    with torch.no_grad():
        model[7].weight[2, 1, 0, 0] = value
    with pytest.raises(FloatingPointError, match="cannot rank the filters of 7: .*NaN or inf"):
        method.step(3)
    assert method.phase == "full"
    model, _, method = build()
    method.step(3)
    with torch.no_grad():
        model[3].weight[2, 1, 0, 0] = value
    with pytest.raises(FloatingPointError, match="cannot bring back the filters of 3"):
        method.step(5)
    assert method.phase == "sub"


@pytest.mark.parametrize("seed", [2**63, -(2**63), 1_727_000_000_000_000_000])
def test_seeds_of_any_size(seed):
    _, _, method = build(seed=seed, criterion="random")
    method.step(3)
    method.step(5)


def test_seed_that_is_no_whole_number_is_refused():
    with pytest.raises(ValueError, match="seed is 0.5. Set a whole number"):
        build(seed=0.5)


def test_copies_of_another_width_are_refused():
    other = net("chain", torch.float32)
    other[3] = nn.Conv2d(other[3].in_channels, 12, 3)
    with pytest.raises(ValueError, match="the weight of 3 is .* in a copy of the model"):
        build(copies=[other])


def test_criterion_that_returns_nothing_is_told():
    _, _, method = build(criterion=lambda layers, data: None)
    with pytest.raises(ValueError, match="returned NoneType. Return scores by layer name"):
        method.step(3)


def test_criterion_that_returns_something_else_is_told():
    for scores in ({}, {"3": torch.zeros(8), "7": torch.zeros(3)}):
        _, _, method = build(criterion=lambda layers, data, scores=scores: scores)
        with pytest.raises(ValueError, match="a score for each of the 8 filters of"):
            method.step(3)


def test_state_does_not_go_on_with_the_run():
    _, _, method = build()
    state = method.state_dict()
    method.step(3)
    assert state["history"] == [] and len(method.history) == 1


def test_what_goes_to_other_ranks_is_a_contiguous_copy(monkeypatch):
    """NCCL refuses other strides, gloo takes the memory as it is; and scores may be kept."""
    sent = []
    for module in (choice, ranks):
        monkeypatch.setattr(module, "distributed", lambda group: True)
    monkeypatch.setattr(ranks.dist, "get_world_size", lambda group: 2)
    monkeypatch.setattr(ranks.dist, "all_reduce", lambda t, group: t.mul_(3))
    monkeypatch.setattr(ranks.dist, "broadcast", lambda t, source, group: sent.append(t))
    monkeypatch.setattr(ranks.dist, "broadcast_object_list", lambda *_, **__: None)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 1), nn.Conv2d(16, 24, 1), nn.Conv2d(24, 16, 1), nn.Conv2d(16, 5, 1)
    )
    kept = {"1": torch.arange(24.0).double(), "2": torch.zeros(16).double()}
    trainer = torch.optim.SGD(model.parameters(), 0.1)
    method = RePr(model, trainer, SCHEDULE, criterion=lambda layers, data: kept)
    method.step(S1)
    method.step(S1 + S2)
    assert kept["1"][1] == 1
    # Beside 24 filters there is no room for new ones in 16 dimensions.
    assert any(tensor.shape == (12, 16) for tensor in sent)
    assert all(tensor.is_contiguous() for tensor in sent)


def test_zero_filters_are_counted():
    model, _, method = build()
    assert method.count_zero_filters() == {}
    with torch.no_grad():
        model[3].weight[[1, 4]] = 0
    assert method.count_zero_filters() == {"3": 2}
    method.step(3)
    assert method.pruned["3"][[1, 4]].all()
    assert method.count_zero_filters() == {}


def test_frozen_readers_get_their_weights_back():
    """They could not learn them anew."""
    torch.manual_seed(0)
    model = net("chain", torch.float32)
    model[7].weight.requires_grad_(False)
    before = weights(model)["7.weight"]
    trained = [p for p in model.parameters() if p.requires_grad]
    method = RePr(model, torch.optim.SGD(trained, 0.1), SCHEDULE, batches=endless, loss=loss)
    method.step(SCHEDULE.s1)
    gone = method.pruned["3"]
    assert gone.any() and not model[7].weight[:, gone].any()
    method.step(SCHEDULE.s1 + SCHEDULE.s2)
    assert torch.equal(model[7].weight, before)
    # A trained one starts without influence, by default.
    model, _, method = build(include=["3"])
    method.step(SCHEDULE.s1)
    gone = method.pruned["3"]
    method.step(SCHEDULE.s1 + SCHEDULE.s2)
    assert gone.any() and not model[7].weight[:, gone].any()


@pytest.mark.parametrize("activation", [nn.ReLU, nn.SiLU])
def test_drop_between_accumulated_gradients(activation):
    """What was accumulated before the drop moves nothing that was dropped."""
    torch.manual_seed(0)
    model = net("chain", torch.float32)
    for index in (2, 5, 9):
        model[index] = activation()
    trainer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=1e-4)
    method = RePr(model, trainer, RePrSchedule(5, 40, 1), prune_ratio=0.5)
    for i in range(20):
        method.step(i)
        loss(model, batch(i, torch.float32)).backward()
        if i % 4 == 3:
            trainer.step()
            trainer.zero_grad()
    check_held(method)
    assert not model[7].weight[:, method.pruned["3"]].any()


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("losses", ["in turns", "one by one"])
def test_features_that_a_hook_gives_to_a_loss(when, losses):
    """What reads them is no layer; so their gradients are held, whatever a first backward shows."""
    torch.manual_seed(0)
    model = net("chain", torch.float32)
    features = {}

    def tap():
        model[3].register_forward_hook(lambda module, args, out: features.update(out=out))

    if when == "before":
        tap()
    trainer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    method = RePr(model, trainer, RePrSchedule(1, 40, 1), prune_ratio=0.5)
    if when == "after":
        tap()
    for i in range(8):
        method.step(i)
        trainer.zero_grad()
        loss(model, batch(i, torch.float32)).backward(retain_graph=True)
        if losses == "one by one" or i % 2 == 1:
            (features["out"] - 1).square().mean().backward()
        trainer.step()
    check_held(method)


# --- norms that mix channels


class LayerNormNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.conv = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.norm, self.linear = nn.LayerNorm(8), nn.Linear(8, 5)

    def forward(self, x):
        y = self.norm(self.conv(torch.relu(self.stem(x))).permute(0, 2, 3, 1))
        return self.linear(torch.relu(y).mean((1, 2)))


def group_norm_net():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1),
        nn.GroupNorm(2, 8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5),
    )  # fmt: skip


@pytest.mark.parametrize("build_net", [group_norm_net, LayerNormNet])
def test_norms_that_mix_channels_differ_by_their_statistics(build_net):
    """Pruned channels are exactly zero behind the norm; what differs from a smaller network is that
    the survivors are normalised with the zeros counted in.

    With n of m channels of a group pruned, mean and mean square shrink by (m - n) / m. Survivors of
    the smaller norm are recomputed here from that alone.
    """
    torch.manual_seed(0)
    model = build_net().double()
    trainer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    name = "2" if isinstance(model, nn.Sequential) else "conv"
    method = RePr(model, trainer, RePrSchedule(1, 9, 1), 0.25, include=[name])
    method.step(1)
    mask = method.pruned[name]
    assert int(mask.sum()) == 2
    seen = {}
    conv = model.get_submodule(name)
    (link,) = method.layers[0].norms
    conv.register_forward_hook(lambda m, a, out: seen.update(conv=out.detach()))
    link.module.register_forward_hook(lambda m, a, out: seen.update(norm=out.detach()))
    for i in range(5):
        train(model, trainer, i, torch.float64)
        out = seen["norm"] if link.dim == 1 else seen["norm"].permute(0, 3, 1, 2)
        assert out[:, mask].abs().sum() == 0
    # Statistics of the smaller norm: over what is left of each group, per image or per position.
    groups = range(0, 8, 4) if link.dim == 1 else [0]
    width = 4 if link.dim == 1 else 8
    difference = 0.0
    for begin in groups:
        part, gone = seen["conv"][:, begin : begin + width], mask[begin : begin + width]
        axes = (1, 2, 3) if link.dim == 1 else (1,)
        kept = part[:, ~gone]
        smaller = (kept - kept.mean(axes, keepdim=True)) / torch.sqrt(
            kept.var(axes, correction=0, keepdim=True) + 1e-5
        )
        share = kept.shape[1] / width
        mean, square = (share * v.mean(axes, keepdim=True) for v in (kept, kept.square()))
        ours = (kept - mean) / torch.sqrt(square - mean.square() + 1e-5)
        full = torch.nn.functional.group_norm(part, 1) if link.dim == 1 else F.layer_norm(
            part.permute(0, 2, 3, 1), (8,)).permute(0, 3, 1, 2)  # fmt: skip
        torch.testing.assert_close(ours, full[:, ~gone])
        if gone.any():
            difference = max(difference, ((ours - smaller).abs().mean() / smaller.std()).item())
    # Measured with 2 of 8 channels pruned: 0.134 (GroupNorm) and 0.123 (LayerNorm) standard
    # deviations of the smaller norm's output, on average.
    assert 0.02 < difference < 0.4


# --- promises 2 and 3 on Detectron2's backbone


@pytest.fixture(scope="module")
def backbone():
    model_zoo = pytest.importorskip("detectron2.model_zoo")
    from detectron2.layers import ShapeSpec
    from detectron2.modeling import build_backbone

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cfg = model_zoo.get_config("COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml")
        cfg.merge_from_list(["MODEL.WEIGHTS", "", "MODEL.DEVICE", "cpu"])
        torch.manual_seed(0)
        model = nn.Module()
        model.backbone = build_backbone(cfg, ShapeSpec(channels=3))
        model.forward = model.backbone.forward

    def images():
        generator = torch.Generator().manual_seed(0)
        while True:
            yield torch.randn(1, 3, 64, 64, generator=generator)

    trainer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.01)
    method = RePr(
        model, trainer, RePrSchedule(1, 1, 1), 0.3, batches=images,
        loss=lambda m, x: m.backbone(x)["p2"].mean(),
    )  # fmt: skip
    before = {layer.name: layer.matrix().clone() for layer in method.layers}
    method.step(1)
    pruned = method.pruned
    method.step(2)
    return method, pruned, before


def test_backbone_layers(backbone):
    method, _, _ = backbone
    names = [layer.name for layer in method.layers]
    # FREEZE_AT 2: stem and res2 stand still. 13 + 19 + 10 convs of res3 to res5, 8 of the FPN.
    assert len(names) == 50
    assert not any("stem" in n or "res2" in n for n in names)


def test_backbone_new_filters_are_orthogonal(backbone):
    method, pruned, before = backbone
    checked = 0
    for layer in method.layers:
        mask, new = pruned[layer.name], layer.matrix()
        if mask.any() and layer.num_filters + int(mask.sum()) <= layer.dimension:
            assert cosines(new[mask], new[~mask]).max() <= 1e-5, layer.name
            assert cosines(new[mask], before[layer.name][mask]).max() <= 1e-5, layer.name
            checked += 1
        if mask.any():
            among = cosines(new[mask], new[mask])[: layer.dimension, : layer.dimension]
            among.fill_diagonal_(0)
            assert among.max() <= 1e-5, layer.name
    assert checked >= 20


def test_backbone_layers_are_ranked_alike(backbone):
    """At random weights no kind of layer is emptied or spared for its dimension."""
    _, pruned, before = backbone
    by_dimension = {}
    for name, mask in pruned.items():
        by_dimension.setdefault(before[name].shape[1], []).append(mask.float().mean().item())
    shares = {d: sum(v) / len(v) for d, v in by_dimension.items()}
    assert len(shares) >= 7
    assert min(shares.values()) > 0.1
    assert max(shares.values()) <= 0.5
    assert chance_overlap(max(shares)) < chance_overlap(min(shares)) / 4


@pytest.mark.parametrize("transposed", [False, True])
def test_filters_that_read_nothing_else_come_back_as_they_were(transposed):
    """At zero behind a norm, depthwise filters would get gradients hundreds of times too large."""
    torch.manual_seed(0)
    kind = nn.ConvTranspose2d if transposed else nn.Conv2d
    model = nn.Sequential(
        *(nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), nn.ReLU()),
        *(kind(8, 8, 3, padding=1, groups=8), nn.BatchNorm2d(8), nn.ReLU()),
        *(nn.Conv2d(8, 8, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3)),
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    method = RePr(model, optimizer, RePrSchedule(1, 2, 1), include=["1"])
    depthwise = model[4].weight
    before = depthwise.detach().clone()
    method.step(1)
    gone = method.pruned["1"]
    assert gone.any() and (depthwise[gone] == 0).all()
    torch.testing.assert_close(depthwise[~gone], before[~gone], rtol=0, atol=0)
    method.step(3)
    assert torch.equal(depthwise, before)


def test_checkpoints_from_before_there_was_a_warmup():
    _, _, method = build()
    state = method.state_dict()
    del state["settings"]["warmup"]
    method.load_state_dict(state)


@pytest.mark.parametrize(
    ("dtype", "limit"), [(torch.float64, 1e-10), (torch.float32, 1e-5), (torch.bfloat16, 0.02)]
)
def test_weights_of_any_precision_come_back_orthogonal(dtype, limit):
    """To what their own rounding leaves of it."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Conv2d(n, 16, 3, groups=g) for n, g in ((3, 1), (16, 1), (16, 2))))
    model = nn.Sequential(model, nn.Conv2d(16, 2, 1)).to(dtype)
    method = RePr(model, torch.optim.SGD(model.parameters(), 0.1), RePrSchedule(1, 1, 1), 0.3)
    before = {layer.name: layer.matrix().double().clone() for layer in method.layers}
    method.step(1)
    pruned = method.pruned
    method.step(2)
    for layer in method.layers:
        assert layer.weight.dtype == dtype
        now = layer.matrix().double()
        for old, new, gone in zip(
            *(x.chunk(layer.groups) for x in (before[layer.name], now, pruned[layer.name])),
            strict=True,
        ):
            if gone.any():
                unit = torch.nn.functional.normalize(torch.cat([old[gone], new]), dim=1)
                cosines = (unit @ unit.T).abs().fill_diagonal_(0)
                assert cosines[int(gone.sum()) :][gone].max() <= limit
                lengths = new.norm(dim=1)
                mean = lengths[~gone].mean().expand(int(gone.sum()))
                torch.testing.assert_close(lengths[gone], mean, rtol=limit, atol=0)
    assert sum(int(mask.sum()) for mask in pruned.values()) == 9


def test_cumulative_averages_begin_again_at_a_return():
    """``momentum=None``: a returned channel would keep the mean of 0 that it began with."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.SiLU(), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8, momentum=None)
    )
    model.extend([nn.SiLU(), nn.Conv2d(8, 4, 3)])
    method = RePr(model, torch.optim.SGD(model.parameters(), 0.0), RePrSchedule(1, 1, 1))
    for i in range(200):
        model(torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(i)))
    method.step(1)
    gone = method.pruned["2"]
    method.step(2)
    images = [torch.rand(2, 3, 16, 16) for _ in range(5)]
    for x in images:
        model(x)
    outputs = [model[:3](x).transpose(0, 1).flatten(1) for x in images]
    mean = torch.stack([out.mean(1) for out in outputs]).mean(0)
    var = torch.stack([out.var(1) for out in outputs]).mean(0)
    assert gone.any()
    torch.testing.assert_close(model[3].running_mean[gone], mean[gone], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(model[3].running_var[gone], var[gone], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("compiled", ["script", "trace", "part"])
def test_a_model_compiled_by_torch_jit_is_refused_in_one_sentence(compiled):
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.SiLU(), nn.Conv2d(8, 8, 3))
    images = torch.rand(1, 3, 8, 8)
    model = {
        "script": lambda: torch.jit.script(model),
        "trace": lambda: torch.jit.trace(model, images),
        "part": lambda: nn.Sequential(torch.jit.script(model), nn.Conv2d(8, 8, 1)),
    }[compiled]()
    with pytest.raises(UserError, match="torch.jit has compiled. Pass the model itself"):
        RePr(model, torch.optim.SGD(model.parameters(), 0.1), SCHEDULE)
