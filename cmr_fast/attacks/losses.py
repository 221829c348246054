"""What an attack raises: a loss takes outputs (B, ...) and labels (B, ...) and returns one number a sample, (B,)."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from cmr_fast.errors import InputError

Loss = Callable[[Tensor, Tensor], Tensor]


def ce(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross entropy, -log softmax(z)_y."""
    return F.cross_entropy(logits, labels, reduction="none")


def _true_and_best_other(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    own = logits.gather(1, labels[:, None])
    other = logits.scatter(1, labels[:, None], -torch.inf)
    return own[:, 0], other.amax(dim=1)


def margin(logits: Tensor, labels: Tensor) -> Tensor:
    """max_{j != y} z_j - z_y: above 0 where the sample is misclassified. Carlini and Wagner's f6, never clamped."""
    own, other = _true_and_best_other(logits, labels)
    return other - own


def cw(logits: Tensor, labels: Tensor, kappa: float = 50.0) -> Tensor:
    """-max(0, z_y - max_{j != y} z_j + kappa): the margin until it passes kappa, then no gradient."""
    return margin(logits, labels).clamp(max=kappa) - kappa


def dlr(logits: Tensor, labels: Tensor) -> Tensor:
    """Difference of logits ratio (Croce and Hein 2020, Eq. 6): -(z_y - max_{j != y} z_j) / (z_pi1 - z_pi3).

    Does not change when the logits are shifted or scaled. Needs three classes.
    """
    if logits.shape[1] < 3:
        raise InputError(f"DLR needs at least 3 classes, the model has {logits.shape[1]}; use margin or ce")
    own, other = _true_and_best_other(logits, labels)
    top = logits.topk(3, dim=1).values
    return (other - own) / (top[:, 0] - top[:, 2] + 1e-12)


def dlr_targeted(logits: Tensor, labels: Tensor, targets: Tensor) -> Tensor:
    """-(z_y - z_t) / (z_pi1 - (z_pi3 + z_pi4) / 2) (Croce and Hein 2020, Eq. 7). Needs four classes."""
    if logits.shape[1] < 4:
        raise InputError(
            f"targeted DLR needs at least 4 classes, the model has {logits.shape[1]}; use DLR, margin or ce"
        )
    own, wanted = (logits.gather(1, which[:, None])[:, 0] for which in (labels, targets))
    top = logits.topk(4, dim=1).values
    return (wanted - own) / (top[:, 0] - (top[:, 2] + top[:, 3]) / 2 + 1e-12)


NAMED: dict[str, Loss] = {"ce": ce, "cw": cw, "margin": margin, "dlr": dlr}


def find(loss: str | Loss) -> Loss:
    if callable(loss):
        return loss
    if loss not in NAMED:
        raise InputError(f"loss must be a callable or one of {', '.join(NAMED)}, got {loss!r}")
    return NAMED[loss]
