"""The page: what it says of runs, and what a browser makes of it."""

from __future__ import annotations

import dataclasses
import html
import itertools
import re

import pytest
import torch

from repr_det.classification import ClassificationTrainer
from repr_det.cli import main
from repr_det.engine import recording
from repr_det.errors import UserError
from repr_det.report.arms import arms_of, by_method, longest
from repr_det.report.material import Material, in_depth
from repr_det.report.page import write_report
from repr_det.report.run import read_metrics, read_run
from tests.browser import Browser, needs_chromium
from tests.classification.settings import register_corners, small_cfg
from tests.report.folders import (
    HALF,
    detections,
    squares,
    write_detection_run,
    write_metrics,
    write_run,
)


def text_of(page) -> str:
    content = re.sub(r"<style>.*?</style>", "", page.read_text(), flags=re.S)
    return html.unescape(re.sub(r"<[^>]+>", " ", content))


def figures_of(page) -> list[str]:
    return re.findall(r'<figure id="(\w+)">', page.read_text())


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A classification run without RePr and one with it, trained for a moment."""
    register_corners()
    root = tmp_path_factory.mktemp("pair")
    for name, uses_repr in (("standard", False), ("repr", True)):
        cfg = small_cfg(str(root / name))
        cfg.REPR.ENABLED = uses_repr
        cfg.REPR.S1, cfg.REPR.S2, cfg.REPR.N = 2, 2, 2
        cfg.TEST.EVAL_PERIOD = 6
        cfg.SOLVER.CHECKPOINT_PERIOD = 6
        (root / name).mkdir()
        (root / name / "config.yaml").write_text(cfg.dump())
        ClassificationTrainer(cfg).train()
    return root / "standard", root / "repr"


@pytest.fixture(scope="module")
def page(pair, tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "report.html"
    return write_report(by_method([read_run(folder) for folder in pair]), path, images=24)


EVERY_FIGURE = [
    *("curves", "drops", "times", "overlap", "overlap_over_time", "overlap_by_layer"),
    *("cca_by_layer", "cca", "svcca", "similarity", "filters"),
]


def test_a_pair_has_every_figure_and_says_what_is_missing(page, pair):
    assert figures_of(page) == EVERY_FIGURE
    text = text_of(page)
    assert "With RePr the top-1 accuracy was" in text
    assert "One run each has no interval" in text
    assert "What each filter contributes : Not computed yet" in text
    assert "REPR.ENABLED" in text  # among the settings that differ
    dropped = recording.read(pair[1])
    number = sum(map(len, dropped.drops[0].pruned.values()))
    assert f"Dropped {number}, {number} of {sum(dropped.layers.values())} filters" in text
    assert list(page.parent.iterdir()) == [page]


def test_the_page_needs_nothing_else(page):
    content = page.read_text()
    assert not re.search(r'(src|href)="(?!data:)', content)
    assert "url(http" not in content and "<script" not in content


def test_a_run_that_is_still_going_is_reported(tmp_path):
    register_corners()
    folder = write_run(tmp_path / "going", {"REPR.ENABLED": True}, length=60)
    path = write_report(by_method([read_run(folder)]), tmp_path / "report.html")
    text = text_of(path)
    assert figures_of(path) == ["curves"]
    assert "Not finished, still going or stopped: going" in text
    assert "not finished, 60 iterations" in text
    assert "There is no checkpoint yet" in text
    (folder / "metrics.json").write_text("")
    write_report(by_method([read_run(folder)]), path)
    assert figures_of(path) == []
    assert "There is no evaluation yet" in text_of(path)


def test_s2_is_shaded_where_all_runs_have_it(tmp_path):
    runs = []
    for name, s1 in (("a", 40), ("b", 40), ("c", 80)):
        settings = {"REPR.ENABLED": True, "REPR.S1": s1, "REPR.S2": 20}
        folder = write_run(tmp_path / name, settings)
        drop = recording.Drop(0, s1, {"conv": [1]})
        recording.write(folder, recording.History({"conv": 4}, [drop], []))
        runs.append(read_run(folder))
    assert Material(by_method(runs[:2])).spans == [(40, 60)]
    assert Material(by_method(runs)).spans == []


def test_the_longest_run_says_where_s2_was(tmp_path):
    runs = []
    for name, length in (("killed", 50), ("whole", 200)):
        settings = {"REPR.ENABLED": True, "REPR.S1": 40, "REPR.S2": 20, "SOLVER.STEPS": (150,)}
        folder = write_run(tmp_path / name, settings, length=length)
        drops = [
            recording.Drop(n, at, {"conv": [1]}) for n, at in enumerate((40, 100)[: length // 40])
        ]
        recording.write(folder, recording.History({"conv": 4}, drops, []))
        runs.append(read_run(folder))
    arms = by_method(runs)
    assert Material(arms).spans == [(40, 60), (100, 120)]
    assert longest(arms.runs).rate_drops == [150]


def test_layers_are_listed_from_the_image_on():
    fpn, bottom_up = "backbone.fpn_output2", "backbone.bottom_up.res2.0.conv1"
    heads = ["proposal_generator.rpn_head.conv", "roi_heads.box_head.conv1"]
    assert in_depth([fpn, bottom_up, *heads]) == [bottom_up, fpn, *heads]


def test_a_damaged_checkpoint_costs_only_what_depends_on_it(tmp_path, pair):
    _, folder = pair
    run = read_run(folder)
    bad = tmp_path / "model_final.pth"
    bad.write_bytes(b"not a checkpoint")
    damaged = type(run)(run.folder, run.cfg, run.metrics, bad)
    path = write_report(by_method([damaged]), tmp_path / "report.html")
    assert figures_of(path) == ["curves", "drops", "times", "overlap", "overlap_over_time"]
    assert "is damaged or is no checkpoint" in text_of(path)


def test_detectors_are_shown_where_they_differ_with_an_interval(tmp_path):
    runs = squares(
        tmp_path,
        (detections([1, 2, 3, 4]), HALF, False),
        (detections(range(1, 9)), 100.0, True),
    )
    path = write_report(by_method(runs), tmp_path / "report.html", resamples=50)
    assert figures_of(path) == ["curves", "classes", "sizes"]
    text = text_of(path)
    assert "49.5 points higher, with a 95 % interval from" in text
    tiles = re.findall(r"<figcaption>([^<]*)</figcaption></figure>", path.read_text())
    assert tiles == ["ground truth", "standard: 1 mistake", "RePr: 0 mistakes"] * 4


def test_images_that_are_gone_cost_only_the_pictures(tmp_path):
    half = detections([1, 2, 3, 4])
    runs = squares(tmp_path, (half, HALF, False), (detections(range(1, 9)), 100.0, True))
    for image in (tmp_path / "data" / "images").iterdir():
        image.unlink()
    path = write_report(by_method(runs), tmp_path / "report.html", resamples=50)
    assert figures_of(path) == ["curves", "classes", "sizes"]
    assert re.search(r"Held-out images : Image \S*\.png cannot be read \(", text_of(path))


def test_equal_results_are_called_the_same(tmp_path):
    half = detections([1, 2, 3, 4])
    runs = squares(tmp_path, (half, HALF, False), (half, HALF + 0.04, True))
    text = text_of(write_report(by_method(runs), tmp_path / "report.html", resamples=50))
    assert "without it 50.5 %: the same, with a 95 % interval from" in text


def test_a_detector_that_finds_nothing_has_no_figure_of_classes(tmp_path):
    (run,) = squares(tmp_path, ([], 20.0, True))
    nothing = {f"bbox/{key}": float("nan") for key in ("AP", "AP50", "AP75", "APs", "APm", "APl")}
    early = {**dict.fromkeys(nothing, 20.0), "bbox/AP-cat": 20.0, "bbox/AP-dog": 20.0}
    training = {"iteration": 99, "total_loss": 1.0, "lr": 0.1, "time": 0.5}
    records = [{"iteration": 50, **early}, training, {"iteration": 100, **nothing}]
    write_metrics(run.folder, records)
    run = dataclasses.replace(run, metrics=read_metrics(run.folder))
    path = write_report(by_method([run]), tmp_path / "report.html")
    text = text_of(path)
    assert figures_of(path) == ["curves"]
    assert "AP by class : No AP by class was recorded yet" in text
    assert "With RePr the box AP was 0.0 %" in text


def changed(folder, **keys):
    """A run with other keys of its config."""
    run = read_run(folder)
    run.cfg.merge_from_list([part for pair in keys.items() for part in pair])
    return run


def test_a_run_without_a_test_set_keeps_what_needs_none(pair, tmp_path):
    run = changed(pair[1], **{"DATASETS.TEST": ()})
    path = write_report(by_method([run]), tmp_path / "report.html", images=24)
    needs_images = {"cca", "svcca", "cca_by_layer", "similarity"}
    assert figures_of(path) == [name for name in EVERY_FIGURE if name not in needs_images]
    assert "The run has no test set" in text_of(path)


def test_networks_without_common_layers_keep_what_compares_none(pair, tmp_path):
    runs = [
        changed(folder, **{"REPR.INCLUDE": [f"network.features.{layer}"]})
        for folder, layer in zip(pair, (3, 6), strict=True)
    ]
    path = write_report(by_method(runs), tmp_path / "report.html", images=24)
    compares = {"cca", "svcca", "cca_by_layer", "similarity", "overlap_by_layer"}
    assert figures_of(path) == [name for name in EVERY_FIGURE if name not in compares]
    assert "no filter layer in common" in text_of(path)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"SOLVER.MAX_ITER": 1000}, "learning rate 0.001."),
        ({"SOLVER.MAX_ITER": 50000}, "learning rate 0.001, divided by 10 at 30,000."),
        (
            {"SOLVER.MAX_ITER": 40000, "SOLVER.LR_SCHEDULER_NAME": "WarmupCosineLR"},
            "learning rate 0.001, WarmupCosineLR.",
        ),
        (
            {"SOLVER.MAX_EPOCHS": 20, "SOLVER.STEPS_EPOCHS": (12.5, 30)},
            "for 20 epochs of 16 images; SGD, learning rate 0.001, divided by 10 at 12.5.",
        ),
        (
            {"SOLVER.MAX_EPOCHS": 20, "SOLVER.STEPS": (2, 30000)},
            "for 20 epochs of 16 images; SGD, learning rate 0.001, divided by 10 at iteration 2.",
        ),
        (
            {"SOLVER.MAX_ITER": 120, "SOLVER.STEPS_EPOCHS": (4, 8)},
            "for 120 iterations of 16 images; SGD, learning rate 0.001, divided by 10 at epoch 4 "
            "and 8.",
        ),
    ],
)
def test_the_schedule_is_what_was_trained(tmp_path, settings, words):
    run = read_run(write_detection_run(tmp_path / "run", [], 1.0, settings))
    assert words in text_of(write_report(by_method([run]), tmp_path / "report.html"))


@pytest.mark.parametrize(
    ("key", "name"),
    [("NONE", "Faster R-CNN"), ("MASK_ON", "Mask R-CNN"), ("KEYPOINT_ON", "Keypoint R-CNN")],
)
def test_detectors_are_called_by_their_names(tmp_path, key, name):
    settings = {} if key == "NONE" else {f"MODEL.{key}": True}
    run = read_run(write_detection_run(tmp_path / "run", [], 1.0, settings))
    assert f"standard: {name} R50 on" in text_of(
        write_report(by_method([run]), tmp_path / "report.html")
    )


def test_runs_of_the_same_name_are_named_by_their_folders(tmp_path):
    runs = [
        read_run(write_run(tmp_path / side / "seed_0", {"REPR.ENABLED": side == "repr"}))
        for side in ("standard", "repr")
    ]
    page = write_report(by_method(runs), tmp_path / "report.html").read_text()
    assert "<th>standard/seed_0</th><th>repr/seed_0</th>" in page
    assert "stopped: standard/seed_0, repr/seed_0." in page


def test_what_cannot_be_reported_is_refused_and_nothing_written(tmp_path, pair):
    runs = [read_run(folder) for folder in pair]
    page = tmp_path / "report.html"
    for arguments, words in (
        ({"images": 1}, "too few"),
        ({"resamples": -1}, "Set 0 or more"),
    ):
        with pytest.raises(ValueError, match=words):
            write_report(by_method(runs), page, **arguments)
    with pytest.raises(UserError, match="Create it"):
        write_report(by_method(runs), tmp_path / "nowhere" / "report.html")
    page.mkdir()
    with pytest.raises(ValueError, match="is a folder"):
        write_report(by_method(runs), page)
    assert list(tmp_path.iterdir()) == [page]


def test_three_arms_are_each_compared_with_the_baseline(tmp_path):
    half = detections([1, 2, 3, 4])
    runs = squares(
        tmp_path,
        (half, HALF, False),
        (detections(range(1, 9)), 100.0, True),
        (half, HALF, True),
    )
    groups = {name: [run] for name, run in zip(("N 1", "base", "N 5"), runs, strict=True)}
    path = write_report(arms_of(groups, "base"), tmp_path / "report.html", resamples=50)
    text = " ".join(text_of(path).split())
    assert "With N 1 the box AP was 50.5 %, with base 100.0 %: 49.5 points lower" in text
    assert "base N 1 difference 97.5 % interval N 5 difference 97.5 % interval" in text
    assert figures_of(path) == ["curves", "classes", "sizes"]


def test_arms_that_trained_otherwise_are_described_one_by_one(tmp_path):
    changes = {
        "standard": {},
        "N 1": {"REPR.ENABLED": True, "REPR.S1": 40, "REPR.S2": 20, "REPR.N": 1},
        "N 2": {
            "REPR.ENABLED": True, "REPR.S1": 40, "REPR.S2": 20, "REPR.N": 2,
            "REPR.REINIT.DIRECTION": "previous",
        },
    }  # fmt: skip
    runs = {name: [read_run(write_run(tmp_path / name, keys))] for name, keys in changes.items()}
    text = text_of(write_report(arms_of(runs, "standard"), tmp_path / "report.html"))
    assert text.count("Trained on") == 1
    assert "N 1: RePr: 1 cycles of 40 iterations" in text
    assert "N 2: RePr: 2 cycles of 40 iterations" in text
    assert "Filters return orthogonal to what is there." in text
    assert "Filters return as they were." in text


_STATE = """({
    width: document.documentElement.scrollWidth,
    ground: getComputedStyle(document.body).backgroundColor,
    pictures: [...document.images].map(i => [i.naturalWidth, i.getBoundingClientRect().right]),
})"""

_INK = """(async () => {
    const found = {};
    for (const figure of document.querySelectorAll('figure[id]')) {
        const image = figure.querySelector('img');
        const canvas = document.createElement('canvas');
        canvas.width = 200; canvas.height = 200;
        const pen = canvas.getContext('2d');
        pen.drawImage(image, 0, 0, 200, 200);
        const pixels = pen.getImageData(0, 0, 200, 200).data;
        let drawn = 0;
        for (let i = 3; i < pixels.length; i += 4) drawn += pixels[i] > 40;
        found[figure.id] = drawn;
    }
    return found;
})()"""


def assert_readable(page, expected, folder):
    """On a desk and on a phone: nothing too wide, every figure drawn, no complaints."""
    with Browser(folder) as browser:
        for width, scheme in itertools.product((1280, 390), ("light", "dark")):
            browser.open(page, width, scheme=scheme)
            state = browser.ask(_STATE)
            assert state["width"] <= width
            assert len(state["pictures"]) >= len(expected)
            assert all(size > 0 and right <= width for size, right in state["pictures"])
            drawn = browser.ask(_INK)
            assert list(drawn) == expected
            assert min(drawn.values()) > 300, drawn
            bright = sum(map(int, re.findall(r"\d+", state["ground"])[:3])) > 380
            assert bright == (scheme == "light")
            assert len(browser.picture()) > 20_000
            assert browser.problems == []


@needs_chromium
def test_a_browser_shows_every_figure(page, tmp_path):
    assert_readable(page, EVERY_FIGURE, tmp_path)


@needs_chromium
@pytest.mark.slow
def test_a_browser_shows_detectors_of_the_built_in_dataset(tmp_path):
    demo = (
        *("demo", "-o", str(tmp_path / "demo")),
        *("SOLVER.MAX_ITER", "7", "SOLVER.CHECKPOINT_PERIOD", "7", "SOLVER.STEPS", "()"),
        *("REPR.S1", "2", "REPR.S2", "1", "REPR.N", "2", "TEST.EVAL_PERIOD", "7"),
    )
    assert main(demo) == 0
    runs = [read_run(tmp_path / "demo" / name) for name in ("standard", "repr")]
    page = write_report(by_method(runs), tmp_path / "report.html", images=24)
    expected = [*EVERY_FIGURE, "classes", "sizes"]
    assert set(figures_of(page)) == set(expected)
    assert_readable(page, figures_of(page), tmp_path)


def test_the_page_of_the_same_runs_is_the_same(page, pair, tmp_path):
    torch.manual_seed(3)
    again = write_report(
        by_method([read_run(folder) for folder in pair]), tmp_path / "again.html", images=24
    )

    def undated(path):
        return re.sub(r"Written [\d: -]+ by", "", path.read_text())

    assert undated(again) == undated(page)
