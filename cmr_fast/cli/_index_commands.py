"""`cmr-fast index` and `cmr-fast search`: files of any size, read in blocks, in memory that does not grow with them."""

import csv
import shutil
import tempfile
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING

from cmr_fast._files import write_aside
from cmr_fast._terminal import busy, counting, new_table, show
from cmr_fast.cli._commands import check_codes, free, present, read_array
from cmr_fast.errors import InputError

if TYPE_CHECKING:
    import numpy as np

    from cmr_fast.cli import main as cli
    from cmr_fast.retrieval.index import HammingIndex

    Block = tuple[np.ndarray, np.ndarray]  # distances and ids (B, k)

_QUERIES = 4096  # searched at once, fewer where k is large
_HITS = 1 << 20


def index(arguments: "cli.Index") -> None:
    from cmr_fast.retrieval.index import HammingIndex

    if not arguments.append:
        free(arguments.out, arguments.force)
    elif arguments.bits is not None:
        raise InputError("--bits is for a new index: one that is appended to knows its own")
    present_index = HammingIndex.load(arguments.out) if arguments.append else None
    bits = arguments.bits if present_index is None else present_index.bits
    sources = [open_codes(path, bits) for path in arguments.codes]
    for path, source in zip(arguments.codes, sources, strict=True):
        wanted = -(-bits // 8) if bits else _nbytes(sources[0])
        if _nbytes(source) != wanted:
            raise InputError(
                f"{path}: codes have {_nbytes(source)} bytes, expected {wanted}; one index holds one code length"
            )
    ids = None if arguments.ids is None else read_array(arguments.ids)
    total = sum(map(len, sources))
    if ids is not None and (ids.ndim != 1 or len(ids) != total or ids.dtype.kind not in "iu"):
        raise InputError(f"{arguments.ids}: expected {total} integer ids, one per code, got {ids.dtype} {ids.shape}")
    with counting(total, "appending" if arguments.append else "indexing") as progress:
        if arguments.append:
            HammingIndex.append(arguments.out, sources, ids, progress=progress)
        else:
            HammingIndex.build(arguments.out, sources, ids, bits=bits, progress=progress)
    built = HammingIndex.load(arguments.out)
    print(f"{arguments.out}: {built.ntotal} codes of {built.bits} bits")


def search(arguments: "cli.Search") -> None:
    import numpy as np

    if arguments.out is not None:
        if arguments.out.suffix not in (".npz", ".csv"):
            raise InputError(f"{arguments.out}: expected a name in .npz or .csv, got {arguments.out.suffix!r}")
        free(arguments.out, arguments.force)
    k = arguments.k
    if k < 1:
        raise InputError(f"k must be 1 or more, got {k}")
    loaded = open_index(arguments.index)
    source = open_codes(arguments.queries, loaded.bits)
    queries = source if isinstance(source, np.ndarray) else source.codes
    if len(queries) == 0:
        raise InputError(f"{arguments.queries}: holds no query, expected at least one")
    if queries.shape[1] != _nbytes(loaded):
        raise InputError(
            f"{arguments.queries}: codes have {queries.shape[1]} bytes, those of {arguments.index} {_nbytes(loaded)}"
        )
    head: list[Block] = []
    shown = min(arguments.show, len(queries))

    def blocks(count: int) -> Iterator["Block"]:
        step = max(1, min(_QUERIES, _HITS // k))
        with counting(count, "searching") as progress:
            for start in range(0, count, step):
                block = np.asarray(queries[start : min(start + step, count)])
                distances, ids = (np.asarray(x) for x in loaded.search(block, k, arguments.threads))
                if start < shown:
                    head.append((distances[: shown - start, :5].copy(), ids[: shown - start, :5].copy()))
                progress(len(block))
                yield distances, ids

    if arguments.out is not None:
        write_hits(arguments.out, blocks(len(queries)), (len(queries), k))
    else:
        with busy("searching"):
            for _ in blocks(shown):
                pass
    table = new_table("query")
    for rank in range(min(5, k)):
        table.add_column(str(rank + 1), justify="right")
    rows = (row for distances, ids in head for row in zip(ids.tolist(), distances.tolist(), strict=True))
    for query, row in enumerate(rows):
        table.add_row(str(query), *(f"{i} ({d})" if i >= 0 else "-" for i, d in zip(*row, strict=True)))
    show(f"The nearest of {loaded.ntotal} codes of {loaded.bits} bits: id (distance)", table)
    if len(queries) > shown:
        print(f"… and {len(queries) - shown} more queries{'' if arguments.out else '; --out FILE searches all'}")
    if arguments.out is not None:
        print(f"{arguments.out}: {len(queries)} queries, {k} hits each")


def write_hits(path: Path, blocks: Iterable["Block"], shape: tuple[int, int]) -> None:
    """Blocks of distances int32 and ids int64, of `shape` in all, to .npz, or to .csv without the padding."""
    with write_aside(path) as aside:
        if path.suffix == ".npz":
            _write_npz(aside, blocks, shape)
            return
        with open(aside, "w", newline="") as text:
            writer = csv.writer(text)
            writer.writerow(["query", "rank", "id", "distance"])
            query = 0
            for distances, ids in blocks:
                for row_ids, row_distances in zip(ids.tolist(), distances.tolist(), strict=True):
                    hits = zip(row_ids, row_distances, strict=True)
                    writer.writerows([query, rank, i, d] for rank, (i, d) in enumerate(hits, start=1) if i >= 0)
                    query += 1


def _write_npz(path: Path, blocks: Iterable["Block"], shape: tuple[int, int]) -> None:
    """What np.savez writes, in one pass: a zip takes one array at a time, so ids wait in a file of their own."""
    with zipfile.ZipFile(path, "w") as archive, tempfile.TemporaryFile(dir=path.parent) as spool:
        with archive.open("distances.npy", "w", force_zip64=True) as member:
            _write_header(member, "<i4", shape)
            for distances, ids in blocks:
                member.write(distances.astype("<i4", copy=False).data)
                spool.write(ids.astype("<i8", copy=False).data)
        spool.seek(0)
        with archive.open("ids.npy", "w", force_zip64=True) as member:
            _write_header(member, "<i8", shape)
            shutil.copyfileobj(spool, member, 1 << 20)


def _write_header(file: IO[bytes], dtype: str, shape: tuple[int, int]) -> None:
    from numpy.lib.format import write_array_header_1_0

    write_array_header_1_0(file, {"descr": dtype, "fortran_order": False, "shape": shape})


def open_codes(path: Path, bits: int | None) -> "np.ndarray | HammingIndex":
    """Codes of a .npy file (as an array), an index file or a faiss file (with their ids), left in the file."""
    from cmr_fast.retrieval import HammingIndex, _faiss, _indexfile

    present(path)
    head = b""
    if path.is_file():
        with open(path, "rb") as file:
            head = file.read(8)
    if head == _indexfile.MAGIC:
        return HammingIndex.load(path)
    if head[:4] in (_faiss.FLAT, *_faiss.MAPS):
        return HammingIndex.from_faiss(path, bits)
    codes = read_array(path)
    check_codes(codes, path)
    return codes


def open_index(path: Path) -> "HammingIndex":
    from cmr_fast.retrieval import HammingIndex, _faiss

    present(path)
    if path.is_file():
        with open(path, "rb") as file:
            if file.read(4) in (_faiss.FLAT, *_faiss.MAPS):
                return HammingIndex.from_faiss(path)
    return HammingIndex.load(path)


def _nbytes(source: "np.ndarray | HammingIndex") -> int:
    return source.shape[1] if hasattr(source, "shape") else -(-source.bits // 8)
