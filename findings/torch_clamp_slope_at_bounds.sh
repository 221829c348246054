#!/usr/bin/env bash
# One would guess that x.clamp(0, 1) has slope 1 at 0 and at 1, where it cuts nothing: attacks on pixels clip like that.
# With both bounds as numbers the slope is 0 at both; with min alone 0; with tensors as bounds 0.5 at both.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.14.1 numpy
cd "$work"
venv/bin/python - <<'PYTHON'
import torch

forms = {
    "clamp(0, 1)": (lambda x: x.clamp(0, 1), [0.0, 1.0, 0.0]),
    "clamp(min=0)": (lambda x: x.clamp(min=0), [0.0, 1.0, 1.0]),
    "clamp(tensor, tensor)": (lambda x: x.clamp(torch.tensor(0.0), torch.tensor(1.0)), [0.5, 1.0, 0.5]),
}
print("torch", torch.__version__)
for name, (form, seen) in forms.items():
    x = torch.tensor([0.0, 0.5, 1.0], requires_grad=True)
    form(x).sum().backward()
    print(f"slope of {name} at 0, 0.5, 1:", x.grad.tolist())
    assert x.grad.tolist() == seen, "it has changed"
PYTHON
