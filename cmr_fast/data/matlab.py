"""MATLAB files of the versions 4 and 5 (which v6 and v7 write too), read in Python and numpy alone.

scipy's reader is compiled and believes what a file says of itself: a damaged one can end the process. Here each tag is
checked against the bytes that there are, so a file from elsewhere is read or refused. The format is MathWorks'
"MAT-File Format"; v7.3 is HDF5, see `cmr_fast.data.hdf5`.

An element is a tag (uint32 type, uint32 bytes) and its data, filled up to 8 bytes; up to 4 bytes of data lie in the
tag. A variable is an element of type 14 that holds others: flags with the class, dimensions, name, then its data.
"""

import struct
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from cmr_fast.data._values import DEPTH, Cell, Foreign, decoded, dense, flattened, readers, rows_of_text, scattered

Buffer = memoryview

_NUMBERS = {1: "i1", 2: "u1", 3: "i2", 4: "u2", 5: "i4", 6: "u4", 7: "f4", 9: "f8", 12: "i8", 13: "u8"}
_TEXT = {1: "u1", 2: "u1", 3: "u2", 4: "u2", 5: "u4", 6: "u4", 16: "u1", 17: "u2", 18: "u4"}
_MATRIX, _COMPRESSED, _UTF8 = 14, 15, 16
_CELL, _STRUCT, _OBJECT, _CHAR, _SPARSE, _FUNCTION, _OPAQUE = 1, 2, 3, 4, 5, 16, 17
_NUMERIC = range(6, 16)
_HEAD = 1 << 12
"""Bytes of a compressed variable that are unpacked for its name."""


class _Header(NamedTuple):
    kind: int
    complex: bool
    shape: tuple[int, ...]
    name: str


def is_matlab5(head: bytes) -> bool:
    """Whether a file of these first 128 bytes says that it is one: version 1 in either byte order."""
    return head[124:128] in (b"\x00\x01IM", b"\x01\x00MI")


def read_matlab5(file: Path) -> dict[str, Callable[[], Any]]:
    """Name to a function that reads a variable; those in structs by `short_names`.

    Raises ValueError, zlib.error or struct.error where the file is damaged.
    """
    values: dict[tuple[str, ...], Callable[[], Any]] = {}
    size, start = file.stat().st_size, 128
    order = "<" if _bytes(file, 126, 2) == b"IM" else ">"
    while start < size:
        kind, length = struct.unpack(order + "II", _bytes(file, start, 8))
        if start + 8 + length > size:
            raise ValueError(f"a variable of {length} bytes at byte {start}, where {size - start - 8} are left")
        header = _head(kind, _bytes(file, start + 8, min(length, _HEAD)), order)
        read = partial(_read_at, file, start + 8, length, kind, order)
        if header.kind == _STRUCT:
            for path, value in flattened(header.name, read()).items():
                values[path] = partial(_same, value)
        elif header.name:  # the one without holds what MATLAB's objects are made of
            values[header.name,] = read
        start += 8 + length
    return readers(values)


def _same(value: Any) -> Any:
    return value


def _bytes(file: Path, start: int, count: int) -> Buffer:
    """Read, not mapped: a mapped file that another program cuts short ends the process."""
    with open(file, "rb") as stream:
        stream.seek(start)
        content = stream.read(count)
    if len(content) < count:
        raise ValueError(f"ends at byte {start + len(content)}, within a variable")
    return memoryview(content)


def _read_at(file: Path, start: int, length: int, kind: int, order: str) -> Any:
    content = _bytes(file, start, length)
    if kind == _COMPRESSED:
        kind, content, _ = _element(memoryview(zlib.decompress(content)), 0, order)
    if kind != _MATRIX:
        raise ValueError(f"a variable of type {kind}, expected {_MATRIX}")
    return _matrix(content, order, 0)


def _element(data: Buffer, position: int, order: str) -> tuple[int, Buffer, int]:
    """Type, data, and where the next one begins."""
    if position + 8 > len(data):
        raise ValueError(f"ends within the tag at byte {position}")
    kind, size = struct.unpack_from(order + "II", data, position)
    if small := kind >> 16:
        if small > 4:
            raise ValueError(f"a short element of {small} bytes at byte {position}")
        return kind & 0xFFFF, data[position + 4 : position + 4 + small], position + 8
    end = position + 8 + size
    if end > len(data):
        raise ValueError(f"an element of {size} bytes at byte {position}, where {len(data) - position - 8} are left")
    return kind, data[position + 8 : end], end if kind == _COMPRESSED else min(len(data), end + -size % 8)


def _head(kind: int, content: Buffer, order: str) -> _Header:
    """What a variable's first elements say of it."""
    if kind == _COMPRESSED:
        content = memoryview(zlib.decompressobj().decompress(content, _HEAD))
        (kind,) = struct.unpack_from(order + "I", content)
        content = content[8:]
    if kind != _MATRIX:
        raise ValueError(f"a variable of type {kind}, expected {_MATRIX}")
    return _header(content, order)[0]


def _header(data: Buffer, order: str) -> tuple[_Header, int]:
    kind, flags, position = _element(data, 0, order)
    if kind != 6 or len(flags) != 8:
        raise ValueError("a variable without flags")
    (word,) = struct.unpack_from(order + "I", flags)
    shape: tuple[int, ...] = ()
    if word & 0xFF != _OPAQUE:
        kind, sizes, position = _element(data, position, order)
        if kind != 5 or len(sizes) % 4 or not 8 <= len(sizes) <= 128:
            raise ValueError("a variable without dimensions")
        shape = tuple(np.frombuffer(sizes, order + "i4").tolist())
        if min(shape) < 0:
            raise ValueError(f"a variable of shape {shape}")
    kind, name, position = _element(data, position, order)
    if kind not in (1, 2, _UTF8):
        raise ValueError("a variable without a name")
    return _Header(word & 0xFF, bool(word & 0x800), shape, decoded(bytes(name))), position


def _matrix(data: Buffer, order: str, depth: int) -> Any:
    if depth > DEPTH:
        raise ValueError(f"cells and structs more than {DEPTH} deep")
    if not len(data):
        return np.zeros((0, 0))
    header, position = _header(data, order)
    if header.kind in _NUMERIC:
        if header.complex:
            return Foreign("complex array")
        return _numbers(_element(data, position, order), order).reshape(_fits(header, data), order="F")
    if header.kind == _CHAR:
        return _char(*_element(data, position, order)[:2], order, header.shape)
    if header.kind == _SPARSE:
        return _sparse(data, position, order, header)
    if header.kind == _CELL:
        items, _ = _several(data, position, order, _count(header, data), depth)
        return Cell(items, header.shape)
    if header.kind == _STRUCT:
        return _struct(data, position, order, header, depth)
    if header.kind == _OPAQUE:  # its name, then MCOS, then its class
        _, kind, _ = _element(data, _element(data, position, order)[2], order)
        return Foreign(bytes(kind).decode("latin1"))
    return Foreign(
        {_OBJECT: "object", _FUNCTION: "function_handle"}.get(header.kind, f"variable of class {header.kind}")
    )


def _count(header: _Header, data: Buffer) -> int:
    """How many matrices a cell array or struct array holds; each takes a tag at least."""
    count = 1
    for size in header.shape:
        count *= size
    if count > len(data) // 8:
        raise ValueError(f"a cell or struct array of shape {header.shape} in {len(data)} bytes")
    return count


def _fits(header: _Header, data: Buffer) -> tuple[int, ...]:
    if any(size > len(data) for size in header.shape):
        raise ValueError(f"an array of shape {header.shape} in {len(data)} bytes")
    return header.shape


def _numbers(element: tuple[int, Buffer, int], order: str) -> np.ndarray:
    kind, content, _ = element
    if kind not in _NUMBERS:
        raise ValueError(f"numbers of type {kind}")
    return np.frombuffer(content, order + _NUMBERS[kind])


def _char(kind: int, content: Buffer, order: str, shape: tuple[int, ...]) -> np.ndarray:
    if kind not in _TEXT:
        raise ValueError(f"text of type {kind}")
    codes = np.frombuffer(content, order + _TEXT[kind])
    if len(shape) == 2 and shape[0] == 1:
        return rows_of_text(codes[None])
    if kind == _UTF8 and bytes(content).isascii() is False:  # sizes count letters, not bytes
        codes = np.array([ord(letter) for letter in bytes(content).decode("utf-8")], dtype="<u4")
    if any(size > len(codes) for size in shape) and len(codes):
        raise ValueError(f"text of shape {shape} in {len(codes)} letters")
    return rows_of_text(codes.reshape(shape, order="F"))


def _sparse(data: Buffer, position: int, order: str, header: _Header) -> Any:
    parts = []
    for _ in range(3):
        element = _element(data, position, order)
        parts.append(_numbers(element, order))
        position = element[2]
    if header.complex:
        return Foreign("complex array")
    if len(header.shape) != 2:
        raise ValueError(f"a sparse matrix of shape {header.shape}")
    return dense(parts[0], parts[1], parts[2], (header.shape[0], header.shape[1]))


def _several(data: Buffer, position: int, order: str, count: int, depth: int) -> tuple[list[Any], int]:
    items = []
    for _ in range(count):
        kind, content, position = _element(data, position, order)
        if kind != _MATRIX:
            raise ValueError(f"an entry of type {kind}, expected {_MATRIX}")
        items.append(_matrix(content, order, depth + 1))
    return items, position


def _struct(data: Buffer, position: int, order: str, header: _Header, depth: int) -> dict[str, Any]:
    """Field to value; of a struct array to the values of all, as a cell array of its shape."""
    kind, width, position = _element(data, position, order)
    if kind != 5 or len(width) != 4:
        raise ValueError("a struct without the length of its names")
    size = struct.unpack(order + "i", width)[0]
    _, names, position = _element(data, position, order)
    if size < 1 or len(names) % size:
        raise ValueError(f"a struct with names of {size} bytes in {len(names)}")
    fields = [decoded(bytes(names[i : i + size]).split(b"\0")[0]) for i in range(0, len(names), size)]
    count = _count(header, data)
    if count * len(fields) > len(data) // 8:
        raise ValueError(f"{count} structs of {len(fields)} fields in {len(data)} bytes")
    items, _ = _several(data, position, order, count * len(fields), depth)
    columns = {name: items[i :: len(fields)] for i, name in enumerate(fields)}
    if count == 1:
        return {name: values[0] for name, values in columns.items()}
    return {name: Cell(values, header.shape) for name, values in columns.items()}


class _Record(NamedTuple):
    order: str
    dtype: str
    layout: int  # 0 numbers, 1 text, 2 sparse
    shape: tuple[int, int]
    complex: bool
    name: str
    start: int
    end: int


_NAME4 = 64
_DTYPES4 = ("f8", "f4", "i4", "i2", "u2", "u1")


def is_matlab4(head: bytes, size: int) -> bool:
    """Whether a file of these first bytes and of `size` can be one: it has no mark, but its first record must fit."""
    try:
        return _record(head, 0, size) is not None
    except (ValueError, struct.error):
        return False


def read_matlab4(file: Path) -> dict[str, Callable[[], Any]]:
    """Name to a function that reads a variable. Raises ValueError or struct.error where the file is damaged."""
    values: dict[tuple[str, ...], Callable[[], Any]] = {}
    size, start = file.stat().st_size, 0
    while start < size:
        record = _record(_bytes(file, start, min(size - start, 20 + _NAME4)), start, size)
        values[record.name,] = partial(_value4, file, record)
        start = record.end
    return readers(values)


def _record(head: bytes | Buffer, position: int, size: int) -> _Record:
    """The header at `position`: five int32 (type, rows, columns, complex, length of the name) and the name."""
    for order in "<>":
        kind, rows, columns, imaginary, length = struct.unpack_from(order + "5i", head)
        layout, dtype, zero, machine = kind % 10, kind // 10 % 10, kind // 100 % 10, kind // 1000
        if kind >= 0 and machine == "<>".index(order) and not zero and dtype < len(_DTYPES4) and layout < 3:
            break
    else:
        raise ValueError(f"no variable at byte {position}")
    start = position + 20 + length
    end = start + rows * columns * int(_DTYPES4[dtype][1]) * (1 + imaginary)
    name = bytes(head[20 : 20 + max(0, min(length, _NAME4))])
    if (
        min(rows, columns) < 0
        or imaginary not in (0, 1)
        or not 2 <= length <= _NAME4
        or name[-1:] != b"\0"
        or end > size
    ):
        raise ValueError(f"a variable of {rows} x {columns} at byte {position} that does not fit in {size} bytes")
    word = name.rstrip(b"\0")
    if not word.isascii() or not word.decode("ascii").isidentifier():
        raise ValueError(f"a variable named {word!r}")
    return _Record(order, _DTYPES4[dtype], layout, (rows, columns), bool(imaginary), word.decode("ascii"), start, end)


def _value4(file: Path, record: _Record) -> Any:
    if record.complex:
        return Foreign("complex array")
    content = _bytes(file, record.start, record.end - record.start)
    values = np.frombuffer(content, record.order + record.dtype).reshape(record.shape, order="F")
    if record.layout == 1:
        return rows_of_text(values.astype("<u2"))
    if record.layout == 0:
        return values
    # a row an entry, (row, column, value), and the shape as the last one
    if record.shape[1] != 3 or not len(values) or not np.isfinite(values).all():
        raise ValueError(f"a sparse matrix of {record.shape[1]} columns")
    rows, columns, entries = values[:-1].T
    return scattered(rows - 1.0, columns - 1.0, entries, (int(values[-1, 0]), int(values[-1, 1])))
