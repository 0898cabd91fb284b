"""Small hooks that every training run of this package has, one class each."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode
from detectron2.engine import HookBase, hooks
from detectron2.utils import comm
from detectron2.utils.env import seed_all_rng
from detectron2.utils.events import EventStorage, EventWriter
from torch import nn

from repr_det.engine.files import read_records
from repr_det.engine.randomness import mixed_seed
from repr_det.method.modules import named_modules
from repr_det.method.ranks import from_first_rank_in_place, group_of, object_of_first_rank

logger = logging.getLogger(f"detectron2.{__name__}")

_NOT_RESULTS = {"iteration", "eta_seconds"}
"""Entries of a line of metrics.json that writers add."""

_WINDOW = 20
"""Iterations over which Detectron2's writers smooth."""


class SeedEveryStep(HookBase):
    """Makes every random draw of a step a function of seed, iteration and rank.

    Args:
        seed: of the run.
    """

    def __init__(self, seed: int) -> None:
        self._seed = seed

    def before_step(self) -> None:
        """Seed Python, NumPy and torch, GPUs included."""
        seed_all_rng(mixed_seed(self._seed, self.trainer.iter, comm.get_rank()))


class SharedStatistics(HookBase):
    """Copies the first process's statistics to all before an evaluation and before a checkpoint.

    Buffers and loss normalisers differ between processes, and a checkpoint holds the first one's.
    Without this hook, it would evaluate and resume differently from the run that wrote it.
    """

    def __init__(self, cfg: CfgNode) -> None:
        self._periods = (cfg.SOLVER.CHECKPOINT_PERIOD, cfg.TEST.EVAL_PERIOD)

    def after_step(self) -> None:
        """Copy them where a later hook evaluates or saves."""
        done = self.trainer.iter + 1
        if done == self.trainer.max_iter or any(p > 0 and done % p == 0 for p in self._periods):
            model = self.trainer.model
            from_first_rank_in_place(model.buffers(), group_of(model))
            set_loss_normalizers(
                model, object_of_first_rank(loss_normalizers(model), group_of(model))
            )


class RecordKeeper(HookBase):
    """Makes the record of a resumed run the same as without the interruption. Register it last.

    Checkpoints hold the scalars of the smoothing windows. On resumption, lines of ``metrics.json``
    that were written after the checkpoint are removed. Then the hooks that follow the checkpoint in
    the same iteration run: the writers, and the evaluation, unless its result is recorded.

    Args:
        metrics: path of ``metrics.json``.
    """

    def __init__(self, metrics: Path) -> None:
        self._metrics = metrics
        self._begin = 0
        self._state: dict[str, Any] = {}

    def state_dict(self) -> dict[str, Any]:
        """The scalars of the last window, and the last iteration that was written."""
        storage = getattr(self.trainer, "storage", None)
        if storage is None:
            return {}
        scalars = {}
        for name, history in storage.histories().items():
            values = [
                [value, iteration]
                for value, iteration in history.values()
                if iteration > storage.iter - _WINDOW
            ] or [list(history.values()[-1])]
            scalars[name] = {"values": values, "smooth": storage.smoothing_hints()[name]}
        written = max((writer._last_write for writer in self._writers()), default=-1)
        return {"scalars": scalars, "written": written, "begin": self._begin}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Keep the state until training starts, when there is a storage.

        Raises:
            UserError: ``metrics.json`` is not a record of training.
        """
        if self._metrics.is_file():
            read_records(self._metrics)
        self._state = state

    def before_train(self) -> None:
        """Restore the storage, and the record as it was when the checkpoint was written."""
        if not self._state or self.trainer.start_iter == 0:
            # An earlier run in the same folder may have left lines of its own.
            self._begin = self._metrics.stat().st_size if self._metrics.is_file() else 0
            return
        # The record may have been removed or replaced since.
        self._begin = _line_begin(self._metrics, self._state["begin"])
        storage, done = self.trainer.storage, self.trainer.start_iter - 1
        for name, entry in self._state["scalars"].items():
            for value, iteration in entry["values"]:
                storage.put_scalar(
                    name, value, smoothing_hint=entry["smooth"], cur_iter=int(iteration)
                )
        for writer in self._writers():
            writer._last_write = self._state["written"]
        dropped = []
        if self._writers():
            dropped = _drop_lines_after(self._metrics, self._state["written"], self._begin)
        # Only one process has the record, and all must do the same.
        dropped = comm.all_gather(dropped)[0]
        self._finish_iteration(storage, done, dropped)
        self._state = {}

    def _writers(self) -> list[EventWriter]:
        """The writers that keep the last iteration that they have written."""
        found = [h for h in self.trainer._hooks if isinstance(h, hooks.PeriodicWriter)]
        writers = [writer for hook in found for writer in hook._writers]
        return [w for w in writers if isinstance(getattr(w, "_last_write", None), int)]

    def _finish_iteration(
        self, storage: EventStorage, iteration: int, dropped: list[dict[str, Any]]
    ) -> None:
        """Run the hooks that come after the checkpointer, in the checkpoint's iteration."""
        self.trainer.iter = storage.iter = iteration
        for hook in self.trainer._hooks:
            if isinstance(hook, hooks.EvalHook):
                self._evaluate(hook, storage, iteration, dropped)
            elif isinstance(hook, hooks.PeriodicWriter):
                hook.after_step()
        self.trainer.iter = storage.iter = self.trainer.start_iter

    def _evaluate(
        self,
        hook: hooks.EvalHook,
        storage: EventStorage,
        iteration: int,
        dropped: list[dict[str, Any]],
    ) -> None:
        due = hook._period > 0 and (iteration + 1) % hook._period == 0
        if not due or iteration + 1 == self.trainer.max_iter:
            return
        at_checkpoint = {k for k, (_, at) in storage.latest().items() if at == iteration}
        recorded: dict[str, float] = {}
        for line in dropped:
            if line["iteration"] == iteration:
                recorded |= {k: v for k, v in line.items() if k not in at_checkpoint | _NOT_RESULTS}
        if not recorded:
            logger.info(f"The evaluation of iteration {iteration} was not recorded; it runs now.")
            hook.after_step()
            return
        storage.put_scalars(**recorded, smoothing_hint=False)


def _line_begin(path: Path, at: int) -> int:
    """``at`` if a line of the file begins or may follow there, in bytes; else 0."""
    if not path.is_file() or at > path.stat().st_size:
        return 0
    with open(path, "rb") as file:
        file.seek(at)
        return at if file.read(1) in (b"{", b"") else 0


def _drop_lines_after(path: Path, iteration: int, begin: int) -> list[dict[str, Any]]:
    """Remove lines of later iterations, and an unfinished one, from the end of a file in place.

    Args:
        path: of ``metrics.json``.
        iteration: the last one that stays.
        begin: where this run's lines begin in the file, in bytes.

    Returns:
        The removed lines that could be read.
    """
    if not path.is_file():
        return []
    keep, dropped = begin, []
    with open(path, "rb") as file:
        file.seek(begin)
        for raw in file:
            try:
                line = json.loads(raw)
            except ValueError:
                break
            if not raw.endswith(b"\n"):
                break
            if line["iteration"] > iteration:
                dropped.append(line)
            elif not dropped:
                keep += len(raw)
    # In place: the writer has the file open to append.
    os.truncate(path, keep)
    return dropped


class LossNormalizer(HookBase):
    """Saves the running loss normaliser of RetinaNet and FCOS, which is not in a buffer."""

    def state_dict(self) -> dict[str, float]:
        """The normaliser by the name of its module; empty before the first step."""
        return loss_normalizers(self.trainer.model)

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Set the normaliser of each module that is in the state."""
        set_loss_normalizers(self.trainer.model, state)


def loss_normalizers(model: nn.Module) -> dict[str, float]:
    """The running loss normaliser of RetinaNet and FCOS by the name of its module."""
    return {
        name: float(module.loss_normalizer)  # type: ignore[arg-type]
        for name, module in named_modules(model)
        # In keypoint heads it is a string, the kind of normaliser.
        if not isinstance(getattr(module, "loss_normalizer", ""), str)
    }


def set_loss_normalizers(model: nn.Module, values: dict[str, float]) -> None:
    """Set the running loss normaliser of each module that is named."""
    for name, module in named_modules(model):
        if name in values:
            module.loss_normalizer = values[name]  # type: ignore[assignment]
