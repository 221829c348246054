"""bench/experiments/defaults.py keeps the runs that its .json has, and makes them anew with --fresh."""

import importlib.util
import itertools
import json
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "bench" / "experiments" / "defaults.py"


@pytest.fixture
def defaults():
    spec = importlib.util.spec_from_file_location("defaults_experiment", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_runs_that_stand_in_the_file_are_made_anew_with_fresh_alone(defaults, tmp_path, monkeypatch):
    made = itertools.count()

    def run(name, data, method, seed, epochs):
        return {"data": name, "method": method, "seed": seed, "average": next(made)}

    monkeypatch.setattr(defaults, "run", run)
    monkeypatch.setattr(defaults, "read", lambda name: name)

    def values(*flags):
        argv = ["defaults.py", "--methods", "acmr", "--out", str(tmp_path / "own"), *flags]
        monkeypatch.setattr("sys.argv", argv)
        defaults.main()
        rows = json.loads((tmp_path / "own.json").read_text())
        return {(row["data"], row["method"]): row["average"] for row in rows}, len(rows)

    first, count = values("--data", "lda", "tfidf")
    assert count == 6 and values("--data", "lda", "tfidf") == (first, 6)
    again, count = values("--data", "lda", "--fresh")
    assert count == 6 and {key for key in first if first[key] != again[key]} == {
        key for key in first if key[0] == "lda"
    }
