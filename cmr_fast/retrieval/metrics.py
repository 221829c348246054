"""Retrieval metrics from packed codes or embeddings, by named convention and tie rule, in blocks of queries.

A block of queries is reduced to groups of equally distant items (see _ties), and every number is a sum over groups.
From codes the tie-aware, optimistic and pessimistic values need only histograms of distances; these and the sums under
the index order come from ops.ranking. Nothing of the size of queries x database is ever held.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, cast

import numpy as np
import torch

from cmr_fast.errors import InputError
from cmr_fast.ops import ranking
from cmr_fast.retrieval._checks import (
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
_BLOCK = 1 << 21  # query x database cells held at once, 8 bytes each or less


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
    threads: int | None = None,
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
    threads                default all processors of this process; the result does not depend on it
    """
    queries: Any
    database: Any
    queries, database = check_code_arrays(q, db)
    levels = check_bits(bits, queries, database) + 1
    labels = Labels(q_labels, db_labels, len(queries), len(database))
    asked = _ask(labels, k, convention, ties, pairs)
    q_packed, db_packed = (_like(x, queries) for x in labels.packed())
    by_index = asked.ties == "index"
    cut = cast(Literal["rank", "relevant", "hits"], {"k": "rank", "R": "relevant", "hits": "hits"}[asked.rule.cut])

    def measure(rows: slice, curves: Curves) -> tuple[np.ndarray, np.ndarray]:
        partners = asked.partners[rows] if asked.partners is not None else None
        found = ranking(
            queries[rows], database, q_packed[rows], db_packed, k=asked.cut, cut=cut, order=by_index, curves=by_index,
            partners=_like(partners, queries) if by_index and partners is not None else None, threads=threads,
        )  # fmt: skip
        items, hits = to_numpy(found.items)[:, :levels], to_numpy(found.relevant)[:, :levels]
        counts = hits.sum(axis=1)
        curves.add_radius(items, hits, counts)
        if by_index:
            sums, inside, first = to_numpy(found.sums), to_numpy(found.hits), to_numpy(found.first)
            ap = _divide(sums, inside, counts, asked)
            curves.add_steps(to_numpy(found.hit_steps), to_numpy(found.recall_steps), first)
        else:
            groups = Groups.from_histograms(items, hits).ordered(asked.ties)
            ap = _average_precisions(groups, counts, asked)
            curves.add(groups, counts)
        if partners is not None:
            own = to_numpy(queries[rows]) ^ to_numpy(database)[partners]
            level = np.unpackbits(own, axis=1).sum(axis=1, dtype=np.int64)
            each = np.arange(len(level))
            size, before = items[each, level], np.cumsum(items, axis=1)[each, level] - items[each, level]
            if by_index:
                before, size = before + to_numpy(found.tied_before), np.ones_like(size)
            curves.add_pairs(_partner_alone(size, before).ordered(asked.ties))
        return ap, counts

    # a bit per item and a few histograms are what a query holds
    block = max(1, 8 * _BLOCK // (len(database) // 8 + 32 * levels))
    return _evaluate(measure, block, asked, labels, levels, "hamming")


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

    Scores are computed in float64. Equal rows tie, and so do neighbours in the ranking that differ by no more than the
    rounding of their own sums: (d + 4) * 2^-52 of the distance, or of |q| |x|. No row changes what others score.
    """
    if metric not in METRICS:
        raise InputError(f"metric must be one of {', '.join(METRICS)}, got {metric!r}")
    x, y = check_embeddings(query, database)
    if metric == "cosine":
        # by the largest element first, so that no square underflows
        x, y = (v / torch.where(v == 0, 0, v).abs().amax(dim=1, keepdim=True).clamp_min(5e-324) for v in (x, y))
        x, y = (v / v.norm(dim=1, keepdim=True).clamp_min(torch.finfo(v.dtype).tiny) for v in (x, y))
    rounding = (y.shape[1] + 4) * torch.finfo(y.dtype).eps
    different, place = torch.unique(y, dim=0, return_inverse=True)  # equal rows have one score
    norms = different.norm(dim=1)

    def scores(rows: slice) -> np.ndarray:
        block = x[rows]
        if metric == "l2":
            far = torch.cdist(block, different, compute_mode="donot_use_mm_for_euclid_dist")
            error = rounding * far
        else:
            far, error = -(block @ different.T), rounding * block.norm(dim=1, keepdim=True) * norms
        order = far.argsort(dim=1)
        far, error = far.gather(1, order), error.gather(1, order)
        apart = far[:, 1:] - far[:, :-1] > torch.minimum(error[:, 1:], error[:, :-1])
        keys = torch.zeros_like(order)
        keys.scatter_(1, order[:, 1:], apart.long().cumsum(1))
        return keys[:, place].cpu().numpy()

    labels = Labels(q_labels, db_labels, len(x), len(y))
    asked = _ask(labels, k, convention, ties, pairs)

    def measure(rows: slice, curves: Curves) -> tuple[np.ndarray, np.ndarray]:
        keys, relevant = scores(rows), labels.relevant(rows)
        counts = np.count_nonzero(relevant, axis=1)
        if asked.ties == "index":
            groups = Groups.from_ranking(_ranked_relevance(keys, relevant))
        else:
            groups = Groups.from_sorted_keys(*_sorted_by_key(keys, relevant)).ordered(asked.ties)
        curves.add(groups, counts)
        if asked.partners is not None:
            curves.add_pairs(_pair_groups(keys, asked.partners[rows], asked.ties))
        return _average_precisions(groups, counts, asked), counts

    return _evaluate(measure, max(1, _BLOCK // len(y)), asked, labels, None, metric)


@dataclass(frozen=True)
class _Asked:
    """What an evaluation was asked for, checked."""

    rule: Convention
    ties: str
    k: int | None
    cut: int  # k, or the database size
    partners: np.ndarray | None
    harmonic: np.ndarray


def _ask(labels: Labels, k: int | None, convention: str, ties: str, pairs: Array | None) -> _Asked:
    rule, tie_rule = find_convention(convention), find_ties(ties)
    size = labels.num_database
    if k is not None and (isinstance(k, bool) or not isinstance(k, (int, np.integer)) or k < 1):
        raise InputError(f"k must be an integer of 1 or more, or None for the whole ranking, got {k!r}")
    cut = size if k is None else min(int(k), size)
    if rule.zero == "skip hits = 0" and tie_rule == "tie_aware" and cut < size:
        raise InputError(
            f"{rule.name} at k={k} has no tie-aware value: which queries count depends on the order of ties; "
            "use k=None, another tie rule, or topk_hits"
        )
    harmonic = harmonic_numbers(0 if tie_rule == "index" else size)
    partners = check_pairs(pairs, labels.num_queries, size)
    return _Asked(rule, tie_rule, None if k is None else int(k), cut, partners, harmonic)


def _evaluate(
    measure: Callable[[slice, Curves], tuple[np.ndarray, np.ndarray]],
    block: int,
    asked: _Asked,
    labels: Labels,
    levels: int | None,
    metric: str,
) -> RetrievalResult:
    """measure(rows, curves) -> (B,) average precision and (B,) relevant items; it adds the block to the curves."""
    num_queries, size = labels.num_queries, labels.num_database
    ap, relevant_counts = np.empty(num_queries), np.empty(num_queries, dtype=np.int64)
    curves = Curves(size, levels, asked.partners is not None)
    for start in range(0, num_queries, block):
        rows = slice(start, min(start + block, num_queries))
        ap[rows], relevant_counts[rows] = measure(rows, curves)
    curves.accumulate()
    counted = ~np.isnan(ap)
    return RetrievalResult(
        map=float(ap[counted].mean()) if counted.any() else float("nan"),
        ap=ap,
        relevant=relevant_counts,
        convention=asked.rule.name,
        ties=asked.ties,
        k=asked.k,
        metric=metric,
        num_queries=num_queries,
        num_database=size,
        num_counted=int(counted.sum()),
        _curves=curves,
    )


def _divide(sums: np.ndarray, inside: np.ndarray, counts: np.ndarray, asked: _Asked) -> np.ndarray:
    """(B,) average precision from sums over hits that are certain; nan where the convention leaves the query out."""
    rule = asked.rule
    below = {"R": counts, "hits": inside, "min": np.minimum(asked.cut, counts)}[rule.denominator]
    ap = sums / np.maximum(below, 1)
    if rule.zero != "counts 0":
        ap[below == 0] = np.nan
    return ap


def _average_precisions(groups: Groups, counts: np.ndarray, asked: _Asked) -> np.ndarray:
    """(B,) expected average precision; nan where the convention leaves the query out."""
    rule, cut, harmonic, size = asked.rule, asked.cut, asked.harmonic, len(counts)
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
    if ties == "index":
        before += [np.count_nonzero(row[:p] == row[p]) for row, p in zip(keys, partners, strict=True)]
        size = np.ones_like(size)
    return _partner_alone(size, before).ordered(ties)


def _partner_alone(size: np.ndarray, before: np.ndarray) -> Groups:
    return Groups(np.arange(len(size)), size, np.ones_like(size), before, np.zeros_like(size))


def _ranked_relevance(keys: np.ndarray, relevant: np.ndarray) -> np.ndarray:
    """(B, N) keys and relevance -> relevance in the order of (key, index)."""
    index_bits = keys.shape[1].bit_length()
    if keys.dtype.itemsize <= 2 or 2 * index_bits > 61:
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


def _like(x: np.ndarray, codes: Array) -> Any:
    return torch.from_numpy(x).to(codes.device) if isinstance(codes, torch.Tensor) else x
