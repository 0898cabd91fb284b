"""The measurements of device.py, made one after the other in a process that may be killed.

changes: a drop and a return, what removal adds, and holding a step.
steps: a step of each phase / a standard step.
memory: its peak in each phase.
whole: a whole run in which ``auto`` decides / a standard one.
loading: the share of a step that waits for data.
"""

from __future__ import annotations

import gc
import itertools
import json
import logging
import statistics
import sys
import tempfile
import time
import traceback
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import speed
import torch
from clock import seconds
from device import PLAN
from networks import NETWORKS, VARIANTS, Network, make_trainer, stepper
from torch.profiler import profile

from repr_det.engine.environment import environment
from repr_det.engine.files import write_text_whole

AMP = ("SOLVER.AMP.ENABLED", True)
STEPS = 4
"""In each phase, where changes of phase are timed."""

FULL = {
    "resnet50": Network("ResNet-50, 64 x 224 px", "imagenet_resnet50.yaml", 64, (224, 224)),
    "faster_rcnn_2": Network(
        "Faster R-CNN R50-FPN, 2 x 800 px", "repr_faster_rcnn.yaml", 2, (800, 1067)
    ),
    "faster_rcnn_8": Network(
        "Faster R-CNN R50-FPN, 8 x 800 px", "repr_faster_rcnn.yaml", 8, (800, 1067)
    ),
    "resnet20": NETWORKS["resnet20"],
    "c3_32": NETWORKS["c3_32"],
}
# What stands for each of them in a rehearsal.
SMALL = {
    "resnet50": Network("ResNet-20, 2 x 32 px", "cifar10_resnet20.yaml", 2, (32, 32)),
    "faster_rcnn_2": Network("R18-FPN, 2 x 64 px", "demo_faster_rcnn.yaml", 2, (64, 64)),
    "faster_rcnn_8": Network("R18-FPN, 8 x 64 px", "demo_faster_rcnn.yaml", 8, (64, 64)),
    "resnet20": Network("ResNet-20, 8 x 32 px", "cifar10_resnet20.yaml", 8, (32, 32)),
    "c3_32": Network("C^3(32), 8 x 32 px", "cifar10_c3_32.yaml", 8, (32, 32)),
}


class Size(NamedTuple):
    """How much is measured.

    Attributes:
        networks: by name.
        rounds: at most, of whatever is repeated.
        epoch: iterations of a whole run that stand for an epoch; from 20 on ``auto`` measures.
        loading: what the detector's images are.
    """

    networks: dict[str, Network]
    rounds: int
    epoch: int
    loading: tuple[Any, ...]


_SHAPES = ("DATASETS.TRAIN", ("shapes_train",), "DATASETS.TEST", ("shapes_val",))
_DETECTOR = (*_SHAPES, "MODEL.WEIGHTS", "", "MODEL.ROI_HEADS.NUM_CLASSES", 6)
_SMALL = ("INPUT.MIN_SIZE_TRAIN", (64,), "INPUT.MAX_SIZE_TRAIN", 64, "SOLVER.IMS_PER_BATCH", 2)
SIZES = {
    "full": Size(FULL, 200, 20, (*_DETECTOR, "SOLVER.IMS_PER_BATCH", 8)),
    "small": Size(SMALL, 2, 1, (*_DETECTOR, *_SMALL, "DATALOADER.NUM_WORKERS", 1)),
}


def changes(name: str, size: Size, until: float, *overrides: Any) -> dict[str, Any]:
    """A drop, a return, and what removal adds to them; the time that holding takes of a step.

    Returns:
        Seconds and steps of the full phase, medians over cycles after the first, which also builds
        what later ones use. Under ``"allowed"`` the seconds that a drop and a return may take.
    """
    spent: dict[str, list[float]] = {}
    cycles = ("REPR.S1", STEPS, "REPR.S2", STEPS, "REPR.N", 10**6, "REPR.COMPACT", "off")

    def timed(what: str, work: Any) -> None:
        spent.setdefault(what, []).append(seconds(work))

    with tempfile.TemporaryDirectory() as folder:
        options = ("REPR.ENABLED", True, *cycles, *overrides)
        trainer = make_trainer(size.networks[name], folder, *options)
        step, hook = stepper(trainer), trainer._repr_hook
        for cycle in itertools.count():
            spent.setdefault("step", []).extend(step() for _ in range(STEPS))
            enough = cycle > 1 and (cycle >= size.rounds or time.time() > until)
            with trainer.storage:
                timed("drop", hook.before_step)
                timed("taking out", hook._shrink)
                timed("putting back", hook._grow)
                if cycle == 0:
                    timed("measurement of auto", lambda: hook._compact.speedup())
            # Measuring how long holding takes makes another step.
            left = STEPS - 1 if enough else STEPS
            spent.setdefault("step in S2", []).extend(step() for _ in range(left))
            if enough:
                break
            with trainer.storage:
                timed("return", hook.before_step)
        holding = speed.holding(trainer, step, min(size.rounds, 10))
    full = statistics.median(spent["step"][STEPS:])
    found = {
        what: {"seconds": round(took, 5), "steps": round(took / full, 3)}
        for what, values in spent.items()
        for took in [statistics.median(values[1:] or values)]
    }
    share = holding / statistics.median(spent["step in S2"])
    found["holding"] = {"seconds": round(holding, 7), "share": round(share, 5)}
    allowed = {"allowed": round(max(10 * full, 0.5), 3)}
    return {"network": size.networks[name].title, **found, **allowed, "cycles": cycle}


def steps(name: str, size: Size, until: float, *overrides: Any) -> dict[str, Any]:
    """Ratios of whole steps that take turns."""
    network = size.networks[name]
    found = speed.step_ratios(network, size.rounds, *overrides, until=until)
    return {"network": network.title, **found}


def memory(name: str, size: Size, until: float, *overrides: Any) -> dict[str, Any]:
    """Peak of what tensors hold in each variant, in MiB, and of what is reserved on a GPU.

    The drop before the second step and what it takes to find the smaller network are within.
    """
    del until
    network = size.networks[name]
    found = {v: _peak(network, *options, *overrides) for v, options in VARIANTS.items()}
    return {"network": network.title, **found}


def _peak(network: Network, *overrides: Any) -> dict[str, float]:
    on_gpu, threads, before = torch.cuda.is_available(), torch.get_num_threads(), 0
    gc.collect()
    if on_gpu:
        before = torch.cuda.memory_allocated()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    with ExitStack() as stack:
        if not on_gpu:
            torch.set_num_threads(1)  # only one is watched
            watched = stack.enter_context(profile(profile_memory=True, acc_events=True))
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        step = stepper(make_trainer(network, folder, *overrides))
        for _ in range(3):  # the second is the first of S2
            step()
    torch.set_num_threads(threads)
    if not on_gpu:
        return {"tensors": round(speed.peak_of_tensors(watched) / 2**20, 2)}
    return {
        "tensors": round((torch.cuda.max_memory_allocated() - before) / 2**20, 2),
        "reserved": round(torch.cuda.max_memory_reserved() / 2**20, 2),
    }


def whole(name: str, size: Size, until: float, *overrides: Any) -> dict[str, Any]:
    """A whole run in which ``auto`` decides / a standard one."""
    network, options = size.networks[name], ("REPR.COMPACT", "auto", *overrides)
    found = speed.whole_run(network, size.epoch, *options, until=until)
    return {"network": network.title, **found}


def loading(name: str, size: Size, until: float) -> dict[str, Any]:
    """The share of a step that waits for the built-in dataset's images."""
    if name == "demo":
        return speed.loading_share("demo_faster_rcnn.yaml", size.rounds, until=until)
    options = size.loading
    return speed.loading_share("repr_faster_rcnn.yaml", size.rounds, *options, until=until)


KINDS = {
    "changes": changes, "steps": steps, "memory": memory, "whole": whole, "loading": loading
}  # fmt: skip


def main() -> None:
    """Measure what is named until the time is up, or one fails."""
    folder, end, share, device, size, *names = sys.argv[1:]
    output, until = Path(folder), float(end)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        sys.exit("PyTorch finds no GPU. Set --device cpu.")
    if size == "auto":
        size = "full" if device == "cuda" else "small"
    logging.disable(logging.WARNING)
    torch.manual_seed(0)
    about = json.dumps(environment(device) | {"size": size}, indent=1)
    write_text_whole(output / "environment.json", about)
    print(about, flush=True)
    for name in names:
        begin = time.time()
        kind, network, *amp = name.split("-")
        planned = min(begin + PLAN[name] * float(share), until)
        try:
            found = KINDS[kind](network, SIZES[size], planned, *(AMP if amp else ()))
        except speed.TimeUpError as error:
            print(f"{name}: {error}", flush=True)
            continue
        except Exception:
            found = {"error": traceback.format_exc()}
        found["took"] = round(time.time() - begin, 1)
        write_text_whole(output / f"{name}.json", json.dumps(found, indent=1))
        print(f"{name}: {found.get('error') or json.dumps(found)}", flush=True)
        if "error" in found:  # a failure on a GPU may spoil what follows in this process
            sys.exit(1)
        gc.collect()


if __name__ == "__main__":
    main()
