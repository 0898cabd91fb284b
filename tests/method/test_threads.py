"""Work on many layers at once."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import nn

from repr_det.method.layers import FilterLayer
from repr_det.method.threads import over_layers


@pytest.fixture(params=[1, 2])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


LAYERS = [FilterLayer(str(width), nn.Conv2d(4, width, 3)) for width in (8, 32, 4, 16)]


def test_results_come_in_the_order_of_the_layers_without_gradients(threads):
    sums = over_layers(lambda layer: (layer.name, layer.weight.sum()), LAYERS)
    assert [name for name, _ in sums] == ["8", "32", "4", "16"]
    assert not any(total.requires_grad for _, total in sums)
    assert torch.get_num_threads() == threads


def test_all_threads_work():
    both = threading.Barrier(2, timeout=60)

    def work(layer):
        both.wait()  # would fail if one thread did it all
        return torch.get_num_threads()

    torch_threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert over_layers(work, LAYERS) == [1] * 4
    finally:
        torch.set_num_threads(torch_threads)


def test_autocast_of_the_caller_does_not_reach_the_work(threads):
    with torch.autocast("cpu", torch.bfloat16):
        types = over_layers(lambda layer: (layer.matrix() @ layer.matrix().T).dtype, LAYERS)
    assert types == [torch.float32] * 4


def test_an_error_reaches_the_caller(threads):
    def fail(layer):
        raise ValueError(layer.name)

    with pytest.raises(ValueError, match="8"):
        over_layers(fail, LAYERS)
    assert torch.get_num_threads() == threads
