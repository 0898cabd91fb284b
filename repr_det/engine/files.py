"""Files that are written whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from repr_det.errors import UserError


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
        raise UserError(f"Folder {path.parent} of {option} does not exist: create it.")
    if path.is_dir():
        raise UserError(f"Target {path} of {option} is a folder: give the name of a file.")
