"""Projected gradient attacks.

PGD (Madry et al. 2018), FGSM (Goodfellow et al. 2015), MI-FGSM (Dong et al. 2018), PGD on Carlini and Wagner's margin:

    x <- clip(P(x + alpha sign(grad L(f(x), y))))     L-inf; L2 with grad / |grad|

P projects into the ball of radius eps around the clean input, clip into the box. The update is one pass over memory
(ops.pgd_step_); the time is the model's.
"""

import threading
from dataclasses import replace
from functools import partial
from typing import Any, Literal, Unpack

import torch
from torch import Tensor

from cmr_fast.attacks import losses
from cmr_fast.attacks.base import Attack, Options, Progress
from cmr_fast.attacks.habits import TargetMap
from cmr_fast.attacks.problem import Call, Problem
from cmr_fast.attacks.settings import flag, numbers, quarter, real, whole
from cmr_fast.attacks.victim import Model, Victim
from cmr_fast.errors import InputError
from cmr_fast.ops.pgd import Value, as_values, pgd_noise, row_sums

Targeted = Literal[False, "label", "random"]
TARGET_STREAM = 1 << 32
_REPLAYING = threading.Lock()  # a graph has one set of inputs


class PGDOptions(Options, total=False):
    """The keywords that PGD's kin take besides."""

    targeted: Targeted
    random_start: bool
    restarts: int
    momentum: float | None
    early_stop: bool
    graph: bool


class PGD(Attack):
    """Projected gradient ascent on a loss: `adv = PGD(model, eps=8/255, alpha=2/255, steps=10)(x, y)`.

    Parameters
    ----------
    model
        A torch module (put in evaluation mode, parameters frozen, and back again) or any callable.
    eps, alpha
        Radius and step in the units of x: a number, (B,), (1, C) or (B, C). alpha=None is eps / 4.
    steps
        Gradients taken.
    targeted
        "label": y is the class to reach; "random": a uniformly random class other than y is (Madry's random-targeted
        attack). The loss is then lowered.
    random_start
        Uniform in the ball; torchattacks' rule in L2.
    restarts
        This many starts at once, as one batch; what fools the model is kept, else the highest loss.
    momentum
        None, or MI-FGSM's mu: g <- mu g + grad / mean |grad|, and the step is along g.
    early_stop
        A sample (with its other restarts) leaves the batch once what would be returned for it fools the model.
    graph
        On CUDA, capture the whole loop in one graph and replay it for inputs of the same shape.
    norm
        "linf", or "l2", where the gradient is divided by its length.
    loss
        "ce", "cw", "margin", "dlr", or a callable (outputs, y) -> (B,); their sum is differentiated, so a sample's step
        does not depend on its batch. Outputs are float32 even where the model's are 16 bits.
    success
        (outputs, y) -> bool (B,), for early_stop and restarts with a loss of one's own.
    bounds
        Of x: (low, high), a number or a value a channel (1, C) each.
    normalize
        (mean, std), applied inside the gradient.
    strict
        |adv - x| <= eps holds in exact arithmetic. False leaves float32 L-inf results at the rounded edge fl(x +- eps),
        bit for bit torchattacks'; other norms and types are always exact.
    dtype
        torch.bfloat16 runs the model under autocast; x, losses and steps stay float32, and whether a sample fools the
        model is decided without autocast.
    channels_last
        Run a copy of the convolutions' weights in that layout.
    fold
        Merge batch normalisation into the convolutions of a copy (torch.fx); rounds differently.
    seed, generator
        Of the random start; see `__call__` for how a sample's noise is found.
    check
        A probe at the first call refuses models that are random or mix the samples of a batch.
    progress
        None shows a bar on a terminal after a few seconds, True at once, False never.

    Raises
    ------
    InputError
        For settings out of their range; of a call, see `__call__`. eps = 0 returns x.

    Notes
    -----
    Madry et al. 2018, "Towards deep learning models resistant to adversarial attacks", section 2.1.
    """

    supported_mode: tuple[str, ...] = ("default", "targeted")

    def __init__(
        self,
        model: Model,
        eps: Value = 8 / 255,
        alpha: Value | None = 2 / 255,
        steps: int = 10,
        random_start: bool = True,
        *,
        targeted: Targeted = False,
        restarts: int = 1,
        momentum: float | None = None,
        early_stop: bool = False,
        graph: bool = False,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(model, eps=eps, **options)
        alpha = numbers("alpha", quarter(self.eps) if alpha is None else alpha, 0.0, above=True)
        random_start, early_stop = flag("random_start", random_start), flag("early_stop", early_stop)
        steps, restarts = whole("steps", steps, 0), whole("restarts", restarts, 1)
        if momentum is not None:
            momentum = real("momentum", momentum, 0.0, 1e30)
        if restarts > 1 and not random_start:
            raise InputError(f"{restarts} restarts without a random start would be one and the same run")
        if early_stop and self.success is None:
            raise InputError("early_stop needs to know what success is: pass success=(outputs, y) -> bool (B,)")
        if flag("graph", graph) and early_stop:
            raise InputError("graph=True replays a fixed loop, early_stop changes it: choose one")
        if graph and (self.victim.channels_last or self.victim.fold):
            raise InputError("graph=True reads the model's own weights, channels_last and fold copies: choose one")
        self.alpha, self.steps, self.random_start = alpha, steps, random_start
        self.restarts, self.momentum, self.early_stop, self.graph = restarts, momentum, early_stop, graph
        self.targeted: Targeted | int | TargetMap = False
        self._graphs: dict[Any, Any] = {}
        if not isinstance(targeted, (bool, str)) or targeted not in (False, "label", "random"):
            raise InputError(f"targeted must be False, 'label' or 'random', got {targeted!r}")
        if targeted:
            self._set_mode(f"targeted({targeted})", targeted)

    def _set_mode(self, mode: str, targeted: Any) -> None:
        if targeted and not self.classifier:
            raise InputError("targeted needs a named loss; write a loss of your own so that higher is what you want")
        super()._set_mode(mode, targeted)
        self.targeted = targeted

    def _call(self, victim: Victim) -> Call:
        call = super()._call(victim)
        if self.targeted == "label":
            call.success = _reached
        return call

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
        targets = self._targets(problem)
        if self.graph and self.steps:
            result, history, broken = self._replay(problem, x, targets, alpha)
        else:
            result, history, broken = self._ascend(problem, x, targets, alpha, count)
        self._refuse_broken(broken, count)
        if restarts == 1:
            return result, history
        return self._best(problem, result, targets, history, count)

    def _objective(self, call: Call) -> losses.Loss:
        """What the steps raise: the call's loss, or, where a class is to be reached, less of it."""

        def objective(outputs: Tensor, targets: Tensor) -> Tensor:
            call.check_classes(outputs, targets)
            loss = call.loss(outputs, targets)
            return -loss if self.targeted else loss

        return objective

    def _along(self, gradient: Tensor, velocity: Tensor | None) -> Tensor:
        """What the step goes along: the gradient, or MI-FGSM's velocity, which is updated."""
        if velocity is None or self.momentum is None:
            return gradient
        mean = (row_sums(gradient.abs()) / gradient[0].numel()).to(gradient.dtype)
        return velocity.mul_(self.momentum).add_(torch.where(mean == 0, gradient, gradient / mean))

    def _ascend(
        self, problem: Problem, x: Tensor, targets: Tensor, alpha: Tensor, count: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Perturbed rows, losses before each step (steps, rows), and the step at which a row's gradient broke, or -1.

        With early_stop, `rows` are those still in the batch: row r is restart r // count of sample r % count.
        """
        total, device = len(x), x.device
        result, rows = x, torch.arange(total, device=device)
        objective = self._objective(problem.call)
        history = x.new_zeros((self.steps, total))
        broken = torch.full((total,), -1, dtype=torch.int32, device=device)
        flags, velocity = broken.clone(), torch.zeros_like(x) if self.momentum is not None else None
        if self.early_stop:
            result = x.clone()
        with Progress(self.progress, self.steps, type(self).__name__) as progress:
            for step in range(self.steps):
                outputs, values, gradient = problem.call.victim.gradient(x, objective, targets)
                if self.early_stop:
                    history[step:, rows] = values.to(history.dtype)
                    fooled = problem.fooled(outputs, x) & ~values.isnan()
                    if bool(fooled.any()):
                        result[rows] = x
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
                problem.step(x, self._along(gradient, velocity), alpha, flags, step)
                progress.step()
        if self.early_stop:
            result[rows] = x
            broken[rows] = flags
            return result, history, broken
        return x, history, flags

    def _targets(self, problem: Problem) -> Tensor:
        """The classes to reach; untargeted, and where y says which, the labels themselves."""
        if self.targeted in (False, "label"):
            return problem.labels
        if callable(self.targeted):
            targets = self.targeted(problem.origin, problem.labels)
            shape = problem.labels.shape
            if not isinstance(targets, Tensor) or targets.shape != shape or targets.is_floating_point():
                seen = targets if not isinstance(targets, Tensor) else f"{targets.dtype} {tuple(targets.shape)}"
                raise InputError(f"the target function must return int {tuple(shape)}, got {seen}")
            return targets.to(problem.labels)
        least = self.targeted != "random"
        scores = problem.call.victim.scores(problem.origin if least else problem.origin[:1])
        problem.call.check_classes(scores, problem.labels)
        classes = scores.shape[-1]
        if classes < 2:
            raise InputError(f"a random target needs 2 classes, the model has {classes}")
        if least:
            if int(self.targeted) >= classes:
                raise InputError(f"kth_min must be below the {classes} classes of the model, got {self.targeted}")
            others = scores.scatter(1, problem.labels[:, None], torch.inf)
            return others.argsort(dim=1, stable=True)[:, int(self.targeted) - 1]
        # (y + 1 + r) mod K with r uniform below K - 1; a restart is another draw for the same sample
        restart = torch.arange(self.restarts, device=problem.index.device).repeat_interleave(
            len(problem.index) // self.restarts
        )
        noise = pgd_noise(problem.index, self.restarts, seed=(self.seed + TARGET_STREAM) % 2**64)
        u = (noise.double().gather(1, restart[:, None])[:, 0] + 1) / 2
        return (problem.labels + 1 + (u * (classes - 1)).long()) % classes

    def _best(
        self, problem: Problem, result: Tensor, targets: Tensor, history: Tensor, count: int
    ) -> tuple[Tensor, Tensor]:
        """Of every sample's restarts the one that fools the model, else that of the highest loss."""
        call = problem.call
        outputs = call.victim.scores(problem.returned(result))
        values = self._objective(call)(outputs, targets).reshape(self.restarts, count)
        mask = call.judge(outputs, problem.labels)
        if mask is not None:
            fooled = mask.reshape(self.restarts, count)
            values = torch.where(fooled | ~fooled.any(dim=0), values, -torch.inf)
        kept = values.argmax(dim=0) * count + torch.arange(count, device=result.device)
        return result[kept], history[:, kept]

    def _replay(self, problem: Problem, x: Tensor, targets: Tensor, alpha: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The loop as one CUDA graph, captured at the first call of a shape. Weights are read where they lie."""
        victim = problem.call.victim
        if victim.copied:
            raise InputError("graph=True reads the model's own weights, and these were made under inference_mode")
        inputs = [problem.origin, problem.labels, problem.eps, problem.low, problem.high, x, targets, alpha]
        normalize = None if victim.normalize is None else tuple(tuple(v.flatten().tolist()) for v in victim.normalize)
        settings = self.attack_mode, self.norm, self.steps, self.momentum, self.loss, victim.training, normalize
        key = settings, tuple((tuple(t.shape), t.dtype, t.device) for t in inputs)
        problem.call.check_classes(victim.scores(problem.origin[:1]), targets)  # not in a graph: it waits
        with _REPLAYING:
            if key not in self._graphs:
                # the call is kept too: a graph reads its tensors where they lie
                self._graphs[key] = *self._captured(problem, [t.clone() for t in inputs]), problem.call
            graph, held, result, _ = self._graphs[key]
            for place, value in zip(held, inputs, strict=True):
                place.copy_(value)
            graph.replay()
            victim.queries += self.steps * len(x)
            return result[0].clone(), result[1].clone(), result[2].clone()

    def _captured(self, problem: Problem, held: list[Tensor]) -> tuple[Any, list[Tensor], tuple[Tensor, ...]]:
        """A graph of the loop over `held`, and its outputs."""
        call = problem.call
        queries = call.victim.queries
        fixed = replace(problem, origin=held[0], labels=held[1], eps=held[2], low=held[3], high=held[4])
        objective = self._objective(call)

        def loop() -> tuple[Tensor, Tensor, Tensor]:
            moving, history = held[5].clone(), []
            flags = torch.full((len(moving),), -1, dtype=torch.int32, device=moving.device)
            velocity = torch.zeros_like(moving) if self.momentum is not None else None
            for step in range(self.steps):
                _, values, gradient = call.victim.gradient(moving, objective, held[6])
                history.append(values)
                fixed.step(moving, self._along(gradient, velocity), held[7], flags, step)
            return moving, torch.stack(history), flags

        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            loop()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = loop()
        call.victim.queries = queries
        return graph, held, result


def _reached(logits: Tensor, labels: Tensor) -> Tensor:
    return logits.argmax(dim=1) == labels


class FGSM(PGD):
    """One step of size eps from the clean input: x + eps sign(grad L), clipped.

    Parameters
    ----------
    model, eps, options
        As of PGD.

    Notes
    -----
    Goodfellow et al. 2015, "Explaining and harnessing adversarial examples", section 4.
    """

    def __init__(self, model: Model, eps: Value = 8 / 255, **options: Unpack[PGDOptions]) -> None:
        eps = numbers("eps", eps, 0.0)
        radii = torch.as_tensor(eps, dtype=torch.float64)
        alpha = eps if bool((radii > 0).all()) else torch.where(radii > 0, radii, 1.0)
        options.setdefault("random_start", False)
        super().__init__(model, eps, alpha, 1, **options)


class MIFGSM(PGD):
    """Momentum iterative FGSM: g <- decay g + grad / mean |grad|, x <- x + alpha sign(g).

    Parameters
    ----------
    model, eps, alpha, steps, options
        As of PGD.
    decay
        The momentum mu.

    Notes
    -----
    Dong et al. 2018, "Boosting adversarial attacks with momentum", Algorithm 1.
    """

    def __init__(
        self,
        model: Model,
        eps: Value = 8 / 255,
        alpha: Value | None = 2 / 255,
        steps: int = 10,
        decay: float = 1.0,
        **options: Unpack[PGDOptions],
    ) -> None:
        options.setdefault("random_start", False)
        options.setdefault("momentum", real("decay", decay, 0.0, 1e30))
        super().__init__(model, eps, alpha, steps, **options)


class CW(PGD):
    """PGD on Carlini and Wagner's margin, -max(0, z_y - max_{j != y} z_j + kappa): the CW-20 and CW-100 of tables.

    Parameters
    ----------
    model, eps, alpha, steps, options
        As of PGD.
    kappa
        Where the margin passes it, the gradient stops; for logits that are scaled up (CLIP's) use loss="margin".

    Notes
    -----
    Carlini and Wagner 2017, "Towards evaluating the robustness of neural networks", f6 of section V.A, by PGD.
    """

    def __init__(
        self,
        model: Model,
        eps: Value = 8 / 255,
        alpha: Value | None = 2 / 255,
        steps: int = 20,
        kappa: float = 50.0,
        **options: Unpack[PGDOptions],
    ) -> None:
        kappa = real("kappa", kappa, 0.0, float("inf"))
        options.setdefault("loss", "cw")
        super().__init__(model, eps, alpha, steps, **options)
        self.kappa = kappa
        if options["loss"] == "cw":
            self.loss = partial(losses.cw, kappa=kappa)
