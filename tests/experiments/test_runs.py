"""Whole tables of tiny runs: recorded, stopped, resumed, skipped, imported."""

from __future__ import annotations

import json
import math
import shlex
from dataclasses import replace

import portalocker
import pytest
import torch
from detectron2.utils.env import seed_all_rng
from tqdm import tqdm

from experiments import runs
from experiments.__main__ import reproduce
from experiments.runs import FULL, QUICK, plan, read_records
from experiments.summarise import MEASURES
from experiments.tables import ACCURACY, only
from repr_det.cli import parse
from repr_det.errors import UserError
from repr_det.tasks import configure, trainer_for
from tests.experiments.settings import EPOCH, HELD_OUT, IMAGES, LENGTH, small_table, squeezed


@pytest.fixture
def table(tmp_path):
    return small_table(tmp_path)


@pytest.fixture
def output(tmp_path):
    return tmp_path / "output"


@pytest.mark.parametrize("content", ["{", "[]", '{"evaluations": {}}', "{}"])
def test_a_damaged_record_is_named(tmp_path, content):
    path = tmp_path / "seed_0.json"
    path.write_text(content)
    with pytest.raises(UserError, match="seed_0.json is no record of a run. Delete it"):
        runs.read_record(path)


def bar():
    return tqdm(disable=True)


class StopError(Exception):
    """What interrupts a run in these tests."""


@pytest.fixture
def stop_at(monkeypatch):
    """Interrupt the run after this many of all iterations."""
    original = runs.RunClock.after_step

    def stop_at(count):
        done = []

        def after_step(clock):
            original(clock)
            done.append(clock.trainer.iter)
            if len(done) == count:
                raise StopError

        monkeypatch.setattr(runs.RunClock, "after_step", after_step)
        return done

    return stop_at


def test_a_table_is_stopped_resumes_and_skips_what_is_recorded(table, output, stop_at, tmp_path):
    table = only(table, ["repr"])
    whole = reproduce(table, [0], FULL, tmp_path / "whole")

    stop = LENGTH + 2 * EPOCH + 5
    done = stop_at(stop)
    with pytest.raises(StopError):
        reproduce(table, [0], FULL, output)
    assert [(r["row"], r["seed"]) for r in read_records(table, FULL, output)] == [("standard", 0)]
    partial = (output / "small" / "table.md").read_text()
    assert "| RePr | 74 | not run | 0 |" in squeezed(partial)
    # The file has the rows that were not asked for, too.
    assert partial.count("not run") == len(table.whole.rows) - 1 > 1

    assert reproduce(table, [0], FULL, output) == whole
    # The stopped run went on after its checkpoint of epoch 2; nothing else ran twice.
    assert done[stop:] == [*range(2 * EPOCH, LENGTH)]
    for one, other in zip(
        read_records(table, FULL, tmp_path / "whole"),
        read_records(table, FULL, output),
        strict=True,
    ):
        assert _without_training(one) == _without_training(other)

    del done[:]
    assert reproduce(table, [0], FULL, output) == whole
    assert not done
    final = squeezed((output / "small" / "table.md").read_text()).splitlines()
    assert [line for line in final if "taught" not in line] == squeezed(whole).splitlines()


def _without_training(record):
    """Medians over 20 iterations begin again with a resumed run."""
    return [
        {key: value for key, value in entry.items() if key != "train_top1"}
        for entry in record["evaluations"]["small_test"]
    ]


def test_two_processes_do_not_train_one_table(table, output):
    folder = output / "small"
    folder.mkdir(parents=True)
    with (
        portalocker.Lock(folder / ".lock"),
        pytest.raises(UserError, match="Another process trains in .*small. Let it end."),
    ):
        reproduce(table, [0], FULL, output)
    assert not read_records(table, FULL, output)


def test_a_teacher_of_another_seed_is_trained_first(table, output):
    """As of a Born-Again network, which would begin as its teacher began."""
    taught = replace(table.row("taught"), teacher_seed=1)
    rows = tuple(taught if row.name == "taught" else row for row in table.rows)
    table = only(replace(table, rows=rows), ["taught"])
    reproduce(table, [0], FULL, output)
    found = [(r["row"], r["seed"]) for r in read_records(table, FULL, output)]
    assert (taught.teacher, 1) in found and ("taught", 0) in found
    record = json.loads((output / "small" / "taught" / "seed_0.json").read_text())
    assert f"{taught.teacher}/seed_1" in record["settings"]["DISTILL"]["WEIGHTS"]


def test_what_a_record_holds(table, output, tmp_path):
    reproduce(only(table, ["taught"]), [3], FULL, output)
    path = output / "small" / "taught" / "seed_3.json"
    text = path.read_text()
    assert str(output) not in text
    record = json.loads(text)
    assert (record["table"], record["row"], record["scale"], record["seed"]) == (
        "small", "taught", "full", 3,
    )  # fmt: skip
    assert record["training_images"] == IMAGES - HELD_OUT
    assert record["settings"]["SOLVER"]["MAX_ITER"] == LENGTH
    assert record["settings"]["REPR"]["S1"] == EPOCH
    assert record["versions"]["torch"] == torch.__version__
    assert {"python", "detectron2", "repr_det"} < set(record["versions"])
    assert record["device"] and record["wall_seconds"] > 0 and record["cpu_seconds"] > 0
    ((name, evaluations),) = record["evaluations"].items()
    assert name == "small_test"
    assert [e["iteration"] for e in evaluations] == [24, 48, 72]
    assert [e["epoch"] for e in evaluations] == [1, 2, 3]
    assert MEASURES[ACCURACY].value(record) == evaluations[-1]["top1"]
    assert all(0 <= e["train_top1"] <= 100 for e in evaluations)


def test_evaluations_are_read_from_metrics(table, output, tmp_path):
    """Written again by a resumed run, cut off by a kill, and after the last iteration."""
    run = plan(table, table.row("standard"), 0, FULL, output)
    lines = [
        {"iteration": 3, "train/top1": 50.0},
        {"iteration": 23, "train/top1": 60.0},
        {"iteration": 23, "accuracy/top1": 1.0, "accuracy/top5": 90.0, "accuracy/loss": 3.0},
        {"iteration": 43, "train/top1": 70.0},
        {"iteration": 23, "accuracy/top1": 40.0, "accuracy/top5": 99.0, "accuracy/loss": 2.0},
        {"iteration": 72, "accuracy/top1": 50.0, "accuracy/top5": 100.0, "accuracy/loss": math.inf},
    ]
    text = "\n".join(map(json.dumps, lines)) + '\n{"iteration": 71, "accur'
    (tmp_path / "metrics.json").write_text(text)
    assert runs.read_evaluations(run, tmp_path) == {
        "small_test": [
            {"iteration": 24, "epoch": 1.0, "top1": 40.0, "top5": 99.0, "loss": 2.0,
             "train_top1": 55.0},
            {"iteration": 72, "epoch": 3.0, "top1": 50.0, "top5": 100.0},
        ]
    }  # fmt: skip
    assert runs.read_evaluations(run, tmp_path / "nothing") == {"small_test": []}


def test_the_recorded_command_makes_the_same_config(table, output):
    for row in table.rows:
        run = plan(table, row, 2, QUICK, output)
        program, *arguments = shlex.split(runs._header(run)["command"])
        assert program == "tools/train_net.py"
        cfg = configure(parse(["train", *arguments]))
        assert not runs.differences(runs.settings_of(cfg), runs.settings_of(run.cfg))
        folder = "output/reproduce/small-quick/{}/seed_2"
        assert folder.format(row.name) == cfg.OUTPUT_DIR
        weights = folder.format(row.teacher) + "/model_final.pth" if row.teacher else ""
        assert weights == cfg.DISTILL.WEIGHTS


def test_pairs_share_initial_weights_and_data(table, output):
    """And other seeds share neither."""

    def start(row, seed):
        run = plan(table, table.row(row), seed, FULL, output)
        seed_all_rng(seed)
        trainer = trainer_for(run.cfg)(run.cfg)
        batches = iter(trainer.data_loader)
        return trainer.model.state_dict(), [next(batches) for _ in range(8)]

    weights, batches = start("standard", 1)
    same_weights, same_batches = start("repr", 1)
    other_weights, other_batches = start("repr", 2)
    assert weights.keys() == same_weights.keys()
    for name, value in weights.items():
        assert torch.equal(value, same_weights[name])
    assert not torch.equal(
        weights["network.features.0.weight"], other_weights["network.features.0.weight"]
    )
    for batch, same in zip(batches, same_batches, strict=True):
        assert torch.equal(batch["image"], same["image"])
        assert torch.equal(batch["label"], same["label"])
    assert not torch.equal(batches[0]["image"], other_batches[0]["image"])


def test_seeds_draw_other_new_filters(table, output):
    configs = [plan(table, table.row("repr"), seed, FULL, output).cfg for seed in (0, 1)]
    assert [cfg.REPR.SEED for cfg in configs] == [0, 1]


def test_quick_runs_are_shortened_in_proportion(tmp_path, output):
    table = small_table(tmp_path, quick_images=80)
    (tmp_path / "small.yaml").write_text(
        (tmp_path / "small.yaml").read_text()
        .replace("MAX_EPOCHS: 3", "MAX_EPOCHS: 30\n  STEPS_EPOCHS: (25,)")
        .replace("S1: 1, S2: 1", "S1: 12, S2: 6")
    )  # fmt: skip
    run = plan(table, table.row("repr"), 0, QUICK, output)
    assert run.images == 80 and run.cfg.DATASETS.HELD_OUT == 40
    keys = run.resolved
    assert (keys.SOLVER.MAX_ITER, keys.SOLVER.STEPS, keys.REPR.S1, keys.REPR.S2, keys.REPR.N) == (
        60, (50,), 24, 12, 1,
    )  # fmt: skip
    assert keys.TEST.EVAL_PERIOD == 0
    text = reproduce(only(table, ["repr"]), [0], QUICK, output)
    assert text.startswith("# A small table (SHORTENED RUNS)\n\n**Shortened: at most 80 training")
    (record,) = (r for r in read_records(table, QUICK, output) if r["row"] == "repr")
    assert len(record["evaluations"]["small_test"]) == 1


def test_another_table_with_equal_settings_needs_no_new_run(tmp_path, table, output, stop_at):
    done = stop_at(10**6)
    reproduce(only(table, ["repr"]), [0], FULL, output)
    del done[:]
    other = small_table(tmp_path, name="other")
    reproduce(only(other, ["repr"]), [0], FULL, output)
    assert not done
    record = json.loads((output / "other" / "repr" / "seed_0.json").read_text())
    assert record["table"] == "other" and "OUTPUT_DIR output/reproduce/other/" in record["command"]
    # The student's teacher is recorded, but its network is not there.
    reproduce(only(other, ["taught"]), [0], FULL, output)
    assert done == [*range(LENGTH), *range(LENGTH)]


def test_records_of_other_settings_are_not_taken(table, output, tmp_path):
    reproduce(only(table, ["standard"]), [0], FULL, output)
    config = tmp_path / "small.yaml"
    config.write_text(config.read_text().replace("BASE_LR: 0.01", "BASE_LR: 0.02"))
    with pytest.raises(ValueError, match=r"seed_0.json is of .* SOLVER.BASE_LR \(wanted 0.02\)"):
        reproduce(table, [0], FULL, output)
    (output / "small" / "standard" / "seed_0.json").unlink()
    with pytest.raises(ValueError, match=r"seed_0 is of a run with other settings"):
        reproduce(table, [0], FULL, output)


def test_missing_data_is_reported_before_anything_is_trained(tmp_path, output, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    table = small_table(tmp_path)
    row = table.rows[1]
    missing = row.__class__(
        "imagenet", "", None, row.config, {"DATASETS.TRAIN": ("imagenet_train",)}
    )
    with pytest.raises(UserError, match="imagenet.*DETECTRON2_DATASETS"):
        reproduce(table.__class__("t", "t", (row, missing)), [0], FULL, output)
    assert not output.exists()


def test_a_run_that_diverges_is_recorded_as_such(tmp_path, output):
    config = small_table(tmp_path).rows[0].config
    table = small_table(tmp_path)
    row = table.rows[0].__class__(
        "wild", "Wild", None, config, {"SOLVER.BASE_LR": 1e30, "REPR.ENABLED": False}
    )
    text = reproduce(table.__class__("wild", "Wild", (row,)), [0], FULL, output)
    assert "| Wild | diverged | 0 (1 more diverged) | |" in squeezed(text)
    record = json.loads((output / "wild" / "wild" / "seed_0.json").read_text())
    assert "inf" in record["diverged"] or "nan" in record["diverged"]


def test_time_adds_up_over_interruptions(table, output, stop_at):
    run = plan(table, table.row("standard"), 0, FULL, output)
    clock = runs.RunClock(bar())
    clock.load_state_dict({"wall_seconds": 1000.0, "cpu_seconds": 500.0})
    assert 1000 <= clock.seconds["wall_seconds"] < 1100
    assert 500 <= clock.seconds["cpu_seconds"] < 600
    stop_at(50)
    with pytest.raises(StopError):
        runs.execute(run, bar())
    state = torch.load(run.folder / "model_0000047.pth", weights_only=True)
    assert state["trainer"]["hooks"]["RunClock"]["wall_seconds"] > 0
    # Two checkpoints are kept.
    assert len(list(run.folder.glob("*.pth"))) == 2


def test_correlation_with_the_oracle(tmp_path, output, stop_at):
    table = small_table(tmp_path, correlates=True, paper_correlations={"ortho_paper": (0.58, 0.38)})
    done = stop_at(10**6)
    text = reproduce(only(table, ["standard"]), [0], FULL, output)
    (record,) = read_records(only(table, ["standard"]), FULL, output)
    layers = {"all layers", "network.features.3", "network.features.6"}
    assert set(record["correlations"]["taylor"]) == layers
    assert "oracle" not in record["correlations"]
    # Taylor estimates what the oracle measures.
    assert record["correlations"]["taylor"]["all layers"]["rank"] > 0.5
    assert "| ortho_paper | 0.58 | 0.38 | " in squeezed(text)

    # Stopped between the last iteration and the correlation: nothing is trained again.
    runs.plan(table, table.rows[0], 0, FULL, output).record_path.unlink()
    del done[:]
    assert reproduce(only(table, ["standard"]), [0], FULL, output) == text
    assert not done
