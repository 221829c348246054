"""faiss's other binary index files: IVF ("IBwF"), HNSW ("IBHf"), Hash ("IBHh"), MultiHash ("IBHm"), ID maps over them.

Their codes and ids are read, as faiss/impl/index_write.cpp lays them out; lists, graphs and buckets say where faiss
looks first, which an exact search has no use for.
"""

import struct
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cmr_fast.errors import InputError
from cmr_fast.ops._tensors import MAX_BITS
from cmr_fast.retrieval._formats import FAISS_FLAT, FAISS_MAPS, FAISS_OTHERS

_HEADER = struct.Struct("<4siiq?i")  # fourcc, d, code_size, ntotal, is_trained, metric


@dataclass
class _Reader:
    """Fields of a file one after the other; InputError where it ends too early."""

    path: Path
    data: np.ndarray
    at: int = 0

    def take(self, count: int) -> np.ndarray:
        """The next bytes."""
        if count < 0 or self.at + count > len(self.data):
            raise InputError(
                f"{self.path} is truncated or damaged: {count} bytes expected from byte {self.at} of {len(self.data)}"
            )
        self.at += count
        return self.data[self.at - count : self.at]

    def fields(self, form: str) -> tuple[int, ...]:
        """Numbers of struct's format `form`, little-endian."""
        return struct.unpack(f"<{form}", self.take(struct.calcsize(f"<{form}")).tobytes())

    def vector(self, kind: str) -> np.ndarray:
        """A std::vector: its length as uint64, then numbers of numpy's `kind`."""
        (count,) = self.fields("Q")
        return np.frombuffer(self.take(count * np.dtype(kind).itemsize).tobytes(), kind)


def read(path: Path, data: np.ndarray) -> tuple[int, np.ndarray, np.ndarray]:
    """A file of one of these kinds -> bits, codes and ids, in memory, by rising id."""
    reader = _Reader(path, data)
    kind = data[:4].tobytes()
    bits, codes, ids = _index(reader)
    if reader.at != len(data):
        raise InputError(f"{path} is damaged: {reader.at} bytes expected, {len(data)} seen")
    name = next(name for start, name in FAISS_OTHERS.items() if _inner(data, kind).startswith(start))
    warnings.warn(
        f"{path}: of faiss's {name} the codes and ids are read; how it looks for neighbours is left aside, since "
        "searches here are exact",
        stacklevel=5,
    )
    order = np.argsort(ids, kind="stable")
    return bits, codes[order], ids[order]


def _inner(data: np.ndarray, kind: bytes) -> bytes:
    """The fourcc of the index that holds the codes."""
    return data[_HEADER.size : _HEADER.size + 4].tobytes() if kind in FAISS_MAPS else kind


def _index(reader: _Reader) -> tuple[int, np.ndarray, np.ndarray]:
    kind, bits, nbytes, ntotal, _, _ = _HEADER.unpack(reader.take(_HEADER.size).tobytes())
    if bits < 8 or bits != 8 * nbytes or ntotal < 0 or bits > MAX_BITS:
        raise InputError(f"{reader.path} is damaged or too wide: its header says {bits} bits, {nbytes} bytes, {ntotal}")
    if ntotal * nbytes > len(reader.data):
        raise InputError(
            f"{reader.path} is truncated or damaged: its header says {ntotal} codes of {nbytes} bytes, it has "
            f"{len(reader.data)} bytes"
        )
    ids = np.arange(ntotal if kind in (FAISS_FLAT, b"IBHf", b"IBHm") else 0)
    if kind == FAISS_FLAT:
        codes = reader.vector("u1")
    elif kind in FAISS_MAPS:
        inner_bits, codes, places = _index(reader)
        names = reader.vector("<i8")
        if inner_bits != bits or len(names) != ntotal or np.any((places < 0) | (places >= ntotal)):
            raise InputError(f"{reader.path} is damaged: an ID map of {len(names)} ids over {len(places)} codes")
        ids = names[places]
    elif kind == b"IBHf":
        for each in ("<f8", "<i4", "<i4", "<u8", "<i4"):  # probabilities, neighbours a level, levels, offsets, links
            reader.vector(each)
        reader.fields("5i")  # entry point, top level, breadths of building and searching, and one that is not used
        codes = _stored(reader, bits)
    elif kind == b"IBwF":
        codes, ids = _lists(reader, bits)
    elif kind == b"IBHh":
        codes, ids = _buckets(reader)
    elif kind == b"IBHm":
        codes = _stored(reader, bits)
        _, maps, _ = reader.fields("3i")  # bits of a hash, hashes, flips
        for _ in range(maps):
            reader.fields("iQ")  # bits of an id, buckets
            reader.vector("u1")
    else:
        raise InputError(f"{reader.path}: expected a binary index of faiss at byte {reader.at - 25}, got {kind!r}")
    if codes.size != ntotal * nbytes or len(ids) != ntotal:
        raise InputError(
            f"{reader.path} is damaged: its header says {ntotal} codes of {nbytes} bytes, it holds {codes.size} bytes "
            f"and {len(ids)} ids"
        )
    return bits, codes.reshape(ntotal, nbytes), ids


def _stored(reader: _Reader, bits: int) -> np.ndarray:
    """Codes of the flat index that another one keeps them in."""
    inner_bits, codes, _ = _index(reader)
    if inner_bits != bits:
        raise InputError(f"{reader.path} is damaged: codes of {inner_bits} bits in an index of {bits}")
    return codes.reshape(-1)


def _lists(reader: _Reader, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """Inverted lists: codes and ids of each in turn."""
    reader.fields("2Q")  # lists, and how many are probed
    _index(reader)  # the quantizer
    (kind,) = reader.fields("B")  # of the direct map
    reader.vector("<i8")
    if kind == 2:
        reader.vector("V16")
    fourcc = reader.take(4).tobytes()
    if fourcc == b"il00":
        return np.empty(0, np.uint8), np.empty(0, np.int64)
    if fourcc != b"ilar":
        raise InputError(f"{reader.path}: expected inverted lists in the file, 'ilar', got {fourcc!r}")
    count, width = reader.fields("2Q")
    layout = reader.take(4).tobytes()
    sizes = reader.vector("<u8")
    if layout == b"sprs":
        sizes = sizes[1::2]
    if width != bits // 8 or layout not in (b"full", b"sprs") or len(sizes) > count:
        raise InputError(f"{reader.path} is damaged: {count} lists of {width} bytes a code, {layout!r}")
    codes, ids = [np.empty(0, np.uint8)], [np.empty(0, np.int64)]
    for size in sizes.tolist():
        codes.append(reader.take(size * width))
        ids.append(np.frombuffer(reader.take(8 * size).tobytes(), "<i8"))
    return np.concatenate(codes), np.concatenate(ids)


def _buckets(reader: _Reader) -> tuple[np.ndarray, np.ndarray]:
    """Buckets of a hash: ids and codes of each in turn."""
    reader.fields("2i")  # bits of a hash, flips
    buckets, _ = reader.fields("Qi")  # and bits of a bucket's size
    reader.vector("u1")  # hashes and sizes
    codes, ids = [np.empty(0, np.uint8)], [np.empty(0, np.int64)]
    for _ in range(buckets):
        ids.append(reader.vector("<i8"))
        codes.append(reader.vector("u1"))
    return np.concatenate(codes), np.concatenate(ids)
