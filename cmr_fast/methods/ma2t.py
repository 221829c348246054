"""MA2T's data: pairs of which one side is augmented join those of the data set (Algorithm 1, lines 1 to 5).

    D <- D + {(I, T_aug)}     texts: EDA of the caption, the image's other captions, or those of a file
    D <- D + {(I_aug, T)}     images: RandAugment in ALBEF's form, 2 operations at level 5

four for each original (section 4.2). What is augmented depends on the image's id alone: it is the same in every pass.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from cmr_fast.data.augment import EDA, RandAugment, WordNet
from cmr_fast.data.captions import CaptionedImages
from cmr_fast.data.photos import Photos
from cmr_fast.errors import InputError
from cmr_fast.methods._settings import check_least

ALPHA, OPERATIONS, LEVEL = 0.3, 2, 5  # appendix A.1
BOTH = (
    "pairs with both sides augmented are trained on (augment_both): image and text need not be aligned, and the paper "
    "found that it degrades the model"
)


@dataclass(frozen=True)
class AugmentConfig:
    """What joins the training pairs; nothing by default."""

    augment_text: str = "none"
    """MA2T's texts for each image: `eda` of its first caption (alpha 0.3), `human`, its captions after the first, or a
    JSON file {image: [texts]} of what some model made of captions or images; `none` for no such pairs."""
    augment_image: str = "none"
    """MA2T's images for each caption: `randaug` (2 operations of level 5), or `none`. Beside texts, its pairs join
    theirs: each has one side as it was."""
    augment_count: int = 4
    """Augmented pairs for each original, of texts and of images."""
    augment_both: bool = False
    """Pair augmented texts with augmented images instead. The paper warns that this degrades the model."""
    wordnet: str = ""
    """WordNet's dict folder, where EDA's synonyms come from. None: EDA swaps and deletes words alone."""

    def check_augment(self) -> None:
        """InputError for values out of range, and for settings that do not go together."""
        check_least(self, augment_count=1)
        texts, images = self.augment_text != "none", self.augment_image != "none"
        if self.augment_text not in ("none", "eda", "human") and not self.augment_text.endswith(".json"):
            raise InputError(f"augment_text must be none, eda, human or a .json file, got {self.augment_text!r}")
        if self.augment_image not in ("none", "randaug"):
            raise InputError(f"augment_image must be none or randaug, got {self.augment_image!r}")
        if self.augment_both and not (texts and images):
            raise InputError(
                "augment_both pairs augmented texts with augmented images: expected both augment_text and augment_image"
            )
        if self.wordnet and self.augment_text != "eda":
            raise InputError(f"wordnet is for augment_text eda, got {self.augment_text!r}")

    @property
    def augments(self) -> bool:
        """Whether any pair joins."""
        return self.augment_text != "none" or self.augment_image != "none"


@dataclass(frozen=True)
class MorePairs:
    """The pairs of a split and those that join them, in blocks of as many rows as it has images.

    Attributes
    ----------
    split
        Photos are not changed in it: see `pixels`.
    originals
        Rows of a block.
    images_from
        The first row whose image is augmented; as many as there are rows where none is.
    """

    split: CaptionedImages
    originals: int
    images_from: int

    @property
    def blocks(self) -> int:
        """How many pairs are made of one."""
        return len(self.split) // self.originals

    def pixels(self, batch: CaptionedImages) -> Tensor:
        """float32 (B, 3, H, W) from 0 to 1 of a batch of the split, augmented where its rows are.

        Parameters
        ----------
        batch
            That knows its rows.
        """
        assert batch.rows is not None
        rows = batch.rows.cpu()
        moved = (rows >= self.images_from).nonzero()[:, 0]
        if not len(moved):
            return batch.pixels()
        raw = (batch.image.pixels() if isinstance(batch.image, Photos) else batch.image).clone()
        numbers = batch.labels.cpu()[moved] * self.blocks + rows[moved] // self.originals
        more = RandAugment(OPERATIONS, LEVEL)(raw[moved.to(raw.device)].cpu(), index=numbers.tolist())
        raw[moved.to(raw.device)] = more.to(raw.device)
        return raw.float() / 255


def more_pairs(train: CaptionedImages, config: AugmentConfig, captions: int) -> MorePairs:
    """The training pairs and what a config adds to them.

    Parameters
    ----------
    train
        N images.
    config
        What is added.
    captions
        Of an original image, the first so many; 0: all.

    Returns
    -------
    MorePairs
        Its split has (1 + augment_count) N rows, or (1 + 2 augment_count) N where both sides are augmented apart.

    Raises
    ------
    InputError
        Where a file or an image's captions do not give as many texts as are needed.
    """
    count, originals = config.augment_count, len(train)
    own = [row[: captions or None] for row in train.text]
    texts: list[tuple[str, ...]] = list(own)
    if config.augment_text != "none":
        more = _texts(train, config, captions)
        texts += [(row[variant],) for variant in range(count) for row in more]
    images_from = originals if config.augment_both else len(texts)
    if config.augment_image != "none" and not config.augment_both:
        texts += own * count
    rows = torch.arange(originals).repeat(len(texts) // originals)
    split = CaptionedImages(train.image[rows], tuple(texts), train.labels.cpu()[rows])
    return MorePairs(split, originals, images_from if config.augment_image != "none" else len(texts))


def _texts(train: CaptionedImages, config: AugmentConfig, captions: int) -> list[Sequence[str]]:
    """`augment_count` texts for each image."""
    count = config.augment_count
    if config.augment_text == "eda":
        synonyms = WordNet(config.wordnet) if config.wordnet else None
        return list(EDA(ALPHA, count, synonyms=synonyms)([row[0] for row in train.text], index=train.labels.tolist()))
    if config.augment_text == "human":
        if captions != 1:
            raise InputError(
                f"augment_text human takes the captions after the first: expected captions 1, got {captions}"
            )
        few = [row for row, own in enumerate(train.text) if len(own) < 1 + count]
        if few:
            raise InputError(
                f"augment_text human needs {1 + count} captions of every image (augment_count is {count}): "
                f"{len(few)} of {len(train)} have fewer, {_names(train)[few[0]]} has {len(train.text[few[0]])}"
            )
        return [row[1 : 1 + count] for row in train.text]
    return _from_file(Path(config.augment_text), train, count)


def _from_file(file: Path, train: CaptionedImages, count: int) -> list[Sequence[str]]:
    try:
        stored = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{file}: cannot be read as JSON ({error})") from error
    if not isinstance(stored, dict) or not all(
        isinstance(texts, list) and all(isinstance(text, str) and text.strip() for text in texts)
        for texts in stored.values()
    ):
        raise InputError(f"{file}: expected an object of image names, each with a list of texts that have words")
    names = _names(train)
    photos = {photo.name for photo in train.image.files} if isinstance(train.image, Photos) else None
    # those of the other splits are known too
    if unknown := [name for name in stored if (not name.isdecimal() if photos is None else name not in photos)]:
        raise InputError(
            f"{file}: names {len(unknown)} of {len(stored)} images that are not in the data set, {unknown[0]!r} first; "
            f"expected names like {names[0]!r}"
        )
    if few := [name for name in names if len(stored.get(name, ())) < count]:
        raise InputError(
            f"{file}: expected {count} texts for each training image (augment_count): {len(few)} of {len(names)} have "
            f"fewer, {few[0]} has {len(stored.get(few[0], ()))}"
        )
    return [stored[name][:count] for name in names]


def _names(train: CaptionedImages) -> list[str]:
    """What images are called in a file: by their photo, or by their id where they have none."""
    if isinstance(train.image, Photos):
        return [str(train.image.name(row)) for row in range(len(train))]
    return [str(label) for label in train.labels.tolist()]
