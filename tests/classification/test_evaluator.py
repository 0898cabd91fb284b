from __future__ import annotations

import math

import pytest
import torch

from repr_det.classification import AccuracyEvaluator


def evaluate(batches):
    evaluator = AccuracyEvaluator()
    evaluator.reset()
    for inputs, outputs in batches:
        evaluator.process(inputs, outputs)
    return evaluator.evaluate()["accuracy"]


def test_by_hand():
    # Six classes, scores falling from class 0 to class 5.
    logits = torch.tensor([[5.0, 4, 3, 2, 1, 0]]).expand(4, 6)
    result = evaluate([({"image": None, "label": torch.tensor([0, 1, 4, 5])}, logits)])
    assert result["top1"] == pytest.approx(25)
    assert result["top5"] == pytest.approx(75)
    log_sum = math.log(sum(math.exp(i) for i in range(6)))
    assert result["loss"] == pytest.approx(sum(log_sum - s for s in (5, 4, 1, 0)) / 4, rel=1e-5)


def test_batches_of_different_size_weigh_by_images_and_formats_agree():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(11, 8, generator=generator)
    labels = torch.randint(0, 8, (11,), generator=generator)
    whole = evaluate([({"label": labels}, logits)])
    parts = evaluate(
        [
            ({"label": labels[:3]}, logits[:3]),
            ([{"label": int(label)} for label in labels[3:]], logits[3:]),
        ]
    )
    assert parts == pytest.approx(whole)
    assert whole["top1"] == pytest.approx(100 * (logits.argmax(1) == labels).float().mean().item())


def test_fewer_than_five_classes():
    result = evaluate([({"label": torch.tensor([0, 1])}, torch.eye(2))])
    assert result["top1"] == result["top5"] == 100


def test_nothing_to_evaluate():
    with pytest.raises(ValueError, match="no images"):
        evaluate([])


def test_reset_forgets():
    evaluator = AccuracyEvaluator()
    evaluator.reset()
    evaluator.process({"label": torch.tensor([0])}, torch.tensor([[0.0, 1]]))
    evaluator.reset()
    evaluator.process({"label": torch.tensor([1])}, torch.tensor([[0.0, 1]]))
    assert evaluator.evaluate()["accuracy"]["top1"] == 100
