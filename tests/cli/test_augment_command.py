"""`cmr-fast augment`: files of captions and of images, made in runs that may be stopped, and trained on."""

import json

import numpy as np
import pytest
import tiny_generators
import torch
from commands import refused

from cmr_fast.cli import main
from cmr_fast.data import EDA, load_captions
from cmr_fast.data.augmented import make_images
from cmr_fast.errors import InputError
from cmr_fast.methods.candidates import images_in
from cmr_fast.models import generate

pytest.importorskip("transformers")
DATA = ["--data", "shapes", "--options", "count=24"]


def ran(capsys, *argv):
    """Run a command that must succeed; returns what it prints."""
    capsys.readouterr()
    assert main([str(a) for a in argv]) == 0
    return capsys.readouterr().out


@pytest.fixture(scope="module")
def shapes():
    return load_captions("shapes", count=24)


@pytest.fixture(scope="module")
def words(shapes):
    return sorted({w for row in shapes.train.text for caption in row for w in caption.lower().split()})


def captions(*more):
    return ["augment", "captions", *DATA, "--new-tokens", "24", "--count", "2", "--batch", "4", *map(str, more)]


def dying(patch, kind, after):
    """After so many calls, an interrupt."""
    call, calls = kind.__call__, []

    def counted(self, *arguments):
        calls.append(1)
        if len(calls) > after:
            raise KeyboardInterrupt
        return call(self, *arguments)

    patch.setattr(kind, "__call__", counted)


@pytest.mark.parametrize("kind", ["rewrite", "caption"])
def test_a_run_that_is_stopped_goes_on_and_ends_as_one_that_was_not(kind, tmp_path, words, shapes, capsys):
    make = tiny_generators.causal if kind == "rewrite" else tiny_generators.asked_captioner
    model = make(tmp_path / "model", words)
    command = captions("--kind", kind, "--model", model)
    whole, out = tmp_path / "whole.json", tmp_path / "texts.json"
    said = ran(capsys, *command, "--out", whole)
    assert ("Rewrite image captions in 2 different ways." if kind == "rewrite" else "what does the image") in said
    with pytest.MonkeyPatch.context() as patch:
        dying(patch, generate.Rewriter if kind == "rewrite" else generate.Captioner, 2)
        assert main([*command, "--out", str(out)]) == 130
    assert "go on with the same command" in capsys.readouterr().err
    partial = tmp_path / "texts.json.partial"
    assert not out.exists() and len(partial.read_text().splitlines()) == 3
    partial.write_text(partial.read_text() + '[["cut')
    assert "was begun with seed 0, which is now 1; --force" in refused(capsys, *command, "--out", out, "--seed", "1")
    ran(capsys, *command, "--out", out)
    assert out.read_bytes() == whole.read_bytes() and not partial.exists()
    stored = json.loads(out.read_text())
    assert list(stored) == [str(n) for n in shapes.train.labels.tolist()]
    assert all(len(set(texts)) == 2 for texts in stored.values())
    assert "exists already; --force" in refused(capsys, *command, "--out", out)
    with pytest.MonkeyPatch.context() as patch:
        dying(patch, generate.Rewriter if kind == "rewrite" else generate.Captioner, 2)
        assert main([*map(str, command), "--out", str(out), "--seed", "1", "--force"]) == 130
    assert "the same command, without --force" in capsys.readouterr().err
    begun = partial.read_text().splitlines()
    assert len(begun) == 3 and out.read_bytes() == whole.read_bytes()
    ran(capsys, *command, "--out", out, "--seed", "1")
    texts = [row for line in begun[1:] for row in json.loads(line)]
    assert list(json.loads(out.read_text()).values())[: len(texts)] == texts
    assert out.read_bytes() != whole.read_bytes() and not partial.exists()


def test_the_prompt_shows_other_images(tmp_path, words, shapes, capsys, monkeypatch):
    seen = {}

    def recorded(caption, examples, count):
        seen.setdefault(caption, []).append([tuple(own[:3]) for own in examples])
        return f"{caption} =>"

    monkeypatch.setattr(generate, "rewrite_prompt", recorded)
    command = captions("--model", tiny_generators.causal(tmp_path / "m", words), "--out", tmp_path / "t.json")
    ran(capsys, *command)
    own = {row[0]: tuple(row[:3]) for row in shapes.train.text}
    assert len(seen) == len(own)
    assert all(len(set(shown)) == 3 and own[caption] not in shown for caption, all_ in seen.items() for shown in all_)
    assert len({tuple(all_[0]) for all_ in seen.values()}) > len(seen) // 2
    table = tmp_path / "captions.csv"
    rows = [f"{n}.jpg,{n} says {k}" for n in range(5) for k in range(3)]
    table.write_text("\n".join(["image,caption", *rows, "5.jpg,alone"]) + "\n")
    seen.clear()
    ran(capsys, *command, "--force", "--images", "6", "--examples", table)
    groups = {tuple(f"{n} says {k}" for k in range(3)) for n in range(5)}
    assert {shown for all_ in seen.values() for three in all_ for shown in three} == groups
    said = refused(capsys, *command, "--force", "--images", "3")
    assert "the prompt shows 3 other images with 3 captions each, 3 have as many" in said


def test_words_without_a_generative_model(tmp_path, shapes, capsys, words):
    train, out = shapes.train, tmp_path / "eda.json"
    ran(capsys, "augment", "captions", *DATA, "--kind", "eda", "--seed", "3", "--batch", "5", "--out", out)
    stored = json.loads(out.read_text())
    expected = EDA(0.3, 4, seed=3)([row[0] for row in train.text], index=train.labels.tolist())
    assert list(stored.values()) == expected
    from cmr_fast.models.mlm import MaskedLM

    MaskedLM.scratch(train.captions()[0], vocabulary=200, width=32, layers=1).save(tmp_path / "mlm")
    command = ["augment", "captions", *DATA, "--kind", "mlm", "--model", tmp_path / "mlm"]
    ran(capsys, *command, "--count", "2", "--out", tmp_path / "mlm.json")
    made = json.loads((tmp_path / "mlm.json").read_text())
    lengths = [[len(text.split()) for text in texts] for texts in made.values()]
    assert lengths == [[len(row[0].split())] * 2 for row in train.text]
    changed = [sum(a != b for a, b in zip(t.split(), row[0].split(), strict=True)) > 0
               for texts, row in zip(made.values(), train.text, strict=True) for t in texts]  # fmt: skip
    assert np.mean(changed) > 0.8
    start = ["train", "finetune", *DATA, "--augment-text", str(out), "--max-steps", "1", "--batch-size", "4"]
    import tiny_towers

    towers = tiny_towers.towers(tmp_path, words, train.pixels())
    assert main([*start, "--towers", towers, "--dim", "8", "--hidden", "8", "--out", str(tmp_path / "run")]) == 0


def test_images_of_captions_go_on_where_they_were(tmp_path, shapes, capsys):
    model = tiny_generators.painter(tmp_path / "model")
    command = ["augment", "images", *DATA, "--images", "5", "--count", "2", "--batch", "2", "--model", str(model)]
    command += ["--steps", "1", "--size", "32"]
    ran(capsys, *command, "--out", tmp_path / "whole")
    out = tmp_path / "images"
    with pytest.MonkeyPatch.context() as patch:
        dying(patch, generate.Painter, 1)
        assert main([*command, "--out", str(out)]) == 130
    names = [str(n) for n in shapes.train.labels[:5].tolist()]
    (out / f"{names[1]}_1.png").unlink()
    capsys.readouterr()
    assert "was begun with steps 1, which is now 2" in refused(capsys, *command, "--steps", "2", "--out", out)
    ran(capsys, *command, "--out", out)
    files = sorted(path.name for path in out.iterdir())
    assert files == sorted(["images.json", "settings.json", *(f"{n}_{k}.png" for n in names for k in range(2))])
    assert all((out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes() for name in files)
    assert json.loads((out / "images.json").read_text())[names[2]] == [f"{names[2]}_0.png", f"{names[2]}_1.png"]
    assert "made already; --force" in refused(capsys, *command, "--out", out)
    ran(capsys, *command, "--out", out, "--force", "--seed", "1")
    assert (out / files[0]).read_bytes() != (tmp_path / "whole" / files[0]).read_bytes()
    with pytest.MonkeyPatch.context() as patch:
        dying(patch, generate.Painter, 0)
        assert main([*command, "--out", str(out), "--force"]) == 130
    assert "the same command, without --force" in capsys.readouterr().err
    ran(capsys, *command, "--out", out)
    assert (out / files[0]).read_bytes() == (tmp_path / "whole" / files[0]).read_bytes()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "mine").touch()
    assert "holds something already" in refused(capsys, *command, "--out", tmp_path / "other")


def test_images_that_are_begun_anew_leave_none_of_those_before(tmp_path, shapes):
    from PIL import Image

    names, out = [str(n) for n in shapes.train.labels[:5].tolist()], tmp_path / "images"

    def made(names, count, force=False, dies=False):
        def make(rows):
            if dies:
                raise KeyboardInterrupt
            return [[Image.new("RGB", (8, 8))] * count for _ in rows]

        return make_images(out, names, make, count=count, settings={"count": count}, batch=2, force=force)

    made(names, 8)
    (out / "mine_0.png").touch()
    with pytest.raises(KeyboardInterrupt):
        made(names[:4], 4, force=True, dies=True)
    left = ["mine_0.png", "settings.json", *(f"{names[4]}_{k}.png" for k in range(8))]
    assert sorted(path.name for path in out.iterdir()) == sorted(left)
    made(names[:4], 4)
    found = images_in(out, shapes.train.select(torch.arange(4)), 4)
    assert [[photo.path.name for photo in row] for row in found] == [
        [f"{n}_{k}.png" for k in range(4)] for n in names[:4]
    ]
    with pytest.raises(InputError, match=f"1 of 5 have fewer, {names[4]} has 0"):
        images_in(out, shapes.train.select(torch.arange(5)), 4)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--kind", "eda", "--model", "x"], "--model is for the other kinds"),
        (["--kind", "mlm"], "--kind mlm needs --model"),
        ([], "--kind rewrite needs --model"),
        (["--kind", "caption", "--model", "x", "--examples", "shapes"], "--examples is for --kind rewrite"),
        (["--kind", "eda", "--prompt", "x"], "--prompt is for --kind caption"),
        (["--kind", "eda", "--temperature", "1"], "--temperature is for --kind rewrite and caption"),
        (["--kind", "eda", "--count", "0"], "--count must be 1 or more"),
        (["--kind", "eda", "--features", "lda"], "--features is for pairs"),
    ],
)
def test_mistakes(flags, message, tmp_path, capsys):
    out = tmp_path / "texts.json"
    assert message in refused(capsys, "augment", "captions", *DATA, *flags, "--out", out) and not out.exists()


def test_two_processes_do_not_write_one_file(tmp_path, capsys):
    import fcntl

    out = tmp_path / "texts.json"
    command = ["augment", "captions", *DATA, "--kind", "eda", "--out", out]
    with open(tmp_path / "texts.json.partial", "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert "texts.json.partial: in use, another process" in refused(capsys, *command)
        assert (tmp_path / "texts.json.partial").exists()
        file.write("its own\n")
        file.flush()
        assert "in use, another process" in refused(capsys, *command, "--force")
        assert (tmp_path / "texts.json.partial").read_text() == "its own\n"
    ran(capsys, *command, "--force")
    assert out.exists() and not (tmp_path / "texts.json.partial").exists()


def test_data_are_asked_for(tmp_path, capsys):
    assert "expected --data" in refused(capsys, "augment", "captions", "--kind", "eda", "--out", tmp_path / "x.json")


def test_a_prompt_that_is_too_long_leaves_nothing(tmp_path, capsys, words):
    model = tiny_generators.causal(tmp_path / "model", words, context=40)
    said = refused(capsys, *captions("--model", model, "--out", tmp_path / "x.json"))
    assert "a context of 40" in said and [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_model_that_is_not_there_leaves_nothing(tmp_path, capsys):
    said = refused(capsys, *captions("--model", tmp_path, "--out", tmp_path / "x.json"))
    assert "transformers finds no model in this folder" in said and not list(tmp_path.iterdir())
