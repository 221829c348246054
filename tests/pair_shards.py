"""Images with captions written as shards, for tests of what is trained on a stream."""

import io
import tarfile
from pathlib import Path

import pytest
from PIL import Image

from cmr_fast.data import CaptionedImages


def png(pixels):
    """A photo's file, of uint8 (3, H, W)."""
    file = io.BytesIO()
    Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(file, "PNG")
    return file.getvalue()


def write_shards(folder: Path, split: CaptionedImages, counts, kind="tar", broken=()) -> Path:
    """So many pairs a file, in order; the photos of the rows `broken` are none."""
    folder.mkdir(parents=True, exist_ok=True)
    first = 0
    for number, count in enumerate(counts):
        rows = range(first, first + count)
        photos = [b"no photo" if row in broken else png(split.image[row]) for row in rows]
        texts = [split.text[row] for row in rows]
        first += count
        if kind == "parquet":
            arrow = pytest.importorskip("pyarrow")
            from pyarrow import parquet

            parquet.write_table(arrow.table({"image": photos, "captions": texts}), folder / f"{number}.parquet")
            continue
        with tarfile.open(folder / f"{number}.tar", "w") as tar:
            for row, photo, text in zip(rows, photos, texts, strict=True):
                for ending, content in (("png", photo), ("txt", "\n".join(text).encode())):
                    member = tarfile.TarInfo(f"{row:04}.{ending}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    return folder
