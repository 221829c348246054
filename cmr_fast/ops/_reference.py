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
