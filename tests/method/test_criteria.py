"""Which: every score against a case worked by hand or an independent computation."""

from __future__ import annotations

import itertools
import math
import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from torchvision.ops import roi_align

from repr_det import RePr, RePrSchedule
from repr_det.method import data_criteria
from repr_det.method.choice import choose
from repr_det.method.criteria import (
    CRITERIA,
    NEEDS_DATA,
    Data,
    chance_overlap,
    filter_overlap,
    mean_overlap,
)
from repr_det.method.data_criteria import DIFFERENTIATES
from repr_det.method.layers import FilterLayer
from tests.method.nets import batch, layer_of, loss, net


def scores_of(criterion, *layers):
    data = Data(nn.Identity(), None, None, torch.Generator().manual_seed(0))
    return CRITERIA[criterion](layers, data)


def close(actual, expected, tolerance=1e-12):
    torch.testing.assert_close(
        actual, torch.as_tensor(expected, dtype=torch.float64), rtol=tolerance, atol=tolerance
    )


# --- overlap


def test_paper_score_of_two_filters():
    # cos((3, 4), (1, 0)) = 0.6, and each of the two is divided by J = 2.
    close(scores_of("ortho_paper", layer_of([[3, 4], [1, 0]]))["conv"], [0.3, 0.3])


def test_paper_score_of_three_filters():
    # Cosines: 0.6 between 0 and 1, 0.8 between 0 and 2, 0 between 1 and 2.
    close(
        scores_of("ortho_paper", layer_of([[3, 4], [-2, 0], [0, 7]]))["conv"],
        [1.4 / 3, 0.6 / 3, 0.8 / 3],
    )


def test_score_is_the_mean_cosine_over_chance():
    # In two dimensions chance gives 2 / pi.
    close(
        scores_of("ortho", layer_of([[3, 4], [-2, 0], [0, 7]]))["conv"],
        [0.7 * math.pi / 2, 0.3 * math.pi / 2, 0.4 * math.pi / 2],
    )


@pytest.mark.parametrize("filters", [2, 19, 300])
def test_ortho_against_the_formula(filters):
    rows = torch.randn(filters, 20, generator=torch.Generator().manual_seed(filters))
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-6)):
        units = F.normalize(rows.double(), dim=1)
        overlap = (units @ units.T - torch.eye(filters, dtype=torch.float64)).abs()
        layer = layer_of(rows, dtype=dtype)
        close(scores_of("ortho_paper", layer)["conv"], overlap.sum(1) / filters, tolerance)
        expected = overlap.sum(1) / (filters - 1) / chance_overlap(20)
        close(scores_of("ortho", layer)["conv"], expected, tolerance)


def test_chance_overlap_in_closed_form():
    assert chance_overlap(1) == pytest.approx(1)
    assert chance_overlap(2) == pytest.approx(2 / math.pi)
    assert chance_overlap(3) == pytest.approx(1 / 2)
    assert chance_overlap(4608) == pytest.approx(math.sqrt(2 / (math.pi * 4608)), rel=1e-3)


@pytest.mark.parametrize("dimension", [2, 5, 27, 256])
def test_chance_overlap_against_random_directions(dimension):
    generator = torch.Generator().manual_seed(dimension)
    directions = F.normalize(torch.randn(200_000, dimension, generator=generator), dim=1)
    # Standard error: at most the mean / sqrt(200,000).
    assert directions[:, 0].abs().mean().item() == pytest.approx(
        chance_overlap(dimension), rel=0.01
    )


@pytest.mark.parametrize("criterion", ["ortho", "ortho_paper"])
def test_filters_equal_up_to_sign_overlap(criterion):
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(6, 40, generator=generator, dtype=torch.float64)
    rows[4] = -3 * rows[1]
    scores = scores_of(criterion, layer_of(rows))["conv"]
    assert set(scores.topk(2).indices.tolist()) == {1, 4}
    flipped = rows.clone()
    flipped[4] *= -1
    close(scores_of(criterion, layer_of(flipped))["conv"], scores)


@pytest.mark.parametrize("criterion", ["ortho", "ortho_paper"])
def test_zero_filter_goes_first_and_disturbs_no_other(criterion):
    rows = torch.tensor([[3.0, 4.0], [0, 0], [1, 0]])
    scores = scores_of(criterion, layer_of(rows))["conv"]
    assert scores[1] == math.inf
    # The others see 0.6 of each other and nothing of the zero filter.
    expected = 0.6 / 3 if criterion == "ortho_paper" else 0.6 * math.pi / 2
    close(scores[[0, 2]], [expected, expected])
    pruned = choose([layer_of(rows)], {"conv": scores}, 0.34, 0.5)["conv"]
    assert pruned.tolist() == [False, True, False]


def test_filters_too_small_for_float32_squares_are_not_zero():
    rows = torch.tensor([[3e-25, 4e-25], [1e-25, 0]])
    close(scores_of("ortho_paper", layer_of(rows, dtype=torch.float32))["conv"], [0.3, 0.3], 1e-6)


@pytest.mark.parametrize("criterion", ["ortho", "ortho_paper", "ortho_authors"])
def test_grouped_filters_are_compared_inside_their_group(criterion):
    # The second group repeats the first: across groups they would overlap fully.
    rows = torch.tensor([[3.0, 4], [1, 0], [3, 4], [1, 0]])
    grouped = scores_of(criterion, layer_of(rows, groups=2))["conv"]
    alone = scores_of(criterion, layer_of(rows[:2]))["conv"]
    if criterion == "ortho_authors":  # normalised over the layer as a whole
        # |W|^2 = 52: (25 + 3) / 52 / 2 - 1 / 2 and (1 + 3) / 52 / 2 - 1 / 2
        alone = torch.tensor([0.5 - 28 / 104, 0.5 - 4 / 104], dtype=torch.float64)
    close(grouped, torch.cat([alone, alone]))


def test_authors_variant_by_hand():
    # |W|^2 = 26. W W^T = [[25, 3], [3, 1]] / 26; row means less 1/2, absolute value last.
    expected = [abs(28 / 52 - 0.5), abs(4 / 52 - 0.5)]
    close(scores_of("ortho_authors", layer_of([[3, 4], [1, 0]]))["conv"], expected)


def test_weights_is_minus_the_mean_magnitude():
    close(scores_of("weights", layer_of([[3, -5], [1, 0]]))["conv"], [-4.0, -0.5])


def test_random_depends_on_the_generator_alone():
    layers = [layer_of(torch.randn(5, 3), name="a"), layer_of(torch.randn(4, 3), name="b")]
    first, second = (scores_of("random", *layers) for _ in range(2))
    assert torch.equal(first["a"], second["a"])
    assert not torch.equal(first["a"][:4], first["b"])


def test_mean_overlap_looks_at_survivors_only():
    layer = layer_of([[3.0, 4], [1, 0], [1, 1], [0, 0]])
    pruned = {"conv": torch.tensor([False, False, True, False])}
    assert mean_overlap(filter_overlap([layer], pruned))["conv"] == pytest.approx(0.3)
    none = {"conv": torch.tensor([True, True, True, False])}
    assert mean_overlap(filter_overlap([layer], none))["conv"] == 0


# --- promise 3


def random_layers():
    generator = torch.Generator().manual_seed(3)
    shapes = {"wide": (256, 64), "narrow": (64, 576), "deep": (128, 1152), "low": (128, 32)}
    return [
        layer_of(torch.randn(*shape, generator=generator), name=name)
        for name, shape in shapes.items()
    ]


def shares(criterion, max_layer_ratio=1.0):
    layers = random_layers()
    pruned = choose(layers, scores_of(criterion, *layers), 0.3, max_layer_ratio)
    return {name: mask.float().mean().item() for name, mask in pruned.items()}


def test_comparable_score_takes_from_random_layers_alike():
    for name, share in shares("ortho").items():
        assert 0.1 < share < 0.5, name


def test_paper_score_empties_low_dimensional_layers():
    """As paper.md reports; what the comparable score is for."""
    found = shares("ortho_paper")
    assert found["low"] > 0.9
    assert found["narrow"] == found["deep"] == 0


# --- criteria that look at data


class Tiny(nn.Module):
    """Stem, conv with or without norm, ReLU, linear; small enough for a full Hessian."""

    def __init__(self, norm=True, relu=torch.relu):
        super().__init__()
        self.stem = nn.Conv2d(2, 3, 1)
        self.conv = nn.Conv2d(3, 4, 2, bias=not norm)
        self.norm = nn.BatchNorm2d(4) if norm else nn.Identity()
        self.linear = nn.Linear(4, 3)
        self.relu = relu

    def forward(self, x):
        x = torch.relu(self.stem(x))
        return self.linear(self.relu(self.norm(self.conv(x))).mean((2, 3)))


def tiny(norm=True, relu=torch.relu, images=3, seed=0):
    torch.manual_seed(seed)
    model = Tiny(norm, relu).double()
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.uniform_(layer.weight)
            nn.init.uniform_(layer.bias, -0.3, 0.3)
    examples = [
        (torch.randn(images, 2, 5, 5, dtype=torch.float64), torch.randint(0, 3, (images,)))
        for _ in range(2)
    ]
    method = RePr(
        model, torch.optim.SGD(model.parameters(), 0.1), RePrSchedule(1, 1, 1), include=["conv"]
    )
    data = Data(model, lambda: iter(examples), loss, torch.Generator().manual_seed(0))
    return model, method.layers, data, examples


def rescaled(scores):
    return scores / scores.norm()


def features(model, examples):
    """The feature maps behind the ReLU, shape (filters, all positions of all images)."""
    maps = [
        torch.relu(model.norm(model.conv(torch.relu(model.stem(x))))).transpose(0, 1).flatten(1)
        for x, _ in examples
    ]
    return torch.cat(maps, 1)


@pytest.mark.parametrize("norm", [True, False])
def test_activations_against_the_mean_feature(norm):
    model, layers, data, examples = tiny(norm)
    expected = -rescaled(features(model, examples).mean(1)).detach()
    close(data_criteria.activations(layers, data)["conv"], expected)


@pytest.mark.parametrize("norm", [True, False])
def test_apoz_against_a_direct_count(norm):
    model, layers, data, examples = tiny(norm)
    maps = features(model, examples)
    expected = torch.tensor([sum(v == 0 for v in row.tolist()) / len(row) for row in maps])
    assert len(set(expected.tolist())) == 4
    close(data_criteria.apoz(layers, data)["conv"], expected, 1e-7)


class OneByOne(nn.Module):
    """A conv and a linear layer that get images with or without a batch dimension."""

    def __init__(self, batched: bool) -> None:
        super().__init__()
        self.stem, self.conv, self.fc, self.last = (
            nn.Conv2d(2, 4, 1), nn.Conv2d(4, 5, 1), nn.Linear(5, 6), nn.Linear(6, 3)
        )  # fmt: skip
        self.batched = batched

    def forward(self, x):
        images = [x] if self.batched else list(x)
        found = [self.fc(torch.tanh(self.conv(self.stem(one))).mean((-2, -1))) for one in images]
        found = [self.last(torch.tanh(one)) for one in found]
        return found[0] if self.batched else torch.stack(found)


@pytest.mark.parametrize("criterion", ["activations", "apoz", "taylor"])
def test_single_images_score_as_a_batch(criterion):
    examples = [
        (torch.randn(3, 2, 4, 5, dtype=torch.float64), torch.randint(0, 3, (3,))) for _ in range(2)
    ]

    def scores(batched):
        torch.manual_seed(0)
        model = OneByOne(batched).double()
        trainer = torch.optim.SGD(model.parameters(), 0.1)
        arguments = {"batches": lambda: iter(examples), "loss": loss, "linear": True}
        layers = RePr(model, trainer, RePrSchedule(1, 1, 1), **arguments).layers
        assert [layer.name for layer in layers] == ["conv", "fc"]
        data = Data(model, lambda: iter(examples), loss, torch.Generator().manual_seed(0))
        return getattr(data_criteria, criterion)(layers, data)

    for name, expected in scores(True).items():
        close(scores(False)[name], expected)


def test_features_of_a_channels_last_norm():
    """A LayerNorm between permutations counts channels in the last dimension."""

    class Last(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.conv = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 5, 1)
            self.norm, self.linear = nn.LayerNorm(5), nn.Linear(5, 2)

        def forward(self, x):
            y = self.norm(self.conv(self.stem(x)).permute(0, 2, 3, 1))
            return self.linear(torch.relu(y).mean((1, 2)))

    torch.manual_seed(0)
    model = Last()
    method = RePr(model, torch.optim.SGD(model.parameters(), 0.1), RePrSchedule(1, 1, 1))
    x = torch.randn(2, 3, 5, 5)
    data = Data(model, lambda: iter([(x, torch.tensor([0, 1]))]), loss, torch.Generator())
    y = model.norm(model.conv(model.stem(x)).permute(0, 2, 3, 1))
    expected = (y <= 0).double().mean((0, 1, 2))
    close(data_criteria.apoz(method.layers, data)["conv"], expected, 1e-7)
    assert data_criteria.taylor(method.layers, data)["conv"].isfinite().all()


def test_gradients_against_backward():
    model, layers, data, examples = tiny()
    expected = torch.zeros(4, dtype=torch.float64)
    for example in examples:
        model.zero_grad()
        loss(model, example).backward()
        expected += model.conv.weight.grad.flatten(1).abs().mean(1)
    model.zero_grad(set_to_none=True)
    close(data_criteria.gradients(layers, data)["conv"], -rescaled(expected))
    assert model.conv.weight.grad is None


@pytest.mark.parametrize("norm", [True, False])
def test_taylor_against_the_product_behind_the_relu(norm):
    """|mean over positions of gradient * feature| of each image, with the feature as a leaf."""
    model, layers, data, examples = tiny(norm)
    expected = []
    for x, y in examples:
        with torch.no_grad():
            z = torch.relu(model.norm(model.conv(torch.relu(model.stem(x)))))
        z.requires_grad_()
        (gradient,) = torch.autograd.grad(F.cross_entropy(model.linear(z.mean((2, 3))), y), z)
        expected.append((gradient * z).mean((2, 3)).abs())
    close(
        data_criteria.taylor(layers, data)["conv"], -rescaled(torch.cat(expected).mean(0)).detach()
    )


def test_taylor_is_the_change_in_loss_for_small_filters():
    """Filters whose features are small: the first order is all there is."""
    model, layers, data, examples = tiny(norm=True, images=1)
    examples[1:] = []
    with torch.no_grad():
        model.norm.weight *= 1e-4
        model.norm.bias *= 1e-4
    before = loss(model, examples[0]).item()
    changes = []
    for i in range(4):
        kept = model.norm.weight[i].item(), model.norm.bias[i].item()
        with torch.no_grad():
            model.norm.weight[i] = model.norm.bias[i] = 0
            changes.append(abs(loss(model, examples[0]).item() - before))
            model.norm.weight[i], model.norm.bias[i] = kept
    scores = data_criteria.taylor(layers, data)["conv"]
    close(scores, -rescaled(torch.tensor(changes, dtype=torch.float64)), 1e-3)


def saliency_by_autograd(model, examples):
    """Optimal Brain Damage with the full Hessian of the conv's weight."""
    total = torch.zeros(4, dtype=torch.float64)
    weight = model.conv.weight.detach()
    for example in examples:

        def of(value, example=example):
            parameters = {"conv.weight": value.reshape(weight.shape)}
            return F.cross_entropy(
                torch.func.functional_call(model, parameters, example[0]), example[1]
            )

        matrix = torch.autograd.functional.hessian(of, weight.flatten())
        saliency = matrix.diagonal() * weight.flatten().square() / 2
        total += saliency.reshape(4, -1).sum(1)
    return total / len(examples)


@pytest.mark.parametrize("norm", [True, False])
def test_hessian_diagonal_against_autograd(norm, monkeypatch):
    """Probes whose mean outer product is exactly the identity leave no error of estimation."""
    model, layers, data, examples = tiny(norm, relu=torch.tanh)
    size = model.conv.weight.numel()
    one_by_one = itertools.cycle(torch.eye(size, dtype=torch.float64) * math.sqrt(size))
    monkeypatch.setattr(data_criteria, "HESSIAN_PROBES", size)
    monkeypatch.setattr(
        data_criteria, "_signs", lambda like, generator: next(one_by_one).reshape(like.shape)
    )
    exact = -saliency_by_autograd(model, examples)
    close(data_criteria.hessian(layers, data)["conv"], exact, 1e-9)


def test_hessian_probes_are_independent_signs(monkeypatch):
    """Signs that are independent have the identity as mean outer product."""
    generator = torch.Generator().manual_seed(0)
    signs = torch.stack(
        [data_criteria._signs(torch.empty(3, 2), generator).flatten() for _ in range(4000)]
    )
    assert set(signs.unique().tolist()) == {-1.0, 1.0}
    # Standard error: 1 / sqrt(4000) = 0.016.
    assert ((signs.T @ signs) / 4000 - torch.eye(6)).abs().max() < 0.08


def test_hessian_of_a_diagonal_loss_is_exact():
    """Where the Hessian is diagonal any signs do: loss sum(c w^2) / 2, saliency c w^2 / 2."""
    layer = layer_of([[1.0, 2], [3, -1]])
    curvature = torch.tensor([[1.0, 4], [2, 6]], dtype=torch.float64)

    def quadratic(model, example):
        return (curvature * layer.weight[:, :, 0, 0].square()).sum() / 2

    data = Data(layer.module, lambda: iter([0]), quadratic, torch.Generator())
    close(data_criteria.hessian([layer], data)["conv"], [-(1 + 16) / 2, -(18 + 6) / 2])


def test_oracle_is_what_the_loss_rises_by(monkeypatch):
    model, layers, data, examples = tiny()

    def total(keep):
        value = 0
        for x, y in examples:
            z = torch.relu(model.norm(model.conv(torch.relu(model.stem(x)))))
            value += F.cross_entropy(model.linear((z * keep[:, None, None]).mean((2, 3))), y).item()
        return value

    everything = torch.ones(4, dtype=torch.float64)
    expected = []
    for i in range(4):
        keep = everything.clone()
        keep[i] = 0
        expected.append(total(everything) - total(keep))
    close(data_criteria.oracle(layers, data)["conv"], expected, 1e-9)


@pytest.mark.parametrize("source", ["torch", "python", "numpy"])
def test_oracle_gives_every_filter_the_same_random_draws(source):
    drawn = {"python": random.random, "numpy": np.random.random}

    def noisy(x):
        x = torch.relu(x)
        return F.dropout(x, 0.5) if source == "torch" else x * drawn[source]()

    model, layers, data, examples = tiny(relu=noisy)
    with torch.no_grad():
        model.linear.weight[:, 2] = 0  # nothing reads filter 2, so the loss must not change
    scores = data_criteria.oracle(layers, data)["conv"]
    assert scores[2] == 0
    assert (scores[[0, 1, 3]] != 0).all()


def test_oracle_tells_its_progress():
    _, layers, data, _ = tiny()
    expected = data_criteria.oracle(layers, data)["conv"]
    seen = []

    def progress(filters):
        for layer, index in filters:
            seen.append((layer.name, index))
            yield layer, index

    told = data_criteria.oracle(layers, data._replace(progress=progress))["conv"]
    assert torch.equal(told, expected)
    assert seen == [("conv", index) for index in range(4)]


@pytest.mark.parametrize("criterion", sorted(NEEDS_DATA))
def test_ranking_changes_nothing(criterion):
    """Weights, gradients, buffers and random state are what they were; endless batches do."""
    model = net("residual-frozen")
    endless = lambda: (batch(i) for i in iter(int, 1))  # noqa: E731
    method = RePr(
        model, torch.optim.SGD(model.parameters(), 0.1), RePrSchedule(1, 1, 1),
        include=["block1.conv2"], criterion=criterion, batches=endless, loss=loss,
    )  # fmt: skip
    before = {k: v.clone() for k, v in model.state_dict().items()}
    random = torch.get_rng_state()
    scores = {}
    original = method._criterion
    method._criterion = lambda layers, data: scores.update(original(layers, data)) or scores
    method.step(1)
    assert scores["block1.conv2"].shape == (6,)
    assert len(set(scores["block1.conv2"].tolist())) > 1
    assert torch.equal(torch.get_rng_state(), random)
    assert all(p.grad is None for p in model.parameters())
    untouched = [
        k for k in before if not k.startswith(("block1.conv2", "block1.norm2", "block1.conv3"))
    ]
    assert all(torch.equal(model.state_dict()[k], before[k]) for k in untouched)
    kept = ~method.pruned["block1.conv2"]
    name = "block1.conv2.weight"
    assert torch.equal(model.state_dict()[name][kept], before[name][kept])


@pytest.mark.parametrize("criterion", sorted(NEEDS_DATA))
def test_missing_data_is_refused_when_built(criterion):
    model = net("chain")
    for given in ({}, {"loss": loss}, {"batches": lambda: iter([])}):
        with pytest.raises(ValueError, match=f"{criterion!r} looks at training batches"):
            RePr(
                model, torch.optim.SGD(model.parameters(), 0.1), RePrSchedule(1, 1, 1),
                criterion=criterion, **given,
            )  # fmt: skip
    data = Data(model, None, None, torch.Generator())
    layers = [FilterLayer("3", model[3])]
    with pytest.raises(ValueError, match="Pass batches= and loss="):
        CRITERIA[criterion](layers, data)
    with pytest.raises(ValueError, match="yields nothing"):
        CRITERIA[criterion](layers, data._replace(batches=lambda: iter([]), loss=loss))


def test_hessian_of_what_cannot_be_differentiated_twice_is_refused_when_built():
    def through_roi_align(model, example):
        boxes = torch.tensor([[i, 0, 0, 1, 1] for i in range(6)], dtype=torch.float64)
        logits = roi_align(model(example[0])[:, :, None, None], boxes, 1)
        return F.cross_entropy(logits.flatten(1), example[1])

    model = net("chain")
    with pytest.raises(ValueError, match="needs second derivatives.*roi_align.*for example taylor"):
        RePr(
            model, torch.optim.SGD(model.parameters(), 0.1), RePrSchedule(1, 1, 1),
            criterion="hessian", batches=lambda: iter([batch(0)]), loss=through_roi_align,
        )  # fmt: skip


def test_every_criterion_that_needs_data_says_so():
    layers = [layer_of(torch.randn(4, 3))]
    data = Data(layers[0].module, None, None, torch.Generator())
    for name, criterion in CRITERIA.items():
        if name in NEEDS_DATA:
            with pytest.raises(ValueError):
                criterion(layers, data)
        else:
            assert criterion(layers, data)["conv"].shape == (4,)


def test_callable_of_ones_own():
    model = net("chain")
    method = RePr(
        model, torch.optim.SGD(model.parameters(), 0.1), RePrSchedule(1, 1, 1),
        criterion=lambda layers, data: {x.name: torch.arange(x.num_filters) for x in layers},
    )  # fmt: skip
    method.step(1)
    assert method.pruned["3"].tolist() == [False] * 6 + [True] * 2


class Checkpointed(nn.Module):
    """Computes what lies behind its first conv again on the way back."""

    def __init__(self, reentrant: bool | None):
        super().__init__()
        torch.manual_seed(0)
        self.reentrant = reentrant
        self.first = nn.Conv2d(3, 6, 3)
        self.rest = nn.Sequential(nn.Conv2d(6, 6, 3), nn.ReLU(), nn.Conv2d(6, 6, 3), nn.ReLU())
        self.last = nn.Linear(6, 3)

    def forward(self, x):
        x = self.first(x)
        if self.reentrant is None:
            x = self.rest(x)
        else:
            x = checkpoint(self.rest, x, use_reentrant=self.reentrant)
        return self.last(x.mean(dim=(2, 3)))


def ranked(criterion, reentrant):
    model = Checkpointed(reentrant).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    method = RePr(
        *(model, optimizer, RePrSchedule(1, 1, 1)),
        **{"criterion": criterion, "batches": lambda: iter([batch(0)]), "loss": loss},
    )
    method.step(1)
    return method.history[0]["pruned"]


@pytest.mark.parametrize("criterion", sorted(DIFFERENTIATES))
def test_checkpointing_changes_no_ranking(criterion):
    plain, checkpointed = ranked(criterion, None), ranked(criterion, False)
    assert plain.keys() == checkpointed.keys()
    assert all(torch.equal(plain[name], checkpointed[name]) for name in plain)


@pytest.mark.parametrize("criterion", sorted(DIFFERENTIATES))
def test_reentrant_checkpointing_is_refused_when_built(criterion):
    """Its gradients would all be missing, and the first layers lose their filters."""
    with pytest.raises(ValueError, match="reentrant checkpointing. Call .* use_reentrant=False"):
        ranked(criterion, True)
