"""The gate between two commits: what its verdicts say of samples, what it sees in a clone, what makes it fail."""

import importlib.util
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "bench"))

pytest.importorskip("asv", reason="the extra bench")
from gate import planted, trees  # noqa: E402
from gate.verdict import Samples, judged  # noqa: E402


def quads(factor: float, spread: float, count: int = 24, seed: int = 0) -> Samples:
    """Samples whose machine drifts to twice its speed and back, each off by a lognormal share of its own."""
    rng = random.Random(seed)
    found = []
    for i in range(count):
        drift = 1e-3 * (1 + abs(i - count / 2) / count * 2)
        found.append(tuple(drift * rng.lognormvariate(0, spread) * side for side in (1, factor, factor, 1)))
    return Samples(found)


@pytest.mark.parametrize("seed", range(10))
def test_noise_alone_is_the_same_and_three_tenths_more_are_worse(seed):
    assert judged("x", "time", quads(1.0, 0.08, seed=seed), 24).word == "same"
    assert judged("x", "time", quads(1.3, 0.08, seed=seed), 24).word == "WORSE"
    assert judged("x", "time", quads(1 / 1.3, 0.08, seed=seed), 24).word == "better"


def test_a_difference_that_two_quads_show_is_not_sure():
    assert judged("x", "time", quads(1.3, 0.3, count=2), 2).word == "same"


def test_the_ratio_and_its_interval_are_those_of_the_quads():
    row = judged("x", "time", Samples([(1.0, 2.0, 2.0, 1.0)] * 20 + [(1.0, 1.0, 1.0, 1.0)] * 3), 23)
    assert (row.a, row.b, row.ratio, row.low, row.high) == (1.0, 2.0, 2.0, 2.0, 2.0)


@pytest.mark.parametrize(
    ("cost", "quad", "word"),
    [
        ("instructions", (100, 109, 109, 100), "same"),
        ("instructions", (100, 111, 111, 100), "WORSE"),
        ("memory", (10.0, 12.9, 12.9, 10.0), "same"),
        ("memory", (10.0, 13.1, 13.1, 10.0), "WORSE"),
        ("memory", (0.1, 0.5, 0.5, 0.1), "same"),  # less than half a megabyte
        ("time", (1.0, float("nan"), 1.0, 1.0), "BROKEN"),
        ("memory", (1.0, 0.0, 0.0, 1.0), "BROKEN"),
    ],
)
def test_words(cost, quad, word):
    assert judged("x", cost, Samples([quad]), 1).word == word


def test_fewer_samples_than_there_should_be_fail():
    row = judged("x", "time", quads(1.0, 0.05, count=5), 24)
    assert row.word == "TOO FEW" and row.failed and not row.measured


def test_a_message_accepts_a_cost_by_its_names(tmp_path):
    repo = planted.clone(tmp_path, ())
    message = "Exact sums\n\nAccepted cost: sinkhorn time, the sums are exact now\nAccepted cost: ipot"
    git = ["git", "-C", repo, "-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", message], check=True)
    assert trees.accepted(repo, ("HEAD^", "HEAD")) == {("sinkhorn", "time")}
    assert trees.accepted(repo, ("HEAD", "HEAD")) == set()


def clone(folder: Path, *changes: planted.Change) -> Path:
    """A clone with a commit of changes to Python, whose kernels are those that the tests run."""
    native = importlib.util.find_spec("cmr_fast._cpu")
    if native is None or native.origin is None:
        pytest.skip("the native kernels are not built")
    if not (ROOT / ".git").exists():
        pytest.skip("no repository")
    repo = planted.clone(folder, changes)
    kept = repo / ".asv" / "kernels" / trees.key_of(repo) / f"_cpu{trees.SUFFIX}"
    kept.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy2(native.origin, kept)
    return repo


def words(found: dict) -> dict[tuple[str, str], str]:
    return {(row["case"], row["cost"]): row["word"] for row in found["rows"]}


CASES = "bench/gate/cases.py"
CALL = "    native.hamming_topk_of_arrays(isa, q, db, k, threads or 1, distances, indices)\n"
NOISE = "    out = torch.empty((len(index), count), dtype=torch.float32, device=index.device)\n"
RUN = "    panels.run(body)\n    return gradients.result(scale)\n"


@pytest.fixture(scope="module")
def changed(tmp_path_factory):
    """HEAD has a slowdown of 1.3, 20 % more instructions and twice the memory that HEAD^ has not."""
    return clone(
        tmp_path_factory.mktemp("changed"),
        (
            "cmr_fast/ops/hamming.py",
            CALL,
            CALL + "    part = len(q) * 3 // 10\n"
            "    if part:\n"
            "        more = distances[:part].copy(), indices[:part].copy()\n"
            "        native.hamming_topk_of_arrays(isa, q[:part], db, k, 1, *more)\n",
        ),
        (
            "cmr_fast/ops/pgd.py",
            NOISE,
            NOISE + "    if len(index) == 10:\n        _noise(index[:2], count, seed, backend, threads)\n",
        ),
        ("cmr_fast/ops/_info_nce_tiles.py", RUN, "    more = torch.ones(66 << 18)\n" + RUN),
    )


@pytest.mark.timeout(1200)
def test_planted_time_and_memory_are_flagged_and_nothing_else(changed):
    options = ("--cases", "hamming_topk", "info_nce_memory", "ipot", "pairwise_nll_memory")
    options += ("--costs", "time", "memory", "--rounds", "2")
    status, found = planted.compared(changed, "HEAD^", "HEAD", *options)
    assert status == 1
    assert words(found) == {
        ("hamming_topk", "time"): "WORSE",
        ("ipot", "time"): "same",
        ("info_nce_memory", "memory"): "WORSE",
        ("pairwise_nll_memory", "memory"): "same",
    }
    status, found = planted.compared(changed, "HEAD", "HEAD", *options)
    assert status == 0 and set(words(found).values()) == {"same"}


@pytest.mark.skipif(not shutil.which("valgrind"), reason="no valgrind")
@pytest.mark.timeout(1800)  # a Python that imports torch, fifty times slower
def test_planted_instructions_are_flagged_and_nothing_else(changed):
    options = ("--cases", "pgd_noise", "ipot", "--costs", "instructions")
    status, found = planted.compared(changed, "HEAD^", "HEAD", *options)
    assert status == 1
    assert words(found) == {("pgd_noise", "instructions"): "WORSE", ("ipot", "instructions"): "same"}
    ratios = {row["case"]: row["ratio"] for row in found["rows"]}
    assert 1.15 < ratios["pgd_noise"] < 1.22 and abs(ratios["ipot"] - 1) < 0.02


@pytest.mark.timeout(1200)
def test_what_breaks_differs_is_gone_or_not_finite_fails(tmp_path):
    labels = "    labels = hot(128), hot(3000)\n"
    ipot = '@case("time", "instructions")\ndef ipot() -> Call:'
    repo = clone(
        tmp_path,
        (CASES, labels, labels + "    return lambda: torch.tensor(float('nan'))\n"),
        (CASES, ipot, f'{ipot}\n    raise RuntimeError("no such thing")\n'),
        (CASES, '@case("time")\ndef hamming_calls', '@case("time")\ndef hamming_calls_anew'),
        ("cmr_fast/ops/pgd.py", NOISE, NOISE + "    seed += 1\n"),
    )
    status, found = planted.compared(repo, "HEAD^", "HEAD", "--costs", "time", "--rounds", "1", "--quads", "1")
    seen = words(found)
    assert status == 1
    assert seen["hamming_calls", "time"] == "GONE"
    assert seen["hamming_calls_anew", "time"] == "new"
    assert seen["pairwise_nll", "time"] == "BROKEN"
    assert seen["ipot", "time"] == "BROKEN"
    assert seen["pgd_noise", "time"] == "DIFFERENT"
    said = {row["case"]: row["said"] for row in found["rows"]}
    assert said["ipot"] == "A: RuntimeError: no such thing"
    assert said["pairwise_nll"] == "A: ValueError: pairwise_nll returns a number that is not finite"
    assert seen["sinkhorn", "time"] == "same"


def test_a_case_that_breaks_on_one_commit_alone_names_it(tmp_path):
    repo = clone(tmp_path, ("cmr_fast/ops/pgd.py", NOISE, NOISE + "    raise MemoryError\n"))
    status, found = planted.compared(repo, "HEAD^", "HEAD", "--costs", "time", "--cases", "pgd_noise")
    (row,) = found["rows"]
    assert (status, row["word"], row["said"]) == (1, "BROKEN", "B: MemoryError: ")


def test_a_commit_that_is_not_there_and_a_case_that_is_none(tmp_path):
    def run(*arguments: str) -> subprocess.CompletedProcess:
        command = [sys.executable, ROOT / "bench" / "compare.py", *arguments]
        return subprocess.run(command, capture_output=True, text=True)

    done = run("HEAD", "no-such-commit", "--costs", "time")
    assert done.returncode == 2 and "no-such-commit" in done.stderr and not done.stdout
    repo = clone(tmp_path)
    done = run("HEAD", "HEAD", "--costs", "time", "--cases", "sinkhorne", "--repo", str(repo))
    assert done.returncode == 2 and "no case is called sinkhorne" in done.stderr
    left = subprocess.run(["git", "-C", repo, "worktree", "list"], capture_output=True, text=True).stdout
    assert len(left.splitlines()) == 1
