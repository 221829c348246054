"""Feature Scattering-based adversarial training (Zhang and Wang 2019, NeurIPS).

Beside it Madry's PGD training (2018), the same with random targets, and plain training: a classifier of small images,
its perturbation, its loss.

    x' = FeatureScatter(x)      without labels, through the network in evaluation mode
    minimise the cross entropy of f(x') against smoothed labels: 1 - delta for the class, delta / (K - 1) for the others

As the authors' code has it, all training images are trained on and the last weights are kept: nothing is held out and
nothing stops early. With `--valid-fraction 0.1 --patience 20` robust accuracy on held-out images chooses the epoch.

The presets that begin with "small" depart from the paper to train on a CPU, seconds to minutes an epoch: WRN-10-1, 30
epochs and a cosine schedule. The others are for a GPU.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from math import cos, pi
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cmr_fast.attacks.base import Attack
from cmr_fast.attacks.pgd import PGD, Targeted
from cmr_fast.attacks.scatter import FeatureScatter
from cmr_fast.data.images import ImageDataset, Images
from cmr_fast.errors import InputError
from cmr_fast.methods._settings import check_kinds, check_least
from cmr_fast.methods.evaluation import accuracy
from cmr_fast.methods.method import Classifier
from cmr_fast.models.wide_resnet import WideResNet


@dataclass(frozen=True)
class ScatterConfig:
    """Defaults: the paper's CIFAR-10 model, as its code has them where the paper says nothing."""

    perturb: Literal["scatter", "madry", "random_targeted", "none"] = "scatter"
    """What training images are replaced by: Feature Scattering's, PGD's on the cross entropy, PGD's towards a random
    other class, or nothing. The presets set steps, alpha and smoothing to go with it."""
    eps: float = 8 / 255
    """Radius of the L-inf ball, of pixels from 0 to 1."""
    alpha: float = 8 / 255
    """Step of the perturbation."""
    steps: int = 1
    """Steps of the perturbation (7 for Madry's)."""
    smoothing: float = 0.5
    """delta: what the labels give to the other classes; 0 for hard labels."""
    scatter_on: Literal["logits", "features"] = "logits"
    """Which outputs are transported: the logits, or what the last layer sees."""
    ot_group: int = 0
    """Images that are transported together; 0: the batch."""
    ot_solver: Literal["sinkhorn", "ipot", "identity"] = "sinkhorn"
    """Of the transport problem; identity matches every image with its own clean one (section 5.2)."""
    ot_reg: float = 0.01
    """Its entropic regularisation (IPOT's beta)."""
    ot_grad: Literal["unrolled", "envelope"] = "unrolled"
    """Gradient through the solver's iterations as in the authors' code, or with the plan held fixed, which is another
    step."""
    depth: int = 28
    """Layers of the wide residual network, 6 n + 4 (Zagoruyko and Komodakis 2016)."""
    width: int = 10
    """Its width k: 16 k, 32 k and 64 k channels."""
    epochs: int = 200
    """Passes over the training images."""
    batch_size: int = 60
    """Images a batch (rebuttal: 60; below 60 worse)."""
    lr: float = 0.1
    """Peak learning rate of SGD."""
    schedule: Literal["steps", "cosine"] = "steps"
    """steps: lr, divided by 10 at each milestone; cosine: up to lr over the first tenth, then down to 0."""
    milestones: tuple[int, ...] = (60, 90)
    """Epochs of the steps schedule."""
    momentum: float = 0.9
    """Of SGD."""
    weight_decay: float = 2e-4
    """Of SGD."""
    augment: bool = True
    """Random crops of the image padded by 4 pixels, and random flips; --no-augment trains on the images as they are, as
    the authors do on SVHN (preset svhn)."""
    flip: bool = True
    """Flips among the augmentations."""
    valid_steps: int = 10
    """Where images are held out, steps of the PGD that validates robustness; 0 validates clean accuracy alone, and so
    does perturb = none."""
    valid_images: int = 500
    """How many of the held-out images are validated on."""

    def __post_init__(self) -> None:
        check_kinds(self)
        if self.depth < 10 or (self.depth - 4) % 6 or self.width < 1:
            raise InputError(f"depth must be 10, 16, 22, 28, … and width 1 or more, got {self.depth} and {self.width}")
        if not 0 <= self.smoothing < 1:
            raise InputError(f"smoothing must be at least 0 and below 1, got {self.smoothing}")
        if not 0 < self.lr < float("inf"):
            raise InputError(f"lr must be finite and above 0, got {self.lr}")
        if not 1e-5 <= self.ot_reg < float("inf"):
            raise InputError(f"ot_reg must be at least 1e-5, the costs lying from 0 to 2, got {self.ot_reg}")
        if not (0 <= self.momentum < 1 and 0 <= self.weight_decay < float("inf")):
            raise InputError(
                f"momentum must be from 0 to below 1 and weight_decay 0 or more, got {self.momentum} and "
                f"{self.weight_decay}"
            )
        check_least(self, steps=1, ot_group=0, valid_steps=0, valid_images=1)
        if not 0 <= self.eps <= 1 or not 0 < self.alpha <= 1:
            raise InputError(
                f"eps and alpha are of pixels from 0 to 1 (8/255 is 0.03137), got {self.eps} and {self.alpha}"
            )


class Features(nn.Module):
    """A network up to its last layer, to be attacked there."""

    def __init__(self, net: WideResNet) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) images -> (B, width) pooled features."""
        return self.net.features(x)


@dataclass(frozen=True)
class MadryConfig(ScatterConfig):
    """PGD training (Madry et al. 2018) of the same network: 7 steps of 2/255, hard labels."""

    perturb: Literal["scatter", "madry", "random_targeted", "none"] = "madry"
    """What training images are replaced by; fixed by the name of the method."""
    alpha: float = 2 / 255
    """Step of the perturbation."""
    steps: int = 7
    """Steps of the perturbation."""
    smoothing: float = 0.0
    """What the labels give to the other classes; 0 for hard labels."""


@dataclass(frozen=True)
class RandomTargetedConfig(MadryConfig):
    """Madry's, each image moved towards a random other class."""

    perturb: Literal["scatter", "madry", "random_targeted", "none"] = "random_targeted"
    """What training images are replaced by; fixed by the name of the method."""


@dataclass(frozen=True)
class PlainConfig(MadryConfig):
    """Training on the images as they are."""

    perturb: Literal["scatter", "madry", "random_targeted", "none"] = "none"
    """What training images are replaced by; fixed by the name of the method."""


def _small(kind: type[ScatterConfig]) -> ScatterConfig:
    return kind(depth=10, width=1, epochs=30, batch_size=60, schedule="cosine")


def _as_scatter(config: ScatterConfig) -> ScatterConfig:
    return ScatterConfig(**asdict(config))


_SMALL = _small(ScatterConfig)


class Scatter(Classifier):
    """A classifier and one batch of its training, by what `config.perturb` names."""

    name: ClassVar[str] = "scatter"
    Config: ClassVar[type] = ScatterConfig
    fixed: ClassVar[str | None] = None
    """The one `perturb` of a trainer that is called what it is."""
    one_process: ClassVar[str] = (
        "batch normalisation takes its statistics, and Feature Scattering its transport, from the whole batch"
    )
    protocol: ClassVar[Mapping[str, Any]] = {"valid_fraction": 0.0, "patience": 0}
    presets: ClassVar[dict[str, Any]] = {
        "small": _SMALL,
        "small-identity": replace(_SMALL, ot_solver="identity"),
        "small-madry": _as_scatter(_small(MadryConfig)),
        "small-random-targeted": _as_scatter(_small(RandomTargetedConfig)),
        "small-plain": _as_scatter(_small(PlainConfig)),
        "cifar100": ScatterConfig(),
        "svhn": ScatterConfig(augment=False),
        "identity": ScatterConfig(ot_solver="identity"),
        "madry": _as_scatter(MadryConfig()),
        "random-targeted": _as_scatter(RandomTargetedConfig()),
        "plain": _as_scatter(PlainConfig()),
    }

    def __init__(self, config: ScatterConfig, num_classes: int) -> None:
        super().__init__(config, num_classes)
        if self.fixed is not None and config.perturb != self.fixed:
            raise InputError(
                f"{self.name} has perturb = {self.fixed!r}, got {config.perturb!r}: scatter takes any of them"
            )
        self.config: ScatterConfig = config
        # smoothing as torch has it gives delta / K to every class, the true one too
        self.smoothing = config.smoothing * num_classes / (num_classes - 1) if num_classes > 1 else 0.0
        if self.smoothing > 1:
            raise InputError(
                f"smoothing must be at most {(num_classes - 1) / num_classes:g} for {num_classes} classes, where the "
                f"true class is no likelier than the others, got {config.smoothing}"
            )
        self.net = WideResNet(config.depth, config.width, num_classes)
        self.net.to(memory_format=torch.channels_last)
        robust = config.perturb != "none" and config.valid_steps > 0
        self.monitor = ("valid_accuracy", "valid_robust") if robust else ("valid_accuracy",)

    def forward(self, x: Tensor) -> Tensor:
        """Pixels (B, 3, H, W) from 0 to 1 -> logits (B, K)."""
        return self.net(x.contiguous(memory_format=torch.channels_last))

    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        """SGD with momentum over all parameters."""
        c = self.config
        return {"net": torch.optim.SGD(self.parameters(), lr=c.lr, momentum=c.momentum, weight_decay=c.weight_decay)}

    def perturbation(self) -> Attack | None:
        """What makes the training images of one batch, its noise from torch's random state."""
        c = self.config
        if c.perturb == "none":
            return None
        common: dict[str, Any] = {"check": False, "progress": False, "seed": int(torch.randint(2**62, ()))}
        if c.perturb != "scatter":
            targets: Targeted = "random" if c.perturb == "random_targeted" else False
            return PGD(self, c.eps, c.alpha, c.steps, targeted=targets, **common)
        seen: nn.Module = self if c.scatter_on == "logits" else Features(self.net)
        ot: dict[str, Any] = {"group": c.ot_group or None, "solver": c.ot_solver, "reg": c.ot_reg, "ot_grad": c.ot_grad}
        return FeatureScatter(seen, c.eps, c.alpha, c.steps, **ot, **common)

    def step(
        self,
        batch: Images,
        optimizers: dict[str, torch.optim.Optimizer],
        backward: Callable[[Tensor], None],
        progress: float,
    ) -> dict[str, Tensor]:
        """Perturb, one step of SGD on the perturbed images alone."""
        optimizer, c = optimizers["net"], self.config
        for group in optimizer.param_groups:
            group["lr"] = c.lr * _rate(c, progress)
        x = batch.pixels().to(next(self.parameters()).dtype)
        if c.augment:
            x = augmented(x, c.flip)
        attack = self.perturbation()
        try:
            adversarial = x if attack is None else attack(x, batch.labels)
        except InputError as error:
            if all(bool(p.isfinite().all()) for p in self.parameters()) and "finite" not in str(error):
                raise
            raise InputError(f"the training has diverged: expected a lower lr than {c.lr} ({error})") from error
        logits = self(adversarial).float()
        loss = F.cross_entropy(logits, batch.labels, label_smoothing=self.smoothing)
        optimizer.zero_grad()
        backward(loss)
        optimizer.step()
        right = (logits.detach().argmax(dim=1) == batch.labels).float().mean()
        return {"loss": loss.detach(), "perturbed_accuracy": right}

    def validate(self, valid: Images) -> dict[str, float]:
        """Accuracy on `valid_images` images, and under PGD with `valid_steps` steps of eps / 4."""
        sample = valid.sample(self.config.valid_images)
        scores = {"valid_accuracy": accuracy(self, sample)}
        if "valid_robust" in self.monitor:
            scores["valid_robust"] = accuracy(self, sample, self._pgd(self.config.valid_steps))
        return scores

    def test(self, dataset: ImageDataset) -> dict[str, Any]:
        """Accuracy on the test split, and under PGD-20 on 500 images of it; `cmr-fast report` asks much more."""
        sample = dataset.test.sample(500)
        robust = accuracy(self, sample, self._pgd(20))
        return {"accuracy": accuracy(self, dataset.test), "pgd20_accuracy": robust, "pgd20_images": len(sample)}

    def _pgd(self, steps: int) -> PGD:
        return PGD(self, self.config.eps, None, steps, check=False, progress=False)


class Madry(Scatter):
    """PGD adversarial training (Madry, Makelov, Schmidt, Tsipras, Vladu; ICLR 2018)."""

    name: ClassVar[str] = "madry"
    Config: ClassVar[type] = MadryConfig
    fixed: ClassVar[str | None] = "madry"
    presets: ClassVar[dict[str, Any]] = {"small": _small(MadryConfig)}


class RandomTargeted(Scatter):
    """PGD adversarial training, each image moved towards a random other class."""

    name: ClassVar[str] = "random-targeted"
    Config: ClassVar[type] = RandomTargetedConfig
    fixed: ClassVar[str | None] = "random_targeted"
    presets: ClassVar[dict[str, Any]] = {"small": _small(RandomTargetedConfig)}


class Plain(Scatter):
    """Plain training: the images as they are, without perturbation."""

    name: ClassVar[str] = "plain"
    Config: ClassVar[type] = PlainConfig
    fixed: ClassVar[str | None] = "none"
    presets: ClassVar[dict[str, Any]] = {"small": _small(PlainConfig)}


def _rate(c: ScatterConfig, progress: float) -> float:
    """The learning rate as a share of lr."""
    if c.schedule == "steps":
        return 0.1 ** sum(progress * c.epochs >= epoch for epoch in c.milestones)
    return min(progress / 0.1, (1 + cos(pi * max(0.0, progress - 0.1) / 0.9)) / 2)


def augmented(x: Tensor, flip: bool, pad: int = 4) -> Tensor:
    """Random crops of (B, 3, H, W) padded with zeros, and random flips, by torch's random state."""
    count, _, height, width = x.shape
    padded = F.pad(x, (pad, pad, pad, pad))
    down, right = torch.randint(2 * pad + 1, (2, count)).to(x.device)
    rows = (down[:, None] + torch.arange(height, device=x.device))[:, None, :, None]
    columns = right[:, None] + torch.arange(width, device=x.device)
    if flip:
        turned = (torch.rand(count) < 0.5).to(x.device)
        columns = torch.where(turned[:, None], columns.flip(1), columns)
    samples, channels = (torch.arange(n, device=x.device) for n in x.shape[:2])
    return padded[samples[:, None, None, None], channels[:, None, None], rows, columns[:, None, None, :]]
