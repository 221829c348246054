"""The suite's instructions: what callgrind counts of the installed library, and what is said where it cannot."""

import shutil
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "bench"))

from benchmarks import instructions


@pytest.mark.skipif(not shutil.which("valgrind"), reason="no valgrind")
def test_a_count_of_the_library_repeats_and_is_of_the_case():
    found = [instructions.counted(("pgd_step", "pgd_noise")) for _ in range(2)]
    assert found[0].keys() == found[1].keys() == {"pgd_step", "pgd_noise"}
    for case, count in found[0].items():
        assert abs(count / found[1][case] - 1) < 0.01
    suite = instructions.Instructions()
    suite.setup(found[0], "pgd_step")
    # ten steps of 196,608 elements, 8 to a vector, some 20 instructions a vector with its copy
    assert 10 * 196_608 / 8 < suite.track_instructions(found[0], "pgd_step") < 10 * 196_608 * 40 / 8


def test_a_case_that_valgrind_could_not_run_fails_and_is_not_skipped():
    with pytest.raises(KeyError, match="sinkhorn"):
        instructions.Instructions().track_instructions({"ipot": 7}, "sinkhorn")


def test_skipped_without_valgrind(monkeypatch):
    monkeypatch.setattr(instructions.shutil, "which", lambda _: None)
    suite = instructions.Instructions()
    with pytest.raises(instructions.SkipNotImplemented, match="no valgrind"):
        suite.setup(suite.setup_cache(), "ipot")
