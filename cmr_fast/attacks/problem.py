"""One call's samples in their ball and box: how they move, who is fooled, what is returned."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from cmr_fast.attacks import losses
from cmr_fast.attacks.victim import Victim
from cmr_fast.errors import InputError
from cmr_fast.ops.pgd import Norm, pgd_noise, row_norms

Success = Callable[[Tensor, Tensor], Tensor]
STREAM = 0x9E3779B97F4A7C15  # seeds of restarts and of other kinds of noise are this far apart
INSIDE = 2.0**-19  # of eps: L2 norms are at most eps in float32 arithmetic too


@dataclass
class Call:
    """What one call of an attack goes by: the victim while it is attacked, and what is raised and counted."""

    victim: Victim
    loss: losses.Loss
    success: Success | None
    classifier: bool
    checked: bool = False

    def values(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """Losses (B,), without a graph.

        Parameters
        ----------
        outputs, labels
            Of the same samples.
        """
        return losses.one_each(self.loss(outputs, labels), len(outputs)).detach()

    def judge(self, outputs: Tensor, labels: Tensor) -> Tensor | None:
        """Who fools the model, bool (B,), or None where that is not defined.

        Parameters
        ----------
        outputs, labels
            Of the same samples.

        Raises
        ------
        InputError
            For a success function that returns anything else.
        """
        if self.success is None:
            return None
        mask = self.success(outputs, labels)
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.shape != outputs.shape[:1]:
            seen = f"{mask.dtype} {tuple(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
            raise InputError(f"success must return bool ({len(outputs)},), got {seen}")
        return mask

    def check_classes(self, outputs: Tensor, labels: Tensor) -> None:
        """The labels against the model's classes, once a call.

        Parameters
        ----------
        outputs, labels
            Of the same samples: float (B, ...), int (B,).

        Raises
        ------
        InputError
            For outputs that are no logits, and labels that the model has no class for.
        """
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
        """The same of the samples chosen, by number or by mask.

        Parameters
        ----------
        chosen
            int64 (M,), or bool (B,).
        """
        names = ("eps", "low", "high", "exact_eps")
        values = {name: v[chosen] if len(v := getattr(self, name)) > 1 else v for name in names}
        return replace(self, origin=self.origin[chosen], labels=self.labels[chosen], index=self.index[chosen], **values)

    def spread(self, value: Tensor) -> Tensor:
        """(1 or B, 1 or C) so that it broadcasts over the samples.

        Parameters
        ----------
        value
            (1 or B, 1 or C).
        """
        if self.origin.ndim < 2:
            return value.reshape(-1, *[1] * (self.origin.ndim - 1))
        return value.reshape(*value.shape, *[1] * (self.origin.ndim - 2))

    def boxed(self, x: Tensor) -> Tensor:
        """x clipped to the bounds.

        Parameters
        ----------
        x
            Like origin.
        """
        return torch.minimum(torch.maximum(x, self.spread(self.low)), self.spread(self.high))

    def step(self, x: Tensor, along: Tensor, size: Tensor, broken: Tensor, step: int) -> Tensor:
        """ops.pgd_step_ on x, its arguments checked once and for all; x itself.

        Parameters
        ----------
        x, along
            Like origin; x is changed.
        size
            (1 or B, 1 or C), the step.
        broken, step
            int32 (B,), which becomes `step` where a gradient is not finite.
        """
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

        Parameters
        ----------
        x
            Like origin.

        Returns
        -------
        Tensor
            In the caller's type.
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
        """Who fools the model, bool (B,), judged by what would be returned and by the model's own outputs.

        Parameters
        ----------
        outputs, x
            The model's outputs (B, ...) for the points x.
        """
        victim = self.call.victim
        mask = self.call.judge(outputs, self.labels)
        if mask is None:
            return torch.zeros(len(x), dtype=torch.bool, device=x.device)
        if not (victim.approximate or self.rounds) or not bool(mask.any()):
            return mask
        rows = mask.nonzero()[:, 0]
        part = self.rows(rows)
        out = part.returned(x[rows])
        if not victim.approximate:  # the outputs are those of the points that rounding leaves as they are
            moved = (out != x[rows].to(out.dtype)).flatten(1).any(dim=1)
            rows, out = rows[moved], out[moved]
        if len(rows):
            again = self.call.judge(victim.scores(out), self.labels[rows])
            mask = mask.clone() if again is None else mask.index_copy(0, rows, again)
        return mask

    def noise(self, seed: int, stream: int, count: int) -> Tensor:
        """(B, count) in (-1, 1), a sample's by its number.

        Parameters
        ----------
        seed, stream
            Of the attack; of the restart or the kind of noise.
        count
            Numbers a sample.
        """
        noise = pgd_noise(self.index, count, seed=(seed + stream * STREAM) % 2**64)
        return noise.to(self.origin.dtype)

    def directions(self, seed: int, stream: int) -> tuple[Tensor, Tensor]:
        """A random unit vector like origin for each sample, and a uniform number (B, 1, ...), both float64.

        Parameters
        ----------
        seed, stream
            As of `noise`.
        """
        each = self.origin[0].numel()
        u = (self.noise(seed, stream, 2 * each + 1).double() + 1) / 2
        normal = (-2 * u[:, :each].log()).sqrt() * (2 * torch.pi * u[:, each : 2 * each]).cos()  # Box and Muller
        unit = normal / row_norms(normal).clamp(min=1e-30)
        return unit.reshape(self.origin.shape), u[:, -1].reshape(-1, *[1] * (self.origin.ndim - 1))


def refuse_outside(problem: Problem) -> None:
    """Refuse inputs that are not finite or lie outside the box, with what they look like.

    Parameters
    ----------
    problem
        Of the call.

    Raises
    ------
    InputError
        For these.
    """
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
