"""Two commits, checked out side by side with their native kernels: no network, no new environment."""

import ast
import hashlib
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

CASES = Path("bench", "gate", "cases.py")
SUFFIX = sysconfig.get_config_var("EXT_SUFFIX")
ACCEPTED = re.compile(r"^Accepted cost: (\w+) (time|memory|instructions|gone|result)\b", re.MULTILINE)


class Unbuilt(Exception):
    """A commit that is not there, or whose kernels do not build."""


def git(repo: Path, *arguments: str) -> str:
    done = subprocess.run(["git", "-C", str(repo), *arguments], capture_output=True, text=True)
    if done.returncode:
        raise Unbuilt(f"git {' '.join(arguments)}: {done.stderr.strip()}")
    return done.stdout.strip()


@contextmanager
def checked_out(repo: Path, commits: tuple[str, str], cache: Path) -> Iterator[tuple[Path, Path]]:
    """A worktree a commit; both are taken away again."""
    folder = Path(tempfile.mkdtemp(prefix="cmr-fast-"))
    trees = folder / "a", folder / "b"
    try:
        for tree, commit in zip(trees, commits, strict=True):
            git(repo, "worktree", "add", "--quiet", "--detach", str(tree), commit)
            add_kernels(tree, cache)
        yield trees
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        git(repo, "worktree", "prune")


def key_of(tree: Path) -> str:
    """What the kernels of a tree depend on: their sources, setup.py, the compiler and its flags, the interpreter."""
    compiler = subprocess.run([os.environ.get("CXX", "c++"), "--version"], capture_output=True, text=True).stdout
    flags = [os.environ.get(name, "") for name in ("CXX", "CFLAGS", "CXXFLAGS", "LDFLAGS")]
    sources = git(tree, "rev-parse", "HEAD:csrc", "HEAD:setup.py")
    text = "\n".join([sources, compiler.partition("\n")[0], *flags, sys.version, str(SUFFIX)])
    return hashlib.sha256(text.encode()).hexdigest()[:20]


def add_kernels(tree: Path, cache: Path) -> None:
    """Build them, or copy what an earlier call built from the same sources."""
    kept = cache / key_of(tree) / f"_cpu{SUFFIX}"
    place = tree / "cmr_fast" / kept.name
    if not kept.exists():
        log = tree / "build.log"
        with log.open("w") as out:
            code = subprocess.run(
                [sys.executable, "setup.py", "build_ext", "--inplace"],
                cwd=tree, env={**os.environ, "CMR_FAST_CUDA": "0"}, stdout=out, stderr=subprocess.STDOUT,
            ).returncode  # fmt: skip
        if code or not place.exists():
            last = "\n".join(log.read_text().splitlines()[-15:])
            raise Unbuilt(f"the kernels of {git(tree, 'rev-parse', '--short', 'HEAD')} do not build:\n{last}")
        kept.parent.mkdir(parents=True, exist_ok=True)
        aside = kept.with_suffix(f".{os.getpid()}")
        shutil.copy2(place, aside)
        aside.replace(kept)
    else:
        shutil.copy2(kept, place)


def declared(tree: Path) -> set[tuple[str, str]] | None:
    """The (case, cost) pairs that a commit's own file has, read and not run; None where it has no such file."""
    path = tree / CASES
    if not path.exists():
        return None
    return {
        (function.name, cost.value)
        for function in ast.parse(path.read_text()).body
        if isinstance(function, ast.FunctionDef)
        for mark in function.decorator_list
        if isinstance(mark, ast.Call) and getattr(mark.func, "id", "") == "case"
        for cost in mark.args
        if isinstance(cost, ast.Constant)
    }


def accepted(repo: Path, commits: tuple[str, str]) -> set[tuple[str, str]]:
    """The costs that the commits after A say, in their messages, are meant: `Accepted cost: CASE time`."""
    log = git(repo, "log", "--format=%B", f"{commits[0]}..{commits[1]}")
    return set(ACCEPTED.findall(log))
