"""What attacks on images and captions share: which caption belongs to which image, the victim's two sides, batches."""

from collections.abc import Sequence
from typing import Any, Protocol, TypedDict, overload, runtime_checkable

import numpy as np
import torch
from torch import Tensor, nn

from cmr_fast.attacks.settings import whole
from cmr_fast.attacks.text.encoder import evaluating
from cmr_fast.attacks.text.words import check_texts
from cmr_fast.attacks.victim import widened
from cmr_fast.errors import InputError


@runtime_checkable
class DualEncoder(Protocol):
    """What is attacked: images and texts into one space, rows of length 1."""

    def encode_image(self, pixels: Tensor) -> Tensor:
        """Embeddings (N, d) of float (N, 3, H, W) in [0, 1]; what else the tower wants happens inside."""

    def tokenize(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """int64 ids and bool mask (N, L), padded on the right to the longest."""

    def encode_text(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Embeddings, float (N, d), which do not depend on the padding."""


class TextOptions(TypedDict, total=False):
    """The keywords of BertAttack that attacks on both sides hand on."""

    words: int
    k: int
    threshold: float
    max_length: int | None
    tokens: int | None


class ImageTower(nn.Module):
    """The victim's image side as a module that PGD holds.

    Parameters
    ----------
    victim
        Whose `encode_image` it is.
    """

    def __init__(self, victim: DualEncoder) -> None:
        super().__init__()
        self.victim = victim

    def forward(self, pixels: Tensor) -> Tensor:
        """(N, 3, H, W) -> (N, d)."""
        return self.victim.encode_image(pixels)


class MultimodalAttack:
    """Calling habits and checks; a subclass says how a batch of images with all their captions is attacked."""

    def __init__(self, victim: DualEncoder, seed: int, batch: int) -> None:
        if not isinstance(victim, DualEncoder):
            raise InputError(
                "the victim must have encode_image(pixels), tokenize(texts) and encode_text(ids, mask), "
                f"{type(victim).__name__} has not"
            )
        self.model, self.seed, self.batch = victim, whole("seed", seed, 0, 2**64 - 1), whole("batch", batch, 1)

    @overload
    def __call__(
        self, images: np.ndarray, texts: Sequence[str], image_of: object = None, *, start: object = None,
        index: object = None,
    ) -> tuple[np.ndarray, list[str]]: ...  # fmt: skip

    @overload
    def __call__(
        self, images: Tensor, texts: Sequence[str], image_of: object = None, *, start: object = None,
        index: object = None,
    ) -> tuple[Tensor, list[str]]: ...  # fmt: skip

    def __call__(
        self, images: Any, texts: Sequence[str], image_of: object = None, *, start: object = None, index: object = None
    ) -> tuple[Any, list[str]]:
        """Adversarial images and captions.

        Parameters
        ----------
        images
            Floats (N, 3, H, W) in [0, 1], numpy or torch.
        texts
            M captions, each of one of the images.
        image_of
            int (M,): which image a caption belongs to. None: caption i to image i.
        start
            Where the images begin in place of a random start: like images.
        index
            int64 (N,) numbers of the images that the noise depends on, besides the seed. None: their places.

        Returns
        -------
        images, texts
            Like images, and list of str.

        Raises
        ------
        InputError
            For images outside of [0, 1], captions that belong to no image or have no word, and images without captions.
        """
        texts = check_texts(texts)
        was_numpy = isinstance(images, np.ndarray)
        pixels = torch.from_numpy(np.ascontiguousarray(images)) if was_numpy else images
        if not isinstance(pixels, Tensor) or not pixels.is_floating_point() or pixels.ndim != 4:
            seen = f"{pixels.dtype} {tuple(pixels.shape)}" if isinstance(pixels, Tensor) else type(images).__name__
            raise InputError(f"images must be floats (N, 3, H, W) in [0, 1], got {seen}")
        owner = _owners(image_of, len(pixels), len(texts))
        pixels = pixels.detach()
        begin = None if start is None else torch.as_tensor(start).detach()
        if begin is not None and begin.shape != pixels.shape:
            raise InputError(f"start must be like images {tuple(pixels.shape)}, got {tuple(begin.shape)}")
        numbers = torch.arange(len(pixels)) if index is None else torch.as_tensor(index).long()
        if numbers.shape != pixels.shape[:1]:
            raise InputError(f"index must be integers ({len(pixels)},), got shape {tuple(numbers.shape)}")
        adversarial, changed = [pixels[:0]], list(texts)
        with evaluating(self.model):
            self._begin()
            for first in range(0, len(pixels), self.batch):
                rows = slice(first, first + self.batch)
                mine = ((owner >= first) & (owner < first + self.batch)).nonzero()[:, 0].tolist()
                part, words = self._attack(
                    pixels[rows], [texts[i] for i in mine], owner[mine] - first,
                    None if begin is None else begin[rows], numbers[rows],
                )  # fmt: skip
                adversarial.append(part)
                for i, text in zip(mine, words, strict=True):
                    changed[i] = text
        out = torch.cat(adversarial)
        return (out.cpu().numpy() if was_numpy else out), changed

    def _begin(self) -> None:
        """What is found once a call, before its batches."""

    def _attack(
        self, images: Tensor, texts: list[str], owner: Tensor, start: Tensor | None, index: Tensor
    ) -> tuple[Tensor, list[str]]:
        """A batch of images with all of their captions, `owner` saying whose each is."""
        raise NotImplementedError

    @torch.no_grad()
    def _seen(self, images: Tensor) -> Tensor:
        """Embeddings of images, float32 or wider (N, d)."""
        return widened(self.model.encode_image(images))


def summed(values: Tensor, owner: Tensor, count: int) -> Tensor:
    """Rows of captions summed for each image.

    Parameters
    ----------
    values, owner
        Float (M, d); int64 (M,), the image of each.
    count
        Images.

    Returns
    -------
    Tensor
        Float (count, d).
    """
    return values.new_zeros((count, values.shape[1])).index_add_(0, owner.to(values.device), values)


def _owners(image_of: object, images: int, texts: int) -> Tensor:
    if image_of is None:
        if images != texts:
            raise InputError(f"{texts} captions of {images} images: expected image_of, which image each belongs to")
        return torch.arange(images)
    try:
        owner = torch.as_tensor(image_of)
    except (RuntimeError, TypeError, ValueError) as error:
        raise InputError(f"image_of must be integers ({texts},), got {type(image_of).__name__}") from error
    if owner.shape != (texts,) or owner.is_floating_point() or owner.is_complex() or owner.dtype == torch.bool:
        raise InputError(f"image_of must be integers ({texts},), got {owner.dtype} {tuple(owner.shape)}")
    owner = owner.long().cpu()
    if texts and (int(owner.min()) < 0 or int(owner.max()) >= images):
        bad = int(((owner < 0) | (owner >= images)).nonzero()[0])
        raise InputError(f"image_of must be from 0 to {images - 1}, caption {bad} has {int(owner[bad])}")
    lonely = (torch.bincount(owner, minlength=images) == 0).nonzero()
    if len(lonely):
        raise InputError(f"image {int(lonely[0])} has no caption: expected one at least")
    return owner
