"""Every program of examples/ runs from another folder, says what it shows, and leaves nothing behind."""

import ast
import os
import re
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


def output(name: str, folder: Path) -> str:
    paths = [str(EXAMPLES.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    result = subprocess.run(
        [sys.executable, str(EXAMPLES / name)],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    assert list(folder.iterdir()) == []
    return result.stdout


def test_search(tmp_path):
    text = output("search.py", tmp_path)
    nearest = [int(x) for x in re.search(r"nearest of query 0: .* at \[(.*)\]", text).group(1).split(",")]
    assert nearest == sorted(nearest) and 0 < int(re.search(r"query 0: (\d+) items", text).group(1)) < 19_900
    assert float(re.search(r"mAP ([\d.]+)", text).group(1)) > 0.5


def test_sqlite_vec_codes(tmp_path):
    pytest.importorskip("sqlite_vec")
    if not hasattr(sqlite3.Connection, "enable_load_extension"):
        pytest.skip("this Python's sqlite3 loads no extensions")
    text = output("sqlite_vec_codes.py", tmp_path)
    ours, theirs = (ast.literal_eval(x) for x in re.findall(r": (\[.*\]) at (?:\[.*\])", text))
    distances = re.findall(r"at (\[.*\])", text)
    assert "read 5000 codes" in text and len(ours) == 10 and distances[0] == distances[1]
    assert ours[0] == theirs[0] and distances[0].startswith("[0, ")


@pytest.mark.timeout(400)
def test_train_on_two_ranks(tmp_path):
    text = output("train_on_two_ranks.py", tmp_path)
    curves = [tuple(map(float, row)) for row in re.findall(r"([\d.]+) in one process, ([\d.]+) on", text)]
    assert len(curves) == 3 and curves[2][0] < curves[0][0]
    assert all(two == pytest.approx(one, rel=1e-4) for one, two in curves)


def test_swap_loss(tmp_path):
    text = output("swap_loss.py", tmp_path)
    curves = {
        name: (float(a), float(b)) for name, a, b in re.findall(r"(\w+) +first step ([\d.]+), last ([\d.]+)", text)
    }
    assert curves["ours"][1] < curves["ours"][0] / 2
    if "theirs" in curves:
        assert curves["theirs"] == pytest.approx(curves["ours"], abs=1e-3)


def test_attack_a_model(tmp_path):
    text = output("attack_a_model.py", tmp_path)
    accuracy = {name: float(x) for name, x in re.findall(r"([\w-]+) +accuracy ([\d.]+)", text)}
    assert accuracy["clean"] > 0.9 and accuracy["PGD-20"] < accuracy["clean"] - 0.3
    assert all(float(x) <= 8.0 for x in re.findall(r"moved ([\d.]+)/255", text))


def test_train_your_features(tmp_path):
    text = output("train_your_features.py", tmp_path)
    scores = [float(x) for x in re.search(r"'i2t': ([\d.]+), 't2i': ([\d.]+)", text).groups()]
    assert min(scores) > 0.5  # chance is 0.17
    assert "texts for image 0, class" in text


def test_every_example_is_run_here_and_short():
    names = {path.stem for path in EXAMPLES.glob("*.py")}
    assert names == {name.removeprefix("test_") for name in globals() if name.startswith("test_")} - {
        "every_example_is_run_here_and_short"
    }
    for path in EXAMPLES.glob("*.py"):
        text = path.read_text()
        assert len(text.splitlines()) < 80 and "argparse" not in text, path.name


def test_sharded_search(tmp_path):
    pytest.importorskip("ray")
    text = output("sharded_search.py", tmp_path)
    assert "ShardedIndex(bits=64, ntotal=200000, shards=2)" in text
    assert "one actor was killed; the other answered in" in text
    assert "ids of what was added: [200000, 200001, 200002]" in text
