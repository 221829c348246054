"""Commands as the tests of cli/ run them."""

import pytest

from cmr_fast.cli.main import main


def refused(capsys: pytest.CaptureFixture[str], *argv: object) -> str:
    """Run a command that must exit with 2 and one line on stderr, an error; returns what it says."""
    capsys.readouterr()
    assert main([str(a) for a in argv]) == 2
    err = capsys.readouterr().err
    lines = err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), err
    return lines[0].removeprefix("error: ")
