"""torchvision's ConvNeXt with an FPN, as a detector's backbone."""

from __future__ import annotations

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY
from detectron2.modeling.backbone import Backbone
from detectron2.modeling.backbone.fpn import FPN, LastLevelMaxPool
from torch import Tensor
from torchvision.models.convnext import CNBlockConfig, ConvNeXt

from repr_det.errors import UserError


class ConvNeXtStages(Backbone):
    """The stages of a ConvNeXt (Liu et al., A ConvNet for the 2020s, CVPR 2022), without its head.

    Args:
        depths: blocks of each stage.
        widths: channels of each stage, as many numbers.
        stochastic_depth: how often the last block is skipped in training; the others less often.
    """

    def __init__(self, depths: list[int], widths: list[int], stochastic_depth: float) -> None:
        super().__init__()
        following = [*widths[1:], None]
        settings = [
            CNBlockConfig(width, after, depth)
            for width, after, depth in zip(widths, following, depths, strict=True)
        ]
        # torchvision's scale of 1e-6 is meant for deeper networks and longer training.
        model = ConvNeXt(settings, stochastic_depth, layer_scale=0.1)
        self.features = model.features
        self._out_features = [f"c{i + 2}" for i in range(len(depths))]
        self._out_feature_channels = dict(zip(self._out_features, widths, strict=True))
        self._out_feature_strides = {f: 4 * 2**i for i, f in enumerate(self._out_features)}

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Feature maps of images of shape (N, 3, H, W).

        Returns:
            ``c2``, ``c3``, ... with strides s of 4, 8, ...: (N, width, H / s, W / s).
        """
        outputs = []
        # The stem and downsampling convs alternate with the stages.
        for index, part in enumerate(self.features):
            x = part(x)
            if index % 2:
                outputs.append(x)
        return dict(zip(self._out_features, outputs, strict=True))


@BACKBONE_REGISTRY.register()
def build_convnext_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """The backbone that ``cfg.MODEL.CONVNEXT`` and ``cfg.MODEL.FPN`` describe.

    Raises:
        UserError: numbers of widths and depths differ, or there are fewer than two stages.
    """
    keys = cfg.MODEL.CONVNEXT
    if len(keys.DEPTHS) != len(keys.WIDTHS) or len(keys.DEPTHS) < 2:
        raise UserError(
            f"MODEL.CONVNEXT.DEPTHS is {keys.DEPTHS} and WIDTHS is {keys.WIDTHS}. Set two lists of "
            f"the same length, one number for each of two or more stages."
        )
    return FPN(
        bottom_up=ConvNeXtStages(keys.DEPTHS, keys.WIDTHS, keys.STOCHASTIC_DEPTH),
        in_features=cfg.MODEL.FPN.IN_FEATURES,
        out_channels=cfg.MODEL.FPN.OUT_CHANNELS,
        norm=cfg.MODEL.FPN.NORM,
        # Detectron2's ResNet-FPN has p6, from p5, too.
        top_block=LastLevelMaxPool() if "c5" in cfg.MODEL.FPN.IN_FEATURES else None,
        fuse_type=cfg.MODEL.FPN.FUSE_TYPE,
    )
