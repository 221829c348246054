"""When two items are relevant to each other, in one place: they share a label."""

import torch
from torch import Tensor


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
