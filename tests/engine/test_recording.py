"""The record of drops: what it says, that it survives, and what TensorBoard and the log get."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from detectron2.engine.hooks import CallbackHook
from detectron2.utils.events import EventStorage
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from repr_det.classification import ClassificationTrainer
from repr_det.engine import recording
from repr_det.engine.recording import Drop, History, Overlap
from repr_det.method.criteria import ortho_paper
from tests.classification.settings import register_corners, small_cfg

EXAMPLE = History(
    {"a": 4, "b": 2},
    [Drop(0, 10, {"a": [1, 3]}), Drop(1, 30, {"a": [3], "b": [0]})],
    [Overlap(10, {"a": 0.5, "b": 0.25})],
)


def repr_cfg(folder):
    register_corners()
    cfg = small_cfg(str(folder))
    cfg.REPR.ENABLED = True
    cfg.REPR.S1, cfg.REPR.S2, cfg.REPR.N = 2, 2, 2
    cfg.SOLVER.CHECKPOINT_PERIOD = 5
    return cfg


def train(cfg, resume=False):
    trainer = ClassificationTrainer(cfg)
    trainer.resume_or_load(resume=resume)
    trainer.train()
    return trainer


def test_shares_and_counts():
    assert recording.shares(EXAMPLE).tolist() == [[0.5, 0.25], [0, 0.5]]
    counts = {name: list(times) for name, times in recording.times_dropped(EXAMPLE).items()}
    assert counts == {"a": [0, 1, 0, 2], "b": [1, 0]}
    assert recording.shares(History({"a": 4}, [], [])).shape == (1, 0)


def test_the_picture_is_darker_where_more_was_dropped():
    image = recording.picture(EXAMPLE)
    assert image.shape[0] == 3 and image.min() >= 0 and image.max() == 1
    half = image.shape[1] // 2
    brightness = image.mean(axis=0)
    assert brightness[0, 0] < brightness[0, -1] < brightness[-1, 0] == 1
    assert brightness[0, 0] == pytest.approx(brightness[half, -1])


def test_written_and_read(tmp_path):
    assert recording.read(tmp_path) is None
    recording.write(tmp_path, EXAMPLE)
    assert recording.read(tmp_path) == EXAMPLE
    path = tmp_path / recording.FILE
    whole = path.read_text()
    path.write_text(whole[:-20])
    with pytest.raises(ValueError, match="damaged"):
        recording.read(tmp_path)
    path.write_text(whole.replace('"pruned": {"a"', '"pruned": {"unknown"'))
    assert path.read_text() != whole
    with pytest.raises(ValueError, match="damaged"):
        recording.read(tmp_path)


def test_a_run_records_what_it_dropped_and_a_resumed_one_forgets_what_came_after(tmp_path):
    trainer = train(repr_cfg(tmp_path))
    written = recording.read(tmp_path)
    assert written == recording.of_state(trainer._repr_hook.state_dict(), written.overlaps)
    assert [drop.iteration for drop in written.drops] == [2, 6]
    assert [overlap.iteration for overlap in written.overlaps] == [2, 4, 6, 8]
    assert written.overlaps[0].layers.keys() == written.layers.keys()
    total = sum(written.layers.values())
    assert [sum(map(len, drop.pruned.values())) for drop in written.drops] == [int(0.3 * total)] * 2
    # Killed after the second drop, with a checkpoint from before it.
    metrics = (tmp_path / "metrics.json").read_text()
    (tmp_path / "last_checkpoint").write_text("model_0000004.pth")
    trainer = ClassificationTrainer(repr_cfg(tmp_path))
    trainer.resume_or_load(resume=True)
    with EventStorage(trainer.start_iter) as trainer.storage:
        trainer._repr_hook.before_train()
    kept = recording.read(tmp_path)
    assert kept.drops == written.drops[:1] and kept.overlaps == written.overlaps[:2]
    assert (tmp_path / "metrics.json").read_text() == metrics


def test_tensorboard_shows_overlap_and_drops_and_metrics_hold_scalars_alone(tmp_path):
    trainer = train(repr_cfg(tmp_path))
    (path,) = tmp_path.glob("events.out.tfevents.*")
    events = EventAccumulator(str(path), size_guidance={"images": 0, "histograms": 0})
    events.Reload()
    layer = trainer._repr_hook.method.layers[0]
    histograms = events.Histograms(f"repr/filter_overlap/{layer.name}")
    assert [event.step for event in histograms] == [2, 4, 6, 8]
    assert {event.histogram_value.num for event in histograms} == {layer.num_filters}
    assert [event.step for event in events.Images("repr/dropped")] == [2, 6]
    assert "repr/overlap" in events.Tags()["scalars"]
    lines = [json.loads(line) for line in (tmp_path / "metrics.json").read_text().splitlines()]
    assert all(isinstance(value, (int, float)) for line in lines for value in line.values())
    assert not any("filter_overlap" in name or "dropped" in name for line in lines for name in line)


def test_the_overlap_of_filters_is_the_papers_score_where_nothing_is_pruned(tmp_path):
    trainer = ClassificationTrainer(repr_cfg(tmp_path))
    method = trainer._repr_hook.method
    plain = ortho_paper(method.layers)
    for name, values in method.filter_overlap().items():
        assert torch.equal(values, plain[name])
    method.step(2)
    overlap = method.filter_overlap()
    for name, mask in method.pruned.items():
        assert np.array_equal(overlap[name].isnan().numpy(), mask.numpy())


LAYERS = ("network.features.3", "network.features.6")


def watched(cfg):
    """A trainer, and a dict that its run fills: filters as rows by moment, iteration and layer."""
    torch.manual_seed(0)
    trainer, seen = ClassificationTrainer(cfg), {}
    with torch.no_grad():
        for name, alike in zip(LAYERS, (2, 3), strict=True):  # so the layers lose unequal numbers
            rows = trainer.model.get_submodule(name).weight
            rows[1:alike] = rows[0] + 0.01 * rows[1:alike]

    def keep(moment):
        def look(trainer):
            seen[moment, trainer.iter] = {
                name: trainer.model.get_submodule(name).weight.detach().double().flatten(1)
                for name in LAYERS
            }

        return look

    before = CallbackHook(before_step=keep("before RePr"))
    before.trainer = trainer
    trainer._hooks.insert(0, before)
    trainer.register_hooks(
        [CallbackHook(before_step=keep("after RePr"), after_step=keep("after the step"))]
    )
    return trainer, seen


def others(rows):
    """Sum of |cosine| of each filter that is there to the others that are."""
    units = rows[rows.any(dim=1)]
    units = units / units.norm(dim=1, keepdim=True)
    return (units @ units.T - torch.eye(len(units))).abs().sum(dim=1)


def test_scalars_are_what_the_weights_say(tmp_path):
    cfg = repr_cfg(tmp_path)
    cfg.SOLVER.MAX_ITER, cfg.TEST.EVAL_PERIOD = 11, 4
    trainer, seen = watched(cfg)
    trainer.train()

    def recorded(name):
        return trainer.storage.history(name).values()

    phases = [0, 0, 1, 1] * 2 + [0] * 3
    assert recorded("repr/phase") == [(phase, i) for i, phase in enumerate(phases)]
    cycles = [0] * 4 + [1] * 4 + [2] * 3
    assert recorded("repr/cycle") == [(cycle, i) for i, cycle in enumerate(cycles)]
    zeros = [
        sum(int((~rows.any(dim=1)).sum()) for rows in seen["after RePr", i].values())
        for i in range(11)
    ]
    assert zeros == [4 * phase for phase in phases]
    assert recorded("repr/num_pruned") == [(number, i) for i, number in enumerate(zeros)]

    # Before drops, after returns, at evaluations, which are in S2, and at the end.
    moments = [
        ("before RePr", 2), ("after the step", 3), ("after RePr", 4),
        ("before RePr", 6), ("after the step", 7), ("after RePr", 8), ("after the step", 10),
    ]  # fmt: skip
    by_filter = {
        name: [others(seen[m][name]) / len(others(seen[m][name])) for m in moments]
        for name in LAYERS
    }
    together = [torch.cat(parts) for parts in zip(*by_filter.values(), strict=True)]
    scalars = {f"repr/overlap/{name}": scores for name, scores in by_filter.items()}
    for name, scores in {**scalars, "repr/overlap": together}.items():
        values, iterations = zip(*recorded(name), strict=True)
        assert list(iterations) == [i for _, i in moments]
        assert values == pytest.approx([float(score.mean()) for score in scores], rel=1e-5)


def test_the_log_says_what_was_dropped_and_brought_back(tmp_path, monkeypatch):
    cfg = repr_cfg(tmp_path)
    cfg.REPR.COMPACT = "off"
    trainer, seen = watched(cfg)
    told = []
    monkeypatch.setattr("repr_det.engine.hook.logger.info", told.append)
    trainer.train()
    # Mean |cosine| of two random directions among 8 channels of 3 x 3.
    chance = math.gamma(36) / math.gamma(36.5) / math.sqrt(math.pi)
    expected = []
    for cycle, iteration in enumerate((2, 6)):
        rows = seen["before RePr", iteration]
        scores = {name: others(rows[name]) / 7 / chance for name in LAYERS}
        least = torch.cat(list(scores.values())).sort(descending=True).values[3]
        lost = {name: int((score >= least).sum()) for name, score in scores.items()}
        most = max(lost, key=lost.get)
        what = f"4 of 16 filters in {sum(n > 0 for n in lost.values())} of 2 layers, "
        what += f"the largest share {lost[most]}/8 in {most}."
        expected.append(f"RePr cycle {cycle}: dropped {what}")
        expected += [
            f"  {name}: 8 filters, {lost[name]} pruned, mean score {scores[name].mean():.4f}"
            for name in LAYERS
        ]
        expected.append(f"RePr cycle {cycle}: brought back {what}")
        assert cycle == 1 or list(lost.values()) == [1, 3]
    assert told == expected
