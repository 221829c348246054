"""Greedy local search (Narodytska and Kasiviswanathan 2017, "Simple black-box adversarial attacks on deep networks"):
an attack that asks the model for scores and never for a gradient.

With pixels scaled to [-1/2, 1/2], a round tries each candidate pixel at p sign(I), takes the t that leave the true
class likeliest, and sets these to r I, wrapped into the range. The next candidates are the (2 d + 1)^2 pixels around
them. In a ball a round tries each candidate at both faces of it, and sets the t that raise the loss most.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cmr_fast.attacks.base import Attack, Model, Problem, Progress
from cmr_fast.errors import InputError
from cmr_fast.ops.pgd import Value


class LocalSearch(Attack):
    """`adv = LocalSearch(model)(x, y)` for images x (B, C, H, W). Candidates of all samples are one batch.

    rounds       R, at most; a sample stops once it fools the model
    p, r, d, t   as above; t is 5 unless given, in a ball 32
    candidates   pixels tried a round; of more, these are drawn. The first are 10 % of the image, drawn
    eps          None, the paper's attack, bounds how many pixels change but not by how much. A radius (L-inf) keeps
                 every query and the result in that ball, where a pixel's channels go up or down by eps together
    batch        images a forward pass
    and what every attack takes: loss, success, bounds, normalize, seed, check, progress

    Without a ball the pixels taken are those whose probe has the lowest loss, as in foolbox. That looks the wrong way
    round, but r I grows until it wraps to the other side, and there a probe costs the true class much. On the small
    network of the tests it fooled every sample where taking the highest loss fooled a fifth. In a ball nothing wraps:
    the paper's move, clipped, fooled no image of a plainly trained network where PGD fools all.
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
        **options: Any,
    ) -> None:
        if options.get("norm", "linf") != "linf":
            raise InputError(f"the ball of a local search is L-inf, got norm={options['norm']!r}")
        t = (5 if eps is None else 32) if t is None else t
        low, high = (torch.as_tensor(v, dtype=torch.float64) for v in options.get("bounds", (0.0, 1.0)))
        super().__init__(model, eps=float((high - low).max()) if eps is None else eps, **options)
        for name, number, least in (
            ("rounds", rounds, 1), ("d", d, 0), ("t", t, 1), ("candidates", candidates, 1), ("batch", batch, 1)
        ):  # fmt: skip
            if not isinstance(number, int) or number < least:
                raise InputError(f"{name} must be an integer of {least} or more, got {number!r}")
        if not 0 < r <= 2 or p <= 0:
            raise InputError(f"r must be above 0 and at most 2, and p above 0, got r={r!r}, p={p!r}")
        self.steps, self.p, self.r, self.d, self.t = rounds, p, r, d, t
        self.candidates, self.batch, self.bounded = candidates, batch, eps is not None

    def _perturb(self, problem: Problem, start: Tensor | None) -> tuple[Tensor, Tensor]:
        if problem.origin.ndim != 4:
            raise InputError(f"a local search needs images (B, C, H, W), got {tuple(problem.origin.shape)}")
        found = problem.origin.clone() if start is None else start
        pixels = found[0, 0].numel()
        near = torch.ones((len(found), pixels), dtype=torch.bool, device=found.device)
        tried = min(self.candidates, max(pixels // 10, 1))
        outputs = self.victim.scores(found)
        self._check_classes(outputs, problem.labels)
        values = self.loss(outputs, problem.labels)
        history = values.detach().to(found.dtype).expand(self.steps, -1).clone()
        alive = (~self._fooled(outputs, found, problem.labels)).nonzero()[:, 0]
        with Progress(self.progress, self.steps, type(self).__name__) as progress:
            for step in range(self.steps):
                if not len(alive):
                    break
                part, x = problem.rows(alive), found[alive]
                draw = self._noise(part, step, pixels).masked_fill(~near[alive], -2)  # noise is above -1
                order = draw.topk(min(tried, pixels), dim=1)
                move = self._to_a_face if self.bounded else self._cyclically
                x, chosen = move(part, x, order.indices, order.values != -2)
                near[alive] = self._around(chosen, x)
                tried = self.candidates
                outputs = self.victim.scores(x)
                found[alive] = x
                history[step + 1 :, alive] = self.loss(outputs, part.labels).to(history.dtype)
                alive = alive[~self._fooled(outputs, x, part.labels)]
                progress.step()
        return found, history

    def _cyclically(self, problem: Problem, x: Tensor, places: Tensor, near: Tensor) -> tuple[Tensor, Tensor]:
        """The paper's round: t of `places` (B, n), those that are `near`, to r I; x, and bool (B, pixels) of them."""
        middle, width = self._scale(problem)
        costs = self._costs(problem, x, places, middle + width * self.p * (x - middle).sign())
        best = costs.masked_fill(~near, torch.inf).topk(min(self.t, costs.shape[1]), dim=1, largest=False)
        chosen = self._at(x, places.gather(1, best.indices), near.gather(1, best.indices))
        x = torch.where(chosen.reshape(len(x), 1, *x.shape[2:]), self._cyclic(problem, x), x)
        return self._boxed(problem, x), chosen

    def _to_a_face(self, problem: Problem, x: Tensor, places: Tensor, near: Tensor) -> tuple[Tensor, Tensor]:
        """A round in the ball: t of `places` to origin + eps or origin - eps, where that raises the loss."""
        eps = problem.spread(problem.eps)
        faces = [self._boxed(problem, problem.origin + step) for step in (eps, -eps)]
        losses = torch.stack([self._costs(problem, x, places, face) for face in faces])
        highest, which = losses.max(dim=0)
        now = self.loss(self.victim.scores(x), problem.labels)[:, None]
        best = highest.masked_fill(~near, -torch.inf).topk(min(self.t, highest.shape[1]), dim=1)
        rises, taken = best.values > now, places.gather(1, best.indices)
        up = which.gather(1, best.indices) == 0
        for face, mine in zip(faces, (up, ~up), strict=True):
            moved = self._at(x, taken, rises & mine).reshape(len(x), 1, *x.shape[2:])
            x = torch.where(moved, face, x)
        return x, self._at(x, taken, rises)

    def _at(self, x: Tensor, places: Tensor, there: Tensor) -> Tensor:
        """bool (B, pixels): those of `places` (B, k) that are `there`."""
        found = torch.zeros((len(x), x[0, 0].numel()), dtype=torch.bool, device=x.device)
        return found.scatter(1, places, there)

    def _costs(self, problem: Problem, x: Tensor, places: Tensor, probe: Tensor) -> Tensor:
        """The loss with one pixel as in `probe`, for each of `places` (B, n): (B, n)."""
        count, n = places.shape
        probe = probe.flatten(2)
        costs = []
        for sample, place in zip(
            torch.arange(count, device=x.device).repeat_interleave(n).split(self.batch),
            places.flatten().split(self.batch), strict=True,
        ):  # fmt: skip
            tried = x[sample].flatten(2)
            rows = torch.arange(len(sample), device=x.device)
            tried[rows, :, place] = probe[sample, :, place]
            costs.append(self.loss(self.victim.scores(tried.reshape(-1, *x.shape[1:])), problem.labels[sample]))
        return torch.cat(costs).reshape(count, n)

    def _cyclic(self, problem: Problem, x: Tensor) -> Tensor:
        """r I, wrapped into [-1/2, 1/2]."""
        middle, width = self._scale(problem)
        scaled = self.r * (x - middle) / width
        return middle + width * (scaled - (scaled > 0.5).to(x.dtype) + (scaled < -0.5).to(x.dtype))

    def _scale(self, problem: Problem) -> tuple[Tensor, Tensor]:
        low, high = problem.spread(problem.low), problem.spread(problem.high)
        return (low + high) / 2, high - low

    def _boxed(self, problem: Problem, x: Tensor) -> Tensor:
        low, high = problem.spread(problem.low), problem.spread(problem.high)
        return torch.minimum(torch.maximum(x, low), high)

    def _around(self, chosen: Tensor, x: Tensor) -> Tensor:
        grown = F.max_pool2d(chosen.reshape(len(x), 1, *x.shape[2:]).float(), 2 * self.d + 1, 1, self.d)
        return grown.flatten(1) > 0
