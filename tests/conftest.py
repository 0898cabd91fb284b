"""Settings of every test."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

# The networks of the tests are small: more threads would only wait for each other.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def algorithms_as_before() -> Iterator[None]:
    """A deterministic run makes its whole process deterministic, and so the tests behind it."""
    before = torch.are_deterministic_algorithms_enabled()
    yield
    torch.use_deterministic_algorithms(before)
