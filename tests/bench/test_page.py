"""The page of the history: every graph is in it, nothing is fetched, and a browser draws it; what `sane` refuses."""

import ast
import fnmatch
import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "bench"))

pytest.importorskip("asv", reason="the extra bench")
from asv.results import Results, iter_results  # noqa: E402
from page import history  # noqa: E402
from sane import LIBRARIES, PROGRAMS, faults  # noqa: E402

PROBLEMS = [["'8'", "'16'"]]


def add(folder: Path, commit: str, date: int, values: dict[str, tuple[list, list, str]]) -> None:
    """A result as asv writes it."""
    params = {"machine": "box", "python": "3.11"}
    result = Results(params, {}, commit, date, "3.11", "standing-py3.11", {})
    for name, (parameters, numbers, version) in values.items():
        result._results[name] = numbers
        result._benchmark_params[name] = parameters
        result._samples[name] = result._stats[name] = [None] * len(numbers)
        result._benchmark_version[name] = version
    result.save(str(folder))
    (folder / "box" / "machine.json").write_text(json.dumps({"machine": "box", "version": 1}))


@pytest.fixture
def results(tmp_path):
    folder = tmp_path / "results"
    for i, commit in enumerate(("a" * 40, "b" * 40, "c" * 40)):
        values = {
            "sinkhorn.Sinkhorn.time_sinkhorn": (PROBLEMS, [2.0 - i / 2, math.nan if i == 1 else 4.0], "1"),
            "package.Library.track_bytes": ([], [1000.0 * (i + 1)], "2" if i else "1"),
        }
        add(folder, commit, 1_700_000_000_000 + i * 86_400_000, values)
    return folder


def page_of(results: Path, out: Path) -> str:
    command = [sys.executable, ROOT / "bench" / "page.py", "--results", results, "--out", out]
    subprocess.run(command, check=True, capture_output=True, text=True)
    return out.read_text()


def test_history_holds_what_was_measured_by_the_newest_version(results):
    found = history(results)
    sinkhorn = found["sinkhorn.Sinkhorn.time_sinkhorn"]
    assert [point.value for point in sinkhorn["8 on box"]] == [2.0, 1.5, 1.0]
    assert [point.commit[0] for point in sinkhorn["16 on box"]] == ["a", "c"]  # skipped at b
    assert [point.value for point in found["package.Library.track_bytes"]["box"]] == [2000.0, 3000.0]


def test_page_draws_every_point_and_asks_no_other_host(results, tmp_path):
    text = page_of(results, tmp_path / "page.html")
    assert text.count("<svg") == 2 and text.count("<circle") == 7
    assert "nan" not in text.lower()
    assert not re.findall(r"(?:src|href|url)\s*[=(]", text)


def test_no_results_are_an_error_and_no_page(tmp_path):
    (tmp_path / "empty").mkdir()
    command = [
        sys.executable,
        ROOT / "bench" / "page.py",
        "--results",
        tmp_path / "empty",
        "--out",
        tmp_path / "x.html",
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and "no results in" in done.stderr and not (tmp_path / "x.html").exists()


@pytest.mark.skipif(not shutil.which("chromium"), reason="no chromium")
def test_a_browser_without_a_network_shows_the_graphs(results, tmp_path):
    """Pixels of the first line's colour, where a page of text alone has none."""
    from matplotlib.image import imread

    page, shot = tmp_path / "page.html", tmp_path / "page.png"
    page_of(results, page)
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--window-size=1000,1000"]
    command += ["--host-resolver-rules=MAP * ~NOTFOUND", f"--user-data-dir={tmp_path / 'profile'}"]
    subprocess.run([*command, f"--screenshot={shot}", page.as_uri()], check=True, capture_output=True, timeout=300)
    image = imread(shot)[..., :3]
    blue = abs(image - [0x1F / 255, 0x77 / 255, 0xB4 / 255]).max(2) < 0.05
    rows, columns = blue.any(1).nonzero()[0], blue.any(0).nonzero()[0]
    assert blue.sum() > 300
    assert columns.max() - columns.min() > 500  # a line across the page, no dot of the key
    assert rows.max() - rows.min() > 300  # in both graphs


def test_what_is_not_sane(results, tmp_path):
    add(
        tmp_path / "wrong", "d" * 40, 1,
        {
            "a.A.time_a": (PROBLEMS, [1.0, None], "1"),
            "a.A.time_b": (PROBLEMS, [math.nan, 1.0], "1"),
            "a.A.time_c": ([], [math.inf], "1"),
            "a.A.time_d": ([], [-1.0], "1"),
        },
    )  # fmt: skip
    suite = {f"a.A.time_{letter}": {} for letter in "abcde"}
    found = list(iter_results(str(tmp_path / "wrong")))
    wrong, numbers = faults(suite, found, ())
    assert numbers == 2
    of_b_and_a = ["a.A.time_a(16): failed", "a.A.time_b(8): skipped"]
    assert sorted(wrong) == [*of_b_and_a, "a.A.time_c: inf", "a.A.time_d: -1.0", "a.A.time_e: not run"]
    assert "a.A.time_b(8): skipped" not in faults(suite, found, ("a.A.time_b(8)",))[0]


def test_every_benchmark_says_its_version():
    """Which keys asv's history: the hash of a source would end a series at every edit."""
    import ast

    for path in sorted((ROOT / "bench" / "benchmarks").glob("*.py")):
        for node in ast.parse(path.read_text()).body:
            if not isinstance(node, ast.ClassDef):
                continue
            names = [x.name for x in node.body if isinstance(x, ast.FunctionDef)]
            if any(name.startswith(("time_", "track_", "mem_", "peakmem_")) for name in names):
                assigned = [t.id for x in node.body if isinstance(x, ast.Assign) for t in x.targets if hasattr(t, "id")]
                assert "version" in assigned, f"{path.name}: {node.name}"


@pytest.mark.parametrize("pattern", sorted({*LIBRARIES.values(), *PROGRAMS.values()}))
def test_what_is_excused_is_in_the_suite(pattern):
    """Read from the sources: a benchmark under another name would be excused by nothing."""
    names = {
        f"{path.stem}.{group.name}.{getattr(one, 'name', '')}"
        for path in (ROOT / "bench" / "benchmarks").glob("*.py")
        for group in ast.parse(path.read_text()).body
        if isinstance(group, ast.ClassDef)
        for one in group.body
    }
    assert fnmatch.filter(names, pattern)
