"""What the figures of a report are drawn from, computed once and only if a figure asks for it."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pandas as pd
from detectron2.data import DatasetCatalog, MetadataCatalog
from tqdm import tqdm

from repr_det.detection.coco_results import BBOX, read_results
from repr_det.detection.evaluation import truth_of
from repr_det.engine.checkpoint import SafeCheckpointer, iteration_of
from repr_det.engine.files import write_text_whole
from repr_det.engine.recording import History
from repr_det.errors import UserError, sentence
from repr_det.report import examples, plots
from repr_det.report.arms import BEFORE, Arms, longest
from repr_det.report.compare import matches_of
from repr_det.report.examples import Example
from repr_det.report.probes import (
    Network,
    Responses,
    contributions,
    held_out_images,
    load_network,
    overlap,
    responses,
)
from repr_det.report.run import FINAL, RunFolder
from repr_det.tasks import DETECTION

logger = logging.getLogger(f"detectron2.{__name__}")

CONTRIBUTIONS = "contributions.json"
"""Where the greedy oracle's values of a run's newest checkpoint are kept, in its folder."""

_MOST_CHECKPOINTS = 6


@dataclass(frozen=True)
class Material:
    """Arms, and what is computed from them.

    Attributes:
        arms: comparable runs.
        images: held-out images that networks are run on.

    Raises:
        UserError: too few images.
    """

    arms: Arms
    images: int = 32

    def __post_init__(self) -> None:
        if self.images < 4:
            raise UserError(
                f"{self.images} images are too few to correlate filters on. Set at least 4."
            )

    @property
    def task(self) -> str:
        """Of all runs."""
        return self.arms.runs[0].task

    @property
    def colours(self) -> dict[str, str]:
        """Of the arms, the same in every figure."""
        return plots.colours(list(self.arms.groups))

    @property
    def with_repr(self) -> RunFolder:
        """The first RePr run.

        Raises:
            UserError: there is none.
        """
        if not self.arms.with_repr:
            raise UserError("This figure needs at least one RePr run.")
        return self.arms.with_repr[0]

    @property
    def spans(self) -> list[tuple[float, float]]:
        """Where the RePr runs trained the sub-network (S2); none where their schedules differ."""
        runs = self.arms.with_repr
        found = longest(runs).spans if runs else []
        # A run that was killed, or is shorter, may end within a span.
        ended = {span for run in runs for span in run.spans if span[1] < run.iterations}
        return found if ended <= set(found) else []

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
        """The network before training, and the newest checkpoint of the first run of each arm.

        The network before training is left out where it is not known or cannot be loaded.

        Raises:
            UserError: no run has a checkpoint.
        """
        firsts = {name: group[0] for name, group in self.arms.groups.items()}
        trained = {name: run for name, run in firsts.items() if run.checkpoint or run.checkpoints}
        if not trained:
            raise UserError("There is no checkpoint yet whose filters could be looked at.")
        first = next(iter(trained.values()))
        initial = _initial(first) if first.checkpoint is None else None
        found = {} if initial is None else {BEFORE: initial}
        for name, run in trained.items():
            found[name] = load_network(run.cfg, run.weights)
        return found

    @property
    def layers(self) -> list[str]:
        """Names of the filter layers that all networks have, in the order of :func:`in_depth`.

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
        """Responses of each network to the same held-out images.

        Raises:
            UserError: the images are not there.
        """
        first = next(iter(self.networks.values()))
        batches = held_out_images(first.cfg, self.images)
        bar = tqdm(self.networks.items(), "Responses", unit="network", disable=None)
        return {name: responses(net, batches, self.shown_layers) for name, net in bar}

    @cached_property
    def examples(self) -> list[Example]:
        """Held-out images: where the first runs of two arms differ most, else the first ones.

        Raises:
            UserError: no results, no images, or two arms that differ on none.
        """
        self.check_detection()
        firsts = [group[0] for group in self.arms.groups.values()]
        truth = truth_of(firsts[0].cfg, firsts[0].test_set)
        results = [read_results(run.folder, truth) for run in firsts]
        ids = sorted(truth.getImgIds())
        counts = [examples.mistakes(matches_of(run, BBOX)) for run in firsts]
        chosen = examples.choose(*counts, 6) if len(firsts) == 2 else range(min(4, len(ids)))
        if not len(chosen):
            raise UserError("The detectors make equally many mistakes on every image.")
        records = {record["image_id"]: record for record in DatasetCatalog.get(firsts[0].test_set)}
        classes = MetadataCatalog.get(firsts[0].test_set).thing_dataset_id_to_contiguous_id
        return [
            examples.example(records[ids[i]], classes, results, [int(count[i]) for count in counts])
            for i in chosen
        ]

    @property
    def class_names(self) -> list[str]:
        """Class names of the detectors' test set, known once :attr:`examples` has read it."""
        return list(MetadataCatalog.get(self.arms.runs[0].test_set).thing_classes)

    def check_detection(self) -> None:
        """Refuse what only detectors have.

        Raises:
            UserError: these are classifiers.
        """
        if self.task != DETECTION:
            raise UserError("This figure is only available for detection runs.")


def _initial(run: RunFolder) -> Network | None:
    """The network that a run began with; None where it is not known or cannot be loaded."""
    if run.cfg.SEED < 0 and not run.cfg.MODEL.WEIGHTS:
        return None  # drawn with an unknown seed
    try:
        return load_network(run.cfg, None)
    except UserError as error:
        logger.warning(f"What training began with is left out. {sentence(error)}")
        return None


def in_depth(names: Sequence[str]) -> list[str]:
    """Layer names in the order of their depth.

    Detectron2 builds a feature pyramid before the backbone that it reads.
    """
    return sorted(names, key=lambda name: (not name.startswith("backbone."), ".fpn_" in f".{name}"))


def overlap_over_time(run: RunFolder) -> tuple[pd.Series | None, pd.Series | None]:
    """Mean filter overlap by iteration, and its sum over filters where their number is known.

    From what was recorded, else from the run's checkpoints.
    """
    recorded = run.series("repr/overlap")
    if recorded is None:
        return _overlap_of_checkpoints(run) if run.checkpoints else (None, None)
    if run.history is None or not run.history.overlaps:
        return recorded, None
    filters = run.history.layers
    if any(moment.layers.keys() != filters.keys() for moment in run.history.overlaps):
        return recorded, None  # layers were frozen or unfrozen on the way
    total = sum(filters.values())
    moments = {  # of the whole network
        moment.iteration: sum(moment.layers[name] * filters[name] for name in filters) / total
        for moment in run.history.overlaps
    }
    mean = pd.Series(recorded.to_dict() | moments).sort_index()
    # At a drop, overlap is recorded before it.
    there = pd.Series(float(total), mean.index)
    for drop, (begin, end) in zip(run.history.drops, run.spans, strict=True):
        there[(mean.index > begin) & (mean.index < end)] -= sum(map(len, drop.pruned.values()))
    return mean, mean * there


def _overlap_of_checkpoints(run: RunFolder) -> tuple[pd.Series, pd.Series]:
    numbers = ((iteration_of(path), path) for path in run.checkpoints)
    moments = [(number + 1, path) for number, path in numbers if number is not None]
    if run.finished and (not moments or moments[-1][0] < run.iterations):
        moments.append((run.iterations, run.folder / FINAL))
    points = {}
    if (network := _initial(run)) is not None:
        points[0] = overlap(network)
    else:
        network = load_network(run.cfg, run.weights)
    step = -(-len(moments) // _MOST_CHECKPOINTS)
    for iteration, path in moments[::-step]:
        SafeCheckpointer(network.model).load_whole(str(path))
        points[iteration] = overlap(network)
    filters = {layer.name: layer.num_filters for layer in network.layers}
    sums = pd.Series(
        {i: sum(found[name] * filters[name] for name in filters) for i, found in points.items()}
    ).sort_index()
    return sums / sum(filters.values()), sums


def kept_contributions(run: RunFolder) -> dict[str, list[float]] | None:
    """Contributions by layer that were computed for the run's checkpoint; None without any.

    Raises:
        UserError: the file that keeps them is damaged.
    """
    path = run.folder / CONTRIBUTIONS
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text())
        of = content["checkpoint"], content.get("sha256")
        if of != (run.weights.name, _sha256(run.weights)):
            return None  # of an earlier checkpoint, or of an earlier training in the same folder
        return content["layers"]
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{path} is damaged. Remove it; its figure computes it again.") from None


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def compute_contributions(run: RunFolder) -> None:
    """Compute the contributions of a run's newest checkpoint, and keep them in its folder.

    Raises:
        UserError: there is no checkpoint, there are no data, or the folder is read-only.
    """
    if kept_contributions(run):
        return
    path = run.folder / CONTRIBUTIONS
    if not os.access(run.folder, os.W_OK):
        raise UserError(
            f"Folder {run.folder} is read-only, but the contributions are kept in it. Copy the run "
            f"to a folder that can be written to."
        )
    content = {"checkpoint": run.weights.name, "sha256": _sha256(run.weights)}
    content |= {"layers": contributions(load_network(run.cfg, run.weights))}
    write_text_whole(path, json.dumps(content) + "\n")
