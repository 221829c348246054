"""Naive oracles: obviously right, never fast. Every kernel is tested against these."""

import numpy as np


def hamming_distances(q: np.ndarray, db: np.ndarray) -> np.ndarray:
    """(Q, nbytes), (N, nbytes) uint8 -> (Q, N) int32."""
    out = np.empty((len(q), len(db)), dtype=np.int32)
    for i, code in enumerate(q):
        out[i] = np.unpackbits(code ^ db, axis=1).sum(axis=1)
    return out


def hamming_topk(q: np.ndarray, db: np.ndarray, k: int, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """A stable sort by distance, so ties go to the lower index; padded with -1 and bits + 1."""
    distances = np.full((len(q), k), bits + 1, dtype=np.int32)
    indices = np.full((len(q), k), -1, dtype=np.int64)
    for i, row in enumerate(hamming_distances(q, db)):
        order = np.argsort(row, kind="stable")[:k]
        distances[i, : len(order)] = row[order]
        indices[i, : len(order)] = order
    return distances, indices


def hamming_range(q: np.ndarray, db: np.ndarray, radius: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Everything at distance <= radius, in index order within a query."""
    table = hamming_distances(q, db)
    hits = [np.flatnonzero(row <= radius) for row in table]
    lims = np.cumsum([0] + [len(h) for h in hits], dtype=np.int64)
    distances = np.concatenate([np.empty(0, np.int32)] + [row[h] for row, h in zip(table, hits, strict=True)])
    return lims, distances, np.concatenate([np.empty(0, np.int64), *hits])


def pack_codes(bits: np.ndarray) -> np.ndarray:
    """(N, bits) of 0 and 1 -> (N, ceil(bits / 8)) uint8, bit j of a row in byte j // 8 at position j % 8."""
    out = np.zeros((len(bits), -(-bits.shape[1] // 8)), dtype=np.uint8)
    for j in range(bits.shape[1]):
        out[:, j // 8] |= bits[:, j].astype(np.uint8) << (j % 8)
    return out


def ranking(
    q: np.ndarray,
    db: np.ndarray,
    q_labels: np.ndarray,
    db_labels: np.ndarray,
    *,
    k: int | None = None,
    cut: str = "rank",
    partners: np.ndarray | None = None,
) -> dict[str, np.ndarray]:
    """Query by query: a stable sort by distance, then counting hits from the first rank to the last."""
    levels, size = 8 * db.shape[1] + 1, len(db)
    k = size if k is None else k
    out = {name: np.zeros((len(q), levels), np.int64) for name in ("items", "relevant")}
    out |= {"sums": np.zeros(len(q))} | {name: np.zeros(len(q), np.int64) for name in ("hits", "first", "tied_before")}
    out |= {"hit_steps": np.zeros(size, np.int64), "recall_steps": np.zeros(size)}
    for i, distances in enumerate(hamming_distances(q, db)):
        relevant = db_labels == q_labels[i] if db_labels.ndim == 1 else (db_labels & q_labels[i]).any(axis=1)
        np.add.at(out["items"][i], distances, 1)
        np.add.at(out["relevant"][i], distances, relevant)
        found, total = 0, int(relevant.sum())
        for rank, item in enumerate(np.argsort(distances, kind="stable"), start=1):
            if not relevant[item]:
                continue
            found += 1
            inside = {"rank": rank <= k, "relevant": rank <= min(k, total), "hits": found <= min(k, total)}[cut]
            out["sums"][i] += inside * found / rank
            out["hits"][i] += inside
            out["first"][i] = out["first"][i] or rank
            out["hit_steps"][rank - 1] += 1
            out["recall_steps"][rank - 1] += 1 / total
        if partners is not None:
            out["tied_before"][i] = (distances[: partners[i]] == distances[partners[i]]).sum()
    return out


def pairwise(
    f: np.ndarray, g: np.ndarray, s: np.ndarray, *, scale: float = 0.5, squared: bool = False
) -> tuple[float, np.ndarray, np.ndarray]:
    """The sum over all pairs in float64, and its gradients with respect to f and g."""
    f, g, s = (np.asarray(x, dtype=np.float64) for x in (f, g, s))
    theta = scale * f @ g.T
    softplus, sigmoid = np.logaddexp(0, theta), np.exp(-np.logaddexp(0, -theta))
    if squared:
        total, slope = 0.5 * ((s * theta - softplus) ** 2).sum(), (s * theta - softplus) * (s - sigmoid)
    else:
        total, slope = (softplus - s * theta).sum(), sigmoid - s
    return float(total), scale * slope @ g, scale * slope.T @ f


def sinkhorn(
    cost: np.ndarray,
    reg: float,
    mu: np.ndarray,
    nu: np.ndarray,
    max_iter: int,
    tol: float = 0.0,
    stop: str = "marginals",
) -> tuple[np.ndarray, int]:
    """One problem (m, n) in float64 by log-sum-exps: the plan and how many iterations were made."""
    cost, mu, nu = (np.asarray(x, dtype=np.float64) for x in (cost, mu, nu))
    f, g = np.zeros(len(mu)), np.where(nu > 0, 0.0, -np.inf)
    with np.errstate(divide="ignore"):
        log_mu, log_nu = np.log(mu), np.log(nu)
    done, change = 0, np.inf
    while done < max_iter and not change < tol:
        done += 1
        lse = np.logaddexp.reduce((g - cost) / reg, axis=1)
        rows, f_before = np.exp(np.minimum(f / reg + lse, 700)), f
        f = reg * (log_mu - lse)
        g = reg * (log_nu - np.logaddexp.reduce((f[:, None] - cost) / reg, axis=0))
        has = mu > 0
        change = (
            np.abs(rows - mu)[has].sum() if stop == "marginals" else np.abs(f - f_before, where=has, out=0 * f).sum()
        )
    return np.exp((f[:, None] + g - cost) / reg), done


def ipot(cost: np.ndarray, beta: float, mu: np.ndarray, nu: np.ndarray, max_iter: int, inner: int = 1) -> np.ndarray:
    """Algorithm 1 of Xie et al. 2018 for one problem, in float64 as it is written there."""
    cost, mu, nu = (np.asarray(x, dtype=np.float64) for x in (cost, mu, nu))
    g = np.exp(-cost / beta)
    plan, sigma = np.ones_like(cost), np.where(nu > 0, 1 / len(nu), 0.0)
    for _ in range(max_iter):
        q = g * plan
        for _ in range(inner):
            delta = mu / (q @ sigma)
            sigma = nu / (q.T @ delta)
        plan = delta[:, None] * q * sigma
    return plan
