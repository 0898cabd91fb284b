"""What tools/demo.py does with an earlier run."""

from __future__ import annotations

import pytest

from tests.tools.loading import load_tool

OF_A_RUN = ("model_0000539.pth", "model_final.pth", "last_checkpoint", "metrics.json", "run.png")
FOREIGN = ("holiday.png", "backbone.pth", "model_best.pth", "notes.txt")


@pytest.fixture
def tool():
    return load_tool("demo")


@pytest.fixture
def folder(tmp_path):
    """A folder with an earlier run and with other things."""
    for name in (*OF_A_RUN, *FOREIGN):
        (tmp_path / name).write_text(f"content of {name}")
    return tmp_path


def content(folder):
    return {path.name: path.read_text() for path in folder.iterdir()}


@pytest.mark.parametrize(
    ("pair", "sentence"),
    [
        (("REPR.S1", "0"), "s1 is 0"),
        (("REPR.NO_KEY", "1"), "NO_KEY"),
        (("DATASETS.TEST", "('nobody',)"), "Dataset nobody is not registered"),
        (("DATASETS.TEST", "('shapes_val', 'shapes_val')"), "DATASETS.TEST names 2 test sets"),
        (("DATASETS.TEST", "()"), "DATASETS.TEST names 0 test sets"),
    ],
)
def test_a_mistake_leaves_the_earlier_run(tool, folder, capsys, pair, sentence):
    before = content(folder)
    with pytest.raises(SystemExit) as stop:
        tool.main(["--output", str(folder), *pair])
    assert stop.value.code == 2
    (line,) = [x for x in capsys.readouterr().err.splitlines() if ": error: " in x]
    assert sentence in line
    assert content(folder) == before


def test_an_earlier_run_is_moved_and_nothing_else(tool, folder):
    for n in (1, 2):
        tool.set_aside(folder)
        (folder / "metrics.json").write_text(f"new {n}")
    tool.set_aside(folder)
    assert {path.name for path in folder.iterdir() if path.is_file()} == set(FOREIGN)
    assert content(folder / "earlier-1") == {name: f"content of {name}" for name in OF_A_RUN}
    assert content(folder / "earlier-2") == {"metrics.json": "new 1"}
    assert content(folder / "earlier-3") == {"metrics.json": "new 2"}
