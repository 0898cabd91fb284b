"""What figures show, by their artists and their pixels."""

from __future__ import annotations

import base64
import re
import xml.etree.ElementTree as ET

import cv2
import numpy as np
import pytest
from matplotlib.colors import to_hex

from repr_det.errors import UserError
from repr_det.report import plots
from repr_det.report.arms import BEFORE, REPR, STANDARD
from repr_det.report.plots import Line, Panel

COLOURS = plots.colours([STANDARD, REPR])


def two_runs(spans=(), rate_drops=()):
    x = np.arange(0, 200, 20)
    lines = [Line(x, 3 - x / 100, COLOURS[side], side) for side in (STANDARD, REPR)]
    panel = Panel("training loss", lines, 0, spans, rate_drops)
    return [panel, Panel("never recorded", [])]


def test_curves_shade_s2_mark_the_rate_and_colour_arms():
    figure = plots.curves(two_runs([(40, 80)], [150]))
    (axes,) = figure.axes  # a panel without lines is left out
    (shade,) = axes.patches
    assert (shade.get_x(), shade.get_width()) == (40, 40)
    colours = {line.get_label(): to_hex(line.get_color()) for line in axes.lines}
    assert colours[STANDARD] == COLOURS[STANDARD] and colours[REPR] == COLOURS[REPR]
    vertical = [line for line in axes.lines if list(line.get_xdata()) == [150, 150]]
    assert len(vertical) == 1
    assert axes.get_xlabel() == "iteration" and axes.get_ylabel() == "training loss"
    said = [text.get_text() for text in figure.legends[0].get_texts()]
    assert said == ["S2: filters dropped", "learning rate falls"]


def test_nothing_recorded_is_said():
    with pytest.raises(ValueError, match="Nothing was recorded"):
        plots.curves([Panel("loss", [])])
    with pytest.raises(ValueError, match="no drops"):
        plots.map_of_layers([], [], np.zeros((0, 0)), "share", "cycle")


def test_the_map_has_a_cell_for_each_layer_and_cycle():
    values = np.array([[0.5, 0.0], [0.1, 0.3], [0.0, 0.0]])
    names = ["net.a.conv", "net.b.conv", "net.c"]
    figure = plots.map_of_layers(names, ["1", "2"], values, "dropped", "cycle", share=True)
    axes = figure.axes[0]
    assert np.array_equal(axes.images[0].get_array(), values)
    assert [label.get_text() for label in axes.get_yticklabels()] == ["a.conv", "b.conv", "c"]
    assert [text.get_text() for text in axes.texts] == ["50", "10", "30"]


def test_names_are_short_but_no_mere_numbers():
    short = plots.shortened
    assert short(["net.features.3", "net.features.6"]) == ["features.3", "features.6"]
    assert short(["net.a.conv", "net.b.3"]) == ["a.conv", "b.3"]
    assert short(["backbone.stem.conv1"]) == ["backbone.stem.conv1"]


def test_heat_maps_print_the_mean_without_the_diagonal():
    table = np.array([[1.0, 0.2, 0.6], [0.2, 1.0, 0.4], [0.6, 0.4, 1.0]])
    constant = np.full((3, 3), np.nan)
    figure = plots.heat_maps({"conv": {BEFORE: table, REPR: constant}}, "correlation", COLOURS)
    first = figure.axes[0]
    assert first.get_title() == BEFORE and first.get_xlabel() == "mean 0.40"
    assert np.ma.getmaskarray(first.images[0].get_array()).diagonal().all()
    assert plots.mean_correlation(table) == pytest.approx(0.4)
    assert np.isnan(plots.mean_correlation(constant))


def test_bars_are_means_over_runs():
    values = {STANDARD: [[10, 20]], REPR: [[30, 40], [50, 60]]}
    figure = plots.bars(["cat", "dog"], values, "AP (%)", COLOURS)
    containers = figure.axes[0].containers
    widths = [[bar.get_width() for bar in container] for container in containers]
    assert widths == [[10, 20], [40, 50]]
    assert [to_hex(c[0].get_facecolor()) for c in containers] == [COLOURS[STANDARD], COLOURS[REPR]]


def test_every_arm_has_its_own_colour():
    assert plots.colours([REPR])[REPR] == COLOURS[REPR]
    many = plots.colours(["base", "a", "b", "c", "d"])
    assert len({many[name] for name in ("base", "a", "b", "c", "d")}) == 5
    assert many["base"] == COLOURS[STANDARD] and many["a"] == COLOURS[REPR]


def test_names_of_arms_are_drawn_in_fonts_that_have_them(monkeypatch):
    asked: set[str] = set()

    def families(names):
        asked.update(names)
        return ["DejaVu Sans"]

    monkeypatch.setattr(plots, "families", families)
    arms, palette = ["\u6807\u51c6", "\u65b0"], plots.colours(["\u6807\u51c6", "\u65b0"])
    x = np.arange(3.0)
    table = np.eye(3)
    for draw in (
        lambda: plots.curves([Panel("loss", [Line(x, x, "black", arm) for arm in arms])]),
        lambda: plots.dots_by_layer(["a", "b", "c"], dict.fromkeys(arms, x), "x", palette),
        lambda: plots.heat_maps({"layer": dict.fromkeys(arms, table)}, "correlation", palette),
        lambda: plots.contributions(dict.fromkeys(arms, x), "x", palette),
        lambda: plots.filter_images(dict.fromkeys(arms, np.ones((2, 3, 4, 4))), palette),
        lambda: plots.bars(["a", "b", "c"], {arm: [x] for arm in arms}, "x", palette),
    ):
        asked.clear()
        draw()
        assert asked >= set(arms)


def test_filters_are_tiled_in_order_and_scaled_one_by_one():
    filters = np.zeros((3, 3, 2, 2))
    filters[0, 0, 0, 0] = 0.001  # red, however small
    filters[2, :, 0, 0] = [-4, -4, 2]
    sheet = np.asarray(plots.filter_images({REPR: filters}, COLOURS).axes[0].images[0].get_array())
    assert sheet.shape == (5, 5, 4)
    assert sheet[0, 0, 0] == 1.0 and sheet[0, 0, 0] > sheet[0, 0, 1]
    assert (sheet[0:2, 3:5, :3] == 0.5).all()  # the second filter is zero
    assert sheet[3, 0, 2] > 0.5 > sheet[3, 0, 0]
    assert sheet[3:, 3:, 3].max() == 0  # there is no fourth


def test_long_names_of_arms_stay_inside_and_apart():
    arms = [f"RePr with {cycles} cycles of S1 and S2 and the rest" for cycles in (1, 3, 5, 7)]
    colours = plots.colours(arms)
    lines = [Line([0, 9], [1, 2], colours[arm], f"{arm} AP50") for arm in arms]
    tables = {"backbone.bottom_up.res4.22.conv2": {arm: np.eye(8) for arm in arms}}
    images = {arm: np.zeros((4, 3, 2, 2)) for arm in arms}
    for figure in (
        plots.curves([Panel("AP", lines)]),
        plots.dots_by_layer(["a"], {arm: [0.1] for arm in arms}, "overlap", colours),
        plots.bars(["cat"], {arm: [[1.0]] for arm in arms}, "AP", colours),
        plots.contributions({arm: [0.0, 1.0] for arm in arms}, "loss", colours),
        plots.heat_maps(tables, "correlation", colours),
        plots.filter_images(images, colours),
    ):
        figure.canvas.draw()
        texts = [axes.title for axes in figure.axes] + [axes.yaxis.label for axes in figure.axes]
        legends = [*figure.legends, *filter(None, (axes.get_legend() for axes in figure.axes))]
        texts += [text for legend in legends for text in legend.get_texts()]
        boxes = [text.get_window_extent() for text in texts if text.get_text()]
        assert all(box.x0 >= 0 and box.x1 <= figure.bbox.x1 for box in boxes)
        assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
        assert min(axes.bbox.width for axes in figure.axes) > 50


def test_svg_follows_the_readers_colours():
    text = plots.as_svg(plots.curves(two_runs([(40, 80)])))
    ET.fromstring(text)
    assert "prefers-color-scheme:dark" in text
    without_style = re.sub(r"<style>.*?</style>", "", text, flags=re.S)
    for colour in ("#1a1a1a", "#cfcfcf", "#ececec", *COLOURS.values()):
        assert colour not in without_style
    assert "#ffffff" not in without_style  # the ground is the reader's, too
    assert plots.as_svg(plots.curves(two_runs([(40, 80)]))) == text
    uri = plots.data_uri(text, "image/svg+xml")
    assert base64.b64decode(uri.partition(",")[2]).decode() == text


def test_figures_are_saved_as_png_or_svg_alone(tmp_path):
    values = {STANDARD: [0.1, 0.4], REPR: [0.2, np.nan]}
    figure = plots.dots_by_layer(["a", "b"], values, "overlap", COLOURS)
    picture = cv2.imread(str(plots.save(figure, tmp_path / "a.png")))
    assert picture.std() > 5 and picture[0, 0].tolist() == [255, 255, 255]
    ET.parse(plots.save(figure, tmp_path / "a.svg"))
    with pytest.raises(ValueError, match="neither in .png nor in .svg"):
        plots.save(figure, tmp_path / "a.jpg")


def test_a_failed_write_leaves_the_earlier_picture(tmp_path, monkeypatch):
    path = tmp_path / "a.png"
    path.write_bytes(b"earlier")

    def full(_):
        raise OSError("No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(UserError, match="a.png cannot be written .No space left on device"):
        plots.save(plots.curves(two_runs()), path)
    assert path.read_bytes() == b"earlier" and list(tmp_path.iterdir()) == [path]
