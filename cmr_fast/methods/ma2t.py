"""MA2T's data: pairs of which one side is augmented join those of the data set (Algorithm 1, lines 1 to 5).

    D <- D + {(I, T_aug)}     texts: EDA of the caption, the image's other captions, or those of a file
    D <- D + {(I_aug, T)}     images: RandAugment in ALBEF's form, 2 operations at level 5, or those of files

four for each original (section 4.2). What is augmented depends on the image's id alone: it is the same in every pass.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from cmr_fast.data.augment import EDA, RandAugment, WordNet, random_crops
from cmr_fast.data.captions import CaptionedImages
from cmr_fast.data.photos import Photos
from cmr_fast.errors import InputError
from cmr_fast.methods._settings import check_choices, check_least
from cmr_fast.methods.candidates import (
    SELECTIONS,
    image_scores,
    images_in,
    names_of,
    photos_like,
    reference_model,
    taken,
    text_scores,
    texts_in,
)
from cmr_fast.models.dual import DualEncoder

ALPHA, OPERATIONS, LEVEL = 0.3, 2, 5  # appendix A.1
LEVELS = ((0.8, 0, 0), (0.8, 2, 3), (0.7, 2, 5), (0.6, 2, 7), (0.5, 2, 9))
"""Figure 7's strengths (appendix A.3): the least share of an image that a crop keeps, operations, their level."""
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
    """MA2T's images for each caption: `randaug` (2 operations of level 5), a JSON file {image: [image files]} of what
    some model made, or a folder with 123_0.png, 123_1.png, ... of 123.jpg; or `none`. Beside texts, its pairs join
    theirs: each has one side as it was."""
    augment_count: int = 4
    """Augmented pairs for each original, of texts and of images."""
    augment_select: Literal["first", "top", "random"] = "first"
    """Which, where `human` or files have more: the first, those best aligned with the other side in a reference model
    (the paper's Top), or some drawn once."""
    augment_reference: str = ""
    """The reference model of `top`: a run on captions, or a pretrained model such as
    open_clip/ViT-B-16-quickgelu@openai."""
    augment_level: int = 0
    """Of `randaug`, 1 to 5: crops and operations as strong as in the paper's Figure 7. 0: 2 operations of level 5."""
    augment_both: bool = False
    """Pair augmented texts with augmented images instead. The paper warns that this degrades the model."""
    wordnet: str = ""
    """WordNet's dict folder, where EDA's synonyms come from. None: EDA swaps and deletes words alone."""

    def check_augment(self) -> None:
        """InputError for values out of range, and for settings that do not go together."""
        check_least(self, augment_count=1, augment_level=0)
        check_choices(self, augment_select=SELECTIONS)
        texts, images = self.augment_text != "none", self.augment_image != "none"
        if self.augment_text not in ("none", "eda", "human") and not self.augment_text.endswith(".json"):
            raise InputError(f"augment_text must be none, eda, human or a .json file, got {self.augment_text!r}")
        if self.augment_level > len(LEVELS) or (self.augment_level and self.augment_image != "randaug"):
            raise InputError(
                f"augment_level must be 0 to {len(LEVELS)}, and is for augment_image randaug; got {self.augment_level} "
                f"and {self.augment_image}"
            )
        if self.augment_both and not (texts and images):
            raise InputError(
                "augment_both pairs augmented texts with augmented images: expected both augment_text and augment_image"
            )
        if self.wordnet and self.augment_text != "eda":
            raise InputError(f"wordnet is for augment_text eda, got {self.augment_text!r}")
        if self.augment_select != "first" and self.augment_text in ("none", "eda") and not self.images_lie_there:
            raise InputError(
                f"augment_select {self.augment_select} is of candidates that are there: expected augment_text human or "
                f"a file, or augment_image from files, got {self.augment_text} and {self.augment_image}"
            )
        if (self.augment_select == "top") != bool(self.augment_reference):
            raise InputError(
                "augment_select top is by a reference model: expected augment_reference RUN with it, and with it "
                f"alone; got {self.augment_select} and {self.augment_reference!r}"
            )

    @property
    def images_lie_there(self) -> bool:
        """Whether augmented images come from files."""
        return self.augment_image not in ("none", "randaug")

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
    files
        The augmented images, one for each row from there on; None: RandAugment makes them.
    level
        Of RandAugment, see AugmentConfig.
    """

    split: CaptionedImages
    originals: int
    images_from: int
    files: Photos | None = None
    level: int = 0

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
        if self.files is None:
            numbers = batch.labels.cpu()[moved] * self.blocks + rows[moved] // self.originals
            more = _randaug(raw[moved.to(raw.device)].cpu(), numbers.tolist(), self.level)
        else:
            more = self.files[rows[moved] - self.images_from].pixels()
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
        Where a file or an image's captions do not give as many texts or images as are needed, and where the reference
        model is not there.
    """
    reference = reference_model(config.augment_reference) if config.augment_select == "top" else None
    count, originals = config.augment_count, len(train)
    own = [row[: captions or None] for row in train.text]
    texts: list[tuple[str, ...]] = list(own)
    if config.augment_text != "none":
        more = _texts(train, config, captions, reference)
        texts += [(row[variant],) for variant in range(count) for row in more]
    images_from = originals if config.augment_both else len(texts)
    files = _images(train, config, reference) if config.images_lie_there else None
    if config.augment_image != "none" and not config.augment_both:
        texts += own * count
    rows = torch.arange(originals).repeat(len(texts) // originals)
    split = CaptionedImages(train.image[rows], tuple(texts), train.labels.cpu()[rows])
    images_from = images_from if config.augment_image != "none" else len(texts)
    return MorePairs(split, originals, images_from, files, config.augment_level)


def _randaug(images: Tensor, numbers: list[int], level: int) -> Tensor:
    if not level:
        return RandAugment(OPERATIONS, LEVEL)(images, index=numbers)
    least, operations, strength = LEVELS[level - 1]
    return RandAugment(operations, strength)(random_crops(images, least, index=numbers), index=numbers)


def _texts(
    train: CaptionedImages, config: AugmentConfig, captions: int, reference: DualEncoder | None
) -> list[list[str]]:
    """`augment_count` texts for each image."""
    count = config.augment_count
    if config.augment_text == "eda":
        synonyms = WordNet(config.wordnet) if config.wordnet else None
        return EDA(ALPHA, count, synonyms=synonyms)([row[0] for row in train.text], index=train.labels.tolist())
    if config.augment_text == "human":
        if captions != 1:
            raise InputError(
                f"augment_text human takes the captions after the first: expected captions 1, got {captions}"
            )
        few = [row for row, own in enumerate(train.text) if len(own) < 1 + count]
        if few:
            raise InputError(
                f"augment_text human needs {1 + count} captions of every image (augment_count is {count}): "
                f"{len(few)} of {len(train)} have fewer, {names_of(train)[few[0]]} has {len(train.text[few[0]])}"
            )
        candidates = [list(row[1:]) for row in train.text]
    else:
        candidates = texts_in(Path(config.augment_text), train, count)
    scores = None if reference is None else text_scores(reference, train, candidates)
    return taken(candidates, count, config.augment_select, train.labels.tolist(), scores)


def _images(train: CaptionedImages, config: AugmentConfig, reference: DualEncoder | None) -> Photos:
    """`augment_count` images for each caption, block by block."""
    count = config.augment_count
    candidates = images_in(Path(config.augment_image), train, count)
    scores = None if reference is None else image_scores(reference, train, candidates)
    chosen = taken(candidates, count, config.augment_select, train.labels.tolist(), scores)
    return photos_like([row[variant] for variant in range(count) for row in chosen], train)
