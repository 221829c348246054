"""The table of peers: what it prints, what its files say, and that a difference is no row but a failure."""

import json
import subprocess
import sys
from pathlib import Path

BENCH = Path(__file__).resolve().parents[2] / "bench"


def test_files_hold_the_rows_that_are_printed_and_what_they_were_measured_with(tmp_path):
    kept, table = tmp_path / "rows.json", tmp_path / "rows.md"
    done = subprocess.run(
        [sys.executable, BENCH / "peers.py", "pairwise", "--quick", "--json", kept, "--markdown", table],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(kept.read_text())
    (row,) = found["rows"]
    assert row["comparison"] == "16 x 500, 16 bits"
    assert row["speedup"] == row["theirs_s"] / row["ours_s"]  # of one round
    assert table.read_text().startswith(done.stdout)
    assert found["machine"].keys() >= {"processor", "isa", "python", "torch", "commit"}
    assert f"commit {found['machine']['commit']}" in table.read_text()


def test_a_difference_is_red_and_fails(tmp_path):
    """Eager torch, told a sum that is none of the loss."""
    script = f"""
import sys
sys.path.insert(0, {str(BENCH)!r})
sys.argv = ["peers.py", "pairwise", "--quick", "--json", {str(tmp_path / "rows.json")!r}]
import benchmarks.pairwise, peers
benchmarks.pairwise.eager = lambda f, g, *_: (f.sum() + g.sum())
raise SystemExit(peers.main())
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    assert "| RED: apart by" in done.stdout
    assert json.loads((tmp_path / "rows.json").read_text())["rows"] == []
