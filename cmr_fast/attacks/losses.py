"""What an attack raises: a loss takes outputs (B, ...) and labels (B, ...) and returns one number a sample, (B,).

Of classifiers the outputs are logits float (B, classes), the labels int (B,). Of rankings the outputs are scores float
(B, N) against a gallery of N items, the labels bool (B, N): which of them are relevant.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from cmr_fast.errors import InputError

Loss = Callable[[Tensor, Tensor], Tensor]


def ce(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross entropy, -log softmax(z)_y.

    Parameters
    ----------
    logits, labels
        Float (B, classes), int (B,).

    Returns
    -------
    Tensor
        Float (B,).
    """
    return F.cross_entropy(logits, labels, reduction="none")


def _true_and_best_other(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    own = logits.gather(1, labels[:, None])
    other = logits.scatter(1, labels[:, None], -torch.inf)
    return own[:, 0], other.amax(dim=1)


def margin(logits: Tensor, labels: Tensor) -> Tensor:
    """max_{j != y} z_j - z_y: above 0 where the sample is misclassified.

    Parameters
    ----------
    logits, labels
        Float (B, classes), int (B,).

    Returns
    -------
    Tensor
        Float (B,).

    Notes
    -----
    Carlini and Wagner 2017, f6 of section V.A, never clamped.
    """
    own, other = _true_and_best_other(logits, labels)
    return other - own


def cw(logits: Tensor, labels: Tensor, kappa: float = 50.0) -> Tensor:
    """-max(0, z_y - max_{j != y} z_j + kappa): the margin until it passes kappa, then no gradient.

    Parameters
    ----------
    logits, labels
        Float (B, classes), int (B,).
    kappa
        In units of the logits.

    Returns
    -------
    Tensor
        Float (B,).

    Notes
    -----
    Carlini and Wagner 2017, f6 of section V.A.
    """
    return margin(logits, labels).clamp(max=kappa) - kappa


def dlr(logits: Tensor, labels: Tensor) -> Tensor:
    """Difference of logits ratio: -(z_y - max_{j != y} z_j) / (z_pi1 - z_pi3).

    Does not change when the logits are shifted or scaled.

    Parameters
    ----------
    logits, labels
        Float (B, classes) of 3 classes or more, int (B,).

    Returns
    -------
    Tensor
        Float (B,).

    Raises
    ------
    InputError
        For fewer classes.

    Notes
    -----
    Croce and Hein 2020, Eq. 6.
    """
    if logits.shape[1] < 3:
        raise InputError(f"DLR needs at least 3 classes, the model has {logits.shape[1]}; use margin or ce")
    own, other = _true_and_best_other(logits, labels)
    top = logits.topk(3, dim=1).values
    return (other - own) / (top[:, 0] - top[:, 2] + 1e-12)


def dlr_targeted(logits: Tensor, labels: Tensor, targets: Tensor) -> Tensor:
    """-(z_y - z_t) / (z_pi1 - (z_pi3 + z_pi4) / 2).

    Parameters
    ----------
    logits, labels, targets
        Float (B, classes) of 4 classes or more, int (B,) each.

    Returns
    -------
    Tensor
        Float (B,).

    Raises
    ------
    InputError
        For fewer classes.

    Notes
    -----
    Croce and Hein 2020, Eq. 7.
    """
    if logits.shape[1] < 4:
        raise InputError(
            f"targeted DLR needs at least 4 classes, the model has {logits.shape[1]}; use DLR, margin or ce"
        )
    own, wanted = (logits.gather(1, which[:, None])[:, 0] for which in (labels, targets))
    top = logits.topk(4, dim=1).values
    return (wanted - own) / (top[:, 0] - (top[:, 2] + top[:, 3]) / 2 + 1e-12)


NAMED: dict[str, Loss] = {"ce": ce, "cw": cw, "margin": margin, "dlr": dlr}


def find(loss: str | Loss) -> Loss:
    """A loss by its name; what is a loss already as it is.

    Parameters
    ----------
    loss
        One of NAMED, or a callable.

    Raises
    ------
    InputError
        For anything else.
    """
    if callable(loss):
        return loss
    if not isinstance(loss, str) or loss not in NAMED:
        raise InputError(f"loss must be a callable or one of {', '.join(NAMED)}, got {loss!r}")
    return NAMED[loss]


def one_each(values: object, count: int) -> Tensor:
    """What a loss has returned, checked.

    Parameters
    ----------
    values
        Of a loss.
    count
        Samples B.

    Returns
    -------
    Tensor
        Float (B,).

    Raises
    ------
    InputError
        For anything else.
    """
    if isinstance(values, Tensor) and values.shape == (count,) and values.is_floating_point():
        return values
    seen = f"{values.dtype} {tuple(values.shape)}" if isinstance(values, Tensor) else type(values).__name__
    raise InputError(f"loss must return one value a sample, float ({count},), got {seen}")


def ranking_ce(scores: Tensor, relevant: Tensor) -> Tensor:
    """-log of the softmax mass on the relevant items.

    Parameters
    ----------
    scores, relevant
        Float (B, N), bool (B, N).

    Returns
    -------
    Tensor
        Float (B,).
    """
    return scores.logsumexp(dim=1) - scores.masked_fill(~relevant, -torch.inf).logsumexp(dim=1)


def ranking_margin(scores: Tensor, relevant: Tensor) -> Tensor:
    """The best irrelevant score less the best relevant one: above 0 where R@1 is lost.

    Parameters
    ----------
    scores, relevant
        Float (B, N), bool (B, N).

    Returns
    -------
    Tensor
        Float (B,).
    """
    best, other = _best(scores, relevant)
    return other - best


def ranking_dlr(scores: Tensor, relevant: Tensor) -> Tensor:
    """`ranking_margin` over the first score less the third, which no scale changes.

    Parameters
    ----------
    scores, relevant
        Float (B, N) against 3 items or more, bool (B, N).

    Returns
    -------
    Tensor
        Float (B,).

    Raises
    ------
    InputError
        For a smaller gallery.
    """
    if scores.shape[1] < 3:
        raise InputError(f"DLR needs a gallery of at least 3 items, got {scores.shape[1]}")
    best, other = _best(scores, relevant)
    top = scores.topk(3, dim=1).values
    return (other - best) / (top[:, 0] - top[:, 2] + 1e-12)


def _best(scores: Tensor, relevant: Tensor) -> tuple[Tensor, Tensor]:
    """The highest score of a relevant item, and that of an irrelevant one, (B,) each."""
    best = scores.masked_fill(~relevant, -torch.inf).amax(dim=1)
    return best, scores.masked_fill(relevant, -torch.inf).amax(dim=1)
