"""The Python blocks of README.md and docs/ run: those of a file one after the other, in one namespace, in a process.

A block is left out where the line before its fence is `<!-- not run -->`. Commands have flags that there are, and those
that they need.
"""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
BLOCK = re.compile(r"^(?P<mark><!-- not run -->\n)?```python\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(text: str) -> list[str]:
    """Each padded to its place in the file, so that a traceback names the line."""
    return [
        "\n" * text.count("\n", 0, match.start("code")) + match["code"]
        for match in BLOCK.finditer(text)
        if not match["mark"]
    ]


def pages() -> list[Path]:
    found = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    return [path for path in found if blocks(path.read_text(encoding="utf-8"))]


RUN = """
import sys
path, *sources = sys.stdin.read().split("\\0")
namespace = {"__name__": "__main__"}
for source in sources:
    exec(compile(source, path, "exec"), namespace)
"""


@pytest.mark.parametrize("path", pages(), ids=lambda path: path.relative_to(ROOT).as_posix())
def test_python_blocks_run(path, tmp_path):
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    result = subprocess.run(
        [sys.executable, "-c", RUN],
        input="\0".join([str(path), *blocks(path.read_text(encoding="utf-8"))]),
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert result.returncode == 0, result.stderr[-3000:]


COMMAND = re.compile(r"^    cmr-fast (.*)$", re.MULTILINE)


def commands() -> list[tuple[str, str]]:
    """Page and arguments of each command that is shown in full and does something."""
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    found = [(p, c) for p in pages for c in COMMAND.findall(p.read_text(encoding="utf-8").replace("\\\n", " "))]
    return [(p.relative_to(ROOT).as_posix(), c) for p, c in found if " ... " not in c and "--help" not in c]


def test_commands_are_accepted_as_printed(capsys):
    from cmr_fast.cli.main import _parse

    assert any(
        "train scatter" in command and "train=10000" in command and "--out" in command for _, command in commands()
    )
    refused = []
    for page, command in commands():
        arguments = shlex.split(command.partition("&&")[0], comments=True)
        try:
            assert callable(_parse(arguments))
        except (SystemExit, ValueError) as error:
            refused.append(f"{page}: cmr-fast {command} ({error}) {capsys.readouterr().err}")
    assert not refused, "\n".join(refused)


def test_marked_blocks_are_left_out():
    text = "a\n```python\nfirst\n```\n\n<!-- not run -->\n```python\nsecond\n```\n```text\nthird\n```\n"
    assert [(block.count("\n") - 1, block.strip()) for block in blocks(text)] == [(2, "first")]
    assert ROOT / "README.md" in pages()
