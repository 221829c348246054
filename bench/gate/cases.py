"""What `bench/compare.py` measures: small work on one thread, a function a case, that returns what to call.

    @case("time", "instructions")
    def pairwise_nll() -> Call:
        f, g = floats(128, 32), floats(1000, 32)
        labels = hot(128), hot(1000)
        return lambda: cf.pairwise_nll(f, g, labels, threads=1)

What the call returns must be the same on both commits (integers exactly, floats to 1e-4 of the largest), so no case
returns what was never written, and none draws without a seed. A call of some 2 to 20 ms is best.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

import cmr_fast as cf
from cmr_fast import ops

Call = Callable[[], object]
COSTS = ("time", "memory", "instructions")
CASES: dict[str, tuple[Callable[[], Call], tuple[str, ...]]] = {}


def case(*costs: str) -> Callable[[Callable[[], Call]], Callable[[], Call]]:
    """A case by its function's name, and which of COSTS it has."""
    assert costs and set(costs) <= set(COSTS), costs

    def register(make: Callable[[], Call]) -> Callable[[], Call]:
        assert make.__name__ not in CASES, f"two cases are called {make.__name__}"
        CASES[make.__name__] = make, costs
        return make

    return register


def floats(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def codes(count: int, bits: int = 64) -> np.ndarray:
    return np.random.default_rng(count).integers(0, 256, (count, bits // 8), np.uint8)


def hot(count: int, classes: int = 24) -> Tensor:
    """Labels of items, several classes each."""
    return torch.rand(count, classes, generator=torch.Generator().manual_seed(count)) < 0.15


def trained(loss: Callable[..., Tensor], *inputs: Tensor) -> Call:
    """A loss and its gradients."""
    leaves = [x.requires_grad_() for x in inputs]

    def call() -> tuple[Tensor, ...]:
        value = loss(*leaves)
        return value.detach(), *torch.autograd.grad(value, leaves)

    return call


def unit(count: int, width: int, seed: int) -> Tensor:
    x = torch.randn(count, width, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.normalize(x)


@case("time", "instructions")
def hamming_topk() -> Call:
    q, db = codes(48), codes(150_000)
    return lambda: cf.hamming_topk(q, db, 10, threads=1)


@case("time", "instructions")
def hamming_topk_128_bits() -> Call:
    q, db = codes(16, 128), codes(100_000, 128)
    return lambda: cf.hamming_topk(q, db, 100, threads=1)


@case("time", "instructions")
def hamming_range() -> Call:
    q, db = codes(32), codes(150_000)
    return lambda: cf.hamming_range(q, db, 14, tables=False, threads=1)


@case("time", "instructions")
def hamming_pairs() -> Call:
    x = codes(20_000)
    x[10_000:10_200] = x[:200]
    return lambda: cf.hamming_pairs(x, 2, threads=1)


@case("time")
def hamming_calls() -> Call:
    """What a call costs beside its scan."""
    q, db = codes(1), codes(1000)
    index = cf.HammingIndex(64)
    index.add(db)
    searcher = index.searcher(10)
    return lambda: [(*searcher.search(q), *cf.hamming_topk(q, db, 10)) for _ in range(100)]


@case("time", "instructions")
def ranking() -> Call:
    q, db, of_q, of_db = codes(24), codes(10_000), hot(24), hot(10_000)
    arrays = of_q.numpy(), of_db.numpy()
    return lambda: cf.evaluate_codes(q, db, *arrays, threads=1).map


@case("time", "instructions")
def info_nce() -> Call:
    scale = torch.tensor(20.0)
    return trained(lambda a, b: cf.info_nce(a, b, scale, threads=1), unit(256, 128, 1), unit(256, 128, 2))


@case("time", "instructions")
def sigmoid_loss() -> Call:
    scale, bias = torch.tensor(10.0), torch.tensor(-10.0)
    return trained(lambda a, b: ops.sigmoid_loss(a, b, scale, bias, threads=1), unit(256, 128, 1), unit(256, 128, 2))


@case("time", "instructions")
def triplet_margin() -> Call:
    labels = torch.arange(320) % 10
    return trained(lambda x: cf.triplet_margin(x, labels, 0.05, threads=1), unit(320, 64, 3))


@case("time", "instructions")
def acmr_triplet() -> Call:
    labels = torch.arange(320) % 10
    return trained(lambda a, b: cf.acmr_triplet(a, b, labels, 1.0, 1.0, threads=1), unit(320, 64, 4), unit(320, 64, 5))


@case("time", "instructions")
def pairwise_nll() -> Call:
    labels = hot(128), hot(3000)
    return trained(lambda f, g: cf.pairwise_nll(f, g, labels, threads=1), floats(128, 32), floats(3000, 32))


@case("time", "instructions")
def pgd_step() -> Call:
    origin, gradient = torch.rand(4, 3, 128, 128, generator=torch.Generator().manual_seed(6)), floats(4, 3, 128, 128)
    x = origin.clone()

    def call() -> Tensor:
        x.copy_(origin)
        for step in range(10):
            ops.pgd_step_(x, gradient, origin, alpha=0.01, eps=0.03, step=step, threads=1)
        return x

    return call


@case("time", "instructions")
def pgd_noise() -> Call:
    rows = torch.arange(10)
    return lambda: ops.pgd_noise(rows, 3 * 128 * 128, seed=7, threads=1)


@case("time", "instructions")
def sinkhorn() -> Call:
    cost = torch.rand(384, 24, 24, generator=torch.Generator().manual_seed(8))
    return lambda: cf.sinkhorn(cost, 0.1, max_iter=30, tol=0, threads=1)


@case("time", "instructions")
def ipot() -> Call:
    cost = torch.rand(384, 24, 24, generator=torch.Generator().manual_seed(9))
    return lambda: cf.ipot(cost, 1.0, max_iter=30, threads=1)


@case("memory")
def info_nce_memory() -> Call:
    scale = torch.tensor(20.0)
    return trained(lambda a, b: cf.info_nce(a, b, scale, threads=1), unit(3000, 256, 1), unit(3000, 256, 2))


@case("memory")
def sigmoid_loss_memory() -> Call:
    scale, bias = torch.tensor(10.0), torch.tensor(-10.0)
    return trained(lambda a, b: ops.sigmoid_loss(a, b, scale, bias, threads=1), unit(3000, 256, 1), unit(3000, 256, 2))


@case("memory")
def triplet_margin_memory() -> Call:
    labels = torch.arange(1500) % 10
    return trained(lambda x: cf.triplet_margin(x, labels, 0.05, threads=1), unit(1500, 256, 3))


@case("memory")
def pairwise_nll_memory() -> Call:
    labels = hot(2000), hot(2000)
    return trained(lambda f, g: cf.pairwise_nll(f, g, labels, threads=1), floats(2000, 256), floats(2000, 256))
