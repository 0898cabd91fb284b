from __future__ import annotations

import functools

import pytest
import torch
from torch import nn

from repr_det.classification.models import build_classifier, classifier_names


@functools.cache
def shapes_of(name: str) -> nn.Module:
    """A network for CIFAR-10 without data, built once for all tests."""
    with torch.device("meta"):
        return build_classifier(name, 10)


def count_before_last(network: nn.Module) -> int:
    last = [m for m in network.modules() if isinstance(m, nn.Linear)][-1]
    return sum(p.numel() for p in network.parameters()) - sum(p.numel() for p in last.parameters())


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("c3_32", 19_392),
        ("c8_32", 65_632),
        ("c13_32", 111_872),
        ("c18_32", 158_112),
        ("c3_32_bn", 19_584),
        ("c8_32_bn", 66_144),
        ("c13_32_bn", 112_704),
        ("c18_32_bn", 159_264),
    ],
)
def test_plain_networks_have_the_papers_counts(name, count):
    assert count_before_last(build_classifier(name, 10)) == count


@pytest.mark.parametrize("name", ["c3_32", "c3_32_bn"])
def test_pooling_before_the_relu_changes_no_bit(name):
    torch.manual_seed(0)
    network = build_classifier(name, num_classes=10)
    layers = list(network.features)
    as_printed = []
    while layers:
        layer = layers.pop(0)
        if isinstance(layer, nn.MaxPool2d):
            as_printed.append(layers.pop(0))
        as_printed.append(layer)
    kinds = [type(layer) for layer in as_printed]
    assert kinds.index(nn.ReLU) < kinds.index(nn.MaxPool2d)
    images = torch.randn(16, 3, 32, 32)

    def gradients(features):
        logits = network.fc(features(images).flatten(1))
        return logits, *torch.autograd.grad(logits.square().sum(), list(network.parameters()))

    for got, expected in zip(
        gradients(network.features), gradients(nn.Sequential(*as_printed)), strict=True
    ):
        assert torch.equal(got, expected)


@pytest.mark.parametrize(
    ("name", "thousands"),
    [
        ("cifar_resnet20", 269),
        ("cifar_resnet32", 464),
        ("cifar_resnet110", 1727),
        ("cifar_resnet182", 2894),
        ("cifar_densenet40", 1016),
        ("cifar_densenet100", 6968),
    ],
)
def test_cifar_networks_have_the_papers_counts(name, thousands):
    count = count_before_last(shapes_of(name))
    # Printed in thousands without saying how rounded: less than one thousand may lie between.
    assert abs(count - 1000 * thousands) < 1000


def densenet_count(layers: int, growth: int) -> int:
    """Layer by layer from Huang et al. 2017, table 1: 3x3 conv and norm on all earlier channels."""
    channels = 16
    count = 27 * channels
    for block in range(3):
        for _ in range((layers - 4) // 3):
            count += 9 * channels * growth + 2 * channels
            channels += growth
        if block < 2:
            count += channels * channels + 2 * channels
    return count + 2 * channels


@pytest.mark.parametrize("depth", [40, 100])
def test_densenet_counts_layer_by_layer(depth):
    assert count_before_last(shapes_of(f"cifar_densenet{depth}")) == densenet_count(depth, 12)


@pytest.mark.parametrize(
    ("name", "convs", "linears"),
    [
        ("c13_32", 13, 1),
        ("cifar_resnet20", 19, 1),
        ("cifar_resnet182", 181, 1),
        ("cifar_densenet5", 4, 1),
        ("cifar_densenet40", 39, 1),
        ("cifar_densenet100", 99, 1),
    ],
)
def test_depth_is_the_number_of_weighted_layers(name, convs, linears):
    modules = list(shapes_of(name).modules())
    assert sum(isinstance(m, nn.Conv2d) for m in modules) == convs
    assert sum(isinstance(m, nn.Linear) for m in modules) == linears


@pytest.mark.parametrize(
    "name",
    ["c3_32", "c8_32_bn", "c3_32_k5", "cifar_resnet20", "cifar_densenet5", "cifar_densenet40"],
)
def test_every_weight_of_small_networks_gets_a_finite_gradient(name):
    network = build_classifier(name, 7)
    logits = network(torch.randn(2, 3, 32, 32))
    assert logits.shape == (2, 7)
    logits.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())


def test_resnet_shortcut_is_stride_and_zeros():
    block = build_classifier("cifar_resnet20", 10).layer2[0].eval()
    for norm in (block.bn1, block.bn2):
        nn.init.zeros_(norm.weight)
    x = torch.rand(1, 16, 8, 8)
    out = block(x)
    assert torch.equal(out[:, 8:24], x[:, :, ::2, ::2])
    assert not out[:, :8].any() and not out[:, 24:].any()


def test_bn_inception_has_the_published_shape():
    with torch.device("meta"):
        network = build_classifier("bn_inception", 1000, image_size=224).eval()
        sizes = []
        x = network.stem(torch.empty(1, 3, 224, 224))
        for module in network.features:
            x = module(x)
            sizes.append((x.shape[1], x.shape[2]))
    # Ioffe & Szegedy 2015, figure 5, column "output size".
    assert sizes == [
        (256, 28), (320, 28), (576, 14), (576, 14), (576, 14), (576, 14), (576, 14),
        (1024, 7), (1024, 7), (1024, 7),
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["resnet18", "resnet152", "vgg16", "googlenet", "inception_v3"])
def test_torchvision_networks_by_name(name):
    size = 299 if name == "inception_v3" else 224
    with torch.device("meta"):
        network = build_classifier(name, 5, image_size=size).eval()
        assert network(torch.empty(2, 3, size, size)).shape == (2, 5)


# RegNets compute their widths with tensors, which the meta device does not hold.
ON_META = [name for name in classifier_names() if not name.startswith("regnet")]


@pytest.mark.parametrize(
    ("name", "device"),
    [
        # Every day one of eight.
        *(
            pytest.param(name, "meta", marks=pytest.mark.slow if number % 8 else [])
            for number, name in enumerate(ON_META)
        ),
        *(("regnet_x_400mf", "cpu"), ("regnet_y_400mf", "cpu")),
    ],
)
def test_every_listed_name_can_be_built_of_regnets_the_smallest(name, device):
    with torch.device(device):
        network = build_classifier(name, 3, image_size=299 if name == "inception_v3" else 224)
    assert any(3 in parameter.shape[:1] for parameter in network.parameters())


def test_building_leaves_the_seed_to_the_weights():
    """The check of the image size draws nothing, so the weights are those of the bare network."""
    from torchvision.models import mobilenet_v2

    torch.manual_seed(3)
    expected = mobilenet_v2(num_classes=4)  # has dropout and BatchNorm
    state = torch.get_rng_state()
    torch.manual_seed(3)
    network = build_classifier("mobilenet_v2", 4)
    assert torch.equal(torch.get_rng_state(), state)
    torch.testing.assert_close(network.state_dict(), expected.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("name", "close"), [("resnet20", "cifar_resnet20"), ("vgg61", "vgg16"), ("c3_32bn", "c3_32_bn")]
)
def test_unknown_name_gets_close_matches(name, close):
    with pytest.raises(ValueError, match=rf"no classifier named '{name}'.*{close}"):
        build_classifier(name, 10)


@pytest.mark.parametrize(
    ("name", "size"),
    [("inception_v3", 32), ("c3_32", 4), ("alexnet", 32), ("densenet121", 16), ("resnet18", -1)],
)
def test_image_size_that_does_not_fit(name, size):
    with pytest.raises(ValueError, match=f"{size} x {size}"):
        build_classifier(name, 10, image_size=size)


@pytest.mark.parametrize(("size", "fits"), [(96, False), (224, False), (299, True)])
def test_image_size_that_fits_in_evaluation_alone(size, fits):
    """The auxiliary head of Inception v3 only runs in training."""
    with torch.device("meta"):
        if fits:
            assert all(m.training for m in build_classifier("inception_v3", 4, 0, size).modules())
            return
        with pytest.raises(ValueError, match=f"{size} x {size}"):
            build_classifier("inception_v3", 4, image_size=size)


@pytest.mark.parametrize("name", ["cifar_resnet21", "cifar_densenet41"])
def test_depth_that_does_not_exist(name):
    with pytest.raises(ValueError, match="layers"):
        build_classifier(name, 10)


def test_dropout_halves_the_last_layers_input_in_training_only():
    network = build_classifier("c3_32", 10, dropout=0.5)
    assert list(network.state_dict()) == list(build_classifier("c3_32", 10).state_dict())
    fc = network.fc
    x = torch.ones(400, fc.in_features)
    nn.init.ones_(fc.weight)
    nn.init.zeros_(fc.bias)
    seen = fc(x)[:, 0] / fc.in_features
    # Each output is the mean of 512 values that are 0 or 2: standard deviation 1 / sqrt(512).
    assert abs(seen.mean() - 1) < 0.01
    assert abs(seen.std() - 512**-0.5) < 0.01
    fc.eval()
    assert torch.equal(fc(x)[:, 0], torch.full((400,), 512.0))


@pytest.mark.parametrize(("name", "p"), [("c3_32", 1.0), ("c3_32", -0.1), ("squeezenet1_1", 0.5)])
def test_dropout_that_cannot_be(name, p):
    with pytest.raises(ValueError, match=r"[Dd]ropout"):
        build_classifier(name, 10, dropout=p, image_size=64)
