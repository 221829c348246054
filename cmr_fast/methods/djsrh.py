"""DJSRH: Deep Joint-Semantics Reconstructing Hashing (Su, Zhong and Zhang; ICCV 2019), unsupervised, on features.

Of a batch of m pairs, S_I and S_T are the cosine similarities of its image and of its text features. They join in

    S~ = beta S_I + (1 - beta) S_T,    S = (1 - eta) S~ + eta S~ S~^T / m,

the second term being how alike two items' neighbourhoods are. Codes B = tanh(alpha H) of both networks' outputs H are
to reconstruct it, cos being the cosine similarities of rows:

    |mu S - cos(B_I, B_T)|^2 + lambda1 |mu S - cos(B_I, B_I)|^2 + lambda2 |mu S - cos(B_T, B_T)|^2

alpha rises from epoch to epoch, so that tanh comes near to sign. Each |.|^2 is a mean over the m^2 pairs, as in the
authors' code, which sets what a rate means. There S_I are similarities of a fixed AlexNet's fc7 and the image network
is a second AlexNet; here both begin at features. Where this file says "code", it is the authors' PyTorch code.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cmr_fast.data.pairs import Pairs
from cmr_fast.errors import InputError
from cmr_fast.methods._settings import check_choices, check_finite, check_kinds, check_least
from cmr_fast.methods.dcmh import full
from cmr_fast.methods.method import Retriever
from cmr_fast.methods.scaling import SCALINGS, InputScaling, Scaling
from cmr_fast.modalities import MODALITIES, Modality

AFFINITIES = ("stretched", "cosine", "inputs")


@dataclass(frozen=True)
class DJSRHConfig:
    """DJSRH's settings: those of the authors' code for MIR-Flickr25K."""

    bits: int = 32
    """Length of the code (the paper's tables: 16, 32, 64, 128)."""
    epochs: int = 80
    """Passes over the training split (code: 80; 200 for Wikipedia)."""
    batch_size: int = 32
    """Pairs a batch, m (code)."""
    beta: float = 0.9
    """Share of the image similarities in S~ (code: 0.9; 0.6 for NUS-WIDE, 0.3 for Wikipedia)."""
    eta: float = 0.4
    """Share of S~ S~^T / m in S (code)."""
    mu: float = 1.5
    """What S is multiplied by before codes reconstruct it (code)."""
    lambda1: float = 0.1
    """Weight of the image codes' own similarities (code: 0.1; 0.3 for Wikipedia)."""
    lambda2: float = 0.1
    """Weight of the text codes' own similarities (code: 0.1; 0.3 for Wikipedia)."""
    affinity: Literal["stretched", "cosine", "inputs"] = "stretched"
    """What S_I and S_T are: 2 cos - 1 of the features (code: fills -1 to 1 where no feature is negative), cos of the
    features, or cos of the networks' inputs (which standard scaling has centred)."""
    image_hidden: int = 4096
    """Hidden units between image features and bits (code: AlexNet's fc7)."""
    text_hidden: int = 4096
    """Hidden units between text features and bits (code)."""
    image_input: Scaling = "standard"
    """Scaling of the image network's inputs: raw, standard, hellinger or chi2 (not in the paper: pixels)."""
    text_input: Scaling = "raw"
    """Scaling of the text network's inputs (code: raw)."""
    lr_image: float = 0.001
    """SGD's rate of the image network (code: 0.001; 0.01 for Wikipedia)."""
    lr_text: float = 0.01
    """SGD's rate of the text network (code)."""
    momentum: float = 0.9
    """SGD's momentum (code)."""
    weight_decay: float = 5e-4
    """SGD's weight decay (code)."""

    def __post_init__(self) -> None:
        check_kinds(self)
        check_least(self, bits=1, epochs=1, image_hidden=1, text_hidden=1, batch_size=2)
        for name in ("beta", "eta"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"{name} must lie between 0 and 1, got {getattr(self, name)}")
        check_finite(self, "mu", "lambda1", "lambda2", "lr_image", "lr_text", "momentum", "weight_decay")
        check_choices(self, affinity=AFFINITIES, image_input=SCALINGS, text_input=SCALINGS)


# Both by validation mAP at 32 bits, four settings each tried by hand: Wikipedia's on a held-out fifth of the training
# split (the authors' values for Wikipedia, fewer epochs), Flickr8k-24's on its own validation split.
_WIKIPEDIA = DJSRHConfig(
    beta=0.3, lambda1=0.3, lambda2=0.3, lr_image=0.01, text_input="standard", epochs=40,
)  # fmt: skip
_FLICKR8K = DJSRHConfig(
    beta=0.6, lambda1=0.3, lambda2=0.3, lr_image=0.03, lr_text=0.1, batch_size=128, image_hidden=1024,
    text_hidden=1024, epochs=12,
)  # fmt: skip


def joint_affinity(image: Tensor, text: Tensor, beta: float, eta: float) -> Tensor:
    """S of similarities S_I and S_T, (m, m) each: (1 - eta) S~ + eta S~ S~^T / m, S~ = beta S_I + (1 - beta) S_T."""
    joint = beta * image + (1 - beta) * text
    return (1 - eta) * joint + eta * (joint @ joint.T) / len(joint)


def reconstruction_losses(image: Tensor, text: Tensor, target: Tensor) -> dict[str, Tensor]:
    """The mean squared errors of relaxed codes' (m, bits) cosine similarities to `target` (m, m): cross, image, text.

    `target` is mu S.
    """
    image, text = F.normalize(image), F.normalize(text)
    return {
        "cross": F.mse_loss(image @ text.T, target),
        "image": F.mse_loss(image @ image.T, target),
        "text": F.mse_loss(text @ text.T, target),
    }


class DJSRH(Retriever):
    """An image network and a text network, of one hidden layer each, into `bits` outputs."""

    name: ClassVar[str] = "djsrh"
    binary: ClassVar[bool] = True
    Config: ClassVar[type[Any]] = DJSRHConfig
    presets: ClassVar[dict[str, Any]] = {"wikipedia": _WIKIPEDIA, "flickr8k": _FLICKR8K}
    preset_data: ClassVar[dict[str, str]] = {name: name for name in presets}

    def __init__(self, config: DJSRHConfig, image_dim: int, text_dim: int, num_classes: int) -> None:
        super().__init__(config, image_dim, text_dim, num_classes)
        self.config: DJSRHConfig = config
        self.scalings = nn.ModuleDict(
            {"image": InputScaling(config.image_input, image_dim), "text": InputScaling(config.text_input, text_dim)}
        )
        self.networks = nn.ModuleDict(
            {
                name: nn.Sequential(nn.Linear(scaling.out_dim, hidden), nn.ReLU(), nn.Linear(hidden, config.bits))
                for (name, scaling), hidden in zip(
                    self._scalings(), (config.image_hidden, config.text_hidden), strict=True
                )
            }
        )
        self.alpha = 1.0

    def _scalings(self) -> list[tuple[Modality, InputScaling]]:
        return [(modality, cast(InputScaling, self.scalings[modality])) for modality in MODALITIES]

    def fit_inputs(self, train: Pairs) -> None:
        """Fit the scalings on the training split; labels are not looked at."""
        for modality, scaling in self._scalings():
            scaling.fit(getattr(train, modality))

    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        """SGD, one for each network."""
        c = self.config
        return {
            modality: torch.optim.SGD(
                self.networks[modality].parameters(), lr=lr, momentum=c.momentum, weight_decay=c.weight_decay
            )
            for modality, lr in zip(MODALITIES, (c.lr_image, c.lr_text), strict=True)
        }

    def encode(self, modality: Modality, features: Tensor) -> Tensor:
        """(N, D) features -> outputs H (N, bits); the code's bit is H >= 0."""
        return cast(Tensor, self.networks[modality](self.scalings[modality](features)))

    def begin_round(self, split: Pairs, progress: float) -> None:
        """alpha of epoch t, counted from 1: the square root of t."""
        self.alpha = math.sqrt(1 + round(progress * self.config.epochs))

    def step(
        self,
        batch: Pairs,
        optimizers: dict[str, torch.optim.Optimizer],
        backward: Callable[[Tensor], None],
        progress: float,
    ) -> dict[str, Tensor]:
        """Both networks by the whole loss of the batch; labels are not looked at."""
        c = self.config
        target = c.mu * joint_affinity(self._similarity(batch, "image"), self._similarity(batch, "text"), c.beta, c.eta)
        said = (self.ranks.over(partial(self.encode, m), getattr(batch, m)) for m in MODALITIES)
        codes = [torch.tanh(self.alpha * full(outputs)) for outputs in said]
        losses = reconstruction_losses(codes[0], codes[1], target)
        loss = losses["cross"] + c.lambda1 * losses["image"] + c.lambda2 * losses["text"]
        for optimizer in optimizers.values():
            optimizer.zero_grad()
        backward(loss)
        for optimizer in optimizers.values():
            optimizer.step()
        return {"loss": loss.detach()} | {name: value.detach() for name, value in losses.items()}

    @torch.no_grad()
    def _similarity(self, batch: Pairs, modality: Modality) -> Tensor:
        features = getattr(batch, modality)
        if self.config.affinity == "inputs":
            features = self.scalings[modality](features)
        features = F.normalize(full(features))
        cosine = features @ features.T
        return 2 * cosine - 1 if self.config.affinity == "stretched" else cosine
