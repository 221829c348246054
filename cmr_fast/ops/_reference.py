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


def sigmoid_pairs(
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
