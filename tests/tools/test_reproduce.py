"""The command line of tools/reproduce.py on a table of tiny runs."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

from experiments import runs
from tests.experiments.settings import small_table

ROOT = Path(__file__).parents[2]


@pytest.fixture
def tool(tmp_path, monkeypatch):
    """The tool, with one table named small; returns exit status and what was printed."""
    spec = importlib.util.spec_from_file_location("tool", ROOT / "tools" / "reproduce.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setitem(module.TABLES, "small", small_table(tmp_path))
    return module


def test_trains_shows_and_writes(tool, tmp_path, capsys):
    output = str(tmp_path / "output")
    arguments = ["small", "--rows", "repr", "--output", output]
    assert tool.main([*arguments, "--seeds", "2"]) == 0
    trained = capsys.readouterr().out
    assert "| RePr | 74 | " in trained and " | 2 | +4 | " in trained
    written = (tmp_path / "output" / "small" / "table.md").read_text()
    assert set(trained.splitlines()) < set(written.splitlines())
    assert tool.main([*arguments, "--show"]) == 0
    assert capsys.readouterr().out == trained
    plot = str(tmp_path / "plot.svg")
    assert tool.main([*arguments, "--show", "--plot", plot]) == 0
    assert capsys.readouterr().out == f"{trained}{plot}\n"
    assert "RePr" in Path(plot).read_text()


def test_nothing_to_show(tool, tmp_path, capsys):
    assert tool.main(["small", "--show", "--output", str(tmp_path / "none")]) == 2
    assert "none/small does not exist, so no run is recorded" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


def test_trains_together(tool, tmp_path, capsys):
    output = tmp_path / "output"
    arguments = ["small", "--seeds", "1", "--together", "5", "--output", str(output)]
    assert tool.main(arguments) == 0
    printed = capsys.readouterr()
    assert "Trained alone, because it learns from a teacher: taught seed 0." in printed.err
    for row, together in (("standard", 2), ("repr", 2), ("taught", None)):
        record = json.loads((output / "small" / row / "seed_0.json").read_text())
        assert record.get("together") == together and record["wall_seconds"] > 0


def test_imports(tool, tmp_path, capsys):
    output = str(tmp_path / "output")
    assert tool.main(["small", "--rows", "repr", "--seeds", "1", "--output", output]) == 0
    folder = tmp_path / "output" / "small" / "repr"
    (folder / "seed_0.json").unlink()
    arguments = ["small", "--import-run", str(folder / "seed_0"), "--output", output]
    assert tool.main([*arguments, "--rows", "repr"]) == 0
    assert (folder / "seed_0.json").is_file()
    assert "(one seed: no interval)" in capsys.readouterr().out
    assert tool.main(arguments) == 2
    assert "--import-run needs --rows" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--seeds", "0"], "reproduce.py: error: --seeds is 0; give at least 1."),
        (["--together", "0"], "reproduce.py: error: --together is 0; give at least 1."),
        (["--plot", "plot.gif"], "reproduce.py: error: plot.gif ends neither in .png nor in .svg"),
        (["--plot", "no/plot.png"], "reproduce.py: error: Folder no of --plot does not exist"),
        (["--rows", "nothing"], "reproduce.py: error: Table small has no row 'nothing'"),
    ],
)
def test_mistakes_are_told_in_one_sentence(tool, tmp_path, capsys, arguments, sentence):
    assert tool.main(["small", *arguments, "--output", str(tmp_path / "output")]) == 2
    assert capsys.readouterr().err.startswith(sentence)
    assert not (tmp_path / "output").exists()


def test_stopped_by_the_keyboard(tool, tmp_path, capsys, monkeypatch):
    def stop(clock):
        raise KeyboardInterrupt

    monkeypatch.setattr(runs.RunClock, "after_step", stop)
    assert tool.main(["small", "--output", str(tmp_path / "output")]) == 130
    assert "the same command goes on" in capsys.readouterr().err


def test_unknown_table(tool, capsys):
    with pytest.raises(SystemExit):
        tool.main(["tables"])
    assert "invalid choice: 'tables'" in capsys.readouterr().err
