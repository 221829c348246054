"""What all search tables share: the native kernels, memory for them, and what the scan costs that they save."""

import contextlib
import mmap
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from cmr_fast.errors import InputError
from cmr_fast.ops import _dispatch

MAX_CODES = (1 << 31) - 1
_HUGE_PAGES = 1 << 22  # bytes, from which tables are read at random all over memory


def native_kernels() -> Any:
    module = _dispatch.native()
    if not isinstance(module, ModuleType):
        raise InputError(f"search tables need the native kernels: {_dispatch.unavailable('cpp', 'cpu')}")
    return module


def scan_cost_of_one(n: int, nbytes: int, num_queries: int, k: int) -> float:
    return float(native_kernels().multi_index_scan_cost(_dispatch.choose_isa(), n, nbytes, num_queries, k))


def spread(n: int, count: int) -> Tensor:
    return torch.linspace(0, max(n - 1, 0), min(count, n), dtype=torch.float64, device="cpu").long()


def empty(count: int, dtype: torch.dtype) -> Tensor:
    """Uninitialised, on huge pages where the system grants them: small ones cost a third of the time of a search."""
    size = count * dtype.itemsize
    if size < _HUGE_PAGES or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(count, dtype=dtype, device="cpu")
    pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):
        pages.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(pages, dtype=dtype, count=count)


def address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()
