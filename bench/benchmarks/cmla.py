"""CMLA on features, 10 iterations of 256 pairs, against a port of the authors' loop on the same networks and threads.

Their loop runs one batch of 128 at a time, fetches perturbation and perturbed items to the host in every iteration,
and goes through the networks again for what it fetches and prints. The port does that in eager torch; ours is
compat="cmla", which takes the same steps (checked).
"""

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from cmr_fast.attacks import CMLA

from .common import Comparison, cost

PAIRS, STEPS, BITS, BATCH = 256, 10, 32, 128
EPS = {"image": 10.0, "text": 0.01}
LR = {"image": 0.5, "text": 0.002}
HIGH = {"image": 255.0, "text": 1.0}


def problem() -> tuple[dict[str, nn.Module], dict[str, Tensor], Tensor]:
    torch.manual_seed(0)
    networks = {
        name: nn.Sequential(nn.Linear(width, 1024), nn.ReLU(), nn.Linear(1024, BITS)).eval()
        for name, width in (("image", 1280), ("text", 1376))
    }
    with torch.no_grad():
        networks["image"][0].weight /= 64  # inputs go to 255
    inputs = {"image": 255 * torch.rand(PAIRS, 1280), "text": (torch.rand(PAIRS, 1376) < 0.01).float()}
    return networks, inputs, torch.arange(PAIRS) % 8


def objective(
    network: nn.Module, x: Tensor, noise: Tensor, high: float, other: Tensor, own: Tensor, share: Tensor
) -> tuple[Tensor, Tensor]:
    """J of the authors' code, and the perturbed inputs."""
    moved = x + noise
    moved = torch.where(
        (moved < 0) | (moved > high), moved.clamp(0, high), moved
    )  # TensorFlow's clip: slope 1 at bounds
    values = network(moved).tanh()
    inter, intra = values @ other.T, values @ own.T
    total = (share * inter + nn.functional.softplus(-inter)).mean() + (x - moved).abs().mean()
    return total + (nn.functional.softplus(intra) - share * intra).mean(), moved


def port(networks: dict[str, nn.Module], inputs: dict[str, Tensor], labels: Tensor) -> Callable[[], dict[str, Tensor]]:
    def attack() -> dict[str, Tensor]:
        kept = {name: x.clone().numpy() for name, x in inputs.items()}
        for start in range(0, PAIRS, BATCH):
            rows = slice(start, start + BATCH)
            share = (labels[rows, None] == labels[None, rows]).float()
            with torch.no_grad():
                codes = {n: torch.where(networks[n](x[rows]) >= 0, 1.0, -1.0) for n, x in inputs.items()}
            for name, other in (("text", "image"), ("image", "text")):
                x = inputs[name][rows]
                noise = torch.zeros_like(x, requires_grad=True)
                adam = torch.optim.Adam([noise], LR[name])
                loss = partial(objective, networks[name], x, noise, HIGH[name], codes[other], codes[name], share)

                for _ in range(STEPS):
                    adam.zero_grad()
                    loss()[0].backward()
                    adam.step()
                    with torch.no_grad():
                        noise.clamp_(0, EPS[name])
                        _, moved = loss()
                    kept[name][rows] = moved.numpy()
        return {name: torch.from_numpy(x) for name, x in kept.items()}

    return attack


def ours(networks: dict[str, nn.Module], inputs: dict[str, Tensor], labels: Tensor) -> Callable[[], Any]:
    atk = CMLA(
        (networks["image"], networks["text"]), steps=STEPS, compat="cmla", batch=BATCH, image_eps=EPS["image"],
        text_eps=EPS["text"], image_lr=LR["image"], text_lr=LR["text"], image_bounds=(0, 255),
    )  # fmt: skip
    return lambda: atk(inputs["image"], inputs["text"], labels)


def limit(networks: dict[str, nn.Module], inputs: dict[str, Tensor]) -> float:
    """Iterations of a pair a second if nothing were done but the products that no one can leave out: through each
    network once, and back to its inputs."""
    start = time.perf_counter()
    with torch.no_grad():
        for name, x in inputs.items():
            first, second = (networks[name][i].weight for i in (0, 2))
            for part in x.split(BATCH):
                ((part @ first.T) @ second.T) @ second @ first
    return PAIRS / (time.perf_counter() - start)


def comparison() -> Comparison:
    networks, inputs, labels = problem()
    mine, theirs = ours(networks, inputs, labels), port(networks, inputs, labels)

    def check() -> None:
        a, b = mine(), theirs()
        for name, x in inputs.items():
            assert not torch.equal(getattr(a, name), x) and not torch.equal(b[name], x), f"{name}: nothing moved"
            # TensorFlow's Adam and torch's place epsilon differently, which shows where the gradient is next to nothing
            apart = ((getattr(a, name) - b[name]).abs() > 0.1 * EPS[name]).float().mean()
            assert apart < 0.05, f"{name}: {apart:.1%} of the values moved otherwise"

    return Comparison(
        name=f"CMLA, {STEPS} iterations, {PAIRS} pairs of 1280 and 1376 features",
        alternative="eager port of the authors' loop",
        ours=mine,
        theirs=theirs,
        check=check,
        work=PAIRS * STEPS,
        unit="iterations of a pair",
        limit=partial(limit, networks, inputs),
    )


def comparisons(quick: bool = False) -> list[Comparison]:
    return [comparison()]


class Cmla:
    """Lower is better: seconds, and our time as a share of the port's."""

    version = "1"
    timeout = 600

    def setup(self) -> None:
        self.attack = ours(*problem())

    def time_attack(self) -> None:
        self.attack()

    def track_time_over_port(self) -> float:
        return cost(lambda: comparison(), 3)

    track_time_over_port.unit = "ours / port"
