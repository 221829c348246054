#!/usr/bin/env bash
# One would guess that save_file to a symbolic link writes the file that it names, with that file's mode, as open() does.
# The link is replaced by a new regular file of mode 0600; the file that it named keeps its old bytes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q safetensors==0.8.0 numpy==2.4.6
cd "$work"
venv/bin/python - <<'PYTHON'
import os

import numpy as np
import safetensors
from safetensors.numpy import load_file, save_file

save_file({"x": np.zeros(2)}, "weights.safetensors")
os.chmod("weights.safetensors", 0o644)
os.symlink("weights.safetensors", "latest.safetensors")
save_file({"x": np.ones(2)}, "latest.safetensors")
seen = {
    "still a link": os.path.islink("latest.safetensors"),
    "mode": oct(os.stat("latest.safetensors").st_mode & 0o777),
    "the file it named": load_file("weights.safetensors")["x"].tolist(),
}
print("safetensors", safetensors.__version__, seen)
assert seen == {"still a link": False, "mode": "0o600", "the file it named": [0.0, 0.0]}
PYTHON
