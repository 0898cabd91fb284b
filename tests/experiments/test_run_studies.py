from __future__ import annotations

import json

import pytest

from experiments.protocol import CHOICE_SEED, STANDARD, STUDIES, all_cells, choice_cells
from experiments.run_studies import (
    AGAIN,
    _write,
    failure_path,
    main,
    read_values,
    record_path,
    recorded_cell,
    run_all,
    train_cell,
    tries,
    value_of,
    what_is_left,
)
from experiments.runs import write_record
from repr_det.engine.checkpoint import has_run
from repr_det.errors import UserError

SHORT = {
    "finetune": {
        **{"DATASETS.HELD_OUT": 16, "SOLVER.MAX_ITER": 8, "SOLVER.STEPS": (6, 7)},
        **{"REPR.N": 1, "REPR.S1": 2, "REPR.S2": 2},
    },
    "noise": {
        **{"DATASETS.HELD_OUT": 200, "DATASETS.TRAIN_SHARE": 0.01, "SOLVER.MAX_EPOCHS": 4},
        **{"SOLVER.STEPS_EPOCHS": (3,), "REPR.N": 1, "REPR.S1": 1, "REPR.S2": 1},
    },
}


FIRST = {name: next(iter(study.settings)) for name, study in STUDIES.items()}
ARMS = [(name, arm) for name, study in STUDIES.items() for arm in study.settings[FIRST[name]].arms]


def record_with(cell, value):
    study = STUDIES[cell.study]
    entries = [{study.metric: 1.0}, {study.metric: value}]
    return {"wall_seconds": 1.0, "evaluations": {study.datasets[cell.stage]: entries}}


class Recorder:
    """Makes records in place of training, and fails at the cells that it is given."""

    def __init__(self, fails=lambda cell, times: False, stop_after=10**6):
        self.cells = []
        self.fails = fails
        self.stop_after = stop_after

    def __call__(self, cell):
        if len(self.cells) == self.stop_after:
            raise KeyboardInterrupt
        self.cells.append(cell)
        if self.fails(cell, self.cells.count(cell)):
            raise RuntimeError("no luck")
        return record_with(cell, 40.0 + 100 * cell.value if cell.seed == CHOICE_SEED else 1.0)


def test_every_cell_is_run_once_over_stops(tmp_path):
    seen = []
    for stop in (7, 60, 10**6):
        recorder = Recorder(stop_after=stop)
        if stop < 10**6:
            with pytest.raises(KeyboardInterrupt):
                run_all(tmp_path, recorder)
        else:
            run_all(tmp_path, recorder)
        seen += recorder.cells
    assert len(seen) == len(set(seen)) == 262
    values = read_values(tmp_path)
    assert seen == all_cells(values)
    # The largest value of the grid was best, and the first arm of those that are equal.
    primary = {(c.arm, c.value) for c in values if c.seed == 10 and c.study == "finetune"}
    assert primary == {(STANDARD, 0.002), ("repr", 0.002)}
    assert "noise-test: 118 of 118 runs done, 0 of them failed" in what_is_left(values)


def test_a_failed_run_is_tried_again_after_the_others(tmp_path):
    fails_once, fails_always = (
        choice_cells("noise", "40")[1],
        choice_cells("finetune", "252-600")[0],
    )
    recorder = Recorder(lambda c, times: c == fails_always or (c == fails_once and times == 1))
    run_all(tmp_path, recorder)
    assert recorder.cells.count(fails_always) == recorder.cells.count(fails_once) == 2
    values = read_values(tmp_path)
    assert values[fails_always] is None and values[fails_once] == 40.0 + 100 * fails_once.value
    failure = json.loads(failure_path(fails_always, tmp_path).read_text())
    assert failure["tries"] == 2 and failure["error"] == "RuntimeError: no luck"
    assert "finetune-choice: 45 of 45 runs done, 1 of them failed" in what_is_left(values)


def test_failures_in_a_row_end_the_command(tmp_path):
    recorder = Recorder(lambda cell, times: True)
    with pytest.raises(UserError, match="3 runs failed one after the other.*no luck"):
        run_all(tmp_path, recorder)
    assert [tries(cell, tmp_path) for cell in recorder.cells] == [1, 1, 1]


def test_checkpoints_go_when_the_record_is_there(tmp_path):
    cell = choice_cells("noise", "40")[0]
    folder = record_path(cell, tmp_path).with_suffix("")

    def train(found):
        if found != cell:
            raise KeyboardInterrupt
        folder.mkdir(parents=True)
        for name in ("model_final.pth", "metrics.json"):
            (folder / name).touch()
        return record_with(cell, 1.0)

    first = choice_cells("finetune", "252-600")[0]
    write_record(record_path(first, tmp_path), record_with(first, 1.0))
    with pytest.raises(KeyboardInterrupt):
        run_all(tmp_path, train)
    assert [path.name for path in folder.iterdir()] == ["metrics.json"]


@pytest.mark.parametrize("study", STUDIES)
def test_the_last_evaluation_counts_and_divergence_is_chance(study):
    cell = choice_cells(study, FIRST[study])[0]
    record = record_with(cell, 33.3)
    assert value_of(record, cell) == 33.3
    assert value_of(record | {"diverged": "NaN"}, cell) == (10.0 if study == "noise" else 0.0)


def test_a_record_names_its_cell(tmp_path):
    cell = choice_cells("noise", "40")[3]
    path = record_path(cell, tmp_path)
    write_record(path, record_with(cell, 1.0) | {"cell": vars(cell)})
    assert recorded_cell(path) == cell


@pytest.mark.parametrize("text", [None, "{", "[]", "{}", '{"cell": {"arm": "repr"}}'])
def test_what_is_no_record_is_refused(text, tmp_path, capsys):
    path = tmp_path / "seed_1.json"
    if text is not None:
        path.write_text(text)
    assert main(["--output", str(tmp_path / "out"), "--again", str(path)]) == 2
    message = capsys.readouterr().err
    assert message.startswith("run_studies: error: ") and str(path) in message
    assert not (tmp_path / "out").exists()


def test_a_run_is_trained_again_beside_its_record(tmp_path, monkeypatch):
    cell = choice_cells("noise", "40")[3]
    path = record_path(cell, tmp_path)
    write_record(path, record_with(cell, 1.0) | {"cell": vars(cell)})
    before = path.read_bytes()
    trained = []

    def train(found, output):
        trained.append((found, output))
        return record_with(found, 2.0)

    monkeypatch.setattr("experiments.run_studies.check", lambda output: None)
    monkeypatch.setattr("experiments.run_studies.train_cell", train)
    assert main(["--output", str(tmp_path), "--again", str(path)]) == 0
    assert trained == [(cell, tmp_path / AGAIN)] and path.read_bytes() == before
    again = json.loads(record_path(cell, tmp_path / AGAIN).read_text())
    assert value_of(again, cell) == 2.0
    assert read_values(tmp_path) == {cell: 1.0}


@pytest.mark.slow
@pytest.mark.parametrize("study, arm", ARMS)
def test_every_arm_trains_and_is_recorded(study, arm, tmp_path, needed):
    cell = next(c for c in choice_cells(study, FIRST[study]) if c.arm == arm)
    record = train_cell(cell, tmp_path, SHORT[study])
    assert 0 <= value_of(record, cell) <= 100
    assert record["cell"]["arm"] == arm and len(record["commit"].rstrip("+")) == 40
    assert (record_path(cell, tmp_path).with_suffix("") / "model_final.pth").is_file()
    assert record["overrides"] and record["cpu_seconds"] > 0


def test_a_run_whose_record_is_deleted_starts_again(tmp_path):
    """It would look for the checkpoints that went when it was recorded."""
    path = tmp_path / "seed_1.json"
    folder = tmp_path / "seed_1"
    folder.mkdir()
    for name in ("model_0000009.pth", "last_checkpoint", "log.txt"):
        (folder / name).write_text("model_0000009.pth")
    _write({"wall_seconds": 1.0}, path)
    assert has_run(str(folder)) is False
    assert [file.name for file in folder.iterdir()] == ["log.txt"]
