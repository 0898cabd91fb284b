#!/usr/bin/env python3
"""Time of a training step with RePr and in deterministic mode, against standard training.

    python benchmarks/step_time.py demo_faster_rcnn.yaml cifar10_c3_32.yaml [--steps 60]

Five trainers with one seed take turns, one step each, in one process: standard; RePr in its full
phase; RePr in S2; RePr in S2 without the pruned filters; standard in deterministic mode. All see
batches of the same sizes. The ratios to standard training are taken step by step, of steps that ran
one after the other; reported are their median and the 95 % interval of the median. A step is the
whole step with its hooks; nothing is evaluated, saved or written.
"""

from __future__ import annotations

import argparse
import json
import logging
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from detectron2.engine.hooks import EvalHook, PeriodicCheckpointer, PeriodicWriter
from detectron2.utils.env import seed_all_rng
from detectron2.utils.events import EventStorage

from repr_det.engine.config import config_path
from repr_det.tasks import get_cfg, trainer_for

RESULT = Path(__file__).with_suffix(".json")
STANDARD, FULL, DETERMINISTIC = "standard", "RePr, full phase", "deterministic"
SUB, SMALLER = "RePr, S2", "RePr, S2, physically smaller"
WARM_UP = 5
NEVER = 10**6


def make_step(config: str, variant: str, folder: str) -> Callable[[], float]:
    """A function that makes one step and returns its seconds."""
    cfg = get_cfg()
    cfg.merge_from_file(config_path(config))
    cfg.OUTPUT_DIR = folder
    for key in list(cfg.SOLVER):
        if key.endswith("_EPOCHS"):
            cfg.SOLVER[key] = 0.0
    cfg.SOLVER.MAX_ITER, cfg.SEED = NEVER, 0
    cfg.REPR.ENABLED = variant in (FULL, SUB, SMALLER)
    cfg.REPR.COMPACT = "on" if variant == SMALLER else "off"
    cfg.REPR.UNIT, cfg.REPR.N = "iteration", 1
    cfg.REPR.S1, cfg.REPR.S2 = (1, NEVER // 2) if variant in (SUB, SMALLER) else (NEVER // 2, 1)
    deterministic = cfg.DETERMINISTIC = variant == DETERMINISTIC
    seed_all_rng(0)
    trainer = trainer_for(cfg)(cfg)
    torch.use_deterministic_algorithms(False)
    skipped = (EvalHook, PeriodicCheckpointer, PeriodicWriter)
    trainer._hooks = [hook for hook in trainer._hooks if not isinstance(hook, skipped)]
    trainer.iter, trainer.storage = 0, EventStorage(0)
    with trainer.storage:
        trainer.before_train()

    def step() -> float:
        torch.use_deterministic_algorithms(deterministic)
        begin = time.perf_counter()
        with trainer.storage, torch.jit.optimized_execution(not deterministic):
            trainer.before_step()
            trainer.run_step()
            trainer.after_step()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        trainer.iter += 1
        return time.perf_counter() - begin

    return step


def median_interval(values: list[float]) -> tuple[float, float, float]:
    """The median with its distribution-free 95 % interval (order statistics)."""
    ranked, n = sorted(values), len(values)
    reach = round(1.96 * n**0.5 / 2)
    low, high = max(n // 2 - reach, 0), min(n // 2 + reach, n - 1)
    return statistics.median(ranked), ranked[low], ranked[high]


def measure(config: str, steps: int) -> dict:
    """Ratios of one config."""
    with tempfile.TemporaryDirectory() as folder:
        variants = (STANDARD, FULL, SUB, SMALLER, DETERMINISTIC)
        run = {v: make_step(config, v, f"{folder}/{i}") for i, v in enumerate(variants)}
        seconds: dict[str, list[float]] = {variant: [] for variant in variants}
        for index in range(WARM_UP + steps):
            # Nobody always runs behind the same other one.
            for variant in variants if index % 2 else variants[::-1]:
                value = run[variant]()
                if index >= WARM_UP:
                    seconds[variant].append(value)
    result = {"seconds_standard": round(statistics.median(seconds[STANDARD]), 5)}
    for variant in variants[1:]:
        pairs = zip(seconds[variant], seconds[STANDARD], strict=True)
        median, low, high = median_interval([mine / other for mine, other in pairs])
        result[variant] = {
            "ratio": round(median, 4),
            "interval": [round(low, 4), round(high, 4)],
        }
    return result


def environment() -> dict[str, str]:
    """What the measurement was made on and with."""
    processor = f"{platform.machine()}, {torch.get_num_threads()} thread(s)"
    return {
        "torch": torch.__version__,
        "machine": torch.cuda.get_device_name() if torch.cuda.is_available() else processor,
    }


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("configs", nargs="+", metavar="CONFIG")
    parser.add_argument("--steps", type=int, default=60)
    args = parser.parse_args()
    logging.disable(logging.WARNING)
    record = json.loads(RESULT.read_text()) if RESULT.exists() else {}
    for config in args.configs:
        record[config] = measure(config, args.steps) | {"steps": args.steps} | environment()
        print(config, json.dumps(record[config], indent=1), flush=True)
        RESULT.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
