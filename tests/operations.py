"""What torch is asked to do, as a list: a measure of cost that does not depend on the machine."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Operations(TorchDispatchMode):
    """Records every operation inside it, those of the backward pass included.

    Attributes:
        seen: name of each operation with the shapes of its tensors, in order.
    """

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, tuple[tuple[int, ...], ...]]] = []

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        self.seen.append((func.overloadpacket.__name__, tuple(tuple(t.shape) for t in tensors)))
        return func(*args, **(kwargs or {}))
