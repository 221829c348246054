"""One training step of Feature Scattering, batch 60, on the same network as

Madry      one step of PGD-7 training by the same trainer. Seven times the perturbation, divided by 3.5: the step of
           Feature Scattering should cost at most 1.3 of that, so Madry / ours should be 2.69 or more
the paper  the authors' step as their code has it, ported to today's torch: a copy of the network for every batch,
           .backward() through its weights too, Sinkhorn's iterations unrolled with a wait for the host in each
"""

import copy
from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from cmr_fast.data.images import Images
from cmr_fast.methods.scatter import Scatter, ScatterConfig

from .common import Comparison, cost

BATCH, CLASSES = 60, 10
NETS = {"WRN-10-1": (10, 1), "WRN-10-2": (10, 2), "WRN-16-4": (16, 4)}


def batch() -> Images:
    random = torch.Generator().manual_seed(0)
    image = torch.randint(0, 256, (BATCH, 3, 32, 32), generator=random).to(torch.uint8)
    return Images(image, torch.randint(0, CLASSES, (BATCH,), generator=random))


def trainer(net: str, **changes: object) -> Scatter:
    torch.manual_seed(0)
    depth, width = NETS[net]
    return Scatter(replace(ScatterConfig(depth=depth, width=width), **changes), CLASSES).train()


def stepper(model: Scatter, images: Images, bf16: bool) -> Callable[[], object]:
    optimizers = model.optimizers()

    def step() -> object:
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            return model.step(images, optimizers, Tensor.backward, 0.1)

    return step


def port(model: Scatter, images: Images) -> Callable[[], object]:
    """attack_feature_scatter.py's step, on [0, 1] and without its pickling (a deep copy is cheaper)."""
    c = model.config
    optimizer = torch.optim.SGD(model.parameters(), 0.01, c.momentum, weight_decay=c.weight_decay)

    def transport(clean: Tensor, moved: Tensor) -> Tensor:
        a, b = F.normalize(clean, dim=1), F.normalize(moved, dim=1)
        cost = F.relu(1 - (a[:, None] * b[None, :]).sum(2))
        n = len(cost)
        u = v = torch.zeros(n)
        mass = torch.full((n,), 1 / n)

        def lse(x: Tensor) -> Tensor:
            return torch.log(torch.exp(x).sum(1) + 1e-6)

        def scaled() -> Tensor:
            return (-cost + u[:, None] + v[None, :]) / 0.01

        for _ in range(100):
            before = u
            u = 0.01 * (torch.log(mass) - lse(scaled())) + u
            v = 0.01 * (torch.log(mass) - lse(scaled().t())) + v
            if (u - before).abs().sum().item() < 0.1:
                break
        return (torch.exp(scaled()) * cost).sum()

    def step() -> object:
        x, y = images.pixels(), images.labels
        attacked = copy.deepcopy(model).eval()
        moved = (x + c.eps * (2 * torch.rand_like(x) - 1)).requires_grad_()
        clean = attacked(x)
        distance = transport(clean, attacked(moved))
        attacked.zero_grad()
        distance.backward()
        assert moved.grad is not None
        moved = torch.min(torch.max(moved + c.alpha * moved.grad.sign(), x - c.eps), x + c.eps).clamp(0, 1).detach()
        target = torch.full((BATCH, CLASSES), c.smoothing / (CLASSES - 1)).scatter(1, y[:, None], 1 - c.smoothing)
        loss = -(target * F.log_softmax(model(moved), dim=1)).sum(1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss

    return step


def comparison(net: str, against: str, bf16: bool = False) -> Comparison:
    images = batch()
    model = trainer(net)
    if against == "Madry":
        theirs = stepper(trainer(net, perturb="madry", steps=7, alpha=2 / 255, smoothing=0.0), images, bf16)
    else:
        theirs = port(trainer(net), images)

    def check() -> None:
        logged = stepper(trainer(net), images, bf16)()
        assert torch.isfinite(logged["loss"])

    return Comparison(
        name=f"Feature Scattering step, {net}, batch {BATCH}, {'bf16' if bf16 else 'fp32'}",
        alternative="Madry's PGD-7 step" if against == "Madry" else "port of the authors' step",
        ours=stepper(model, images, bf16),
        theirs=theirs,
        check=check,
        work=1,
        unit="steps",
    )


def comparisons(quick: bool = False) -> list[Comparison]:
    if quick:
        return [comparison("WRN-10-1", against) for against in ("Madry", "paper")]
    return [
        *(comparison(net, against) for net in NETS for against in ("Madry", "paper")),
        comparison("WRN-10-2", "Madry", bf16=True),
    ]


class ScatterStep:
    """Lower is better: seconds, and our step as a share of Madry's / 3.5 (the aim is at most 1.3)."""

    version = "1"
    timeout = 600

    def setup(self) -> None:
        self.step = stepper(trainer("WRN-10-1"), batch(), bf16=False)

    def time_step(self) -> None:
        self.step()

    def track_time_over_madry(self) -> float:
        return 3.5 * cost(lambda: comparison("WRN-10-1", "Madry"))

    track_time_over_madry.unit = "ours / (Madry's / 3.5)"
