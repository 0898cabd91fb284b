"""Reading the files of a run, whole, interrupted or damaged."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest
import torch

from repr_det.engine import recording
from repr_det.engine.recording import Drop, History, Overlap
from repr_det.errors import UserError
from repr_det.report.run import (
    of_checkpoint,
    read_metrics,
    read_run,
    settings_that_differ,
    short_names,
    training_seconds,
)
from repr_det.tasks import CLASSIFICATION, get_cfg
from tests.report.folders import write_detection_run, write_metrics, write_run


def test_metrics_of_a_resumed_run_keep_the_later_line(tmp_path: Path):
    records = [
        {"iteration": 19, "total_loss": 3.0},
        {"iteration": 39, "total_loss": 2.0},
        {"iteration": 39, "total_loss": 1.5, "bbox/AP": 7.0},
    ]
    path = write_metrics(tmp_path, records)
    path.write_text(path.read_text() + '{"iteration": 59, "total_lo')  # killed while writing
    metrics = read_metrics(tmp_path)
    assert set(metrics) == {"total_loss", "bbox/AP"}
    assert metrics["total_loss"].dropna().to_dict() == {19: 3.0, 39: 1.5}
    assert metrics["bbox/AP"].dropna().to_dict() == {39: 7.0}
    assert read_metrics(tmp_path / "nothing").empty


def test_a_later_run_in_the_folder_replaces_records(tmp_path):
    ap, lost = {"bbox/AP": 5.0}, {"bbox/AP": 9.0}
    records = [
        {"iteration": 19, "total_loss": 3.0},
        {"iteration": 29, **ap},
        {"iteration": 39, "total_loss": 2.5},
        {"iteration": 59, "total_loss": 2.0},
        {"iteration": 49, **lost},  # written together with the line before it
        # Resumed after iteration 29, as Detectron2 does: the file was left as it was.
        {"iteration": 39, "total_loss": 2.4},
        {"iteration": 59, "total_loss": 1.9},
    ]
    write_metrics(tmp_path, records)
    metrics = read_metrics(tmp_path)
    assert metrics["total_loss"].dropna().to_dict() == {19: 3.0, 39: 2.4, 59: 1.9}
    assert metrics["bbox/AP"].dropna().to_dict() == {29: 5.0}
    # Trained again, without --resume, and not evaluated yet.
    write_metrics(tmp_path, [*records, {"iteration": 19, "total_loss": 7.0}])
    metrics = read_metrics(tmp_path)
    assert set(metrics.dropna(axis=1, how="all")) == {"total_loss"}
    assert metrics["total_loss"].dropna().to_dict() == {19: 7.0}


def test_lines_of_one_run_need_not_be_in_order(tmp_path):
    """Detectron2 writes what is new as it was first recorded: losses, then an evaluation."""
    write_metrics(
        tmp_path,
        [
            {"iteration": 19, "total_loss": 3.0},
            {"iteration": 39, "total_loss": 2.0},
            {"iteration": 24, "bbox/AP": 7.0},
            {"iteration": 59, "total_loss": 1.0},
            {"iteration": 49, "bbox/AP": 8.0},
            # Begun again: its first two lines are not in order either.
            {"iteration": 39, "total_loss": 5.0},
            {"iteration": 24, "bbox/AP": 1.0},
        ],
    )
    metrics = read_metrics(tmp_path)
    assert metrics["total_loss"].dropna().to_dict() == {19: 3.0, 39: 5.0}
    assert metrics["bbox/AP"].dropna().to_dict() == {24: 1.0}


def test_steps_of_the_rate_are_found_without_warm_up_and_decay(tmp_path):
    settings = {"SOLVER.LR_SCHEDULER_NAME": "Triangular"}
    folder = write_run(tmp_path / "run", settings)
    rates = {19: 0.01, 39: 0.02, 59: 0.018, 79: 0.0018, 99: 0.00018}
    write_metrics(folder, [{"iteration": i, "lr": rate} for i, rate in rates.items()])
    assert read_run(folder).rate_drops == [79, 99]


def test_learning_rate_falls_where_the_config_says(tmp_path):
    """Not where the rate was next recorded, and no step counts that the run has not reached."""
    run = read_run(write_run(tmp_path / "run", {"SOLVER.STEPS": (50, 130, 900)}, length=200))
    assert run.rate_drops == [50, 130]


def test_time_counts_the_steps_between_records():
    seconds = pd.DataFrame({"time": [0.5, 1.0, 2.0]}, [19, 39, 44])
    assert training_seconds(seconds) == 20 * 0.5 + 20 * 1.0 + 5 * 2.0
    assert training_seconds(pd.DataFrame()) is None


def test_a_run_that_was_killed_is_read(tmp_path):
    run = read_run(write_run(tmp_path / "run", {"REPR.ENABLED": True}, length=100))
    assert (run.task, run.uses_repr, run.finished, run.iterations) == (
        CLASSIFICATION, True, False, 100,
    )  # fmt: skip
    assert run.history is None and run.checkpoints == []
    with pytest.raises(UserError, match="no checkpoint yet"):
        _ = run.weights
    assert list(run.evaluations("accuracy/top1").index) == [49, 99]
    assert set(run.evaluated()) == {"accuracy/top1", "accuracy/loss"}


def test_spans_are_exact_where_drops_are_known(tmp_path):
    settings = {"REPR.ENABLED": True, "REPR.UNIT": "epoch", "REPR.S1": 2, "REPR.S2": 1}
    folder = write_run(tmp_path / "run", settings, length=100)
    recording.write(folder, History({"conv": 4}, [Drop(0, 44, {"conv": [1]}), Drop(1, 88, {})], []))
    assert read_run(folder).spans == [(44, 66), (88, 100)]
    (folder / recording.FILE).write_text("{")
    run = read_run(folder)
    assert run.spans == []
    with pytest.raises(ValueError, match="damaged"):
        _ = run.history


def test_a_run_of_a_trainer_with_a_hook_in_code_is_one_of_repr(tmp_path):
    """Its config knows nothing of RePr; S2 ends where the overlap after a return was recorded."""
    folder = write_run(tmp_path / "run", length=100)
    assert not read_run(folder).uses_repr
    with open(folder / "metrics.json", "a") as file:
        file.write(json.dumps({"iteration": 99, "repr/phase": 0, "repr/overlap": 0.2}) + "\n")
    moments = [Overlap(iteration, {"conv": 0.2}) for iteration in (20, 30, 50, 60, 80)]
    drops = [Drop(0, 20, {"conv": [1]}), Drop(1, 50, {"conv": [0]}), Drop(2, 80, {"conv": [3]})]
    recording.write(folder, History({"conv": 4}, drops, moments))
    run = read_run(folder)
    assert run.uses_repr and run.spans == [(20, 30), (50, 60), (80, 100)]
    recording.write(folder, History({"conv": 4}, drops, []))
    assert read_run(folder).spans == []
    # A standard run in the same folder is one of its own.
    with open(folder / "metrics.json", "a") as file:
        file.write(json.dumps({"iteration": 19, "total_loss": 1.0}) + "\n")
    assert not read_run(folder).uses_repr


def test_drops_without_a_record_are_read_from_the_newest_checkpoint(tmp_path):
    folder = write_run(tmp_path / "run", {"REPR.ENABLED": True})
    for iteration, masks in ((9, []), (109, [[True, False, True]])):
        state = {
            "layers": {"conv": 3},
            "history": [
                {"cycle": i, "iteration": 40, "pruned": {"conv": torch.tensor(mask)}}
                for i, mask in enumerate(masks)
            ],
        }
        content = {"model": {}, "trainer": {"hooks": {"RePrHook": state}}}
        torch.save(content, folder / f"model_{iteration:07d}.pth")
    found = read_run(folder).history
    assert found == History({"conv": 3}, [Drop(0, 40, {"conv": [0, 2]})], [])
    assert read_run(write_run(tmp_path / "standard")).history is None


def test_checkpoints_of_an_earlier_run_are_ignored(tmp_path):
    folder = write_run(tmp_path / "run")
    numbered = ["model_0000049.pth", "model_0000099.pth"]
    for name in (*numbered, "model_final.pth"):
        (folder / name).touch()
    tag = folder / "last_checkpoint"
    for last, finished, count in (
        ("model_final.pth", True, 3), (numbered[1], False, 2), (numbered[0], False, 1)
    ):  # fmt: skip
        tag.write_text(last)
        run = read_run(folder)
        assert run.finished == finished
        assert len(run.checkpoints) == count
        assert run.weights.name == last
    tag.unlink()
    torch.save({"model": {}, "iteration": 199}, folder / "model_final.pth")
    assert read_run(folder).finished


def test_a_run_that_was_copied_without_its_checkpoints_has_none(tmp_path):
    folder = write_run(tmp_path / "run", {"REPR.ENABLED": True, "REPR.S1": 40, "REPR.S2": 20})
    (folder / "last_checkpoint").write_text("model_final.pth")
    run = read_run(folder)
    assert run.finished and run.checkpoints == [] and run.history is None


def test_what_is_no_number_is_no_metric(tmp_path):
    """As a hook of one's own may write it."""
    folder = write_run(tmp_path / "run")
    lines = (folder / "metrics.json").read_text()
    more = {"iteration": 201, "note": "hello", "none": None, "list": [1], "total_loss": 0.5}
    (folder / "metrics.json").write_text(f"{lines}{json.dumps(more)}\n")
    metrics = read_run(folder).metrics
    assert metrics["total_loss"].iloc[-1] == 0.5
    assert not {"note", "none", "list"} & {*metrics.columns}


def test_a_run_of_another_machine_is_read_on_this_ones_device(tmp_path):
    folder = write_run(tmp_path / "run", {"MODEL.DEVICE": "cuda:3"})
    assert read_run(folder).cfg.MODEL.DEVICE == get_cfg().MODEL.DEVICE


def test_a_restarted_run_ignores_the_earlier_final_checkpoint(tmp_path):
    folder = write_run(tmp_path / "run", length=40)
    torch.save({"model": {}, "iteration": 199}, folder / "model_final.pth")
    (folder / "model_0000099.pth").touch()
    run = read_run(folder)
    assert not run.finished and run.checkpoints == []


def test_one_of_several_test_sets_can_be_read_alone(tmp_path):
    folder = write_run(tmp_path / "run", {"DATASETS.TEST": ("one_test", "two_test")})
    write_metrics(folder, [{"iteration": 9, "one_test/accuracy/top1": 20.0, "total_loss": 1.0}])
    run = read_run(folder)
    run.cfg.DATASETS.TEST = ("one_test",)
    assert run.evaluations("accuracy/top1").tolist() == [20.0]
    assert run.evaluated() == ["accuracy/top1"]


def test_the_output_folder_is_no_setting_that_differs(tmp_path):
    runs = [
        read_run(write_run(tmp_path / "a", {"SEED": 1, "OUTPUT_DIR": "a"})),
        read_run(write_run(tmp_path / "b", {"SEED": 2, "OUTPUT_DIR": "b"})),
    ]
    assert settings_that_differ(runs) == {"SEED": [1, 2]}


def test_names_of_runs_are_the_shortest_unique_ends_of_paths(tmp_path):
    folders = ("standard/seed_0", "repr/seed_0", "repr/seed_1", "repr/old/seed_1")
    runs = [read_run(write_run(tmp_path / folder)) for folder in folders]
    assert short_names(runs) == ["standard/seed_0", "repr/seed_0", "repr/seed_1", "old/seed_1"]
    assert short_names(runs[:1]) == ["seed_0"]


def test_a_detector_that_finds_nothing_has_ap_zero(tmp_path):
    """Detectron2 records NaN then, as it does where there are no objects of a size."""
    run = read_run(write_detection_run(tmp_path / "run", [], float("nan")))
    assert run.evaluations("bbox/AP50").to_dict() == {100: 0}
    assert run.evaluations("bbox/APs") is None
    assert run.evaluations("bbox/AP-cat") is None


def test_keys_of_somebody_elses_trainer_are_read(tmp_path):
    folder = write_run(tmp_path / "run")
    config = folder / "config.yaml"
    config.write_text(config.read_text() + "MINE: {KEY: 3}\n")
    assert read_run(folder).cfg.MINE.KEY == 3


def test_what_is_no_run_is_refused(tmp_path):
    with pytest.raises(UserError, match="Pass the OUTPUT_DIR"):
        read_run(tmp_path)
    (tmp_path / "config.yaml").write_text("MODEL: [1\n")
    with pytest.raises(ValueError, match="cannot be read"):
        read_run(tmp_path)
    with pytest.raises(UserError, match="Set the path of a checkpoint"):
        of_checkpoint("cifar10_c3_32.yaml", tmp_path / "none.pth")
    with pytest.raises(UserError, match="neither a file nor a name"):
        of_checkpoint("nothing.yaml", tmp_path / "none.pth")
