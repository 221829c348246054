"""Labelled images from their authors' files: CIFAR-10 and CIFAR-100 (python and MATLAB version), SVHN's digits."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cmr_fast.data import pickles
from cmr_fast.data._values import decoded
from cmr_fast.data.images import ImageDataset, Images
from cmr_fast.data.readers import read_arrays
from cmr_fast.errors import InputError

CIFAR_TRAIN, CIFAR_TEST = [f"data_batch_{number}" for number in range(1, 6)], "test_batch"
CIFAR_FOLDERS = ("", "cifar-10-batches-py", "cifar-10-batches-mat")
CIFAR100_FILES = "train", "test", "meta"
CIFAR100_FOLDERS = ("", "cifar-100-python", "cifar-100-matlab")
SVHN_FILES = "train_32x32.mat", "test_32x32.mat"


def cifar10_folder(path: Path) -> Path | None:
    """The folder at or in `path` where CIFAR-10's first batch lies."""
    folders = [path / name for name in CIFAR_FOLDERS]
    return next((folder for folder in folders if _batch_file(folder, CIFAR_TRAIN[0]).is_file()), None)


def _batch_file(folder: Path, name: str) -> Path:
    """A batch, a pickle without an ending or MATLAB's file."""
    matlab = folder / f"{name}.mat"
    return matlab if matlab.is_file() and not (folder / name).is_file() else folder / name


def holds_cifar10(path: Path) -> bool:
    """Whether CIFAR-10's batches lie there."""
    return cifar10_folder(path) is not None


def cifar100_folder(path: Path) -> Path | None:
    """The folder at or in `path` where all files of CIFAR-100 lie."""
    folders = [path / name for name in CIFAR100_FOLDERS]
    return next((f for f in folders if all(_batch_file(f, name).is_file() for name in CIFAR100_FILES)), None)


def holds_cifar100(path: Path) -> bool:
    """Whether CIFAR-100's files lie there."""
    return cifar100_folder(path) is not None


def holds_svhn(path: Path) -> bool:
    """Whether SVHN's cropped digits lie there."""
    return (path / SVHN_FILES[0]).is_file()


def load_cifar10(path: Path) -> ImageDataset:
    """CIFAR-10: 50,000 and 10,000 images of ten classes, in five batches and one."""
    folder = cifar10_folder(path) or path
    missing = [name for name in (*CIFAR_TRAIN, CIFAR_TEST) if not _batch_file(folder, name).is_file()]
    if missing:
        raise InputError(f"{folder}: CIFAR-10's {', '.join(missing)} not found")
    train, test = (_cifar_split(folder, files, "labels", 10) for files in (CIFAR_TRAIN, [CIFAR_TEST]))
    names: tuple[str, ...] = ()
    meta = _batch_file(folder, "batches.meta")
    if meta.is_file():
        names = tuple(_text(name) for name in _entry(meta, "label_names"))
    return ImageDataset("cifar10", train, test, class_names=names)


def load_cifar100(path: Path) -> ImageDataset:
    """CIFAR-100: 50,000 and 10,000 images of a hundred classes, the fine labels, a file each."""
    folder = cifar100_folder(path) or path
    train, test = (_cifar_split(folder, [name], "fine_labels", 100) for name in CIFAR100_FILES[:2])
    names = tuple(_text(name) for name in _entry(_batch_file(folder, CIFAR100_FILES[2]), "fine_label_names"))
    return ImageDataset("cifar100", train, test, class_names=names)


def _cifar_split(folder: Path, files: list[str], labels: str, classes: int) -> Images:
    images, ids = zip(*(_cifar_batch(_batch_file(folder, name), labels, classes) for name in files), strict=True)
    return Images(torch.cat(images), torch.cat(ids))


def _cifar_batch(file: Path, name: str, classes: int) -> tuple[Tensor, Tensor]:
    data, labels = _entry(file, "data"), _entry(file, name)
    if not isinstance(data, np.ndarray) or data.dtype != np.uint8 or data.ndim != 2 or data.shape[1] != 3072:
        seen = f"{data.dtype} {data.shape}" if isinstance(data, np.ndarray) else type(data).__name__
        raise InputError(f"{file}: data must be uint8 (N, 3072), got {seen}")
    ids = np.asarray(labels)
    ids = ids[:, 0] if ids.ndim == 2 and ids.shape[1] == 1 else ids
    if ids.shape != data.shape[:1] or ids.dtype.kind not in "iu":
        raise InputError(f"{file}: {name} must be {len(data)} integers, got {ids.dtype} {ids.shape}")
    if len(ids) and (ids.min() < 0 or ids.max() >= classes):
        raise InputError(f"{file}: CIFAR-{classes} has classes 0 to {classes - 1}, got {ids.min()} to {ids.max()}")
    pixels = torch.from_numpy(data.copy()).reshape(-1, 3, 32, 32)
    return pixels, torch.from_numpy(ids.astype(np.int64))


def _entry(file: Path, name: str) -> Any:
    """A value of a batch's dict, whose keys are bytes or text, or of MATLAB's file."""
    if file.suffix == ".mat":
        arrays = read_arrays(file)
        if name in arrays:
            return arrays[name]()
    else:
        batch = pickles.load(file)
        for key in (name.encode(), name):
            if isinstance(batch, dict) and key in batch:
                return batch[key]
    raise InputError(f"{file}: not a file of CIFAR: it has no {name!r}")


def _text(name: object) -> str:
    return decoded(name) if isinstance(name, bytes) else str(name)


def load_svhn(folder: Path) -> ImageDataset:
    """SVHN, 32 x 32 digits; its label 10 is the digit 0."""
    train, test = (_svhn_split(folder / name) for name in SVHN_FILES)
    return ImageDataset("svhn", train, test, class_names=tuple("0123456789"))


def _svhn_split(file: Path) -> Images:
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
