"""Checks whether a robust accuracy is real, or the model hides its gradient.

After Athalye et al. 2018, Carlini et al. 2019, and AutoAttack's own warnings (Croce and Hein 2020).

Each check is a function of a model, inputs and labels and returns a Finding; `masking` runs them all. A finding that is
`suspicious` says that an attack which follows the gradient overstates this model's robustness, not that the model is
weak; one that is not proves nothing by itself.

They share these parameters: `model`, `x` (B, ...) and `y` int (B,) as of an attack, and `options` as of PGD (norm,
bounds, normalize, dtype, seed, progress, ...). Bad ones raise InputError, as does a batch of no samples.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Unpack

import torch
from torch import Tensor

from cmr_fast.attacks.base import Attack, Labels, Options
from cmr_fast.attacks.pgd import PGD
from cmr_fast.attacks.search import LocalSearch
from cmr_fast.attacks.settings import real, whole
from cmr_fast.attacks.transfer import Transfer
from cmr_fast.attacks.victim import Model, widened
from cmr_fast.errors import InputError
from cmr_fast.ops.pgd import Value

SLACK = 0.002  # a share of accuracy that counts as nothing, AutoAttack's 0.2 points


@dataclass(frozen=True)
class Finding:
    """What one check says.

    Attributes
    ----------
    name
        Of the check.
    suspicious
        Whether an attack that follows the gradient would overstate the model.
    words
        Why, in one sentence.
    numbers
        Those behind it, by name.
    """

    name: str
    suspicious: bool
    words: str
    numbers: dict[str, float]

    def __str__(self) -> str:
        return f"{'SUSPICIOUS' if self.suspicious else 'fine'}: {self.name}: {self.words}"


def random_output(model: Model, x: Any, y: Labels, *, passes: int = 3, **options: Unpack[Options]) -> Finding:
    """Several passes over the same input must agree: else average over passes in the attack (EoT).

    Parameters
    ----------
    model, x, y, options
        As above.
    passes
        How many, 2 or more.

    Returns
    -------
    Finding
        `apart`, the largest difference as a share of the outputs' size, and `changed`, the share of other answers.
    """
    passes = whole("passes", passes, 2)
    atk, images, _ = _attacked(model, x, y, options)
    with atk.victim.prepare(images) as victim:
        outputs = torch.stack([victim.scores(images) for _ in range(passes)])
    apart = float((outputs - outputs[0]).abs().max() / outputs.abs().max().clamp(min=1e-30))
    changed = float((outputs.argmax(2) != outputs[0].argmax(1)).any(0).float().mean())
    words = f"{passes} passes differ by {apart:.2g} of the outputs' size and change {changed:.1%} of the answers"
    return Finding("random output", apart > 1e-4, words, {"apart": apart, "changed": changed})


def softmax_given(model: Model, x: Any, y: Labels, **options: Unpack[Options]) -> Finding:
    """Logits are wanted, not probabilities: a second softmax flattens the loss, and DLR is then another ratio.

    Parameters
    ----------
    model, x, y, options
        As above.

    Returns
    -------
    Finding
        `least`, the least output, and `sum_off`, how far from 1 the outputs' sums are at most.
    """
    atk, images, _ = _attacked(model, x, y, options)
    with atk.victim.prepare(images) as victim:
        outputs = victim.scores(images)
    total = float((outputs.sum(1) - 1).abs().max())
    given = bool((outputs >= 0).all()) and total < 1e-3
    words = "outputs are at least 0 and sum to 1: hand over logits" if given else "outputs are no probabilities"
    return Finding("softmax given", given, words, {"least": float(outputs.min()), "sum_off": total})


def zero_gradient(model: Model, x: Any, y: Labels, *, most: float = 0.05, **options: Unpack[Options]) -> Finding:
    """Cross entropy must have a gradient at samples that the model has right.

    Parameters
    ----------
    model, x, y, options
        As above.
    most
        The share of them that may have none.

    Returns
    -------
    Finding
        `share`, that of the samples classified right whose gradient is zero.
    """
    atk, images, labels = _attacked(model, x, y, options)
    with atk.victim.prepare(images) as victim:
        outputs, _, gradient = victim.gradient(widened(images).clone(), atk.loss, labels.clone())
    most, right = real("most", most, 0.0, 1.0), outputs.argmax(1) == labels
    zero = (gradient.flatten(1) == 0).all(1)
    share = float(zero[right].float().mean()) if bool(right.any()) else 0.0
    words = f"{share:.1%} of the samples classified right have a gradient of zero, {most:.0%} may"
    if not bool(right.any()):
        words = "not tested: no sample is classified right"
    return Finding("zero gradient", share > most, words, {"share": share})


def large_eps(
    model: Model, x: Any, y: Labels, *, eps: Sequence[float] | None = None, steps: int = 40, **options: Unpack[Options]
) -> Finding:
    """PGD in ever larger balls, at last the whole box, must bring accuracy down to 0.

    Parameters
    ----------
    model, x, y, options
        As above.
    eps
        The radii, ascending; None: 1/64, 1/16, 1/4 and all of the width of the bounds.
    steps
        Of PGD, eps / 4 each.

    Returns
    -------
    Finding
        Accuracy by radius.
    """
    low, high = (torch.as_tensor(v, dtype=torch.float64) for v in options.get("bounds", (0.0, 1.0)))
    width = float((high - low).max())
    sweep = [width * part for part in (1 / 64, 1 / 16, 1 / 4, 1)] if eps is None else _several("eps", eps)
    left = [accuracy(PGD(model, e, None, steps, **_unchecked(options)), x, y) for e in sweep]
    rises = any(b > a + SLACK for a, b in pairwise(left))
    words = "accuracy " + ", ".join(f"{a:.1%} at eps {e:.3g}" for e, a in zip(sweep, left, strict=True))
    words += ": it must fall to 0" + (" and never rise" if rises else "")
    numbers = {f"{e:.6g}": a for e, a in zip(sweep, left, strict=True)}
    return Finding("large eps", left[-1] > SLACK or rises, words, numbers)


def black_box(
    model: Model,
    x: Any,
    y: Labels,
    *,
    eps: Value = 8 / 255,
    steps: int = 20,
    surrogate: Model | None = None,
    attacks: Sequence[Attack] | None = None,
    **options: Unpack[Options],
) -> Finding:
    """An attack that sees no gradient must not find more than PGD, which does.

    Parameters
    ----------
    model, x, y, options
        As above.
    eps, steps
        Of PGD, with steps of eps / 4.
    surrogate
        A second model to craft on; its PGD is one of the attacks.
    attacks
        More that need no gradient of the model; None: a local search in the same ball, which is L-inf.

    Returns
    -------
    Finding
        Accuracy under PGD and under each attack.

    Raises
    ------
    InputError
        Without a surrogate or an attack.
    """
    white = accuracy(PGD(model, eps, None, steps, **_unchecked(options)), x, y)
    left: dict[str, float] = {}
    if attacks is None:
        kept: Options = {**options, "check": False}
        attacks = [LocalSearch(model, eps, 20, **kept)] if options.get("norm", "linf") == "linf" else []
    if not isinstance(attacks, (list, tuple)) or not all(isinstance(atk, (Attack, Transfer)) for atk in attacks):
        raise InputError(f"attacks must be a list of attacks on the model, got {attacks!r}")
    for atk in attacks:
        kind = type(atk).__name__
        same = sum(type(other) is type(atk) for other in attacks)
        number = sum(name.startswith(f"{kind} ") for name in left) + 1
        left[f"{kind} {number}" if same > 1 or kind == "PGD" else kind] = accuracy(atk, x, y)
    if surrogate is not None:
        transfer = Transfer(model, surrogate, eps=eps, alpha=None, steps=steps, **_unchecked(options))
        left["Transfer"] = accuracy(transfer, x, y)
    if not left:
        raise InputError("a black-box check needs a surrogate or attacks; the local search has an L-inf ball only")
    name = min(left, key=lambda n: left[n])
    words = f"accuracy {white:.1%} under PGD-{steps}, {left[name]:.1%} under {name}, which sees no gradient"
    return Finding("black box", left[name] < white - SLACK, words, {"PGD": white, **left})


def more_steps(
    model: Model,
    x: Any,
    y: Labels,
    *,
    eps: Value = 8 / 255,
    steps: Sequence[int] = (1, 10, 50),
    **options: Unpack[Options],
) -> Finding:
    """More steps of the same attack from the same start must not be weaker.

    Parameters
    ----------
    model, x, y, options
        As above.
    eps
        Of PGD, with steps of eps / 4.
    steps
        How many, ascending.

    Returns
    -------
    Finding
        Accuracy by the number of steps.
    """
    steps = _several("steps", steps)
    left = [accuracy(PGD(model, eps, None, count, **_unchecked(options)), x, y) for count in steps]
    weaker = any(b > a + SLACK for a, b in pairwise(left))
    words = "accuracy " + ", ".join(f"{a:.1%} after {count}" for count, a in zip(steps, left, strict=True))
    numbers = {str(count): a for count, a in zip(steps, left, strict=True)}
    return Finding("more steps", weaker, words + (": it rises" if weaker else ""), numbers)


def plateau(
    model: Model,
    x: Any,
    y: Labels,
    *,
    eps: Value = 8 / 255,
    steps: int = 100,
    most: float = 0.05,
    **options: Unpack[Options],
) -> Finding:
    """The loss must rise with the steps and then stop rising: else the attack needs more of them, or sees nothing.

    Parameters
    ----------
    model, x, y, options
        As above.
    eps, steps
        Of PGD, with steps of eps / 4.
    most
        The share of the whole rise that may lie in the last fifth of the steps.

    Returns
    -------
    Finding
        `first` and `last`, mean losses, and `tail`, that share.
    """
    steps, most = whole("steps", steps, 2), real("most", most, 0.0, 1.0)
    atk = PGD(model, eps, None, steps, **_unchecked(options))
    curve = atk(x, y, return_info=True)[1].losses.double().mean(dim=1)
    if not len(curve):
        raise InputError(f"a loss against the step needs an eps above 0, got {eps}")
    rise = float(curve[-1] - curve[0])
    tail = float(curve[-1] - curve[-1 - steps // 5])
    share = tail / rise if rise > 0 else 1.0
    flat = rise <= 1e-6 * max(abs(float(curve[0])), 1e-6)
    if flat:
        words = f"the loss does not rise in {steps} steps ({float(curve[0]):.4g} to {float(curve[-1]):.4g})"
    else:
        words = f"{share:.1%} of the rise lies in the last fifth of {steps} steps, {most:.0%} may"
    numbers = {"first": float(curve[0]), "last": float(curve[-1]), "tail": share}
    return Finding("loss against step", flat or share > most, words, numbers)


def masking(
    model: Model,
    x: Any,
    y: Labels,
    *,
    eps: Value = 8 / 255,
    surrogate: Model | None = None,
    **options: Unpack[Options],
) -> list[Finding]:
    """Every check.

    Parameters
    ----------
    model, x, y, options
        As above.
    eps
        Radius for the checks that attack.
    surrogate
        As of `black_box`.

    Returns
    -------
    list of Finding
        Seven.
    """
    return [
        random_output(model, x, y, **options),
        softmax_given(model, x, y, **options),
        zero_gradient(model, x, y, **options),
        large_eps(model, x, y, **options),
        black_box(model, x, y, eps=eps, surrogate=surrogate, **options),
        more_steps(model, x, y, eps=eps, **options),
        plateau(model, x, y, eps=eps, **options),
    ]


def accuracy(attack: Attack | Transfer, x: Any, y: Labels) -> float:
    """The share of samples that are classified right after the attack.

    Parameters
    ----------
    attack
        Of a classifier.
    x, y
        As of its calls.

    Returns
    -------
    float
        From 0 to 1.
    """
    success = attack(x, y, return_info=True)[1].success
    if success is None or not len(success):
        raise InputError("accuracy needs a classifier and at least one sample")
    return 1 - float(success.double().mean())


def _several(name: str, values: Any) -> list[Any]:
    """One value or more, each of which the attack checks."""
    try:
        result = [] if isinstance(values, (str, bytes)) else list(values)
    except TypeError:
        result = []
    if not result:
        raise InputError(f"{name} must be a list of one or more, got {values!r}")
    return result


def _unchecked(options: Options) -> Options:
    """A model that is random is a finding here, not an error."""
    return {"check": False, **options}


def _attacked(model: Model, x: Any, y: Labels, options: Options) -> tuple[PGD, Tensor, Tensor]:
    """An attack, and the samples as it takes them."""
    atk = PGD(model, **_unchecked(options))
    images, labels, _ = atk.checked(x, y)
    if not len(images):
        raise InputError("a check needs at least one sample")
    return atk, images, labels
