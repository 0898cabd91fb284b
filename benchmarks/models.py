"""Which published models RePr can train: are pruned filters exactly zero in each of them?

Every model is built with random weights and followed on two random images. A tenth of its filters
is dropped, and one training step is taken. Where there are no convs for it, hidden linear units
take part (``linear=True``). Before and after it, the output of every pruned filter
(after its norm) is looked at in training and in evaluation mode: it must be exactly zero. Then the
pruned filters are removed physically, and the loss of one batch is compared.

    python benchmarks/models.py torchvision timm detectron2 [--record]

Of torchvision every model is tried, and of Detectron2's zoo every network. timm has over 1,300
models, most of them sizes of the same code: of each of its files, the smallest of each family is
tried, by name.

Each model is tried in a process of its own, with a limit of time and of memory. Results are written
as they come. A run that was interrupted goes on: what models.json has is not tried again.

timm is a development extra; what is not installed is left out.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import re
import resource
import signal
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from repr_det import RePr, RePrSchedule
from repr_det.errors import UserError
from repr_det.method.compact import Compact
from repr_det.method.modules import unchanged

RECORD = Path(__file__).with_name("models.json")
LARGEST = 90_000_000
"""Parameters of the largest model that is tried."""

SECONDS, MEMORY = 300, 5 * 2**30
"""What one model may take: time of a CPU, and bytes."""

Batch = Any
Built = tuple[nn.Module, Batch]


def images(size: int = 64, width: int = 3, count: int = 2) -> Tensor:
    """Images of noise."""
    return torch.randn(count, width, size, size)


# --- the lists


def torchvision_models() -> Iterator[tuple[str, Callable[[], Built]]]:
    """Classification, segmentation, video and detection."""
    import torchvision.models as zoo

    for name in zoo.list_models(module=zoo):
        size = 299 if "inception_v3" in name else 224 if name.startswith(("vit", "maxvit")) else 64
        yield name, lambda n=name, s=size: (zoo.get_model(n, weights=None), images(s))
    for name in zoo.list_models(module=zoo.segmentation):
        yield (
            name,
            lambda n=name: (
                zoo.get_model(n, weights=None, weights_backbone=None),
                images(64),
            ),
        )
    for name in zoo.list_models(module=zoo.video):
        if "r2plus1d" in name or "r3d" in name or "mc3" in name or "s3d" in name:
            size = 224 if name == "s3d" else 64
            yield name, lambda n=name, s=size: (
                zoo.get_model(n, weights=None), torch.randn(2, 3, 16, s, s)
            )  # fmt: skip
    for name in zoo.list_models(module=zoo.detection):
        few = (
            {"box_detections_per_img": 8, "box_batch_size_per_image": 16} if "rcnn" in name else {}
        )
        few |= {"min_size": 128, "max_size": 128} if "ssd" not in name else {}
        yield name, lambda n=name, f=few: (
            zoo.get_model(n, weights=None, weights_backbone=None, **f),
            _torchvision_targets("keypoint" in n),
        )  # fmt: skip


def _torchvision_targets(keypoints: bool) -> Batch:
    boxes = torch.tensor([[10.0, 10.0, 60.0, 70.0], [30.0, 20.0, 100.0, 110.0]])
    target = {
        "boxes": boxes,
        "labels": torch.tensor([1, 1]),
        "masks": torch.ones(2, 128, 128, dtype=torch.uint8),
    }
    if keypoints:
        target["keypoints"] = torch.tensor([[[30.0, 40.0, 1.0]] * 17] * 2)
    return list(images(128)), [dict(target) for _ in range(2)]


def timm_models() -> Iterator[tuple[str, Callable[[], Built]]]:
    """The smallest model of each family, by its name, of every file of timm."""
    import timm

    sizes = ["femto", "atto", "pico", "nano", "tiny", "mini", "small", "xs", "s0", "_0", "18", "26"]
    found: list[list[str]] = []
    for module in timm.list_modules():
        names = timm.list_models(module=module)
        names.sort(key=lambda n: next((i for i, s in enumerate(sizes) if s in n), len(sizes)))
        families: dict[str, str] = {}
        for name in names:
            families.setdefault(re.match(r"[a-z]+", name)[0], name)
        found.append(list(families.values()))
    # One of each file first.
    for row in itertools.zip_longest(*found):
        for name in filter(None, row):
            yield f"timm.{name}", lambda n=name: _timm_model(n)


def _timm_model(name: str) -> Built:
    import timm

    model = timm.create_model(name, pretrained=False)
    given = model.pretrained_cfg
    needs_it = any(part in name for part in ("inception", "bat_", "halo"))
    size = given["input_size"][-1] if needs_it or given.get("fixed_input_size") else 64
    return model, images(size, given["input_size"][0])


def detectron2_models() -> Iterator[tuple[str, Callable[[], Built]]]:
    """Every network of the model zoo, once where configs differ in the length of training."""
    from detectron2.model_zoo.model_zoo import _ModelZooUrls

    networks = set()
    for path in _ModelZooUrls.CONFIG_PATH_TO_URL_SUFFIX:
        # Detectron1's configs have the same networks.
        network = re.sub(r"_(\dx|\d+ep_LSJ|noaug)", "", path.split("/")[-1])
        if network not in networks:
            networks.add(network)
            yield path, lambda p=path: _detectron2_model(p)


def _detectron2_model(path: str) -> Built:
    from detectron2 import model_zoo
    from detectron2.config import get_cfg, instantiate
    from detectron2.modeling import build_model
    from detectron2.structures import BitMasks, Boxes, Instances, Keypoints, PolygonMasks

    if path.startswith("new_baselines/"):  # Mask R-CNN, in Python
        model, cfg = instantiate(model_zoo.get_config(f"{path}.py").model), get_cfg()
        cfg.MODEL.MASK_ON = True
    else:
        cfg = model_zoo.get_config(f"{path}.yaml")
        cfg.MODEL.DEVICE, cfg.MODEL.WEIGHTS = "cpu", ""
        model = build_model(cfg)
    square = [10.0, 10.0, 60.0, 10.0, 60.0, 70.0, 10.0, 70.0]
    batch = []
    for image in images(128):
        instances = Instances((128, 128))
        instances.gt_boxes = Boxes([[10.0, 10.0, 60.0, 70.0], [30.0, 20.0, 100.0, 110.0]])
        instances.gt_classes = torch.tensor([0, 0])
        if cfg.MODEL.MASK_ON:
            bits = cfg.INPUT.MASK_FORMAT == "bitmask"
            instances.gt_masks = (
                BitMasks(torch.ones(2, 128, 128)) if bits else PolygonMasks([[square]] * 2)
            )
        if cfg.MODEL.KEYPOINT_ON:
            instances.gt_keypoints = Keypoints(torch.tensor([[[30.0, 40.0, 2.0]] * 17] * 2))
        segments = torch.zeros(128, 128, dtype=torch.long)
        batch.append({"image": image * 50 + 100, "instances": instances, "sem_seg": segments})
        batch[-1].update(height=128, width=128)
        if cfg.MODEL.LOAD_PROPOSALS:
            proposals = Instances((128, 128))
            proposals.proposal_boxes = Boxes([[10.0, 10.0, 60.0, 70.0], [5.0, 5.0, 50.0, 90.0]])
            proposals.objectness_logits = torch.ones(2)
            batch[-1]["proposals"] = proposals
    return model, batch


LISTS = {
    "torchvision": torchvision_models, "timm": timm_models, "detectron2": detectron2_models
}  # fmt: skip


# --- one model


def run(model: nn.Module, batch: Batch) -> Any:
    """The model's results on a batch."""
    if isinstance(batch, list) and isinstance(batch[0], dict):  # Detectron2
        from detectron2.utils.events import EventStorage

        with EventStorage():
            return model(batch)
    if isinstance(batch, tuple):  # images and targets of torchvision
        return model(*batch) if model.training else model(batch[0])
    return model(batch)


def loss(model: nn.Module, batch: Batch) -> Tensor:
    """Something that depends on all results of a training forward pass."""
    leaves = [t for t in tree_leaves(run(model, batch)) if isinstance(t, Tensor)]
    # Weighted by noise: the mean of what leaves a norm is zero, whatever the network.
    generator = torch.Generator().manual_seed(0)
    return sum(
        (t.float() * torch.randn(t.shape, generator=generator)).mean()
        for t in leaves
        if t.is_floating_point()
    )


def not_zero(model: nn.Module, method: RePr, batch: Batch) -> list[str]:
    """Layers with a pruned filter whose output is not exactly zero in one of the modes."""
    pruned, found, handles = method.pruned, [], []

    def watch(module: nn.Module, name: str, channels: Tensor, dim: int | None) -> None:
        def look(module: nn.Module, args: Any, out: Tensor) -> None:
            # A conv's channels are counted from the back, for images without a batch.
            place = dim if dim is not None else out.dim() - module.weight.dim() + 1
            if out.detach().index_select(place, channels).any():
                found.append(name)

        handles.append(module.register_forward_hook(look))

    for layer in method.layers:
        chosen = pruned[layer.name]
        if chosen.any():
            watch(layer.module, layer.name, chosen.nonzero().flatten(), None)
            for link in layer.norms:
                watch(link.module, link.name, link.channels_of(chosen), link.dim)
    try:
        with unchanged(model), torch.no_grad():
            for training in (True, False):
                model.train(training)
                run(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    return sorted(set(found))


def check(build: Callable[[], Built]) -> dict[str, Any]:
    """What became of one model."""
    torch.manual_seed(0)
    start = time.perf_counter()
    model, batch = build()
    parameters = sum(p.numel() for p in model.parameters())
    if parameters > LARGEST:
        return {"result": "too large", "parameters": parameters}
    model.train()
    trainer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 1e-3, 0.9)
    method, reason = None, ""
    for linear in (False, True):
        try:
            method = RePr(
                model, trainer, RePrSchedule(1, 9, 1), 0.1, loss=loss,
                batches=lambda: iter([batch]), linear=linear,
            )  # fmt: skip
            break
        except UserError as error:
            reason = str(error)
    if method is None:
        return {"result": "refused", "reason": reason}
    built = time.perf_counter() - start
    method.step(1)
    found = not_zero(model, method, batch)
    loss(model, batch).backward()
    # Deep networks with frozen norms and random weights would overflow, and NaN is not zero.
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    trainer.step()
    trainer.zero_grad()
    found += not_zero(model, method, batch)
    record = {
        "result": "not zero" if found else "exact",
        "linear": linear,
        "layers": len(method.layers),
        "convs": len(method.graph.convs),
        "pruned": method.num_pruned,
        "not_run": len(method.graph.not_run),
        "seconds": round(built, 1),
    }
    return (
        record
        | ({"where": sorted(set(found))[:5]} if found else {})
        | removed(model, method, batch)
    )


def removed(model: nn.Module, method: RePr, batch: Batch) -> dict[str, Any]:
    """How many pruned filters can be removed, and how much that changes the loss."""
    compact = Compact(method)

    def value() -> float:
        torch.manual_seed(1)
        model.train()
        with unchanged(model), torch.no_grad():
            return float(loss(model, batch))

    before = value()
    try:
        count = compact.shrink().removed
    except RuntimeError as error:
        return {"removed": 0, "removal": str(error)[:200]}
    after = value()
    compact.grow()
    return {"removed": count, "difference": abs(after - before) / max(abs(before), 1e-12)}


def _send(build: Callable[[], Built], end: Connection) -> None:
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
    warnings.simplefilter("ignore")
    try:
        end.send(check(build))
    except ImportError as error:
        end.send({"result": "not built", "reason": str(error).splitlines()[0][:200]})
    except Exception as error:  # foreign models may raise anything
        text = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        kind = "too large" if "can't allocate memory" in text else "exception"
        end.send({"result": kind, "reason": text})


def check_apart(build: Callable[[], Built]) -> dict[str, Any]:
    """What became of one model, checked in a process of its own."""
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=_send, args=(build, there))
    process.start()
    there.close()
    try:
        return here.recv()
    except EOFError:
        process.join()
        late = process.exitcode == -signal.SIGXCPU
        reason = f"it took more than {SECONDS} s" if late else f"status {process.exitcode}"
        return {"result": "stopped", "reason": reason}


def main() -> None:
    """Check the models of some lists and print what became of each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("lists", nargs="+", choices=list(LISTS))
    parser.add_argument(
        "--match", default="", help="only models whose name this regular expression finds"
    )
    parser.add_argument(
        "--record", action="store_true", help="write models.json, and try only what it has not"
    )
    arguments = parser.parse_args()
    results: dict[str, dict[str, Any]] = {}
    if arguments.record and RECORD.exists():
        results = json.loads(RECORD.read_text())
    for kind in arguments.lists:
        try:
            models = dict(LISTS[kind]())
        except ImportError as error:
            print(f"{kind} is left out: {error}")
            continue
        for name, build in models.items():
            if name in results or not re.search(arguments.match, name):
                continue
            results[name] = check_apart(build) | {"list": kind}
            print(name, json.dumps(results[name]), flush=True)
            if arguments.record:
                RECORD.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n")
    print(Counter((r["list"], r["result"]) for r in results.values()))


if __name__ == "__main__":
    main()
