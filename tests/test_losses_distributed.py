"""Two processes: what subclasses of ClipLoss and SigLipLoss see and give there is what open_clip's see and give."""

import os
import socket
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn import functional as F

from cmr_fast.losses import ClipLoss, SigLipLoss


def halved(base):
    class Halved(base):
        def get_logits(self, *arguments, **options):
            logits = super().get_logits(*arguments, **options)
            return tuple(x / 2 for x in logits) if isinstance(logits, tuple) else logits / 2

    return Halved


def share(rank, world):
    torch.manual_seed(0)
    image, text = F.normalize(torch.randn(2, 7 * world, 5, dtype=torch.float64), dim=-1)
    rows = slice(7 * rank, 7 * rank + 7)
    scale, bias = torch.tensor([20.0, -3.0], dtype=torch.float64)
    return [x.clone().requires_grad_() for x in (image[rows], text[rows], scale, bias)]


def compare(rank, world):
    import open_clip.loss as theirs

    for local in (False, True):
        for gradient in (False, True):
            options = {"local_loss": local, "gather_with_grad": gradient, "rank": rank, "world_size": world}
            given = share(rank, world)
            want, got = (loss(**options).get_logits(*given[:3]) for loss in (theirs.ClipLoss, ClipLoss))
            torch.testing.assert_close(got, want)
            # one bias: theirs adds it twice to gathered logits, since those of the texts are a view
            biased = ClipLoss(**options).get_logits(*given)
            torch.testing.assert_close(biased, tuple(x + given[3] for x in want))
            labels = [loss(**options).get_ground_truth("cpu", len(want[0])) for loss in (theirs.ClipLoss, ClipLoss)]
            assert torch.equal(*labels)
            agree(halved(theirs.ClipLoss)(**options), halved(ClipLoss)(**options), rank, world, 3)
    for form in ("bidir", "shift", "reduce", "gather"):
        options = {"rank": rank, "world_size": world, "dist_impl": form}
        agree(halved(theirs.SigLipLoss)(**options), halved(SigLipLoss)(**options), rank, world, 4)


def agree(original, ours, rank, world, leaves):
    results = []
    for loss in (original, ours):
        given = share(rank, world)[:leaves]
        value = loss(*given)
        value.backward()
        results.append([value.detach(), *(x.grad for x in given)])
    torch.testing.assert_close(*results[::-1])


def run_rank(rank, world, port):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
    try:
        compare(rank, world)
    finally:
        dist.destroy_process_group()


@pytest.mark.timeout(120)
def test_subclasses_over_ranks(monkeypatch):
    pytest.importorskip("open_clip.loss")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parent), *sys.path]))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(run_rank, (2, port), nprocs=2)
