"""Which optimizers are accepted, and what their state becomes.

An optimizer is accepted for what it does, not for its name. It is tried on a few small weights in
float64, with the options of each of its parameter groups and with gradients that grow:

- A weight with zero rows and columns, and zero gradients there, must step as the smaller one does.
- Rows that are set to zero later, with their state, must stay zero.
- Rows that come back with a new state must stay where they are put while their gradient is zero and
  nothing decays. A state that is a position (slow weights, averages that weights are drawn from)
  would pull them away.

Norms over a whole weight pass: zeros do not change them. But with them, filters take part only
where all that reads them is known, and so zero meanwhile. Means over a weight, factored moments and
noise do not pass.
"""

from __future__ import annotations

import copy
import inspect
import warnings
from collections import OrderedDict, defaultdict
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves, tree_map

from repr_det.errors import UserError
from repr_det.method.layers import FilterLayer

SECOND_MOMENTS = {
    "exp_avg_sq", "max_exp_avg_sq", "square_avg", "sum", "exp_inf", "acc_delta", "step_size"
}  # fmt: skip
"""Optimizer state that scales a step: a new filter starts with the survivors' mean of it."""

_ROWS, _COLUMNS = 140, 134
"""Size of a weight that is tried. Some optimizers factor moments from 128 by 128 on."""

_TOLERANCE = 1e-12
"""Largest difference that counts as rounding, relative to the weight."""

_SCALES = [10.0**exponent for exponent in range(-4, 4)]
"""Of the gradients, one step after another: at some of them, clipping and trust ratios act."""

_STEPS_AFTER_RETURN = 24
"""Slow weights are averaged in every few steps."""


def check_optimizer(optimizer: Optimizer) -> bool:
    """Refuse an optimizer with which the pruned network would not be exactly a smaller one.

    Returns:
        Whether weights without a gradient change the steps of others where they are not zero. Trust
        ratios do (LARS, LAMB): they scale a step by the length of the whole weight.

    Raises:
        UserError: it lacks one of the properties above, or could not be tried.
    """
    if not isinstance(optimizer, Optimizer):
        raise UserError(
            f"RePr: the optimizer is a {type(optimizer).__name__}. Pass a torch.optim.Optimizer."
        )
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    if any(is_lazy(p) for p in parameters):
        raise UserError("RePr: the model has lazy layers without weights. Run it on a batch first.")
    if {"DTensor", "FlatParameter"} & {type(p).__name__ for p in parameters}:
        raise UserError(
            "RePr: the model's weights are sharded (FSDP), so its filters cannot be compared. Use "
            "DistributedDataParallel."
        )
    closure = inspect.signature(optimizer.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise UserError(
            f"RePr: {type(optimizer).__name__} cannot step without a closure, so RePr cannot try "
            "it. Use an optimizer such as SGD, Adam, AdamW or RMSprop."
        )
    # Nothing here may show outside: random numbers, warnings about hyper-parameters.
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings(), torch.enable_grad():
        warnings.simplefilter("ignore")
        try:
            problem = _keeps_zeros(optimizer) or _lets_rows_return(optimizer)
            if problem is None:
                return _scales_by_length(optimizer)
        except Exception as error:  # an unknown optimizer may raise anything
            problem = f"it could not be tried on a small weight ({type(error).__name__}: {error})"
    raise UserError(
        f"RePr: with {type(optimizer).__name__} the pruned network would not train exactly as "
        f"a smaller one: {problem}. Use an optimizer such as SGD, Adam, AdamW or RMSprop."
    )


class _Weight(NamedTuple):
    """A weight that is tried.

    Attributes:
        values: float64, zero outside of ``kept``.
        kept: ``values[kept]`` is the smaller weight.
    """

    values: Tensor
    kept: tuple[Tensor, ...]

    def random(self, generator: torch.Generator) -> Tensor:
        """Random numbers of the weight's shape, zero outside of what is kept."""
        zeros = torch.zeros_like(self.values)
        numbers = torch.randn(self.values[self.kept].shape, generator=generator, dtype=zeros.dtype)
        return zeros.index_put(self.kept, numbers)


def _weights(dimensions: set[int], generator: torch.Generator) -> Iterator[_Weight]:
    """A weight for each number of dimensions; for four, also that of a grouped conv."""
    rows = torch.arange(_ROWS)[torch.arange(_ROWS) % 20 != 4]
    columns = torch.arange(_COLUMNS)[torch.arange(_COLUMNS) % 35 != 2]
    second_group = (rows >= _ROWS // 2).long()[:, None]
    for count in sorted(dimensions - {0}):
        shape = (_ROWS, _COLUMNS, 2, 1, 1)[:count]
        indices = [(rows,)] if count == 1 else [(rows[:, None], columns)]
        if count == 4:  # its groups lose equally many inputs, but others
            indices.append((rows[:, None], (columns + second_group) % _COLUMNS))
        for kept in indices:
            empty = _Weight(torch.zeros(shape, dtype=torch.float64), kept)
            yield empty._replace(values=empty.random(generator))


def _options(optimizer: Optimizer, decay: bool) -> list[tuple[dict[str, Any], set[int]]]:
    """The different options of parameter groups, and how many dimensions their weights have.

    Without ``decay``, options that shrink weights are 0.
    """
    found: dict[str, tuple[dict[str, Any], set[int]]] = {}
    for group in optimizer.param_groups:
        options = {k: v for k, v in group.items() if k not in ("params", "param_names")}
        options = tree_map(
            lambda v: v.item() if isinstance(v, Tensor) and v.numel() == 1 else v, options
        )
        for implementation in {"foreach", "fused", "capturable"} & options.keys():
            options[implementation] = False
        # A schedule may begin with a rate of 0, with which everything stays where it is.
        if "lr" in options:
            options["lr"] = options.get("initial_lr", options["lr"])
            if options["lr"] == 0:
                options["lr"] = 0.1
        for name, value in options.items():
            decays = "decay" in name or name.startswith(("lambd", "l1", "l2"))
            if not decay and decays and type(value) in (int, float):
                options[name] = type(value)(0)
        dimensions = {p.dim() for p in group["params"]}
        # The rate alone makes no difference, and some loops set one for each layer.
        alike = repr({**options, "lr": None, "initial_lr": None})
        found.setdefault(alike, (options, set()))[1].update(dimensions)
    return list(found.values())


class _Trial(NamedTuple):
    """An optimizer like another one, on weights of its own."""

    optimizer: Optimizer
    parameters: list[nn.Parameter]

    def step(self, gradients: list[Tensor]) -> None:
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            parameter.grad = gradient.clone()
        self.optimizer.step()


def _trial(
    optimizer: Optimizer, options: list[dict[str, Any]], values: list[list[Tensor]]
) -> _Trial:
    """The same kind of optimizer on other weights, a list of them for each group of options."""
    parameters = [[nn.Parameter(v.clone()) for v in some] for some in values]
    groups = [{**o, "params": some} for o, some in zip(options, parameters, strict=True)]
    accepted = inspect.signature(type(optimizer).__init__).parameters
    defaults = {k: v for k, v in optimizer.defaults.items() if k in accepted}
    # Options of all groups may be attributes.
    plain = {k: v for k, v in vars(optimizer).items() if type(v) in (bool, int, float, str)}
    try:
        made = type(optimizer)([dict(group) for group in groups], **defaults)
        vars(made).update({k: v for k, v in plain.items() if k in vars(made)})
    except Exception:  # its constructor takes something else, for example another optimizer
        made = _blank_copy(optimizer, groups)
    for group, some in zip(made.param_groups, options, strict=True):
        group.update(some)
    return _Trial(made, [p for some in parameters for p in some])


def _blank_copy(optimizer: Optimizer, groups: list[dict[str, Any]]) -> Optimizer:
    """A copy with other parameter groups and without state or hooks."""
    made = object.__new__(type(optimizer))
    state: defaultdict[Tensor, Any] = defaultdict(dict)
    # Optimizers within this one share its groups and its state.
    memo = {id(optimizer.param_groups): groups, id(optimizer.state): state}
    for key, value in vars(optimizer).items():
        if key.endswith("_hooks"):
            vars(made)[key] = OrderedDict()
        elif key != "step":  # set by schedules
            vars(made)[key] = copy.deepcopy(value, memo)
    return made


def _growing(weights: list[_Weight], generator: torch.Generator) -> Iterator[list[Tensor]]:
    for scale in _SCALES:
        yield [weight.random(generator).mul_(scale) for weight in weights]


def _keeps_zeros(optimizer: Optimizer) -> str | None:
    """Why a weight with zero rows and columns does not step as the smaller one; None if it does."""
    generator = torch.Generator().manual_seed(0)
    found = _options(optimizer, decay=True)
    options = [one for one, _ in found]
    weights = [list(_weights(dimensions, generator)) for _, dimensions in found]
    whole = _trial(optimizer, options, [[w.values for w in some] for some in weights])
    small = _trial(optimizer, options, [[w.values[w.kept] for w in some] for some in weights])
    flat = [weight for some in weights for weight in some]
    for gradients in _growing(flat, generator):
        whole.step(gradients)
        small.step([g[w.kept] for g, w in zip(gradients, flat, strict=True)])
        for weight, one, other in zip(flat, whole.parameters, small.parameters, strict=True):
            kept = one.detach()[weight.kept]
            if one.count_nonzero() > kept.count_nonzero():
                return "zero weights with zero gradients do not stay zero"
            if not _same(kept, other.detach()):
                return "a weight that is partly zero does not step as the smaller weight does"
    for parameter in whole.parameters:
        alike = state_tensors(whole.optimizer, parameter)
        state = whole.optimizer.state.get(parameter, {})
        others = tree_leaves([value for key, value in state.items() if key not in alike])
        if any(isinstance(leaf, Tensor) and leaf.numel() > 1 for leaf in others):
            return "its state of a weight is more than numbers and tensors of the weight's shape"
    return None


def _lets_rows_return(optimizer: Optimizer) -> str | None:
    """Why rows that were zero cannot go on from where they are put; None if they can."""
    generator = torch.Generator().manual_seed(1)
    found = _options(optimizer, decay=False)
    weights = [list(_weights(dimensions, generator)) for _, dimensions in found]
    trial = _trial(optimizer, [one for one, _ in found], [[w.values for w in x] for x in weights])
    flat = [weight for some in weights for weight in some]
    rows = torch.arange(5)
    for gradients in _growing(flat, generator):
        trial.step(gradients)
    _reset(trial, rows, [torch.zeros_like(w.values[rows]) for w in flat])
    for gradients in _growing(flat, generator):
        trial.step([g.index_fill(0, rows, 0.0) for g in gradients])
        if any(p[rows].count_nonzero() for p in trial.parameters):
            return "weights that were set to zero with their state do not stay zero"
    new = [torch.randn(w.values[rows].shape, generator=generator).double() for w in flat]
    _reset(trial, rows, new)
    gradients = [weight.random(generator).index_fill(0, rows, 0.0) for weight in flat]
    for _ in range(_STEPS_AFTER_RETURN):
        trial.step(gradients)
        if not all(_same(p.detach()[rows], v) for p, v in zip(trial.parameters, new, strict=True)):
            return "returned filters would move without a gradient, as towards slow weights"
    return None


def _scales_by_length(optimizer: Optimizer) -> bool:
    """Whether rows without a gradient change the steps of other rows."""
    generator = torch.Generator().manual_seed(2)
    found = _options(optimizer, decay=True)
    weights = [list(_weights(dimensions, generator)) for _, dimensions in found]
    trials = []
    for factor in (1.0, 3.0):
        values = [[w.values.clone() for w in some] for some in weights]
        for value in (value for some in values for value in some):
            value[:5] *= factor
        trials.append(_trial(optimizer, [one for one, _ in found], values))
    for gradients in _growing([weight for some in weights for weight in some], generator):
        for trial in trials:
            trial.step([g.index_fill(0, torch.arange(5), 0.0) for g in gradients])
        pairs = zip(*(trial.parameters for trial in trials), strict=True)
        if not all(_same(a.detach()[5:], b.detach()[5:]) for a, b in pairs):
            return True
    return False


def _reset(trial: _Trial, rows: Tensor, values: list[Tensor]) -> None:
    """Set rows of each weight and their state, as a drop does for zeros and a return for others."""
    for parameter, new in zip(trial.parameters, values, strict=True):
        parameter.detach()[rows] = new
        for key, state in state_tensors(trial.optimizer, parameter).items():
            scales = key in SECOND_MOMENTS and bool(new.any())
            state[rows] = state[len(rows) :].mean(0).expand_as(state[rows]) if scales else 0.0


def _same(a: Tensor, b: Tensor) -> bool:
    # Written so that NaN is a difference.
    return bool((a - b).abs().max() <= _TOLERANCE * b.abs().max())


def state_tensors(optimizer: Optimizer, parameter: Tensor) -> dict[str, Tensor]:
    """An optimizer's state of a parameter that has the parameter's shape, by name."""
    state = optimizer.state.get(parameter, {})
    return {
        key: value
        for key, value in state.items()
        if isinstance(value, Tensor) and value.shape == parameter.shape and value.dim() > 0
    }


def reset_state(layer: FilterLayer, returned: Tensor, optimizer: Optimizer) -> None:
    """Start the optimizer state of returned filters (bool of shape (J,)) afresh.

    First moments start at zero. Second moments (:data:`SECOND_MOMENTS`) start at the mean of the
    survivors' in the layer. From zero, late in training, Adam's first steps of a new filter would
    be several times as long as a survivor's.
    """
    survivors = ~returned
    for key, state in state_tensors(optimizer, layer.weight).items():
        if key in SECOND_MOMENTS and survivors.any():
            rows = layer.matrix(state)
            mean = rows[survivors.to(rows.device)].mean(dim=0)
            layer.write_rows(returned, mean.expand(int(returned.sum()), -1), state)
        else:
            for slot in layer.weight_slots(returned):
                slot.fill(0.0, like=state)
    for slot, others in zip(
        layer.affine_slots(returned), layer.affine_slots(survivors), strict=True
    ):
        for key, state in state_tensors(optimizer, slot.tensor).items():
            of_others = others.read(like=state)
            scales = key in SECOND_MOMENTS and len(of_others)
            slot.fill(float(of_others.mean()) if scales else 0.0, like=state)
