"""ACMR: Adversarial Cross-Modal Retrieval (Wang, Yang, Xu, Hanjalic, Shen; ACM Multimedia 2017)."""

import math
from collections.abc import Callable, Mapping, Sequence
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
SIMILARITIES = ("cosine", "ip", "labels")


@dataclass(frozen=True)
class ACMRConfig:
    """ACMR's settings. A field that names no section is one on which the paper is silent.

    Its value is ours, the same for all data; of the data at hand validation chooses the similarity (where it is `auto`)
    and the epoch.
    """

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
    losses here are means; the paper has sums over triplets, and alpha and beta best in [0.01, 0.1] on deep features
    (4.3.4, whose text has the two the other way round than Eq. 8)."""
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
    """lambda of Algorithm 1, line 8 (4.1.2): the modality classifier's learning rate over the image side's."""
    triplet_weight: float = 0.05
    """lambda of Eq. 4-5 (4.1.2): weight of the hinge on irrelevant pairs."""
    margin: float = 10.0
    """mu of Eq. 4-5: irrelevant pairs are pushed this far apart (the subspace is 28 across)."""
    triplet_reduction: Literal["sum", "mean"] = "mean"
    """sum over all triplets as Eq. 4-5 are printed, or the mean per anchor, which does not grow with the batch."""
    reg: float = 0.1
    """Weight of L_reg (Eq. 7-8; no value is given)."""
    reg_squared: bool = False
    """Square the Frobenius norms of Eq. 7, which are printed without a square."""
    label_head: Literal["shared", "each"] = "shared"
    """One label classifier for both modalities, as in the authors' code, or one on top of each projector; 3.4.1 can be
    read both ways. A shared one ties the two halves of the subspace together."""
    label_smoothing: float = 0.0
    """Share of the label's mass spread over all classes."""
    learning_rate: float = 2e-4
    """Adam's learning rate (3.5 names Adam, no rate)."""
    text_rate: float = 1.0
    """The text side's learning rate over the image side's: its few inputs learn slower and overfit later."""
    image_weight_decay: float = 0.0
    """Adam's L2 penalty on the image projector and its label classifier, beside L_reg."""
    text_weight_decay: float = 0.0
    """Adam's L2 penalty on the text projector and its label classifier, beside L_reg."""
    dropout: float = 0.3
    """Dropout on the projectors' hidden layers (4.2 mentions dropout, no rate)."""
    similarity: Literal["auto", "cosine", "ip", "labels"] = "auto"
    """How pairs are ranked (4.1.3 does not say): cosine or inner product in the common subspace, or labels: the
    probability that two items have the same label, which is the inner product of their predicted label distributions.
    auto: the one with the highest validation mAP, epoch by epoch (a refit keeps that of the epoch that it trains to);
    labels where there is no validation split."""
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
            similarity=("auto", *SIMILARITIES),
        )
        if self.terms == "imi" and self.similarity == "labels":
            raise InputError(
                "terms imi trains no label classifier, so similarity labels would rank by a random one; expected auto, "
                "cosine or ip"
            )


# As printed where something is: triplets summed (Eq. 4-5), one point of 4.3.4's region of alpha and beta (of deep
# features; 4.1.2 chose a pair a data set), the subspace itself compared, though 4.1.3 does not say by what. Rate,
# margin, dropout, scaling and weight of L_reg are ours.
_PAPER = ACMRConfig(alpha=0.1, beta=0.1, triplet_reduction="sum", similarity="cosine", reg=1.0)

# Chosen by validation mAP on held-out fifths of the training split (bench/experiments/acmr_wikipedia.py); what is not
# named is the default. One inner step in place of the paper's five costs a fifth.
_WIKIPEDIA = ACMRConfig(
    similarity="cosine",
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
    reg=1.0,
)


class ACMR(Retriever):
    """Two projectors into one subspace, a modality classifier that they learn to confuse, and label classifiers."""

    name = "acmr"
    Config: ClassVar[type[Any]] = ACMRConfig
    presets: ClassVar[dict[str, Any]] = {
        "paper": _PAPER,
        "wikipedia": _WIKIPEDIA,
        "wikipedia-tfidf": replace(_WIKIPEDIA, text_rate=1.0),
    }
    preset_data: ClassVar[dict[str, str]] = {"wikipedia": "wikipedia", "wikipedia-tfidf": "wikipedia"}
    observed = ("probe_accuracy",)
    # 4.2 names early stopping, neither what it watches nor how long: the default run's. The tables' presets:
    preset_protocols: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "wikipedia": {"valid_fraction": 0.2, "patience": 6},
        "wikipedia-tfidf": {"valid_fraction": 0.2, "patience": 6},
    }
    ranking: Tensor

    def __init__(self, config: ACMRConfig, image_dim: int, text_dim: int, num_classes: int) -> None:
        super().__init__(config, image_dim, text_dim, num_classes)
        if config.similarity == "auto":
            self.register_buffer("ranking", torch.tensor(len(self.candidates) - 1))  # of candidates, by validation
        self.image_scaling = InputScaling(config.image_input, image_dim)
        self.text_scaling = InputScaling(config.text_input, text_dim)
        self.image_projector = _projector(self.image_scaling.out_dim, config.image_hidden, config)
        self.text_projector = _projector(self.text_scaling.out_dim, config.text_hidden, config)
        self.image_labels = nn.Linear(config.dim, num_classes)
        self.text_labels = self.image_labels if config.label_head == "shared" else nn.Linear(config.dim, num_classes)
        self.modality_classifier = _modality_classifier(config)

    @property
    def candidates(self) -> tuple[str, ...]:
        """The similarities that `auto` chooses from."""
        return SIMILARITIES[:2] if self.config.terms == "imi" else SIMILARITIES

    @property
    def similarity(self) -> str:
        """How pairs are ranked: the config's, or what validation has chosen so far."""
        chosen: str = self.config.similarity
        return self.candidates[int(self.ranking)] if chosen == "auto" else chosen

    @property
    def metric(self) -> str:  # type: ignore[override]
        """What embeddings are compared by."""
        return "cosine" if self.similarity == "cosine" else "ip"

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

    def _projected(self, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        """Of a batch, each rank its rows."""
        return self.ranks.over(self.image_projector, image), self.ranks.over(self.text_projector, text)

    def encode(self, modality: Modality, features: Tensor) -> Tensor:
        """(N, dim) features -> (N, 200) in the common subspace, or (N, C) label distributions if those are compared."""
        projected = self.subspace(modality, features)
        head = self.image_labels if modality == "image" else self.text_labels
        return head(projected).softmax(dim=1) if self.similarity == "labels" else projected

    def subspace(self, modality: Modality, features: Tensor) -> Tensor:
        """(N, dim) features -> (N, 200) in the common subspace, whatever pairs are ranked by."""
        if modality == "image":
            return cast(Tensor, self.image_projector(self.image_scaling(features)))
        return cast(Tensor, self.text_projector(self.text_scaling(features)))

    def validate(self, valid: Any) -> dict[str, float]:
        """mAP(all) of the validation split by the similarity that is best there, and a fresh probe's accuracy."""
        scores = {}
        for number, name in enumerate(self.candidates if self.config.similarity == "auto" else (self.similarity,)):
            if self.config.similarity == "auto":
                self.ranking.fill_(number)
            scores[name] = super().validate(valid)
        best = max(scores, key=lambda name: scores[name]["valid_map"])
        if self.config.similarity == "auto":
            self.ranking.fill_(self.candidates.index(best))
        return {"probe_accuracy": self.probe(valid)} | scores[best]

    def settled(self) -> ACMRConfig:
        """The config with the similarity that validation chose in place of auto."""
        return cast(ACMRConfig, replace(self.config, similarity=self.similarity))

    def test(self, dataset: Any) -> dict[str, Any]:
        """mAP of the query and database splits; how pairs were ranked; who can tell the modality of the queries."""
        split = dataset.query
        told: dict[str, float] = {"classifier_accuracy": self._told(split), "probe_accuracy": self.probe(split)}
        return super().test(dataset) | {"similarity": self.similarity, "modality": told}

    def _embedded(self, pairs: Pairs) -> tuple[Tensor, Tensor]:
        """(2N, dim) projections in eval mode, images before texts, and their modalities (2N,)."""
        was, weight = self.training, next(self.parameters())
        self.eval()
        with torch.no_grad():
            both = torch.cat(self.project(pairs.to(weight.device, weight.dtype)))
        self.train(was)
        return both, _modalities(len(pairs), both.device)

    def _told(self, pairs: Pairs) -> float:
        """The modality classifier's accuracy."""
        both, modality = self._embedded(pairs)
        with torch.no_grad():
            return float((self.modality_classifier(both).argmax(dim=1) == modality).double().mean())

    def probe(self, pairs: Pairs, steps: int = 100) -> float:
        """Accuracy of a new modality classifier, trained on the pairs of even number, on those of odd number.

        0.5 where the modalities cannot be told apart. It has D's shape and takes `steps` of Adam (rate 0.01) on the
        whole; what it shows is the modality gap that is there, whatever D has learnt.
        """
        both, modality = self._embedded(pairs)
        even = torch.arange(len(pairs), device=both.device).remainder(2).eq(0).repeat(2)
        if bool(even.all()):
            return math.nan
        with torch.random.fork_rng(devices=[both.device] if both.is_cuda else []):
            torch.manual_seed(0)
            network = _modality_classifier(self.config).to(both.device, both.dtype)
        optimizer = torch.optim.Adam(network.parameters(), 0.01)
        for _ in range(steps):
            optimizer.zero_grad()
            with torch.enable_grad():
                F.cross_entropy(network(both[even]), modality[even]).backward()
            optimizer.step()
        with torch.no_grad():
            return float((network(both[~even]).argmax(dim=1) == modality[~even]).double().mean())

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
        return self._adversarial(image, text, reversal)[0]

    def _adversarial(self, image: Tensor, text: Tensor, reversal: float) -> tuple[Tensor, Tensor]:
        """L_adv, and the modality classifier's accuracy."""
        logits = self.modality_classifier(gradient_reversal(torch.cat([image, text]), reversal))
        modality = _modalities(len(image), logits.device)
        told = (logits.detach().argmax(dim=1) == modality).to(logits.dtype).mean()
        return 2 * F.cross_entropy(logits, modality), told

    def embedding_loss(self, image: Tensor, text: Tensor, labels: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """L_emb (Eq. 8) of projected features, and its unweighted terms by name."""
        c = self.config
        loss, terms = self._data_loss(image, text, labels)
        if c.reg:
            terms["reg_loss"] = frobenius(self._weights(), squared=c.reg_squared)
            loss = loss + c.reg * terms["reg_loss"]
        return loss, terms

    def _data_loss(self, image: Tensor, text: Tensor, labels: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """L_emb without L_reg."""
        c = self.config
        terms: dict[str, Tensor] = {}
        if c.terms != "imd":
            terms["imi_loss"] = acmr_triplet(image, text, labels, c.margin, c.triplet_weight, c.triplet_reduction)
        if c.terms != "imi":
            terms["imd_loss"] = self.label_loss(image, text, labels)
        weights = {"imi_loss": c.alpha, "imd_loss": c.beta}
        return cast(Tensor, sum(weights[name] * value for name, value in terms.items())), terms

    def _weights(self) -> list[Tensor]:
        """What L_reg (Eq. 7) is of."""
        networks = self.image_projector, self.text_projector
        return [layer.weight for network in networks for layer in network if isinstance(layer, nn.Linear)]

    @torch.no_grad()
    def _regularize(self) -> Tensor:
        """Add the gradient of reg L_reg to the weights' gradients, in one pass over each, and return L_reg."""
        c, weights = self.config, self._weights()
        norms = torch.stack(torch._foreach_norm(weights))
        scales = 2 * torch.ones_like(norms) if c.reg_squared else norms.reciprocal().masked_fill(norms == 0, 0)
        for weight, scale in zip(weights, (c.reg * scales).unbind(), strict=True):
            cast(Tensor, weight.grad).addcmul_(weight, scale)
        return (norms.square() if c.reg_squared else norms).sum()

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
            image, text = self._projected(*scaled)
            embedding, terms = self._data_loss(image, text, batch.labels)
            loss = embedding
            if c.adversary:
                loss = loss + self.adversarial_loss(image, text, reversal)
            optimizers["embedding"].zero_grad()
            backward(loss)
            if c.reg:  # by hand: autograd would write and then add a tensor of each weight's size
                terms["reg_loss"] = self._regularize()
                embedding = embedding.detach() + c.reg * terms["reg_loss"]
            optimizers["embedding"].step()
        logged = {"embedding_loss": embedding} | terms
        if c.adversary:  # lines 7-8
            with torch.no_grad():
                image, text = self._projected(*scaled)
            optimizers["modality"].zero_grad()
            loss, logged["modality_accuracy"] = self._adversarial(image, text, reversal=0.0)
            logged["adversarial_loss"] = loss
            backward(loss)
            optimizers["modality"].step()
        return {name: value.detach() for name, value in logged.items()}


def _modalities(pairs: int, device: torch.device) -> Tensor:
    return torch.arange(2, device=device).repeat_interleave(pairs)


def _modality_classifier(config: ACMRConfig) -> nn.Sequential:
    return nn.Sequential(nn.Linear(config.dim, config.modality_hidden), nn.Tanh(), nn.Linear(config.modality_hidden, 2))


class _Dropout(nn.Dropout):
    """Dropout whose masks are uniform numbers at p or above: on a CPU a quarter of the time of torch's draws."""

    def forward(self, x: Tensor) -> Tensor:
        """x of any shape, entries set to 0 with probability p and the others divided by 1 - p; in training."""
        if not self.training or not self.p or x.is_cuda:
            return super().forward(x)
        mask = torch.rand(x.shape, device=x.device).ge_(self.p).div_(1 - self.p)
        return x * mask.to(x.dtype)


def _projector(inputs: int, hidden: int, config: ACMRConfig) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(inputs, hidden), nn.Tanh(), _Dropout(config.dropout), nn.Linear(hidden, config.dim), nn.Tanh()
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
