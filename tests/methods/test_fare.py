"""FARE, LEAF and MMCoA: their steps against slow oracles, and what learns."""

import copy

import pytest
import torch
from small import ALPHA, EPS, STEPS
from test_mat import prepared, quiet, slow_image, stepped
from torch.testing import assert_close

from cmr_fast.attacks import BertAttack, CharacterAttack
from cmr_fast.errors import InputError
from cmr_fast.methods import METHODS
from cmr_fast.methods.loop import load_model, train
from cmr_fast.methods.mat import PairBatch
from cmr_fast.models.mlm import MaskedLM
from cmr_fast.ops.pgd import pgd_noise


class Raw(torch.nn.Module):
    """Texts without their normalisation."""

    def __init__(self, dual):
        super().__init__()
        self.dual, self.tokenize = dual, dual.tokenize

    def encode_text(self, ids, mask):
        return self.dual.text_embedding(ids, mask)


def raw_image(dual, x):
    return dual.image_embedding((x - dual.mean.double()) / dual.std.double())


def moved_by_hand(dual, before):
    """Towers that are no longer those that training began with: so that the two are told apart."""
    with torch.no_grad():
        for p in dual.parameters():
            p += 0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()), dtype=p.dtype)
    return before


def slow_fare(model, batch, seed):
    c, dual, before = model.config, copy.deepcopy(model.dual), copy.deepcopy(model._before[0]).double()
    dual.eval()
    torch.manual_seed(seed)
    noise, total, moved = int(torch.randint(2**62, ())), 0, []
    for i, x in enumerate(batch.pixels().double()):
        wanted = raw_image(before, x[None]).detach()
        start = pgd_noise(batch.rows[i : i + 1], x.numel(), seed=noise).to(x.dtype).view_as(x)
        z = (x + EPS * start).clamp(0, 1)
        for _ in range(STEPS):
            z = z.detach().requires_grad_()
            (gradient,) = torch.autograd.grad((raw_image(dual, z[None]) - wanted).square().sum(), z)
            z = torch.minimum(torch.maximum(z + ALPHA * gradient.sign(), x - EPS), x + EPS).clamp(0, 1)
        moved.append(z.detach())
        total = total + (raw_image(dual, z.detach()[None]) - wanted).square().sum()
    return c, dual, total / len(moved), torch.stack(moved), [t for row in batch.text for t in row]


def slow_leaf(model, batch, seed):
    c, dual, before = model.config, copy.deepcopy(model.dual), copy.deepcopy(model._before[0]).double()
    dual.eval()
    torch.manual_seed(seed)
    number, total, texts = int(torch.randint(2**62, ())), 0, [t for row in batch.text for t in row]
    for i, text in enumerate(texts):
        wanted = before.text_embedding(*before.tokenize([text])).detach()
        atk = CharacterAttack(
            Raw(dual), tries=c.tries, seed=number, check=False,
            objective=lambda changed, clean, images, wanted=wanted: (changed - wanted).square().sum(1),
        )  # fmt: skip
        texts[i] = atk([text], index=torch.tensor([i]))[0]
        total = total + (dual.text_embedding(*dual.tokenize([texts[i]])) - wanted).square().sum()
    return c, dual, total / len(texts), batch.pixels().double(), texts


@pytest.mark.parametrize("name", ["fare", "leaf"])
def test_a_step_is_that_of_the_slow_oracle(name, config_of, data):
    changes = {"tries": 6} if name == "leaf" else {}
    model, split = prepared(config_of(name, optimizer="sgd", lr=0.5, **changes), name, data.train)
    moved_by_hand(model.dual, model._before)
    batch = split.select(torch.tensor([3, 11, 0, 7, 20]))
    c, dual, loss, pixels, texts = (slow_fare if name == "fare" else slow_leaf)(model, batch, 5)
    loss.backward()
    parameters = dict(dual.named_parameters())
    side = "image" if name == "fare" else "text"
    with torch.no_grad():
        for key, p in parameters.items():
            if key.startswith((f"{side}_tower", f"{side}_head")) and p.grad is not None:
                p -= c.lr * (p.grad + c.weight_decay * p)
    logged, clean, moved = stepped(model, batch, seed=5)
    assert moved.texts == texts and (texts != clean.texts) == (name == "leaf")
    assert_close(moved.pixels, pixels, atol=1e-9, rtol=0)
    assert_close(logged["loss"], loss.detach(), atol=1e-10, rtol=1e-10)
    for key, value in model.dual.named_parameters():
        assert_close(value, parameters[key], atol=1e-9, rtol=1e-9, msg=key)


@pytest.mark.parametrize("captions", [1, 2])
def test_mmcoa_is_the_slow_oracle(captions, config_of, data, monkeypatch):
    model, split = prepared(config_of("mmcoa", captions=captions), "mmcoa", data.train)
    batch = split.select(torch.tensor([3, 11, 0, 7]))
    c, dual, mlm = model.config, copy.deepcopy(model.dual), MaskedLM.load(model.config.mlm)
    dual.eval()
    texts = [t for row in batch.text for t in row]
    owner = [i for i, row in enumerate(batch.text) for _ in row]

    def divergence(changed, clean, images=None):
        p, q = clean.softmax(1), changed.softmax(1)
        return (p * (p.log() - q.log())).sum(1)

    def attacked(caption):
        return BertAttack(dual, mlm, words=1, k=10, objective=divergence, importance=divergence, check=False)([caption])

    torch.manual_seed(5)
    with torch.no_grad():
        changed = [attacked(text)[0] for text in texts]
        seen = torch.cat([dual.encode_text(*dual.tokenize([text])) for text in texts])
    noise, scale = int(torch.randint(2**62, ())), dual.scale.detach()
    pixels = []
    for i, x in enumerate(batch.pixels().double()):
        own = torch.tensor([o == i for o in owner])
        pixels.append(slow_image(dual, x, int(batch.rows[i]), noise, seen, own, scale, True))
    total = 0
    for images, captioned in ((torch.stack(pixels), texts), (batch.pixels().double(), changed)):
        image = dual.encode_image(images)
        text = torch.cat([dual.encode_text(*dual.tokenize([t])) for t in captioned])
        z = dual.scale * image @ text.T
        same = torch.tensor([[o == i for o in owner] for i in range(4)]).double()
        rows = (same / same.sum(1, keepdim=True) * z.log_softmax(1)).sum(1).mean()
        total = total - (rows + (same / same.sum(0) * z.log_softmax(0)).sum(0).mean()) / 4
    total.backward()
    logged, _, moved = stepped(model, batch, seed=5)
    assert moved.texts == texts + changed and changed != texts
    assert_close(moved.pixels, torch.cat([torch.stack(pixels), batch.pixels().double()]), atol=1e-9, rtol=0)
    assert_close(logged["loss"], total.detach(), atol=1e-10, rtol=1e-10)
    for key, p in dual.named_parameters():
        with torch.no_grad():
            wanted = p if p.grad is None else p - c.lr * (p.grad + c.weight_decay * p)
        assert_close(dict(model.dual.named_parameters())[key], wanted, atol=1e-9, rtol=1e-9, msg=key)


@pytest.mark.parametrize("name", ["fare", "leaf"])
def test_one_tower_learns_and_is_held_to_what_it_said(name, config_of, data, start, tmp_path):
    config = config_of(name, max_steps=12, lr=1e-3)
    run = train(name, config, data, quiet(tmp_path / "run"))
    began, model = load_model(start).dual, load_model(tmp_path / "run")
    moved = {k.split(".")[0] for k, v in model.dual.named_parameters() if not torch.equal(v, began.state_dict()[k])}
    side = "image" if name == "fare" else "text"
    assert moved == {f"{side}_tower", f"{side}_head"}
    losses = [float(row["loss"]) for row in run.history]
    assert losses[-1] < losses[0]
    assert run.results["perturbation"].endswith("(distance from the clean embedding)")
    assert not any("_before" in key for key in model.state_dict())


@pytest.mark.parametrize(("name", "what"), [("fare", "image"), ("leaf", "a caption of image")])
def test_a_loss_that_breaks_names_whose_it_is(name, what, config_of, data):
    model, split = prepared(config_of(name, captions=0, chunk=2), name, data.train)
    batch = split.select(torch.tensor([3, 1, 5]))
    texts = [caption for row in batch.text for caption in row]
    owner = torch.repeat_interleave(torch.tensor([len(row) for row in batch.text]))
    dual, pixels = model.dual, batch.pixels().double()
    with torch.no_grad():
        seen = dual.text_embedding(*dual.tokenize(texts)) if name == "leaf" else raw_image(dual, pixels)
    seen[(owner == 1).nonzero()[0] if name == "leaf" else 1] = torch.nan
    pairs = PairBatch(pixels, texts, owner, batch.labels, seen)
    with pytest.raises(InputError, match=rf"\({what} {int(batch.labels[1])} has a distance that is not finite"):
        model._descend(pairs, lambda loss: None)


def test_leaf_reads_its_dictionary(config_of, data, tmp_path):
    words = tmp_path / "words.txt"
    words.write_text(
        "\n".join(sorted({w for row in data.train.text for t in row for w in t.split()})) + "\ncafé", "utf-8"
    )
    model, split = prepared(config_of("leaf", dictionary=str(words), tries=20), "leaf", data.train)
    _, clean, moved = stepped(model, split.select(torch.arange(6)))
    known = set(words.read_text("utf-8").lower().split())
    for before, after in zip(clean.texts, moved.texts, strict=True):
        assert before == after or len(known & set(after.lower().split())) < len(known & set(before.lower().split()))
    with pytest.raises(InputError, match="expected a text file of words"):  # before the first step
        prepared(config_of("leaf", dictionary=str(tmp_path / "none")), "leaf", data.train)


def test_what_cannot_be_is_refused(config_of):
    for name, changes, words in (
        ("fare", {"optimizer": "adam"}, "optimizer"),
        ("fare", {"eps": 0.0}, "eps and alpha"),
        ("leaf", {"edits": 0}, "edits"),
        ("mmcoa", {"mlm": ""}, "mmcoa attacks captions with words"),
    ):
        with pytest.raises(InputError, match=words):
            config_of(name, **changes)
    assert {"small", "steps2"} <= METHODS["fare"].presets.keys() and "steps2" not in METHODS["leaf"].presets
