"""Adversarial images as files: rounded to 8 bits inside of the ball, written as PNG or JPEG, and read again.

A PNG holds the rounded pixels. A JPEG moves them by tens of levels, out of the ball, and takes from an attack; what is
left of it, only reading the file again tells.
"""

import importlib.util
from collections.abc import Sequence
from math import floor
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from cmr_fast._files import write_aside
from cmr_fast.errors import InputError

Format = Literal["png", "jpeg"]
Decoder = Literal["pillow", "torchvision"]
FORMATS: tuple[Format, ...] = ("png", "jpeg")
QUALITY = 95
"""Of JPEG files; their colours have half of the pixels' resolution, as Pillow's default."""


def to_uint8(adversarial: Tensor, clean: Tensor, eps: float) -> Tensor:
    """Adversarial images as 8-bit pixels of the L-inf ball: the nearest level within it of each value.

    Casting would truncate, up to a level more; rounding alone leaves a ball whose radius is no whole number of levels.

    Parameters
    ----------
    adversarial
        Float (N, C, H, W) from 0 to 1.
    clean
        The same of the images before, of whole levels: k / 255.
    eps
        Radius of the ball. Below 1/255 the clean images are all that it holds.

    Returns
    -------
    Tensor
        uint8 (N, C, H, W).

    Raises
    ------
    InputError
        Where the two differ in shape, are not in [0, 1], or the clean ones are not of whole levels.
    """
    if adversarial.shape != clean.shape or not adversarial.is_floating_point() or not clean.is_floating_point():
        raise InputError(
            f"adversarial and clean images must be floats of one shape, got {adversarial.dtype} "
            f"{tuple(adversarial.shape)} and {clean.dtype} {tuple(clean.shape)}"
        )
    exact, wanted = clean.double() * 255, adversarial.double() * 255
    level = exact.round()
    for name, values in (("adversarial", wanted), ("clean", exact)):
        if values.numel() and not (values.isfinite().all() and values.min() >= -1e-3 and values.max() <= 255 + 1e-3):
            raise InputError(f"{name} images must lie in 0 to 1, got {values.min() / 255:g} to {values.max() / 255:g}")
    if bool(((exact - level).abs() > 1e-2).any()):
        raise InputError("clean images must be 8-bit pixels over 255, got values between two levels")
    most = floor(eps * 255 + 1e-3)  # 2/255 in single precision is 2 levels
    return (level + (wanted - level).round().clamp(-most, most)).clamp(0, 255).to(torch.uint8)


def write_images(folder: Path, images: Tensor, names: Sequence[str], kind: Format) -> list[Path]:
    """Write images as folder/NAME.png or .jpg; a file appears whole or not at all.

    Parameters
    ----------
    folder
        Made where it is missing.
    images
        uint8 (N, 3, H, W).
    names
        N file names, without their endings.
    kind
        "png", or "jpeg" at quality 95.

    Raises
    ------
    InputError
        For other images, and where Pillow is missing.
    """
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3 or len(images) != len(names):
        raise InputError(
            f"images must be uint8 ({len(names)}, 3, H, W), a name each, got {images.dtype} {tuple(images.shape)}"
        )
    if importlib.util.find_spec("PIL") is None:
        raise InputError("writing images needs Pillow: pip install pillow")
    from PIL import Image

    paths = []
    for name, pixels in zip(names, images.cpu().permute(0, 2, 3, 1).contiguous().numpy(), strict=True):
        paths.append(folder / f"{name}.{'png' if kind == 'png' else 'jpg'}")
        with write_aside(paths[-1]) as aside:
            if kind == "png":
                Image.fromarray(pixels).save(aside, "PNG")
            else:
                Image.fromarray(pixels).save(aside, "JPEG", quality=QUALITY)
    return paths


def read_images(paths: Sequence[Path], decoder: Decoder = "pillow") -> Tensor:
    """Images of one size as uint8 (N, 3, H, W), as a decoder gives them.

    Parameters
    ----------
    paths
        PNG or JPEG files.
    decoder
        One of `decoders()`.
    """
    if decoder == "torchvision":
        from torchvision.io import ImageReadMode, decode_image

        return torch.stack([decode_image(str(path), mode=ImageReadMode.RGB) for path in paths])
    from PIL import Image

    images = []
    for path in paths:
        with Image.open(path) as opened:
            images.append(np.asarray(opened.convert("RGB")).transpose(2, 0, 1))
    return torch.from_numpy(np.stack(images))


def decoders() -> list[Decoder]:
    """The decoders that are installed."""
    found: list[tuple[Decoder, str]] = [("pillow", "PIL"), ("torchvision", "torchvision")]
    return [name for name, module in found if importlib.util.find_spec(module) is not None]
