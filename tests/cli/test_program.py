"""repr-det as a program: its help, its exit status, and the names of version 0.1."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import repr_det
from repr_det.cli import COMMANDS, build_parser, figure, main, parse
from repr_det.report.gallery import FIGURES

ROOT = Path(__file__).parents[2]
SCRIPTS = {
    "demo.py": "demo",
    "evaluate_coco.py": "eval",
    "export_backbone.py": "export-backbone",
    "install_detectron2.py": "install-detectron2",
    "predict.py": "predict",
    "train_net.py": "train",
}


def python(*words, **environment):
    return subprocess.run(
        [sys.executable, *map(str, words)],
        env=os.environ | {"PYTHONPATH": str(ROOT)} | environment,
        capture_output=True,
        text=True,
    )


def test_help_needs_neither_torch_nor_detectron2():
    code = """
import sys
sys.modules["torch"] = sys.modules["detectron2"] = None
from repr_det.cli import COMMANDS, main
for words in [["--help"], *([name, "--help"] for name in COMMANDS)]:
    try:
        main(words)
    except SystemExit as stop:
        assert stop.code == 0, words
"""
    done = python("-c", code)
    assert done.returncode == 0, done.stderr
    assert all(f"usage: repr-det {name} [-h]" in done.stdout for name in COMMANDS)


def test_help_lists_every_command_with_a_sentence(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    printed = capsys.readouterr().out
    for name, module in COMMANDS.items():
        assert f"\n    {name}" in printed
        assert sys.modules[module].__doc__.partition("\n")[0].endswith(".")


def test_version_is_the_packages(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"repr-det {repr_det.__version__}\n"


@pytest.mark.parametrize("words", [[], ["fly"], ["train", "--no-such-option"]])
def test_a_wrong_command_line_ends_with_status_2(words):
    with pytest.raises(SystemExit) as stop:
        main(words)
    assert stop.value.code == 2


def test_an_interrupted_command_ends_with_status_130(monkeypatch, capsys):
    def interrupted(args):
        raise KeyboardInterrupt

    monkeypatch.setattr("repr_det.cli.env.run", interrupted)
    assert main(["env"]) == 130
    assert capsys.readouterr().err == "repr-det env: interrupted.\n"


def test_a_bug_keeps_its_traceback(monkeypatch):
    def wrong(args):
        raise ValueError("not the user's")

    monkeypatch.setattr("repr_det.cli.env.run", wrong)
    with pytest.raises(ValueError, match="not the user's"):
        main(["env"])


def test_env_prints_versions(capsys):
    assert main(["env"]) == 0
    printed = capsys.readouterr().out
    assert f"repr_det {repr_det.__version__}" in printed
    assert "PyTorch" in printed and "detectron2" in printed


@pytest.mark.parametrize(("script", "command"), SCRIPTS.items())
def test_scripts_of_tools_are_the_same_programs(script, command):
    path = ROOT / "tools" / script
    assert os.access(path, os.X_OK)
    done = python(path, "--help", COLUMNS="100")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"usage: repr-det {command} ")


def test_options_may_stand_between_overrides():
    args = parse(["train", "SEED", "1", "--config", "a.yaml", "REPR.N", "2", "--resume"])
    assert args.config_file == "a.yaml" and args.resume
    assert args.opts == ["SEED", "1", "REPR.N", "2"]


class TestOldOptions:
    """What version 0.1 took still works and says what replaces it."""

    @pytest.mark.parametrize(
        ("words", "option", "instead"),
        [
            (["eval", "--run", "nowhere"], "--run", "RUN as the first argument"),
            (["predict", "a.png", "--run", "nowhere", "-o", "out"], "--run", "RUN as the first"),
            (
                ["predict", "a.png", "--config", "c.yaml", "--opts", "SEED", "1"],
                "--opts",
                "KEY VALUE at the end",
            ),
            (["report", "run", "-o", "r.html", "--images", "8"], "--images", "--num-images"),
            (["figure", "cca", "run", "-o", "c.png", "--images", "8"], "--images", "--num-images"),
            (
                ["figure", "cca", "--config", "c.yaml", "--weights", "w.pth", "-o", "c.png"],
                "--weights",
                "MODEL.WEIGHTS FILE at the end",
            ),
        ],
    )
    def test_each_says_what_replaces_it(self, words, option, instead, capsys):
        parse(words)
        (line,) = capsys.readouterr().err.splitlines()
        assert f"{option} will be removed in 0.3. Use {instead}" in line

    def test_run_of_eval_is_the_positional_run(self, capsys):
        assert main(["eval", "--run", "nowhere", "SEED", "1"]) == 2
        assert "nowhere holds no run" in capsys.readouterr().err.splitlines()[-1]

    def test_seeds_of_compare_joined_by_commas(self, tmp_path, capsys):
        assert main(["compare", str(tmp_path / "val.json"), "a0.json,a1.json", "b.json"]) == 2
        warned, refused = capsys.readouterr().err.splitlines()
        assert "Use --arm NAME RESULTS..." in warned and "a0.json" in refused

    def test_target_of_export_backbone(self, tmp_path, capsys):
        target = tmp_path / "b.pth"
        assert main(["export-backbone", str(tmp_path / "no.pth"), str(target)]) == 2
        warned, refused = capsys.readouterr().err.splitlines()
        assert "Use --output" in warned and "no.pth" in refused and not target.exists()


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--num-gpus", "0"], "--num-gpus is 0. Set it to 1 or more."),
        (["--machine-rank", "1"], "--machine-rank is 1 for --num-machines 1."),
        (["--num-machines", "2"], "Set --dist-url tcp://HOST:PORT, the same on every machine."),
    ],
)
def test_processes_that_cannot_meet_are_refused(words, sentence, capsys):
    assert main(["train", *words]) == 2
    assert sentence in capsys.readouterr().err


def test_every_argument_has_help():
    (commands,) = build_parser()._subparsers._group_actions
    for name, parser in commands.choices.items():
        assert all(action.help for action in parser._actions), name


def test_help_of_figure_lists_every_figure():
    listed = re.findall(r"^  (\w+)  +\w", figure.__doc__, re.MULTILINE)
    assert listed == [*FIGURES, figure.DETECTIONS]
