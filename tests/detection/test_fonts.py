"""Labels are drawn as they are written."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from detectron2.structures import Boxes, Instances
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from matplotlib import font_manager

from repr_det.detection import fonts
from repr_det.detection.drawing import draw_detections, draw_instances, draw_over
from repr_det.report import plots

UNASSIGNED = "\u0378"
"""No font has it: it is drawn as the box that stands for missing characters."""


@pytest.fixture(autouse=True)
def fresh():
    """Nothing is known of fonts, and nobody was warned."""
    for function in (fonts._file_of, fonts._installed, fonts._characters, fonts._warn):
        function.cache_clear()
    yield
    for function in (fonts._file_of, fonts._installed, fonts._characters, fonts._warn):
        function.cache_clear()


@pytest.fixture
def nothing_installed(monkeypatch):
    monkeypatch.setattr(font_manager, "findSystemFonts", lambda: [])


@pytest.fixture
def chinese(tmp_path, monkeypatch):
    """The only font of the system has two characters, a bar and a triangle."""
    builder = FontBuilder(1000, isTTF=True)
    builder.setupGlyphOrder([".notdef", "bar", "triangle"])
    builder.setupCharacterMap({ord("螺"): "bar", ord("母"): "triangle"})
    glyphs = {}
    shapes = {
        ".notdef": [(0, 0), (0, 50), (50, 50), (50, 0)],
        "bar": [(0, 300), (0, 500), (900, 500), (900, 300)],
        "triangle": [(0, 0), (450, 800), (900, 0)],
    }
    for name, points in shapes.items():
        pen = TTGlyphPen(None)
        pen.moveTo(points[0])
        for point in points[1:]:
            pen.lineTo(point)
        pen.closePath()
        glyphs[name] = pen.glyph()
    builder.setupGlyf(glyphs)
    builder.setupHorizontalMetrics(dict.fromkeys(shapes, (1000, 0)))
    builder.setupHorizontalHeader(ascent=800, descent=-200)
    builder.setupNameTable({"familyName": "Two Characters", "styleName": "Regular"})
    builder.setupOS2()
    builder.setupPost()
    path = tmp_path / "two.ttf"
    builder.save(path)
    monkeypatch.setattr(font_manager, "findSystemFonts", lambda: [str(path)])
    return str(path)


def picture(name, draw=draw_instances):
    found = Instances(
        (40, 60),
        pred_boxes=Boxes(torch.tensor([[2.0, 20.0, 50.0, 38.0]])),
        pred_classes=torch.tensor([0]),
        scores=torch.tensor([0.9]),
    )
    return draw(np.full((40, 60, 3), 128, np.uint8), found, [name])


def sheet(name, tmp_path):
    image = np.full((40, 60, 3), 128, np.uint8)
    nothing = Instances((40, 60), gt_boxes=Boxes(torch.zeros(0, 4)), gt_classes=torch.zeros(0))
    path = tmp_path / "sheet.png"
    draw_detections([(image, nothing)], [], path, [name])
    return path.read_bytes()


@pytest.mark.parametrize("draw", [draw_instances, draw_over])
@pytest.mark.parametrize("name", ["é", "ß", "Ж", "λ", "ğ"])
def test_letters_outside_ascii_are_drawn(nothing_installed, draw, name):
    """Not as the box of a missing character, and each in its own way."""
    assert not np.array_equal(picture(name, draw), picture(UNASSIGNED, draw))
    assert not np.array_equal(picture(name, draw), picture("?", draw))


def test_an_accent_of_its_own_is_joined_to_its_letter(nothing_installed):
    assert np.array_equal(picture("e\u0301te\u0301"), picture("été"))


@pytest.mark.parametrize("draw", [draw_instances, draw_over])
def test_a_font_of_the_system_is_found(chinese, caplog, draw):
    assert fonts.runs("a螺母") == [("a", fonts.DEJAVU), ("螺母", chinese)]
    assert not np.array_equal(picture("螺", draw), picture("母", draw))
    assert not caplog.text


def test_titles_of_a_sheet_are_drawn(chinese, tmp_path):
    assert sheet("螺", tmp_path) != sheet("母", tmp_path)


def test_a_missing_font_is_warned_of_once(nothing_installed, caplog):
    picture("螺母")
    picture("螺 母")
    assert caplog.text.count("No installed font has the characters") == 1
    assert "Noto Sans CJK" in caplog.text


@pytest.mark.parametrize("draw", [draw_instances, draw_over])
@pytest.mark.parametrize("name", ["$x$", "$\\frac$", "a$b$c", "${"])
def test_dollar_signs_are_drawn(draw, name):
    """Without mathematics, each of them takes its place on the label."""
    bare = picture(name.replace("$", ""), draw)
    plate = (picture(name, draw) != bare).any(axis=(0, 2)).nonzero()[0]
    assert len(plate) > 10


def width_of(name):
    """Of a class in the report's figure of classes, in pixels."""
    figure = plots.bars([name], {"RePr": [[0.5]]}, "AP (%)", plots.colours(["RePr"]))
    figure.canvas.draw()
    (label,) = [t for t in figure.axes[0].get_yticklabels() if t.get_text() == name]
    return label.get_window_extent().width, figure


def test_dollar_signs_in_a_figure_are_drawn():
    dollar = width_of("$")[0]
    assert width_of("$\\frac$")[0] > width_of("\\frac")[0] + dollar
    assert plots.as_svg(width_of("$x$")[1])


def test_a_font_of_the_system_is_used_in_a_figure(chinese):
    assert fonts.families(["螺", "été"]) == ["DejaVu Sans", "Two Characters"]
    (first, figure), (second, other) = width_of("螺"), width_of("母")
    assert first > 0 and second > 0 and plots.as_svg(figure) != plots.as_svg(other)
