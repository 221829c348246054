"""Pairwise likelihoods against float64: every instruction set, the torch path, every kind of similarity, odd shapes."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import softplus
from ways import ISAS, NATIVE

import cmr_fast as cf
from cmr_fast.ops import _reference, pairwise_nll, pairwise_squared

KINDS = ("packed", "bool labels", "classes", "bool", "uint8", "int64", "float32", "float64", "transposed")


def codes(seed, n, size, bits, spread=1.0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    f, g = (spread * torch.randn(count, bits, generator=generator) for count in (n, size))
    return f.to(dtype).requires_grad_(), g.to(dtype).requires_grad_()


def similarities(kind, n, size, classes=24, seed=0):
    """What pairwise_nll is given, and the matrix S that it means."""
    rng = np.random.default_rng(seed)
    if kind == "classes":
        ids = [torch.from_numpy(rng.integers(-2, 2, count)) for count in (n, size)]
        return tuple(ids), (ids[0][:, None] == ids[1]).double()
    hot = [torch.from_numpy(rng.random((count, classes)) < 1.5 / classes) for count in (n, size)]
    s = (hot[0].double() @ hot[1].double().T > 0).double()
    if kind == "packed":
        return tuple(cf.pack_codes(x) for x in hot), s
    if kind == "bool labels":
        return tuple(hot), s
    if kind in ("float32", "float64", "transposed"):
        s = s * torch.from_numpy(rng.random((n, size)).astype(np.float32))
    if kind == "transposed":
        return s.float().T.contiguous().T, s
    return s.to(getattr(torch, kind)), s


def gradients(loss, *tensors):
    return torch.autograd.grad(loss, tensors)


def eager(f, g, s, squared=False):
    theta = 0.5 * f @ g.T
    return 0.5 * (s * theta - softplus(theta)).square().sum() if squared else (softplus(theta) - s * theta).sum()


def assert_within_budget(f, g, given, s, squared=False):
    """Loss and gradients: at most twice the error of eager torch in float32, plus eps of the terms that are summed."""
    s = s * (0.999 if squared else 1)
    want = [torch.as_tensor(x) for x in _reference.pairwise(f.detach(), g.detach(), s, squared=squared)]
    theirs = eager(f, g, s.to(f.dtype), squared)
    ours = (pairwise_squared if squared else pairwise_nll)(f, g, given, threads=2)
    theta = (0.5 * f @ g.T).detach().double()
    slope = 0.5 * ((s * theta - softplus(theta)) * (s - theta.sigmoid()) if squared else theta.sigmoid() - s).abs()
    terms = want[0], slope @ g.detach().double().abs(), slope.T @ f.detach().double().abs()
    for got, other, exact, scale in zip(
        (ours, *gradients(ours, f, g)), (theirs, *gradients(theirs, f, g)), want, terms, strict=True
    ):
        assert got.shape == other.shape
        error, budget = ((x.detach().double() - exact).abs().max() for x in (got, other))
        # exp, log1p and the square are good to 2 units each; of a single term eager may be right by chance
        assert error <= 2 * budget + 4 * torch.finfo(got.dtype).eps * (scale.max() + 1e-3)


@pytest.mark.parametrize("squared", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_similarity(run, kind, squared):
    for n, size, bits in ((1, 1, 1), (3, 15, 2), (17, 33, 16), (128, 300, 64)):
        given, s = similarities(kind, n, size)
        assert_within_budget(*codes(n, n, size, bits), given, s, squared)


@pytest.mark.parametrize("classes", [1, 8, 31, 32, 33, 64, 80, 300])
def test_labels_of_any_width(run, classes):
    given, s = similarities("packed", 20, 70, classes)
    assert_within_budget(*codes(1, 20, 70, 8), given, s)


@pytest.mark.parametrize("kind", ["packed", "classes", "bool", "float32"])
def test_many_tiles(run, kind):
    given, s = similarities(kind, 300, 1201)
    assert_within_budget(*codes(2, 300, 1201, 32), given, s)
    assert_within_budget(*codes(2, 300, 1201, 32), given, s, squared=True)


@given(
    n=st.integers(1, 40), size=st.integers(1, 90), bits=st.integers(1, 70), kind=st.sampled_from(KINDS),
    classes=st.integers(1, 100), spread=st.sampled_from([0.0, 0.01, 1.0, 5.0]), squared=st.booleans(),
    seed=st.integers(0, 2**31), isa=st.sampled_from(ISAS or ["scalar"]),
)  # fmt: skip
@settings(max_examples=80, deadline=None)
def test_arbitrary_shapes(n, size, bits, kind, classes, spread, squared, seed, isa):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CMR_FAST_ISA", isa)
        given, s = similarities(kind, n, size, classes, seed)
        assert_within_budget(*codes(seed, n, size, bits, spread), given, s, squared)


def test_sigmoid_and_softplus_to_a_few_units_in_the_last_place(run):
    """One pair at a time for the loss, all at once for the gradient, over every size of Theta that matters."""
    theta = torch.cat([torch.linspace(-103, 103, 4001), torch.logspace(-8, 2, 400), -torch.logspace(-8, 2, 400)])
    one, zero = torch.ones(1, 1), torch.zeros(1, 1)
    f = theta[:, None].requires_grad_()
    (slope,) = gradients(pairwise_nll(f, one, torch.zeros(len(f), 1), scale=1.0), f)
    exact = torch.exp(-torch.logaddexp(torch.zeros(()).double(), -theta.double()))
    normal = exact > torch.finfo(torch.float32).tiny
    error = (slope[:, 0].double() - exact).abs() / exact
    assert error[normal].max() < 4 * torch.finfo(torch.float32).eps
    for s, sign in ((zero, 1), (one, -1)):  # softplus(t) - t = softplus(-t): nothing is lost
        for t in theta[::37].tolist():
            loss = float(pairwise_nll(torch.tensor([[t]]), one, s, scale=1.0))
            exact = float(torch.logaddexp(torch.zeros(()).double(), torch.tensor(sign * t).double()))
            assert abs(loss - exact) <= 4 * 1.2e-7 * exact + 1e-37


def test_finite_where_the_naive_formula_is_not(run):
    """Theta is 10^4 and -10^4 in the first two rows, with S both right and wrong."""
    f = torch.tensor([[100.0], [-100.0], [0.0]], requires_grad=True)
    g = torch.tensor([[200.0], [-200.0], [0.0]], requires_grad=True)
    s = torch.tensor([[1, 0, 0], [1, 0, 1], [0, 1, 0]])
    loss = pairwise_nll(f, g, s)
    assert loss.item() == pytest.approx(2e4 + 5 * np.log(2), rel=1e-7)
    slope_f, slope_g = gradients(loss, f, g)
    torch.testing.assert_close(slope_f, torch.tensor([[0.0], [-200.0], [100.0]]))
    torch.testing.assert_close(slope_g, torch.tensor([[50.0], [-50.0], [50.0]]))
    loss = pairwise_squared(f, g, s)
    want = _reference.pairwise(f.detach(), g.detach(), 0.999 * s, squared=True)
    assert loss.item() == pytest.approx(want[0], rel=1e-6)
    for got, exact in zip(gradients(loss, f, g), want[1:], strict=True):
        np.testing.assert_allclose(got, exact, rtol=1e-5, atol=1e-2)


def test_a_nan_is_not_hidden(run):
    f, g = codes(3, 5, 40, 4)
    f.data[2, 1] = np.nan
    loss = pairwise_nll(f, g, torch.ones(5, 40))
    slope, _ = gradients(loss, f, g)
    assert loss.isnan() and slope[2].isnan().all() and not slope[[0, 1, 3, 4]].isnan().any()


@pytest.mark.parametrize(("n", "size"), [(0, 5), (5, 0), (0, 0)])
def test_nothing_to_compare(run, n, size):
    f, g = codes(4, n, size, 3)
    for reduction in ("sum", "mean"):
        loss = pairwise_nll(f, g, torch.zeros(n, size), reduction=reduction)
        slopes = gradients(loss, f, g)
        assert loss == 0 and [x.shape for x in slopes] == [f.shape, g.shape] and not any(x.any() for x in slopes)


def test_options(run):
    f, g = (x.detach() for x in codes(5, 9, 20, 6))
    s = similarities("bool", 9, 20)[0]
    mean = pairwise_nll(f, g, s, reduction="mean").item()
    assert mean == pytest.approx(pairwise_nll(f, g, s).item() / 180, rel=1e-6)
    # CMLA's first term, log(1 + e^-Theta) + S Theta without the half, is the likelihood of 1 - S
    theta = f @ g.T
    cmla = (softplus(-theta) + s * theta).sum()
    assert pairwise_nll(f, g, ~s, scale=1.0).item() == pytest.approx(cmla.item(), rel=1e-6)
    half = pairwise_nll(f, g, s, positive=0.5).item()
    assert half == pytest.approx(pairwise_nll(f, g, 0.5 * s).item(), rel=1e-6)


def test_codes_that_are_not_contiguous(run):
    wide, g = codes(6, 30, 50, 12)
    given, s = similarities("packed", 15, 50)
    assert_within_budget(wide.detach()[::2, ::2].requires_grad_(), g.detach()[:, 6:].requires_grad_(), given, s)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_halves_are_computed_in_float32(run, dtype):
    f, g = codes(7, 40, 60, 16, dtype=dtype)
    given, s = similarities("packed", 40, 60)
    want = _reference.pairwise(f.detach().double(), g.detach().double(), s)
    loss = pairwise_nll(f, g, given)
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(want[0], rel=1e-6)
    for got, exact in zip(gradients(loss, f, g), want[1:], strict=True):
        assert got.dtype == dtype
        np.testing.assert_allclose(got.double(), exact, rtol=torch.finfo(dtype).eps, atol=1e-4)


def test_same_bits_for_any_number_of_threads(run):
    f, g = codes(8, 300, 1500, 16)
    given, _ = similarities("packed", 300, 1500)
    results, before = [], torch.get_num_threads()
    for threads in (1, 2, 2, 7):
        torch.set_num_threads(min(threads, 2))
        loss = pairwise_nll(f, g, given, threads=threads)
        results.append((loss, *gradients(loss, f, g)))
    torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_gradients_only_where_they_are_asked_for():
    f, g = codes(9, 6, 8, 4)
    s = torch.ones(6, 8)
    (only,) = gradients(pairwise_nll(f, g.detach(), s), f)
    torch.testing.assert_close(only, gradients(pairwise_nll(f, g, s), f, g)[0])
    assert not pairwise_nll(f.detach(), g.detach(), s).requires_grad
    with torch.no_grad():
        assert not pairwise_nll(f, g, s).requires_grad
    loss = pairwise_nll(f, g, s)
    (first,) = torch.autograd.grad(3 * loss, f, create_graph=True)
    torch.testing.assert_close(first, 3 * only)
    with pytest.raises(cf.InputError, match="once"):
        first.sum().backward()


@pytest.mark.parametrize("squared", [False, True])
def test_gradcheck(squared):
    f, g = codes(10, 4, 7, 3, dtype=torch.float64)
    given, _ = similarities("packed", 4, 7)
    loss = pairwise_squared if squared else pairwise_nll
    assert torch.autograd.gradcheck(lambda f, g: loss(f, g, given), (f, g))


def test_opcheck_and_compile():
    f, g = codes(11, 10, 30, 8)
    labels, s = similarities("packed", 10, 30)
    for backend in ("cpp", "torch"):
        for matrix, (mine, theirs), needs in ((None, labels, (True, True)), (s.float(), (None, None), (True, False))):
            second = g if needs[1] else g.detach()
            arguments = (f, second, matrix, mine, theirs, 0.5, 1.0, *needs, backend, 1)
            for op in (torch.ops.cmr_fast.pairwise_nll, torch.ops.cmr_fast.pairwise_squared):
                torch.library.opcheck(op.default, arguments)
    upstream = torch.ones(())
    for op in (torch.ops.cmr_fast.pairwise_nll_backward, torch.ops.cmr_fast.pairwise_squared_backward):
        torch.library.opcheck(op.default, (upstream, f.detach(), g.detach()))

    def loss(f, g):
        return pairwise_nll(torch.tanh(f), g, labels, reduction="mean")

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    got, want = compiled(f, g), loss(f, g)
    assert got == want
    assert all(torch.equal(a, b) for a, b in zip(gradients(got, f, g), gradients(want, f, g), strict=True))


def test_numpy_in_numpy_out():
    f, g = (x.detach().numpy() for x in codes(12, 5, 9, 4))
    labels, s = similarities("packed", 5, 9)
    value = pairwise_nll(f, g, tuple(x.numpy() for x in labels))
    assert isinstance(value, np.ndarray) and value == pytest.approx(_reference.pairwise(f, g, s)[0], rel=1e-6)
    assert pairwise_nll(f, g, s.numpy()) == value


@pytest.mark.parametrize("isa", ISAS)
def test_forced_instruction_set_is_the_one_that_ran(isa, monkeypatch):
    monkeypatch.setenv("CMR_FAST_ISA", isa)
    NATIVE.reset_last_isa()
    pairwise_nll(*codes(13, 3, 4, 2), torch.zeros(3, 4))
    assert NATIVE.last_isa() == isa
    assert cf.explain("pairwise_nll", np.zeros(1)).isa == isa


F, G = (x.detach() for x in codes(15, 3, 5, 8))
S = torch.zeros(3, 5)
IDS = torch.zeros(3, dtype=torch.int64), torch.zeros(5, dtype=torch.int64)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"f": F[0]}, r"must be \(n, bits\) and \(N, bits\), got \(8,\)"),
        ({"g": G[:, :4]}, r"got \(3, 8\) and \(5, 4\)"),
        ({"f": F[:, :0], "g": G[:, :0]}, r"\(3, 0\)"),
        ({"g": G.double()}, "one float dtype on one device, got torch.float32"),
        ({"f": F.int(), "g": G.int()}, "float dtype"),
        ({"f": "codes"}, "f must be a numpy array or a torch tensor, got str"),
        ({"s": S.T}, r"real matrix \(3, 5\)"),
        ({"s": S + 0j}, "complex"),
        ({"s": S.clone().requires_grad_()}, "s gets no gradient"),
        ({"s": IDS[::-1]}, r"f's labels must be packed uint8 \(3, L\)"),
        ({"s": (*IDS, IDS[0])}, "a pair, those of f and those of g, got 3"),
        ({"s": (IDS[0], torch.zeros(5, 1, dtype=torch.uint8))}, "one kind and width"),
        ({"s": (IDS[0] + 2**40, IDS[1])}, "32 bits"),
        ({"reduction": "none"}, "sum or mean, got 'none'"),
        ({"f": F.double(), "g": G.double(), "backend": "cpp"}, "computes in float32"),
        ({"backend": "cuda"}, "cuda"),
        ({"threads": 0}, "threads must be 1 or more, got 0"),
    ],
)
def test_bad_input_is_refused_with_what_was_seen(change, message):
    with pytest.raises(cf.InputError, match=message):
        pairwise_nll(**({"f": F, "g": G, "s": S} | change))


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_whole_training_set_takes_little_memory():
    """10,000 x 10,000 pairs, forward and backward: one such array alone would be 400 MB."""
    script = (
        "import re, torch, cmr_fast as cf\n"
        "f, g = (torch.randn(10_000, 16, requires_grad=True) for _ in range(2))\n"
        "labels = cf.pack_codes(torch.rand(10_000, 24) < 0.15)\n"
        "cf.pairwise_nll(f[:600], g[:600], (labels[:600], labels[:600])).backward()\n"
        "def peak(what): return int(re.search(what + r':\\s+(\\d+)', open('/proc/self/status').read())[1]) / 1024\n"
        "open('/proc/self/clear_refs', 'w').write('5')\n"
        "before = peak('VmRSS')\n"
        "cf.pairwise_nll(f, g, (labels, labels)).backward()\n"
        "print(peak('VmHWM') - before)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300, check=True)
    assert float(done.stdout) < 20
