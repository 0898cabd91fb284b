"""Settings of every test."""

from __future__ import annotations

import torch

# The networks of the tests are small: more threads would only wait for each other.
torch.set_num_threads(1)
