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
from gate import measure, planted, trees  # noqa: E402
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


def test_a_wider_factor_takes_the_place_of_the_costs_own():
    assert judged("x", "time", quads(1.3, 0.08), 24, 1.5).word == "same"
    assert judged("x", "time", quads(1.7, 0.08), 24, 1.5).word == "WORSE"


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
    lines = ("sinkhorn time, the sums are exact now", "ipot", "pgd_noise result")
    message = "Exact sums\n" + "".join(f"\nAccepted cost: {line}" for line in lines)
    git = ["git", "-C", repo, "-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", message], check=True)
    assert trees.accepted(repo, ("HEAD^", "HEAD")) == {("sinkhorn", "time"), ("pgd_noise", "result")}
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
ONCE = ("--rounds", "1", "--quads", "1")
NOISE = "    out = torch.empty((len(index), count), dtype=torch.float32, device=index.device)\n"
RUN = "    panels.run(body)\n    return gradients.result(scale)\n"


@pytest.fixture(scope="module")
def changed(tmp_path_factory):
    """HEAD has 20 % more instructions and twice the memory that HEAD^ has not. Time is `gate/planted.py`'s to show."""
    return clone(
        tmp_path_factory.mktemp("changed"),
        (
            "cmr_fast/ops/pgd.py",
            NOISE,
            NOISE + "    if len(index) == 10:\n        _noise(index[:2], count, seed, backend, threads)\n",
        ),
        ("cmr_fast/ops/_info_nce_tiles.py", RUN, "    more = torch.ones(66 << 18)\n" + RUN),
    )


@pytest.mark.timeout(1200)
def test_planted_memory_is_flagged_and_nothing_else(changed):
    options = ("--cases", "info_nce_memory", "pairwise_nll_memory", "--costs", "memory", "--rounds", "1")
    status, found = planted.compared(changed, "HEAD^", "HEAD", *options)
    assert status == 1
    assert words(found) == {("info_nce_memory", "memory"): "WORSE", ("pairwise_nll_memory", "memory"): "same"}
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
    status, found = planted.compared(repo, "HEAD^", "HEAD", "--costs", "time", *ONCE)
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
    assert next(row for row in found["rows"] if row["case"] == "sinkhorn")["ratio"] > 0  # the others are measured


def test_other_results_that_a_message_accepts_are_measured(tmp_path):
    repo = clone(tmp_path, ("cmr_fast/ops/pgd.py", NOISE, NOISE + "    seed += 1\n"))
    git = ["git", "-C", repo, "-c", "user.name=a", "-c", "user.email=a@b", "commit", "-q", "--allow-empty"]
    subprocess.run([*git, "-m", "Another stream\n\nAccepted cost: pgd_noise result, by its seed"], check=True)
    _, found = planted.compared(repo, "HEAD^^", "HEAD", "--cases", "pgd_noise", "--costs", "time", *ONCE)
    result, time = found["rows"]
    assert (result["cost"], result["word"]) == ("result", "accepted") and result["said"].startswith("array 0 is apart")
    assert time["cost"] == "time" and time["ratio"] > 0


class Stub:
    """A worker of these instruction sets, whose process ends at the case called `deadly`."""

    def __init__(self, tree=None, code=None, before=("out=",), patience=0, isas=("avx2", "sse")):
        self.isas, self.out, self.isa, self.code, self.asked = list(isas), before[-1].partition("=")[2], None, None, ""
        self.process = self

    def poll(self):
        return self.code

    def close(self):
        self.code = -9

    def send(self, order, *arguments):
        if self.code is not None:
            raise measure.Broken("the process ended")
        self.asked = arguments[0] if order == "instructions" else ""

    def answer(self):
        if not self.asked:
            return {"isas": self.isas}
        if self.asked == "deadly" and ".A" in self.out:
            self.code = -11
            raise measure.Broken("the process ended (-11)")
        Path(f"{self.out}.{self.asked}").write_text(f"desc: Trigger: Client Request: {self.asked}\ntotals: 7\n")

    def __call__(self, order, isa):
        self.isa = isa
        return isa


def test_two_instruction_sets_run_the_best_in_common():
    a, b = Stub(isas=("avx512bw", "avx2", "sse")), Stub(isas=("neither", "avx2", "sse"))
    measure.described([a, b])
    assert (a.isa, b.isa) == ("avx2", "avx2")
    a, b = Stub(), Stub()
    measure.described([a, b])
    assert (a.isa, b.isa) == (None, None)
    with pytest.raises(measure.Broken, match="A has avx2, sse and B neon: they can run none in common"):
        measure.described([Stub(), Stub(isas=("neon",))])


def test_a_case_that_ends_its_valgrind_costs_one_row(tmp_path, monkeypatch):
    monkeypatch.setattr(measure, "Worker", Stub)
    cases = ["before", "deadly", "after"]
    counts, broken = measure.instructions((tmp_path, tmp_path), tmp_path, cases, tmp_path, tmp_path / "shim.so")
    assert broken == {"deadly": "A: the process ended (-11)"}
    assert counts == {"before": (7, 7), "after": (7, 7)}


def test_one_tree_is_counted_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(measure, "Worker", Stub)
    cases = ["before", "deadly", "after"]
    counts, broken = measure.instructions((tmp_path,), tmp_path, cases, tmp_path, tmp_path / "shim.so")
    assert (counts, broken) == ({"before": (7,), "after": (7,)}, {"deadly": "A: the process ended (-11)"})


@pytest.mark.skipif(not shutil.which("valgrind"), reason="no valgrind")
def test_without_a_compiler_the_counts_alone_break(tmp_path, monkeypatch):
    repo = clone(tmp_path)
    monkeypatch.setenv("CC", "no-such-compiler")
    options = ("--cases", "ipot", "--costs", "time", "instructions", *ONCE)
    status, found = planted.compared(repo, "HEAD", "HEAD", *options)
    time, count = found["rows"]
    assert (status, count["word"]) == (1, "BROKEN") and count["said"].startswith("no C compiler")
    assert time["cost"] == "time" and time["ratio"] > 0


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
