"""Transport on a GPU; tests/native/test_emulated_sinkhorn.py runs the same kernel on the host, where there is none."""

import numpy as np
import pytest
import torch
from transport_cases import SHAPES, assert_plans, costs, masses

import cmr_fast as cf
from cmr_fast.ops import _dispatch, _reference, ipot, sinkhorn

REASON = _dispatch.unavailable("cuda", "cuda")
needs_gpu = pytest.mark.skipif(REASON is not None, reason=str(REASON))


@needs_gpu
@pytest.mark.parametrize("reg", [1.0, 0.05, 0.001])
@pytest.mark.parametrize(("m", "n"), [*SHAPES, (128, 128), (200, 230), (300, 260), (1500, 3), (3, 1500)])
def test_cuda_equals_logarithms_in_double(m, n, reg):
    cost, mu, nu = costs(m + n, 3, m, n), masses(1, 3, m, zeros=m // 4), masses(2, 3, n, zeros=n // 5)
    on_gpu = [torch.from_numpy(x).cuda() for x in (cost, mu, nu)]
    assert cf.explain("sinkhorn", on_gpu[0]).backend == "cuda"
    options = {"mu": on_gpu[1], "nu": on_gpu[2], "details": True}
    found = sinkhorn(on_gpu[0], reg, max_iter=20, tol=0, **options)
    proximal = ipot(on_gpu[0], max(reg, 0.05), max_iter=6, inner=2, **options)
    assert found.plan.is_cuda and (found.iterations == 20).all() and (proximal.iterations == 6).all()
    for i in range(3):
        some = np.ix_(mu[i] > 0, nu[i] > 0)
        case = mu[i][mu[i] > 0], nu[i][nu[i] > 0]
        want, slow = np.zeros((m, n)), np.zeros((m, n))
        want[some] = _reference.sinkhorn(cost[i][some], reg, *case, 20)[0]
        slow[some] = _reference.ipot(cost[i][some], max(reg, 0.05), *case, 6, 2)
        assert_plans(found.plan[i].cpu().numpy(), want, cost, reg, "cuda")
        assert_plans(proximal.plan[i].cpu().numpy(), slow, cost, max(reg, 0.05) / 6, "cuda")


@needs_gpu
@pytest.mark.parametrize("stop", ["marginals", "potentials"])
def test_cuda_stops_when_torch_does(stop):
    scales = torch.linspace(0, 3, 40, device="cuda")[:, None, None]
    for size in (15, 32, 280):
        cost = torch.from_numpy(costs(5, 40, size, size)).cuda() * scales
        options = {"tol": 0.01, "stop": stop, "max_iter": 300, "details": True}
        ours, theirs = (sinkhorn(cost, 0.1, backend=backend, **options) for backend in ("cuda", "torch"))
        assert len(set(ours.iterations.tolist())) > 2
        # sums are rounded in another order, so a change that is tol up to rounding may be below it in one of them
        assert (ours.iterations - theirs.iterations).abs().max() <= 1
        same = ours.iterations == theirs.iterations
        assert same.float().mean() > 0.9
        torch.testing.assert_close(ours.plan[same], theirs.plan[same], rtol=1e-3, atol=1e-7)
        assert all(torch.equal(a, b) for a, b in zip(sinkhorn(cost, 0.1, **options), ours, strict=True))


@needs_gpu
@pytest.mark.parametrize("op", [sinkhorn, ipot])
def test_capture_in_a_graph(op):
    for size in (32, 100, 280):
        held = torch.from_numpy(costs(1, 5, size, size)).cuda()
        op(held, 0.2, max_iter=20)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = op(held, 0.2, max_iter=20)
        for seed in (2, 3):
            other = torch.from_numpy(costs(seed, 5, size, size)).cuda()
            held.copy_(other)
            graph.replay()
            assert torch.equal(found, op(other, 0.2, max_iter=20))


@needs_gpu
def test_cuda_in_half_precision_on_another_stream_and_where_it_is_unfit():
    cost = torch.from_numpy(costs(11, 4, 12, 10)).cuda()
    half = sinkhorn(cost.bfloat16(), 0.1)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), sinkhorn(cost.bfloat16().float(), 0.1), rtol=2e-2, atol=1e-5)
    want = sinkhorn(cost, 0.1)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        found = sinkhorn(cost, 0.1)
    stream.synchronize()
    assert torch.equal(found, want)
    assert sinkhorn(cost[:0], 0.1).shape == (0, 12, 10)
    wide = torch.zeros(1, 4, 2045, device="cuda")
    assert sinkhorn(wide, 0.1, max_iter=2).shape == wide.shape
    for unfit, message in ((wide, "at most 2048 rows and columns"), (cost.double(), "float32")):
        with pytest.raises(cf.InputError, match=message):
            sinkhorn(unfit, 0.1, backend="cuda")
