"""Networks are built as they were trained, and their responses are what their layers answer."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from detectron2.utils.env import seed_all_rng

from repr_det.analysis import network as network_module
from repr_det.analysis.gallery import CONTRIBUTIONS, FIGURES, Material, compute_contributions
from repr_det.analysis.network import (
    contributions,
    filter_correlations,
    first_filters,
    held_out_images,
    load_network,
    map_correlations,
    overlap,
    responses,
)
from repr_det.analysis.run_folder import FINAL, read_run
from repr_det.classification import ClassificationTrainer
from repr_det.engine.batches import own_batches, training_loss
from tests.classification.settings import register_corners, small_cfg


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


def test_a_checkpoint_has_the_layers_and_the_overlap_that_the_run_recorded(trained):
    run, _, trainer = trained
    network = load_network(run.cfg, run.weights)
    method = trainer._repr_hook.method
    assert [layer.name for layer in network.layers] == [layer.name for layer in method.layers]
    assert overlap(network) == pytest.approx(method.overlap())
    stem = trainer.model.network.features[0].weight.detach().double().numpy()
    assert np.array_equal(first_filters(network), stem)


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
    assert filter_correlations(found, name) == pytest.approx(expected, abs=1e-6)
    side = found.pooled[name].shape[-1]
    assert 2 * side**2 < 20 - 1
    pooled = F.adaptive_avg_pool2d(answers[0], side).double().numpy()
    assert found.pooled[name] == pytest.approx(pooled, abs=1e-6)
    table = map_correlations(found, name)
    assert np.array_equal(table, table.T) and table.min() >= 0 and table.max() <= 1


def test_contributions_are_what_the_loss_rises_by_and_leave_the_network_alone(trained):
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


def test_contributions_are_kept_for_the_checkpoint_that_they_are_of(trained):
    run, *_ = trained
    with pytest.raises(ValueError, match="It was not computed"):
        FIGURES["contributions"].draw(Material([run]))
    compute_contributions(run)
    assert "The greedy oracle" in FIGURES["contributions"].draw(Material([run])).caption
    path = run.folder / CONTRIBUTIONS
    kept = json.loads(path.read_text())
    assert kept["checkpoint"] == FINAL
    path.write_text(json.dumps(kept | {"checkpoint": "model_0000003.pth"}))
    with pytest.raises(ValueError, match="It was not computed"):
        FIGURES["contributions"].draw(Material([run]))
    path.unlink()
