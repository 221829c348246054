"""Exact Hamming search on a GPU against what else is there: `python bench/benchmarks/hamming_cuda.py [--json FILE]`.

Limits are measured in the same run: popcounts by a kernel that does nothing else, memory by a copy. Alternatives are
products of +-1 in torch (int8 and fp16) with topk over blocks of the database, and faiss's GPU index where faiss has
one that runs. Every row first passes a gate: the same distances and indices as the CPU for some of its queries. Times
are device times between events, medians over rounds in which ours and the alternative take turns.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import torch

import cmr_fast as cf
from cmr_fast.ops import _dispatch, _hamming_cuda
from cmr_fast.ops.ranking import ranking

BLOCK = 1 << 18  # codes whose scores the torch baselines hold at once


def seconds(call: Callable[[], object]) -> float:
    start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    call()
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop) / 1e3


def medians(calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    for call in calls.values():
        call()
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(rounds):
        for name in sorted(calls, reverse=bool(turn % 2)):
            times[name].append(seconds(calls[name]))
    return {name: statistics.median(values) for name, values in times.items()}


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
    device = _hamming_cuda.device_of(torch.empty(1, device="cuda"))
    native = _dispatch.native_cuda()
    blocks, rounds = device.warps * 4, 4096
    out = torch.empty(256 * blocks, dtype=torch.int32, device="cuda")
    queue = native.Queue(device.index, device.stream)
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


class Report:
    def __init__(self, rounds: int, machine: dict, path: Path | None) -> None:
        self.rounds, self.machine, self.path = rounds, machine, path
        self.rows, self.red = [], 0

    def row(self, name: str, case: Callable[[], dict]) -> None:
        try:
            values = case()
        except AssertionError as error:
            self.red += 1
            values = {"red": str(error)}
        torch.cuda.empty_cache()
        self.rows.append({"case": name, **values})
        print(name, *(f"{key}={value:.4g}" if isinstance(value, float) else f"{key}={value}" for key, value in
                      values.items()), sep="  ", flush=True)  # fmt: skip
        if self.path:  # after every row: a run that is cut short leaves what it measured
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_text(json.dumps({"machine": self.machine, "rows": self.rows}, indent=1) + "\n")

    def against_popcounts(self, bits: int, queries: int, n: int, k: int, limit: float) -> dict:
        q, db = random_codes(queries, bits), random_codes(n, bits)
        gate(in_form("popc", q, db, k), q, db, k)
        took = medians({"ours": lambda: in_form("popc", q, db, k)}, self.rounds)["ours"]
        rate = queries * n / took
        return {"seconds": took, "T_pairs_s": rate / 1e12, "share_of_popc_limit": rate * bits / 32 / limit}

    def forms(self, bits: int, queries: int, n: int, k: int) -> dict:
        q, db = random_codes(queries, bits), random_codes(n, bits)
        calls = {name: (lambda name=name: in_form(name, q, db, k)) for name in _hamming_cuda.FORMS}
        for call in calls.values():
            gate(call(), q, db, k)
        took = medians(calls, self.rounds)
        rates = {f"{name}_T_pairs_s": queries * n / t / 1e12 for name, t in took.items()}
        return rates | {f"{name}_over_popc": took["popc"] / took[name] for name in ("b1", "int8")}

    def one_query(self, bits: int, n: int, k: int, bandwidth: float) -> dict:
        q, db = random_codes(1, bits), random_codes(n, bits)
        gate(cf.hamming_topk(q, db, k), q, db, k, 1)
        graph = torch.cuda.CUDAGraph()  # as launch gaps are of the order of the work
        with torch.cuda.graph(graph):
            cf.hamming_topk(q, db, k)
        took = medians({"eager": lambda: cf.hamming_topk(q, db, k), "graph": graph.replay}, 2 * self.rounds)
        bound = db.numel() / bandwidth
        return {"eager_s": took["eager"], "graph_s": took["graph"], "bound_s": bound,
                "graph_over_bound": took["graph"] / bound}  # fmt: skip

    def against_torch(self, bits: int, queries: int, n: int, k: int, dtype: torch.dtype) -> dict:
        q, db = random_codes(queries, bits), random_codes(n, bits)
        wide, blocks = signs(q, dtype), [signs(block, dtype) for block in db.split(BLOCK)]
        ours, theirs = cf.hamming_topk(q, db, k), torch_topk(wide, blocks, k)
        gate(ours, q, db, k)
        assert torch.equal(ours[0], theirs), "differs from torch"
        took = medians(
            {"ours": lambda: cf.hamming_topk(q, db, k), "theirs": lambda: torch_topk(wide, blocks, k)}, self.rounds
        )
        return {"ours_s": took["ours"], "theirs_s": took["theirs"], "speed_up": took["theirs"] / took["ours"]}

    def against_faiss(self, bits: int, queries: int, n: int, k: int) -> dict:
        index = faiss_gpu_index(bits)
        if isinstance(index, str):
            return {"skipped": index}
        q, db = random_codes(queries, bits), random_codes(n, bits)
        on_host = q.cpu().numpy()
        index.add(db.cpu().numpy())
        ours, theirs = cf.hamming_topk(q, db, k), index.search(on_host, k)
        assert (ours[0].cpu().numpy() == theirs[0]).all(), "differs from faiss"
        took = medians(
            {"ours": lambda: cf.hamming_topk(q, db, k), "theirs": lambda: index.search(on_host, k)}, self.rounds
        )
        return {"ours_s": took["ours"], "theirs_s": took["theirs"], "speed_up": took["theirs"] / took["ours"]}

    def histograms(self, bits: int, queries: int, n: int) -> dict:
        q, db = random_codes(queries, bits), random_codes(n, bits)
        labels = [random_codes(len(x), 24) & 0x11 for x in (q, db)]
        found = ranking(q, db, *labels, order=False)
        expected = ranking(q[:4].cpu(), db.cpu(), labels[0][:4].cpu(), labels[1].cpu(), order=False)
        for got, want in zip(found[:2], expected[:2], strict=True):
            assert torch.equal(got[:4].cpu(), want), "differs from the CPU"
        took = medians({"ours": lambda: ranking(q, db, *labels, order=False)}, self.rounds)["ours"]
        return {"seconds": took, "T_pairs_s": queries * n / took / 1e12}


def machine(popcounts: float, bandwidth: float) -> dict:
    properties = torch.cuda.get_device_properties(0)
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return {
        "gpu": properties.name,
        "multiprocessors": properties.multi_processor_count,
        "driver": subprocess.run(query, capture_output=True, text=True).stdout.strip(),
        "torch": torch.__version__,
        "popcounts_s": popcounts,
        "bytes_s": bandwidth,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="small cases: shows that everything runs")
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    arguments = parser.parse_args()
    if reason := _dispatch.unavailable("cuda", "cuda"):
        print(f"nothing measured: {reason}", file=sys.stderr)
        return 1
    torch.manual_seed(0)
    million = 10_000 if arguments.quick else 1_000_000
    popcounts, bandwidth = popcounts_per_second(), bytes_per_second()
    print(f"limits  popcounts={popcounts:.4g}/s  bandwidth={bandwidth:.4g} B/s")
    report = Report(arguments.rounds, machine(popcounts, bandwidth), arguments.json)
    for bits, k in ((64, 10), (64, 100), (64, 1000), (32, 100), (128, 100), (256, 100)):
        n = 100 * million * 64 // max(bits, 64)
        case = (bits, 1024, n, k, popcounts)
        report.row(f"{bits} bits, 1,024 x {n:,}, k={k}, popc", lambda case=case: report.against_popcounts(*case))
    for bits in (64, 128, 256, 512):
        n = 20 * million
        report.row(f"{bits} bits, 1,024 x {n:,}, k=100, forms", lambda bits=bits, n=n: report.forms(bits, 1024, n, 100))
    for bits, n in ((128, 10 * million), (64, 100 * million)):
        case = (bits, n, 10, bandwidth)
        report.row(f"{bits} bits, one query x {n:,}, k=10", lambda case=case: report.one_query(*case))
    for dtype in (torch.int8, torch.float16):
        for bits in (64, 256):
            case = (bits, 1024, 4 * million, 100, dtype)
            report.row(
                f"{bits} bits, 1,024 x {4 * million:,}, k=100, against torch {str(dtype)[6:]} product and topk",
                lambda case=case: report.against_torch(*case),
            )
    for queries in (1, 1024):
        report.row(
            f"64 bits, {queries:,} x {10 * million:,}, k=100, against faiss GpuIndexBinaryFlat",
            lambda queries=queries: report.against_faiss(64, queries, 10 * million, 100),
        )
    report.row(
        f"64 bits, 256 x {million:,}, k=10,000", lambda: report.against_popcounts(64, 256, million, 10_000, popcounts)
    )
    report.row(f"64 bits, 2,000 x {million // 5:,}, histograms", lambda: report.histograms(64, 2000, million // 5))
    return 1 if report.red else 0


if __name__ == "__main__":
    raise SystemExit(main())
