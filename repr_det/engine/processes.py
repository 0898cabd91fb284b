"""Processes that train together: how they start, find each other and part."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import detectron2.engine
import torch
import torch.distributed as dist
from detectron2.utils import comm


def launch(
    main: Callable[..., None],
    processes: int,
    *,
    num_machines: int = 1,
    machine_rank: int = 0,
    dist_url: str = "auto",
    args: tuple[Any, ...] = (),
) -> None:
    """Run a function in each of several processes, as Detectron2's launch does, and then part.

    Where ``torchrun`` has started the processes, these are used instead.

    Args:
        main: a function of a module, that other processes can import.
        processes: how many on this machine; one runs it here, without a process group.
        num_machines: how many machines take part.
        machine_rank: which of them this is, from 0.
        dist_url: where they meet; ``auto`` is a free port of this machine.
        args: what ``main`` is given.

    Raises:
        ProcessExitedException: a process ended by itself; the others are ended then.
        ProcessRaisedException: one raised an error.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:
        _join_torchrun()
        _take_part(main, args)
    elif processes * num_machines == 1:
        main(*args)
    else:
        detectron2.engine.launch(
            _take_part,
            processes,
            num_machines=num_machines,
            machine_rank=machine_rank,
            dist_url=dist_url,
            args=(main, args),
        )


def _take_part(main: Callable[..., None], args: tuple[Any, ...]) -> None:
    main(*args)
    _leave_process_group()


def _join_torchrun() -> None:
    local_rank = int(os.environ["LOCAL_RANK"])
    if torch.cuda.is_available():
        torch.cuda.set_device(local_rank)
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    comm.create_local_process_group(int(os.environ["LOCAL_WORLD_SIZE"]))


def _leave_process_group() -> None:
    """Take the process group down, with its threads, before the interpreter goes.

    A thread of gloo may still hold a tensor of the last reduction; to let go of it after Python
    has begun to finalize aborts a process whose work is done
    (https://github.com/pytorch/pytorch/pull/179291). ``destroy_process_group`` ends the threads
    of groups to which nothing else refers, and Detectron2 does.

    Only after work that went well: a group whose other processes are gone may not come down.
    """
    dist.destroy_process_group()
    comm._LOCAL_PROCESS_GROUP = None
    comm._get_global_gloo_group.cache_clear()
