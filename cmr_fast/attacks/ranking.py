"""Attacks on retrieval: a query image is moved so that what is relevant to it leaves the first K of the ranking.

    z_j = scale cos(f(x), g_j)                     scores against a gallery of N embeddings g, scale 100 as CLIP's
    ce  = -log sum_{j relevant} softmax(z)_j       all relevant items are positives (captions of one image, say)

With these scores in place of logits the attacks on classifiers work on rankings, APGD and DLR too. Recall@K of a query
is 1 where any relevant item is among its first K; over attacks a query keeps its worst.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cmr_fast.attacks.apgd import APGD
from cmr_fast.attacks.base import Attack
from cmr_fast.attacks.pgd import PGD
from cmr_fast.errors import InputError
from cmr_fast.ops.pgd import Value

AttackOf = Callable[..., Attack]


def ranking_ce(scores: Tensor, relevant: Tensor) -> Tensor:
    """-log of the softmax mass on the relevant items: scores (B, N), relevant bool (B, N) -> (B,)."""
    return scores.logsumexp(dim=1) - scores.masked_fill(~relevant, -torch.inf).logsumexp(dim=1)


def ranking_margin(scores: Tensor, relevant: Tensor) -> Tensor:
    """The best irrelevant score less the best relevant one: above 0 where R@1 is lost."""
    best, other = _best(scores, relevant)
    return other - best


def ranking_dlr(scores: Tensor, relevant: Tensor) -> Tensor:
    """`ranking_margin` over the first score less the third, which no scale changes. Needs a gallery of three."""
    if scores.shape[1] < 3:
        raise InputError(f"DLR needs a gallery of at least 3 items, got {scores.shape[1]}")
    best, other = _best(scores, relevant)
    top = scores.topk(3, dim=1).values
    return (other - best) / (top[:, 0] - top[:, 2] + 1e-12)


def _best(scores: Tensor, relevant: Tensor) -> tuple[Tensor, Tensor]:
    """The highest score of a relevant item, and that of an irrelevant one, (B,) each."""
    best = scores.masked_fill(~relevant, -torch.inf).amax(dim=1)
    return best, scores.masked_fill(relevant, -torch.inf).amax(dim=1)


def missed(scores: Tensor, relevant: Tensor) -> Tensor:
    """Whether the first item is not relevant, bool (B,); equal scores rank by index."""
    return ~relevant.gather(1, scores.argmax(dim=1, keepdim=True))[:, 0]


class Ranker(nn.Module):
    """Inputs -> scores against a gallery, what the attacks see in place of a classifier's logits.

    encode     inputs -> embeddings (B, d)
    gallery    (N, d), of the other modality
    codes      embeddings are relaxed codes: their tanh is compared with the gallery's signs, scaled like a cosine
    """

    def __init__(
        self, encode: Callable[[Tensor], Tensor], gallery: Tensor, *, scale: float = 100.0, codes: bool = False
    ) -> None:
        super().__init__()
        self.encode, self.scale, self.codes = encode, scale, codes
        signs = torch.where(gallery >= 0, 1.0, -1.0)
        self.register_buffer("gallery", F.normalize(signs if codes else gallery.float(), dim=1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        embedded, gallery = self._embedded(x), self.get_buffer("gallery")
        if self.codes:
            return self.scale * (embedded.tanh() / embedded.shape[1] ** 0.5) @ gallery.T
        return self.scale * F.normalize(embedded, dim=1) @ gallery.T

    def _embedded(self, x: Tensor) -> Tensor:
        found, width = self.encode(x), self.get_buffer("gallery").shape[1]
        if not isinstance(found, Tensor) or found.shape != (len(x), width):
            seen = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise InputError(f"encode must return ({len(x)}, {width}), as wide as the gallery, got {seen}")
        return found.float()

    @torch.no_grad()
    def exact(self, x: Tensor) -> Tensor:
        """The scores that a search goes by: of codes, those of their signs."""
        if not self.codes:
            return self(x)
        signs = torch.where(self._embedded(x) >= 0, 1.0, -1.0)
        return self.scale * (signs / signs.shape[1] ** 0.5) @ self.get_buffer("gallery").T


@dataclass(frozen=True)
class RecallUnderAttack:
    """R@K by attack, shares from 0 to 1, and what is left of each query at its worst.

    clean, by_attack     {K: R@K}, and the same by the attack's name
    worst                {K: R@K} where a query counts only if it survives every attack
    success              {K: share of the queries right before that some attack made wrong} (SGA's ASR)
    drop                 {K: clean R@K less the worst} (Co-Attack's ASR)
    hits                 {name: bool (Q, K's)}, "clean" among them
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


ATTACKS: dict[str, AttackOf] = {
    "PGD-20 ce": lambda model, **o: PGD(model, alpha=_quarter(o["eps"]), steps=20, loss=ranking_ce, **o),
    "PGD-20 margin": lambda model, **o: PGD(model, alpha=_quarter(o["eps"]), steps=20, loss=ranking_margin, **o),
    "APGD-50 ce": lambda model, **o: APGD(model, steps=50, loss=ranking_ce, early_stop=False, **o),
    "APGD-50 dlr": lambda model, **o: APGD(model, steps=50, loss=ranking_dlr, early_stop=False, **o),
}


def recall_under_attack(
    encode: Callable[[Tensor], Tensor],
    x: Tensor,
    gallery: Tensor,
    relevant: Tensor,
    *,
    k: Sequence[int] = (1, 5, 10),
    eps: Value = 8 / 255,
    attacks: Mapping[str, AttackOf] | None = None,
    restarts: int = 1,
    codes: bool = False,
    scale: float = 100.0,
    batch: int = 64,
    seed: int = 0,
    **options: Any,
) -> RecallUnderAttack:
    """R@K of queries x (Q, ...) against a clean gallery (N, d), before and under attack.

    encode     x -> embeddings (B, d), or relaxed codes (B, bits) where `codes`; a module is attacked in eval mode
    relevant   bool (Q, N): which items of the gallery belong to a query; several may
    attacks    name -> function of (model, eps=, seed=, ...) that makes an attack; ATTACKS unless given
    restarts   runs of each attack, with other random starts; a query keeps its worst
    options    bounds, normalize, norm, dtype, ...: as PGD takes them

    Every query is attacked to the end, those that are wrong at first too, and the highest loss is kept. Queries without
    a relevant item, or with none but relevant ones, are refused.
    """
    for name, value in (("x", x), ("gallery", gallery), ("relevant", relevant)):
        if not isinstance(value, Tensor):
            raise InputError(f"{name} must be a torch tensor, got {type(value).__name__}")
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
    whole = isinstance(k, (tuple, list)) and bool(k) and all(isinstance(n, int) for n in k)
    if not whole or min(k) < 1 or max(k) > len(gallery):
        raise InputError(f"k must be integers from 1 to the {len(gallery)} items of the gallery, like (1, 5), got {k}")
    if attacks is not None and (not isinstance(attacks, Mapping) or not attacks):
        raise InputError(f"attacks must be a dict of at least one, name to maker, got {attacks!r}")
    for name, make in (attacks or {}).items():
        if isinstance(make, Attack) or not callable(make):
            raise InputError(f"attacks[{name!r}] must be a function of the model that makes an attack, got {make!r}")
    for name, number in (("restarts", restarts), ("batch", batch), ("scale", scale)):
        if not number > 0:
            raise InputError(f"{name} must be above 0, got {number}")
    model = Ranker(encode, gallery, scale=scale, codes=codes)
    hits = {"clean": _hits(model, x, relevant, k, None, batch)}
    for name, make in (ATTACKS if attacks is None else attacks).items():
        for restart in range(restarts):
            # no success: an attack that is content once R@1 is lost would say nothing of R@K
            atk = make(model, eps=eps, seed=seed + restart, **options)
            found = _hits(model, x, relevant, k, atk, batch)
            hits[name] = hits[name] & found if name in hits else found
    before = hits["clean"]
    left = torch.stack(list(hits.values())).all(dim=0)
    recalls = {name: dict(zip(k, found.double().mean(dim=0).tolist(), strict=True)) for name, found in hits.items()}
    worst = dict(zip(k, left.double().mean(dim=0).tolist(), strict=True))
    success = {
        n: float((before & ~left)[:, i].double().sum() / before[:, i].double().sum().clamp(min=1))
        for i, n in enumerate(k)
    }
    clean = recalls.pop("clean")
    drop = {n: clean[n] - worst[n] for n in k}
    return RecallUnderAttack(clean, recalls, worst, success, drop, hits, len(gallery))


def _hits(model: Ranker, x: Tensor, relevant: Tensor, k: Sequence[int], attack: Attack | None, batch: int) -> Tensor:
    """bool (Q, len(k)): whether a relevant item is among the first K, equal scores by index."""
    found = []
    training = [(m, m.training) for m in model.modules()]
    for number in range(0, len(x), batch):
        part, own = x[number : number + batch], relevant[number : number + batch]
        if attack is not None:
            part = attack(part, own, index=torch.arange(number, number + len(part)))
        model.eval()
        order = model.exact(part).argsort(dim=1, descending=True, stable=True)
        for module, mode in training:
            module.training = mode
        ranked = own.gather(1, order)
        found.append(torch.stack([ranked[:, :n].any(dim=1) for n in k], dim=1).cpu())
    return torch.cat(found)


def _quarter(eps: Value) -> Value:
    """eps / 4, and where eps is 0 any step that is above it."""
    if isinstance(eps, (int, float)):
        return eps / 4 or 1.0
    quarter = torch.as_tensor(eps) / 4
    return torch.where(quarter > 0, quarter, 1.0)
