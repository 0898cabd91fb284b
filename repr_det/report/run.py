"""What a run left behind in its folder, finished or not."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from detectron2.config import CfgNode
from numpy.typing import NDArray

from repr_det.detection.coco_results import BBOX, SEGM
from repr_det.engine import recording
from repr_det.engine.checkpoint import NUMBERED, last_checkpoint, read_checkpoint
from repr_det.engine.command_line import merge_config_file
from repr_det.engine.config import config_path
from repr_det.engine.data import held_out_name
from repr_det.engine.files import read_records
from repr_det.engine.hook import STATE_KEY
from repr_det.errors import UserError
from repr_det.tasks import get_cfg

DETECTION, CLASSIFICATION = "detection", "classification"

FINAL, _LAST = "model_final.pth", "last_checkpoint"

_KINDS = (BBOX, SEGM, "accuracy")
"""What the names of evaluated metrics begin with."""

_ZERO_IF_NAN = {f"{kind}/{m}" for kind in (BBOX, SEGM) for m in ("AP", "AP50", "AP75")}
"""Metrics that are NaN where nothing was detected; of sizes and classes also without objects."""

Series = tuple[NDArray[np.float64], NDArray[np.float64]]
Metrics = dict[str, Series]


def read_metrics(folder: str | Path) -> Metrics:
    """Read the scalars that Detectron2's ``JSONWriter`` wrote to ``metrics.json``.

    Where a run was resumed or begun anew in the same folder, so that iterations come again, what
    was written of them and of later ones before does not count. A last line that was cut off in
    writing is ignored.

    Returns:
        name -> (iterations, values), both float (n,), by increasing iteration; empty where there is
        no such file.

    Raises:
        UserError: it is no record of training.
    """
    path = Path(folder) / "metrics.json"
    beginnings: list[list[tuple[float, dict[str, float]]]] = []
    last: dict[str, float] = {}
    for record in read_records(path) if path.is_file() else ():
        iteration = record.pop("iteration")
        # Lines are not in order, but those of one scalar are: the writer puts what is new of each.
        if not beginnings or any(last.get(name, iteration) > iteration for name in record):
            beginnings.append([])
            last.clear()
        beginnings[-1].append((iteration, record))
        last |= dict.fromkeys(record, iteration)
    series: dict[str, dict[float, float]] = {}
    for lines in beginnings:
        first = min(iteration for iteration, _ in lines)
        series = {n: {i: v for i, v in s.items() if i < first} for n, s in series.items()}
        for iteration, record in lines:
            for name, value in record.items():
                series.setdefault(name, {})[iteration] = value
    return {
        name: (np.array(sorted(s), dtype=float), np.array([s[i] for i in sorted(s)], dtype=float))
        for name, s in series.items()
        if s
    }


def sub_network_spans(iterations: np.ndarray, phases: np.ndarray) -> list[tuple[float, float]]:
    """Where the run trained the sub-network (S2).

    Args:
        iterations: when ``repr/phase`` was written, increasing.
        phases: what it was, 0 full and 1 sub; a value holds since the entry before it.

    Returns:
        First iteration and end (exclusive) of each span.
    """
    starts = np.concatenate([[0], iterations[:-1] + 1])
    spans: list[tuple[float, float]] = []
    for start, last, phase in zip(starts, iterations, phases, strict=True):
        if phase == 1:
            if spans and spans[-1][1] == start:
                start = spans.pop()[0]
            spans.append((float(start), float(last) + 1))
    return spans


def learning_rate_drops(iterations: np.ndarray, rates: np.ndarray) -> list[float]:
    """Iterations by which the learning rate had fallen to less than 0.6 of the entry before."""
    return iterations[1:][rates[1:] < 0.6 * rates[:-1]].tolist()


def rate_steps(solver: Mapping[str, Any], end: int) -> list[float] | None:
    """Where the settings of the solver, in iterations, let the learning rate fall.

    Args:
        solver: the config's ``SOLVER``.
        end: only falls before it.

    Returns:
        Iterations; None for a schedule without steps.
    """
    if solver["LR_SCHEDULER_NAME"] != "WarmupMultiStepLR" or solver.get("MAX_EPOCHS", 0):
        return None
    return [float(step) for step in solver["STEPS"] if step < end]


def training_seconds(metrics: Metrics) -> float | None:
    """Wall-clock time of the training steps alone; None where no time was recorded.

    Each recorded time of a step stands for the iterations since the record before it.
    """
    if "time" not in metrics:
        return None
    iterations, seconds = metrics["time"]
    return float((seconds * np.diff(iterations, prepend=-1)).sum())


@dataclass(frozen=True)
class RunFolder:
    """A run, read from its folder.

    Attributes:
        folder: its ``OUTPUT_DIR``.
        cfg: its config; ``MODEL.DEVICE`` is a device of this machine.
        metrics: its scalars.
        checkpoint: the one to look at; None for the newest.
    """

    folder: Path
    cfg: CfgNode
    metrics: Metrics
    checkpoint: Path | None = None

    @property
    def uses_repr(self) -> bool:
        """Whether it was trained with RePr."""
        return self.cfg.REPR.ENABLED

    @property
    def task(self) -> str:
        """:data:`DETECTION` or :data:`CLASSIFICATION`."""
        return task_of(self.cfg)

    @property
    def finished(self) -> bool:
        """Whether training came to its end, and was not begun anew or prolonged since."""
        if self._newest or not (self.folder / FINAL).is_file():
            return self._newest == FINAL
        # Without a word of what was written last, as where a run was begun anew.
        return read_checkpoint(self.folder / FINAL).get("iteration", -1) + 1 == self.iterations

    @cached_property
    def _newest(self) -> str:
        """Name of the checkpoint that was written last; empty where nothing says so."""
        return last_checkpoint(self.folder).name if (self.folder / _LAST).is_file() else ""

    @property
    def iterations(self) -> int:
        """How many iterations of training are recorded."""
        done, _ = self.metrics.get("total_loss", ((), ()))
        return 1 + int(done[-1]) if len(done) else 0

    @property
    def spans(self) -> list[tuple[float, float]]:
        """Where the run trained the sub-network (S2), as half-open ranges of iterations.

        From what is recorded of the drops, else as :func:`sub_network_spans`.
        """
        try:
            drops = self.history.drops if self.history else []
        except ValueError:  # damaged; said where the drops themselves are asked for
            drops = []
        if drops and self.cfg.REPR.S1:
            # The first drop ends S1, so the ratio gives S2 in iterations whatever its unit.
            length = round(drops[0].iteration * self.cfg.REPR.S2 / self.cfg.REPR.S1)
            return [
                (d.iteration, max(d.iteration, min(d.iteration + length, self.iterations)))
                for d in drops
            ]
        if "repr/phase" not in self.metrics:
            return []
        return sub_network_spans(*self.metrics["repr/phase"])

    @property
    def rate_drops(self) -> list[float]:
        """Where the learning rate falls: the config's steps in iterations, else as was recorded."""
        if (steps := rate_steps(self.cfg.SOLVER, self.iterations)) is not None:
            return steps
        return learning_rate_drops(*self.metrics["lr"]) if "lr" in self.metrics else []

    @property
    def test_set(self) -> str:
        """What it was evaluated on: the last of the config's test sets."""
        return self.cfg.DATASETS.TEST[-1] if self.cfg.DATASETS.TEST else ""

    @property
    def held_out(self) -> int:
        """How many training images the test set is made of; 0 for a test set of its own."""
        names = map(held_out_name, self.cfg.DATASETS.TRAIN)
        return self.cfg.DATASETS.HELD_OUT if self.test_set in names else 0

    def evaluations(self, metric: str) -> Series | None:
        """An evaluated metric of the test set over time, ``bbox/AP`` say; None without any.

        A detector that detected nothing has an AP of 0, which Detectron2 records as NaN.
        """
        series = self.metrics.get(f"{self._prefix}{metric}")
        if series is not None and metric in _ZERO_IF_NAN:
            return series[0], np.nan_to_num(series[1])
        return series

    def evaluated(self) -> list[str]:
        """Names of all metrics of the test set."""
        kinds = tuple(f"{self._prefix}{kind}/" for kind in _KINDS)
        return [name.removeprefix(self._prefix) for name in self.metrics if name.startswith(kinds)]

    @property
    def _prefix(self) -> str:
        """What stands before the test set's metrics: its name, where there were several."""
        start = f"{self.test_set}/"
        kinds = tuple(f"{start}{kind}/" for kind in _KINDS)
        return start if any(name.startswith(kinds) for name in self.metrics) else ""

    @cached_property
    def checkpoints(self) -> list[Path]:
        """By increasing iteration, the final one last; none of an earlier run in the folder."""
        numbered = [
            (int(match[1]), path)
            for path in self.folder.glob("model_*.pth")
            if (match := NUMBERED.fullmatch(path.name))
        ]
        # Runs that have no record of what they did are told by their checkpoints alone.
        last = self.iterations - 1 if self.metrics else math.inf
        if match := NUMBERED.fullmatch(self._newest):
            last = min(last, int(match[1]))
        numbered = [(number, path) for number, path in numbered if number <= last]
        final = [self.folder / FINAL] if self.finished else []
        return [path for _, path in sorted(numbered)] + final

    @property
    def weights(self) -> Path:
        """The checkpoint to look at.

        Raises:
            UserError: there is none yet.
        """
        if self.checkpoint is not None:
            return self.checkpoint
        if not self.checkpoints:
            raise UserError(f"{self.folder} holds no checkpoint yet.")
        return self.checkpoints[-1]

    @cached_property
    def history(self) -> recording.History | None:
        """What each drop took; None for a run without RePr, or one that left no word of it.

        Raises:
            UserError: the record or the newest checkpoint is damaged.
        """
        if not self.uses_repr:
            return None
        if (found := recording.read(self.folder)) is not None or not self.checkpoints:
            return found
        state = read_checkpoint(self.weights).get("trainer", {}).get("hooks", {}).get(STATE_KEY)
        return None if state is None else recording.of_state(state)


def task_of(cfg: CfgNode) -> str:
    """:data:`DETECTION` or :data:`CLASSIFICATION`."""
    image_classifier = cfg.MODEL.META_ARCHITECTURE == "ImageClassifier"
    return CLASSIFICATION if image_classifier else DETECTION


def read_run(folder: str | Path) -> RunFolder:
    """Read a run's config and scalars.

    Args:
        folder: its ``OUTPUT_DIR``.

    Raises:
        UserError: no folder, or not a run's, or a config that cannot be read.
    """
    folder = Path(folder)
    path = folder / "config.yaml"
    if not path.is_file():
        raise UserError(
            f"{path} does not exist: give the OUTPUT_DIR of a run of tools/train_net.py."
        )
    return RunFolder(folder, _read_config(path), read_metrics(folder))


def of_checkpoint(config: str, weights: Path) -> RunFolder:
    """A checkpoint with a config, without what a run leaves behind.

    Args:
        config: a path, or the bare name of a file in ``configs/``.
        weights: the checkpoint.

    Raises:
        UserError: one of them does not exist, or a config that cannot be read.
    """
    path = Path(config_path(config))
    if not weights.is_file():
        raise UserError(f"{weights} does not exist: give the path of a checkpoint.")
    return RunFolder(weights.parent, _read_config(path), {}, weights)


def _read_config(path: Path) -> CfgNode:
    cfg = get_cfg()
    device = cfg.MODEL.DEVICE
    cfg.set_new_allowed(True)  # a trainer of one's own has keys of its own
    merge_config_file(cfg, str(path), trusted=False)
    cfg.MODEL.DEVICE = device if device == "cpu" else cfg.MODEL.DEVICE
    return cfg


def short_names(runs: Sequence[RunFolder]) -> list[str]:
    """What to call runs: the shortest end of each one's path that is no other's of these.

    Args:
        runs: of different folders.
    """
    paths = [run.folder.resolve().parts for run in runs]
    lengths = [
        next(n for n in range(1, len(path) + 1) if [p[-n:] for p in paths].count(path[-n:]) == 1)
        for path in paths
    ]
    return [str(Path(*path[-n:])) for path, n in zip(paths, lengths, strict=True)]


def settings_that_differ(runs: Sequence[RunFolder]) -> dict[str, list[Any]]:
    """Config keys that are not the same in all runs, with each run's value, by dotted key.

    Left out is what says where a run was and not what it was.
    """
    ignored = ("OUTPUT_DIR", "MODEL.DEVICE", "DATALOADER.NUM_WORKERS")
    flat = [flat_settings(run.cfg) for run in runs]
    return {
        key: [settings.get(key) for settings in flat]
        for key in sorted({key for settings in flat for key in settings})
        if key not in ignored and any(s.get(key) != flat[0].get(key) for s in flat)
    }


def flat_settings(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """The values of a config by dotted key."""
    flat = {}
    for key, value in settings.items():
        if isinstance(value, dict):
            flat.update(flat_settings(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = value
    return flat
