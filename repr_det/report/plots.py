"""Figures of runs: plain data in, a matplotlib figure out.

All are drawn for a column of a page: legible at 350 pixels of width. Colours are those of Okabe and
Ito, which colour-blind people can tell apart; an arm has the same one everywhere.
"""

from __future__ import annotations

import base64
import io
import itertools
import os
import re
import textwrap
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib import rc_context
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap, to_hex
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator
from numpy.typing import ArrayLike, NDArray

from repr_det.detection.drawing import COLOURS
from repr_det.detection.fonts import families
from repr_det.engine.files import write_whole, writing
from repr_det.errors import UserError
from repr_det.report.arms import BEFORE, REPR, STANDARD

_BLUE, _ORANGE, _GREEN, _PURPLE, _SKY, _VERMILION, _ = (to_hex(np.array(c) / 255) for c in COLOURS)
_GREY = "#808080"

ARM_COLOURS = (_BLUE, _VERMILION, _GREEN, _PURPLE, _ORANGE, _SKY)
"""Of the baseline, and of the other arms in their order."""

_INK, _FAINT, _SHADE = "#1a1a1a", "#cfcfcf", "#ececec"
"""Text and axes, grids, and the spans of S2."""

_DARK = {
    **{_INK: "#e6e6e6", _FAINT: "#4a4a4a", _SHADE: "#343434", _GREY: "#a0a0a0"},
    **{_BLUE: "#56b4e9", _VERMILION: "#f08a4b", _GREEN: "#35c29c"},
    **{_PURPLE: "#dd9bc0", _ORANGE: "#e6a92e", _SKY: "#8ccbf0"},
}
"""What a page on a dark ground has in place of each colour."""

WIDTH = 4.6
"""Inches."""

_LETTER = 0.08
"""Width of a letter in inches, rather more than less."""

_ROW, _TALLEST = 0.19, 9.0
"""Height of a layer's row and the most that all rows have together, in inches."""

_METADATA: dict[str, dict[str, None]] = {".png": {}, ".svg": {"Date": None, "Creator": None}}
"""By suffix, what is left out of a file so that the same figure is the same file."""

_SHARE_MAP = LinearSegmentedColormap.from_list("share", ["#ffffff", _SKY, _BLUE, "#00263e"])


class Line(NamedTuple):
    """One series of a panel.

    Attributes:
        x: (n,)
        y: (n,)
        colour: of matplotlib.
        label: in the legend, the same for lines that mean the same.
        style: of matplotlib.
        marker: of matplotlib, or empty.
        spread: (n,), shaded this far to both sides; None for no shade.
    """

    x: ArrayLike
    y: ArrayLike
    colour: str
    label: str
    style: str = "-"
    marker: str = ""
    spread: ArrayLike | None = None


class Panel(NamedTuple):
    """One pair of axes over iterations.

    Attributes:
        ylabel: with its unit.
        lines: what to draw.
        bottom: lower limit of y, None for matplotlib's choice.
        spans: of S2, shaded in this panel.
        rate_drops: where the learning rate falls, marked in this panel.
    """

    ylabel: str
    lines: Sequence[Line]
    bottom: float | None = None
    spans: Sequence[tuple[float, float]] = ()
    rate_drops: Sequence[float] = ()


def colours(arms: Sequence[str]) -> dict[str, str]:
    """The colour of each arm, the baseline first, and of what training began with.

    RePr keeps its colour where it is the only arm.
    """
    own = {} if list(arms) == [REPR] else zip(arms, itertools.cycle(ARM_COLOURS), strict=False)
    return {STANDARD: _BLUE, REPR: _VERMILION, BEFORE: _GREY} | dict(own)


def _style(names: Sequence[str] = ()) -> AbstractContextManager:
    """The look of every figure.

    Args:
        names: texts of the user's, for which there must be fonts.
    """
    return rc_context(
        {
            "font.family": families(names),
            "text.parse_math": False,  # a name may have dollar signs
            "font.size": 9.5,
            "axes.titlesize": 9.5,
            "axes.labelsize": 9.5,
            "legend.fontsize": 8.5,
            "xtick.labelsize": 8.5,
            "ytick.labelsize": 8.5,
            "lines.linewidth": 1.5,
            "lines.markersize": 4,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "axes.axisbelow": True,
            "axes.facecolor": "none",
            "grid.color": _FAINT,
            "grid.linewidth": 0.5,
            "text.color": _INK,
            "axes.edgecolor": _INK,
            "axes.labelcolor": _INK,
            "xtick.color": _INK,
            "ytick.color": _INK,
            "legend.frameon": False,
            "svg.hashsalt": "repr_det",
        }
    )


def _figure(height: float) -> Figure:
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    figure.patch.set_alpha(0)
    FigureCanvasAgg(figure)
    return figure


def curves(panels: Sequence[Panel], *, xlabel: str = "iteration", spread: str = "") -> Figure:
    """Series over iterations, panels below one another.

    Args:
        panels: those without lines are left out.
        xlabel: what time is counted in.
        spread: what the spread of the lines is, where any has one.

    Raises:
        UserError: nothing to draw.
    """
    panels = [panel for panel in panels if panel.lines]
    if not panels:
        raise UserError("Nothing was recorded yet that could be drawn over iterations.")
    with _style([line.label for panel in panels for line in panel.lines]):
        figure = _figure(0.4 + 2.2 * len(panels))
        every = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
        shown: list[str] = []
        for axes, panel in zip(every, panels, strict=True):
            _draw_panel(axes, panel)
            handles = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
            if list(handles) != shown:  # above the axes, where no line is in the way
                place = {"loc": "lower left", "bbox_to_anchor": (0, 1), "borderaxespad": 0.2}
                _legend(axes, handles, **place)
                shown = list(handles)
        lines = [line for panel in panels for line in panel.lines]
        last = max(np.max(line.x) for line in lines if len(line.x))
        every[-1].set_xlabel(xlabel)
        every[-1].set_xlim(0, 1.02 * max(last, 1))
        every[-1].xaxis.set_major_locator(MaxNLocator(6, integer=True))
        marks = {}
        if any(panel.spans for panel in panels):
            marks["S2: filters dropped"] = Patch(color=_SHADE)
        if any(line.spread is not None for line in lines):
            marks[spread] = Patch(color=_INK, alpha=0.25, linewidth=0)
        if any(panel.rate_drops for panel in panels):
            marks["learning rate falls"] = Line2D([], [], color=_INK, linestyle=":", linewidth=1)
        if marks:
            _legend(figure, marks)
    return figure


def over_values(table: pd.DataFrame, ylabel: str) -> Figure:
    """Series over a few values of a setting, on a logarithmic axis.

    Args:
        table: (values, series), NaN where there is none. The name of its index labels the axis.
        ylabel: what the numbers are, with their unit.
    """
    with _style():
        figure = _figure(2.6)
        axes = figure.subplots()
        for name, colour in zip(table, itertools.cycle(ARM_COLOURS), strict=False):
            if table[name].notna().any():
                axes.plot(table[name], color=colour, marker="o", label=name)
        axes.set_xscale("log")
        axes.set_xticks(table.index, [f"{value:g}" for value in table.index])
        axes.minorticks_off()
        axes.set_xlabel(table.index.name)
        axes.set_ylabel(ylabel)
        if handles := {str(line.get_label()): line for line in axes.lines}:
            _legend(figure, handles)
    return figure


def _legend(where: Axes | Figure, handles: Mapping[str, Artist], **place: Any) -> None:
    """A legend above in as many columns as its labels have room for; the figure grows with it."""
    place = place or {"loc": "outside upper center"}
    labels = [_wrapped(label, WIDTH - 1) for label in handles]
    widths = [0.55 + 0.07 * max(map(len, label.split("\n"))) for label in labels]
    room = WIDTH - 0.6
    columns = len(labels) if sum(widths) < room else max(1, int(room / max(widths)))
    where.legend(handles.values(), labels, ncols=columns, **place)
    figure = where.get_figure()
    figure.set_figheight(figure.get_figheight() + 0.17 * (-(-len(labels) // columns) - 1))


def _wrapped(text: str, width: float) -> str:
    """A text in lines of at most some inches, about."""
    return textwrap.fill(text, max(6, int(width / _LETTER)))


def _extra(titles: Mapping[str, str]) -> float:
    """Height in inches of the lines that titles have after the first."""
    return 0.17 * max(title.count("\n") for title in titles.values())


def _draw_panel(axes: Axes, panel: Panel) -> None:
    for begin, end in panel.spans:
        axes.axvspan(begin, end, color=_SHADE, zorder=0, linewidth=0)
    for drop in panel.rate_drops:
        axes.axvline(drop, color=_INK, linestyle=":", linewidth=1)
    for line in panel.lines:
        marker = line.marker or ("." if len(line.x) == 1 else "")  # a single point is no line
        style = {"linestyle": line.style, "marker": marker, "label": line.label}
        axes.plot(line.x, line.y, color=line.colour, **style)
        if line.spread is not None:
            middle, around = np.asarray(line.y), np.asarray(line.spread)
            ends = middle - around, middle + around
            axes.fill_between(line.x, *ends, color=line.colour, alpha=0.25, linewidth=0)
    axes.set_ylabel(panel.ylabel)
    axes.set_ylim(bottom=panel.bottom)


def map_of_layers(
    names: Sequence[str],
    columns: Sequence[str],
    values: ArrayLike,
    label: str,
    xlabel: str,
    *,
    share: bool = False,
) -> Figure:
    """A number for each layer and moment: layers down, time across.

    Args:
        names: of the layers.
        columns: what each moment is called.
        values: (layers, moments); NaN where there is none.
        label: of the colours, with its unit.
        xlabel: what a moment is.
        share: values are shares in [0, 1], printed in per cent where there is room.

    Raises:
        UserError: no layers, or no moments.
    """
    values = np.asarray(values, dtype=float)
    if not values.size:
        raise UserError("There are no drops or records of layers yet.")
    names = shortened(names)
    with _style():
        figure = _figure(1.3 + min(_TALLEST, max(0.9, _ROW * len(names))))
        axes = figure.subplots()
        limits = {"vmin": 0, "vmax": max(0.5, np.nanmax(values))} if share else {}
        image = axes.imshow(
            values,
            aspect="auto",
            interpolation="none",
            cmap=_SHARE_MAP if share else "viridis",
            **limits,
        )
        _row_labels(axes, names)
        step = -(-len(columns) // 6)
        axes.set_xticks(range(0, len(columns), step), columns[::step])
        axes.set_xlabel(xlabel)
        axes.grid(False)
        if share and _ROW * len(names) <= _TALLEST and len(columns) <= 8:
            _print_shares(axes, values, limits["vmax"])
        bar = figure.colorbar(image, ax=axes, location="top", aspect=40, pad=0.02)
        bar.set_label(label)
        bar.outline.set_visible(False)
        if share:
            bar.ax.xaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f}")
    return figure


def _print_shares(axes: Axes, values: NDArray[np.float64], largest: float) -> None:
    for row, column in np.argwhere(values > 0):
        value = values[row, column]
        ink = "#ffffff" if value > 0.55 * largest else "#111111"
        place = {"ha": "center", "va": "center", "fontsize": 7}
        axes.text(column, row, f"{100 * value:.0f}", color=ink, **place)


def shortened(names: Sequence[str]) -> list[str]:
    """Names without the dotted parts with which all of them begin; a number never stands alone."""
    parts = [name.split(".") for name in names]
    common = len(os.path.commonprefix([p[:-1] for p in parts])) if len(parts) > 1 else 0
    if common and any(p[common:] == [p[-1]] and p[-1].isdigit() for p in parts):
        common -= 1
    return [".".join(p[common:]) for p in parts]


def _row_labels(axes: Axes, names: Sequence[str]) -> None:
    step = -(-len(names) // 55)
    size = 8.5 if len(names) <= 12 else 7.0
    axes.set_yticks(range(0, len(names), step), names[::step], fontsize=size)
    axes.tick_params(axis="y", length=0)


def dots_by_layer(
    names: Sequence[str],
    values: Mapping[str, ArrayLike],
    xlabel: str,
    palette: Mapping[str, str],
) -> Figure:
    """One number for each layer and network, layers down.

    Args:
        names: of the layers.
        values: by network, (layers,); NaN where there is none.
        xlabel: what the number is, with its unit.
        palette: from :func:`colours`.
    """
    with _style([*values]):
        figure = _figure(1.0 + min(_TALLEST, max(0.9, _ROW * len(names))))
        axes = figure.subplots()
        size = 20 if _ROW * len(names) <= _TALLEST else 8
        markers = {BEFORE: "|", next((n for n in values if n != BEFORE), None): "s"}
        for network, numbers in values.items():
            axes.scatter(
                numbers,
                range(len(names)),
                size,
                color=palette.get(network, _INK),
                marker=markers.get(network, "o") if len(values) > 1 else "o",
                label=network,
            )
        _row_labels(axes, shortened(names))
        axes.set_ylim(len(names) - 0.4, -0.6)
        axes.set_xlabel(xlabel)
        axes.set_xlim(left=0)
        if len(values) > 1:
            handles, labels = axes.get_legend_handles_labels()
            _legend(figure, dict(zip(labels, handles, strict=True)))
    return figure


def times_dropped(counts: ArrayLike, by_chance: ArrayLike) -> Figure:
    """How many filters were dropped how often.

    Args:
        counts: (cycles + 1,), number of filters that were dropped 0, 1, ... times.
        by_chance: (cycles + 1,), expected if each drop had taken as many of each layer at random.
    """
    with _style():
        figure = _figure(2.2)
        axes = figure.subplots()
        frame = pd.DataFrame({"RePr": counts, "by chance": by_chance}).melt(ignore_index=False)
        palette = {"RePr": _VERMILION, "by chance": _GREY}
        kind = {"x": frame.index, "y": "value", "hue": "variable", "palette": palette}
        sns.barplot(frame, **kind, saturation=1, ax=axes)
        axes.bar_label(axes.containers[0], fmt="%.0f", fontsize=8)
        axes.set_xlabel("times dropped")
        axes.set_ylabel("filters")
        axes.margins(y=0.15)
        axes.grid(axis="x", visible=False)
        axes.legend()
    return figure


def heat_maps(
    layers: Mapping[str, Mapping[str, NDArray[np.float64] | None]],
    label: str,
    palette: Mapping[str, str],
) -> Figure:
    """Square tables of correlations: a row for each layer, a column for each network.

    Args:
        layers: by layer, then by network, (filters, filters) in [0, 1]; NaN for constant filters,
            None where there is none. All layers have the same networks.
        label: of the colours.
        palette: from :func:`colours`.
    """
    networks = list(next(iter(layers.values())))
    with _style(networks):
        side = WIDTH / max(2.2, len(networks))
        titles = {network: _wrapped(network, side - 0.25) for network in networks}
        figure = _figure(0.75 + (side + 0.18) * len(layers) + _extra(titles))
        grid = figure.subplots(len(layers), len(networks), squeeze=False)
        for number, (layer, tables) in enumerate(layers.items()):
            row = grid[number]
            for axes, (network, table) in zip(row, tables.items(), strict=True):
                axes.set_xticks([])
                axes.set_yticks([])
                axes.grid(False)
                axes.set_box_aspect(1)
                if number == 0:
                    axes.set_title(titles[network], color=palette.get(network, _INK))
                if table is None:
                    axes.text(0.5, 0.5, "none", ha="center", va="center")
                    continue
                image = axes.imshow(
                    np.where(np.eye(len(table)), np.nan, table),
                    vmin=0,
                    vmax=1,
                    cmap="viridis",
                    interpolation="none" if len(table) <= 128 else "antialiased",
                )
                axes.set_xlabel(f"mean {mean_correlation(table):.2f}", fontsize=8.5)
            # In small print, and broken at its dots.
            name = _wrapped(layer.replace(".", ". "), 1.4 * side).replace(". ", ".")
            row[0].set_ylabel(f"{name}\n{_size(tables)} filters", fontsize=8)
        bar = figure.colorbar(image, ax=list(grid[-1]), location="bottom", aspect=40, pad=0.05)
        bar.set_label(label)
        bar.outline.set_visible(False)
    return figure


def _size(tables: Mapping[str, NDArray[np.float64] | None]) -> int:
    return next(len(table) for table in tables.values() if table is not None)


def mean_correlation(table: ArrayLike) -> float:
    """Mean over the pairs of different filters of a table of correlations.

    Args:
        table: (filters, filters); NaN for constant filters, which do not count.

    Returns:
        NaN where fewer than two filters respond at all.
    """
    array = np.asarray(table, dtype=float)
    others = array[~np.eye(len(array), dtype=bool) & ~np.isnan(array)]
    return float(others.mean()) if others.size else float("nan")


def contributions(
    values: Mapping[str, ArrayLike], xlabel: str, palette: Mapping[str, str]
) -> Figure:
    """How much each filter contributes: distributions, one for each arm.

    Args:
        values: by arm, (filters,).
        xlabel: what a contribution is, with its unit.
        palette: from :func:`colours`.
    """
    with _style([*values]):
        figure = _figure(2.3)
        axes = figure.subplots()
        labels = {arm: f"{arm}, median {np.median(array):.2g}" for arm, array in values.items()}
        frame = pd.concat([pd.DataFrame({"x": v, "arm": labels[n]}) for n, v in values.items()])
        by_label = {labels[arm]: palette.get(arm, _INK) for arm in values}
        kind = {"x": "x", "hue": "arm", "bins": 40, "element": "step", "alpha": 0.25}
        sns.histplot(frame, palette=by_label, legend=False, ax=axes, **kind)
        _legend(figure, {label: Patch(color=colour) for label, colour in by_label.items()})
        axes.set_xlabel(xlabel)
        axes.set_ylabel("filters")
    return figure


def filter_images(filters: Mapping[str, NDArray[np.float64]], palette: Mapping[str, str]) -> Figure:
    """The filters of a first layer as small images, one sheet a network.

    Each filter is shown by itself: its mean is grey and its largest weight full colour.

    Args:
        filters: by network, (filters, channels, height, width); three channels are shown as RGB,
            others as their mean.
        palette: from :func:`colours`.
    """
    with _style([*filters]):
        columns = len(filters)
        side = WIDTH / max(columns, 1.6)
        titles = {network: _wrapped(network, side - 0.15) for network in filters}
        figure = _figure(0.3 + side + _extra(titles))
        for axes, (network, weights) in zip(
            figure.subplots(1, columns, squeeze=False)[0], filters.items(), strict=True
        ):
            axes.imshow(_tiled(np.asarray(weights, dtype=float)), interpolation="none")
            axes.set_title(titles[network], color=palette.get(network, _INK))
            axes.axis("off")
    return figure


def _tiled(weights: NDArray[np.float64]) -> NDArray[np.float64]:
    """(height, width, 4), all filters on a transparent ground."""
    images = weights if weights.shape[1] == 3 else weights.mean(axis=1, keepdims=True).repeat(3, 1)
    images = images - images.mean(axis=(1, 2, 3), keepdims=True)
    largest = np.abs(images).max(axis=(1, 2, 3), keepdims=True)
    images = 0.5 + 0.5 * images / np.where(largest > 0, largest, 1)
    count, _, height, width = images.shape
    columns = int(np.ceil(np.sqrt(count)))
    rows = -(-count // columns)
    gap = max(1, round(height / 6))
    sheet = np.zeros((rows * (height + gap) - gap, columns * (width + gap) - gap, 4))
    for number, image in enumerate(images):
        top, left = (number // columns) * (height + gap), (number % columns) * (width + gap)
        sheet[top : top + height, left : left + width, :3] = image.transpose(1, 2, 0)
        sheet[top : top + height, left : left + width, 3] = 1
    return sheet


def bars(
    names: Sequence[str],
    values: Mapping[str, Sequence[ArrayLike]],
    xlabel: str,
    palette: Mapping[str, str],
) -> Figure:
    """A number for each name and arm, names down; a dot for each run where there are several.

    Args:
        names: of what is compared, for example classes.
        values: by arm, (names,) of each of its runs.
        xlabel: what the number is, with its unit.
        palette: from :func:`colours`.
    """
    frame = pd.DataFrame(
        [
            {"name": name, "arm": arm, "value": value}
            for arm, runs in values.items()
            for run in runs
            for name, value in zip(names, np.asarray(run, dtype=float), strict=True)
        ]
    )
    with _style([*names, *values]):
        figure = _figure(0.9 + 0.13 * len(values) * len(names) + 0.1 * len(names))
        axes = figure.subplots()
        kind = {"data": frame, "x": "value", "y": "name", "hue": "arm", "ax": axes, "orient": "h"}
        arms = {arm: palette[arm] for arm in values}
        sns.barplot(**kind, palette=arms, saturation=1, errorbar=None, legend=False)
        if any(len(runs) > 1 for runs in values.values()):
            ink = dict.fromkeys(values, _INK)
            sns.stripplot(**kind, palette=ink, dodge=True, jitter=False, size=3, legend=False)
        axes.tick_params(axis="y", length=0)
        axes.set_xlabel(xlabel)
        axes.set_ylabel(None)
        axes.grid(axis="y", visible=False)
        if len(values) > 1:
            _legend(figure, {arm: Patch(color=colour) for arm, colour in arms.items()})
    return figure


# --- out


def as_svg(figure: Figure) -> str:
    """A figure as SVG that follows the reader's light or dark colours, background left open."""
    buffer = io.StringIO()
    with _style():
        figure.savefig(buffer, format="svg", metadata=_METADATA[".svg"])
    text = re.sub(r"<\?xml.*?\?>\s*<!DOCTYPE[^>]*>\s*", "", buffer.getvalue(), flags=re.S)
    for number, colour in enumerate(_DARK):
        text = text.replace(colour, f"var(--c{number})")
    light, dark = (
        ";".join(f"--c{number}:{colour}" for number, colour in enumerate(values))
        for values in (_DARK, _DARK.values())
    )
    style = f"svg{{{light}}}@media(prefers-color-scheme:dark){{svg{{{dark}}}}}"
    return re.sub(r"(<svg[^>]*>)", rf"\1<style>{style}</style>", text, count=1)


def data_uri(content: bytes | str, kind: str) -> str:
    """What an ``img`` of a self-contained page has as its source.

    Args:
        content: of the file.
        kind: its media type, ``image/svg+xml`` say.
    """
    raw = content.encode() if isinstance(content, str) else content
    return f"data:{kind};base64,{base64.b64encode(raw).decode()}"


def check_suffix(path: Path) -> None:
    """Refuse to save a figure as anything but PNG or SVG.

    Raises:
        UserError: another suffix.
    """
    if path.suffix not in _METADATA:
        raise UserError(f"{path} ends neither in .png nor in .svg. Set one of them.")


def save(figure: Figure, path: str | Path) -> Path:
    """Write a figure as PNG or SVG, by the suffix of its path, on white.

    Raises:
        UserError: another suffix, or it cannot be written.
    """
    path = Path(path)
    check_suffix(path)
    with _style():
        kind = {"format": path.suffix[1:], "metadata": _METADATA[path.suffix]}
        with writing(path):
            write_whole(path, lambda file: figure.savefig(file, dpi=200, facecolor="white", **kind))
    return path
