"""Projected gradient attacks: PGD (Madry et al. 2018), FGSM (Goodfellow et al. 2015), MI-FGSM (Dong et al. 2018), and
PGD on Carlini and Wagner's margin.

    x <- clip(P(x + alpha sign(grad L(f(x), y))))     L-inf; L2 with grad / |grad|

P projects into the ball of radius eps around the clean input, clip into the box. The update is one pass over memory
(ops.pgd_step_); the time is the model's.
"""

from typing import Any, Literal

import torch
from torch import Tensor

from cmr_fast.attacks import losses
from cmr_fast.attacks.base import Attack, Model, Problem, Progress, _check_values
from cmr_fast.errors import InputError
from cmr_fast.ops.pgd import Value, as_values, pgd_noise

Targeted = Literal[False, "label", "random"]
TARGET_STREAM = 1 << 32


class PGD(Attack):
    """Projected gradient ascent on a loss: `adv = PGD(model, eps=8/255, alpha=2/255, steps=10)(x, y)`.

    model             a torch module (put in evaluation mode, parameters frozen, and back again) or any callable
    eps, alpha        radius and step in the units of x: a number, (B,), (1, C) or (B, C)
    norm              "linf", or "l2", where the gradient is divided by its length
    loss              "ce", "cw", "margin", "dlr", or a callable (outputs, y) -> (B,); their sum is differentiated, so a
                      sample's step does not depend on its batch. Outputs are float32 even where the model's are 16 bits
    success           (outputs, y) -> bool (B,), for early_stop and restarts with a loss of one's own
    targeted          "label": y is the class to reach; "random": a uniformly random class other than y is (Madry's
                      random-targeted attack); the loss is then lowered
    random_start      uniform in the ball; torchattacks' rule in L2
    restarts          this many starts at once, as one batch; what fools the model is kept, else the highest loss
    momentum          None, or MI-FGSM's mu: g <- mu g + grad / mean |grad|, and the step is along g
    early_stop        a sample (with its other restarts) leaves the batch once it fools the model
    bounds            of x, a number or a value a channel; normalize=(mean, std) is applied inside the gradient
    strict            |adv - x| <= eps holds in exact arithmetic. False leaves float32 L-inf results at the rounded edge
                      fl(x +- eps), bit for bit torchattacks'; other norms and types are always exact
    dtype             torch.bfloat16 runs the model under autocast; x, losses and steps stay float32, and whether a
                      sample fools the model is decided without autocast
    channels_last     runs a copy of the convolutions' weights in that layout
    fold              merges batch normalisation into the convolutions of a copy (torch.fx); rounds differently
    graph             on CUDA, captures the whole loop in one graph and replays it for inputs of the same shape
    seed, generator   of the random start; see `__call__` for how a sample's noise is found
    check             a probe at the first call refuses models that are random or mix the samples of a batch
    progress          None shows a bar on a terminal after a few seconds, True at once, False never

    Raises InputError for inputs outside the bounds, labels that the model has no class for, and gradients that are not
    finite, naming sample and step. eps = 0 returns x.
    """

    def __init__(
        self,
        model: Model,
        eps: Value = 8 / 255,
        alpha: Value = 2 / 255,
        steps: int = 10,
        *,
        targeted: Targeted = False,
        random_start: bool = True,
        restarts: int = 1,
        momentum: float | None = None,
        early_stop: bool = False,
        graph: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(model, eps=eps, **options)
        _check_values("alpha", alpha, 0.0, above=True)
        for name, number, least in (("steps", steps, 0), ("restarts", restarts, 1)):
            if not isinstance(number, int) or number < least:
                raise InputError(f"{name} must be an integer of {least} or more, got {number!r}")
        if momentum is not None and not 0 <= momentum < float("inf"):
            raise InputError(f"momentum must be finite and 0 or more, got {momentum}")
        if restarts > 1 and not random_start:
            raise InputError(f"{restarts} restarts without a random start would be one and the same run")
        if targeted not in (False, "label", "random"):
            raise InputError(f"targeted must be False, 'label' or 'random', got {targeted!r}")
        if targeted and not self.classifier:
            raise InputError("targeted needs a named loss; write a loss of your own so that higher is what you want")
        if early_stop and self.success is None:
            raise InputError("early_stop needs to know what success is: pass success=(outputs, y) -> bool (B,)")
        if graph and early_stop:
            raise InputError("graph=True replays a fixed loop, early_stop changes it: choose one")
        if graph and (self.victim.channels_last or self.victim.fold):
            raise InputError("graph=True reads the model's own weights, channels_last and fold copies: choose one")
        if targeted == "label":
            self.success = lambda logits, labels: logits.argmax(dim=1) == labels
        self.alpha, self.steps, self.targeted, self.random_start = alpha, steps, targeted, random_start
        self.restarts, self.momentum, self.early_stop, self.graph = restarts, momentum, early_stop, graph
        self._graphs: dict[Any, Any] = {}

    def _perturb(self, problem: Problem, start: Tensor | None) -> tuple[Tensor, Tensor]:
        if self.graph and problem.origin.device.type != "cuda":
            raise InputError(f"graph=True needs a CUDA device, x is on {problem.origin.device}")
        count, restarts = len(problem.origin), self.restarts
        starts = []
        for restart in range(restarts):
            if start is not None and restart == 0:
                starts.append(start)
            elif self.random_start:
                starts.append(self._random_start(problem, restart))
            else:
                starts.append(problem.origin.clone())
        alpha = as_values(self.alpha, problem.origin, "alpha")
        if restarts > 1:
            every = torch.arange(count, device=problem.origin.device).repeat(restarts)
            alpha = alpha[every] if len(alpha) > 1 else alpha
            problem = problem.rows(every)
        x = torch.cat(starts) if restarts > 1 else starts[0]
        targets = self._targets(problem) if self.targeted == "random" else problem.labels
        if self.graph and self.steps:
            found, history, broken = self._replay(problem, x, targets, alpha)
        else:
            found, history, broken = self._ascend(problem, x, targets, alpha, count)
        self._refuse_broken(broken, count)
        if restarts == 1:
            return found, history
        return self._best(problem, found, targets, history, count)

    def _objective(self, outputs: Tensor, targets: Tensor) -> Tensor:
        self._check_classes(outputs, targets)
        values = self.loss(outputs, targets)
        return -values if self.targeted else values

    def _step(self, problem: Problem, x: Tensor, along: Tensor, alpha: Tensor, flags: Tensor, step: int) -> None:
        """ops.pgd_step_, its arguments checked once and for all."""
        box = problem.low, problem.high
        l2 = self.norm == "l2"
        torch.ops.cmr_fast.pgd_step_(x, along, problem.origin, alpha, problem.eps, *box, flags, step, l2, None, None)

    def _along(self, gradient: Tensor, velocity: Tensor | None) -> Tensor:
        """What the step goes along: the gradient, or MI-FGSM's velocity, which is updated."""
        if velocity is None or self.momentum is None:
            return gradient
        mean = gradient.abs().flatten(1).mean(dim=1).reshape(-1, *[1] * (gradient.ndim - 1))
        return velocity.mul_(self.momentum).add_(torch.where(mean == 0, gradient, gradient / mean))

    def _ascend(
        self, problem: Problem, x: Tensor, targets: Tensor, alpha: Tensor, count: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Perturbed rows, losses before each step (steps, rows), and the step at which a row's gradient broke, or -1.

        With early_stop, `rows` are those still in the batch: row r is restart r // count of sample r % count.
        """
        total, device = len(x), x.device
        found, rows = x, torch.arange(total, device=device)
        history = x.new_zeros((self.steps, total))
        broken = torch.full((total,), -1, dtype=torch.int32, device=device)
        flags, velocity = broken.clone(), torch.zeros_like(x) if self.momentum is not None else None
        if self.early_stop:
            found = x.clone()
        with Progress(self.progress, self.steps, type(self).__name__) as progress:
            for step in range(self.steps):
                outputs, values, gradient = self.victim.gradient(x, self._objective, targets)
                if self.early_stop:
                    history[step:, rows] = values.to(history.dtype)
                    fooled = self._fooled(outputs, x, problem.labels) & ~values.isnan()
                    if bool(fooled.any()):
                        found[rows] = x
                        broken[rows] = flags
                        done = torch.zeros(count, dtype=torch.bool, device=device)
                        done[rows[fooled] % count] = True
                        stay = (~done[rows % count]).nonzero()[:, 0]
                        rows, x, gradient, flags = rows[stay], x[stay], gradient[stay], flags[stay]
                        problem, targets = problem.rows(stay), targets[stay]
                        alpha = alpha[stay] if len(alpha) > 1 else alpha
                        velocity = None if velocity is None else velocity[stay]
                        if not len(rows):
                            break
                else:
                    history[step] = values
                self._step(problem, x, self._along(gradient, velocity), alpha, flags, step)
                progress.step()
        if self.early_stop:
            found[rows] = x
            broken[rows] = flags
            return found, history, broken
        return x, history, flags

    def _targets(self, problem: Problem) -> Tensor:
        """(y + 1 + r) mod K with r uniform below K - 1."""
        scores = self.victim.scores(problem.origin[:1])
        self._check_classes(scores, problem.labels)
        classes = scores.shape[-1]
        if classes < 2:
            raise InputError(f"a random target needs 2 classes, the model has {classes}")
        # a restart is another draw for the same sample
        restart = torch.arange(self.restarts, device=problem.index.device).repeat_interleave(
            len(problem.index) // self.restarts
        )
        noise = pgd_noise(problem.index, self.restarts, seed=(self.seed + TARGET_STREAM) % 2**64)
        u = (noise.double().gather(1, restart[:, None])[:, 0] + 1) / 2
        return (problem.labels + 1 + (u * (classes - 1)).long()) % classes

    def _best(
        self, problem: Problem, found: Tensor, targets: Tensor, history: Tensor, count: int
    ) -> tuple[Tensor, Tensor]:
        """Of every sample's restarts the one that fools the model, else that of the highest loss."""
        outputs = self.victim.scores(found)
        values = self._objective(outputs, targets).reshape(self.restarts, count)
        if self.success is not None:
            fooled = self.success(outputs, problem.labels).reshape(self.restarts, count)
            values = torch.where(fooled | ~fooled.any(dim=0), values, -torch.inf)
        kept = values.argmax(dim=0) * count + torch.arange(count, device=found.device)
        return found[kept], history[:, kept]

    def _replay(self, problem: Problem, x: Tensor, targets: Tensor, alpha: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The loop as one CUDA graph, captured at the first call of a shape. Weights are read where they lie."""
        inputs = [problem.origin, problem.labels, problem.eps, problem.low, problem.high, x, targets, alpha]
        key = tuple((tuple(t.shape), t.dtype, t.device) for t in inputs)
        if key not in self._graphs:
            self._check_classes(self.victim.scores(problem.origin[:1]), targets)  # not in a graph: it waits
            held = [t.clone() for t in inputs]
            fixed = Problem(held[0], held[1], problem.index, *held[2:5])

            def loop() -> tuple[Tensor, Tensor, Tensor]:
                moving, history = held[5].clone(), []
                flags = torch.full((len(moving),), -1, dtype=torch.int32, device=moving.device)
                velocity = torch.zeros_like(moving) if self.momentum is not None else None
                for step in range(self.steps):
                    _, values, gradient = self.victim.gradient(moving, self._objective, held[6])
                    history.append(values)
                    self._step(fixed, moving, self._along(gradient, velocity), held[7], flags, step)
                return moving, torch.stack(history), flags

            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                loop()
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                result = loop()
            self._graphs[key] = graph, held, result
        graph, held, result = self._graphs[key]
        for place, value in zip(held, inputs, strict=True):
            place.copy_(value)
        graph.replay()
        return result[0].clone(), result[1].clone(), result[2].clone()


class FGSM(PGD):
    """One step of size eps from the clean input (Goodfellow et al. 2015): x + eps sign(grad L), clipped."""

    def __init__(self, model: Model, eps: Value = 8 / 255, **options: Any) -> None:
        largest = torch.as_tensor(eps, dtype=torch.float64)
        alpha = eps if bool((largest > 0).all()) else torch.where(largest > 0, largest, 1.0)
        super().__init__(model, eps, alpha, 1, **{"random_start": False, **options})


class MIFGSM(PGD):
    """Momentum iterative FGSM (Dong et al. 2018): g <- decay g + grad / mean |grad|, x <- x + alpha sign(g)."""

    def __init__(
        self,
        model: Model,
        eps: Value = 8 / 255,
        alpha: Value = 2 / 255,
        steps: int = 10,
        decay: float = 1.0,
        **options: Any,
    ) -> None:
        super().__init__(model, eps, alpha, steps, **{"random_start": False, "momentum": decay, **options})


class CW(PGD):
    """PGD on Carlini and Wagner's margin, -max(0, z_y - max_{j != y} z_j + kappa): the CW-20 and CW-100 of tables.

    Its gradient stops where the margin passes kappa; for logits that are scaled up (CLIP's) use loss="margin".
    """

    def __init__(
        self,
        model: Model,
        eps: Value = 8 / 255,
        alpha: Value = 2 / 255,
        steps: int = 20,
        kappa: float = 50.0,
        **options: Any,
    ) -> None:
        def loss(logits: Tensor, labels: Tensor) -> Tensor:
            return losses.cw(logits, labels, kappa)

        super().__init__(model, eps, alpha, steps, **{"loss": "cw", **options})
        if options.get("loss", "cw") == "cw":
            self.loss = loss
