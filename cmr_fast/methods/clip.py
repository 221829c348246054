"""Contrastive training of a dual encoder on captions (CLIP: Radford et al. 2021), heads first, then the towers too.

    minimise InfoNCE(f(x), g(t)), both directions halved        every caption of an image is a positive of it

In the first `head_epochs` the pretrained towers stay as they are, so what they see in each image and caption is
computed once, kept in the user's cache, and only the heads are trained on it: seconds an epoch; of a stream, which is
not held, it is computed batch by batch. In the epochs after these the towers are trained too, at rates of their own.
Batch normalisation keeps its stored statistics throughout.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from math import cos, pi
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cmr_fast.data.captions import CaptionedImages
from cmr_fast.data.deep import tower_features
from cmr_fast.data.streamed import StreamedImages
from cmr_fast.errors import InputError
from cmr_fast.methods._gradcache import contrast, descend
from cmr_fast.methods._settings import check_finite, check_kinds, check_least
from cmr_fast.methods.method import CaptionRetriever
from cmr_fast.modalities import Modality
from cmr_fast.models.clip import TwoTowers, dual_encoder
from cmr_fast.models.dual import trimmed

_TEXTS = 64  # that go through a tower at a time


@dataclass(frozen=True)
class ClipConfig:
    """Defaults: what fits into 20 minutes of two cores on Flickr8k; the heads' were chosen on its validation split."""

    towers: str = "efficientnet-lite0+minilm"
    """The pretrained towers: IMAGE+TEXT, open_clip/NAME@WEIGHTS or a robust checkpoint, see cmr_fast.models.clip."""
    dim: int = 512
    """Of the common space (of IMAGE+TEXT; a model of open_clip has its own)."""
    hidden: int = 512
    """Of the heads' hidden layer."""
    dropout: float = 0.3
    """Of the heads' hidden layer."""
    epochs: int = 10
    """Passes over the training images, those of the heads alone included."""
    head_epochs: int = 8
    """So many epochs, the first, train the heads alone; epochs of no more than that leave the towers frozen."""
    batch_size: int = 128
    """Images a batch."""
    chunk: int = 0
    """Images, and texts, that go through the towers at once while these are trained, for less memory; the loss is that
    of the whole batch all the same, at the cost of up to one forward pass more. 0: all of the images, 64 texts."""
    captions: int = 1
    """Captions of an image in a batch, drawn anew each time; 0: all of them."""
    head_lr: float = 5e-4
    """Peak learning rate of the heads alone, AdamW."""
    image_lr: float = 3e-4
    """Peak learning rate of the image tower."""
    text_lr: float = 1e-4
    """Peak learning rate of the text tower."""
    joint_head_lr: float = 3e-4
    """Peak learning rate of the heads while the towers are trained."""
    weight_decay: float = 0.05
    """Of AdamW; not of biases, normalisations and the temperature."""
    frozen_blocks: int = 3
    """Of the image tower's blocks the first so many, and what lies before them, keep their weights: their filters are
    general, and training them would take a third of the time. 0 trains all."""
    augment: bool = True
    """Random crops of the images (a side of 0.75 to 1 of them) and flips, while the towers are trained."""

    def __post_init__(self) -> None:
        check_kinds(self)
        check_least(self, dim=1, hidden=1, epochs=1, head_epochs=0, batch_size=2, chunk=0, captions=0, frozen_blocks=0)
        check_finite(self, "head_lr", "image_lr", "text_lr", "joint_head_lr", "weight_decay")
        if not 0 <= self.dropout < 1:
            raise InputError(f"dropout must be at least 0 and below 1, got {self.dropout}")


class _Seen(NamedTuple):
    """What frozen towers see: (N, width) of images, (M, width) of captions image by image, (N,) where these begin."""

    image: Tensor
    text: Tensor
    begin: Tensor


class Clip(CaptionRetriever):
    """A dual encoder, `dual`, and one batch of its training."""

    name: ClassVar[str] = "clip"
    Config: ClassVar[type] = ClipConfig
    presets: ClassVar[dict[str, Any]] = {"frozen": ClipConfig(epochs=8)}
    replicas_only: ClassVar[str] = ""
    contrasts = True

    def __init__(self, config: ClipConfig) -> None:
        super().__init__(config)
        self.config: ClipConfig = config
        c = config
        self.dual = dual_encoder(c.towers, dim=c.dim, hidden=c.hidden, dropout=c.dropout, pretrained=False)
        if c.head_epochs and not isinstance(self.dual, TwoTowers):
            raise InputError(f"{c.towers} has no heads of its own, expected head_epochs 0, got {c.head_epochs}")
        self.dual.requires_grad_(True)
        if isinstance(self.dual, TwoTowers):
            self.dual.freeze_blocks(c.frozen_blocks)
        self._seen: dict[int, _Seen] = {}  # by the split's fingerprint, while the towers are frozen
        self._train: _Seen | None = None

    def fit_inputs(self, train: CaptionedImages) -> None:
        """Take the pretrained weights."""
        self.dual.load()

    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        """AdamW of the heads (of open_clip's models: nothing but the temperature), and of each tower."""
        return {name: torch.optim.AdamW(self._groups(part)) for name, part in self.dual.parts().items()}

    def _groups(self, parameters: list[nn.Parameter]) -> list[dict[str, Any]]:
        matrices, rest = ([p for p in parameters if (p.ndim > 1) == wanted] for wanted in (True, False))
        return [{"params": matrices, "weight_decay": self.config.weight_decay}, {"params": rest, "weight_decay": 0.0}]

    def _rates(self, progress: float) -> dict[str, float]:
        """The learning rates at a step, by optimizer: a cosine each for the heads alone and for everything."""
        c = self.config
        begin = min(c.head_epochs, c.epochs) / c.epochs
        if progress < begin - 1e-9:
            return {"heads": c.head_lr * _cosine(progress / begin)}
        share = _cosine((progress - begin) / (1 - begin))
        return {"heads": c.joint_head_lr * share, "image": c.image_lr * share, "text": c.text_lr * share}

    def begin_round(self, split: CaptionedImages | StreamedImages, progress: float) -> None:
        """Before an epoch of the heads alone: have the towers see everything once, unless it is a stream."""
        if "image" not in self._rates(progress) and not isinstance(split, StreamedImages):
            self._train = self._recall(split)
        else:
            self._train = None
            self._seen.clear()

    def step(
        self,
        batch: CaptionedImages,
        optimizers: dict[str, torch.optim.Optimizer],
        backward: Callable[[Tensor], None],
        progress: float,
    ) -> dict[str, Tensor]:
        """One step of InfoNCE over the batch's images and the captions drawn for them."""
        rates = self._rates(progress)
        for name, rate in rates.items():
            for group in optimizers[name].param_groups:
                group["lr"] = rate
        rows, chosen = self._drawn(batch.text)
        frozen = "image" not in rates
        if self._train is not None:
            sides = self._through_heads(self._train, batch, rows, chosen)
        else:
            texts = [batch.text[row][which] for row, which in zip(rows.tolist(), chosen.tolist(), strict=True)]
            sides, order = self._through_towers(batch, texts, frozen)
            rows = rows[order]
        for name in rates:
            optimizers[name].zero_grad()
        device = self.dual.log_scale.device
        ids = batch.labels.to(device)
        owners = ids[rows.to(device)]
        twice = not frozen and self.config.chunk > 0
        loss = descend(sides, partial(self._contrast, ids, owners), backward, device, twice)
        for name in rates:
            optimizers[name].step()
        self.dual.clamp_scale()
        return {"loss": loss, "scale": self.dual.scale.detach()}

    def _drawn(self, text: Sequence[Sequence[str]]) -> tuple[Tensor, Tensor]:
        """int64 (M,) each: the row of the batch and which of its captions, by torch's random state."""
        count = self.config.captions
        which = [torch.randperm(len(row))[: count or None] for row in text]
        return torch.repeat_interleave(torch.tensor([len(w) for w in which])), torch.cat(which)

    def _contrast(self, ids: Tensor, owners: Tensor, image: Tensor, text: Tensor) -> Tensor:
        """InfoNCE of all images and texts of a batch, by the images that they belong to."""
        image, text = (x.float() if x.dtype.itemsize < 4 else x for x in (image, text))  # autocast mixes types
        return contrast(self.ranks, image, text, self.dual.scale, (ids, owners))

    def _through_heads(
        self, seen: _Seen, batch: CaptionedImages, rows: Tensor, chosen: Tensor
    ) -> list[list[Callable[[], Tensor]]]:
        assert batch.rows is not None
        places = batch.rows.cpu()
        features: dict[Modality, Tensor] = {
            "image": seen.image[places], "text": seen.text[seen.begin[places[rows]] + chosen],
        }  # fmt: skip
        return [[partial(self.ranks.over, partial(self._head, m), x)] for m, x in features.items()]

    def _head(self, modality: Modality, features: Tensor) -> Tensor:
        assert isinstance(self.dual, TwoTowers)
        head = self.dual.image_head if modality == "image" else self.dual.text_head
        where = self.dual.log_scale
        return F.normalize(head(features.to(where.device, where.dtype)), dim=1)

    def _through_towers(
        self, batch: CaptionedImages, texts: Sequence[str], frozen: bool = False
    ) -> tuple[list[list[Callable[[], Tensor]]], Tensor]:
        """Passes over images, and over texts of like length; and which text each row of the latter is of."""
        c, over, device = self.config, self.ranks.over, self.dual.log_scale.device
        crops = drawn_crops(len(batch)) if c.augment and not frozen else None
        images: list[Callable[[], Tensor]] = [
            partial(over, partial(self._images_of, batch, crops, frozen), rows)
            for rows in torch.arange(len(batch)).split(c.chunk or len(batch))
        ]
        ids, mask = self.dual.tokenize(texts)
        order = torch.argsort(mask.sum(dim=1), stable=True)
        parts = [(x.to(device) for x in trimmed(ids[r], mask[r])) for r in order.split(c.chunk or _TEXTS)]
        return [images, [partial(over, partial(self._texts_of, frozen), *part) for part in parts]], order

    def _texts_of(self, frozen: bool, ids: Tensor, mask: Tensor) -> Tensor:
        if frozen:
            return self._head("text", self._as_they_are("text", ids, mask))
        return F.normalize(self.dual.text_embedding(ids, mask), dim=1)

    def _images_of(self, batch: CaptionedImages, crops: Tensor | None, frozen: bool, rows: Tensor) -> Tensor:
        where = self.dual.log_scale
        pixels = batch.select(rows.to(batch.labels.device)).pixels().to(where.device, where.dtype)
        if frozen:
            return self._head("image", self._as_they_are("image", pixels))
        return self.dual.encode_image(pixels if crops is None else augmented(pixels, crops[rows]))

    @torch.no_grad()
    def _as_they_are(self, modality: Modality, *inputs: Tensor) -> Tensor:
        """What a frozen tower sees, in eval mode."""
        assert isinstance(self.dual, TwoTowers)
        tower = self.dual.image_tower if modality == "image" else self.dual.text_tower
        training = tower.training
        tower.eval()
        seen = (self.dual.image_features if modality == "image" else self.dual.text_features)(*inputs)
        tower.train(training)
        return seen

    def embed(self, modality: Modality, split: CaptionedImages) -> Tensor:
        """All images or all captions; through the head alone while the towers are frozen and have seen them."""
        if self._train is not None:
            seen = self._recall(split)
            return self._head(modality, seen.image if modality == "image" else seen.text).cpu()
        return super().embed(modality, split)

    def _recall(self, split: CaptionedImages) -> _Seen:
        """What the towers see in a split, once; in eval mode, so that it is the same each time."""
        key = split.fingerprint()
        if key not in self._seen:
            counts = torch.tensor([len(row) for row in split.text])
            self._seen[key] = _Seen(*tower_features(self.unsharded().dual, split), counts.cumsum(0) - counts)
        return self._seen[key]


def drawn_crops(count: int) -> Tensor:
    """(count, 2, 3): random crops (a side of 0.75 to 1 of the image), half of them flipped, by torch's random state."""
    side = 0.75 + 0.25 * torch.rand(count)
    shift = (1 - side)[:, None] * (2 * torch.rand(count, 2) - 1)
    turned = torch.where(torch.rand(count) < 0.5, -1.0, 1.0)
    zero = torch.zeros(count)
    rows = [torch.stack([side * turned, zero, shift[:, 0]], dim=1), torch.stack([zero, side, shift[:, 1]], dim=1)]
    return torch.stack(rows, dim=1)


def augmented(pixels: Tensor, crops: Tensor | None = None) -> Tensor:
    """Images (B, 3, H, W) by crops (B, 2, 3), drawn here or before, scaled back to their size."""
    crops = drawn_crops(len(pixels)) if crops is None else crops
    grid = F.affine_grid(crops.to(pixels), list(pixels.shape), align_corners=False)
    return F.grid_sample(pixels, grid, padding_mode="reflection", align_corners=False)


def _cosine(share: float) -> float:
    """Up over the first tenth, then down to 0, as a share of the peak."""
    return min(max(share, 0.01) / 0.1, (1 + cos(pi * max(0.0, share - 0.1) / 0.9)) / 2)
