#!/usr/bin/env bash
# One would guess that `pip install adv-lib`, a pure Python wheel, installs into a fresh environment.
# It imports visdom when it is imported, whose newest release is a source that setuptools from 82 on cannot build: pip fails.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
pip=("$work/venv/bin/pip" --disable-pip-version-check -q --no-cache-dir)
"${pip[@]}" download --no-deps -d "$work" adv-lib==0.2.8
python3 - "$work" <<'PYTHON'
import sys
import zipfile
from pathlib import Path

with zipfile.ZipFile(next(Path(sys.argv[1]).glob("adv_lib-*.whl"))) as wheel:
    asks = next(x for x in wheel.read("adv_lib-0.2.8.dist-info/METADATA").decode().splitlines() if "visdom" in x)
    module = wheel.read("adv_lib/utils/visdom_logger.py").decode().splitlines()
print("adv-lib 0.2.8:", asks, "|", next(line for line in module if line.startswith("import visdom")))
PYTHON
for setuptools in 81.0.0 82.0.1; do
    "${pip[@]}" install "setuptools==$setuptools" wheel==0.47.0
    built=yes
    "${pip[@]}" wheel --no-deps --no-build-isolation -w "$work/$setuptools" visdom==0.2.4 2>"$work/log" || built=no
    echo "visdom 0.2.4 with setuptools $setuptools built: $built; $(grep -m1 -o "No module named.*" "$work/log" || true)"
    echo "$built" >"$work/built-$setuptools"
done
test "$(cat "$work/built-81.0.0") $(cat "$work/built-82.0.1")" = "yes no"
