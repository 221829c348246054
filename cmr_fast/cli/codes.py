"""Files of codes that `cmr-fast index` and `search` read: .npy arrays, index files, those of others."""

from pathlib import Path
from typing import TYPE_CHECKING, Literal

from cmr_fast.cli.common import check_exists, read_array
from cmr_fast.errors import InputError

if TYPE_CHECKING:
    import numpy as np

    from cmr_fast.retrieval.index import HammingIndex


def open_codes(
    path: Path, bits: int | None, dataset: Literal["train", "test"] = "train"
) -> "np.ndarray | HammingIndex":
    """Codes of a file of codes (as an array) or an index (with its ids), left in the file where it holds them packed.

    dataset    of an HDF5 file of ann-benchmarks
    """
    from cmr_fast.retrieval import HammingIndex, index_kind, read_codes
    from cmr_fast.retrieval._codefiles import has_codes

    check_exists(path)
    if has_codes(path):
        held, packed = read_codes(path, dataset, bits)
        if held % 8 == 0 or bits is not None:
            return packed
        index = HammingIndex(held)
        index.add(packed)
        return index
    if path.is_file() and index_kind(path):
        return open_index(path, bits)
    codes = read_array(path)
    if codes.dtype.name != "uint8" or codes.ndim != 2:
        hint = "see cmr_fast.pack_codes"
        if codes.dtype.kind == "u" and codes.ndim <= 2:
            hint = "words of packed bits are meant as x.view(uint8).reshape(len(x), -1)"
        raise InputError(f"{path}: expected packed codes, uint8 (N, bytes), got {codes.dtype} {codes.shape}: {hint}")
    return codes


def open_index(path: Path, bits: int | None = None) -> "HammingIndex":
    """An index file or a faiss file; `bits` where a faiss file's codes have fewer than 8 x bytes."""
    from cmr_fast.retrieval import HammingIndex

    check_exists(path)
    try:
        return HammingIndex.open(path, bits=bits)
    except InputError as error:
        raise InputError(str(error) if str(path) in str(error) else f"{path}: {error}") from error


def nbytes_of(source: "np.ndarray | HammingIndex") -> int:
    """Bytes of a code."""
    return source.shape[1] if hasattr(source, "shape") else -(-source.bits // 8)


def refuse_unpacked(path: Path, source: "np.ndarray | HammingIndex") -> None:
    """InputError where the first rows are bits, one a byte."""
    from cmr_fast.retrieval import HammingIndex

    if isinstance(source, HammingIndex):
        return
    head = source[:1000]
    if head.size and head.shape[1] > 1 and head.max() <= 1 and head.any():
        raise InputError(
            f"{path}: every byte is 0 or 1, so these are bits, not packed: expected cmr_fast.pack_codes(bits); with "
            f"--bits {8 * head.shape[1]} they are taken as codes all the same"
        )
