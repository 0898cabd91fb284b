"""Networks side by side compute what each computes alone, on memory that they share."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from repr_det.classification.models import build_classifier
from repr_det.classification.models.registry import PAPER_NAMES
from repr_det.classification.stacked import StackedNetworks

LARGE = ("cifar_resnet110", "cifar_resnet182", "cifar_densenet40", "cifar_densenet100")
NAMES = [name for name in PAPER_NAMES if name != "bn_inception"]


def make(name, count=3, size=16):
    torch.manual_seed(0)
    networks = [build_classifier(name, 4, image_size=size).double() for _ in range(count)]
    alone = copy.deepcopy(networks)
    return alone, networks, StackedNetworks(networks)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow) if name in LARGE else name
        for name in (*NAMES, "cifar_resnet8")
    ],
)
def test_outputs_gradients_and_statistics_are_those_of_each(name):
    alone, networks, stacked = make(name, count=2)
    images = torch.randn(3, 2, 3, 16, 16, dtype=torch.float64)
    for _ in range(2):
        expected = torch.stack([network(images[:, k]) for k, network in enumerate(alone)])
        found = stacked(images)
    torch.testing.assert_close(found, expected)
    expected.square().sum().backward()
    found.square().sum().backward()
    for parameter, part in stacked.stack.named_parameters():
        for k, network in enumerate(alone):
            torch.testing.assert_close(part.grad[k], network.get_parameter(parameter).grad)
    for network, own in zip(networks, alone, strict=True):
        torch.testing.assert_close(dict(network.named_buffers()), dict(own.named_buffers()))
    stacked.eval()
    with torch.no_grad():
        expected = torch.stack([network.eval()(images[:, 0]) for network in alone])
        torch.testing.assert_close(stacked(images[:, 0]), expected)


def test_memory_is_shared_until_it_is_separated():
    _, networks, stacked = make("c3_8_bn")
    optimizer = torch.optim.Adam(stacked.stack.parameters(), lr=0.1)
    own = [torch.optim.Adam(network.parameters(), lr=0.1) for network in networks]
    stacked(torch.randn(2, 3, 16, 16, dtype=torch.float64)).sum().backward()
    optimizer.step()
    stacked.share_state(optimizer, own)
    weight, whole = networks[1].fc.weight, stacked.stack.fc.weight
    moment = own[1].state[weight]["exp_avg"]
    assert torch.equal(weight, whole[1]) and torch.equal(
        moment, optimizer.state[whole]["exp_avg"][1]
    )
    with torch.no_grad():
        weight.fill_(7.0)
        moment.fill_(8.0)
        networks[1].features[1].running_mean.fill_(9.0)
    assert (whole[1] == 7).all() and not (whole[0] == 7).any()
    assert (optimizer.state[whole]["exp_avg"][1] == 8).all()
    assert (stacked.stack.features[1].running_mean[1] == 9).all()

    stacked.separate(own)
    with torch.no_grad():
        for tensor in (*stacked.stack.parameters(), *stacked.stack.buffers()):
            tensor.zero_()
    assert (weight == 7).all() and (own[1].state[weight]["exp_avg"] == 8).all()
    assert (networks[1].features[1].running_mean == 9).all()
    assert weight.untyped_storage().nbytes() == weight.nbytes
    assert isinstance(weight, nn.Parameter) and weight in own[1].state
