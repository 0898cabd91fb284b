"""Networks are built as they were trained, and their responses are what their layers answer."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from detectron2.utils.env import seed_all_rng
from torch import nn

from repr_det.classification import ClassificationTrainer
from repr_det.engine import recording
from repr_det.engine.batches import own_batches, training_loss
from repr_det.engine.config import config_path
from repr_det.engine.recording import Drop, History, Overlap
from repr_det.errors import UserError
from repr_det.report import probes as network_module
from repr_det.report.arms import BEFORE, REPR, Arms, by_method
from repr_det.report.gallery import FIGURES
from repr_det.report.material import (
    CONTRIBUTIONS,
    Material,
    compute_contributions,
    kept_contributions,
    overlap_over_time,
)
from repr_det.report.probes import (
    Network,
    contributions,
    filter_correlations,
    first_filters,
    held_out_images,
    load_network,
    map_correlations,
    overlap,
    responses,
    similarity,
)
from repr_det.report.run import FINAL, read_run
from repr_det.tasks import get_cfg
from tests.classification.settings import register_corners, small_cfg
from tests.report.folders import write_metrics, write_run


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run with RePr, its first weights and its trainer."""
    register_corners()
    folder = tmp_path_factory.mktemp("runs") / "repr"
    cfg = small_cfg(str(folder))
    cfg.REPR.ENABLED = True
    cfg.REPR.S1, cfg.REPR.S2, cfg.REPR.N = 2, 2, 2
    cfg.TEST.EVAL_PERIOD = 6
    folder.mkdir()
    (folder / "config.yaml").write_text(cfg.dump())
    seed_all_rng(cfg.SEED)
    trainer = ClassificationTrainer(cfg)
    begun = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    trainer.train()
    return read_run(folder), begun, trainer


def test_before_training_is_what_the_run_began_with(trained):
    run, begun, _ = trained
    network = load_network(run.cfg, None)
    for name, value in network.model.state_dict().items():
        assert torch.equal(value, begun[name])
    assert not network.model.training


def test_a_checkpoint_has_the_layers_and_overlap_of_its_run(trained):
    run, _, trainer = trained
    network = load_network(run.cfg, run.weights)
    method = trainer._repr_hook.method
    assert [layer.name for layer in network.layers] == [layer.name for layer in method.layers]
    assert overlap(network) == pytest.approx(method.overlap())
    stem = trainer.model.network.features[0].weight.detach().double().numpy()
    assert np.array_equal(first_filters(network), stem)


def test_a_network_that_is_not_registered_is_no_bug_of_ours():
    cfg = get_cfg()
    cfg.MODEL.BACKBONE.NAME = "build_my_backbone"
    with pytest.raises(UserError, match="build_my_backbone.*import what registers it"):
        load_network(cfg, None)


def test_correlations_are_of_what_the_layer_answers(trained, monkeypatch):
    monkeypatch.setattr(network_module, "OBSERVATIONS", 10**6)  # every position
    run, *_ = trained
    network = load_network(run.cfg, run.weights)
    name = network.layers[0].name
    batches = held_out_images(run.cfg, 20)
    assert sum(len(batch["image"]) for batch in batches) == 20
    found = responses(network, batches, [name])
    answers = []
    module = network.layers[0].module
    handle = module.register_forward_hook(lambda _, __, out: answers.append(out.clone()))
    with torch.no_grad():
        network.model(batches[0])
    handle.remove()
    positions = answers[0].double().transpose(0, 1).flatten(1).numpy()
    expected = np.abs(np.corrcoef(positions))
    assert filter_correlations(found.sampled[name]) == pytest.approx(expected, abs=1e-6)
    cells = found.pooled[name].shape[-1]
    assert 2 * cells < 20 - 1
    pooled = F.adaptive_avg_pool2d(answers[0], int(cells**0.5)).flatten(2).double().numpy()
    assert found.pooled[name] == pytest.approx(pooled, abs=1e-6)
    table = map_correlations(found.pooled[name])
    assert table == pytest.approx(table.T) and table.min() >= 0 and table.max() <= 1


def test_linear_layers_of_a_run_with_them():
    cfg = get_cfg()
    cfg.merge_from_file(config_path("shapes_convnext.yaml"))
    cfg.MODEL.DEVICE = "cpu"
    kinds = [type(layer.module) for layer in load_network(cfg, None).layers]
    assert {nn.Linear, nn.Conv2d} <= set(kinds)
    cfg.REPR.LINEAR = False
    without = [type(layer.module) for layer in load_network(cfg, None).layers]
    assert without == [kind for kind in kinds if kind is not nn.Linear]


def test_channels_of_linear_layers_are_last():
    """Of maps, tokens and vectors alike: what each unit answers, observation by observation."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.maps, self.tokens, self.vectors = (nn.Linear(3, 5) for _ in range(3))

        def forward(self, batch):
            maps = batch["image"].permute(0, 2, 3, 1)
            return self.maps(maps), self.tokens(maps.flatten(1, 2)), self.vectors(maps.mean((1, 2)))

    torch.manual_seed(0)
    model, batch = Model(), {"image": torch.rand(9, 3, 2, 2)}
    layers = [SimpleNamespace(name=n, module=m, num_filters=5) for n, m in model.named_children()]
    found = responses(Network(get_cfg(), model, layers, []), [batch], ["maps", "vectors"])
    for name, answer in zip(("maps", "tokens", "vectors"), model(batch), strict=True):
        expected = answer.detach().reshape(-1, 5).double().numpy()
        assert sorted(map(tuple, found.sampled[name])) == sorted(map(tuple, expected))
    maps = model(batch)[0].detach().double().permute(0, 3, 1, 2)
    pooled = F.adaptive_avg_pool2d(maps, int(found.pooled["maps"].shape[-1] ** 0.5)).flatten(2)
    assert found.pooled["maps"] == pytest.approx(pooled.numpy(), abs=1e-6)


def test_overlap_over_time_where_layers_were_frozen_on_the_way(tmp_path):
    """Another number of filters at each moment: the recorded mean is shown, and no sum."""
    folder = write_run(tmp_path / "run", {"REPR.ENABLED": True, "REPR.S1": 40, "REPR.S2": 20})
    write_metrics(folder, [{"iteration": i, "repr/overlap": 0.1} for i in (19, 59)])
    moments = [Overlap(40, {"a": 0.2, "b": 0.3}), Overlap(100, {"a": 0.2})]
    recording.write(folder, History({"a": 4, "b": 4}, [Drop(0, 40, {"a": [1]})], moments))
    mean, total = overlap_over_time(read_run(folder))
    assert mean.tolist() == [0.1, 0.1] and total is None


def test_a_layer_that_is_given_nothing_has_no_responses(trained):
    """As a mask head where nothing is detected."""
    run, *_ = trained
    network = load_network(run.cfg, run.weights)
    last = network.layers[-1]
    last.module.register_forward_hook(lambda _, __, out: out[:0])
    found = responses(network, held_out_images(run.cfg, 20), [x.name for x in network.layers])
    assert list(found.sampled) == list(found.pooled) == [network.layers[0].name]
    material = Material(by_method([run]))
    vars(material).update(networks={REPR: network}, responses={REPR: found})
    assert len(FIGURES["cca"].draw(material).figure.axes) == 2  # one table, and its colours
    assert np.isnan(FIGURES["cca_by_layer"].draw(material).values[REPR][last.name])
    vars(material).update(responses={REPR: dataclasses.replace(found, sampled={})})
    with pytest.raises(UserError, match="None of the layers answers"):
        FIGURES["cca"].draw(material)


def test_layers_that_see_boxes_are_not_compared_between_networks(trained):
    run, *_ = trained
    network = load_network(run.cfg, run.weights)
    boxes = network.layers[-1]
    boxes.module.register_forward_hook(lambda _, __, out: out.repeat(50, 1, 1, 1)[:-1])
    batches, names = held_out_images(run.cfg, 20), [layer.name for layer in network.layers]
    found = responses(network, batches, names)
    assert found.whole == {names[0]} and list(found.sampled) == names
    assert 20 <= len(found.pooled[boxes.name]) < 40
    material = Material(Arms({"a": [run], "b": [run]}))
    vars(material).update(networks={"a": network, "b": network}, responses={"a": found, "b": found})
    drawn = FIGURES["similarity"].draw(material)
    assert drawn.values == {"a and b": {names[0]: pytest.approx(1)}}
    assert "see boxes are left out" in drawn.caption
    nothing = dataclasses.replace(found, whole=frozenset())
    vars(material).update(responses={"a": found, "b": nothing})
    with pytest.raises(UserError, match="sees whole images"):
        FIGURES["similarity"].draw(material)


def test_contributions_are_what_the_loss_rises_by(trained):
    run, *_ = trained
    network = load_network(run.cfg, run.weights)
    before = {name: value.clone() for name, value in network.model.state_dict().items()}
    found = contributions(network)
    assert all(torch.equal(v, before[n]) for n, v in network.model.state_dict().items())
    loader = ClassificationTrainer.build_train_loader(run.cfg)
    batches = [b for b, _ in zip(own_batches(loader, run.cfg.SEED)(), range(8), strict=False)]
    network.model.train()
    layer = network.layers[0]
    with torch.no_grad():
        whole = sum(float(training_loss(network.model, batch)) for batch in batches)
        layer.module.weight[3] = 0
        layer.module.bias[3] = 0
        less = sum(float(training_loss(network.model, batch)) for batch in batches)
    assert found[layer.name][3] == pytest.approx((less - whole) / 8, abs=1e-5)
    assert {name: len(values) for name, values in found.items()} == {
        layer.name: layer.num_filters for layer in network.layers
    }


def test_contributions_are_kept_for_the_checkpoint_that_they_are_of(trained, monkeypatch):
    run, *_ = trained
    with pytest.raises(ValueError, match="Not computed yet"):
        FIGURES["contributions"].draw(Material(by_method([run])))
    with monkeypatch.context() as patch:
        patch.setattr(os, "access", lambda path, mode: False)  # root may write everywhere
        with pytest.raises(UserError, match=f"Folder {run.folder} is read-only"):
            compute_contributions(run)
    compute_contributions(run)
    assert "The greedy oracle" in FIGURES["contributions"].draw(Material(by_method([run]))).caption
    path = run.folder / CONTRIBUTIONS
    kept = json.loads(path.read_text())
    assert kept["checkpoint"] == FINAL
    checkpoint = run.folder / FINAL
    trained_last = checkpoint.read_bytes()
    try:
        for stale, content in (
            (kept | {"checkpoint": "model_0000003.pth"}, trained_last),
            ({name: kept[name] for name in ("checkpoint", "layers")}, trained_last),
            (kept, trained_last + b"trained again"),
        ):
            path.write_text(json.dumps(stale))
            checkpoint.write_bytes(content)
            with pytest.raises(ValueError, match="Not computed yet"):
                FIGURES["contributions"].draw(Material(by_method([run])))
        for damaged in ("", '{"checkpoint"', "[]", "null"):
            path.write_text(damaged)
            with pytest.raises(UserError, match=f"{path} is damaged"):
                kept_contributions(run)
    finally:
        checkpoint.write_bytes(trained_last)
        path.unlink()


def changed(run, **keys):
    """A run with other keys of its config."""
    cfg = run.cfg.clone()
    cfg.merge_from_list([part for pair in keys.items() for part in pair])
    return dataclasses.replace(run, cfg=cfg)


@pytest.mark.parametrize("keys", [{"SEED": -1}, {"MODEL.WEIGHTS": "/no/such/weights.pth"}])
def test_an_unknown_initial_network_is_left_out(trained, keys):
    run, *_ = trained
    assert list(Material(by_method([run])).networks) == [BEFORE, REPR]
    material = Material(by_method([changed(run, **keys)]), images=24)
    assert list(material.networks) == [REPR]
    assert list(FIGURES["overlap_by_layer"].draw(material).values) == [REPR]


@pytest.mark.parametrize("keys", [{}, {"MODEL.WEIGHTS": "/no/such/weights.pth"}])
def test_overlap_that_was_not_recorded_is_of_all_checkpoints(trained, tmp_path, keys):
    run, *_ = trained
    for name in ("model_0000005.pth", FINAL):
        shutil.copy(run.folder / FINAL, tmp_path / name)
    metrics = run.metrics.drop(columns=[n for n in run.metrics if "overlap" in n])
    run = dataclasses.replace(changed(run, **keys), folder=tmp_path, metrics=metrics)
    total, mean = FIGURES["overlap"].draw(Material(by_method([run]))).figure.axes
    for axes in (total, mean):
        (line,) = [line for line in axes.lines if line.get_label() == REPR]
        assert list(line.get_xdata()) == ([6, 12] if keys else [0, 6, 12])
        assert line.get_ydata()[-1] == line.get_ydata()[-2] > 0


def test_correlations_of_filters_are_pearsons_and_constant_filters_have_none():
    generator = np.random.default_rng(0)
    x = generator.normal(size=50)
    samples = np.stack([x, -2 * x + 7, generator.normal(size=50), np.full(50, 3.3)], axis=1)
    table = filter_correlations(samples)
    assert table[0, 1] == pytest.approx(1)
    a, b = samples[:, 0] - x.mean(), samples[:, 2] - samples[:, 2].mean()
    assert table[0, 2] == pytest.approx(abs(a @ b) / np.sqrt((a @ a) * (b @ b)))
    assert np.isnan(table[3]).all() and np.isnan(table[:, 3]).all()


def test_svcca_of_maps_is_the_mean_canonical_correlation():
    """Against correlations of least-squares fits, one canonical direction after another."""
    generator = np.random.default_rng(1)
    maps = generator.normal(size=(40, 3, 2))
    maps[:, 1] = maps[:, 0] @ [[1.0, 2.0], [0.5, -1.0]] + 3  # the same space
    maps[:, 2] += maps[:, 0]
    table = map_correlations(maps, variance=1.0)
    assert table[0, 1] == pytest.approx(1) and np.diag(table) == pytest.approx(1)
    x, y = (maps[:, i] - maps[:, i].mean(axis=0) for i in (0, 2))
    squares = np.linalg.eigvals(np.linalg.pinv(x) @ y @ np.linalg.pinv(y) @ x)
    assert table[0, 2] == pytest.approx(np.sqrt(squares.real).mean())
    with pytest.raises(UserError, match="needs more than 4 images, not 4"):
        map_correlations(maps[:4], variance=1.0)


def test_svcca_leaves_directions_of_little_variance_out():
    generator = np.random.default_rng(2)
    common = generator.normal(size=60)
    noise = 0.01 * generator.normal(size=(60, 2))
    maps = np.stack([np.stack([common, n], axis=1) for n in noise.T], axis=1)
    assert map_correlations(maps, 0.99)[0, 1] == pytest.approx(1)
    assert map_correlations(maps, 1.0)[0, 1] < 0.7


def test_similarity_is_the_unbiased_cka():
    generator = np.random.default_rng(3)
    x = generator.normal(size=(30, 5))
    rotation, _ = np.linalg.qr(generator.normal(size=(5, 5)))
    assert similarity(x, 3 * x @ rotation + 2) == pytest.approx(1)
    assert np.isnan(similarity(x, np.ones((30, 2))))
    # Song et al. 2012, equation 5, as sums over different observations.
    y = x[:, :2] + generator.normal(size=(30, 2))

    def hsic(a, b, n=7):
        k, m = a[:n] @ a[:n].T, b[:n] @ b[:n].T
        others = [list(itertools.permutations(range(n), r)) for r in (2, 3, 4)]
        pairs = np.mean([k[i, j] * m[i, j] for i, j in others[0]])
        threes = np.mean([k[i, j] * m[i, q] for i, j, q in others[1]])
        fours = np.mean([k[i, j] * m[q, r] for i, j, q, r in others[2]])
        return pairs + fours - 2 * threes

    expected = hsic(x, y) / np.sqrt(hsic(x, x) * hsic(y, y))
    assert similarity(x[:7], y[:7]) == pytest.approx(expected)


def test_similarity_of_unrelated_layers_is_zero_on_average():
    generator = np.random.default_rng(4)
    found = [
        similarity(generator.normal(size=(40, 60)), generator.normal(size=(40, 60)))
        for _ in range(60)
    ]
    assert abs(np.mean(found)) < 4 * np.std(found) / np.sqrt(60)
    assert abs(np.mean(found)) < 0.02
