"""What attacks leave of retrieval between images and captions, from ranks: both success rates, and each query's worst.

    success   SGA's rate: of the queries that were right, the share that is wrong under attack
    drop      Co-Attack's rate: clean R@K less R@K under attack; queries that an attack happens to mend count against it

Ranks are what retrieval.evaluate_captions gives for embeddings: of adversarial queries in an adversarial gallery where
both sides are the attack's, in a clean one where the other side is.
"""

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from cmr_fast.errors import InputError

WAYS = ("tr", "ir")  # image -> text, text -> image
Recall = dict[str, dict[int, float]]


@dataclass(frozen=True)
class PairsUnderAttack:
    """R@K by attack and way, {"tr", "ir"} -> {K: share from 0 to 1}.

    Attributes
    ----------
    clean
        Without an attack.
    by_attack
        Under each.
    worst
        Where a query counts only if it survives every attack.
    success, drop
        {attack: ...}, and under "worst" of the worst case.
    """

    clean: Recall
    by_attack: dict[str, Recall]
    worst: Recall
    success: dict[str, Recall]
    drop: dict[str, Recall]
    hits: dict[str, dict[str, np.ndarray]] = field(repr=False)

    def rows(self) -> list[tuple[str, Recall]]:
        """Name and R@K, clean first and the worst case last."""
        return [("clean", self.clean), *self.by_attack.items(), ("worst case of a query", self.worst)]


def pairs_under_attack(
    ranks: Mapping[str, Mapping[str, np.ndarray]], k: Sequence[int] = (1, 5, 10)
) -> PairsUnderAttack:
    """Compare ranks under attacks with those without.

    Parameters
    ----------
    ranks
        {name: {"tr": int (images,), "ir": int (captions,)}}, ranks from 1: of each image its best caption's, of each
        caption its image's. One name is "clean".
    k
        Each K from 1.

    Returns
    -------
    PairsUnderAttack
        R@K, both success rates, and the worst case of each query over the attacks.

    Raises
    ------
    InputError
        Without clean ranks or an attack, and for ranks of other shapes or below 1.

    Examples
    --------
    >>> import numpy as np
    >>> ranks = {
    ...     "clean": {"tr": np.array([1, 1, 3]), "ir": np.array([1, 2, 1])},
    ...     "sga": {"tr": np.array([4, 1, 1]), "ir": np.array([1, 2, 9])},
    ... }
    >>> result = pairs_under_attack(ranks, k=[1])
    >>> result.success["sga"]["tr"][1], result.drop["sga"]["tr"][1]
    (0.5, 0.0)
    """
    cuts = _cuts(k)
    if "clean" not in ranks or len(ranks) < 2:
        raise InputError(f'ranks must hold "clean" and one attack at least, got {", ".join(ranks) or "nothing"}')
    hits = {
        name: {way: _checked(values, ranks["clean"], name, way)[:, None] <= cuts for way in WAYS}
        for name, values in ranks.items()
    }
    before = hits["clean"]
    attacked = {name: found for name, found in hits.items() if name != "clean"}
    attacked["worst"] = {way: np.logical_and.reduce([found[way] for found in attacked.values()]) for way in WAYS}

    def shares(found: Mapping[str, np.ndarray]) -> Recall:
        return {way: dict(zip(cuts.tolist(), found[way].mean(axis=0).tolist(), strict=True)) for way in WAYS}

    success = {
        name: {way: dict(zip(cuts.tolist(), _lost(before[way], found[way]).tolist(), strict=True)) for way in WAYS}
        for name, found in attacked.items()
    }
    recalls = {name: shares(found) for name, found in attacked.items()}
    clean = shares(before)
    drop = {
        name: {way: {n: clean[way][n] - recall[way][n] for n in cuts.tolist()} for way in WAYS}
        for name, recall in recalls.items()
    }
    return PairsUnderAttack(clean, recalls, recalls.pop("worst"), success, drop, hits)


def _lost(before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """Shares (K's,) of those right before that are wrong after; 0 where none was right."""
    shares: np.ndarray = (before & ~after).sum(axis=0) / np.maximum(before.sum(axis=0), 1)
    return shares


def _cuts(k: Sequence[int]) -> np.ndarray:
    try:
        cuts = [operator.index(n) for n in k]
    except TypeError:
        cuts = []
    if not cuts or min(cuts) < 1:
        raise InputError(f"k must be integers from 1, like (1, 5, 10), got {k!r}")
    return np.array(cuts)


def _checked(values: Mapping[str, np.ndarray], clean: Mapping[str, np.ndarray], name: str, way: str) -> np.ndarray:
    if way not in values or way not in clean:
        raise InputError(f'ranks of {name!r} and of "clean" must hold "tr" and "ir", got {", ".join(values)}')
    ranks = np.asarray(values[way])
    if ranks.dtype.kind not in "iu" or ranks.ndim != 1 or ranks.shape != np.shape(clean[way]) or not len(ranks):
        raise InputError(
            f"ranks of {name!r}, {way!r}, must be integers {np.shape(clean[way])} as the clean ones, got "
            f"{ranks.dtype} {ranks.shape}"
        )
    if ranks.min() < 1:
        raise InputError(f"ranks count from 1, those of {name!r}, {way!r}, hold {ranks.min()}")
    return ranks
