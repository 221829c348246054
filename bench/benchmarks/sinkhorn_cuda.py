"""Batched transport on a GPU against torch: `python bench/benchmarks/sinkhorn_cuda.py [--quick] [--json FILE]`.

The alternatives are the same op's torch path and, for Sinkhorn and where it is installed, POT's batch solver, on the
same GPU. Every row first passes a gate: plans like float64's on the CPU. Times are device times between events; ours
and the alternative take turns, in an order that is turned round every round, and the speed-up is the median over the
rounds of theirs / ours.
"""

from collections.abc import Callable

import torch
from torch import Tensor

import cmr_fast as cf
from cmr_fast.ops import _reference

try:
    from .gpu import Report, graph_of, in_turn, median, speed_up
except ImportError:  # started as a program
    from gpu import Report, graph_of, in_turn, median, speed_up

SHAPES = ((256, 32), (64, 64), (4096, 32), (8, 512))
ITERATIONS, REG, BETA = 50, 0.05, 1.0


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


def against(
    report: Report, cost: Tensor, solve: Callable[[Tensor, str], Tensor],
    other: Callable[[Tensor], Tensor] | None = None,
) -> dict[str, object]:  # fmt: skip
    def ours() -> Tensor:
        return solve(cost, "cuda")

    def theirs() -> Tensor:
        return other(cost) if other else solve(cost, "torch")

    gate(cost, ours(), theirs(), solve is ipot)
    return speed_up(ours, theirs, report.rounds)


def in_a_graph(report: Report, cost: Tensor) -> dict[str, object]:
    """Without the time to launch: what the kernel itself takes."""
    return {"seconds": median(in_turn({"graph": graph_of(lambda: sinkhorn(cost, "cuda"), 1)}, report.rounds), "graph")}


def main() -> int:
    report = Report(__doc__, "cuda")
    without_pot = pot_problem()
    for problems, size in ((16, 32), (2, 280)) if report.quick else SHAPES:
        cost = torch.rand(problems, size, size, generator=torch.Generator().manual_seed(size)).cuda()
        name = f"{problems:,} problems of {size} x {size}, {ITERATIONS} iterations"
        report.row(f"Sinkhorn, {name}, torch path", lambda cost=cost: against(report, cost, sinkhorn))
        report.row(
            f"Sinkhorn, {name}, POT solve_batch",
            lambda cost=cost: {"skipped": without_pot} if without_pot else against(report, cost, sinkhorn, pot),
        )
        report.row(f"IPOT, {name}, torch path", lambda cost=cost: against(report, cost, ipot))
        report.row(f"Sinkhorn, {name}, as a CUDA graph", lambda cost=cost: in_a_graph(report, cost))
    return 1 if report.red else 0


if __name__ == "__main__":
    raise SystemExit(main())
