"""Photo files as pixels, all of one size."""

import importlib.util
import io
from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from cmr_fast._terminal import track
from cmr_fast.errors import InputError


def decoded(photos: Iterable[tuple[str, bytes]], count: int, size: int) -> Tensor:
    """Photos as uint8 (N, 3, size, size): scaled to `size` on the shorter side, the middle cut out.

    Parameters
    ----------
    photos : iterable of (str, bytes)
        Name and file of each of the `count` photos, in order; JPEG or whatever Pillow reads.
    count, size : int
        How many there are; pixels a side.

    Raises
    ------
    InputError
        Where Pillow is missing, or a file is no photo.
    """
    if importlib.util.find_spec("PIL") is None:
        raise InputError("photos are JPEG files: reading them needs Pillow, pip install pillow")
    from PIL import Image, ImageOps

    images = np.zeros((count, 3, size, size), dtype=np.uint8)
    for row, (_, (name, data)) in enumerate(zip(track(range(count), "reading photos"), photos, strict=True)):
        try:
            with Image.open(io.BytesIO(data)) as opened:
                photo = ImageOps.fit(opened.convert("RGB"), (size, size), Image.Resampling.BICUBIC)
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise InputError(f"{name}: not a photo that Pillow can read ({error})") from error
        images[row] = np.asarray(photo).transpose(2, 0, 1)
    return torch.from_numpy(images)
