"""Files that are written whole or not at all, and the record of a run."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from repr_det.errors import UserError, shown


def write_whole(target: Path, write: Any) -> None:
    """Write a file aside and rename it, so that it is there whole or not at all."""
    # Of a name of its own: another process may write the same file.
    aside = target.with_name(f".{target.name}.{os.getpid()}.writing")
    try:
        with open(aside, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, target)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise


def write_text_whole(target: Path, text: str) -> None:
    """Write a text file by :func:`write_whole`; a pipe, device or link is written to and stays."""
    if target.is_symlink() or (target.exists() and not target.is_file()):  # /dev/stdout, say
        target.write_text(text, encoding="utf-8")
    else:
        write_whole(target, lambda file: file.write(text.encode()))


def check_folder_of(option: str, path: Path | None) -> None:
    """Refuse a file to be written where there is no folder for it, or a folder; None is no file.

    Raises:
        UserError: no such folder, or the path is that of a folder.
    """
    if path is None:
        return
    if not path.parent.is_dir():
        raise UserError(f"Folder {path.parent} of {option} does not exist. Create it.")
    if path.is_dir():
        raise UserError(f"Target {path} of {option} is a folder. Set the name of a file.")


def read_records(path: Path) -> list[dict[str, Any]]:
    """The lines of a run's ``metrics.json``; one that was cut off in writing is left out.

    Args:
        path: of the file.

    Raises:
        UserError: it is not UTF-8, or a line is no record of an iteration.
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
