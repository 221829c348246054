"""One training step of ACMR, batch 64, against a plain eager port of the paper on the same threads.

The port is what a reader of the paper writes first: Eq. 4-5 broadcast over every triplet, Eq. 7 as norms, a forward
pass for each update of Algorithm 1, torch's default Adam. Networks, weights and batch are the same, one step of both
ends with the same weights (checked without dropout, which draws its masks in another order). The limit is that of the
projectors' matrix products alone, which both sides make.
"""

import copy
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cmr_fast.data.pairs import Pairs
from cmr_fast.methods.acmr import ACMR, ACMRConfig

from .common import Comparison, cost

BATCH, CLASSES = 64, 10
WIDTHS = {"shallow": (128, 10), "deep": (4096, 3000)}  # image and text features of Wikipedia in the paper's Table 1


def config(**changes: float) -> ACMRConfig:
    """The paper's: k = 5, sums over triplets; inputs as they are."""
    return ACMRConfig(
        triplet_reduction="sum", alpha=0.01, beta=0.1, image_input="raw", text_input="raw", label_head="each", **changes
    )


def problem(features: str, settings: ACMRConfig) -> tuple[ACMR, Pairs]:
    torch.manual_seed(0)
    image, text = (torch.randn(BATCH, width) for width in WIDTHS[features])
    model = ACMR(settings, *WIDTHS[features], CLASSES)
    return model.train(), Pairs(image, text, torch.randint(0, CLASSES, (BATCH,)))


def triplet_term(anchors: Tensor, others: Tensor, labels: Tensor, margin: float, weight: float) -> Tensor:
    """Eq. 4 (and, the other way round, Eq. 5): a sum over all (B, B, B) triplets."""
    d = torch.cdist(anchors, others)
    alike = (labels[:, None] == labels).float()
    triplets = alike[:, :, None] * (1 - alike)[:, None, :]
    return (triplets * (d[:, :, None] + weight * F.relu(margin - d)[:, None, :])).sum()


def port(model: ACMR, c: ACMRConfig) -> Callable[[Pairs], None]:
    """Algorithm 1, eagerly, on the same modules."""
    image_net, text_net, classifier = model.image_projector, model.text_projector, model.modality_classifier
    heads = model.image_labels, model.text_labels
    embedding = [p for m in (image_net, text_net, *heads) for p in m.parameters()]
    first = torch.optim.Adam(embedding, c.learning_rate)
    second = torch.optim.Adam(classifier.parameters(), c.learning_rate * c.classifier_rate)

    def adversarial(image: Tensor, text: Tensor) -> Tensor:
        """Eq. 1."""
        on_image, on_text = classifier(image).log_softmax(1), classifier(text).log_softmax(1)
        return -(on_image[:, 0] + on_text[:, 1]).mean()

    def step(batch: Pairs) -> None:
        for _ in range(c.inner_steps):
            image, text = image_net(batch.image), text_net(batch.text)
            imi = triplet_term(image, text, batch.labels, c.margin, c.triplet_weight)
            imi = imi + triplet_term(text, image, batch.labels, c.margin, c.triplet_weight)
            imd = F.cross_entropy(heads[0](image), batch.labels) + F.cross_entropy(heads[1](text), batch.labels)
            reg = sum(m.weight.norm() for net in (image_net, text_net) for m in net if isinstance(m, nn.Linear))
            loss = c.alpha * imi + c.beta * imd + c.reg * reg - c.adversary * adversarial(image, text)
            first.zero_grad()
            loss.backward()
            first.step()
        second.zero_grad()
        adversarial(image_net(batch.image).detach(), text_net(batch.text).detach()).backward()
        second.step()

    return step


def ours(model: ACMR) -> Callable[[Pairs], None]:
    optimizers = model.optimizers()
    return lambda batch: model.step(batch, optimizers, Tensor.backward, 0.0) and None


def products(features: str, c: ACMRConfig) -> float:
    """Steps a second if there were nothing but the projectors' products: k times forward and backward, and forward."""
    sides = []
    for width, hidden in zip(WIDTHS[features], (c.image_hidden, c.text_hidden), strict=True):
        x, h, out = (torch.randn(BATCH, n) for n in (width, hidden, c.dim))
        sides.append((x, h, out, torch.randn(hidden, width), torch.randn(c.dim, hidden)))
    start = time.perf_counter()
    for number in range(c.inner_steps + 1):
        for x, h, out, first, second in sides:
            x @ first.T, h @ second.T
            if number < c.inner_steps:
                out.T @ h, out @ second, h.T @ x
    return 1 / (time.perf_counter() - start)


def comparison(features: str) -> Comparison:
    c = config()
    model, batch = problem(features, c)
    twin = copy.deepcopy(model)
    for network in (twin.image_projector, twin.text_projector):  # the port draws its masks as torch does
        for place, layer in enumerate(network):
            if isinstance(layer, nn.Dropout):
                network[place] = nn.Dropout(layer.p)
    mine, theirs = ours(model), port(twin, c)

    def check() -> None:
        calm = config(dropout=0.0)
        one, same = problem(features, calm)
        other = copy.deepcopy(one)
        ours(one)(same)
        port(other, calm)(same)
        for (name, a), b in zip(one.named_parameters(), other.parameters(), strict=True):
            # Adam moves a weight by the learning rate times a sign where the gradient is next to nothing
            apart = ((a - b).abs() > 1e-2 * c.learning_rate * c.inner_steps).float().mean()
            assert apart < 1e-3, f"{name}: {apart:.1%} of the weights moved otherwise"

    return Comparison(
        name=f"ACMR step, batch {BATCH}, k = {c.inner_steps}, {features} features {WIDTHS[features]}",
        alternative="eager port of the paper",
        ours=lambda: mine(batch),
        theirs=lambda: theirs(batch),
        check=check,
        limit=lambda: products(features, c),
        work=1,
        unit="steps",
    )


def comparisons(quick: bool = False) -> list[Comparison]:
    return [comparison("shallow")] if quick else [comparison("shallow"), comparison("deep")]


class AcmrStep:
    """Lower is better: seconds, and our time as a share of the eager port's."""

    version = "1"
    params = (tuple(WIDTHS),)
    param_names = ("features",)
    timeout = 600

    def setup(self, features: str) -> None:
        model, self.batch = problem(features, config())
        self.step = ours(model)

    def time_step(self, features: str) -> None:
        self.step(self.batch)

    def track_time_over_port(self, features: str) -> float:
        return cost(lambda: comparison(features))

    track_time_over_port.unit = "ours / eager port"
