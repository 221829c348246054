"""Retrieval metrics from packed codes or embeddings, by named convention and tie rule, in blocks of queries.

Distances become small integers; a block of queries is reduced to groups of equally distant items (see _ties), and
every number is a sum over groups. From codes the tie-aware, optimistic and pessimistic values need only histograms of
distances; the index order is a counting sort of them. Nothing of the size of queries x database is ever held.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from cmr_fast.errors import InputError
from cmr_fast.ops import hamming_distances
from cmr_fast.retrieval._ties import (
    Groups,
    chance_of_a_hit,
    harmonic_numbers,
    mixed,
    precision_sums,
    sum_first_hits,
    sum_over_hits,
)
from cmr_fast.retrieval.conventions import Convention, find_convention, find_ties

Array = np.ndarray | Tensor
Ranks = int | Sequence[int] | Array
ZeroRelevant = Literal["zero", "skip"]
METRICS = ("cosine", "l2", "ip")
_BLOCK = 1 << 21  # query x database cells held at once
_GRID = 1 << 38  # embedding scores are compared as integers on this grid


class PrecisionRecall(NamedTuple):
    """A curve: `at` int64 (ranks or radii), `precision` and `recall` float64, all (P,)."""

    at: np.ndarray
    precision: np.ndarray
    recall: np.ndarray


@dataclass(frozen=True)
class RetrievalResult:
    """What one ranking of a database by a set of queries is worth. Every array is numpy float64.

    map            mean average precision over the queries that the convention counts (nan where it counts none)
    ap             (Q,) average precision per query; nan where the convention leaves the query out
    relevant       (Q,) int64, relevant items of each query in the database
    convention, ties, k, metric                 as asked (k None: the whole ranking)
    num_queries, num_database, num_counted      queries, database items, queries in the mean

    Under ties="tie_aware" every value of the curves, too, is the exact mean over the orders of equally distant items.
    The curves do not depend on the convention or on k.
    """

    map: float
    ap: np.ndarray = field(repr=False)
    relevant: np.ndarray = field(repr=False)
    convention: str
    ties: str
    k: int | None
    metric: str
    num_queries: int
    num_database: int
    num_counted: int
    _curves: "_Curves" = field(repr=False)

    def precision_at(self, ks: Ranks, *, zero_relevant: ZeroRelevant = "zero") -> np.ndarray:
        """Prec@K, hits in the first K over K, mean over queries; over a range of K it is the precision-scope curve.

        K beyond the database keeps K below the line. zero_relevant="skip" leaves out queries with nothing to find.
        """
        k = _check_ks(ks)
        return self._curves.hits[np.minimum(k, self.num_database)] / k / self._mean_over(zero_relevant)

    def recall_at(self, ks: Ranks, *, zero_relevant: ZeroRelevant = "zero") -> np.ndarray:
        """Recall@K, hits in the first K over R, mean over queries; one with nothing to find counts 0 or is left out."""
        return self._curves.recall[np.minimum(_check_ks(ks), self.num_database)] / self._mean_over(zero_relevant)

    def recall_one_at(
        self, ks: Ranks, *, relevance: Literal["label", "pair"] = "label", zero_relevant: ZeroRelevant = "zero"
    ) -> np.ndarray:
        """RecallOne@K (CMIMH, Table VII): the share of queries with a relevant item in the first K.

        relevance      "label": an item that shares a label; "pair": the query's own partner. Partners are given to the
                       evaluation as `pairs`, or are the same row where there are as many queries as database items
        """
        k = np.minimum(_check_ks(ks), self.num_database)
        if relevance == "label":
            return self._curves.any_hit[k] / self._mean_over(zero_relevant)
        if relevance != "pair":
            raise InputError(f"relevance must be 'pair' or 'label', got {relevance!r}")
        if self._curves.pair is None:
            raise InputError(
                "relevance='pair' needs the database row of each query's partner: pass pairs= to the evaluation "
                f"({self.num_queries} queries and {self.num_database} database items are not row by row)"
            )
        return self._curves.pair[k] / self.num_queries

    def precision_recall_by_rank(self, *, zero_relevant: ZeroRelevant = "zero") -> PrecisionRecall:
        """Mean precision and mean recall of the first K items, K = 1 .. database size."""
        k = np.arange(1, self.num_database + 1)
        return PrecisionRecall(
            k, self.precision_at(k, zero_relevant=zero_relevant), self.recall_at(k, zero_relevant=zero_relevant)
        )

    def precision_recall_by_radius(
        self, average: Literal["micro", "macro"] = "micro", empty: Literal[0, 1, "skip"] = 0
    ) -> PrecisionRecall:
        """Precision and recall of everything within a Hamming radius, radii 0 .. bits. Codes only.

        average    "micro" pools the retrieved items of all queries (DCMH); "macro" is the mean over queries (CPAH)
        empty      precision where nothing is within the radius: 0, 1, or "skip" (such queries leave the mean; nan
                   where nobody retrieves anything)

        Recall is retrieved relevant items over relevant items; a query with nothing to find has recall 0 in "macro".
        """
        within = self._curves.radius
        if within is None:
            raise InputError(f"curves by radius need packed codes; these are embeddings compared by {self.metric}")
        if average not in ("micro", "macro"):
            raise InputError(f"average must be 'micro' or 'macro', got {average!r}")
        if empty not in (0, 1, "skip"):
            raise InputError(f"empty must be 0, 1 or 'skip', got {empty!r}")
        if average == "micro":
            total, count = within.relevant, within.items
            recall = within.relevant / max(int(self.relevant.sum()), 1)
            missing = np.where(within.items == 0, 1.0, 0.0)
        else:
            total, count = within.precision, within.nonempty
            recall = within.recall / self.num_queries
            missing = self.num_queries - within.nonempty
        if empty != "skip":
            total, count = total + empty * missing, count + missing
        with np.errstate(invalid="ignore"):
            precision = np.true_divide(total, count)  # 0 / 0: nobody retrieves anything
        return PrecisionRecall(np.arange(len(precision)), precision, recall)

    def _mean_over(self, zero_relevant: str) -> float:
        if zero_relevant == "zero":
            return self.num_queries
        if zero_relevant != "skip":
            raise InputError(f"zero_relevant must be 'zero' or 'skip', got {zero_relevant!r}")
        return float(np.count_nonzero(self.relevant)) or np.nan


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
    queries, database = _check_code_arrays(q, db)
    width = _check_bits(bits, queries, database)
    small = np.uint8 if width <= 255 else np.uint16

    def distances(rows: slice) -> np.ndarray:
        return _numpy(hamming_distances(queries[rows], database)).astype(small)  # type: ignore[type-var]

    labels = _Labels(q_labels, db_labels, len(queries), len(database))
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
    x, y = _check_embeddings(query, database)
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
            far, bound = norms**2 + y_norms**2 - 2 * products, (norms + longest) ** 2
        else:
            far, bound = -products, norms * longest
        unit = _GRID / torch.where(bound > 0, bound, 1.0)
        return (far * unit).round_().long().cpu().numpy()

    labels = _Labels(q_labels, db_labels, len(x), len(y))
    return _evaluate(scores, labels, None, metric, k, convention, ties, pairs)


def _evaluate(
    keys_of: Callable[[slice], np.ndarray],
    labels: "_Labels",
    levels: int | None,
    metric: str,
    k: int | None,
    convention: str,
    ties: str,
    pairs: Array | None,
) -> RetrievalResult:
    """keys_of(rows) -> (B, N) integers, smaller is nearer; levels: keys are 0 .. levels - 1, None where they are many."""
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
    partners = _check_pairs(pairs, num_queries, size)
    ap, relevant_counts = np.empty(num_queries), np.empty(num_queries, dtype=np.int64)
    curves = _Curves(size, levels, partners is not None)
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
            sums[g] = sum_first_hits(*_one(groups, g), int(wanted[g]))
    else:
        ends = capped[groups.query] if rule.cut == "R" else cut
        ranks = np.clip(ends - groups.before, 0, groups.size)
        sums = precision_sums(groups, ranks, harmonic)
    totals = np.bincount(groups.query, sums, size)
    hits = np.bincount(groups.query, ranks * groups.relevant / groups.size, size)  # certain, but for the groups below
    below = {"R": counts, "min": capped, "hits": hits}[rule.denominator]
    ap = totals / np.where(below > 0, below, 1)
    if rule.denominator == "hits":
        for g in np.flatnonzero(mixed(groups, ranks)):
            query = groups.query[g]
            ap[query] = sum_over_hits(*_one(groups, g), int(ranks[g]), totals[query] - sums[g], harmonic)
    if rule.zero != "counts 0":
        ap[(hits if rule.zero == "skip hits = 0" else counts) == 0] = np.nan
    return ap


def _one(groups: Groups, g: np.integer) -> tuple[int, int, int, int]:
    return int(groups.size[g]), int(groups.relevant[g]), int(groups.before[g]), int(groups.hits_before[g])


class _Radius(NamedTuple):
    """Sums over queries of what lies within each radius, (bits + 1,) each."""

    items: np.ndarray
    relevant: np.ndarray
    nonempty: np.ndarray
    precision: np.ndarray
    recall: np.ndarray


class _Curves:
    """Sums over queries at every rank k = 0 .. N: expected hits, recall, P(a hit), P(the partner)."""

    def __init__(self, size: int, levels: int | None, with_pairs: bool) -> None:
        self.hits, self.recall, self.any_hit = np.zeros(size + 1), np.zeros(size + 1), np.zeros(size + 1)
        self.pair = np.zeros(size + 1) if with_pairs else None
        self.radius = _Radius(*(np.zeros(levels) for _ in range(5))) if levels else None

    def add(self, groups: Groups, counts: np.ndarray) -> None:
        share = groups.relevant / groups.size
        _add_steps(self.hits, groups, share)
        _add_steps(self.recall, groups, share / counts[groups.query])
        first = np.flatnonzero(np.diff(groups.query, prepend=-1))
        for g in first[groups.relevant[first] < groups.size[first]]:
            n, r, before, _ = _one(groups, g)
            self.any_hit[before + 1 : before + n + 1] += np.diff(chance_of_a_hit(n, r))
        alike = first[groups.relevant[first] == groups.size[first]]
        self.any_hit += np.bincount(groups.before[alike] + 1, minlength=len(self.any_hit))

    def add_pairs(self, groups: Groups) -> None:
        assert self.pair is not None
        _add_steps(self.pair, groups, 1 / groups.size)

    def add_radius(self, items: np.ndarray, hits: np.ndarray, counts: np.ndarray) -> None:
        assert self.radius is not None
        within, found = np.cumsum(items, axis=1), np.cumsum(hits, axis=1)
        parts = (within, found, within > 0, found / np.maximum(within, 1), found / np.maximum(counts, 1)[:, None])
        for total, part in zip(self.radius, parts, strict=True):
            total += part.sum(axis=0)

    def accumulate(self) -> None:
        """From steps to values: `hits`, `recall` and `pair` hold second differences, `any_hit` first ones."""
        for curve in (self.hits, self.recall, self.pair):
            if curve is not None:
                curve[1:] = np.cumsum(np.cumsum(curve[:-1]))
                curve[0] = 0
        np.cumsum(self.any_hit, out=self.any_hit)


def _add_steps(curve: np.ndarray, groups: Groups, share: np.ndarray) -> None:
    """Every rank of a group adds `share` to the hits."""
    curve += np.bincount(groups.before, share, len(curve))
    curve -= np.bincount(groups.before + groups.size, share, len(curve))


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
        order = np.argsort(keys, axis=1, kind="stable")  # numpy counts (radix) where keys have 8 or 16 bits
        return np.take_along_axis(relevant, order, axis=1)
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


class _Labels:
    """Relevance of blocks of queries: equal class ids, or a shared bit of packed multi-hot labels."""

    def __init__(self, q_labels: Array, db_labels: Array, num_queries: int, num_database: int) -> None:
        q, db = _label_array(q_labels, "q_labels"), _label_array(db_labels, "db_labels")
        for name, labels, count in (("q_labels", q, num_queries), ("db_labels", db, num_database)):
            if len(labels) != count:
                raise InputError(
                    f"{name} must have a row per code or embedding: {count} of these, {len(labels)} labels"
                )
        if q.shape[1:] != db.shape[1:]:
            raise InputError(
                "q_labels and db_labels must both be (N,) class ids or both (N, C) multi-hot of one C, "
                f"got {q.shape} and {db.shape}"
            )
        self.num_queries, self.num_database = num_queries, num_database
        self._multi = q.ndim == 2
        self._q, self._db = (_words(q), _words(db)) if self._multi else (q, db)

    def relevant(self, rows: slice) -> np.ndarray:
        """bool (B, N)."""
        if not self._multi:
            return self._q[rows, None] == self._db
        out = np.zeros((rows.stop - rows.start, self.num_database), dtype=bool)
        for q, db in zip(self._q.T, self._db.T, strict=True):
            out |= (q[rows, None] & db) != 0
        return out


def _label_array(labels: object, name: str) -> np.ndarray:
    x = _numpy(labels)
    if x.ndim == 1 and x.dtype.kind in "iu":
        return x.astype(np.int64)
    if x.ndim == 2 and x.dtype.kind in "biuf" and x.shape[1]:
        if not np.isin(x, (0, 1)).all():
            raise InputError(f"{name} {x.shape} must be multi-hot, 0 and 1 only; class ids go in as (N,) integers")
        return x.astype(bool)
    raise InputError(f"{name} must be (N,) integer class ids or (N, C) multi-hot of 0 and 1, got {x.dtype} {x.shape}")


def _words(labels: np.ndarray) -> np.ndarray:
    """(N, C) bool -> (N, W) of the narrowest unsigned words that hold C bits."""
    packed = np.packbits(labels, axis=1)
    width = next(w for w in (1, 2, 4, 8) if w >= packed.shape[1] or w == 8)
    packed = np.pad(packed, ((0, 0), (0, -packed.shape[1] % width)))
    return np.ascontiguousarray(packed).view(f"u{width}")


def _numpy(x: object) -> np.ndarray:
    return x.detach().cpu().numpy() if isinstance(x, Tensor) else np.asarray(x)


def _check_code_arrays(q: Array, db: Array) -> tuple[Array, Array]:
    for name, codes in (("q", q), ("db", db)):
        if not isinstance(codes, (np.ndarray, Tensor)) or codes.ndim != 2:
            raise InputError(f"{name} must be packed codes, uint8 (N, nbytes), got {_describe(codes)}")
        if str(codes.dtype).removeprefix("torch.") != "uint8":
            raise InputError(f"{name} must be packed codes, uint8 (N, nbytes) (see pack_codes), got {_describe(codes)}")
        if len(codes) == 0:
            raise InputError(f"{name} must hold at least one code, got {_describe(codes)}")
    if q.shape[1] != db.shape[1]:
        raise InputError(f"q and db must have the same bits: q has {q.shape[1]} bytes a code, db has {db.shape[1]}")
    if isinstance(q, Tensor) != isinstance(db, Tensor):
        return _numpy(q), _numpy(db)
    return q, db


def _check_bits(bits: int | None, q: Array, db: Array) -> int:
    held = 8 * q.shape[1]
    if bits is None:
        return held
    if not held - 8 < bits <= held:
        raise InputError(f"codes of {q.shape[1]} bytes hold {held - 7} to {held} bits, got bits={bits}")
    for name, codes in (("q", q), ("db", db)):
        if bits % 8 and bool((codes[:, -1] >> bits % 8).any()):
            raise InputError(f"{name} has bits set beyond bits={bits}: was it packed with another number of bits?")
    return int(bits)


def _check_embeddings(query: Array, database: Array) -> tuple[Tensor, Tensor]:
    out = []
    for name, values in (("query", query), ("database", database)):
        if not isinstance(values, (np.ndarray, Tensor)) or values.ndim != 2 or 0 in values.shape:
            raise InputError(f"{name} must be (N, d) embeddings, N and d of 1 or more, got {_describe(values)}")
        if values.is_complex() if isinstance(values, Tensor) else values.dtype.kind not in "biuf":
            raise InputError(f"{name} must hold real numbers, got {_describe(values)}")
        if isinstance(values, Tensor):
            x = (values if values.device.type == "cuda" else values.cpu()).detach().double()  # others may lack float64
        else:
            x = torch.from_numpy(values.astype(np.float64, order="C"))
        bad = ~torch.isfinite(x.square().sum(dim=1))
        if bool(bad.any()):
            first = int(bad.nonzero()[0])
            raise InputError(f"{name} must be finite: {int(bad.sum())} rows are not, the first is row {first}")
        out.append(x)
    if out[0].shape[1] != out[1].shape[1]:
        raise InputError(f"query and database must have one width, got {tuple(out[0].shape)} and {tuple(out[1].shape)}")
    return out[0], out[1].to(out[0].device)


def _check_pairs(pairs: Array | None, num_queries: int, size: int) -> np.ndarray | None:
    if pairs is None:
        return np.arange(size) if num_queries == size else None
    x = _numpy(pairs)
    if x.shape != (num_queries,) or x.dtype.kind not in "iu" or x.min() < 0 or x.max() >= size:
        raise InputError(f"pairs must be ({num_queries},) database rows from 0 to {size - 1}, got {x.dtype} {x.shape}")
    return x.astype(np.int64)


def _check_ks(ks: object) -> np.ndarray:
    k = _numpy(ks)
    if k.dtype.kind not in "iu" or k.size == 0 or k.min() < 1:
        raise InputError(f"ks must be integers of 1 or more, got {ks!r}")
    return k.astype(np.int64)


def _describe(x: object) -> str:
    return f"{x.dtype} {tuple(x.shape)}" if isinstance(x, (np.ndarray, Tensor)) else type(x).__name__
