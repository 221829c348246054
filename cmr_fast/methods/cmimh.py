"""Cross-Modal Info-Max Hashing: Hoang, Do, Nguyen, Cheung, "Multi-Modal Mutual Information Maximization", 2021.

Each modality x is encoded as L independent Bernoulli bits with logits a and means m = sigmoid(a). Minimised, batch by
batch (Eq. 14 with its sign turned, and its order):

    |x_i - decode(h_i)|^2 + |x_t - decode(h_t)|^2      h ~ Bern(m), Gaussian decoders (Eq. 2-4)
      - lambda_mi  I_JS(m_i; m_t)                      Jensen-Shannon bound, separable critic T (Eq. 5: js_critic)
      + lambda_skl SKL(m_i, m_t)                       modality gap (Eq. 6-7)
      + lambda_ind L_ind                               total correlation by discriminators D (Eq. 11-12)
      + lambda_bal L_bal                               each bit on half of the time (Eq. 13)

and, in a step of their own, the discriminators' cross entropy between m and m with its bit columns shuffled. Codes are
h = 1[a >= 0].
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cmr_fast.data.pairs import Pairs
from cmr_fast.errors import InputError
from cmr_fast.methods._settings import check_choices, check_kinds, check_least
from cmr_fast.methods.evaluation import encode_all
from cmr_fast.methods.method import Retriever
from cmr_fast.methods.scaling import SCALINGS, InputScaling, Scaling
from cmr_fast.modalities import MODALITIES, Modality
from cmr_fast.ops.info_nce import js_critic

_NOT_NEGATIVE = (
    *("lambda_mi", "lambda_skl", "lambda_ind", "lambda_bal", "reconstruction_weight"),
    *("lr", "decoder_lr", "momentum", "weight_decay", "clip_norm", "pca_dim", "text_pca_dim"),
)


@dataclass(frozen=True)
class CMIMHConfig:
    """One setting for many data sets; `--preset paper` has IV-A's, for MIR-Flickr25K and NUS-WIDE.

    They leave the paper where it is silent (the inputs' scale, on which the reconstruction's weight hangs, and epochs),
    and in values of its that are named below; what those give on Wikipedia is in docs/results/cmimh.md.
    """

    bits: int = 32
    """L, the code length (the paper's tables: 16, 32, 48, 64)."""
    lambda_mi: float = 1.5
    """Weight of I_JS (Eq. 14, lambda_1; 4 for MS-COCO)."""
    lambda_skl: float = 1.0
    """Weight of the symmetrised KL divergence (Eq. 14, lambda_2; 1.5 for MS-COCO)."""
    lambda_ind: float = 0.25
    """Weight of the total correlation (Eq. 14, lambda_3); 0 trains no discriminator."""
    lambda_bal: float = 1.0
    """Weight of the balance term (Eq. 14, lambda_4: 0.01)."""
    reconstruction: Literal["sum", "mean", "bits"] = "bits"
    """Squared error summed over features (Eq. 2 and 14 write a norm), averaged, or averaged and times the number of
    bits: SKL is a sum over bits, and wins the first epochs of long codes otherwise."""
    reconstruction_weight: float = 1.25
    """Weight of both reconstruction terms (Eq. 14: 1). It sets what the lambdas mean."""
    marginals: Literal["all", "permutation"] = "all"
    """Pairs from the product of marginals in Eq. 5: all B(B-1) of the batch, or B of them by one derangement."""
    straight_through: Literal["logits", "means"] = "means"
    """Where the decoders' gradient lands (Eq. 4: logits, dh/da = 1, which drives saturated logits on; "means" passes
    the sigmoid, dh/da = m(1 - m))."""
    critic_input: Literal["means", "samples"] = "means"
    """What the critic T sees: Bernoulli means (III-B3, the paper's choice) or one sample of each (Table I)."""
    critic_samples: int = 1
    """With critic_input samples: how many pairs of samples I_JS is averaged over (Table I: 1 to 20)."""
    inputs: Scaling = "global"
    """Input scaling by name, from training statistics (not given in the paper)."""
    pca_dim: int = 50
    """Images wider than this are reduced to it by PCA (IV-A: 1024 for AlexNet's fc7); 0 never reduces."""
    text_pca_dim: int = 50
    """The same of texts, which IV-A leaves as they are (0)."""
    hidden: int = 1024
    """Width of the two hidden ReLU layers of encoders and decoders (IV-A)."""
    critic_hidden: int = 512
    """Width of the two hidden LeakyReLU layers of critics and discriminators (IV-A)."""
    critic_dim: int = 512
    """Width of the critics' outputs, whose inner product is T (IV-A gives no width)."""
    negative_slope: float = 0.2
    """LeakyReLU's slope (IV-A gives none; 0.2 as in the paper's source for D, Kim and Mnih 2018)."""
    lr: float = 0.03
    """SGD's rate for encoders, critics and discriminators (IV-A: 0.01)."""
    decoder_lr: float = 0.03
    """SGD's rate for decoders (IV-A: 0.001)."""
    momentum: float = 0.9
    """SGD's momentum (IV-A)."""
    weight_decay: float = 3e-3
    """SGD's weight decay (IV-A: 1e-4)."""
    clip_norm: float = 1.0
    """Largest gradient norm of the encoders, of the decoders, of the critics and of the discriminators in one update;
    0 never clips (not in the paper, where nothing bounds T and D)."""
    batch_size: int = 128
    """Pairs per step (IV-A)."""
    init: Literal["torch", "he"] = "torch"
    """Initial weights: torch's own, or He's normal ones, which leave the start sooner (IV-A gives none)."""
    epochs: int = 100
    """Passes over the training split (not given in the paper)."""
    choose_by: Literal["pairs", "labels"] = "pairs"
    """What validation, where there is any, picks the epoch by: pairs alone (see `CMIMH.validate`), as the method sees
    no label; or labels, by mAP."""

    def __post_init__(self) -> None:
        check_kinds(self)
        check_least(self, bits=1, hidden=1, critic_hidden=1, critic_dim=1, critic_samples=1, epochs=1)
        if self.batch_size < 2:
            raise InputError(f"batch_size must be at least 2 (Eq. 5 needs unpaired pairs), got {self.batch_size}")
        for name in _NOT_NEGATIVE:
            if not getattr(self, name) >= 0:
                raise InputError(f"{name} must be 0 or more, got {getattr(self, name)}")
        check_choices(
            self,
            reconstruction=("sum", "mean", "bits"),
            marginals=("all", "permutation"),
            critic_input=("means", "samples"),
            straight_through=("logits", "means"),
            inputs=SCALINGS,
            init=("torch", "he"),
            choose_by=("pairs", "labels"),
        )


_MI_FLOOR = 1e-3
_RISE = 0.03  # of validation mAP since the first epoch: codes that learn


def sample_bernoulli(logits: Tensor, straight_through: str = "logits") -> Tensor:
    """h = 1[a + log u - log(1 - u) >= 0], u ~ U(0, 1): samples in {0, 1} of the shape of `logits` (Eq. 4).

    Straight-through: the gradient with respect to h lands on `logits` unchanged, or, with straight_through="means", as
    if h were the mean sigmoid(a).
    """
    tiny = torch.finfo(logits.dtype).eps
    u = torch.rand_like(logits).clamp(tiny, 1 - tiny)
    z = logits + torch.log(u) - torch.log1p(-u)
    passed = logits if straight_through == "logits" else logits.sigmoid()
    return (z >= 0).to(z.dtype) + (passed - passed.detach())


def symmetrised_kl(image_logits: Tensor, text_logits: Tensor) -> Tensor:
    """Eq. 6-7 between Bernoulli distributions with logits (B, L): summed over bits, averaged over the batch.

    KL(m_i || m_t) + KL(m_t || m_i) = sum over bits of (m_i - m_t)(a_i - a_t): no logarithm, no clamp.
    """
    gap = (image_logits.sigmoid() - text_logits.sigmoid()) * (image_logits - text_logits)
    return gap.sum(dim=1).mean()


def balance(means: Tensor) -> Tensor:
    """One modality's half of Eq. 13 on a batch of means (B, L): sum over bits of |mean over the batch - 1/2|."""
    return (means.mean(dim=0) - 0.5).abs().sum()


def permute_columns(means: Tensor) -> Tensor:
    """Samples of the product of the bits' marginals: each column of (B, L) shuffled on its own (III-D, footnote 4)."""
    return means.gather(0, torch.rand_like(means).argsort(dim=0))


def discriminator_loss(discriminator: nn.Module, means: Tensor) -> Tensor:
    """Cross entropy of D between `means` (B, L), label 1, and the same with shuffled columns, label 0 (Eq. 11)."""
    real, fake = _full(discriminator(means)), _full(discriminator(permute_columns(means)))
    return (F.softplus(-real).mean() + F.softplus(fake).mean()) / 2


class Inputs(nn.Module):
    """Features -> what the encoders see and the decoders aim at: scaling, then PCA where the features are too many."""

    centre: Tensor
    components: Tensor

    def __init__(self, kind: Scaling, dim: int, pca_dim: int) -> None:
        super().__init__()
        self.scaling = InputScaling(kind, dim)
        self.reduces = 0 < pca_dim < self.scaling.out_dim
        self.out_dim = pca_dim if self.reduces else self.scaling.out_dim
        self.register_buffer("centre", torch.zeros(self.scaling.out_dim if self.reduces else 0))
        self.register_buffer("components", torch.zeros(self.scaling.out_dim if self.reduces else 0, self.out_dim))

    def fit(self, features: Tensor) -> None:
        """Fit scaling, centre and components on features (N, d)."""
        self.scaling.fit(features)
        if self.reduces:
            scaled = self.scaling(features).double()
            self.centre.copy_(scaled.mean(dim=0))
            scaled = scaled - scaled.mean(dim=0)
            self.components.copy_(torch.linalg.eigh(scaled.T @ scaled)[1].flip(1)[:, : self.out_dim])

    def forward(self, features: Tensor) -> Tensor:
        """(N, d) features -> (N, out_dim) inputs of the networks."""
        scaled = self.scaling(features)
        return (scaled - self.centre) @ self.components if self.reduces else scaled


# As printed: a sum over features (Eq. 2 and 14), gradients on the logits (Eq. 4), nothing clipped, inputs as they come
_PAPER = CMIMHConfig(
    reconstruction="sum",
    reconstruction_weight=1.0,
    straight_through="logits",
    inputs="raw",
    pca_dim=1024,
    text_pca_dim=0,
    lambda_bal=0.01,
    lr=0.01,
    decoder_lr=0.001,
    weight_decay=1e-4,
    clip_norm=0.0,
)

# Chosen on a held-out fifth of the training split at 32 bits (bench/experiments/cmimh_wikipedia.py, which also says why
# each leaves the paper's value); what is not named is the default.
_WIKIPEDIA = CMIMHConfig(
    inputs="standard",
    pca_dim=1024,
    text_pca_dim=0,
    reconstruction="mean",
    reconstruction_weight=20.0,
    straight_through="means",
    lambda_bal=1.0,
    lr=0.03,
    decoder_lr=0.03,
    weight_decay=3e-3,
    epochs=50,
)
_TFIDF = replace(_WIKIPEDIA, inputs="hellinger", pca_dim=50, text_pca_dim=50, reconstruction_weight=40.0, epochs=40)


class CMIMH(Retriever):
    """The encoders, decoders, critics and discriminators of both modalities, and one batch's two updates."""

    name: ClassVar[str] = "cmimh"
    binary: ClassVar[bool] = True
    Config: ClassVar[type] = CMIMHConfig
    presets: ClassVar[dict[str, Any]] = {
        "paper": _PAPER,
        "paper-coco": replace(_PAPER, lambda_mi=4.0, lambda_skl=1.5),  # IV-A's weights for MS-COCO
        "wikipedia": _WIKIPEDIA,
        "wikipedia-tfidf": _TFIDF,
        # by validation at 32 bits: the preset for LDA texts stays at chance on these inputs, that for tf-idf does not
        "flickr8k": replace(_TFIDF, epochs=12),
    }
    preset_data: ClassVar[dict[str, str]] = {
        "wikipedia": "wikipedia", "wikipedia-tfidf": "wikipedia", "flickr8k": "flickr8k",
    }  # fmt: skip
    monitor = (*Retriever.monitor, "valid_pairs")
    # labels choose nothing: as printed, and in the tables, all pairs are trained on for a fixed number of epochs
    preset_protocols: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "paper": {"valid_fraction": 0.0, "patience": 0},
        "paper-coco": {"valid_fraction": 0.0, "patience": 0},
        "wikipedia": {"valid_fraction": 0.0, "patience": 0, "precision": "bf16-mixed"},
        "wikipedia-tfidf": {"valid_fraction": 0.0, "patience": 0, "precision": "bf16-mixed"},
        "flickr8k": {"valid_fraction": 0.0, "patience": 0},
    }

    def __init__(self, config: CMIMHConfig, image_dim: int, text_dim: int, num_classes: int = 0) -> None:
        super().__init__(config, image_dim, text_dim, num_classes)
        self.config: CMIMHConfig = config
        if config.choose_by == "labels":
            self.monitor = ("valid_pairs", *Retriever.monitor)
        dims = {"image": image_dim, "text": text_dim}
        most = {"image": config.pca_dim, "text": config.text_pca_dim}
        self.inputs = nn.ModuleDict({m: Inputs(config.inputs, d, most[m]) for m, d in dims.items()})
        widths = {m: cast(Inputs, inputs).out_dim for m, inputs in self.inputs.items()}
        relu, leaky = nn.ReLU, lambda: nn.LeakyReLU(config.negative_slope)
        bits, hidden, narrow = config.bits, config.hidden, config.critic_hidden
        self.encoder = nn.ModuleDict({m: mlp(w, hidden, bits, relu) for m, w in widths.items()})
        self.decoder = nn.ModuleDict({m: mlp(bits, hidden, w, relu) for m, w in widths.items()})
        self.critic = nn.ModuleDict({m: mlp(bits, narrow, config.critic_dim, leaky) for m in dims})
        self.discriminator = nn.ModuleDict({m: mlp(bits, narrow, 1, leaky) for m in dims})
        if config.init == "he":
            for layer in self.modules():
                if isinstance(layer, nn.Linear):
                    nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
                    nn.init.zeros_(layer.bias)

    @classmethod
    def read_config(cls, stored: dict[str, Any]) -> dict[str, Any]:
        """Before text_pca_dim, pca_dim held for texts too, and labels chose the epoch."""
        return {"text_pca_dim": stored.get("pca_dim", 0), "choose_by": "labels"} | stored

    def fit_inputs(self, train: Pairs) -> None:
        """Fit centring, PCA and scaling on the training split; labels are not looked at."""
        for modality, inputs in self.inputs.items():
            cast(Inputs, inputs).fit(getattr(train, modality))

    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        """Of the model, and of the discriminators (IV-B: SGD, decoders at a rate of their own)."""
        c = self.config
        model: list[dict[str, Any]] = [
            {"params": [*self.encoder.parameters(), *self.critic.parameters()]},
            {"params": list(self.decoder.parameters()), "lr": c.decoder_lr},
        ]

        def sgd(parameters: Any) -> torch.optim.SGD:
            return torch.optim.SGD(parameters, lr=c.lr, momentum=c.momentum, weight_decay=c.weight_decay, fused=True)

        return {"model": sgd(model), "discriminator": sgd(self.discriminator.parameters())}

    def terms(self, image: Tensor, text: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Raw features (B, Di), (B, Dt) -> the six terms of Eq. 14 unweighted, and the means (B, L) by modality."""
        c = self.config
        inputs = {"image": self.inputs["image"](image), "text": self.inputs["text"](text)}
        over = self.ranks.over  # networks, each rank its rows; draws and losses are of the whole batch
        logits = {m: _full(over(self.encoder[m], x)) for m, x in inputs.items()}
        means = {m: a.sigmoid() for m, a in logits.items()}
        samples = {m: sample_bernoulli(a, c.straight_through) for m, a in logits.items()}
        terms = {
            f"reconstruction_{m}": self._squared_error(over(self.decoder[m], samples[m].to(x.dtype)), x)
            for m, x in inputs.items()
        }
        seen = [means]
        if c.critic_input == "samples":
            again = range(c.critic_samples - 1)
            seen = [samples, *({m: sample_bernoulli(a, c.straight_through) for m, a in logits.items()} for _ in again)]
        bounds = []
        for values in seen:
            embedded = {m: _full(over(self.critic[m], v.to(image.dtype))) for m, v in values.items()}
            with torch.autocast(image.device.type, enabled=False):
                bounds.append(js_critic(embedded["image"], embedded["text"], marginals=c.marginals))
        terms["mi"] = torch.stack(bounds).mean()
        terms["skl"] = symmetrised_kl(logits["image"], logits["text"])
        # D gives logits: log D / (1 - D) is its output
        terms["ind"] = sum(
            (_full(self.discriminator[m](v.to(image.dtype))).mean() for m, v in means.items()),
            start=terms["mi"].new_zeros(()),
        )
        terms["bal"] = balance(means["image"]) + balance(means["text"])
        return terms, means

    def objective(self, terms: dict[str, Tensor]) -> Tensor:
        """Eq. 14 with its sign turned: what the encoder step minimises."""
        c = self.config
        reconstruction = terms["reconstruction_image"] + terms["reconstruction_text"]
        alignment = c.lambda_skl * terms["skl"] - c.lambda_mi * terms["mi"]
        properties = c.lambda_ind * terms["ind"] + c.lambda_bal * terms["bal"]
        return c.reconstruction_weight * reconstruction + alignment + properties

    def step(
        self,
        batch: Pairs,
        optimizers: dict[str, torch.optim.Optimizer],
        backward: Callable[[Tensor], None],
        progress: float,
    ) -> dict[str, Tensor]:
        """Encoders, decoders and critics with D frozen, then D on the means of the same pass."""
        assert isinstance(batch.text, Tensor)
        self.discriminator.requires_grad_(False)
        terms, means = self.terms(batch.image, batch.text)
        loss = self.objective(terms)
        optimizers["model"].zero_grad()
        backward(loss)
        self._clip(self.encoder, self.decoder, self.critic)
        optimizers["model"].step()
        self.discriminator.requires_grad_(True)

        log = {"loss": loss.detach(), **{name: term.detach() for name, term in terms.items()}}
        for m, v in means.items():
            on = v >= 0.5
            log[f"constant_bits_{m}"] = (on.all(dim=0) | ~on.any(dim=0)).sum().to(v.dtype)
        if self.config.lambda_ind > 0:
            fooled = [
                discriminator_loss(self.discriminator[m], v.detach().to(batch.image.dtype)) for m, v in means.items()
            ]
            optimizers["discriminator"].zero_grad()
            backward(fooled[0] + fooled[1])
            self._clip(self.discriminator)
            optimizers["discriminator"].step()
            log["discriminator"] = (fooled[0] + fooled[1]).detach()
        return log

    def validate(self, valid: Any) -> dict[str, float]:
        """mAP(all) of the validation split, and `valid_pairs`, which looks at no label and chooses the epoch.

        valid_pairs is the share of other items that lie farther from a query's code than its own partner does (of
        equals half), both ways: 0.5 at chance, 1 where every partner comes first.
        """
        codes = [(encode_all(self, m, getattr(valid, m)) >= 0).float() * 2 - 1 for m in MODALITIES]
        return super().validate(valid) | {"valid_pairs": partners_first(codes[0], codes[1])}

    def trouble(self, history: Sequence[Mapping[str, float]]) -> str | None:
        """Codes that die: bits equal for every row of a batch, or a critic at its floor for three epochs."""
        rows = [row for row in history if "constant_bits_image" in row][-3:]
        if len(rows) < 3:
            return None
        still = max(min(row[f"constant_bits_{m}"] for row in rows) for m in self.inputs)
        advice = "try another preset or none, a lower lr, or init he"
        if still >= max(1.0, self.config.bits / 4):
            return f"codes are dying: {still:.0f} of {self.config.bits} bits are the same for every row; {advice}"
        scores = [row["valid_map"] for row in history if math.isfinite(row.get("valid_map", math.nan))]
        learns = len(scores) > 1 and max(scores) > scores[0] + _RISE  # of the other losses: it can go well all the same
        if self.config.lambda_mi > 0 and not learns and max(row["mi"] for row in rows) < _MI_FLOOR:
            return (
                f"codes learn nothing in common: mutual information {rows[-1]['mi']:.2g}, the critic's floor; {advice}"
            )
        return None

    def encode(self, modality: Modality, features: Tensor) -> Tensor:
        """(N, D) raw features -> logits (N, bits); the code's bit is logit >= 0."""
        return self.encoder[modality](self.inputs[modality](features))

    def _clip(self, *networks: nn.Module) -> None:
        if self.config.clip_norm > 0:
            for network in networks:
                self.ranks.average(network.parameters())
                nn.utils.clip_grad_norm_(network.parameters(), self.config.clip_norm)

    def _squared_error(self, decoded: Tensor, target: Tensor) -> Tensor:
        error = (_full(decoded) - target).square()
        if self.config.reconstruction == "sum":
            return error.sum(dim=1).mean()
        return error.mean() * (self.config.bits if self.config.reconstruction == "bits" else 1)


def partners_first(image: Tensor, text: Tensor) -> float:
    """Of codes (N, L) in -1, 1: the share of other items that are less alike than the partner, of equals half."""
    alike = image @ text.T
    own, others = alike.diagonal(), len(alike) - 1
    shares = []
    for row in (alike, alike.T):
        less = (row < own[:, None]).sum(1) + ((row == own[:, None]).sum(1) - 1) / 2
        shares.append(float(less.double().mean()) / max(others, 1))
    return sum(shares) / 2


def mlp(inputs: int, hidden: int, outputs: int, activation: Callable[[], nn.Module]) -> nn.Sequential:
    """Two hidden layers of one width."""
    return nn.Sequential(
        nn.Linear(inputs, hidden), activation(), nn.Linear(hidden, hidden), activation(), nn.Linear(hidden, outputs)
    )


def _full(x: Tensor) -> Tensor:
    """Losses are computed in float32 at least, whatever the networks run in."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
