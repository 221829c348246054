import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from commands import refused

import cmr_fast
from cmr_fast.cli.main import COMMANDS, main
from cmr_fast.cli.train import flags_of
from cmr_fast.methods import METHODS

SMALL = {
    "acmr": ["--dim", "16", "--image-hidden", "16", "--text-hidden", "16"],
    "cmimh": ["--bits", "16", "--hidden", "16", "--critic-hidden", "16", "--critic-dim", "8"],
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of the package's own layout: three classes that both modalities tell apart."""
    random = np.random.default_rng(0)
    arrays = {}
    for split, count in (("train", 90), ("query", 30), ("database", 60)):
        labels = np.arange(count) % 3
        arrays[f"{split}_labels"] = labels
        for modality, dim in (("image", 8), ("text", 6)):
            centres = 2 * np.eye(3, dim)
            arrays[f"{split}_{modality}"] = (centres[labels] + random.normal(0, 0.5, (count, dim))).astype(np.float32)
    path = tmp_path_factory.mktemp("data") / "tiny.npz"
    np.savez(path, **arrays)
    return path


@pytest.fixture(scope="module")
def runs(data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("runs")
    found = {}
    for method, small in SMALL.items():
        found[method] = folder / method
        argv = ["train", method, "--data", str(data), "--epochs", "2", "--out", str(found[method]), *small]
        assert main(argv) == 0
    return found


def ran(capsys: pytest.CaptureFixture[str], *argv: object) -> str:
    """Run a command that must succeed; returns what it printed."""
    capsys.readouterr()
    code = main([str(a) for a in argv])
    captured = capsys.readouterr()
    assert code == 0, captured.err
    return captured.out


def test_training_prints_the_results_beside_baselines_and_what_to_type_next(data, tmp_path, capsys):
    out = ran(
        capsys, "train", "acmr", "--data", data, "--epochs", 1, "--out", tmp_path / "run-<data>-<seed>", *SMALL["acmr"]
    )
    run = tmp_path / f"run-{cmr_fast.data.load(data).name}-0"
    assert (run / "model.safetensors").is_file()
    for expected in ("mAP(all)", "mAP@50 hits", "random", "CCA", str(run), "cmr-fast evaluate", "cmr-fast report"):
        assert expected in out
    results = json.loads((run / "results.json").read_text())
    assert f"{results['all']['average']:.3f}" in out


def test_the_commands_that_training_names_work(runs, capsys):
    from cmr_fast.cli.train import next_commands

    for method, run in runs.items():
        for line in next_commands(run, codes=method == "cmimh"):
            argv = line.split()
            assert argv[0] == "cmr-fast"
            ran(capsys, *argv[1:], *(["--tsne-points", "0"] if argv[1] == "report" else []))
        hits = (run / "hits.csv").read_text().splitlines()
        assert hits[0] == "query,rank,id,distance" and len(hits) == 1 + 30 * 10
        assert (run / "report" / "index.html").is_file()


def test_an_ended_run_can_be_resumed_and_another_not_begun_over_it(runs, data, capsys):
    argv = ["train", "acmr", "--data", data, "--epochs", 2, "--out", runs["acmr"], *SMALL["acmr"]]
    assert "not empty" in refused(capsys, *argv)
    assert "mAP(all)" in ran(capsys, *argv, "--resume")
    assert "alpha" in refused(capsys, *argv, "--resume", "--alpha", 0.5)


def test_encode_writes_packed_codes_or_real_values(runs, tmp_path, capsys):
    encode = ["encode", "--modality", "text", "--split", "query"]
    ran(capsys, *encode, runs["cmimh"], "--out", tmp_path / "codes.npy")
    ran(capsys, *encode, runs["cmimh"], "--real", "--out", tmp_path / "logits.npy")
    codes, logits = np.load(tmp_path / "codes.npy"), np.load(tmp_path / "logits.npy")
    assert codes.dtype == np.uint8 and codes.shape == (30, 2)
    assert logits.dtype == np.float32 and logits.shape == (30, 16)
    assert np.array_equal(np.unpackbits(codes, axis=1, bitorder="little"), logits >= 0)

    ran(capsys, *encode, runs["acmr"], "--out", tmp_path / "embeddings.npy")
    ran(capsys, *encode, runs["acmr"], "--bits", "--out", tmp_path / "signs.npy")
    embeddings, signs = np.load(tmp_path / "embeddings.npy"), np.load(tmp_path / "signs.npy")
    assert embeddings.dtype == np.float32 and embeddings.shape == (30, 16)
    assert np.array_equal(np.unpackbits(signs, axis=1, bitorder="little"), embeddings >= 0)


def test_the_held_out_pairs_and_the_training_pairs_are_those_of_the_run(runs, tmp_path, capsys):
    parts = []
    for split in ("train", "valid"):
        ran(capsys, "encode", runs["acmr"], "--modality", "image", "--split", split, "--out", tmp_path / f"{split}.npy")
        parts.append(np.load(tmp_path / f"{split}.npy"))
    assert len(parts[0]) + len(parts[1]) == 90 and len(parts[1]) == 9


def test_search_finds_what_a_stable_sort_finds(tmp_path, capsys):
    random = np.random.default_rng(1)
    db, queries = random.integers(0, 256, (50, 2), dtype=np.uint8), random.integers(0, 256, (4, 2), dtype=np.uint8)
    np.save(tmp_path / "a.npy", db[:20])
    np.save(tmp_path / "b.npy", db[20:])
    np.save(tmp_path / "q.npy", queries)
    ids = np.arange(1000, 1050)
    np.save(tmp_path / "ids.npy", ids)
    ran(
        capsys,
        "index",
        tmp_path / "a.npy",
        tmp_path / "b.npy",
        "--ids",
        tmp_path / "ids.npy",
        "--out",
        tmp_path / "x.cmrx",
    )
    out = ran(capsys, "search", tmp_path / "x.cmrx", tmp_path / "q.npy", "--k", 7, "--out", tmp_path / "hits.npz")
    found = np.load(tmp_path / "hits.npz")
    distances = np.unpackbits(queries[:, None] ^ db[None], axis=2).sum(axis=2)
    order = np.argsort(distances, axis=1, kind="stable")[:, :7]
    assert np.array_equal(found["ids"], ids[order])
    assert np.array_equal(found["distances"], np.take_along_axis(distances, order, axis=1))
    assert f"{ids[order[0, 0]]} ({distances[0, order[0, 0]]})" in out

    ran(capsys, "search", tmp_path / "x.cmrx", tmp_path / "q.npy", "--k", 60, "--out", tmp_path / "hits.csv")
    assert len((tmp_path / "hits.csv").read_text().splitlines()) == 1 + 4 * 50


def test_evaluate_prints_every_convention_and_agrees_with_the_library(runs, data, tmp_path, capsys):
    out = ran(capsys, "evaluate", runs["cmimh"], "--convention", "every", "--k", 20, "--out", tmp_path / "table.json")
    rows = json.loads((tmp_path / "table.json").read_text())
    from cmr_fast.methods.evaluation import evaluate_model
    from cmr_fast.methods.loop import load_model
    from cmr_fast.retrieval.conventions import CONVENTIONS

    assert [row["convention"] for row in rows] == list(CONVENTIONS)
    model, dataset = load_model(runs["cmimh"]), cmr_fast.data.load(data)
    for row in rows:
        assert row["convention"] in out
        expected = evaluate_model(model, dataset, k=20, convention=row["convention"])
        assert row["I2T"] == expected["i2t"].map and row["T2I"] == expected["t2i"].map


def test_every_tie_rule_leaves_out_what_is_not_defined(runs, capsys):
    out = ran(capsys, "evaluate", runs["cmimh"], "--convention", "every", "--ties", "every", "--k", 5)
    line = next(line for line in out.splitlines() if line.startswith("hits_skip") and "tie_aware" in line)
    assert line.split()[-3:] == ["-", "-", "-"] and "not defined" in out


def test_evaluate_files(data, tmp_path, capsys):
    arrays = np.load(data)
    for name, key in (("q", "query_image"), ("d", "database_image"), ("ql", "query_labels"), ("dl", "database_labels")):
        np.save(tmp_path / f"{name}.npy", arrays[key])
    files = {flag: tmp_path / f"{name}.npy" for flag, name in zip(FLAGS, ("q", "d", "ql", "dl"), strict=True)}
    argv = [str(part) for pair in files.items() for part in pair]
    ran(capsys, "evaluate", *argv, "--metric", "l2", "--out", tmp_path / "table.json")
    expected = cmr_fast.evaluate_embeddings(
        arrays["query_image"], arrays["database_image"], arrays["query_labels"], arrays["database_labels"], metric="l2"
    )
    assert json.loads((tmp_path / "table.json").read_text())[0]["mAP"] == expected.map

    assert "--database-labels" in refused(capsys, "evaluate", *argv[:6])
    np.save(tmp_path / "ql.npy", arrays["query_labels"][:-1])
    assert "29 labels" in refused(capsys, "evaluate", *argv)


FLAGS = ("--query-codes", "--database-codes", "--query-labels", "--database-labels")


def test_doctor_says_which_instruction_set_runs(capsys, monkeypatch):
    monkeypatch.delenv("CMR_FAST_ISA", raising=False)
    found = json.loads(ran(capsys, "doctor", "--json"))
    from cmr_fast.ops import _dispatch

    native = _dispatch.native()
    if isinstance(native, ImportError):
        assert found["instruction_set"]["runs"] is None and "_cpu" in found["instruction_set"]["why"]
    else:
        assert found["instruction_set"]["runs"] == native.available_isas()[0]
        assert found["instruction_set"]["runs"] in ran(capsys, "doctor")
        monkeypatch.setenv("CMR_FAST_ISA", "scalar")
        forced = json.loads(ran(capsys, "doctor", "--json"))["instruction_set"]
        assert forced["runs"] == "scalar" and "CMR_FAST_ISA" in forced["why"]
    for op, devices in _dispatch.BACKENDS.items():
        for device, names in devices.items():
            assert list(found["ops"][op][device]["candidates"]) == list(names)


def test_help_teaches(capsys):
    def helped(*argv: str) -> str:
        with pytest.raises(SystemExit) as stopped:
            main([*argv, "--help"])
        assert stopped.value.code == 0
        return capsys.readouterr().out

    top = helped()
    for command in COMMANDS:
        assert command in top
        assert f"Example:  cmr-fast {command}" in helped(command) or command == "train"
    for method in METHODS:
        assert method in helped("train")
        text = helped("train", method)
        assert f"cmr-fast train {method} --data" in text and "--resume" in text
        assert "--epochs" in text or "--max-steps" in text
    assert "4.1.2" in helped("train", "acmr") and "Eq. 14" in helped("train", "cmimh")


def test_bad_input_is_one_line_and_exit_code_2(runs, data, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("CMR_FAST_DATA", raising=False)
    np.save("codes.npy", np.zeros((3, 2), np.uint8))
    np.save("wide.npy", np.zeros((3, 4), np.uint8))
    np.save("floats.npy", np.zeros((3, 2), np.float32))
    Path("text.npy").write_text("hello")
    Path("half.safetensors").write_bytes((runs["acmr"] / "model.safetensors").read_bytes()[:1000])
    assert main(["index", "codes.npy", "--out", "db.cmrx"]) == 0
    encode = ("--modality", "image", "--out", "new.npy")

    assert "no data at nowhere" in refused(capsys, "train", "acmr", "--data", "nowhere", "--out", "run")
    assert "no such file" in refused(capsys, "evaluate", "nowhere")
    assert "half-written" in refused(capsys, "evaluate", "half.safetensors", "--data", data)
    assert "half-written" in refused(capsys, "encode", "codes.npy", *encode)
    assert "dimensions" in refused(capsys, "encode", runs["acmr"], "--data", "shapes", "--options", "count=16", *encode)
    assert "exclude" in refused(capsys, "encode", runs["cmimh"], "--real", "--bits", *encode)
    assert "name=value" in refused(capsys, "encode", runs["cmimh"], "--options", "count", *encode)
    assert "exists already" in refused(capsys, "index", "codes.npy", "--out", "db.cmrx")
    assert "one code length" in refused(capsys, "index", "codes.npy", "wide.npy", "--out", "two.cmrx")
    assert "uint8" in refused(capsys, "index", "floats.npy", "--out", "two.cmrx")
    assert "3 integer ids" in refused(capsys, "index", "codes.npy", "--ids", "floats.npy", "--out", "two.cmrx")
    assert "not a .npy" in refused(capsys, "index", "text.npy", "--out", "two.cmrx")
    assert "k must be" in refused(capsys, "search", "db.cmrx", "codes.npy", "--k", 0)
    assert "bytes" in refused(capsys, "search", "db.cmrx", "wide.npy")
    assert "not a HammingIndex" in refused(capsys, "search", "codes.npy", "codes.npy")
    assert ".npz or .csv" in refused(capsys, "search", "db.cmrx", "codes.npy", "--out", "hits.txt")
    assert "k must be" in refused(capsys, "evaluate", runs["acmr"], "--k", 0)
    assert "convention" in refused(capsys, "evaluate", runs["acmr"], "--convention", "mine")
    assert "expected a folder" in refused(capsys, "report", runs["acmr"], "--out", "codes.npy")
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(
        ["codes.npy", "wide.npy", "floats.npy", "text.npy", "half.safetensors", "db.cmrx"]
    )


def test_flags_that_cannot_be_are_refused_before_anything_is_read(capsys):
    for argv in (["train", "acmr", "--epochs", "0"], ["train", "acmr", "--nonsense"], ["nonsense"], ["search"]):
        with pytest.raises(SystemExit) as stopped:
            main(argv)
        assert stopped.value.code == 2


def test_an_interrupt_says_how_to_go_on(monkeypatch, capsys):
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("cmr_fast.cli.train.load_pairs", interrupt)
    assert main(["train", "acmr", "--data", "a b", "--out", "here"]) == 130
    assert "cmr-fast train acmr --data 'a b' --out here --resume" in capsys.readouterr().err


def test_a_defect_keeps_its_traceback(monkeypatch):
    def defect(*_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("cmr_fast.cli.train.load_pairs", defect)
    with pytest.raises(ZeroDivisionError):
        main(["train", "acmr"])


def test_help_of_the_program_imports_nothing_heavy():
    code = (
        "import sys; from cmr_fast.cli import main\n"
        "try: main(['doctor', '--help'])\n"
        "except SystemExit: pass\n"
        "print([m for m in ('torch', 'numpy', 'lightning', 'matplotlib', 'sklearn', 'scipy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_python_m_runs_the_same_program():
    done = subprocess.run(
        [sys.executable, "-m", "cmr_fast", "search", "nowhere.cmrx", "nothing.npy"],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 2 and done.stderr == "error: nowhere.cmrx: no such file or folder\n"


def test_without_the_extra_one_line_names_it(tmp_path):
    """With torch and numpy alone, as `pip install cmr-fast` gives them."""
    missing = ("tyro", "rich", "scipy", "h5py", "safetensors", "sklearn", "lightning", "tensorboard", "matplotlib")
    code = f"import sys\nsys.modules.update(dict.fromkeys({missing!r}))\nfrom cmr_fast.cli import main\n"
    for argv in ([], ["--help"], ["train", "acmr"], ["doctor"]):
        done = subprocess.run(
            [sys.executable, "-c", code + f"sys.exit(main({argv!r}))"], capture_output=True, text=True
        )
        assert done.returncode == 2 and 'pip install "cmr-fast[train]"' in done.stderr
        assert len(done.stderr.splitlines()) == 1


def test_flags_that_a_command_would_not_use_are_refused(runs, tmp_path, capsys):
    run = runs["acmr"]
    for flags in (["--fast"], ["--attacks", "pgd5"], ["--save", tmp_path / "x.npz"]):
        assert f"{flags[0]} is for classifiers" in refused(capsys, "attack", run, *flags)
    for flags in (["--fast"], ["--images", 9], ["--eps", 0.1], ["--attacks", "pgd5"], ["--surrogate", run]):
        assert f"{flags[0]} is for classifiers" in refused(capsys, "report", run, "--out", tmp_path / "r", *flags)
    assert "--bits is for codes from files" in refused(capsys, "evaluate", run, "--bits", 8)


@pytest.mark.parametrize("columns", ["20", "40", "80", "300"])
def test_numbers_are_whole_however_narrow_the_terminal(runs, tmp_path, capsys, monkeypatch, columns):
    ran(capsys, "evaluate", runs["acmr"], "--out", tmp_path / "table.json")
    row = json.loads((tmp_path / "table.json").read_text())[0]
    monkeypatch.setenv("COLUMNS", columns)
    monkeypatch.setenv("FORCE_COLOR", "1")  # as on a terminal
    out = ran(capsys, "evaluate", runs["acmr"])
    assert "\x1b[" in out and "…" not in out
    assert all(f"{row[name]:.4f}" in out for name in ("I2T", "T2I", "average"))
    monkeypatch.delenv("FORCE_COLOR")
    plain = ran(capsys, "evaluate", runs["acmr"])
    assert "all  " in plain and any(line.endswith(f"{row['average']:.4f}") for line in plain.splitlines())


def test_every_method_says_its_own_in_the_help():
    said = [(flags_of(method).__doc__ or "").partition("\n")[0] for method in METHODS]
    assert all(said) and len(set(said)) == len(METHODS)
    assert flags_of("plain").__doc__.startswith("Plain training")
    assert flags_of("scatter").__doc__.startswith("Feature Scattering")
