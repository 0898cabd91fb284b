"""Starts and ends the processes that train together."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import detectron2.engine
import torch
import torch.distributed as dist
from detectron2.utils import comm

from repr_det.errors import UserError


def launch(
    main: Callable[..., None],
    processes: int,
    *,
    num_machines: int = 1,
    machine_rank: int = 0,
    dist_url: str = "auto",
    args: tuple[Any, ...] = (),
) -> None:
    """Run a function in several processes, as Detectron2's launch does, and end their group.

    Processes that ``torchrun`` has started are used instead.

    Args:
        main: a function that other processes can import from its module.
        processes: number of processes on this machine. A single one is this process, without a
            process group.
        num_machines: number of machines.
        machine_rank: number of this machine, from 0.
        dist_url: address of the first process; ``auto`` is a free port of this machine.
        args: arguments of ``main``.

    Raises:
        UserError: there are fewer GPUs than processes.
        ProcessExitedException: a process ended by itself; the others are ended then.
        ProcessRaisedException: a process raised an error.
    """
    if dist.is_torchelastic_launched():
        _join_torchrun()
        _take_part(main, args)
    elif processes * num_machines == 1:
        main(*args)
    else:
        if torch.cuda.is_available() and processes > (count := torch.cuda.device_count()):
            raise UserError(
                f"--num-gpus is {processes}, but there are {count}. Set {count} or less."
            )
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
    """Destroy the process group and its threads before the interpreter ends.

    A thread of gloo may still hold a tensor of the last reduction. To free it after Python has
    begun to finalize aborts a process whose work is done
    (https://github.com/pytorch/pytorch/pull/179291). ``destroy_process_group`` ends the threads
    of groups to which nothing else refers. Detectron2 refers to some, which are cleared here.

    Call it only after success: it may hang where other processes of the group are gone.
    """
    dist.destroy_process_group()
    comm._LOCAL_PROCESS_GROUP = None
    comm._get_global_gloo_group.cache_clear()
