"""Step times, whole runs, ways to be faster, data loading and memory, all as ratios to standard."""

from __future__ import annotations

import itertools
import math
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from clock import now
from detectron2.utils.events import EventStorage
from networks import NETWORKS, NEVER, VARIANTS, Network, make_trainer, stepper
from scipy.stats import binom
from torch.cuda import max_memory_allocated, max_memory_reserved
from torch.profiler import profile

from repr_det.engine.allocator import keep_freed_memory
from repr_det.engine.config import config_path
from repr_det.method.compact import Compact
from repr_det.method.holding import GradientMask
from repr_det.method.layers import column_slots
from repr_det.tasks import get_cfg, trainer_for

WARM_UP = 2
HOLDING_ROUNDS = 10
"""Backward passes that time how gradients are held, for each round of steps."""

CYCLES, S1, S2, LENGTH = 3, 20, 10, 110
"""The paper's schedule, in epochs."""

STEPS, MEMORY = "steps", "memory"
"""What a process that this file starts measures."""

TENSORS, PROCESS, PRUNED = "tensors", "process", "pruned weights"
"""Whose memory."""

GIVEN_BACK, KEPT = "given back", "memory kept"
SECONDS = "seconds:"

OPTIONS: dict[str, tuple[Any, ...]] = {
    "channels last": ("MODEL.CHANNELS_LAST", True),
    "bfloat16 (float16 on a GPU)": ("SOLVER.AMP.ENABLED", True),
    "fused optimizer": ("SOLVER.FUSED", True),
    "torch.compile": ("MODEL.COMPILE", True),
    "deterministic": ("DETERMINISTIC", True),
}


class TimeUpError(Exception):
    """What was to be measured does not fit into the time."""


def median_interval(values: list[float]) -> dict[str, Any]:
    """The median of ratios with its distribution-free interval of at least 95 % (order statistics).

    Of fewer than six values that interval is the whole range, and covers less.
    """
    ranked = sorted(values)
    # So many values lie below the median by chance in less than 2.5 % of all cases.
    outside = max(int(binom.ppf(0.025, len(values), 0.5)) - 1, 0)
    return {
        "ratio": round(statistics.median(ranked), 4),
        "interval": [round(ranked[outside], 4), round(ranked[-1 - outside], 4)],
    }


def _turns(
    steps: dict[str, Any],
    rounds: int,
    warm_up: int = WARM_UP,
    *,
    until: float = math.inf,
    at_least: int = 2,
) -> dict[str, list[float]]:
    """Seconds of each, a step each in turn; nobody always runs behind the same other one.

    Ends early at ``until`` (of ``time.time``) if ``at_least`` so many rounds were made.

    Raises:
        TimeUpError: as many will not be made by then.
    """
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    begin = time.time()
    for index in range(warm_up + rounds):
        done = index - warm_up
        if done >= min(at_least, rounds) and time.time() > until:
            break
        if 20 <= done < at_least and (time.time() - begin) / index * at_least > until - begin:
            raise TimeUpError(f"{at_least} rounds do not fit into the time")
        for name in list(steps)[:: 1 if index % 2 else -1]:
            value = steps[name]()
            if done >= 0:
                seconds[name].append(value)
    return seconds


def _ratios(seconds: dict[str, list[float]], to: str) -> dict[str, Any]:
    return {
        name: median_interval([a / b for a, b in zip(values, seconds[to], strict=True)])
        for name, values in seconds.items()
        if name != to
    }


def step_ratios(
    network: Network, rounds: int, *overrides: Any, until: float = math.inf
) -> dict[str, Any]:
    """Time of a step of each variant / standard, and multiply-adds of the smaller network.

    Under ``"holding"`` the share of a masked step in which gradients are set to zero.

    Args:
        network: which.
        rounds: of steps, one of each variant.
        overrides: KEY, VALUE, ... of the config, of all variants.
        until: from then on (of ``time.time``) no further round begins.
    """
    with tempfile.TemporaryDirectory() as folder:
        trainers = {
            variant: make_trainer(network, folder, *options, *overrides)
            for variant, options in VARIANTS.items()
        }
        steps = {v: stepper(t) for v, t in trainers.items()}
        seconds = _turns(steps, rounds, until=until)
        result = _ratios(seconds, "standard")
        rounds = len(seconds["standard"])
        spent = holding(trainers["masked"], steps["masked"], min(rounds, 20))
        result["holding"] = round(spent / statistics.median(seconds["masked"]), 5)
        result["multiply_adds"] = _multiply_adds(trainers["masked"])
    result["seconds_standard"] = round(statistics.median(seconds["standard"]), 4)
    return result | {"rounds": rounds}


def holding(masked: Any, step: Callable[[], float], rounds: int) -> float:
    """Seconds of a step of S2 in which gradients are set to zero.

    A median over backward passes that do nothing but accumulate the gradients that are held, with
    and without holding them in turns.
    """
    step()
    mask: GradientMask = masked._repr_hook.method._mask
    found = [one for one in mask.held if one.parameter.grad is not None]
    held = [one.parameter for one in found]
    slots = [slot for one in found for slot in one.slots]
    gradients = [torch.zeros_like(parameter) for parameter in held]
    mask.remove()
    spent = []
    for index in range(WARM_UP + HOLDING_ROUNDS * rounds):
        seconds = {}
        for holds in (False, True) if index % 2 else (True, False):
            again = GradientMask(slots if holds else [], masked.optimizer)
            begin = now()
            torch.autograd.backward(held, gradients)
            seconds[holds] = now() - begin
            again.remove()
        spent.append(seconds[True] - seconds[False])
    return max(statistics.median(spent[WARM_UP:]), 0.0)


def _multiply_adds(masked: Any) -> float:
    """Of the smaller network / of the whole one, in a forward pass."""
    hook = masked._repr_hook
    compact = Compact(hook.method)
    with EventStorage():
        shrunk = compact.shrink()
        compact.grow()
    return round(shrunk.after.multiply_adds / shrunk.before.multiply_adds, 4)


def whole_run(
    network: Network, epoch: int, *overrides: Any, until: float = math.inf
) -> dict[str, Any]:
    """Time of a whole RePr run / of a standard one, of equal iterations, step beside step.

    Args:
        network: which.
        epoch: iterations that stand for one epoch; the run has :data:`LENGTH` of them.
        overrides: KEY, VALUE, ... of the config of both.
        until: when it must be over (of ``time.time``).

    Raises:
        TimeUpError: it will not be.
    """
    cycles = ("REPR.S1", S1 * epoch, "REPR.S2", S2 * epoch, "REPR.N", CYCLES)
    with tempfile.TemporaryDirectory() as folder:
        trainers = {
            "standard": make_trainer(network, folder, *overrides, "REPR.ENABLED", False),
            "RePr": make_trainer(network, folder, *overrides, "REPR.ENABLED", True, *cycles),
        }
        steps = {v: stepper(t) for v, t in trainers.items()}
        length = LENGTH * epoch
        seconds = _turns(steps, length, warm_up=0, until=until, at_least=length)
    hook = trainers["RePr"]._repr_hook
    in_s2 = [
        index % ((S1 + S2) * epoch) > S1 * epoch and index < CYCLES * (S1 + S2) * epoch
        for index in range(LENGTH * epoch)
    ]
    pairs = list(zip(seconds["RePr"], seconds["standard"], in_s2, strict=True))
    step = statistics.median(a / b for a, b, sub in pairs if sub)
    full = CYCLES * S2
    return {
        "ratio": round(sum(seconds["RePr"]) / sum(seconds["standard"]), 4),
        "step_ratio_in_s2": round(step, 4),
        "bound": round(1.02 * (LENGTH - full + full * step) / LENGTH, 4),
        "iterations": LENGTH * epoch,
        "removed": bool(hook.state_dict()["compact"]),
    }


def phase_changes(network: Network, cycles: int) -> dict[str, Any]:
    """Time of a drop, and of a return, / of a full-phase step, all in turns.

    Args:
        network: which.
        cycles: of two steps, a drop, a step and a return each. One more comes first, uncounted.
    """
    found: dict[str, list[float]] = {"drop": [], "return": []}
    options = ("REPR.S1", 2, "REPR.S2", 1, "REPR.N", NEVER // 4, "REPR.COMPACT", "off")
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(network, folder, "REPR.ENABLED", True, *options)
        step, change = stepper(trainer), trainer._repr_hook.before_step
        for cycle in range(cycles + 1):
            full = statistics.mean(step() for _ in range(2))
            for kind, values in found.items():
                begin = now()
                with trainer.storage:
                    change()
                values.append((now() - begin) / full)
                if kind == "drop":
                    step()
            print(f"cycle {cycle}: a step {full:.2f} s", file=sys.stderr, flush=True)
    ratios = {kind: median_interval(values[1:]) for kind, values in found.items()}
    return {**ratios, "cycles": cycles, "load": round(os.getloadavg()[1], 1)}


def option_ratios(name: str, rounds: int) -> dict[str, Any]:
    """Time of a standard step with each option / without any."""
    with tempfile.TemporaryDirectory() as folder:
        steps = {}
        for option, overrides in {"none": (), **OPTIONS}.items():
            off = ("REPR.ENABLED", False, "MODEL.CHANNELS_LAST", False)
            steps[option] = stepper(make_trainer(NETWORKS[name], folder, *off, *overrides))
        seconds = _turns(steps, rounds)
    return _ratios(seconds, "none") | {"rounds": rounds}


def kept_memory_ratio(name: str, pairs: int, steps: int) -> dict[str, Any]:
    """Time of a standard step where freed memory is kept / where the C library gives it back.

    A process is the one or the other from its beginning, so two of them make their steps in turns.

    Args:
        name: of the network.
        pairs: of processes.
        steps: of each process.
    """
    seconds: dict[str, list[float]] = {GIVEN_BACK: [], KEPT: []}
    for _ in range(pairs):
        with ExitStack() as stack:
            started = {kind: _stepper_in_a_process(name, kind, stack) for kind in seconds}
            for kind, values in _turns(started, steps).items():
                seconds[kind] += values
    return _ratios(seconds, GIVEN_BACK) | {"rounds": pairs * steps}


def _stepper_in_a_process(name: str, kind: str, stack: ExitStack) -> Callable[[], float]:
    """A function that lets a process make one step, and returns its seconds."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    command = _as_a_program(STEPS, name, kind)
    process = stack.enter_context(subprocess.Popen(command, text=True, bufsize=1, **pipes))
    # Before the process is waited for: it ends when nothing more can be asked.
    stack.callback(process.stdin.close)

    def step() -> float:
        process.stdin.write("step\n")
        for line in process.stdout:
            if line.startswith(SECONDS):
                return float(line.removeprefix(SECONDS))
        raise RuntimeError(f"the process that makes steps of {name} ended")

    return step


def loading_share(
    config: str, steps: int, *overrides: Any, until: float = math.inf
) -> dict[str, Any]:
    """Share of a real step in which the trainer waits for its data, a median over steps.

    At most ``steps`` of them, and none that begins after ``until`` (of ``time.time``).
    """
    with tempfile.TemporaryDirectory() as folder:
        cfg = get_cfg()
        cfg.merge_from_file(config_path(config))
        cfg.merge_from_list(list(overrides))
        cfg.OUTPUT_DIR, cfg.SOLVER.MAX_ITER, cfg.REPR.ENABLED = folder, 10**9, False
        trainer = trainer_for(cfg)(cfg)
        shares = []
        with EventStorage() as trainer._trainer.storage:
            for index in range(WARM_UP + steps):
                if len(shares) > 1 and time.time() > until:
                    break
                trainer._trainer.iter = index
                begin = now()
                trainer._trainer.run_step()
                whole = now() - begin
                waited = trainer._trainer.storage.history("data_time").latest()
                if index >= WARM_UP:
                    shares.append(waited / whole)
    return {"share": round(statistics.median(shares), 4), "steps": len(shares)}


def peak_memory(name: str) -> dict[str, Any]:
    """Peak memory of the first steps of each variant, in MiB, each in a process of its own.

    The drop before the second step and what it takes to find the smaller network are within.

    Returns:
        By variant what tensors hold and what the process does (on a GPU, what was reserved there);
        under :data:`PRUNED` the size of these weights.
    """

    def measure(kind: str, variant: str) -> float:
        command = _as_a_program(MEMORY, kind, name, variant)
        printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        return round(int(printed.split()[-1]) / 2**20, 2)

    found = {v: {kind: measure(kind, v) for kind in (TENSORS, PROCESS)} for v in VARIANTS}
    return found | {PRUNED: measure(PRUNED, "masked")}


def _as_a_program(*arguments: str) -> list[str]:
    return [sys.executable, str(Path(__file__).resolve()), *arguments]


def _make_steps_when_asked(name: str, kind: str) -> None:
    """A step for each line that comes in."""
    if kind != GIVEN_BACK and not torch.cuda.is_available():
        keep_freed_memory()
    with tempfile.TemporaryDirectory() as folder:
        step = stepper(make_trainer(NETWORKS[name], folder, *VARIANTS["standard"]))
        for _ in sys.stdin:
            print(SECONDS, step(), flush=True)


def _print_peak_memory(kind: str, name: str, variant: str) -> None:
    """In bytes."""
    on_gpu = torch.cuda.is_available()
    with ExitStack() as stack:
        if kind == TENSORS and not on_gpu:
            torch.set_num_threads(1)  # only one is watched
            watched = stack.enter_context(profile(profile_memory=True, acc_events=True))
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        trainer = make_trainer(NETWORKS[name], folder, *VARIANTS[variant])
        step = stepper(trainer)
        for _ in range(3):  # the second is the first of S2
            step()
    if kind == PRUNED:
        print(_size_of_pruned(trainer))
    elif on_gpu:
        print({TENSORS: max_memory_allocated, PROCESS: max_memory_reserved}[kind]())
    else:
        print(peak_of_tensors(watched) if kind == TENSORS else _peak_of_process())


def _size_of_pruned(trainer: Any) -> int:
    """Of the pruned filters and of the weights that read nothing else."""
    method = trainer._repr_hook.method
    pruned = method.pruned
    slots = [slot for layer in method.layers for slot in layer.filter_slots(pruned[layer.name])]
    for reader in method.graph.readers.values():
        slots += column_slots(reader.module, reader.dead(pruned))
    masks = {slot.tensor: torch.zeros_like(slot.tensor, dtype=torch.bool) for slot in slots}
    for slot in slots:
        slot.fill(True, like=masks[slot.tensor])
    return sum(int(mask.sum()) * tensor.element_size() for tensor, mask in masks.items())


def peak_of_tensors(watched: profile) -> int:
    """Bytes that tensors held at once, at most, while they were watched."""
    found = [e for e in watched.profiler.kineto_results.events() if e.name() == "[memory]"]
    found.sort(key=lambda event: event.start_ns())
    return max(itertools.accumulate(event.nbytes() for event in found))


def _peak_of_process() -> int:
    # Not getrusage: its peak survives exec, so it would be that of the process that started us.
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s*(\d+) kB", status)[1]) * 2**10


if __name__ == "__main__":
    what, *arguments = sys.argv[1:]
    {STEPS: _make_steps_when_asked, MEMORY: _print_peak_memory}[what](*arguments)
