"""What a paired data set is: images and texts that belong together, their labels, and three splits."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cmr_fast.data.split import Parts
from cmr_fast.errors import InputError
from cmr_fast.ops._tensors import as_seed

MAX_CLASSES = 1_000_000


@dataclass(frozen=True, repr=False)
class Pairs(Parts):
    """N pairs; row i of `image` and entry i of `text` describe the same thing. A `cmr_fast.data.split.Split`.

    Parameters
    ----------
    image : Tensor
        float (N, Di) features, or uint8 (N, 3, H, W) raw images.
    text : Tensor or tuple of str or tuple of tuple of str
        float (N, Dt) features, int64 (N, L) token ids, or N captions, each a string or a tuple of them.
    labels : Tensor
        int64 (N,) class ids from 0, or uint8 (N, C) multi-hot.
    rows : Tensor, optional
        int64 (N,), which rows of a split a batch holds; None of a split.

    Notes
    -----
    numpy arrays are taken too, and kept as tensors over the same memory.

    Raises
    ------
    InputError
        Where a part has another type, dtype, shape or number of rows, is not finite, or labels are out of range.
    """

    image: Tensor
    text: Tensor | Sequence[str] | Sequence[tuple[str, ...]]
    labels: Tensor
    rows: Tensor | None = None

    def __post_init__(self) -> None:
        for name, kinds in (("image", "a tensor"), ("text", "a tensor or captions"), ("labels", "a tensor")):
            value = getattr(self, name)
            if name == "text" and not isinstance(value, Tensor | np.ndarray):
                object.__setattr__(self, name, _captions(value))
            else:
                object.__setattr__(self, name, as_tensor(value, name, kinds))
        sizes = {"image": len(self.image), "text": len(self.text), "labels": len(self.labels)}
        if len(set(sizes.values())) != 1:
            raise InputError(f"image, text and labels must have the same number of rows, got {sizes}")
        _check_labels(self.labels)
        if isinstance(self.text, Tensor):
            _check_text(self.text)
        if self.image.dtype != torch.uint8:
            _check_features(self.image, "image")
        elif self.image.ndim != 4 or self.image.shape[1] != 3:
            raise InputError(f"raw images must be uint8 (N, 3, H, W), got uint8 {shape_seen(self.image)}")

    @property
    def multi_label(self) -> bool:
        """Whether labels are multi-hot rows."""
        return self.labels.ndim == 2


@dataclass(frozen=True, repr=False)
class PairedDataset:
    """Train, query and database splits. Queries of one modality rank the database of the other.

    Where the field ranks the test set within itself (Wikipedia), `query` and `database` are the same object.

    Parameters
    ----------
    name : str
        What results are reported under.
    train, query, database : Pairs
        The splits, of one width for each part.
    valid : Pairs, optional
        Pairs to choose by during training; `hold_out` takes them from `train`.
    class_names : tuple of str
        One a class, or none.

    Raises
    ------
    InputError
        Where a split is empty, has another width, or holds one class only, or names do not fit the classes.
    """

    name: str
    train: Pairs
    query: Pairs
    database: Pairs
    valid: Pairs | None = None
    class_names: tuple[str, ...] = field(default=())

    def __post_init__(self) -> None:
        for split in ("train", "query", "database", "valid"):
            pairs = getattr(self, split)
            if pairs is None and split == "valid":
                continue
            if not isinstance(pairs, Pairs):
                raise InputError(f"{self.name}: the {split} split must be Pairs, got {type(pairs).__name__}")
            if len(pairs) == 0:
                also = ", or is None" if split == "valid" else ""
                raise InputError(f"{self.name}: the {split} split is empty, it needs at least one pair{also}")
        for part in ("image", "text", "labels"):
            pairs_of = {split: getattr(self, split) for split in ("train", "query", "database", "valid")}
            widths = {split: _width(getattr(pairs, part)) for split, pairs in pairs_of.items() if pairs is not None}
            if len(set(widths.values())) != 1:
                seen = ", ".join(f"{split} {width}" for split, width in widths.items())
                raise InputError(f"{self.name}: {part} must have one width over all splits, got {seen}")
        for split in ("train", "database"):
            used = _used(getattr(self, split).labels)
            if used < 2:
                raise InputError(
                    f"{self.name}: the {split} labels hold {('no class', 'one class only')[used]}; "
                    "retrieval by label needs at least two"
                )
        if self.class_names and len(self.class_names) != self.num_classes:
            raise InputError(
                f"{self.name}: {len(self.class_names)} class names for labels of {self.num_classes} classes"
            )

    def __repr__(self) -> str:
        lines = [f"{type(self).__name__} {self.name}, {self.num_classes} classes"]
        for split in ("train", "valid", "query", "database"):
            if getattr(self, split) is not None:
                same = " (the queries)" if split == "database" and self.database is self.query else ""
                lines.append(f"  {split:<9}{getattr(self, split)!r}{same}")
        return "\n".join(lines)

    def _splits(self) -> list[Pairs]:
        return [pairs for pairs in (self.train, self.valid, self.query, self.database) if pairs is not None]

    @property
    def num_classes(self) -> int:
        """Columns of multi-hot labels; of ids the highest that occurs or is named, plus one."""
        if self.train.multi_label:
            return self.train.labels.shape[1]
        return max(len(self.class_names), 1 + max(int(pairs.labels.max()) for pairs in self._splits()))

    @property
    def image_dim(self) -> int:
        """Columns of the image features. InputError for raw images."""
        return _feature_dim(self.name, "image", self.train.image)

    @property
    def image_shape(self) -> tuple[int, ...]:
        """Shape of an image: (dim,) of features, (3, H, W) of raw pixels."""
        return tuple(self.train.image.shape[1:])

    @property
    def text_dim(self) -> int:
        """Columns of the text features. InputError for captions and token ids."""
        return _feature_dim(self.name, "text", self.train.text)

    def hold_out(self, fraction: float, seed: int) -> "PairedDataset":
        """Move about `fraction` of the training pairs to `valid`: the same for one seed, single labels by class."""
        held = held_out(self.train.labels, fraction, seed)
        return replace(
            self, train=self.train.select((~held).nonzero()[:, 0]), valid=self.train.select(held.nonzero()[:, 0])
        )


def held_out(labels: Tensor, fraction: float, seed: int) -> Tensor:
    """bool (N,): about `fraction` of the rows, the same for one seed; of single labels each class gives its share."""
    if not 0 < fraction < 1:
        raise InputError(f"fraction must lie between 0 and 1, got {fraction}")
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(as_seed(seed)))
    if labels.ndim == 1:
        order = order[torch.argsort(labels[order], stable=True)]
    # every (1/fraction)-th item of the class-sorted shuffle
    held = torch.zeros(len(labels), dtype=torch.bool)
    held[order[torch.arange(0, len(labels), 1 / fraction).long()]] = True
    return held


def as_tensor(value: Any, name: str, kinds: str = "a tensor") -> Tensor:
    """`value` as a tensor, over the same memory where it is a numpy array. InputError for anything else."""
    if isinstance(value, np.ndarray) and not isinstance(value, np.ma.MaskedArray):
        try:
            value = torch.from_numpy(np.ascontiguousarray(value))
        except TypeError as error:
            raise InputError(f"{name} must be an array of numbers, got dtype {value.dtype} {value.shape}") from error
    if not isinstance(value, Tensor) or value.ndim == 0 or value.layout != torch.strided:
        seen = f"{value.layout} {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise InputError(f"{name} must be {kinds} or a numpy array with one row a pair, got {seen}")
    return value


def shape_seen(images: Tensor) -> str:
    """The shape of images that are not (N, 3, H, W), and what to do where their channels lie last."""
    last = images.ndim == 4 and images.shape[3] == 3
    return f"{tuple(images.shape)}" + ("; channels lie last, x.permute(0, 3, 1, 2) turns them" if last else "")


def _captions(text: Any) -> tuple[str, ...] | tuple[tuple[str, ...], ...]:
    """N strings, or N tuples of strings."""
    if isinstance(text, list | tuple):
        if all(isinstance(caption, str) for caption in text):
            return tuple(text)
        if all(isinstance(row, list | tuple) and all(isinstance(c, str) for c in row) for row in text):
            return tuple(tuple(row) for row in text)
        seen = f"a {type(text).__name__} of {', '.join(sorted({type(row).__name__ for row in text}))}"
    else:
        seen = type(text).__name__
    raise InputError(
        f"text must be a tensor or numpy array of features or token ids, or N strings or tuples of strings, got {seen}"
    )


def _check_text(values: Tensor) -> None:
    if values.dtype != torch.int64:
        _check_features(values, "text")
    elif values.ndim != 2 or not values.shape[1]:
        raise InputError(f"token ids must be int64 (N, L), got {tuple(values.shape)}")


def _check_features(values: Tensor, name: str) -> None:
    if values.ndim != 2 or not values.is_floating_point():
        also = ", token ids int64 (N, L)" if name == "text" else ", raw images uint8 (N, 3, H, W)"
        raise InputError(f"{name} features must be floats (N, dim){also}, got {values.dtype} {tuple(values.shape)}")
    if values.shape[1] == 0:
        raise InputError(f"{name} features must have at least one column, got shape {tuple(values.shape)}")
    bad = (~torch.isfinite(values)).any(dim=1)
    if bad.any():
        row = int(bad.nonzero()[0])
        raise InputError(f"{name} features must be finite: {int(bad.sum())} rows are not, the first is row {row}")


def _check_labels(labels: Tensor) -> None:
    if labels.ndim == 1 and labels.dtype == torch.int64:
        if len(labels) and int(labels.min()) < 0:
            raise InputError(f"class ids must be 0 or more, got {int(labels.min())}")
        if len(labels) and int(labels.max()) >= MAX_CLASSES:
            raise InputError(f"class ids must count from 0 and stay below {MAX_CLASSES}, got {int(labels.max())}")
    elif labels.ndim == 2 and labels.dtype == torch.uint8:
        if labels.numel() and int(labels.max()) > 1:
            raise InputError(f"multi-hot labels must be 0 or 1, got {int(labels.max())}")
    else:
        raise InputError(
            f"labels must be int64 (N,) class ids or uint8 (N, C) multi-hot, got {labels.dtype} {tuple(labels.shape)}"
        )


def _used(labels: Tensor) -> int:
    """How many classes occur."""
    return int((labels.amax(dim=0) > 0).sum()) if labels.ndim == 2 else len(labels.unique())


def _width(values: Tensor | Sequence[Any]) -> str:
    if not isinstance(values, Tensor):
        return "captions"
    return " x ".join(map(str, values.shape[1:])) or "a number"


def _feature_dim(name: str, what: str, values: Tensor | Sequence[Any]) -> int:
    if not isinstance(values, Tensor) or values.ndim != 2 or not values.is_floating_point():
        raise InputError(f"{name}: {what} is raw, this needs features (N, dim)")
    return values.shape[1]
