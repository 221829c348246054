"""What ops/hamming.py runs on CUDA tensors: sizes, workspace and the order of the launches.

Everything here only queues work on the current stream (range search waits once, for the number of its hits), so a
search can be captured in a CUDA graph. The answers do not depend on the plan: how many ranges the database is cut
into, the sample that limits start from, the kernel's form.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cmr_fast.errors import InputError
from cmr_fast.ops import _dispatch
from cmr_fast.ops._tensors import hits_room

FORMS = ("popc", "b1", "int8")  # xor and popcount; tensor cores on bits; tensor cores on bytes
MOST_LISTED = 2048  # a larger k is found by counting all distances first, then placing
LEAST_RANGE = 8  # steps: shorter runs of the database cost more than they give
WARPS = 16  # of a multiprocessor, as the kernels' registers allow
SAMPLE = 64  # limits start from every 64th step of a large database


@dataclass(frozen=True)
class Device:
    """How many warps fill it, and how many bytes of workspace a search may take."""

    warps: int
    workspace: int


def device_of(tensor: Tensor) -> Device:
    """The device that a tensor is on."""
    properties = torch.cuda.get_device_properties(tensor.device)
    return Device(WARPS * properties.multi_processor_count, min(1 << 30, properties.total_memory // 16))


def choose_form(nbytes: int, unit: int) -> str:
    """CMR_FAST_CUDA_FORM, else xor and popcount. Tensor cores need codes of whole, aligned 32-bit words."""
    form = os.environ.get("CMR_FAST_CUDA_FORM") or "popc"
    if form not in FORMS:
        raise InputError(f"CMR_FAST_CUDA_FORM must be one of {', '.join(FORMS)}, got {form!r}")
    if form != "popc" and unit < 4:
        raise InputError(
            f"CMR_FAST_CUDA_FORM={form} needs codes of whole, aligned 32-bit words, got {nbytes} bytes a code"
        )
    return form


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)


class _Search:
    """The native module, and the arguments that all of its functions share."""

    def __init__(self, q: Tensor, db: Tensor) -> None:
        self.q, self.db = q.contiguous(), db.contiguous()
        self.native: Any = _dispatch.native_cuda()
        self.device, self.queue = device_of(q), _dispatch.queue(q)
        self.n, self.nbytes = db.shape
        self.bins = 8 * self.nbytes + 1
        self.least_ranges = max(1, _ceil_div(self.n, 1 << 30))  # a warp counts in 32 bits
        addresses = self.q.data_ptr() | self.db.data_ptr() | self.nbytes
        self.unit = next(unit for unit in (8, 4, 1) if addresses % unit == 0)

    def scan(self, first: int, count: int, ranges: int, stride: int = 1) -> tuple[Any, int]:
        """Queries [first, first + count) against every stride-th step, in at most `ranges` parts; and in how many."""
        steps = _ceil_div(_ceil_div(self.n, self.native.STEP), stride)
        parts = max(self.least_ranges, min(ranges, steps // LEAST_RANGE))
        range_steps = _ceil_div(steps, parts)
        parts = _ceil_div(steps, range_steps)
        q = self.q.data_ptr() + first * self.nbytes
        scan = self.native.HammingScan(
            q, self.db.data_ptr(), count, self.n, self.nbytes, self.unit, parts, range_steps, stride
        )
        return scan, parts

    def ranges(self, count: int, group: int, bytes_per_range: int) -> int:
        """How many parts of the database fill the device for `count` queries, within the workspace."""
        by_warps = self.device.warps // _ceil_div(count, group)
        return max(self.least_ranges, min(by_warps, self.device.workspace // (count * bytes_per_range)))

    def batches(self, bytes_per_query: int) -> Iterator[tuple[int, int]]:
        """(first, count) of queries whose workspace fits, with the database in one part."""
        most = max(1, self.device.workspace // bytes_per_query)
        for first in range(0, len(self.q), most):
            yield first, min(most, len(self.q) - first)

    def empty(self, *shape: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self.q.device)


def topk(q: Tensor, db: Tensor, k: int, distances: Tensor, indices: Tensor) -> None:
    """Fill the first min(k, N) columns of distances (Q, k) and indices (Q, k)."""
    if len(q) == 0 or len(db) == 0:
        return
    search = _Search(q, db)
    if min(k, search.n) <= MOST_LISTED:
        _topk_by_lists(search, min(k, search.n), distances, indices)
    else:
        _topk_by_counting(search, min(k, search.n), distances, indices)


def _topk_by_lists(search: _Search, k: int, distances: Tensor, indices: Tensor) -> None:
    native, form = search.native, choose_form(search.nbytes, search.unit)
    capacity = k + max(k // 2, native.STEP) + native.STEP
    group = native.GROUP if form == "popc" else native.TENSOR_GROUP
    sample = min(SAMPLE, search.n // (8 * k))
    for first, count in search.batches(8 * capacity):
        ranges = search.ranges(count, group, 8 * capacity)
        limits = torch.full((count,), search.bins, dtype=torch.int32, device=search.q.device)
        keys = search.empty(count, ranges, capacity, dtype=torch.int64)
        counts = search.empty(count, ranges, dtype=torch.int32)
        # every sample-th step gives limits, then all of them the answer
        for stride in (sample, 1) if search.n >= 1 << 16 and sample >= 4 else (1,):
            scan, parts = search.scan(first, count, ranges, stride)
            native.hamming_lists(
                search.queue, scan, form, k, capacity, limits.data_ptr(), keys.data_ptr(), counts.data_ptr()
            )
            native.hamming_merge(
                search.queue, count, parts, search.nbytes, k, capacity, keys.data_ptr(), counts.data_ptr(),
                limits.data_ptr() if stride > 1 else 0, distances[first].data_ptr(), indices[first].data_ptr(),
                distances.shape[1],
            )  # fmt: skip


def _topk_by_counting(search: _Search, k: int, distances: Tensor, indices: Tensor) -> None:
    native = search.native
    # int32 counts and two int64 tables of places, one of them a temporary
    for first, count in search.batches(24 * search.bins):
        ranges = search.ranges(count, native.GROUP, 24 * search.bins)
        scan, parts = search.scan(first, count, ranges)
        items = search.empty(count, parts, search.bins, dtype=torch.int32)
        native.hamming_histogram(search.queue, scan, 0, 0, 0, False, items.data_ptr(), 0)
        totals = items.sum(dim=1)
        up_to = totals.cumsum(1)
        limits = ((up_to - totals) < k).sum(dim=1, dtype=torch.int32)  # distances before which fewer than k were found
        places = items.cumsum(1, dtype=torch.int64)
        places += (up_to - totals)[:, None, :]
        places -= items
        native.hamming_place(
            search.queue, scan, k, limits.data_ptr(), places.data_ptr(), distances[first].data_ptr(),
            indices[first].data_ptr(), distances.shape[1],
        )  # fmt: skip


def range_search(q: Tensor, db: Tensor, radius: int) -> tuple[Tensor, Tensor, Tensor]:
    """lims (Q + 1,), distances (T,), indices (T,). Waits once for T."""
    if len(q) == 0 or len(db) == 0:
        lims = torch.zeros(len(q) + 1, dtype=torch.int64, device=q.device)
        return lims, lims.new_empty(0, dtype=torch.int32), lims.new_empty(0)
    search = _Search(q, db)
    radius = min(radius, 8 * search.nbytes)
    scan, parts = search.scan(0, len(q), search.ranges(len(q), search.native.GROUP, 8))
    counts = search.empty(len(q) * parts, dtype=torch.int64)
    search.native.hamming_range_count(search.queue, scan, radius, counts.data_ptr())
    offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    total = int(offsets[-1])
    distances, indices = hits_room(total, q.device)
    search.native.hamming_range_fill(
        search.queue, scan, radius, offsets.data_ptr(), distances.data_ptr(), indices.data_ptr()
    )
    return offsets[::parts].clone(), distances, indices


def table(q: Tensor, db: Tensor, out: Tensor) -> None:
    """All distances, into out int32 (Q, N)."""
    if out.numel() == 0:
        return
    search = _Search(q, db)
    scan, _ = search.scan(0, len(q), search.ranges(len(q), search.native.GROUP, 1))
    search.native.hamming_table(search.queue, scan, out.data_ptr())


def histograms(q: Tensor, db: Tensor, q_labels: Tensor, db_labels: Tensor, items: Tensor, relevant: Tensor) -> None:
    """How many codes, and how many relevant ones, are at each distance: items, relevant int64 (Q, 8 * nbytes + 1).

    q_labels, db_labels    uint8 (Q, L) and (N, L): relevant where a bit is shared; or int32 (Q,) and (N,): where equal
    """
    if len(q) == 0 or len(db) == 0:
        items.zero_()
        relevant.zero_()
        return
    search = _Search(q, db)
    asked, held = q_labels.contiguous(), db_labels.contiguous()
    classes = held.ndim == 1
    label_bytes = 4 if classes else held.shape[1]
    bytes_per_query = 8 * search.bins
    for first, count in search.batches(bytes_per_query):
        scan, parts = search.scan(first, count, search.ranges(count, search.native.GROUP, bytes_per_query))
        parts_of = [search.empty(count, parts, search.bins, dtype=torch.int32) for _ in range(2)]
        search.native.hamming_histogram(
            search.queue, scan, asked[first:].data_ptr(), held.data_ptr(), label_bytes, classes,
            parts_of[0].data_ptr(), parts_of[1].data_ptr(),
        )  # fmt: skip
        for counts, out in zip(parts_of, (items, relevant), strict=True):
            torch.sum(counts, dim=1, out=out[first : first + count])
