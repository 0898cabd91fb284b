"""From a name to a network."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torch.func import functional_call

from repr_det.classification.models.bn_inception import BNInception
from repr_det.classification.models.cifar_densenet import CifarDenseNet
from repr_det.classification.models.cifar_resnet import CifarResNet
from repr_det.classification.models.plain import PlainConvNet
from repr_det.engine.data import first_line
from repr_det.errors import UserError

PAPER_NAMES = (
    *(f"c{depth}_32{norm}" for depth in (3, 8, 13, 18) for norm in ("", "_bn")),
    *(f"cifar_resnet{depth}" for depth in (20, 32, 110, 182)),
    *(f"cifar_densenet{depth}" for depth in (5, 40, 100)),
    "bn_inception",
)

_PLAIN = re.compile(r"c(\d+)_(\d+)(_bn)?(_k5)?")
_CIFAR = re.compile(r"cifar_(resnet|densenet)(\d+)")
# Both warn of their default initial weights unless ``init_weights`` is set.
_WITH_INIT_WEIGHTS = ("googlenet", "inception_v3")

Builder = Callable[[int, int], nn.Module]


def _torchvision_names() -> list[str]:
    return torchvision.models.list_models(module=torchvision.models)


def _find_builder(name: str) -> Builder | None:
    """What builds a network from the number of classes and the image size."""
    if plain := _PLAIN.fullmatch(name):
        depth, width, norm, large = plain.groups()
        return lambda num_classes, image_size: PlainConvNet(
            int(depth), int(width), num_classes, bool(norm), 5 if large else 3, image_size
        )
    if cifar := _CIFAR.fullmatch(name):
        network = CifarResNet if cifar[1] == "resnet" else CifarDenseNet
        return lambda num_classes, _: network(int(cifar[2]), num_classes)
    if name == "bn_inception":
        return lambda num_classes, _: BNInception(num_classes)
    if name in _torchvision_names():
        extra = {"init_weights": True} if name in _WITH_INIT_WEIGHTS else {}
        return lambda num_classes, _: torchvision.models.get_model(
            name, weights=None, num_classes=num_classes, **extra
        )
    return None


def classifier_names() -> list[str]:
    """The paper's networks for CIFAR and all of torchvision's, sorted.

    ``c3_32`` is the paper's ``C^3(32)`` without norm, ``c3_32_bn`` the one with BatchNorm;
    ``cifar_resnet20`` and ``cifar_densenet40`` are networks for small images. Other depths and
    widths are understood too (``c4_64``, ``cifar_resnet56``). A plain network whose name ends in
    ``_k5`` has the 5x5 kernels of the authors' public code.
    """
    return sorted({*PAPER_NAMES, *_torchvision_names()})


def _close_names(name: str) -> list[str]:
    names = classifier_names()
    inside = [known for known in names if name in known]
    close = difflib.get_close_matches(name, names, n=4)
    return list(dict.fromkeys(inside[:3] + close))


class DropoutLinear(nn.Linear):
    """A linear layer with dropout on its input.

    Args:
        linear: the layer whose parameters it takes over, under the same names.
        dropout: probability of dropout.
    """

    def __init__(self, linear: nn.Linear, dropout: float) -> None:
        with torch.device("meta"):
            super().__init__(linear.in_features, linear.out_features, linear.bias is not None)
        self.weight, self.bias = linear.weight, linear.bias
        self.dropout = dropout

    def forward(self, x: Tensor) -> Tensor:
        """``(..., in_features)`` to ``(..., out_features)``."""
        return super().forward(F.dropout(x, self.dropout, self.training))


def add_dropout(network: nn.Module, probability: float) -> None:
    """Add dropout to the input of a network's last linear layer, in place.

    Args:
        network: any network whose last layer is an ``nn.Linear``.
        probability: share of inputs that are zeroed in training, in ``[0, 1)``.

    Raises:
        UserError: a probability out of range, or a network without a linear layer.
    """
    if not 0 <= probability < 1:
        raise UserError(f"Dropout is {probability}. Set a probability of at least 0 and below 1.")
    linear = [name for name, module in network.named_modules() if type(module) is nn.Linear]
    if not linear:
        raise UserError(
            f"{type(network).__name__} has no linear layer to put dropout in front of. Set "
            f"dropout 0."
        )
    parent, _, name = linear[-1].rpartition(".")
    old = network.get_submodule(linear[-1])
    setattr(network.get_submodule(parent), name, DropoutLinear(old, probability))


def build_classifier(
    name: str, num_classes: int, dropout: float = 0.0, image_size: int = 32
) -> nn.Module:
    """A classification network with fresh weights.

    Args:
        name: see :func:`classifier_names`.
        num_classes: number of outputs.
        dropout: probability of dropout in front of the last linear layer, on top of whatever
            dropout the architecture has itself.
        image_size: side of the square input images in pixels.

    Returns:
        A module from images ``(B, 3, image_size, image_size)`` to logits ``(B, num_classes)``. In
        training mode GoogLeNet and Inception v3 return a named tuple of logits and auxiliary
        logits.

    Raises:
        UserError: an unknown name (with close matches), a dropout out of range, or an image size
            that the network cannot take.
    """
    builder = _find_builder(name)
    if builder is None:
        close = ", ".join(_close_names(name)) or "one of classifier_names()"
        raise UserError(f"There is no classifier named {name!r}. Did you mean {close}?")
    network = builder(num_classes, image_size)
    _check_image_size(name, network, image_size)
    if dropout:
        add_dropout(network, dropout)
    return network


def _check_image_size(name: str, network: nn.Module, image_size: int) -> None:
    """Send images without data through the network with weights without data.

    In training, too: auxiliary heads run in no other mode. Leaves the network in training mode.
    """
    tensors = {**dict(network.named_parameters()), **dict(network.named_buffers())}
    shapes = {name: tensor.to("meta") for name, tensor in tensors.items()}
    try:
        images = torch.empty(2, 3, image_size, image_size, device="meta")
        with torch.random.fork_rng(devices=[]):
            for training in (False, True):
                functional_call(network.train(training), shapes, images)
    except (RuntimeError, AssertionError) as error:
        raise UserError(
            f"{name} cannot take images of {image_size} x {image_size} pixels "
            f"({first_line(error).rstrip('.')}). Set INPUT.IMAGE_SIZE to its size."
        ) from error
