"""ACMR: Adversarial Cross-Modal Retrieval (Wang, Yang, Xu, Hanjalic, Shen; ACM Multimedia 2017)."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cmr_fast.data.pairs import PairedDataset, Pairs
from cmr_fast.errors import InputError
from cmr_fast.losses import acmr_triplet, frobenius, gradient_reversal
from cmr_fast.methods._settings import check_choices, check_finite, check_kinds, check_least
from cmr_fast.methods.grid import GridSearch, grid_search
from cmr_fast.methods.method import Retriever, RunConfig
from cmr_fast.methods.scaling import InputScaling, Scaling
from cmr_fast.modalities import Modality

PAPER_GRID = (0.01, 0.1, 1.0, 10.0, 100.0)


@dataclass(frozen=True)
class ACMRConfig:
    """ACMR's settings. A field that names no section is one on which the paper is silent; it was set by validation."""

    epochs: int = 200
    """Passes over the training split (Fig. 5 plots 200); validation may stop earlier."""
    batch_size: int = 64
    """Pairs a batch (4.1.2)."""
    dim: int = 200
    """Width of the common subspace (4.1.2)."""
    image_hidden: int = 2000
    """Hidden units of the image projector, V -> 2000 -> 200 (4.1.2)."""
    text_hidden: int = 500
    """Hidden units of the text projector, T -> 500 -> 200 (4.1.2)."""
    modality_hidden: int = 50
    """Hidden units of the modality classifier, f -> 50 -> 2 (4.1.2)."""
    alpha: float = 1.0
    """Weight of the inter-modal invariance loss (Eq. 8), from 4.1.2's grid by validation on Wikipedia, as beta is. The
    losses here are means; the paper's sums over triplets were best with alpha and beta in [0.01, 0.1] (4.3.4)."""
    beta: float = 10.0
    """Weight of the intra-modal discrimination loss (Eq. 8)."""
    terms: Literal["full", "imi", "imd"] = "full"
    """Table 5: full ACMR, or with the inter-modal invariance (imi) or intra-modal discrimination (imd) term only."""
    inner_steps: int = 5
    """k of Algorithm 1: updates of projectors and label classifier for one of the modality classifier (4.1.2)."""
    adversary: float = 1.0
    """Scale of the gradient reversal: weight of -L_adv in the projectors' objective (Eq. 9); 0 is no adversary."""
    adversary_schedule: Literal["constant", "ganin"] = "constant"
    """constant as in the paper; ganin multiplies by 2 / (1 + exp(-10 progress)) - 1, as the authors' code does."""
    classifier_rate: float = 0.05
    """lambda of Algorithm 1, line 8 (4.1.2): the modality classifier's learning rate over the projectors'."""
    triplet_weight: float = 0.05
    """lambda of Eq. 4-5 (4.1.2): weight of the hinge on irrelevant pairs."""
    margin: float = 10.0
    """mu of Eq. 4-5: irrelevant pairs are pushed this far apart (the subspace is 28 across)."""
    triplet_reduction: Literal["sum", "mean"] = "mean"
    """sum over all triplets as Eq. 4-5 are printed, or the mean per anchor, which does not grow with the batch."""
    reg: float = 1.0
    """Weight of L_reg (Eq. 7-8)."""
    reg_squared: bool = False
    """Square the Frobenius norms of Eq. 7, which are printed without a square."""
    label_head: Literal["shared", "each"] = "shared"
    """One label classifier for both modalities, as in the authors' code, or one on top of each projector; 3.4.1 can be
    read both ways. A shared one ties the two halves of the subspace together."""
    label_smoothing: float = 0.0
    """Share of the label's mass spread over all classes."""
    learning_rate: float = 3e-5
    """Adam's learning rate (3.5 names Adam, no rate)."""
    text_rate: float = 1.0
    """The text side's learning rate over the image side's: its few inputs learn slower and overfit later."""
    image_weight_decay: float = 0.0
    """Adam's L2 penalty on the image projector and its label classifier, beside L_reg."""
    text_weight_decay: float = 0.0
    """Adam's L2 penalty on the text projector and its label classifier, beside L_reg."""
    dropout: float = 0.3
    """Dropout on the projectors' hidden layers (4.2 mentions dropout, no rate)."""
    similarity: Literal["cosine", "ip", "labels"] = "cosine"
    """How pairs are ranked: cosine or inner product in the common subspace, or labels: the probability that two items
    have the same label, which is the inner product of their predicted label distributions."""
    image_input: Scaling = "standard"
    """Scaling of image features: raw, standard, hellinger or chi2."""
    text_input: Scaling = "standard"
    """Scaling of text features: raw, standard, hellinger or chi2."""

    def __post_init__(self) -> None:
        check_kinds(self)
        whole = ("epochs", "dim", "image_hidden", "text_hidden", "modality_hidden", "inner_steps")
        check_least(self, **dict.fromkeys(whole, 1), batch_size=2)
        check_finite(self, "alpha", "beta", "adversary", "triplet_weight", "margin", "reg")
        check_finite(self, "image_weight_decay", "text_weight_decay")
        for name in ("learning_rate", "text_rate", "classifier_rate"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) > 0):
                raise InputError(f"{name} must be finite and above 0, got {getattr(self, name)}")
        for name in ("dropout", "label_smoothing"):
            if not 0 <= getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 0 and below 1, got {getattr(self, name)}")
        check_choices(
            self,
            terms=("full", "imi", "imd"),
            adversary_schedule=("constant", "ganin"),
            triplet_reduction=("sum", "mean"),
            label_head=("shared", "each"),
            similarity=("cosine", "ip", "labels"),
        )


# Chosen by validation mAP on held-out fifths of the training split (bench/experiments/acmr_wikipedia.py); what is not
# named is the default. One inner step in place of the paper's five costs a fifth.
_WIKIPEDIA = ACMRConfig(
    alpha=1.0,
    beta=10.0,
    adversary=3.0,
    inner_steps=1,
    learning_rate=2e-4,
    text_rate=5.0,
    dropout=0.3,
    image_weight_decay=0.5,
    image_input="chi2",
    text_input="hellinger",
)


class ACMR(Retriever):
    """Two projectors into one subspace, a modality classifier that they learn to confuse, and label classifiers."""

    name = "acmr"
    Config: ClassVar[type[Any]] = ACMRConfig
    presets: ClassVar[dict[str, Any]] = {
        "wikipedia": _WIKIPEDIA,
        "wikipedia-tfidf": replace(_WIKIPEDIA, text_rate=1.0),
    }
    preset_data: ClassVar[dict[str, str]] = dict.fromkeys(presets, "wikipedia")

    def __init__(self, config: ACMRConfig, image_dim: int, text_dim: int, num_classes: int) -> None:
        super().__init__(config, image_dim, text_dim, num_classes)
        self.metric = "cosine" if config.similarity == "cosine" else "ip"
        self.image_scaling = InputScaling(config.image_input, image_dim)
        self.text_scaling = InputScaling(config.text_input, text_dim)
        self.image_projector = _projector(self.image_scaling.out_dim, config.image_hidden, config)
        self.text_projector = _projector(self.text_scaling.out_dim, config.text_hidden, config)
        self.image_labels = nn.Linear(config.dim, num_classes)
        self.text_labels = self.image_labels if config.label_head == "shared" else nn.Linear(config.dim, num_classes)
        self.modality_classifier = nn.Sequential(
            nn.Linear(config.dim, config.modality_hidden), nn.Tanh(), nn.Linear(config.modality_hidden, 2)
        )

    def fit_inputs(self, train: Pairs) -> None:
        """Fit the scalings on the training split; labels are not looked at."""
        self.image_scaling.fit(train.image)
        self.text_scaling.fit(cast(Tensor, train.text))

    def project(self, pairs: Pairs) -> tuple[Tensor, Tensor]:
        """f_V(image), f_T(text): features of both modalities -> (N, 200) each."""
        return self._project(*self._scale(pairs))

    def _scale(self, pairs: Pairs) -> tuple[Tensor, Tensor]:
        return self.image_scaling(pairs.image), self.text_scaling(pairs.text)

    def _project(self, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        return self.image_projector(image), self.text_projector(text)

    def encode(self, modality: Modality, features: Tensor) -> Tensor:
        """(N, dim) features -> (N, 200) in the common subspace, or (N, C) label distributions if those are compared."""
        scaling, projector, head = (
            (self.image_scaling, self.image_projector, self.image_labels)
            if modality == "image"
            else (self.text_scaling, self.text_projector, self.text_labels)
        )
        projected = projector(scaling(features))
        return head(projected).softmax(dim=1) if self.config.similarity == "labels" else projected

    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        """embedding: theta_V, theta_T and theta_imd of Algorithm 1; modality: theta_D."""
        c = self.config
        image = [*self.image_projector.parameters(), *self.image_labels.parameters()]
        text = [*self.text_projector.parameters()]
        if self.text_labels is not self.image_labels:
            text += self.text_labels.parameters()
        groups = [
            {"params": image, "lr": c.learning_rate, "weight_decay": c.image_weight_decay},
            {"params": text, "lr": c.learning_rate * c.text_rate, "weight_decay": c.text_weight_decay},
        ]
        return {
            "embedding": torch.optim.Adam(groups, fused=True),
            "modality": torch.optim.Adam(
                self.modality_classifier.parameters(), c.learning_rate * c.classifier_rate, fused=True
            ),
        }

    def label_loss(self, image: Tensor, text: Tensor, labels: Tensor) -> Tensor:
        """L_imd (Eq. 2) of projected features: softmax cross-entropy of both modalities, mean over pairs.

        A multi-hot row y counts as the distribution y / sum(y); a row without labels counts nothing.
        """
        if labels.ndim == 1:
            target = labels
        else:
            target = labels.to(image.dtype)
            target = target / target.sum(1, keepdim=True).clamp(min=1)
        smoothing = self.config.label_smoothing
        on_image = F.cross_entropy(self.image_labels(image), target, label_smoothing=smoothing)
        return on_image + F.cross_entropy(self.text_labels(text), target, label_smoothing=smoothing)

    def adversarial_loss(self, image: Tensor, text: Tensor, reversal: float) -> Tensor:
        """L_adv (Eq. 1) behind gradient reversal: modality cross-entropy, both modalities, mean over pairs."""
        both = gradient_reversal(torch.cat([image, text]), reversal)
        modality = torch.arange(2, device=both.device).repeat_interleave(len(image))
        return 2 * F.cross_entropy(self.modality_classifier(both), modality)

    def embedding_loss(self, image: Tensor, text: Tensor, labels: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """L_emb (Eq. 8) of projected features, and its unweighted terms by name."""
        c = self.config
        terms: dict[str, Tensor] = {}
        if c.terms != "imd":
            terms["imi_loss"] = acmr_triplet(image, text, labels, c.margin, c.triplet_weight, c.triplet_reduction)
        if c.terms != "imi":
            terms["imd_loss"] = self.label_loss(image, text, labels)
        if c.reg:
            layers = [m for net in (self.image_projector, self.text_projector) for m in net if isinstance(m, nn.Linear)]
            terms["reg_loss"] = frobenius([layer.weight for layer in layers], squared=c.reg_squared)
        weights = {"imi_loss": c.alpha, "imd_loss": c.beta, "reg_loss": c.reg}
        return sum(weights[name] * value for name, value in terms.items()), terms

    def step(
        self,
        batch: Pairs,
        optimizers: dict[str, torch.optim.Optimizer],
        backward: Callable[[Tensor], None],
        progress: float,
    ) -> dict[str, Tensor]:
        """Algorithm 1 on one batch."""
        c = self.config
        reversal = c.adversary
        if c.adversary_schedule == "ganin":
            reversal *= 2 / (1 + math.exp(-10 * progress)) - 1
        scaled = self._scale(batch)
        for _ in range(c.inner_steps):  # lines 1-6
            image, text = self._project(*scaled)
            embedding, terms = self.embedding_loss(image, text, batch.labels)
            loss = embedding
            if c.adversary:
                loss = loss + self.adversarial_loss(image, text, reversal)
            optimizers["embedding"].zero_grad()
            backward(loss)
            optimizers["embedding"].step()
        logged = {"embedding_loss": embedding} | terms
        if c.adversary:  # lines 7-8
            with torch.no_grad():
                image, text = self._project(*scaled)
            optimizers["modality"].zero_grad()
            logged["adversarial_loss"] = self.adversarial_loss(image, text, reversal=0.0)
            backward(logged["adversarial_loss"])
            optimizers["modality"].step()
        return {name: value.detach() for name, value in logged.items()}


def _projector(inputs: int, hidden: int, config: ACMRConfig) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(inputs, hidden), nn.Tanh(), nn.Dropout(config.dropout), nn.Linear(hidden, config.dim), nn.Tanh()
    )


def select(
    dataset: PairedDataset,
    run: RunConfig,
    config: ACMRConfig | None = None,
    *,
    alphas: Sequence[float] = PAPER_GRID,
    betas: Sequence[float] = PAPER_GRID,
    **others: Sequence[Any],
) -> GridSearch:
    """The grid of 4.1.2 over alpha and beta (and any other field), chosen by the validation split, never on test.

    Writes one run a combination and the table grid.csv and grid.md under `run.out`; see `grid_search`.
    """
    return grid_search(ACMR, config or ACMRConfig(), {"alpha": alphas, "beta": betas} | others, dataset, run)
