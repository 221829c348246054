#!/usr/bin/env bash
# One would guess that an operator with torch.library.register_autograd works in torch.func.grad, as it does in backward.
# backward() is right; torch.func.grad raises RuntimeError, about a setup_context that the operator was registered with.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.14.1 numpy
cd "$work"
venv/bin/python - <<'PYTHON'
import torch


@torch.library.custom_op("finding::triple", mutates_args=())
def triple(x: torch.Tensor) -> torch.Tensor:
    return 3 * x


@triple.register_fake
def _(x):
    return torch.empty_like(x)


def remember(ctx, inputs, output):
    ctx.factor = 3


triple.register_autograd(lambda ctx, upstream: ctx.factor * upstream, setup_context=remember)

x = torch.ones(2, requires_grad=True)
triple(x).sum().backward()
print("torch", torch.__version__, "backward:", x.grad.tolist())
assert x.grad.tolist() == [3.0, 3.0]
try:
    print("torch.func.grad:", torch.func.grad(lambda x: triple(x).sum())(torch.ones(2)).tolist())
    raise SystemExit("it works now")
except RuntimeError as error:
    said = " ".join(str(error).split())
    print("torch.func.grad:", said[:200])
    assert "setup_context" in said
PYTHON
