"""What kind of index a file is, by its first bytes."""

from typing import Literal

from cmr_fast._files import StrPath, as_path, check_regular, named, pointer

MAGIC = b"CMRFHAM\n"
FAISS_FLAT = b"IBxF"
FAISS_MAPS = (b"IBMp", b"IBM2")
HEAD = 512

_FAISS = {b"IBw": "IndexBinaryIVF", b"IBHf": "IndexBinaryHNSW", b"IBHh": "IndexBinaryHash", b"IBHm": "a multi-hash"}


def index_kind(path: StrPath) -> Literal["cmr_fast", "faiss"] | None:
    """Whose index a file is.

    Parameters
    ----------
    path
        A file, of any kind.

    Returns
    -------
    str or None
        "cmr_fast", "faiss" (IndexBinaryFlat, alone or under an IndexBinaryIDMap or IDMap2), or None: neither.

    Raises
    ------
    InputError
        Where there is no such file.
    """
    head = first_bytes(path)
    if head.startswith(MAGIC):
        return "cmr_fast"
    return "faiss" if head[:4] in (FAISS_FLAT, *FAISS_MAPS) else None


def first_bytes(path: StrPath) -> bytes:
    """The beginning of a file."""
    path = as_path(path)
    check_regular(path, "index file")
    with named(path), open(path, "rb") as file:
        return file.read(HEAD)


def what_it_is(head: bytes) -> str:
    """What a file of these first bytes is, in place of the index that was expected: a verb and what to do."""
    if refused := pointer(head):
        return refused
    if not head:
        return "is empty"
    if head.startswith(MAGIC):
        return "is an index of cmr_fast, which HammingIndex.load and HammingIndex.open read"
    if head[:4] in (FAISS_FLAT, *FAISS_MAPS):
        return "is an index of faiss, which HammingIndex.from_faiss and HammingIndex.open read"
    if head.startswith(b"\x93NUMPY"):
        return "is a .npy array; HammingIndex.build makes an index of one that holds packed codes"
    seen = f"begins with {head[:4] if head[:1] == b'I' else head[:8]!r}"
    for start, name in _FAISS.items():
        if head.startswith(start):
            return f"{seen}, faiss's {name}; of its binary indexes IndexBinaryFlat and ID maps over it are read"
    if head[:2] in (b"Ix", b"Iw", b"IH") and head[:4].isalnum():
        return f"{seen}, a faiss index of floats; packed codes are in its binary indexes"
    if head.startswith(b"PK"):
        return f"{seen}, a zip archive (.npz, or of torch.save)"
    return seen
