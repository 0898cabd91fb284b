"""The command lines of repr-det report and repr-det figure."""

from __future__ import annotations

import json
from pathlib import Path

import cv2
import pytest
import torch

from repr_det.classification import ClassificationTrainer
from repr_det.cli import main
from repr_det.report.run import read_run
from tests.classification.settings import register_corners, small_cfg
from tests.report.folders import (
    detections,
    write_detection_data,
    write_detection_run,
    write_run,
)


@pytest.fixture
def runs(tmp_path):
    """Folders of a standard and a RePr run of detection, and the arguments that give their data."""
    annotations, images = write_detection_data(tmp_path / "data")
    name = f"squares_{tmp_path.name}"
    folders = []
    for number, (found, ap) in enumerate((([1, 2], 100 * 26 / 101), (range(1, 9), 100.0))):
        settings = {"DATASETS.TEST": (name,), "REPR.ENABLED": bool(number)}
        folder = write_detection_run(tmp_path / f"run_{number}", detections(found), ap, settings)
        folders.append(str(folder))
    return folders, ["--test-data", name, str(annotations), str(images)]


def test_the_page_is_written_and_named(runs, tmp_path, capsys):
    folders, data = runs
    page = tmp_path / "report.html"
    assert main(["report", *folders, "-o", str(page), "--resamples", "20", *data]) == 0
    assert capsys.readouterr().out == f"{page}\n"
    assert "Held-out images" in page.read_text()


def test_data_that_a_run_was_not_evaluated_on_are_refused(runs, tmp_path, capsys):
    """Recorded metrics are of the test set of the run, whatever is named later."""
    folders, (option, name, *files) = runs
    page = tmp_path / "report.html"
    assert main(["report", *folders, "-o", str(page), option, "other", *files]) == 2
    assert f"was evaluated on {name}, not on other. Set" in capsys.readouterr().err
    assert not page.exists()


def test_no_output_replaces_annotations(runs, tmp_path, capsys):
    folders, data = runs
    before = Path(data[2]).read_bytes()
    figure = ["figure", "overlap_by_layer", *folders, "-o", str(tmp_path / "a.png")]
    for words in (["report", *folders, "-o", data[2]], [*figure, "--json", data[2]]):
        assert main([*words, *data]) == 2
        assert "is a file that this command also reads" in capsys.readouterr().err
        assert Path(data[2]).read_bytes() == before


def test_detectors_that_make_the_same_mistakes_have_no_examples(tmp_path, capsys):
    annotations, images = write_detection_data(tmp_path / "data")
    data, folders = ["--test-data", f"same_{tmp_path.name}", str(annotations), str(images)], []
    for number in range(2):
        settings = {"DATASETS.TEST": (data[1],), "REPR.ENABLED": bool(number)}
        folder = tmp_path / f"run_{number}"
        folders.append(
            str(write_detection_run(folder, detections([1, 2]), 100 * 26 / 101, settings))
        )
    assert main(["figure", "detections", *folders, "-o", str(tmp_path / "a.png"), *data]) == 2
    assert "make equally many mistakes on every image" in capsys.readouterr().err


def test_figures_alone(runs, tmp_path, capsys):
    folders, data = runs
    for figure, name in (("classes", "a.png"), ("curves", "b.svg"), ("detections", "c.png")):
        assert main(["figure", figure, *folders, "-o", str(tmp_path / name), *data]) == 0
    assert "Box AP of each class" in capsys.readouterr().out
    assert cv2.imread(str(tmp_path / "c.png")).std() > 10
    assert (tmp_path / "b.svg").read_text().startswith("<?xml")


def test_a_checkpoint_with_a_config_gives_overlap_and_correlations(tmp_path):
    register_corners()
    cfg = small_cfg(str(tmp_path))
    config = tmp_path / "small.yaml"
    config.write_text(cfg.dump())
    model = ClassificationTrainer.build_model(cfg)
    weights = tmp_path / "weights.pth"
    torch.save({"model": model.state_dict()}, weights)
    given = ["--config-file", str(config), "MODEL.WEIGHTS", str(weights), "--num-images", "20"]
    numbers = {}
    for figure in ("overlap_by_layer", "cca_by_layer"):
        out = tmp_path / f"{figure}.json"
        arguments = [figure, *given, "-o", str(tmp_path / "a.png"), "--json", str(out)]
        assert main(["figure", *arguments]) == 0
        ((_, numbers[figure]),) = json.loads(out.read_text()).items()
    rows = model.network.features[3].weight.detach().flatten(1)
    cosines = torch.nn.functional.normalize(rows) @ torch.nn.functional.normalize(rows).T
    expected = (cosines.abs().sum() - len(rows)) / len(rows) ** 2
    assert numbers["overlap_by_layer"]["network.features.3"] == pytest.approx(float(expected))
    assert 0 < numbers["cca_by_layer"]["network.features.3"] < 1


def test_mistakes_are_told_in_one_sentence_and_nothing_is_written(tmp_path, capsys):
    run = str(write_run(tmp_path / "run"))
    other = str(write_run(tmp_path / "other", {"DATASETS.TEST": ("another",)}))
    out = tmp_path / "out"
    out.mkdir()
    page, png = str(out / "a.html"), str(out / "a.png")
    folder, js = tmp_path / "folder.png", str(out / "j")
    folder.mkdir()
    for name, arguments, sentence in (
        ("report", [str(tmp_path), "-o", page], f"{tmp_path}/config.yaml does not exist. Pass"),
        ("report", [run, other, "-o", page], f"The test set of {other} is another"),
        (
            "report",
            [run, "-o", str(out / "no" / "a.html")],
            f"Folder {out}/no of --output does not exist",
        ),
        ("report", [run, "-o", page, "--num-images", "1"], "1 images are too few"),
        ("figure", ["curves", run, "-o", page], f"{page} ends neither in .png nor in .svg"),
        ("figure", ["curves", "-o", png], "There are no runs to report on"),
        ("figure", ["drops", run, "-o", png], "This figure needs at least one RePr run."),
        ("figure", ["cca", "--config", "c.yaml", "-o", png], "Set either runs, or --config-file"),
        ("figure", ["curves", run, "-o", png, "--json", js], "curves has no numbers"),
        ("figure", ["contributions", run, "-o", png, "--json", js], "contributions has"),
        ("figure", ["detections", run, "-o", png, "--json", js], "detections has no"),
        ("figure", ["detections", run, "-o", str(out / "a.svg")], "detections is a picture. Set"),
        ("figure", ["curves", run, "-o", str(folder)], f"Target {folder} of --output is a folder"),
        ("report", [run, "-o", str(folder)], f"Target {folder} of --output is a folder"),
        ("figure", ["cats", run, "-o", png], "There is no figure 'cats'. Set one of curves,"),
        ("report", [run, "-o", page, "--arm", "a", other], f"{run} belongs to no arm. Set --arm"),
        ("figure", ["detections", run, "-o", png], "This figure is only available for detection"),
    ):
        assert main([name, *arguments]) == 2
        printed = capsys.readouterr().err
        assert printed.startswith(f"repr-det {name}: error: {sentence}"), printed
        assert printed.count("\n") == 1
    assert not list(out.iterdir()) and not list(folder.iterdir())
    assert read_run(run).iterations == 200


def test_a_page_of_named_arms(runs, tmp_path):
    folders, data = runs
    page = tmp_path / "report.html"
    arms = ["--arm", "all of them", folders[1], "--arm", "some", folders[0]]
    arguments = [*arms, "--baseline", "some", "-o", str(page), "--resamples", "20", *data]
    assert main(["report", *arguments]) == 0
    text = page.read_text()
    assert "<h1>some and all of them: " in text
    assert text.index(">some</th>") < text.index(">all of them</th>")
