"""Writes files whole or not at all, and reads the record of a run."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from repr_det.errors import UserError, shown


def write_whole(target: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Write a temporary file and rename it, so that the file is whole or not there at all."""
    # With a name of its own, since another process may write the same file, and not a longer one.
    aside = target.with_name(f".{target.name[:40]}.{os.getpid()}.writing")
    try:
        with open(aside, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, target)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise


@contextmanager
def writing(target: Path) -> Iterator[None]:
    """Make it a mistake of the user that a file cannot be written.

    Raises:
        UserError: the block raised an OSError.
    """
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{target} cannot be written ({error.strerror or error}). Set another path."
        ) from error


def write_text_whole(target: Path, text: str) -> None:
    """Write a text file by :func:`write_whole`. A pipe, device or link is written to directly.

    Raises:
        UserError: it cannot be written.
    """
    with writing(target):
        if target.is_symlink() or (target.exists() and not target.is_file()):  # as /dev/stdout
            target.write_text(text, encoding="utf-8")
        else:
            write_whole(target, lambda file: file.write(text.encode()))


def check_output(option: str, path: Path | None, reads: Iterable[str | Path | None] = ()) -> None:
    """Refuse the path of a file that cannot be written. None passes.

    Args:
        option: that names the file.
        path: of the file.
        reads: what the command reads, and what else it writes.

    Raises:
        UserError: its folder does not exist or is read-only, it is a folder itself, or one of
            ``reads``.
    """
    if path is None:
        return
    if any(other is not None and path.resolve() == Path(other).resolve() for other in reads):
        raise UserError(
            f"{option} {path} is a file that this command also reads or writes. Set another one."
        )
    # Path's own methods raise where a folder may not be read.
    if not os.path.isdir(path.parent):
        raise UserError(f"Folder {path.parent} of {option} does not exist. Create it.")
    if os.path.isdir(path):
        raise UserError(f"Target {path} of {option} is a folder. Set the name of a file.")
    special = os.path.exists(path) and not os.path.isfile(path)  # as /dev/stdout
    if not os.access(path if special else path.parent, os.W_OK):
        raise UserError(f"Folder {path.parent} of {option} is read-only. Set another one.")


def read_records(path: Path) -> list[dict[str, Any]]:
    """The lines of a run's ``metrics.json``, without one that was only written in part.

    Args:
        path: of the file.

    Raises:
        UserError: it is not UTF-8, or a line is not a record of an iteration.
    """
    try:
        lines = path.read_bytes().decode().splitlines()
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path} is no record of training: it is not UTF-8 ({error.reason} at byte "
            f"{error.start}). Remove it, or set another run."
        ) from None
    records = []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if type(record) is not dict or type(record.get("iteration")) not in (int, float):
            raise UserError(
                f"{path} is no record of training: line {number} is {shown(record)}. Remove it, or "
                f"set another run."
            )
        records.append(record)
    return records
