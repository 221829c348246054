"""Labelled images for classifiers."""

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from cmr_fast.data.pairs import as_tensor, held_out, shape_seen
from cmr_fast.data.split import Parts
from cmr_fast.errors import InputError
from cmr_fast.ops._tensors import as_seed


@dataclass(frozen=True, repr=False)
class Images(Parts):
    """N images with a class each. A `cmr_fast.data.split.Split`.

    Parameters
    ----------
    image : Tensor
        uint8 (N, 3, H, W).
    labels : Tensor
        int64 (N,) class ids from 0.
    rows : Tensor, optional
        int64 (N,), which rows of a split a batch holds; None of a split.

    Raises
    ------
    InputError
        Where a part has another type, dtype or shape, or an id is negative.
    """

    image: Tensor
    labels: Tensor
    rows: Tensor | None = None

    def __post_init__(self) -> None:
        for name in ("image", "labels"):
            object.__setattr__(self, name, as_tensor(getattr(self, name), name))
        image, labels = self.image, self.labels
        if image.dtype != torch.uint8 or image.ndim != 4 or image.shape[1] != 3:
            raise InputError(f"images must be uint8 (N, 3, H, W), got {image.dtype} {shape_seen(image)}")
        if labels.dtype != torch.int64 or labels.shape != image.shape[:1]:
            raise InputError(
                f"labels must be int64 ({len(image)},), one an image, got {labels.dtype} {tuple(labels.shape)}"
            )
        if len(labels) and int(labels.min()) < 0:
            raise InputError(f"class ids must be 0 or more, got {int(labels.min())}")

    def sample(self, count: int, seed: int = 0) -> "Images":
        """`count` images, each class its share, in an order drawn with `seed`; all of them where there are no more."""
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(as_seed(seed)))
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
    """Train and test splits of labelled images, and what `hold_out` takes from train.

    Parameters
    ----------
    name : str
        What results are reported under.
    train, test : Images
        The splits, of one size of image.
    valid : Images, optional
        Images to choose by during training.
    class_names : tuple of str
        One a class, or none.

    Raises
    ------
    InputError
        Where a split is empty, or has images of another size or classes without a name.
    """

    name: str
    train: Images
    test: Images
    valid: Images | None = None
    class_names: tuple[str, ...] = field(default=())

    def __post_init__(self) -> None:
        for split in ("train", "test", "valid"):
            images = getattr(self, split)
            if images is None and split == "valid":
                continue
            if not isinstance(images, Images):
                raise InputError(f"{self.name}: the {split} split must be Images, got {type(images).__name__}")
            if not len(images):
                raise InputError(f"{self.name}: the {split} split is empty, it needs at least one image")
        shapes = {tuple(images.image.shape[1:]) for images in self._splits()}
        if len(shapes) != 1:
            raise InputError(f"{self.name}: images must have one size over all splits, got {sorted(shapes)}")
        highest = max(int(images.labels.max()) for images in self._splits())
        if self.class_names and highest >= len(self.class_names):
            raise InputError(f"{self.name}: class {highest}, but only {len(self.class_names)} class names")

    def __repr__(self) -> str:
        lines = [f"{type(self).__name__} {self.name}, {self.num_classes} classes"]
        for split in ("train", "valid", "test"):
            if getattr(self, split) is not None:
                lines.append(f"  {split:<6}{getattr(self, split)!r}")
        return "\n".join(lines)

    def _splits(self) -> list[Images]:
        return [images for images in (self.train, self.test, self.valid) if images is not None]

    @property
    def num_classes(self) -> int:
        """The highest class that occurs or is named, plus one."""
        return max(len(self.class_names), 1 + max(int(images.labels.max()) for images in self._splits()))

    def hold_out(self, fraction: float, seed: int) -> "ImageDataset":
        """Move about `fraction` of the training images to `valid`: the same for one seed, each class its share."""
        held = held_out(self.train.labels, fraction, seed)
        valid, train = (self.train.select(rows.nonzero()[:, 0]) for rows in (held, ~held))
        return replace(self, train=train, valid=valid)
