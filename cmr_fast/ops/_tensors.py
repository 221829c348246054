"""What every op does with what comes in and goes out: arrays to tensors and back, packed codes, numbers."""

import math
import numbers
from typing import Any, SupportsInt, TypeGuard, TypeVar

import numpy as np
import torch
from torch import Tensor

from cmr_fast.errors import InputError

Array = TypeVar("Array", np.ndarray, Tensor)
MAX_BITS = 4096
SEEDS = 1 << 64


def as_tensor(x: object, name: str) -> tuple[Tensor, bool]:
    """`x` as a dense tensor, sharing its memory, and whether it is a numpy array."""
    if isinstance(x, Tensor):
        if x.layout != torch.strided:
            raise InputError(f"{name} must be a dense tensor, got {x.layout}")
        return x, False
    if not isinstance(x, np.ndarray):
        raise InputError(f"{name} must be a numpy array or a torch tensor, got {type(x).__name__}")
    if isinstance(x, np.ma.MaskedArray):
        raise InputError(f"{name} must not be masked: expected .filled(...) or the rows that are there, got a mask")
    x = np.ascontiguousarray(x)
    if not x.flags.writeable:
        x = np.asarray(_SharedMemory(x))
    try:
        return torch.from_numpy(x), True
    except (TypeError, ValueError) as error:  # ValueError: a byte order that is not this machine's
        raise InputError(f"{name} must be bool, integer or float, got dtype {x.dtype}") from error


def described(x: object) -> str:
    """What a message says of something that does not fit."""
    if not isinstance(x, Tensor):
        return type(x).__name__
    layout = "" if x.layout == torch.strided else f"{x.layout} "
    return f"{layout}{x.dtype} {tuple(x.shape)} on {x.device}"


class _SharedMemory:
    """A read-only array (a memory map, say) as one that torch takes as it is; the ops never write to it."""

    def __init__(self, x: np.ndarray) -> None:
        self.owner = x
        self.__array_interface__ = {**x.__array_interface__, "data": (x.ctypes.data, False)}


def like_input(result: Tensor, was_numpy: bool) -> Any:
    """`result` as numpy where that came in."""
    return result.numpy() if was_numpy else result


def as_number(value: object, name: str, *, least: float = -math.inf, above: bool = False, finite: bool = True) -> float:
    """A number, of Python or numpy or a tensor without axes, of `least` or more (`above`: more)."""
    number = value.item() if isinstance(value, (Tensor, np.ndarray)) and value.ndim == 0 else value
    if isinstance(number, numbers.Real) and not isinstance(number, bool):
        x = float(number)
        if not finite or (abs(x) < math.inf and (x > least or (x == least and not above))):  # which dynamo traces
            return x
    expected = "" if least == -math.inf else f" above {least:g}" if above else f" of {least:g} or more"
    raise InputError(f"{name} must be a {'finite ' if finite else ''}number{expected}, got {value!r}")


def _is_integer(value: Any) -> TypeGuard[SupportsInt]:
    """Of Python, numpy, or a tensor of one; True is none."""
    if isinstance(value, Tensor):
        return value.ndim == 0 and value.dtype != torch.bool and not (value.is_floating_point() or value.is_complex())
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def as_integer(value: object, name: str, least: int, most: int | None = None, also: str = "") -> int:
    """An integer, of Python, numpy or a tensor of one, from `least` to `most`."""
    if type(value) is int or _is_integer(value):
        x = int(value)
        if x >= least and (most is None or x <= most):
            return x
    expected = f"of {least} or more" + ("" if most is None else f" and below {most + 1}")
    raise InputError(f"{name} must be an integer {expected}{also}, got {value!r}")


def as_seed(value: object, name: str = "seed") -> int:
    """A seed that torch and numpy both take."""
    return as_integer(value, name, 0, SEEDS - 1)


def check_codes(codes: Tensor, name: str) -> None:
    """Raise InputError unless `codes` are packed, uint8 (N, nbytes), saying what they probably are."""
    if codes.dtype == torch.uint8 and codes.ndim == 2 and 1 <= codes.shape[1] <= MAX_BITS // 8:
        return
    if codes.dtype == torch.int8:
        hint = ': bytes of packed bits as int8 (precision="binary" elsewhere) are meant as x.view(uint8), on both sides'
    elif codes.dtype == torch.uint8 and codes.ndim == 2 and codes.shape[1] > MAX_BITS // 8:
        hint = ": are these bits, not packed yet? See pack_codes"
    elif codes.dtype == torch.uint8 and codes.ndim == 1:
        hint = ": expected one row for each code, x[None] for one code"
    else:
        hint = ": see pack_codes"
    raise InputError(
        f"{name} must be packed codes, uint8 (N, nbytes) with 1 to {MAX_BITS // 8} bytes, got {codes.dtype} "
        f"{tuple(codes.shape)}{hint}"
    )


def as_codes(q: object, db: object) -> tuple[Tensor, Tensor, bool]:
    """Queries and database as tensors, checked to be packed codes of one width on one device; whether from numpy."""
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
