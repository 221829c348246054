import json
from dataclasses import replace

import pytest
import torch
from small import small_dataset

from cmr_fast.attacks import CMLA
from cmr_fast.data import save_pairs
from cmr_fast.errors import InputError
from cmr_fast.methods.baselines import CVH
from cmr_fast.methods.cmimh import CMIMH, CMIMHConfig
from cmr_fast.methods.dcmh import DCMHConfig
from cmr_fast.methods.evaluation import averaged, evaluate_model
from cmr_fast.methods.hardening import VARIANTS, bounds_of, harden, named_attack, perturb
from cmr_fast.methods.loop import RunConfig, train
from cmr_fast.reports import hashing

CONFIG = DCMHConfig(
    bits=8, epochs=25, batch_size=16, image_hidden=24, text_hidden=24, optimizer="adam", lr=5e-3, eta=0.01,
    text_input="standard",
)  # fmt: skip
RUN = RunConfig(device="cpu", threads=1, quiet=True, patience=0, valid_fraction=0.0)
SHARE = 0.3


@pytest.fixture(scope="module")
def data():
    return small_dataset(multi=True)


@pytest.fixture(scope="module")
def model(data, tmp_path_factory):
    return train("dcmh", CONFIG, data, replace(RUN, out=tmp_path_factory.mktemp("run") / "dcmh")).model


def test_clean_scores_are_the_evaluations(model, data):
    row, _ = hashing.score(model, data.query, data.database, "clean")
    expected = averaged(evaluate_model(model, data))
    assert row.map["i2t"] == expected["i2t"] and row.map["t2i"] == expected["t2i"]
    assert row.cross == pytest.approx(expected["average"])
    assert all(0 < row.tie_aware[task] <= 1 for task in hashing.TASKS)


def test_an_undefended_model_falls_and_the_report_says_so(model, data, tmp_path):
    result = hashing.examine(model, data, ["cmla-both40", "cmla40"], share=SHARE)
    clean, both, kept = result.rows
    assert both.cross < clean.cross - 0.1 and clean.distortion == {"image": 0.0, "text": 0.0}
    assert 0 < both.distortion["image"] <= SHARE
    assert kept.map["i2i"] + kept.map["t2t"] > both.map["i2i"] + both.map["t2t"]
    assert "cmla-both40 takes" in hashing.verdict(result)[0]
    hashing.write_report(result, tmp_path, "small")
    stored = json.loads((tmp_path / "results.json").read_text())
    assert [row["name"] for row in stored] == ["clean", "cmla-both40", "cmla40"]
    for file in ("README.md", "index.html", "results.csv", "map.png", "precision-recall.png", "precision-at.png",
                 "loss.png", "texts.png"):  # fmt: skip
        assert (tmp_path / file).stat().st_size > 0


def test_an_attack_that_does_not_bite_is_named(model, data):
    (line,) = hashing.verdict(hashing.examine(model, data, ["cmla2"], share=1e-6))
    assert "little of I2T and T2I" in line and "moved" not in line
    (line,) = hashing.verdict(hashing.examine(model, data, ["cmla2"], share=0.0))
    assert "no image and no text has moved" in line


def test_each_direction_is_judged_by_itself():
    """An attack that takes half of I2T and none of T2I; the texts have moved."""
    rows = [
        hashing.Row("clean", {"i2t": 0.4, "t2i": 0.2, "i2i": 0.3, "t2t": 0.5}, {}),
        hashing.Row("cmla", {"i2t": 0.2, "t2i": 0.2, "i2i": 0.3, "t2t": 0.5}, {}, {"image": 0.0, "text": 0.1}),
    ]
    (line,) = hashing.verdict(hashing.Attacked(rows, {}, {}, {}))
    assert line.startswith(
        "cmla takes 50% of I2T's mAP (0.400 to 0.200) and 0% of T2I's (0.200 to 0.200): little of T2I."
    )
    assert line.endswith("; no image has moved (D is 0)")


def test_queries_that_find_nothing_have_nothing_to_lose(model, data):
    alone = replace(data, query=replace(data.query, labels=torch.zeros_like(data.query.labels)), valid=None)
    result = hashing.examine(model, alone, ["cmla2"], share=SHARE)
    assert result.rows[0].cross == 0
    assert hashing.verdict(result) == [
        "the clean queries find nothing across the modalities: there is nothing that an attack could take"
    ]


def test_all_names_are_looked_at_before_the_first_attack(model, data, monkeypatch):
    monkeypatch.setattr(hashing, "perturb", lambda *_: pytest.fail("attacked"))
    with pytest.raises(InputError, match="unknown attack 'pgd20'"):
        hashing.examine(model, data, ["cmla500", "pgd20"])
    with pytest.raises(InputError, match="count must be at least 1"):
        hashing.examine(model, data, ["cmla2"], count=0)


def test_features_without_a_range_are_named(model, data):
    plain = {
        m: replace(getattr(data, m), text=torch.ones_like(data.train.text)) for m in ("train", "query", "database")
    }
    with pytest.raises(InputError, match="every text feature is 1; expected a range"):
        hashing.examine(model, replace(data, **plain), ["cmla2"])


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--adversarial 5 46", "from 1 to 45, the training pairs; got 5, 46"),
        ("--adversarial 5 5", "expected different numbers"),
        ("--adversarial 7", "run-adversarial7: not empty"),
        ("--defence cgat", "run-cgat: not empty"),
    ],
)
def test_a_defence_that_cannot_be_is_refused_before_the_training(data, tmp_path, capsys, flags, words):
    from cmr_fast.cli import main

    save_pairs(tmp_path / "small.npz", data)
    for used in ("run-adversarial7", "run-cgat"):
        (tmp_path / used).mkdir()
        (tmp_path / used / "notes.txt").write_text("mine")
    assert main(f"train dcmh --data {tmp_path}/small.npz --epochs 2 {flags} --out {tmp_path}/run".split())
    assert words in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_names_say_what_runs(model, data):
    assert named_attack("cmla", model, data).steps == 500
    assert named_attack("cmla-compat100", model, data).compat == "cmla"
    low, high = bounds_of(data, "image")
    budget = named_attack("cmla7", model, data).budgets["image"]
    assert budget.eps == pytest.approx(10 / 255 * (high - low)) and budget.bounds == (low, high)
    assert named_attack("cmla", model, data, share=0.2).budgets["text"].eps == pytest.approx(
        0.2 * 0.01 * 25.5 * (bounds_of(data, "text")[1] - bounds_of(data, "text")[0])
    )
    for name in VARIANTS:
        assert isinstance(named_attack(f"{name}3", model, data), CMLA)
    assert named_attack("cgat", model, data).steps == 100 and not named_attack("cgat3", model, data).targeted
    assert named_attack("dhta", model, data).steps == 2000 and named_attack("dhta", model, data).targeted
    for wrong in ("pgd20", "cmla-", "cmla0", "cmla-other", "dhta0"):
        with pytest.raises(InputError, match="unknown attack"):
            named_attack(wrong, model, data)
    with pytest.raises(InputError, match="CVH has none; expected a trained method"):
        named_attack("cmla", CVH(8), data)
    with pytest.raises(InputError, match="eps must be from 0 to 1"):
        named_attack("cmla", model, data, share=2.0)


def test_other_hashing_methods_are_attacked_too(data):
    torch.manual_seed(0)
    small = CMIMHConfig(bits=6, hidden=12, critic_hidden=8, critic_dim=5)
    cmimh = CMIMH(small, data.image_dim, data.text_dim, data.num_classes)
    cmimh.fit_inputs(data.train)
    result = hashing.examine(cmimh, data, ["cmla5"], count=10, share=SHARE)
    assert len(result.queries["cmla5"]) == 10 and result.rows[1].distortion["text"] > 0


def test_attacks_by_codes_of_the_database(model, data, tmp_path):
    result = hashing.examine(model, data, ["cgat20", "dhta60", "cmla5"], share=0.5)
    clean, cgat, dhta, cmla = result.rows
    assert cgat.cross < clean.cross and not cgat.targeted and not cmla.targeted
    assert all(dhta.targeted[task] > dhta.targeted_before[task] for task in hashing.CROSS)
    targets = named_attack("dhta60", model, data, share=0.5)(
        data.query.image, data.query.text, data.query.labels
    ).targets
    led = (targets != 0).any(dim=1)
    assert 0 < (~led).sum() < len(led) / 2  # they bear all labels, and count in no t-mAP
    aimed = replace(result.queries["dhta60"], labels=targets).select(led.nonzero()[:, 0])
    assert hashing.score(model, aimed, data.database, "x")[0].map == dhta.targeted
    words = hashing.verdict(result)
    assert (
        f"I2T {dhta.targeted_before['i2t']:.3f} to {dhta.targeted['i2t']:.3f}" in words[1] and "t-mAP" not in words[0]
    )
    hashing.write_report(result, tmp_path / "report", "small")
    saved = json.loads((tmp_path / "report" / "results.json").read_text())
    assert saved[2]["targeted"] == dhta.targeted and (tmp_path / "report" / "loss.png").exists()


def test_hardening_goes_on_from_the_model_with_the_attacked_pairs(model, data, tmp_path):
    before = {name: p.clone() for name, p in model.state_dict().items()}
    seen = []

    def counted(kind, config, more, run, *, start, notes):
        seen.append((len(more.train), config.epochs, start))
        return train(kind, config, more, run, start=start, notes=notes)

    from cmr_fast.methods import hardening

    original, hardening.train = hardening.train, counted
    try:
        run = harden(model, data, replace(RUN, out=tmp_path / "hard"), 12, epochs=4, rounds=2, attack="cmla5")
    finally:
        hardening.train = original
    assert seen[0] == (len(data.train) + 12, 2, model) and seen[1][2] is not model
    assert (tmp_path / "hard" / "model.safetensors").exists() and (tmp_path / "hard-round1").exists()
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert any(not torch.equal(a, b) for a, b in zip(run.model.parameters(), model.parameters(), strict=True))
    stored = json.loads((tmp_path / "hard" / "config.json").read_text())["adversarial"]
    used = stored.pop("settings")
    assert stored == {"samples": 12, "round": 2, "rounds": 2, "attack": "cmla5"}
    atk = named_attack("cmla5", model, data)
    assert (used["steps"], used["norm"], used["intra"], used["compat"]) == (5, "linf", 1.0, None)
    assert used["image_bounds"] == list(bounds_of(data, "image")) and used["image_eps"] == atk.budgets["image"].eps
    with pytest.raises(InputError, match="adversarial attack was 'cmla5' and is now 'cmla6'"):
        again = replace(RUN, out=tmp_path / "hard", resume=True)
        harden(model, data, again, 12, epochs=4, rounds=2, attack="cmla6")
    with pytest.raises(InputError, match="expected 0 to 45 adversarial samples"):
        harden(model, data, RUN, 46)
    with pytest.raises(InputError, match=r"got 5\.0"):
        harden(model, data, RUN, 5.0)
    with pytest.raises(InputError, match="rounds must divide"):
        harden(model, data, RUN, 5, epochs=5, rounds=2)


def test_defence_reports_the_models_own_attack_beside_the_stored_queries(model, data, tmp_path, capsys):
    rows = hashing.defend(
        model, data, replace(RUN, out=tmp_path / "base"), [20], attack="cmla-both20", share=SHARE, epochs=3
    )
    assert [row.name for row in rows] == ["no", "0 samples, as long", "20 samples"]
    assert [row.run and row.run.name for row in rows] == [None, "base-adversarial0", "base-adversarial20"]
    control = harden(model, data, replace(RUN, out=tmp_path / "control"), 0, epochs=3).model
    assert hashing.score(control, data.query, data.database, "x")[0].map == rows[1].natural.map
    model.config = replace(model.config, defence="cgat")  # one defence at a time: the control and the samples have none
    again = harden(model, data, replace(RUN, out=tmp_path / "again"), 0, epochs=3)
    assert hashing.score(again.model, data.query, data.database, "x")[0].map == rows[1].natural.map
    assert rows[0].stored is rows[0].adaptive
    stored, _ = hashing.score(
        model, perturb(named_attack("cmla-both20", model, data, share=SHARE), data.query)[0], data.database, "x"
    )
    assert stored.map == rows[0].adaptive.map
    hashing.print_defences(rows, "small")
    printed = capsys.readouterr().out
    assert "attacked anew" in printed and f"{rows[2].adaptive.map['i2t']:.3f}" in printed
    assert "what it wins is no defence" in printed
    assert (tmp_path / "base-adversarial20" / "model.safetensors").exists()


def test_from_the_command_line(data, tmp_path, capsys):
    from cmr_fast.cli import main

    save_pairs(tmp_path / "small.npz", data)
    flags = "--epochs 10 --bits 8 --batch-size 16 --text-hidden 24 --image-hidden 24 --optimizer adam --lr 5e-3"
    assert main(
        f"train dcmh --data {tmp_path}/small.npz {flags} --eta 0.01 --adversarial 10 "
        f"--adversarial-attack cmla-nointra20 --defence cgat --cgat-eps 0.1 --cgat-steps 2 "
        f"--out {tmp_path}/run --device cpu".split()
    ) in (0, None)  # fmt: skip
    out = capsys.readouterr().out
    assert "mAP after adversarial training" in out and "CgAT" in out and "0 samples, as long" in out
    for name, defence in (("run", "none"), ("run-cgat", "cgat"), ("run-adversarial0", "none")):
        assert json.loads((tmp_path / name / "config.json").read_text())["config"]["defence"] == defence
        assert (tmp_path / name / "data.json").exists()
    notes = [json.loads((tmp_path / f"run{end}" / "config.json").read_text()).get("adversarial")
             for end in ("", "-cgat", "-adversarial0", "-adversarial10")]  # fmt: skip
    assert notes[:3] == [None, None, {"samples": 0, "round": 1, "rounds": 1}]
    assert notes[3]["attack"] == "cmla-nointra20" and notes[3]["settings"]["intra"] == 0
    assert main(
        f"attack {tmp_path}/run-adversarial10 --attacks cmla20 cmla-nointra20 --out {tmp_path}/report".split()
    ) in (0, None)  # fmt: skip
    out = capsys.readouterr().out
    assert "cmla-nointra20" in out and "D image" in out and (tmp_path / "report" / "index.html").exists()


@pytest.mark.parametrize("attack", ["cgat3", "dhta3"])
def test_adversarial_samples_are_made_without_the_databases_codes_and_labels(model, data, tmp_path, attack):
    """On Wikipedia the database is the test split."""
    other = replace(data, database=replace(data.database, labels=data.database.labels.flip(0)))
    weights = [
        harden(model, d, replace(RUN, out=tmp_path / str(i)), 20, epochs=1, attack=attack, share=SHARE).model
        for i, d in enumerate((data, other))
    ]
    for a, b in zip(*(w.parameters() for w in weights), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("precision", ["bf16-true", "64-true"])
def test_models_of_another_dtype_are_hardened(data, tmp_path, precision):
    run = train("dcmh", replace(CONFIG, epochs=2), data, replace(RUN, out=tmp_path / "run", precision=precision))
    settings = replace(RUN, out=run.path, precision=precision)
    for attack in ("cmla2", "cgat2"):
        rows = hashing.defend(
            run.model, data, replace(settings, out=tmp_path / attack), [5], attack=attack, epochs=1, cgat=True
        )
        assert len(rows) == 4 and all(row.adaptive.distortion["image"] > 0 for row in rows)


def test_a_seed_is_what_attacks_draw_by(model, data):
    one, other, again = (
        hashing.examine(model, data, ["dhta2"], share=SHARE, seed=seed).queries["dhta2"].image for seed in (0, 1, 0)
    )
    assert torch.equal(one, again) and not torch.equal(one, other)


def test_what_gains_a_little_takes_nothing():
    rows = [
        hashing.Row("clean", dict.fromkeys(hashing.TASKS, 0.5), {}),
        hashing.Row("cmla", {"i2t": 0.501, "t2i": 0.53, "i2i": 0.3, "t2t": 0.5}, {}, {"image": 0.1, "text": 0.1}),
    ]
    (line,) = hashing.verdict(hashing.Attacked(rows, {}, {}, {}))
    assert line.startswith("cmla takes 0% of I2T's mAP (0.500 to 0.501) and -6% of T2I's (0.500 to 0.530)")


def test_a_report_without_losses_has_the_texts_too(model, data, tmp_path):
    hashing.write_report(hashing.examine(model, data, ["cgat2"], share=SHARE), tmp_path / "cgat", "small")
    assert (tmp_path / "cgat" / "texts.png").exists() and not (tmp_path / "cgat" / "loss.png").exists()
    hashing.write_report(hashing.examine(model, data, []), tmp_path / "clean", "small")
    assert not (tmp_path / "clean" / "texts.png").exists()


def test_a_quiet_training_keeps_its_table_and_says_nothing(data, tmp_path, capfd):
    from cmr_fast.cli import main

    save_pairs(tmp_path / "small.npz", data)
    flags = "--epochs 1 --bits 8 --batch-size 16 --text-hidden 8 --image-hidden 8 --optimizer adam --lr 5e-3"
    assert main(
        f"train dcmh --data {tmp_path}/small.npz {flags} --adversarial 5 --adversarial-attack cgat2 --quiet "
        f"--out {tmp_path}/run --device cpu".split()
    ) in (0, None)  # fmt: skip
    assert capfd.readouterr() == ("", "")
    folder = tmp_path / "run" / "defences"
    stored = json.loads((folder / "results.json").read_text())
    assert [row["name"] for row in stored] == ["no", "0 samples, as long", "5 samples"]
    assert stored[2]["run"] == f"{tmp_path}/run-adversarial5"
    lines = (folder / "results.csv").read_text().splitlines()
    assert lines[0].startswith("fine-tuned,natural I2T") and len(lines) == 4
    assert lines[3].split(",")[1] == f"{stored[2]['natural']['map']['i2t']:.3f}"
    assert (folder / "map.png").exists() and "cgat2" in (folder / "README.md").read_text()
    assert main(f"attack {tmp_path}/run --attacks cmla2 --seed 1".split()) == 2
    assert "--seed is for attacks that draw" in capfd.readouterr().err
    assert main(f"attack {tmp_path}/run --attacks cmla2 dhta2 --seed 1".split()) in (0, None)


def test_raw_pixels_from_the_command_line(tmp_path, capsys):
    from test_dcmh import pixel_dataset

    from cmr_fast.cli import main

    save_pairs(tmp_path / "pixels.npz", pixel_dataset())
    assert main(
        f"train dcmh --data {tmp_path}/pixels.npz --epochs 1 --bits 8 --batch-size 6 --text-hidden 8 --optimizer adam "
        f"--lr 1e-4 --adversarial 2 --adversarial-attack cmla2 --out {tmp_path}/run --device cpu".split()
    ) in (0, None)  # fmt: skip
    assert main(f"attack {tmp_path}/run --attacks cmla2 --images 3 --out {tmp_path}/report".split()) in (0, None)
    assert (tmp_path / "report" / "photos.png").stat().st_size > 0
    assert main(f"report {tmp_path}/run --out {tmp_path}/tables".split()) in (0, None)
    assert main(f"train acmr --data {tmp_path}/pixels.npz --out {tmp_path}/acmr".split()) not in (0, None)
    assert "--adversarial is for hashing methods" in refused(main, tmp_path, capsys)


def refused(main, tmp_path, capsys):
    capsys.readouterr()
    assert main(f"train acmr --data {tmp_path}/pixels.npz --adversarial 3 --out {tmp_path}/acmr".split()) != 0
    return capsys.readouterr().err
