"""MAT, MAT of images, TeCoA, clean training, MA2T's data: steps against slow oracles, what learns, what is refused."""

import copy
import json
import math
from dataclasses import replace

import pytest
import torch
from small import ACMR_SMALL, ALPHA, EPS, STEPS, small_dataset
from torch.testing import assert_close

from cmr_fast.attacks import BertAttack
from cmr_fast.cli import main
from cmr_fast.data import EDA, RandAugment
from cmr_fast.errors import InputError
from cmr_fast.methods import METHODS, ma2t
from cmr_fast.methods.loop import RunConfig, load_model, train
from cmr_fast.methods.mat import Finetune, Mat, MatImg, Tecoa
from cmr_fast.models.mlm import MaskedLM
from cmr_fast.ops.info_nce import info_nce
from cmr_fast.ops.pgd import pgd_noise

pytest.importorskip("transformers")
NAMES = ("finetune", "tecoa", "mat-img", "mat")


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


def quiet(out, **settings):
    return RunConfig(out=out, quiet=True, checkpoint_seconds=0.0, threads=1, **settings)


def prepared(config, name, split, dtype=torch.float64):
    """A model as the loop has it, without dropout, and the split that its batches are drawn from."""
    model = METHODS[name](config)
    model.fit_inputs(split)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model.to(dtype).train(), model.enlarge(split).to("cpu", dtype)


def stepped(model, batch, seed=0, progress=0.0):
    """One step; returns its log and what it was trained on."""
    torch.manual_seed(seed)
    seen = []
    attacked = model.attacked

    def recorded(pairs, rows=None):
        seen[:] = pairs, attacked(pairs, rows)[0]
        return seen[1], {}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model, "attacked", recorded)
        return model.step(batch, model.optimizers(), lambda loss: loss.backward(), progress), *seen


# ---- the oracle: one image, one caption, one step at a time


def slow_text(dual, mlm, caption):
    """Eq. 4 with one word: the attack on this caption alone, its objective written out."""

    def distance(changed, clean, images=None):
        return torch.stack([(a - b).pow(2).sum().sqrt() for a, b in zip(changed, clean, strict=True)])

    return BertAttack(dual, mlm, words=1, k=10, objective=distance, importance=distance, check=False)([caption])[0]


def slow_image(dual, x, row, seed, texts, own, scale, infonce):
    """PGD on one image (3, H, W): `own` says which of the texts (M, d) are its."""
    noise = pgd_noise(torch.tensor([row]), x.numel(), seed=seed).to(x.dtype).view_as(x)
    moved = (x + EPS * noise).clamp(0, 1)
    for _ in range(STEPS):
        moved = moved.detach().requires_grad_()
        cosines = texts @ dual.encode_image(moved[None])[0]
        loss = -cosines[own].mean()
        if infonce:
            loss = -(scale * cosines).log_softmax(0)[own].mean()
        (gradient,) = torch.autograd.grad(loss, moved)
        moved = torch.minimum(torch.maximum(moved + ALPHA * gradient.sign(), x - EPS), x + EPS).clamp(0, 1)
    return moved.detach()


def slow_step(model, batch, seed):
    """The parameters after one step of SGD from the first lr, by name."""
    c, dual = model.config, copy.deepcopy(model.dual)
    texts = [caption for row in batch.text for caption in row]
    owner = [i for i, row in enumerate(batch.text) for _ in row]
    ids = batch.labels.tolist()
    dual.eval()
    mlm = MaskedLM.load(c.mlm) if isinstance(model, Mat) else None
    torch.manual_seed(seed)
    with torch.no_grad():
        if mlm is not None:
            texts = [slow_text(dual, mlm, text) for text in texts]
        seen = torch.cat([dual.encode_text(*dual.tokenize([text])) for text in texts])
        scale = dual.scale.clone()
    pixels = list(batch.pixels().double())
    if isinstance(model, MatImg):
        noise = int(torch.randint(2**62, ()))
        infonce = c.away == "infonce"
        for i, x in enumerate(pixels):
            own = torch.tensor([ids[o] == ids[i] if infonce else o == i for o in owner])
            pixels[i] = slow_image(dual, x, int(batch.rows[i]), noise, seen, own, scale, infonce)
    image = torch.cat([dual.encode_image(x[None]) for x in pixels])
    text = torch.cat([dual.encode_text(*dual.tokenize([text])) for text in texts])
    if isinstance(model, Tecoa):
        text = text.detach()
    z = dual.scale * image @ text.T
    same = torch.tensor([[a == ids[o] for o in owner] for a in ids]).double()
    loss = -(same / same.sum(1, keepdim=True) * z.log_softmax(1)).sum(1).mean()
    if not isinstance(model, Tecoa):
        loss = (loss - (same / same.sum(0) * z.log_softmax(0)).sum(0).mean()) / 2
    loss.backward()
    learns = ("image_tower", "image_head") if isinstance(model, Tecoa) else ("",)
    with torch.no_grad():
        for name, p in dual.named_parameters():
            if p.grad is not None and name.startswith(learns):
                p -= c.lr * (p.grad + c.weight_decay * p)
    return loss.detach(), dict(dual.named_parameters()), pixels, texts


@pytest.mark.parametrize("captions", [1, 2])
@pytest.mark.parametrize("name", NAMES)
def test_a_step_is_that_of_the_slow_oracle(name, captions, config_of, data):
    model, split = prepared(config_of(name, captions=captions), name, data.train)
    batch = split.select(torch.tensor([3, 11, 0, 7, 20]))
    loss, parameters, pixels, texts = slow_step(model, batch, seed=5)
    logged, clean, moved = stepped(model, batch, seed=5)
    assert moved.texts == texts and (texts != clean.texts) == (name == "mat")
    assert_close(moved.pixels, torch.stack(pixels), atol=1e-9, rtol=0)
    assert_close(logged["loss"], loss, atol=1e-10, rtol=1e-10)
    for key, value in model.dual.named_parameters():
        assert_close(value, parameters[key], atol=1e-9, rtol=1e-9, msg=key)
    assert model.training and all(p.requires_grad for p in model.dual.text_tower.parameters())


# ---- what learns, and within which bounds


@pytest.mark.parametrize("chunk", [0, 5])
@pytest.mark.parametrize("name", ["tecoa", "mat-img", "mat"])
def test_images_stay_in_the_ball_and_the_box(name, chunk, config_of, data):
    model, split = prepared(config_of(name, chunk=chunk, eps=2 / 255, alpha=1 / 255), name, data.train, torch.float32)
    with torch.autocast("cpu", torch.bfloat16, enabled=chunk > 0):
        logged, clean, moved = stepped(model, split.select(torch.arange(12)))
    delta = (moved.pixels.double() - clean.pixels.double()).abs()
    assert 1.5 / 255 < delta.max() <= 2 / 255 and moved.pixels.min() >= 0 and moved.pixels.max() <= 1
    assert (delta.flatten(1).amax(1) > 0).all() and logged["loss"].isfinite()


@pytest.mark.parametrize("name", NAMES)
def test_tecoa_leaves_all_but_the_image_tower_as_it_was(name, config_of, data, start):
    model, split = prepared(config_of(name), name, data.train, torch.float32)
    before = {key: value.clone() for key, value in model.dual.named_parameters()}
    optimizers = model.optimizers()
    for step in range(2):
        rows = torch.arange(12) + 12 * step
        model.step(split.select(rows), optimizers, lambda loss: loss.backward(), step / 8)
    moved = {key for key, value in model.dual.named_parameters() if not torch.equal(value, before[key])}
    parts = {key.split(".")[0] for key in moved}
    everything = {"image_tower", "image_head", "text_tower", "text_head", "log_scale"}
    assert parts == ({"image_tower", "image_head"} if name == "tecoa" else everything)
    assert all(p.requires_grad for p in model.dual.parameters()) and model.training
    assert load_model(start).dual.text_tower.width == model.dual.text_tower.width


def test_the_rate_falls_from_lr_to_nothing(config_of, data):
    model, split = prepared(config_of("finetune"), "finetune", data.train, torch.float32)
    optimizers = model.optimizers()
    for progress, rate in ((0.0, 1e-2), (0.5, 5e-3), (7 / 8, 1e-2 * (1 + math.cos(math.pi * 7 / 8)) / 2)):
        model.step(split.select(torch.arange(4)), optimizers, lambda loss: loss.backward(), progress)
        assert optimizers["all"].param_groups[0]["lr"] == pytest.approx(rate)


# ---- parts of a batch


def gradients(model, batch, **settings):
    model.config = replace(model.config, **settings)
    model.zero_grad()
    logged = stepped(model, batch, seed=1)[0]
    return logged["loss"], {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("chunk", [1, 5, 64])
@pytest.mark.parametrize("name", ["tecoa", "mat", "mmcoa", "fare", "leaf"])
def test_parts_have_the_whole_batchs_loss_and_gradient(name, chunk, config_of, data):
    model, split = prepared(config_of(name, captions=2, lr=0.0), name, data.train)
    batch = split.select(torch.arange(11))
    loss, whole = gradients(model, batch)
    again, parts = gradients(model, batch, chunk=chunk)
    assert_close(again, loss, atol=1e-12, rtol=0)
    assert whole.keys() == parts.keys()
    for key, value in whole.items():
        assert_close(parts[key], value, atol=1e-10, rtol=1e-8, msg=key)


def test_parts_keep_their_gradient_under_autocast_and_their_dropout(config_of, data):
    """Weights cast without a graph are not reused, and both passes of a part drop the same units."""
    model, split = prepared(config_of("finetune", lr=0.0), "finetune", data.train, torch.float32)
    batch = split.select(torch.arange(8))
    with torch.autocast("cpu", torch.bfloat16):
        whole = gradients(model, batch, chunk=0)[1]
        parts = gradients(model, batch, chunk=8)[1]
    assert whole.keys() == parts.keys()
    for key, value in whole.items():
        assert_close(parts[key], value, atol=2e-2 * float(value.abs().max()) + 1e-6, rtol=0, msg=key)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.3
    model.double()
    batch = batch.to("cpu", torch.float64)
    pairs = stepped(model, batch)[1]
    model.config = replace(model.config, chunk=3)
    model.zero_grad()
    torch.manual_seed(2)
    loss = model._descend(pairs, lambda loss: loss.backward())
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    torch.manual_seed(2)
    image = torch.cat([model.dual.encode_image(part) for part in pairs.pixels.split(3)])
    passes, back = model.text_passes(pairs.texts, model.dual.encode_text)
    text = torch.cat([encode() for encode in passes])[back]
    expected = info_nce(image, text, model.dual.scale, positives=(pairs.ids, pairs.ids[pairs.owner]))
    expected.backward()
    assert_close(loss, expected.detach(), atol=1e-12, rtol=0)
    for key, value in found.items():
        assert_close(value, dict(model.named_parameters())[key].grad, atol=1e-10, rtol=1e-8, msg=key)


# ---- MA2T


def augmented(data, **settings):
    return ma2t.more_pairs(data.train, ma2t.AugmentConfig(**settings), 1)


def test_pairs_with_one_side_augmented_join_the_others(data, tmp_path):
    train = data.train
    count = len(train)
    first = [row[:1] for row in train.text]
    plain = augmented(data)
    assert list(plain.split.text) == first and plain.images_from == len(plain.split) == count
    human = augmented(data, augment_text="human")
    assert [t for (t,) in human.split.text[count:]] == [row[v] for v in range(1, 5) for row in train.text]
    assert human.images_from == len(human.split) == 5 * count
    assert torch.equal(human.split.labels, train.labels.repeat(5)) and list(human.split.text[:count]) == first
    eda = augmented(data, augment_text="eda", augment_count=2)
    expected = EDA(0.3, 2)([row[0] for row in train.text], index=train.labels.tolist())
    assert [t for (t,) in eda.split.text[count:]] == [row[v] for v in range(2) for row in expected]
    texts = {str(label): [f"a {label}", f"b {label}"] for label in range(60)}
    (tmp_path / "texts.json").write_text(json.dumps(texts))
    file = augmented(data, augment_text=str(tmp_path / "texts.json"), augment_count=2)
    assert [t for (t,) in file.split.text[count:]] == [
        texts[str(n)][v] for v in range(2) for n in train.labels.tolist()
    ]


@pytest.mark.parametrize("text", ["none", "human"])
def test_two_augmentations_meet_only_where_they_are_asked_to(data, text):
    train, count = data.train, len(data.train)
    original = {(label, row[0]) for label, row in zip(train.labels.tolist(), train.text, strict=True)}

    def sides(more):
        """For each pair, whether its image and its text are augmented."""
        rows = torch.arange(len(more.split))
        seen = []
        for part in rows.split(100):
            batch = more.split.select(part)
            pixels = more.pixels(batch)
            for i, label in enumerate(batch.labels.tolist()):
                (place,) = (train.labels == label).nonzero()[0].tolist()
                same = torch.equal(pixels[i], train.image[place].float() / 255)
                seen.append((not same, (label, *batch.text[i]) not in original))
        return seen

    apart = sides(augmented(data, augment_text=text, augment_image="randaug"))
    blocks = 5 if text == "none" else 9
    assert len(apart) == blocks * count and not any(image and caption for image, caption in apart)
    assert sum(image for image, _ in apart) > 1.5 * count  # many draws of RandAugment change nothing
    if text == "human":
        assert sum(caption for _, caption in apart) == 4 * count
        both = sides(augmented(data, augment_text=text, augment_image="randaug", augment_both=True))
        assert len(both) == 5 * count and sum(image and caption for image, caption in both) > 1.5 * count


def test_what_is_augmented_depends_on_the_image_alone(data):
    more = augmented(data, augment_image="randaug", augment_count=2)
    rows = torch.tensor([60, 3, 100, 140])
    whole = more.pixels(more.split.select(rows))
    parts = torch.cat([more.pixels(more.split.select(r[None])) for r in rows])
    assert torch.equal(whole, parts)
    number = int(more.split.labels[60]) * 3 + 1
    expected = RandAugment(2, 5)(data.train.image[60 - len(data.train)][None], index=[number])
    assert torch.equal(whole[:1], expected.float() / 255)


# ---- runs


def weights(run):
    return run.model.state_dict()


@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("tecoa", {"augment_image": "randaug", "steps": 1}),
        ("mat", {"augment_text": "human", "steps": 1}),
        ("fare", {"steps": 1}),
        ("leaf", {"tries": 5}),
    ],
)
def test_a_run_that_is_killed_within_a_pass_ends_with_the_same_weights(name, more, config_of, data, tmp_path):
    config, run = config_of(name, max_steps=4, **more), {"round_steps": 2, "valid_fraction": 0.0}
    whole = train(name, config, data, quiet(tmp_path / "whole", **run))
    kind = METHODS[name]
    step, calls = kind.step, []

    def dying(self, *arguments):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return step(self, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kind, "step", dying)
        with pytest.raises(KeyboardInterrupt):
            train(name, config, data, quiet(tmp_path / "run", **run))
    again = train(name, config, data, quiet(tmp_path / "run", resume=True, **run))
    assert len(again.history) == 2 and again.results["best_step"] == 4
    assert all(torch.equal(value, weights(whole)[key]) for key, value in weights(again).items())


def test_a_run_begins_with_the_weights_of_another_and_forgets_where_they_lay(config_of, data, start, tmp_path):
    config = config_of("mat-img", max_steps=1, lr=0.0)
    run = train("mat-img", replace(config, start=str(start)), data, quiet(tmp_path / "run", valid_fraction=0.0))
    theirs = load_model(start).state_dict()
    assert all(torch.equal(value, theirs[key]) for key, value in weights(run).items())
    assert run.results["perturbation"] == "images by PGD, 3 x 4/255 within 8/255 (cosine)"
    assert (config.dim, config.hidden) == (8, 8) and config.towers == load_model(start).config.towers
    moved = tmp_path / "stored"
    (tmp_path / "run").rename(moved)
    stored = json.loads((moved / "config.json").read_text())["config"]
    assert stored["start"] == str(start)
    assert torch.equal(load_model(moved).embed("text", data.test), run.model.embed("text", data.test))


def test_the_last_weights_are_kept_whatever_validation_says(config_of, data, tmp_path, monkeypatch):
    scores = iter((9.0, 5.0, 7.0))
    monkeypatch.setattr(Finetune, "validate", lambda self, valid: dict.fromkeys(self.monitor, next(scores)))
    run = train(
        "finetune", config_of("finetune", max_steps=6), data, quiet(tmp_path / "run", round_steps=2, patience=1)
    )
    assert (run.results["best_epoch"], run.results["best_step"], run.results["valid_rsum"]) == (3, 6, 7.0)
    more = {"refit": True, "round_steps": 2, "eval_every": 9}
    scores = iter((9.0, 8.0))
    refit = train("finetune", config_of("finetune", max_steps=3), data, quiet(tmp_path / "refit", **more))
    assert refit.results["best_step"] == 3 and len(refit.history) == 2


def test_a_loss_that_breaks_names_its_step_and_the_checkpoint_before_it_is_kept(config_of, data, tmp_path):
    config, run = config_of("mat-img", max_steps=4, steps=1), {"round_steps": 1, "valid_fraction": 0.0}
    whole = train("mat-img", config, data, quiet(tmp_path / "whole", **run))
    encode, calls = MatImg._descend, []

    def breaking(self, pairs, backward):
        calls.append(1)
        if len(calls) == 3:
            pairs = replace(pairs, pixels=pairs.pixels.index_fill(0, torch.tensor([2]), math.nan))
        return encode(self, pairs, backward)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MatImg, "_descend", breaking)
        with pytest.raises(InputError, match=r"step 3 of 4: the loss is nan \(image \d+ has an embedding"):
            train("mat-img", config, data, quiet(tmp_path / "run", **run))
    assert len((tmp_path / "run" / "metrics.csv").read_text().splitlines()) == 3
    again = train("mat-img", config, data, quiet(tmp_path / "run", resume=True, **run))
    assert all(torch.equal(value, weights(whole)[key]) for key, value in weights(again).items())
    with pytest.raises(InputError, match=r"step 2 of 4: "):
        train("mat-img", replace(config, lr=1e30), data, quiet(tmp_path / "wild", **run))
    with pytest.raises(InputError, match=r"mat-img: validation after epoch 1: .*finite.* lower the learning rate"):
        train("mat-img", replace(config, lr=1e30), data, quiet(tmp_path / "valid", round_steps=1, valid_fraction=0.5))


@pytest.mark.parametrize("name", ["tecoa", "mat", "mmcoa", "fare", "leaf"])
def test_mixed_precision(name, config_of, data, tmp_path):
    run = train(name, config_of(name, max_steps=1), data, quiet(tmp_path / "run", precision="bf16-mixed"))
    assert math.isfinite(run.history[0]["loss"]) and all(p.dtype == torch.float32 for p in run.model.parameters())


# ---- what is refused


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("mat", {"mlm": ""}, "expected mlm, the folder of one that `cmr-fast train mlm` made"),
        ("mat", {"words": 0}, "words must be at least 1"),
        ("tecoa", {"eps": 2.0}, "eps and alpha are of pixels from 0 to 1"),
        ("tecoa", {"away": "kl"}, "away must be one of infonce, cosine"),
        ("finetune", {"momentum": 1.0}, "momentum must be at least 0 and below 1"),
        ("finetune", {"chunk": -1}, "chunk must be at least 0"),
        ("finetune", {"dim": 9}, "dim is 8 in .*, which this begins with; got 9"),
        ("finetune", {"augment_text": "rewrite"}, "augment_text must be none, eda, human or a .json file"),
        ("finetune", {"augment_image": "randaug", "augment_level": 6}, "augment_level must be 0 to 5"),
        ("finetune", {"augment_level": 1}, "is for augment_image randaug; got 1 and none"),
        ("finetune", {"augment_select": "best"}, "augment_select must be one of first, top, random"),
        ("finetune", {"augment_text": "human", "augment_select": "top"}, "expected augment_reference RUN with it"),
        ("finetune", {"augment_text": "human", "augment_reference": "/run"}, "and with it alone; got first"),
        ("finetune", {"augment_text": "eda", "augment_select": "random"}, "candidates that are there"),
        ("finetune", {"augment_text": "eda", "augment_both": True}, "expected both augment_text and augment_image"),
        ("finetune", {"augment_text": "human", "wordnet": "/here"}, "wordnet is for augment_text eda"),
    ],
)
def test_settings_out_of_range(name, settings, message, config_of):
    with pytest.raises(InputError, match=message):
        config_of(name, **settings)


def test_augmentations_that_the_data_do_not_have_are_refused(data, tmp_path):
    with pytest.raises(InputError, match=r"needs 7 captions of every image \(augment_count is 6\): 48 of 48"):
        augmented(data, augment_text="human", augment_count=6)
    with pytest.raises(InputError, match="expected captions 1, got 0"):
        ma2t.more_pairs(data.train, ma2t.AugmentConfig(augment_text="human"), 0)
    file = tmp_path / "texts.json"
    for stored, message in (
        ({"17.jpg": ["a"] * 4}, "names 1 of 1 images that are not in the data set, '17.jpg' first"),
        ({"0": ["a"] * 4}, r"expected 4 texts for each training image \(augment_count\): 4\d of 48 have fewer"),
        ({"0": "a"}, "expected an object of image names, each with a list of texts that have words"),
        ({"0": ["a", " "]}, "each with a list of texts that have words"),
        ({"0": ["a", "..."]}, "each with a list of texts that have words"),
    ):
        file.write_text(json.dumps(stored))
        with pytest.raises(InputError, match=message):
            augmented(data, augment_text=str(file))
    file.write_text("{")
    with pytest.raises(InputError, match="cannot be read as JSON"):
        augmented(data, augment_text=str(file))
    with pytest.raises(InputError, match=r"lacks index\.noun"):
        augmented(data, augment_text="eda", wordnet=str(tmp_path))


def test_a_part_that_must_learn_and_is_frozen_is_refused(config_of, data):
    for name, part in (("tecoa", "image"), ("mat", "text"), ("mat-img", "image")):
        model = METHODS[name](config_of(name))
        getattr(model.dual, f"{part}_tower").requires_grad_(False)
        with pytest.raises(InputError, match=f"{name} trains the {part} tower, all of which is frozen"):
            model.optimizers()
    with pytest.raises(InputError, match="blocks to freeze, got 99"):
        Finetune(config_of("finetune", frozen_blocks=99))


def test_only_runs_on_captions_can_be_begun_with(config_of, tmp_path):
    other = train("acmr", ACMR_SMALL, small_dataset(), quiet(tmp_path / "other"))
    with pytest.raises(InputError, match="a run of acmr, expected one on captions"):
        config_of("finetune", start=str(other.path))
    with pytest.raises(InputError, match="no such file"):
        config_of("finetune", start=str(tmp_path / "nothing"))


def test_what_goes_wrong_without_an_error_is_said(config_of, start):
    model = MatImg(config_of("mat-img", augment_text="human", augment_image="randaug", augment_both=True))
    assert "the paper found that it degrades the model" in model.trouble([])
    assert MatImg(config_of("mat-img")).trouble([]) is None
    towers = load_model(start).config.towers
    assert "began at random" in Finetune(config_of("finetune", start="", towers=towers)).trouble([])


def test_a_model_of_open_clip_is_trained_in_its_image_tower_alone(config_of, data, tmp_path):
    open_clip = pytest.importorskip("open_clip")
    text = {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
    vision = {"image_size": 32, "layers": 1, "width": 64, "patch_size": 16}
    (tmp_path / "small.json").write_text(json.dumps({"embed_dim": 8, "vision_cfg": vision, "text_cfg": text}))
    open_clip.add_model_config(tmp_path / "small.json")
    config = config_of("tecoa", start="", towers="open_clip/small", max_steps=1, chunk=5)
    model, split = prepared(config, "tecoa", data.train, torch.float32)
    before = {key: value.clone() for key, value in model.dual.named_parameters()}
    model.step(split.select(torch.arange(12)), model.optimizers(), lambda loss: loss.backward(), 0.0)
    moved = {key for key, value in model.dual.named_parameters() if not torch.equal(value, before[key])}
    assert moved and all(key.startswith("model.visual.") for key in moved)
    assert model.trouble([]) is None
    with pytest.raises(InputError, match="has no blocks to freeze, expected frozen_blocks 0, got 1"):
        Finetune(config_of("finetune", start="", towers="open_clip/small", frozen_blocks=1))


# ---- the commands


def test_the_commands(config_of, start, mlm, tmp_path, capsys):
    run = tmp_path / "run"
    data = ["--data", "shapes", "--options", "count=60"]
    command = ["train", "mat", *data, "--start", str(start), "--mlm", mlm, "--preset", "steps2", "--batch-size", "24"]
    assert main([*command, "--max-steps", "2", "--augment-text", "human", "--out", str(run)]) == 0
    out = capsys.readouterr().out
    assert "BERT-Attack, 1 word (l2), images by PGD, 2 x 1/255 within 2/255 (cosine)" in out
    assert f"cmr-fast attack {run}" in out and "TR R@1" in out
    config = json.loads((run / "config.json").read_text())["config"]
    assert config["dim"] == 8 and config["mlm"] == mlm
    assert main(["attack", str(run), "--attacks", "co-attack", "--mlm", mlm, "--images", "4"]) == 0
    assert "co-attack" in capsys.readouterr().out
    assert main(["report", str(run), "--out", str(tmp_path / "report")]) == 0
    assert (tmp_path / "report" / "index.html").stat().st_size > 0
    capsys.readouterr()
    assert main(["train", "mat", *data, "--start", str(start), "--out", str(tmp_path / "none")]) == 2
    assert "expected mlm, the folder of one" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()
