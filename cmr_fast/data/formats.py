"""Names for files that are something else than data sets, and what to do with them."""

import zipfile
from pathlib import Path

from cmr_fast._files import pointer
from cmr_fast.errors import InputError

_SAVE = "save the arrays as image, text and labels in one .npz"
_STARTS = (
    (b"<!doctype html", "a web page, as a failed download leaves", "download it again"),
    (b"<html", "a web page, as a failed download leaves", "download it again"),
    (b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.", "a file of torch.save", "open it with torch.load and {save}"),
    (b"\x1f\x8b", "gzip", "unpack it with gunzip"),
    (b"BZh", "bzip2", "unpack it with bunzip2"),
    (b"\xfd7zXZ\x00", "xz", "unpack it with unxz"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive", "unpack it"),
    (b"Rar!", "a RAR archive", "unpack it"),
    (b"\x28\xb5\x2f\xfd", "zstd", "unpack it with unzstd"),
    (b"PAR1", "a Parquet table", "open it with pandas.read_parquet and {save}"),
    (b"ARROW1", "an Arrow table", "open it with pyarrow and {save}"),
    (b"\x89PNG", "a PNG image", "encode images first, and save their features"),
    (b"\xff\xd8\xff", "a JPEG image", "encode images first, and save their features"),
    (b"CMRFHAM\n", "an index of cmr_fast", "HammingIndex.load opens it"),
    (b"IBxF", "an index of faiss", "it holds codes, not features"),
    (b"IBM", "an index of faiss", "it holds codes, not features"),
    (b"SQLite format 3", "an SQLite database", "open it yourself and {save}"),
    (b"RDX", "a file of R", "open it yourself and {save}"),
    (b"%PDF", "a PDF", "download the data set itself"),
    (b"# Octave", "text of Octave", "save with -v7"),
)  # fmt: skip


OBJECTS = (
    "holds Python objects (dtype=object), which numpy keeps as a pickle; these are not read. Open it yourself and save "
    "numbers, or text as numpy.array(x, dtype=str)"
)


def first_bytes(file: Path, count: int = 512) -> bytes:
    """The beginning of a file. InputError where it is missing, empty, a pointer to another, or cannot be read."""
    try:
        if not file.is_file():
            other = "is a folder" if file.is_dir() else "is no regular file" if file.exists() else "no such file"
            raise InputError(f"{file}: {other}")
        with open(file, "rb") as stream:
            head = stream.read(count)
    except OSError as error:
        raise InputError(f"{file}: cannot be read ({error.strerror or error})") from error
    if not head:
        raise InputError(f"{file}: is empty")
    if refused := pointer(head):
        raise InputError(f"{file}: {refused}")
    return head


def refusal(file: Path, head: bytes, save: str = _SAVE) -> str | None:
    """What a file of these first bytes is and what to do, where it is known to be no data set; else None.

    save: what to do with its arrays once they are read by other means.
    """
    if head[257:262] == b"ustar":
        return "is a tar archive; unpack it"
    lowered = head.lstrip().lower()
    for start, what, todo in _STARTS:
        if head.startswith(start) or (start[:1] == b"<" and lowered.startswith(start)):
            return f"is {what}; {todo.format(save=save)}"
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 100_000_000:
        return f"is a safetensors file; open it with safetensors.numpy.load_file and {save}"
    if head.lstrip()[:1] in (b"{", b"[") and file.suffix.lower() in (".json", ".jsonl"):
        return f"is JSON, perhaps of captions; encode images and captions first (with open_clip, say) and {save}"
    return None


def zip_refusal(file: Path, save: str = _SAVE) -> str | None:
    """What a zip archive is, where it is no .npz; None where it is one. Raises zipfile.BadZipFile for a damaged one."""
    with zipfile.ZipFile(file) as archive:
        names = archive.namelist()
    if any(name.endswith("/data.pkl") or name == "data.pkl" for name in names):
        return f"is a file of torch.save; open it with torch.load(..., weights_only=True) and {save}"
    if not names or any(name.endswith(".npy") for name in names):
        return None
    if "[Content_Types].xml" in names:
        return f"is an Office file; open it yourself and {save}"
    return (
        f"is a zip archive of {', '.join(names[:4])}{', …' if len(names) > 4 else ''}, expected .npy arrays; unpack it"
    )


def other_than_one_array(file: Path, head: bytes, save: str = _SAVE) -> str | None:
    """As `refusal`, of zip archives too, an .npz among them."""
    if not head.startswith(b"PK\x03\x04"):
        return refusal(file, head, save)
    try:
        return zip_refusal(file, save) or f"is an .npz; {save}"
    except (zipfile.BadZipFile, OSError) as error:
        return f"begins like a zip archive, but is damaged or cut short ({error})"


def folder_advice(folder: Path) -> str:
    """What to do with a folder without data sets: of photos and captions, of torch files; "" where nothing is known."""
    names = [path.name.lower() for path in _walk(folder)]
    endings = {name.rpartition(".")[2] for name in names}
    photos = endings & {"jpg", "jpeg", "png", "webp", "bmp"}
    captions = any("caption" in n or n.startswith(("dataset_", "results_")) for n in names if "." in n)
    if photos and (captions or endings & {"json", "jsonl", "txt", "csv", "token"}):
        return (
            ". These are photos and captions, not features: `cmr-fast train clip` and cmr_fast.data.load_captions read "
            "them; for other methods encode both first (with open_clip, say) and keep the result with "
            "cmr_fast.data.save_pairs, or as image, text and labels in one .npz"
        )
    if photos:
        return (
            ". These are photos without texts: encode them, and texts or tags for them, first and keep the result with "
            "cmr_fast.data.save_pairs"
        )
    if captions:
        return ". There are captions but no features: encode images and captions first and keep them as one .npz"
    if endings & {"pt", "pth", "ckpt"}:
        return f". Files of torch.save are not read: open them with torch.load and {_SAVE}"
    if endings & {"csv", "tsv", "parquet", "safetensors", "json", "xlsx"}:
        return f". Tables are not read: open them yourself and {_SAVE}"
    if endings & {"zip", "gz", "tgz", "tar", "bz2", "xz", "7z", "rar"}:
        return ". Archives are not read: unpack them"
    return ""


def _walk(folder: Path, depth: int = 2, most: int = 200) -> list[Path]:
    """The first entries of a folder and of those in it."""
    entries: list[Path] = []
    try:
        for count, path in enumerate(sorted(folder.iterdir())):
            if count >= most:
                break
            entries.append(path)
            if depth > 1 and path.is_dir():
                entries += _walk(path, depth - 1, 20)
    except OSError:
        pass
    return entries
