"""The suite's instructions: what callgrind counts of the installed library, and what is said where it cannot."""

import shutil
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "bench"))

pytest.importorskip("asv")
from benchmarks import instructions


@pytest.mark.skipif(not shutil.which("valgrind"), reason="no valgrind")
def test_a_count_is_of_the_case_and_of_one_call():
    found = instructions.counted(("pgd_step",))
    suite = instructions.Instructions()
    suite.setup(found, "pgd_step")
    # ten steps of 196,608 elements, 8 to a vector, some 20 instructions a vector with its copy
    assert 10 * 196_608 / 8 < suite.track_instructions(found, "pgd_step") < 10 * 196_608 * 40 / 8
    assert found.keys() == {"pgd_step"}


def test_a_case_that_valgrind_could_not_run_fails_and_is_not_skipped():
    with pytest.raises(KeyError, match="sinkhorn"):
        instructions.Instructions().track_instructions({"ipot": 7}, "sinkhorn")


def test_skipped_without_valgrind(monkeypatch):
    monkeypatch.setattr(instructions.shutil, "which", lambda _: None)
    suite = instructions.Instructions()
    with pytest.raises(instructions.SkipNotImplemented, match="no valgrind"):
        suite.setup(suite.setup_cache(), "ipot")
