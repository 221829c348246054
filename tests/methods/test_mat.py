"""MAT, MAT of images, TeCoA, clean training, MA2T's data: steps against slow oracles, what learns, what is refused."""

import copy
import json
import math
from dataclasses import replace

import pytest
import tiny_towers
import torch
from torch.testing import assert_close

from cmr_fast.attacks import BertAttack
from cmr_fast.cli import main
from cmr_fast.data import EDA, CaptionedDataset, CaptionedImages, RandAugment, load_captions
from cmr_fast.errors import InputError
from cmr_fast.methods import METHODS, ma2t, mat
from cmr_fast.methods.clip import ClipConfig
from cmr_fast.methods.loop import RunConfig, load_model, train
from cmr_fast.methods.mat import Finetune, Mat, MatConfig, MatImg, MatImgConfig, Tecoa
from cmr_fast.models.mlm import MaskedLM
from cmr_fast.ops.pgd import pgd_noise

pytest.importorskip("transformers")
NAMES = ("finetune", "tecoa", "mat-img", "mat")
EPS, ALPHA, STEPS = 8 / 255, 4 / 255, 3


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def data():
    return load_captions("shapes", count=60)


@pytest.fixture(scope="module")
def start(tmp_path_factory, data):
    """A run of clip on two small towers, heads trained."""
    words = sorted({w for row in data.train.text for caption in row for w in caption.lower().split()})
    towers = tiny_towers.towers(tmp_path_factory.mktemp("towers"), words, data.train.pixels())
    config = ClipConfig(
        towers=towers, dim=8, hidden=8, dropout=0.0, epochs=5, head_epochs=5, batch_size=16, head_lr=1e-2, captions=0
    )
    return train("clip", config, data, RunConfig(out=tmp_path_factory.mktemp("runs") / "clip", quiet=True)).path


@pytest.fixture(scope="module")
def mlm(tmp_path_factory, data):
    """A masked language model with random weights."""
    folder = tmp_path_factory.mktemp("mlm")
    MaskedLM.scratch(data.train.captions()[0], vocabulary=200, width=32, layers=1).save(folder)
    return str(folder)


@pytest.fixture(scope="module")
def config_of(start, mlm):
    def make(name, **changes):
        kind = METHODS[name]
        settings = {"start": str(start), "max_steps": 8, "batch_size": 12, "lr": 1e-2}
        if issubclass(kind, MatImg):
            settings |= {"eps": EPS, "alpha": ALPHA, "steps": STEPS}
        return kind.completed(kind.Config(**settings | ({"mlm": mlm} if name == "mat" else {}) | changes))

    return make


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
        seen.append((pairs, attacked(pairs, rows)[0]))
        return seen[0][1], {}

    model.attacked = recorded
    return model.step(batch, model.optimizers(), lambda loss: loss.backward(), progress), *seen[0]


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
