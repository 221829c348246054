#!/usr/bin/env bash
# One would guess that symbolic_trace of one model leaves other threads alone, which run other, untraced modules.
# While it traces, a module called from any thread goes through the tracer: NameError, not a submodule; later it works.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.14.1
cd "$work"
venv/bin/python - <<'PYTHON'
import threading

import torch
from torch import nn
from torch.fx import symbolic_trace

served, seen = nn.Linear(2, 3), []


def request():
    try:
        seen.append(tuple(served(torch.zeros(1, 2)).shape))
    except Exception as error:
        seen.append(f"{type(error).__name__}: {error}")


class Traced(nn.Module):
    def forward(self, x):
        thread = threading.Thread(target=request)
        thread.start()
        thread.join()
        return x + 1


symbolic_trace(Traced())
request()
print("torch", torch.__version__, seen)
assert seen == ["NameError: module is not installed as a submodule", (1, 3)]
PYTHON
