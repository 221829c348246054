"""Batched transport on a GPU against torch: `python bench/benchmarks/sinkhorn_cuda.py [--quick] [--json FILE]`.

The alternatives are the same op's torch path and, for Sinkhorn and where it is installed, POT's batch solver, on the
same GPU. Every row first passes a gate: plans like float64's on the CPU. Times are device times between events; ours
and the alternative take turns, in an order that is turned round every round, and the speed-up is the median over the
rounds of theirs / ours.
"""

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

import cmr_fast as cf
from cmr_fast.ops import _dispatch, _reference

SHAPES = ((256, 32), (64, 64), (4096, 32), (8, 512))
ITERATIONS, REG, BETA = 50, 0.05, 1.0


def seconds(call: Callable[[], object]) -> float:
    start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    call()
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop) / 1e3


def compare(ours: Callable[[], object], theirs: Callable[[], object], rounds: int) -> dict[str, float]:
    sides = {"ours": ours, "theirs": theirs}
    times: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(-2, rounds):
        for name in sorted(sides, reverse=bool(turn % 2)):
            took = seconds(sides[name])
            if turn >= 0:  # before it they warm up
                times[name].append(took)
    ratios = [b / a for a, b in zip(times["ours"], times["theirs"], strict=True)]
    return {
        "ours_s": statistics.median(times["ours"]),
        "theirs_s": statistics.median(times["theirs"]),
        "speed_up": statistics.median(ratios),
    }


def sinkhorn(cost: Tensor, backend: str) -> Tensor:
    return cf.sinkhorn(cost, REG, max_iter=ITERATIONS, tol=0, backend=backend)


def ipot(cost: Tensor, backend: str) -> Tensor:
    return cf.ipot(cost, BETA, max_iter=ITERATIONS, backend=backend)


def pot(cost: Tensor) -> Tensor:
    from ot.batch import solve_batch

    return solve_batch(cost, REG, max_iter=ITERATIONS, tol=0.0, method="log_sinkhorn", grad="detach").plan


def pot_problem() -> str | None:
    try:
        pot(torch.rand(2, 4, 4, device="cuda"))
    except Exception as error:
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return None


def gate(cost: Tensor, ours: Tensor, theirs: Tensor, proximal: bool) -> None:
    mass = [torch.full((cost.shape[1],), 1 / cost.shape[1]).double().numpy()] * 2
    for i in (0, len(cost) - 1):
        c = cost[i].cpu().numpy()
        if proximal:
            exact = _reference.ipot(c, BETA, *mass, ITERATIONS)
        else:
            exact = _reference.sinkhorn(c, REG, *mass, ITERATIONS)[0]
        error, budget = (float((x[i].cpu().double() - torch.as_tensor(exact)).abs().max()) for x in (ours, theirs))
        assert error <= 2 * budget + 1e-6 * exact.max(), f"error {error:.1e}, theirs {budget:.1e}"


class Report:
    def __init__(self, rounds: int, path: Path | None) -> None:
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        self.machine = {
            "gpu": torch.cuda.get_device_name(),
            "driver": subprocess.run(query, capture_output=True, text=True).stdout.strip(),
            "torch": torch.__version__,
        }
        self.rounds, self.path, self.red = rounds, path, 0
        self.rows: list[dict] = []

    def row(self, name: str, case: Callable[[], dict]) -> None:
        try:
            values = case()
        except AssertionError as error:
            self.red += 1
            values = {"red": str(error)}
        self.rows.append({"case": name, **values})
        print(name, *(f"{key}={value:.4g}" if isinstance(value, float) else f"{key}={value}" for key, value in
                      values.items()), sep="  ", flush=True)  # fmt: skip
        if self.path:  # after every row: a run that is cut short leaves what it measured
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_text(json.dumps({"machine": self.machine, "rows": self.rows}, indent=1) + "\n")

    def against(
        self, cost: Tensor, solve: Callable[[Tensor, str], Tensor], other: Callable[[Tensor], Tensor] | None = None
    ) -> dict:
        ours, theirs = (lambda: solve(cost, "cuda")), (lambda: other(cost) if other else solve(cost, "torch"))
        gate(cost, ours(), theirs(), solve is ipot)
        return compare(ours, theirs, self.rounds)

    def in_a_graph(self, cost: Tensor) -> dict:
        """Without the time to launch: what the kernel itself takes."""
        sinkhorn(cost, "cuda")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            sinkhorn(cost, "cuda")
        return {"seconds": compare(graph.replay, graph.replay, self.rounds)["ours_s"]}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--quick", action="store_true", help="small cases: shows that everything runs")
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    arguments = parser.parse_args()
    if reason := _dispatch.unavailable("cuda", "cuda"):
        print(f"nothing measured: {reason}", file=sys.stderr)
        return 1
    report = Report(3 if arguments.quick else arguments.rounds, arguments.json)
    without_pot = pot_problem()
    for problems, size in ((16, 32), (2, 280)) if arguments.quick else SHAPES:
        cost = torch.rand(problems, size, size, generator=torch.Generator().manual_seed(size)).cuda()
        name = f"{problems:,} problems of {size} x {size}, {ITERATIONS} iterations"
        report.row(f"Sinkhorn, {name}, torch path", lambda cost=cost: report.against(cost, sinkhorn))
        report.row(
            f"Sinkhorn, {name}, POT solve_batch",
            lambda cost=cost: {"skipped": without_pot} if without_pot else report.against(cost, sinkhorn, pot),
        )
        report.row(f"IPOT, {name}, torch path", lambda cost=cost: report.against(cost, ipot))
        report.row(f"Sinkhorn, {name}, as a CUDA graph", lambda cost=cost: report.in_a_graph(cost))
    return 1 if report.red else 0


if __name__ == "__main__":
    raise SystemExit(main())
