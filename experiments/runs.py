"""Run what a table still lacks, and record every run as one JSON file."""

from __future__ import annotations

import fcntl
import filecmp
import json
import logging
import math
import os
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from detectron2.config import CfgNode
from detectron2.engine import HookBase
from detectron2.engine.hooks import PeriodicCheckpointer
from detectron2.utils.env import seed_all_rng
from tqdm import tqdm

from experiments.correlation import oracle_correlations
from experiments.measures import MEASURES, Measure, Record
from experiments.summary import table_in_markdown
from experiments.tables import Row, Table
from repr_det.classification.together import Together, common_settings, obstacle
from repr_det.engine.allocator import keep_freed_memory
from repr_det.engine.config import config_path
from repr_det.engine.environment import environment
from repr_det.engine.files import write_text_whole
from repr_det.engine.trainer import has_run
from repr_det.errors import UserError
from repr_det.report.run import flat_settings, read_metrics, training_seconds
from repr_det.tasks import get_cfg, trainer_for

FULL, QUICK = "full", "quick"
QUICK_SHARE = 0.1
"""The shortened runs have this share of all lengths."""

DEFAULT_OUTPUT = Path("output/reproduce")

CHECKPOINT, LOG = "model_final.pth", "log.txt"

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
    """A row with a seed: what is to be trained, and where it lies.

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
        return self.folder / CHECKPOINT

    @property
    def max_iter(self) -> int:
        """Length in iterations."""
        return self.resolved.SOLVER.MAX_ITER

    @property
    def measure(self) -> Measure:
        """What it is judged by."""
        return MEASURES[self.table.metric]


def table_folder(output: Path, table: Table, scale: str) -> Path:
    """Where a table's runs, records and Markdown lie."""
    return output / (table.name if scale == FULL else f"{table.name}-{scale}")


def run_folder(output: Path, table: Table, row: str, seed: int, scale: str) -> Path:
    """``OUTPUT_DIR`` of a run."""
    return table_folder(output, table, scale) / row / f"seed_{seed}"


def row_cfg(row: Row, seed: int) -> CfgNode:
    """The config of a row for a seed."""
    cfg = get_cfg()
    cfg.merge_from_file(config_path(row.config))
    cfg.merge_from_list(list(row.overrides))
    # Standard training takes no notice of the second: initial weights and data order of a seed are
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
        cfg.DISTILL.WEIGHTS = str(teacher / CHECKPOINT)
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
        images: at most so many training images, of which ``DATASETS.TRAIN_SHARE`` is taken.

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
    for key in _LENGTHS:
        *path, name = key.split(".")
        node = cfg
        for part in path:
            node = node[part]
        node[name] = _scaled(node[name])
    return cfg


def _scaled(length: int | tuple[int, ...]) -> int | tuple[int, ...]:
    if isinstance(length, tuple):
        return tuple(_scaled(part) for part in length)
    return math.ceil(round(length * QUICK_SHARE, 6))


def _settings(cfg: Any) -> Any:
    """A config as plain data, equal to what a dump of it reads as."""
    if isinstance(cfg, dict):
        return {key: _settings(value) for key, value in cfg.items()}
    return [_settings(value) for value in cfg] if isinstance(cfg, tuple | list) else cfg


def _differences(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
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
    other = _differences(found, _settings(wanted))
    if other:
        keys = ", ".join(f"{key} (wanted {value})" for key, value in list(other.items())[:4])
        raise UserError(
            f"{where} is of a run with other settings, {keys}: move it away, or give another "
            "--output."
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
    portable = _settings(_portable(run, run.cfg))
    flat = flat_settings(portable)
    changed = _differences(_settings(base), portable)
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
        "settings": _settings(_portable(run, run.resolved)),
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
    undefined = run.measure.undefined
    epoch = run.images / run.cfg.SOLVER.IMS_PER_BATCH
    found: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    for name, entries in found.items():
        prefix = "" if len(names) == 1 else f"{name}/"
        by_done: dict[int, dict[str, float]] = {}
        for key, metric in run.measure.metrics.items():
            for iteration, value in zip(*metrics.get(prefix + metric, ((), ())), strict=True):
                # The evaluation after training is written with the iteration behind the last.
                done = min(int(iteration) + 1, run.max_iter)
                finite = math.isfinite(value)
                by_done.setdefault(done, {})[key] = float(value) if finite else undefined
        for done, values in sorted(by_done.items()):
            entry = {"iteration": done, "epoch": round(done / epoch, 2), **values}
            if "train/top1" in metrics:
                iterations, training = metrics["train/top1"]
                training = training[(done - epoch <= iterations) & (iterations < done)]
                if len(training):
                    entry["train_top1"] = round(float(training.mean()), 3)
            entries.append(entry)
    return found


class RunClock(HookBase):
    """Advances a progress bar and adds up a run's time over its interruptions.

    Time is kept in the checkpoint; work that was lost with an interruption does not count.

    Args:
        bar: advanced by one an iteration.
        measure: whose first column the bar shows.
    """

    def __init__(self, bar: tqdm, measure: Measure) -> None:
        self._bar, self._measure = bar, measure
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
        metric = self._measure.metrics[self._measure.columns[0].name]
        for name in (metric, f"{self.trainer.cfg.DATASETS.TEST[-1]}/{metric}"):
            if name in self.trainer.storage.latest():
                value, _ = self.trainer.storage.latest()[name]
                self._bar.set_postfix_str(self._measure.printed.format(value), refresh=False)

    def state_dict(self) -> dict[str, float]:
        """Time until now."""
        return self.seconds

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Add the time before the interruption."""
        self._wall += state["wall_seconds"]
        self._cpu += state["cpu_seconds"]


@contextmanager
def _logged_to(path: Path) -> Iterator[None]:
    """Detectron2's log lines, and what pycocotools prints, go to a file instead of the console."""
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


def _prepare_folder(run: Run) -> None:
    """Make a run's folder; what is in it stays."""
    run.folder.mkdir(parents=True, exist_ok=True)
    (run.folder / "config.yaml").write_text(run.cfg.dump())


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
    _prepare_folder(run)
    record = _header(run) | environment(cfg.MODEL.DEVICE)
    with _logged_to(folder / LOG):
        clock = RunClock(bar, run.measure)
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


def execute_together(runs: Sequence[Run], bar: tqdm) -> list[Record]:
    """Train several runs at once from their beginning, and make their records.

    A record says under ``"together"`` how many runs there were; its times are an equal share of
    what all of them took.

    Args:
        runs: what :func:`repr_det.classification.together.Together` can train, without checkpoints.
        bar: advanced by every run's iterations.

    Raises:
        UserError: the GPU's memory does not hold so many; whatever the runs' own trainers refuse.
    """
    start = time.perf_counter(), time.process_time()
    for run in runs:
        _prepare_folder(run)
    try:
        together = Together(
            [run.resolved for run in runs], lambda cfg: _logged_to(Path(cfg.OUTPUT_DIR) / LOG)
        )
        together.train(lambda iterations: bar.update(iterations * len(runs)))
    except torch.cuda.OutOfMemoryError as error:
        raise UserError(
            f"{len(runs)} runs at once need more memory than the GPU has: give a smaller "
            "--together."
        ) from error
    seconds = time.perf_counter() - start[0], time.process_time() - start[1]
    shares = {
        key: round(value / len(runs), 1)
        for key, value in zip(("wall_seconds", "cpu_seconds"), seconds, strict=True)
    }
    records = []
    for run, network in zip(runs, together.networks, strict=True):
        record = _header(run) | environment(run.cfg.MODEL.DEVICE) | {"together": len(runs)}
        if network.diverged is not None:
            record["diverged"] = network.diverged
        records.append(record | shares | {"evaluations": read_evaluations(run, run.folder)})
    return records


def write_record(path: Path, record: Record) -> None:
    """Write a record whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text_whole(path, json.dumps(record, indent=1, allow_nan=False) + "\n")


def read_records(table: Table, scale: str, output: Path) -> list[Record]:
    """What is recorded of a table's rows, all seeds."""
    folder = table_folder(output, table, scale)
    return [
        json.loads(path.read_text())
        for row in table.rows
        for path in sorted((folder / row.name).glob("seed_*.json"))
    ]


def _recorded(run: Run) -> bool:
    """Whether a run is recorded, here or with the same settings in another table.

    What another table recorded is copied, unless the trained network itself is needed.
    """
    if run.record_path.is_file():
        found = json.loads(run.record_path.read_text())["settings"]
        _check_settings(found, run.resolved, run.record_path)
        return True
    if run.table.correlates:
        return False
    wanted = _settings(run.resolved)
    for path in sorted(run.output.glob(f"*/*/{run.record_path.name}")):
        record = json.loads(path.read_text())
        if record["scale"] == run.scale and not _differences(record["settings"], wanted):
            write_record(run.record_path, record | _header(run))
            return True
    return False


def _missing(runs: Sequence[Run]) -> list[Run]:
    """What is to be trained: what is not recorded, and the teachers of it that are not there."""
    missing = [run for run in runs if not _recorded(run)]
    needed = {run.cfg.DISTILL.WEIGHTS for run in missing if run.row.teacher}
    paths = {run.record_path for run in missing} | {
        run.record_path
        for run in runs
        if str(run.checkpoint) in needed and not run.checkpoint.is_file()
    }
    return [run for run in runs if run.record_path in paths]


def write_table(table: Table, scale: str, output: Path) -> str:
    """Write ``table.md``, all of its rows, from what is recorded; returns the given rows' text."""

    def text(of: Table) -> str:
        return table_in_markdown(of, scale == QUICK, read_records(of, scale, output))

    path = table_folder(output, table, scale) / "table.md"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text(table.whole or table))
    return text(table)


def batches(runs: Sequence[Run], together: int) -> tuple[list[list[Run]], list[str]]:
    """Which runs are trained at once.

    Args:
        runs: what is to be trained; whatever a run needs stands before it.
        together: at most so many at once.

    Returns:
        All of the runs in batches, in an order that keeps that, and a sentence for each reason why
        some of them are trained alone.
    """
    if together == 1:
        return [[run] for run in runs], []
    found: list[list[Run]] = []
    latest: dict[str, list[Run]] = {}
    obstacles: dict[str, str | None] = {}
    alone: dict[str, list[str]] = {}
    for run in runs:
        key = common_settings(run.resolved)
        if key not in obstacles:
            obstacles[key] = obstacle(run.resolved)
        reason = obstacles[key]
        if run.table.correlates:
            reason = "the table looks into the trained network"
        elif has_run(str(run.folder)):
            reason = "it goes on from its checkpoint"
        if reason is not None:
            alone.setdefault(reason, []).append(f"{run.row.name} seed {run.seed}")
            found.append([run])
        elif key in latest and len(latest[key]) < together:
            # Before its turn: only students need other runs, and they are trained alone.
            latest[key].append(run)
        else:
            latest[key] = [run]
            found.append(latest[key])
    sentences = [
        f"Trained alone, because {reason}: {', '.join(names)}." for reason, names in alone.items()
    ]
    return found, sentences


def reproduce(
    table: Table, seeds: Sequence[int], scale: str, output: Path, together: int = 1
) -> str:
    """Train and record what is missing of a table, and write the table.

    May be stopped at any moment; called again, it goes on with the run that was stopped, while
    runs that were trained at once start again. The table is written anew after every run. Several
    processes may share the work: none trains a run that another is at.

    Args:
        table: which.
        seeds: one run of each row for each of them.
        scale: :data:`FULL` or :data:`QUICK`.
        output: folder of all tables.
        together: at most so many runs are trained at once.

    Returns:
        The table in Markdown.

    Raises:
        UserError: before anything is trained, a mistake in config or
            data, data that is not there, or records of other settings.
    """
    wanted = [(row, seed) for seed in seeds for row in table.rows]
    wanted += [
        (table.row(row.teacher), seed + row.teacher_seed)
        for row, seed in wanted
        if row.teacher_seed and seed + row.teacher_seed not in seeds
    ]
    # Teachers first: they may be of a later seed.
    wanted.sort(key=lambda pair: pair[0].teacher is not None)
    runs = [plan(table, row, seed, scale, output) for row, seed in wanted]
    missing = _missing(runs)
    planned, sentences = batches(missing, together)
    quiet = 0.5 if sys.stderr.isatty() else 30.0
    total = sum(run.max_iter for run in missing)
    with tqdm(total=total, unit="it", mininterval=quiet, disable=not missing) as bar:
        for sentence in sentences:
            bar.write(sentence, file=sys.stderr)
        number = 0
        for batch in _one_process_each(planned):
            first, number = number + 1, number + len(batch)
            numbers = f"run {first}" if len(batch) == 1 else f"runs {first}-{number}"
            name = f"{batch[0].row.name} seed {batch[0].seed}"
            more = f" and {len(batch) - 1} more" if len(batch) > 1 else ""
            bar.set_description(f"{numbers}/{len(missing)} {name}{more}")
            bar.set_postfix_str("", refresh=False)
            records = execute_together(batch, bar) if len(batch) > 1 else [execute(batch[0], bar)]
            for run, record in zip(batch, records, strict=True):
                write_record(run.record_path, record)
                value = run.measure.value(record)
                outcome = "diverged" if value is None else run.measure.printed.format(value)
                bar.write(
                    f"{table.name} {run.row.name} seed {run.seed}: {outcome}, "
                    f"{record['wall_seconds']:.0f} s",
                    file=sys.stderr,
                )
            write_table(table, scale, output)
    return write_table(table, scale, output)


def _one_process_each(planned: Sequence[list[Run]]) -> Iterator[list[Run]]:
    """The batches that are still to be trained, each while no other process trains one of its runs.

    What another process is at, or its student, comes last, and only what that process left undone.
    """
    had = {run.record_path for batch in planned for run in batch if run.record_path.is_file()}

    def done(run: Run) -> bool:
        """Whether it was trained since it was planned; of a teacher the network may be missing."""
        path = run.record_path
        return path.is_file() and (path not in had or run.checkpoint.is_file())

    later = []
    for wait, some in ((False, planned), (True, later)):
        for batch in some:
            with ExitStack() as locks:
                free = all([locks.enter_context(_lock(run.folder, wait)) for run in batch])
                taught = all(run.row.teacher is None or _teacher_is_there(run) for run in batch)
                if not wait and not (free and taught):
                    later.append(batch)
                elif left := [run for run in batch if not done(run)]:
                    yield left


def _teacher_is_there(run: Run) -> bool:
    return Path(run.cfg.DISTILL.WEIGHTS).is_file()


@contextmanager
def _lock(folder: Path, wait: bool) -> Iterator[bool]:
    """Hold a folder against other processes; whether it could be had, if not to be waited for.

    The system lets go of it when the process ends, however it does.
    """
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        yield False
    else:
        yield True
    finally:
        os.close(handle)


def _check_teacher(weights: Path, run: Run) -> None:
    """Refuse a run whose teacher is not the one of the table.

    Raises:
        UserError: it is another one, or either is not there to be compared.
    """
    own = Path(run.cfg.DISTILL.WEIGHTS)
    if run.row.teacher is None or weights == own:
        return
    if not all(path.is_file() and filecmp.cmp(path, own, shallow=False) for path in (own, weights)):
        raise UserError(
            f"Its teacher {weights} is not the one of this table, {own}: train with that one, or "
            f"let reproduce.py train the row."
        )


def import_run(
    source: Path, table: Table, row: Row, scale: str = FULL, output: Path = DEFAULT_OUTPUT
) -> Record:
    """Record a run of ``tools/train_net.py`` as one of a table.

    Wall-clock time is that of the training steps alone, from ``metrics.json``; versions and device
    are those of the process that imports.

    Args:
        source: its ``OUTPUT_DIR``.
        table: that the row is of.
        row: what it is a run of; the seed is the run's own.
        scale: of the row that it must equal.
        output: folder of all tables.

    Raises:
        UserError: no run there, or it has other settings than the row, or is not finished.
    """
    config = source / "config.yaml"
    if not config.is_file():
        raise UserError(
            f"{config} does not exist: give the OUTPUT_DIR of a run of tools/train_net.py."
        )
    found = yaml.safe_load(config.read_text())
    run = plan(table, row, found["SEED"], scale, output)
    _check_settings(found, run.cfg, source)
    _check_teacher(Path(found["DISTILL"]["WEIGHTS"]), run)
    evaluations = read_evaluations(run, source)
    done = max((e["iteration"] for es in evaluations.values() for e in es), default=0)
    if done < run.max_iter:
        raise UserError(
            f"{source} was evaluated up to iteration {done} of {run.max_iter}: import it when it "
            "is finished."
        )
    wall = training_seconds(read_metrics(source)) or 0.0
    record = (
        _header(run)
        | environment(run.cfg.MODEL.DEVICE)
        | {"wall_seconds": round(wall, 1), "cpu_seconds": None, "evaluations": evaluations}
    )
    write_record(run.record_path, record)
    write_table(table, scale, output)
    return record
