"""Named input scalings, learnt from the training split and kept inside the model."""

from typing import Literal

import torch
from torch import Tensor, nn

from cmr_fast.errors import InputError

Scaling = Literal["raw", "standard", "global", "hellinger", "chi2"]
SCALINGS: tuple[Scaling, ...] = ("raw", "standard", "global", "hellinger", "chi2")
_CHI2_STEP = 0.5
_LINEAR = 1e-12
"""Below it a root is a straight line, so that its slope at 0, which attacks go by, is finite."""


class InputScaling(nn.Module):
    """(N, dim) features -> (N, out_dim) inputs of a network.

    raw        as they come
    standard   each feature to mean 0 and deviation 1 over the training split
    global     centred, then all features divided by one number that makes their mean variance 1: rare ones stay small
    hellinger  square root, then standard: Euclidean distance of histograms becomes Hellinger's; features must not be
               negative
    chi2       the explicit map of the additive chi-square kernel (Vedaldi and Zisserman, 2012; 3 values a feature),
               then standard; features must not be negative
    """

    mean: Tensor
    scale: Tensor

    def __init__(self, kind: Scaling, dim: int) -> None:
        super().__init__()
        if kind not in SCALINGS:
            raise InputError(f"input scaling must be one of {', '.join(SCALINGS)}, got {kind!r}")
        self.kind = kind
        self.out_dim = 3 * dim if kind == "chi2" else dim
        self.register_buffer("mean", torch.zeros(self.out_dim))
        self.register_buffer("scale", torch.ones(self.out_dim))

    def fit(self, features: Tensor) -> None:
        """Set mean and scale from the training features (N, dim). A feature that never varies becomes 0."""
        if self.kind == "raw":
            return
        if self.kind in ("hellinger", "chi2") and bool((features < 0).any()):
            raise InputError(
                f"{self.kind} input scaling needs features of at least 0, got {float(features.min())}; "
                "expected raw or standard for these (a preset of another data set may have chosen it)"
            )
        mapped = self._map(features.to(self.mean.device, torch.float64))
        deviation = mapped.std(0, correction=0)
        varies = deviation > 1e-12 * mapped.abs().amax(0).clamp(min=1e-300)
        if self.kind == "global":
            deviation = torch.where(varies, deviation.square().mean().sqrt(), 0.0)
        self.mean.copy_(mapped.mean(0))
        self.scale.copy_(torch.where(varies, 1 / deviation.clamp(min=1e-300), 0.0))

    def forward(self, features: Tensor) -> Tensor:
        """(N, d) features, scaled as they were fitted."""
        return features if self.kind == "raw" else (self._map(features) - self.mean) * self.scale

    def _map(self, x: Tensor) -> Tensor:
        if self.kind == "hellinger":
            return torch.where(x < 0, -1.0, 1.0).to(x.dtype) * _root(torch.where(x < 0, -x, x))
        if self.kind == "chi2":
            return _chi2_map(x)
        return x


def _chi2_map(x: Tensor) -> Tensor:
    """Two samples of the kernel's spectrum sech(pi w): (N, dim) -> (N, 3 dim). 0 stays 0."""
    x = torch.where(x < 0, 0.0, x)  # clamp's slope is 0 at the bound: entries of 0 would look robust
    phase = _CHI2_STEP * x.clamp(min=torch.finfo(x.dtype).tiny).log()
    constant = _root(x * _CHI2_STEP)
    wave = _root(2 * _CHI2_STEP * x / torch.cosh(torch.tensor(torch.pi * _CHI2_STEP, dtype=x.dtype)))
    return torch.cat([constant, wave * phase.cos(), wave * phase.sin()], dim=1)


def _root(x: Tensor) -> Tensor:
    return torch.where(x > _LINEAR, x.clamp(min=_LINEAR).sqrt(), x / _LINEAR**0.5)
