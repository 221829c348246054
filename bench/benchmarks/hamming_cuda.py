"""Exact Hamming search on a GPU against what else is there: `python bench/benchmarks/hamming_cuda.py [--json FILE]`.

Limits are measured in the same run: popcounts by a kernel that does nothing else, memory by a copy. Alternatives are
products of +-1 in torch (int8 and fp16) with topk over blocks of the database, and faiss's GPU index where faiss has
one that runs. Every row first passes a gate: the same distances and indices as the CPU for some of its queries. Times
are device times between events, medians over rounds in which ours and the alternative take turns.
"""

import os
from collections.abc import Callable
from contextlib import contextmanager

import torch

import cmr_fast as cf
from cmr_fast.ops import _dispatch
from cmr_fast.ops.cuda import hamming as hamming_cuda
from cmr_fast.ops.ranking import ranking

try:
    from .gpu import Report, graph_of, in_turn, median, speed_up
except ImportError:  # started as a program
    from gpu import Report, graph_of, in_turn, median, speed_up

BLOCK = 1 << 18  # codes whose scores the torch baselines hold at once


def medians(calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    times = in_turn(calls, rounds)
    return {name: median(times, name) for name in calls}


@contextmanager
def form(name: str):
    before = os.environ.get("CMR_FAST_CUDA_FORM")
    os.environ["CMR_FAST_CUDA_FORM"] = name
    try:
        yield
    finally:
        os.environ.pop("CMR_FAST_CUDA_FORM")
        if before is not None:
            os.environ["CMR_FAST_CUDA_FORM"] = before


def random_codes(n: int, bits: int) -> torch.Tensor:
    return torch.randint(0, 256, (n, bits // 8), dtype=torch.uint8, device="cuda")


def in_form(name: str, q: torch.Tensor, db: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    with form(name):
        return cf.hamming_topk(q, db, k)


def gate(found: tuple[torch.Tensor, torch.Tensor], q: torch.Tensor, db: torch.Tensor, k: int, rows: int = 4) -> None:
    expected = cf.hamming_topk(q[:rows].cpu(), db.cpu(), k)
    for got, want in zip(found, expected, strict=True):
        assert torch.equal(got[:rows].cpu(), want), "differs from the CPU"


def popcounts_per_second() -> float:
    device = hamming_cuda.device_of(torch.empty(1, device="cuda"))
    native = _dispatch.native_cuda()
    blocks, rounds = device.warps * 4, 4096
    out = torch.empty(256 * blocks, dtype=torch.int32, device="cuda")
    queue = _dispatch.queue(torch.empty(1, device="cuda"))
    took = medians({"limit": lambda: native.hamming_arithmetic(queue, blocks, rounds, out.data_ptr())}, 5)["limit"]
    return 8.0 * rounds * 256 * blocks / took


def bytes_per_second() -> float:
    a = torch.randint(0, 256, (1 << 31,), dtype=torch.uint8, device="cuda")
    b = torch.empty_like(a)
    return 2 * a.numel() / medians({"copy": lambda: b.copy_(a)}, 5)["copy"]


def signs(codes: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return (cf.unpack_codes(codes, 8 * codes.shape[1]).to(dtype) * 2 - 1).contiguous()


def torch_topk(q: torch.Tensor, blocks: list[torch.Tensor], k: int) -> torch.Tensor:
    """Distances only: products of +-1 a block at a time, the k largest of each, then of all. Ties fall anyhow."""
    bits = q.shape[1]
    best = []
    for block in blocks:
        products = torch._int_mm(q, block.T) if q.dtype == torch.int8 else q @ block.T
        best.append(products.topk(k, dim=1).values)
    return ((bits - torch.cat(best, dim=1).topk(k, dim=1).values) / 2).int()


def faiss_gpu_index(bits: int):
    """A faiss GPU index that answers on this device, or the reason why there is none."""
    try:
        import faiss

        index = faiss.GpuIndexBinaryFlat(faiss.StandardGpuResources(), bits)
        probe = random_codes(64, bits).cpu().numpy()
        index.add(probe)
        index.search(probe[:2], 1)
        index.reset()
        return index
    except Exception as error:
        return f"{type(error).__name__}: {error}".splitlines()[0]


def against_popcounts(report: Report, bits: int, queries: int, n: int, k: int, limit: float) -> dict:
    q, db = random_codes(queries, bits), random_codes(n, bits)
    gate(in_form("popc", q, db, k), q, db, k)
    took = medians({"ours": lambda: in_form("popc", q, db, k)}, report.rounds)["ours"]
    rate = queries * n / took
    return {"seconds": took, "T_pairs_s": rate / 1e12, "share_of_popc_limit": rate * bits / 32 / limit}


def forms(report: Report, bits: int, queries: int, n: int, k: int) -> dict:
    q, db = random_codes(queries, bits), random_codes(n, bits)
    calls = {name: (lambda name=name: in_form(name, q, db, k)) for name in hamming_cuda.FORMS}
    for call in calls.values():
        gate(call(), q, db, k)
    took = medians(calls, report.rounds)
    rates = {f"{name}_T_pairs_s": queries * n / t / 1e12 for name, t in took.items()}
    return rates | {f"{name}_over_popc": took["popc"] / took[name] for name in ("b1", "int8")}


def one_query(report: Report, bits: int, n: int, k: int, bandwidth: float) -> dict:
    q, db = random_codes(1, bits), random_codes(n, bits)
    gate(cf.hamming_topk(q, db, k), q, db, k, 1)
    replay = graph_of(lambda: cf.hamming_topk(q, db, k), 1)  # as launch gaps are of the order of the work
    took = medians({"eager": lambda: cf.hamming_topk(q, db, k), "graph": replay}, 2 * report.rounds)
    bound = db.numel() / bandwidth
    return {"eager_s": took["eager"], "graph_s": took["graph"], "bound_s": bound,
            "graph_over_bound": took["graph"] / bound}  # fmt: skip


def against_torch(report: Report, bits: int, queries: int, n: int, k: int, dtype: torch.dtype) -> dict:
    q, db = random_codes(queries, bits), random_codes(n, bits)
    wide, blocks = signs(q, dtype), [signs(block, dtype) for block in db.split(BLOCK)]
    ours, theirs = cf.hamming_topk(q, db, k), torch_topk(wide, blocks, k)
    gate(ours, q, db, k)
    assert torch.equal(ours[0], theirs), "differs from torch"
    return speed_up(lambda: cf.hamming_topk(q, db, k), lambda: torch_topk(wide, blocks, k), report.rounds)


def against_faiss(report: Report, bits: int, queries: int, n: int, k: int) -> dict:
    index = faiss_gpu_index(bits)
    if isinstance(index, str):
        return {"skipped": index}
    q, db = random_codes(queries, bits), random_codes(n, bits)
    on_host = q.cpu().numpy()
    index.add(db.cpu().numpy())
    ours, theirs = cf.hamming_topk(q, db, k), index.search(on_host, k)
    assert (ours[0].cpu().numpy() == theirs[0]).all(), "differs from faiss"
    return speed_up(lambda: cf.hamming_topk(q, db, k), lambda: index.search(on_host, k), report.rounds)


def histograms(report: Report, bits: int, queries: int, n: int) -> dict:
    q, db = random_codes(queries, bits), random_codes(n, bits)
    labels = [random_codes(len(x), 24) & 0x11 for x in (q, db)]
    found = ranking(q, db, *labels, order=False)
    expected = ranking(q[:4].cpu(), db.cpu(), labels[0][:4].cpu(), labels[1].cpu(), order=False)
    for got, want in zip(found[:2], expected[:2], strict=True):
        assert torch.equal(got[:4].cpu(), want), "differs from the CPU"
    took = medians({"ours": lambda: ranking(q, db, *labels, order=False)}, report.rounds)["ours"]
    return {"seconds": took, "T_pairs_s": queries * n / took / 1e12}


def main() -> int:
    report = Report(__doc__, "cuda")
    million = 10_000 if report.quick else 1_000_000
    popcounts, bandwidth = popcounts_per_second(), bytes_per_second()
    report.machine |= {"popcounts_s": popcounts, "bytes_s": bandwidth}
    print(f"limits  popcounts={popcounts:.4g}/s  bandwidth={bandwidth:.4g} B/s")
    for bits, k in ((64, 10), (64, 100), (64, 1000), (32, 100), (128, 100), (256, 100)):
        n = 100 * million * 64 // max(bits, 64)
        case = (bits, 1024, n, k, popcounts)
        report.row(f"{bits} bits, 1,024 x {n:,}, k={k}, popc", lambda case=case: against_popcounts(report, *case))
    for bits in (64, 128, 256, 512):
        n = 20 * million
        report.row(
            f"{bits} bits, 1,024 x {n:,}, k=100, forms", lambda bits=bits, n=n: forms(report, bits, 1024, n, 100)
        )
    for bits, n in ((128, 10 * million), (64, 100 * million)):
        case = (bits, n, 10, bandwidth)
        report.row(f"{bits} bits, one query x {n:,}, k=10", lambda case=case: one_query(report, *case))
    for dtype in (torch.int8, torch.float16):
        for bits in (64, 256):
            case = (bits, 1024, 4 * million, 100, dtype)
            report.row(
                f"{bits} bits, 1,024 x {4 * million:,}, k=100, against torch {str(dtype)[6:]} product and topk",
                lambda case=case: against_torch(report, *case),
            )
    for queries in (1, 1024):
        report.row(
            f"64 bits, {queries:,} x {10 * million:,}, k=100, against faiss GpuIndexBinaryFlat",
            lambda queries=queries: against_faiss(report, 64, queries, 10 * million, 100),
        )
    case = (64, 256, million, 10_000, popcounts)
    report.row(f"64 bits, 256 x {million:,}, k=10,000", lambda: against_popcounts(report, *case))
    report.row(f"64 bits, 2,000 x {million // 5:,}, histograms", lambda: histograms(report, 64, 2000, million // 5))
    return 1 if report.red else 0


if __name__ == "__main__":
    raise SystemExit(main())
