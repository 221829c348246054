"""Rankings with ties as groups, and the exact expectations over the orders inside them.

A group is a run of ranks whose items are equally distant: `size` items, `relevant` of them relevant, after `before`
items with `hits_before` relevant ones. Every order inside a group is equally likely. A tie rule is a choice of groups:
tie-aware takes them as they are; optimistic, pessimistic and index orders make groups of relevant items alone; a
threshold puts all hits of a group at its last rank. So one set of formulas serves all five. Groups without relevant
items are left out: they add nothing to any sum below.

With N = before, R0 = hits_before, n = size, r = relevant and H the harmonic numbers, the expected sum of precisions at
the hits in a group's first m ranks is (McSherry and Najork, ECIR 2008, in closed form)

    S(m) = r/n [ (R0 + 1) dH + b (m - (N + 1) dH) ],   dH = H_{N+m} - H_N,   b = (r - 1) / (n - 1)
"""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Groups:
    """Groups of a block of queries, in rank order within a query; int64 (G,) each. Every group has relevant > 0.

    single     every group is one rank (size 1), of one relevant item or, at a threshold, several: formulas shorten
    """

    query: np.ndarray
    size: np.ndarray
    relevant: np.ndarray
    before: np.ndarray
    hits_before: np.ndarray
    single: bool = False

    @classmethod
    def from_histograms(cls, items: np.ndarray, relevant: np.ndarray) -> "Groups":
        """(B, D) int64 items and relevant items at each distance -> the tied groups as they are."""
        query, distance = np.nonzero(relevant)
        n, r = items[query, distance], relevant[query, distance]
        before = np.cumsum(items, axis=1)[query, distance] - n
        return cls(query, n, r, before, np.cumsum(relevant, axis=1)[query, distance] - r)

    @classmethod
    def from_ranking(cls, relevant: np.ndarray) -> "Groups":
        """(B, N) bool in rank order -> one group of one item per hit."""
        width = relevant.shape[1]
        counts = np.count_nonzero(relevant, axis=1)
        query = np.repeat(np.arange(len(relevant)), counts)
        before = np.flatnonzero(relevant) - query * width
        ones = np.broadcast_to(np.int64(1), query.shape)
        hits_before = np.arange(len(query)) - np.repeat(np.cumsum(counts) - counts, counts)
        return cls(query, ones, ones, before, hits_before, single=True)

    @classmethod
    def from_sorted_keys(cls, keys: np.ndarray, relevant: np.ndarray) -> "Groups":
        """(B, N) ascending keys, equal where tied, and relevance in the same order -> the tied groups as they are."""
        width = keys.shape[1]
        new = np.ones(keys.shape, dtype=bool)
        new[:, 1:] = keys[:, 1:] != keys[:, :-1]
        bounds = np.append(np.flatnonzero(new), keys.size)
        hits = np.concatenate([[0], np.cumsum(relevant.ravel(), dtype=np.int64)])
        r = np.diff(hits[bounds])
        nonempty = np.flatnonzero(r)
        starts = bounds[nonempty]
        query = starts // width
        return cls(
            query,
            bounds[nonempty + 1] - starts,
            r[nonempty],
            starts - query * width,
            hits[starts] - hits[query * width],
        )

    def one(self, g: np.integer) -> tuple[int, int, int, int]:
        """Size, relevant, before and hits_before of group g."""
        return int(self.size[g]), int(self.relevant[g]), int(self.before[g]), int(self.hits_before[g])

    def ordered(self, ties: str) -> "Groups":
        """The groups under a tie rule: relevant first (optimistic), last (pessimistic), at one rank, or as they are."""
        if ties == "threshold":
            ones, last = np.ones_like(self.size), self.before + self.size - 1
            return Groups(self.query, ones, self.relevant, last, self.hits_before, single=True)
        if ties == "optimistic":
            return Groups(self.query, self.relevant, self.relevant, self.before, self.hits_before)
        if ties == "pessimistic":
            return Groups(
                self.query, self.relevant, self.relevant, self.before + self.size - self.relevant, self.hits_before
            )
        return self


def harmonic_numbers(n: int) -> np.ndarray:
    """H_0 .. H_n, float64, summed in extended precision where the machine has it."""
    table = np.zeros(n + 1)
    table[1:] = np.cumsum(1 / np.arange(1, n + 1, dtype=np.longdouble))
    return table


def _harmonic_steps(
    before: np.ndarray | int, m: np.ndarray | int, harmonic: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """dH = sum_{i=1..m} 1 / (N + i) and m - (N + 1) dH = sum (i - 1) / (N + i), N = before, without cancellation."""
    n, m = np.asarray(before, dtype=np.float64), np.asarray(m, dtype=np.float64)
    low = np.minimum(n, 63).astype(np.int64)
    table = harmonic if len(harmonic) else harmonic_numbers(0)
    last = len(table) - 1
    direct = table[np.minimum(low + m.astype(np.int64), last)] - table[np.minimum(low, last)]
    a = np.maximum(n, 64)  # from here on by the expansion of H_n - log(n) in 1 / n
    end = a + m
    x = m / a
    r = x / (2 + x)
    power, series = r * r * r, np.zeros_like(r)
    for i in range(3, 31, 2):
        series, power = series + power / i, power * r * r
    beyond = np.where(x < 0.5, x * x / (2 + x) - 2 * series, x - np.log1p(x))  # x - log(1 + x)
    rest = m * (a + end) / (12 * (a * end) ** 2) - (1 / a**4 - 1 / end**4) / 120 + (1 / a**6 - 1 / end**6) / 252
    dh = np.log1p(x) - m / (2 * a * end) + rest
    spread = a * beyond + m / (2 * end) - a * rest - dh  # m - a dH - dH
    small = n < 64
    return np.where(small, direct, dh), np.where(small, m - (n + 1) * direct, spread)


def precision_sums(groups: Groups, ranks: np.ndarray, harmonic: np.ndarray) -> np.ndarray:
    """E[sum of precisions at the hits among a group's first `ranks` ranks], (G,) float64; 0 <= ranks <= size."""
    if groups.single:
        return np.asarray(ranks * groups.relevant * ((groups.hits_before + groups.relevant) / (groups.before + 1)))
    n, r = groups.size, groups.relevant
    dh, spread = _harmonic_steps(groups.before, ranks, harmonic)
    b = (r - 1) / np.maximum(n - 1, 1)
    return np.asarray(r / n * ((groups.hits_before + 1) * dh + b * spread))


def mixed(groups: Groups, ranks: np.ndarray) -> np.ndarray:
    """Which groups are cut inside (0 < ranks < size) where items are relevant and others not: their hits are random."""
    return (ranks > 0) & (ranks < groups.size) & (groups.relevant < groups.size)


def sum_over_hits(n: int, r: int, before: int, hits_before: int, m: int, earlier: float, harmonic: np.ndarray) -> float:
    """E[(earlier + S) / (hits_before + x)], x the hits among the first m ranks of one group, S their precisions' sum.

    x is hypergeometric, and given x the first m ranks are a group of m items with x relevant ones. 0 where no hit is.
    """
    x = np.arange(max(0, m - (n - r)), min(m, r) + 1)
    p = _weights((r - x[:-1]) * (m - x[:-1]) / ((x[:-1] + 1) * (n - r - m + x[:-1] + 1)))
    dh, spread = _harmonic_steps(before, m, harmonic)
    b = (x - 1) / max(m - 1, 1)
    sums = x / m * ((hits_before + 1) * dh + b * spread)
    hits = hits_before + x
    return float(p @ np.where(hits > 0, (earlier + sums) / np.maximum(hits, 1), 0.0))


def sum_first_hits(n: int, r: int, before: int, hits_before: int, j: int) -> float:
    """E[sum of precisions at the first j hits of one group], 0 < j < r: the ranks of these hits are random.

    The item at place p (from 1) is relevant with probability r/n. Given that, x of the p - 1 items before it are
    relevant, x ~ Hyp(n-1, r-1, p-1), and it counts where x < j:
        (1 / (before + p)) E[(hits_before + 1 + x) 1(x < j)],
    and E[x 1(x < j)] = (p-1)(r-1)/(n-1) P(Hyp(n-2, r-2, p-2) < j - 1).
    """
    p = np.arange(1, n + 1)
    fewer = _later_than(n - 1, r - 1, j, p - 1)
    shifted = _later_than(n - 2, r - 2, j - 1, p - 2) if j > 1 else np.zeros(n)
    expected = (hits_before + 1) * fewer + (p - 1) * (r - 1) / (n - 1) * shifted
    return float(r / n * np.sum(expected / (before + p)))


def chance_of_a_hit(n: int, r: int) -> np.ndarray:
    """P(at least one hit among the first m ranks of a group), m = 0..n: 1 - C(n-r, m) / C(n, m), (n + 1,) float64."""
    j = np.arange(n)
    return 1 - np.concatenate([[1.0], np.cumprod(np.maximum(n - r - j, 0) / (n - j))])


def _later_than(n: int, r: int, t: int, places: np.ndarray) -> np.ndarray:
    """P(the t-th relevant item lies after `places`) in a random order of n items, r >= t of them relevant."""
    s = np.arange(t, n - r + t)
    pmf = np.zeros(n + 1)
    pmf[t : n - r + t + 1] = _weights(s / (s - t + 1) * (n - s - r + t) / (n - s))
    return np.asarray(1 - np.concatenate([[0.0], np.cumsum(pmf)])[np.maximum(places + 1, 0)])


def _weights(ratios: np.ndarray) -> np.ndarray:
    """Probabilities from the ratios of neighbours."""
    logs = np.concatenate([[0.0], np.cumsum(np.log(ratios))])
    weights = np.exp(logs - logs.max())
    return np.asarray(weights / weights.sum())
