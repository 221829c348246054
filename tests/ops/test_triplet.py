"""Triplet losses against loops over every triplet: every instruction set, the torch path, odd shapes, ties, labels."""

import itertools
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ways import ISAS, NATIVE

import cmr_fast as cf
from cmr_fast.ops import _reference, _triplet_blocks, acmr_triplet, triplet, triplet_margin

DISTANCES = ("euclidean", "squared", "cosine", "dot")
EPS = float(np.finfo(np.float32).eps)


def labels(rng, n, classes):
    """`classes` ids where negative, else multi-hot of that width."""
    return rng.integers(0, -classes, n) if classes < 0 else rng.random((n, classes)) < 1.2 / (classes + 1)


def problem(seed, n, others=None, classes=-3, width=5, whole=True):
    """Points of few whole coordinates around 0: distances tie often, their squares and products are exact in float32.

    Or, not whole, of the normal distribution.
    """
    rng = np.random.default_rng(seed)

    def draw(m):
        if not whole:
            return rng.standard_normal((m, width)).astype(np.float32)
        half = rng.integers(-2, 3, (m // 2, width))
        return rng.permutation(np.concatenate([half, -half, np.zeros((m % 2, width))])).astype(np.float32)

    cross = {} if others is None else {"other": draw(others), "other_labels": labels(rng, others, classes)}
    return (draw(n), labels(rng, n, classes)), cross


def gradients(x, labels, margin, other=None, other_labels=None, dtype=torch.float32, **options):
    """Loss, and the gradients of x and other as float64 arrays."""
    leaves = [None if v is None else torch.tensor(v, dtype=dtype).requires_grad_() for v in (x, other)]
    theirs = None if other_labels is None else torch.as_tensor(other_labels)
    mine = torch.as_tensor(labels)
    loss = triplet_margin(leaves[0], mine, margin, other=leaves[1], other_labels=theirs, **options)
    loss.backward()
    return float(loss.detach()), [v.grad.double().numpy() for v in leaves if v is not None]


def oracle_gradients(x, y, weights, distance):
    """Chain rule from the derivative by the distances (A, N), pair by pair; none where a distance is 0."""
    x, y = x.astype(np.float64), y.astype(np.float64)
    gx, gy = np.zeros_like(x), np.zeros_like(y)
    for i, j in zip(*np.nonzero(weights), strict=True):
        if distance == "dot":
            a, b = -y[j], -x[i]
        elif distance == "cosine":
            nx, ny = np.linalg.norm(x[i]), np.linalg.norm(y[j])
            if nx == 0 or ny == 0:
                continue
            u, v = x[i] / nx, y[j] / ny
            a, b = -(v - u * (u @ v)) / nx, -(u - v * (u @ v)) / ny
        else:
            a = x[i] - y[j]
            a = 2 * a if distance == "squared" else a / max(np.linalg.norm(a), 1e-300)
            b = -a
        gx[i] += weights[i, j] * a
        gy[j] += weights[i, j] * b
    return gx, gy


@pytest.mark.parametrize("mining", triplet.MINING)
@pytest.mark.parametrize("distance", ["squared", "dot"])
@pytest.mark.parametrize("classes", [-3, 4, 70], ids=["ids", "4 labels", "70 labels"])
@pytest.mark.parametrize("cross", [False, True], ids=["batch", "cross"])
def test_equals_the_loop_over_triplets_ties_included(run, mining, distance, classes, cross):
    """Whole numbers, so that float32 makes no error and every tie is one: losses and gradients are equal."""
    for n, others in ((1, 1), (2, 3), (13, 9), (34, 50)):
        (x, mine), their = problem(n, n, others if cross else None, classes)
        for margin, reduction in itertools.product((0.0, 1.5, 4.0), triplet.REDUCTIONS):
            options = {"mining": mining, "distance": distance, "reduction": reduction}
            want, weights = _reference.triplet_margin(x, mine, margin, **their, **options)
            got, grads = gradients(x, mine, margin, **their, **options)
            assert got == pytest.approx(want, rel=3 * EPS)
            gx, gy = oracle_gradients(x, their.get("other", x), weights, distance)
            for ours, exact in zip(grads, (gx, gy) if cross else (gx + gy,), strict=True):
                np.testing.assert_allclose(ours, exact, rtol=1e-5, atol=1e-5 * max(1, np.abs(exact).max()))


@pytest.mark.parametrize("mining", triplet.MINING)
@pytest.mark.parametrize("distance", ["euclidean", "cosine"])
def test_distances_with_roots(run, mining, distance):
    for n, others, classes in ((17, None, -4), (31, 18, 5), (64, None, 3), (65, None, -2)):
        (x, mine), their = problem(n, n, others, classes, whole=False)
        for reduction in triplet.REDUCTIONS:
            options = {"mining": mining, "distance": distance, "reduction": reduction}
            want, weights = _reference.triplet_margin(x, mine, 0.3, **their, **options)
            got, grads = gradients(x, mine, 0.3, **their, **options)
            assert got == pytest.approx(want, rel=1e-5, abs=1e-6)
            gx, gy = oracle_gradients(x, their.get("other", x), weights, distance)
            for ours, exact in zip(grads, (gx, gy) if others else (gx + gy,), strict=True):
                # a triplet whose hinge float32 puts on the other side of 0 may differ
                assert np.abs(ours - exact).max() <= 5e-3 * np.abs(exact).max() + 1e-6


@pytest.mark.parametrize("mining", triplet.MINING)
@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("cross", [False, True], ids=["batch", "cross"])
def test_gradcheck(mining, distance, cross):
    (x, mine), their = problem(3, 11, 8 if cross else None, whole=False)
    leaves = [torch.from_numpy(v).double().requires_grad_() for v in (x, *([their["other"]] if cross else []))]
    kinds = [torch.from_numpy(v) for v in (mine, *([their["other_labels"]] if cross else []))]

    def loss(a, b=None):
        return triplet_margin(
            a, kinds[0], 0.4, mining=mining, distance=distance, other=b, other_labels=kinds[1] if cross else None
        )

    assert torch.autograd.gradcheck(loss, leaves)


def test_opcheck():
    (x, mine), their = problem(4, 12, 7, classes=3)
    x, other = torch.from_numpy(x), torch.from_numpy(their["other"])
    packed = [
        triplet._as_relevance(torch.from_numpy(v), t, "labels", "x")
        for v, t in ((mine, x), (their["other_labels"], other))
    ]
    for backend in ("cpp", "torch"):
        for needs_x, needs_other in ((True, True), (False, True), (False, False)):
            a, b = x.clone().requires_grad_(needs_x), other.clone().requires_grad_(needs_other)
            arguments = (a, b, *packed, 0.5, "all", "euclidean", "mean", needs_x, needs_other, backend, 1)
            torch.library.opcheck(torch.ops.cmr_fast.triplet_margin.default, arguments)
        a = x.clone().requires_grad_()
        arguments = (a, None, packed[0], None, 0.5, "semihard", "squared", "mean_nonzero", True, False, backend, 1)
        torch.library.opcheck(torch.ops.cmr_fast.triplet_margin.default, arguments)
        a, b = (torch.randn(9, 4).requires_grad_() for _ in range(2))
        ids = torch.arange(9) % 3
        arguments = (a, b, ids, 0.5, 0.3, "mean", True, True, backend, 1)
        torch.library.opcheck(torch.ops.cmr_fast.acmr_triplet.default, arguments)
    torch.library.opcheck(
        torch.ops.cmr_fast.triplet_margin_backward.default, (torch.tensor(2.0), x, other), test_utils="test_schema"
    )


@pytest.mark.parametrize("multi", [False, True])
def test_compile(multi):
    (x, mine), _ = problem(5, 20, classes=4 if multi else -3, whole=False)
    kinds = torch.from_numpy(mine)

    def loss(a):
        y = a * 2
        return triplet_margin(y, kinds, 0.4) + acmr_triplet(y, y.flip(0), kinds, 1.0, 0.5)

    results = []
    for function in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        a = torch.from_numpy(x).requires_grad_()
        value = function(a)
        value.backward()
        results.append((value.detach(), a.grad))
    assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])


@pytest.mark.parametrize("mining", triplet.MINING)
def test_same_bits_on_every_instruction_set_number_of_threads_and_run(mining, monkeypatch):
    """The last of many threads' rows, several blocks, weights of 31-bit labels, and all of it twice."""
    monkeypatch.setattr(_triplet_blocks, "BLOCK", _triplet_blocks.BLOCK | {"cpp": 1 << 15})
    (x, mine), their = problem(6, 300, 170, classes=70, whole=False)
    for cross in ({}, their):
        results = []
        for isa in ISAS:
            monkeypatch.setenv("CMR_FAST_ISA", isa)
            results += [gradients(x, mine, 0.2, mining=mining, threads=threads, **cross) for threads in (1, 2, 7, 2)]
        for loss, grads in results[1:]:
            assert loss == results[0][0]
            for a, b in zip(grads, results[0][1], strict=True):
                np.testing.assert_array_equal(a, b)


def test_torchs_threads_do_not_change_the_result():
    (x, mine), _ = problem(7, 1100, classes=-10, width=200, whole=False)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(gradients(x, mine, 0.3))
    finally:
        torch.set_num_threads(before)
    for loss, grads in results[1:]:
        assert loss == results[0][0]
        np.testing.assert_array_equal(grads[0], results[0][1][0])


@pytest.mark.parametrize("block", [1, 100, 3000])
@pytest.mark.parametrize("cross", [False, True], ids=["batch", "cross"])
def test_blocks_change_nothing(run, block, cross, monkeypatch):
    (x, mine), their = problem(8, 60, 40 if cross else None)
    whole = gradients(x, mine, 1.0, distance="squared", **their)
    monkeypatch.setattr(_triplet_blocks, "BLOCK", dict.fromkeys(_triplet_blocks.BLOCK, block))
    parts = gradients(x, mine, 1.0, distance="squared", **their)
    assert whole[0] == parts[0]
    for a, b in zip(whole[1], parts[1], strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * np.abs(a).max())


def eager(x, labels, margin):
    """All triplets broadcast, as plain torch: the mean over them."""
    d = torch.cdist(x, x)
    alike = labels[:, None] == labels
    positive = alike & ~torch.eye(len(x), dtype=torch.bool)
    hinges = (d[:, :, None] - d[:, None, :] + margin).clamp(min=0) * (positive[:, :, None] & ~alike[:, None, :])
    return hinges.sum() / (positive.sum(1) * (~alike).sum(1)).sum()


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("scale", [0.1, 1.0, 30.0])
def test_error_budget(run, seed, scale):
    """Against float64, at most twice the error of eager torch in float32."""
    (x, mine), _ = problem(seed, 96, classes=-6, width=64, whole=False)
    x, kinds = torch.from_numpy(x * scale), torch.from_numpy(mine)

    def result(function, dtype):
        leaf = x.to(dtype, copy=True).requires_grad_()
        loss = function(leaf, kinds, 0.2 * scale)
        loss.backward()
        return loss.detach().double(), leaf.grad.double()

    exact, plain = result(eager, torch.float64), result(eager, torch.float32)
    ours = result(triplet_margin, torch.float32)
    rounding = EPS * torch.pdist(x.double()).mean()  # of one distance
    assert (ours[0] - exact[0]).abs() <= 2 * (plain[0] - exact[0]).abs() + rounding
    eps = 4 * EPS * exact[1].abs().max()
    assert (ours[1] - exact[1]).norm() <= 2 * (plain[1] - exact[1]).norm() + eps


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype):
    (x, mine), _ = problem(9, 30, whole=False)
    half, kinds = torch.from_numpy(x).to(dtype).requires_grad_(), torch.from_numpy(mine)
    full = half.detach().float().requires_grad_()
    losses = [triplet_margin(v, kinds, 0.2) for v in (half, full)]
    assert losses[0].dtype == torch.float32 and torch.equal(*losses)
    for loss in losses:
        loss.backward()
    assert half.grad.dtype == dtype and torch.equal(half.grad, full.grad.to(dtype))


def test_autocast_changes_nothing():
    (x, mine), _ = problem(9, 30, whole=False)
    plain = gradients(x, mine, 0.2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = gradients(x, mine, 0.2)
    assert plain[0] == cast[0] and np.array_equal(plain[1][0], cast[1][0])


@pytest.mark.parametrize("mining", triplet.MINING)
def test_a_batch_without_triplets_is_zero_with_a_gradient_of_zeros(run, mining):
    x = np.random.default_rng(0).standard_normal((6, 3)).astype(np.float32)
    for kinds in (np.zeros(6, np.int64), np.arange(6), np.zeros((6, 2), bool)):
        for reduction in triplet.REDUCTIONS:
            loss, grads = gradients(x, kinds, 1.0, mining=mining, reduction=reduction)
            assert loss == 0 and not grads[0].any()
    for shape in ((0, 3), (1, 3), (2, 0)):
        loss, grads = gradients(np.zeros(shape, np.float32), np.arange(shape[0]), 1.0, mining=mining)
        assert loss == 0 and grads[0].shape == shape and not grads[0].any()
    loss, grads = gradients(x, np.arange(6), 1.0, mining=mining, other=x[:0], other_labels=np.zeros(0, np.int64))
    assert loss == 0 and not grads[0].any() and grads[1].shape == (0, 3)


def test_equal_points_have_a_gradient_of_zero_between_them(run):
    x = np.full((4, 3), 0.3, np.float32)
    x[2:] += np.float32(1e-3)
    loss, grads = gradients(x, np.array([0, 1, 0, 1]), 0.5)
    assert loss > 0 and np.isfinite(grads[0]).all() and np.abs(grads[0]).max() < 10
    same = gradients(np.full((4, 3), 0.3, np.float32), np.array([0, 1, 0, 1]), 0.5)
    assert same[0] == pytest.approx(0.5) and not same[1][0].any()


def test_inputs_that_are_not_contiguous(run):
    (x, mine), their = problem(10, 24, 18, classes=5, width=12, whole=False)
    wide = np.repeat(np.repeat(mine, 2, axis=0), 2, axis=1)
    want = gradients(x[::2, 2:9].copy(), mine[::2].copy(), 0.3)
    leaf = torch.from_numpy(x).requires_grad_()
    loss = triplet_margin(leaf[::2, 2:9], torch.from_numpy(wide)[::4, ::2], 0.3)
    loss.backward()
    assert float(loss.detach()) == want[0] and np.array_equal(leaf.grad[::2, 2:9].double().numpy(), want[1][0])
    a = torch.from_numpy(their["other"]).T.contiguous().T
    kinds = torch.from_numpy(their["other_labels"])
    assert triplet_margin(a, kinds, 0.3) == triplet_margin(a.contiguous(), kinds, 0.3)


def test_numpy_in_numpy_out():
    (x, mine), their = problem(11, 12, 9)
    loss = triplet_margin(x, mine, 0.5, **their)
    tensors = {name: torch.from_numpy(v) for name, v in their.items()}
    assert isinstance(loss, np.ndarray) and loss.dtype == np.float32
    assert loss == triplet_margin(torch.from_numpy(x), torch.from_numpy(mine), 0.5, **tensors).numpy()


@pytest.mark.parametrize("isa", ISAS)
def test_forced_instruction_set_is_the_one_that_ran(isa, monkeypatch):
    monkeypatch.setenv("CMR_FAST_ISA", isa)
    (x, mine), _ = problem(12, 9)
    for call in (
        lambda: triplet_margin(x, mine, 0.5),
        lambda: acmr_triplet(torch.from_numpy(x), torch.from_numpy(x), torch.from_numpy(mine), 1.0, 0.5),
    ):
        NATIVE.reset_last_isa()
        call()
        assert NATIVE.last_isa() == isa
    assert cf.explain("triplet_margin", x).backend == "cpp"


def test_memory_does_not_grow_with_the_square_of_the_batch():
    """B = 8192 would take 268 MB for one float32 matrix of distances."""
    script = (
        "import re, torch, cmr_fast as cf\n"
        "def step(n):\n"
        "    x = torch.randn(n, 16).requires_grad_()\n"
        "    cf.triplet_margin(x, torch.arange(n) % 10, 0.1, threads=2).backward()\n"
        "def peak(what): return int(re.search(what + r':\\s+(\\d+)', open('/proc/self/status').read())[1]) / 1024\n"
        "step(64)\n"
        "open('/proc/self/clear_refs', 'w').write('5')\n"
        "before = peak('VmRSS')\n"
        "step(8192)\n"
        "print(peak('VmHWM') - before)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300, check=True)
    assert float(done.stdout) < 60


@given(
    n=st.integers(0, 70), others=st.one_of(st.none(), st.integers(0, 90)), classes=st.integers(-6, 80).filter(bool),
    width=st.integers(1, 9), margin=st.floats(-1, 3), mining=st.sampled_from(triplet.MINING),
    distance=st.sampled_from(("squared", "dot")), seed=st.integers(0, 2**32 - 1),
    isa=st.sampled_from(ISAS or ["scalar"]),
)  # fmt: skip
@settings(max_examples=80, deadline=None)
def test_arbitrary_shapes(n, others, classes, width, margin, mining, distance, seed, isa):
    (x, mine), their = problem(seed, n, others, classes, width)
    margin = float(np.float32(round(4 * margin) / 4))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CMR_FAST_ISA", isa)
        want, _ = _reference.triplet_margin(x, mine, margin, mining=mining, distance=distance, **their)
        got = float(triplet_margin(x, mine, margin, mining=mining, distance=distance, **their))
    assert got == pytest.approx(want, rel=3 * EPS, abs=1e-30)


def test_many_positives_on_every_depth_of_the_search(run):
    """From no positive to more than the levels that AVX-512 keeps in registers."""
    rng = np.random.default_rng(13)
    x, other = (rng.integers(-4, 5, (n, 3)).astype(np.float32) for n in (2, 2300))
    for positives in (1, 3, 7, 15, 31, 32, 63, 64, 127, 255, 256, 511, 512, 1100):
        theirs = np.ones(2300, np.int64)
        theirs[rng.permutation(2300)[:positives]] = 0
        options = {"other": other, "other_labels": theirs, "distance": "dot"}
        d = _reference.triplet_distances(x, other, "dot")
        hinges = np.clip(d[:, theirs == 0, None] + 1 - d[:, None, theirs == 1], 0, None)
        got = float(triplet_margin(x, np.zeros(2, np.int64), 1.0, **options))
        assert got == pytest.approx(hinges.mean(), rel=3 * EPS)


def test_non_finite_inputs_are_named_on_request_and_never_hidden(run, monkeypatch):
    (x, mine), _ = problem(14, 12, whole=False)
    for bad in (np.nan, np.inf):
        x[3, 1] = bad
        assert not np.isfinite(triplet_margin(x, mine, 0.5))
    monkeypatch.setenv("CMR_FAST_CHECK_FINITE", "1")
    with pytest.raises(cf.InputError, match=r"x must be finite, got 1 that are not, the first at \[3, 1\]"):
        triplet_margin(x, mine, 0.5)


X = np.zeros((4, 3), np.float32)
IDS = np.zeros(4, np.int64)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": [1.0]}, "numpy array or a torch tensor, got list"),
        ({"x": X[0]}, r"x must be float \(N, d\), got torch.float32 \(3,\)"),
        ({"x": X.astype(np.int32)}, "got torch.int32"),
        ({"labels": IDS[:3]}, "a row for each of the 4 rows of x on cpu, got 3"),
        ({"labels": IDS.astype(np.float32)}, "integer class ids, got torch.float32"),
        ({"labels": np.zeros((4, 0))}, r"multi-hot, got torch.float64 \(4, 0\)"),
        ({"margin": "wide"}, "margin must be a finite number, got 'wide'"),
        ({"margin": float("nan")}, "margin must be a finite number, got nan"),
        ({"mining": "easy"}, "all, hard, hard_negative, semihard, got 'easy'"),
        ({"distance": "manhattan"}, "euclidean, squared, cosine, dot, got 'manhattan'"),
        ({"reduction": "none"}, "mean, mean_nonzero, sum, got 'none'"),
        ({"other_labels": IDS}, "other_labels needs other"),
        ({"other": X[:3]}, "pairs row by row, got 3 and 4 rows"),
        ({"other": X[:, :2]}, "agree in width, dtype and device"),
        ({"other": X.astype(np.float64)}, "torch.float64"),
        ({"other": X, "other_labels": np.zeros((4, 2), bool)}, r"one kind and width, got \(4,\) and \(4, 2\)"),
        ({"backend": "cuda"}, "cuda"),
        ({"x": X.astype(np.float64), "backend": "cpp"}, "float32, x is torch.float64"),
    ],
)
def test_bad_input_is_refused_with_what_was_seen(change, message):
    with pytest.raises(cf.InputError, match=message):
        triplet_margin(**({"x": X, "labels": IDS, "margin": 0.5} | change))


@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("classes", [-3, 4, 70], ids=["ids", "4 labels", "70 labels"])
def test_acmr_on_every_backend(run, reduction, classes):
    """Against the separable form in float64, gradients by autograd of the norms."""
    for n in (1, 2, 17, 64):
        (image, mine), their = problem(n, n, n, classes, width=20, whole=False)
        text = their["other"]
        alike = torch.from_numpy(
            np.array([[_reference.share_label(a, b) for b in mine] for a in mine], dtype=np.float64)
        )
        results = []
        for dtype, exact in ((torch.float32, False), (torch.float64, True)):
            a, b = (torch.from_numpy(v).to(dtype).requires_grad_() for v in (image, text))
            if exact:
                d = (a[:, None] - b[None]).norm(dim=2)
                loss = torch.zeros((), dtype=dtype)
                for axis in (1, 0):
                    p, far = alike.sum(axis), (1 - alike).sum(axis)
                    pull, push = (alike * d).sum(axis), ((5.0 - d).clamp(min=0) * (1 - alike)).sum(axis)
                    if reduction == "sum":
                        loss = loss + (far * pull + 0.3 * p * push).sum()
                    elif bool((p * far > 0).any()):
                        loss = loss + (pull / p.clamp(min=1) + 0.3 * push / far.clamp(min=1))[p * far > 0].mean()
            else:
                loss = acmr_triplet(a, b, torch.from_numpy(mine), 5.0, 0.3, reduction)
            if loss.requires_grad:
                loss.backward()
            grads = [torch.zeros_like(v) if v.grad is None else v.grad for v in (a, b)]
            results.append([loss.detach().double(), *(g.double() for g in grads)])
        for got, want in zip(*results, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5 * max(1.0, float(want.abs().max())))


def test_columns_of_class_ids_and_counts_are_no_multi_hot_labels():
    x, labels = torch.randn(6, 3), torch.tensor([0, 1, 2, 0, 1, 2])
    with pytest.raises(cf.InputError, match="multi-hot"):
        triplet_margin(x, labels[:, None], 0.2)
    with pytest.raises(cf.InputError, match="0 or 1"):
        triplet_margin(x, 5 * torch.nn.functional.one_hot(labels), 0.2)


def test_a_second_derivative_is_refused():
    x = torch.randn(6, 3, requires_grad=True)
    loss = triplet_margin(x, torch.tensor([0, 1, 2, 0, 1, 2]), 0.2)
    (gradient,) = torch.autograd.grad(loss, x, create_graph=True)
    with pytest.raises(cf.InputError, match="differentiated once"):
        torch.autograd.grad(gradient.square().sum(), x)


@pytest.mark.parametrize(("size", "far"), [(20, 1e4), (100, 1e3), (100, 1e5), (300, 1e4)])
def test_one_far_row_costs_the_others_no_digits(run, size, far):
    """The loss, of distances some of which are large; and the gradient of the other rows. The budget is eager's."""
    draws = torch.Generator().manual_seed(0)
    x = torch.nn.functional.normalize(torch.randn(size, 32, generator=draws))
    x[0] *= far
    kinds = torch.randint(0, 5, (size,), generator=draws)
    kinds[0] = 99

    def eager(x):
        d, same = torch.cdist(x, x), kinds[:, None] == kinds
        which = (same & ~torch.eye(size, dtype=torch.bool))[:, :, None] & ~same[:, None, :]
        return torch.where(which, d[:, :, None] - d[:, None, :] + 0.2, 0).clamp(min=0).sum() / which.sum()

    results = []
    for loss, dtype in ((eager, torch.float64), (eager, x.dtype), (lambda x: triplet_margin(x, kinds, 0.2), x.dtype)):
        leaf = x.to(dtype, copy=True).requires_grad_()
        value = loss(leaf)
        value.backward()
        results.append((float(value.detach()), leaf.grad.double()[1:]))
    (want, slope), (_, eager_slope), (got, ours) = results
    assert abs(got / want - 1) <= EPS / 2 + 1e-8  # float64 sums of float32 distances, rounded once
    assert (ours - slope).norm() <= 2 * (eager_slope - slope).norm() + 1e-6 * slope.norm()


@pytest.mark.parametrize("others", [None, 1, 40])
@pytest.mark.parametrize("size", [1, 2, 17, 18, 35, 400])
def test_the_native_origin_is_that_of_the_torch_path(size, others):
    """Coordinates far from 0 beside their spread, near it, constant ones, zeros and a NaN."""
    draws = torch.Generator().manual_seed(size)
    centre = torch.tensor([0, 0, 1, -3, 1e4, 0.5, 0, 2, 7])
    spread = torch.tensor([0, 1, 1, 0.5, 1, 1, 1e-3, 0, 1])
    x, y = (centre + spread * torch.randn(n, 9, generator=draws) for n in (size, others or 1))
    x[0, 8] = float("nan")
    y = x if others is None else y
    want = _triplet_blocks._origin(x, y)
    got = _triplet_blocks._native_origin(x, y)
    assert want is not None and got is not None and torch.equal(got, want) and got[4] != 0
    assert _triplet_blocks._native_origin(x[:, :1] * 0, x[:, :1] * 0) is None
