"""Checkpoints that stay readable when a run is killed at any moment."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.checkpoint import DetectionCheckpointer
from torch import Tensor

from repr_det.engine.files import write_whole
from repr_det.errors import UserError, shown

logger = logging.getLogger(f"detectron2.{__name__}")

_NUMBERED = re.compile(r"model_(\d+)\.pth")
_NAME = re.compile(r"[^/\\\s][^/\\\n]*\.pth")


class SafeCheckpointer(DetectionCheckpointer):
    """Detectron2's checkpointer, with files that are written whole or not at all.

    Files are plain Detectron2 checkpoints. Loading never executes code from a ``.pth`` file. If the
    newest file is damaged, this is reported and the one before it is used.
    """

    _whole = False  # whether the file that is being loaded must hold every entry of the model

    def save(self, name: str, **kwargs: Any) -> None:
        """Write ``<name>.pth`` and then ``last_checkpoint``.

        Args:
            name: of the file, without ``.pth``.
            kwargs: further data to save.

        Raises:
            OSError: the file could not be written, for example because the disk is full. Earlier
                files are unchanged.
        """
        if not self.save_dir or not self.save_to_disk:
            return
        data = {"model": self.model.state_dict()}
        data |= {key: item.state_dict() for key, item in self.checkpointables.items()}
        data |= kwargs
        target = Path(self.save_dir) / f"{name}.pth"
        logger.info(f"Saving checkpoint to {target}")
        try:
            write_whole(target, lambda file: torch.save(data, file))
        except (OSError, RuntimeError) as error:
            raise OSError(
                f"Checkpoint {target} could not be written ({error}). Free some space and resume; "
                f"the checkpoint before it is untouched."
            ) from error
        self.tag_last_checkpoint(target.name)

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        """Write into ``last_checkpoint`` which file to resume from."""
        write_whole(
            Path(self.save_dir) / "last_checkpoint",
            lambda file: file.write(last_filename_basename.encode()),
        )

    def set_aside_last_checkpoint(self) -> None:
        """Rename ``last_checkpoint`` to ``last_checkpoint.earlier``: a new run resumes nothing."""
        if self.save_dir and self.has_checkpoint():
            path = Path(self.save_dir) / "last_checkpoint"
            os.replace(path, path.with_suffix(".earlier"))

    def has_set_aside(self) -> bool:
        """Whether :meth:`set_aside_last_checkpoint` has renamed a file of an earlier run."""
        return os.path.isfile(Path(self.save_dir) / "last_checkpoint.earlier")

    def resume_or_load(self, path: str, *, resume: bool = True) -> dict[str, Any]:
        """Resume from the newest checkpoint that can be read, or load only weights.

        Args:
            path: weights to load where nothing is resumed; empty for none.
            resume: whether to resume where there is a checkpoint.

        Raises:
            UserError: no checkpoint can be read, or one is of another architecture.
        """
        if not (resume and self.has_checkpoint()):
            return super().resume_or_load(path, resume=False)
        for candidate in self._newest_first():
            try:
                self._torch_load(str(candidate))
            except UserError as error:
                logger.warning(f"{error} Going back to the checkpoint before it.")
                continue
            return self.load_whole(str(candidate))
        raise UserError(
            f"No checkpoint in {self.save_dir} can be read. Start the run again without --resume."
        )

    def load_whole(self, path: str) -> dict[str, Any]:
        """Load a checkpoint that must hold every entry of the model, in its shape.

        Raises:
            UserError: it cannot be read, or is of another architecture.
        """
        self._whole = True
        try:
            return self.load(path)
        finally:
            self._whole = False

    def _newest_first(self) -> Iterator[Path]:
        tagged = last_checkpoint(self.save_dir)
        yield tagged
        limit = iteration_of(tagged)
        for number, path in reversed(numbered_checkpoints(tagged.parent)):
            if path != tagged and (limit is None or number < limit):
                yield path

    def _torch_load(self, f: str) -> dict[str, Any]:
        return read_checkpoint(f)

    def _load_file(self, filename: str) -> Any:
        try:
            content = super()._load_file(filename)
        except UserError:
            raise
        except Exception as error:  # of many kinds: a pickle, or a file of pycls
            raise _no_checkpoint(filename, error) from error
        weights = content["model"]
        if not isinstance(weights, dict):
            raise UserError(f"{filename} is no checkpoint: its model is {shown(weights)}.")
        for key, value in weights.items():
            if not isinstance(value, (Tensor, np.ndarray)):
                raise UserError(
                    f"{filename} is no checkpoint of Detectron2's: its entry {key} is of type "
                    f"{type(value).__name__}, not a tensor. Save the weights alone, or under model."
                )
        return content

    def _load_model(self, checkpoint: Any) -> Any:
        keys = set(self.model.state_dict())
        incompatible = super()._load_model(checkpoint)
        missing = incompatible.missing_keys  # entries of another shape among them
        if missing and (self._whole or len(missing) >= len(keys)):
            raise UserError(
                f"The checkpoint is of another architecture ({len(missing)} of {len(keys)} entries "
                f"are missing or of another shape, for example {missing[0]}). Build the model that "
                f"it was trained as."
            )
        return incompatible


def has_run(folder: str | Path) -> bool:
    """Whether a folder holds a run's checkpoint to resume from."""
    return (Path(folder) / "last_checkpoint").is_file()


def iteration_of(path: str | Path) -> int | None:
    """Last iteration of a checkpoint, from its name; None for the final one and other files."""
    match = _NUMBERED.fullmatch(Path(path).name)
    return int(match[1]) if match else None


def numbered_checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """Checkpoints of a run by their last iteration, ascending; without the final one."""
    numbers = ((iteration_of(path), path) for path in folder.glob("model_*.pth"))
    return sorted((number, path) for number, path in numbers if number is not None)


def last_checkpoint(folder: str | Path) -> Path:
    """The checkpoint that ``last_checkpoint`` in a run's folder names.

    Raises:
        UserError: it names no checkpoint. It is empty, or another tool wrote it.
    """
    tag = Path(folder) / "last_checkpoint"
    name = tag.read_bytes().decode(errors="replace").strip()
    if not _NAME.fullmatch(name):
        raise UserError(
            f"{tag} holds {shown(name)}, which is no name of a checkpoint in its folder. Write one "
            f"such as model_final.pth into it, or remove it to start from the beginning."
        )
    return tag.with_name(name)


def read_checkpoint(path: str | Path, *, mmap: bool = False) -> dict[str, Any]:
    """The content of a ``.pth`` file, on the CPU. No code in it is executed.

    Args:
        path: of the file.
        mmap: map the file into memory, so that tensors are read only when they are used.

    Raises:
        UserError: there is no such file, or it is damaged or no checkpoint.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except FileNotFoundError:
        raise UserError(f"Checkpoint {path} does not exist.") from None
    except Exception as error:  # of many kinds, depending on which byte is wrong
        raise _no_checkpoint(path, error) from error
    if not isinstance(content, dict):
        raise UserError(f"{path} is no checkpoint: it holds a {type(content).__name__}.")
    return content


def _no_checkpoint(path: str | Path, error: Exception) -> UserError:
    return UserError(f"{path} is damaged or is no checkpoint ({type(error).__name__}).")
