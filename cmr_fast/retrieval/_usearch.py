"""usearch's index files of bits ("b1x8", Hamming), as usearch 2 writes them.

Little-endian: uint32 rows and columns (or uint64 of both), the codes; 64 bytes of head: "usearch", version as 3 uint16,
kinds of metric, scalar, key and slot, uint64 present, deleted and dimensions, bool multi; then the graph: uint64 size,
connectivity of the upper levels and of the base, 2 more, int16 level of each node, and for each node uint64 key, int16
level, and for the base and each level above it uint32 count and its links.
"""

import struct
from pathlib import Path

import numpy as np

from cmr_fast._files import StrPath, as_path, check_regular, named
from cmr_fast.errors import InputError
from cmr_fast.ops._tensors import MAX_BITS
from cmr_fast.retrieval._formats import USEARCH, what_it_is
from cmr_fast.retrieval._segments import Part

_HEAD = struct.Struct("<7s3H4B3Q?")
_HEAD_BYTES = 64
_GRAPH = struct.Struct("<5Q")
_KINDS = (ord("b"), 1, 14, 15)  # Hamming, bits, keys of 64 bits, slots of 32
_METRICS = {
    98: "hamming", 99: "cos", 100: "divergence", 101: "l2sq", 104: "haversine", 105: "ip", 106: "jaccard",
    112: "pearson", 115: "sorensen", 116: "tanimoto",
}  # fmt: skip
_SCALARS = {1: "b1", 4: "bf16", 10: "f64", 11: "f32", 12: "f16", 14: "u64", 15: "u32", 17: "u8", 23: "i8"}
_MOST_LINKS = 2**31
_FREE = 2**64 - 1  # the key of a code that was removed


def read(path: StrPath) -> tuple[int, Part]:
    """A file -> bits, and a part in memory: codes by rising key, without what was removed, and keys as ids."""
    path = as_path(path)
    check_regular(path, "usearch file")
    with named(path):
        data = path.read_bytes()
    at, rows, columns = _matrix(path, data)
    _, *rest = _HEAD.unpack(_bytes(path, data, at, _HEAD.size))
    major, kinds, present, dimensions = rest[0], tuple(rest[3:7]), rest[7], rest[9]
    if kinds != _KINDS or major != 2:
        metric, *scalars = kinds
        dtype, key, slot = (_SCALARS.get(kind, str(kind)) for kind in scalars)
        raise InputError(
            f"{path}: expected a usearch 2 index of bits (dtype b1), metric hamming, keys u64 and slots u32, "
            f"got usearch {major}, dtype {dtype}, metric {_METRICS.get(metric, metric)}, keys {key}, slots {slot}"
        )
    if columns != -(-dimensions // 8) or not 1 <= dimensions <= MAX_BITS:
        raise InputError(f"{path} is damaged or too wide: {dimensions} bits in {columns} bytes")
    codes = np.frombuffer(data, np.uint8, rows * columns, at - rows * columns).reshape(rows, columns)
    at += _HEAD_BYTES
    size, upper, base, _, _ = _GRAPH.unpack(_bytes(path, data, at, _GRAPH.size))
    at += _GRAPH.size
    if size != rows or max(upper, base) > _MOST_LINKS:
        raise InputError(f"{path} is damaged: {rows} codes and a graph of {size}, of {base} and {upper} links a node")
    levels = np.frombuffer(_bytes(path, data, at, 2 * size), "<i2").astype(np.int64)
    at += 2 * size
    lengths = 10 + 4 + 4 * base + levels * (4 + 4 * upper)
    starts = at + np.cumsum(lengths) - lengths
    end = at + int(lengths.sum())
    if (levels < 0).any() or end != len(data):
        raise InputError(f"{path} is truncated or damaged: {end} bytes expected, {len(data)} seen")
    places = starts[:, None] + np.arange(8)
    keys = np.frombuffer(data, np.uint8)[places].copy().view("<u8").reshape(-1)
    kept = keys != _FREE
    if int(kept.sum()) != present:
        raise InputError(f"{path} is damaged: {int(kept.sum())} keys where its head says {present}")
    if (keys[kept] >= 2**63).any():
        raise InputError(f"{path}: keys must be below 2^63 to be ids here, got {int(keys[kept].max())}")
    order = np.flatnonzero(kept)
    order = order[np.argsort(keys[kept], kind="stable")]  # threads that add leave the rows in any order
    return 8 * columns, Part(codes[order], keys[order].astype(np.int64))


def _matrix(path: Path, data: bytes) -> tuple[int, int, int]:
    """Where the codes end, and their rows and columns."""
    for form in ("<2I", "<2Q"):
        if len(data) >= struct.calcsize(form):
            rows, columns = struct.unpack_from(form, data)
            at = struct.calcsize(form) + rows * columns
            if data[at : at + len(USEARCH)] == USEARCH:
                return at, rows, columns
    raise InputError(f"{path}: expected an index of usearch, whole and with its vectors, it {what_it_is(data[:512])}")


def _bytes(path: Path, data: bytes, at: int, count: int) -> bytes:
    if at + count > len(data):
        raise InputError(f"{path} is truncated: at least {at + count} bytes expected, {len(data)} seen")
    return data[at : at + count]
