"""What a user can put right."""

from __future__ import annotations

import json
from typing import Any

_SHOWN = 60


class UserError(ValueError):
    """A mistake of the user's, in one sentence: what is wrong, and what to set.

    The command line prints it without a traceback and ends with exit status 2. Every other
    exception is a bug and keeps its traceback.
    """


def sentence(error: UserError) -> str:
    """What a mistake says, also one that a data loader's process has sent with its traceback."""
    message = str(error)
    if message.startswith("Caught "):
        message = message.strip().splitlines()[-1].partition(": ")[2]
    return message


def shown(value: Any) -> str:
    """A value as JSON has it, in quotes if it is text, cut where it is long."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    text = text.encode(errors="backslashreplace").decode()
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
