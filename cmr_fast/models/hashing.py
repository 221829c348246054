"""Networks of the hashing papers: CNN-F for pixels, and a first layer for bags of words that skips the words not there.

CNN-F is Chatfield et al. 2014's fast network ("Return of the Devil in the Details", Table 1), the image side of DCMH
and SSAH. Their codes load its ImageNet weights (imagenet-vgg-f.mat); here it starts from random ones.
"""

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cmr_fast.errors import InputError


class CNNF(nn.Module):
    """CNN-F up to fc7: pixels (N, 3, H, W) from 0 to 255 -> (N, 4096).

    The papers' images are 224 x 224; others of at least 64 x 64 are taken as they are, fc6 has the width that they
    need. The mean pixel of the training images is subtracted (`fit`); DCMH and SSAH subtract a mean image.

    Raises
    ------
    InputError
        For images of less than 64 pixels a side.
    """

    mean: Tensor
    scale: Tensor

    def __init__(self, height: int, width: int) -> None:
        super().__init__()
        if min(height, width) < 64:
            raise InputError(f"CNN-F takes images of 64 x 64 pixels or more, got {height} x {width}")
        norm = lambda: nn.LocalResponseNorm(5, alpha=5e-4, beta=0.75, k=2.0)  # noqa: E731  # tf: radius 2, alpha 1e-4
        pool = lambda: nn.MaxPool2d(3, 2, ceil_mode=True)  # noqa: E731
        self.features = nn.Sequential(
            nn.Conv2d(3, 64, 11, stride=4), nn.ReLU(), norm(), pool(),
            nn.Conv2d(64, 256, 5, padding=2), nn.ReLU(), norm(), pool(),
            nn.Conv2d(256, 256, 3, padding=1), nn.ReLU(),
            nn.Conv2d(256, 256, 3, padding=1), nn.ReLU(),
            nn.Conv2d(256, 256, 3, padding=1), nn.ReLU(), pool(),
        )  # fmt: skip
        with torch.no_grad():
            cells = self.features(torch.zeros(1, 3, height, width)).numel()
        self.fc6, self.fc7 = nn.Linear(cells, 4096), nn.Linear(4096, 4096)
        self.register_buffer("mean", torch.full((3,), 127.5))
        self.register_buffer("scale", torch.ones(()))
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
                nn.init.zeros_(cast(Tensor, layer.bias))

    def fit(self, images: Tensor) -> None:
        """The mean pixel, and one deviation that all are divided by, of up to 1000 images uint8 (N, 3, H, W)."""
        sample = images[:: max(1, len(images) // 1000)].double()
        self.mean.copy_(sample.mean(dim=(0, 2, 3)))
        self.scale.copy_((sample - sample.mean(dim=(0, 2, 3), keepdim=True)).square().mean().sqrt().clamp(min=1e-3))

    def forward(self, pixels: Tensor) -> Tensor:
        """(N, 3, H, W) pixels of 0 to 255 -> (N, 4096)."""
        x = (pixels.to(self.mean.dtype) - self.mean[:, None, None]) / self.scale
        x = self.features(x).flatten(1)
        return F.relu(self.fc7(F.relu(self.fc6(x))))


class _Bag(torch.autograd.Function):
    """x @ weight of a sparse x: sums of the weight's rows; the weight's gradient has only the rows that occur."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        rows, columns = x.nonzero(as_tuple=True)
        values = x[rows, columns]
        ctx.save_for_backward(rows, columns, values)
        ctx.shape = weight.shape
        return _summed(weight, columns, rows, len(x), values)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor]:
        rows, columns, values = ctx.saved_tensors
        order = columns.argsort(stable=True)
        occur, numbers = columns[order].unique_consecutive(return_inverse=True)
        slopes = _summed(gradient.contiguous(), rows[order], numbers, len(occur), values[order])
        return None, torch.sparse_coo_tensor(
            occur[None], slopes, ctx.shape, is_coalesced=True, check_invariants=False
        )  # fmt: skip


def _summed(table: Tensor, entries: Tensor, bags: Tensor, count: int, values: Tensor) -> Tensor:
    """(count, d): sums of values * table[entries] by bag; bags are in order."""
    sizes = torch.bincount(bags, minlength=count)
    return F.embedding_bag(entries, table, sizes.cumsum(0) - sizes, mode="sum", per_sample_weights=values)


class BagLinear(nn.Module):
    """A linear layer (N, inputs) -> (N, outputs) for inputs that are mostly 0, where `sparse` is true.

    Then a training step costs what the entries cost that are not 0: rows of the weight are added up, and its gradient
    is sparse (plain SGD and SparseAdam take one). Else it is `inputs @ weight + bias`.
    """

    def __init__(self, inputs: int, outputs: int, *, sparse: bool = False) -> None:
        super().__init__()
        self.sparse = sparse
        bound = inputs**-0.5
        self.weight = nn.Parameter(torch.rand(inputs, outputs) * 2 * bound - bound)
        self.bias = nn.Parameter(torch.rand(outputs) * 2 * bound - bound)

    def forward(self, x: Tensor) -> Tensor:
        """(N, words) -> (N, width)."""
        if self.training and self.sparse and not x.requires_grad:
            return cast(Tensor, _Bag.apply(x.to(self.weight.dtype), self.weight)) + self.bias
        return x @ self.weight + self.bias


def mostly_zero(x: Tensor) -> bool:
    """Whether fewer than a tenth of the entries of up to 1000 rows are not 0."""
    sample = x[:: max(1, len(x) // 1000)]
    return 10 * int(sample.count_nonzero()) < sample.numel()
