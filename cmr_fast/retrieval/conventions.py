"""The mAP conventions and tie rules by name: what each computes, and which published code computes it."""

from dataclasses import dataclass
from typing import Literal

from cmr_fast.errors import InputError


@dataclass(frozen=True)
class Convention:
    """One way to turn a ranking into an average precision, and the queries into a mean.

    P(i) is the precision of the first i ranks, rel(i) is 1 where rank i is relevant, R counts the query's relevant
    items in the database, hits those of them inside the cut. k defaults to the database size.

    Attributes
    ----------
    name, formula : str
    cut : str
        "k": the first k ranks; "R": the first min(k, R) ranks; "hits": the first min(k, R) hits.
    denominator : str
        "R", "hits", or "min", which is min(k, R).
    zero : str
        "counts 0": a query with R = 0 has AP 0 and counts; "skip R = 0": it is left out of the mean; "skip hits = 0":
        so is one with no hit inside the cut.
    used_by, note : str
        Published code that computes it, and what to know.
    """

    name: str
    formula: str
    cut: Literal["k", "R", "hits"]
    denominator: Literal["R", "hits", "min"]
    zero: Literal["counts 0", "skip R = 0", "skip hits = 0"]
    used_by: str
    note: str = ""


_RANKS = "sum_{i<=k} P(i) rel(i)"
_TABLE = (
    Convention(
        "all",
        f"{_RANKS} / R",
        "k",
        "R",
        "counts 0",
        "DCMH, SSAH, DJSRH calculate_map, DCHUC",
        "k = None is mAP(all); a k keeps R below the line",
    ),
    Convention(
        "topk_hits",
        f"{_RANKS} / hits",
        "k",
        "hits",
        "counts 0",
        "DCMH MATLAB topkMap; DJSRH, JDSH, DGCPN top map; DeepHash-pytorch; ACMR; DSCMR, SDML single-label (k = N); "
        "torchmetrics top_k of scores above 0 (it counts no hit at others)",
        "rewards fewer hits: [+--] scores above [+-+]; so the optimistic order need not score highest",
    ),
    Convention("topk_R", f"{_RANKS} / R", "k", "R", "skip R = 0", "pytorch-metric-learning mean_average_precision"),
    Convention("topk_min", f"{_RANKS} / min(k, R)", "k", "min", "counts 0", "standard information retrieval"),
    Convention(
        "map_at_r",
        "sum_{i<=min(k,R)} P(i) rel(i) / R",
        "R",
        "R",
        "skip R = 0",
        "pytorch-metric-learning mean_average_precision_at_r",
    ),
    Convention(
        "first_k_hits",
        "mean of P at the first min(k, R) hits, at any rank",
        "hits",
        "min",
        "counts 0",
        "WendellGul, torchcmh, DCHMT, CLIP-hash, CPAH, DGCPN calc_map_k",
        "these call it mAP@k, which it is not: it looks at every rank until k hits are found",
    ),
    Convention(
        "hits_skip",
        f"{_RANKS} / hits",
        "k",
        "hits",
        "skip hits = 0",
        "UCCH; SDML, MRL multi-label",
        "which queries count depends on the ranking; with ties=tie_aware only the whole ranking has a defined mean",
    ),
    Convention(
        "sephfamily",
        f"{_RANKS} / R",
        "k",
        "R",
        "skip R = 0",
        "perf_metric4Label.m (SePH and its family)",
        "copies that start goodQueryNum at 10 report this value times n / (n + 10), n the queries counted",
    ),
)

_TIES = {
    "index": "equal distances rank by database index, lower first",
    "tie_aware": "the exact mean over every order of equally distant items (McSherry and Najork 2008)",
    "optimistic": "the relevant ones of equally distant items come first",
    "pessimistic": "the relevant ones of equally distant items come last",
    "threshold": "equally distant items are found at once, at the last of their ranks: scikit-learn's "
    "average_precision_score, of the whole ranking",
}

CONVENTIONS = tuple(row.name for row in _TABLE)
TIES = tuple(_TIES)


def convention_table() -> dict[str, Convention]:
    """Every mAP convention.

    Returns
    -------
    dict of str to Convention
        By name: formula, denominator, rule for queries without hits, and who uses it.
    """
    return {row.name: row for row in _TABLE}


def tie_table() -> dict[str, str]:
    """Every tie rule.

    Returns
    -------
    dict of str to str
        By name, in one line.
    """
    return dict(_TIES)


def find_convention(name: str) -> Convention:
    """The convention called `name` ("-" and "_" are the same); unknown names raise InputError listing the choices."""
    return convention_table()[_find(name, CONVENTIONS, "convention")]


def find_ties(name: str) -> str:
    """The tie rule called `name` ("-" and "_" are the same); unknown names raise InputError listing the choices."""
    return _find(name, TIES, "ties")


def _find(name: str, names: tuple[str, ...], what: str) -> str:
    wanted = str(name).replace("-", "_").lower()
    for known in names:
        if known.lower() == wanted:
            return known
    raise InputError(f"{what} must be one of {', '.join(names)}, got {name!r}")
