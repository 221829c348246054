"""`cmr-fast index`: an index from files of any size, read in blocks, in memory that does not grow with them."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tyro.conf import Positional

from cmr_fast._terminal import counting
from cmr_fast.cli.codes import nbytes_of, open_codes, refuse_unpacked
from cmr_fast.cli.common import check_least, check_output, naming, read_array
from cmr_fast.errors import InputError

if TYPE_CHECKING:
    import numpy as np

    from cmr_fast.retrieval import HammingIndex


@dataclass(frozen=True, kw_only=True)
class Index:
    """Build a Hamming index from packed codes (uint8 .npy files, as `encode` writes them), or append to one.

    Example:  cmr-fast index images.npy more.npy --out db.cmrx

    Example:  cmr-fast index today.npy --out db.cmrx --append

    Example:  cmr-fast index images.npy --out db --shards 4

    Example:  cmr-fast index codes-*.parquet --column codes --out db.cmrx
    """

    codes: Positional[tuple[Path, ...]]
    """.npy files, uint8 (N, bytes), whose rows are numbered on; .u8bin and .bvecs, whose rows are taken for codes,
    and ann-benchmarks .hdf5 by Hamming distance; index files, also faiss's and usearch's, which bring their ids; or
    .parquet alone, of whose --column some rows at a time are in memory."""
    out: Path
    """The index file to write."""
    append: bool = False
    """Add to the index there. It stays whole whatever happens."""
    shards: int | None = None
    """Write a folder of so many shards rather than a file: `search` reads both, cmr_fast.distributed.ShardedIndex
    holds the shards in processes of one machine or many."""
    ids: Path | None = None
    """int64 (N,) .npy of your own ids, one per row of all files together. None: 0, 1, 2, …"""
    column: str = "codes"
    """Of .parquet: lists of uint8 or bytes, of one width."""
    bits: int | None = None
    """Code length. None: that of the first file, 8 x bytes for .npy."""
    force: bool = False
    """Overwrite the output file."""

    def __call__(self) -> None:
        """Run the command."""
        from cmr_fast.distributed import ShardedIndex
        from cmr_fast.ops._tensors import MAX_BITS
        from cmr_fast.retrieval.index import HammingIndex

        if not self.codes:
            raise InputError("expected the files of the codes before --out, got none")
        if self.bits is not None and not 1 <= self.bits <= MAX_BITS:
            raise InputError(f"--bits must be from 1 to {MAX_BITS}, got {self.bits}")
        sharded = self.shards is not None or (self.append and self.out.is_dir())
        if self.append and (self.bits is not None or self.shards is not None):
            which = "--bits" if self.bits is not None else "--shards"
            raise InputError(f"{which} is for a new index: one that is appended to knows its own")
        check_least(shards=(self.shards, 1))
        if sharded and self.force:
            raise InputError(f"--force is for a file; remove the folder {self.out} yourself, or name another")
        if not sharded:
            check_output(self.out, self.force or self.append, *self.codes, self.ids)
        if any(path.suffix == ".parquet" for path in self.codes):
            self._stream()
            return self._built(sharded)
        bits = HammingIndex.open(self.out).bits if self.append else self.bits
        sources = [open_codes(path, bits) for path in self.codes]
        wanted = -(-bits // 8) if bits else nbytes_of(sources[0])
        if not bits:
            for path, source in zip(self.codes, sources, strict=True):
                refuse_unpacked(path, source)
        for path, source in zip(self.codes, sources, strict=True):
            if nbytes_of(source) != wanted:
                raise InputError(
                    f"{path}: codes have {nbytes_of(source)} bytes, expected {wanted}; one index holds one code length"
                )
        ids = None if self.ids is None else read_array(self.ids)
        verb = "appending" if self.append else "indexing"
        total = sum(map(len, sources))
        if ids is not None and (ids.ndim != 1 or len(ids) != total or ids.dtype.kind not in "iu"):
            raise InputError(f"{self.ids}: expected {total} integer ids, one per code, got {ids.dtype} {ids.shape}")
        ids_from = self.ids or Path(", ".join(map(str, self.codes)))
        with self._naming(sources, bits), naming(ids=ids_from), counting(total, verb) as progress:
            if self.append and sharded:
                ShardedIndex.append(self.out, sources, ids, progress=progress)
            elif sharded:
                ShardedIndex.build(self.out, sources, ids, shards=self.shards or 1, bits=bits, progress=progress)
            elif self.append:
                HammingIndex.append(self.out, sources, ids, progress=progress)
            else:
                HammingIndex.build(self.out, sources, ids, bits=bits, progress=progress)
        self._built(sharded)

    def _stream(self) -> None:
        """Build from Parquet, whose codes come one block after the other."""
        from cmr_fast.data.streams import count_rows, stream_column
        from cmr_fast.distributed import ShardedIndex
        from cmr_fast.retrieval.index import HammingIndex

        if self.append or self.ids is not None or any(path.suffix != ".parquet" for path in self.codes):
            raise InputError(
                "codes of .parquet go into a new index, with ids 0, 1, 2, …, and no other files beside them"
            )
        total = count_rows(self.codes)

        def blocks() -> "Iterator[np.ndarray]":
            for number, block in enumerate(stream_column(self.codes, self.column)):
                if not number and not self.bits:
                    refuse_unpacked(self.codes[0], block)
                yield block

        named = naming(codes=Path(", ".join(map(str, self.codes))))
        with named, counting(total, "indexing") as progress:
            if self.shards is None:
                HammingIndex.build(self.out, blocks(), bits=self.bits, progress=progress)
            else:
                rows = max(1, -(-total // self.shards))
                ShardedIndex.build(self.out, blocks(), rows=rows, bits=self.bits, progress=progress)

    def _built(self, sharded: bool) -> None:
        from cmr_fast.retrieval import _shards
        from cmr_fast.retrieval.index import HammingIndex

        built = HammingIndex.open(self.out)
        of = f" in {len(_shards.read(self.out).shards)} shards" if sharded else ""
        print(f"{self.out}: {built.ntotal} codes of {built.bits} bits{of}")

    @contextmanager
    def _naming(self, sources: "list[np.ndarray | HammingIndex]", bits: int | None) -> Iterator[None]:
        """An InputError from inside about codes names the first file of which it is true."""
        from cmr_fast.retrieval._checks import packed_codes

        try:
            yield
        except InputError as error:
            for path, source in zip(self.codes, sources, strict=True):
                codes = source if hasattr(source, "shape") else source.codes
                if str(error).startswith("codes ") and bits:
                    with naming(codes=path):
                        packed_codes(codes, "codes", bits)
            raise
