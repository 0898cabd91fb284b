"""RePr as one object: its life, and every refusal."""

from __future__ import annotations

import copy
from collections import Counter
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from repr_det import RePr, RePrSchedule
from repr_det.errors import UserError
from repr_det.method import choice, ranks
from tests.device import DEVICE
from tests.method.nets import NETS, OPTIMIZERS, batch, check_held, loss, net
from tests.method.runs import (
    LENGTH,
    S1,
    S2,
    SCHEDULE,
    assert_bits,
    build,
    cosines,
    endless,
    train,
    weights,
)
from tests.operations import Operations

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


def test_iterations_may_be_numpys(tmp_path):
    plain, numpys = build()[2], build()[2]
    for i in np.arange(6):
        assert plain.step(int(i)) == numpys.step(i)
    torch.save(numpys.state_dict(), tmp_path / "state.pth")
    found = torch.load(tmp_path / "state.pth", weights_only=True)
    assert [entry["iteration"] for entry in found["history"]] == [3]


@pytest.mark.parametrize("criterion", ["oracle", "taylor", "activations"])
@pytest.mark.parametrize("name", ["chain", "chain-bias"])
def test_inside_the_callers_autocast_runs_see_what_was_written(name, criterion):
    """Autocast keeps copies of the weights until its outermost region ends."""

    def autocast():
        return torch.autocast(DEVICE.type, torch.bfloat16)

    def autocast_loss(model, pair):
        with autocast():
            return loss(model, pair)

    def drop(inside):
        model = net(name, torch.float32)
        data = [batch(i, torch.float32) for i in range(2)]
        with autocast() if inside else nullcontext():
            with autocast():
                model(data[0][0])
            method = RePr(
                model, torch.optim.SGD(model.parameters(), 0.1), RePrSchedule(1, 1, 1),
                criterion=criterion, batches=lambda: iter(data), loss=autocast_loss,
            )  # fmt: skip
            method.step(1)
            with autocast():
                output = model(data[0][0])
        return {name: mask.tolist() for name, mask in method.pruned.items()}, output

    (pruned, output), (expected, expected_output) = drop(True), drop(False)
    assert pruned == expected
    assert torch.equal(output, expected_output)
    assert torch.is_autocast_cache_enabled()


def test_a_ranking_may_use_gradients_and_leaves_none():
    model, trainer, _ = build()
    data = [batch(i, torch.float32) for i in range(2)]

    def by_gradients(layers, data):
        seen.append([p.grad.clone() for p in model.parameters()])
        with torch.enable_grad():
            for one in data.batches():
                data.loss(data.model, one).backward()
        return {layer.name: -layer.matrix(layer.module.weight.grad).norm(dim=1) for layer in layers}

    seen = []
    method = RePr(
        model, trainer, RePrSchedule(1, 1, 1), criterion=by_gradients,
        batches=lambda: iter(data), loss=loss,
    )  # fmt: skip
    loss(model, data[0]).backward()
    before = [p.grad for p in model.parameters()]
    values = [gradient.clone() for gradient in before]
    # Not step(): a drop sets the gradients of what it prunes to zero.
    method._scores(0)
    after = [p.grad for p in model.parameters()]
    assert all(a is b and torch.equal(a, v) for a, b, v in zip(after, before, values, strict=True))
    assert all(torch.equal(a, v) for a, v in zip(seen[0], values, strict=True))


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"criterion": None}, "criterion is None. Set a name or a function"),
        ({"criterion": nn.Identity}, "Set a name or a function"),
        ({"reinit": "previous"}, "reinit is 'previous'. Set a Reinit, for example Reinit"),
        ({"copies": nn.Sequential(nn.Conv2d(3, 8, 3))}, "copies is not a list of modules"),
        ({"copies": [{}]}, "copies is not a list of modules"),
        (
            {"criterion": "taylor", "loss": lambda m, b: {"loss": loss(m, b)}},
            "loss= returned a dict. Return a tensor with one number",
        ),
        (
            {"criterion": "oracle", "loss": lambda m, b: m(b[0])},
            r"loss= returned a Tensor of shape \(6, 5\). Return a tensor with one number",
        ),
        (
            {"criterion": "gradients", "loss": lambda m, b: loss(m, b).detach()},
            "that of loss= has no gradient",
        ),
    ],
)
def test_arguments_of_the_wrong_kind_are_refused_at_once(arguments, sentence):
    model = net("chain", torch.float32)
    given = {"batches": lambda: iter([batch(0, torch.float32)]), "loss": loss, **arguments}
    with pytest.raises(UserError, match=sentence):
        RePr(model, torch.optim.SGD(model.parameters(), 0.1), RePrSchedule(1, 1, 1), **given)


@pytest.mark.parametrize(
    "arguments",
    [
        {"criterion": "activations", "loss": lambda m, b: {"loss": loss(m, b)}},
        {"criterion": "oracle", "loss": lambda m, b: loss(m, b).item()},
        {"copies": nn.ModuleList([net("chain", torch.float32)])},
        {"copies": {"average": net("chain", torch.float32)}.values()},
    ],
)
def test_arguments_of_other_kinds_that_do(arguments):
    model = net("chain", torch.float32)
    given = {"batches": lambda: iter([batch(0, torch.float32)]), "loss": loss, **arguments}
    method = RePr(model, torch.optim.SGD(model.parameters(), 0.1), RePrSchedule(1, 1, 1), **given)
    assert [change.kind for change in (*method.step(1), *method.step(2))] == ["drop", "return"]


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


def test_every_cycle_draws_anew():
    method = build(criterion="random")[2]
    for i in (S1, S1 + S2, 2 * S1 + S2):
        method.step(i)
    first, second = (drop["pruned"] for drop in method.history)
    assert any(not torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(("name", "criterion"), [("chain", "taylor"), ("chain-frozen", "ortho")])
def test_batches_that_yield_nothing_are_refused_where_needed(name, criterion):
    """Not at the first phase change, hours later."""
    with pytest.raises(UserError, match=r"batches\(\) yields nothing. Pass batches="):
        build(name, criterion=criterion, batches=lambda: iter(()))


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
        with pytest.raises(ValueError, match="a score for each of its 8 filters"):
            method.step(3)


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
