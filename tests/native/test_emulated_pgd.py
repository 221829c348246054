"""The attack's step and noise by the CUDA kernels, emulated on the host (conftest.py)."""

import numpy as np
import pgd_cases
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pgd_cases import problem

from cmr_fast.ops import _dispatch, _reference, pgd, pgd_noise, pgd_step_


def on_backend(backend, x, *rest, **options):
    """x moved by one backend, on a copy at an address that a load of 4 may take or may not."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_dispatch, "choose_backend", lambda *_: backend)
        patch.setattr(_dispatch, "queue", lambda _: _dispatch.native_cuda().Queue(0, 0))
        return pgd_step_(x.clone(), *rest, **options)


SHAPES = [*pgd_cases.SHAPES, (1, 3, 96, 97), (1, 525_000), (0, 3), (2, 0), (3, 2, 0)]


def values_of(shape):
    """alpha, eps and bounds for all, of every sample, of every channel and of both."""
    rng = np.random.default_rng(0)
    channels = shape[1] if len(shape) > 1 else 1
    for kind in ((1, 1), (shape[0], 1), (1, channels), (shape[0], channels)):
        alpha, eps, low, high = (
            torch.from_numpy(rng.uniform(a, b, kind).astype(np.float32))
            for a, b in ((0.05, 0.3), (0.05, 0.3), (0, 0.1), (0.9, 1))
        )
        yield {"alpha": alpha, "eps": eps, "bounds": (low, high)}


@pytest.mark.parametrize("shape", SHAPES)
def test_sign_steps_have_the_bits_of_torch_and_of_the_cpu(emulated, order, shape):
    tensors = problem(shape)
    for values in values_of(shape):
        emulated.reset_last_kernel()
        got, portable, native = (on_backend(b, *tensors, **values) for b in ("cuda", "torch", "cpp"))
        assert torch.equal(got, portable)
        assert torch.equal(got.view(torch.int32), native.view(torch.int32))
        assert emulated.last_kernel() == ("linf" if got.numel() else "none")


@pytest.mark.parametrize("shape", SHAPES)
def test_l2_steps_against_float64(emulated, order, shape):
    tensors = problem(shape)
    if not tensors[0].numel():
        return
    for values in values_of(shape):
        if values["alpha"].shape[1] > 1:
            values |= {"alpha": values["alpha"][:, :1], "eps": values["eps"][:, :1]}
        got = on_backend("cuda", *tensors, norm="l2", **values)
        alpha, eps, low, high = (v.numpy() for v in (values["alpha"], values["eps"], *values["bounds"]))
        want = _reference.pgd_step(*(t.numpy() for t in tensors), alpha, eps, low, high, "l2")
        # operands below 2, at most six roundings
        np.testing.assert_allclose(got.numpy(), want, rtol=0, atol=6 * 2**-24)
        assert emulated.last_kernel() == "l2"


def test_gradients_of_any_size_give_a_step_of_the_same(emulated):
    x, gradient, origin = problem((4, 2, 3), 5)
    gradient[0] = 0
    gradient[1] *= 1e-41  # 0.05 over their norm is no float32
    gradient[2] *= 1e37
    x = origin.clone()
    moved = on_backend("cuda", x, gradient, origin, alpha=0.05, eps=1.0, bounds=(-5.0, 5.0), norm="l2")
    assert torch.equal(moved[0], x[0])
    torch.testing.assert_close((moved - x)[1:].flatten(1).norm(dim=1), torch.full((3,), 0.05), rtol=1e-4, atol=0)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_addresses_that_a_wide_load_cannot_take(emulated, norm):
    """The same bits, and nothing before or after x is touched."""
    shape = (3, 5, 20)
    x, gradient, origin = problem(shape)
    want = on_backend("cuda", x, gradient, origin, alpha=0.1, eps=0.12, norm=norm)
    raw = torch.full((x.numel() + 8,), 7.0)
    raw[3 : 3 + x.numel()] = x.flatten()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_dispatch, "choose_backend", lambda *_: "cuda")
        patch.setattr(_dispatch, "queue", lambda _: emulated.Queue(0, 0))
        moved = pgd_step_(raw[3 : 3 + x.numel()].view(shape), gradient, origin, alpha=0.1, eps=0.12, norm=norm)
    assert moved.data_ptr() == raw.data_ptr() + 12 and torch.equal(moved, want)
    assert (raw[:3] == 7).all() and (raw[3 + x.numel() :] == 7).all()


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("shape", [(6, 3, 5, 7), (6, 2500)])
def test_gradients_that_are_not_finite(emulated, order, norm, shape):
    x, gradient, origin = problem(shape, 4)
    flat = gradient.view(6, -1)
    flat[1, -1] = torch.nan
    flat[2, 3], flat[2, 40] = torch.inf, -torch.inf
    flat[4, 50] = -torch.inf
    flat[5] = torch.nan
    for step in (0, 7, -2):
        results = []
        for backend in ("cuda", "torch"):
            broken = torch.tensor([-1, -1, -5, -1, 2, -1], dtype=torch.int32)
            moved = on_backend(backend, x, gradient, origin, alpha=0.1, eps=0.2, norm=norm, broken=broken, step=step)
            results.append((moved, broken))
        assert results[0][1].tolist() == results[1][1].tolist() == [-1, step, step, -1, 2, step]
        torch.testing.assert_close(results[0][0], results[1][0], rtol=0, atol=0 if norm == "linf" else 6 * 2**-24)
        assert torch.equal(on_backend("cuda", x, gradient, origin, alpha=0.1, eps=0.2, norm=norm), results[0][0])
    if norm == "l2":
        assert torch.equal(results[0][0][[1, 2, 4, 5]], x[[1, 2, 4, 5]])


def test_gradients_and_origins_that_are_not_contiguous(emulated):
    x, gradient, origin = problem((2, 3, 4, 5), 6)
    strided = gradient.contiguous(memory_format=torch.channels_last), origin.mT.contiguous().mT
    for norm in ("linf", "l2"):
        got, want = (on_backend("cuda", x, *t, alpha=0.1, eps=0.05, norm=norm) for t in (strided, (gradient, origin)))
        assert torch.equal(got, want)


def test_a_sample_has_the_same_bits_in_every_batch(emulated):
    x, gradient, origin = problem((5, 3, 40, 41), 7)
    whole = on_backend("cuda", x, gradient, origin, alpha=0.5, eps=0.6, norm="l2")
    for i in range(5):
        alone = on_backend("cuda", x[i : i + 1], gradient[i : i + 1], origin[i : i + 1], alpha=0.5, eps=0.6, norm="l2")
        assert torch.equal(alone[0], whole[i])


@given(
    samples=st.integers(0, 9), channels=st.integers(1, 5), inner=st.integers(0, 700), each=st.integers(0, 3),
    norm=st.sampled_from(pgd.NORMS), order=st.sampled_from(["forward", "reverse"]), seed=st.integers(0, 1000),
)  # fmt: skip
@settings(max_examples=40, deadline=None)
def test_steps_of_arbitrary_shapes(emulated, samples, channels, inner, each, norm, order, seed):
    tensors = problem((samples, channels, inner), seed)
    values = list(values_of((samples, channels, inner)))[each]
    if norm == "l2":
        values |= {"alpha": values["alpha"][:, :1], "eps": values["eps"][:, :1]}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CMR_SHIM_ORDER", order)
        got, want = (on_backend(b, *tensors, norm=norm, **values) for b in ("cuda", "torch"))
    torch.testing.assert_close(got, want, rtol=0, atol=0 if norm == "linf" else 6 * 2**-24)


@given(
    seed=st.integers(0, 2**64 - 1), index=st.lists(st.integers(-(2**63), 2**63 - 1), max_size=4),
    count=st.integers(0, 5000),
)  # fmt: skip
@settings(max_examples=30, deadline=None)
def test_noise_has_the_bits_of_the_cpu(emulated, seed, index, count):
    index = torch.tensor(index, dtype=torch.int64)
    want = pgd_noise(index, count, seed=seed, backend="cpp")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_dispatch, "choose_backend", lambda *_: "cuda")
        patch.setattr(_dispatch, "queue", lambda _: emulated.Queue(0, 0))
        emulated.reset_last_kernel()
        assert torch.equal(pgd_noise(index, count, seed=seed), want)
    assert emulated.last_kernel() == "noise"
