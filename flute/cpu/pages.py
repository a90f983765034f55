"""Memory in large pages: weights that are read from end to end miss the TLB less."""

from __future__ import annotations

import contextlib
import mmap
import sys

import torch
from torch import Tensor

_LARGE_PAGE = 2 << 20


def large_pages(num_bytes: int) -> Tensor:
    """Memory of its own, in pages of 2 MB where Linux has them: reading it misses the TLB less.

    Why not torch's: what it hands out again is in small pages already, and stays there.
    """
    if sys.platform != "linux" or num_bytes < _LARGE_PAGE:
        return torch.empty(num_bytes, dtype=torch.uint8)
    # The address space of one page more lets it begin at one; untouched, that takes no memory.
    memory = mmap.mmap(-1, num_bytes + _LARGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    start = -torch.frombuffer(memory, dtype=torch.uint8).data_ptr() % _LARGE_PAGE
    pages = (num_bytes + _LARGE_PAGE // 2) // _LARGE_PAGE  # the last, if half of it is used
    with contextlib.suppress(OSError):  # a kernel without them
        memory.madvise(mmap.MADV_HUGEPAGE, start, pages * _LARGE_PAGE)
    return torch.frombuffer(memory, dtype=torch.uint8, count=num_bytes, offset=start)
