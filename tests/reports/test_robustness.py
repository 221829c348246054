import copy
import csv
import json
from dataclasses import replace

import pytest
import torch
from networks import samples, trained
from test_checks import Masked
from torch import nn

from cmr_fast.attacks import CW, checks
from cmr_fast.cli import main
from cmr_fast.errors import InputError
from cmr_fast.reports import robustness
from cmr_fast.reports.robustness import Outcome, Settings, attack_all, examine, print_outcomes, worst_case, write_report

SETTINGS = Settings(eps=8 / 255, images=40, few=40, batch=16)
QUICK = ("clean", "fgsm", "pgd10", "cw10x2", "apgd20-dlr")


LINEAR = {"images": 20, "few": 5, "batch": 20}


def linear(classes):
    """A linear classifier, 20 images, and its own answers as their labels."""
    generator = torch.Generator().manual_seed(classes)
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, classes)).eval()
    model[1].weight.data = torch.randn(classes, 48, generator=generator)
    x = torch.rand(20, 3, 4, 4, generator=generator)
    return model, x, model(x).argmax(1)


@pytest.mark.parametrize(("classes", "missing"), [(2, ["apgd-dlr", "apgd-t"]), (3, ["apgd-t"]), (4, [])])
def test_the_standard_attacks_fit_the_number_of_classes(classes, missing, monkeypatch):
    """DLR needs three classes, targeted DLR four: known before the first attack, and said."""
    monkeypatch.setattr(robustness, "STANDARD", ("clean", "pgd5", "apgd-dlr", "apgd-t", "transfer-pgd5"))
    monkeypatch.setattr(checks, "masking", lambda *a, **o: [])
    model, x, y = linear(classes)
    report = examine("linear", model, x, y, Settings(**LINEAR))
    assert list(report.outcomes) == [n for n in ("clean", "pgd5", "apgd-dlr", "apgd-t") if n not in missing]
    assert list(report.left_out) == missing and all(name in report.verdict() for name in missing)
    assert report.outcomes["clean"].accuracy == 1 and report.worst < 1


def test_an_attack_asked_for_by_name_that_the_classes_rule_out_is_refused_before_any_work(monkeypatch):
    monkeypatch.setattr(robustness, "_run", lambda *a: pytest.fail("work was done"))
    model, x, y = linear(2)
    with pytest.raises(InputError, match="apgd-t needs at least 4 classes, there are 2"):
        attack_all(model, x, y, ["pgd5", "apgd-t"], Settings(**LINEAR))
    with pytest.raises(InputError, match=r"an attack in the ball beside clean.*apgd-dlr needs at least 3 classes"):
        examine("linear", model, x, y, Settings(**LINEAR), names=["clean", "apgd-dlr"])
    with pytest.raises(InputError, match="logits"):
        attack_all(lambda z: z, x, y, ["pgd5"], Settings(**LINEAR))


@pytest.mark.parametrize("when", ["second attack", "checks"])
def test_an_interrupted_report_says_from_where_it_goes_on(when, plain, many, tmp_path, monkeypatch):
    run = robustness._run

    def interrupted(name, *arguments):
        if name == "pgd3":
            raise KeyboardInterrupt
        return run(name, *arguments)

    def stop(*arguments, **options):
        raise KeyboardInterrupt

    arguments = "plain", plain, *many, SETTINGS
    with monkeypatch.context() as patch:
        if when == "checks":
            patch.setattr(checks, "masking", stop)
        else:
            patch.setattr(robustness, "_run", interrupted)
        with pytest.raises(KeyboardInterrupt, match=f"the same command goes on from the attacks kept in {tmp_path}"):
            examine(*arguments, names=["fgsm", "pgd3"], keep=tmp_path)
        with pytest.raises(KeyboardInterrupt) as nothing_kept:
            examine(*arguments, names=["pgd3"])
        assert not nothing_kept.value.args
    kept = {path.name for path in tmp_path.iterdir()}
    assert kept == {"clean.json", "fgsm.json", "pgd3.json"} - ({"pgd3.json"} if when != "checks" else set())
    monkeypatch.setattr(robustness, "_run", lambda name, *a: run(name, *a) if name == "pgd3" else pytest.fail("again"))
    assert set(examine(*arguments, names=["fgsm", "pgd3"], keep=tmp_path).outcomes) == {"clean", "fgsm", "pgd3"}


def test_an_interrupt_before_the_first_attack_is_done_promises_nothing(plain, many, tmp_path, monkeypatch):
    def stop(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(robustness, "_run", stop)
    (tmp_path / "fgsm.json").write_text('{"mark": 0}')  # of another model
    with pytest.raises(KeyboardInterrupt) as error:
        attack_all(plain, *many, ["pgd3"], SETTINGS, keep=tmp_path)
    assert not error.value.args


@pytest.fixture(scope="module")
def plain():
    return trained().eval()


@pytest.fixture(scope="module")
def many():
    return samples(40, seed=21)


def test_each_attack_by_its_name(plain, many):
    x, y = many
    other = trained(seed=5).eval()
    names = (*QUICK, "mifgsm5", "targeted5", "noise5", "apgd20-ce", "apgd20-t", "local-search")
    names += ("transfer-pgd10", "transfer-cw10")
    found = attack_all(plain, x, y, names, SETTINGS, surrogate=other)
    assert list(found) == list(names)
    clean = (plain(x).argmax(1) == y).double().mean()
    assert found["clean"].accuracy == pytest.approx(float(clean))
    for name, outcome in found.items():
        assert outcome.accuracy <= found["clean"].accuracy and len(outcome.right) == 40, name
        assert not (outcome.right & ~found["clean"].right).any()
    assert found["pgd10"].accuracy < found["clean"].accuracy
    assert found["transfer-pgd10"].accuracy >= found["pgd10"].accuracy
    (curve,) = found["pgd10"].curves
    assert len(curve) == 10 and curve[-1] > curve[0]
    assert len(found["cw10x2"].runs) == 2 and found["cw10x2"].accuracy <= min(found["cw10x2"].runs)


def test_each_run_of_an_attack_is_the_attack_with_that_seed_at_its_last_step(plain, many):
    """One rule for the first run and the others: fooled at the end, however it fared on the way."""
    x, y = many
    found = attack_all(plain, x, y, ["cw10x3"], replace(SETTINGS, seed=4))["cw10x3"]
    clean = plain(x).argmax(1) == y
    right = []
    for seed in (4, 5, 6):
        adv = CW(plain, SETTINGS.eps, None, 10, seed=seed)(x, y, index=torch.arange(len(x)))
        right.append(clean & (plain(adv).argmax(1) == y))
    assert found.runs == [float(r.double().mean()) for r in right]
    assert torch.equal(found.right, right[0] & right[1] & right[2])
    assert (found.lowest, found.spread) == (min(found.runs), max(found.runs) - min(found.runs))
    assert [len(curve) for curve in found.curves] == [10, 10, 10] and found.curves[0] != found.curves[1]


def test_what_leaves_the_ball_is_no_part_of_the_worst_case(plain, many):
    found = attack_all(plain, *many, ["clean", "fgsm", "local-search-pixels"], replace(SETTINGS, few=8))
    pixels = found["local-search-pixels"]
    assert not pixels.in_ball and found["fgsm"].in_ball and len(pixels.right) == 8
    assert pixels.accuracy < found["fgsm"].right[:8].double().mean()
    assert torch.equal(worst_case(found), found["fgsm"].right)
    with pytest.raises(InputError, match="an attack in the ball beside clean"):
        examine("plain", plain, *many, SETTINGS, names=["local-search-pixels"])


def test_numbers_do_not_depend_on_the_batch(plain, many):
    a, b = (
        attack_all(plain, *many, ["pgd10", "apgd20-ce"], Settings(images=40, few=40, batch=batch)) for batch in (7, 40)
    )
    assert all(torch.equal(a[n].right, b[n].right) for n in a)


def test_worst_case_is_of_each_image():
    def outcome(bits):
        return Outcome("x", torch.tensor(bits, dtype=torch.bool), [0.5])

    left = worst_case({"a": outcome([1, 1, 0, 1]), "b": outcome([1, 0, 1, 1]), "few": outcome([0, 1])})
    assert left.tolist() == [False, False, False, True]


def test_finished_attacks_are_kept_and_others_made_anew(plain, many, tmp_path, monkeypatch):
    x, y = many
    first = attack_all(plain, x, y, ["pgd10", "fgsm"], SETTINGS, keep=tmp_path)

    def no_work(*arguments):
        raise AssertionError("attacked again")

    with monkeypatch.context() as patch:
        patch.setattr(robustness, "_run", no_work)
        again = attack_all(plain, x, y, ["pgd10", "fgsm"], SETTINGS, keep=tmp_path)
        assert all(torch.equal(first[n].right, again[n].right) and first[n].curves == again[n].curves for n in first)
        changed = copy.deepcopy(plain)
        changed[7].bias.data += 1
        for arguments in (
            (changed, x, y, ["pgd10"], SETTINGS),
            (plain, x.flip(0), y.flip(0), ["pgd10"], SETTINGS),
            (plain, x, y, ["pgd10"], Settings(eps=4 / 255, images=40)),
            (plain, x, y, ["pgd11"], SETTINGS),
        ):
            with pytest.raises(AssertionError, match="attacked again"):
                attack_all(*arguments, keep=tmp_path)
    (tmp_path / "pgd10.json").write_text("{")
    with pytest.raises(InputError, match="damaged"):
        attack_all(plain, x, y, ["pgd10"], SETTINGS, keep=tmp_path)


def test_a_plain_model_is_not_called_out_and_a_masked_one_is(plain, many, tmp_path):
    x, y = many
    surrogate = trained(seed=5).eval()
    masked = Masked(plain)
    found = [
        examine("plain", plain, x, y, SETTINGS, names=QUICK, surrogate=surrogate, keep=tmp_path / "a"),
        examine("masked", masked, x, y, SETTINGS, names=(*QUICK, "transfer-pgd10"), surrogate=copy.deepcopy(plain)),
    ]
    assert not found[0].suspicious and "SUSPICIOUS" not in found[0].verdict()
    assert found[1].suspicious and "SUSPICIOUS" in found[1].verdict() and "black box" in found[1].verdict()
    assert found[1].outcomes["pgd10"].accuracy > 0.8 and found[1].worst < 0.6
    assert found[0].sweep[0.0] == pytest.approx(found[0].outcomes["clean"].accuracy)
    assert list(found[0].sweep.values()) == sorted(found[0].sweep.values(), reverse=True)

    write_report(found, tmp_path / "report", "templates", SETTINGS)
    there = {path.name for path in (tmp_path / "report").iterdir()}
    assert there == {
        "robustness.csv", "README.md", "index.html", "attacks.png", "loss-against-step.png", "eps-sweep.png"
    }  # fmt: skip
    with open(tmp_path / "report" / "robustness.csv", newline="") as file:
        table = list(csv.reader(file))
    assert table[0] == ["accuracy under", "plain", "masked"] and table[-1][0] == "every attack together"
    assert table[-1][1] == f"{found[0].worst:.1%}"
    for page in ("README.md", "index.html"):
        text = (tmp_path / "report" / page).read_text()
        assert "SUSPICIOUS" in text and "attacks.png" in text
    assert all((tmp_path / "report" / name).stat().st_size > 5000 for name in there if name.endswith(".png"))


def test_the_table_on_a_terminal(plain, many, capsys):
    found = attack_all(plain, *many, ["clean", "cw5x2", "local-search"], Settings(images=40, few=8))
    print_outcomes("numbers", {"net": found})
    shown = capsys.readouterr().out
    assert "cw5x2" in shown and f"(lowest run {found['cw5x2'].lowest:.1%}, max - min" in shown
    assert "local-search, 8 images" in shown


@pytest.mark.parametrize(
    ("names", "options", "message"),
    [
        (["pgd"], {}, "unknown attack 'pgd', expected one of clean"),
        (["pgd10", "transfer-pgd5"], {}, "expected a surrogate"),
    ],
)
def test_refuses_names_before_any_work(plain, many, names, options, message, monkeypatch):
    monkeypatch.setattr(robustness, "_run", lambda *a: pytest.fail("work was done"))
    with pytest.raises(InputError, match=message):
        attack_all(plain, *many, names, SETTINGS, **options)


def test_refuses_settings():
    with pytest.raises(InputError, match="eps must be"):
        Settings(eps=8)
    for images in (0, 2.5, "8", True, None):
        with pytest.raises(InputError, match="images must be"):
            Settings(images=images)
    for values in ({"eps": "8"}, {"eps": None}, {"eps": float("nan")}, {"seed": -1}, {"seed": "0"}, {"batch": 0}):
        with pytest.raises(InputError, match=f"{next(iter(values))} must be"):
            Settings(**values)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two small classifiers trained on shapes by the command line."""
    folder = tmp_path_factory.mktemp("runs")
    common = ["--preset", "small-plain", "--options", "train=60", "test=24", "--epochs", "1", "--threads", "1"]
    for seed in ("0", "1"):
        command = ["train", "scatter", *common, "--seed", seed, "--out", str(folder / f"run{seed}"), "--quiet"]
        assert main(command) == 0
    return folder


def test_attack_from_the_command_line(runs, capsys, tmp_path):
    import numpy as np

    out = tmp_path / "adv.npz"
    command = ["attack", str(runs / "run0"), "--attacks", "clean", "pgd5", "transfer-pgd5", "--images", "20"]
    assert main([*command, "--surrogate", str(runs / "run1"), "--save", str(out)]) == 0
    shown = capsys.readouterr().out
    assert "pgd5" in shown and "every attack together" in shown and "eps 8/255" in shown
    with np.load(out) as saved:
        apart = np.abs(saved["adversarial"].astype(float) - saved["images"].astype(float)).max()
        assert saved["adversarial"].shape == (20, 3, 32, 32) and 0 < apart <= 8 / 255 + 1e-7
    assert main([*command, "--surrogate", str(runs / "run1"), "--save", str(out)]) == 2  # not overwritten
    assert "exists already" in capsys.readouterr().err
    assert main([*command, "--surrogate", str(runs / "run0")]) == 2
    assert "victim" in capsys.readouterr().err
    assert main([*command]) == 2 and "surrogate" in capsys.readouterr().err
    assert main(["attack", str(runs / "run0"), "--attacks", "clean", "clean"]) == 2
    assert "named once" in capsys.readouterr().err


def test_report_of_classifiers_from_the_command_line(runs, capsys, tmp_path):
    out = tmp_path / "report"
    command = ["report", str(runs / "run0"), str(runs / "run1"), "--out", str(out), "--images", "4"]
    command += ["--attacks", "clean", "pgd5"]
    assert main(command) == 0
    shown = capsys.readouterr().out
    assert "run0" in shown and "every attack together" in shown and "index.html" in shown
    assert (out / "robustness.csv").is_file() and (out / "attacks" / "run1" / "pgd5.json").is_file()
    assert main(command) == 2 and "--force" in capsys.readouterr().err
    assert main([*command, "--force"]) == 0
    assert main([*command[:-2], "clean", "--force"]) == 2 and "beside clean" in capsys.readouterr().err


def test_a_surrogate_among_the_runs_is_left_out_of_them(runs, capsys, tmp_path):
    command = ["report", str(runs / "run0"), str(runs / "run1"), "--images", "4", "--attacks", "clean", "transfer-pgd2"]
    assert main([*command, "--surrogate", str(runs / "run1"), "--out", str(tmp_path / "report")]) == 0
    assert f"{runs / 'run1'} is the surrogate and left out" in capsys.readouterr().err
    table = (tmp_path / "report" / "robustness.csv").read_text().splitlines()
    assert table[0] == "accuracy under,run0"
    command = ["report", str(runs / "run1"), "--surrogate", str(runs / "run1" / "model.safetensors")]
    assert main([*command, "--out", str(tmp_path / "none")]) == 2
    assert "expected another to attack" in capsys.readouterr().err


def test_a_report_without_names_runs_the_standard_attacks(runs, tmp_path, monkeypatch):
    asked = []

    def stop(name, *arguments, names=None, **options):
        asked.append(names)
        raise InputError("enough")

    monkeypatch.setattr(robustness, "examine", stop)
    assert main(["report", str(runs / "run0"), "--out", str(tmp_path / "r"), "--images", "4"]) == 2
    assert asked == [None]


def test_retrieval_commands_name_a_classifier_and_the_reverse(runs, capsys, tmp_path):
    assert main(["evaluate", str(runs / "run0")]) == 2
    assert "a classifier, expected a retriever" in capsys.readouterr().err
    retriever = ["train", "acmr", "--options", "count=160", "--epochs", "1", "--out", str(tmp_path / "acmr"), "--quiet"]
    assert main(retriever) == 0
    assert main(["report", str(runs / "run0"), str(tmp_path / "acmr"), "--out", str(tmp_path / "r")]) == 2
    assert "several kinds" in capsys.readouterr().err
    assert main(["attack", str(tmp_path / "acmr"), "--images", "16", "--eps", "0.02"]) == 0
    shown = capsys.readouterr().out
    assert "R@10" in shown and "worst case of a query" in shown and "R@1" in shown
    out = tmp_path / "recall"
    command = ["attack", str(tmp_path / "acmr"), "--images", "16", "--eps", "0.02", "--out", str(out)]
    assert main([*command, "--surrogate", str(runs / "run0")]) == 2
    assert main(command) == 0
    assert {path.name for path in out.iterdir()} == {
        "recall.csv", "README.md", "index.html", "attacks.png", "eps-sweep.png", "loss-against-step.png"
    }  # fmt: skip
    assert main(command) == 2 and "--force" in capsys.readouterr().err
    assert main(["attack", str(tmp_path / "acmr"), "--surrogate", str(tmp_path / "acmr"), "--images", "8"]) == 2
    assert "copy of the victim" in capsys.readouterr().err
    assert json.loads((runs / "run0" / "results.json").read_text())["accuracy"] >= 0
