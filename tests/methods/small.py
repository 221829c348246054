"""A small made-up data set and a run that another process can be asked to do."""

from dataclasses import replace

import torch

from cmr_fast.data.pairs import PairedDataset, Pairs
from cmr_fast.methods.acmr import ACMRConfig
from cmr_fast.methods.loop import RunConfig, train

ACMR_SMALL = ACMRConfig(
    epochs=12,
    batch_size=16,
    dim=6,
    image_hidden=16,
    text_hidden=8,
    modality_hidden=4,
    dropout=0.3,
    learning_rate=1e-2,
    alpha=0.1,
    beta=1.0,
    reg=0.01,
    adversary=0.1,
    label_head="shared",
    similarity="cosine",
)

EPS, ALPHA, STEPS = 8 / 255, 4 / 255, 3  # of attacks on images with captions


def small_dataset(count: int = 90, seed: int = 0, multi: bool = False) -> PairedDataset:
    """Three classes, whose means differ, with a little noise; half for training."""
    generator = torch.Generator().manual_seed(seed)
    classes = torch.arange(count) % 3
    image = torch.eye(3)[classes].repeat(1, 3)[:, :7] + 0.7 * torch.randn(count, 7, generator=generator)
    text = torch.eye(3)[classes].repeat(1, 2)[:, :5] + 0.7 * torch.randn(count, 5, generator=generator)
    labels = classes
    if multi:
        labels = torch.eye(3, dtype=torch.uint8)[classes] | (torch.rand(count, 3, generator=generator) > 0.8).byte()
    pairs = Pairs(image, text, labels)
    test = pairs.select(torch.arange(count // 2, count))
    return PairedDataset("small", pairs.select(torch.arange(count // 2)), test, test)


KILLED_EPOCHS = 40


def train_small(out: str, resume: bool) -> None:
    """One run with a checkpoint at every epoch, for a process that will be killed."""
    run = RunConfig(
        out=out,
        resume=resume,
        device="cpu",
        checkpoint_seconds=0,
        patience=0,
        valid_fraction=0.3,
        threads=1,
        quiet=True,
    )
    train("acmr", replace(ACMR_SMALL, epochs=KILLED_EPOCHS), small_dataset(), run)
