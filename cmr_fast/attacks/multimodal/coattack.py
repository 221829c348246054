"""Co-Attack (Zhang et al. 2022) on dual encoders: captions first, then images away from both.

    T' = BERT-Attack(T) on KL
    I' = argmax KL(e(I) || e(I')) + weight KL(e(T') || e(I'))     over softmaxed embeddings, PGD in the ball

An image with several captions is attacked once, against the mean over them; their code attacks it once a caption and
keeps the last (captions="last"). Their code also attacks the captions a second time, from the clean ones, with the same
result; here once.
"""

from typing import Literal, Unpack, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from cmr_fast.attacks.multimodal.base import DualEncoder, ImageTower, MultimodalAttack, TextOptions, summed
from cmr_fast.attacks.pgd import PGD
from cmr_fast.attacks.settings import quarter, real, whole
from cmr_fast.attacks.text.bert import BertAttack, Compat
from cmr_fast.attacks.text.candidates import WordModel
from cmr_fast.errors import InputError
from cmr_fast.ops.pgd import Norm, pgd_noise

Mode = Literal["clean", "text", "image", "separate", "joint"]
MODES = ("clean", "text", "image", "separate", "joint")


class CoAttack(MultimodalAttack):
    """Images and captions attacked together: `images, texts = CoAttack(victim, mlm)(images, texts)`.

    Parameters
    ----------
    victim
        A dual encoder: `encode_image(pixels)`, `tokenize(texts)`, `encode_text(ids, mask)`.
    mlm
        A masked language model, as of BertAttack.
    mode
        "clean", "text", "image", "separate" (both, each for itself) or "joint" (images against adversarial captions):
        adv = 0 to 4 of their code.
    eps, steps
        Radius of the ball, of pixels from 0 to 1, and steps of 1.25 eps / steps.
    weight
        Of the adversarial captions in "joint": alpha of their code.
    norm
        "linf" or "l2".
    captions
        Of an image with several: "all", the mean over them, or "last".
    compat
        "coattack": captions as of BertAttack's compat, and random starts in [0, eps], as in their code.
    seed
        Of the random starts.
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
    Zhang et al. 2022, "Towards adversarial attack on vision-language pre-training models"; "image" and the
    first term are as in TRADES. What is reported as its success rate is clean recall less recall under attack.
    """

    def __init__(
        self,
        victim: DualEncoder,
        mlm: WordModel,
        *,
        mode: Mode = "joint",
        eps: float = 2 / 255,
        steps: int = 10,
        weight: float = 3.0,
        norm: Norm = "linf",
        captions: Literal["all", "last"] = "all",
        compat: Compat = None,
        seed: int = 0,
        dtype: torch.dtype | None = None,
        batch: int = 64,
        **options: Unpack[TextOptions],
    ) -> None:
        super().__init__(victim, seed, batch)
        for name, value, allowed in (("mode", mode, MODES), ("captions", captions, ("all", "last"))):
            if value not in allowed:
                raise InputError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")
        self.mode, self.captions, self.compat = mode, captions, compat
        self.weight, self.steps = real("weight", weight, 0.0, 1e30), whole("steps", steps, 1)
        self.text = BertAttack(victim, mlm, compat=compat, dtype=dtype, **options)
        alpha = 1.25 * eps / self.steps if eps else quarter(eps)
        self.image = PGD(
            ImageTower(victim), eps=eps, alpha=alpha, steps=self.steps, norm=norm, loss=self._away, seed=seed,
            dtype=dtype, strict=True, check=False,
        )  # fmt: skip

    def _attack(
        self, images: Tensor, texts: list[str], owner: Tensor, start: Tensor | None, index: Tensor
    ) -> tuple[Tensor, list[str]]:
        changed = self.text(texts) if self.mode in ("text", "separate", "joint") else texts
        if self.mode in ("clean", "text"):
            return images.clone(), changed
        clean = self._seen(images)
        guides = torch.zeros_like(clean)
        if self.mode == "joint":
            with self.text.texts.prepare():
                targets = F.normalize(self.text.texts(changed), dim=-1).softmax(dim=-1)
            guides = self.weight * self._of_images(targets, owner, len(images)).to(clean)
        if start is None and self.compat is not None:
            noise = pgd_noise(index.to(images.device), images[0].numel(), seed=self.seed)
            eps = float(self.image.eps)  # type: ignore[arg-type]
            start = (images + (noise.to(images).reshape(images.shape) + 1) / 2 * eps).clamp(0, 1)
        rows = torch.stack([clean.softmax(dim=-1), guides], dim=1)
        return cast(Tensor, self.image(images, rows, start=start, index=index)), changed

    def _of_images(self, targets: Tensor, owner: Tensor, count: int) -> Tensor:
        """(N, d): the mean over the captions of each image, or its last."""
        if self.captions == "all":
            return summed(targets, owner, count) / torch.bincount(owner, minlength=count)[:, None].to(targets.device)
        last = torch.zeros(count, dtype=torch.int64).scatter_reduce_(0, owner, torch.arange(len(owner)), "amax")
        return targets[last.to(targets.device)]

    @staticmethod
    def _away(outputs: Tensor, rows: Tensor) -> Tensor:
        """Both KLs but for what does not depend on the image: cross entropies with rows (B, 2, d)."""
        clean, text = rows.to(outputs.dtype).unbind(dim=1)
        from_clean = -(clean * outputs.log_softmax(dim=-1)).sum(dim=-1)
        return from_clean - (text * F.normalize(outputs, dim=-1).log_softmax(dim=-1)).sum(dim=-1)
