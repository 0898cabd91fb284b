"""The record of a run over a resumption, without training."""

from __future__ import annotations

import json

import pytest
from detectron2.engine import TrainerBase, hooks
from detectron2.utils.events import JSONWriter, get_event_storage
from torch import nn

from repr_det.engine.hooks import LossNormalizer, RecordKeeper, _drop_lines_after


def write(path, *runs):
    lines = [json.dumps({"iteration": i, "run": r}) for r, run in enumerate(runs) for i in run]
    path.write_text("".join(line + "\n" for line in lines))


def read(path):
    return [(line["run"], line["iteration"]) for line in map(json.loads, path.open())]


def test_later_lines_go(tmp_path):
    path = tmp_path / "metrics.json"
    write(path, [19, 39, 59])
    assert [line["iteration"] for line in _drop_lines_after(path, 19, 0)] == [39, 59]
    assert read(path) == [(0, 19)]


def test_a_half_written_line_goes(tmp_path):
    path = tmp_path / "metrics.json"
    write(path, [19, 39])
    path.write_text(path.read_text() + '{"iteration": 59, "ru')
    assert _drop_lines_after(path, 39, 0) == []
    assert read(path) == [(0, 19), (0, 39)]


def test_an_earlier_run_in_the_same_folder_is_left_alone(tmp_path):
    path = tmp_path / "metrics.json"
    write(path, [19, 39, 59, 79, 99])
    begin = path.stat().st_size
    write(path, [19, 39, 59, 79, 99], [19, 39, 59])
    assert [line["iteration"] for line in _drop_lines_after(path, 39, begin)] == [59]
    assert read(path) == [(0, i) for i in (19, 39, 59, 79, 99)] + [(1, 19), (1, 39)]


@pytest.mark.parametrize("lines", [1, 200])
def test_a_record_that_was_replaced_is_neither_padded_nor_cut(tmp_path, lines):
    """The checkpoint says where this run's lines began in the file of then."""
    path = tmp_path / "metrics.json"
    write(path, [*range(100)])
    state = stopped_after(path, 29)
    assert state["begin"] > 0 and state["written"] == 19
    path.write_text('{"iteration": 1, "run": 7, "of": "another file"}\n' * lines)
    resumed = Trainer(path)
    resumed._hooks[-1].load_state_dict(state)
    resumed.train(30, 40)
    record = [json.loads(line) for line in path.open()]
    assert sum("of" in line for line in record) == lines and len(record) > lines


class Trainer(TrainerBase):
    """Records a loss at every step and evaluates by counting."""

    def __init__(self, path):
        super().__init__()
        self.model = nn.Identity()
        self.evaluated = []
        self.register_hooks(
            [
                hooks.EvalHook(10, self.evaluate),
                hooks.PeriodicWriter([JSONWriter(str(path))], period=20),
                RecordKeeper(path),
            ]
        )

    def evaluate(self):
        self.evaluated.append(self.iter)
        return {"AP": 10.0 * len(self.evaluated)}

    def run_step(self):
        get_event_storage().put_scalar("loss", self.iter**2 % 17)


def stopped_after(path, iteration):
    """The state that a checkpoint of an iteration holds: before the evaluation and the writers."""
    trainer = Trainer(path)
    states = {}
    trainer._hooks.insert(
        0,
        hooks.CallbackHook(
            after_step=lambda t: states.__setitem__(t.iter, trainer._hooks[-1].state_dict())
        ),
    )
    trainer._hooks[0].trainer = trainer
    trainer.train(0, 40)
    return states[iteration]


@pytest.mark.parametrize(("iteration", "repeated"), [(9, [9]), (12, []), (19, []), (29, [])])
def test_recorded_evaluations_are_not_repeated(tmp_path, iteration, repeated):
    """Writers write at 19 and 39, what is newest: the evaluation at 9 is not recorded."""
    path = tmp_path / "metrics.json"
    state = stopped_after(path, iteration)
    whole = path.read_text()
    resumed = Trainer(path)
    resumed.evaluated = [i for i in (9, 19, 29) if i < iteration] + [iteration] * (
        iteration in (19, 29)
    )
    before = list(resumed.evaluated)
    resumed._hooks[-1].load_state_dict(state)
    resumed.train(iteration + 1, 40)
    after = resumed.evaluated[len(before) :]
    assert [i for i in after if i <= iteration] == repeated
    assert path.read_text() == whole


def test_loss_normaliser_is_saved():
    """In a model that has made no step, as a resumed one has: Detectron2 makes it in the first."""

    class Detector(TrainerBase):
        def __init__(self):
            super().__init__()
            self.model = nn.ModuleDict({"head": nn.Module()})

    before, after = Detector(), Detector()
    before.register_hooks([LossNormalizer()])
    after.register_hooks([LossNormalizer()])
    assert before._hooks[0].state_dict() == {}
    before.model["head"].loss_normalizer = 83.25
    after._hooks[0].load_state_dict(before._hooks[0].state_dict())
    assert after.model["head"].loss_normalizer == 83.25
