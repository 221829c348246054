"""Greedy local search: an attack that asks the model for scores and never for a gradient.

Narodytska and Kasiviswanathan 2017, "Simple black-box adversarial attacks on deep networks".

With pixels scaled to [-1/2, 1/2], a round tries each candidate pixel at p sign(I), takes the t that leave the true
class likeliest, and sets these to r I, wrapped into the range. The next candidates are the (2 d + 1)^2 pixels around
them. In a ball a round tries each candidate at both faces of it, and sets the t that raise the loss most.
"""

from typing import Unpack

import torch
import torch.nn.functional as F
from torch import Tensor

from cmr_fast.attacks.base import Attack, Options, Progress
from cmr_fast.attacks.problem import Problem
from cmr_fast.attacks.settings import real, whole
from cmr_fast.attacks.victim import Model
from cmr_fast.errors import InputError
from cmr_fast.ops.pgd import Value


class LocalSearch(Attack):
    """`adv = LocalSearch(model)(x, y)` for images x (B, C, H, W). Candidates of all samples are one batch.

    Parameters
    ----------
    model, options
        As of PGD: loss, success, bounds, normalize, seed, check, progress. norm is "linf".
    eps
        None, the paper's attack, bounds how many pixels change but not by how much. A radius (L-inf) keeps every query
        and the result in that ball, where a pixel's channels go up or down by eps together.
    rounds
        R, at most; a sample stops once it fools the model.
    p, r, d, t
        As above; t is 5 unless given, in a ball 32.
    candidates
        Pixels tried a round; of more, these are drawn. The first are 10 % of the image, drawn.
    batch
        Images a forward pass.

    Raises
    ------
    InputError
        For settings out of their range; of a call, as PGD, and for x that is no images.

    Notes
    -----
    A sample that never fools the model comes back as the point of its highest loss.

    Without a ball the pixels taken are those whose probe has the lowest loss, as in foolbox: r I grows until it wraps
    to the other side, and there a probe costs the true class much. In a ball nothing wraps, so the highest loss is
    taken.
    Narodytska and Kasiviswanathan 2017, Algorithm 2.
    """

    def __init__(
        self,
        model: Model,
        eps: Value | None = None,
        rounds: int = 150,
        *,
        p: float = 10.0,
        r: float = 1.5,
        d: int = 5,
        t: int | None = None,
        candidates: int = 128,
        batch: int = 1024,
        **options: Unpack[Options],
    ) -> None:
        # without a radius the ball is the box
        super().__init__(model, eps=0.0 if eps is None else eps, **options)
        if self.norm != "linf":
            raise InputError(f"the ball of a local search is L-inf, got norm={self.norm!r}")
        if eps is None:
            low, high = (torch.as_tensor(v, dtype=torch.float64) for v in self.bounds)
            self.eps = float((high - low).max())
        self.p, self.r = real("p", p, 0.0, 1e30, above=True), real("r", r, 0.0, 2.0, above=True)
        self.steps, self.d = whole("rounds", rounds, 1), whole("d", d, 0)
        self.t = (5 if eps is None else 32) if t is None else whole("t", t, 1)
        self.candidates, self.batch = whole("candidates", candidates, 1), whole("batch", batch, 1)
        self.bounded = eps is not None

    def _perturb(self, problem: Problem, start: Tensor | None) -> tuple[Tensor, Tensor]:
        if problem.origin.ndim != 4:
            raise InputError(f"a local search needs images (B, C, H, W), got {tuple(problem.origin.shape)}")
        call = problem.call
        now = problem.origin.clone() if start is None else self._in_ball(problem, start)
        pixels = now[0, 0].numel()
        near = torch.ones((len(now), pixels), dtype=torch.bool, device=now.device)
        tried = min(self.candidates, max(pixels // 10, 1))
        outputs = call.victim.scores(now)
        call.check_classes(outputs, problem.labels)
        values = call.values(outputs, problem.labels)
        result, best = now.clone(), values.clone()
        history = values.to(now.dtype).expand(self.steps, -1).clone()
        alive = (~problem.fooled(outputs, now)).nonzero()[:, 0]
        with Progress(self.progress, self.steps, type(self).__name__) as progress:
            for step in range(self.steps):
                if not len(alive):
                    break
                part, x = problem.rows(alive), now[alive]
                draw = part.noise(self.seed, step, pixels).masked_fill(~near[alive], -2)  # noise is above -1
                order = draw.topk(min(tried, pixels), dim=1)
                move = self._to_a_face if self.bounded else self._cyclically
                x, chosen = move(part, x, order.indices, order.values != -2)
                near[alive] = self._around(chosen, x)
                tried = self.candidates
                outputs = call.victim.scores(x)
                values = call.values(outputs, part.labels)
                now[alive], history[step + 1 :, alive] = x, values.to(history.dtype)
                fooled = part.fooled(outputs, x)
                better = fooled | (values >= best[alive])
                result[alive[better]], best[alive[better]] = x[better], values[better]
                alive = alive[~fooled]
                progress.step()
        return result, history

    def _in_ball(self, problem: Problem, start: Tensor) -> Tensor:
        eps = problem.spread(problem.eps)
        return problem.boxed(torch.minimum(torch.maximum(start, problem.origin - eps), problem.origin + eps))

    def _cyclically(self, problem: Problem, x: Tensor, places: Tensor, near: Tensor) -> tuple[Tensor, Tensor]:
        """The paper's round: t of `places` (B, n), those that are `near`, to r I; x, and bool (B, pixels) of them."""
        middle, width = self._scale(problem)
        costs = self._costs(problem, x, places, middle + width * self.p * (x - middle).sign())
        best = costs.masked_fill(~near, torch.inf).topk(min(self.t, costs.shape[1]), dim=1, largest=False)
        chosen = self._at(x, places.gather(1, best.indices), near.gather(1, best.indices))
        x = torch.where(chosen.reshape(len(x), 1, *x.shape[2:]), self._cyclic(problem, x), x)
        return problem.boxed(x), chosen

    def _to_a_face(self, problem: Problem, x: Tensor, places: Tensor, near: Tensor) -> tuple[Tensor, Tensor]:
        """A round in the ball: t of `places` to origin + eps or origin - eps, where that raises the loss."""
        eps = problem.spread(problem.eps)
        faces = [problem.boxed(problem.origin + step) for step in (eps, -eps)]
        highest, which = torch.stack([self._costs(problem, x, places, face) for face in faces]).max(dim=0)
        now = problem.call.values(problem.call.victim.scores(x), problem.labels)[:, None]
        best = highest.masked_fill(~near, -torch.inf).topk(min(self.t, highest.shape[1]), dim=1)
        rises, taken = best.values > now, places.gather(1, best.indices)
        up = which.gather(1, best.indices) == 0
        for face, side in zip(faces, (up, ~up), strict=True):
            moved = self._at(x, taken, rises & side).reshape(len(x), 1, *x.shape[2:])
            x = torch.where(moved, face, x)
        return x, self._at(x, taken, rises)

    def _at(self, x: Tensor, places: Tensor, mask: Tensor) -> Tensor:
        """bool (B, pixels): those of `places` (B, k) where `mask` is set."""
        return torch.zeros((len(x), x[0, 0].numel()), dtype=torch.bool, device=x.device).scatter(1, places, mask)

    def _costs(self, problem: Problem, x: Tensor, places: Tensor, probe: Tensor) -> Tensor:
        """The loss with one pixel as in `probe`, for each of `places` (B, n): (B, n)."""
        count, n = places.shape
        probe = probe.flatten(2)
        costs = []
        samples = torch.arange(count, device=x.device).repeat_interleave(n)
        for number in range(0, count * n, self.batch):
            some = slice(number, number + self.batch)
            sample, place = samples[some], places.flatten()[some]
            tried = x[sample].flatten(2)
            rows = torch.arange(len(sample), device=x.device)
            tried[rows, :, place] = probe[sample, :, place]
            scores = problem.call.victim.scores(tried.reshape(-1, *x.shape[1:]))
            costs.append(problem.call.values(scores, problem.labels[sample]))
        return torch.cat(costs).reshape(count, n)

    def _cyclic(self, problem: Problem, x: Tensor) -> Tensor:
        """r I, wrapped into [-1/2, 1/2]."""
        middle, width = self._scale(problem)
        scaled = self.r * (x - middle) / width
        return middle + width * (scaled - (scaled > 0.5).to(x.dtype) + (scaled < -0.5).to(x.dtype))

    def _scale(self, problem: Problem) -> tuple[Tensor, Tensor]:
        low, high = problem.spread(problem.low), problem.spread(problem.high)
        return (low + high) / 2, high - low

    def _around(self, chosen: Tensor, x: Tensor) -> Tensor:
        grown = F.max_pool2d(chosen.reshape(len(x), 1, *x.shape[2:]).float(), 2 * self.d + 1, 1, self.d)
        return grown.flatten(1) > 0
