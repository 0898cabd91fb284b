"""The names of a run's classes: recorded in checkpoints, compared with those of other data."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from detectron2.engine import HookBase

from repr_det.engine.checkpoint import read_checkpoint
from repr_det.errors import UserError, shown

STATE_KEY = "ClassNames"
"""Where the names are in a checkpoint: ``trainer.hooks[STATE_KEY]``."""


class ClassNames(HookBase):
    """Keeps the names of the classes, in order, in a run's checkpoints.

    Args:
        dataset: name of the training data, for errors.
        names: names of its classes; None where they are not known.
    """

    def __init__(self, dataset: str, names: Sequence[str] | None) -> None:
        self._dataset, self._names = dataset, names

    def state_dict(self) -> dict[str, Any]:
        """The names, if they are known."""
        return {} if self._names is None else {"names": list(self._names)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Compare the names with those in a checkpoint.

        Raises:
            UserError: they differ.
        """
        check_names(state.get("names"), self._names, self._dataset)


def recorded_names(weights: str | Path) -> list[str] | None:
    """The names of the classes that a checkpoint was trained on.

    Args:
        weights: a path or URL as in ``MODEL.WEIGHTS``.

    Returns:
        The names in order; None where the checkpoint has none or cannot be loaded.
    """
    if Path(weights).suffix != ".pth" or not Path(weights).is_file():
        return None
    try:
        content = read_checkpoint(weights, mmap=True)
        return list(content["trainer"]["hooks"][STATE_KEY]["names"])
    except (UserError, LookupError, TypeError):
        return None


def check_names(recorded: Sequence[str] | None, found: Sequence[str] | None, dataset: str) -> None:
    """Refuse a dataset whose classes have other names than those that were trained on.

    Nothing is compared where either is None.

    Args:
        recorded: names that :func:`recorded_names` returned.
        found: names in the dataset.
        dataset: its name or file, for the error.

    Raises:
        UserError: names or their order differ.
    """
    if recorded is not None and found is not None and list(found) != list(recorded):
        raise UserError(
            f"{dataset} has other classes than the run was trained on, or in another order "
            f"({difference(recorded, found)}). Set data with the same ones."
        )


def difference(expected: Sequence[str], found: Sequence[str]) -> str:
    """The first difference of two lists of classes, in words."""
    for number, (wanted, there) in enumerate(zip(expected, found, strict=False)):
        if wanted != there:
            return f"class {number} is {shown(there)} instead of {shown(wanted)}"
    return f"{len(found)} classes instead of {len(expected)}"
