from __future__ import annotations

import platform
import subprocess
import sys

import pytest

FAULTS = """
import resource
import sys

import torch

from repr_det.engine.allocator import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        tensors = [torch.ones(2**24) for _ in range(2)]
        del tensors
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

faults()
if sys.argv[1] == "kept":
    assert keep_freed_memory()
    faults()
print(faults())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc alone is set")
def test_blocks_that_were_freed_are_used_again():
    faults = {
        kind: int(subprocess.check_output([sys.executable, "-c", FAULTS, kind], text=True))
        for kind in ("given back", "kept")
    }
    # Each time two blocks of 64 MiB: a page that comes from the kernel is a fault. Of blocks below
    # 32 MiB it hangs on what lies behind them whether glibc gives them back.
    pages = 5 * 2 * 2**26 // 4096
    assert faults["kept"] < 0.01 * pages
    assert faults["given back"] > 10 * faults["kept"]
