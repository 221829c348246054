"""What kind of index a file is, by its first bytes."""

import os
import struct
from pathlib import Path
from typing import Literal

from cmr_fast._files import StrPath, as_path, check_regular, named, pointer

MAGIC = b"CMRFHAM\n"
FAISS_FLAT = b"IBxF"
FAISS_MAPS = (b"IBMp", b"IBM2")
HEAD = 512

FAISS_OTHERS = {
    b"IBwF": "IndexBinaryIVF",
    b"IBHf": "IndexBinaryHNSW",
    b"IBHh": "IndexBinaryHash",
    b"IBHm": "IndexBinaryMultiHash",
}
USEARCH = b"usearch"
CODE_SUFFIXES = (".u8bin", ".bvecs", ".hdf5", ".h5")


def index_kind(path: StrPath) -> Literal["cmr_fast", "faiss", "usearch"] | None:
    """Whose index a file is.

    Parameters
    ----------
    path
        A file, of any kind.

    Returns
    -------
    str or None
        "cmr_fast", "faiss" (a binary index), "usearch", or None: none of these.

    Raises
    ------
    InputError
        Where there is no such file.
    """
    head = first_bytes(path)
    if head.startswith(MAGIC):
        return "cmr_fast"
    if head[:4] in (FAISS_FLAT, *FAISS_MAPS, *FAISS_OTHERS):
        return "faiss"
    return "usearch" if _has_usearch_head(path, head) else None


def _has_usearch_head(path: StrPath, head: bytes) -> bool:
    """Whether the head of a usearch index comes after a matrix of the size that the file begins with."""
    path = as_path(path)
    with named(path), open(path, "rb") as file:
        for form in ("<2I", "<2Q"):
            if len(head) >= struct.calcsize(form):
                rows, columns = struct.unpack_from(form, head)
                at = struct.calcsize(form) + rows * columns
                if at + len(USEARCH) <= os.fstat(file.fileno()).st_size:
                    file.seek(at)
                    if file.read(len(USEARCH)) == USEARCH:
                        return True
    return False


def first_bytes(path: StrPath) -> bytes:
    """The beginning of a file."""
    path = as_path(path)
    check_regular(path, "index file")
    with named(path), open(path, "rb") as file:
        return file.read(HEAD)


def what_it_is(head: bytes, path: Path | None = None) -> str:
    """What a file of these first bytes is, in place of the index that was expected: a verb and what to do."""
    if path is not None and _has_usearch_head(path, head):
        return "is an index of usearch, which HammingIndex.open reads"
    if path is not None and path.suffix in CODE_SUFFIXES:
        return f"is named as a file of codes in {path.suffix}, which HammingIndex.open reads"
    if refused := pointer(head):
        return refused
    if not head:
        return "is empty"
    if head.startswith(MAGIC):
        return "is an index of cmr_fast, which HammingIndex.load and HammingIndex.open read"
    if head[:4] in (FAISS_FLAT, *FAISS_MAPS, *FAISS_OTHERS):
        return "is an index of faiss, which HammingIndex.from_faiss and HammingIndex.open read"
    if head.startswith(b"\x93NUMPY"):
        return "is a .npy array; HammingIndex.build or `cmr-fast index` makes an index of one that holds packed codes"
    seen = f"begins with {head[:4] if head[:1] == b'I' else head[:8]!r}"
    if head[:2] in (b"Ix", b"Iw", b"IH") and head[:4].isalnum():
        return f"{seen}, a faiss index of floats; packed codes are in its binary indexes"
    if head.startswith(b"PK"):
        return f"{seen}, a zip archive (.npz, or of torch.save)"
    return seen
