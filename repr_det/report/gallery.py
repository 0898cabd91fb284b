"""Every figure of a report by name, drawn from runs."""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
from detectron2.data import DatasetCatalog, MetadataCatalog
from matplotlib.figure import Figure
from tqdm import tqdm

from repr_det.detection.coco_results import BBOX, read_results, read_truth
from repr_det.detection.evaluation import annotations_of
from repr_det.engine import recording
from repr_det.engine.files import write_text_whole
from repr_det.engine.recording import History
from repr_det.errors import UserError, sentence
from repr_det.report import examples, plots
from repr_det.report.cca import svcca
from repr_det.report.compare import (
    Sides,
    by_side,
    last_common_evaluation,
    matches_of,
    value_at,
)
from repr_det.report.examples import Example
from repr_det.report.plots import BEFORE, REPR, STANDARD, Line, Panel
from repr_det.report.probes import (
    Network,
    Responses,
    contributions,
    filter_correlations,
    first_filters,
    held_out_images,
    load_network,
    load_weights,
    map_correlations,
    overlap,
    responses,
)
from repr_det.report.run import CLASSIFICATION, DETECTION, FINAL, RunFolder, Series

logger = logging.getLogger(f"detectron2.{__name__}")

CONTRIBUTIONS = "contributions.json"
"""Where the greedy oracle's values of a run's newest checkpoint are kept, in its folder."""

SIZES = {"APs": "small", "APm": "medium", "APl": "large"}

_MOST_CLASSES = 20
_MOST_CHECKPOINTS = 6
_RECORDS = 60
"""Curves of training are averaged until about so many points are left to tell apart."""


class Drawn(NamedTuple):
    """A figure and what its caption says of these runs.

    Attributes:
        figure: the figure.
        caption: in whole sentences.
        values: what is drawn, by side and layer, where there is one number for each.
    """

    figure: Figure
    caption: str
    values: dict[str, dict[str, float]] | None = None


@dataclass(frozen=True)
class Material:
    """Runs, and what is computed from them once and only if something asks for it.

    Attributes:
        runs: comparable ones.
        images: held-out images that networks are run on.
        progress: show bars.

    Raises:
        UserError: too few images.
    """

    runs: Sequence[RunFolder]
    images: int = 32
    progress: bool = False

    def __post_init__(self) -> None:
        if self.images < 4:
            raise UserError(
                f"{self.images} images are too few to correlate filters on: give at least 4."
            )

    @property
    def sides(self) -> Sides:
        """The runs by side."""
        return by_side(self.runs)

    @property
    def with_repr(self) -> RunFolder:
        """The first RePr run.

        Raises:
            UserError: there is none.
        """
        if REPR not in self.sides:
            raise UserError("This is of RePr runs, and none was given.")
        return self.sides[REPR][0]

    @property
    def dropped(self) -> History:
        """What the drops of the first RePr run took.

        Raises:
            UserError: nothing is known of them.
        """
        if self.with_repr.history is None:
            raise UserError(
                "Nothing is known of drops: there is neither a record of them nor a checkpoint "
                "with RePr's state."
            )
        return self.with_repr.history

    @cached_property
    def networks(self) -> dict[str, Network]:
        """What training began with, and the newest checkpoint of the first run of each side.

        The former is left out where it is not known or cannot be had.

        Raises:
            UserError: no run has a checkpoint.
        """
        trained = {s: g[0] for s, g in self.sides.items() if g[0].checkpoint or g[0].checkpoints}
        if not trained:
            raise UserError("There is no checkpoint yet whose filters could be looked at.")
        first = next(iter(trained.values()))
        begun = _begun(first) if first.checkpoint is None else None
        found = {} if begun is None else {BEFORE: begun}
        for side, run in trained.items():
            found[side] = load_network(run.cfg, run.weights)
        return found

    @property
    def layers(self) -> list[str]:
        """Names of the filter layers of all networks, in depth.

        Raises:
            UserError: no checkpoint, or no layer that all networks have.
        """
        names = [{layer.name for layer in network.layers} for network in self.networks.values()]
        common = set.intersection(*names)
        if not common:
            raise UserError("The networks have no filter layer in common that could be compared.")
        first = next(iter(self.networks.values()))
        return in_depth([layer.name for layer in first.layers if layer.name in common])

    @property
    def shown_layers(self) -> list[str]:
        """The first, a middle and the last layer."""
        names = self.layers
        return list(dict.fromkeys([names[0], names[len(names) // 2], names[-1]]))

    @cached_property
    def responses(self) -> dict[str, Responses]:
        """Of each network to the same held-out images.

        Raises:
            UserError: the images are not there.
        """
        first = next(iter(self.networks.values()))
        batches = held_out_images(first.cfg, self.images)
        bar = tqdm(self.networks.items(), "Responses", unit="network", disable=not self.progress)
        return {name: responses(net, batches, self.shown_layers) for name, net in bar}

    @cached_property
    def examples(self) -> list[Example]:
        """Held-out images: where the first runs of two sides differ most, else the first ones.

        Raises:
            UserError: no results, or no images.
        """
        _detection_only(self)
        firsts = [group[0] for group in self.sides.values()]
        truth = read_truth(*annotations_of(firsts[0].cfg, firsts[0].test_set))
        results = [read_results(run.folder, truth) for run in firsts]
        counts, ids = [], sorted(truth.getImgIds())
        for run in firsts:
            counts.append(examples.mistakes(matches_of(run, BBOX)))
        chosen = examples.choose(*counts, 6) if len(firsts) == 2 else range(min(4, len(ids)))
        records = {record["image_id"]: record for record in DatasetCatalog.get(firsts[0].test_set)}
        classes = MetadataCatalog.get(firsts[0].test_set).thing_dataset_id_to_contiguous_id
        return [
            examples.example(records[ids[i]], classes, results, [int(count[i]) for count in counts])
            for i in chosen
        ]


def _begun(run: RunFolder) -> Network | None:
    """The network that a run began with; None where it is not known or cannot be had."""
    if run.cfg.SEED < 0 and not run.cfg.MODEL.WEIGHTS:
        return None  # random numbers that nobody kept
    try:
        return load_network(run.cfg, None)
    except UserError as error:
        logger.warning(f"What training began with is left out. {sentence(error)}")
        return None


def in_depth(names: Sequence[str]) -> list[str]:
    """Layer names in the order of their depth: a feature pyramid is built before what it reads."""
    return sorted(names, key=lambda name: ".fpn_" in f".{name}")


# --- what is recorded


def _smoothed(series: Series) -> Series:
    """Running means that leave about :data:`_RECORDS` points to tell apart."""
    iterations, values = series
    window = max(1, len(values) // _RECORDS)
    if window == 1:
        return series
    kernel = np.ones(window) / window
    return np.convolve(iterations, kernel, "valid"), np.convolve(values, kernel, "valid")


def _lines(
    sides: Sides, find: Callable[[RunFolder], Series | None], what: str, **style: str
) -> Iterator[Line]:
    for side, group in sides.items():
        for run in group:
            series = find(run)
            if series is not None:
                yield Line(*series, side, f"{side}{what}", **style)


def _curves(material: Material) -> Drawn:
    sides, task = material.sides, material.runs[0].task

    def trained(name: str) -> Callable[[RunFolder], Series | None]:
        return lambda run: _smoothed(run.metrics[name]) if name in run.metrics else None

    def evaluated(name: str) -> Callable[[RunFolder], Series | None]:
        return lambda run: run.evaluations(name)

    if task == CLASSIFICATION:
        dots = {"style": "--", "marker": "o"}
        panels = [
            Panel(f"{what}", [
                *_lines(sides, trained(train), ", training"),
                *_lines(sides, evaluated(held_out), ", held-out", **dots),
            ], bottom)
            for what, train, held_out, bottom in (
                ("loss", "total_loss", "accuracy/loss", None),
                ("top-1 accuracy (%)", "train/top1", "accuracy/top1", None),
            )
        ]  # fmt: skip
        what = "Training curves are running means; held-out ones are of the test set."
    else:
        panels = [Panel("training loss", list(_lines(sides, trained("total_loss"), "")), 0)]
        for kind, word in ((BBOX, "box"), ("segm", "mask")):
            lines = [
                *_lines(sides, evaluated(f"{kind}/AP50"), " AP50", style="--", marker="s"),
                *_lines(sides, evaluated(f"{kind}/AP"), " AP", marker="o"),
            ]
            panels.append(Panel(f"held-out {word} AP (%)", lines, 0))
        what = "The loss is of training batches; AP is of the held-out images."
    spans = material.sides[REPR][0].spans if REPR in sides else []
    drawn = plots.curves(panels, spans, material.runs[0].rate_drops)
    several = any(len(group) > 1 for group in sides.values())
    return Drawn(drawn, what + (" A line is a run." if several else ""))


def _pruned_at(run: RunFolder, iterations: np.ndarray) -> np.ndarray:
    """How many filters were pruned when overlap was recorded; at a drop, before it."""
    pruned = np.zeros(len(iterations))
    for drop, (begin, end) in zip(run.history.drops, run.spans, strict=True):
        inside = (iterations > begin) & (iterations < end)
        pruned[inside] = sum(map(len, drop.pruned.values()))
    return pruned


def _overlap_series(run: RunFolder) -> tuple[Series, Series | None]:
    """Mean overlap over time, and its sum over filters where their number is known."""
    if "repr/overlap" in run.metrics:
        if run.history is None:
            return run.metrics["repr/overlap"], None
        filters = run.history.layers
        total = sum(filters.values())
        points = dict(zip(*run.metrics["repr/overlap"], strict=True))
        for moment in run.history.overlaps:  # of the whole network
            points[moment.iteration] = sum(moment.layers[n] * filters[n] for n in filters) / total
        iterations = np.array(sorted(points), dtype=float)
        mean = np.array([points[iteration] for iteration in iterations])
        return (iterations, mean), (iterations, mean * (total - _pruned_at(run, iterations)))
    if not run.checkpoints:
        nothing = np.zeros(0)
        return (nothing, nothing), None
    moments = [(int(path.name[6:-4]) + 1, path) for path in run.checkpoints if path.name != FINAL]
    if run.finished and (not moments or moments[-1][0] < run.iterations):
        moments.append((run.iterations, run.folder / FINAL))
    points = {}
    if (network := _begun(run)) is not None:
        points[0] = overlap(network)
    else:
        network = load_network(run.cfg, run.weights)
    step = max(1, -(-len(moments) // _MOST_CHECKPOINTS))
    for iteration, path in moments[::-step]:
        load_weights(network, path)
        points[iteration] = overlap(network)
    filters = {layer.name: layer.num_filters for layer in network.layers}
    iterations = np.array(sorted(points), dtype=float)
    sums = np.array([sum(points[i][n] * filters[n] for n in filters) for i in sorted(points)])
    return (iterations, sums / sum(filters.values())), (iterations, sums)


def _overlap(material: Material) -> Drawn:
    if not any(run.metrics for run in material.runs):
        return _overlap_by_layer(material)
    means, sums, looked_at = [], [], False
    for side, group in material.sides.items():
        for run in group:
            recorded = "repr/overlap" in run.metrics
            looked_at |= not recorded
            style = {} if recorded else {"style": "--", "marker": "s"}
            mean, total = _overlap_series(run)
            if len(mean[0]):
                means.append(Line(*mean, side, side, **style))
            if total is not None and len(total[0]):
                sums.append(Line(*total, side, side, **style))
    spans = material.sides[REPR][0].spans if REPR in material.sides else []
    panels = [Panel("sum over filters", sums), Panel("mean over filters", means)]
    drawn = plots.curves(panels, spans, material.runs[0].rate_drops)
    note = " Without RePr it is not recorded: squares are of checkpoints." if looked_at else ""
    return Drawn(
        drawn,
        "Filter overlap: the paper's score as printed, the mean |cosine| of a filter to the others "
        "of its layer (with itself counted as 0), of all filters that are there. A drop takes the "
        "dropped ones out of the sum." + note,
    )


def _overlap_over_time(material: Material) -> Drawn:
    run, start = material.with_repr, "repr/overlap/"
    recorded = {n.removeprefix(start): s for n, s in run.metrics.items() if n.startswith(start)}
    points: dict[float, dict[str, float]] = {}
    for name, series in recorded.items():
        for iteration, value in zip(*series, strict=True):
            points.setdefault(iteration, {})[name] = value
    for moment in run.history.overlaps if run.history else ():
        points[moment.iteration] = moment.layers
    if not points:
        raise UserError("No overlap was recorded yet.")
    names = in_depth(list(run.history.layers if run.history else recorded))
    values = np.array([[points[i].get(name, math.nan) for i in sorted(points)] for name in names])
    columns = [f"{moment:.0f}" for moment in sorted(points)]
    drawn = plots.map_of_layers(names, columns, values, "mean filter overlap", "iteration")
    return Drawn(
        drawn,
        f"{REPR}, layers from the image (top) on. Recorded before each drop, after each return and "
        "at evaluations, so columns are moments and not equal times.",
    )


def _overlap_by_layer(material: Material) -> Drawn:
    names = material.layers
    values = {}
    for side, network in material.networks.items():
        found = overlap(network)
        values[side] = {name: found[name] for name in names}
    return Drawn(
        _dots(names, values, "mean filter overlap"),
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
        f"Layers from the image (top) on. Dropped {each} of {total:,} filters, at iteration "
        f"{when}.",
    )


def expected_by_chance(dropped: History) -> np.ndarray:
    """(drops + 1,), how many filters would be dropped 0, 1, ... times by chance.

    That is if each drop had taken as many of each layer as it did, whichever.
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


def _dots(names: Sequence[str], values: dict[str, dict[str, float]], xlabel: str) -> Figure:
    listed = {side: [by_layer[name] for name in names] for side, by_layer in values.items()}
    return plots.dots_by_layer(names, listed, xlabel)


def _maps(
    material: Material, compare: Callable[[Responses, str], np.ndarray | None], label: str
) -> Figure:
    short = dict(zip(material.layers, plots.short_names(material.layers), strict=True))
    tables = {
        short[layer]: {name: compare(found, layer) for name, found in material.responses.items()}
        for layer in material.shown_layers
    }
    return plots.heat_maps(tables, label)


def _cca(material: Material) -> Drawn:
    drawn = _maps(material, filter_correlations, "canonical correlation of two filters")
    return Drawn(
        drawn,
        "Rows and columns are the filters of a layer: its first, a middle and its last layer. A "
        f"filter is one variable, observed at positions of {material.images} held-out images "
        "before any non-linearity, so the correlation is |Pearson's|. Darker is less redundant.",
    )


def _svcca(material: Material) -> Drawn:
    drawn = _maps(material, map_correlations, "SVCCA of two filters")
    return Drawn(
        drawn,
        f"The same layers, at most 64 filters of each: here a filter's map, pooled to a few cells, "
        f"is observed in each of {material.images} images, and directions beyond 99 % of its "
        "variance are left out. So few images raise all values alike.",
    )


def _cca_by_layer(material: Material) -> Drawn:
    names = material.layers
    values = {}
    for side, found in material.responses.items():
        tables = {name: filter_correlations(found, name) for name in names}
        values[side] = {
            name: math.nan if table is None else plots.mean_correlation(table)
            for name, table in tables.items()
        }
    return Drawn(
        _dots(names, values, "mean correlation of two filters"),
        "Mean of the heat map's values over all pairs of different filters, for every layer from "
        "the image (top) on.",
        values,
    )


def _similarity(material: Material) -> Drawn:
    if not {STANDARD, REPR} <= material.networks.keys():
        raise UserError("This compares checkpoints of both sides: give a run of each.")
    first, second = (material.responses[side].sampled for side in (STANDARD, REPR))
    names = [name for name in material.layers if name in first and name in second]
    found = {}
    for name in tqdm(names, "SVCCA", unit="layer", disable=not material.progress):
        try:
            found[name] = svcca(first[name], second[name])
        except ValueError:  # too few positions for so many directions
            found[name] = math.nan
    if np.isnan(list(found.values())).all():
        raise UserError("Too few positions for SVCCA between layers: raise --images.")
    values = {f"{STANDARD} and {REPR}": found}
    return Drawn(
        _dots(names, values, "SVCCA of the layer in both networks"),
        "How much the two networks' layers say the same: 1 if the responses of one are a linear "
        "map of the other's, directions beyond 99 % of variance left out. Layers with too few "
        "positions for it have no dot.",
        values,
    )


def _contributions(material: Material) -> Drawn:
    values = {}
    for side, group in material.sides.items():
        kept = _kept_contributions(group[0])
        if kept:
            values[side] = np.concatenate(list(kept.values()))
    if not values:
        raise UserError(
            "It was not computed: tools/analyze.py contributions RUN does, with one forward pass a "
            "filter."
        )
    share = {s: 100 * float((v <= 0).mean()) for s, v in values.items()}
    words = ", ".join(f"{value:.0f} % of {side}" for side, value in share.items())
    return Drawn(
        plots.contributions(values, "training loss gained by zeroing the filter"),
        f"The greedy oracle: one filter at a time. Zeroing does not raise the loss for {words}.",
    )


def _kept_contributions(run: RunFolder) -> dict[str, list[float]] | None:
    """What was computed for the checkpoint that is looked at, by layer."""
    path = run.folder / CONTRIBUTIONS
    if not path.is_file():
        return None
    content = json.loads(path.read_text())
    if content["checkpoint"] != run.weights.name or content.get("sha256") != _sha256(run.weights):
        return None  # of an earlier checkpoint, or of an earlier training in the same folder
    return content["layers"]


def _sha256(path: Path) -> str:
    found = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**20):
            found.update(block)
    return found.hexdigest()


def compute_contributions(run: RunFolder) -> None:
    """Compute a run's contributions by its newest checkpoint and keep them in its folder.

    Raises:
        UserError: no checkpoint, or no data.
    """
    if _kept_contributions(run):
        return
    content = {"checkpoint": run.weights.name, "sha256": _sha256(run.weights)}
    content |= {"layers": contributions(load_network(run.cfg, run.weights))}
    write_text_whole(run.folder / CONTRIBUTIONS, json.dumps(content) + "\n")


def _filters(material: Material) -> Drawn:
    found = {name: first_filters(network) for name, network in material.networks.items()}
    found = {name: weights for name, weights in found.items() if weights is not None}
    if not found:
        raise UserError("The networks have no convolution over two dimensions that reads images.")
    return Drawn(
        plots.filter_images(found),
        "Each filter by itself: grey is its mean. RePr does not rank this layer by default, so it "
        "differs only through the others.",
    )


# --- what detectors find


def _ap(material: Material, names: Mapping[str, str], title: str) -> Drawn:
    """Bars of some metrics at the last evaluation that all runs have."""
    at = last_common_evaluation(material.runs)
    if at is None:
        raise UserError("There is no evaluation yet that all runs have.")
    values = {
        side: [[value_at(run, metric, at) for metric in names] for run in group]
        for side, group in material.sides.items()
    }
    caption = f"{title}, at iteration {at:,}."
    order = range(len(names))
    if len(names) > _MOST_CLASSES:
        means = [np.mean(runs, axis=0) for runs in values.values()]
        spread = np.ptp(means, axis=0) if len(means) > 1 else -means[0]
        order = np.sort(np.argsort(-spread, kind="stable")[:_MOST_CLASSES])
        which = "differ most" if len(means) > 1 else "are worst"
        caption += f" Of {len(names)} classes the {_MOST_CLASSES} that {which}."
        values = {s: [[run[i] for i in order] for run in runs] for s, runs in values.items()}
    labels = [list(names.values())[i] for i in order]
    return Drawn(plots.bars(labels, values, "AP (%)"), caption)


def _detection_only(material: Material) -> None:
    if material.runs[0].task != DETECTION:
        raise UserError("This is of detection.")


def _finite(material: Material, names: Mapping[str, str]) -> dict[str, str]:
    """Those of some metrics that every run has values of: no objects, no AP."""
    at = last_common_evaluation(material.runs)
    return {
        metric: name
        for metric, name in names.items()
        if at is not None and all(value_at(run, metric, at) is not None for run in material.runs)
    }


def _classes(material: Material) -> Drawn:
    _detection_only(material)
    start = f"{BBOX}/AP-"
    names = {n: n.removeprefix(start) for n in material.runs[0].evaluated() if n.startswith(start)}
    names = _finite(material, names)
    if not names:
        raise UserError("No AP by class was recorded yet.")
    return _ap(material, names, "Box AP of each class")


def _sizes(material: Material) -> Drawn:
    _detection_only(material)
    names = _finite(material, {f"{BBOX}/{key}": word for key, word in SIZES.items()})
    if not names:
        raise UserError("No AP by size was recorded yet.")
    return _ap(
        material,
        names,
        "Box AP by size of the objects (small below 32 x 32 pixels, large from 96 x 96)",
    )


class Entry(NamedTuple):
    """A figure of a report.

    Attributes:
        title: of the figure.
        draw: draws it; raises ValueError, FileNotFoundError or KeyError with one sentence where it
            cannot.
        tasks: it is of.
        sides: that it needs at least.
        by_layer: it has a number for each layer, see :class:`Drawn`.
    """

    title: str
    draw: Callable[[Material], Drawn]
    tasks: tuple[str, ...] = (DETECTION, CLASSIFICATION)
    sides: tuple[str, ...] = ()
    by_layer: bool = False


FIGURES: dict[str, Entry] = {
    "curves": Entry("Loss and metrics over training", _curves),
    "classes": Entry("AP by class", _classes, (DETECTION,)),
    "sizes": Entry("AP by size", _sizes, (DETECTION,)),
    "drops": Entry("Which filters were dropped when", _drops, sides=(REPR,)),
    "times": Entry("Filters dropped again", _times, sides=(REPR,)),
    "overlap": Entry("Filter overlap over training", _overlap),
    "overlap_over_time": Entry(
        "Filter overlap by layer over training", _overlap_over_time, sides=(REPR,)
    ),
    "overlap_by_layer": Entry(
        "Filter overlap by layer, before and after", _overlap_by_layer, by_layer=True
    ),
    "cca": Entry("Correlation of filters inside a layer", _cca),
    "svcca": Entry("The same by SVCCA", _svcca),
    "cca_by_layer": Entry("Correlation of filters by layer", _cca_by_layer, by_layer=True),
    "similarity": Entry(
        "Standard and RePr compared layer by layer",
        _similarity,
        sides=(STANDARD, REPR),
        by_layer=True,
    ),
    "contributions": Entry("What each filter contributes", _contributions),
    "filters": Entry("First-layer filters", _filters),
}
"""By the name that tools/analyze.py and the page's anchors have for them, in a report's order."""


def class_names(run: RunFolder) -> list[str]:
    """Of the last test set of a detection run."""
    return list(MetadataCatalog.get(run.test_set).thing_classes)
