"""When two items are relevant to each other, in one place: they share a label."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from cmr_fast.errors import InputError
from cmr_fast.ops._tensors import check_values, from_table


def share_label(query: Tensor, database: Tensor) -> Tensor:
    """Which items of the database share a label with each query.

    Parameters
    ----------
    query, database : Tensor
        Class ids, integers (Q,) and (N,), or multi-hot rows (Q, C) and (N, C), on one device.

    Returns
    -------
    Tensor
        bool (Q, N).
    """
    if query.ndim == 1:
        return query[:, None] == database
    return (query.float() @ database.float().T) > 0


def share_bit(query: Tensor, database: Tensor) -> Tensor:
    """Which items of the database share a label with each query, of labels as the kernels take them.

    Parameters
    ----------
    query, database : Tensor
        Class ids, integers (Q,) and (N,), or packed multi-hot labels, integers (Q, W) and (N, W), on one device.

    Returns
    -------
    Tensor
        bool (Q, N).
    """
    if query.ndim == 1:
        return query[:, None] == database
    shared = torch.zeros((len(query), len(database)), dtype=torch.bool, device=query.device)
    for a, b in zip(query.T, database.T, strict=True):
        shared |= (a[:, None] & b) != 0
    return shared


class Labels:
    """Relevance of blocks of queries: equal class ids, or a shared bit of packed multi-hot labels.

    Parameters
    ----------
    q_labels, db_labels
        As `label_array` takes them, both of one kind.
    num_queries, num_database
        How many rows each must have.

    Raises
    ------
    InputError
        For labels of another kind or count, naming `q_labels` or `db_labels`.
    """

    def __init__(self, q_labels: object, db_labels: object, num_queries: int, num_database: int) -> None:
        q, db = label_array(q_labels, "q_labels"), label_array(db_labels, "db_labels")
        for name, labels, count in (("q_labels", q, num_queries), ("db_labels", db, num_database)):
            if len(labels) != count:
                row = f"; one row of {count} class ids goes in as {name}[0]" if labels.shape == (1, count) else ""
                raise InputError(
                    f"{name} must have a row per code or embedding: {count} of these, {len(labels)} labels{row}"
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
        """Which items of the database are relevant to a block of queries, bool (B, N)."""
        if not self._multi:
            return np.asarray(self._q[rows, None] == self._db)
        out = np.zeros((rows.stop - rows.start, self.num_database), dtype=bool)
        for q, db in zip(self._q.T, self._db.T, strict=True):
            out |= (q[rows, None] & db) != 0
        return out

    def relevant_at(self, rows: slice, items: np.ndarray) -> np.ndarray:
        """Whether one database row for each query of a block, int64 (B,), is relevant to it: bool (B,)."""
        if not self._multi:
            return np.asarray(self._q[rows] == self._db[items])
        return np.asarray((self._q[rows] & self._db[items]).any(axis=1))

    def packed(self) -> tuple[np.ndarray, np.ndarray]:
        """Both as ops.ranking takes them: uint8 (N, L) of bits, or int32 (N,) class ids."""
        if self._multi:
            return self._q.view(np.uint8), self._db.view(np.uint8)
        q, db = self._q, self._db
        if min(q.min(), db.min()) < -(2**31) or max(q.max(), db.max()) >= 2**31:
            both = np.unique(np.concatenate([q, db]), return_inverse=True)[1]
            q, db = both[: len(q)], both[len(q) :]
        return q.astype(np.int32), db.astype(np.int32)


def label_array(labels: object, name: str) -> np.ndarray:
    """Labels in one of two forms.

    Parameters
    ----------
    labels
        Class ids, integers (N,), or multi-hot rows (N, C) of 0 and 1 of any number type: a numpy array, a torch tensor
        (sparse ones too), a scipy sparse matrix, a pandas or polars Series or DataFrame, or lists.
    name
        What errors call them.

    Returns
    -------
    ndarray
        int64 (N,) or bool (N, C).

    Raises
    ------
    InputError
        For anything else: masked arrays; a column (N, 1) of numbers, which may mean class ids as well as one label in
        multi-hot form (bool is the latter).
    """
    x = _sparse_array(labels, name) if hasattr(labels, "tocsr") else _dense_array(labels, name)
    if x.ndim == 1 and x.dtype.kind in "iu":
        if x.dtype == np.uint64 and len(x) and x.max() >= 2**63:
            raise InputError(f"{name} must be class ids below 2^63, got {x.max()}")
        return x.astype(np.int64)
    if x.ndim == 2 and x.shape[1] == 1 and x.dtype.kind in "iuf":
        raise InputError(
            f"{name} must be (N,) integer class ids or (N, C) multi-hot, got one column {x.shape}: class ids go in as "
            f"{name}[:, 0], one label in multi-hot form as bool"
        )
    if x.ndim == 2 and x.shape[1] and x.dtype.kind in "biuf":
        if x.dtype != bool and not ((x == 0) | (x == 1)).all():
            raise InputError(f"{name} {x.shape} must be multi-hot, 0 and 1 only; class ids go in as (N,) integers")
        return x.astype(bool)
    of = "" if isinstance(labels, np.ndarray | Tensor) else f" ({type(labels).__name__})"
    raise InputError(
        f"{name} must be (N,) integer class ids or (N, C) multi-hot of 0 and 1, got {x.dtype} {x.shape}{of}"
    )


def _dense_array(labels: object, name: str) -> np.ndarray:
    if isinstance(labels, Tensor):
        check_values(labels, name)
        x = labels.detach()
        x = x.to_dense() if x.layout != torch.strided else x
        return (x.float() if x.dtype == torch.bfloat16 else x).cpu().numpy()
    if isinstance(labels, np.ma.MaskedArray) and np.ma.is_masked(labels):
        raise InputError(f"{name} must not be masked: expected .filled(...) or the rows that are there, got a mask")
    try:
        return from_table(labels)
    except (TypeError, ValueError) as error:  # ValueError: rows of several lengths
        raise InputError(f"{name} must be labels, got {type(labels).__name__} ({error})") from error


def _sparse_array(labels: Any, name: str) -> np.ndarray:
    """A scipy sparse matrix or array as bool (N, C); its zeros are never made into wider numbers."""
    rows = labels.tocsr()
    if rows.ndim != 2 or rows.dtype.kind not in "biuf" or not ((rows.data == 0) | (rows.data == 1)).all():
        raise InputError(
            f"{name} must be multi-hot, (N, C) of 0 and 1, got a sparse {type(labels).__name__} of {rows.dtype} "
            f"{rows.shape} with other values"
        )
    return np.asarray(rows.astype(bool).toarray())


def _words(labels: np.ndarray) -> np.ndarray:
    """(N, C) bool -> (N, W) of the narrowest unsigned words that hold C bits."""
    packed = np.packbits(labels, axis=1)
    width = next(w for w in (1, 2, 4, 8) if w >= packed.shape[1] or w == 8)
    packed = np.pad(packed, ((0, 0), (0, -packed.shape[1] % width)))
    return np.ascontiguousarray(packed).view(f"u{width}")
