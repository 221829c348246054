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
        hits, total = 0, int(relevant.sum())
        for rank, item in enumerate(np.argsort(distances, kind="stable"), start=1):
            if not relevant[item]:
                continue
            hits += 1
            inside = {"rank": rank <= k, "relevant": rank <= min(k, total), "hits": hits <= min(k, total)}[cut]
            out["sums"][i] += inside * hits / rank
            out["hits"][i] += inside
            out["first"][i] = out["first"][i] or rank
            out["hit_steps"][rank - 1] += 1
            out["recall_steps"][rank - 1] += 1 / total
        if partners is not None:
            out["tied_before"][i] = (distances[: partners[i]] == distances[partners[i]]).sum()
    return out


def triplet_distances(x: np.ndarray, y: np.ndarray, distance: str) -> np.ndarray:
    """float64 (A, d), (N, d) -> (A, N)."""
    out = np.empty((len(x), len(y)))
    for i, row in enumerate(x):
        if distance == "dot":
            out[i] = -(y @ row)
        elif distance == "cosine":
            out[i] = 1 - (y @ row) / (np.linalg.norm(row) * np.linalg.norm(y, axis=1))
        else:
            squares = ((row - y) ** 2).sum(1)
            out[i] = squares if distance == "squared" else np.sqrt(squares)
    return out


def share_label(a: np.ndarray, b: np.ndarray) -> bool:
    return bool((a > 0) @ (b > 0)) if a.ndim else bool(a == b)


def triplets(
    d: np.ndarray, labels: np.ndarray, other_labels: np.ndarray | None, margin: float, mining: str
) -> list[tuple[int, int, int]]:
    """(anchor, positive, negative) of the mining, by loops; other_labels None: candidates are the anchors."""
    result = []
    candidates = labels if other_labels is None else other_labels
    for a in range(len(labels)):
        alike = [share_label(labels[a], candidates[j]) for j in range(len(candidates))]
        positives = [j for j in range(len(candidates)) if alike[j] and not (other_labels is None and j == a)]
        negatives = [j for j in range(len(candidates)) if not alike[j]]
        if not positives or not negatives:
            continue
        nearest = min(negatives, key=lambda j: (d[a, j], j))
        if mining == "all":
            result += [(a, p, n) for p in positives for n in negatives]
        elif mining == "hard":
            result.append((a, min(positives, key=lambda j: (-d[a, j], j)), nearest))
        elif mining == "hard_negative":
            result += [(a, p, nearest) for p in positives]
        else:
            for p in positives:
                farther = [n for n in negatives if d[a, n] > d[a, p]]
                if farther:
                    result.append((a, p, min(farther, key=lambda j: (d[a, j], j))))
    return result


def triplet_margin(
    x: np.ndarray,
    labels: np.ndarray,
    margin: float,
    *,
    mining: str = "all",
    other: np.ndarray | None = None,
    other_labels: np.ndarray | None = None,
    distance: str = "euclidean",
    reduction: str = "mean",
) -> tuple[float, np.ndarray]:
    """Every triplet by itself, in float64: the loss, and its derivative by the distances (A, N)."""
    x = x.astype(np.float64)
    y = x if other is None else other.astype(np.float64)
    if other is not None and other_labels is None:
        other_labels = labels
    d = triplet_distances(x, y, distance)
    total, number, weights = 0.0, 0, np.zeros_like(d)
    for a, p, n in triplets(d, labels, other_labels if other is not None else None, margin, mining):
        hinge = max(0.0, d[a, p] + margin - d[a, n])
        total += hinge
        number += reduction == "mean" or (reduction == "mean_nonzero" and hinge > 0)
        if hinge > 0:
            weights[a, p] += 1
            weights[a, n] -= 1
    scale = 1.0 if reduction == "sum" else 1 / max(1, number)
    return total * scale, weights * scale


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


def pgd_step(
    x: np.ndarray, gradient: np.ndarray, origin: np.ndarray, alpha: np.ndarray, eps: np.ndarray, low: np.ndarray,
    high: np.ndarray, norm: str,
) -> np.ndarray:  # fmt: skip
    """(B, ...) in float64, element by element; alpha, eps, low and high (1 or B, 1 or C), C the size of dimension 1."""
    out = x.astype(np.float64)
    channels = x.shape[1] if x.ndim > 1 else 1
    alpha, eps, low, high = (np.broadcast_to(v, (len(x), channels)).astype(np.float64) for v in (alpha, eps, low, high))
    places = list(np.ndindex(x.shape[1:]))
    for b in range(len(x)):
        length = np.sqrt((gradient[b].astype(np.float64) ** 2).sum())
        for place in places:
            at, c = (b, *place), place[0] if place else 0
            g = float(gradient[at])
            if norm == "linf":
                delta = out[at] + alpha[b, c] * np.sign(g) - origin[at]
                out[at] = origin[at] + min(max(delta, -eps[b, c]), eps[b, c])
            elif length > 0:
                out[at] += alpha[b, c] * g / length
        if norm == "l2":
            delta = out[b] - origin[b]
            distance = np.sqrt((delta**2).sum())
            out[b] = origin[b] + delta * (min(1.0, eps[b, 0] / distance) if distance > 0 else 1.0)
        for place in places:
            at, c = (b, *place), place[0] if place else 0
            out[at] = min(max(out[at], low[b, c]), high[b, c])
    return out


def pgd_noise(seed: int, index: int, count: int) -> np.ndarray:
    """Philox4x32-10 (Salmon et al. 2011, section 4) with the key `seed` and the counter (block, index), as (-1, 1)."""
    out = []
    for block in range(-(-count // 4)):
        c = [block & 0xFFFFFFFF, block >> 32, index & 0xFFFFFFFF, (index >> 32) & 0xFFFFFFFF]
        key = [seed & 0xFFFFFFFF, seed >> 32]
        for _ in range(10):
            a, b = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
            c = [(b >> 32) ^ c[1] ^ key[0], b & 0xFFFFFFFF, (a >> 32) ^ c[3] ^ key[1], a & 0xFFFFFFFF]
            key = [(key[0] + 0x9E3779B9) & 0xFFFFFFFF, (key[1] + 0xBB67AE85) & 0xFFFFFFFF]
        out += [(2 * (word >> 9) + 1 - 2**23) / 2**23 for word in c]
    return np.array(out[:count], dtype=np.float32)


def info_nce(image: np.ndarray, text: np.ndarray, scale: float, weights: np.ndarray) -> dict[str, np.ndarray]:
    """Both directions of InfoNCE from the whole array of logits, and the gradient of the sum of all losses.

    weights (n, m), 0 or more: rows and columns are divided by their sums; without a positive they have the loss 0.
    """
    products = image @ text.T
    logits, of_logits, out = scale * products, np.zeros_like(products), {}
    for axis, name in ((1, "rows"), (0, "columns")):
        total = weights.sum(axis=axis, keepdims=True)
        target = np.divide(weights, total, out=np.zeros_like(weights), where=total > 0)
        most = logits.max(axis=axis, keepdims=True)
        log_softmax = logits - most - np.log(np.exp(logits - most).sum(axis=axis, keepdims=True))
        out[name] = -(target * log_softmax).sum(axis=axis)
        of_logits += np.where(total > 0, np.exp(log_softmax) - target, 0)
    return out | _gradients(image, text, scale, products, of_logits)


def sigmoid_loss(
    image: np.ndarray, text: np.ndarray, scale: float, bias: float, positive: np.ndarray
) -> dict[str, np.ndarray]:
    """Sum over all pairs of log(1 + exp(-z)) where positive (n, m), else log(1 + exp(z)), and its gradient."""
    products = image @ text.T
    signed = np.where(positive, -1.0, 1.0) * (scale * products + bias)
    of_logits = np.where(positive, -1.0, 1.0) / (1 + np.exp(-signed))
    out = {"loss": np.logaddexp(0, signed).sum(), "of_bias": of_logits.sum()}
    return out | _gradients(image, text, scale, products, of_logits)


def _gradients(
    image: np.ndarray, text: np.ndarray, scale: float, products: np.ndarray, of_logits: np.ndarray
) -> dict[str, np.ndarray]:
    return {
        "of_image": scale * of_logits @ text,
        "of_text": scale * of_logits.T @ image,
        "of_scale": (of_logits * products).sum(),
    }


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
