import csv
import json
import math
from dataclasses import dataclass, replace

import pytest
import torch

from cmr_fast.cli import main
from cmr_fast.data import load, save_pairs
from cmr_fast.data.pairs import PairedDataset, Pairs
from cmr_fast.errors import DivergedError, InputError
from cmr_fast.methods import METHODS, loop
from cmr_fast.methods._runfolder import held
from cmr_fast.methods.acmr import ACMRConfig
from cmr_fast.methods.baselines import CCAITQ
from cmr_fast.methods.cmimh import CMIMHConfig
from cmr_fast.methods.djsrh import DJSRHConfig
from cmr_fast.methods.evaluation import evaluate_model
from cmr_fast.methods.tuned_itq import TunedCCAITQ
from cmr_fast.reports.reproduce import acmr, cmimh, common, reproduce

SMALL = ACMRConfig(
    epochs=2, batch_size=16, dim=6, image_hidden=8, text_hidden=8, modality_hidden=4, inner_steps=1, learning_rate=1e-2
)

SMALL_CODES = CMIMHConfig(epochs=1, batch_size=16, hidden=8, critic_hidden=8, critic_dim=4)


@pytest.fixture
def pairs(tmp_path):
    generator = torch.Generator().manual_seed(0)
    classes = torch.arange(90) % 3
    image = torch.eye(3)[classes].repeat(1, 3) + 0.7 * torch.randn(90, 9, generator=generator)
    text = torch.eye(3)[classes].repeat(1, 2) + 0.7 * torch.randn(90, 6, generator=generator)
    both = Pairs(image, text, classes)
    test = both.select(torch.arange(45, 90))
    save_pairs(tmp_path / "own.npz", PairedDataset("own", both.select(torch.arange(45)), test, test))
    return str(tmp_path / "own.npz")


@pytest.fixture
def with_valid(pairs, tmp_path):
    """The same with 15 of the training pairs as a validation split of its own."""
    data = load(pairs)
    valid, train = (data.train.select(torch.arange(*rows)) for rows in ((0, 15), (15, 45)))
    save_pairs(tmp_path / "split.npz", replace(data, name="split", train=train, valid=valid))
    return str(tmp_path / "split.npz")


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(acmr, "settings_of", lambda dataset: ("default", SMALL))
    monkeypatch.setattr(cmimh, "settings_of", lambda dataset: ("default", SMALL_CODES))
    for lengths in ("SHORT", "LONG", "EVERY"):
        monkeypatch.setattr(cmimh, lengths, (8, 12, 16))
    short = DJSRHConfig(epochs=1, image_hidden=8, text_hidden=8)
    monkeypatch.setattr(METHODS["djsrh"], "all_presets", classmethod(lambda cls: {"default": short}))
    printed = replace(SMALL_CODES, inputs="raw", reconstruction="sum")
    monkeypatch.setattr(METHODS["cmimh"], "all_presets", classmethod(lambda cls: {"paper": printed}))


def table(out, name):
    (file,) = [path for path in out.iterdir() if path.name.startswith(name) and path.suffix == ".csv"]
    with open(file, newline="") as text:
        return {row[0]: row[1:] for row in csv.reader(text)}


def test_a_table_from_the_command_line_with_the_papers_numbers_beside(pairs, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["reproduce", "acmr", "--data", pairs, "--table", "5", "--seeds", "2", "--out", str(out)]) == 0
    assert table(out, "table-5.-the-paper")["Pascal Sentences, full"] == ["0.535", "0.486", "0.511"]
    rows = table(out, "table-5.-the-terms")
    stores = [out / "runs" / f"own-6-default-seed{seed}" / "scores.json" for seed in (0, 1)]
    runs = [json.loads(store.read_text())["scores"] for store in stores]
    mean = sum(run["all"]["i2t"] for run in runs) / 2
    assert rows["full"][0].startswith(f"{mean:.3f} ± ")
    assert rows["full"][8] == " ".join(str(run["best_epoch"]) for run in runs)
    assert rows[acmr.PLAIN][6] == "-" and float(rows["full"][6].split()[0]) <= 1
    assert rows[acmr.LONG][6::2] == ["-", "30 30"]  # nothing held out, the last weights
    assert "Table 5" in (out / "README.md").read_text() and "<table>" in (out / "index.html").read_text()
    assert acmr._protocol(load(pairs), "wikipedia") == (  # of its rows' preset alone
        "Epochs are chosen by validation mAP. wikipedia: a share of 0.2 held out, patience 6."
    )
    capsys.readouterr()


@pytest.mark.parametrize(("paper", "number", "name"), [("acmr", 5, "table-5.-the-terms"), ("cmimh", 3, "table-3")])
def test_trainings_side_by_side_give_the_table_of_those_one_after_the_other(pairs, tmp_path, paper, number, name):
    tables = []
    for jobs in (1, 2):
        out = tmp_path / f"{jobs}"
        reproduce(paper, pairs, out, tables=[number], seeds=1, quiet=True, jobs=jobs)
        tables.append(table(out, name))
    one, other = tables
    assert one.keys() == other.keys() and one.pop("") == other.pop("")
    for row, cells in one.items():
        numbers, same = ([float(cell.strip("-") or "nan") for cell in x] for x in (cells, other[row]))
        assert numbers == pytest.approx(same, abs=0.02, nan_ok=True), row  # sums of another number of threads
    assert len(list((tmp_path / "2" / "runs").glob("*/scores.json"))) == len(list((tmp_path / "1" / "runs").iterdir()))


def test_no_job_is_refused_before_data_are_read(tmp_path):
    with pytest.raises(InputError, match="jobs must be 1 or more, got 0"):
        reproduce("acmr", "nowhere", tmp_path / "out", jobs=0)


def test_what_is_there_is_not_made_again_and_other_settings_are_refused(pairs, tmp_path, monkeypatch):
    out = tmp_path / "out"
    reproduce("acmr", pairs, out, tables=[5], seeds=1, quiet=True)
    before = table(out, "table-5.-the-terms")

    def refuse(*_, **__):
        raise AssertionError("trained again")

    monkeypatch.setattr("cmr_fast.methods.loop.train", refuse)
    reproduce("acmr", pairs, out, tables=[5], seeds=1, quiet=True)
    assert table(out, "table-5.-the-terms") == before
    monkeypatch.setattr(acmr, "settings_of", lambda dataset: ("default", replace(SMALL, epochs=3)))
    with pytest.raises(InputError, match="other settings or data"):
        reproduce("acmr", pairs, out, tables=[5], seeds=1, quiet=True)


def test_scores_of_other_data_under_the_same_name_are_not_taken(pairs, tmp_path):
    data = load(pairs)
    other = replace(data, train=Pairs(data.train.image + 1, data.train.text, data.train.labels))
    fewer = replace(data, query=data.query.select(torch.arange(20)))
    relabelled = replace(data, query=Pairs(data.query.image, data.query.text, data.query.labels.flip(0)))
    study = common.Study("acmr", pairs, tmp_path / "out", 1, True)

    def scores(dataset, n):
        return study.scores(study.trainings("one", "acmr", SMALL, dataset, lambda run, dataset: {"n": n}))

    assert scores(data, 1) == [{"n": 1}]
    assert scores(load(pairs), 2) == [{"n": 1}]
    for changed in (other, fewer, relabelled):
        assert changed.name == data.name
        with pytest.raises(InputError, match="other settings or data"):
            scores(changed, 2)


@dataclass
class Bare(common.Study):
    """A study without data."""

    def described(self):
        return {"paper": self.paper, "data": self.data}


def study_in(out, data="x", seeds=1, paper="acmr", quiet=True):
    return Bare(paper, data, out, seeds, quiet)


def making(cell):
    return lambda study: [common.Section("title", ("a",), [[cell]])]


def refusing(error):
    def make(study):
        raise error

    return make


def test_what_is_missing_is_said_and_the_rest_goes_on(tmp_path, capsys):
    items = [
        common.Item("Table 1", "first", refusing(common.Missing("it needs Pascal Sentence's features"))),
        common.Item("Table 2", "second", making("b")),
    ]
    common.make(study_in(tmp_path, quiet=False), "title", items, items, "note")
    text = (tmp_path / "README.md").read_text()
    assert "Not made: it needs Pascal Sentence's features." in text and "| b |" in text
    assert "not made: it needs Pascal" in capsys.readouterr().out
    with pytest.raises(InputError, match=r"nothing was made\. Table 1: it needs Pascal"):
        common.make(study_in(tmp_path), "title", items[:1], items, "note")


def test_what_one_item_is_refused_for_leaves_the_others_and_fails_in_the_end(tmp_path):
    error = InputError("runs/one: holds a run of other settings or data")
    items = [
        common.Item("Table 1", "first", making("kept")), common.Item("Table 2", "second", refusing(error)),
        common.Item("Table 3", "third", making("made")),
    ]  # fmt: skip
    with pytest.raises(InputError, match=r"not everything was made\. Table 2: runs/one: holds a run of other settings"):
        common.make(study_in(tmp_path), "title", items, items, "note")
    text = (tmp_path / "README.md").read_text()
    assert "| kept |" in text and "| made |" in text and "Not made: runs/one: holds a run" in text
    again = [common.Item("Table 1", "first", refusing(error))]
    with pytest.raises(InputError, match=r"nothing was made\. Table 1: runs/one"):
        common.make(study_in(tmp_path), "title", again, items, "note")
    assert "| kept |" in (tmp_path / "README.md").read_text()


def test_a_killed_process_ends_the_command(tmp_path):
    killed = common.Item("Table 1", "first", refusing(common.KilledError("killed")))
    rest = common.Item("Table 2", "second", refusing(AssertionError("would be killed as well")))
    with pytest.raises(common.KilledError):
        common.make(study_in(tmp_path / "out"), "title", [killed, rest], [killed, rest], "note")


def test_a_folder_is_of_one_paper_and_data_and_of_one_process_at_a_time(tmp_path):
    items = [common.Item("Table 1", "first", making("one"))]
    common.make(study_in(tmp_path / "out"), "title", items, items, "note")
    before = (tmp_path / "out" / "README.md").read_text()
    for other, seen in (
        ({"paper": "cmimh"}, "its paper is 'acmr', asked for 'cmimh'"),
        ({"data": "y"}, "its data is 'x'"),
    ):
        with pytest.raises(InputError, match=f"holds another study, {seen}"):
            common.make(study_in(tmp_path / "out", **other), "title", items, items, "note")
    with held(tmp_path / "out"), pytest.raises(InputError, match="in use, process"):
        common.make(study_in(tmp_path / "out"), "title", items, items, "note")
    assert (tmp_path / "out" / "README.md").read_text() == before
    (tmp_path / "out" / "study.json").unlink()
    with pytest.raises(InputError, match="holds a report of an earlier version"):
        common.make(study_in(tmp_path / "out"), "title", items, items, "note")
    for name in ("README.md", "index.html", "config.json"):
        (tmp_path / name[:3]).mkdir()
        (tmp_path / name[:3] / name).write_text("mine")
        with pytest.raises(InputError, match=f"holds a {name} of something else"):
            common.make(study_in(tmp_path / name[:3]), "title", items, items, "note")
        assert [path.name for path in (tmp_path / name[:3]).iterdir()] == [name]


def test_a_report_keeps_what_was_made_before_in_the_papers_order(tmp_path):
    missing = refusing(common.Missing("it is not there any more"))
    every = [common.Item("Table 1", "first", making("one")), common.Item("Table 2", "second", making("two"))]
    common.make(study_in(tmp_path, seeds=3), "title", every[1:], every, "note")
    common.make(study_in(tmp_path), "title", every[:1], every, "note")
    text = (tmp_path / "README.md").read_text()
    assert text.index("## Table 1. title") < text.index("| one |") < text.index("Made of x, 1 seed.")
    assert text.index("Made of x, 1 seed.") < text.index("## Table 2. title") < text.index("| two |")
    assert "Made of x, 3 seeds." in text
    again = [common.Item("Table 1", "first", making("anew")), common.Item("Table 2", "second", missing)]
    common.make(study_in(tmp_path), "title", again, again, "note")
    text = (tmp_path / "README.md").read_text()
    assert "| anew |" in text and "| one |" not in text and "| two |" in text
    assert (
        "| anew |" not in (tmp_path / "index.html").read_text()
        and "<td>anew</td>" in (tmp_path / "index.html").read_text()
    )


def test_other_commands_know_the_data_of_a_run(pairs, tmp_path, capsys):
    reproduce("acmr", pairs, tmp_path / "out", tables=[5], seeds=1, quiet=True)
    assert main(["evaluate", str(tmp_path / "out" / "runs" / "own-6-default-seed0")]) == 0
    assert "own" in capsys.readouterr().out


def runs(*values, told=0.9, probe=0.99):
    """Runs of these mAP(all), a tenth higher by the other convention."""
    return [
        {"all": {"average": value}, "topk_hits@50": {"average": value + 0.1},
         "modality": {"classifier_accuracy": told, "probe_accuracy": probe}}
        for value in values
    ]  # fmt: skip


def test_the_order_of_the_terms_is_of_the_papers_rows_alone_with_its_error_and_seeds():
    found = {"imd only": runs(0.2, 0.3), "full": runs(0.24, 0.36), acmr.PLAIN: runs(0.1, 0.1)}
    told = acmr.order(found)
    assert "'imd only': mAP(all) +0.0500 ± 0.0100 (+0.0400 +0.0600), mAP@50 hits +0.0500 ± 0.0100" in told
    assert "no adversary" not in told and "One seed" not in told
    told = acmr.order({name: rows[:1] for name, rows in found.items()})
    assert "'imd only': mAP(all) +0.0400, mAP@50 hits +0.0400." in told and "One seed cannot tell" in told


def test_rows_that_are_ranked_by_other_things_say_so():
    found = {"full": [{"similarity": "cosine"}] * 2, "imi only": [{"similarity": "ip"}, {"similarity": "labels"}]}
    assert acmr._ranked({"full": found["full"]}) == "Pairs are ranked by cosine."
    assert "differs between rows" in acmr._ranked(found) and "full: cosine; imi only: ip or labels." in acmr._ranked(
        found
    )


def test_an_adversary_is_judged_beside_its_like_without_one():
    found = {
        "full": runs(0.24, 0.36), acmr.PLAIN: runs(0.2, 0.3), "full, 30 epochs, slow": runs(0.2, 0.3, told=0.8),
        acmr.LONG: runs(0.3, 0.3, probe=1.0), "imd only": runs(0.0, 0.0, probe=0.0),
    }  # fmt: skip
    told = acmr.adversaries(found)
    assert "'full': D is right on 0.900, a fresh probe on 0.990 (0.990 without); mAP(all) +0.0500" in told
    assert (
        "'full, 30 epochs, slow': D is right on 0.800, a fresh probe on 0.990 (1.000 without); mAP(all) -0.0500" in told
    )
    assert "In none of these rows" in told and "imd" not in told
    told = acmr.adversaries(found | {"full": runs(0.24, 0.36, probe=0.9)})
    assert "A fresh probe does worse (by 0.02) than without an adversary in: full." in told


def test_what_the_paper_prints_stands_apart_and_says_where_it_is_not_its_own_mean():
    section = acmr._paper("title", acmr.DEEP)
    assert section.rows[1] == ["Multimodal DBN", "0.204", "0.183", "0.194"] and len(section.rows) == 10
    assert section.notes[1:] == ["ACMR's printed average 0.546 is not the mean of its row, 0.554."]
    assert "Bimodal-AE's printed average 0.458" in acmr._paper("title", acmr.TABLE_3["Pascal Sentences"]).notes[1]
    assert len(acmr._paper("title", acmr.SHALLOW).notes) == 1


@pytest.mark.parametrize(
    ("name", "theirs"),
    [
        ("bonus", None),
        ("pascal-sentence", "Pascal Sentences"),
        ("nuswide10k", "NUS-WIDE-10k"),
        ("nus_wide", "NUS-WIDE-10k"),
    ],
)
def test_data_are_the_papers_by_a_word_of_their_name(name, theirs):
    assert acmr.paper_of(name) == theirs


def test_what_a_preset_changes_of_the_paper_is_named():
    told = acmr.departures("wikipedia")
    assert "beta 10.0 (0.1)" in told and "inner_steps 1 (5)" in told and "dim" not in told
    told = acmr.printed()
    assert "alpha 0.1 and beta 0.1" in told and "the rate 0.0002, margin 10" in told and "1/m is left out" in told


def test_bad_requests_are_refused(pairs, tmp_path, capsys):
    with pytest.raises(InputError, match="table 9 is not made here; expected some of Table"):
        reproduce("acmr", pairs, tmp_path / "out", tables=[9])
    with pytest.raises(InputError, match="reproduces acmr, cmimh"):
        reproduce("bert", pairs, tmp_path / "out")
    with pytest.raises(InputError, match="seeds"):
        reproduce("acmr", pairs, tmp_path / "out", seeds=0)
    with pytest.raises(InputError, match="no setting 'gamma', expected one of epochs"):
        common.changed(SMALL, gamma=1.0)
    assert not (tmp_path / "out").exists()


def test_every_figure_and_the_tables_that_these_data_permit(pairs, tmp_path, monkeypatch):
    out = tmp_path / "out"
    monkeypatch.setattr(acmr, "GRID", (0.1, 1.0))
    monkeypatch.setattr(acmr, "STEPS", (1, 2))
    monkeypatch.setattr(acmr.ACMR, "all_presets", classmethod(lambda cls: {"default": SMALL, "paper": SMALL}))
    trained = []
    train = loop.train
    monkeypatch.setattr(loop, "train", lambda *a, **k: trained.append(a[3].out.name) or train(*a, **k))
    reproduce("acmr", pairs, out, seeds=1, quiet=True)
    page = (out / "README.md").read_text()
    for name in ("Table 2", "Table 3", "Table 5", "Figure 3", "Figure 4", "Figure 5", "Figure 6"):
        assert f"## {name}" in page
    assert (
        "Not the paper's data: it has VGG's fc7" in page
        and "| linear heads, InfoNCE |" in page
        and "| semantic matching, tuned |" in page
        and "Not made: it is of Wikipedia" in page
    )
    drawn = {path.name for path in out.glob("*.png")}
    assert {"figure-4-a.png", "figure-4-b.png", "figure-4-c.png", "figure-5.png", "figure-6-alpha.png"} <= drawn
    assert len(trained) == len(set(trained)), "a setting that items share is trained once"
    assert "(a) and (b) are of 'imi only, alpha 10, triplet weight 1'" in page
    assert {"own-6-default-terms-imi-alpha-10.0-triplet-weight-1.0-adversary-0.0-seed0"} <= set(trained)
    steps = table(out, "figure-6.-inner")
    assert list(steps) == ["inner_steps", "1", "2"]
    curves = table(out, "figure-3")
    assert curves["ACMR, I2T"] != curves["random, I2T"]


def test_cmimhs_tables_and_figures(pairs, tmp_path, monkeypatch):
    out = tmp_path / "out"
    monkeypatch.setattr(cmimh, "SAMPLES", (1, 5))
    monkeypatch.setattr(cmimh, "ABLATION", ("1000", "1111"))
    monkeypatch.setattr(cmimh, "SHARES", (0.5, 1.0))
    monkeypatch.setattr(cmimh, "total_correlation", lambda means: 0.5)
    monkeypatch.setattr(cmimh, "WEIGHTS", {"lambda_mi": (0.0, 1.5), "lambda_skl": (0.0, 1.0)})
    trained = []
    train = loop.train
    monkeypatch.setattr(loop, "train", lambda *a, **k: trained.append(a[3].out.name) or train(*a, **k))
    reproduce("cmimh", pairs, out, seeds=1, quiet=True)
    page = (out / "README.md").read_text()
    for name in (*(f"Table {n}" for n in range(1, 10)), *(f"Figure {n}" for n in range(1, 6))):
        assert f"## {name}" in page
    assert "Not made" not in page and len(trained) == len(set(trained))
    tasks = table(out, "table-3")
    assert {"I2I, CMIMH", "T2T, DJSRH", "I2T, random"} <= set(tasks) and not any("printed" in name for name in tasks)
    assert tasks["I2T, CMIMH"][3:] == ["0.8068", "0.8193", "0.8292"]  # the paper's
    for file in out.glob("table-*.csv"):
        with open(file, newline="") as text:
            assert len({len(row) for row in csv.reader(text)}) == 1, file
    store = json.loads((out / "runs" / "own-45-default-8bits-seed0" / "scores.json").read_text())["scores"]
    assert tasks["T2T, CMIMH"][0] == f"{store['mAP@1k']['t2t']:.3f}"
    assert (out / "figure-2.png").exists() and sum(store["histogram"]["image"]) == pytest.approx(1)
    settings = json.loads((out / "tuned-cca-itq.json").read_text())["settings"]
    data = load(pairs)
    best = cmimh.measure(TunedCCAITQ(8, settings).fit(data.train), data)
    assert tasks["I2T, CCA-ITQ, tuned"][0] == f"{best['mAP@1k']['i2t']:.3f}"
    assert table(out, "table-2")["paper, MIR-Flickr25k, 48 bits, without L_ind"][-1] == "0.8128"
    monkeypatch.setattr(cmimh, "tune", lambda *a, **k: pytest.fail("tuned again"))
    reproduce("cmimh", pairs, out, tables=[3], seeds=1, quiet=True)
    assert table(out, "table-3") == tasks


def test_where_a_preset_was_made_for_the_data_the_printed_setting_stands_beside_it(pairs, tmp_path, monkeypatch):
    monkeypatch.setattr(cmimh, "settings_of", lambda dataset: ("wikipedia", SMALL_CODES))
    monkeypatch.setattr(cmimh, "EVERY", (8, 12, 16, 20))
    reproduce("cmimh", pairs, tmp_path / "out", tables=[3], seeds=1, quiet=True)
    tasks = table(tmp_path / "out", "table-3")
    store = json.loads((tmp_path / "out" / "runs" / "own-45-paper-12bits-seed0" / "scores.json").read_text())["scores"]
    printed = tasks["T2I, CMIMH, preset paper (as printed)"]
    assert (printed[1], printed[3]) == (f"{store['mAP@1k']['t2i']:.3f}", "")


def test_a_printed_setting_that_diverges_is_said_and_the_table_made(pairs, tmp_path, monkeypatch):
    monkeypatch.setattr(cmimh, "settings_of", lambda dataset: ("wikipedia", SMALL_CODES))
    train, broken = loop.train, ["paper-12bits"]

    def diverging(method, config, data, run):
        if any(name in run.out.name for name in broken):
            raise DivergedError("cmimh: mi is no longer finite in epoch 1")
        return train(method, config, data, run)

    monkeypatch.setattr(loop, "train", diverging)
    reproduce("cmimh", pairs, tmp_path / "out", tables=[3], seeds=1, quiet=True)
    page = (tmp_path / "out" / "README.md").read_text()
    assert "(as printed) is not measured at 12 bits: cmimh: mi is no longer finite" in page
    cells = table(tmp_path / "out", "table-3")["I2T, CMIMH, preset paper (as printed)"]
    assert float(cells[0]) > 0 and cells[1] == "" and float(cells[2]) > 0
    broken[:] = ["paper"]
    reproduce("cmimh", pairs, tmp_path / "none", tables=[3], seeds=1, quiet=True)
    assert {name for name in table(tmp_path / "none", "table-3") if "CMIMH" in name} == {
        f"{task}, CMIMH" for task in ("I2T", "T2I", "I2I", "T2T")
    }
    (tmp_path / "out" / "runs" / "own-45-paper-8bits-seed0" / "scores.json").write_text("{")
    with pytest.raises(
        InputError, match=r"scores\.json: damaged.*; without this file it is made again"
    ):  # not for divergence, so it is no row that lacks
        reproduce("cmimh", pairs, tmp_path / "out", tables=[3], seeds=1, quiet=True)


def test_where_the_data_have_a_validation_split_each_table_says_how_epochs_were_chosen(with_valid, tmp_path, capsys):
    reproduce("acmr", with_valid, tmp_path / "acmr", tables=[5], seeds=1, quiet=True)
    rows = table(tmp_path / "acmr", "table-5.-the-terms")
    assert rows[acmr.LONG][8] == "30", "the last weights, with a validation split beside"
    run = tmp_path / "acmr" / "runs" / "split-6-default-valid-fraction-0.0-epochs-30-adversary-0.0-seed0"
    assert json.loads((run / "config.json").read_text())["data"].get("valid") is None
    page = (tmp_path / "acmr" / "README.md").read_text()
    assert "default: the split of the data, patience 20" in page and "Pairs are ranked by " in page
    assert main(["evaluate", str(run)]) == 0, "the run knows its data"
    study = common.Study("cmimh", with_valid, tmp_path, 1, True)
    (printed,), (ours,) = (cmimh._trainings(study, 8, printed=printed) for printed in (True, False))
    assert printed.dataset.valid is None and ours.dataset.valid is not None and printed.source == ours.source
    told = cmimh._protocol(study, djsrh=True)
    assert "without labels" in told and "DJSRH, preset default, keeps the epoch of the best labelled validation" in told
    capsys.readouterr()


def test_cmimhs_protocol_says_what_differs_at_long_codes_and_from_djsrh(pairs, tmp_path, monkeypatch):
    study = common.Study("cmimh", pairs, tmp_path, 1, True)
    told = cmimh._protocol(study, djsrh=True)
    assert "DJSRH, preset default, trains on all pairs; CMIMH holds a share of 0.1 out" in told
    assert "DJSRH" not in cmimh._protocol(study) and "double" not in cmimh._protocol(study, 128)
    means = replace(SMALL_CODES, reconstruction="mean")
    monkeypatch.setattr(cmimh, "settings_of", lambda dataset: ("wikipedia", means))
    assert "counts double, first changed so after a look at test" in cmimh._protocol(study, 64)
    told = cmimh._protocol(study, djsrh=True)
    assert "double" not in told and "DJSRH, preset default, trains on all pairs." in told
    assert cmimh._of_length(means, 64).reconstruction_weight == 2 * cmimh._of_length(means, 48).reconstruction_weight


def test_what_cmimh_is_measured_by(pairs):
    """Against the metrics called one by one, a query left out of its own ranking."""
    data = load(pairs)
    model = CCAITQ(6).fit(data.train)
    found = cmimh.measure(model, data)
    codes = {m: (model.encode(m, getattr(data.query, m)) >= 0) for m in ("image", "text")}
    distances = (codes["image"][:, None] != codes["image"][None]).sum(-1).double()
    distances.fill_diagonal_(torch.inf)
    labels, hits_at_one = data.query.labels, 0
    for i, row in enumerate(distances):
        hits_at_one += int(labels[row.argmin()] == labels[i])
    assert found["RecallOne@1"]["i2i"] == pytest.approx(hits_at_one / len(labels))
    signs = codes["text"].double() * 2 - 1
    gap = signs.T @ signs / len(signs) - torch.eye(6)
    assert found["Corr MSE"]["text"] == pytest.approx(float(gap.square().mean()))
    result = evaluate_model(model, data, k=50, convention="topk_hits")
    assert found["mAP@50"]["t2i"] == pytest.approx(result["t2i"].map)


def test_total_correlation_is_near_nothing_for_independent_bits_and_large_for_copies():
    bits = torch.rand(2000, 8, generator=torch.Generator().manual_seed(0)).round()
    copies = bits[:, :1].expand(-1, 8)
    assert abs(cmimh.total_correlation(bits)) < 0.3 < 1.5 < cmimh.total_correlation(copies)


def test_spread_is_mean_and_deviation():
    assert common.spread([0.1, 0.2, 0.3]) == "0.200 ± 0.100" and common.spread([0.25]) == "0.250"


def test_scores_without_a_number_are_nan_again(pairs, tmp_path):
    study = common.Study("acmr", pairs, tmp_path / "out", 1, True)
    given = {"probe": [float("nan"), 0.5], "n": {"epoch": 2}}
    (found,) = study.scores(study.trainings("one", "acmr", SMALL, study.load(), lambda run, dataset: given))
    assert math.isnan(found["probe"][0]) and found["probe"][1] == 0.5 and found["n"] == {"epoch": 2}
    assert common.spread(found["probe"]) == "nan"


@pytest.mark.parametrize(
    ("name", "dims", "presets"),
    [
        ("wikipedia", (128, 10), ("wikipedia", "wikipedia", "wikipedia")),
        ("wikipedia", (128, 1000), ("wikipedia-tfidf", "wikipedia-tfidf", "default")),
        ("wikipedia-vgg", (4096, 10), ("default", "default", "default")),
        ("wikipedia-other", (128, 300), ("default", "default", "default")),
        ("flickr8k-24", (1000, 7000), ("default", "flickr8k", "flickr8k")),
        ("flickr8k", (1280, 384), ("default", "default", "default")),  # a file of the user's
        ("own", (128, 10), ("default", "default", "default")),
    ],
)
def test_a_preset_is_taken_for_the_features_that_it_was_made_for(name, dims, presets):
    labels = torch.arange(4) % 2
    pairs = Pairs(torch.zeros(4, dims[0]), torch.zeros(4, dims[1]), labels)
    data = PairedDataset(name, pairs, pairs, pairs)
    assert tuple(common.preset_for(METHODS[method], data) for method in ("acmr", "cmimh", "djsrh")) == presets


def test_table_2_without_the_file_of_tf_idf_has_its_other_half(tmp_path, monkeypatch):
    labels = torch.arange(40) % 4
    generator = torch.Generator().manual_seed(0)
    parts = Pairs(torch.rand(40, 128, generator=generator), torch.rand(40, 10, generator=generator), labels)
    save_pairs(tmp_path / "wikipedia.npz", PairedDataset("wikipedia", parts, parts, parts))
    monkeypatch.setattr(acmr.ACMR, "all_presets", classmethod(lambda cls: {"default": SMALL, "paper": SMALL}))
    reproduce("acmr", str(tmp_path / "wikipedia.npz"), tmp_path / "out", tables=[2], seeds=1, quiet=True)
    page = (tmp_path / "out" / "README.md").read_text()
    assert "| ACMR, default" in page and "tf-idf 1,000-d (not in the paper)\n\nNot made: " in page
