"""What benchmarks that need a GPU share: device times of contenders in turn, and rows that are written as they come."""

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from cmr_fast.ops import _dispatch

Call = Callable[[], object]


def seconds(call: Call) -> float:
    start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    call()
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop) / 1e3


def in_turn(calls: dict[str, Call], rounds: int) -> dict[str, list[float]]:
    """Seconds of every call in every round, after a round that warms up; each round starts with the next one."""
    names = list(calls)
    times: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(-1, rounds):
        first = max(turn, 0) % len(names)
        for name in names[first:] + names[:first]:
            took = seconds(calls[name])
            if turn >= 0:
                times[name].append(took)
    return times


def median(times: dict[str, list[float]], name: str) -> float:
    return statistics.median(times[name])


def speed_up(ours: Call, theirs: Call, rounds: int) -> dict[str, object]:
    """A row's seconds of both, and the median over the rounds of theirs / ours."""
    times = in_turn({"ours": ours, "theirs": theirs}, rounds)
    both = {f"{name}_s": median(times, name) for name in times}
    return both | {"speed_up": ratio(times, "theirs", "ours")}


def ratio(times: dict[str, list[float]], slow: str, fast: str) -> float:
    """How many times as long `slow` takes: the median over the rounds."""
    return statistics.median(a / b for a, b in zip(times[slow], times[fast], strict=True))


def graph_of(call: Call, repeats: int) -> Call:
    """Replays `repeats` calls: device time without the host's."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(repeats):
            call()
    return graph.replay


def peak_bytes(call: Call) -> int:
    """The most that is allocated during a call, above what was before."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def machine() -> dict[str, object]:
    properties = torch.cuda.get_device_properties(0)
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return {
        "gpu": properties.name,
        "multiprocessors": properties.multi_processor_count,
        "driver": subprocess.run(query, capture_output=True, text=True).stdout.strip(),
        "torch": torch.__version__,
    }


class Report:
    """The command line of a benchmark, and its rows: printed, and written to --json after every one of them."""

    def __init__(self, description: str | None, backend: str) -> None:
        parser = argparse.ArgumentParser(
            description=description, formatter_class=argparse.RawDescriptionHelpFormatter
        )  # fmt: skip
        parser.add_argument("--rounds", type=int, default=9)
        parser.add_argument("--quick", action="store_true", help="small cases: shows that everything runs")
        parser.add_argument("--json", type=Path, help="also write the rows to this file")
        arguments = parser.parse_args()
        reason = _dispatch.unavailable(backend, "cuda")
        if reason is None and not torch.cuda.is_available():
            reason = "torch sees no CUDA device or driver"
        if reason:
            print(f"nothing measured: {reason}", file=sys.stderr)
            raise SystemExit(1)
        torch.manual_seed(0)
        self.rounds, self.quick, self.path = arguments.rounds, arguments.quick, arguments.json
        self.machine = machine()
        self.rows: list[dict[str, object]] = []
        self.red = 0

    def row(self, name: str, case: Callable[[], dict[str, object]]) -> None:
        try:
            values = case()
        except (AssertionError, torch.OutOfMemoryError) as error:
            self.red += 1
            values = {"red": str(error).splitlines()[0]}
        torch.cuda.empty_cache()
        self.rows.append({"case": name, **values})
        shown = (
            f"{key}={value:.4g}" if isinstance(value, float) else f"{key}={value}" for key, value in values.items()
        )
        print(name, *shown, sep="  ", flush=True)
        if self.path:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_text(json.dumps({"machine": self.machine, "rows": self.rows}, indent=1) + "\n")
