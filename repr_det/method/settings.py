"""Settings that a resumed run must share with the run that wrote its checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from numbers import Integral
from typing import Any

from repr_det.errors import UserError


def check_whole(name: str, value: Any) -> None:
    """Refuse a value that is not a whole number.

    Raises:
        UserError: it is not.
    """
    if not isinstance(value, Integral):
        raise UserError(f"RePr: {name} is {value!r}. Set a whole number.")


def check_same_settings(of: str, mine: Mapping[str, Any], theirs: Mapping[str, Any]) -> None:
    """Refuse to resume with other settings.

    Args:
        of: what is set, as an error begins.
        mine: of this run.
        theirs: of the checkpoint; others than mine do not matter.

    Raises:
        UserError: one of mine is another one there, or missing.
    """
    different = [key for key in mine if theirs.get(key) != mine[key]]
    if different:
        listed = "; ".join(f"{k} was {theirs.get(k)!r}, is {mine[k]!r}" for k in different)
        raise UserError(
            f"{of} settings differ from the checkpoint's ({listed}). "
            f"Resume with the same settings or start a new run."
        )
