"""What an evaluation returns: the mean average precision and the curves."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import numpy as np

from cmr_fast.errors import InputError
from cmr_fast.retrieval._checks import Array, to_numpy
from cmr_fast.retrieval._ties import Groups, chance_of_a_hit

Ranks = int | Sequence[int] | Array
ZeroRelevant = Literal["zero", "skip"]


class Radius(NamedTuple):
    """Sums over queries of what lies within each radius, (bits + 1,) each."""

    items: np.ndarray
    relevant: np.ndarray
    nonempty: np.ndarray
    precision: np.ndarray
    recall: np.ndarray


class Curves:
    """Sums over queries at every rank k = 0 .. N: expected hits, recall, P(a hit), P(the partner)."""

    def __init__(self, size: int, levels: int | None, with_pairs: bool) -> None:
        self.hits, self.recall, self.any_hit = np.zeros(size + 1), np.zeros(size + 1), np.zeros(size + 1)
        self.pair = np.zeros(size + 1) if with_pairs else None
        self.hit_steps, self.recall_steps = np.zeros(size), np.zeros(size)
        self.radius = Radius(*(np.zeros(levels) for _ in range(5))) if levels else None

    def add(self, groups: Groups, counts: np.ndarray) -> None:
        """Add queries' groups of equal rank; counts (Q,) relevant items of each."""
        share = groups.relevant / groups.size
        _add_steps(self.hits, groups, share)
        _add_steps(self.recall, groups, share / counts[groups.query])
        first = np.flatnonzero(np.diff(groups.query, prepend=-1))
        for g in first[groups.relevant[first] < groups.size[first]]:
            n, r, before, _ = groups.one(g)
            self.any_hit[before + 1 : before + n + 1] += np.diff(chance_of_a_hit(n, r))
        alike = first[groups.relevant[first] >= groups.size[first]]
        self.any_hit += np.bincount(groups.before[alike] + 1, minlength=len(self.any_hit))

    def add_steps(self, hits: np.ndarray, recall: np.ndarray, first: np.ndarray) -> None:
        """Certain ranks: (N,) hits and recall that each rank adds, (B,) ranks of the first hits, 0 for none."""
        self.hit_steps += hits
        self.recall_steps += recall
        self.any_hit += np.bincount(first[first > 0], minlength=len(self.any_hit))

    def add_pairs(self, groups: Groups) -> None:
        """Add the groups that hold each query's partner."""
        assert self.pair is not None
        _add_steps(self.pair, groups, 1 / groups.size)

    def add_radius(self, items: np.ndarray, hits: np.ndarray, counts: np.ndarray) -> None:
        """Add queries by radius: items and hits (Q, bits + 1) at each distance, counts (Q,) relevant items."""
        assert self.radius is not None
        within, near = np.cumsum(items, axis=1), np.cumsum(hits, axis=1)  # relevant ones among them
        parts = (within, near, within > 0, near / np.maximum(within, 1), near / np.maximum(counts, 1)[:, None])
        for total, part in zip(self.radius, parts, strict=True):
            total += part.sum(axis=0)

    def accumulate(self) -> None:
        """From steps to values: `hits`, `recall` and `pair` hold second differences, `any_hit` first ones."""
        for curve, steps in ((self.hits, self.hit_steps), (self.recall, self.recall_steps), (self.pair, 0.0)):
            if curve is not None:
                curve[1:] = np.cumsum(np.cumsum(curve[:-1]) + steps)
                curve[0] = 0
        np.cumsum(self.any_hit, out=self.any_hit)


def _add_steps(curve: np.ndarray, groups: Groups, share: np.ndarray) -> None:
    """Every rank of a group adds `share` to the hits."""
    curve += np.bincount(groups.before, share, len(curve))
    curve -= np.bincount(groups.before + groups.size, share, len(curve))


class PrecisionRecall(NamedTuple):
    """A curve: `at` int64 (ranks or radii), `precision` and `recall` float64, all (P,)."""

    at: np.ndarray
    precision: np.ndarray
    recall: np.ndarray


@dataclass(frozen=True, eq=False)
class RetrievalResult:
    """What one ranking of a database by a set of queries is worth.

    Under ties="tie_aware" every value of the curves, too, is the exact mean over the orders of equally distant items.
    The curves do not depend on the convention or on k.

    Attributes
    ----------
    map : float
        Mean average precision over the queries that the convention counts; nan where it counts none.
    ap : ndarray
        float64 (Q,), average precision per query; nan where the convention leaves the query out.
    relevant : ndarray
        int64 (Q,), relevant items of each query in the database.
    convention, ties, k, metric
        As asked (k None: the whole ranking; metric "hamming" for codes).
    num_queries, num_database, num_counted : int
        Queries, database items to rank, queries in the mean.
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
    _curves: Curves = field(repr=False)

    def precision_at(self, ks: Ranks, *, zero_relevant: ZeroRelevant = "zero") -> np.ndarray:
        """Prec@K, hits in the first K over K, mean over queries; over a range of K it is the precision-scope curve.

        Parameters
        ----------
        ks : int or sequence of int
            Ranks, 1 or more; K beyond the database keeps K below the line.
        zero_relevant : {"zero", "skip"}
            Whether a query with nothing to find counts 0 or is left out.

        Returns
        -------
        ndarray
            float64, of the shape of `ks`.

        Raises
        ------
        InputError
            For other ranks or rules.
        """
        k = _check_ks(ks)
        return np.asarray(self._curves.hits[np.minimum(k, self.num_database)] / k / self._mean_over(zero_relevant))

    def recall_at(self, ks: Ranks, *, zero_relevant: ZeroRelevant = "zero") -> np.ndarray:
        """Recall@K, hits in the first K over R, mean over queries; arguments as for `precision_at`."""
        at = np.minimum(_check_ks(ks), self.num_database)
        return np.asarray(self._curves.recall[at] / self._mean_over(zero_relevant))

    def recall_one_at(
        self, ks: Ranks, *, relevance: Literal["label", "pair"] = "label", zero_relevant: ZeroRelevant = "zero"
    ) -> np.ndarray:
        """RecallOne@K (CMIMH, Table VII): the share of queries with a relevant item in the first K.

        Parameters
        ----------
        ks, zero_relevant
            As for `precision_at`.
        relevance : {"label", "pair"}
            "label": an item that shares a label; "pair": the query's own partner. Partners are given to the evaluation
            as `pairs`, or are the same row where there are as many queries as database items and none is left out.

        Returns
        -------
        ndarray
            float64, of the shape of `ks`.

        Raises
        ------
        InputError
            For other ranks or rules, and for pairs that the evaluation knew nothing of.
        """
        k = np.minimum(_check_ks(ks), self.num_database)
        if relevance == "label":
            return np.asarray(self._curves.any_hit[k] / self._mean_over(zero_relevant))
        if relevance != "pair":
            raise InputError(f"relevance must be 'pair' or 'label', got {relevance!r}")
        if self._curves.pair is None:
            raise InputError(
                "relevance='pair' needs the database row of each query's partner: pass pairs= to the evaluation "
                f"({self.num_queries} queries and {self.num_database} database items are not row by row)"
            )
        return np.asarray(self._curves.pair[k] / self.num_queries)

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

        Recall is retrieved relevant items over relevant items; a query with nothing to find has recall 0 in "macro".

        Parameters
        ----------
        average : {"micro", "macro"}
            "micro" pools the retrieved items of all queries (DCMH); "macro" is the mean over queries (CPAH).
        empty : {0, 1, "skip"}
            Precision where nothing is within the radius; "skip": such queries leave the mean (nan where nobody
            retrieves anything).

        Returns
        -------
        PrecisionRecall
            `at`, `precision` and `recall`, (bits + 1,) each.

        Raises
        ------
        InputError
            For embeddings and other rules.
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


def _check_ks(ks: object) -> np.ndarray:
    k = to_numpy(ks, "ks")
    if k.dtype.kind not in "iu" or k.size == 0 or k.min() < 1:
        raise InputError(f"ks must be integers of 1 or more, got {ks!r}")
    return k.astype(np.int64)
