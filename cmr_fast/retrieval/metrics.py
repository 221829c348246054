"""Retrieval metrics from packed codes or embeddings, by named convention and tie rule, in blocks of queries.

A block of queries is reduced to groups of equally distant items (see _ties), and every number is a sum over groups.
From codes the values under the tie rules of whole groups need only histograms of distances; these and the sums under
the index order come from ops.ranking. Nothing of the size of queries x database is ever held.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal, cast

import numpy as np

from cmr_fast.errors import InputError
from cmr_fast.ops import hamming_distances, ranking
from cmr_fast.ops._tensors import as_integer
from cmr_fast.ops.labels import Labels
from cmr_fast.retrieval._checks import (
    Array,
    check_bits,
    check_code_arrays,
    check_embeddings,
    check_exclude,
    check_pairs,
    like,
    to_numpy,
)
from cmr_fast.retrieval._scores import METRICS, Scores
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

_BLOCK = 1 << 21  # query x database cells held at once, 8 bytes each or less


def evaluate_codes(
    q: Array,
    db: Array,
    q_labels: object,
    db_labels: object,
    *,
    k: int | None = None,
    convention: str = "all",
    ties: str = "index",
    bits: int | None = None,
    pairs: Array | None = None,
    exclude_self: bool | Array = False,
    threads: int | None = None,
) -> RetrievalResult:
    """Rank a database of packed codes by Hamming distance to each query and measure it.

    Parameters
    ----------
    q, db : ndarray or Tensor
        uint8 (Q, nbytes) and (N, nbytes), see `pack_codes`.
    q_labels, db_labels
        Class ids, integers (Q,) and (N,), or multi-hot rows (Q, C) and (N, C) of 0 and 1; arrays, tensors, lists, scipy
        sparse matrices, pandas or polars. An item is relevant where it shares a label with the query. A column (N, 1)
        of numbers, which may mean either, is refused.
    k : int, optional
        Cut of the average precision; None is the whole ranking. The curves always go to N.
    convention : str
        A name of CONVENTIONS: see `convention_table`.
    ties : str
        A name of TIES: "index" (lower index first), "tie_aware", "optimistic", "pessimistic" or "threshold" (as
        scikit-learn's average_precision_score); see `tie_table`. For the denominators R and min(k, R),
        optimistic >= tie_aware >= pessimistic.
    bits : int, optional
        Code length where it is not 8 * nbytes (radius curves end there).
    pairs : ndarray or Tensor, optional
        int (Q,), the database row of each query's own partner, for recall_one_at(relevance="pair"). None: row by row
        where there are as many queries as database items and none of them is left out.
    exclude_self : bool, ndarray or Tensor
        Queries that are themselves in the database, and found first by themselves: True leaves database row i out of
        the ranking of query i; int (Q,) leaves out that row of each, -1 none.
    threads : int, optional
        Default all processors of this process; the result does not depend on it.

    Returns
    -------
    RetrievalResult
        With curves by rank and by radius. Where every query leaves itself out, ranks end at N - 1.

    Raises
    ------
    InputError
        For arrays that are not codes and labels of one kind and length, and unknown names.
    """
    queries, database = check_code_arrays(q, db)
    levels = check_bits(bits, queries, database) + 1
    labels = Labels(q_labels, db_labels, len(queries), len(database))
    setting = _check_setting(labels, k, convention, ties, pairs, exclude_self)
    q_packed, db_packed = (like(x, queries) for x in labels.packed())
    cut = cast(Literal["rank", "relevant", "hits"], {"k": "rank", "R": "relevant", "hits": "hits"}[setting.rule.cut])
    by_op = setting.ties == "index" and setting.exclude is None  # the op ranks whole databases

    def measure(rows: slice, curves: Curves) -> tuple[np.ndarray, np.ndarray]:
        partners = setting.partners[rows] if setting.partners is not None else None
        ranked = ranking(
            queries[rows], database, q_packed[rows], db_packed, k=setting.cut, cut=cut, order=by_op, curves=by_op,
            partners=like(partners, queries) if by_op and partners is not None else None, threads=threads,
        )  # fmt: skip
        items, hits = to_numpy(ranked.items)[:, :levels], to_numpy(ranked.relevant)[:, :levels]
        if setting.exclude is not None:
            _take_out(setting.exclude[rows], queries[rows], database, labels, rows, items, hits)
        counts = hits.sum(axis=1)
        curves.add_radius(items, hits, counts)
        if by_op:
            sums, inside, first = to_numpy(ranked.sums), to_numpy(ranked.hits), to_numpy(ranked.first)
            ap = _divide(sums, inside, counts, setting)
            curves.add_steps(to_numpy(ranked.hit_steps), to_numpy(ranked.recall_steps), first)
            if partners is not None:
                level = _distances(queries[rows], database, partners)
                before = np.cumsum(items, axis=1)[np.arange(len(level)), level]
                before += to_numpy(ranked.tied_before) - items[np.arange(len(level)), level]
                curves.add_pairs(_partner_alone(np.ones_like(before), before))
            return ap, counts
        if setting.ties == "index":
            keys = to_numpy(hamming_distances(queries[rows], database, threads=threads)).astype(np.uint16)
            return _measure_keys(keys, labels.relevant(rows), np.arange(rows.start, rows.stop), setting, curves)
        groups = Groups.from_histograms(items, hits).ordered(setting.ties)
        curves.add(groups, counts)
        if partners is not None:
            level, each = _distances(queries[rows], database, partners), np.arange(len(partners))
            size, before = items[each, level], np.cumsum(items, axis=1)[each, level] - items[each, level]
            curves.add_pairs(_partner_alone(size, before).ordered(setting.ties))
        return _average_precisions(groups, counts, setting), counts

    # a bit per item and a few histograms are what a query holds; of one that leaves itself out, distances and relevance
    held = 8 * len(database) if setting.ties == "index" and not by_op else len(database) // 8 + 32 * levels
    return _evaluate(measure, max(1, 8 * _BLOCK // held), setting, labels, levels, "hamming")


def evaluate_histograms(
    histograms: Callable[[slice, np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]],
    q_labels: object,
    db_labels: object,
    sizes: tuple[int, int],
    bits: int,
    *,
    k: int | None = None,
    convention: str = "all",
    ties: str = "tie_aware",
) -> RetrievalResult:
    """`evaluate_codes` from histograms of distances, which several databases together have as the sum of theirs.

    Parameters
    ----------
    histograms : callable
        (rows, labels of these queries, labels of the database) -> int64 (B, bits + 1) items at each distance, and the
        relevant ones among them; labels as `ops.ranking` takes them.
    q_labels, db_labels, k, convention
        As in `evaluate_codes`.
    sizes : (int, int)
        Queries and items of the database.
    bits : int
        Code length.
    ties : str
        As in `evaluate_codes`, but "index", whose order inside a distance histograms do not know.

    Returns
    -------
    RetrievalResult
        To the last bit that of `evaluate_codes`.

    Raises
    ------
    InputError
        As `evaluate_codes`, and for ties="index".
    """
    labels = Labels(q_labels, db_labels, *sizes)
    setting = _check_setting(labels, k, convention, ties, None, False)
    if setting.ties == "index":
        raise InputError(
            "ties='index' needs the order of equally distant items, which sums of histograms do not hold; "
            f"ties must be one of {', '.join(name for name in TIES if name != 'index')}"
        )
    setting = replace(setting, partners=None)
    q_packed, db_packed = labels.packed()

    def measure(rows: slice, curves: Curves) -> tuple[np.ndarray, np.ndarray]:
        items, hits = histograms(rows, q_packed[rows], db_packed)
        counts = hits.sum(axis=1)
        curves.add_radius(items, hits, counts)
        groups = Groups.from_histograms(items, hits).ordered(setting.ties)
        curves.add(groups, counts)
        return _average_precisions(groups, counts, setting), counts

    held = sizes[1] // 8 + 32 * (bits + 1)
    return _evaluate(measure, max(1, 8 * _BLOCK // held), setting, labels, bits + 1, "hamming")


def evaluate_embeddings(
    query: Array,
    database: Array,
    q_labels: object,
    db_labels: object,
    *,
    metric: Literal["cosine", "l2", "ip"] = "cosine",
    k: int | None = None,
    convention: str = "all",
    ties: str = "index",
    pairs: Array | None = None,
    exclude_self: bool | Array = False,
) -> RetrievalResult:
    """Rank a database of embeddings and measure it.

    Scores are computed in float64. Equal rows tie, and so do neighbours in the ranking that differ by no more than the
    rounding of their own sums: (d + 4) * 2^-52 of the distance, or of |q| |x|. No row changes what others score.

    Parameters
    ----------
    query, database : ndarray or Tensor
        (Q, d) and (N, d), finite numbers.
    q_labels, db_labels, k, convention, ties, pairs, exclude_self
        As in `evaluate_codes`.
    metric : {"cosine", "l2", "ip"}
        "cosine" (a zero vector is at 0 from everything), "l2", or "ip" (largest inner product first).
        Values of any finite size; by "l2", distances below about 1e-150 of the largest value are 0.

    Returns
    -------
    RetrievalResult
        With curves by rank.

    Raises
    ------
    InputError
        For arrays that are not finite embeddings and labels of one kind and length, and unknown names.
    """
    if metric not in METRICS:
        raise InputError(f"metric must be one of {', '.join(METRICS)}, got {metric!r}")
    x, y = check_embeddings(query, database)
    labels = Labels(q_labels, db_labels, len(x), len(y))
    setting = _check_setting(labels, k, convention, ties, pairs, exclude_self)
    scores = Scores(x, y, metric)

    def measure(rows: slice, curves: Curves) -> tuple[np.ndarray, np.ndarray]:
        relevant, each = labels.relevant(rows), np.arange(rows.start, rows.stop)
        ap, counts, certain = _measure_certain(scores, relevant, each, setting, curves)
        doubtful = np.flatnonzero(~certain)
        if len(doubtful):
            keys, which = scores.exact(each[doubtful]), each[doubtful]
            ap[doubtful], counts[doubtful] = _measure_keys(keys, relevant[doubtful], which, setting, curves)
        return ap, counts

    return _evaluate(measure, max(1, _BLOCK // len(y)), setting, labels, None, metric)


def _measure_certain(
    scores: Scores, relevant: np.ndarray, each: np.ndarray, setting: "_Setting", curves: Curves
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Average precision and relevant items of the queries `each`, as far as coarse keys are certain: the mask says."""
    ap, counts, certain = np.zeros(len(each)), np.zeros(len(each), dtype=np.int64), np.zeros(len(each), dtype=bool)
    if not scores.paying:
        return ap, counts, certain
    width = relevant.shape[1]
    index_bits = width.bit_length() if scores.repeats else 0
    keys, apart = scores.coarse(slice(int(each[0]), int(each[-1]) + 1), 60 - index_bits)
    equal = np.full(len(each), scores.repeats)  # neighbours that must be equal
    if setting.exclude is not None:
        equal -= scores.is_repeated(setting.exclude[each]) & (setting.exclude[each] >= 0)
        _leave_out(keys, relevant, each, setting, 1 << (60 - index_bits))
    packed = ((keys << index_bits | np.arange(width)) << 1) | relevant if index_bits else (keys << 1) | relevant
    packed.sort(axis=1)
    ordered = packed >> (index_bits + 1) if index_bits else packed
    steps = np.diff(ordered, axis=1)
    certain = np.ones(len(each), dtype=bool)
    if index_bits:
        certain = np.count_nonzero(steps == 0, axis=1) == equal
        steps[steps == 0] = np.iinfo(np.int64).max
    elif width > 1:
        apart = 2 * np.minimum(apart, 1 << 60) + 1  # relevance is still in the keys
    certain &= (steps.min(axis=1) if width > 1 else np.inf) > apart
    scores.paying = bool(2 * np.count_nonzero(certain) >= len(each))
    if not certain.any():
        return ap, counts, certain
    packed &= 1
    rows = slice(None) if certain.all() else certain
    ranked = packed.astype(bool)[rows]
    if setting.ties == "index" or not index_bits:
        groups = Groups.from_ranking(ranked)
    else:
        groups = Groups.from_sorted_keys(ordered[rows], ranked).ordered(setting.ties)
    ap[rows], counts[rows] = _measure_groups(groups, keys[rows], relevant[rows], each[rows], setting, curves)
    return ap, counts, certain


def _measure_keys(
    keys: np.ndarray, relevant: np.ndarray, each: np.ndarray, setting: "_Setting", curves: Curves
) -> tuple[np.ndarray, np.ndarray]:
    """(B, N) keys, rising with the distance, and relevance -> average precision and relevant items of each query."""
    if setting.exclude is not None:
        _leave_out(keys, relevant, each, setting, int(keys.max()) + 1)
    if setting.ties == "index":
        groups = Groups.from_ranking(_ranked_relevance(keys, relevant))
    else:
        groups = Groups.from_sorted_keys(*_sorted_by_key(keys, relevant)).ordered(setting.ties)
    return _measure_groups(groups, keys, relevant, each, setting, curves)


def _measure_groups(
    groups: Groups, keys: np.ndarray, relevant: np.ndarray, each: np.ndarray, setting: "_Setting", curves: Curves
) -> tuple[np.ndarray, np.ndarray]:
    counts = np.count_nonzero(relevant, axis=1)
    curves.add(groups, counts)
    if setting.partners is not None:
        curves.add_pairs(_pair_groups(keys, setting.partners[each], setting.ties))
    return _average_precisions(groups, counts, setting), counts


def _leave_out(keys: np.ndarray, relevant: np.ndarray, each: np.ndarray, setting: "_Setting", last: int) -> None:
    """Put what queries leave out last, where nothing counts it, in place."""
    assert setting.exclude is not None
    out = np.flatnonzero(setting.exclude[each] >= 0)
    keys[out, setting.exclude[each][out]] = last
    relevant[out, setting.exclude[each][out]] = False


def _distances(q: Array, db: Array, rows: np.ndarray) -> np.ndarray:
    """Hamming distance of each query to one database row, int64 (B,)."""
    return np.asarray(np.unpackbits(to_numpy(q) ^ to_numpy(db)[rows], axis=1).sum(axis=1, dtype=np.int64))


def _take_out(
    exclude: np.ndarray, q: Array, db: Array, labels: Labels, rows: slice, items: np.ndarray, hits: np.ndarray
) -> None:
    """Take what each query leaves out from the histograms of items and of relevant ones, in place."""
    out = np.flatnonzero(exclude >= 0)
    level = _distances(q, db, exclude)[out]
    items[out, level] -= 1
    hits[out, level] -= labels.relevant_at(rows, exclude)[out]


@dataclass(frozen=True)
class _Setting:
    """What an evaluation is to measure, checked."""

    rule: Convention
    ties: str
    k: int | None
    cut: int  # k, or the database size
    size: int  # ranks: the database size, less one where every query leaves itself out
    partners: np.ndarray | None
    exclude: np.ndarray | None
    harmonic: np.ndarray


def _check_setting(
    labels: Labels, k: int | None, convention: str, ties: str, pairs: object, exclude_self: object
) -> _Setting:
    rule, tie_rule = find_convention(convention), find_ties(ties)
    exclude = check_exclude(exclude_self, labels.num_queries, labels.num_database)
    size = labels.num_database - (exclude is not None and bool((exclude >= 0).all()))
    checked_k = None if k is None else as_integer(k, "k", 1, also=", or None for the whole ranking")
    cut = size if checked_k is None else min(checked_k, size)
    if rule.zero == "skip hits = 0" and tie_rule == "tie_aware" and cut < size:
        raise InputError(
            f"{rule.name} at k={k} has no tie-aware value: which queries count depends on the order of ties; "
            "use k=None, another tie rule, or topk_hits"
        )
    harmonic = harmonic_numbers(0 if tie_rule in ("index", "threshold") else size)
    partners = check_pairs(pairs, labels.num_queries, labels.num_database, exclude)
    return _Setting(rule, tie_rule, checked_k, cut, size, partners, exclude, harmonic)


def _evaluate(
    measure: Callable[[slice, Curves], tuple[np.ndarray, np.ndarray]],
    block: int,
    setting: _Setting,
    labels: Labels,
    levels: int | None,
    metric: str,
) -> RetrievalResult:
    """measure(rows, curves) -> (B,) average precision and (B,) relevant items; it adds the block to the curves."""
    num_queries, size = labels.num_queries, setting.size
    ap, relevant_counts = np.empty(num_queries), np.empty(num_queries, dtype=np.int64)
    curves = Curves(size, levels, setting.partners is not None)
    for start in range(0, num_queries, block):
        rows = slice(start, min(start + block, num_queries))
        ap[rows], relevant_counts[rows] = measure(rows, curves)
    curves.accumulate()
    counted = ~np.isnan(ap)
    return RetrievalResult(
        map=float(ap[counted].mean()) if counted.any() else float("nan"),
        ap=ap,
        relevant=relevant_counts,
        convention=setting.rule.name,
        ties=setting.ties,
        k=setting.k,
        metric=metric,
        num_queries=num_queries,
        num_database=size,
        num_counted=int(counted.sum()),
        _curves=curves,
    )


def _divide(sums: np.ndarray, inside: np.ndarray, counts: np.ndarray, setting: _Setting) -> np.ndarray:
    """(B,) average precision from sums over hits that are certain; nan where the convention leaves the query out."""
    rule = setting.rule
    below = {"R": counts, "hits": inside, "min": np.minimum(setting.cut, counts)}[rule.denominator]
    ap: np.ndarray = sums / np.maximum(below, 1)
    if rule.zero != "counts 0":
        ap[below == 0] = np.nan
    return ap


def _average_precisions(groups: Groups, counts: np.ndarray, setting: _Setting) -> np.ndarray:
    """(B,) expected average precision; nan where the convention leaves the query out."""
    rule, cut, harmonic, size = setting.rule, setting.cut, setting.harmonic, len(counts)
    capped = np.minimum(cut, counts)  # min(k, R)
    if rule.cut == "hits" and groups.single:
        wanted = np.clip(capped[groups.query] - groups.hits_before, 0, groups.relevant)
        sums = wanted * ((groups.hits_before + groups.relevant) / (groups.before + 1))
    elif rule.cut == "hits":
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
    ap: np.ndarray = totals / np.where(below > 0, below, 1)
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
    return np.asarray(packed & 1, dtype=bool)


def _sorted_by_key(keys: np.ndarray, relevant: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(B, N) int64 keys and relevance, both in the order of keys; among equal keys in any order."""
    packed = (keys << 1) | relevant
    packed.sort(axis=1)
    return packed >> 1, (packed & 1).astype(bool)
