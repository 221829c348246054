"""Files that are damaged or something else than their name says: one line that names the file and what is wrong."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import refused

from cmr_fast.cli.main import main

LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:aa\nsize 12\n"
CODES = np.random.default_rng(0).integers(0, 256, (40, 8), dtype=np.uint8)


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    np.save("codes.npy", CODES)
    np.save("labels.npy", np.arange(40) % 2)
    return tmp_path


def evaluate(queries: str, database: str, query_labels: str = "labels.npy", labels: str = "labels.npy") -> list[str]:
    files = {"query-codes": queries, "database-codes": database}
    files |= {"query-labels": query_labels, "database-labels": labels}
    return ["evaluate", *(part for flag, file in files.items() for part in (f"--{flag}", file))]


@pytest.mark.parametrize(
    ("name", "text", "what"),
    [
        ("data.json", '{"data": 3, "options": {}}', "data is 3"),
        ("data.json", '{"data": "shapes", "options": []}', "options is []"),
        ("data.json", '{"data": "shapes", "options": null}', "options is None"),
        ("data.json", '{"data": "shapes"}', "expected options, got data"),
        ("data.json", "[" * 100_000, "not readable as JSON"),
        ("config.json", "", "not readable as JSON"),
        ("config.json", "{}", "expected run, got nothing"),
        ("config.json", "[]", "expected an object, got list"),
        ("config.json", '{"run": 3}', "run is 3"),
        ("config.json", '{"run": {"seed": "a", "valid_fraction": 0.1}}', "seed of its run is 'a'"),
        ("config.json", '{"run": {"seed": 0}}', "valid_fraction of its run is None"),
    ],
)
def test_a_damaged_file_of_a_run_is_named(trained, capsys, name, text, what):
    shutil.copytree(trained / "run", "run")
    Path("run", name).write_text(text)
    encode = ["encode", "run", "--split", "valid", "--modality", "text", "--out", "v.npy"]
    for argv in (encode, ["report", "run", "--out", "report", "--tsne-points", "0"]):
        said = refused(capsys, *argv)
        assert said.startswith(f"run/{name}: damaged") and what in said


@pytest.mark.parametrize("part", ["config", "run", "data", "method"])
def test_a_run_with_a_damaged_config_is_not_resumed(trained, capsys, part):
    shutil.copytree(trained / "run", "run")
    config = json.loads(Path("run/config.json").read_text())
    Path("run/config.json").write_text(json.dumps(config | {part: 3}))
    argv = ["train", "acmr", "--data", trained / "data.npz", "--out", "run", "--resume"]
    assert refused(capsys, *argv).startswith(f"run/config.json: damaged or of another program, {part} is 3")


def _lfs(path):
    path.write_text(LFS)


def _torch(path):
    torch.save(torch.from_numpy(CODES), path)


def _npz(path):
    with open(path, "wb") as file:
        np.savez(file, codes=CODES)


def _cut(path):
    path.write_bytes(Path("codes.npy").read_bytes()[:200])


def _single(path):
    np.save(path, np.array(3))


def _objects(path):
    np.save(path, np.array([None]))


@pytest.mark.parametrize(
    ("write", "what"),
    [
        (_lfs, "is a Git LFS pointer"), (_torch, "is a file of torch.save"), (_npz, "is an .npz"),
        (_cut, "damaged or cut short"), (_single, "a single int64"), (_objects, "holds Python objects"),
        (Path.touch, "is empty"),
    ],
)  # fmt: skip
def test_what_is_called_npy_is_called_what_it_is(here, capsys, write, what):
    write(here / "x.npy")
    assert main(["index", "codes.npy", "--out", "i.cmrx"]) == 0
    for argv in (["index", "x.npy", "--out", "x.cmrx"], evaluate("codes.npy", "x.npy"), ["search", "i.cmrx", "x.npy"]):
        said = refused(capsys, *argv)
        assert said.startswith("x.npy: ") and what in said


@pytest.mark.parametrize(("write", "what"), [(_lfs, "is a Git LFS pointer"), (_torch, "is a file of torch.save")])
def test_what_is_called_a_model_is_called_what_it_is(here, capsys, write, what):
    write(here / "model.safetensors")
    said = refused(capsys, "evaluate", "model.safetensors")
    assert said.startswith("model.safetensors: ") and what in said


def test_one_of_several_files_is_named(capsys):
    np.save("zeros.npy", CODES & 0)
    np.save("ids.npy", -np.arange(80))
    np.save("column.npy", np.arange(40)[:, None])
    np.save("nan.npy", np.full((40, 3), np.nan))
    assert refused(capsys, "index", "zeros.npy", "codes.npy", "--out", "x", "--bits", 60).startswith("codes.npy: codes")
    assert main(["index", "zeros.npy", "--bits", "60", "--out", "sixty"]) == 0
    assert refused(capsys, "index", "zeros.npy", "codes.npy", "--out", "sixty", "--append").startswith("codes.npy: ")
    assert refused(capsys, "search", "sixty", "codes.npy").startswith("codes.npy: q must have no bits set")
    argv = ["index", "zeros.npy", "codes.npy", "--out", "x", "--ids", "ids.npy"]
    assert refused(capsys, *argv).startswith("ids.npy: ids must be from 0")
    assert refused(capsys, *evaluate("zeros.npy", "codes.npy", "column.npy")).startswith("column.npy: q_labels")
    assert refused(capsys, *evaluate("zeros.npy", "codes.npy"), "--bits", 60).startswith("codes.npy: db must have")
    assert refused(capsys, *evaluate("nan.npy", "nan.npy")).startswith("nan.npy: query must be finite")


def test_embeddings_beside_packed_codes_are_refused(capsys):
    np.save("floats.npy", np.random.default_rng(0).random((40, 8)))
    for files in (("floats.npy", "codes.npy"), ("codes.npy", "floats.npy")):
        said = refused(capsys, *evaluate(*files))
        assert "floats.npy holds float64" in said and "codes.npy holds uint8" in said


def test_a_mean_over_no_query_is_null_in_json():
    np.save("other.npy", np.arange(40) + 9)
    argv = evaluate("codes.npy", "codes.npy", labels="other.npy")
    assert main([*argv, "--convention", "topk_R", "--out", "table.json"]) == 0
    rows = json.loads(Path("table.json").read_text(), parse_constant=pytest.fail)
    assert rows == [{"convention": "topk_R", "ties": "index", "k": None, "mAP": None}]


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["report", "run", "--out", "r", "--tsne-points", "-1"], "--tsne-points must be 0 or more, got -1"),
        (["report", "run", "--out", "r", "--images", "0"], "--images must be 1 or more, got 0"),
        (["attack", "run", "--images", "0"], "--images must be 1 or more, got 0"),
        (["attack", "run", "--batch", "0"], "--batch must be 1 or more, got 0"),
        (["attack", "run", "--seed", "-1"], "--seed must be 0 or more, got -1"),
    ],
)
def test_a_number_that_cannot_be_is_named_by_its_flag(trained, capsys, argv, said):
    shutil.copytree(trained / "run", "run")
    assert refused(capsys, *argv) == said


@pytest.mark.parametrize("out", ["used", "run-seed<seed>"])
def test_a_used_folder_is_refused_before_the_data_are_read(capsys, monkeypatch, out):
    Path(out.replace("<seed>", "3")).mkdir()
    Path(out.replace("<seed>", "3"), "something").touch()
    monkeypatch.setattr("cmr_fast.cli.train.load_pairs", lambda *_: pytest.fail("read"))
    said = refused(capsys, "train", "acmr", "--data", "shapes", "--seed", 3, "--out", out)
    assert said.startswith(f"{out.replace('<seed>', '3')}: not empty")


@pytest.mark.parametrize("command", [["demo"], ["train", "acmr", "--data", "shapes", "--options", "count=60"]])
def test_a_seed_that_torch_does_not_take_is_refused(capsys, command):
    code = 2
    try:
        code = main([*command, "--seed", str(2**64), "--out", "out"])
    except SystemExit as error:
        code = error.code
    assert code == 2 and "seed must be an integer of 0 or more and below" in " ".join(capsys.readouterr().err.split())
    assert not Path("out").exists()
