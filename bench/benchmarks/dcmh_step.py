"""One training step of DCMH, batch 128 against 10,000 buffered codes, 1,386 tags, against a plain port of its code.

The port is what the published code does, in eager torch: dense layers, the likelihood on the full 128 x 10,000 arrays
(softplus, so that it does not overflow), the labels' product for S, the column sums over all rows that are not in the
batch. Networks, weights and batch are the same, one step of both ends with the same weights (checked).
"""

import copy
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from cmr_fast.data.pairs import Pairs
from cmr_fast.methods.dcmh import DCMH, DCMHConfig, signs

from .common import Comparison, cost

BATCH, PAIRS, TAGS, FEATURES, CLASSES = 128, 10_000, 1386, 1024, 24


def config() -> DCMHConfig:
    return DCMHConfig(image_hidden=1024, image_input="raw")


def problem(count: int = PAIRS) -> tuple[DCMH, Pairs]:
    """Tags as sparse as MIR-Flickr's, some nine of an item."""
    torch.manual_seed(0)
    pairs = Pairs(
        torch.randn(count, FEATURES) / 32,
        (torch.rand(count, TAGS) < 9 / TAGS).float(),
        (torch.rand(count, CLASSES) < 0.12).to(torch.uint8),
    )
    model = DCMH(config(), (FEATURES,), TAGS, CLASSES)
    model.fit_inputs(pairs)
    model.begin_round(pairs, 0.0)
    return model.train(), pairs


def port(model: DCMH, pairs: Pairs) -> Callable[[Tensor], None]:
    """The published step: image network, then text network."""
    c = model.config
    codes = {"image": model.memory.image.clone(), "text": model.memory.text.clone()}
    b = signs(codes["image"] + codes["text"])
    bag = model.text_network[0]
    networks = {
        "image": model.image_network,
        "text": lambda x: model.text_network[2](F.relu(x @ bag.weight + bag.bias)),
    }
    steps = {
        "image": torch.optim.SGD(model.image_network.parameters(), c.lr),
        "text": torch.optim.SGD(model.text_network.parameters(), c.lr),
    }
    labels, count = pairs.labels.float(), len(pairs)

    def step(rows: Tensor) -> None:
        rest = torch.ones(count, dtype=torch.bool)
        rest[rows] = False
        for name, other in (("image", "text"), ("text", "image")):
            out = networks[name](getattr(pairs, name)[rows])
            codes[name][rows] = out.detach()
            share = (labels[rows] @ labels.T > 0).float()
            theta = 0.5 * out @ codes[other].T
            loss = (F.softplus(theta) - share * theta).sum() + c.gamma * (b[rows] - out).square().sum()
            loss = loss + c.eta * (out.sum(0) + codes[name][rest].sum(0)).square().sum()
            steps[name].zero_grad()
            (loss / (len(rows) * count)).backward()
            steps[name].step()

    return step


def ours(model: DCMH, pairs: Pairs) -> Callable[[Tensor], None]:
    optimizers = model.optimizers()
    return lambda rows: model.step(pairs.select(rows), optimizers, Tensor.backward, 0.0) and None


def comparison() -> Comparison:
    model, pairs = problem()
    twin = copy.deepcopy(model)
    mine, theirs = ours(model, pairs), port(twin, pairs)
    rows = torch.arange(BATCH)

    def check() -> None:
        one, same = problem(2000)
        other = copy.deepcopy(one)
        ours(one, same)(rows)
        port(other, same)(rows)
        for (name, a), b in zip(one.named_parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5, msg=name)

    return Comparison(
        name=f"DCMH step, batch {BATCH} against {PAIRS:,}, {FEATURES} features, {TAGS:,} tags",
        alternative="eager port of its code",
        ours=lambda: mine(rows),
        theirs=lambda: theirs(rows),
        check=check,
        work=1,
        unit="steps",
    )


def comparisons(quick: bool = False) -> list[Comparison]:
    return [comparison()]


class DcmhStep:
    """Lower is better: seconds, and our time as a share of the eager port's."""

    version = "1"
    timeout = 600

    def setup(self) -> None:
        model, self.pairs = problem()
        self.step = ours(model, self.pairs)

    def time_step(self) -> None:
        self.step(torch.arange(BATCH))

    def track_time_over_port(self) -> float:
        return cost(lambda: comparison())

    track_time_over_port.unit = "ours / eager port"
