"""MMCoA (Zhou et al. 2024, "Revisiting the adversarial robustness of vision language models", arXiv 2404.19287).

    T' = argmax KL(g(T) || g(T'))                       BERT-Attack, one word
    I' = argmax InfoNCE_I(f(I'), g(T))                  PGD in the L-inf ball
    minimise 1/2 InfoNCE(f(I'), g(T)) + 1/2 InfoNCE(f(I), g(T'))

Each attacked side is held where the clean other one is; MAT pairs the two attacked sides. The paper classifies and has
the images' side of the first term and of the second the texts' over the classes; here both terms have both directions,
as MAT's Eq. 6.
"""

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from cmr_fast.methods.mat import Mat, MatConfig, PairBatch, presets_of


@dataclass(frozen=True)
class MmcoaConfig(MatConfig):
    """Of MAT, but for what PGD raises."""

    away: Literal["infonce", "cosine"] = "infonce"
    """What PGD raises: InfoNCE among the clean texts of the batch, or minus the cosine with its own."""


class Mmcoa(Mat):
    """MMCoA: attacked images beside clean texts, and clean images beside attacked texts; both towers learn."""

    name: ClassVar[str] = "mmcoa"
    Config: ClassVar[type] = MmcoaConfig
    presets: ClassVar[dict[str, Any]] = presets_of(MmcoaConfig)
    raised: ClassVar[str] = "kl"

    def attacked(self, pairs: PairBatch, rows: Tensor | None = None) -> tuple[PairBatch, dict[str, Tensor]]:
        """A batch of twice the size: attacked images with clean texts, then clean images with attacked texts."""
        texts, changed = self.attacked_texts(pairs)
        moved, _ = super(Mat, self).attacked(pairs, rows)
        both = replace(
            pairs,
            pixels=torch.cat([moved.pixels, pairs.pixels]),
            texts=[*pairs.texts, *texts.texts],
            owner=torch.cat([pairs.owner, pairs.owner + len(pairs.pixels)]),
            ids=pairs.ids.repeat(2),
            copies=2,
        )
        return both, {"changed": changed}

    def contrast(self, image: Tensor, text: Tensor, scale: Tensor, of_image: Tensor, of_text: Tensor) -> Tensor:
        """The mean of the two halves' losses."""
        halves = [x.chunk(2) for x in (image, text, of_image, of_text)]
        losses = [super(Mmcoa, self).contrast(i, t, scale, a, b) for i, t, a, b in zip(*halves, strict=True)]
        return (losses[0] + losses[1]) / 2
