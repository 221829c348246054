"""MAT's figures: alignment and diversity against a loop, densities, and the trainings that the others are made of."""

import csv
import json

import numpy as np
import pytest
import tiny_towers
import torch
from torch.testing import assert_close

from cmr_fast.cli import main
from cmr_fast.data import EDA, RandAugment, load_captions
from cmr_fast.errors import InputError
from cmr_fast.methods.clip import ClipConfig
from cmr_fast.methods.loop import RunConfig, load_model, train
from cmr_fast.reports import mat_figures


@pytest.fixture(scope="module")
def data():
    return load_captions("shapes", count=40)


@pytest.fixture(scope="module")
def reference(tmp_path_factory, data):
    """A run of clip on two small towers."""
    pytest.importorskip("transformers")
    place = tmp_path_factory.mktemp("reference")
    words = sorted({w for row in data.train.text for caption in row for w in caption.lower().split()})
    config = ClipConfig(
        towers=tiny_towers.towers(place, words, data.train.pixels()), dim=8, hidden=8, epochs=2, head_epochs=2,
        batch_size=16, head_lr=1e-2,
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(place / "cache"))
        return train("clip", config, data, RunConfig(out=place / "clip", quiet=True, valid_fraction=0.0)).path


def files(folder, split):
    """Texts and images of a split, four each."""
    image = pytest.importorskip("PIL.Image")
    names = [str(n) for n in split.labels.tolist()]
    (folder / "made.json").write_text(json.dumps({n: [f"a {n} {k}" for k in range(4)] for n in names}))
    (folder / "images").mkdir()
    random = np.random.default_rng(0)
    for name in names:
        for k in range(4):
            pixels = random.integers(256, size=(32, 32, 3), dtype=np.uint8)
            image.fromarray(pixels).save(folder / "images" / f"{name}_{k}.png")
    return {"LangRW": str(folder / "made.json")}, {"SD": str(folder / "images")}


def test_alignment_and_diversity_are_those_of_a_loop(data, reference, tmp_path):
    dual, split = load_model(reference).dual, data.train.select(torch.arange(7))
    texts, images = files(tmp_path, split)
    found = mat_figures.measure(dual, split, texts=texts, images=images)
    assert list(found) == ["Orig.", "EDA", "Human", "LangRW", "RandAug", "SD"]

    @torch.no_grad()
    def text(caption):
        return dual.encode_text(*dual.tokenize([caption]))[0]

    @torch.no_grad()
    def image(pixels):
        return dual.encode_image(pixels[None].float() / 255)[0]

    stored = json.loads((tmp_path / "made.json").read_text())
    for row in range(7):
        label, own, pixels = int(split.labels[row]), split.text[row][0], split.image[row]
        assert_close(found["Orig."].alignment[row, 0], float(image(pixels) @ text(own)), atol=1e-5, rtol=0)
        made = {
            "EDA": EDA(0.3, 4)([own], index=[label])[0], "Human": split.text[row][1:5], "LangRW": stored[str(label)],
        }  # fmt: skip
        for name, captions in made.items():
            for k, caption in enumerate(captions):
                assert_close(found[name].alignment[row, k], float(image(pixels) @ text(caption)), atol=1e-5, rtol=0)
                away = float((text(own) - text(caption)).norm())
                assert_close(found[name].diversity[row, k], away, atol=1e-4, rtol=0)
        for k in range(4):
            moved = RandAugment(2, 5)(pixels[None], index=[label * 5 + 1 + k])[0]
            assert_close(found["RandAug"].alignment[row, k], float(image(moved) @ text(own)), atol=1e-5, rtol=0)
            away = float((image(moved) - image(pixels)).norm())
            assert_close(found["RandAug"].diversity[row, k], away, atol=1e-4, rtol=0)
    assert found["SD"].diversity.min() > 0 and found["Orig."].diversity is None
    assert len(mat_figures.words_of(found)) == len(mat_figures.CLAIMS)


def test_a_density_holds_one_and_lies_where_the_values_do():
    values = np.random.default_rng(0).normal(2.0, 0.5, 3000)
    at = np.linspace(-1, 5, 400)
    found = mat_figures.density(values, at)
    assert np.trapezoid(found, at) == pytest.approx(1, abs=1e-3)
    normal = np.exp(-0.5 * ((at - 2) / 0.5) ** 2) / (0.5 * np.sqrt(2 * np.pi))
    assert np.abs(found - normal).max() < 0.06
    still = mat_figures.density(np.zeros(5), at)
    assert np.isfinite(still).all() and at[still.argmax()] == pytest.approx(0, abs=0.02)


def test_a_claim_is_told_with_its_interval():
    low, high = (np.full((50, 4), x) + np.linspace(0, 0.1, 50)[:, None] for x in (0.2, 0.5))
    found = {
        "EDA": mat_figures.Measured("text", low, high), "Human": mat_figures.Measured("text", high, low),
    }  # fmt: skip
    first, second = mat_figures.words_of(found)
    assert first.endswith("(Figure 1): holds here (+0.300, 95 % from +0.300 to +0.300)")
    assert second.endswith("(Figure 2): the reverse holds here (-0.300, 95 % from -0.300 to -0.300)")
    assert mat_figures.words_of({"EDA": found["EDA"]}) == []


def test_the_command_writes_both_figures(reference, data, tmp_path, capsys):
    texts, images = files(tmp_path, data.train)
    out = tmp_path / "report"
    command = ["augment", "measure", "--data", "shapes", "--options", "count=40", "--reference", str(reference)]
    more = ["--augment-text", f"LangRW={texts['LangRW']}", "--augment-image", f"SD={images['SD']}", "--images", "6"]
    assert main([*command, *more, "--out", str(out)]) == 0
    assert "Captions by people are more diverse" in capsys.readouterr().out
    told = json.loads((out / "figures.json").read_text())
    assert told["images"] == 6 and list(told["densities"]["diversity"]) == ["EDA", "Human", "LangRW", "RandAug", "SD"]
    with open(out / "densities.csv") as file:
        rows = list(csv.DictReader(file))
    shown = {(row["augmentation"], row["measure"]): float(row["mean"]) for row in rows}
    assert shown["Human", "alignment"] == pytest.approx(told["densities"]["alignment"]["Human"]["mean"], abs=1e-3)
    for name in ("figure-1.png", "figure-2.png", "index.html", "README.md"):
        assert (out / name).stat().st_size > 0
    assert main([*command, "--split", "test", "--images", "3", "--out", str(out)]) == 2
    assert "--force writes over it" in capsys.readouterr().err
    assert main([*command, "--split", "test", "--images", "3", "--out", str(out), "--force"]) == 0
    assert json.loads((out / "figures.json").read_text())["split"] == "test"
    for flags, message in (
        (["--reference", str(tmp_path / "no")], "there is no reference model at"),
        (["--augment-text", "LangRW"], "--augment-text expects NAME=FILE"),
        (["--augment-text", f"EDA={texts['LangRW']}"], "must differ from each other and from EDA, Human and RandAug"),
        (["--augment-image", f"SD={tmp_path / 'no'}"], "no such file or folder"),
    ):
        assert main([*command, *flags, "--out", str(tmp_path / "x")]) == 2
        assert message in capsys.readouterr().err and not (tmp_path / "x").exists()


def test_points_of_the_figures_share_their_runs():
    texts, images = {"LangRW": "here/rw.json"}, {"SD": "there/sd"}
    made = mat_figures.sweeps(["1", *mat_figures.FIGURES], reference="ref", texts=texts, images=images)
    assert list(made) == list(mat_figures.FIGURES)
    slugs = {
        name: {line: [mat_figures.slug_of(s) for _, s in points] for line, points in sweep.lines.items()}
        for name, sweep in made.items()
    }
    assert all(points[0] == "mat-img" for lines in slugs.values() for points in lines.values())
    assert slugs["8"]["Top"] == slugs["3a"]["Top"] and slugs["3b"]["random"] == slugs["6"]["random"]
    assert slugs["7"]["RandAug"][1:] == [f"figure-randaug-level{n}" for n in range(1, 6)]
    assert slugs["5"]["Top"][2] == "figure-texts-rw-top-count2"
    assert slugs["3a"]["random"][4] == "figure-images-sd-random-count4"
    assert dict(made["5"].lines["Top"])[2] == {
        "augment_text": "here/rw.json", "augment_select": "top", "augment_reference": "ref", "augment_count": 2,
    }  # fmt: skip
    assert dict(made["4"].lines["EDA"])[3] == {"augment_text": "eda", "augment_count": 3}
    for figures, message in ((["9"], "figures must be of 1, 2, 3a"), (["8"], "expected --augment-image SD=FILE")):
        with pytest.raises(InputError, match=message):
            mat_figures.sweeps(figures, reference="ref", texts={}, images={})
