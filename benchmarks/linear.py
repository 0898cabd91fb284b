"""Hidden units of linear layers: what takes part with them, and what S2 costs without them.

    python benchmarks/linear.py models [NAME ...] [--record]     # the table
    python benchmarks/linear.py steps [NAME ...] [--record]      # steps of S2 against plain ones

Models have random weights, which a rate of almost zero leaves where they are. A drop takes 30 % of
the filters. Steps of the masked, the smaller and the plain network are taken in turns, so that
another load of the machine meets all three.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from repr_det import RePr, RePrSchedule
from repr_det.errors import UserError
from repr_det.method.compact import Compact

RECORD = Path(__file__).with_name("linear.json")
Built = tuple[nn.Module, Callable[[nn.Module], Tensor]]


def _classifier(model: nn.Module, size: int, count: int = 2) -> Built:
    images = torch.randn(count, 3, size, size)
    classes = torch.arange(count)
    return model, lambda m: nn.functional.cross_entropy(m(images), classes)


def _torchvision(name: str, size: int = 224, count: int = 2, **options: Any) -> Built:
    import torchvision

    return _classifier(torchvision.models.get_model(name, **options), size, count)


def _timm(name: str, size: int = 224, count: int = 2, **options: Any) -> Built:
    import timm

    return _classifier(timm.create_model(name, **options), size, count)


def _detector(model: nn.Module, size: int = 128) -> Built:
    from detectron2.structures import Boxes, Instances, PolygonMasks
    from detectron2.utils.events import EventStorage

    square = [10.0, 10.0, 60.0, 10.0, 60.0, 70.0, 10.0, 70.0]
    batch = []
    for _ in range(2):
        instances = Instances((size, size))
        instances.gt_boxes = Boxes([[10.0, 10.0, 60.0, 70.0], [30.0, 20.0, 100.0, 110.0]])
        instances.gt_classes = torch.tensor([0, 1])
        instances.gt_masks = PolygonMasks([[square], [square]])
        image = torch.randint(0, 255, (3, size, size)).float()
        batch.append({"image": image, "instances": instances, "height": size, "width": size})

    def loss(model: nn.Module) -> Tensor:
        with EventStorage():
            return sum(model(batch).values())

    return model, loss


def _yaml(path: str) -> Built:
    """A model of Detectron2's YAML files."""
    from detectron2 import model_zoo
    from detectron2.modeling import build_model

    cfg = model_zoo.get_config(path)
    cfg.MODEL.DEVICE, cfg.MODEL.WEIGHTS = "cpu", ""
    return _detector(build_model(cfg))


def _lazy(bottom_up: str) -> Built:
    """Mask R-CNN of Detectron2's LazyConfigs on ViTDet-B, or on an FPN of a Swin-T or MViTv2-T.

    The last two are not in its package. Their numbers are those of its ``projects/MViTv2``.
    """
    from detectron2 import model_zoo
    from detectron2.config import LazyCall, instantiate
    from detectron2.modeling import FPN, MViT, SwinTransformer

    name = "mask_rcnn_vitdet" if bottom_up == "ViT" else "mask_rcnn_fpn"
    cfg = model_zoo.get_config(f"common/models/{name}.py").model
    if bottom_up == "ViT":
        cfg.backbone.square_pad = 128
        cfg.backbone.net.img_size = 128
        return _detector(instantiate(cfg))
    if bottom_up == "Swin":
        heads = [3, 6, 12, 24]
        body = LazyCall(SwinTransformer)(
            depths=[2, 2, 6, 2], drop_path_rate=0.2, embed_dim=96, num_heads=heads
        )
        features = ("p0", "p1", "p2", "p3")
    else:
        body = LazyCall(MViT)(depth=10, last_block_indexes=(0, 2, 7, 9), drop_path_rate=0.2)
        features = ("scale2", "scale3", "scale4", "scale5")
    top = cfg.backbone.top_block
    cfg.backbone = LazyCall(FPN)(
        bottom_up=body, in_features=features, out_channels=256, square_pad=128, top_block=top
    )
    return _detector(instantiate(cfg))


MODELS: dict[str, Callable[[], Built]] = {
    **{f"torchvision {n}": lambda n=n: _torchvision(n, 128) for n in (
        "convnext_tiny", "swin_t", "vgg11", "alexnet", "mobilenet_v3_small")},
    # Wide linear layers: at the two small images above, a return takes longer than ten steps.
    "torchvision vgg11, 32 x 224 px": lambda: _torchvision("vgg11", 224, 32),
    "torchvision alexnet, 128 x 224 px": lambda: _torchvision("alexnet", 224, 128),
    "torchvision maxvit_t": lambda: _torchvision("maxvit_t"),
    "torchvision vit_b_16": lambda: _torchvision("vit_b_16", 64, image_size=64),
    "timm vit_small": lambda: _timm("vit_small_patch16_224", 128, img_size=128),
    "timm deit_tiny": lambda: _timm("deit_tiny_patch16_224", 128, img_size=128),
    "timm swin_tiny": lambda: _timm("swin_tiny_patch4_window7_224", 128, img_size=128),
    "timm convnext_tiny": lambda: _timm("convnext_tiny", 128),
    "timm convnextv2_atto": lambda: _timm("convnextv2_atto", 128),
    "timm maxvit_tiny": lambda: _timm("maxvit_rmlp_pico_rw_256", 256),
    "timm mixer_s32": lambda: _timm("mixer_s32_224"),
    "timm eva02_tiny (SwiGLU)": lambda: _timm("eva02_tiny_patch14_224"),
    "Faster R-CNN R50-FPN": lambda: _yaml("COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml"),
    "Mask R-CNN R50-FPN": lambda: _yaml(
        "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml"),
    "Cascade R-CNN R50-FPN": lambda: _yaml("Misc/cascade_mask_rcnn_R_50_FPN_1x.yaml"),
    "ViTDet-B": lambda: _lazy("ViT"),
    "Mask R-CNN Swin-T": lambda: _lazy("Swin"),
    "Mask R-CNN MViTv2-T": lambda: _lazy("MViT"),
}  # fmt: skip

STEPS: dict[str, Callable[[], Built]] = {
    "ViT-S": lambda: _timm("vit_small_patch16_224", 128, 4, img_size=128),
    "ConvNeXt-T": lambda: _timm("convnext_tiny", 128, 4),
    "Faster R-CNN R50-FPN": MODELS["Faster R-CNN R50-FPN"],
    "Faster R-CNN R50-FPN, box head": MODELS["Faster R-CNN R50-FPN"],
}
# From random weights the ranking of all layers takes few units of the box head. Here it is of the
# box head alone.
INCLUDE = {"Faster R-CNN R50-FPN, box head": ("roi_heads.box_head.*",)}


def _method(
    model: nn.Module,
    loss: Callable[[nn.Module], Tensor],
    linear: bool,
    cycles: int = 1,
    include: Sequence[str] = (),
) -> RePr:
    trainer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 1e-8, 0.9)
    schedule = RePrSchedule(1, 1, cycles)
    return RePr(
        model, trainer, schedule, 0.3, include=include, linear=linear,
        batches=lambda: iter([None]), loss=lambda m, _: loss(m),
    )  # fmt: skip


def _share(method: RePr, model: nn.Module) -> float:
    total = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return round(sum(layer.weight.numel() for layer in method.layers) / total, 3)


def describe(build: Callable[[], Built]) -> dict[str, Any]:
    """A row of the table of models."""
    torch.manual_seed(0)
    model, loss = build()
    model.train()
    try:
        before = _share(_method(model, loss, linear=False), model)
    except UserError:
        before = 0.0
    start = time.perf_counter()
    method = _method(model, loss, linear=True)
    built = time.perf_counter() - start
    units = [layer for layer in method.layers if layer.name in method.graph.linears]
    step = _stepper(model, loss, method.optimizer)
    step()
    plain = [step(), step()]
    start = time.perf_counter()
    method.step(1)
    dropped = time.perf_counter() - start
    gone = method.removable.choose(method.pruned).filters
    removable = sum(int(gone[name].sum()) for name in method.pruned if name in gone)
    share = removable / method.num_pruned
    start = time.perf_counter()
    method.step(2)
    returned = time.perf_counter() - start
    seconds = statistics.median([*plain, step()])
    return {
        "threads": torch.get_num_threads(),
        "filters": sum(layer.num_filters for layer in method.layers),
        "linear units": sum(layer.num_filters for layer in units),
        "linear layers": f"{len(units)} of {len(method.graph.linears)}",
        "share of weights before": before,
        "share of weights after": _share(method, model),
        "share of pruned filters removable": round(share, 3),
        "seconds to build": round(built, 1),
        "seconds of a step": round(seconds, 2),
        "seconds of a drop": round(dropped, 2),
        "seconds of a return": round(returned, 2),
        "drop in steps": round(dropped / seconds, 1),
        "return in steps": round(returned / seconds, 1),
    }


def _stepper(
    model: nn.Module, loss: Callable[[nn.Module], Tensor], trainer: torch.optim.Optimizer
) -> Callable[[], float]:
    """What takes a training step and returns its seconds."""

    def step() -> float:
        start = time.perf_counter()
        trainer.zero_grad()
        loss(model).backward()
        trainer.step()
        return time.perf_counter() - start

    return step


def ratios(build: Callable[[], Built], rounds: int, include: Sequence[str]) -> dict[str, Any]:
    """Steps of S2, masked and with units removed, relative to those of the plain network."""
    torch.manual_seed(0)
    model, loss = build()
    model.train()
    method = _method(model, loss, linear=True, cycles=rounds, include=include)
    step = _stepper(model, loss, method.optimizer)
    compact = Compact(method)
    seconds: dict[str, list[float]] = {"plain": [], "masked": [], "smaller": []}

    def timed(kind: str) -> None:
        step()
        seconds[kind].append(min(step(), step()))

    step()
    for turn in range(rounds):
        timed("plain")
        method.step(2 * turn + 1)
        timed("masked")
        shrunk = compact.shrink()
        timed("smaller")
        compact.grow()
        method.step(2 * turn + 2)
    plain = seconds["plain"]
    found = {
        kind: [b / a for a, b in zip(plain, seconds[kind], strict=True)]
        for kind in ("masked", "smaller")
    }
    return {
        "threads": torch.get_num_threads(),
        "plain step in seconds": round(statistics.median(plain), 3),
        **{f"{kind} / plain": round(statistics.median(r), 3) for kind, r in found.items()},
        "turns": {kind: [round(x, 3) for x in r] for kind, r in found.items()},
        "removed": shrunk.removed,
        "kept as zeros": shrunk.kept,
        "multiply-adds": round(shrunk.after.multiply_adds / shrunk.before.multiply_adds, 3),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, and with ``--record`` write linear.json."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("models", "steps"))
    parser.add_argument("names", nargs="*", help="parts of names; default: all")
    parser.add_argument("--rounds", type=int, default=5, help="cycles of steps")
    parser.add_argument("--record", action="store_true", help="write linear.json")
    options = parser.parse_args(arguments)
    warnings.simplefilter("ignore")
    for name, build in (MODELS if options.what == "models" else STEPS).items():
        if options.names and not any(part in name for part in options.names):
            continue
        try:
            if options.what == "models":
                row = describe(build)
            else:
                row = ratios(build, options.rounds, INCLUDE.get(name, ()))
        except Exception as error:  # each model in its own try
            row = {"failed": f"{type(error).__name__}: {error}".splitlines()[0][:300]}
        print(name, json.dumps(row), flush=True)
        if options.record:
            record = json.loads(RECORD.read_text()) if RECORD.exists() else {}
            record.setdefault(options.what, {})[name] = row
            RECORD.write_text(json.dumps(record, indent=1) + "\n")
        gc.collect()


if __name__ == "__main__":
    main()
