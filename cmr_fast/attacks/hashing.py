"""Attacks on cross-modal hashing: CMLA (Li et al.; NeurIPS 2019), and on one modality by given codes (DHTA, CgAT).

CMLA perturbs images v and texts t so that their codes leave the items of the other modality that share a label, while
within their modality they stay where they were. For images, over perturbed items i and clean items j of the batch,

    J = sum_ij [log(1 + e^-inter_ij) + S_ij inter_ij] + sum_ij [log(1 + e^intra_ij) - S_ij intra_ij] + sum_i |delta_i|_p

    inter_ij = 1/2 h~v_i . ht_j,    intra_ij = 1/2 h~v_i . hv_j,    |delta_i|_p <= eps,

h~ the relaxed code of the perturbed item, h the binary code of a clean one; of texts with v and t exchanged. The first
sum is the likelihood of 1 - S: it also pulls together what shares no label (flip="all", as the authors' poster and code
have it). Their author response says that only S = 1 is pushed: flip="positives", the sum over S_ij = 1 of
log(1 + e^inter). With clean codes on the right, every item is attacked by itself, whatever its batch.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, Protocol, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cmr_fast.errors import InputError
from cmr_fast.ops import pack_codes, pairwise_nll, pairwise_squared
from cmr_fast.ops._tensors import as_tensor, like_input
from cmr_fast.ops.labels import share_label

Modality = Literal["image", "text"]
Norm = Literal["linf", "l2", "l1"]
Array = Any  # numpy array or torch tensor
MODALITIES: tuple[Modality, ...] = ("image", "text")
_OTHER: dict[Modality, Modality] = {"image": "text", "text": "image"}
_P = {"linf": torch.inf, "l2": 2.0, "l1": 1.0}
_BETAS = (0.9, 0.999)


class Hashing(Protocol):
    """What is attacked: a trained method, or anything with `encode(modality, x) -> (N, bits)` whose signs are codes."""

    def encode(self, modality: Modality, features: Tensor) -> Tensor:
        """(N, ...) inputs -> (N, bits); bit = value >= 0."""


@dataclass(frozen=True)
class Perturbed:
    """What CMLA returns.

    Attributes
    ----------
    image, text : Tensor or numpy.ndarray
        The perturbed inputs, of the kind, dtype and shape of those given.
    distortion : dict
        D by modality: the mean over items of the root mean square of their perturbation, in units of the bounds'
        width. What the authors print beside every mAP.
    losses : dict
        J by modality before each step, (steps,), the mean over the items.
    """

    image: Array
    text: Array
    distortion: dict[str, float]
    losses: dict[str, Tensor]


class CMLA:
    """Cross-Modal Learning with Adversarial samples: perturbs images and texts of a hashing model.

    `atk = CMLA(model, image_eps=10, image_bounds=(0, 255)); result = atk(image, text, labels)`

    Parameters
    ----------
    model : Hashing
        A trained hashing method, or a pair (image encoder, text encoder) of callables x -> (N, bits).
    image_eps, text_eps : float
        Budgets |delta|_p of an item, in the units of its input. The authors' code: 10 of 255, and 0.01 of 1.
    image_bounds, text_bounds : (float, float)
        The range of the inputs; perturbed ones stay in it.
    norm : {"linf", "l2", "l1"}
        p of the budget and of the distortion term (the paper gives none; the code clips each value: linf).
    steps : int
        Iterations (code: 500).
    optimizer : {"adam", "sign"}
        Adam on the perturbation from 0, as the code, or steps of fixed size along the gradient's sign.
    image_lr, text_lr : float, optional
        The step size. None: a twentieth of image_eps and a fifth of text_eps (code: 0.5 and 0.002); with "sign" a
        tenth.
    flip : {"all", "positives"}
        Which pairs the inter-modal term moves, see the module.
    keep_intra : bool
        True keeps the similarities within the modality; False attacks them too, by the author response's term
        sum |(1 - S) intra - log(1 + e^intra)|^2.
    intra : float
        Weight of that term; 0 leaves it out.
    distortion : float
        Weight of the distortion term.
    single_modal : bool
        Attack each modality against its own clean codes alone (flipped similarities), for comparison.
    alternate : bool
        The two perturbations are updated in turn, each against the other's codes of that moment; this makes an item's
        result depend on its batch. False: each against the other's clean codes, as the code does.
    relax : {"tanh", "none"}
        What makes the encoder's outputs relaxed codes. "none" for outputs that are tanh's already.
    compat : {"cmla"}, optional
        The authors' code: text first, supervision from within batches of 128 (the last one overlaps), no 1/2, means
        for sums, mean |x~ - x|, perturbations of one sign in [0, eps], TensorFlow's Adam. It sets flip="all" and
        keeps intra-modal similarities.
    batch : int
        Items at a time; the result does not depend on it unless `alternate` or `compat` say so.
    check : bool
        Refuse a model whose code of an item depends on the rest of its batch.

    Raises
    ------
    InputError
        For options that are none of these, or a budget below 0.
    """

    def __init__(
        self,
        model: Hashing | Sequence[Callable[[Tensor], Tensor]],
        *,
        image_eps: float = 10 / 255,
        text_eps: float = 0.01,
        image_bounds: tuple[float, float] = (0.0, 1.0),
        text_bounds: tuple[float, float] = (0.0, 1.0),
        norm: Norm = "linf",
        steps: int = 500,
        optimizer: Literal["adam", "sign"] = "adam",
        image_lr: float | None = None,
        text_lr: float | None = None,
        flip: Literal["all", "positives"] = "all",
        keep_intra: bool = True,
        intra: float = 1.0,
        distortion: float = 1.0,
        single_modal: bool = False,
        alternate: bool = False,
        relax: Literal["tanh", "none"] = "tanh",
        compat: Literal["cmla"] | None = None,
        batch: int = 128,
        check: bool = True,
    ) -> None:
        choices: dict[str, tuple[Any, tuple[Any, ...]]] = {
            "norm": (norm, tuple(_P)),
            "optimizer": (optimizer, ("adam", "sign")),
            "flip": (flip, ("all", "positives")),
            "relax": (relax, ("tanh", "none")),
            "compat": (compat, (None, "cmla")),
        }
        for name, (value, allowed) in choices.items():
            if value not in allowed:
                raise InputError(f"{name} must be one of {', '.join(map(str, allowed))}, got {value!r}")
        if compat and (alternate or single_modal or flip != "all" or not keep_intra or norm != "linf"):
            raise InputError(
                "compat='cmla' is the authors' code: expected flip='all', keep_intra=True, norm='linf' and neither "
                "alternate nor single_modal"
            )
        for name, count in (("steps", steps), ("batch", batch)):
            if isinstance(count, bool) or not isinstance(count, int) or count < 1:
                raise InputError(f"{name} must be a whole number of 1 or more, got {count!r}")
        for name, number in (("intra", intra), ("distortion", distortion)):
            if not 0 <= number < torch.inf:
                raise InputError(f"{name} must be 0 or more, got {number!r}")
        self.model = Encoders.of(model, relax)
        shares = (1 / 20, 1 / 5) if optimizer == "adam" else (0.1, 0.1)
        self.budgets: dict[Modality, Budget] = {
            "image": Budget.checked("image", image_eps, norm, image_bounds, image_lr, shares[0]),
            "text": Budget.checked("text", text_eps, norm, text_bounds, text_lr, shares[1]),
        }
        self.norm, self.steps, self.optimizer, self.flip = norm, steps, optimizer, flip
        self.keep_intra, self.intra, self.distortion = keep_intra, intra, distortion
        self.single_modal, self.alternate, self.compat = single_modal, alternate, compat
        self.batch, self.check = batch, check

    def __call__(self, image: Array, text: Array, labels: Array) -> Perturbed:
        """Perturb pairs.

        Parameters
        ----------
        image : Tensor or numpy.ndarray
            Float (N, ...) in image_bounds; uint8 pixels come back as float32.
        text : Tensor or numpy.ndarray
            Float (N, d) in text_bounds.
        labels : Tensor or numpy.ndarray
            Class ids, integers (N,), or multi-hot rows (N, C); rows without a label share none.

        Returns
        -------
        Perturbed

        Raises
        ------
        InputError
            Where sizes disagree, inputs lie outside the bounds or are not finite, the two codes differ in length, or a
            code depends on batch mates.
        """
        inputs: dict[Modality, Tensor] = {}
        given: dict[Modality, Array] = {"image": image, "text": text}
        for m, value in given.items():
            inputs[m] = self.budgets[m].inputs(as_tensor(value, m)[0], m)
        classes = _labels(labels, len(inputs["image"])).to(inputs["image"].device)
        if len(inputs["text"]) != len(classes):
            raise InputError(f"image, text and labels must be of one length, got {len(inputs['text'])} texts")
        result = {m: x.clone() for m, x in inputs.items()}
        losses = {m: torch.zeros(self.steps, dtype=torch.float64) for m in inputs}
        with frozen(self.model.modules):
            if self.check:
                self.model.probe(inputs)
            clean = self.model.codes(inputs, self.batch)
            for rows in self._batches(len(classes)):
                self._attack(rows, inputs, clean, classes, result, losses)
        moved: dict[str, float] = {m: _distortion(result[m], x, self.budgets[m].bounds) for m, x in inputs.items()}
        weight = max(1, sum(len(rows) for rows in self._batches(len(classes))))
        out = {m: like_input(result[m].to(_dtype(value)), as_tensor(value, m)[1]) for m, value in given.items()}
        return Perturbed(out["image"], out["text"], moved, {m: (x / weight).float() for m, x in losses.items()})

    def _batches(self, count: int) -> list[Tensor]:
        rows = list(torch.arange(count).split(self.batch))
        if self.compat and count > self.batch:
            rows[-1] = torch.arange(count - self.batch, count)
        return rows if count else []

    def _attack(
        self, rows: Tensor, inputs: dict[Modality, Tensor], clean: dict[Modality, Tensor], labels: Tensor,
        result: dict[Modality, Tensor], losses: dict[Modality, Tensor],
    ) -> None:  # fmt: skip
        within = self.compat is not None
        right: dict[Modality, Tensor] = {m: codes[rows] if within else codes.clone() for m, codes in clean.items()}
        known = {m: codes[rows] if within else codes for m, codes in clean.items()}
        mine = labels[rows]
        theirs = mine if within else labels
        runs: dict[Modality, _Run] = {
            m: _Run(inputs[m][rows], self.budgets[m], self.steps, self.optimizer, one_sided=within)
            for m in ("text", "image")
        }

        def step(modality: Modality, number: int) -> None:
            run = runs[modality]
            x = run.point()
            values = self.model.relaxed(modality, x)
            _differentiable(values, modality)
            loss = self._objective(values, right[_OTHER[modality]], known[modality], mine, theirs)
            loss = loss + self._penalty(x, run.clean)
            run.step(loss)
            losses[modality][number] += float(loss.detach()) * (len(rows) if within else 1)
            if self.alternate:
                right[modality][rows] = sign(values.detach())

        if self.alternate:
            for number in range(self.steps):
                for modality in runs:
                    step(modality, number)
        else:
            for modality in runs:
                for number in range(self.steps):
                    step(modality, number)
        for modality, run in runs.items():
            result[modality][rows] = run.result()

    def _objective(self, values: Tensor, other: Tensor, own: Tensor, mine: Tensor, theirs: Tensor) -> Tensor:
        """The two sums of J for relaxed codes `values` (n, bits) against clean ones (N, bits)."""
        scale, packed = 1.0 if self.compat else 0.5, (_packed(mine), _packed(theirs))
        values = values.to(own.dtype)
        against = own if self.single_modal else other
        if self.flip == "all":  # log(1 + e^-x) + S x is the likelihood of S at -x
            total = cast(Tensor, pairwise_nll(-values, against, packed, scale=scale))
        else:
            pushed = F.softplus(scale * values @ against.T)
            total = pushed.masked_fill(~share_label(mine, theirs), 0).sum()
        if self.intra and not self.single_modal:
            if self.keep_intra:
                kept = pairwise_nll(values, own, packed, scale=scale)
            else:
                apart = ~share_label(mine, theirs)
                kept = 2 * pairwise_squared(values, own, apart, scale=scale, positive=1.0)
            total = total + self.intra * cast(Tensor, kept)
        return total / (len(mine) * len(theirs)) if self.compat else total

    def _penalty(self, x: Tensor, clean: Tensor) -> Tensor:
        moved = (x - clean).flatten(1)
        if self.compat:
            return self.distortion * moved.abs().mean()
        if self.norm == "l2":  # its gradient at 0 is 0
            squares = moved.square().sum(dim=1)
            return self.distortion * squares[squares > 0].sqrt().sum()
        return self.distortion * torch.linalg.vector_norm(moved, ord=_P[self.norm], dim=1).sum()


class CodeAttack:
    """Moves one modality's inputs towards or away from given codes, by signed steps: DHTA's and CgAT's attacks.

    Minimises - (1 / bits) t . h~ for a target t (Bai et al. 2020, Eq. 8, with its alpha = 1), or + for away=True (Wang
    et al. 2023, CgAT's attack). Codes to aim at: `anchor_code`, `centre_codes`.

    Parameters
    ----------
    model : Hashing
        As in CMLA.
    modality : {"image", "text"}
        What is perturbed.
    eps, bounds, norm : float, (float, float), str
        Budget of an item and range of the inputs.
    steps : int
        Signed steps (DHTA: 2000; CgAT: 100 of 1/255).
    lr : float, optional
        Their size; None: a tenth of eps.
    away : bool
        Move away from the codes instead.
    relax : {"tanh", "none"}
        As in CMLA.
    batch : int
        Items at a time.
    """

    def __init__(
        self,
        model: Hashing | Sequence[Callable[[Tensor], Tensor]],
        modality: Modality = "image",
        *,
        eps: float = 8 / 255,
        bounds: tuple[float, float] = (0.0, 1.0),
        norm: Norm = "linf",
        steps: int = 100,
        lr: float | None = None,
        away: bool = False,
        relax: Literal["tanh", "none"] = "tanh",
        batch: int = 128,
    ) -> None:
        if modality not in _OTHER or norm not in _P or relax not in ("tanh", "none"):
            raise InputError(
                f"modality must be image or text, norm one of {', '.join(_P)}, relax tanh or none, got {modality!r}, "
                f"{norm!r} and {relax!r}"
            )
        self.model, self.modality, self.away = Encoders.of(model, relax), modality, away
        self.budget = Budget.checked(modality, eps, norm, bounds, lr, 0.1)
        self.steps, self.batch = steps, batch

    def __call__(self, x: Array, codes: Array) -> Array:
        """Perturb x (N, ...) with regard to codes of +-1, (N, bits) or one for all (bits,); of x's kind."""
        values, was_numpy = as_tensor(x, "x")
        inputs = self.budget.inputs(values, self.modality)
        aims = as_tensor(codes, "codes")[0].to(inputs.device, inputs.dtype)
        aims = aims.expand(len(inputs), -1) if aims.ndim == 1 else aims
        if aims.ndim != 2 or len(aims) != len(inputs):
            raise InputError(f"codes must be ({len(inputs)}, bits) or (bits,), got {tuple(aims.shape)}")
        out = inputs.clone()
        with frozen(self.model.modules):
            for rows in torch.arange(len(inputs)).split(self.batch):
                run = _Run(inputs[rows], self.budget, self.steps, "sign", one_sided=False)
                for _ in range(self.steps):
                    relaxed = self.model.relaxed(self.modality, run.point())
                    if relaxed.shape != aims[rows].shape:
                        raise InputError(f"codes must be of the model's {relaxed.shape[1]} bits, got {aims.shape[1]}")
                    _differentiable(relaxed, self.modality)
                    agreement = (relaxed * aims[rows]).sum() / aims.shape[1]
                    run.step(agreement if self.away else -agreement)
                out[rows] = run.result()
        return like_input(out.to(_dtype(x)), was_numpy)


def anchor_code(codes: Tensor) -> Tensor:
    """DHTA's anchor of a set of codes (n, bits) of +-1: each bit as most of them have it (component voting, Alg. 1).

    It has the least summed Hamming distance to the set; a bit that is even becomes 1.
    """
    if codes.ndim != 2 or not len(codes):
        raise InputError(f"codes must be (n, bits) of at least one, got {tuple(codes.shape)}")
    return sign(codes.sum(dim=0))


def centre_codes(codes: Tensor, labels: Tensor, query_labels: Tensor) -> Tensor:
    """CgAT's centre code of each query, (Q, bits) of +-1: near the codes that share a label, far from the others.

    b = sign(1/Np sum_positives b_j - 1/Nn sum_negatives b_j), the optimum of its Eq. 5 with equal weights; a query
    without positives (or negatives) has only the other sum.

    Parameters
    ----------
    codes : Tensor
        (N, bits) of +-1, with `labels` (N,) or (N, C).
    query_labels : Tensor
        (Q,) or (Q, C).
    """
    alike = share_label(query_labels, labels).to(codes.dtype)
    apart = 1 - alike
    near = alike @ codes / alike.sum(dim=1, keepdim=True).clamp(min=1)
    far = apart @ codes / apart.sum(dim=1, keepdim=True).clamp(min=1)
    return sign(near - far)


def sign(values: Tensor) -> Tensor:
    """1 where a value is >= 0, else -1: the package's codes as numbers."""
    return (values >= 0).to(values.dtype) * 2 - 1


@dataclass(frozen=True)
class Encoders:
    """Both encoders of a victim, and how their outputs become relaxed codes."""

    encode: Callable[[Modality, Tensor], Tensor]
    modules: tuple[nn.Module, ...]
    relax: str

    @classmethod
    def of(cls, model: Any, relax: str) -> "Encoders":
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
        values = self.encode(modality, x)
        if not isinstance(values, Tensor) or values.ndim != 2 or len(values) != len(x):
            seen = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
            raise InputError(f"the {modality} encoder must return ({len(x)}, bits), got {seen}")
        return values.tanh() if self.relax == "tanh" else values

    @torch.no_grad()
    def codes(self, inputs: dict[Modality, Tensor], batch: int) -> dict[Modality, Tensor]:
        """Binary codes as +-1."""
        out = {m: [sign(self.relaxed(m, part)) for part in x.split(batch)] for m, x in inputs.items()}
        codes = {m: torch.cat(parts) for m, parts in out.items()}
        widths = [c.shape[1] for c in codes.values()]
        if widths[0] != widths[1]:
            raise InputError(f"both encoders must make codes of one length, got {widths[0]} bits and {widths[1]} bits")
        return codes

    @torch.no_grad()
    def probe(self, inputs: dict[Modality, Tensor]) -> None:
        """Refuse a model whose output for an item depends on the others of its batch, or is random."""
        for modality, x in inputs.items():
            if len(x) < 2:
                continue
            beside, alone = (self.relaxed(modality, part)[:1] for part in (x[:8], torch.cat([x[:1], x[:1]])))
            apart = float((beside - alone).abs().max())
            if apart > 1e-3:
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
        if not 0 <= eps < torch.inf:
            raise InputError(f"{name}_eps must be finite and 0 or more, got {eps!r}")
        if len(bounds) != 2 or not bounds[0] < bounds[1]:
            raise InputError(f"{name}_bounds must be (low, high), got {bounds!r}")
        if lr is not None and not 0 < lr < torch.inf:
            raise InputError(f"{name}_lr must be above 0, got {lr!r}")
        return cls(float(eps), norm, (float(bounds[0]), float(bounds[1])), eps * share if lr is None else lr)

    def inputs(self, x: Tensor, name: str) -> Tensor:
        """x as floats. InputError where it is not what the budget is for."""
        if x.ndim < 2 or not (x.is_floating_point() or x.dtype == torch.uint8):
            raise InputError(f"{name} must be floats (N, ...) or uint8 pixels, got {x.dtype} {tuple(x.shape)}")
        x = x.detach()
        x = x if x.dtype == torch.float64 else x.float()
        low, high = self.bounds
        if x.numel() and not (x.isfinite().all() and float(x.min()) >= low and float(x.max()) <= high):
            raise InputError(
                f"{name} must lie in its bounds, {low:g} to {high:g}, got {float(x.min()):g} to {float(x.max()):g}"
            )
        return x


class _Run:
    """One batch's perturbation under an optimizer."""

    def __init__(self, clean: Tensor, budget: Budget, steps: int, optimizer: str, *, one_sided: bool) -> None:
        self.clean, self.budget, self.optimizer, self.one_sided = clean, budget, optimizer, one_sided
        self.noise = torch.zeros_like(clean)
        self.first, self.second = torch.zeros_like(clean), torch.zeros_like(clean)
        self.count = 0

    def point(self) -> Tensor:
        """Where the gradient is wanted."""
        self.noise.requires_grad_()
        x = self.clean + self.noise
        # the code clips inside the graph; else the noise stays where the sum is in the box
        return x.clamp(*self.budget.bounds) if self.one_sided else x

    def step(self, loss: Tensor) -> None:
        (slope,) = torch.autograd.grad(loss, self.noise)
        self.noise = self.noise.detach()
        self.count += 1
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

    def result(self) -> Tensor:
        """The perturbed items, in the box, and in the ball as their own numbers say."""
        x, p = (self.clean + self.noise).clamp(*self.budget.bounds), _P[self.budget.norm]
        margin = 1e-7
        while True:  # rounding can leave an item outside by its last bits
            moved = (x.double() - self.clean.double()).flatten(1)
            size = moved.abs() if self.budget.norm == "linf" else torch.linalg.vector_norm(moved, p, 1, keepdim=True)
            if not (size > self.budget.eps).any():
                return x
            shrink = torch.where(size > self.budget.eps, self.budget.eps * (1 - margin) / size.clamp(min=1e-300), 1.0)
            nearer = self.clean.double() + (moved * shrink).view_as(x)
            x = torch.where((shrink < 1).expand_as(moved).view_as(x), nearer.to(x.dtype), x).clamp(*self.budget.bounds)
            margin *= 4


def within(noise: Tensor, eps: float, norm: Norm) -> Tensor:
    """Noise (N, ...) projected onto the l2 or l1 ball of radius eps, item by item."""
    flat = noise.flatten(1)
    if norm == "l2":
        size = torch.linalg.vector_norm(flat, dim=1, keepdim=True)
        return (flat * (eps / size.clamp(min=1e-30)).clamp(max=1)).view_as(noise)
    # l1: soft threshold (Duchi et al. 2008, Fig. 1)
    ordered = flat.abs().sort(dim=1, descending=True).values
    excess = ordered.cumsum(dim=1) - eps
    count = torch.arange(1, flat.shape[1] + 1, device=flat.device)
    last = ((ordered * count > excess) * count).amax(dim=1, keepdim=True).clamp(min=1)
    threshold = (excess.gather(1, last - 1) / last).clamp(min=0)
    return (flat.sign() * (flat.abs() - threshold).clamp(min=0)).view_as(noise)


@contextmanager
def frozen(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Evaluation mode and parameters without gradients inside; as before outside."""
    modes = [(part, part.training) for module in modules for part in module.modules()]
    asked = [p for module in modules for p in module.parameters() if p.requires_grad]
    try:
        for module in modules:
            module.eval()
        for parameter in asked:
            parameter.requires_grad_(False)
        with torch.inference_mode(False), torch.enable_grad():
            yield
    finally:
        for part, training in modes:
            part.training = training
        for parameter in asked:
            parameter.requires_grad_(True)


def _differentiable(values: Tensor, modality: Modality) -> None:
    if not values.requires_grad:
        raise InputError(f"the {modality} codes have no gradient with respect to the input: does the model detach it?")


def _labels(labels: Array, count: int) -> Tensor:
    values = as_tensor(labels, "labels")[0]
    if values.ndim not in (1, 2) or len(values) != count or values.is_floating_point() or values.is_complex():
        raise InputError(
            f"labels must be integers ({count},), or 0 and 1 ({count}, classes), got {values.dtype} "
            f"{tuple(values.shape)}"
        )
    return values


def _packed(labels: Tensor) -> Tensor:
    return pack_codes(labels.bool()) if labels.ndim == 2 else labels.long()


def _distortion(x: Tensor, clean: Tensor, bounds: tuple[float, float]) -> float:
    moved = (x.double() - clean.double()).flatten(1) / (bounds[1] - bounds[0])
    return float(moved.square().mean(dim=1).sqrt().mean()) if len(moved) else 0.0


def _dtype(value: Any) -> torch.dtype:
    """The dtype to give back: the input's own, float32 for pixels."""
    dtype = as_tensor(value, "x")[0].dtype
    return dtype if dtype.is_floating_point else torch.float32
