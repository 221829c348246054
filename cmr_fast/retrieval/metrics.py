"""Retrieval metrics from packed codes or embeddings, by named convention and tie rule, in blocks of queries.

Distances become small integers; a block of queries is reduced to groups of equally distant items (see _ties), and
every number is a sum over groups. From codes the tie-aware, optimistic and pessimistic values need only histograms of
distances; the index order is a counting sort of them. Nothing of the size of queries x database is ever held.
"""

from collections.abc import Callable, Iterator
from typing import Literal

import numpy as np
import torch

from cmr_fast.errors import InputError
from cmr_fast.ops import hamming_distances
from cmr_fast.retrieval._inputs import (
    Array,
    Labels,
    check_bits,
    check_code_arrays,
    check_embeddings,
    check_pairs,
    to_numpy,
)
from cmr_fast.retrieval._ties import (
    Groups,
    harmonic_numbers,
    mixed,
    precision_sums,
    sum_first_hits,
    sum_over_hits,
)
from cmr_fast.retrieval.conventions import CONVENTIONS, TIES, Convention, find_convention, find_ties
from cmr_fast.retrieval.result import Curves, RetrievalResult

__all__ = ["CONVENTIONS", "METRICS", "TIES", "RetrievalResult", "evaluate_codes", "evaluate_embeddings"]

METRICS = ("cosine", "l2", "ip")
_BLOCK = 1 << 21  # query x database cells held at once
_GRID = 1 << 38  # embedding scores are compared as integers on this grid


def evaluate_codes(
    q: Array,
    db: Array,
    q_labels: Array,
    db_labels: Array,
    *,
    k: int | None = None,
    convention: str = "all",
    ties: str = "index",
    bits: int | None = None,
    pairs: Array | None = None,
) -> RetrievalResult:
    """Rank a database of packed codes by Hamming distance to each query and measure it.

    q, db                  uint8 (Q, nbytes) and (N, nbytes), see pack_codes
    q_labels, db_labels    int (Q,) and (N,) class ids, or (Q, C) and (N, C) multi-hot of 0 and 1; an item is relevant
                           where it shares a label with the query
    k                      cut of the average precision; None is the whole ranking. The curves always go to N
    convention             a name of CONVENTIONS: see convention_table()
    ties                   a name of TIES: "index" (lower index first), "tie_aware", "optimistic" or "pessimistic".
                           For the denominators R and min(k, R), optimistic >= tie_aware >= pessimistic
    bits                   code length where it is not 8 * nbytes (radius curves end there)
    pairs                  int (Q,), the database row of each query's own partner, for recall_one_at(relevance="pair")
    """
    queries, database = check_code_arrays(q, db)
    width = check_bits(bits, queries, database)
    small = np.uint8 if width <= 255 else np.uint16

    def distances(rows: slice) -> np.ndarray:
        return to_numpy(hamming_distances(queries[rows], database)).astype(small)  # type: ignore[type-var]

    labels = Labels(q_labels, db_labels, len(queries), len(database))
    return _evaluate(distances, labels, width + 1, "hamming", k, convention, ties, pairs)


def evaluate_embeddings(
    query: Array,
    database: Array,
    q_labels: Array,
    db_labels: Array,
    *,
    metric: Literal["cosine", "l2", "ip"] = "cosine",
    k: int | None = None,
    convention: str = "all",
    ties: str = "index",
    pairs: Array | None = None,
) -> RetrievalResult:
    """Rank a database of embeddings and measure it; the other arguments are those of evaluate_codes.

    query, database    (Q, d) and (N, d), finite numbers
    metric             "cosine" (a zero vector is at 0 from everything), "l2", or "ip" (largest inner product first)

    Scores are computed in float64, and those that agree to 2^-38 of the largest that the query could have are tied,
    so equal rows tie whatever the order of summation.
    """
    if metric not in METRICS:
        raise InputError(f"metric must be one of {', '.join(METRICS)}, got {metric!r}")
    x, y = check_embeddings(query, database)
    if metric == "cosine":
        x, y = (v / v.norm(dim=1, keepdim=True).clamp_min(torch.finfo(v.dtype).tiny) for v in (x, y))
    elif metric == "l2":
        centre = y.mean(dim=0)
        x, y = x - centre, y - centre
    y_norms = y.norm(dim=1)
    longest = y_norms.max()

    def scores(rows: slice) -> np.ndarray:
        block = x[rows]
        norms = block.norm(dim=1, keepdim=True)
        products = block @ y.T
        if metric == "l2":
            far, bound = y_norms**2 - 2 * products, longest**2 + 2 * norms * longest  # less |x|^2: one order
        else:
            far, bound = -products, norms * longest
        unit = _GRID / torch.where(bound > 0, bound, 1.0)
        return (far * unit).round_().long().cpu().numpy()

    labels = Labels(q_labels, db_labels, len(x), len(y))
    return _evaluate(scores, labels, None, metric, k, convention, ties, pairs)


def _evaluate(
    keys_of: Callable[[slice], np.ndarray],
    labels: Labels,
    levels: int | None,
    metric: str,
    k: int | None,
    convention: str,
    ties: str,
    pairs: Array | None,
) -> RetrievalResult:
    """keys_of(rows) -> (B, N) integers, smaller is nearer; levels: keys are 0 .. levels - 1, or any (None)."""
    rule, tie_rule = find_convention(convention), find_ties(ties)
    num_queries, size = labels.num_queries, labels.num_database
    if k is not None and (isinstance(k, bool) or not isinstance(k, (int, np.integer)) or k < 1):
        raise InputError(f"k must be an integer of 1 or more, or None for the whole ranking, got {k!r}")
    cut = size if k is None else min(int(k), size)
    if rule.zero == "skip hits = 0" and tie_rule == "tie_aware" and cut < size:
        raise InputError(
            f"{rule.name} at k={k} has no tie-aware value: which queries count depends on the order of ties; "
            "use k=None, another tie rule, or topk_hits"
        )
    partners = check_pairs(pairs, num_queries, size)
    ap, relevant_counts = np.empty(num_queries), np.empty(num_queries, dtype=np.int64)
    curves = Curves(size, levels, partners is not None)
    harmonic = harmonic_numbers(size)
    for rows in _blocks(num_queries, max(size, 2 * (levels or 0))):
        keys, relevant = keys_of(rows), labels.relevant(rows)
        counts = np.count_nonzero(relevant, axis=1)
        if levels:
            items, hits = _histograms(keys, relevant, levels)
            curves.add_radius(items, hits, counts)
        if tie_rule == "index":
            groups = Groups.from_ranking(_ranked_relevance(keys, relevant))
        elif levels:
            groups = Groups.from_histograms(items, hits).ordered(tie_rule)
        else:
            groups = Groups.from_sorted_keys(*_sorted_by_key(keys, relevant)).ordered(tie_rule)
        ap[rows] = _average_precisions(groups, counts, rule, cut, harmonic)
        relevant_counts[rows] = counts
        curves.add(groups, counts)
        if partners is not None:
            curves.add_pairs(_pair_groups(keys, partners[rows], tie_rule))
    curves.accumulate()
    counted = ~np.isnan(ap)
    return RetrievalResult(
        map=float(ap[counted].mean()) if counted.any() else float("nan"),
        ap=ap,
        relevant=relevant_counts,
        convention=rule.name,
        ties=tie_rule,
        k=None if k is None else int(k),
        metric=metric,
        num_queries=num_queries,
        num_database=size,
        num_counted=int(counted.sum()),
        _curves=curves,
    )


def _average_precisions(
    groups: Groups, counts: np.ndarray, rule: Convention, cut: int, harmonic: np.ndarray
) -> np.ndarray:
    """(B,) expected average precision; nan where the convention leaves the query out."""
    size = len(counts)
    capped = np.minimum(cut, counts)  # min(k, R)
    if rule.cut == "hits":
        wanted = capped[groups.query] - groups.hits_before
        alike = groups.relevant == groups.size
        ranks = np.clip(np.where(alike, wanted, np.where(wanted > 0, groups.size, 0)), 0, groups.size)
        sums = precision_sums(groups, ranks, harmonic)
        for g in np.flatnonzero(~alike & (wanted > 0) & (wanted < groups.relevant)):
            sums[g] = sum_first_hits(*groups.one(g), int(wanted[g]))
    else:
        ends = capped[groups.query] if rule.cut == "R" else cut
        ranks = np.clip(ends - groups.before, 0, groups.size)
        sums = precision_sums(groups, ranks, harmonic)
    totals = np.bincount(groups.query, sums, size)
    if rule.denominator == "hits":  # certain, but for the mixed groups below
        below = np.bincount(groups.query, ranks * groups.relevant / groups.size, size)
    else:
        below = counts if rule.denominator == "R" else capped
    ap = totals / np.where(below > 0, below, 1)
    if rule.denominator == "hits":
        for g in np.flatnonzero(mixed(groups, ranks)):
            query = groups.query[g]
            ap[query] = sum_over_hits(*groups.one(g), int(ranks[g]), totals[query] - sums[g], harmonic)
    if rule.zero != "counts 0":  # R = 0, or hits = 0 where they divide
        ap[below == 0] = np.nan
    return ap


def _pair_groups(keys: np.ndarray, partners: np.ndarray, ties: str) -> Groups:
    """One group per query: the items as near as its partner, the partner alone relevant."""
    rows = np.arange(len(keys))
    own = keys[rows, partners][:, None]
    before, size = np.count_nonzero(keys < own, axis=1), np.count_nonzero(keys == own, axis=1)
    one = np.ones_like(size)
    if ties == "index":
        before += [np.count_nonzero(row[:p] == row[p]) for row, p in zip(keys, partners, strict=True)]
        size = one
    return Groups(rows, size, one, before, np.zeros_like(size)).ordered(ties)


def _histograms(keys: np.ndarray, relevant: np.ndarray, levels: int) -> tuple[np.ndarray, np.ndarray]:
    """(B, N) distances and relevance -> int64 (B, levels) items and relevant items at each distance."""
    table = np.empty((len(keys), levels, 2), dtype=np.int64)
    cells = 2 * keys.astype(np.uint16) + relevant
    for i, row in enumerate(cells):
        table[i] = np.bincount(row, minlength=2 * levels).reshape(levels, 2)
    return table.sum(axis=2), table[:, :, 1]


def _ranked_relevance(keys: np.ndarray, relevant: np.ndarray) -> np.ndarray:
    """(B, N) keys and relevance -> relevance in the order of (key, index)."""
    index_bits = keys.shape[1].bit_length()
    if keys.dtype.itemsize <= 2 or _GRID.bit_length() + 2 + index_bits > 62:
        # a row at a time stays in cache; numpy's stable sort counts (radix) where keys have 8 or 16 bits
        out = np.empty_like(relevant)
        for i, row in enumerate(keys):
            np.take(relevant[i], np.argsort(row, kind="stable"), out=out[i])
        return out
    packed = ((keys << index_bits | np.arange(keys.shape[1])) << 1) | relevant
    packed.sort(axis=1)
    return (packed & 1).astype(bool)


def _sorted_by_key(keys: np.ndarray, relevant: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(B, N) int64 keys and relevance, both in the order of keys; among equal keys in any order."""
    packed = (keys << 1) | relevant
    packed.sort(axis=1)
    return packed >> 1, (packed & 1).astype(bool)


def _blocks(count: int, width: int) -> Iterator[slice]:
    step = max(1, _BLOCK // width)
    for start in range(0, count, step):
        yield slice(start, min(start + step, count))
