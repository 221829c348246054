"""PGD that takes its gradient between three points of its own way (DRA, Gao et al. 2024).

    p_k = r1 x + r2 x_clean + r3 x_before        r drawn, positive, of sum 1: points of a triangle, k of them
    y_k = x + alpha sign(grad L(p_k))            one step along each point's gradient
    x  <- P(x + alpha sign(grad L_views(p_b)))   b the k of the highest L(y_k); before there is an x_before, p_b is x

L sees the image alone, L_views all of its views. The k points of all images are one forward and backward pass, their
y_k one forward pass. The authors choose one k for a batch, by its mean loss; here each image has its own. SA-AET (Jia
et al. 2024) draws only r with r1 < r3 < r2.
"""

from functools import cache
from typing import Any, Unpack

import torch
from torch import Tensor

from cmr_fast.attacks.base import Options, Progress
from cmr_fast.attacks.pgd import PGD
from cmr_fast.attacks.problem import STREAM, Problem
from cmr_fast.ops.pgd import Value, pgd_noise

RATIOS = 1 << 20  # the stream of the draws, past those of the views


class TrajectoryPGD(PGD):
    """PGD on `model(x)` whose gradient is taken at points that `model.alone` has chosen.

    Parameters
    ----------
    model
        A module of images, of `sga.Views`.
    eps, alpha, steps
        As of PGD.
    samples
        Points an image and step.
    ordered
        Draw shares as SA-AET does: the image's below the one before's, and that below the clean one's.
    options
        As of PGD.
    """

    def __init__(
        self, model: Any, eps: Value, alpha: Value | None, steps: int, *, samples: int, ordered: bool = False,
        **options: Unpack[Options],
    ) -> None:  # fmt: skip
        super().__init__(model, eps, alpha, steps, **options)
        self.views, self.samples, self.ordered = model, samples, ordered
        self.before: Tensor | None = None  # the points before the last step

    def _ascend(
        self, problem: Problem, x: Tensor, targets: Tensor, alpha: Tensor, count: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        objective, victim = self._objective(problem.call), problem.call.victim
        history = x.new_zeros((self.steps, len(x)))
        flags = torch.full((len(x),), -1, dtype=torch.int32, device=x.device)
        self.before = None
        with Progress(self.progress, self.steps, type(self).__name__) as progress:
            for step in range(self.steps):
                at = x if self.before is None else self._chosen(problem, x, targets, alpha, step)
                before = x.clone()
                _, values, gradient = victim.gradient(at, objective, targets)
                history[step] = values
                problem.step(x, gradient, alpha, flags, step)
                self.before = before
                progress.step()
        return x, history, flags

    def _chosen(self, problem: Problem, x: Tensor, targets: Tensor, alpha: Tensor, step: int) -> Tensor:
        """Of each image the point along whose gradient a step raises the loss most."""
        assert self.before is not None
        objective, victim = self._objective(problem.call), problem.call.victim
        shares = self._ratios(problem.index, step).to(x)[..., None, None, None]  # (3, samples, N, 1, 1, 1)
        points = shares[0] * x + shares[1] * problem.origin + shares[2] * self.before
        every = torch.arange(len(x), device=x.device).repeat(self.samples)
        self.views.alone = True
        try:
            _, _, gradient = victim.gradient(points.flatten(0, 1), objective, targets[every])
            tried = x[every] + problem.spread(alpha) * gradient.sign()
            values = objective(victim.scores(tried), targets[every]).reshape(self.samples, len(x))
        finally:
            self.views.alone = False
        return points[values.argmax(dim=0), torch.arange(len(x), device=x.device)]

    def _ratios(self, index: Tensor, step: int) -> Tensor:
        """(3, samples, N) shares in hundredths, each 0.01 or more, an image's by its number."""
        seed = (self.seed + (RATIOS + step) * STREAM) % 2**64
        u = (pgd_noise(index, 2 * self.samples, seed=seed).double().T + 1) / 2
        if self.ordered:
            triples, upto = _ordered()
            drawn = torch.searchsorted(upto.to(u.device), u[: self.samples].contiguous(), right=True)
            return triples.to(u.device)[:, drawn.clamp(max=len(upto) - 1)] / 100
        first = 1 + (98 * u[: self.samples]).floor().clamp(max=97)
        second = 1 + ((99 - first) * u[self.samples :]).floor().clamp(min=torch.zeros_like(first), max=98 - first)
        return torch.stack([first, second, 100 - first - second]) / 100


@cache
def _ordered() -> tuple[Tensor, Tensor]:
    """SA-AET's triples (3, M) in hundredths, and the chance (M,) that its rejection draws one up to each."""
    triples = [(a, b, 100 - a - b) for a in range(1, 100) for b in range(1, 100 - a) if a < 100 - a - b < b]
    chances = torch.tensor([1 / (100 - a) for a, _, _ in triples], dtype=torch.float64)
    return torch.tensor(triples, dtype=torch.float64).T, chances.cumsum(0) / chances.sum()
