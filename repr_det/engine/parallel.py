"""Keeps DistributedDataParallel working when parameters change their sizes."""

from __future__ import annotations

import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel


def reason_against_other_sizes(model: nn.Module) -> str:
    """Why parameters of a model may not change their sizes; empty where they may.

    :func:`renew_buckets` can renew only the outermost wrapper, and no other parts that hold tensors
    of the parameters' sizes.
    """
    wrappers = [m for m in model.modules() if isinstance(m, DistributedDataParallel)]
    if any(wrapper is not model for wrapper in wrappers):
        return "DistributedDataParallel is inside another wrapper"
    if not wrappers:
        return ""
    if model.mixed_precision is not None:
        return "DistributedDataParallel keeps parameters in mixed precision"
    if getattr(model, "_delay_all_reduce_params", []):
        return "DistributedDataParallel delays the reduction of some parameters"
    hooks = getattr(model, "_comm_hooks", [])
    if any(state is not None and not isinstance(state, dist.ProcessGroup) for _, state in hooks):
        return "a communication hook of DistributedDataParallel has a state of its own"
    if not hooks and model._get_ddp_logging_data().get("comm_hook"):
        return "DistributedDataParallel has a built-in communication hook"
    return ""


def renew_buckets(model: DistributedDataParallel) -> None:
    """Renew a wrapper's buckets for gradients, in place, for the present sizes of its parameters.

    All processes must call this at the same time. The wrapper stays the same object with all of its
    settings, as when it is unpickled (``DistributedDataParallel.__setstate__``).
    """
    model._remove_autograd_hooks()
    model.reducer = model.logger = None  # the old ones must be gone before new ones are made
    parameters, expect_sparse = model._build_params_for_reducer()
    names = model._build_debug_param_to_name_mapping(parameters)
    model._ddp_init_helper(parameters, expect_sparse, names, model.static_graph)
    model._has_rebuilt_buckets = model._lazy_init_ran = False
    if model.static_graph:
        model._static_graph_delay_allreduce_enqueued = False
        model.reducer._set_static_graph()
        model.logger._set_static_graph()  # type: ignore[attr-defined]
    for hook, state in model._comm_hooks:
        dist._register_comm_hook(model.reducer, state, hook)
