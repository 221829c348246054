"""What every attack shares: the ball and the box, the checks, who is fooled, what is returned.

Inputs are in `bounds`, eps in the same units. What the model itself wants (`normalize`) happens inside the gradient.
"""

import operator
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypedDict, TypeVar, overload

import numpy as np
import torch
from torch import Tensor

from cmr_fast import _terminal
from cmr_fast.attacks import losses
from cmr_fast.attacks.habits import Habits
from cmr_fast.attacks.victim import Model, Victim, widened
from cmr_fast.errors import InputError
from cmr_fast.ops.pgd import NORMS, Norm, Value, as_values, pgd_noise, row_norms

Array = TypeVar("Array", np.ndarray, Tensor)
Labels = Any  # numpy array, torch tensor or list; with a loss of one's own whatever it takes
Success = Callable[[Tensor, Tensor], Tensor]
SLOW = 5.0  # seconds until an attack that was not asked to shows its progress
STREAM = 0x9E3779B97F4A7C15  # seeds of restarts and of other kinds of noise are this far apart
INSIDE = 2.0**-19  # of eps: L2 norms are at most eps in float32 arithmetic too
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


@dataclass
class Call:
    """What one call of an attack goes by: the victim while it is attacked, and what is raised and counted."""

    victim: Victim
    loss: losses.Loss
    success: Success | None
    classifier: bool
    checked: bool = False

    def check_classes(self, outputs: Tensor, labels: Tensor) -> None:
        """The labels against the model's classes, once a call."""
        if not self.classifier or self.checked:
            return
        self.checked = True
        if outputs.ndim != 2 or outputs.shape[1] < 2:
            raise InputError(
                f"a named loss needs logits (B, classes) of two classes or more, got {tuple(outputs.shape)}"
            )
        if len(labels) and (int(labels.min()) < 0 or int(labels.max()) >= outputs.shape[1]):
            bad = int(((labels < 0) | (labels >= outputs.shape[1])).nonzero()[0])
            raise InputError(f"y must be labels from 0 to {outputs.shape[1] - 1}, sample {bad} has {int(labels[bad])}")


@dataclass
class Problem:
    """One call's samples: float32 (or float64), contiguous, with the ball and the box as (1 or B, 1 or C) tensors."""

    call: Call
    origin: Tensor
    labels: Tensor
    index: Tensor
    eps: Tensor
    low: Tensor
    high: Tensor
    norm: Norm = "linf"
    strict: bool = False
    dtype: torch.dtype | None = None  # that results are returned in; None: origin's
    exact_eps: Tensor = field(default_factory=lambda: torch.zeros((1, 1), dtype=torch.float64))  # as the user gave it

    def rows(self, chosen: Tensor) -> "Problem":
        """The same of the samples chosen, by number or by mask."""
        names = ("eps", "low", "high", "exact_eps")
        values = {name: v[chosen] if len(v := getattr(self, name)) > 1 else v for name in names}
        return replace(self, origin=self.origin[chosen], labels=self.labels[chosen], index=self.index[chosen], **values)

    def spread(self, value: Tensor) -> Tensor:
        """(1 or B, 1 or C) so that it broadcasts over the samples."""
        if self.origin.ndim < 2:
            return value.reshape(-1, *[1] * (self.origin.ndim - 1))
        return value.reshape(*value.shape, *[1] * (self.origin.ndim - 2))

    def boxed(self, x: Tensor) -> Tensor:
        """x clipped to the bounds."""
        return torch.minimum(torch.maximum(x, self.spread(self.low)), self.spread(self.high))

    def step(self, x: Tensor, along: Tensor, size: Tensor, broken: Tensor, step: int) -> Tensor:
        """ops.pgd_step_ on x, its arguments checked once and for all; x itself."""
        torch.ops.cmr_fast.pgd_step_(
            x, along, self.origin, size, self.eps, self.low, self.high, broken, step, self.norm == "l2", None, None
        )
        return x

    @property
    def rounds(self) -> bool:
        """Whether what is returned is another point than the one that the attack has found."""
        return self.norm != "linf" or self.strict or self.dtype not in (None, self.origin.dtype)

    def returned(self, x: Tensor) -> Tensor:
        """x as it is returned: in the caller's type, and still in the ball and the box.

        A float32 L-inf result in the cube [fl(x - eps), fl(x + eps)] is left as it is, bit for bit what other libraries
        give, unless `strict`: the rounded edge can lie half a unit in the last place outside. Everything else (L2,
        16-bit types) is rounded towards the origin, so that |x - origin| <= eps holds exactly.
        """
        if not self.rounds:
            return x
        dtype = self.dtype or x.dtype
        origin = self.origin.double()
        eps = self.spread(self.exact_eps.to(x.device))
        delta = x.double() - origin
        if self.norm == "linf":
            delta = torch.minimum(torch.maximum(delta, -eps), eps)
        else:
            length = row_norms(delta)
            most = eps * (1 - INSIDE / 2)
            delta = delta * torch.where(length > most, most / length, 1.0)
        low, high = self.spread(self.low).double(), self.spread(self.high).double()
        target = torch.minimum(torch.maximum(origin + delta, low), high)
        out, home = target.to(dtype), self.origin.to(dtype)
        for _ in range(2):  # rounding is off by one step at most, of the wider spacing
            over = (out.double() - origin).abs() > (target - origin).abs()
            out = torch.where(over, torch.nextafter(out, home), out)
        return out

    def fooled(self, outputs: Tensor, x: Tensor) -> Tensor:
        """Who fools the model, bool (B,), judged by what would be returned and by the model's own outputs."""
        success, victim = self.call.success, self.call.victim
        if success is None:
            return torch.zeros(len(x), dtype=torch.bool, device=x.device)
        mask = success(outputs, self.labels)
        if not (victim.approximate or self.rounds) or not bool(mask.any()):
            return mask
        rows = mask.nonzero()[:, 0]
        part = self.rows(rows)
        out = part.returned(x[rows])
        if not victim.approximate:  # the outputs are those of the points that rounding leaves as they are
            moved = (out != x[rows].to(out.dtype)).flatten(1).any(dim=1)
            rows, out = rows[moved], out[moved]
        if len(rows):
            mask = mask.clone()
            mask[rows] = success(victim.scores(out), self.labels[rows])
        return mask

    def noise(self, seed: int, stream: int, count: int) -> Tensor:
        """(B, count) in (-1, 1), a sample's by its number."""
        noise = pgd_noise(self.index, count, seed=(seed + stream * STREAM) % 2**64)
        return noise.to(self.origin.dtype)

    def directions(self, seed: int, stream: int) -> tuple[Tensor, Tensor]:
        """A random unit vector like origin for each sample, and a uniform number (B, 1, ...), both float64."""
        each = self.origin[0].numel()
        u = (self.noise(seed, stream, 2 * each + 1).double() + 1) / 2
        normal = (-2 * u[:, :each].log()).sqrt() * (2 * torch.pi * u[:, each : 2 * each]).cos()  # Box and Muller
        unit = normal / row_norms(normal).clamp(min=1e-30)
        return unit.reshape(self.origin.shape), u[:, -1].reshape(-1, *[1] * (self.origin.ndim - 1))


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
        if norm not in NORMS:
            raise InputError(f"norm must be one of {', '.join(NORMS)}, got {norm!r}")
        if generator is not None:
            if not isinstance(generator, torch.Generator):
                raise InputError(
                    f"generator must be a torch.Generator, got {type(generator).__name__}: seed= is a number"
                )
            seed = int(torch.randint(2**63 - 1, (), generator=generator, device=generator.device))
        seed = whole("seed", seed, 0)
        if seed >= 2**64:
            raise InputError(f"seed must be an integer from 0 to 2^64 - 1, got {seed!r}")
        check_values("eps", eps, least=0.0)
        if not isinstance(bounds, (tuple, list)) or len(bounds) != 2:
            raise InputError(f"bounds must be (low, high), got {bounds!r}")
        for value in bounds:
            check_values("bounds", value)
        if success is not None and not callable(success):
            raise InputError(f"success must be a function (outputs, y) -> bool (B,), got {type(success).__name__}")
        self.victim = Victim(model, normalize, dtype, channels_last, fold)
        self.eps, self.norm, self.bounds, self.strict = eps, norm, (bounds[0], bounds[1]), strict
        self.loss, self.classifier = losses.find(loss), isinstance(loss, str)
        self.success = success or (misclassified if self.classifier else None)
        self.seed, self.check, self.progress = seed, check, progress
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
            scores, labels = victim.scores(self._to_pixels(images.clone())), labels.clone()
            call.check_classes(scores, labels)
            return None if call.success is None else call.success(scores, labels), call.loss(scores, labels).detach()

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
        was_numpy = isinstance(x, np.ndarray)
        try:
            images = torch.from_numpy(x if x.flags.writeable else x.copy()) if was_numpy else x
        except (TypeError, ValueError) as error:
            raise InputError(f"x must be floats (B, ...), got dtype {x.dtype}") from error
        if not isinstance(images, Tensor) or not images.is_floating_point() or images.ndim < 2:
            seen = f"{images.dtype} {tuple(images.shape)}" if isinstance(images, Tensor) else type(x).__name__
            pixels = isinstance(images, Tensor) and images.dtype == torch.uint8
            raise InputError(f"x must be floats (B, ...), got {seen}{': divide pixels by 255' if pixels else ''}")
        if images.layout != torch.strided:
            raise InputError(f"x must be a dense tensor, got {images.layout}")
        if self.device is not None:
            images = images.to(self.device)
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
        _check_inputs(problem)
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
        eps, width = float(torch.as_tensor(self.eps).max()), float((high - low).max())
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
        loss = call.loss(scores, labels).detach()
        delta = (out.double() - problem.origin.double()).flatten(1)
        norm = delta.abs().amax(dim=1) if self.norm == "linf" else row_norms(delta)[:, 0]
        success = None if call.success is None else call.success(scores, labels)
        return AttackInfo(success, loss, norm, history, call.victim.queries)

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


def quarter(eps: Value) -> Value:
    """eps / 4, the step of alpha=None; where eps is 0 any step above it.

    Parameters
    ----------
    eps
        A number, or numbers of any shape.
    """
    if isinstance(eps, (int, float)):
        return eps / 4 or 1.0
    part = torch.as_tensor(eps) / 4
    return torch.where(part > 0, part, 1.0)


def whole(name: str, value: object, least: int) -> int:
    """An integer of `least` or more, of Python's or numpy's."""
    try:
        number = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        number = None
    if number is None or number < least:
        raise InputError(f"{name} must be an integer of {least} or more, got {value!r}")
    return number


def check_values(name: str, value: Value, least: float | None = None, above: bool = False) -> None:
    """Refuse what is no finite number or numbers, of `least` or more."""
    try:
        tensor = torch.as_tensor(value, dtype=torch.float64)
    except (RuntimeError, TypeError, ValueError) as error:
        raise InputError(f"{name} must be a number or numbers, got {value!r}") from error
    if not bool(tensor.isfinite().all()) or not tensor.numel():
        raise InputError(f"{name} must be finite{_limit(least, above)}, got {value}")
    if least is not None and not bool(((tensor > least) if above else (tensor >= least)).all()):
        raise InputError(f"{name} must be finite{_limit(least, above)}, got {value}")


def check_number(name: str, value: object, least: float, most: float, above: bool = False) -> None:
    """Refuse what is no real number from least to most."""
    real = isinstance(value, (int, float, np.number)) and not isinstance(value, bool)
    if not real or not (least < value <= most if above else least <= value <= most):  # type: ignore[operator]
        end = "" if most == float("inf") else f" and at most {most:g}"
        raise InputError(f"{name} must be a number{_limit(least, above)}{end}, got {value!r}")


def _limit(least: float | None, above: bool) -> str:
    return "" if least is None else f" and {'above' if above else 'at least'} {least:g}"


def _check_inputs(problem: Problem) -> None:
    wide = problem.origin
    if not len(wide):
        return
    if not bool(wide.isfinite().all()):
        bad = int((~wide.isfinite()).flatten(1).any(1).nonzero()[0])
        raise InputError(f"x must be finite, sample {bad} is not")
    low, high = problem.spread(problem.low), problem.spread(problem.high)
    beyond = torch.maximum(low - wide, wide - high)
    outside = beyond > 0
    if not bool(outside.any()):
        return
    least, most = float(wide.min()), float(wide.max())
    bounds = (float(problem.low.min()), float(problem.high.max()))
    share, width = float(outside.double().mean()), float((high - low).max())
    message = f"x must lie in bounds {bounds}, got values from {least:.8g} up to {most:.8g}"
    if float(beyond.max()) <= 0.01 * width or (share < 0.01 and float(beyond.max()) <= 0.3 * width):
        bad = int(outside.flatten(1).any(1).nonzero()[0])
        message += (
            f": {int(outside.sum())} of {wide.numel()} values lie outside, by at most {float(beyond.max()):.3g} (first "
            f"in sample {bad}), as resizing and rounding leave them; clip them first, x.clip({bounds[0]:g}, "
            f"{bounds[1]:g})"
        )
    elif bounds == (0.0, 1.0) and most > 4:
        message += ": these look like pixels from 0 to 255; divide by 255, or pass bounds=(0, 255) and eps in pixels"
    elif bounds == (0.0, 1.0):
        message += (
            ": these look normalised. Pass pixels from 0 to 1 and normalize=(mean, std), which happens inside "
            "the attack, or say which bounds and eps the normalised values have: (1, C), a value a channel"
        )
    raise InputError(message)


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
