"""Small networks and data for the attacks' tests: trained in a second, vulnerable as usual."""

import copy
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def network(seed: int = 0, classes: int = 5, channels: int = 3) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(channels, 8, 3, padding=1),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Conv2d(8, 16, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(2),
            nn.Flatten(),
            nn.Linear(64, classes),
        )


def samples(count: int, seed: int = 1, classes: int = 5, size: int = 8) -> tuple[Tensor, Tensor]:
    """Noisy class templates in [0, 1]; the templates are the same for every seed."""
    generator = torch.Generator().manual_seed(99)
    templates = torch.rand(classes, 3, size, size, generator=generator)
    generator.manual_seed(seed)
    labels = torch.randint(classes, (count,), generator=generator)
    noise = 0.5 * torch.randn(count, 3, size, size, generator=generator)
    return (0.5 + 0.3 * (templates[labels] - 0.5) + 0.15 * noise).clamp(0, 1), labels


def trained(seed: int = 0, steps: int = 150) -> nn.Sequential:
    """Another copy at each call; trained once a process."""
    return copy.deepcopy(_trained(seed, steps))


@cache
def _trained(seed: int, steps: int) -> nn.Sequential:
    model = network(seed)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    x, y = samples(256, seed=7)
    for step in range(steps):
        chosen = slice(step % 4 * 64, step % 4 * 64 + 64)
        optimizer.zero_grad()
        F.cross_entropy(model(x[chosen]), y[chosen]).backward()
        optimizer.step()
    return model
