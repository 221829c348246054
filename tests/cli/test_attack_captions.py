"""`cmr-fast attack` on a run of captions: the table, the report, and what is refused."""

import csv
from dataclasses import replace
from types import SimpleNamespace

import pytest
import tiny_towers
import torch
from commands import refused

from cmr_fast.attacks.multimodal import registry
from cmr_fast.cli import main
from cmr_fast.data import load_captions
from cmr_fast.errors import InputError
from cmr_fast.methods.clip import ClipConfig
from cmr_fast.methods.loop import RunConfig, train
from cmr_fast.reports import attacked_captions, defended_captions

SMALL = ClipConfig(dim=16, hidden=16, epochs=12, head_epochs=12, batch_size=16, head_lr=1e-2, captions=0)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        data = load_captions("shapes", count=60)
        words = sorted({w for row in data.train.text for caption in row for w in caption.lower().split()})
        towers = tiny_towers.towers(tmp_path_factory.mktemp("towers"), words, data.train.pixels())
        out = tmp_path_factory.mktemp("runs") / "clip"
        return train("clip", replace(SMALL, towers=towers), data, RunConfig(out=out, quiet=True, valid_fraction=0.0))


@pytest.fixture(scope="module")
def split():
    return load_captions("shapes", count=60).test.select(torch.arange(8))


def test_images_leave_their_captions_within_the_ball(run, split):
    result = attacked_captions.examine(run.model.dual, split, ["pgd5", "clean"], eps=8 / 255)
    clean, moved = result.images["clean"], result.images["pgd5"]
    assert 0 < float((moved - clean).abs().max()) <= 8 / 255 + 1e-7
    assert result.changed == {"pgd5": 0.0} and result.texts["pgd5"] == result.texts["clean"]
    # captions alone are searched for among clean images as before
    assert result.clean.by_attack["pgd5"]["ir"] == result.clean.clean["ir"]
    rows = attacked_captions.table_of(result)
    assert [row[0] for row in rows] == ["clean", "pgd5", "pgd5, clean gallery"]
    assert all(len(row) == len(attacked_captions.HEAD) for row in rows)


def test_an_attack_sees_the_whole_gallery_whatever_the_batch(run, split):
    whole, parts = (
        attacked_captions.examine(run.model.dual, split, ["pgd5"], batch=batch).images["pgd5"] for batch in (8, 3)
    )
    assert float((whole - parts).abs().max()) <= 1e-6


def test_the_command_writes_a_report(run, tmp_path, capsys):
    command = ["attack", str(run.path), "--data", "shapes", "--options", "count=60", "--images", "8"]
    out = tmp_path / "report"
    assert main([*command, "--attacks", "pgd3", "character", "--eps", "0.03", "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert "character" in said and "worst case of a query" in said
    rows = list(csv.reader((out / "results.csv").open()))
    assert rows[0][:2] == ["attack", "TR R@1"] and len(rows) == 7
    for file in ("README.md", "index.html", "recall.png", "images-pgd3.png", "captions.png"):
        assert (out / file).stat().st_size > 0


def test_saved_images_are_read_again(run, tmp_path, capsys):
    command = [
        "attack",
        str(run.path),
        "--data",
        "shapes",
        "--options",
        "count=60",
        "--images",
        "8",
        "--attacks",
        "pgd3",
    ]
    out, report = tmp_path / "images", tmp_path / "report"
    assert main([*command, "--eps", "0.03", "--save", str(out), "--out", str(report)]) == 0
    assert "Images written and read again" in capsys.readouterr().out
    for name in ("clean", "pgd3"):
        assert len(list((out / name / "png").glob("*.png"))) == len(list((out / name / "jpeg").glob("*.jpg"))) == 8
    assert len(list(csv.reader((out / "captions.csv").open()))) > 8
    rows = list(csv.reader((report / "saved.csv").open()))
    levels = {(row[0], row[1]): int(row[3]) for row in rows[1:]}
    assert levels["clean", "PNG"] == 0 and levels["pgd3", "PNG"] == 7 < levels["pgd3", "JPEG 95"]
    assert "is not empty" in refused(capsys, *command, "--save", str(out))
    assert "expected a folder" in refused(capsys, *command, "--save", str(tmp_path / "x.npz"))


def test_png_files_keep_what_the_attack_made(run, split, tmp_path):
    result = attacked_captions.examine(run.model.dual, split, ["pgd5"], eps=8 / 255, save=tmp_path / "images")
    png = [row for row in result.saved if row.attack == "pgd5" and row.kind == "png"]
    assert len(png) >= 1 and all(row.levels == 8 for row in png)
    # signed steps of eps / 4 end on whole levels, so PNG loses nothing
    assert all(row.recall == result.adversarial.by_attack["pgd5"] for row in png)


def test_a_defence_is_attacked_through_and_around(run, tmp_path, capsys):
    command = [
        "attack",
        str(run.path),
        "--data",
        "shapes",
        "--options",
        "count=60",
        "--images",
        "8",
        "--defence",
        "ttc",
    ]
    out = tmp_path / "report"
    assert main([*command, "--attacks", "pgd3", "character", "--eps", "0.03", "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert "the defence moves clean R@1 from" in said and "pgd3 leaves" in said
    rows = list(csv.reader((out / "results.csv").open()))
    assert rows[0] == [
        "attack",
        *(f"{who} {way} R@1" for who in ("TTC adaptive", "TTC not adaptive", "undefended") for way in ("TR", "IR")),
    ]
    assert [row[0] for row in rows[1:]] == ["clean", "pgd3", "character", "worst case of a query"]
    clean = rows[1]
    assert clean[1:3] == clean[3:5]  # the same images, read with the same noise
    every = list(csv.reader((out / "recalls.csv").open()))
    bare = attacked_captions.examine(
        run.model.dual, load_captions("shapes", count=60).test.select(torch.arange(8)), ["pgd3", "character"], eps=0.03
    )
    wanted = [["undefended", *row] for row in attacked_captions.table_of(bare)]
    assert [row for row in every if row[0] == "undefended"] == wanted and len(every) == 1 + 3 * len(wanted)
    for file in ("README.md", "index.html", "recall.png"):
        assert (out / file).stat().st_size > 0
    assert "attacks without a defence" in refused(capsys, *command, "--save", str(tmp_path / "images"))
    assert "threshold must be a number" in refused(capsys, *command, "--threshold", "-1", "--attacks", "pgd3")
    assert "is for --defence ttc" in refused(capsys, *command[:-2], "--threshold", "1")


def test_what_an_attack_leaves_above_clean_is_said():
    recalls = {
        "clean": [[0.16, 0.108], [0.16, 0.108], [0.6, 0.446]],
        "pgd10": [[0.06, 0.136], [0.42, 0.1], [0.0, 0.446]],
    }
    result = SimpleNamespace(at_one=recalls.get, undefended=SimpleNamespace(changed=["pgd10"]))
    assert defended_captions.verdict(result)[2:] == [
        "pgd10 leaves more than there is without an attack, images left alone would leave less: "
        "TTC adaptive IR 13.6 over 10.8, TTC not adaptive TR 42.0 over 16.0"
    ]
    recalls["pgd10"] = recalls["clean"]
    assert len(defended_captions.verdict(result)) == 2


def test_what_does_not_go_together_is_refused(run, capsys, split):
    unread = ["attack", str(run.path), "--data", "not-there", "--attacks"]  # refused before the data are looked for
    assert "sga takes words from a masked language model, got none" in refused(capsys, *unread, "sga")
    for name in ("nothing", "pgd20x5"):
        assert name in (said := refused(capsys, *unread, "pgd2", name)) and "expected one of bert-attack" in said
    assert "no data at not-there" in refused(capsys, *unread, "clean", "character", "pgd2")
    command = ["attack", str(run.path), "--data", "shapes", "--options", "count=60"]
    assert "takes words from a masked language model" in refused(capsys, *command, "--attacks", "sga")
    assert "unknown attack 'nothing'" in refused(capsys, *command, "--attacks", "nothing")
    assert "other runs than those on captions" in refused(capsys, *command, "--restarts", "2")
    with pytest.raises(InputError, match="no attack on images and captions"):
        registry.make("pgd20x5", run.model.dual)
    with pytest.raises(InputError, match="an attack at least"):
        attacked_captions.examine(run.model.dual, split, ["clean"])
