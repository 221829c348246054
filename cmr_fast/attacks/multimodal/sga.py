"""SGA, the set-level guidance attack (Lu et al. 2023): an image against all of its captions, at several scales.

    T'  = argmin <e(T'), e(I)>                            each caption, by BERT-Attack
    I'  = argmin sum_scales sum_t <e(view(I')), e(t')>    over the captions t' of the image, PGD in the ball
    T'' = argmin <e(T''), e(I')>                          from the clean captions again

A view is I' with Gaussian noise, resized to a scale and back (bicubic); I' itself is one more. All views of a batch are
one forward pass, and the sum over captions is taken before it: similarities are linear in them.

DRA takes the gradient at points of a triangle (`trajectory`). SA-AET, besides, takes similarities in the span of all
but the first singular vector of a corpus of captions: <P e(I), P t> = <e(I), P t>, so only captions are projected.
"""

from collections.abc import Sequence
from functools import partial
from typing import Literal, Unpack, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cmr_fast.attacks.multimodal.base import DualEncoder, MultimodalAttack, TextOptions, summed
from cmr_fast.attacks.multimodal.trajectory import TrajectoryPGD
from cmr_fast.attacks.pgd import PGD
from cmr_fast.attacks.problem import STREAM
from cmr_fast.attacks.settings import real, whole
from cmr_fast.attacks.text.bert import BertAttack
from cmr_fast.attacks.text.candidates import WordModel
from cmr_fast.attacks.text.words import check_texts
from cmr_fast.errors import InputError
from cmr_fast.ops.pgd import Norm, pgd_noise

SCALES = (0.5, 0.75, 1.25, 1.5)


class Views(nn.Module):
    """Images -> embeddings of their views, (N, 1 + scales, d); the noise changes with every pass.

    Parameters
    ----------
    victim
        Whose `encode_image` it is.
    index
        int64 (N,), the images' numbers, which their noise depends on.
    scales
        Of the views.
    sigma
        Of the noise.
    seed
        Of the noise.
    clamp
        Keep pixels of views within [0, 1] after they are resized back, too.
    """

    def __init__(
        self, victim: DualEncoder, index: Tensor, scales: Sequence[float], sigma: float, seed: int, clamp: bool
    ) -> None:
        super().__init__()
        self.victim, self.index, self.scales = victim, index, scales
        self.sigma, self.seed, self.clamp, self.passes = sigma, seed, clamp, 0
        self.alone = False  # the images without their views

    def views(self, pixels: Tensor) -> Tensor:
        """(N, 3, H, W) -> (1 + scales, N, 3, H, W), the images first."""
        size = pixels.shape[-2:]
        views = [pixels]
        for number, scale in enumerate(self.scales):
            noise = self.sigma * self._normal(pixels, self.passes * len(self.scales) + number)
            scaled = F.interpolate(
                pixels + noise, [max(1, int(scale * side)) for side in size], mode="bicubic", align_corners=False
            ).clamp(0, 1)
            back = F.interpolate(scaled, size, mode="bicubic", align_corners=False)
            views.append(back.clamp(0, 1) if self.clamp else back)
        self.passes += 1
        return torch.stack(views)

    def _normal(self, pixels: Tensor, stream: int) -> Tensor:
        """Like pixels, by Box and Muller; of an image by its number."""
        each = (pixels[0].numel() + 1) // 2
        seed = (self.seed + (stream + 1) * STREAM) % 2**64
        u = (pgd_noise(self.index.to(pixels.device), 2 * each, seed=seed).to(pixels.dtype) + 1) / 2
        radius, angle = (-2 * u[:, :each].log()).sqrt(), 2 * torch.pi * u[:, each:]
        normal = torch.cat([radius * angle.cos(), radius * angle.sin()], dim=1)
        return normal[:, : pixels[0].numel()].reshape(pixels.shape)

    def forward(self, pixels: Tensor) -> Tensor:
        """(N, 3, H, W) -> (N, 1 + scales, d), or (N, 1, d) where `alone`."""
        views = pixels[None] if self.alone else self.views(pixels)
        vectors = self.victim.encode_image(views.flatten(0, 1))
        return vectors.reshape(*views.shape[:2], -1).transpose(0, 1)


class SGA(MultimodalAttack):
    """Images and sets of captions attacked together: `images, texts = SGA(victim, mlm)(images, texts, image_of)`.

    Parameters
    ----------
    victim
        A dual encoder: `encode_image(pixels)`, `tokenize(texts)`, `encode_text(ids, mask)`.
    mlm
        A masked language model, as of BertAttack.
    eps, alpha, steps
        Radius and step, of pixels from 0 to 1, and how many steps. alpha=None is eps / 4.
    scales, sigma
        Sizes of the views beside the image itself, and the deviation of their noise. No scales: the image alone.
    norm
        "linf" or "l2".
    samples
        0 for SGA. DRA takes 5: points of a triangle between an image, its clean one and the one before, of which the
        most promising gives the gradient (see `trajectory`); captions are then attacked against all three.
    corpus
        With samples, for SA-AET: captions, say all that are searched, whose most common direction images are not
        attacked along. Its code takes 40 % of the test set's.
    shares
        With samples: how much the clean image, the last one and the one before it weigh for the captions.
    compat
        "sga": captions as of BertAttack's compat="coattack", and views whose pixels may leave [0, 1] after they are
        resized back, as in their code.
    seed
        Of the random starts and the views' noise, which also depend on an image's `index` and on nothing else.
    dtype
        torch.bfloat16: towers run under autocast; objectives are float32 all the same.
    batch
        Images at once, with all of their captions; the result does not depend on it but for rounding.
    options
        words, k, threshold, max_length, tokens: as of BertAttack.

    Raises
    ------
    InputError
        For settings out of their range, and models without the functions that are needed.

    Notes
    -----
    Lu et al. 2023, "Set-level guidance attack: boosting adversarial transferability of vision-language pre-training
    models"; with samples Gao et al. 2024, "Boosting transferability in vision-language attacks via diversification
    along the intersection region of adversarial trajectory"; with a corpus Jia et al. 2024, "Semantic-aligned
    adversarial evolution triangle for high-transferability vision-language attack". The success rate is the share
    of what was right before and is wrong after.
    """

    def __init__(
        self,
        victim: DualEncoder,
        mlm: WordModel,
        *,
        eps: float = 2 / 255,
        alpha: float | None = 0.5 / 255,
        steps: int = 10,
        scales: Sequence[float] = SCALES,
        sigma: float = 0.05,
        norm: Norm = "linf",
        samples: int = 0,
        corpus: Sequence[str] | None = None,
        shares: tuple[float, float, float] = (0.6, 0.2, 0.2),
        compat: Literal["sga"] | None = None,
        seed: int = 0,
        dtype: torch.dtype | None = None,
        batch: int = 32,
        **options: Unpack[TextOptions],
    ) -> None:
        super().__init__(victim, seed, batch)
        if compat not in (None, "sga"):
            raise InputError(f"compat must be 'sga' or None, got {compat!r}")
        self.eps, self.alpha, self.steps, self.norm, self.dtype = eps, alpha, whole("steps", steps, 1), norm, dtype
        self.scales = tuple(real("scales", scale, 0.0, 16.0, above=True) for scale in scales)
        self.sigma, self.compat = real("sigma", sigma, 0.0, 1e30), compat
        self.samples = whole("samples", samples, 0)
        if corpus is not None and not self.samples:
            raise InputError("a corpus is for SA-AET, which takes samples: expected samples=5, say, got 0")
        self.corpus = None if corpus is None else check_texts(corpus)
        if len(shares) != 3:
            raise InputError(
                f"shares must be three numbers, of the clean image, the last and the one before, got {shares}"
            )
        self.shares = tuple(real("shares", share, 0.0, 1e30) for share in shares)
        self.text = BertAttack(
            victim, mlm, objective="image", compat="coattack" if compat else None, dtype=dtype, **options
        )
        self._pgd(torch.zeros(0, dtype=torch.int64))  # its settings are checked here

    def _begin(self) -> None:
        """The span of all but the first left singular vector of the corpus, (d, rank - 1)."""
        self.span: Tensor | None = None
        if self.corpus is not None:
            with self.text.holding():
                self.span = torch.linalg.svd(self.text.texts(self.corpus).T, full_matrices=False).U[:, 1:]

    def _pgd(self, index: Tensor) -> PGD:
        views = Views(self.model, index, self.scales, self.sigma, self.seed, self.compat is None)
        ordered = self.corpus is not None
        kind = partial(TrajectoryPGD, samples=self.samples, ordered=ordered) if self.samples else PGD
        return kind(
            views, eps=self.eps, alpha=self.alpha, steps=self.steps, norm=self.norm, loss=_apart, seed=self.seed,
            dtype=self.dtype, strict=True, check=False,
        )  # fmt: skip

    def _attack(
        self, images: Tensor, texts: list[str], owner: Tensor, start: Tensor | None, index: Tensor
    ) -> tuple[Tensor, list[str]]:
        owners = owner.to(images.device)
        clean = self._seen(images)
        with self.text.holding():
            prepared = self.text.prepare(texts)
            first = [result.text for result in self.text.finish(prepared, clean[owners])]
            targets = self.text.embedded(prepared, first)
            targets = targets if self.span is None else targets @ self.span @ self.span.T
        guides = summed(targets, owner, len(images)).to(images.device)
        atk = self._pgd(index)
        moved = cast(Tensor, atk(images, guides, start=start, index=index))
        against = self._seen(moved)
        if isinstance(atk, TrajectoryPGD):
            before = images if atk.before is None else atk.before.to(images.dtype)  # eps = 0: nothing has moved
            weights = zip(self.shares, (clean, against, self._seen(before)), strict=True)
            against = torch.stack([share * seen for share, seen in weights]).sum(dim=0)
        with self.text.holding():
            return moved, [result.text for result in self.text.finish(prepared, against[owners])]


def _apart(outputs: Tensor, guides: Tensor) -> Tensor:
    """Similarities of views (B, V, d) with the sums of their captions (B, d), summed and negative."""
    return -(outputs.sum(dim=1) * guides.to(outputs.dtype)).sum(dim=-1)
