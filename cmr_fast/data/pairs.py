"""What a paired data set is: images and texts that belong together, their labels, and three splits."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from cmr_fast.data.split import Parts
from cmr_fast.errors import InputError

MAX_CLASSES = 1_000_000


@dataclass(frozen=True, repr=False)
class Pairs(Parts):
    """N pairs; row i of `image` and entry i of `text` describe the same thing.

    image   float32 (N, Di) features, or uint8 (N, 3, H, W) raw images
    text    float32 (N, Dt) features, int64 (N, L) token ids, or N captions, each a string or a tuple of them
    labels  int64 (N,) class ids from 0, or uint8 (N, C) multi-hot
    rows    int64 (N,), which rows of a split a batch holds; None of a split
    """

    image: Tensor
    text: Tensor | Sequence[str] | Sequence[tuple[str, ...]]
    labels: Tensor
    rows: Tensor | None = None

    def __post_init__(self) -> None:
        sizes = {"image": len(self.image), "text": len(self.text), "labels": len(self.labels)}
        if len(set(sizes.values())) != 1:
            raise InputError(f"image, text and labels must have the same number of rows, got {sizes}")
        _check_labels(self.labels)
        if isinstance(self.text, Tensor) and self.text.dtype == torch.int64:
            if self.text.ndim != 2 or not self.text.shape[1]:
                raise InputError(f"token ids must be int64 (N, L), got {tuple(self.text.shape)}")
        elif isinstance(self.text, Tensor):
            _check_features(self.text, "text")
        if self.image.dtype != torch.uint8:
            _check_features(self.image, "image")
        elif self.image.ndim != 4 or self.image.shape[1] != 3:
            raise InputError(f"raw images must be uint8 (N, 3, H, W), got uint8 {tuple(self.image.shape)}")

    @property
    def multi_label(self) -> bool:
        """Whether labels are multi-hot rows."""
        return self.labels.ndim == 2


@dataclass(frozen=True, repr=False)
class PairedDataset:
    """Train, query and database splits. Queries of one modality rank the database of the other.

    Where the field ranks the test set within itself (Wikipedia), `query` and `database` are the same object.
    """

    name: str
    train: Pairs
    query: Pairs
    database: Pairs
    valid: Pairs | None = None
    class_names: tuple[str, ...] = field(default=())

    def __post_init__(self) -> None:
        for split in ("train", "query", "database"):
            pairs = getattr(self, split)
            if len(pairs) == 0:
                raise InputError(f"{self.name}: the {split} split is empty, it needs at least one pair")
        splits = [p for p in (self.train, self.valid, self.query, self.database) if p is not None]
        if self.valid is not None and len(self.valid) == 0:
            raise InputError(f"{self.name}: the valid split is empty, it needs at least one pair, or is None")
        for what in ("image", "text", "labels"):
            widths = {_width(getattr(p, what)) for p in splits}
            if len(widths) != 1:
                raise InputError(
                    f"{self.name}: {what} must have one width over all splits, got {sorted(map(str, widths))}"
                )
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
        lines += [f"  {split:<9}{getattr(self, split)!r}" for split in ("train", "valid", "query", "database")
                  if getattr(self, split) is not None]  # fmt: skip
        return "\n".join(lines)

    @property
    def num_classes(self) -> int:
        if self.train.multi_label:
            return self.train.labels.shape[1]
        splits = [p for p in (self.train, self.valid, self.query, self.database) if p is not None]
        return max(len(self.class_names), 1 + max(int(p.labels.max()) for p in splits))

    @property
    def image_dim(self) -> int:
        return _feature_dim(self.name, "image", self.train.image)

    @property
    def text_dim(self) -> int:
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
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    if labels.ndim == 1:
        order = order[torch.argsort(labels[order], stable=True)]
    # every (1/fraction)-th item of the class-sorted shuffle
    held = torch.zeros(len(labels), dtype=torch.bool)
    held[order[torch.arange(0, len(labels), 1 / fraction).long()]] = True
    return held


def _check_features(values: Tensor, name: str) -> None:
    if values.ndim != 2 or not values.is_floating_point():
        raise InputError(f"{name} features must be floats (N, dim), got {values.dtype} {tuple(values.shape)}")
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


def _width(values: Tensor | Sequence) -> tuple:
    return tuple(values.shape[1:]) if isinstance(values, Tensor) else ("captions",)


def _feature_dim(name: str, what: str, values: Tensor | Sequence) -> int:
    if not isinstance(values, Tensor) or values.ndim != 2:
        raise InputError(f"{name}: {what} is raw, this needs features (N, dim)")
    return values.shape[1]
