"""Steps of an attack that every backend is tested on."""

import torch

SHAPES = [(1, 1), (3,), (2, 3, 1), (5, 3, 4, 4), (3, 2, 7, 5), (1, 3, 33), (2, 17), (70, 3, 9, 9)]


def problem(shape, seed=0, dtype=torch.float32, scale=0.3):
    generator = torch.Generator().manual_seed(seed)
    origin = torch.rand(shape, generator=generator, dtype=dtype)
    x = (origin + scale * (torch.rand(shape, generator=generator, dtype=dtype) - 0.5)).clamp(0, 1)
    gradient = torch.randn(shape, generator=generator, dtype=dtype)
    gradient[torch.rand(shape, generator=generator) < 0.1] = 0.0
    return x, gradient, origin


def eager_linf(x, gradient, origin, alpha, eps):
    """torchattacks.PGD's update."""
    x = x + alpha * gradient.sign()
    delta = torch.clamp(x - origin, min=-eps, max=eps)
    return torch.clamp(origin + delta, min=0, max=1)
