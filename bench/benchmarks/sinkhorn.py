"""Many small transport problems, 50 iterations each, one thread: against plain torch and POT's and geomloss's batch
solvers."""

from collections.abc import Callable

import torch
from torch import Tensor

import cmr_fast as cf
from cmr_fast.ops import _reference

from .common import Comparison, cost

SHAPES = ((256, 32), (64, 64))
ITERATIONS, REG, BETA = 50, 0.05, 1.0


def costs(problems: int, size: int) -> Tensor:
    return torch.rand(problems, size, size, generator=torch.Generator().manual_seed(size))


def plain_sinkhorn(cost: Tensor, reg: float, iterations: int) -> Tensor:
    """The log-domain loop that people write."""
    m, n = cost.shape[1:]
    k = -cost / reg
    f, g = torch.zeros_like(cost[:, :, 0]), torch.zeros_like(cost[:, 0])
    log_mu, log_nu = -torch.tensor(float(m)).log(), -torch.tensor(float(n)).log()
    for _ in range(iterations):
        f = log_mu - torch.logsumexp(k + g[:, None, :], 2)
        g = log_nu - torch.logsumexp(k + f[:, :, None], 1)
    return (k + f[:, :, None] + g[:, None, :]).exp()


def plain_ipot(cost: Tensor, beta: float, iterations: int) -> Tensor:
    """Xie et al. 2018, Algorithm 1, with one inner step, as it stands."""
    m, n = cost.shape[1:]
    step, plan = (-cost / beta).exp(), torch.ones_like(cost)
    sigma = torch.full_like(cost[:, 0], 1 / n)
    for _ in range(iterations):
        q = step * plan
        delta = 1 / (m * (q @ sigma[:, :, None])[:, :, 0])
        sigma = 1 / (n * (q.mT @ delta[:, :, None])[:, :, 0])
        plan = delta[:, :, None] * q * sigma[:, None, :]
    return plan


def pot(cost: Tensor, reg: float, iterations: int) -> Tensor:
    from ot.batch import solve_batch

    return solve_batch(cost, reg, max_iter=iterations, tol=0.0, method="log_sinkhorn", grad="detach").plan


def geomloss(cost: Tensor, reg: float, iterations: int) -> Tensor:
    """Its regulariser is KL to the product of the marginals, which has the same plan. Its iterations come down to `reg`
    from the spread of the costs and move both sides at once, so that its plan is further from the end than ours."""
    from geomloss import ot

    return ot.solve_batch(cost, reg=reg, max_iter=iterations).plan


def comparison(
    problems: int, size: int, alternative: str, solve: Callable[[Tensor, float, int], Tensor], proximal: bool = False
) -> Comparison:
    cost = costs(problems, size)

    def ours() -> Tensor:
        if proximal:
            return cf.ipot(cost, BETA, max_iter=ITERATIONS, threads=1)
        return cf.sinkhorn(cost, REG, max_iter=ITERATIONS, tol=0, threads=1)

    def check() -> None:
        mine, theirs = ours(), solve(cost, BETA if proximal else REG, ITERATIONS)
        mass = [torch.full((size,), 1 / size).double().numpy()] * 2
        for i in range(2):
            if proximal:
                exact = _reference.ipot(cost[i].numpy(), BETA, *mass, ITERATIONS)
            else:
                exact = _reference.sinkhorn(cost[i].numpy(), REG, *mass, ITERATIONS)[0]
            error, budget = (float((x[i].double() - torch.as_tensor(exact)).abs().max()) for x in (mine, theirs))
            assert error <= 2 * budget + 1e-6, f"error {error:.1e}, theirs {budget:.1e}"
            assert budget <= 0.1 * exact.max(), f"theirs is apart by {budget:.1e}: another problem"

    return Comparison(
        name=f"{'IPOT' if proximal else 'Sinkhorn'}, {problems} problems of {size} x {size}, {ITERATIONS} iterations",
        alternative=alternative,
        ours=ours,
        theirs=lambda: solve(cost, BETA if proximal else REG, ITERATIONS),
        check=check,
        work=2 * ITERATIONS * cost.numel() / 1e9,
        unit="G multiply-adds",
    )


def comparisons(quick: bool = False) -> list[Comparison]:
    if quick:
        ways = {"plain torch": plain_sinkhorn, "POT solve_batch": pot, "geomloss.ot solve_batch": geomloss}
        return [comparison(16, 32, name, solve) for name, solve in ways.items()]
    rows = []
    for problems, size in SHAPES:
        rows.append(comparison(problems, size, "plain torch, logarithms", plain_sinkhorn))
        rows.append(comparison(problems, size, "POT solve_batch, log_sinkhorn", pot))
        rows.append(comparison(problems, size, "geomloss.ot solve_batch", geomloss))
        rows.append(comparison(problems, size, "plain torch", plain_ipot, proximal=True))
    return rows


class Sinkhorn:
    """Lower is better: seconds, what is left of the marginals' error, and our time as a share of the others'."""

    version = "1"
    params = (tuple(f"{problems} x {size}" for problems, size in SHAPES),)
    param_names = ("problems",)
    timeout = 600

    def setup(self, shape: str) -> None:
        self.shape = problems, size = tuple(int(x) for x in shape.split(" x "))
        self.cost = costs(problems, size)

    def time_sinkhorn(self, shape: str) -> None:
        cf.sinkhorn(self.cost, REG, max_iter=ITERATIONS, tol=0, threads=1)

    def time_ipot(self, shape: str) -> None:
        cf.ipot(self.cost, BETA, max_iter=ITERATIONS, threads=1)

    def track_marginal_error(self, shape: str) -> float:
        return float(cf.sinkhorn(self.cost, REG, tol=1e-6, details=True, threads=1).error.max())

    def track_time_over_torch(self, shape: str) -> float:
        return cost(lambda: comparison(*self.shape, "plain torch", plain_sinkhorn))

    track_time_over_torch.unit = "ours / plain torch"

    def track_time_over_pot(self, shape: str) -> float:
        return cost(lambda: comparison(*self.shape, "POT", pot))

    track_time_over_pot.unit = "ours / POT"

    def track_time_over_geomloss(self, shape: str) -> float:
        return cost(lambda: comparison(*self.shape, "geomloss", geomloss))

    track_time_over_geomloss.unit = "ours / geomloss"
