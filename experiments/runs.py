"""Run what a table still lacks, and record every run as one JSON file."""

from __future__ import annotations

import json
import logging
import math
import shlex
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import portalocker
import yaml
from detectron2.config import CfgNode
from detectron2.engine import HookBase
from detectron2.engine.hooks import PeriodicCheckpointer
from detectron2.utils.env import seed_all_rng
from tqdm import tqdm

from experiments.correlation import oracle_correlations
from experiments.summarise import MEASURES, Measure, Record
from experiments.tables import RECORDS, Row, Table
from repr_det.engine.allocator import keep_freed_memory
from repr_det.engine.checkpoint import has_run
from repr_det.engine.config import config_path, flat_settings
from repr_det.engine.environment import environment
from repr_det.engine.files import write_text_whole
from repr_det.errors import UserError
from repr_det.report.run import FINAL, read_metrics
from repr_det.tasks import get_cfg, trainer_for

FULL, QUICK = "full", "quick"
QUICK_SHARE = 0.1
"""The shortened runs have this share of all lengths."""

DEFAULT_OUTPUT = Path("output/reproduce")

_NO_SETTINGS = ("OUTPUT_DIR", "MODEL.DEVICE", "DISTILL.WEIGHTS")
"""Keys that say where a run was and not what it was."""

_LENGTHS = (
    "SOLVER.MAX_ITER", "SOLVER.STEPS", "SOLVER.WARMUP_ITERS", "SOLVER.CYCLE_ITERS",
    "SOLVER.CHECKPOINT_PERIOD", "DSD.DENSE_ITERS", "DSD.SPARSE_ITERS", "REPR.S1", "REPR.S2",
    "REPR.WARMUP",
)  # fmt: skip
"""Keys that are in iterations once :meth:`RePrTrainer.in_iterations` has seen them."""


@dataclass(frozen=True)
class Run:
    """A row with a seed: what is to be trained, and where it is.

    Attributes:
        table: the whole table.
        row: of the table.
        seed: of weights, data order, new filters and random ranking.
        scale: :data:`FULL` or :data:`QUICK`.
        output: folder of all tables.
        cfg: the config.
        resolved: the config with every length in iterations.
        images: size of the training set.
    """

    table: Table
    row: Row
    seed: int
    scale: str
    output: Path
    cfg: CfgNode
    resolved: CfgNode
    images: int

    @property
    def folder(self) -> Path:
        """The run's ``OUTPUT_DIR``."""
        return Path(self.cfg.OUTPUT_DIR)

    @property
    def record_path(self) -> Path:
        """The run's record."""
        return self.folder.with_suffix(".json")

    @property
    def checkpoint(self) -> Path:
        """The trained network."""
        return self.folder / FINAL

    @property
    def max_iter(self) -> int:
        """Length in iterations."""
        return self.resolved.SOLVER.MAX_ITER

    @property
    def measure(self) -> Measure:
        """What it is judged by."""
        return MEASURES[self.table.metric]


def table_folder(output: Path, table: Table, scale: str) -> Path:
    """Where a table's runs, records and Markdown are."""
    return output / (table.name if scale == FULL else f"{table.name}-{scale}")


def run_folder(output: Path, table: Table, row: str, seed: int, scale: str) -> Path:
    """``OUTPUT_DIR`` of a run."""
    return table_folder(output, table, scale) / row / f"seed_{seed}"


def row_cfg(row: Row, seed: int) -> CfgNode:
    """The config of a row for a seed."""
    cfg = get_cfg()
    cfg.merge_from_file(config_path(row.config))
    cfg.merge_from_list([part for pair in row.overrides.items() for part in pair])
    # Standard training ignores the second: initial weights and data order of a seed are
    # those of RePr, and runs with one seed are pairs.
    cfg.SEED = cfg.REPR.SEED = seed
    return cfg


def plan(table: Table, row: Row, seed: int, scale: str, output: Path) -> Run:
    """What a row and a seed ask for; reads the data.

    Raises:
        UserError: a mistake in config or data, or data not found.
    """
    cfg = row_cfg(row, seed)
    if row.teacher:
        teacher = run_folder(output, table, row.teacher, seed + row.teacher_seed, scale)
        cfg.DISTILL.WEIGHTS = str(teacher / FINAL)
    cfg.OUTPUT_DIR = str(run_folder(output, table, row.name, seed, scale))
    if scale == QUICK:
        cfg = shortened(cfg, table.quick_images)
    trainer = trainer_for(cfg)
    trainer.check_to_train(cfg)
    resolved, images = trainer.in_iterations(cfg), trainer.training_images(cfg)
    return Run(table, row, seed, scale, output, cfg, resolved, images)


def shortened(cfg: CfgNode, images: int) -> CfgNode:
    """A config with fewer training images, and every length a tenth.

    The images that are left out become held-out ones, so they are the same for all seeds and rows.
    Evaluates at the end only.

    Args:
        cfg: not changed.
        images: maximum number of training images; ``DATASETS.TRAIN_SHARE`` of these are used.

    Returns:
        Lengths in iterations.
    """
    trainer = trainer_for(cfg)
    cfg, every = cfg.clone(), cfg.clone()
    every.DATASETS.HELD_OUT, every.DATASETS.TRAIN_SHARE, every.DATASETS.TEST = 0, 1.0, ()
    trainer.check_to_train(every)
    left_out = trainer.training_images(every) - images
    cfg.DATASETS.HELD_OUT = max(cfg.DATASETS.HELD_OUT, left_out)
    cfg.TEST.EVAL_EPOCHS = cfg.TEST.EVAL_PERIOD = 0
    cfg = trainer.in_iterations(cfg)
    lengths = flat_settings(cfg)
    cfg.merge_from_list([part for key in _LENGTHS for part in (key, _scaled(lengths[key]))])
    return cfg


def _scaled(length: int | tuple[int, ...]) -> int | tuple[int, ...]:
    if isinstance(length, tuple):
        return tuple(_scaled(part) for part in length)
    return math.ceil(round(length * QUICK_SHARE, 6))


def settings_of(cfg: CfgNode) -> dict[str, Any]:
    """A config as plain data."""
    return yaml.safe_load(cfg.dump())


def differences(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """Values of the new settings that differ from the old ones, by dotted key.

    Keys that only one of them has do not count: versions differ in what can be set.
    """
    before, after = flat_settings(old), flat_settings(new)
    return {
        key: value
        for key, value in after.items()
        if key in before and before[key] != value and key not in _NO_SETTINGS
    }


def _check_settings(found: dict[str, Any], wanted: CfgNode, where: Path) -> None:
    """Refuse to take a run for another one.

    Raises:
        UserError: names the settings that differ.
    """
    other = differences(found, settings_of(wanted))
    if other:
        keys = ", ".join(f"{key} (wanted {value})" for key, value in list(other.items())[:4])
        raise UserError(
            f"{where} is of a run with other settings, {keys}. Move it away, or set "
            "another --output."
        )


def _portable(run: Run, cfg: CfgNode) -> CfgNode:
    """The config with the paths that it would have below the default output folder."""
    cfg = cfg.clone()
    cfg.defrost()
    for node, key in ((cfg, "OUTPUT_DIR"), (cfg.DISTILL, "WEIGHTS")):
        path = Path(node[key])
        if path.is_relative_to(run.output):
            node[key] = (DEFAULT_OUTPUT / path.relative_to(run.output)).as_posix()
    return cfg


def _overrides(run: Run) -> list[str]:
    """KEY, VALUE, ... that make the run's config from its config file."""
    base = get_cfg()
    base.merge_from_file(config_path(run.row.config))
    portable = settings_of(_portable(run, run.cfg))
    flat = flat_settings(portable)
    changed = differences(settings_of(base), portable)
    for key in ("SEED", *(("DISTILL.WEIGHTS",) if run.row.teacher else ()), "OUTPUT_DIR"):
        changed[key] = flat[key]
    return [part for key, value in changed.items() for part in (key, str(value))]


def _header(run: Run) -> Record:
    """The part of a record that is known before the run."""
    overrides = _overrides(run)
    command = ["tools/train_net.py", "--config", run.row.config, *overrides]
    return {
        "table": run.table.name,
        "row": run.row.name,
        "scale": run.scale,
        "seed": run.seed,
        "command": shlex.join(command),
        "config": run.row.config,
        "overrides": overrides,
        "settings": settings_of(_portable(run, run.resolved)),
        "training_images": run.images,
    }


def read_evaluations(run: Run, folder: Path) -> dict[str, list[dict[str, float]]]:
    """What a run evaluated, by dataset.

    Returns:
        For each evaluation the iterations and epochs done, the measure's metrics (those that there
        are), and of classifiers ``train_top1``: accuracy on the training batches of the epoch
        before it, a mean of medians over 20 iterations.
    """
    metrics = read_metrics(folder)
    names = list(run.cfg.DATASETS.TEST)
    epoch = run.images / run.cfg.SOLVER.IMS_PER_BATCH
    found = {}
    for name in names:
        prefix = "" if len(names) == 1 else f"{name}/"
        columns = {f"{prefix}{metric}": key for key, metric in run.measure.metrics.items()}
        values = metrics[[c for c in columns if c in metrics]].rename(columns=columns)
        values = values.dropna(how="all")
        # The evaluation after training is written with the iteration after the last.
        values.index = (values.index.astype(int) + 1).where(
            values.index < run.max_iter, run.max_iter
        )
        found[name] = []
        for done, row in values.groupby(level=0).last().iterrows():
            entry = {"iteration": int(done), "epoch": round(done / epoch, 2)}
            entry |= row.dropna().to_dict()
            if "train/top1" in metrics:
                training = metrics["train/top1"].loc[done - epoch : done - 1].dropna()
                if len(training):
                    entry["train_top1"] = round(float(training.mean()), 3)
            found[name].append(entry)
    return found


class RunClock(HookBase):
    """Advances a progress bar and adds up a run's time over its interruptions.

    Time is kept in the checkpoint; work that was lost with an interruption does not count.

    Args:
        bar: advanced by one an iteration.
    """

    def __init__(self, bar: tqdm) -> None:
        self._bar = bar
        self._wall = -time.perf_counter()
        self._cpu = -time.process_time()

    @property
    def seconds(self) -> dict[str, float]:
        """Wall-clock time, and time of all processor threads."""
        return {
            "wall_seconds": round(time.perf_counter() + self._wall, 1),
            "cpu_seconds": round(time.process_time() + self._cpu, 1),
        }

    def after_step(self) -> None:
        """One more iteration."""
        self._bar.update()

    def state_dict(self) -> dict[str, float]:
        """Time until now."""
        return self.seconds

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Add the time before the interruption."""
        self._wall += state["wall_seconds"]
        self._cpu += state["cpu_seconds"]


@contextmanager
def _logged_to(path: Path) -> Iterator[None]:
    """Send Detectron2's log lines and what pycocotools prints to a file, not to the console."""
    loggers = [logging.getLogger(name) for name in ("detectron2", "fvcore")]
    before = [(log.level, log.propagate, log.handlers) for log in loggers]
    handler = logging.FileHandler(path)
    handler.setFormatter(logging.Formatter("%(asctime)s %(name)s: %(message)s"))
    for log in loggers:
        log.setLevel(logging.INFO)
        log.propagate, log.handlers = False, [handler]
    try:
        with redirect_stdout(handler.stream):
            yield
    finally:
        handler.close()
        for log, (level, propagate, handlers) in zip(loggers, before, strict=True):
            log.setLevel(level)
            log.propagate, log.handlers = propagate, handlers


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Make a folder, and keep other processes from training in it.

    Raises:
        UserError: another process does.
    """
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with portalocker.Lock(folder / ".lock", timeout=0, fail_when_locked=True):
            yield
    except portalocker.AlreadyLocked as error:
        raise UserError(f"Another process trains in {folder}. Let it end.") from error


def execute(run: Run, bar: tqdm) -> Record:
    """Train a run, going on from its last checkpoint if there is one, and make its record.

    A loss that is not finite ends the run; the record says so under ``"diverged"``.

    Raises:
        UserError: the folder holds a run with other settings.
    """
    folder, cfg = run.folder, run.cfg.clone()
    cfg.freeze()
    if has_run(cfg.OUTPUT_DIR):
        found = yaml.safe_load((folder / "config.yaml").read_text())
        _check_settings(found, cfg, folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_text_whole(folder / "config.yaml", cfg.dump())
    record = _header(run) | environment(cfg.MODEL.DEVICE)
    with _logged_to(folder / "log.txt"):
        clock = RunClock(bar)
        seed_all_rng(cfg.SEED)
        if cfg.MODEL.DEVICE == "cpu":
            keep_freed_memory()
        trainer = trainer_for(cfg)(cfg)
        trainer.register_hooks([clock])
        for hook in trainer._hooks:
            if isinstance(hook, PeriodicCheckpointer):
                hook.max_to_keep = 2
        trainer.resume_or_load(resume=True)
        bar.update(trainer.start_iter)
        try:
            trainer.train()
        except FloatingPointError as error:
            record["diverged"] = str(error)
        if run.table.correlates and "diverged" not in record:
            record["correlations"] = oracle_correlations(trainer)
    return record | clock.seconds | {"evaluations": read_evaluations(run, folder)}


def write_record(path: Path, record: Record) -> None:
    """Write a record whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text_whole(path, json.dumps(record, indent=1, allow_nan=False) + "\n")


def read_records(table: Table, scale: str, output: Path) -> list[Record]:
    """What is recorded of a table's rows, all seeds."""
    folder = table_folder(output, table, scale)
    return [
        read_record(path)
        for row in table.rows
        for path in sorted((folder / row.name).glob(RECORDS))
    ]


def read_record(path: Path) -> Record:
    """A record of a run.

    Raises:
        UserError: the file is not one, or holds no evaluation.
    """
    try:
        record = json.loads(path.read_text())
        if record["evaluations"] or "diverged" in record:
            return record
    except (ValueError, KeyError, TypeError):
        pass
    raise UserError(f"{path} is no record of a run. Delete it to train the run again.")


def _recorded(run: Run) -> bool:
    """Whether a run is recorded, here or with the same settings in another table.

    What another table recorded is copied, unless the trained network itself is needed.
    """
    if run.record_path.is_file():
        found = read_record(run.record_path)["settings"]
        _check_settings(found, run.resolved, run.record_path)
        return True
    if run.table.correlates:
        return False
    wanted = settings_of(run.resolved)
    for path in sorted(run.output.glob(f"*/*/{run.record_path.name}")):
        record = read_record(path)
        if record["scale"] == run.scale and not differences(record["settings"], wanted):
            write_record(run.record_path, record | _header(run))
            return True
    return False


def missing(runs: Sequence[Run]) -> list[Run]:
    """Runs to train: those that are not recorded, and their teachers that were not trained."""
    new = [run for run in runs if not _recorded(run)]
    needed = {run.cfg.DISTILL.WEIGHTS for run in new if run.row.teacher}
    paths = {run.record_path for run in new} | {
        run.record_path
        for run in runs
        if str(run.checkpoint) in needed and not run.checkpoint.is_file()
    }
    return [run for run in runs if run.record_path in paths]
