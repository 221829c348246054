"""Auto-PGD: PGD that chooses its own step.

Croce and Hein 2020, "Reliable evaluation of adversarial robustness with an ensemble of diverse parameter-free attacks".

    z     = P(x_k + size sign(grad L(x_k)))                         size = 2 eps at first
    x_k+1 = P(x_k + 0.75 (z - x_k) + 0.25 (x_k - x_k-1))

At checkpoints, 0.22 N steps in and then at shrinking distances, a sample whose loss rose in at most 0.75 of the steps
since the last one, or whose best loss has not changed although its size has not either, gets half the size and starts
again from its best point.
"""

from typing import Unpack

import torch
from torch import Tensor

from cmr_fast.attacks import losses
from cmr_fast.attacks.base import Attack, Options, Progress
from cmr_fast.attacks.problem import Problem
from cmr_fast.attacks.settings import flag, real, whole
from cmr_fast.attacks.victim import Model
from cmr_fast.errors import InputError
from cmr_fast.ops.pgd import Value

MIX = 0.75  # of the new step, the rest is momentum
FIRST, LEAST, SHRINK = 0.22, 0.06, 0.03  # checkpoint distances, as shares of the steps


class APGD(Attack):
    """`adv = APGD(model, eps=8/255, steps=100)(x, y)`: APGD-CE; loss="dlr" is APGD-DLR.

    Parameters
    ----------
    model, eps, options
        As of PGD: norm, loss, success, bounds, normalize, strict, dtype, channels_last, fold, seed, ...
    steps
        Gradients a run.
    restarts
        Runs, each on the samples that no run before it has fooled.
    rho
        Share of the steps since a checkpoint in which the loss must rise for the size to be kept.
    early_stop
        A sample leaves the batch once it fools the model, which does not change who is fooled.

    Raises
    ------
    InputError
        For settings out of their range; of a call, as PGD.

    Notes
    -----
    Samples that the model has wrong as they are come back as they are. `start` replaces the first run's random start.
    Croce and Hein 2020, Algorithm 1.
    """

    def __init__(
        self,
        model: Model,
        eps: Value = 8 / 255,
        steps: int = 100,
        *,
        restarts: int = 1,
        rho: float = 0.75,
        early_stop: bool = True,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(model, eps=eps, **options)
        self.steps, self.restarts = whole("steps", steps, 1), whole("restarts", restarts, 1)
        self.rho, self.early_stop = real("rho", rho, 0.0, 1.0), flag("early_stop", early_stop)

    def _runs(self, problem: Problem, clean: Tensor) -> list[tuple[losses.Loss, Tensor]]:
        """What each run raises, and what it compares the outputs with."""
        return [(problem.call.loss, problem.labels)] * self.restarts

    def _perturb(self, problem: Problem, start: Tensor | None) -> tuple[Tensor, Tensor]:
        call = problem.call
        clean = call.victim.scores(problem.origin)
        call.check_classes(clean, problem.labels)
        result, best = problem.origin.clone(), problem.origin.new_full((len(clean),), -torch.inf)
        history = call.values(clean, problem.labels).to(best.dtype).expand(self.steps, -1).clone()
        alive = (~problem.fooled(clean, problem.origin)).nonzero()[:, 0]
        runs = self._runs(problem, clean)
        with Progress(self.progress, self.steps * len(runs), type(self).__name__) as progress:
            for run, (objective, goals) in enumerate(runs):
                if not len(alive):
                    break
                part = problem.rows(alive)
                x = self._sphere(part, run) if start is None or run else start[alive]
                x, value, fooled, curve, broken = self._ascend(part, x, objective, goals[alive], progress)
                where = torch.full((len(result),), -1, device=x.device)
                where[alive] = broken
                self._refuse_broken(where, len(result))
                better = fooled | (value > best[alive])
                kept = alive[better]
                result[kept], best[kept], history[:, kept] = x[better], value[better], curve[:, better]
                alive = alive[~fooled]
        return result, history

    def _ascend(
        self, problem: Problem, x: Tensor, objective: losses.Loss, goals: Tensor, progress: Progress
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """One run: points, their losses, who is fooled, the losses before each step, where a gradient broke."""
        victim = problem.call.victim
        count, rows = len(x), torch.arange(len(x), device=x.device)
        result, fooled = x.clone(), torch.zeros(count, dtype=torch.bool, device=x.device)
        highest = torch.full((count,), -torch.inf, dtype=x.dtype, device=x.device)
        history, broken = x.new_zeros((self.steps, count)), torch.full((count,), -1, device=x.device)
        flags = broken.int()
        old, best_x, best_gradient = x.clone(), x.clone(), torch.zeros_like(x)
        best, previous, at_check = highest.clone(), -highest, highest.clone()
        size = (2 * problem.eps).expand(count, -1).clone()
        rises, halved = torch.zeros_like(best), torch.ones_like(fooled)
        window, least = (max(int(share * self.steps), 1) for share in (FIRST, LEAST))
        checkpoint = window
        for step in range(self.steps + 1):
            last = step == self.steps
            if last:  # the last point is only looked at
                outputs = victim.scores(x)
                values, gradient = objective(outputs, goals).detach(), best_gradient
            else:
                outputs, values, gradient = victim.gradient(x, objective, goals)
                history[step:, rows] = values.to(history.dtype)
            values = values.to(best.dtype)
            hit = problem.fooled(outputs, x) & ~values.isnan()
            new = values > best
            best = torch.where(new, values, best)
            best_x[new], best_gradient[new] = x[new], gradient[new]
            improved = hit | (~fooled[rows] & new)  # a point that fools the model is never given up for a higher loss
            result[rows[improved]], highest[rows[improved]] = x[improved], values[improved]
            fooled[rows[hit]] = True
            if last:
                broken[rows] = flags.long()
                break
            rises += values > previous
            previous = values
            if step == checkpoint:
                halve = (rises <= self.rho * window) | (~halved & (best == at_check))
                size[halve] /= 2
                x, gradient = x.clone(), gradient.clone()
                x[halve], gradient[halve] = best_x[halve], best_gradient[halve]
                halved, at_check = halve, best.clone()
                rises = torch.zeros_like(rises)
                window = max(window - max(int(SHRINK * self.steps), 1), least)
                checkpoint += window
            if self.early_stop and bool(hit.any()):
                stay = (~hit).nonzero()[:, 0]
                broken[rows] = flags.long()
                rows, problem, goals, flags = rows[stay], problem.rows(stay), goals[stay], flags[stay]
                x, old, gradient, size = x[stay], old[stay], gradient[stay], size[stay]
                best_x, best_gradient, best, previous = best_x[stay], best_gradient[stay], best[stay], previous[stay]
                rises, halved, at_check = rises[stay], halved[stay], at_check[stay]
                if not len(rows):
                    break
            ahead = problem.step(x.clone(), gradient, size, flags, step)
            mix = MIX if step else 1.0
            mixed = x + mix * (ahead - x) + (1 - mix) * (x - old)
            still = torch.zeros_like(mixed)  # a step along zero is the projection alone
            old, x = x, problem.step(mixed, still, size, flags, step)
            progress.step()
        return result, highest, fooled, history, broken

    def _sphere(self, problem: Problem, run: int) -> Tensor:
        """A random point of the ball's surface, clipped: in L-inf the noise of one sample divided by its largest."""
        origin = problem.origin
        if self.norm == "linf":
            noise = problem.noise(self.seed, run, origin[0].numel())
            delta = (noise / noise.abs().amax(dim=1, keepdim=True)).reshape(origin.shape)
        else:
            delta = problem.directions(self.seed, run)[0].to(origin.dtype)
        return problem.boxed(origin + problem.spread(problem.eps) * delta).contiguous()


class APGDT(APGD):
    """APGD-T: one run of APGD on the targeted DLR for each of the likeliest wrong classes, on who is left.

    Parameters
    ----------
    model, eps, steps, options
        As of APGD.
    targets
        How many classes (9, AutoAttack's, or all wrong ones if there are fewer).
    restarts, rho, early_stop
        As of APGD; the restarts are of each class.

    Raises
    ------
    InputError
        For a loss of one's own, and models of fewer than 4 classes.

    Notes
    -----
    Croce and Hein 2020, Eq. 7.
    """

    def __init__(
        self,
        model: Model,
        eps: Value = 8 / 255,
        steps: int = 100,
        *,
        targets: int = 9,
        restarts: int = 1,
        rho: float = 0.75,
        early_stop: bool = True,
        **options: Unpack[Options],
    ) -> None:
        options.setdefault("loss", "dlr")
        super().__init__(model, eps, steps, restarts=restarts, rho=rho, early_stop=early_stop, **options)
        if not self.classifier:
            raise InputError(
                "APGDT raises the targeted DLR of a classifier's logits; use APGD with a loss of one's own"
            )
        self.targets = whole("targets", targets, 1)

    def _runs(self, problem: Problem, clean: Tensor) -> list[tuple[losses.Loss, Tensor]]:
        ranked = clean.scatter(1, problem.labels[:, None], -torch.inf).argsort(dim=1, descending=True, stable=True)

        def objective(logits: Tensor, goals: Tensor) -> Tensor:
            return losses.dlr_targeted(logits, goals[:, 0], goals[:, 1])

        wanted = ranked[:, : min(self.targets, clean.shape[1] - 1)].unbind(dim=1)
        return [(objective, torch.stack([problem.labels, w], dim=1)) for w in wanted for _ in range(self.restarts)]
