"""Does the gate see what it should? `python bench/gate/planted.py [--runs 10]`.

A clone gets a commit in which a kernel of Sinkhorn does 1.3 times its work, noise takes 20 % more instructions and
InfoNCE twice its memory; `compare.py` has to flag the three in every run.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
Change = tuple[str, str, str]  # file, what stands there once, what takes its place

CHANGES: tuple[Change, ...] = (
    (
        "csrc/cpu/sinkhorn.cpp",
        "        kernel.solve(s, data, problem, base + slot * scratch);\n",
        "        for (int again = 0; again < (problem % 10 < 3 ? 2 : 1); ++again)\n"
        "            kernel.solve(s, data, problem, base + slot * scratch);\n",
    ),
    (
        "csrc/cpu/pgd.cpp",
        "{ kernel.noise(noise, first, last); }",
        "{\n        kernel.noise(noise, first, last);\n"
        "        for (int64_t i = first; i < last; ++i)\n"
        "            if (i % 5 == 0) kernel.noise(noise, i, i + 1);\n    }",
    ),
    (
        "cmr_fast/ops/_info_nce_tiles.py",
        "    panels.run(body)\n    return gradients.result(scale)\n",
        "    more = torch.ones(66 << 18)\n    panels.run(body)\n    del more\n    return gradients.result(scale)\n",
    ),
)
FLAGGED = {("sinkhorn", "time"), ("pgd_noise", "instructions"), ("info_nce_memory", "memory")}


def clone(folder: Path, changes: tuple[Change, ...], repo: Path = ROOT) -> Path:
    """A clone of this tree as it stands, a commit with the changes on top of it, and the kernels built here before."""
    path = folder / "clone"
    git = ["git", "-c", "user.name=bench", "-c", "user.email=bench@localhost", "-c", "advice.detachedHead=false"]
    subprocess.run([*git, "clone", "--quiet", "--shared", str(repo), str(path)], check=True)
    moved = ["git", "-C", str(repo), "ls-files", "--modified", "--others", "--exclude-standard"]
    for name in subprocess.run(moved, capture_output=True, text=True, check=True).stdout.splitlines():
        if (repo / name).exists():
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(repo / name, path / name)
    commit = [*git, "-C", str(path), "commit", "--quiet", "--all", "--allow-empty", "--message"]
    subprocess.run(["git", "-C", str(path), "add", "--all"], check=True)
    subprocess.run([*commit, "as it stands"], check=True)
    for name, old, new in changes:
        text = (path / name).read_text()
        if text.count(old) != 1:
            raise ValueError(f"{name} holds {text.count(old)} times what is to be changed:\n{old}")
        (path / name).write_text(text.replace(old, new))
    subprocess.run([*commit, "planted"], check=True)
    if (kernels := repo / ".asv" / "kernels").exists():
        shutil.copytree(kernels, path / ".asv" / "kernels")
    return path


def compared(repo: Path, a: str, b: str, *options: str) -> tuple[int, dict]:
    """Exit status and rows of `compare.py`."""
    with tempfile.TemporaryDirectory() as folder:
        kept = Path(folder) / "rows.json"
        done = subprocess.run(
            [sys.executable, repo / "bench" / "compare.py", a, b, "--json", kept, *options],
            capture_output=True, text=True,
        )  # fmt: skip
        if not kept.exists():
            raise RuntimeError(done.stderr)
        return done.returncode, json.loads(kept.read_text())


def flagged(found: dict) -> set[tuple[str, str]]:
    return {(row["case"], row["cost"]) for row in found["rows"] if row["word"] == "WORSE"}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=10)
    arguments, rest = parser.parse_known_args()
    missed = 0
    with tempfile.TemporaryDirectory() as folder:
        repo = clone(Path(folder), CHANGES)
        for run in range(arguments.runs):
            cases = ("--cases", *sorted({case for case, _ in FLAGGED}))
            status, found = compared(repo, "HEAD^", "HEAD", *cases, *rest)
            ratios = {f"{row['case']} {row['cost']}": row["ratio"] for row in found["rows"]}
            seen = flagged(found)
            missed += not (seen >= FLAGGED and status == 1)
            print(f"run {run + 1}: status {status}, missed {sorted(FLAGGED - seen)}, ratios {ratios}", flush=True)
    print(f"{arguments.runs - missed} of {arguments.runs} runs flagged all three")
    return 1 if missed else 0


if __name__ == "__main__":
    raise SystemExit(main())
