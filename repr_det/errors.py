"""What a user can put right."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
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


def tell(program: str, error: UserError) -> int:
    """Print a user's mistake as one sentence on standard error; returns the exit status, 2.

    Args:
        program: the program's name.
        error: what is wrong.
    """
    print(f"{program}: error: {sentence(error)}", file=sys.stderr)
    return 2


def exit_status(program: str, work: Callable[[], int | None], *, stopped: str) -> int:
    """Do a program's work; returns its exit status: 0, 2 after a mistake, 130 if interrupted.

    Args:
        program: its name.
        work: does it, and may return another exit status.
        stopped: what to print when it is interrupted.
    """
    try:
        return work() or 0
    except UserError as error:
        return tell(program, error)
    except KeyboardInterrupt:
        print(stopped, file=sys.stderr)
        return 130


def shown(value: Any) -> str:
    """A value as JSON has it, in quotes if it is text, cut where it is long."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    text = text.encode(errors="backslashreplace").decode()
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
