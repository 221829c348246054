"""What every op does with what comes in and goes out: arrays to tensors and back, packed codes, numbers."""

import math
import numbers
import os
from typing import Any, SupportsInt, TypeGuard, TypeVar

import numpy as np
import torch
from torch import Tensor

from cmr_fast.errors import InputError

Array = TypeVar("Array", np.ndarray, Tensor)
MAX_BITS = 4096
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_LARGEST = 2**1023  # of the integers that every float holds the size of
MAX_K = 2**31 - 1  # the kernels count in int32
SEEDS = 1 << 64


def as_tensor(x: object, name: str) -> tuple[Tensor, bool]:
    """`x` as a dense tensor, sharing its memory, and whether it is a numpy array."""
    if isinstance(x, Tensor):
        if x.layout != torch.strided:
            raise InputError(f"{name} must be a dense tensor, got {x.layout}")
        check_float(x, name)
        return x, False
    if not isinstance(x, np.ndarray):
        hint = ': expected numpy.load(path, mmap_mode="r")' if isinstance(x, str | os.PathLike) else ""
        raise InputError(f"{name} must be a numpy array or a torch tensor, got {type(x).__name__}{hint}")
    if isinstance(x, np.ma.MaskedArray):
        raise InputError(f"{name} must not be masked: expected .filled(...) or the rows that are there, got a mask")
    x = np.ascontiguousarray(x)
    if not x.flags.writeable:
        x = np.asarray(_SharedMemory(x))
    try:
        return torch.from_numpy(x), True
    except (TypeError, ValueError) as error:  # ValueError: a byte order that is not this machine's
        raise InputError(f"{name} must be bool, integer or float, got dtype {x.dtype}") from error


def check_float(x: Tensor, name: str) -> None:
    """Raise InputError for floats of 8 bits and fewer, which torch stores but does not compute with."""
    if x.is_floating_point() and x.dtype not in FLOATS:
        raise InputError(
            f"{name} must be float16, bfloat16, float32 or float64, got {x.dtype}: expected {name}.float()"
        )


def check_values(x: object, name: str) -> None:
    """Raise InputError for a tensor on torch's meta device, which has a shape and no values."""
    if isinstance(x, Tensor) and x.is_meta:
        raise InputError(f"{name} must hold values, got {described(x)}")


def shown(value: object) -> str:
    """The value in a message: on one short line, whatever it is."""
    if isinstance(value, int) and not isinstance(value, bool) and value.bit_length() > 1024:
        return f"an integer of {value.bit_length()} bits"
    text = " ".join(repr(value).split())
    return text if len(text) <= 200 else f"{text[:200]}..."


def fits_float(number: Any) -> bool:
    """Whether float(number) is a number, which it is not of integers beyond its range."""
    exact = isinstance(number, numbers.Rational)
    return not exact or -_LARGEST < int(number) < _LARGEST


def from_table(x: object) -> np.ndarray:
    """np.asarray(x); nullable columns of a pandas DataFrame, which come as objects, as the numbers that they hold."""
    array = np.asarray(x)
    if array.dtype == object and hasattr(x, "to_numpy"):
        array = np.array(array.tolist())  # of objects still where something is missing
    return array


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
    if isinstance(number, numbers.Real) and not isinstance(number, bool) and fits_float(number):
        x = float(number)
        if not finite or (abs(x) < math.inf and (x > least or (x == least and not above))):  # which dynamo traces
            return x
    expected = "" if least == -math.inf else f" above {least:g}" if above else f" of {least:g} or more"
    raise InputError(f"{name} must be a {'finite ' if finite else ''}number{expected}, got {shown(value)}")


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
    raise InputError(f"{name} must be an integer {expected}{also}, got {shown(value)}")


def neighbours(count: int, k: int, bits: int, device: torch.device | str, padded: bool) -> tuple[Tensor, Tensor]:
    """Room for the nearest codes of `count` queries, int32 and int64 (count, k); padded: bits + 1 and -1."""
    try:
        distances = torch.empty((count, k), dtype=torch.int32, device=device)
        indices = torch.empty((count, k), dtype=torch.int64, device=device)
    except (RuntimeError, MemoryError) as error:
        raise _too_large(count, k, device) from error
    return (distances.fill_(bits + 1), indices.fill_(-1)) if padded else (distances, indices)


def neighbour_arrays(count: int, k: int, bits: int, padded: bool) -> tuple[np.ndarray, np.ndarray]:
    """`neighbours` as numpy arrays."""
    try:
        distances, indices = np.empty((count, k), np.int32), np.empty((count, k), np.int64)
    except (MemoryError, ValueError) as error:
        raise _too_large(count, k, "cpu") from error
    if padded:
        distances.fill(bits + 1)
        indices.fill(-1)
    return distances, indices


def hits_room(total: int, device: torch.device | str) -> tuple[Tensor, Tensor]:
    """Room for distances and indices of a search within a radius, int32 and int64 (total,)."""
    try:
        return (
            torch.empty(total, dtype=torch.int32, device=device),
            torch.empty(total, dtype=torch.int64, device=device),
        )
    except (RuntimeError, MemoryError) as error:
        raise InputError(
            f"radius must be small enough for the results to be held: {total} codes within it take {12 * total} bytes, "
            f"more than there are on {device}; expected a smaller one, or fewer queries at a time"
        ) from error


def _too_large(count: int, k: int, device: torch.device | str) -> InputError:
    return InputError(
        f"k must be small enough for the results to be held: k={k} for {count} queries takes {12 * count * k} "
        f"bytes, more than there are on {device}"
    )


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
    elif codes.ndim <= 2 and codes.dtype in (torch.uint16, torch.uint32, torch.uint64):
        hint = ": words of packed bits are meant as x.view(uint8).reshape(len(x), -1)"
    else:
        hint = ": see pack_codes"
    raise InputError(
        f"{name} must be packed codes, uint8 (N, nbytes) with 1 to {MAX_BITS // 8} bytes, got {codes.dtype} "
        f"{tuple(codes.shape)}{hint}"
    )


def as_codes(q: object, db: object, names: tuple[str, str] = ("q", "db")) -> tuple[Tensor, Tensor, bool]:
    """Queries and database as tensors, checked to be packed codes of one width on one device; whether from numpy."""
    first, second = names
    queries, was_numpy = as_tensor(q, first)
    database, db_was_numpy = as_tensor(db, second)
    if was_numpy != db_was_numpy:
        raise InputError(f"{first} and {second} must both be numpy arrays or both torch tensors")
    check_codes(queries, first)
    check_codes(database, second)
    if queries.shape[1] != database.shape[1]:
        raise InputError(
            f"{first} and {second} must have the same bits: {first} has {queries.shape[1]} bytes a code, {second} has "
            f"{database.shape[1]}"
        )
    if queries.device != database.device:
        raise InputError(f"{first} and {second} must be on one device, got {queries.device} and {database.device}")
    return queries, database, was_numpy
