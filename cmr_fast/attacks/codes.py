"""What attacks on hash codes share: the victim's encoders, an item's budget, the perturbation under an optimizer."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from cmr_fast.attacks.settings import real
from cmr_fast.attacks.victim import held
from cmr_fast.errors import InputError
from cmr_fast.losses.dcmh import signs
from cmr_fast.modalities import MODALITIES, Modality

Norm = Literal["linf", "l2", "l1"]
ORDER = {"linf": torch.inf, "l2": 2.0, "l1": 1.0}
_BETAS = (0.9, 0.999)
_MOST = 1e30  # of a budget or bound


class Hashing(Protocol):
    """What is attacked: a trained method, or anything with `encode(modality, x) -> (N, bits)` whose signs are codes."""

    def encode(self, modality: Modality, features: Tensor) -> Tensor:
        """(N, ...) inputs -> (N, bits); bit = value >= 0."""


@dataclass(frozen=True)
class Encoders:
    """Both encoders of a victim, and how their outputs become relaxed codes."""

    encode: Callable[[Modality, Tensor], Tensor]
    modules: tuple[nn.Module, ...]
    relax: str

    @classmethod
    def of(cls, model: Any, relax: str) -> "Encoders":
        """From a trained hashing method, or a pair (image encoder, text encoder) of callables."""
        if hasattr(model, "encode"):
            return cls(model.encode, (model,) if isinstance(model, nn.Module) else (), relax)
        if isinstance(model, tuple | list) and len(model) == 2 and all(callable(part) for part in model):
            pair = dict(zip(MODALITIES, model, strict=True))
            modules = tuple(part for part in model if isinstance(part, nn.Module))
            return cls(lambda modality, x: pair[modality](x), modules, relax)
        raise InputError(
            "model must have encode(modality, x), or be a pair (image encoder, text encoder), got "
            f"{type(model).__name__}"
        )

    def relaxed(self, modality: Modality, x: Tensor) -> Tensor:
        """Relaxed codes (n, bits) of inputs (n, ...), checked."""
        try:
            values: object = self.encode(modality, x.clone())  # the first layer may work in place
        except (RuntimeError, ValueError) as error:
            if isinstance(error, InputError | torch.OutOfMemoryError):
                raise
            raise InputError(
                f"the {modality} encoder cannot take {x.dtype} {tuple(x.shape)}; expected inputs of its own width and "
                f"dtype ({error})"
            ) from error
        if not isinstance(values, Tensor) or values.ndim != 2 or len(values) != len(x) or not values.shape[1]:
            seen = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
            raise InputError(f"the {modality} encoder must return ({len(x)}, bits), got {seen}")
        return values.tanh() if self.relax == "tanh" else values

    @torch.no_grad()
    def codes(self, batches: Mapping[Modality, Iterable[Tensor]]) -> dict[Modality, Tensor]:
        """Binary codes as +-1, of one dtype for both modalities: the wider one, float32 at least."""
        codes = {m: torch.cat([self._signs(m, part) for part in parts]) for m, parts in batches.items()}
        wide = torch.float32
        for values in codes.values():
            wide = torch.promote_types(wide, values.dtype)
        codes = {m: values.to(wide) for m, values in codes.items()}
        widths = [c.shape[1] for c in codes.values()]
        if widths[0] != widths[1]:
            raise InputError(f"both encoders must make codes of one length, got {widths[0]} bits and {widths[1]} bits")
        return codes

    def _signs(self, modality: Modality, x: Tensor) -> Tensor:
        values = self.relaxed(modality, x)
        if bad := int(values.isnan().any(dim=1).count_nonzero()):  # NaN is no bit: not 1, not 0
            raise InputError(f"the {modality} encoder returns NaN for {bad} of {len(x)} items; expected numbers")
        return signs(values)

    @torch.no_grad()
    def probe(self, modality: Modality, x: Tensor, bounds: tuple[float, float]) -> None:
        """Refuse a model whose output for an item depends on the others of its batch, or is random."""
        if not len(x):
            return
        mirrored = (sum(bounds) - x[:1]).clamp(*bounds)  # another item, where all are alike or there is one only
        batches = torch.cat([x[:7], mirrored]), torch.cat([x[:1], x[:1]])
        beside, alone = (self.relaxed(modality, batch)[:1] for batch in batches)
        apart = float((beside.double() - alone.double()).abs().max()) / max(1.0, float(alone.abs().max()))
        if apart > (1e-3 if alone.dtype.itemsize > 2 else 2e-2):
            raise InputError(
                f"the {modality} code of an item depends on the rest of its batch, or is random (it changed by "
                f"{apart:.3g} of 1): batch normalisation without running statistics, or dropout? Use evaluation "
                "mode, or pass check=False"
            )


@dataclass(frozen=True)
class Budget:
    """How far an item may move, and where it must stay."""

    eps: float
    norm: Norm
    bounds: tuple[float, float]
    lr: float

    @classmethod
    def checked(
        cls, name: str, eps: float, norm: Norm, bounds: tuple[float, float], lr: float | None, share: float
    ) -> "Budget":
        """A budget of checked values; lr=None is `share` of eps."""
        eps = real(f"{name}_eps", eps, 0, _MOST)
        if not isinstance(bounds, tuple | list) or len(bounds) != 2:
            raise InputError(f"{name}_bounds must be (low, high), got {bounds!r}")
        low, high = (real(f"{name}_bounds", bound, -_MOST, _MOST) for bound in bounds)
        if not low < high:
            raise InputError(f"{name}_bounds must be (low, high), got {bounds!r}")
        rate = eps * share if lr is None else real(f"{name}_lr", lr, 0, _MOST, above=True)
        return cls(eps, norm, (low, high), rate)

    def inputs(self, x: Tensor, name: str) -> Tensor:
        """x as floats. InputError where it is not what the budget is for."""
        if x.ndim < 2 or not (x.is_floating_point() or x.dtype == torch.uint8):
            raise InputError(f"{name} must be floats (N, ...) or uint8 pixels, got {x.dtype} {tuple(x.shape)}")
        dtype = x.dtype if x.is_floating_point() else torch.float64
        x = x.detach()
        x = x if x.dtype == torch.float64 else x.float()
        # as numbers of the dtype given: 0.1 of float32 is above 0.1
        low, high = (float(torch.tensor(b, dtype=dtype)) for b in self.bounds)
        if x.numel() and not (x.isfinite().all() and float(x.min()) >= low and float(x.max()) <= high):
            raise InputError(
                f"{name} must lie in its bounds, {low:g} to {high:g}, got {float(x.min()):g} to {float(x.max()):g}"
            )
        return x


class Perturbation:
    """One batch's perturbation under an optimizer."""

    def __init__(self, clean: Tensor, budget: Budget, steps: int, optimizer: str, *, one_sided: bool) -> None:
        self.clean, self.budget, self.optimizer, self.one_sided = clean, budget, optimizer, one_sided
        self.noise = torch.zeros_like(clean)
        self.first, self.second = torch.zeros_like(clean), torch.zeros_like(clean)
        self.count = 0
        self.broken = torch.zeros(len(clean), dtype=torch.int32, device=clean.device)
        """The first step of each item whose gradient was not finite; 0 where none was."""

    def point(self) -> Tensor:
        """Where the gradient is wanted."""
        self.noise.requires_grad_()
        x = self.clean + self.noise
        if not self.one_sided:  # the noise stays where the sum is in the box
            return x
        low, high = self.budget.bounds
        # the code clips in the graph, with slope 1 at both ends as TensorFlow's clip; of torch's clamp it is 0 there
        return torch.where(x < low, low, torch.where(x > high, high, x))

    def scatter(self) -> None:
        """Begin at a random point: uniform in the cube of side 2 eps, projected onto the ball and the box."""
        self.noise.uniform_(-self.budget.eps, self.budget.eps)
        self._project()

    def step(self, loss: Tensor) -> None:
        """One update of the noise along the gradient of `loss`, a number."""
        (slope,) = torch.autograd.grad(loss, self.noise)
        self.noise = self.noise.detach()
        self.count += 1
        self.broken[(self.broken == 0) & ~slope.flatten(1).isfinite().all(dim=1)] = self.count
        rate = self.budget.lr
        if self.optimizer == "sign":
            self.noise -= rate * slope.sign()
        else:
            b1, b2 = _BETAS
            self.first.mul_(b1).add_(slope, alpha=1 - b1)
            self.second.mul_(b2).addcmul_(slope, slope, value=1 - b2)
            rest1, rest2 = 1 - b1**self.count, (1 - b2**self.count) ** 0.5
            if self.one_sided:  # TensorFlow adds epsilon before the bias is corrected
                self.noise.addcdiv_(self.first, self.second.sqrt().add_(1e-8), value=-rate * rest2 / rest1)
            else:  # a gradient of any size counts: J is a sum whose scale says nothing
                self.noise.addcdiv_(self.first, (self.second.sqrt() / rest2).add_(1e-30), value=-rate / rest1)
        self._project()

    def _project(self) -> None:
        eps = self.budget.eps
        if self.one_sided:
            self.noise.clamp_(0, eps)
            return
        if self.budget.norm == "linf":
            self.noise.clamp_(-eps, eps)
        else:
            self.noise = within(self.noise, eps, self.budget.norm)
        low, high = self.budget.bounds
        self.noise = (self.clean + self.noise).clamp_(low, high) - self.clean

    def result(self, dtype: torch.dtype) -> Tensor:
        """The perturbed items as numbers of `dtype`, in the box, and in the ball as these numbers say.

        InputError where a gradient was not finite: such an item would stand still, and look robust.
        """
        if bool(self.broken.any()):
            item = int(self.broken.nonzero()[0])
            raise InputError(
                f"the model's gradient of {int(self.broken.count_nonzero())} of {len(self.broken)} items is not "
                f"finite, item {item} of the batch first at step {int(self.broken[item])}; expected a model with "
                "finite slopes at the items (a square root has none at 0)"
            )
        x, p = (self.clean + self.noise).clamp(*self.budget.bounds), ORDER[self.budget.norm]
        x = self._rounded(x, dtype)
        margin = 1e-7
        while True:  # rounding can leave an item outside by its last bits
            moved = (x.double() - self.clean.double()).flatten(1)
            size = moved.abs() if self.budget.norm == "linf" else torch.linalg.vector_norm(moved, p, 1, keepdim=True)
            if not (size > self.budget.eps).any():
                return x
            within_eps = self.budget.eps * (1 - min(margin, 1.0))  # in the end the clean item
            shrink = torch.where(size > self.budget.eps, within_eps / size.clamp(min=1e-300), 1.0)
            nearer = self.clean.double() + (moved * shrink).view_as(x)
            x = torch.where((shrink < 1).expand_as(moved).view_as(x), nearer.to(x.dtype), x).clamp(*self.budget.bounds)
            x = self._rounded(x, dtype)
            margin *= 4

    def _rounded(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """x in numbers of `dtype`, rounded towards the clean item, whose own are of that type."""
        if dtype.itemsize >= x.dtype.itemsize:
            return x
        out, home = x.to(dtype), self.clean.to(dtype)
        for _ in range(2):  # rounding is off by one step at most, of the wider spacing
            over = (out.to(x.dtype) - self.clean).abs() > (x - self.clean).abs()
            out = torch.where(over, torch.nextafter(out, home), out)
        return out.to(x.dtype)


def within(noise: Tensor, eps: float, norm: Norm) -> Tensor:
    """Noise (N, ...) projected onto the l2 or l1 ball of radius eps, item by item."""
    flat = noise.flatten(1)
    if norm == "l2":
        size = torch.linalg.vector_norm(flat, dim=1, keepdim=True, dtype=torch.float64)  # squares overflow float32
        shrunk: Tensor = flat * (eps / size.clamp(min=1e-30)).clamp(max=1).to(flat.dtype)
        return shrunk.view_as(noise)
    # l1: soft threshold (Duchi et al. 2008, Fig. 1)
    ordered = flat.abs().sort(dim=1, descending=True).values
    excess = ordered.cumsum(dim=1) - eps
    count = torch.arange(1, flat.shape[1] + 1, device=flat.device)
    last = ((ordered * count > excess) * count).amax(dim=1, keepdim=True).clamp(min=1)
    threshold = (excess.gather(1, last - 1) / last).clamp(min=0)
    return (flat.sign() * (flat.abs() - threshold).clamp(min=0)).view_as(noise)


@contextmanager
def frozen(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Evaluation mode, parameters without gradients and gradients on inside; as before outside."""
    with ExitStack() as stack:
        for module in modules:
            stack.enter_context(held(module))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        yield


def check_differentiable(values: Tensor, modality: Modality) -> None:
    """InputError where codes (n, bits) have no gradient with respect to the input."""
    if not values.requires_grad:
        raise InputError(f"the {modality} codes have no gradient with respect to the input: does the model detach it?")
