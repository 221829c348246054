"""ClipLoss and SigLipLoss in one process: open_clip's values and gradients, its signatures, and what is refused."""

import importlib
import inspect
import sys
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from cmr_fast.errors import InputError
from cmr_fast.losses import ClipLoss, SigLipLoss

EXPERIMENTS = Path(__file__).resolve().parent.parent / "bench" / "experiments"

MAIN_BRANCH = ("chunk_size",)  # arguments that open_clip has had since its last release


def problem(dtype=torch.float32):
    torch.manual_seed(0)
    image, text = F.normalize(torch.randn(2, 50, 16, dtype=torch.float64), dim=-1).to(dtype)
    return [image, text, torch.tensor(20.0, dtype=dtype), torch.tensor(-4.0, dtype=dtype)]


def gradients(loss, arguments):
    leaves = [x.clone().requires_grad_() for x in arguments]
    value = loss(*leaves)
    return [value.detach(), *torch.autograd.grad(value, leaves)]


@pytest.mark.parametrize("name", ["ClipLoss", "SigLipLoss"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equals_open_clip(name, dtype):
    theirs = pytest.importorskip("open_clip.loss")
    ours = {"ClipLoss": ClipLoss, "SigLipLoss": SigLipLoss}[name]
    rtol = 1e-5 if dtype == torch.float32 else 1e-10
    for a, b in zip(gradients(ours(), problem(dtype)), gradients(getattr(theirs, name)(), problem(dtype)), strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=rtol)


@pytest.mark.parametrize("name", ["ClipLoss", "SigLipLoss"])
def test_has_open_clips_signatures(name):
    theirs = getattr(pytest.importorskip("open_clip.loss"), name)
    ours = {"ClipLoss": ClipLoss, "SigLipLoss": SigLipLoss}[name]
    for method in ("__init__", "forward"):
        wanted, got = (inspect.signature(getattr(loss, method)).parameters for loss in (theirs, ours))
        assert list(got)[: len(wanted)] == list(wanted)
        for argument, there in wanted.items():
            assert there.default in (got[argument].default, inspect.Parameter.empty)
        added = [x for x in list(got)[len(wanted) :] if x not in MAIN_BRANCH]
        assert all(got[x].kind == inspect.Parameter.KEYWORD_ONLY for x in added)


def test_output_dict_and_backend():
    image, text, scale, bias = problem()
    for loss in (ClipLoss(backend="torch"), SigLipLoss(backend="torch")):
        found = loss(image, text, scale, bias, output_dict=True)
        assert list(found) == ["contrastive_loss"]
        assert torch.equal(found["contrastive_loss"], loss(image, text, scale, bias))


def test_half_precision_features_give_a_float32_loss():
    image, text, scale, _ = problem(torch.bfloat16)
    loss = ClipLoss()(image, text, scale)
    want = ClipLoss()(image.double(), text.double(), scale.double())
    assert loss.dtype == torch.float32 and float(loss) == pytest.approx(float(want), abs=0.02)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ClipLoss(use_horovod=True), "use_horovod must be False"),
        (lambda: ClipLoss(ring=True), "ring needs local_loss and gather_with_grad"),
        (lambda: ClipLoss(rank=2, world_size=2), "rank must be from 0 to world_size - 1 = 1, got 2"),
        (lambda: SigLipLoss(rank=1), "rank must be from 0 to"),
        (lambda: SigLipLoss(dist_impl="tree"), "dist_impl must be .* got 'tree'"),
        (lambda: ClipLoss()(torch.zeros(3, 2), torch.zeros(4, 2), 1.0), r"got \(3, 2\) and \(4, 2\)"),
        (lambda: SigLipLoss()(torch.zeros(3, 2), torch.zeros(4, 2), 1.0), r"got \(3, 2\) and \(4, 2\)"),
    ],
)
def test_refuses(make, message):
    with pytest.raises(InputError, match=message):
        make()


def test_open_clip_trains_alike_with_the_import_swapped(monkeypatch):
    """The example: the same loss curve, to the float32 error of the steps between."""
    theirs = pytest.importorskip("open_clip.loss")
    monkeypatch.syspath_prepend(str(EXPERIMENTS))
    monkeypatch.delitem(sys.modules, "clip_import_swap", raising=False)
    example = importlib.import_module("clip_import_swap")
    curves = [example.train(loss, steps=12, batch=32) for loss in (theirs.ClipLoss(), ClipLoss())]
    assert curves[0] == pytest.approx(curves[1], abs=2e-5) and curves[1][-1] < curves[1][0]
