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
    for _ in range(3):  # a block of something else in between may make the heap grow once more
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


HEAPS = """
import sys
import threading

import torch

from repr_det.engine.allocator import keep_freed_memory

def work():
    for _ in range(4):
        tensors = [torch.ones(2**20) for _ in range(40)]
        del tensors

assert keep_freed_memory()
tensors = [torch.ones(2**20) for _ in range(80)]
del tensors
for _ in range(2):
    if sys.argv[1] == "threads":
        worker = threading.Thread(target=work)
        worker.start()
        worker.join()
    else:
        work()
print(next(l.split()[1] for l in open("/proc/self/status") if l.startswith("VmRSS")))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc alone is set")
def test_what_one_thread_freed_another_uses():
    kilobytes = {
        kind: int(subprocess.check_output([sys.executable, "-c", HEAPS, kind], text=True))
        for kind in ("threads", "no threads")
    }
    # Otherwise each thread would keep 160 MiB of its own.
    assert kilobytes["threads"] < kilobytes["no threads"] + 80 * 2**10
