"""Records which filters each drop took, and the overlap of filters."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
from detectron2.engine.train_loop import TrainerBase
from detectron2.utils import comm
from detectron2.utils.events import JSONWriter
from numpy.typing import NDArray

from repr_det.engine.files import write_whole
from repr_det.errors import UserError
from repr_det.method.controller import PhaseChange, RePr
from repr_det.method.criteria import mean_overlap

logger = logging.getLogger(f"detectron2.{__name__}")

FILE = "repr_history.json"
"""Name of the history's file in a run's folder."""

_CELL = 16
"""Width and height of a cell of :func:`picture`, in pixels."""

_FULL_SHARE = np.array([0.0, 0.45, 0.7])
"""RGB of a layer that lost all of its filters. A layer that lost none is white."""


class Drop(NamedTuple):
    """One drop.

    Attributes:
        cycle: counted from 0.
        iteration: the first one without the filters.
        pruned: indices of the filters by layer name, without layers that lost none.
    """

    cycle: int
    iteration: int
    pruned: dict[str, list[int]]


class Overlap(NamedTuple):
    """Mean plain Ortho score at one moment: before a drop, or after a return.

    Attributes:
        iteration: of the phase change.
        layers: mean over the surviving filters by layer name.
    """

    iteration: int
    layers: dict[str, float]


class History(NamedTuple):
    """What happened to a run's filters so far.

    Attributes:
        layers: number of filters by layer name, for every layer that takes part.
        drops: in the order in which they happened.
        overlaps: before each drop and after each return. ``metrics.json`` may lack them, since its
            writer keeps only the latest value of a period.
    """

    layers: dict[str, int]
    drops: list[Drop]
    overlaps: list[Overlap]


class LateJSONWriter(JSONWriter):
    """Detectron2's writer of scalars, but the file is made when it is first written to.

    Args:
        json_file: path of ``metrics.json``; new lines are appended.
    """

    def __init__(self, json_file: str) -> None:
        self._json_file, self._window_size, self._last_write = json_file, 20, -1

    @cached_property
    def _file_handle(self) -> IO[str]:
        return open(self._json_file, "a")

    def close(self) -> None:
        """Close the file, if there is one."""
        if "_file_handle" in vars(self):
            super().close()


def of_state(state: dict[str, Any], overlaps: Sequence[Overlap] = ()) -> History:
    """The history in a method's ``state_dict``, which every checkpoint holds.

    Args:
        state: of :class:`repr_det.RePr`.
        overlaps: the overlaps, which are not in the state.
    """
    return History(
        {
            # A layer that lost filters may be frozen now and take no part any more.
            **{
                name: len(mask)
                for entry in state["history"]
                for name, mask in entry["pruned"].items()
            },
            **state["layers"],
        },
        [
            Drop(
                entry["cycle"],
                entry["iteration"],
                {
                    name: mask.nonzero().flatten().tolist()
                    for name, mask in entry["pruned"].items()
                    if mask.any()
                },
            )
            for entry in state["history"]
        ],
        list(overlaps),
    )


def write(folder: str | Path, history: History) -> None:
    """Write :data:`FILE` whole or not at all.

    Raises:
        OSError: it cannot be written, for example because the disk is full.
    """
    content = {
        "layers": history.layers,
        "drops": [drop._asdict() for drop in history.drops],
        "overlaps": [overlap._asdict() for overlap in history.overlaps],
    }
    text = json.dumps(content) + "\n"
    write_whole(Path(folder) / FILE, lambda file: file.write(text.encode()))


def read(folder: str | Path) -> History | None:
    """The history that a run wrote; None where there is none.

    Raises:
        UserError: the file is not what :func:`write` wrote.
    """
    path = Path(folder) / FILE
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text())
        found = History(
            content["layers"],
            [Drop(**drop) for drop in content["drops"]],
            [Overlap(**overlap) for overlap in content["overlaps"]],
        )
        if not all(drop.pruned.keys() <= found.layers.keys() for drop in found.drops):
            raise KeyError("a drop names an unknown layer")
        return found
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path} is damaged ({type(error).__name__}). Delete it; the checkpoints hold the same "
            f"drops."
        ) from error


class Recorder:
    """Records drops and the overlap of filters; see :class:`repr_det.RePrHook`.

    Args:
        method: of the run.
        trainer: its storage receives scalars, histograms and the picture. The main process writes
            the history to ``OUTPUT_DIR`` of its config, if it has one.
    """

    def __init__(self, method: RePr, trainer: TrainerBase) -> None:
        self._method, self._trainer = method, trainer
        self._overlaps: list[Overlap] = []

    @property
    def _folder(self) -> Path | None:
        folder = getattr(getattr(self._trainer, "cfg", None), "OUTPUT_DIR", "")
        return Path(folder) if folder and comm.is_main_process() else None

    def begin(self) -> None:
        """Start the record: of a resumed run, with the overlaps from before its checkpoint."""
        start, folder = self._trainer.start_iter, self._folder
        self._overlaps = []
        if folder is not None and start > 0:
            try:
                found = read(folder)
            except UserError as error:
                logger.warning(f"RePr: {error}")
                found = None
            if found is not None:
                self._overlaps = [o for o in found.overlaps if o.iteration < start]
        self._write()

    def change(self, change: PhaseChange) -> None:
        """Record a drop or a return, right after it."""
        if change.kind == "return":
            self.overlap(detailed=True)
        self._write()
        if change.kind == "drop":
            self._trainer.storage.put_image("repr/dropped", picture(self._history()))

    def overlap(self, *, detailed: bool = False) -> None:
        """Record the mean overlap of the filters of each layer, and of all.

        Args:
            detailed: also the overlap of each filter, as histograms, and in the history.
        """
        by_filter = self._method.filter_overlap()
        overlap = mean_overlap(by_filter)
        if detailed:
            self._overlaps.append(Overlap(self._trainer.iter, overlap))
        if detailed and comm.is_main_process():
            for name, values in by_filter.items():
                values = values[~values.isnan()].cpu()
                if len(values):
                    self._trainer.storage.put_histogram(f"repr/filter_overlap/{name}", values, 30)
        scalars = {f"repr/overlap/{name}": value for name, value in overlap.items()}
        surviving = {name: int((~mask).sum()) for name, mask in self._method.pruned.items()}
        scalars["repr/overlap"] = sum(
            value * surviving[name] for name, value in overlap.items()
        ) / sum(surviving.values())
        self._trainer.storage.put_scalars(**scalars, smoothing_hint=False)

    def _history(self) -> History:
        return of_state(self._method.state_dict(), self._overlaps)

    def _write(self) -> None:
        if (folder := self._folder) is None:
            return
        try:
            folder.mkdir(parents=True, exist_ok=True)
            write(folder, self._history())
        except OSError as error:  # the checkpoints hold the drops, too
            logger.warning(f"RePr: {FILE} could not be written ({error}).")


def shares(history: History) -> NDArray[np.float64]:
    """The share of each layer's filters that each drop took, in [0, 1]: (layers, drops)."""
    return np.array(
        [
            [len(drop.pruned.get(name, ())) / filters for drop in history.drops]
            for name, filters in history.layers.items()
        ]
    ).reshape(len(history.layers), len(history.drops))


def times_dropped(history: History) -> dict[str, NDArray[np.int64]]:
    """How often each filter was dropped, (filters,) by layer name."""
    counts = {name: np.zeros(filters, dtype=int) for name, filters in history.layers.items()}
    for drop in history.drops:
        for name, indices in drop.pruned.items():
            counts[name][indices] += 1
    return counts


def picture(history: History) -> NDArray[np.float64]:
    """The shares as an image: layers down, drops across, darker where more was dropped.

    Returns:
        (3, height, width), RGB in [0, 1].
    """
    cells = np.kron(shares(history), np.ones((_CELL, _CELL)))
    return 1 - cells * (1 - _FULL_SHARE[:, None, None])
