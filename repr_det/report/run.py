"""What a run left in its folder, finished or not."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd
from detectron2.config import CfgNode

from repr_det.detection.matching import Matches
from repr_det.engine import recording
from repr_det.engine.checkpoint import (
    iteration_of,
    last_checkpoint,
    numbered_checkpoints,
    read_checkpoint,
)
from repr_det.engine.config import config_path, flat_settings
from repr_det.engine.data import held_out_name
from repr_det.engine.files import read_records
from repr_det.engine.hook import STATE_KEY
from repr_det.engine.trained import merge_run_config
from repr_det.errors import UserError
from repr_det.report.metrics import KINDS, counted
from repr_det.tasks import get_cfg, task_of

FINAL, _LAST = "model_final.pth", "last_checkpoint"


def read_metrics(folder: str | Path) -> pd.DataFrame:
    """Read the scalars that Detectron2's ``JSONWriter`` wrote to ``metrics.json``.

    Where iterations repeat, because a run was resumed or restarted in the folder, only what the
    last run wrote is kept. A last line that was cut off is ignored.

    Returns:
        A column for each scalar, a row for each iteration, increasing. NaN where nothing was
        written, or what was written does not count; see :func:`repr_det.report.metrics.counted`.

    Raises:
        UserError: it is no record of training.
    """
    path = Path(folder) / "metrics.json"
    restarts: list[list[dict[str, float]]] = []
    last: dict[str, float] = {}
    for record in read_records(path) if path.is_file() else ():
        iteration = record.pop("iteration")
        # Lines are not in order, but those of one scalar are.
        if not restarts or any(last.get(name, iteration) > iteration for name in record):
            restarts.append([])
            last.clear()
        last |= dict.fromkeys(record, iteration)
        values = {
            name: counted(name, value)
            for name, value in record.items()
            if type(value) in (int, float)  # a hook of one's own may write text
        }
        restarts[-1].append({"iteration": iteration, **values})
    found = pd.DataFrame()
    for lines in restarts:
        new = pd.DataFrame(lines).groupby("iteration").last()
        found = pd.concat([found[found.index < new.index.min()], new]) if len(found) else new
    return found.astype(float).dropna(how="all")


def rate_steps(solver: Mapping[str, Any], end: int) -> list[float] | None:
    """Where the settings of the solver let the learning rate fall.

    Args:
        solver: the config's ``SOLVER``.
        end: only falls before it.

    Returns:
        Iterations; None for a schedule without steps, or with steps in epochs.
    """
    if solver["LR_SCHEDULER_NAME"] != "WarmupMultiStepLR" or solver.get("STEPS_EPOCHS", ()):
        return None
    return [float(step) for step in solver["STEPS"] if step < end]


def training_seconds(metrics: pd.DataFrame) -> float | None:
    """Wall-clock time of the training steps alone; None where no time was recorded.

    Each recorded time of a step stands for the iterations since the record before it.
    """
    if "time" not in metrics:
        return None
    seconds = metrics["time"].dropna()
    return float((seconds * seconds.index.to_series().diff().fillna(seconds.index[0] + 1)).sum())


@dataclass(frozen=True)
class RunFolder:
    """A run, read from its folder.

    Attributes:
        folder: its ``OUTPUT_DIR``.
        cfg: its config; ``MODEL.DEVICE`` is a device of this machine.
        metrics: its scalars, see :func:`read_metrics`.
        checkpoint: the one to look at; None for the newest.
        matches: cache of :func:`repr_det.report.compare.matches_of`, by IoU type.
    """

    folder: Path
    cfg: CfgNode
    metrics: pd.DataFrame
    checkpoint: Path | None = None
    matches: dict[str, Matches] = field(default_factory=dict, repr=False)

    @property
    def uses_repr(self) -> bool:
        """Whether it was trained with RePr, by its config or by a hook of the user's trainer."""
        return self.cfg.REPR.ENABLED or self.series("repr/phase") is not None

    @property
    def task(self) -> str:
        """See :func:`repr_det.tasks.task_of`."""
        return task_of(self.cfg)

    def series(self, name: str) -> pd.Series | None:
        """A scalar by iteration; None where it was never written."""
        found = self.metrics[name].dropna() if name in self.metrics else ()
        return found if len(found) else None

    @property
    def finished(self) -> bool:
        """Whether training came to its end, and was not restarted or prolonged since."""
        if self._newest or not (self.folder / FINAL).is_file():
            return self._newest == FINAL
        # It is not recorded what was written last, for example after a restart.
        return read_checkpoint(self.folder / FINAL).get("iteration", -1) + 1 == self.iterations

    @cached_property
    def _newest(self) -> str:
        """Name of the checkpoint that was written last; empty where that is not recorded."""
        return last_checkpoint(self.folder).name if (self.folder / _LAST).is_file() else ""

    @property
    def iterations(self) -> int:
        """How many iterations of training are recorded."""
        losses = self.series("total_loss")
        return 0 if losses is None else 1 + int(losses.index[-1])

    @property
    def spans(self) -> list[tuple[float, float]]:
        """Where the run trained the sub-network (S2), as half-open ranges of iterations."""
        try:
            drops, overlaps = self.history[1:] if self.history else ([], [])
        except UserError:  # damaged; said where the drops themselves are asked for
            return []
        if self.cfg.REPR.ENABLED and drops:
            # The first drop ends S1, so the ratio gives S2 in iterations whatever its unit.
            length = round(drops[0].iteration * self.cfg.REPR.S2 / self.cfg.REPR.S1)
            ends = [drop.iteration + length for drop in drops]
        elif overlaps:  # the schedule is in the user's code
            moments = [moment.iteration for moment in overlaps]
            ends = [min([m for m in moments if m > drop.iteration] or [math.inf]) for drop in drops]
        else:
            return []
        return [
            (drop.iteration, max(drop.iteration, min(end, self.iterations)))
            for drop, end in zip(drops, ends, strict=True)
        ]

    @property
    def rate_drops(self) -> list[float]:
        """Where the learning rate falls: the config's steps in iterations, else as was recorded."""
        if (steps := rate_steps(self.cfg.SOLVER, self.iterations)) is not None:
            return steps
        rates = self.series("lr")
        return [] if rates is None else rates.index[rates < 0.6 * rates.shift()].tolist()

    @property
    def test_set(self) -> str:
        """What it was evaluated on: the last of the config's test sets."""
        return self.cfg.DATASETS.TEST[-1] if self.cfg.DATASETS.TEST else ""

    @property
    def held_out(self) -> int:
        """How many training images the test set is made of; 0 for a test set of its own."""
        names = map(held_out_name, self.cfg.DATASETS.TRAIN)
        return self.cfg.DATASETS.HELD_OUT if self.test_set in names else 0

    def evaluations(self, metric: str) -> pd.Series | None:
        """An evaluated metric of the test set by iteration, e.g. ``bbox/AP``; None without any."""
        return self.series(f"{self._prefix}{metric}")

    def evaluated(self) -> list[str]:
        """Names of all metrics of the test set."""
        kinds = tuple(f"{self._prefix}{kind}/" for kind in KINDS)
        return [name.removeprefix(self._prefix) for name in self.metrics if name.startswith(kinds)]

    @property
    def _prefix(self) -> str:
        """Prefix of the test set's metrics: its name where there are several, else nothing."""
        kinds = tuple(f"{self.test_set}/{kind}/" for kind in KINDS)
        return f"{self.test_set}/" if any(n.startswith(kinds) for n in self.metrics) else ""

    @cached_property
    def checkpoints(self) -> list[Path]:
        """By increasing iteration, the final one last; none of an earlier run in the folder."""
        # Of runs without a record only the checkpoints are known.
        last = math.inf if self.metrics.empty else self.iterations - 1
        newest = iteration_of(self._newest)
        if newest is not None:
            last = min(last, newest)
        found = [path for number, path in numbered_checkpoints(self.folder) if number <= last]
        final = self.folder / FINAL
        return [*found, final] if self.finished and final.is_file() else found

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
        """What each drop took; None for a run without RePr, or without a record of its drops.

        Raises:
            UserError: the record or the newest checkpoint is damaged.
        """
        if not self.uses_repr:
            return None
        if (found := recording.read(self.folder)) is not None or not self.checkpoints:
            return found
        state = read_checkpoint(self.weights).get("trainer", {}).get("hooks", {}).get(STATE_KEY)
        return None if state is None else recording.of_state(state)


def read_run(folder: str | Path) -> RunFolder:
    """Read a run's config and scalars.

    Args:
        folder: its ``OUTPUT_DIR``.

    Raises:
        UserError: the folder holds no run, or its config cannot be read.
    """
    folder = Path(folder)
    path = folder / "config.yaml"
    if not path.is_file():
        raise UserError(f"{path} does not exist. Pass the OUTPUT_DIR of a run of `repr-det train`.")
    return RunFolder(folder, _read_config(path), read_metrics(folder))


def of_checkpoint(config: str, weights: Path) -> RunFolder:
    """A checkpoint and a config in the form of a run without records.

    Args:
        config: a path, or the bare name of a file in ``configs/``.
        weights: the checkpoint.

    Raises:
        UserError: one of them does not exist, or the config cannot be read.
    """
    path = Path(config_path(config))
    if not weights.is_file():
        raise UserError(f"{weights} does not exist. Set the path of a checkpoint.")
    return RunFolder(weights.parent, _read_config(path), pd.DataFrame(), weights)


def _read_config(path: Path) -> CfgNode:
    cfg = get_cfg()
    merge_run_config(cfg, path)
    return cfg


def short_names(runs: Sequence[RunFolder]) -> list[str]:
    """The shortest end of each run's path that no other of these paths ends with.

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

    Keys that say where or how fast a run was computed are left out.
    """
    ignored = ("OUTPUT_DIR", "MODEL.DEVICE", "DATALOADER.NUM_WORKERS")
    flat = [flat_settings(run.cfg) for run in runs]
    return {
        key: [settings.get(key) for settings in flat]
        for key in sorted({key for settings in flat for key in settings})
        if key not in ignored and any(s.get(key) != flat[0].get(key) for s in flat)
    }
