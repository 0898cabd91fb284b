"""What comes back: filters, norms, optimizer states, readers and copies."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import nn

from repr_det import Reinit, RePr, RePrSchedule
from repr_det.method.criteria import chance_overlap
from tests.grids import covering
from tests.method.nets import NETS, OPTIMIZERS, batch, loss, net
from tests.method.runs import S1, S2, SCHEDULE, build, cosines, endless, train, weights


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


def test_frozen_readers_get_their_weights_back():
    """A frozen layer cannot learn its weights again."""
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


@pytest.mark.parametrize("transposed", [False, True])
def test_filters_that_read_nothing_else_come_back_as_they_were(transposed):
    """Depthwise filters that return at zero after a norm would get much too large gradients."""
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
