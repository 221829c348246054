"""Files of codes that `cmr-fast index` and `search` read: .npy arrays, index files, faiss files."""

from pathlib import Path
from typing import TYPE_CHECKING

from cmr_fast.cli.common import check_exists, read_array
from cmr_fast.errors import InputError

if TYPE_CHECKING:
    import numpy as np

    from cmr_fast.retrieval.index import HammingIndex


def open_codes(path: Path, bits: int | None) -> "np.ndarray | HammingIndex":
    """Codes of a .npy file (as an array), an index file or a faiss file (with their ids), left in the file."""
    from cmr_fast.retrieval import index_kind

    check_exists(path)
    if path.is_file() and index_kind(path):
        return open_index(path, bits)
    codes = read_array(path)
    if codes.dtype.name != "uint8" or codes.ndim != 2:
        raise InputError(f"{path}: expected packed codes, uint8 (N, bytes), got {codes.dtype} {codes.shape}")
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
