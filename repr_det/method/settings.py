"""Checks of arguments, and of the settings that a resumed run shares with its checkpoint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from numbers import Integral, Real
from typing import Any

from torch import Tensor, nn

from repr_det.errors import UserError

NO_BATCHES = "RePr: batches() yields nothing. Pass batches= that yields training batches."


def check_whole(name: str, value: Any) -> None:
    """Refuse a value that is not a whole number.

    Raises:
        UserError: it is not a whole number.
    """
    if not isinstance(value, Integral):
        raise UserError(f"RePr: {name} is {value!r}. Set a whole number.")


def check_data(batches: Any, loss: Any) -> None:
    """Refuse batches and a loss that are not functions.

    Raises:
        UserError: one of them is something else, for example a loader.
    """
    for name, given, example in (
        ("batches", batches, "lambda: iter(loader)"), ("loss", loss, "lambda model, batch: ...")
    ):  # fmt: skip
        if given is not None and not callable(given):
            raise UserError(
                f"RePr: {name} is a {type(given).__name__}. Set a function, as {example}."
            )


def check_losses(losses: Sequence[Any]) -> None:
    """Refuse what a loss function returned, where it is not one number.

    Raises:
        UserError: a loss is something else, for example a detector's dictionary of losses.
    """
    for loss in losses:
        one_number = loss.numel() == 1 if isinstance(loss, Tensor) else isinstance(loss, Real)
        if not one_number:
            shape = f" of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else ""
            raise UserError(
                f"RePr: loss= returned a {type(loss).__name__}{shape}. Return a tensor with one "
                f"number, for example the sum of the losses."
            )


def checked_copies(copies: Any) -> list[nn.Module]:
    """The copies of a model.

    Raises:
        UserError: something else than modules, or one alone.
    """
    one = isinstance(copies, nn.Module) and not isinstance(copies, nn.ModuleList)
    found = [] if one else list(copies)
    if one or not all(isinstance(copy, nn.Module) for copy in found):
        raise UserError(
            "RePr: copies is not a list of modules. Set copies=[...], of an average for example "
            "[AveragedModel(model)] of torch.optim.swa_utils."
        )
    return found


def check_same_settings(of: str, mine: Mapping[str, Any], theirs: Mapping[str, Any]) -> None:
    """Refuse to resume with other settings.

    Args:
        of: what the settings belong to, for the error.
        mine: settings of this run.
        theirs: settings of the checkpoint. Only those that are in ``mine`` are compared.

    Raises:
        UserError: a setting differs, or the checkpoint lacks it.
    """
    different = [key for key in mine if theirs.get(key) != mine[key]]
    if different:
        listed = "; ".join(f"{k} was {theirs.get(k)!r}, is {mine[k]!r}" for k in different)
        raise UserError(
            f"{of} settings differ from the checkpoint's ({listed}). "
            f"Resume with the same settings or start a new run."
        )
