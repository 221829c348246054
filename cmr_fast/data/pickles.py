"""Pickles of plain data, read without running anything in them.

A pickle may name any function and call it. Here a name resolves only to the stand-ins below, which build numpy
arrays, dtypes and scalars by their own hand from the bytes in the file; every other name is refused. The stand-ins are
sealed classes: a pickle that tries to change them, to change what the next call does, fails.
"""

import os
import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np

from cmr_fast.data import formats
from cmr_fast.errors import InputError

_KINDS = "biufSU"
_DEPTH = 8


def load(path: str | os.PathLike[str]) -> Any:
    """The value in a pickle: numbers, text, tuples, lists, dicts, sets, and numpy arrays of numbers or text.

    Parameters
    ----------
    path : str or path
        A pickle of any protocol; those of Python 2 are read as latin1.

    Returns
    -------
    object
        Plain data; arrays of objects come as (nested) lists.

    Raises
    ------
    InputError
        For one that names anything else, which is then not run, and for one that is damaged, empty or another file.
    """
    file = Path(path)
    head = formats.first_bytes(file)
    with open(file, "rb") as stream:
        try:
            return _plain(_Reader(stream, encoding="latin1").load(), 0, {})
        except InputError as error:
            raise InputError(f"{file}: {error}") from None
        except (Exception, RecursionError, MemoryError) as error:
            if refused := _other(file, head):
                raise InputError(f"{file}: expected a pickle; it {refused}") from error
            reason = (f"{type(error).__name__}: {error}".splitlines() or [type(error).__name__])[0]
            raise InputError(f"{file}: not a pickle of arrays, lists and dicts, or damaged ({reason})") from error


def _other(file: Path, head: bytes) -> str | None:
    """What a file is that is no pickle, where it is known."""
    if refused := formats.refusal(file, head):
        return refused
    try:
        return formats.zip_refusal(file) if head.startswith(b"PK\x03\x04") else None
    except (zipfile.BadZipFile, OSError):
        return None


class _Sealed(type):
    def __setattr__(cls, name: str, value: Any) -> None:
        raise InputError(f"the pickle tries to change {cls.__name__}.{name}")

    __delattr__ = __setattr__  # type: ignore[assignment]


class _Dtype(metaclass=_Sealed):
    """numpy.dtype of one number or piece of text, or of objects."""

    __slots__ = ("code",)

    def __init__(self, code: str | bytes, *_: Any) -> None:
        self.code = np.dtype(code.decode("ascii") if isinstance(code, bytes) else code)
        if self.code.kind not in _KINDS + "O" or self.code.fields or self.code.subdtype:
            raise InputError(f"arrays must hold numbers or text, got dtype {self.code}")

    def __setstate__(self, state: tuple) -> None:
        order: Any = _text(state[1])
        size = state[5]
        if self.code.kind in "SU" and self.code.itemsize == 0 and size > 0:
            self.code = np.dtype((self.code.type, size // (4 if self.code.kind == "U" else 1)))
        self.code = self.code.newbyteorder(order)


class _Array(metaclass=_Sealed):
    """numpy's _reconstruct: an array that its state fills: version, shape, dtype, Fortran order, bytes or list."""

    __slots__ = ("value",)

    def __init__(self, *_: Any) -> None:
        self.value: Any = None

    def __setstate__(self, state: tuple) -> None:
        shape, dtype, fortran, content = state[-4:]
        self.value = _array(content, dtype, shape, "F" if fortran else "C")


class _Buffer(metaclass=_Sealed):
    """numpy's _frombuffer, in pickles of protocol 5."""

    __slots__ = ()

    def __new__(cls, content: Any, dtype: _Dtype, shape: tuple, order: str = "C") -> Any:
        return _array(content, dtype, shape, order)


class _Scalar(metaclass=_Sealed):
    """numpy's scalar."""

    __slots__ = ()

    def __new__(cls, dtype: _Dtype, content: Any) -> Any:
        return _array(content, dtype, (), "C")[()]


class _Bytes(metaclass=_Sealed):
    """_codecs.encode, by which protocol 2 writes bytes; also bytes() itself, by which it writes b""."""

    __slots__ = ()

    def __new__(cls, text: str = "", encoding: str = "latin1") -> Any:
        if not isinstance(text, str) or encoding != "latin1":
            raise InputError(f"bytes must come as latin1 text, got {type(text).__name__} as {encoding!r}")
        return text.encode("latin1")


class _Name(metaclass=_Sealed):
    """numpy.ndarray, which only ever says what kind of array _reconstruct should make."""

    __slots__ = ()


class _Set(metaclass=_Sealed):
    __slots__ = ()

    def __new__(cls, items: list | tuple = ()) -> Any:
        return set(items)


class _Ordered(metaclass=_Sealed):
    __slots__ = ()

    def __new__(cls, items: list | tuple = ()) -> Any:
        return OrderedDict(items)


_ALLOWED: dict[tuple[str, str], type] = {
    ("numpy", "dtype"): _Dtype,
    ("numpy", "ndarray"): _Name,
    ("_codecs", "encode"): _Bytes,
    ("collections", "OrderedDict"): _Ordered,
}
for _module in ("__builtin__", "builtins"):
    _ALLOWED |= {(_module, "set"): _Set, (_module, "frozenset"): _Set, (_module, "bytes"): _Bytes}
for _package in ("numpy.core", "numpy._core"):
    _ALLOWED |= {
        (f"{_package}.multiarray", "_reconstruct"): _Array,
        (f"{_package}.multiarray", "scalar"): _Scalar,
        (f"{_package}.numeric", "_frombuffer"): _Buffer,
    }


_OWNERS = {
    "torch": "torch tensors (x.numpy() makes arrays of them)",
    "pandas": "tables of pandas (x.to_numpy() makes arrays of them)",
    "scipy": "sparse matrices of scipy (x.toarray() makes arrays of them)",
    "joblib": "arrays of joblib.dump (joblib.load opens it)",
    "sklearn": "objects of scikit-learn",
    "jax": "arrays of jax (numpy.asarray makes arrays of them)",
    "jaxlib": "arrays of jax (numpy.asarray makes arrays of them)",
    "tensorflow": "tensors of TensorFlow (x.numpy() makes arrays of them)",
    "PIL": "images of Pillow (numpy.asarray makes arrays of them)",
}
"""What pickles hold that name a package."""


class _Reader(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        stand_in = _ALLOWED.get((module, name))
        if stand_in is None:
            owner = module.partition(".")[0]
            kind = f", so it holds {_OWNERS[owner]}" if owner in _OWNERS else ""
            raise InputError(
                f"the pickle wants to use {module}.{name}{kind}; only numbers, text, lists, dicts and numpy arrays are "
                "read, and nothing was run. If you trust it, open it yourself and save the arrays as .npz"
            )
        return stand_in


def _array(content: Any, dtype: _Dtype, shape: tuple, order: str) -> Any:
    if not isinstance(dtype, _Dtype):
        raise InputError(f"an array's dtype is {type(dtype).__name__}")
    shape = tuple(int(size) for size in ((shape,) if isinstance(shape, int) else shape))
    count = int(np.prod(shape, dtype=object)) if shape else 1
    if dtype.code.kind == "O":
        if not isinstance(content, list | tuple) or len(content) != count:
            raise InputError(f"an array of objects has shape {shape}, but other contents")
        return _nested(list(content), shape)
    if isinstance(content, str):
        content = content.encode("latin1")
    content = memoryview(content).cast("B") if not isinstance(content, bytes) else content
    if min(shape, default=0) < 0 or len(content) != count * dtype.code.itemsize:
        raise InputError(f"an array of shape {shape} and dtype {dtype.code} has {len(content)} bytes")
    return np.frombuffer(content, dtype.code).reshape(shape, order="F" if order == "F" else "C")


def _nested(items: list, shape: tuple[int, ...]) -> list:
    if len(shape) <= 1:
        return items
    step = len(items) // max(shape[0], 1)
    return [_nested(items[i * step : (i + 1) * step], shape[1:]) for i in range(shape[0])]


def _plain(value: Any, depth: int, done: dict[int, Any]) -> Any:
    """`value` with arrays in the place of their stand-ins; each shared part is walked once."""
    if isinstance(value, _Array):
        value = value.value
        if value is None:
            raise InputError("an array without contents")
    if value is None or isinstance(value, str | bytes | int | float | complex | np.ndarray | np.generic):
        return value
    if depth > _DEPTH:
        raise InputError(f"expected arrays, lists and dicts at most {_DEPTH} deep")
    if id(value) in done:
        return done[id(value)][1]
    if isinstance(value, dict):
        made: Any = {_key(key): _plain(item, depth + 1, done) for key, item in value.items()}
    elif isinstance(value, list | tuple | set | frozenset):
        made = type(value)(_plain(item, depth + 1, done) for item in value)
    else:
        raise InputError(f"expected arrays, lists and dicts, got {getattr(value, '__name__', type(value).__name__)}")
    # the value too, so that its id stays taken
    done[id(value)] = value, made
    return made


def _key(key: Any) -> Any:
    if not isinstance(key, str | bytes | int | float | np.generic):
        raise InputError(f"keys of a dict must be text or numbers, got {type(key).__name__}")
    return key.decode("latin1") if isinstance(key, bytes) else key


def _text(value: Any) -> str:
    return value.decode("ascii") if isinstance(value, bytes) else str(value)
