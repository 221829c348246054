"""SSAH: Self-Supervised Adversarial Hashing (Li, Deng, Li, Liu, Gao, Tao; CVPR 2018), on features or on raw pixels.

A label network turns labels into features F^l, codes H^l and the labels back; an image and a text network learn to
agree with it. With the whole training set's F^l and H^l in buffers, each network minimises over its batch (Eq. 2 and 6)

    alpha J1 + gamma J2 + eta J3 + beta J4 + delta J_adv
    J1, J2   the pairwise loss of features, and of codes: Theta = 1/2 F^l . F^v, S_ij = 1 where a label is shared
    J3       1/2 |H - B|^2, B = sign of the label network's codes        J4   1/2 |L - L'|^2, the labels that come out
    J_adv    image (text) features that the discriminator takes for a label's

The pairwise loss is the likelihood that the paper prints, or the squared form of the authors' code. In that code the
discriminators read placeholders, so nothing adversarial reaches the image and text networks; here the gradient does.

Besides, the code sums J1 to J4 over pairs and entries and takes the mean of J_adv alone; here each is the mean over its
own pairs or entries, so weights of 1 balance them otherwise. There the networks train in phases of several passes,
image and text are quantised to the signs of their own codes, and local response normalisation lies between the layers
of the label and text networks; here all take a step on every batch, B is the label network's, and there is none.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cmr_fast.data.pairs import Pairs
from cmr_fast.errors import InputError
from cmr_fast.losses.dcmh import packed_labels, signs
from cmr_fast.methods._settings import check_choices, check_finite, check_kinds, check_least
from cmr_fast.methods.cgat import CenterGuided, CgATConfig
from cmr_fast.methods.dcmh import IMAGE_NETWORKS, PAIR_LOSSES, Memory, full, scaling_of, tower_of
from cmr_fast.methods.method import Retriever
from cmr_fast.methods.scaling import SCALINGS, InputScaling, Scaling
from cmr_fast.modalities import MODALITIES, Modality
from cmr_fast.models.hashing import CNNF
from cmr_fast.models.towers import weights_file
from cmr_fast.ops import pairwise_nll, pairwise_squared

LEVELS = (1, 2, 3, 6, 10)
_POOL = 5  # words of a window, times the level
_IMAGES = 128


@dataclass(frozen=True)
class SSAHConfig(CgATConfig):
    """SSAH's settings: the authors' code's where it and the paper give one."""

    bits: int = 32
    """Length of the code (16, 32, 64)."""
    epochs: int = 100
    """Passes over the training split; the code counts 500 rounds of up to 15 passes a network."""
    batch_size: int = 128
    """Pairs a batch (code)."""
    alpha: float = 1.0
    """Weight of the pairwise loss of features (code)."""
    gamma: float = 1.0
    """Weight of the pairwise loss of codes (code)."""
    eta: float = 1.0
    """Weight of the quantisation loss (code: beta there; all weights are 1)."""
    beta: float = 1.0
    """Weight of the label loss (code: eta there)."""
    delta: float = 1.0
    """Weight of the adversarial loss (code); 0 trains no discriminator."""
    pair_loss: Literal["nll", "squared"] = "nll"
    """nll: the paper's likelihood; squared: the code's 1/2 |S Theta - log(1 + e^Theta)|^2 with S in {0, 0.999}."""
    feature_dim: int = 512
    """Width of the semantic features (code)."""
    hidden: int = 4096
    """Hidden units of the label and text networks, and between image features and semantic ones (code)."""
    discriminator_hidden: tuple[int, int] = (512, 256)
    """Hidden units of the discriminators (code)."""
    dropout: float = 0.1
    """Dropout of the discriminators (ours; the code has the layers and feeds them keep_prob 1)."""
    lr: float = 1e-4
    """Adam's rate of the image and text networks (code: 10^-4.5 and 10^-3.5)."""
    label_lr: float = 1e-3
    """Adam's rate of the label network (code: 10^-2, falling fast)."""
    discriminator_lr: float = 1e-4
    """Adam's rate of the discriminators (code: 10^-3, falling fast)."""
    image_input: Scaling = "standard"
    """Scaling of image features: raw, standard, hellinger or chi2; pixels are centred by their mean."""
    text_input: Scaling = "raw"
    """Scaling of text features (code: raw bags of words)."""
    image_network: Literal["cnnf", "efficientnet-lite0"] = "cnnf"
    """Below the features of raw pixels: cnnf from random weights (the paper's is pretrained), or EfficientNet-Lite0 as
    ImageNet trained it, frozen, with the hidden layer of image features on top."""
    multi_scale: bool = True
    """The text network sees the words, and means over windows of 5, 10, 15, 30 and 50 neighbours beside them."""

    def __post_init__(self) -> None:
        check_kinds(self)
        self.check_defence()
        check_least(self, bits=1, epochs=1, feature_dim=1, hidden=1, batch_size=2)
        check_finite(self, "alpha", "beta", "gamma", "eta", "delta", "lr", "label_lr", "discriminator_lr")
        if not 0 <= self.dropout < 1:
            raise InputError(f"dropout must be at least 0 and below 1, got {self.dropout}")
        if len(self.discriminator_hidden) != 2 or min(self.discriminator_hidden) < 1:
            raise InputError(f"discriminator_hidden must be two widths, got {self.discriminator_hidden}")
        check_choices(self, pair_loss=PAIR_LOSSES, image_network=IMAGE_NETWORKS)
        check_choices(self, image_input=SCALINGS, text_input=SCALINGS)


# A network that a CPU trains in minutes; validation mAP on Flickr8k-24 at 32 bits was still rising at the fourth epoch.
_FLICKR8K = SSAHConfig(hidden=1024, lr=3e-4, epochs=10)
# By validation mAP on a tenth of Wikipedia's training split at 32 bits; with delta 1 it falls from the sixth epoch on.
_WIKIPEDIA = replace(_FLICKR8K, delta=0.1, image_input="hellinger", text_input="hellinger")


class MultiScale(nn.Module):
    """(N, words) -> (N, 6 words): the words, and five smoothed copies of them (the code's interp_block).

    A copy is the mean over windows of 5 x level neighbours, times a weight, cut at 0, and stretched back by linear
    interpolation. Levels whose window is wider than the text are left out.
    """

    def __init__(self, words: int) -> None:
        super().__init__()
        self.words = words
        self.levels = tuple(level for level in LEVELS if _POOL * level <= words)
        self.weights = nn.Parameter(torch.ones(len(self.levels)))

    @property
    def out_dim(self) -> int:
        """Columns of the result."""
        return self.words * (1 + len(self.levels))

    def forward(self, text: Tensor) -> Tensor:
        """(N, words) -> (N, out_dim)."""
        copies = [text]
        for level, weight in zip(self.levels, self.weights, strict=True):
            pooled = F.relu(weight * F.avg_pool1d(text[:, None], _POOL * level))
            copies.append(F.interpolate(pooled, size=self.words, mode="linear")[:, 0])
        return torch.cat(copies, dim=1)


class Heads(nn.Module):
    """What lies below -> semantic features (N, 512), relaxed codes (N, bits) in (-1, 1), labels (N, C) in (0, 1)."""

    def __init__(self, below: nn.Module, width: int, features: int, bits: int, classes: int) -> None:
        super().__init__()
        self.below, self.features = below, nn.Linear(width, features)
        self.code, self.labels = nn.Linear(features, bits), nn.Linear(features, classes)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Inputs of the network below -> features, relaxed codes, labels."""
        features = F.relu(self.features(self.below(x)))
        return features, self.code(features).tanh(), self.labels(features).sigmoid()

    def logits(self, x: Tensor) -> Tensor:
        """(N, bits) before tanh: of the same signs."""
        return cast(Tensor, self.code(F.relu(self.features(self.below(x)))))


class SSAH(Retriever):
    """Label, image and text network, two discriminators, and what the label network says of the training set."""

    name: ClassVar[str] = "ssah"
    binary: ClassVar[bool] = True
    Config: ClassVar[type[Any]] = SSAHConfig
    presets: ClassVar[dict[str, Any]] = {"flickr8k": _FLICKR8K, "wikipedia": _WIKIPEDIA}
    preset_data: ClassVar[dict[str, str]] = {name: name for name in presets}
    init_arguments: ClassVar[tuple[str, ...]] = ("image_shape", "text_dim", "num_classes")
    one_process: ClassVar[str] = (
        "a batch is compared with what the networks say of the whole training set, which every rank would repeat"
    )

    def __init__(self, config: SSAHConfig, image_shape: Sequence[int], text_dim: int, num_classes: int) -> None:
        super().__init__(config, math.prod(image_shape), text_dim, num_classes)
        self.config: SSAHConfig = config
        self.image_shape = tuple(image_shape)
        c = config
        self.tower = tower_of(c.image_network, self.image_shape)
        self.image_scaling = scaling_of(c.image_input, self.image_shape, self.tower)
        self.text_scaling = InputScaling(c.text_input, text_dim)

        def layer(inputs: int) -> nn.Module:
            return nn.Sequential(nn.Linear(inputs, c.hidden), nn.ReLU())

        if self.image_scaling is None:
            image_below: nn.Module = CNNF(*self.image_shape[1:])
        else:
            image_below = layer(self.image_scaling.out_dim)
        scales = MultiScale(self.text_scaling.out_dim)
        words = scales.out_dim if c.multi_scale else self.text_scaling.out_dim
        text_below = nn.Sequential(scales, layer(words)) if c.multi_scale else layer(words)
        sizes = c.feature_dim, c.bits, num_classes
        self.network = nn.ModuleDict(
            {
                "label": Heads(layer(num_classes), c.hidden, *sizes),
                "image": Heads(image_below, 4096 if self.image_scaling is None else c.hidden, *sizes),
                "text": Heads(text_below, c.hidden, *sizes),
            }
        )
        wide, narrow = c.discriminator_hidden
        self.discriminator = nn.ModuleDict(
            {
                m: nn.Sequential(
                    nn.Linear(c.feature_dim, wide), nn.ReLU(), nn.Dropout(c.dropout),
                    nn.Linear(wide, narrow), nn.ReLU(), nn.Dropout(c.dropout), nn.Linear(narrow, 1),
                )
                for m in MODALITIES
            }
        )  # fmt: skip
        self.memory = Memory(features=c.feature_dim, codes=c.bits)
        self._labels = torch.empty(0)
        self._guided: CenterGuided | None = None

    def fit_inputs(self, train: Pairs) -> None:
        """Fit the scalings, or the mean pixel, on the training split."""
        if self.tower is not None:
            self.tower.load(weights_file())
        if self.image_scaling is None:
            cast(CNNF, cast(Heads, self.network["image"]).below).fit(train.image)
        else:
            self.image_scaling.fit(train.image if self.tower is None else self.tower.remember(train.image))
        self.text_scaling.fit(cast(Tensor, train.text))

    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        """Adam for each network, and for both discriminators."""
        c = self.config
        rates = {"label": c.label_lr, "image": c.lr, "text": c.lr}
        out: dict[str, torch.optim.Optimizer] = {
            name: torch.optim.Adam(self.network[name].parameters(), lr=rate, fused=True) for name, rate in rates.items()
        }
        out["discriminator"] = torch.optim.Adam(self.discriminator.parameters(), lr=c.discriminator_lr, fused=True)
        return out

    def scaled(self, modality: Modality, features: Tensor) -> Tensor:
        """What the network of a modality takes."""
        if modality == "text":
            return cast(Tensor, self.text_scaling(features))
        if self.tower is not None:
            features = self.tower(features)
        return features if self.image_scaling is None else cast(Tensor, self.image_scaling(features))

    def _inputs(self, modality: Modality, batch: Pairs) -> Tensor:
        """What the network of a modality takes, of rows of the training split; a frozen tower's word is remembered."""
        if modality == "image" and self.tower is not None:
            return cast(Tensor, cast(InputScaling, self.image_scaling)(self.tower.seen[batch.rows]))
        return self.scaled(modality, getattr(batch, modality))

    def encode(self, modality: Modality, features: Tensor) -> Tensor:
        """(N, ...) features, or pixels of 0 to 255 -> (N, bits) before tanh; the code's bit is value >= 0."""
        network = cast(Heads, self.network[modality])
        parts = features.split(_IMAGES) if features.ndim == 4 else (features,)
        return torch.cat([network.logits(self.scaled(modality, part)) for part in parts])

    @torch.no_grad()
    def begin_round(self, split: Pairs, progress: float) -> None:
        """F^l and H^l of all rows where there are none yet."""
        self._labels = packed_labels(split.labels)
        if self.tower is not None:
            self.tower.recall(split.image)
        self._guided = CenterGuided(self, split) if self.config.defence == "cgat" else None
        memory = cast(Memory, self.memory)
        if progress == 0 or len(cast(Tensor, memory.codes)) != len(split):
            features, codes, _ = self.network["label"](self._one_hot(split.labels))
            memory.features, memory.codes = full(features), full(codes)

    def _one_hot(self, labels: Tensor) -> Tensor:
        dtype = next(self.parameters()).dtype
        return F.one_hot(labels, self.num_classes).to(dtype) if labels.ndim == 1 else labels.to(dtype)

    def terms(
        self, said: tuple[Tensor, Tensor, Tensor], rows: Tensor, labels: Tensor, code_signs: Tensor
    ) -> dict[str, Tensor]:
        """The terms of one network that are not adversarial, unweighted, per pair or per entry.

        said: features, codes and labels of the batch; pairs are its rows against the whole training set's label
        features and codes.
        """
        features, codes, out = (full(x) for x in said)
        pairs = pairwise_nll if self.config.pair_loss == "nll" else pairwise_squared
        similar = self._labels[rows], self._labels
        memory = cast(Memory, self.memory)
        return {
            "features": cast(Tensor, pairs(features, cast(Tensor, memory.features), similar, reduction="mean")),
            "codes": cast(Tensor, pairs(codes, cast(Tensor, memory.codes), similar, reduction="mean")),
            "quantisation": 0.5 * (codes - code_signs).square().mean(),
            "labels": 0.5 * (out - labels).square().mean(),
        }

    def objective(self, terms: dict[str, Tensor]) -> Tensor:
        """The weighted sum."""
        c = self.config
        weights = {
            "features": c.alpha, "codes": c.gamma, "quantisation": c.eta, "labels": c.beta, "adversarial": c.delta,
            "cgat": c.cgat_weight,
        }  # fmt: skip
        return torch.stack([weights[name] * term for name, term in terms.items()]).sum()

    def step(
        self,
        batch: Pairs,
        optimizers: dict[str, torch.optim.Optimizer],
        backward: Callable[[Tensor], None],
        progress: float,
    ) -> dict[str, Tensor]:
        """The label network, then image and text network against it and the discriminators, then these."""
        c, rows = self.config, cast(Tensor, batch.rows)
        labels = self._one_hot(batch.labels)
        wide = full(labels)
        memory = cast(Memory, self.memory)
        logged = {}

        def update(name: str, loss: Tensor) -> None:
            optimizers[name].zero_grad()
            backward(loss)
            optimizers[name].step()
            logged[f"loss_{name}"] = loss.detach()

        said = self.network["label"](labels)
        update("label", self.objective(self.terms(said, rows, wide, signs(full(said[1].detach())))))
        cast(Tensor, memory.features)[rows] = full(said[0].detach())
        cast(Tensor, memory.codes)[rows] = full(said[1].detach())
        wanted = signs(full(said[1].detach()))
        features = {"label": said[0].detach()}
        self.discriminator.requires_grad_(False)
        for modality in MODALITIES:
            said = self.network[modality](self._inputs(modality, batch))
            terms = self.terms(said, rows, wide, wanted)
            if c.delta:
                terms["adversarial"] = F.softplus(-full(self.discriminator[modality](said[0]))).mean()
            if self._guided is not None:
                terms["cgat"] = self._guided.loss(modality, batch, signs(cast(Tensor, memory.codes)))
                logged[f"cgat_{modality}"] = terms["cgat"].detach()
            update(modality, self.objective(terms))
            features[modality] = said[0].detach()
        self.discriminator.requires_grad_(True)
        if c.delta:
            losses = []
            for modality in MODALITIES:
                fake, real = (full(self.discriminator[modality](features[side])) for side in (modality, "label"))
                losses.append((F.softplus(fake).mean() + F.softplus(-real).mean()) / 2)
            update("discriminator", (losses[0] + losses[1]) / 2)
        return logged
