"""The Triton backend of info_nce against the float64 oracle, on a GPU where there is one and under the interpreter.

Triton reads TRITON_INTERPRET when it is imported, so `test_under_the_interpreter` starts this file again with it.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_info_nce import dense, dense_sigmoid, features, gradients, oracle, within_budget
from torch.nn import functional as F

import cmr_fast as cf
from cmr_fast.errors import InputError
from cmr_fast.ops import _dispatch, info_nce, js_critic, sigmoid_loss

pytest.importorskip("triton")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
runs = pytest.mark.skipif(not INTERPRETED and not torch.cuda.is_available(), reason="no GPU")
on_gpu = pytest.mark.skipif(INTERPRETED or not torch.cuda.is_available(), reason="no GPU")


@pytest.mark.skipif(INTERPRETED, reason="this is that run")
@pytest.mark.timeout(900)
@pytest.mark.parametrize("part", ["onepass", "chunked", "not onepass and not chunked"])
def test_under_the_interpreter(part):
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--timeout=800", "-k", part, __file__],
        env={**os.environ, "TRITON_INTERPRET": "1", "CMR_FAST_BACKEND": ""}, cwd=Path(__file__).parents[2],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout[-4000:] + done.stderr[-2000:]


@pytest.fixture(params=["onepass", "chunked"])
def form(request, monkeypatch):
    """Either form; chunks and parts so small that there are several."""
    from cmr_fast.ops.triton import info_nce as kernels

    monkeypatch.setenv("CMR_FAST_INFONCE_FORM", request.param)
    monkeypatch.setenv("CMR_FAST_BACKEND", "triton")
    monkeypatch.setattr(kernels, "BLOCK", 16)
    monkeypatch.setattr(kernels, "PARTS", {"onepass": (2, 2), "chunked": (1, 2)})
    monkeypatch.setattr(kernels, "CHUNK_BYTES", 1)
    for op in ("info_nce", "sigmoid_loss", "js_critic"):
        monkeypatch.setitem(_dispatch.BACKENDS[op], "cpu", ("triton",))
    return request.param


def on_device(*tensors):
    return [x.to(DEVICE) for x in tensors]


def diagonal(n, m, offset):
    weights = torch.zeros(n, m)
    inside = torch.arange(max(0, -offset), min(n, m - offset))
    weights[inside, inside + offset] = 1
    return weights


# less than a tile, one, a tile and a rest, several in either part
@runs
@pytest.mark.parametrize(
    ("n", "m", "offset"), [(1, 1, 0), (2, 2, 0), (16, 16, 0), (17, 17, 0), (33, 40, 7), (1, 40, 38), (83, 83, 0)]
)
@pytest.mark.parametrize("d", [1, 8, 33, 64, 130])
def test_equals_the_oracle(form, n, m, offset, d):
    image, text = features(n, m, d, seed=n)
    want = oracle(image, text, 12.0, diagonal(n, m, offset))
    leaves = [x.requires_grad_() for x in on_device(image.float(), text.float(), torch.tensor(12.0))]
    rows, columns = info_nce(*leaves, offset=offset, reduction="none")
    (rows.sum() + columns.sum()).backward()
    found = dict(rows=rows, columns=columns)
    found |= dict(zip(("of_image", "of_text", "of_scale"), (x.grad for x in leaves), strict=True))
    for name, x in found.items():
        expected = want[name].double()
        atol = 2e-5 * max(1.0, float(expected.abs().max()))
        torch.testing.assert_close(x.detach().cpu().double(), expected, rtol=2e-5, atol=atol, msg=name)


@runs
@pytest.mark.parametrize("offset", [-30, -1, 20, 39, 40, -33, 1 << 40])
def test_a_diagonal_partly_or_wholly_outside(form, offset):
    """What the ring form asks of the op."""
    image, text = (x.float() for x in features(33, 40, 8))
    outputs, of_inputs = [], []
    for device, backend in ((DEVICE, "triton"), ("cpu", "torch")):
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(_dispatch.BACKENDS["info_nce"], "cpu", ("triton", "torch"))
            patch.setenv("CMR_FAST_BACKEND", backend)
            a, b, s = (x.to(device) for x in (image, text, torch.tensor(9.0)))
            out = torch.ops.cmr_fast.info_nce(a, b, s, None, None, None, offset, True, True, 0, backend, None)
            arguments = (torch.ones_like(out[0]), torch.ones_like(out[1]), a, b, s, None, None, None, offset, *out[2:])
            outputs.append(out[:4])
            of_inputs.append(torch.ops.cmr_fast.info_nce_backward(*arguments, backend, None))
    for got, want in zip((*outputs[0], *of_inputs[0]), (*outputs[1], *of_inputs[1]), strict=True):
        torch.testing.assert_close(got.cpu(), want, rtol=2e-5, atol=2e-5)


@runs
@pytest.mark.parametrize("direction", ["image", "text"])
def test_one_direction(form, direction):
    image, text, scale = (x.float() for x in (*features(45, 45, 6), torch.tensor(9.0)))
    got = gradients(lambda *x: info_nce(*x, direction=direction), *on_device(image, text, scale))
    want = gradients(
        lambda a, b, s: F.cross_entropy(s * (a @ b.T if direction == "image" else b @ a.T), torch.arange(45)),
        *(x.double() for x in (image, text, scale)),
    )
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g.cpu().double(), w, rtol=1e-5, atol=1e-6)


@runs
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [1.0, 14.3, 100.0])
@pytest.mark.parametrize("noise", [0.02, 0.5, 3.0])  # converged, halfway, new
def test_error_budget(form, dtype, scale, noise):
    if (form, dtype, scale, noise) == ("onepass", torch.float32, 100.0, 3.0) and not torch.cuda.is_available():
        pytest.xfail("the interpreter's text gradient is off by 3.8e-6 where eager happens to be off by 0.9e-6")
    image, text = (x.to(dtype) for x in features(67, 67, 48, noise=noise))
    factor = torch.tensor(scale)
    inputs = {
        "ours": on_device(image, text, factor),
        "eager": (image, text, factor.to(dtype)),
        "float64": (image.double(), text.double(), factor.double()),
    }
    found = {}
    for name, arguments in inputs.items():
        _, *of_inputs = gradients(info_nce if name == "ours" else dense, *arguments)
        if name == "ours":
            losses = info_nce(*arguments, reduction="none")
            assert losses[0].dtype == torch.float32 and of_inputs[0].dtype == dtype
        else:
            logits = arguments[2] * arguments[0] @ arguments[1].T
            losses = [F.cross_entropy(z, torch.arange(67), reduction="none") for z in (logits, logits.T)]
        found[name] = [x.cpu() for x in (*losses, *of_inputs)]
    within_budget(found["ours"], found["eager"], found["float64"], dtype)


@runs
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [-10.0, 0.0, 3.0])
def test_error_budget_of_the_sigmoid(form, dtype, bias):
    image, text = (x.to(dtype) for x in features(67, 67, 48, noise=0.5))
    rest = torch.tensor(10.0), torch.tensor(bias)
    got = [x.cpu() for x in gradients(sigmoid_loss, *on_device(image, text, *rest))]
    eager = gradients(dense_sigmoid, image, text, *(x.to(dtype) for x in rest))
    within_budget(got, eager, gradients(dense_sigmoid, *(x.double() for x in (image, text, *rest))), dtype)
    alone = sigmoid_loss(*on_device(image, text, *rest))
    torch.testing.assert_close(alone.cpu(), got[0], rtol=1e-6, atol=0)


@runs
def test_far_negatives_of_the_sigmoid_are_not_lost(form):
    image, text = (torch.zeros(20, 8) for _ in range(2))
    loss = sigmoid_loss(*on_device(image, text), 1.0, -20.0, offset=None, reduction="sum")
    want = 400 * F.softplus(torch.tensor(-20.0, dtype=torch.float64))
    torch.testing.assert_close(loss.cpu().double(), want, rtol=1e-5, atol=0)


@runs
def test_the_critic(form):
    image, text = (x.float() for x in features(41, 41, 6))
    got = gradients(js_critic, *on_device(image, text))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(_dispatch.BACKENDS["js_critic"], "cpu", ("torch",))
        patch.setenv("CMR_FAST_BACKEND", "torch")
        want = gradients(js_critic, image.double(), text.double())
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g.cpu().double(), w, rtol=1e-5, atol=1e-7)


@runs
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_finite_at_a_scale_of_100(form, dtype):
    x = F.normalize(torch.randn(35, 16), dim=1).to(DEVICE)
    for image, text in ((x, x), (x, -x), (x, x.roll(1, 0)), (x[:1].expand(35, 16), x), (x, torch.zeros_like(x))):
        leaves = image.to(dtype), text.to(dtype), torch.tensor(100.0, device=DEVICE)
        found = gradients(info_nce, *leaves) + gradients(sigmoid_loss, *leaves, torch.tensor(-10.0, device=DEVICE))
        assert all(x.isfinite().all() for x in found)


@runs
def test_small_factors_survive_float16(form):
    """The gradient of one of many losses, 1e-6 each, is far below what float16 holds without a common unit."""
    image, text = (x.half() for x in features(40, 40, 16, noise=3.0))
    got = gradients(lambda a, b: info_nce(a, b, 10.0, reduction="sum") * 1e-4, *on_device(image, text))
    want = gradients(lambda a, b: dense(a, b, 10.0) * 40e-4, image.double(), text.double())
    for g, w in zip(got[1:], want[1:], strict=True):
        torch.testing.assert_close(g.cpu().double(), w, rtol=5e-3, atol=2e-3 * float(w.abs().max()))


@runs
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_runs_are_equal_to_the_bit(form, dtype):
    leaves = [*on_device(*(x.to(dtype) for x in features(70, 70, 40))), torch.tensor(30.0, device=DEVICE)]
    first, second = (gradients(info_nce, *leaves) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@runs
def test_not_contiguous_and_without_negatives(form):
    image, text = on_device(*(x.float() for x in features(35, 35, 12)))
    scale = torch.tensor(9.0, device=DEVICE)
    want = gradients(info_nce, image, text, scale)
    strange = [x.requires_grad_() for x in (image.T.contiguous().T, torch.stack([text, text], 2)[:, :, 0])]
    got = torch.autograd.grad(info_nce(*strange, scale), strange)
    assert all(torch.equal(g, w) for g, w in zip(got, want[1:3], strict=True))
    alone = gradients(info_nce, image[:1], text[:1], scale)
    assert all(torch.count_nonzero(x) == 0 for x in alone)


@runs
def test_not_finite_inputs_show(form):
    image, text = on_device(*(x.float() for x in features(50, 50, 8)))
    text[40, 3] = torch.nan
    assert not info_nce(image, text, 10.0).isfinite() and not sigmoid_loss(image, text, 10.0, 0.0).isfinite()


@runs
def test_what_it_does_not_take_says_so(form, monkeypatch):
    image, text = on_device(*(x.float() for x in features(9, 9, 4)))
    with pytest.raises(InputError, match="one positive per image, by offset"):
        info_nce(image, text, 1.0, positives=torch.arange(9, device=DEVICE))
    with pytest.raises(InputError, match=r"features are torch\.float64"):
        info_nce(image.double(), text.double(), 1.0)
    monkeypatch.setenv("CMR_FAST_INFONCE_FORM", "both")
    with pytest.raises(InputError, match="CMR_FAST_INFONCE_FORM must be onepass or chunked, got 'both'"):
        info_nce(image, text, 1.0)
    monkeypatch.delenv("CMR_FAST_INFONCE_FORM")
    from cmr_fast.ops.triton import info_nce as kernels

    assert [kernels.form(d) for d in (511, 512)] == ["onepass", "chunked"]


def test_triton_is_not_imported_before_it_is_needed():
    code = "import sys, cmr_fast.ops; assert not any(m.startswith('cmr_fast.ops.triton') for m in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.skipif(INTERPRETED, reason="the interpreter runs on the CPU")
def test_triton_refuses_the_cpu():
    assert "these are on cpu" in (_dispatch.unavailable("triton", "cpu") or "")


@on_gpu
def test_a_gpu_chooses_it():
    assert cf.explain("info_nce", torch.zeros(2, 2, device="cuda")).backend == "triton"


@on_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("n", "d"), [(1000, 64), (1111, 300), (515, 768)])
@pytest.mark.parametrize("name", ["onepass", "chunked"])
def test_blocks_as_they_are(monkeypatch, name, n, d, dtype):
    monkeypatch.setenv("CMR_FAST_INFONCE_FORM", name)
    image, text = (x.to("cuda", dtype) for x in features(n, n, d, noise=2.0))
    scale = torch.tensor(50.0, device="cuda")

    def eager(a, b, s):
        z, target = s * a @ b.T, torch.arange(n, device="cuda")
        return (F.cross_entropy(z, target) + F.cross_entropy(z.T, target)) / 2

    got = gradients(lambda *x: info_nce(*x, backend="triton"), image, text, scale)
    again = gradients(lambda *x: info_nce(*x, backend="triton"), image, text, scale)
    assert all(torch.equal(a, b) for a, b in zip(got, again, strict=True))
    rounded = gradients(eager, image, text, scale.to(dtype))
    want = gradients(eager, image.double(), text.double(), scale.double())
    within_budget(got, rounded, want, dtype)


@on_gpu
@pytest.mark.parametrize("name", ["onepass", "chunked"])
def test_cuda_graph(monkeypatch, name):
    monkeypatch.setenv("CMR_FAST_INFONCE_FORM", name)
    monkeypatch.setenv("CMR_FAST_BACKEND", "triton")
    image, text = (x.to("cuda", torch.bfloat16).requires_grad_() for x in features(300, 300, 64))
    rest = [torch.tensor(x, device="cuda", requires_grad=True) for x in (20.0, -5.0)]

    def step():
        loss = info_nce(image, text, rest[0]) + sigmoid_loss(image, text, *rest)
        return [loss.detach(), *torch.autograd.grad(loss, (image, text, *rest))]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        image.copy_(text.roll(1, 0))
        rest[0].fill_(30.0)
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(captured, step(), strict=True))
