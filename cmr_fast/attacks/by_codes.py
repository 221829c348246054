"""Attacks by given codes: DHTA (Bai et al.; ECCV 2020) moves towards them, CgAT (Wang et al.; WWW 2023) away."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from cmr_fast.attacks.codes import ORDER, Budget, Encoders, Hashing, Norm, Perturbation, check_differentiable, frozen
from cmr_fast.attacks.hashing import OTHER, Perturbed, Progress, distortion_of, dtype_of
from cmr_fast.attacks.settings import flag, whole
from cmr_fast.errors import InputError
from cmr_fast.losses.dcmh import signs
from cmr_fast.modalities import MODALITIES, Modality
from cmr_fast.ops._tensors import as_seed, as_tensor, like_input
from cmr_fast.ops.labels import label_array, share_label

Array = Any  # numpy array or torch tensor
_TOGETHER = 2**24  # pairs of a query and an item of the database


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
    random_start : bool
        Begin at a point of the ball drawn by torch's generator (of linf uniformly, as CgAT), not at the item.
    relax : {"tanh", "none"}
        As in CMLA.
    batch : int
        Items at a time.
    check : bool
        As in CMLA.
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
        random_start: bool = False,
        relax: Literal["tanh", "none"] = "tanh",
        batch: int = 128,
        check: bool = True,
    ) -> None:
        if modality not in tuple(OTHER) or norm not in tuple(ORDER) or relax not in ("tanh", "none"):
            raise InputError(
                f"modality must be image or text, norm one of {', '.join(ORDER)}, relax tanh or none, got "
                f"{modality!r}, {norm!r} and {relax!r}"
            )
        self.model, self.modality, self.away = Encoders.of(model, relax), modality, flag("away", away)
        self.random_start, self.check = flag("random_start", random_start), flag("check", check)
        self.budget = Budget.checked(modality, eps, norm, bounds, lr, 0.1)
        self.steps, self.batch = whole("steps", steps, 1), whole("batch", batch, 1)

    def __call__(self, x: Array, codes: Array, *, progress: Progress = None) -> Array:
        """Perturb x (N, ...) with regard to codes of +-1, (N, bits) or one for all (bits,); of x's kind.

        progress: as in CMLA.
        """
        values, was_numpy = as_tensor(x, "x")
        inputs = self.budget.inputs(values, self.modality)
        aims = _check_codes(as_tensor(codes, "codes")[0]).to(inputs.device, inputs.dtype)
        aims = aims.expand(len(inputs), -1) if aims.ndim == 1 else aims
        if aims.ndim != 2 or len(aims) != len(inputs):
            raise InputError(f"codes must be ({len(inputs)}, bits) or (bits,), got {tuple(aims.shape)}")
        with frozen(self.model.modules):
            out = inputs.clone()
            if self.check:
                self.model.probe(self.modality, inputs, self.budget.bounds)
            for rows in torch.arange(len(inputs)).split(self.batch):
                run = Perturbation(inputs[rows], self.budget, self.steps, "sign", one_sided=False)
                if self.random_start:
                    run.scatter()
                for _ in range(self.steps):
                    relaxed = self.model.relaxed(self.modality, run.point())
                    if relaxed.shape != aims[rows].shape:
                        raise InputError(f"codes must be of the model's {relaxed.shape[1]} bits, got {aims.shape[1]}")
                    check_differentiable(relaxed, self.modality)
                    agreement = (relaxed * aims[rows]).sum() / aims.shape[1]
                    run.step(agreement if self.away else -agreement)
                    if progress is not None:
                        progress(len(rows))
                out[rows] = run.result(dtype_of(x))
        return like_input(out.to(dtype_of(x)), was_numpy)


class QueryAttack:
    """CgAT's and DHTA's attack of pairs that are queries: each modality by codes of the other modality's database.

    Untargeted, away from the centre codes of what shares a label (Wang et al. 2023). Targeted, towards the anchor of
    `voters` items that bear another label (Bai et al. 2020, n_t = 9), a label that is drawn for each query from those
    that it does not bear; queries of one label have one anchor. Retrieval of that label is what t-mAP measures. A query
    that bears all labels of the database stays.

    Parameters
    ----------
    model : Hashing
        As in CMLA.
    image, text : Tensor or numpy.ndarray
        The database (N, ...), whose codes queries are moved by.
    labels : Tensor or numpy.ndarray
        Of the database, as in CMLA.
    targeted : bool
        DHTA's attack, else CgAT's.
    image_eps, text_eps, image_bounds, text_bounds
        As in CMLA.
    steps : int
        Signed steps of a tenth of eps, CgAT's from a random point of the ball.
    voters : int
        Items of an anchor.
    seed : int
        Of labels, voters and random points.
    batch : int
        Items at a time.

    Raises
    ------
    InputError
        As of CMLA, and for image, text and labels of several lengths.
    """

    def __init__(
        self,
        model: Hashing | Sequence[Callable[[Tensor], Tensor]],
        image: Array,
        text: Array,
        labels: Array,
        *,
        targeted: bool = False,
        image_eps: float = 10 / 255,
        text_eps: float = 0.01,
        image_bounds: tuple[float, float] = (0.0, 1.0),
        text_bounds: tuple[float, float] = (0.0, 1.0),
        steps: int = 100,
        voters: int = 9,
        seed: int = 0,
        batch: int = 128,
    ) -> None:
        self.targeted, self.steps, self.voters = flag("targeted", targeted), steps, whole("voters", voters, 1)
        self.seed, self.batch = as_seed(seed), batch
        self._attacks: dict[Modality, CodeAttack] = {
            m: CodeAttack(
                model, m, eps=eps, bounds=bounds, steps=steps, away=not targeted, random_start=not targeted, batch=batch
            )
            for m, eps, bounds in zip(MODALITIES, (image_eps, text_eps), (image_bounds, text_bounds), strict=True)
        }
        self.model = self._attacks["image"].model
        self._labels = torch.from_numpy(label_array(as_tensor(labels, "labels")[0], "labels"))
        _check_one_length(image, text, self._labels)
        given: dict[Modality, Array] = {"image": image, "text": text}
        batches = {  # pixels become floats a batch at a time
            m: map(partial(attack.budget.inputs, name=m), as_tensor(given[m], m)[0].split(batch))
            for m, attack in self._attacks.items()
        }
        with frozen(self.model.modules):
            self._codes = self.model.codes(batches)

    def __call__(self, image: Array, text: Array, labels: Array, *, progress: Progress = None) -> Perturbed:
        """Perturb pairs (N, ...) with `labels` of the database's kind. InputError as of CMLA, and of other labels.

        progress: as in CMLA.
        """
        asked = torch.from_numpy(label_array(as_tensor(labels, "labels")[0], "labels"))
        if asked.shape[1:] != self._labels.shape[1:]:
            raise InputError(
                f"labels must be of the database's kind, {tuple(self._labels.shape)}, got {tuple(asked.shape)}"
            )
        _check_one_length(image, text, asked)
        generator = torch.Generator().manual_seed(self.seed)
        targets, led = self._targets(asked, generator) if self.targeted else (None, torch.arange(len(asked)))
        given: dict[Modality, Array] = {"image": image, "text": text}
        moved: dict[Modality, Array] = {}
        distortion: dict[str, float] = {}
        devices = torch.cuda.device_count() if torch.cuda.is_available() else 0  # manual_seed seeds them too
        with torch.random.fork_rng(devices=range(devices)):
            torch.manual_seed(self.seed)
            for m, attack in self._attacks.items():
                codes = self._codes[OTHER[m]].float()
                if targets is None:
                    aims = centre_codes(codes, self._labels, asked)
                else:
                    aims = self._anchors(codes, targets[led], generator)
                clean = attack.budget.inputs(as_tensor(given[m], m)[0], m)
                result = clean.clone()
                result[led] = attack(clean[led], aims, progress=progress)
                distortion[m] = distortion_of(result, clean, attack.budget.bounds)
                moved[m] = like_input(result.to(dtype_of(given[m])), as_tensor(given[m], m)[1])
        return Perturbed(moved["image"], moved["text"], distortion, {}, targets)

    def _targets(self, labels: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """A label of each that the database has and the item does not, its own where there is none; who has one."""
        if labels.ndim == 1:
            classes = self._labels.unique()
            free = classes != labels[:, None]
        else:
            classes = torch.arange(labels.shape[1])
            free = (labels == 0) & (self._labels != 0).any(dim=0)
        led = free.any(dim=1)
        if len(labels) and not bool(led.any()):
            raise InputError(
                "a targeted attack needs items in the database of a label that a query does not bear; got none for "
                f"any of {len(labels)} queries"
            )
        drawn = torch.multinomial(torch.where(led[:, None], free, True).double(), 1, generator=generator)[:, 0]
        rows = led.nonzero()[:, 0]
        if labels.ndim == 1:
            return torch.where(led, torch.take(classes, drawn), labels), rows
        one_hot: Tensor = F.one_hot(drawn, labels.shape[1]) * led[:, None]
        return one_hot.to(torch.uint8), rows

    def _anchors(self, codes: Tensor, targets: Tensor, generator: torch.Generator) -> Tensor:
        """The anchor code of each target, of `voters` items drawn for it."""
        kinds, of = targets.unique(dim=0, return_inverse=True)
        anchors = []
        for target in kinds:
            bears = self._labels == target if target.ndim == 0 else ((self._labels != 0) & (target != 0)).any(dim=1)
            rows = bears.nonzero()[:, 0]
            voters = rows[torch.randperm(len(rows), generator=generator)[: self.voters]]
            anchors.append(anchor_code(codes[voters]))
        return torch.stack(anchors)[of] if anchors else codes[:0]


def anchor_code(codes: Array) -> Array:
    """DHTA's anchor of a set of codes (n, bits) of +-1: each bit as most of them have it (component voting, Alg. 1).

    It has the least summed Hamming distance to the set; a bit that is even becomes 1. InputError for other codes.
    """
    values, was_numpy = as_tensor(codes, "codes")
    if values.ndim != 2 or not len(values):
        raise InputError(f"codes must be (n, bits) of at least one, got {tuple(values.shape)}")
    return like_input(signs(_check_codes(values).sum(dim=0)).to(values.dtype), was_numpy)


def centre_codes(codes: Array, labels: Array, query_labels: Array) -> Array:
    """CgAT's centre code of each query, (Q, bits) of +-1: near the codes that share a label, far from the others.

    b = sign(1/Np sum_positives b_j - 1/Nn sum_negatives b_j), the optimum of its Eq. 5 with equal weights; a query
    without positives (or negatives) has only the other sum.

    Parameters
    ----------
    codes : Tensor or numpy.ndarray
        (N, bits) of +-1, with `labels` (N,) or (N, C).
    query_labels : Tensor or numpy.ndarray
        (Q,) or (Q, C), of the same kind.

    Raises
    ------
    InputError
        For other codes, and labels of two kinds, another count or values that are no labels.
    """
    values, was_numpy = as_tensor(codes, "codes")
    if values.ndim != 2:
        raise InputError(f"codes must be (N, bits), got {tuple(values.shape)}")
    given = {"labels": labels, "query_labels": query_labels}
    base, asked = (torch.from_numpy(label_array(x, name)).to(values.device) for name, x in given.items())
    if len(base) != len(values) or base.shape[1:] != asked.shape[1:]:
        raise InputError(
            f"labels and query_labels must be ({len(values)},) and (Q,) class ids, or ({len(values)}, C) and (Q, C) "
            f"multi-hot, got {tuple(base.shape)} and {tuple(asked.shape)}"
        )
    floats = _check_codes(values).to(torch.promote_types(values.dtype, torch.float32))
    rows = max(1, _TOGETHER // max(1, len(base)))
    return like_input(torch.cat([centres(floats, base, part) for part in asked.split(rows)]), was_numpy)


def centres(codes: Tensor, labels: Tensor, query_labels: Tensor) -> Tensor:
    """`centre_codes` of what is known to fit: floats, and labels of one kind."""
    alike = share_label(query_labels, labels).to(codes.dtype)
    apart = 1 - alike
    near = alike @ codes / alike.sum(dim=1, keepdim=True).clamp(min=1)
    far = apart @ codes / apart.sum(dim=1, keepdim=True).clamp(min=1)
    return signs(near - far)


def _check_one_length(image: Array, text: Array, labels: Tensor) -> None:
    if not len(image) == len(text) == len(labels):
        raise InputError(
            f"image, text and labels must be of one length, got {len(image)}, {len(text)} and {len(labels)}"
        )


def _check_codes(codes: Tensor) -> Tensor:
    if codes.dtype == torch.bool or not bool((codes.abs() == 1).all()):
        raise InputError(f"codes must be -1 and 1, got {codes.dtype} with other values; bits b are codes 2 b - 1")
    return codes
