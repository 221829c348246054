"""pgd_step_ and pgd_noise against loops in float64: every instruction set, the torch path, odd shapes, parameters per
sample and per channel, gradients that are not finite."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pgd_cases import SHAPES, eager_linf, problem
from ways import ISAS, NATIVE

from cmr_fast.errors import InputError
from cmr_fast.ops import _reference, pgd_noise, pgd_step_
from cmr_fast.ops import pgd as module


@pytest.mark.parametrize("shape", SHAPES)
def test_sign_steps_are_the_eager_formula_bit_for_bit(run, shape):
    x, gradient, origin = problem(shape)
    for step in range(4):
        expected = eager_linf(x, gradient, origin, 2 / 255, 8 / 255)
        assert pgd_step_(x, gradient, origin, alpha=2 / 255, eps=8 / 255, threads=2) is x
        assert torch.equal(x, expected), step
        gradient = gradient.roll(1)
    if run != "torch":
        assert NATIVE.last_isa() == run


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("shape", SHAPES)
def test_against_the_oracle_with_values_per_sample_and_channel(run, norm, shape):
    x, gradient, origin = problem(shape, 1)
    rng = np.random.default_rng(0)
    channels = shape[1] if len(shape) > 1 else 1
    each = [(1, 1), (shape[0], 1)] if norm == "l2" else [(1, 1), (shape[0], 1), (1, channels), (shape[0], channels)]
    for kind in each:
        alpha, eps = (rng.uniform(0.05, 0.3, kind).astype(np.float32) for _ in range(2))
        low = rng.uniform(0, 0.1, (1, channels)).astype(np.float32)
        high = rng.uniform(0.9, 1, (shape[0], channels)).astype(np.float32)
        got = pgd_step_(x.clone(), gradient, origin, alpha=alpha, eps=eps, bounds=(low, high), norm=norm)
        want = _reference.pgd_step(*(t.numpy() for t in (x, gradient, origin)), alpha, eps, low, high, norm)
        # operands below 2, at most six roundings
        np.testing.assert_allclose(got.numpy(), want, rtol=0, atol=6 * 2**-24)


def test_l2_keeps_to_the_error_budget_of_eager(run):
    x, gradient, origin = problem((6, 3, 16, 16), 2)
    want = _reference.pgd_step(
        *(t.numpy() for t in (x, gradient, origin)), *np.array([0.5, 0.7, 0.0, 1.0])[:, None, None], "l2"
    )
    got = pgd_step_(x.clone(), gradient, origin, alpha=0.5, eps=0.7, norm="l2")
    moved = x + 0.5 * (gradient / (gradient.flatten(1).norm(dim=1) + 1e-10).view(-1, 1, 1, 1))
    delta = moved - origin
    eager = (origin + delta * (0.7 / delta.flatten(1).norm(dim=1)).clamp(max=1).view(-1, 1, 1, 1)).clamp(0, 1)
    budget = 2 * np.abs(eager.numpy() - want).max() + np.finfo(np.float32).eps
    assert np.abs(got.numpy() - want).max() <= budget


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_same_bits_on_every_instruction_set_and_number_of_threads(norm, monkeypatch):
    x, gradient, origin = problem((40, 3, 40, 41), 3)
    results = []
    for isa in ISAS:
        monkeypatch.setenv("CMR_FAST_ISA", isa)
        for threads in (1, 2, 3):
            results.append(
                pgd_step_(x.clone(), gradient, origin, alpha=0.1, eps=0.2, norm=norm, backend="cpp", threads=threads)
            )
    assert all(torch.equal(results[0], r) for r in results[1:])


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_gradients_that_are_not_finite_are_noted_once(run, norm):
    x, gradient, origin = problem((5, 3, 6, 7), 4)
    before = x.clone()
    gradient[1, 2, 5, 6] = torch.nan
    gradient[4, 0, 0, 0] = torch.inf
    broken = torch.tensor([-1, -1, -1, -1, 2], dtype=torch.int32)
    pgd_step_(x, gradient, origin, alpha=0.1, eps=0.2, norm=norm, broken=broken, step=7)
    assert broken.tolist() == [-1, 7, -1, -1, 2]
    assert x.isfinite().all()
    if norm == "l2":
        assert torch.equal(x[1], before[1])


def test_a_zero_gradient_and_tiny_ones(run):
    x, gradient, origin = problem((4, 2, 3), 5, scale=0.01)
    gradient[0] = 0
    gradient[1] *= 1e-30
    moved = pgd_step_(x.clone(), gradient, origin, alpha=0.05, eps=1.0, bounds=(-5.0, 5.0), norm="l2")
    assert torch.equal(moved[0], x[0])
    torch.testing.assert_close((moved - x)[1:].flatten(1).norm(dim=1), torch.full((3,), 0.05), rtol=1e-4, atol=0)


def test_empty_batches_and_samples(run):
    for shape in ((0, 3, 4), (0,), (2, 0), (2, 3, 0)):
        x = torch.empty(shape)
        for norm in ("linf", "l2"):
            assert pgd_step_(x, x.clone(), x.clone(), alpha=0.1, eps=0.1, norm=norm).shape == shape
        assert pgd_noise(torch.arange(shape[0]), 0).shape == (shape[0], 0)


def test_gradients_and_origins_need_not_be_contiguous(run):
    x, gradient, origin = problem((2, 3, 4, 5), 6)
    want = pgd_step_(x.clone(), gradient, origin, alpha=0.1, eps=0.05)
    strided = gradient.contiguous(memory_format=torch.channels_last)
    assert torch.equal(pgd_step_(x.clone(), strided, origin.mT.contiguous().mT, alpha=0.1, eps=0.05), want)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_types_take_the_torch_path(dtype):
    x, gradient, origin = problem((3, 2, 5), 7, dtype)
    pgd_step_(x, gradient, origin, alpha=0.05, eps=0.1)
    assert x.dtype == dtype and (x.double() - origin.double()).abs().max() < 0.1 + 4e-3
    with pytest.raises(InputError, match="float32"):
        pgd_step_(x, gradient, origin, alpha=0.05, eps=0.1, backend="cpp")


def test_philox_known_answers():
    """Random123's kat_vectors for a counter and a key of zeros."""
    words = np.array([0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8])
    want = (2 * (words >> 9) + 1 - 2**23) / 2**23
    np.testing.assert_array_equal(_reference.pgd_noise(0, 0, 4), want)


@given(
    seed=st.integers(0, 2**64 - 1), index=st.lists(st.integers(-(2**63), 2**63 - 1), max_size=4),
    count=st.integers(0, 200), threads=st.integers(1, 3),
)  # fmt: skip
@settings(max_examples=30, deadline=None)
def test_noise_equals_the_oracle(seed, index, count, threads):
    index = torch.tensor(index, dtype=torch.int64)
    want = np.array([_reference.pgd_noise(seed, int(i), count) for i in index], np.float32).reshape(len(index), count)
    with pytest.MonkeyPatch.context() as patch:
        for isa in ISAS:
            patch.setenv("CMR_FAST_ISA", isa)
            got = pgd_noise(index, count, seed=seed, threads=threads, backend="cpp")
            np.testing.assert_array_equal(got.numpy(), want)
    np.testing.assert_array_equal(pgd_noise(index, count, seed=seed, backend="torch").numpy(), want)


def test_noise_depends_on_the_sample_not_on_the_batch(run):
    whole = pgd_noise(torch.arange(100), 1001, seed=5)
    assert torch.equal(pgd_noise(torch.tensor([71, 3]), 1001, seed=5), whole[[71, 3]])
    assert torch.equal(pgd_noise(torch.arange(100), 7, seed=5), whole[:, :7])
    assert not torch.equal(pgd_noise(torch.arange(100), 1001, seed=6), whole)
    assert whole.abs().max() < 1 and whole.mean().abs() < 0.01 and abs(whole.var() - 1 / 3) < 0.01
    assert len(whole.unique()) > 90_000


def test_opcheck_and_compile():
    x, gradient, origin = problem((3, 2, 8), 8)
    values = [torch.full((1, 1), v) for v in (0.1, 0.2, 0.0, 1.0)]
    broken = torch.full((3,), -1, dtype=torch.int32)
    for l2 in (False, True):
        for flags in (None, broken):
            torch.library.opcheck(
                torch.ops.cmr_fast.pgd_step_.default, (x.clone(), gradient, origin, *values, flags, 0, l2, None, 1)
            )
    torch.library.opcheck(torch.ops.cmr_fast.pgd_noise.default, (torch.arange(3), 10, 0, None, 1))

    @torch.compile(fullgraph=True, backend="aot_eager")
    def two_steps(x, gradient, origin):
        moved = x.clone()
        for _ in range(2):
            torch.ops.cmr_fast.pgd_step_(moved, gradient, origin, *values, None, 0, False, None, 1)
        return moved + 1

    want = x.clone()
    for _ in range(2):
        pgd_step_(want, gradient, origin, alpha=0.1, eps=0.2)
    assert torch.equal(two_steps(x, gradient, origin), want + 1)


def test_bad_input():
    x, gradient, origin = problem((2, 3, 4), 9)

    def step(**o):
        return pgd_step_(o.pop("x", x), gradient, origin, **{"alpha": 0.1, "eps": 0.1, **o})

    for options, words in (
        ({"norm": "l1"}, "norm must be one of linf, l2"),
        ({"x": x.mT}, "contiguous"),
        ({"x": x[:1]}, r"gradient must be like x"),
        ({"x": x.double()}, "gradient must be like x"),
        ({"x": x.long()}, "float tensor"),
        ({"eps": torch.ones(3)}, r"eps must be a number, \(2,\), \(1, 3\) or \(2, 3\)"),
        ({"eps": torch.ones(1, 3), "norm": "l2"}, "one alpha and one eps a sample"),
        ({"broken": torch.zeros(2)}, "broken must be int32"),
    ):
        with pytest.raises(InputError, match=words):
            step(**options)
    for arguments, options in (
        ((torch.ones(2), 3), {}),
        ((torch.arange(2), -1), {}),
        ((torch.arange(2), 3), {"seed": -1}),
    ):
        with pytest.raises(InputError):
            pgd_noise(*arguments, **options)


def test_values_describe_themselves():
    assert module._described(torch.ones(1, 1))[1:] == (0, 0)
    assert module._described(torch.ones(4, 3))[1:] == (3, 1)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_autograd_is_told_of_the_step(run, norm):
    """As by torch's in-place operators: the version counts, saved tensors are missed, leaves are refused."""
    y = torch.full((2, 3), 2.0, requires_grad=True)
    x, origin = torch.full((2, 3), 0.25), torch.zeros(2, 3)
    values = {"alpha": 0.5, "eps": 1.0, "norm": norm}
    loss, before = (y * x).sum(), x._version  # y's gradient is x as it is now
    pgd_step_(x, torch.ones(2, 3), origin, **values)
    assert x._version == before + 1 and not torch.equal(x, torch.full((2, 3), 0.25))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    leaf = torch.full((2, 3), 0.5, requires_grad=True)
    with pytest.raises(InputError, match="requires no grad"):
        pgd_step_(leaf, torch.ones(2, 3), origin, **values)
    assert torch.equal(leaf, torch.full((2, 3), 0.5))
    flags = torch.full((2,), -1, dtype=torch.int32)
    pgd_step_(x, torch.full((2, 3), torch.nan), origin, broken=flags, step=4, **values)
    assert flags.tolist() == [4, 4] and flags._version == 1
    with torch.no_grad():
        pgd_step_(leaf, torch.ones(2, 3), origin, **values)  # as torch's own, where grads are off
    assert leaf.requires_grad and not torch.equal(leaf, torch.full((2, 3), 0.5))
