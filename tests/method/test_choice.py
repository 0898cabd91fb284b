"""The choice: which filters go, by their scores."""

from __future__ import annotations

import math

import pytest
import torch

from repr_det.method.choice import choose, layer_limits, number_to_prune
from tests.method.nets import layer_of


def test_choose_takes_the_highest_over_all_layers():
    layers = [layer_of(torch.randn(4, 3), name="a"), layer_of(torch.randn(6, 3), name="b")]
    scores = {
        "a": torch.tensor([0.1, 0.9, 0.2, 0.3]), "b": torch.tensor([0.8, 0.0, 0.7, 0.1, 0.2, 0.3])
    }  # fmt: skip
    pruned = choose(layers, scores, 0.3, 0.5)
    assert pruned["a"].nonzero().flatten().tolist() == [1]
    assert pruned["b"].nonzero().flatten().tolist() == [0, 2]


def test_choose_respects_the_share_of_a_layer():
    layers = [layer_of(torch.randn(4, 3), name="a"), layer_of(torch.randn(4, 3), name="b")]
    scores = {"a": torch.arange(4.0) + 10, "b": torch.arange(4.0)}
    pruned = choose(layers, scores, 0.5, 0.75)
    assert pruned["a"].tolist() == [False, True, True, True]
    assert pruned["b"].tolist() == [False, False, False, True]


def test_choose_never_empties_a_layer():
    layers = [layer_of(torch.randn(2, 3), name="a"), layer_of(torch.randn(6, 3), name="b")]
    scores = {"a": torch.full((2,), math.inf), "b": torch.zeros(6)}
    pruned = choose(layers, scores, 0.5, 1.0)
    assert int(pruned["a"].sum()) == 1
    assert int(pruned["b"].sum()) == 3


def test_equal_scores_go_in_the_order_of_layers_and_filters():
    layers = [layer_of(torch.randn(5, 3), name="a"), layer_of(torch.randn(5, 3), name="b")]
    pruned = choose(layers, {"a": torch.zeros(5), "b": torch.zeros(5)}, 0.4, 0.6)
    assert pruned["a"].nonzero().flatten().tolist() == [0, 1, 2]
    assert pruned["b"].nonzero().flatten().tolist() == [0]


def test_counts_are_rounded_down_without_floating_point_surprises():
    layers = [layer_of(torch.randn(10, 3))]
    assert number_to_prune(layers, 0.7) == 7  # 0.7 * 10 = 6.999... in floating point
    assert number_to_prune(layers, 0.29) == 2
    assert layer_limits(layers, 0.7) == [7]
    assert layer_limits(layers, 1.0) == [9]


def test_score_that_is_no_number_is_named():
    layers = [layer_of(torch.randn(4, 3), name="some.conv")]
    with pytest.raises(FloatingPointError, match="some.conv"):
        choose(layers, {"some.conv": torch.tensor([0, math.nan, 1, 2])}, 0.5, 0.5)
