"""A lower learning rate for a while after each return. Not in the paper; ours."""

from __future__ import annotations

from typing import Any

from torch.optim import ASGD, Optimizer, Rprop

from repr_det.errors import UserError
from repr_det.method.schedule import RePrSchedule


class RateWarmup:
    """Lets the learning rate climb back in a straight line after each return.

    The rate is lowered only during the optimizer's step and restored after it. Schedulers and logs
    of any loop see the usual rate.

    Args:
        optimizer: whose rates are lowered, those of all of its groups.
        schedule: when filters come back.
        length: iterations until the rate is the usual one again; 0 never lowers it.

    Raises:
        UserError: a length that is not a whole number from 0 to ``schedule.s1``, or an optimizer
            whose steps do not follow its learning rate.
    """

    def __init__(self, optimizer: Optimizer, schedule: RePrSchedule, length: int) -> None:
        if type(length) is not int or not 0 <= length <= schedule.s1:  # a bool is no length
            raise UserError(
                f"RePr: warmup is {length!r}. Set a whole number of iterations from 0 to S1, "
                f"which is {schedule.s1}."
            )
        if length and isinstance(optimizer, (ASGD, Rprop)):
            raise UserError(
                f"RePr: the steps of {type(optimizer).__name__} do not follow its learning rate, "
                f"so there is no warmup with it. Set warmup to 0 or use another optimizer."
            )
        self.length = length
        self._factor = 1.0
        self._optimizer = optimizer
        self._schedule = schedule
        self._rates: list[Any] = []
        if length:
            optimizer.register_step_pre_hook(self._lower)
            optimizer.register_step_post_hook(self._restore)

    def set_iteration(self, iteration: int) -> None:
        """Set the rate's factor for the step of this iteration, counted from 0."""
        self._restore(self._optimizer)  # in case the last step raised an error
        since = self._schedule.since_return(iteration)
        self._factor = 1.0 if since is None else min(1.0, (since + 1) / (self.length + 1))

    def _lower(self, optimizer: Optimizer, *_: Any) -> None:
        # Hooks may run more than once a step, as with Detectron2's gradient clipping.
        if self._factor < 1 and not self._rates:
            self._rates = [group["lr"] for group in optimizer.param_groups]
            for group in optimizer.param_groups:
                group["lr"] = self._factor * group["lr"]

    def _restore(self, optimizer: Optimizer, *_: Any) -> None:
        for group, rate in zip(optimizer.param_groups, self._rates, strict=False):
            group["lr"] = rate
        self._rates = []
        # The factor is for one step only.
        self._factor = 1.0
