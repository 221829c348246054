"""The table of peers: what it prints, what its files say, and that a difference is no row but a failure."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "bench"))

import peers

BENCH = Path(peers.__file__).parent


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


def run_with(tmp_path, patch):
    """peers.py over the pairwise op, after `patch`."""
    script = f"""
import sys
sys.path.insert(0, {str(BENCH)!r})
sys.argv = ["peers.py", "pairwise", "--quick", "--json", {str(tmp_path / "rows.json")!r}]
import benchmarks.pairwise, peers
{patch}
raise SystemExit(peers.main())
"""
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)


def test_a_difference_is_red_and_fails(tmp_path):
    """Eager torch, told a sum that is none of the loss."""
    done = run_with(tmp_path, "benchmarks.pairwise.eager = lambda f, g, *_: (f.sum() + g.sum())")
    assert done.returncode == 1, done.stderr
    assert "| RED: apart by" in done.stdout
    assert json.loads((tmp_path / "rows.json").read_text())["rows"] == []


@pytest.mark.parametrize("where", ["eager", "comparisons"])
def test_an_alternative_that_is_not_installed_is_left_out_by_name(tmp_path, where):
    """Where it is called, and where the rows are made. Nothing measured is a failure."""
    done = run_with(tmp_path, f"def broken(*_, **__): import no_such_library\nbenchmarks.pairwise.{where} = broken")
    assert "| left out: No module named 'no_such_library' |" in done.stdout
    assert done.returncode == 1 and json.loads((tmp_path / "rows.json").read_text())["rows"] == []


def test_a_module_of_ours_that_is_missing_is_no_missing_alternative(tmp_path):
    done = run_with(tmp_path, "def broken(*_, **__): import cmr_fast.nothing\nbenchmarks.pairwise.eager = broken")
    assert done.returncode != 0 and "ModuleNotFoundError: No module named 'cmr_fast.nothing'" in done.stderr


def test_every_op_of_the_table_is_a_file_with_comparisons():
    """And every file with comparisons is an op of the table."""
    with_rows = {p.stem for p in (BENCH / "benchmarks").glob("*.py") if "\ndef comparisons(" in p.read_text()}
    assert with_rows == set(peers.OPS)
