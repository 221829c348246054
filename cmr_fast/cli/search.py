"""`cmr-fast search`: the nearest codes of an index, in blocks, in memory that does not grow with the files."""

import csv
import shutil
import tempfile
import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING

from tyro.conf import Positional

from cmr_fast._files import write_aside
from cmr_fast._terminal import busy, counting, new_table, show
from cmr_fast.cli.codes import nbytes_of, open_codes, open_index
from cmr_fast.cli.common import check_least, check_output, naming
from cmr_fast.errors import InputError

if TYPE_CHECKING:
    import numpy as np

    from cmr_fast.retrieval.index import HammingIndex

    Block = tuple[np.ndarray, np.ndarray]  # distances and ids (B, k)

_QUERIES = 4096  # searched at once, fewer where k is large
_HITS = 1 << 20
_PRINTED = 5  # hits of a query


@dataclass(frozen=True, kw_only=True)
class Search:
    """The k nearest codes of an index for every query code: exact, sorted by distance, then by order of insertion.

    Example:  cmr-fast search db.cmrx queries.npy --k 10 --out hits.csv
    """

    index: Positional[Path]
    """Index file, from `cmr-fast index`, or another that it takes."""
    queries: Positional[Path]
    """Packed query codes: uint8 (Q, bytes) .npy, .u8bin or .bvecs, an index file, or ann-benchmarks .hdf5 ("test")."""
    k: int = 10
    """Hits per query; the codes that the index holds where these are fewer."""
    radius: int | None = None
    """Only hits at this Hamming distance or below, 0 or more; in .npz id -1 and distance bits + 1 pad."""
    out: Path | None = None
    """results.npz (distances and ids, (Q, hits)) or results.csv (query, rank, id, distance). None: only print."""
    threads: int | None = None
    """CPU threads. None: all that this process may use."""
    show: int = 5
    """Queries to print."""
    force: bool = False
    """Overwrite the output file."""

    def __call__(self) -> None:
        """Run the command."""
        import numpy as np

        if self.out is not None:
            if self.out.suffix not in (".npz", ".csv"):
                raise InputError(f"{self.out}: expected a name in .npz or .csv, got {self.out.suffix!r}")
            check_output(self.out, self.force, self.index, self.queries)
        check_least(k=(self.k, 1), radius=(self.radius, 0), show=(self.show, 0), threads=(self.threads, 1))
        index = open_index(self.index)
        source = open_codes(self.queries, index.bits, "test")
        queries = source if isinstance(source, np.ndarray) else source.codes
        if len(queries) == 0:
            raise InputError(f"{self.queries}: holds no query, expected at least one")
        if queries.shape[1] != nbytes_of(index):
            raise InputError(
                f"{self.queries}: codes have {queries.shape[1]} bytes, those of {self.index} {nbytes_of(index)}"
            )
        k = min(self.k, max(1, index.ntotal))
        if k < self.k:
            print(f"{self.index}: holds {index.ntotal} codes, fewer than k = {self.k}: so many hits a query")
        head: list[Block] = []
        shown = min(self.show, len(queries))

        def blocks(count: int) -> Iterator["Block"]:
            step = max(1, min(_QUERIES, _HITS // k))
            with counting(count, "searching") as progress:
                for start in range(0, count, step):
                    block = np.asarray(queries[start : min(start + step, count)])
                    with naming(q=self.queries):
                        distances, ids = (
                            np.asarray(x) for x in index.search(block, k, self.threads, radius=self.radius)
                        )
                    if start < shown:
                        rows = slice(0, shown - start)
                        head.append((distances[rows, :_PRINTED].copy(), ids[rows, :_PRINTED].copy()))
                    progress(len(block))
                    yield distances, ids

        if self.out is not None:
            write_hits(self.out, blocks(len(queries)), (len(queries), k), index.bits)
        else:
            with busy("searching"):
                for _ in blocks(shown):
                    pass
        if self.out is not None and k > _PRINTED and shown:
            print(f"The first {_PRINTED} of {k} hits a query; all are in {self.out}")
        elif k > _PRINTED and shown:
            print(f"The first {_PRINTED} of {k} hits a query; --out FILE writes all")
        _print_hits(head, k, index)
        if len(queries) > shown:
            print(f"… and {len(queries) - shown} more queries{'' if self.out else '; --out FILE searches all'}")
        if self.out is not None:
            most = "each" if self.radius is None else f"at most, within {self.radius} bits"
            print(f"{self.out}: {len(queries)} queries, {k} hits {most}")


def _print_hits(head: "list[Block]", k: int, index: "HammingIndex") -> None:
    table = new_table("query")
    for rank in range(min(_PRINTED, k)):
        table.add_column(str(rank + 1), justify="right")
    rows = (row for distances, ids in head for row in zip(ids.tolist(), distances.tolist(), strict=True))
    for query, row in enumerate(rows):
        table.add_row(str(query), *(f"{i} ({d})" if d <= index.bits else "-" for i, d in zip(*row, strict=True)))
    show(f"The nearest of {index.ntotal} codes of {index.bits} bits: id (distance)", table)


def write_hits(path: Path, blocks: Iterable["Block"], shape: tuple[int, int], bits: int) -> None:
    """Blocks of distances int32 and ids int64, of `shape` in all, to .npz, or to .csv without the padding.

    Padding has a distance above `bits`; ids of faiss may be negative.
    """
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
                    writer.writerows([query, rank, i, d] for rank, (i, d) in enumerate(hits, start=1) if d <= bits)
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
