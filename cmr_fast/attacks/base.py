"""What every attack shares: the ball and the box, the checks, who is fooled, what is returned.

Inputs are in `bounds`, eps in the same units. What the model itself wants (`normalize`) happens inside the gradient.
"""

import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Literal, TypedDict, TypeVar, overload

import numpy as np
import torch
from torch import Tensor

from cmr_fast import _terminal
from cmr_fast.attacks import losses
from cmr_fast.attacks.habits import Habits
from cmr_fast.attacks.problem import INSIDE, Call, Problem, Success, refuse_outside
from cmr_fast.attacks.settings import flag, numbers, whole
from cmr_fast.attacks.victim import Model, Victim, widened
from cmr_fast.errors import InputError
from cmr_fast.ops._tensors import check_float
from cmr_fast.ops.pgd import NORMS, Norm, Value, as_values, row_norms

Array = TypeVar("Array", np.ndarray, Tensor)
Labels = Any  # numpy array, torch tensor or list; with a loss of one's own whatever it takes
SLOW = 5.0  # seconds until an attack that was not asked to shows its progress
_COUNTING = threading.Lock()
_BAR = threading.Lock()  # rich draws one at a time


class Options(TypedDict, total=False):
    """The keywords that every attack takes; see PGD for what they mean."""

    norm: Norm
    loss: str | losses.Loss
    success: Success | None
    bounds: tuple[Value, Value]
    normalize: tuple[Value, Value] | None
    strict: bool
    dtype: torch.dtype | None
    channels_last: bool
    fold: bool
    seed: int
    generator: torch.Generator | None
    check: bool
    progress: bool | None


@dataclass(frozen=True)
class AttackInfo:
    """What return_info=True adds, about the samples returned; one row a sample.

    Attributes
    ----------
    success
        bool (B,): who fools the model, or None where that is not defined (a loss of one's own without `success`).
    loss
        float (B,).
    delta_norm
        float64 (B,), the size of the perturbation in the attack's norm, in the units of x.
    losses
        (steps, B) before each step, of the restart that was kept; a sample that has stopped keeps its last.
    queries
        How many samples went through the model.
    """

    success: Tensor | None
    loss: Tensor
    delta_norm: Tensor
    losses: Tensor
    queries: int

    def __repr__(self) -> str:
        """In one line."""
        fooled = "" if self.success is None else f"{int(self.success.sum())} of {len(self.success)} fooled, "
        size = f"delta up to {float(self.delta_norm.max()):.4g}, " if len(self.delta_norm) else ""
        steps = len(self.losses) if self.losses.ndim else 0
        return f"AttackInfo({fooled}{size}{steps} steps, {self.queries} samples through the model)"


class Attack(Habits):
    """Calling habits, checks and bookkeeping; a subclass says how x moves in `_perturb`.

    One object serves several threads at once: nothing of a call is kept in it but how many samples it has seen, which
    numbers the noise of calls without `index`.
    """

    steps: int

    def __init__(
        self,
        model: Model,
        *,
        eps: Value,
        norm: Norm = "linf",
        loss: str | losses.Loss = "ce",
        success: Success | None = None,
        bounds: tuple[Value, Value] = (0.0, 1.0),
        normalize: tuple[Value, Value] | None = None,
        strict: bool = False,
        dtype: torch.dtype | None = None,
        channels_last: bool = False,
        fold: bool = False,
        seed: int = 0,
        generator: torch.Generator | None = None,
        check: bool = True,
        progress: bool | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(norm, str) or norm not in NORMS:
            raise InputError(f"norm must be one of {', '.join(NORMS)}, got {norm!r}")
        if generator is not None:
            if not isinstance(generator, torch.Generator):
                raise InputError(
                    f"generator must be a torch.Generator, got {type(generator).__name__}: seed= is a number"
                )
            seed = int(torch.randint(2**63 - 1, (), generator=generator, device=generator.device))
        eps = numbers("eps", eps, 0.0)
        if not isinstance(bounds, (tuple, list)) or len(bounds) != 2:
            raise InputError(f"bounds must be (low, high), got {bounds!r}")
        low, high = (numbers("bounds", value) for value in bounds)
        if success is not None and not callable(success):
            raise InputError(f"success must be a function (outputs, y) -> bool (B,), got {type(success).__name__}")
        self.victim = Victim(model, normalize, dtype, flag("channels_last", channels_last), flag("fold", fold))
        self.eps, self.norm, self.bounds, self.strict = eps, norm, (low, high), flag("strict", strict)
        self.loss, self.classifier = losses.find(loss), isinstance(loss, str)
        self.success = success or (misclassified if self.classifier else None)
        self.seed, self.check = whole("seed", seed, 0, 2**64 - 1), flag("check", check)
        self.progress = None if progress is None else flag("progress", progress)
        self.seen = 0  # samples attacked so far: the next one's number, for its noise

    @property
    def model(self) -> Model:
        """The model that is attacked."""
        return self.victim.model

    @overload
    def __call__(
        self, x: Array, y: Labels, *, index: object = None, start: object = None, return_info: Literal[False] = False
    ) -> Array: ...

    @overload
    def __call__(
        self, x: Array, y: Labels, *, index: object = None, start: object = None, return_info: Literal[True]
    ) -> tuple[Array, AttackInfo]: ...

    @overload
    def __call__(
        self, x: Array, y: Labels, *, index: object = None, start: object = None, return_info: bool
    ) -> Array | tuple[Array, AttackInfo]: ...

    def __call__(
        self, x: Any, y: Labels, *, index: object = None, start: object = None, return_info: bool = False
    ) -> Any:
        """Adversarial samples for x, of x's kind, type and shape.

        Parameters
        ----------
        x
            Floats (B, ...) in `bounds`, numpy or torch.
        y
            int (B,) class labels; with a loss of one's own whatever it takes, one row a sample.
        index
            int64 (B,) numbers that the noise depends on, besides the seed. By default samples are counted over the
            calls, so a data set gets the same noise whatever the batch size, and every epoch another.
        start
            Where to begin instead of the random start: like x, in the box and the ball.
        return_info
            Return an AttackInfo beside them.

        Returns
        -------
        adv
            Like x; with return_info (adv, AttackInfo).

        Raises
        ------
        InputError
            For inputs outside the bounds, labels that the model has no class for, models that are random or mix the
            samples of a batch, and gradients that are not finite, naming sample and step.
        """
        with torch.inference_mode(False):  # in it tensors are made that autograd refuses
            images, labels, was_numpy = self.checked(x, y)
            images, labels = self._to_pixels(images.detach()), labels.detach().clone()
            with self.victim.prepare(images) as victim:
                problem = self._problem(victim, images, labels, index)
                begin = None if start is None else self._checked_start(start, problem)
                still = len(images) == 0 or not bool((problem.eps > 0).any())
                if not still or return_info:
                    if self.check and len(images):
                        victim.probe(problem.origin, problem.low[:1], problem.high[:1])
                        self.check = False
                    self._set_out(problem)
                if still:
                    result, history = problem.origin.clone(), problem.origin.new_empty((0, len(images)))
                else:
                    result, history = self._perturb(problem, begin)
                out = problem.returned(result)
                info = self._describe(out, problem, history) if return_info else None
            out = self._from_pixels(out)
            adv = out.cpu().numpy() if was_numpy else out
        return (adv, info) if return_info else adv

    def judged(self, x: Any, y: Labels) -> tuple[Tensor | None, Tensor]:
        """Who of x, as they are, fools this attack's model.

        Parameters
        ----------
        x, y
            As of a call.

        Returns
        -------
        success, loss
            bool (B,), or None where success is not defined, and float (B,).
        """
        images, labels, _ = self.checked(x, y)
        with self.victim.prepare(images) as victim:
            call = self._call(victim)
            scores, labels = victim.scores(self._to_pixels(images)), labels.clone()
            call.check_classes(scores, labels)
            return call.judge(scores, labels), call.values(scores, labels)

    def checked(self, x: Any, y: Labels) -> tuple[Tensor, Tensor, bool]:
        """The arguments of a call, checked.

        Parameters
        ----------
        x, y
            As of a call.

        Returns
        -------
        images, labels, was_numpy
            Float tensor (B, ...), a tensor with a row a sample on its device, and whether x was numpy's.

        Raises
        ------
        InputError
            For what is no floats, and labels that are not one a sample.
        """
        images, was_numpy = self.images(x)
        try:
            labels = torch.as_tensor(y).to(images.device)
        except (RuntimeError, TypeError, ValueError) as error:
            raise InputError(f"y must be a row of labels a sample, got {type(y).__name__}") from error
        if labels.shape[:1] != images.shape[:1]:
            raise InputError(f"y must have a row for each of {len(images)} samples, got shape {tuple(labels.shape)}")
        if self.classifier:
            if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool or labels.ndim != 1:
                raise InputError(
                    f"y must be int ({len(images)},) class labels, got {labels.dtype} {tuple(labels.shape)}"
                )
            labels = labels.long()
        return images, labels, was_numpy

    def images(self, x: Any) -> tuple[Tensor, bool]:
        """The samples of a call, checked.

        Parameters
        ----------
        x
            As of a call.

        Returns
        -------
        images, was_numpy
            Float tensor (B, ...) on the attack's device, and whether x was numpy's.

        Raises
        ------
        InputError
            For what is no floats.
        """
        was_numpy = isinstance(x, np.ndarray)
        try:
            images = torch.from_numpy(x if x.flags.writeable else x.copy()) if was_numpy else x
        except (TypeError, ValueError) as error:
            raise InputError(f"x must be floats (B, ...), got dtype {x.dtype}") from error
        if not isinstance(images, Tensor) or not images.is_floating_point() or images.ndim < 2:
            seen = f"{images.dtype} {tuple(images.shape)}" if isinstance(images, Tensor) else type(x).__name__
            pixels = isinstance(images, Tensor) and images.dtype == torch.uint8
            raise InputError(f"x must be floats (B, ...), got {seen}{': divide pixels by 255' if pixels else ''}")
        check_float(images, "x")
        if images.layout != torch.strided or images.is_meta:
            raise InputError(f"x must be a dense tensor with values, got {images.layout} on {images.device}")
        return images if self.device is None else images.to(self.device), was_numpy

    def _call(self, victim: Victim) -> Call:
        """What a call goes by; a subclass with a loss of its own says so here."""
        return Call(victim, self.loss, self.success, self.classifier)

    def _set_out(self, problem: Problem) -> None:
        """What a subclass asks the model about the clean samples, before anything moves."""

    def _problem(self, victim: Victim, images: Tensor, labels: Tensor, index: object) -> Problem:
        numbers = self._numbers(images, index)
        wide = widened(images).clone(memory_format=torch.contiguous_format)
        low, high = (as_values(v, wide, "bounds") for v in self.bounds)
        self._check_ball(low, high)
        eps = as_values(self.eps, wide, "eps")
        if self.norm == "l2" and eps.shape[1] > 1:
            raise InputError("an L2 ball has one radius a sample, got an eps for every channel")
        exact = torch.as_tensor(self.eps, dtype=torch.float64)
        exact = exact.reshape(-1, 1) if exact.ndim < 2 else exact
        if self.norm == "l2":  # the steps keep so far inside that what they find is returned as it is
            eps = as_values(exact * (1 - INSIDE), wide, "eps")
        problem = Problem(
            self._call(victim), wide, labels, numbers, eps, low, high, self.norm, self.strict, images.dtype, exact
        )
        refuse_outside(problem)
        return problem

    def _numbers(self, images: Tensor, index: object) -> Tensor:
        if index is None:
            with _COUNTING:
                first, self.seen = self.seen, self.seen + len(images)
            return torch.arange(first, first + len(images), device=images.device)
        try:
            numbers = torch.as_tensor(index, device=images.device)
        except (RuntimeError, TypeError, ValueError) as error:
            raise InputError(f"index must be integers ({len(images)},), got {type(index).__name__}") from error
        if numbers.shape != images.shape[:1]:
            raise InputError(f"index must be ({len(images)},), got {tuple(numbers.shape)}")
        if (numbers.is_floating_point() or numbers.is_complex() or numbers.dtype == torch.bool) and len(numbers):
            raise InputError(f"index must be integers, got {numbers.dtype}")
        with _COUNTING:
            self.seen += len(images)
        return numbers.long().clone()

    def _check_ball(self, low: Tensor, high: Tensor) -> None:
        """The bounds' order, and an L-inf radius that forgot its / 255."""
        if not bool((low < high).all()):
            raise InputError(f"bounds must be (low, high) with low below high, got {self.bounds}")
        eps, width = float(torch.as_tensor(self.eps, dtype=torch.float64).max()), float((high - low).max())
        if self.norm == "linf" and eps > width * (1 + 1e-6):
            raise InputError(
                f"eps must be at most {width:g}, the width of the bounds, got {eps:g}: is a / 255 missing?"
            )

    def _perturb(self, problem: Problem, start: Tensor | None) -> tuple[Tensor, Tensor]:
        """Perturbed samples (B, ...), and the losses before each step (steps, B)."""
        raise NotImplementedError

    def _refuse_broken(self, broken: Tensor, count: int) -> None:
        """Row r is restart r // count of sample r % count."""
        if bool((broken >= 0).any()):
            row = int((broken >= 0).nonzero()[0])
            raise InputError(
                f"the gradient of sample {row % count} is not finite at step {int(broken[row])} of {self.steps}"
                f"{f' (restart {row // count})' if len(broken) > count else ''}: look for a log, a division or a "
                "square root at zero, or an overflow in 16 bits, in the model or the loss"
            )

    def _describe(self, out: Tensor, problem: Problem, history: Tensor) -> AttackInfo:
        call, labels = problem.call, problem.labels
        scores = call.victim.scores(out)
        call.check_classes(scores, labels)
        loss = call.values(scores, labels)
        delta = (out.double() - problem.origin.double()).flatten(1)
        norm = delta.abs().amax(dim=1) if self.norm == "linf" else row_norms(delta)[:, 0]
        return AttackInfo(call.judge(scores, labels), loss, norm, history, call.victim.queries)

    def _checked_start(self, start: object, problem: Problem) -> Tensor:
        try:
            begin = torch.as_tensor(start).to(problem.origin)
        except (RuntimeError, TypeError, ValueError) as error:
            raise InputError(f"start must be like x, got {type(start).__name__}") from error
        if begin.shape != problem.origin.shape:
            raise InputError(f"start must be like x {tuple(problem.origin.shape)}, got {tuple(begin.shape)}")
        if not bool(begin.isfinite().all()):
            raise InputError("start must be finite")
        return self._to_pixels(begin).clone(memory_format=torch.contiguous_format)

    def _random_start(self, problem: Problem, stream: int) -> Tensor:
        """Uniform in the cube; for L2 a uniform direction and a uniform radius, as torchattacks has it. Clipped."""
        origin, eps = problem.origin, problem.spread(problem.eps)
        if self.norm == "linf":
            delta = eps * problem.noise(self.seed, stream, origin[0].numel()).reshape(origin.shape)
        else:
            direction, radius = problem.directions(self.seed, stream)
            delta = eps * (direction * radius).to(origin.dtype)
        return problem.boxed(origin + delta)


def misclassified(logits: Tensor, labels: Tensor) -> Tensor:
    """Whether the likeliest class is another one than the label.

    Parameters
    ----------
    logits, labels
        Float (B, classes) and int (B,).

    Returns
    -------
    Tensor
        bool (B,).
    """
    return logits.argmax(dim=1) != labels


class Progress:
    """A bar over the steps of an attack: shown when asked for, or once it has taken longer than SLOW seconds."""

    def __init__(self, asked: bool | None, total: int, what: str) -> None:
        self.asked, self.total, self.what = asked, total, what
        self.stack, self.began, self.done = ExitStack(), time.monotonic(), 0
        self.advance: Callable[[int], object] | None = None

    def __enter__(self) -> "Progress":
        return self

    def step(self) -> None:
        """One step more is done."""
        self.done += 1
        if self.asked is False:
            return
        slow = self.asked or time.monotonic() - self.began > SLOW
        if self.advance is None and slow and _BAR.acquire(blocking=False):
            self.stack.callback(_BAR.release)
            self.advance = self._shown()
            self.advance(self.done - 1)
        if self.advance is not None:
            self.advance(1)

    def _shown(self) -> Callable[[int], object]:
        try:
            return self.stack.enter_context(_terminal.counting(self.total, self.what))
        except ModuleNotFoundError:  # rich comes with the extra `train`
            return lambda more: None

    def __exit__(self, *error: object) -> None:
        self.stack.close()
