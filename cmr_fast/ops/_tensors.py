"""What every op does with what comes in and goes out: arrays to tensors and back, packed codes, second derivatives."""

from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from cmr_fast.errors import InputError

Array = TypeVar("Array", np.ndarray, Tensor)
MAX_BITS = 4096


def as_tensor(x: object, name: str) -> tuple[Tensor, bool]:
    if isinstance(x, Tensor):
        if x.layout != torch.strided:
            raise InputError(f"{name} must be a dense tensor, got {x.layout}")
        return x, False
    if not isinstance(x, np.ndarray):
        raise InputError(f"{name} must be a numpy array or a torch tensor, got {type(x).__name__}")
    x = np.ascontiguousarray(x)
    if not x.flags.writeable:
        x = np.asarray(_SharedMemory(x))
    try:
        return torch.from_numpy(x), True
    except (TypeError, ValueError) as error:  # ValueError: a byte order that is not this machine's
        raise InputError(f"{name} must be bool, integer or float, got dtype {x.dtype}") from error


class _SharedMemory:
    """A read-only array (a memory map, say) as one that torch takes as it is; the ops never write to it."""

    def __init__(self, x: np.ndarray) -> None:
        self.owner = x
        self.__array_interface__ = {**x.__array_interface__, "data": (x.ctypes.data, False)}


def like_input(result: Tensor, was_numpy: bool) -> Any:
    return result.numpy() if was_numpy else result


def check_codes(codes: Tensor, name: str) -> None:
    if codes.dtype != torch.uint8 or codes.ndim != 2 or not 1 <= codes.shape[1] <= MAX_BITS // 8:
        raise InputError(
            f"{name} must be packed codes, uint8 (N, nbytes) with 1 to {MAX_BITS // 8} bytes (see pack_codes), "
            f"got {codes.dtype} {tuple(codes.shape)}"
        )


def as_codes(q: object, db: object) -> tuple[Tensor, Tensor, bool]:
    queries, was_numpy = as_tensor(q, "q")
    database, db_was_numpy = as_tensor(db, "db")
    if was_numpy != db_was_numpy:
        raise InputError("q and db must both be numpy arrays or both torch tensors")
    check_codes(queries, "q")
    check_codes(database, "db")
    if queries.shape[1] != database.shape[1]:
        raise InputError(
            f"q and db must have the same bits: q has {queries.shape[1]} bytes a code, db has {database.shape[1]}"
        )
    if queries.device != database.device:
        raise InputError(f"q and db must be on one device, got {queries.device} and {database.device}")
    return queries, database, was_numpy
