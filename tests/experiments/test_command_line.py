"""The command line of experiments on a table of tiny runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from experiments import __main__ as program
from experiments import runs
from tests.experiments.loading import load_tool
from tests.experiments.settings import small_table, squeezed


@pytest.fixture
def tool(tmp_path, monkeypatch):
    """The command line, with one table named small."""
    monkeypatch.setitem(program.TABLES, "small", small_table(tmp_path))
    return program


def test_reproduce_is_the_same_program():
    assert load_tool("reproduce").main is program.main


def test_trains_shows_and_writes(tool, tmp_path, capsys):
    output = str(tmp_path / "output")
    arguments = ["small", "--rows", "repr", "--output", output]
    assert tool.main([*arguments, "--seeds", "2"]) == 0
    trained = capsys.readouterr().out
    assert "| RePr | 74 | " in squeezed(trained) and " | 2 | +4 | " in squeezed(trained)
    written = (tmp_path / "output" / "small" / "table.md").read_text()
    assert set(squeezed(trained).splitlines()) < set(squeezed(written).splitlines())
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


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--seeds", "0"], "experiments: error: --seeds is 0. Set at least 1."),
        (["--plot", "plot.gif"], "experiments: error: plot.gif ends neither in .png nor in .svg"),
        (["--plot", "no/plot.png"], "experiments: error: Folder no of --plot does not exist"),
        (["--rows", "nothing"], "experiments: error: Table small has no row 'nothing'"),
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


def test_lists_its_tables_and_writes_a_page(tool, tmp_path, capsys):
    assert tool.main(["--list"]) == 0
    assert "criteria             Ranking criteria: C^3(32)" in capsys.readouterr().out
    page = tmp_path / "results.md"
    assert tool.main(["--page", str(page)]) == 0
    text = squeezed(page.read_text())
    assert "| Random | 73.4 | 65.81 ± 0.40 | 3 | +1.3 | +0.70 [-0.97, +2.37] |" in text
    nowhere = ["--page", str(tmp_path / "other.md"), "--output", str(tmp_path / "typo")]
    assert tool.main(nowhere) == 2 and not (tmp_path / "other.md").exists()
    assert "typo does not exist" in capsys.readouterr().err
    assert tool.main([]) == 2
    assert "No table was named. Name one" in capsys.readouterr().err
