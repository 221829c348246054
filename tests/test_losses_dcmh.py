"""DCMH's objective against the paper's, written out over the whole training set."""

import pytest
import torch
from test_pairwise import F, G, S, codes, eager, gradients, similarities

import cmr_fast as cf
from cmr_fast.losses.dcmh import CodeBuffer, dcmh_loss


@pytest.mark.parametrize("squared", [False, True])
def test_a_step_of_dcmh(squared):
    """Against the paper's objective written out over the whole training set, and its gradient (methods.md 3)."""
    f, g = (x.detach().double() for x in codes(14, 50, 50, 8))
    rows = torch.tensor([3, 49, 7, 0])
    labels, s = similarities("packed", 50, 50)
    own, other = CodeBuffer(f), CodeBuffer(g)
    values = torch.randn(4, 8, dtype=torch.float64, requires_grad=True)
    signs = torch.sign(f + g)[rows]
    loss = dcmh_loss(values, rows, own, other, (labels[0][rows], labels[1]), signs, gamma=0.7, eta=0.3, squared=squared)
    (slope,) = gradients(loss, values)
    whole = f.index_copy(0, rows, values)
    pairs = eager(values, g, s[rows] * (0.999 if squared else 1), squared)
    want = pairs + 0.7 * (signs - values).square().sum() + 0.3 * whole.sum(dim=0).square().sum()
    torch.testing.assert_close(loss, want)
    torch.testing.assert_close(slope, gradients(want, values)[0])
    own.update(rows, values)
    torch.testing.assert_close(own.codes, whole.detach())
    torch.testing.assert_close(own.sums, whole.detach().sum(dim=0))
    assert torch.equal(f, codes(14, 50, 50, 8)[0].double())  # the buffer is a copy


def test_column_sums_do_not_drift():
    buffer = CodeBuffer(torch.zeros(500, 16))
    generator = torch.Generator().manual_seed(0)
    for _ in range(2000):
        rows = torch.randperm(500, generator=generator)[:64]
        buffer.update(rows, 30 * torch.randn(64, 16, generator=generator))
    torch.testing.assert_close(buffer.sums, buffer.codes.double().sum(dim=0), rtol=0, atol=1e-9)


def test_bad_buffers_are_refused():
    buffer = CodeBuffer(G)
    with pytest.raises(cf.InputError, match="float"):
        CodeBuffer(G.int())
    with pytest.raises(cf.InputError, match="all be different"):
        buffer.update(torch.tensor([1, 1]), G[:2])
    with pytest.raises(cf.InputError, match=r"values \(n, 8\)"):
        buffer.sums_with(torch.tensor([1]), G[:2])
    with pytest.raises(cf.InputError, match="shape of f"):
        dcmh_loss(F, torch.arange(3), buffer, buffer, S, F[:2])


def test_the_names_of_before():
    """They were in cmr_fast.ops once."""
    from cmr_fast import losses, ops

    assert ops.CodeBuffer is losses.CodeBuffer is CodeBuffer and ops.dcmh_loss is losses.dcmh_loss is dcmh_loss
