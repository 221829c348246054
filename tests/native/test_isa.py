"""Which instruction set ran: every op of the native module reports it, contrastive losses too."""

import pytest
import torch

from cmr_fast.ops import _dispatch, info_nce, sigmoid_loss

NATIVE = _dispatch.native()


@pytest.mark.parametrize("loss", [info_nce, sigmoid_loss], ids=["info_nce", "sigmoid_loss"])
@pytest.mark.parametrize("isa", NATIVE.available_isas())
def test_contrastive_losses_report_the_instruction_set_that_ran(monkeypatch, isa, loss):
    monkeypatch.setenv("CMR_FAST_ISA", isa)
    x = torch.nn.functional.normalize(torch.randn(9, 16))
    NATIVE.reset_last_isa()
    loss(x, x, 10.0, backend="cpp", **({} if loss is info_nce else {"logit_bias": -10.0}))
    assert NATIVE.last_isa() == isa
