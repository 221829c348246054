"""Train open_clip's own model twice, with its own ClipLoss and with ours: the change is one import.

    from open_clip.loss import ClipLoss   ->   from cmr_fast.losses import ClipLoss

A tiny CLIP (two transformers of two layers) on the built-in images of shapes with their captions as words; the same
start, the same batches. Needs open_clip (pip install cmr-fast[clip]); downloads nothing.

    python bench/experiments/clip_import_swap.py --steps 30
"""

import argparse
from collections.abc import Callable

import open_clip.loss
import torch
from open_clip.model import CLIP
from torch import Tensor, nn

import cmr_fast.losses

PIXELS, WORDS, LENGTH = 32, 64, 12
VISION = {"layers": 2, "width": 64, "head_width": 32, "patch_size": 8, "image_size": PIXELS}
TEXT = {"context_length": LENGTH, "vocab_size": WORDS, "width": 64, "heads": 2, "layers": 2}


def scenes(count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Images (N, 3, 32, 32) of one bright rectangle, and captions (N, 12) that say its colour, place and size."""
    rng = torch.Generator().manual_seed(seed)
    facts = torch.stack([torch.randint(0, n, (count,), generator=rng) for n in (3, 4, 4, 3)], 1)
    image = 0.2 * torch.randn(count, 3, PIXELS, PIXELS, generator=rng)
    text = torch.zeros(count, LENGTH, dtype=torch.int64)
    for i, (colour, row, column, size) in enumerate(facts.tolist()):
        side = 3 + 2 * size
        image[i, colour, 8 * row : 8 * row + side, 8 * column : 8 * column + side] += 1.0
        words = [1 + colour, 5 + row, 10 + column, 15 + size]
        text[i, : len(words)] = torch.tensor(words)
        text[i, len(words)] = WORDS - 1  # open_clip reads a caption at its largest token
    return image, text


def train(loss: nn.Module, steps: int, batch: int = 64, seed: int = 0) -> list[float]:
    """The loss before each step."""
    torch.manual_seed(seed)
    model = CLIP(embed_dim=32, vision_cfg=VISION, text_cfg=TEXT)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    image, text = scenes(steps * batch, seed)
    curve = []
    for rows in torch.arange(steps * batch).split(batch):
        image_features, text_features, logit_scale = model(image[rows], text[rows])
        value = loss(image_features, text_features, logit_scale)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        curve.append(value.item())
    return curve


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=30)
    steps = parser.parse_args().steps
    losses: dict[str, Callable[[], nn.Module]] = {
        "open_clip.loss.ClipLoss": open_clip.loss.ClipLoss,
        "cmr_fast.losses.ClipLoss": cmr_fast.losses.ClipLoss,
    }
    curves = {name: train(make(), steps) for name, make in losses.items()}
    theirs, ours = curves.values()
    print("step  " + "  ".join(curves))
    for step in range(0, steps, max(1, steps // 10)):
        print(f"{step:4}  {theirs[step]:23.6f}  {ours[step]:24.6f}")
    print(f"largest difference of the curves: {max(abs(a - b) for a, b in zip(theirs, ours, strict=True)):.2g}")


if __name__ == "__main__":
    main()
