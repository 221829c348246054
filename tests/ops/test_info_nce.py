"""info_nce, sigmoid_loss, js_critic against the dense loss: every ISA, torch, odd shapes, positives, dtypes."""

import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from ways import ISAS, NATIVE

import cmr_fast as cf
from cmr_fast.errors import InputError
from cmr_fast.ops import _dispatch, _reference, info_nce, js_critic, sigmoid_loss
from cmr_fast.ops import _info_nce_tiles as tiles


@pytest.fixture
def run(run, monkeypatch):
    """On tiles and blocks so small that every case has several."""
    monkeypatch.setattr(tiles, "ROWS", 20)
    monkeypatch.setattr(tiles, "COLUMNS", 37)
    monkeypatch.setattr(tiles, "TORCH_PAIRS", 300)
    return run


@pytest.fixture
def small_tiles(monkeypatch):
    monkeypatch.setattr(tiles, "ROWS", 20)
    monkeypatch.setattr(tiles, "COLUMNS", 37)


def features(n, m, d, seed=0, noise=1.0):
    """Unit vectors, text i near image i."""
    rng = torch.Generator().manual_seed(seed)
    image, text = torch.randn(n, d, generator=rng, dtype=torch.float64), torch.randn(m, d, generator=rng).double()
    shared = min(n, m)
    text[:shared] = noise * text[:shared] + image[:shared]
    return F.normalize(image, dim=1), F.normalize(text, dim=1)


def gradients(loss, *leaves):
    """(loss, gradient of each leaf)"""
    leaves = [x.detach().clone().requires_grad_() for x in leaves]
    value = loss(*leaves)
    return [value.detach(), *torch.autograd.grad(value, leaves)]


def dense(image, text, scale, weights=None):
    """The mean of both directions in eager torch; weights (n, m), by default the diagonal."""
    logits = scale * image @ text.T
    weights = torch.eye(*logits.shape, dtype=logits.dtype) if weights is None else weights.to(logits.dtype)
    total = logits.new_zeros(())
    for axis in (1, 0):
        sums = weights.sum(axis, keepdim=True)
        target = torch.where(sums > 0, weights / sums.clamp(min=1e-30), 0)
        losses = -(target * logits.log_softmax(axis)).sum(axis)
        total = total + losses.sum() / (sums > 0).sum().clamp(min=1)
    return total / 2


def dense_sigmoid(image, text, scale, bias):
    z = scale * image @ text.T + bias
    return F.softplus(torch.where(torch.eye(*z.shape, dtype=torch.bool), -z, z)).sum() / len(image)


def within_budget(got, eager, want, dtype):
    """Each error against float64 at most twice that of eager torch in the same dtype, plus eps of the largest value."""
    for i, (g, e, w) in enumerate(zip(got, eager, want, strict=True)):
        w = w.double()
        # a float32 loss or sum of softmaxes is made of terms of size 1, however small it is
        least = 1.0 if dtype == torch.float32 and w.ndim < 2 else 1e-3
        eps = torch.finfo(dtype).eps * max(float(w.abs().max()), least)
        ours, theirs = float((g.double() - w).abs().max()), float((e.double() - w).abs().max())
        assert ours <= 2 * theirs + eps, f"output {i}: error {ours:.3g}, eager torch {theirs:.3g}, eps {eps:.3g}"


def oracle(image, text, scale, weights):
    found = _reference.info_nce(image.numpy(), text.numpy(), scale, weights.double().numpy())
    return {name: torch.from_numpy(np.asarray(x)) for name, x in found.items()}


def assert_is_oracle(image, text, scale, weights, dtype=torch.float32, rtol=2e-5, **options):
    """Losses of both directions, and the gradient of their sum."""
    want = oracle(image, text, scale, weights)
    image, text = (x.to(dtype).requires_grad_() for x in (image, text))
    factor = torch.tensor(scale, dtype=torch.promote_types(dtype, torch.float32)).requires_grad_()
    rows, columns = info_nce(image, text, factor, reduction="none", threads=2, **options)
    (rows.sum() + columns.sum()).backward()
    found = dict(rows=rows, columns=columns, of_image=image.grad, of_text=text.grad, of_scale=factor.grad)
    for name, x in found.items():
        atol = rtol * max(1.0, float(want[name].abs().max()) if want[name].numel() else 0)
        torch.testing.assert_close(x.detach().double(), want[name].double(), rtol=rtol, atol=atol, msg=name)


# less than a tile, one, several; less than a vector, one, several and a rest
@pytest.mark.parametrize("n", [1, 2, 7, 16, 20, 21, 59, 75])
@pytest.mark.parametrize("d", [1, 5, 64])
def test_equals_the_dense_loss(run, n, d):
    image, text = features(n, n, d, seed=n)
    assert_is_oracle(image, text, 12.0, torch.eye(n))


@pytest.mark.parametrize(("n", "m", "offset"), [(1, 5, 4), (20, 90, 0), (20, 90, 33), (33, 75, 42), (7, 8, 1)])
def test_rectangles_and_offsets(run, n, m, offset):
    image, text = features(n, m, 6)
    weights = torch.zeros(n, m)
    weights[torch.arange(n), torch.arange(n) + offset] = 1
    assert_is_oracle(image, text, 9.0, weights, offset=offset)
    both = info_nce(image.float(), text.float(), 9.0, offset=offset, reduction="none")
    for direction, at in (("image", 0), ("text", 1)):
        one = info_nce(image.float(), text.float(), 9.0, offset=offset, direction=direction)
        torch.testing.assert_close(one, both[at].sum() / n)
        alone = info_nce(image.float(), text.float(), 9.0, offset=offset, direction=direction, reduction="none")
        assert torch.equal(alone[at], both[at]) and len(alone[1 - at]) == 0


@pytest.mark.parametrize("direction", ["image", "text"])
def test_gradient_of_one_direction(run, direction):
    image, text = (x.float() for x in features(45, 45, 6))
    scale = torch.tensor(9.0)
    got = gradients(lambda *x: info_nce(*x, direction=direction), image, text, scale)
    want = gradients(
        lambda a, b, s: F.cross_entropy(s * (a @ b.T if direction == "image" else b @ a.T), torch.arange(45)),
        *(x.double() for x in (image, text, scale)),
    )
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g.double(), w, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["ids", "two ids", "mask", "soft"])
def test_many_positives(run, kind):
    n, m = (47, 47) if kind == "ids" else (47, 61)
    image, text = features(n, m, 8)
    rng = torch.Generator().manual_seed(3)
    ids = torch.randint(0, 9, (n,), generator=rng), torch.randint(0, 9, (m,), generator=rng)
    if kind == "ids":
        positives, weights = ids[0], ids[0][:, None] == ids[0]
    elif kind == "two ids":
        positives, weights = ids, ids[0][:, None] == ids[1]
    else:
        weights = torch.rand(n, m, generator=rng) < 0.1
        weights[3], weights[:, 5] = False, False  # without a positive
        weights = weights if kind == "mask" else weights * torch.rand(n, m, generator=rng)
        positives = weights
    assert_is_oracle(image, text, 15.0, weights, positives=positives)
    got = info_nce(image.float(), text.float(), 15.0, positives=positives)
    torch.testing.assert_close(got.double(), dense(image, text, 15.0, weights), rtol=1e-5, atol=1e-6)


def test_distinct_ids_are_the_diagonal(run):
    image, text = (x.float() for x in features(50, 50, 8))
    one_each = gradients(info_nce, image, text, torch.tensor(9.0))
    ids = gradients(lambda *x: info_nce(*x, positives=torch.arange(50) * 7), image, text, torch.tensor(9.0))
    for a, b in zip(one_each, ids, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def test_without_positives_or_negatives(run):
    image, text = (x.float() for x in features(30, 30, 8))
    none, every, some = (f(30, 30, dtype=torch.bool) for f in (torch.zeros, torch.ones, torch.zeros))
    some[torch.arange(30), torch.arange(30)] = torch.arange(30) != 4

    def with_positives(positives, **options):
        return lambda a, b: info_nce(a, b, 20.0, positives=positives, **options)

    assert all(torch.count_nonzero(x) == 0 for x in gradients(with_positives(none), image, text))
    got = gradients(with_positives(some, direction="image"), image, text)
    assert torch.count_nonzero(got[1][4]) == 0 and torch.count_nonzero(got[1][5]) > 0
    assert all(x.isfinite().all() for x in gradients(with_positives(every), image, text))
    alone = gradients(info_nce, image[:1], text[:1], torch.tensor(50.0))
    assert all(torch.count_nonzero(x) == 0 for x in alone)


def test_empty(run):
    for n, m in ((0, 0), (0, 4)):
        image, text = torch.zeros(n, 3, requires_grad=True), torch.zeros(m, 3, requires_grad=True)
        loss = info_nce(image, text, 1.0) + sigmoid_loss(image, text, 1.0, -1.0)
        loss.backward()
        assert loss.item() == 0 and image.grad.shape == (n, 3) and torch.count_nonzero(text.grad) == 0
    assert float(info_nce(torch.zeros(5, 0), torch.zeros(5, 0), 3.0)) == pytest.approx(math.log(5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [1.0, 14.3, 100.0])
@pytest.mark.parametrize("noise", [0.02, 0.5, 3.0])  # converged, halfway, new
def test_error_budget(run, dtype, scale, noise):
    image, text = (x.to(dtype) for x in features(83, 83, 48, noise=noise))
    factor = torch.tensor(scale)
    inputs = {
        "ours": (image, text, factor),
        "eager": (image, text, factor.to(dtype)),
        "float64": (image.double(), text.double(), factor.double()),
    }
    found = {}
    for name, arguments in inputs.items():
        _, *of_inputs = gradients(info_nce if name == "ours" else dense, *arguments)
        if name == "ours":  # losses one by one: the errors of their mean cancel by chance
            losses = info_nce(*arguments, reduction="none")
            assert losses[0].dtype == torch.float32 and of_inputs[0].dtype == dtype
        else:
            logits = arguments[2] * arguments[0] @ arguments[1].T
            losses = [F.cross_entropy(z, torch.arange(83), reduction="none") for z in (logits, logits.T)]
        found[name] = [*losses, *of_inputs]
    within_budget(found["ours"], found["eager"], found["float64"], dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [-10.0, 0.0, 3.0])
def test_error_budget_of_the_sigmoid(run, dtype, bias):
    image, text = (x.to(dtype) for x in features(83, 83, 48, noise=0.5))
    rest = torch.tensor(10.0), torch.tensor(bias)
    got = gradients(sigmoid_loss, image, text, *rest)
    eager = gradients(dense_sigmoid, image, text, *(x.to(dtype) for x in rest))
    within_budget(got, eager, gradients(dense_sigmoid, *(x.double() for x in (image, text, *rest))), dtype)


@pytest.mark.parametrize("n", [1, 16, 20, 59])
def test_sigmoid_equals_the_dense_loss(run, n):
    image, text = features(n, n + 3, 6)
    rng = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 5, (n,), generator=rng), torch.randint(0, 5, (n + 3,), generator=rng)
    diagonal = torch.zeros(n, n + 3, dtype=torch.bool)
    diagonal[torch.arange(n), torch.arange(n) + 2] = True
    cases = [
        (dict(offset=2), diagonal),
        (dict(offset=None), torch.zeros(n, n + 3, dtype=torch.bool)),
        (dict(positives=ids), ids[0][:, None] == ids[1]),
        (dict(positives=diagonal), diagonal),
    ]
    for options, positive in cases:
        want = _reference.sigmoid_loss(image.numpy(), text.numpy(), 7.0, -2.0, positive.numpy())
        leaves = [image.float(), text.float(), torch.tensor(7.0), torch.tensor(-2.0)]
        got = gradients(lambda *x, o=options: sigmoid_loss(*x, reduction="sum", **o), *leaves)
        for x, name in zip(got, ("loss", "of_image", "of_text", "of_scale", "of_bias"), strict=True):
            expected = torch.from_numpy(np.asarray(want[name]))
            torch.testing.assert_close(x.double(), expected, rtol=2e-5, atol=2e-5, msg=name)
        alone = sigmoid_loss(*leaves, reduction="sum", **options)
        torch.testing.assert_close(alone, got[0], rtol=1e-6, atol=1e-6)


def test_critic_is_equation_5_and_has_its_gradient(run):
    image, text = features(41, 41, 6)

    def eager(a, b):
        scores = a @ b.T
        apart = (F.softplus(scores) * (1 - torch.eye(41))).sum() / (41 * 40)
        return 2 * math.log(2) - F.softplus(-scores.diagonal()).mean() - apart

    for got, want in zip(gradients(js_critic, image.float(), text.float()), gradients(eager, image, text), strict=True):
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_finite_at_a_scale_of_100(run, dtype):
    if run != "torch" and dtype == torch.float16:
        pytest.skip("cpp does not compute on float16")
    x = F.normalize(torch.randn(60, 16), dim=1)
    for image, text in ((x, x), (x, -x), (x, x.roll(1, 0)), (x[:1].expand(60, 16), x), (x, torch.zeros_like(x))):
        found = gradients(info_nce, image.to(dtype), text.to(dtype), torch.tensor(100.0))
        found += gradients(sigmoid_loss, image.to(dtype), text.to(dtype), torch.tensor(100.0), torch.tensor(-10.0))
        assert all(x.isfinite().all() for x in found)


def test_not_finite_inputs_show(run, monkeypatch):
    image, text = (x.float() for x in features(50, 50, 8))
    for bad in (math.nan, math.inf):
        spoiled = text.clone()
        spoiled[40, 3] = bad
        assert not info_nce(image, spoiled, 10.0).isfinite()
        assert not sigmoid_loss(image, spoiled, 10.0, 0.0).isfinite() or bad == math.inf
        with monkeypatch.context() as m:
            m.setenv("CMR_FAST_CHECK_FINITE", "1")
            with pytest.raises(InputError, match=r"text must be finite, got 1 that are not, the first at \[40, 3\]"):
                info_nce(image, spoiled, 10.0)
            with pytest.raises(InputError, match="logit_bias must be finite"):
                sigmoid_loss(image, text, 10.0, math.nan)
            info_nce(image, text, 10.0)


def test_not_contiguous(run):
    image, text = (x.float() for x in features(45, 45, 12))
    want = gradients(info_nce, image, text, torch.tensor(9.0))
    strange = image.T.contiguous().T, torch.stack([text, text], 2)[:, :, 0]
    leaves = [x.requires_grad_() for x in strange]
    scale = torch.tensor([9.0], requires_grad=True)
    loss = info_nce(*leaves, scale)
    got = [loss.detach(), *torch.autograd.grad(loss, [*leaves, scale])]
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g.reshape(w.shape), w)


def test_a_bias_changes_nothing(run):
    image, text = (x.float() for x in features(20, 20, 8))
    plain = gradients(info_nce, image, text, torch.tensor(9.0))
    biased = gradients(
        lambda a, b, s, c: info_nce(a, b, s, logit_bias=c), image, text, torch.tensor(9.0), torch.tensor(-4.0)
    )
    assert all(torch.equal(a, b) for a, b in zip(plain, biased, strict=False)) and float(biased[-1]) == 0
    assert torch.equal(info_nce(image, text, 9.0, logit_bias=-4.0), plain[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_threads_runs_and_kept_similarities_change_no_bit(small_tiles, monkeypatch, dtype):
    image, text = (x.to(dtype) for x in features(230, 230, 40))
    positives = torch.arange(230) // 3
    for loss, rest in (
        (info_nce, [torch.tensor(30.0)]),
        (lambda *x, **o: info_nce(*x, positives=positives, **o), [torch.tensor(30.0)]),
        (sigmoid_loss, [torch.tensor(10.0), torch.tensor(-10.0)]),
    ):
        want = gradients(lambda *x, f=loss: f(*x, backend="cpp", threads=1), image, text, *rest)
        for threads, kept in ((1, 0), (2, 1 << 30), (3, 0), (3, 100 * 230 * image.element_size()), (8, 1 << 30)):
            monkeypatch.setattr(tiles, "KEEP_BYTES", kept)
            got = gradients(lambda *x, f=loss, t=threads: f(*x, backend="cpp", threads=t), image, text, *rest)
            assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True)), (threads, kept)


def test_backward_twice(run):
    image, text = (x.float().requires_grad_() for x in features(45, 45, 8))
    for loss in (info_nce(image, text, 10.0), sigmoid_loss(image, text, 10.0, -1.0)):
        first = torch.autograd.grad(loss, (image, text), retain_graph=True)
        second = torch.autograd.grad(2 * loss, (image, text))
        assert all(torch.equal(2 * a, b) for a, b in zip(first, second, strict=True))


def test_autocast_does_not_reach_the_products(run):
    image, text = (x.float() for x in features(45, 45, 8))
    with torch.autocast("cpu", torch.bfloat16):
        inside = info_nce(image, text, 10.0)
    assert torch.equal(inside, info_nce(image, text, 10.0))


def test_other_torch_threads_are_left_alone(small_tiles):
    before = torch.get_num_threads()
    image, text = (x.float() for x in features(100, 100, 8))
    info_nce(image, text, 10.0, backend="cpp", threads=4)
    assert torch.get_num_threads() == before


@pytest.mark.parametrize("positives", ["diagonal", "ids", "soft"])
def test_gradcheck(monkeypatch, positives):
    monkeypatch.setattr(tiles, "TORCH_PAIRS", 12)
    image, text = (x.requires_grad_() for x in features(5, 7, 3))
    options = {
        "diagonal": dict(offset=1),
        "ids": dict(positives=(torch.arange(5) // 2, torch.arange(7) // 3)),
        "soft": dict(positives=torch.rand(5, 7, dtype=torch.float64)),
    }[positives]
    scale = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda *x: info_nce(*x, **options), (image, text, scale))
    assert torch.autograd.gradcheck(lambda *x: info_nce(*x, reduction="none", **options), (image, text, scale))
    if positives != "soft":
        bias = torch.tensor(-1.0, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(lambda *x: sigmoid_loss(*x, **options), (image, text, scale, bias))


def test_gradcheck_of_the_critic():
    image, text = (x.requires_grad_() for x in features(5, 5, 3))
    assert torch.autograd.gradcheck(js_critic, (image, text))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_opcheck(small_tiles, dtype):
    image, text = (x.to(dtype).requires_grad_() for x in features(30, 41, 8))
    of = torch.promote_types(dtype, torch.float32)
    scale, bias = (torch.tensor(x, dtype=of, requires_grad=True) for x in (9.0, -2.0))
    ids = torch.arange(30), torch.arange(41)
    calls = [
        (torch.ops.cmr_fast.info_nce, (image, text, scale, None, None, None, 3, True, True, 20, None, None)),
        (torch.ops.cmr_fast.info_nce, (image, text, scale, *ids, None, 0, True, False, 0, None, 2)),
        (
            torch.ops.cmr_fast.info_nce,
            (image, text, scale, None, None, torch.rand(30, 41), 0, False, True, 30, None, 1),
        ),
        (torch.ops.cmr_fast.sigmoid_loss, (image, text, scale, bias, *ids, None, 0, 0.5, True, None, None)),
        (torch.ops.cmr_fast.js_critic, (image, text[:30], True, None, None)),
    ]
    for call, arguments in calls:
        torch.library.opcheck(call, arguments)
    with torch.no_grad():
        found = torch.ops.cmr_fast.info_nce(*calls[0][1])
    plain = [x.detach() for x in (image, text, scale)]
    torch.library.opcheck(
        torch.ops.cmr_fast.info_nce_backward,
        (found[0], found[1], *plain, None, None, None, 3, found[2], found[3], found[4], None, None),
    )
    upstream = torch.ones((), dtype=of)
    torch.library.opcheck(torch.ops.cmr_fast.sigmoid_loss_backward, (upstream, *plain, bias.detach()))
    torch.library.opcheck(torch.ops.cmr_fast.js_critic_backward, (upstream, *plain[:2]))


def test_compiles_without_a_graph_break(small_tiles):
    image, text = (x.float() for x in features(30, 30, 8))
    rest = torch.tensor(9.0), torch.tensor(-2.0)
    ids = torch.arange(30) // 2
    losses = (
        lambda a, b, s, c: info_nce(a, b, s, logit_bias=c),
        lambda a, b, s, c: info_nce(a, b, s, positives=ids, direction="text") + 0 * c,
        lambda a, b, s, c: sigmoid_loss(a, b, s, c),
        lambda a, b, s, c: js_critic(a, b) + 0 * (s + c),
    )
    for loss in losses:
        compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
        for got, want in zip(gradients(compiled, image, text, *rest), gradients(loss, image, text, *rest), strict=True):
            torch.testing.assert_close(got, want)


def test_the_native_path_is_chosen():
    if not ISAS:
        pytest.skip("no native kernels")
    assert cf.explain("info_nce", torch.zeros(2, 2)).backend == "cpp"
    assert cf.info_nce is info_nce
    with pytest.raises(InputError, match=r"computes on float32 and bfloat16, the features are torch\.float64"):
        info_nce(*features(3, 3, 2), 1.0, backend="cpp")


def test_the_native_path_runs_the_epilogue(monkeypatch):
    if not ISAS:
        pytest.skip("no native kernels")
    ran = []

    class Spy:
        def __getattr__(self, name):
            ran.append(name)
            return getattr(NATIVE, name)

    spy = Spy()
    monkeypatch.setattr(_dispatch, "native", lambda: spy)
    monkeypatch.setattr(_dispatch, "unavailable", lambda *_: None)
    monkeypatch.setattr(_dispatch, "choose_isa", lambda: ISAS[0])
    image, text = (x.float().requires_grad_() for x in features(8, 8, 4))
    info_nce(image, text, 5.0).backward()
    sigmoid_loss(image, text, 5.0).backward()
    assert {"infonce_forward", "infonce_gradient", "infonce_sigmoid"} <= set(ran)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"text": torch.zeros(4, 2)}, r"one width, got \(4, 3\) and \(4, 2\)"),
        ({"image": torch.zeros(4)}, r"image must be a floating-point tensor \(N, d\), got torch.float32 \(4,\)"),
        ({"text": torch.zeros(4, 3, dtype=torch.int64)}, "text must be a floating-point tensor"),
        ({"image": np.zeros((4, 3))}, "got ndarray"),
        ({"text": torch.zeros(4, 3).double()}, "agree in dtype and device"),
        ({"text": torch.zeros(4, 3, device="meta")}, "agree in dtype and device, got .* cpu and .* meta"),
        ({"text": torch.zeros(3, 3)}, "at least 4 texts, got 3"),
        ({"offset": 1}, "offset must be from 0 to 0"),
        ({"offset": -1}, "got -1"),
        ({"logit_scale": torch.zeros(2)}, "logit_scale must be a number or a tensor of one float"),
        ({"logit_scale": torch.zeros((), device="meta")}, "logit_scale must be on cpu"),
        ({"positives": torch.zeros(3, dtype=torch.int64)}, r"must be int64 \(4,\) and \(4,\), got torch.int64 \(3,\)"),
        ({"positives": torch.zeros(4)}, "must be int64"),
        ({"positives": torch.zeros(4, 5)}, r"bool or float \(4, 4\), got torch.float32 \(4, 5\)"),
        ({"positives": torch.zeros(4, 4, dtype=torch.int64)}, "bool or float"),
        ({"positives": torch.arange(4), "offset": 2}, "must be 0 where positives are given"),
        ({"positives": torch.zeros(4, 4, device="meta")}, "positives must be dense tensors on cpu"),
        ({"direction": "row"}, "direction must be both, image or text, got 'row'"),
        ({"reduction": "max"}, "reduction must be mean, sum or none, got 'max'"),
        ({"backend": "cuda"}, "has the backends cpp, torch"),
        ({"threads": 0}, "threads must be 1 or more"),
    ],
)
def test_refuses(change, message):
    good = {"image": torch.zeros(4, 3), "text": torch.zeros(4, 3), "logit_scale": 1.0}
    with pytest.raises(InputError, match=message):
        info_nce(**(good | change))


def test_the_sigmoid_refuses_what_it_cannot_do():
    x = torch.zeros(4, 3)
    with pytest.raises(InputError, match="must be ids or bool"):
        sigmoid_loss(x, x, 1.0, positives=torch.ones(4, 4))
    with pytest.raises(InputError, match="reduction must be mean or sum"):
        sigmoid_loss(x, x, 1.0, reduction="none")
    with pytest.raises(InputError, match="offset must be from 0 to 0"):
        sigmoid_loss(x, x, 1.0, offset=1)


@pytest.mark.parametrize("bad", [-1.0, float("nan"), float("inf")])
def test_weights_of_positives_are_checked(bad):
    image, text = torch.randn(3, 4), torch.randn(5, 4)
    weights = torch.rand(3, 5)
    weights[1, 2] = bad
    with pytest.raises(InputError, match="finite and 0 or more"):
        info_nce(image, text, 1.0, positives=weights)


def test_more_images_than_texts_and_odd_offsets_are_named():
    with pytest.raises(InputError, match="at least 5 texts, got 3"):
        info_nce(torch.randn(5, 4), torch.randn(3, 4), 1.0)
    with pytest.raises(InputError, match="offset must be an integer"):
        info_nce(torch.randn(3, 4), torch.randn(5, 4), 1.0, offset=1.5)


@pytest.mark.parametrize("loss", [info_nce, sigmoid_loss])
def test_a_second_derivative_is_refused(loss):
    image, text = (torch.randn(4, 3, requires_grad=True) for _ in range(2))
    (gradient,) = torch.autograd.grad(loss(image, text, 2.0), image, create_graph=True)
    with pytest.raises(InputError, match="differentiated once"):
        torch.autograd.grad(gradient.square().sum(), image)


def test_explain_knows_the_public_names():
    x = torch.randn(2, 3)
    for name in ("info_nce", "sigmoid_loss", "js_critic", "pairwise_nll"):
        assert cf.explain(name, x).backend in ("cpp", "torch")
