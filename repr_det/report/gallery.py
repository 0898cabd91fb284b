"""Every figure of a report by name, drawn from runs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from repr_det.detection.coco_results import BBOX
from repr_det.detection.metrics import DETECTION_METRICS, SIZES
from repr_det.engine import recording
from repr_det.engine.recording import History
from repr_det.errors import UserError
from repr_det.report import plots
from repr_det.report.arms import Arms, last_common_evaluation, longest, value_at
from repr_det.report.material import (
    Material,
    in_depth,
    kept_contributions,
    overlap_over_time,
)
from repr_det.report.metrics import BY_NAME, MAIN
from repr_det.report.plots import Line, Panel
from repr_det.report.probes import (
    Matrix,
    filter_correlations,
    first_filters,
    map_correlations,
    overlap,
    similarity,
)
from repr_det.report.run import RunFolder
from repr_det.tasks import CLASSIFICATION, DETECTION

_MOST_CLASSES = 20
_WINDOWS = 60
"""A training curve is as long as this many windows of its running mean."""


class Drawn(NamedTuple):
    """A figure and what its caption says of these runs.

    Attributes:
        figure: the figure.
        caption: in whole sentences.
        values: what is drawn, by network and layer, where there is one number for each.
    """

    figure: Figure
    caption: str
    values: dict[str, dict[str, float]] | None = None


# --- what is recorded


def _smoothed(series: pd.Series) -> pd.Series:
    """Running means; see :data:`_WINDOWS`."""
    window = max(1, len(series) // _WINDOWS)
    means = series.rolling(window).mean()
    means.index = series.index.to_series().rolling(window).mean()
    return means.iloc[window - 1 :]


def _lines(
    material: Material, find: Callable[[RunFolder], pd.Series | None], what: str, **style: str
) -> Iterator[Line]:
    for arm, group in material.arms.groups.items():
        for run in group:
            series = find(run)
            if series is not None:
                colour = material.colours[arm]
                yield Line(series.index, series, colour, f"{arm}{what}", **style)


def _over_training(material: Material, panels: list[Panel]) -> Figure:
    """Panels in which S2 is shaded and falls of the learning rate are marked."""
    marks = {"spans": material.spans, "rate_drops": longest(material.arms.runs).rate_drops}
    return plots.curves([panel._replace(**marks) for panel in panels])


def _curves(material: Material) -> Drawn:
    def trained(name: str, what: str = "") -> list[Line]:
        def find(run: RunFolder) -> pd.Series | None:
            series = run.series(name)
            return None if series is None else _smoothed(series)

        return list(_lines(material, find, what))

    def evaluated(name: str, what: str, **style: str) -> list[Line]:
        return list(_lines(material, lambda run: run.evaluations(name), what, **style))

    if material.task == CLASSIFICATION:
        dots = {"style": "--", "marker": "o"}
        panels = [
            Panel(
                title,
                [*trained(train, ", training"), *evaluated(held_out, ", held-out", **dots)],
            )
            for title, train, held_out in (
                ("loss", "total_loss", "accuracy/loss"),
                (f"{BY_NAME[MAIN[CLASSIFICATION]].title} (%)", "train/top1", MAIN[CLASSIFICATION]),
            )
        ]
        what = "Training curves are running means; held-out ones are of the test set."
    else:
        panels = [Panel("training loss", trained("total_loss"), 0)]
        for metric in (m for m in DETECTION_METRICS if m.name.endswith("/AP")):
            lines = [
                *evaluated(f"{metric.name}50", " AP50", style="--", marker="s"),
                *evaluated(metric.name, " AP", marker="o"),
            ]
            panels.append(Panel(f"held-out {metric.title} (%)", lines, 0))
        what = "The loss is of training batches; AP is of the held-out images."
    drawn = _over_training(material, panels)
    several = any(len(group) > 1 for group in material.arms.groups.values())
    return Drawn(drawn, what + (" A line is a run." if several else ""))


def _overlap(material: Material) -> Drawn:
    if all(run.metrics.empty for run in material.arms.runs):
        return _overlap_by_layer(material)
    means, sums, looked_at = [], [], False
    for arm, group in material.arms.groups.items():
        for run in group:
            recorded = run.series("repr/overlap") is not None
            looked_at |= not recorded
            style = {} if recorded else {"style": "--", "marker": "s"}
            for found, lines in zip(overlap_over_time(run), (means, sums), strict=True):
                if found is not None:
                    lines.append(Line(found.index, found, material.colours[arm], arm, **style))
    panels = [Panel("sum over filters", sums), Panel("mean over filters", means)]
    drawn = _over_training(material, panels)
    note = " Without RePr it is not recorded: squares are of checkpoints." if looked_at else ""
    return Drawn(
        drawn,
        "Filter overlap: the paper's score as printed, the mean |cosine| of a filter to the others "
        "of its layer (with itself counted as 0), of all filters that are there. A drop takes the "
        "dropped ones out of the sum." + note,
    )


def _overlap_over_time(material: Material) -> Drawn:
    run, start = material.with_repr, "repr/overlap/"
    columns = [name for name in run.metrics if name.startswith(start)]
    recorded = run.metrics[columns].rename(columns=lambda name: name.removeprefix(start))
    points = recorded.dropna(how="all").T.to_dict()
    for moment in run.history.overlaps if run.history else ():
        points[moment.iteration] = moment.layers
    if not points:
        raise UserError("No overlap was recorded yet.")
    names = in_depth(list(run.history.layers if run.history else recorded))
    moments = sorted(points)
    values = np.array([[points[i].get(name, math.nan) for i in moments] for name in names])
    labels = [f"{moment:.0f}" for moment in moments]
    drawn = plots.map_of_layers(names, labels, values, "mean filter overlap", "iteration")
    return Drawn(
        drawn,
        "Of the first run with RePr, layers from the image (top) on. Recorded before each drop, "
        "after each return and at evaluations, so columns are moments and not equal times.",
    )


def _overlap_by_layer(material: Material) -> Drawn:
    names = material.layers
    values = {}
    for arm, network in material.networks.items():
        found = overlap(network)
        values[arm] = {name: found[name] for name in names}
    return Drawn(
        _dots(material.colours, values, "mean filter overlap"),
        "Of the newest checkpoints, layers from the image (top) on. Layers of few dimensions have "
        "more overlap by chance.",
        values,
    )


def _drops(material: Material) -> Drawn:
    dropped = material.dropped
    order = in_depth(list(dropped.layers))
    shares = dict(zip(dropped.layers, recording.shares(dropped), strict=True))
    columns = [f"{drop.cycle + 1}" for drop in dropped.drops]
    drawn = plots.map_of_layers(
        order,
        columns,
        np.array([shares[name] for name in order]),
        "dropped filters (% of the layer)",
        "cycle",
        share=True,
    )
    total = sum(dropped.layers.values())
    each = ", ".join(f"{sum(map(len, d.pruned.values())):,}" for d in dropped.drops)
    when = ", ".join(f"{drop.iteration:,}" for drop in dropped.drops)
    return Drawn(
        drawn,
        "Of the first run with RePr, layers from the image (top) on. Dropped "
        f"{each} of {total:,} filters, at iteration {when}.",
    )


def expected_by_chance(dropped: History) -> np.ndarray:
    """(drops + 1,), how many filters would be dropped 0, 1, ... times by chance.

    By chance, a drop takes as many filters of each layer as it did, drawn at random.
    """
    expected = np.zeros(len(dropped.drops) + 1)
    filters = dropped.layers.values()
    for number, row in zip(filters, recording.shares(dropped), strict=True):
        times = np.ones(1)
        for share in row:
            times = np.convolve(times, [1 - share, share])
        expected += number * times
    return expected


def _times(material: Material) -> Drawn:
    dropped = material.dropped
    if len(dropped.drops) < 2:
        raise UserError("Fewer than two drops so far, so no filter can have been dropped twice.")
    times = np.concatenate(list(recording.times_dropped(dropped).values()))
    counts = np.bincount(times, minlength=len(dropped.drops) + 1)
    chance = expected_by_chance(dropped)
    return Drawn(
        plots.times_dropped(counts, chance),
        f"{counts[2:].sum():,} of {counts.sum():,} filters were dropped more than once; "
        f"{chance[2:].sum():,.0f} would have been by chance, had each drop taken as many of each "
        f"layer at random. {counts[0]:,} were never dropped.",
    )


# --- what networks do


def _dots(palette: Mapping[str, str], values: dict[str, dict[str, float]], label: str) -> Figure:
    names = list(next(iter(values.values())))
    listed = {arm: [by_layer[name] for name in names] for arm, by_layer in values.items()}
    return plots.dots_by_layer(names, listed, label, palette)


def _maps(material: Material, kind: str, compare: Callable[[Matrix], Matrix], label: str) -> Figure:
    """Heat maps of the shown layers, from :class:`Responses` of one kind."""
    tables = {}
    short = dict(zip(material.layers, plots.shortened(material.layers), strict=True))
    for layer in material.shown_layers:
        found = {arm: getattr(seen, kind).get(layer) for arm, seen in material.responses.items()}
        if any(array is not None for array in found.values()):
            tables[short[layer]] = {
                arm: None if array is None else compare(array) for arm, array in found.items()
            }
    if not tables:
        raise UserError("None of the layers answers with maps of two dimensions.")
    return plots.heat_maps(tables, label, material.colours)


def _cca(material: Material) -> Drawn:
    drawn = _maps(material, "sampled", filter_correlations, "canonical correlation of two filters")
    return Drawn(
        drawn,
        "Rows and columns are the filters of a layer: its first, a middle and its last layer. A "
        f"filter is one variable, observed at positions of {material.images} held-out images "
        "before any non-linearity, so the correlation is |Pearson's|. Darker is less redundant.",
    )


def _svcca(material: Material) -> Drawn:
    drawn = _maps(material, "pooled", map_correlations, "SVCCA of two filters")
    return Drawn(
        drawn,
        f"The same layers, at most 64 filters of each: here a filter's map, pooled to a few cells, "
        f"is observed in each of {material.images} images, and directions beyond 99 % of its "
        "variance are left out. So few images raise all values alike.",
    )


def _cca_by_layer(material: Material) -> Drawn:
    values = {}
    for arm, found in material.responses.items():
        values[arm] = {
            name: plots.mean_correlation(filter_correlations(found.sampled[name]))
            if name in found.sampled
            else math.nan
            for name in material.layers
        }
    return Drawn(
        _dots(material.colours, values, "mean correlation of two filters"),
        "Mean of the heat map's values over all pairs of different filters, for every layer from "
        "the image (top) on.",
        values,
    )


def _similarity(material: Material) -> Drawn:
    baseline = material.arms.baseline
    others = [name for name in material.arms.others if name in material.networks]
    if baseline not in material.networks or not others:
        raise UserError("This figure compares checkpoints of two arms. Set a run of each.")
    first, *seconds = (material.responses[arm] for arm in (baseline, *others))
    whole = first.whole.intersection(*(second.whole for second in seconds))
    names = [name for name in material.layers if name in whole]
    if not names:
        raise UserError("No filter layer that the networks have in common sees whole images.")
    values, palette = {}, {}
    for arm, second in zip(others, seconds, strict=True):
        palette[f"{baseline} and {arm}"] = material.colours[arm]
        values[f"{baseline} and {arm}"] = {
            name: similarity(first.sampled[name], second.sampled[name]) for name in names
        }
    left_out = len(names) < len(material.layers)
    return Drawn(
        _dots(palette, values, "CKA of the layer in both networks"),
        "How similar two networks' layers respond to the same images: 1 if the responses of one "
        "are those of the other, rotated and scaled; 0 for unrelated ones (debiased linear CKA)."
        + (" Layers that see boxes are left out: the boxes differ." if left_out else ""),
        values,
    )


def _contributions(material: Material) -> Drawn:
    kept = {arm: kept_contributions(group[0]) for arm, group in material.arms.groups.items()}
    values = {arm: np.concatenate(list(found.values())) for arm, found in kept.items() if found}
    if not values:
        raise UserError(
            "Not computed yet. Run `repr-det figure contributions RUN` (one forward pass a filter)."
        )
    share = {arm: 100 * float((found <= 0).mean()) for arm, found in values.items()}
    words = ", ".join(f"{value:.0f} % of {arm}" for arm, value in share.items())
    label = "training loss gained by zeroing the filter"
    return Drawn(
        plots.contributions(values, label, material.colours),
        f"The greedy oracle: one filter at a time. Zeroing does not raise the loss for {words}.",
    )


def _filters(material: Material) -> Drawn:
    found = {name: first_filters(network) for name, network in material.networks.items()}
    found = {name: weights for name, weights in found.items() if weights is not None}
    if not found:
        raise UserError("The networks have no convolution over two dimensions that reads images.")
    return Drawn(
        plots.filter_images(found, material.colours),
        "Each filter by itself: grey is its mean. RePr does not rank this layer by default, so it "
        "differs only through the others.",
    )


# --- what detectors find


def _ap(material: Material, what: str, names: Mapping[str, str], title: str) -> Drawn:
    """Bars at the last evaluation that all runs have, of the metrics that every run has there."""
    material.check_detection()
    runs = material.arms.runs
    at = last_common_evaluation(runs)
    names = {
        metric: name
        for metric, name in names.items()
        if at is not None and all(value_at(run, metric, at) is not None for run in runs)
    }
    if not names:
        raise UserError(f"No {what} was recorded yet.")
    values = {
        arm: [[value_at(run, metric, at) for metric in names] for run in group]
        for arm, group in material.arms.groups.items()
    }
    caption = f"{title}, at iteration {at:,}."
    order = range(len(names))
    if len(names) > _MOST_CLASSES:
        means = [np.mean(runs, axis=0) for runs in values.values()]
        spread = np.ptp(means, axis=0) if len(means) > 1 else -means[0]
        order = np.sort(np.argsort(-spread, kind="stable")[:_MOST_CLASSES])
        which = "differ most" if len(means) > 1 else "are worst"
        caption += f" Of {len(names)} classes the {_MOST_CLASSES} that {which}."
        values = {n: [[run[i] for i in order] for run in runs] for n, runs in values.items()}
    labels = [list(names.values())[i] for i in order]
    return Drawn(plots.bars(labels, values, "AP (%)", material.colours), caption)


def _classes(material: Material) -> Drawn:
    start = f"{BBOX}/AP-"
    names = {
        n: n.removeprefix(start) for n in material.arms.runs[0].evaluated() if n.startswith(start)
    }
    return _ap(material, "AP by class", names, "Box AP of each class")


def _sizes(material: Material) -> Drawn:
    names = {f"{BBOX}/{key}": word for key, word in SIZES.items()}
    title = "Box AP by size of the objects (small below 32 x 32 pixels, large from 96 x 96)"
    return _ap(material, "AP by size", names, title)


class Entry(NamedTuple):
    """A figure of a report.

    Attributes:
        title: of the figure.
        section: of the page.
        draw: draws it; raises UserError where it cannot.
        repr_only: it needs a RePr run.
        arms: how many it needs at least.
        by_layer: it has a number for each layer, see :class:`Drawn`.
    """

    title: str
    section: str
    draw: Callable[[Material], Drawn]
    repr_only: bool = False
    arms: int = 1
    by_layer: bool = False

    def applies(self, arms: Arms) -> bool:
        """Whether it says anything about these runs."""
        return (
            (self.section != DETECTION or arms.runs[0].task == DETECTION)
            and len(arms.groups) >= self.arms
            and (bool(arms.with_repr) or not self.repr_only)
        )


_DROPS, _REDUNDANCY = "dropping", "redundancy"

FIGURES: dict[str, Entry] = {
    "curves": Entry("Loss and metrics over training", "training", _curves),
    "drops": Entry("Which filters were dropped when", _DROPS, _drops, repr_only=True),
    "times": Entry("Filters dropped again", _DROPS, _times, repr_only=True),
    "overlap": Entry("Filter overlap over training", _REDUNDANCY, _overlap),
    "overlap_over_time": Entry(
        "Filter overlap by layer over training", _REDUNDANCY, _overlap_over_time, repr_only=True
    ),
    "overlap_by_layer": Entry(
        "Filter overlap by layer, before and after", _REDUNDANCY, _overlap_by_layer, by_layer=True
    ),
    "cca_by_layer": Entry(
        "Correlation of filters by layer", _REDUNDANCY, _cca_by_layer, by_layer=True
    ),
    "cca": Entry("Correlation of filters inside a layer", _REDUNDANCY, _cca),
    "svcca": Entry("The same by SVCCA", _REDUNDANCY, _svcca),
    "similarity": Entry(
        "The arms compared layer by layer", _REDUNDANCY, _similarity, arms=2, by_layer=True
    ),
    "contributions": Entry("What each filter contributes", _REDUNDANCY, _contributions),
    "filters": Entry("First-layer filters", _REDUNDANCY, _filters),
    "classes": Entry("AP by class", DETECTION, _classes),
    "sizes": Entry("AP by size", DETECTION, _sizes),
}
"""In the order of a report, by the names of ``repr-det figure`` and of the page's anchors."""
