"""DCMH: Deep Cross-Modal Hashing (Jiang and Li; CVPR 2017), on features or on raw pixels.

F and G are what the image and the text network say of the whole training set, (N, bits) each, kept in buffers;
Theta = 1/2 F G^T; S_ij = 1 where two items share a label. Eq. 1:

    J = - sum_ij [S_ij Theta_ij - log(1 + e^Theta_ij)] + gamma (|B - F|^2 + |B - G|^2) + eta (|F 1|^2 + |G 1|^2)

A step updates each network by its batch's rows of J against the buffered codes of the other modality; B = sign(F + G)
once an epoch. A code's bit is output >= 0, as everywhere here; the authors' sign(0) = 0 would make a third value. The
authors train one network for a pass over the data, then the other; here both take their step on every batch.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, cast

import torch
from torch import Tensor, nn

from cmr_fast.data.pairs import Pairs
from cmr_fast.errors import InputError
from cmr_fast.losses import CodeBuffer, dcmh_loss
from cmr_fast.losses.dcmh import packed_labels, signs
from cmr_fast.methods._settings import check_choices, check_finite, check_kinds, check_least
from cmr_fast.methods.cgat import CenterGuided, CgATConfig
from cmr_fast.methods.method import Retriever
from cmr_fast.methods.scaling import SCALINGS, InputScaling, Scaling
from cmr_fast.modalities import MODALITIES, Modality
from cmr_fast.models.hashing import CNNF, BagLinear, mostly_zero
from cmr_fast.models.towers import Lite0, weights_file

_TURNS: tuple[tuple[Modality, Modality], ...] = (("image", "text"), ("text", "image"))
PAIR_LOSSES = ("nll", "squared")
IMAGE_NETWORKS = ("cnnf", "efficientnet-lite0")
_IMAGES = 128  # pixels are encoded so many at a time


@dataclass(frozen=True)
class DCMHConfig(CgATConfig):
    """DCMH's settings: the paper's, and those of the authors' TensorFlow code where the paper gives none."""

    bits: int = 32
    """Length of the code (IV-B: 16, 32, 64)."""
    epochs: int = 500
    """Passes over the training split (code: 500; validation may stop earlier)."""
    batch_size: int = 128
    """Pairs a batch (IV-B)."""
    gamma: float = 1.0
    """Weight of |B - F|^2 and |B - G|^2 (IV-B)."""
    eta: float = 1.0
    """Weight of |F 1|^2 and |G 1|^2 (IV-B)."""
    pair_loss: Literal["nll", "squared"] = "nll"
    """nll: Eq. 1's likelihood; squared: 1/2 (S Theta - log(1 + e^Theta))^2 with S in {0, 0.999}, SSAH's code's form."""
    optimizer: Literal["sgd", "adam"] = "sgd"
    """sgd: plain SGD (IV-B); adam: Adam."""
    lr: float = 10**-1.5
    """The optimizer's rate at the start (IV-B searches 10^-6 to 10^-1; code: 10^-1.5). It falls to lr_end in a line."""
    lr_end: float = 1e-6
    """The rate at the end (code; the MATLAB code falls to 10^-3 as a power)."""
    weight_decay: float = 0.0
    """SGD's weight decay (TensorFlow code: none; MATLAB: 5e-4). Above 0, the text layer's gradient is dense: slower."""
    image_hidden: int = 4096
    """Hidden units between image features and bits; of pixels, CNN-F's fc7 is that layer (Table 1)."""
    image_network: Literal["cnnf", "efficientnet-lite0"] = "cnnf"
    """Below the bits of raw pixels: cnnf from random weights (the paper's is pretrained), or EfficientNet-Lite0 as
    ImageNet trained it, frozen, with the network of image features on top."""
    text_hidden: int = 8192
    """Hidden units between the bag of words and bits (Table 2)."""
    image_input: Scaling = "standard"
    """Scaling of image features: raw, standard, hellinger or chi2; pixels are centred by their mean."""
    text_input: Scaling = "raw"
    """Scaling of text features (TensorFlow code: raw bags of words; only these are fast)."""

    def __post_init__(self) -> None:
        check_kinds(self)
        self.check_defence()
        check_least(self, bits=1, epochs=1, image_hidden=1, text_hidden=1, batch_size=2)
        check_finite(self, "gamma", "eta", "lr", "lr_end", "weight_decay")
        if self.optimizer == "adam" and self.weight_decay:
            raise InputError(f"weight_decay is for sgd; expected 0 with adam, got {self.weight_decay}")
        check_choices(self, pair_loss=PAIR_LOSSES, optimizer=("sgd", "adam"), image_network=IMAGE_NETWORKS)
        check_choices(self, image_input=SCALINGS, text_input=SCALINGS)


# By validation mAP on Flickr8k-24's own validation split at 32 bits. |F 1|^2 sees a buffer that is up to an epoch old:
# with networks from random weights its gradient overshoots, the more the larger eta is (1, 0.1 and 0 were tried).
_FLICKR8K = DCMHConfig(optimizer="adam", lr=3e-4, eta=0.0, image_hidden=1024, text_hidden=1024, epochs=20)
# By validation mAP on a tenth of Wikipedia's training split at 32 bits, of four scalings of SIFT words and LDA topics.
_WIKIPEDIA = replace(_FLICKR8K, image_input="chi2")


class Memory(nn.Module):
    """Buffers (N, width) of the training set, of whatever N a stored state has."""

    def __init__(self, **widths: int) -> None:
        super().__init__()
        for name, width in widths.items():
            self.register_buffer(name, torch.zeros(0, width))

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        for name, own in list(self.named_buffers()):
            stored = state_dict.get(prefix + name)
            if stored is not None and stored.ndim == 2 and stored.shape[1:] == own.shape[1:]:
                setattr(self, name, torch.zeros_like(stored, device=own.device))  # float32 beside bfloat16 weights
        super()._load_from_state_dict(state_dict, prefix, *rest)


class DCMH(Retriever):
    """An image network and a text network into `bits` outputs each, and their outputs for the whole training set."""

    name: ClassVar[str] = "dcmh"
    binary: ClassVar[bool] = True
    Config: ClassVar[type[Any]] = DCMHConfig
    presets: ClassVar[dict[str, Any]] = {"flickr8k": _FLICKR8K, "wikipedia": _WIKIPEDIA}
    preset_data: ClassVar[dict[str, str]] = {name: name for name in presets}
    init_arguments: ClassVar[tuple[str, ...]] = ("image_shape", "text_dim", "num_classes")
    one_process: ClassVar[str] = (
        "a batch is compared with what the networks say of the whole training set, which every rank would repeat"
    )

    def __init__(self, config: DCMHConfig, image_shape: Sequence[int], text_dim: int, num_classes: int) -> None:
        super().__init__(config, math.prod(image_shape), text_dim, num_classes)
        self.config: DCMHConfig = config
        self.image_shape = tuple(image_shape)
        self.tower = tower_of(config.image_network, self.image_shape)
        self.image_scaling = scaling_of(config.image_input, self.image_shape, self.tower)
        self.text_scaling = InputScaling(config.text_input, text_dim)
        if self.image_scaling is not None:
            hidden = config.image_hidden
            below: nn.Module = nn.Sequential(nn.Linear(self.image_scaling.out_dim, hidden), nn.ReLU())
        else:
            hidden = 4096
            below = CNNF(*self.image_shape[1:])
        self.image_network = nn.Sequential(below, nn.Linear(hidden, config.bits))
        self.text_network = nn.Sequential(
            BagLinear(self.text_scaling.out_dim, config.text_hidden),
            nn.ReLU(),
            nn.Linear(config.text_hidden, config.bits),
        )
        self.memory = Memory(image=config.bits, text=config.bits)
        self._codes: dict[Modality, CodeBuffer] = {}
        self._signs, self._labels = torch.empty(0), torch.empty(0)
        self._guided: CenterGuided | None = None

    def fit_inputs(self, train: Pairs) -> None:
        """Fit the scalings, or the mean pixel, on the training split; labels are not looked at."""
        if self.tower is not None:
            self.tower.load(weights_file())
        if self.image_scaling is not None:
            self.image_scaling.fit(train.image if self.tower is None else self.tower.remember(train.image))
        else:
            cast(CNNF, self.image_network[0]).fit(train.image)
        self.text_scaling.fit(cast(Tensor, train.text))
        bag = cast(BagLinear, self.text_network[0])
        bag.sparse = self.config.weight_decay == 0 and mostly_zero(self.text_scaling(cast(Tensor, train.text)))

    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        """One for each network; of Adam, one more for the layer of the bag of words, whose gradient is sparse."""
        c = self.config
        if c.optimizer == "sgd":
            networks = {"image": self.image_network, "text": self.text_network}
            return {
                name: torch.optim.SGD(network.parameters(), lr=c.lr, weight_decay=c.weight_decay)
                for name, network in networks.items()
            }
        bag = cast(BagLinear, self.text_network[0])
        rest = [p for p in self.text_network.parameters() if p is not bag.weight]
        kind = torch.optim.SparseAdam if bag.sparse else torch.optim.Adam
        return {
            "image": torch.optim.Adam(self.image_network.parameters(), lr=c.lr),
            "text": torch.optim.Adam(rest, lr=c.lr),
            "text_bag": kind([bag.weight], lr=c.lr),
        }

    def encode(self, modality: Modality, features: Tensor) -> Tensor:
        """(N, ...) features, or pixels of 0 to 255 -> outputs (N, bits); the code's bit is output >= 0."""
        if modality == "text":
            return cast(Tensor, self.text_network(self.text_scaling(features)))
        if self.tower is not None:
            return torch.cat([self._head(self.tower(part)) for part in features.split(_IMAGES)])
        if self.image_scaling is not None:
            return self._head(features)
        return torch.cat([self.image_network(part) for part in features.split(_IMAGES)])

    def _head(self, features: Tensor) -> Tensor:
        return cast(Tensor, self.image_network(cast(InputScaling, self.image_scaling)(features)))

    def _said(self, modality: Modality, batch: Pairs, rows: Tensor) -> Tensor:
        """Outputs of rows of the training split; what a frozen tower says of them is remembered."""
        if modality == "image" and self.tower is not None:
            return self._head(self.tower.seen[rows])
        return self.encode(modality, getattr(batch, modality))

    @torch.no_grad()
    def begin_round(self, split: Pairs, progress: float) -> None:
        """F and G of all rows where there are none yet; B = sign(F + G)."""
        if self.tower is not None:
            self.tower.recall(split.image)
        if progress == 0 or len(cast(Tensor, self.memory.image)) != len(split):
            for modality in MODALITIES:
                rows = torch.arange(len(split), device=split.labels.device).split(1024)
                parts = [self._said(modality, split.select(part), part) for part in rows]
                setattr(self.memory, modality, full(torch.cat(parts)))
        for modality in MODALITIES:
            self._codes[modality] = CodeBuffer(getattr(self.memory, modality))
            setattr(self.memory, modality, self._codes[modality].codes)  # one memory: an update is seen in both
        self._signs = signs(self._codes["image"].codes + self._codes["text"].codes)
        self._labels = packed_labels(split.labels)
        self._guided = CenterGuided(self, split) if self.config.defence == "cgat" else None

    def step(
        self,
        batch: Pairs,
        optimizers: dict[str, torch.optim.Optimizer],
        backward: Callable[[Tensor], None],
        progress: float,
    ) -> dict[str, Tensor]:
        """The image network, then the text network, by the batch's rows of J over n N (Algorithm 1)."""
        c, rows = self.config, cast(Tensor, batch.rows)
        rate = c.lr + progress * (c.lr_end - c.lr)
        logged = {}
        for modality, other in _TURNS:
            own_steps = [optimizer for name, optimizer in optimizers.items() if name.startswith(modality)]
            for optimizer in own_steps:
                for group in optimizer.param_groups:
                    group["lr"] = rate
            outputs = full(self._said(modality, batch, rows))
            own, theirs = self._codes[modality], self._codes[other]
            loss = dcmh_loss(
                outputs, rows, own, theirs, (self._labels[rows], self._labels), self._signs[rows],
                gamma=c.gamma, eta=c.eta, squared=c.pair_loss == "squared",
            ) / (len(rows) * len(self._labels))  # fmt: skip
            own.update(rows, outputs)
            if self._guided is not None:
                attacked = self._guided.loss(modality, batch, self._signs)
                loss = loss + c.cgat_weight * attacked
                logged[f"cgat_{modality}"] = attacked.detach()
            for optimizer in own_steps:
                optimizer.zero_grad()
            backward(loss)
            for optimizer in own_steps:
                optimizer.step()
            logged[f"loss_{modality}"] = loss.detach()
        return logged


def tower_of(image_network: str, image_shape: Sequence[int]) -> Lite0 | None:
    """The pretrained tower that a config names, for pixels. InputError where the images are features."""
    if image_network == "cnnf":
        return None
    if len(image_shape) == 1:
        raise InputError(
            f"image_network={image_network} is for raw pixels, expected cnnf (which features do not use), got features "
            f"of {image_shape[0]} dimensions"
        )
    return Lite0()


def scaling_of(kind: Scaling, image_shape: Sequence[int], tower: Lite0 | None) -> InputScaling | None:
    """The scaling of image features, or of a tower's; None of other pixels."""
    if len(image_shape) > 1 and tower is None:
        return None
    return InputScaling(kind, image_shape[0] if tower is None else tower.width)


def full(x: Tensor) -> Tensor:
    """Losses are computed in float32 at least, whatever the networks run in."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
