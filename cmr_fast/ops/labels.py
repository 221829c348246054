"""When two items are relevant to each other, in one place: they share a label."""

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
