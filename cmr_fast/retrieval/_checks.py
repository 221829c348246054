"""Checks of what the evaluations are given, and relevance from labels."""

import numpy as np
import torch
from torch import Tensor

from cmr_fast.errors import InputError

Array = np.ndarray | Tensor


class Labels:
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

    def packed(self) -> tuple[np.ndarray, np.ndarray]:
        """As ops.ranking takes them: uint8 (N, L) of bits, or int32 (N,) class ids."""
        if self._multi:
            return self._q.view(np.uint8), self._db.view(np.uint8)
        q, db = self._q, self._db
        if min(q.min(), db.min()) < -(2**31) or max(q.max(), db.max()) >= 2**31:
            both = np.unique(np.concatenate([q, db]), return_inverse=True)[1]
            q, db = both[: len(q)], both[len(q) :]
        return q.astype(np.int32), db.astype(np.int32)


def _label_array(labels: object, name: str) -> np.ndarray:
    x = to_numpy(labels)
    if x.ndim == 1 and x.dtype.kind in "iu":
        return x.astype(np.int64)
    if x.ndim == 2 and x.dtype.kind in "biuf" and x.shape[1]:
        if x.dtype != bool and not ((x == 0) | (x == 1)).all():
            raise InputError(f"{name} {x.shape} must be multi-hot, 0 and 1 only; class ids go in as (N,) integers")
        return x.astype(bool)
    raise InputError(f"{name} must be (N,) integer class ids or (N, C) multi-hot of 0 and 1, got {x.dtype} {x.shape}")


def _words(labels: np.ndarray) -> np.ndarray:
    """(N, C) bool -> (N, W) of the narrowest unsigned words that hold C bits."""
    packed = np.packbits(labels, axis=1)
    width = next(w for w in (1, 2, 4, 8) if w >= packed.shape[1] or w == 8)
    packed = np.pad(packed, ((0, 0), (0, -packed.shape[1] % width)))
    return np.ascontiguousarray(packed).view(f"u{width}")


def to_numpy(x: object) -> np.ndarray:
    return x.detach().cpu().numpy() if isinstance(x, Tensor) else np.asarray(x)


def check_code_arrays(q: Array, db: Array) -> tuple[Array, Array]:
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
        return to_numpy(q), to_numpy(db)
    return q, db


def check_bits(bits: int | None, q: Array, db: Array) -> int:
    held = 8 * q.shape[1]
    if bits is None:
        return held
    if not held - 8 < bits <= held:
        raise InputError(f"codes of {q.shape[1]} bytes hold {held - 7} to {held} bits, got bits={bits}")
    for name, codes in (("q", q), ("db", db)):
        if bits % 8 and bool((codes[:, -1] >> bits % 8).any()):
            raise InputError(f"{name} has bits set beyond bits={bits}: was it packed with another number of bits?")
    return int(bits)


def check_embeddings(query: Array, database: Array) -> tuple[Tensor, Tensor]:
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


def check_pairs(pairs: Array | None, num_queries: int, size: int) -> np.ndarray | None:
    if pairs is None:
        return np.arange(size) if num_queries == size else None
    x = to_numpy(pairs)
    if x.shape != (num_queries,) or x.dtype.kind not in "iu" or x.min() < 0 or x.max() >= size:
        raise InputError(f"pairs must be ({num_queries},) database rows from 0 to {size - 1}, got {x.dtype} {x.shape}")
    return x.astype(np.int64)


def _describe(x: object) -> str:
    return f"{x.dtype} {tuple(x.shape)}" if isinstance(x, (np.ndarray, Tensor)) else type(x).__name__
