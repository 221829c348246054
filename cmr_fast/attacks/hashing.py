"""CMLA, the attack on cross-modal hashing (Li et al.; NeurIPS 2019).

It perturbs images v and texts t so that their codes leave the items of the other modality that share a label, while
within their modality they stay where they were. For images, over perturbed items i and clean items j of a call,

    J = sum_ij [log(1 + e^-inter_ij) + S_ij inter_ij] + sum_ij [log(1 + e^intra_ij) - S_ij intra_ij] + sum_i |delta_i|_p

    inter_ij = 1/2 h~v_i . ht_j,    intra_ij = 1/2 h~v_i . hv_j,    |delta_i|_p <= eps,

h~ the relaxed code of the perturbed item, h the binary code of a clean one; of texts with v and t exchanged. The first
sum is the likelihood of 1 - S: it also pulls together what shares no label (flip="all", as the authors' poster and code
have it). Their author response says that only S = 1 is pushed: flip="positives", the sum over S_ij = 1 of
log(1 + e^inter). With clean codes on the right, perturbed items do not see one another, whatever the batch; which clean
items j are there matters.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from cmr_fast.attacks.codes import ORDER, Budget, Encoders, Hashing, Norm, Perturbation, check_differentiable, frozen
from cmr_fast.attacks.settings import flag, real, whole
from cmr_fast.errors import InputError
from cmr_fast.losses.dcmh import packed_labels, signs
from cmr_fast.modalities import Modality
from cmr_fast.ops import pairwise_nll, pairwise_squared
from cmr_fast.ops._tensors import as_tensor, like_input
from cmr_fast.ops.labels import label_array, share_label

Array = Any  # numpy array or torch tensor
Progress = Callable[[int], object] | None  # told after a step how many items took it
_MOST = 1e30  # of a weight
OTHER: dict[Modality, Modality] = {"image": "text", "text": "image"}


@dataclass(frozen=True)
class Perturbed:
    """What CMLA returns, and QueryAttack.

    Attributes
    ----------
    image, text : Tensor or numpy.ndarray
        The perturbed inputs, of the kind, dtype and shape of those given.
    distortion : dict
        D by modality: the mean over items of the root mean square of their perturbation, in units of the bounds'
        width. What the authors print beside every mAP.
    losses : dict
        J by modality before each step, (steps,), the mean over the items; empty of QueryAttack.
    targets : Tensor, optional
        Of a targeted attack, the label that each item was led to, as its labels are: int (N,), or uint8 (N, C). Of an
        item that bears all labels of the database, and stays, no label, or its own id.
    """

    image: Array
    text: Array
    distortion: dict[str, float]
    losses: dict[str, Tensor]
    targets: Tensor | None = None


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
        The two perturbations are updated in turn, each against the other's codes before its last step; an item's
        result then depends on its batch. False: each against the other's clean codes, as the code does.
    relax : {"tanh", "none"}
        What makes the encoder's outputs relaxed codes. "none" for outputs that are tanh's already.
    compat : {"cmla"}, optional
        The authors' code: text first, supervision from within batches of 128 (the last one overlaps), no 1/2, means
        for sums, mean |x~ - x|, perturbations of one sign in [0, eps], TensorFlow's Adam. It sets flip="all" and
        keeps intra-modal similarities.
    batch : int
        Items at a time; but for rounding the result does not depend on it, unless `alternate` or `compat` say so.
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
            "norm": (norm, tuple(ORDER)),
            "optimizer": (optimizer, ("adam", "sign")),
            "flip": (flip, ("all", "positives")),
            "relax": (relax, ("tanh", "none")),
            "compat": (compat, (None, "cmla")),
        }
        for name, (value, allowed) in choices.items():
            if value not in allowed:
                raise InputError(f"{name} must be one of {', '.join(map(str, allowed))}, got {value!r}")
        fixed = flip == "all" and keep_intra and norm == "linf" and optimizer == "adam" and intra == 1
        if compat and (alternate or single_modal or not fixed):
            raise InputError(
                "compat='cmla' is the authors' code: expected flip='all', keep_intra=True, intra=1, norm='linf', "
                "optimizer='adam' and neither alternate nor single_modal"
            )
        steps, batch = whole("steps", steps, 1), whole("batch", batch, 1)
        intra, distortion = real("intra", intra, 0, _MOST), real("distortion", distortion, 0, _MOST)
        keep_intra, single_modal = flag("keep_intra", keep_intra), flag("single_modal", single_modal)
        alternate, check = flag("alternate", alternate), flag("check", check)
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

    def __call__(self, image: Array, text: Array, labels: Array, *, progress: Progress = None) -> Perturbed:
        """Perturb pairs.

        Parameters
        ----------
        image : Tensor or numpy.ndarray
            Float (N, ...) in image_bounds; uint8 pixels come back as float32.
        text : Tensor or numpy.ndarray
            Float (N, d) in text_bounds.
        labels : Tensor or numpy.ndarray
            Class ids, integers (N,), or multi-hot rows (N, C) of 0 and 1; rows without a label share none.
        progress : callable, optional
            Called after each step with the number of items that took it, of one modality: 2 N `steps` in all.

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
        dtypes = {m: dtype_of(value) for m, value in given.items()}
        with frozen(self.model.modules):
            result = {m: x.clone() for m, x in inputs.items()}
            losses = {m: torch.zeros(self.steps, dtype=torch.float64, device=classes.device) for m in inputs}
            for m, x in inputs.items() if self.check else ():
                self.model.probe(m, x, self.budgets[m].bounds)
            clean = self.model.codes({m: x.split(self.batch) for m, x in inputs.items()})
            for rows in self._batches(len(classes)):
                self._attack(rows, inputs, clean, classes, result, losses, dtypes, progress)
        moved: dict[str, float] = {m: distortion_of(result[m], x, self.budgets[m].bounds) for m, x in inputs.items()}
        weight = max(1, sum(len(rows) for rows in self._batches(len(classes))))
        out = {m: like_input(result[m].to(dtypes[m]), as_tensor(value, m)[1]) for m, value in given.items()}
        return Perturbed(out["image"], out["text"], moved, {m: (x / weight).float().cpu() for m, x in losses.items()})

    def _batches(self, count: int) -> list[Tensor]:
        rows = list(torch.arange(count).split(self.batch))
        if self.compat and count > self.batch:
            rows[-1] = torch.arange(count - self.batch, count)
        return rows if count else []

    def _attack(
        self, rows: Tensor, inputs: dict[Modality, Tensor], clean: dict[Modality, Tensor], labels: Tensor,
        result: dict[Modality, Tensor], losses: dict[Modality, Tensor], dtypes: dict[Modality, torch.dtype],
        progress: Progress,
    ) -> None:  # fmt: skip
        within = self.compat is not None
        right: dict[Modality, Tensor] = {m: codes[rows] if within else codes.clone() for m, codes in clean.items()}
        known = {m: codes[rows] if within else codes for m, codes in clean.items()}
        mine = labels[rows]
        theirs = mine if within else labels
        runs: dict[Modality, Perturbation] = {
            m: Perturbation(inputs[m][rows], self.budgets[m], self.steps, self.optimizer, one_sided=within)
            for m in ("text", "image")
        }

        def step(modality: Modality, number: int) -> None:
            run = runs[modality]
            x = run.point()
            values = self.model.relaxed(modality, x)
            check_differentiable(values, modality)
            loss = self._objective(values, right[OTHER[modality]], known[modality], mine, theirs)
            loss = loss + self._penalty(x, run.clean)
            run.step(loss)
            losses[modality][number] += loss.detach() * (len(rows) if within else 1)
            if progress is not None:
                progress(len(rows))
            if self.alternate:
                right[modality][rows] = signs(values.detach()).to(right[modality].dtype)

        if self.alternate:
            for number in range(self.steps):
                for modality in runs:
                    step(modality, number)
        else:
            for modality in runs:
                for number in range(self.steps):
                    step(modality, number)
        for modality, run in runs.items():
            result[modality][rows] = run.result(dtypes[modality])

    def _objective(self, values: Tensor, other: Tensor, own: Tensor, mine: Tensor, theirs: Tensor) -> Tensor:
        """The two sums of J for relaxed codes `values` (n, bits) against clean ones (N, bits)."""
        scale, packed = 1.0 if self.compat else 0.5, (packed_labels(mine), packed_labels(theirs))
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
        lengths: Tensor = torch.linalg.vector_norm(moved, ord=ORDER[self.norm], dim=1)
        return self.distortion * lengths.sum()


def _labels(labels: Array, count: int) -> Tensor:
    values = as_tensor(labels, "labels")[0]
    if values.ndim not in (1, 2) or len(values) != count or values.is_floating_point() or values.is_complex():
        raise InputError(
            f"labels must be integers ({count},), or 0 and 1 ({count}, classes), got {values.dtype} "
            f"{tuple(values.shape)}"
        )
    known = torch.from_numpy(label_array(values, "labels"))
    return known if known.ndim == 2 else known.unique(return_inverse=True)[1]  # kernels take ids of 32 bits


def distortion_of(x: Tensor, clean: Tensor, bounds: tuple[float, float]) -> float:
    """The mean over items of the root mean square of x - clean, in units of the bounds' width."""
    moved = (x.double() - clean.double()).flatten(1) / (bounds[1] - bounds[0])
    return float(moved.square().mean(dim=1).sqrt().mean()) if len(moved) else 0.0


def dtype_of(value: Any) -> torch.dtype:
    """The dtype to give back: the input's own, float32 for pixels."""
    dtype = as_tensor(value, "x")[0].dtype
    return dtype if dtype.is_floating_point else torch.float32
