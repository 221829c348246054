"""Attacks on retrieval: a query image is moved so that what is relevant to it leaves the first K of the ranking.

    z_j = scale cos(f(x), g_j)                     scores against a gallery of N embeddings g, scale 100 as CLIP's
    ce  = -log sum_{j relevant} softmax(z)_j       all relevant items are positives (captions of one image, say)

With these scores in place of logits the attacks on classifiers work on rankings, APGD and DLR too. Recall@K of a query
is 1 where any relevant item is among its first K; over attacks a query keeps its worst.
"""

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Unpack

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cmr_fast.attacks import registry
from cmr_fast.attacks.base import Attack, Options
from cmr_fast.attacks.losses import ranking_ce, ranking_dlr, ranking_margin
from cmr_fast.attacks.settings import flag, real, whole
from cmr_fast.attacks.transfer import Transfer
from cmr_fast.attacks.victim import Victim
from cmr_fast.errors import InputError
from cmr_fast.ops._tensors import check_float
from cmr_fast.ops.pgd import Value

__all__ = [
    "Ranker", "RecallUnderAttack", "missed", "ranking_ce", "ranking_dlr", "ranking_margin", "recall_under_attack",
]  # fmt: skip

Encoder = Callable[[Tensor], Tensor]
AttackOf = Callable[..., Attack | Transfer | None]


def missed(scores: Tensor, relevant: Tensor) -> Tensor:
    """Whether the first item is not relevant; equal scores rank by index.

    Parameters
    ----------
    scores, relevant
        Float (B, N), bool (B, N).

    Returns
    -------
    Tensor
        bool (B,).
    """
    return ~relevant.gather(1, scores.argmax(dim=1, keepdim=True))[:, 0]


class Ranker(nn.Module):
    """Inputs -> scores against a gallery, float (B, N): what the attacks see in place of a classifier's logits.

    Parameters
    ----------
    encode
        Inputs -> embeddings (B, d).
    gallery
        Float (N, d), of the other modality.
    scale
        Of the cosines.
    codes
        Embeddings are relaxed codes: their tanh is compared with the gallery's signs, scaled like a cosine.

    Raises
    ------
    InputError
        For arguments of the wrong kind; when called, for embeddings that are not as wide as the gallery.
    """

    def __init__(self, encode: Encoder, gallery: Tensor, *, scale: float = 100.0, codes: bool = False) -> None:
        super().__init__()
        if not callable(encode):
            raise InputError(f"encode must be a function of inputs that returns embeddings, got {encode!r}")
        if not isinstance(gallery, Tensor) or not gallery.is_floating_point() or gallery.ndim != 2:
            seen = f"{gallery.dtype} {tuple(gallery.shape)}" if isinstance(gallery, Tensor) else type(gallery).__name__
            raise InputError(f"gallery must be floats (N, d), got {seen}")
        check_float(gallery, "gallery")
        self.encode, self.scale = encode, real("scale", scale, 0.0, 1e30, above=True)
        self.codes = flag("codes", codes)
        signs = torch.where(gallery >= 0, 1.0, -1.0)
        self.register_buffer("gallery", F.normalize(signs if codes else gallery.float(), dim=1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Scores (B, N), which have a gradient.

        Parameters
        ----------
        x
            Inputs (B, ...).
        """
        embedded, gallery = self._embedded(x), self.get_buffer("gallery")
        unit = embedded.tanh() / embedded.shape[1] ** 0.5 if self.codes else F.normalize(embedded, dim=1)
        return torch.mm(self.scale * unit, gallery.T)

    def _embedded(self, x: Tensor) -> Tensor:
        result, width = self.encode(x), self.get_buffer("gallery").shape[1]
        if not isinstance(result, Tensor) or result.shape != (len(x), width):
            seen = tuple(result.shape) if isinstance(result, Tensor) else type(result).__name__
            raise InputError(f"encode must return ({len(x)}, {width}), as wide as the gallery, got {seen}")
        return result.float()

    @torch.no_grad()
    def exact(self, x: Tensor) -> Tensor:
        """The scores that a search goes by: of codes, those of their signs.

        Parameters
        ----------
        x
            Inputs (B, ...).

        Returns
        -------
        Tensor
            float32 (B, N).
        """
        if not self.codes:
            return self(x)  # type: ignore[no-any-return]  # of nn.Module.__call__
        signs = torch.where(self._embedded(x) >= 0, 1.0, -1.0)
        return torch.mm(self.scale * (signs / signs.shape[1] ** 0.5), self.get_buffer("gallery").T)


@dataclass(frozen=True)
class RecallUnderAttack:
    """R@K by attack, shares from 0 to 1, and what is left of each query at its worst.

    Attributes
    ----------
    clean, by_attack
        {K: R@K}, and the same by the attack's name.
    worst
        {K: R@K} where a query counts only if it survives every attack.
    success
        {K: share of the queries right before that some attack made wrong} (SGA's ASR).
    drop
        {K: clean R@K less the worst} (Co-Attack's ASR).
    hits
        {name: bool (Q, K's)}, "clean" among them.
    gallery
        How many items are ranked.
    """

    clean: dict[int, float]
    by_attack: dict[str, dict[int, float]]
    worst: dict[int, float]
    success: dict[int, float]
    drop: dict[int, float]
    hits: dict[str, Tensor] = field(repr=False)
    gallery: int

    def rows(self) -> list[tuple[str, dict[int, float]]]:
        """Name and R@K, clean first and the worst case last."""
        return [("clean", self.clean), *self.by_attack.items(), ("worst case of a query", self.worst)]


def recall_under_attack(
    encode: Encoder,
    x: Tensor,
    gallery: Tensor,
    relevant: Tensor,
    *,
    k: Sequence[int] = (1, 5, 10),
    eps: Value = 8 / 255,
    attacks: Sequence[str] | Mapping[str, AttackOf] | None = None,
    restarts: int = 1,
    codes: bool = False,
    scale: float = 100.0,
    batch: int = 64,
    surrogate: Encoder | None = None,
    **options: Unpack[Options],
) -> RecallUnderAttack:
    """R@K of queries against a clean gallery, before and under attack.

    Every query is attacked to the end, those that are wrong at first too, and the highest loss is kept.

    Parameters
    ----------
    encode
        x -> embeddings (B, d), or relaxed codes (B, bits) where `codes`; a module is attacked in evaluation mode.
    x
        Queries, float (Q, ...), within `bounds`.
    gallery
        Float (N, d).
    relevant
        bool (Q, N): which items of the gallery belong to a query; several may.
    k
        Each K from 1 to N.
    eps
        Radius of the ball, in the units of x.
    attacks
        Names as of `registry.read`, or name -> function of (model, eps=, seed=, ...) that makes an attack. None: those
        of registry.STANDARD_RANKING that a gallery of this size allows.
    restarts
        Runs of each attack, with other random starts; a query keeps its worst.
    codes, scale
        As of Ranker.
    batch
        Queries a forward pass.
    surrogate
        A Ranker that the transfer attacks are crafted on.
    options
        bounds, normalize, norm, dtype, seed, ...: as of PGD; restart r takes seed + r.

    Returns
    -------
    RecallUnderAttack
        Clean, by attack, and at the worst.

    Raises
    ------
    InputError
        For shapes and types that do not go together, k out of range, unknown attacks, and queries without a relevant
        item or with none but relevant ones.
    """
    _check(x, gallery, relevant, k, flag("codes", codes))
    restarts, batch = whole("restarts", restarts, 1), whole("batch", batch, 1)
    seed = whole("seed", options.pop("seed", 0), 0, 2**63)
    makers = _makers(attacks, len(gallery), surrogate)
    model = Ranker(encode, gallery, scale=scale, codes=codes)
    normalize = options.get("normalize")
    hits = {"clean": _hits(model, x, relevant, k, None, batch, normalize)}
    for name, (make, several) in makers.items():
        for restart in range(restarts * several):
            # no success: an attack that is content once R@1 is lost would say nothing of R@K
            atk = make(model, eps=eps, seed=seed + restart, **options)
            left = _hits(model, x, relevant, k, atk, batch, normalize)
            hits[name] = hits[name] & left if name in hits else left
    before = hits["clean"]
    survived = torch.stack(list(hits.values())).all(dim=0)
    recalls = {name: dict(zip(k, mask.double().mean(dim=0).tolist(), strict=True)) for name, mask in hits.items()}
    worst = dict(zip(k, survived.double().mean(dim=0).tolist(), strict=True))
    success = {
        n: float((before & ~survived)[:, i].double().sum() / before[:, i].double().sum().clamp(min=1))
        for i, n in enumerate(k)
    }
    clean = recalls.pop("clean")
    drop = {n: clean[n] - worst[n] for n in k}
    return RecallUnderAttack(clean, recalls, worst, success, drop, hits, len(gallery))


def _check(x: Tensor, gallery: Tensor, relevant: Tensor, k: Sequence[int], codes: bool) -> None:
    for name, value in (("x", x), ("gallery", gallery), ("relevant", relevant)):
        if not isinstance(value, Tensor):
            raise InputError(f"{name} must be a torch tensor, got {type(value).__name__}")
        check_float(value, name)
    if not gallery.is_floating_point() or gallery.ndim != 2 or not bool(gallery.isfinite().all()):
        raise InputError(
            f"gallery must be finite floats (N, d) (of codes their values, not packed), got {gallery.dtype} "
            f"{tuple(gallery.shape)}"
        )
    if codes and bool((gallery >= 0).all() | (gallery <= 0).all()):
        raise InputError("gallery of codes must hold values whose signs are the bits, got values of one sign: 0 and 1?")
    if not codes and bool((gallery == 0).all(dim=1).any()):
        raise InputError(f"gallery[{int((gallery == 0).all(dim=1).nonzero()[0])}] is all zeros: it has no cosine")
    if relevant.dtype != torch.bool or relevant.shape != (len(x), len(gallery)):
        raise InputError(
            f"relevant must be bool ({len(x)}, {len(gallery)}), queries by gallery, got {relevant.dtype} "
            f"{tuple(relevant.shape)}"
        )
    if not len(x):
        raise InputError("recall needs at least one query, got none")
    for kind, missing in (("relevant", ~relevant.any(dim=1)), ("irrelevant", relevant.all(dim=1))):
        if bool(missing.any()):
            raise InputError(f"query {int(missing.nonzero()[0])} has no {kind} item in the gallery")
    try:
        each = [operator.index(n) for n in k]
    except TypeError:
        each = []
    if not each or min(each) < 1 or max(each) > len(gallery):
        raise InputError(f"k must be integers from 1 to the {len(gallery)} items of the gallery, like (1, 5), got {k}")


def _makers(
    attacks: Sequence[str] | Mapping[str, AttackOf] | None, gallery: int, surrogate: Encoder | None
) -> dict[str, tuple[AttackOf, int]]:
    """Name -> maker and its restarts."""
    if attacks is not None and (not isinstance(attacks, (Mapping, tuple, list)) or not attacks):
        raise InputError(f"attacks must be names, or a dict of name to maker, at least one, got {attacks!r}")
    if isinstance(attacks, Mapping):
        for name, make in attacks.items():
            if isinstance(make, Attack) or not callable(make):
                raise InputError(
                    f"attacks[{name!r}] must be a function of the model that makes an attack, got {make!r}"
                )
        return {name: (make, 1) for name, make in attacks.items()}
    names = list(registry.STANDARD_RANKING if attacks is None else attacks)
    registry.check_names(names)
    small = registry.unfit(names, gallery, "items in the gallery")
    if attacks is None:
        names = [name for name in names if name not in small]
    elif small:
        name, why = next(iter(small.items()))
        raise InputError(f"{name} {why}; leave it out")
    result: dict[str, tuple[AttackOf, int]] = {}
    for name in names:
        if name != "clean":
            one = partial(registry.make, name, losses=registry.RANKING, surrogate=surrogate)
            result[name] = one, registry.read(name).restarts
    return result


def _hits(
    model: Ranker, x: Tensor, relevant: Tensor, k: Sequence[int], attack: Attack | Transfer | None, batch: int,
    normalize: tuple[Value, Value] | None,
) -> Tensor:  # fmt: skip
    """bool (Q, len(k)): whether a relevant item is among the first K, equal scores by index."""
    hits = []
    for number in range(0, len(x), batch):
        part, mask = x[number : number + batch], relevant[number : number + batch]
        if attack is not None:
            part = attack(part, mask, index=torch.arange(number, number + len(part)))
        with Victim(model, normalize).prepare(part) as victim:
            order = model.exact(victim.input(part)).argsort(dim=1, descending=True, stable=True)
        ranked = mask.gather(1, order)
        hits.append(torch.stack([ranked[:, :n].any(dim=1) for n in k], dim=1).cpu())
    return torch.cat(hits)
