"""Swap a loss, keep the script: ours in place of open_clip's ClipLoss and pytorch-metric-learning's TripletMarginLoss.

Where those libraries are installed, the values are printed side by side.

    python examples/swap_loss.py
"""

import importlib

import torch
from torch import Tensor, nn

from cmr_fast.losses import ClipLoss, TripletMarginLoss  # from open_clip.loss, from pytorch_metric_learning.losses


def batch(count: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Two views of the same things, and their classes."""
    rng = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 10, (count,), generator=rng)
    shared = torch.eye(10)[labels] + 0.3 * torch.randn(count, 10, generator=rng)
    noise = 0.1 * torch.randn(2, count, 10, generator=rng)
    return shared + noise[0], shared + noise[1], labels


def train(clip_loss: nn.Module, triplet_loss: nn.Module, steps: int = 30) -> list[float]:
    """A toy dual encoder; the loss of every step."""
    torch.manual_seed(0)
    image_net, text_net = nn.Linear(10, 32), nn.Linear(10, 32)
    logit_scale = nn.Parameter(torch.tensor(10.0))
    optimizer = torch.optim.Adam([*image_net.parameters(), *text_net.parameters(), logit_scale], lr=1e-2)
    curve = []
    for step in range(steps):
        image, text, labels = batch(128, step)
        image_features = nn.functional.normalize(image_net(image))
        text_features = nn.functional.normalize(text_net(text))
        loss = clip_loss(image_features, text_features, logit_scale) + triplet_loss(image_features, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        curve.append(loss.item())
    return curve


def main() -> None:
    ours = train(ClipLoss(), TripletMarginLoss(margin=0.05))
    print(f"ours    first step {ours[0]:.5f}, last {ours[-1]:.5f}")
    try:
        clip = importlib.import_module("open_clip.loss")
        metric = importlib.import_module("pytorch_metric_learning.losses")
    except ImportError as error:
        print(f"(nothing to lay beside it: {error})")
        return
    theirs = train(clip.ClipLoss(), metric.TripletMarginLoss(margin=0.05))
    print(f"theirs  first step {theirs[0]:.5f}, last {theirs[-1]:.5f}")


if __name__ == "__main__":
    main()
