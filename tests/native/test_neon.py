"""The NEON kernels, cross-compiled and run on an emulated Arm processor; `make check` here adds sanitizers."""

import shutil
import subprocess
from pathlib import Path

import pytest


def test_neon_under_qemu(tmp_path):
    for tool in ("make", "aarch64-linux-gnu-g++", "qemu-aarch64"):
        if not shutil.which(tool):
            pytest.skip(f"{tool} not found (Debian: g++-aarch64-linux-gnu, qemu-user)")
    command = ["make", "-C", str(Path(__file__).resolve().parent), "neon", f"OUT={tmp_path}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "neon ok" in done.stdout
