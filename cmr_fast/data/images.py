"""Labelled images for classifiers: CIFAR-10 and SVHN from their authors' files, and the built-in shapes."""

import os
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cmr_fast.data.pairs import held_out
from cmr_fast.data.split import Parts
from cmr_fast.errors import InputError

CIFAR_TRAIN, CIFAR_TEST = [f"data_batch_{number}" for number in range(1, 6)], "test_batch"
SVHN_FILES = "train_32x32.mat", "test_32x32.mat"


@dataclass(frozen=True, repr=False)
class Images(Parts):
    """N images with a class each: image uint8 (N, 3, H, W), labels int64 (N,)."""

    image: Tensor
    labels: Tensor
    rows: Tensor | None = None

    def __post_init__(self) -> None:
        image, labels = self.image, self.labels
        if image.dtype != torch.uint8 or image.ndim != 4 or image.shape[1] != 3:
            raise InputError(f"images must be uint8 (N, 3, H, W), got {image.dtype} {tuple(image.shape)}")
        if labels.dtype != torch.int64 or labels.shape != image.shape[:1]:
            raise InputError(
                f"labels must be int64 ({len(image)},), one an image, got {labels.dtype} {tuple(labels.shape)}"
            )
        if len(labels) and int(labels.min()) < 0:
            raise InputError(f"class ids must be 0 or more, got {int(labels.min())}")

    def sample(self, count: int, seed: int = 0) -> "Images":
        """`count` images, each class its share, in an order drawn with `seed`; all of them where there are no more."""
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))
        if count < len(self):
            by_class = order[torch.argsort(self.labels[order], stable=True)]
            chosen = torch.zeros(len(self), dtype=torch.bool)
            chosen[by_class[torch.arange(count) * len(self) // count]] = True
            order = order[chosen[order]]
        return self.select(order)

    def pixels(self) -> Tensor:
        """float32 (N, 3, H, W) from 0 to 1."""
        return self.image.float() / 255


@dataclass(frozen=True, repr=False)
class ImageDataset:
    """Train and test splits of labelled images, and what `hold_out` takes from train."""

    name: str
    train: Images
    test: Images
    valid: Images | None = None
    class_names: tuple[str, ...] = field(default=())

    def __post_init__(self) -> None:
        splits = {"train": self.train, "test": self.test, "valid": self.valid}
        for name, images in splits.items():
            if images is not None and not len(images):
                raise InputError(f"{self.name}: the {name} split is empty, it needs at least one image")
        shapes = {tuple(images.image.shape[1:]) for images in splits.values() if images is not None}
        if len(shapes) != 1:
            raise InputError(f"{self.name}: images must have one size over all splits, got {sorted(shapes)}")
        highest = max(int(images.labels.max()) for images in splits.values() if images is not None)
        if self.class_names and highest >= len(self.class_names):
            raise InputError(f"{self.name}: class {highest}, but only {len(self.class_names)} class names")

    def __repr__(self) -> str:
        lines = [f"{type(self).__name__} {self.name}, {self.num_classes} classes"]
        lines += [f"  {split:<6}{getattr(self, split)!r}" for split in ("train", "valid", "test")
                  if getattr(self, split) is not None]  # fmt: skip
        return "\n".join(lines)

    @property
    def num_classes(self) -> int:
        splits = [images for images in (self.train, self.test, self.valid) if images is not None]
        return max(len(self.class_names), 1 + max(int(images.labels.max()) for images in splits))

    def hold_out(self, fraction: float, seed: int) -> "ImageDataset":
        """Move about `fraction` of the training images to `valid`: the same for one seed, each class its share."""
        held = held_out(self.train.labels, fraction, seed)
        valid, train = (self.train.select(rows.nonzero()[:, 0]) for rows in (held, ~held))
        return replace(self, train=train, valid=valid)


def load_images(
    path_or_name: str | os.PathLike[str], *, train: int | None = None, test: int | None = None, seed: int = 0
) -> ImageDataset:
    """The labelled images at a path, or by name: "shapes" is built in, others lie under $CMR_FAST_DATA.

    What lies there is found by looking:
    data_batch_1 … data_batch_5, test_batch   CIFAR-10, the python version (also in a folder cifar-10-batches-py in it)
    train_32x32.mat, test_32x32.mat           SVHN, the cropped digits; its label 10 is the digit 0

    train, test    keep this many images of a split, drawn with `seed`, each class its share; None keeps all
    Pickles are read by a reader that runs nothing. Raises InputError for files that are missing, cut short or of other
    shapes than their authors' ones.
    """
    from cmr_fast.data import _find, shapes

    if path_or_name == "shapes":
        wanted = {"train": train, "test": test}
        return shapes.load_images(seed=seed, **{split: n for split, n in wanted.items() if n is not None})
    path = _find(Path(path_or_name).expanduser())
    read = _reader(path)
    if read is None:
        there = sorted(p.name for p in path.iterdir()) if path.is_dir() else [path.name]
        raise InputError(
            f"{path}: no labelled images found; looked for data_batch_1 (CIFAR-10, python version) and "
            f"{SVHN_FILES[0]} (SVHN); it holds {', '.join(there[:8]) or 'nothing'}"
        )
    found = read()
    return replace(found, train=_few(found.train, train, seed, "train"), test=_few(found.test, test, seed, "test"))


def holds_images(path: Path) -> bool:
    """Whether `load_images` knows what lies there."""
    return _reader(path) is not None


def _reader(path: Path) -> Callable[[], ImageDataset] | None:
    for folder in (path, path / "cifar-10-batches-py"):
        if (folder / CIFAR_TRAIN[0]).is_file():
            return lambda: _cifar10(folder)
    return (lambda: _svhn(path)) if (path / SVHN_FILES[0]).is_file() else None


def _few(images: Images, count: int | None, seed: int, split: str) -> Images:
    if count is None:
        return images
    if not 0 < count <= len(images):
        raise InputError(f"{split} must be from 1 to the {len(images)} images there are, got {count}")
    return images.sample(count, seed)


def _cifar10(folder: Path) -> ImageDataset:
    missing = [name for name in (*CIFAR_TRAIN, CIFAR_TEST) if not (folder / name).is_file()]
    if missing:
        raise InputError(f"{folder}: CIFAR-10's {', '.join(missing)} not found")
    train, test = (_cifar_split(folder, files) for files in (CIFAR_TRAIN, [CIFAR_TEST]))
    names: tuple[str, ...] = ()
    if (folder / "batches.meta").is_file():
        names = tuple(_text(name) for name in _entry(folder / "batches.meta", "label_names"))
    return ImageDataset("cifar10", train, test, class_names=names)


def _cifar_split(folder: Path, files: list[str]) -> Images:
    images, labels = zip(*(_cifar_batch(folder / name) for name in files), strict=True)
    return Images(torch.cat(images), torch.cat(labels))


def _cifar_batch(file: Path) -> tuple[Tensor, Tensor]:
    data, labels = _entry(file, "data"), _entry(file, "labels")
    if not isinstance(data, np.ndarray) or data.dtype != np.uint8 or data.ndim != 2 or data.shape[1] != 3072:
        seen = f"{data.dtype} {data.shape}" if isinstance(data, np.ndarray) else type(data).__name__
        raise InputError(f"{file}: data must be uint8 (N, 3072), got {seen}")
    ids = np.asarray(labels)
    if ids.shape != data.shape[:1] or ids.dtype.kind not in "iu":
        raise InputError(f"{file}: labels must be {len(data)} integers, got {ids.dtype} {ids.shape}")
    if len(ids) and (ids.min() < 0 or ids.max() > 9):
        raise InputError(f"{file}: CIFAR-10 has classes 0 to 9, got {ids.min()} to {ids.max()}")
    pixels = torch.from_numpy(data.copy()).reshape(-1, 3, 32, 32)
    return pixels, torch.from_numpy(ids.astype(np.int64))


def _entry(file: Path, name: str) -> Any:
    """A value of a batch's dict, whose keys are bytes or text."""
    from cmr_fast.data import pickles

    found = pickles.load(file)
    if isinstance(found, dict):
        for key in (name.encode(), name):
            if key in found:
                return found[key]
    raise InputError(f"{file}: not a batch of CIFAR-10: it has no {name!r}")


def _text(name: object) -> str:
    return name.decode("utf-8", "replace") if isinstance(name, bytes) else str(name)


def _svhn(folder: Path) -> ImageDataset:
    train, test = (_svhn_split(folder / name) for name in SVHN_FILES)
    return ImageDataset("svhn", train, test, class_names=tuple("0123456789"))


def _svhn_split(file: Path) -> Images:
    from cmr_fast.data.readers import read_arrays

    if not file.is_file():
        raise InputError(f"{file.parent}: SVHN's {file.name} not found beside {SVHN_FILES[0]}")
    arrays = read_arrays(file)
    if not {"X", "y"} <= set(arrays):
        raise InputError(f"{file}: SVHN's files hold X and y, this one {', '.join(arrays) or 'nothing'}")
    images, labels = np.asarray(arrays["X"]()), np.asarray(arrays["y"]()).reshape(-1).astype(np.int64)
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[:3] != (32, 32, 3):
        raise InputError(f"{file}: X must be uint8 (32, 32, 3, N), got {images.dtype} {images.shape}")
    if len(labels) != images.shape[3]:
        raise InputError(f"{file}: {images.shape[3]} images, but {len(labels)} labels")
    if len(labels) and (labels.min() < 1 or labels.max() > 10):
        raise InputError(f"{file}: SVHN's labels are 1 to 10, got {labels.min()} to {labels.max()}")
    pixels = np.ascontiguousarray(images.transpose(3, 2, 0, 1))
    return Images(torch.from_numpy(pixels), torch.from_numpy(labels % 10))
