"""`cmr-fast train mlm`: from captions to a folder that text attacks take words from."""

import pytest
from commands import refused

from cmr_fast.cli import main
from cmr_fast.data import load_captions, load_texts

pytest.importorskip("transformers")

from cmr_fast.models.mlm import MaskedLM


def test_a_small_model_from_captions(tmp_path, capsys):
    texts = tmp_path / "captions.txt"
    texts.write_text("a dog runs on the grass\na man throws a ball\n" * 20)
    out = tmp_path / "mlm"
    command = [
        "train",
        "mlm",
        "--data",
        str(texts),
        "--base",
        "scratch",
        "--steps",
        "2",
        "--batch",
        "4",
        "--out",
        str(out),
    ]
    assert main(command) == 0
    assert str(out) in capsys.readouterr().out
    assert MaskedLM.load(out).pieces(["dog"]) != MaskedLM.load(out).pieces(["grass"])
    assert "--force" in refused(capsys, *command)
    assert main([*command, "--base", str(out), "--force"]) == 0


def test_the_built_in_set_has_captions_and_none_to_measure(tmp_path, capsys):
    command = ["train", "mlm", "--data", "shapes", "--base", "scratch", "--steps", "1", "--batch", "4"]
    assert main([*command, "--out", str(tmp_path / "mlm")]) == 0
    assert "Masked LM: " in capsys.readouterr().out
    assert load_texts("shapes") == load_captions("shapes").train.captions()[0]
    assert load_texts("shapes", "test") == load_captions("shapes").test.captions()[0] and not load_texts(
        "shapes", "val"
    )


def test_mistakes(tmp_path, capsys):
    (tmp_path / "captions.txt").write_text("\n")
    said = refused(capsys, "train", "mlm", "--data", tmp_path / "captions.txt", "--out", tmp_path / "mlm")
    assert "no captions" in said and not (tmp_path / "mlm").exists()
    said = refused(capsys, "train", "mlm", "--data", tmp_path / "nowhere", "--out", tmp_path / "mlm")
    assert "no data at" in said
    (tmp_path / "captions.txt").write_text("a dog\n")
    said = refused(
        capsys, "train", "mlm", "--data", tmp_path / "captions.txt", "--base", tmp_path, "--out", tmp_path / "m"
    )
    assert "no masked language model in this folder" in said
    said = refused(capsys, "train", "mlm", "--data", tmp_path / "captions.txt", "--out", tmp_path / "captions.txt")
    assert "is a file" in said


def test_help_names_it(capsys):
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    assert "mlm" in capsys.readouterr().out
