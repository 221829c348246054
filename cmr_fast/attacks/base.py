"""What every attack shares: the model as a victim that comes back as it was, the ball and the box, the checks.

Inputs are in `bounds`, eps in the same units. What the model itself wants (`normalize`) happens inside the gradient.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cmr_fast import _terminal
from cmr_fast.attacks import losses
from cmr_fast.errors import InputError
from cmr_fast.ops.pgd import NORMS, Norm, Value, as_values, pgd_noise

Model = Callable[[Tensor], Tensor]
Array = Any  # numpy array or torch tensor
SLOW = 5.0  # seconds until an attack that was not asked to shows its progress
STREAM = 0x9E3779B97F4A7C15  # seeds of restarts and of other kinds of noise are this far apart


@dataclass(frozen=True)
class AttackInfo:
    """What return_info=True adds, about the samples returned; one row a sample.

    success       bool (B,), or None where it is not defined: a loss of one's own without `success`
    loss          (B,)
    delta_norm    (B,) in the attack's norm
    losses        (steps, B) before each step, of the restart that was kept; a sample that has stopped keeps its last
    queries       how many samples went through the model
    """

    success: Tensor | None
    loss: Tensor
    delta_norm: Tensor
    losses: Tensor
    queries: int


class Victim:
    """A model under attack: evaluation mode, parameters frozen, nothing left behind."""

    def __init__(
        self,
        model: Model,
        normalize: tuple[Value, Value] | None = None,
        dtype: torch.dtype | None = None,
        channels_last: bool = False,
        fold: bool = False,
    ) -> None:
        if not callable(model):
            raise InputError(f"model must be a torch module or a callable, got {type(model).__name__}")
        if (channels_last or fold) and not isinstance(model, nn.Module):
            raise InputError(f"channels_last and fold need a torch module, got {type(model).__name__}")
        if dtype not in (None, torch.bfloat16, torch.float16):
            raise InputError(f"dtype must be torch.bfloat16, torch.float16 or None (as the model is), got {dtype}")
        self.model, self.normalize, self.dtype = model, normalize, dtype
        self.channels_last, self.fold = channels_last, fold
        self.queries = 0
        self._run: Model = model
        self._input_dtype = torch.float32

    @contextmanager
    def attacked(self, x: Tensor) -> Iterator[None]:
        """Evaluation mode and frozen parameters inside; mode, requires_grad and random numbers as before outside."""
        with ExitStack() as stack:
            devices = [x.device] if x.device.type == "cuda" else []
            stack.enter_context(torch.random.fork_rng(devices=devices))
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.enable_grad())
            self._input_dtype, self._run, self.queries = x.dtype, self.model, 0
            if isinstance(self.model, nn.Module):
                _refuse_wide(x, self.model)
                modes = [(module, module.training) for module in self.model.modules()]
                asked = [p for p in self.model.parameters() if p.requires_grad]

                def restore() -> None:
                    for module, training in modes:
                        module.training = training
                    for parameter in asked:
                        parameter.requires_grad_(True)

                stack.callback(restore)
                if self.model.training or any(training for _, training in modes):
                    self.model.eval()
                for parameter in asked:
                    parameter.requires_grad_(False)
                self._run = self._prepared(self.model)
            yield

    def _prepared(self, model: nn.Module) -> Model:
        """The model, or what runs faster in its place; made anew for every attack, since weights change."""
        if self.fold:
            from torch.fx.experimental.optimization import fuse

            try:
                model = fuse(model)
            except Exception as error:
                raise InputError(f"fold=True needs a model that torch.fx can trace: {error}") from error
        if not self.channels_last:
            return model
        weights = {
            name: p.contiguous(memory_format=torch.channels_last) for name, p in model.named_parameters() if p.ndim == 4
        }
        return lambda x: torch.func.functional_call(model, weights, (x,))

    @property
    def approximate(self) -> bool:
        """Whether gradients come from something that rounds otherwise than the model itself."""
        return self.dtype is not None or self.fold

    def _input(self, x: Tensor) -> Tensor:
        self.queries += len(x)
        x = x.to(self._input_dtype)
        if self.normalize is None:
            return x
        mean, std = (as_values(v, x, name) for v, name in zip(self._per_channel(), ("mean", "std"), strict=True))
        shape = (1, -1, *[1] * (x.ndim - 2))
        return (x - mean.reshape(shape)) / std.reshape(shape)

    def _fast(self, x: Tensor) -> Tensor:
        """Outputs by way of what was asked for: 16 bits, channels_last, folded."""
        x = self._input(x)
        if self.channels_last and x.ndim == 4:
            x = x.contiguous(memory_format=torch.channels_last)
        if self.dtype is None:
            return _outputs(self._run(x), len(x))
        with torch.autocast(x.device.type, dtype=self.dtype):
            return _outputs(self._run(x), len(x))

    def _per_channel(self) -> list[Tensor]:
        assert self.normalize is not None
        return [torch.as_tensor(v).reshape(1, -1) for v in self.normalize]

    def gradient(self, x: Tensor, loss: losses.Loss, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Outputs, losses (B,) in float32 or more, and the gradient of their sum: each sample's own."""
        x = x.detach().requires_grad_()
        outputs = widened(self._fast(x))
        values = loss(outputs, labels)
        if values.shape != x.shape[:1]:
            raise InputError(f"loss must return one value a sample, ({len(x)},), got {tuple(values.shape)}")
        if not values.requires_grad:
            raise InputError("the loss has no gradient with respect to the input: does the model detach it?")
        (gradient,) = torch.autograd.grad(values.sum(), x)
        return outputs.detach(), values.detach(), gradient

    def scores(self, x: Tensor) -> Tensor:
        """Outputs of the model as it is, whatever the gradients are computed with: success is decided by these."""
        with torch.no_grad():
            return widened(_outputs(self.model(self._input(x)), len(x)))

    def probe(self, x: Tensor, low: Tensor, high: Tensor) -> None:
        """Refuse a model that is random, or whose output for a sample depends on the rest of its batch.

        Three forward passes of two samples.
        """
        low, high = (v.reshape(*v.shape, *[1] * (x.ndim - 2)) for v in (low, high))
        second = x[1:2] if len(x) > 1 else low + high - x
        batches = torch.cat([x[:1], second]), torch.cat([x[:1], (x[:1] + low) / 2])
        first, again, beside = (self.scores(batch) for batch in (batches[0], *batches))
        if len(first) != 2:
            raise InputError(f"the model must return one row a sample, got {tuple(first.shape)} for 2 samples")
        rounding = 1e-4 if self._input_dtype in (torch.float32, torch.float64) else 1e-2
        scale = float(first.abs().max()) + 1e-30
        apart = float((first - again).abs().max()) / scale
        if apart > rounding:
            raise InputError(
                f"the model is random: two passes over the same input differ by {apart:.3g} of their size"
                f"{self._suspects('Dropout', 'DropPath', 'RReLU')}. An attack needs one function: average over several "
                "passes inside the model (EoT), or pass check=False"
            )
        apart = float((first[0] - beside[0]).abs().max()) / scale
        if apart > rounding:
            raise InputError(
                f"the model's output for a sample depends on the rest of its batch (it changed by {apart:.3g} of its "
                "size): batch normalisation in training mode, or without running statistics"
                f"{self._suspects('BatchNorm')}? Use running statistics, or pass check=False"
            )

    def _suspects(self, *kinds: str) -> str:
        if not isinstance(self.model, nn.Module):
            return ""
        named = [
            name
            for name, module in self.model.named_modules()
            if any(kind in base.__name__ for base in type(module).__mro__ for kind in kinds)
            and getattr(module, "running_mean", None) is None
        ]
        return f" ({', '.join(named[:3])}{' ...' if len(named) > 3 else ''})" if named else ""


def _refuse_wide(x: Tensor, model: nn.Module) -> None:
    weight = next((p for p in model.parameters() if p.is_floating_point()), None)
    if weight is not None and x.dtype == torch.float64 != weight.dtype:
        raise InputError(
            f"x must be {weight.dtype} as the model's weights are, got float64, which numpy makes by itself"
        )


def _outputs(found: object, count: int) -> Tensor:
    if isinstance(found, Tensor) and found.is_floating_point() and found.ndim and len(found) == count:
        return found
    seen = f"{found.dtype} {tuple(found.shape)}" if isinstance(found, Tensor) else f"a {type(found).__name__}"
    raise InputError(
        f"the model must return a float tensor ({count}, ...), a row a sample, got {seen}; wrap it so that it does"
    )


def widened(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


@dataclass
class Problem:
    """One call's samples: float32 (or float64), contiguous, with the ball and the box as (1 or B, 1 or C) tensors."""

    origin: Tensor
    labels: Tensor
    index: Tensor
    eps: Tensor
    low: Tensor
    high: Tensor

    def rows(self, chosen: Tensor) -> "Problem":
        return Problem(self.origin[chosen], self.labels[chosen], self.index[chosen], *(
            v[chosen] if len(v) > 1 else v for v in (self.eps, self.low, self.high)
        ))  # fmt: skip

    def spread(self, value: Tensor) -> Tensor:
        """(1 or B, 1 or C) so that it broadcasts over the samples."""
        return value.reshape(-1, *[1] * (self.origin.ndim - 1)) if self.origin.ndim < 2 else value.reshape(
            *value.shape, *[1] * (self.origin.ndim - 2)
        )  # fmt: skip


class Attack:
    """Calling habits, checks and bookkeeping; a subclass says how x moves in `_perturb`."""

    steps: int

    def __init__(
        self,
        model: Model,
        *,
        eps: Value,
        norm: Norm = "linf",
        loss: str | losses.Loss = "ce",
        success: Callable[[Tensor, Tensor], Tensor] | None = None,
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
        if norm not in NORMS:
            raise InputError(f"norm must be one of {', '.join(NORMS)}, got {norm!r}")
        if generator is not None:
            seed = int(torch.randint(2**63 - 1, (), generator=generator, device=generator.device))
        if not isinstance(seed, int) or not 0 <= seed < 2**64:
            raise InputError(f"seed must be an integer from 0 to 2^64 - 1, got {seed!r}")
        _check_values("eps", eps, least=0.0)
        if not isinstance(bounds, (tuple, list)) or len(bounds) != 2:
            raise InputError(f"bounds must be (low, high), got {bounds!r}")
        self.victim = Victim(model, normalize, dtype, channels_last, fold)
        self.eps, self.norm, self.bounds, self.strict = eps, norm, bounds, strict
        self.loss, self.classifier = losses.find(loss), isinstance(loss, str)
        self.success = success or (misclassified if self.classifier else None)
        self.seed, self.check, self.progress = seed, check, progress
        self._labels_checked = False
        self.seen = 0  # samples attacked so far: the next one's number, for its noise

    @property
    def model(self) -> Model:
        return self.victim.model

    def __call__(
        self, x: Array, y: Array, *, index: Array | None = None, start: Array | None = None, return_info: bool = False
    ) -> Any:
        """Adversarial samples for x (B, ...) with labels y, of x's kind, type and shape; on request an AttackInfo.

        x        floats in `bounds`; numpy or torch
        y        int (B,) class labels; with a loss of one's own whatever it takes, one row a sample
        index    int64 (B,) numbers that the noise depends on, besides the seed. By default samples are counted over the
                 calls, so a data set gets the same noise whatever the batch size, and every epoch another
        start    where to begin instead of random_start, in the box and the ball
        """
        images, labels, was_numpy = self._checked(x, y)
        if index is None:
            numbers = torch.arange(self.seen, self.seen + len(images), device=images.device)
        else:
            numbers = torch.as_tensor(index, dtype=torch.int64, device=images.device)
            if numbers.shape != images.shape[:1]:
                raise InputError(f"index must be ({len(images)},), got {tuple(numbers.shape)}")
        self.seen += len(images)
        self._labels_checked = False
        wide = widened(images.detach()).clone(memory_format=torch.contiguous_format)
        low, high = (as_values(v, wide, "bounds") for v in self.bounds)
        self._check_ball(low, high)
        problem = Problem(wide, labels, numbers, as_values(self.eps, wide, "eps"), low, high)
        if self.norm == "l2" and problem.eps.shape[1] > 1:
            raise InputError("an L2 ball has one radius a sample, got an eps for every channel")
        self._check_inputs(images, problem)
        begin = None if start is None else self._checked_start(start, problem)
        still = len(images) == 0 or not bool((problem.eps > 0).any())
        with self.victim.attacked(images):
            if self.check and len(images) and not (still and not return_info):
                self.victim.probe(wide, low[:1], high[:1])
                self.check = False
            if still:
                found, history = wide.clone(), wide.new_empty((0, len(wide)))
            else:
                found, history = self._perturb(problem, begin)
            out = inside(found, problem, self._exact_eps(), self.norm, images.dtype, self.strict)
            info = self._describe(out, problem, history) if return_info else None
        result = out.cpu().numpy() if was_numpy else out
        return (result, info) if return_info else result

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

    def _fooled(self, outputs: Tensor, x: Tensor, labels: Tensor) -> Tensor:
        """Who fools the model, bool (B,). Outputs that round otherwise than the model's own are not trusted."""
        if self.success is None:
            return torch.zeros(len(x), dtype=torch.bool, device=x.device)
        fooled = self.success(outputs, labels)
        if self.victim.approximate and bool(fooled.any()):
            fooled[fooled.clone()] = self.success(self.victim.scores(x[fooled]), labels[fooled])
        return fooled

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
        labels = problem.labels
        scores = self.victim.scores(out)
        self._check_classes(scores, labels)
        loss = self.loss(scores, labels).detach()
        delta = (out.double() - problem.origin.double()).flatten(1)
        norm = delta.abs().amax(dim=1) if self.norm == "linf" else delta.norm(dim=1)
        success = None if self.success is None else self.success(scores, labels)
        return AttackInfo(success, loss, norm, history, self.victim.queries)

    def _checked(self, x: Array, y: Array) -> tuple[Tensor, Tensor, bool]:
        was_numpy = isinstance(x, np.ndarray)
        images = torch.from_numpy(x) if was_numpy else x
        if not isinstance(images, Tensor) or not images.is_floating_point() or images.ndim < 2:
            seen = f"{images.dtype} {tuple(images.shape)}" if isinstance(images, Tensor) else type(x).__name__
            raise InputError(f"x must be floats (B, ...), got {seen}")
        try:
            labels = torch.as_tensor(y).to(images.device)
        except (RuntimeError, TypeError, ValueError) as error:
            raise InputError(f"y must be a row of labels a sample, got {type(y).__name__}") from error
        if labels.shape[:1] != images.shape[:1]:
            raise InputError(f"y must have a row for each of {len(images)} samples, got shape {tuple(labels.shape)}")
        if self.classifier:
            if labels.is_floating_point() or labels.dtype == torch.bool or labels.ndim != 1:
                raise InputError(
                    f"y must be int ({len(images)},) class labels, got {labels.dtype} {tuple(labels.shape)}"
                )
            labels = labels.long()
        return images, labels, was_numpy

    def _check_inputs(self, images: Tensor, problem: Problem) -> None:
        if not len(images):
            return
        wide = problem.origin
        if not bool(wide.isfinite().all()):
            bad = int((~wide.isfinite()).flatten(1).any(1).nonzero()[0])
            raise InputError(f"x must be finite, sample {bad} is not")
        low, high = problem.spread(problem.low), problem.spread(problem.high)
        if not bool(((wide >= low) & (wide <= high)).all()):
            least, most = float(wide.min()), float(wide.max())
            bounds = (float(problem.low.min()), float(problem.high.max()))
            message = f"x must lie in bounds {bounds}, got values from {least:.4g} to {most:.4g}"
            if bounds == (0.0, 1.0) and most > 4:
                message += (
                    ": these look like pixels from 0 to 255; divide by 255, or pass bounds=(0, 255) and eps in pixels"
                )
            elif bounds == (0.0, 1.0):
                message += (
                    ": these look normalised. Pass pixels from 0 to 1 and normalize=(mean, std), which happens inside "
                    "the attack, or say which bounds and eps the normalised values have: (1, C), a value a channel"
                )
            raise InputError(message)

    def _checked_start(self, start: Array, problem: Problem) -> Tensor:
        begin = torch.as_tensor(start).to(problem.origin)
        if begin.shape != problem.origin.shape:
            raise InputError(f"start must be like x {tuple(problem.origin.shape)}, got {tuple(begin.shape)}")
        return begin.clone(memory_format=torch.contiguous_format)

    def _exact_eps(self) -> Tensor:
        """eps in float64: what the user compares with."""
        exact = torch.as_tensor(self.eps, dtype=torch.float64)
        return exact.reshape(-1, 1) if exact.ndim < 2 else exact

    def _check_classes(self, outputs: Tensor, labels: Tensor) -> None:
        """The labels against the model's classes, once a call."""
        if not self.classifier or self._labels_checked:
            return
        self._labels_checked = True
        if outputs.ndim != 2 or outputs.shape[1] < 2:
            raise InputError(
                f"a named loss needs logits (B, classes) of two classes or more, got {tuple(outputs.shape)}"
            )
        if int(labels.min()) < 0 or int(labels.max()) >= outputs.shape[1]:
            bad = int(((labels < 0) | (labels >= outputs.shape[1])).nonzero()[0])
            raise InputError(f"y must be labels from 0 to {outputs.shape[1] - 1}, sample {bad} has {int(labels[bad])}")

    def _noise(self, problem: Problem, stream: int, count: int) -> Tensor:
        """(B, count) in (-1, 1)."""
        noise = pgd_noise(problem.index, count, seed=(self.seed + stream * STREAM) % 2**64)
        return noise.to(problem.origin.dtype)

    def _random_start(self, problem: Problem, stream: int) -> Tensor:
        """Uniform in the cube; for L2 a uniform direction and a uniform radius, as torchattacks has it. Clipped."""
        origin = problem.origin
        each = origin[0].numel()
        eps, low, high = (problem.spread(v) for v in (problem.eps, problem.low, problem.high))
        if self.norm == "linf":
            delta = eps * self._noise(problem, stream, each).reshape(origin.shape)
        else:
            u = (self._noise(problem, stream, 2 * each + 1).double() + 1) / 2
            normal = (-2 * u[:, :each].log()).sqrt() * (2 * torch.pi * u[:, each : 2 * each]).cos()
            direction = normal / normal.norm(dim=1, keepdim=True).clamp(min=1e-30) * u[:, -1:]
            delta = eps * direction.to(origin.dtype).reshape(origin.shape)
        return torch.minimum(torch.maximum(origin + delta, low), high)


def misclassified(logits: Tensor, labels: Tensor) -> Tensor:
    return logits.argmax(dim=1) != labels


def inside(x: Tensor, problem: Problem, eps: Tensor, norm: str, dtype: torch.dtype, strict: bool) -> Tensor:
    """x in the type it is returned in, and still in the ball and the box.

    A float32 L-inf result in the cube [fl(x - eps), fl(x + eps)] is left as it is, bit for bit what other libraries
    give, unless `strict`: the rounded edge can lie half a unit in the last place outside. Everything else (L2, 16-bit
    types) is rounded towards the origin, so that |x - origin| <= eps holds exactly.
    """
    if norm == "linf" and dtype == x.dtype and not strict:
        return x
    origin = problem.origin.double()
    eps = problem.spread(eps.to(x.device))
    delta = x.double() - origin
    if norm == "linf":
        delta = torch.minimum(torch.maximum(delta, -eps), eps)
    else:
        # a little inside, so that the norm is at most eps in float32 arithmetic too
        length = delta.flatten(1).norm(dim=1).reshape(-1, *[1] * (x.ndim - 1))
        most = eps * (1 - 2.0**-20)
        delta = delta * torch.where(length > most, most / length, 1.0)
    low, high = problem.spread(problem.low).double(), problem.spread(problem.high).double()
    target = torch.minimum(torch.maximum(origin + delta, low), high)
    out, home = target.to(dtype), problem.origin.to(dtype)
    for _ in range(2):  # rounding is off by one step at most, of the wider spacing
        over = (out.double() - origin).abs() > (target - origin).abs()
        out = torch.where(over, torch.nextafter(out, home), out)
    return out


def _check_values(name: str, value: Value, least: float, above: bool = False) -> None:
    try:
        tensor = torch.as_tensor(value, dtype=torch.float64)
    except (RuntimeError, TypeError, ValueError) as error:
        raise InputError(f"{name} must be a number or numbers, got {value!r}") from error
    fine = tensor > least if above else tensor >= least
    if not bool((fine & tensor.isfinite()).all()):
        raise InputError(f"{name} must be finite and {'above' if above else 'at least'} {least:g}, got {value}")


class Progress:
    """A bar over the steps of an attack: shown when asked for, or once it has taken longer than SLOW seconds."""

    def __init__(self, asked: bool | None, total: int, what: str) -> None:
        self.asked, self.total, self.what = asked, total, what
        self.stack, self.began, self.done = ExitStack(), time.monotonic(), 0
        self.tell: Callable[[int], object] | None = None

    def __enter__(self) -> "Progress":
        return self

    def step(self) -> None:
        self.done += 1
        if self.asked is False:
            return
        if self.tell is None and (self.asked or time.monotonic() - self.began > SLOW):
            self.tell = self.stack.enter_context(_terminal.counting(self.total, self.what))
            self.tell(self.done - 1)
        if self.tell is not None:
            self.tell(1)

    def __exit__(self, *error: object) -> None:
        self.stack.close()
