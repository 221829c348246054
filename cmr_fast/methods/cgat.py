"""CgAT: Center-Guided Adversarial Training (Wang, Lin, Li; WWW 2023), here of both modalities of a hashing method.

In every step the batch is attacked on the fly, and what the network says of the attacked inputs is drawn back. With b_i
the centre code of item i (near the codes of the training set that share a label with it, far from the others), K bits
and h~ relaxed codes,

    x'_i = argmin of b_i . h~(x'_i) over |x'_i - x_i| <= eps,   L = L_hash(x) - lambda / (n K) sum_i b_i . h~(x'_i)

The authors train image hashing. Here images and texts share the codes that centres are made of, so each modality is
held where the other's items are.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from cmr_fast.attacks.by_codes import CodeAttack, centres
from cmr_fast.data.pairs import Pairs
from cmr_fast.errors import InputError
from cmr_fast.modalities import Modality

IMAGE_SHARE, TEXT_SHARE = 10 / 255, 0.01
"""The budgets of CMLA's authors, as shares of the inputs' range."""


@dataclass(frozen=True)
class CgATConfig:
    """What methods with this defence have among their settings."""

    defence: Literal["none", "cgat"] = "none"
    """cgat: adversarial training on the fly, in every step. `cmr-fast train` trains without it first, and fine-tunes
    that model with it in a run of its own."""
    cgat_weight: float = 1.0
    """lambda, the weight of the attacked inputs' term (code: 1)."""
    cgat_eps: float = 8 / 255
    """Budget of images in training, a share of their range (code: 8/255); texts have CMLA's proportion of it, 0.01 to
    10/255."""
    cgat_steps: int = 7
    """Signed steps of eps / 4 from a random start (code: 7 of 2/255)."""

    def check_defence(self) -> None:
        """InputError for values out of range."""
        if self.defence not in ("none", "cgat"):
            raise InputError(f"defence must be one of none, cgat, got {self.defence!r}")
        if not (math.isfinite(self.cgat_weight) and self.cgat_weight >= 0):
            raise InputError(f"cgat_weight must be finite and at least 0, got {self.cgat_weight}")
        if not 0 < self.cgat_eps <= 1:
            raise InputError(f"cgat_eps must be above 0 and at most 1, a share of the range, got {self.cgat_eps}")
        if self.cgat_steps < 1:
            raise InputError(f"cgat_steps must be at least 1, got {self.cgat_steps}")


class CenterGuided:
    """The attack and the term of one model on one training split.

    Parameters
    ----------
    model : Retriever
        Whose config is a `CgATConfig`.
    split : Pairs
        The training split: its labels, and its least and largest values as bounds (of pixels 0 and 255).
    """

    def __init__(self, model: Any, split: Pairs) -> None:
        self._victim, self._labels, config = Victim(model), split.labels, model.config
        self._attacks: dict[Modality, CodeAttack] = {}
        shares: dict[Modality, float] = {"image": 1.0, "text": TEXT_SHARE / IMAGE_SHARE}
        for modality, share in shares.items():
            low, high = bounds_in([getattr(split, modality)], modality)
            eps = config.cgat_eps * share * (high - low)
            self._attacks[modality] = CodeAttack(
                self._victim, modality, eps=eps, bounds=(low, high), steps=config.cgat_steps, lr=eps / 4, away=True,
                random_start=True, batch=config.batch_size, check=False,
            )  # fmt: skip

    def loss(self, modality: Modality, batch: Pairs, codes: Tensor) -> Tensor:
        """The term of a batch, from -1 to 1, unweighted: minus the agreement of attacked items with their centres.

        codes: (N, bits) of +-1, of the whole training split.
        """
        x = getattr(batch, modality)
        aims = centres(codes, self._labels, batch.labels)
        moved = self._attacks[modality](x, aims)
        outputs = self._victim.encode(modality, moved)
        return -(aims * outputs.to(aims.dtype).tanh()).mean()


class Victim(nn.Module):
    """A model whose weights may be of another dtype than the attack's floats."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def encode(self, modality: Modality, x: Tensor) -> Tensor:
        """The model's outputs of x in the dtype of its weights."""
        values: Tensor = self.model.encode(modality, x.to(next(self.model.parameters()).dtype))
        return values


def bounds_in(values: list[Tensor], modality: Modality) -> tuple[float, float]:
    """The range that perturbed inputs stay in: 0 to 255 of pixels, else the least and the largest value.

    InputError where these are the same.
    """
    if values[0].dtype == torch.uint8:
        return 0.0, 255.0
    low, high = min(float(x.min()) for x in values), max(float(x.max()) for x in values)
    if low == high:
        raise InputError(f"every {modality} feature is {low:g}; expected a range, which the budget is a share of")
    return low, high
