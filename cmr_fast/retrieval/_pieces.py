"""Pieces of codes, arrays and parts of other indexes, as the parts of a new one."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import chain

import numpy as np
from torch import Tensor

from cmr_fast.errors import InputError
from cmr_fast.retrieval._checks import Array, code_length, packed_codes
from cmr_fast.retrieval._ids import IdSet, check_ids, counted_on, lowest, next_after, refuse_known
from cmr_fast.retrieval._segments import Part


def planned(
    pieces: Sequence[np.ndarray | tuple[Part, ...]],
    ids: Array | Sequence[int] | None,
    old: Sequence[Part],
    next_id: int,
) -> tuple[list[Part], int]:
    """Pieces as parts whose ids are neither among the `old` parts' nor each other's, and the next id."""
    given = None if ids is None else check_ids(ids, sum(map(_rows, pieces)))
    known: IdSet | None = None
    out: list[Part] = []
    taken = 0
    for piece in pieces:
        parts = piece if isinstance(piece, tuple) else (Part(piece, counted_on(next_id, len(piece))),)
        for part in (part for part in parts if len(part)):
            new = part if given is None else Part(part.codes, given[taken : taken + len(part)])
            if lowest(new.ids) < next_id:
                known = known or IdSet(other.sound().ids for other in (*old, *out))
                refuse_known(new.ids, known)
            if known is not None:
                known.add(new.ids)
            next_id, taken = next_after(next_id, new.ids), taken + len(new)
            out.append(new)
    return out, next_id


def _rows(piece: np.ndarray | tuple[Part, ...]) -> int:
    return sum(map(len, piece)) if isinstance(piece, tuple) else len(piece)


def width_of(x: object) -> int:
    """Bytes of a code of what may not be codes at all."""
    return int(x.shape[1]) if isinstance(x, np.ndarray | Tensor) and x.ndim == 2 else 1


def is_stream(codes: object) -> bool:
    """Whether codes come one block after the other, and once only."""
    return isinstance(codes, Iterator)


def streamed(codes: Iterable[Array], ids: object, bits: int | None) -> tuple[int, Iterator[np.ndarray]]:
    """Bits, and blocks of codes that are checked as they come."""
    if ids is not None:
        raise InputError("ids must be None for codes that come one block after the other: theirs count on from 0")
    blocks = iter(codes)
    first = next(blocks, None)
    if first is None:
        if bits is None:
            raise InputError("codes must hold an array at least, or bits must say the length")
        return code_length(bits), iter(())
    length = code_length(8 * width_of(first) if bits is None else bits)
    numbered = enumerate(chain([first], blocks))
    return length, (packed_codes(block, f"codes of block {number}", length) for number, block in numbered)


def check_progress(progress: object) -> None:
    """InputError unless it can be called, or is None."""
    if progress is not None and not callable(progress):
        raise InputError(f"progress must be called with a number of rows, got {progress!r}")


def verify(parts: Sequence[Part]) -> None:
    """Compare what is mapped with its checksums."""
    for part in parts:
        part.verify()


def distinct(parts: Sequence[Part], rows: Sequence[np.ndarray]) -> np.ndarray:
    """The ids, each once, of some rows of each part."""
    return np.unique(np.concatenate([np.empty(0, np.int64), *map(Part.ids_of, parts, rows)]))
