"""The losses over 2 and 4 processes against the same batch in one process, and against open_clip on those ranks."""

import importlib.util
import os
import socket
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from cmr_fast.errors import InputError
from cmr_fast.losses import ClipLoss, SigLipLoss
from cmr_fast.ops import info_nce, sigmoid_loss
from cmr_fast.ops.info_nce_distributed import distributed_info_nce, distributed_sigmoid_loss

OPEN_CLIP = importlib.util.find_spec("open_clip") is not None
PAIRS, WIDTH = 7, 5  # of a rank


def problem(world):
    torch.manual_seed(world)
    image, text = torch.nn.functional.normalize(torch.randn(2, world * PAIRS, WIDTH, dtype=torch.float64), dim=-1)
    return image, text, torch.tensor(20.0, dtype=torch.float64), torch.tensor(-3.0, dtype=torch.float64)


def single(loss, world, arguments):
    """Value and gradients of the whole batch's loss in one process."""
    leaves = [x.requires_grad_() for x in problem(world)[:arguments]]
    value = loss(*leaves)
    return [value.detach(), *torch.autograd.grad(value, leaves)]


def shared(loss, rank, world, arguments):
    """The same from a rank's share; gradients as averaging over ranks leaves them."""
    image, text, *rest = problem(world)
    rows = slice(rank * PAIRS, (rank + 1) * PAIRS)
    leaves = [x.detach().requires_grad_() for x in (image[rows], text[rows], *rest)[:arguments]]
    value = loss(*leaves)
    value.backward()
    found = [value.detach(), *(x.grad for x in leaves[2:])]
    for x in found:
        dist.all_reduce(x)
    average = [x / world for x in found]
    features = []
    for x in leaves[:2]:
        parts = [torch.empty_like(x) for _ in range(world)]
        dist.all_gather(parts, x.grad)
        features.append(torch.cat(parts) / world)
    return [average[0], *features, *average[1:]]


def equal_one_process(rank, world):
    for form in ("gather", "ring"):
        for distributed, whole, arguments in (
            (distributed_info_nce, info_nce, 3),
            (distributed_sigmoid_loss, sigmoid_loss, 4),
        ):
            got = shared(lambda *x, f=distributed, form=form: f(*x, form=form), rank, world, arguments)
            for a, b in zip(got, single(whole, world, arguments), strict=True):
                torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def equal_in_float32(rank, world):
    """The native epilogue, panels that do not start at 0, positives outside of a tile."""
    image, text, scale, _ = (x.float() for x in problem(world))
    rows = slice(rank * PAIRS, (rank + 1) * PAIRS)
    want = info_nce(image, text, scale)
    for form in ("gather", "ring"):
        got = distributed_info_nce(image[rows], text[rows], scale, form=form).clone()
        dist.all_reduce(got)
        torch.testing.assert_close(got / world, want, rtol=1e-5, atol=1e-6)


def equal_open_clip(rank, world):
    import open_clip.loss as theirs

    cases = [
        (ClipLoss, theirs.ClipLoss, {"local_loss": a, "gather_with_grad": b}, 3)
        for a in (False, True)
        for b in (False, True)
    ]
    cases += [
        (SigLipLoss, theirs.SigLipLoss, {"dist_impl": name}, 4) for name in ("bidir", "shift", "reduce", "gather")
    ]
    for ours, other, options, arguments in cases:
        found = [shared(loss(rank=rank, world_size=world, **options), rank, world, arguments) for loss in (ours, other)]
        for a, b in zip(*found, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12, msg=f"{ours.__name__} {options}")
    got = shared(ClipLoss(True, True, rank=rank, world_size=world, ring=True), rank, world, 3)
    for a, b in zip(got, single(info_nce, world, 3), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def refuses(rank, world):
    x = torch.randn(PAIRS + rank, WIDTH)
    for loss in (distributed_info_nce, distributed_sigmoid_loss):
        with pytest.raises(InputError, match=r"rank 0: \(7, 5\), 32 bits, gather, .*; rank 1: \(8, 5\)"):
            loss(x, x, 1.0, form="gather")
    with pytest.raises(InputError, match="same shape"):
        ClipLoss(rank=rank, world_size=world)(x, x, 1.0)
    y = torch.randn(PAIRS, WIDTH)
    with pytest.raises(InputError, match=r"rank 1: .* ring"):
        distributed_info_nce(y, y, 1.0, form=("gather", "ring")[rank])
    leaf = y.clone().requires_grad_()  # a rank under no_grad would never come to the others' backward pass
    for loss in (distributed_info_nce, distributed_sigmoid_loss):
        with (
            torch.set_grad_enabled(rank == 0),
            pytest.raises(InputError, match=r"rank 0: .* with gradients; rank 1: .* without"),
        ):
            loss(leaf, leaf, 1.0)
    with pytest.raises(InputError, match=f"which is rank {rank} of 2"):
        ClipLoss(rank=rank, world_size=5)(y, y, 1.0)
    leaf = y.clone().requires_grad_()
    loss = distributed_sigmoid_loss(leaf, y, 1.0)
    with pytest.raises(InputError, match="same factor"):
        (loss * (rank + 1)).backward()


def run_rank(rank, world, port, name):
    os.environ["CMR_FAST_THREADS"] = "1"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
    try:
        globals()[name](rank, world)
    finally:
        dist.destroy_process_group()


def spawn(name, world, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parent), *sys.path]))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(run_rank, (world, port, name), nprocs=world)


@pytest.mark.timeout(120)
@pytest.mark.parametrize("world", [2, 4])
def test_equals_one_process(world, monkeypatch):
    spawn("equal_one_process", world, monkeypatch)


@pytest.mark.timeout(120)
def test_equals_one_process_in_float32(monkeypatch):
    spawn("equal_in_float32", 2, monkeypatch)


@pytest.mark.timeout(120)
@pytest.mark.skipif(not OPEN_CLIP, reason="open_clip is not installed")
@pytest.mark.parametrize("world", [2, 4])
def test_equals_open_clip(world, monkeypatch):
    spawn("equal_open_clip", world, monkeypatch)


@pytest.mark.timeout(120)
def test_ranks_that_disagree_are_refused(monkeypatch):
    spawn("refuses", 2, monkeypatch)


def test_needs_a_process_group():
    x = torch.randn(3, 2)
    for call in (
        lambda: distributed_info_nce(x, x, 1.0),
        lambda: distributed_sigmoid_loss(x, x, 1.0),
        lambda: ClipLoss(world_size=2)(x, x, 1.0),
        lambda: SigLipLoss(world_size=2)(x, x, 1.0),
    ):
        with pytest.raises(InputError, match="process group"):
            call()
