"""What someone new gets wrong first, and what they are told."""

import importlib
import warnings

import numpy as np
import pytest
import torch
from commands import refused

import cmr_fast as cf
from cmr_fast import _terminal
from cmr_fast.cli import main
from cmr_fast.methods.acmr import ACMRConfig
from cmr_fast.methods.loop import RunConfig, train
from cmr_fast.ops import _dispatch
from cmr_fast.reports import hashing

program = importlib.import_module("cmr_fast.cli.main")  # `cmr_fast.cli.main` is the function


def test_bits_that_are_not_packed_are_no_codes(tmp_path, capsys):
    rng = np.random.default_rng(0)
    bits = rng.integers(0, 2, (50, 64), dtype=np.uint8)
    np.save(tmp_path / "bits.npy", bits)
    out = tmp_path / "db.cmrx"
    said = refused(capsys, "index", tmp_path / "bits.npy", "--out", out)
    assert "pack_codes" in said and "--bits 512" in said and not out.exists()
    assert main(["index", str(tmp_path / "bits.npy"), "--out", str(out), "--bits", "512"]) == 0
    assert cf.HammingIndex.load(out).bits == 512
    np.save(tmp_path / "codes.npy", cf.pack_codes(bits))
    assert main(["index", str(tmp_path / "codes.npy"), "--out", str(out), "--force"]) == 0
    assert cf.HammingIndex.load(out).bits == 64
    np.save(tmp_path / "words.npy", cf.pack_codes(bits).view(np.uint64).ravel())
    assert "view(uint8)" in refused(capsys, "index", tmp_path / "words.npy", "--out", tmp_path / "new.cmrx")
    np.save(tmp_path / "floats.npy", bits.astype(np.float32))
    assert "pack_codes" in refused(capsys, "index", tmp_path / "floats.npy", "--out", tmp_path / "new.cmrx")


def test_cmla_on_embeddings_says_so(tmp_path, capsys):
    pairs = cf.data.load("shapes", count=60)
    run = train("acmr", ACMRConfig(epochs=1, inner_steps=1), pairs, RunConfig(out=tmp_path / "run", quiet=True))
    said = refused(capsys, "attack", run.path, "--attacks", "cmla20")
    assert "acmr makes embeddings" in said
    with pytest.raises(cf.InputError, match="acmr makes embeddings"):
        hashing.score(run.model, pairs.query, pairs.database, "clean")


def test_work_that_takes_long_is_told_to_a_log(monkeypatch, capsys):
    clock = iter([100.0, 101.0, 103.0, 104.0, 140.0])  # at the start, and before each item
    monkeypatch.setattr(_terminal.time, "monotonic", lambda: next(clock))
    assert list(_terminal.track([1, 2, 3, 4], "reading")) == [1, 2, 3, 4]
    lines = capsys.readouterr().err.splitlines()
    assert lines == ["reading: 1 of 4, 3 s", "reading: 3 of 4, 40 s"]


def test_counts_are_told_to_a_log(monkeypatch, capsys):
    clock = iter([100.0, 101.0, 103.0, 104.0, 140.0, 180.0])  # at the start, and at each count
    monkeypatch.setattr(_terminal.time, "monotonic", lambda: next(clock))
    with _terminal.counting(100, "comparing") as more:
        for count in (10, 20, 30, 20, 20):
            more(count)
    assert capsys.readouterr().err.splitlines() == ["comparing: 30 of 100, 3 s", "comparing: 80 of 100, 40 s"]


def test_no_files_of_codes(tmp_path, capsys):
    assert "files of the codes" in refused(capsys, "index", "--out", tmp_path / "db.cmrx")


def test_a_warning_is_one_line(monkeypatch, capsys):
    def command():
        print(warnings.formatwarning("graphs are left aside", UserWarning, "codes.py", 50), end="")

    before = warnings.formatwarning
    monkeypatch.setattr(program, "_parse", lambda arguments: command)
    assert main([]) == 0
    assert capsys.readouterr().out == "warning: graphs are left aside\n"
    assert warnings.formatwarning is before


def test_a_copy_without_kernels_warns_once(monkeypatch):
    _dispatch._warn_of_no_kernels.cache_clear()
    monkeypatch.setattr(_dispatch, "native", lambda: ImportError("no module cmr_fast._cpu"))
    codes = torch.zeros((3, 8), dtype=torch.uint8)
    with pytest.warns(RuntimeWarning, match="native kernels.*no module cmr_fast._cpu"):
        cf.hamming_topk(codes, codes, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cf.hamming_topk(codes, codes, 1)
    _dispatch._warn_of_no_kernels.cache_clear()


def test_what_an_attack_says_of_itself_is_one_line():
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 3)).eval()
    x, y = torch.rand(5, 3, 2, 2), torch.arange(5) % 3
    _, info = cf.attacks.PGD(model, eps=0.1, steps=4)(x, y, return_info=True)
    assert repr(info).startswith(f"AttackInfo({int(info.success.sum())} of 5 fooled, delta up to 0.1")
    assert "4 steps" in repr(info) and "\n" not in repr(info)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--cgat-eps", "0.3"), "--cgat-eps is for --defence cgat"),
        (("--adversarial-attack", "cmla7"), "--adversarial-attack is for --adversarial"),
        (("--adversarial", "5", "--adversarial-attack", "pgd7"), "unknown attack 'pgd7' on hash codes"),
    ],
)
def test_settings_of_a_defence_that_is_not_asked_for(tmp_path, capsys, flags, said):
    assert said in refused(capsys, "train", "dcmh", "--out", tmp_path / "run", *flags)
    assert not (tmp_path / "run").exists()
