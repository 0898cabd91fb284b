"""What a run leaves behind: which filters each drop took, and its scalars."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
from detectron2.utils.events import JSONWriter
from numpy.typing import NDArray

from repr_det.engine.files import write_whole
from repr_det.errors import UserError

FILE = "repr_history.json"
"""Where the history lies in a run's folder."""

_CELL = 16
"""Pixels of a cell of :func:`picture`."""

_FULL_SHARE = np.array([0.0, 0.45, 0.7])
"""RGB of a layer that was dropped as a whole; white is one that was left alone."""


class Drop(NamedTuple):
    """One drop.

    Attributes:
        cycle: counted from 0.
        iteration: the first one without the filters.
        pruned: indices of the filters by layer name, layers without any left out.
    """

    cycle: int
    iteration: int
    pruned: dict[str, list[int]]


class Overlap(NamedTuple):
    """Mean plain Ortho score at one moment: before a drop, or after a return.

    Attributes:
        iteration: that of the change of phase.
        layers: mean over the surviving filters by layer name.
    """

    iteration: int
    layers: dict[str, float]


class History(NamedTuple):
    """What happened to a run's filters so far.

    Attributes:
        layers: number of filters by layer name, of every layer that takes part.
        drops: in the order in which they happened.
        overlaps: around them. Writers of scalars keep the latest of a period only, so an evaluation
            soon after a drop takes its place in ``metrics.json``.
    """

    layers: dict[str, int]
    drops: list[Drop]
    overlaps: list[Overlap]


class LateJSONWriter(JSONWriter):
    """Detectron2's writer of scalars, which makes its file when it first has something to write.

    Args:
        json_file: path of ``metrics.json``; new lines are appended.
    """

    def __init__(self, json_file: str, window_size: int = 20) -> None:
        self._json_file, self._window_size, self._last_write = json_file, window_size, -1

    @cached_property
    def _file_handle(self) -> IO[str]:
        return open(self._json_file, "a")

    def close(self) -> None:
        """Close the file, if there is one."""
        if "_file_handle" in vars(self):
            super().close()


def of_state(state: dict[str, Any], overlaps: Sequence[Overlap] = ()) -> History:
    """The history in a method's ``state_dict``, as every checkpoint holds it.

    Args:
        state: of :class:`repr_det.RePr`.
        overlaps: which a state does not hold.
    """
    return History(
        dict(state["layers"]),
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
        OSError: the disk is full, say.
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
        return History(
            content["layers"],
            [Drop(**drop) for drop in content["drops"]],
            [Overlap(**overlap) for overlap in content["overlaps"]],
        )
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path} is damaged ({type(error).__name__}): delete it, and what the checkpoints "
            "hold is used."
        ) from error


def shares(history: History) -> NDArray[np.float64]:
    """(layers, drops), the share of a layer's filters that a drop took, in [0, 1]."""
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
    """The shares as an image: layers down, drops across, the darker the more was dropped.

    Returns:
        (3, height, width), RGB in [0, 1].
    """
    cells = np.kron(shares(history), np.ones((_CELL, _CELL)))
    return 1 - cells * (1 - _FULL_SHARE[:, None, None])
