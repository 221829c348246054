"""Masked language models: which files are one, what their tokenizers say, that training them helps."""

import copy
import json

import pytest
import torch

transformers = pytest.importorskip("transformers")

from captions import CAPTIONS, VOCABULARY, config, masked_lm, tokenizer, victim, whole_mlm  # noqa: E402

from cmr_fast.attacks import BertAttack  # noqa: E402
from cmr_fast.data import load_texts  # noqa: E402
from cmr_fast.errors import InputError  # noqa: E402
from cmr_fast.methods.mlm import MLMConfig, train_mlm  # noqa: E402
from cmr_fast.models import hub  # noqa: E402
from cmr_fast.models.mlm import MaskedLM  # noqa: E402
from cmr_fast.models.text import minilm  # noqa: E402


def batch(texts):
    encoded = tokenizer()(list(texts), padding=True, return_tensors="pt")
    return encoded["input_ids"], encoded["attention_mask"].bool()


@pytest.fixture
def folder(tmp_path):
    masked_lm().save(tmp_path / "mlm")
    return tmp_path / "mlm"


def test_logits_are_transformers_own():
    ids, mask = batch(CAPTIONS)
    with torch.no_grad():
        expected = whole_mlm()(input_ids=ids, attention_mask=mask.long()).logits
        model = masked_lm().eval()
        torch.testing.assert_close(model(ids, mask), expected)
        torch.testing.assert_close(model.logits(model.hidden(ids, mask)[mask]), expected[mask])


SMALL = {"vocab_size": len(VOCABULARY), "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4,
         "intermediate_size": 48}  # fmt: skip


@pytest.mark.parametrize("kind", ["DistilBert", "Electra", "Albert", "Roberta", "ModernBert"])
def test_other_architectures(kind, tmp_path):
    torch.manual_seed(0)
    options = dict(SMALL)
    if kind == "DistilBert":
        options = {"vocab_size": len(VOCABULARY), "dim": 32, "n_layers": 1, "n_heads": 4, "hidden_dim": 48}
    if kind in ("Electra", "Albert"):
        options["embedding_size"] = 16
    if kind == "ModernBert":
        options |= {"pad_token_id": 0, "cls_token_id": 2, "sep_token_id": 3, "bos_token_id": 2, "eos_token_id": 3}
    if kind == "Roberta":
        options |= {"pad_token_id": 0, "max_position_embeddings": 66}
    network = getattr(transformers, f"{kind}ForMaskedLM")(getattr(transformers, f"{kind}Config")(**options)).eval()
    ids, mask = batch(CAPTIONS)
    with torch.no_grad():
        expected = network(input_ids=ids, attention_mask=mask.long()).logits
        model = MaskedLM(network, tokenizer()).eval()
        torch.testing.assert_close(model(ids, mask)[mask], expected[mask])
        model.save(tmp_path / "mlm")
        again = MaskedLM.load(tmp_path / "mlm")
        torch.testing.assert_close(again(ids, mask)[mask], expected[mask])
    assert again.context == 64


def test_pieces_that_mark_where_a_word_begins(tmp_path):
    from tokenizers import ByteLevelBPETokenizer

    torch.manual_seed(0)
    trained = ByteLevelBPETokenizer()
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    trained.train_from_iterator(CAPTIONS * 4, vocab_size=330, special_tokens=special, show_progress=False)
    trained.save_model(str(tmp_path))
    bpe = transformers.RobertaTokenizerFast.from_pretrained(str(tmp_path), model_max_length=64)
    options = SMALL | {"vocab_size": len(bpe), "max_position_embeddings": 66}
    model = MaskedLM(transformers.RobertaForMaskedLM(transformers.RobertaConfig(**options)), bpe).eval()
    (dog,), (rest,) = model.pieces(["dog"]), model.pieces(["zzz"])
    assert model.word(dog) == "dog" and model.word(rest[-1:]) is None and model.word(rest) == "zzz"
    changed, info = BertAttack(victim(), model, threshold=0.0, k=100)(CAPTIONS, return_info=True)
    assert sum(a != b for a, b in zip(CAPTIONS, changed, strict=True)) > 3
    after = [change.after for changes in info.changes for change in changes]
    assert all(word.isalnum() for word in after), after


def test_saved_and_loaded(folder):
    assert (folder / "model.safetensors").is_file() and not list(folder.parent.glob(".*"))
    ids, mask = batch(CAPTIONS)
    with torch.no_grad():
        again = MaskedLM.load(folder, torch.float64)
        torch.testing.assert_close(again(ids, mask), masked_lm().eval()(ids, mask))
        own = transformers.AutoModelForMaskedLM.from_pretrained(folder, dtype=torch.float64)
        torch.testing.assert_close(own(input_ids=ids, attention_mask=mask.long()).logits, again(ids, mask))
    assert not again.training and again.pieces(["snowboarder"]) == masked_lm().pieces(["snowboarder"])


def test_an_encoder_without_a_head_is_refused_and_gets_one(tmp_path):
    transformers.BertModel(config()).save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"lacks cls\.predictions.* cmr-fast train mlm --base"):
        MaskedLM.load(tmp_path)
    one, two = (MaskedLM.on_encoder(tmp_path, seed=3) for _ in range(2))
    assert one.decoder.weight is one.network.get_input_embeddings().weight
    ids, mask = batch(CAPTIONS[:2])
    with torch.no_grad():
        assert torch.equal(one(ids, mask), two(ids, mask))


def test_a_tokenizer_of_another_model_is_refused(folder):
    small = transformers.BertConfig(vocab_size=len(VOCABULARY) - 7, hidden_size=32, num_hidden_layers=1,
                                    num_attention_heads=4, intermediate_size=32)  # fmt: skip
    transformers.BertForMaskedLM(small).save_pretrained(folder)
    with pytest.raises(InputError, match="do not belong together"):
        MaskedLM.load(folder)


def test_a_folder_with_vocab_txt_alone(tmp_path):
    whole_mlm().save_pretrained(tmp_path)
    (tmp_path / "vocab.txt").write_text("\n".join(VOCABULARY) + "\n")
    assert MaskedLM.load(tmp_path).pieces(["dogs", "x9", ""]) == masked_lm().pieces(["dogs", "x9", ""])


def test_padding_and_truncation_of_the_tokenizers_file_do_not_reach_the_pieces(folder):
    file = folder / "tokenizer.json"
    stored = json.loads(file.read_text())
    stored["padding"] = {"strategy": {"Fixed": 32}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0,
                         "pad_type_id": 0, "pad_token": "[PAD]"}  # fmt: skip
    stored["truncation"] = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    file.write_text(json.dumps(stored))
    words = ["dogs", "abcdefgh"]
    assert MaskedLM.load(folder).pieces(words) == masked_lm().pieces(words) and len(masked_lm().pieces(words)[1]) == 8


@pytest.mark.parametrize("broken", ["missing", "empty", "cut"])
def test_no_masked_lm(folder, broken, monkeypatch):
    if broken == "missing":
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        folder = folder / "not-there"
    elif broken == "empty":
        for file in folder.iterdir():
            file.unlink()
    else:
        weights = folder / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(InputError, match=str(folder)):
        MaskedLM.load(folder)


def test_a_hub_out_of_reach_is_asked_once_and_not_for_a_folder(folder, monkeypatch):
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub.urllib.request, "getproxies", dict)
    asked = []

    def unreachable(address, timeout):
        asked.append(address)
        raise OSError("no route to host")

    monkeypatch.setattr(hub.socket, "create_connection", unreachable)
    MaskedLM.load(folder)
    assert not asked
    with pytest.raises(InputError, match=r"nobody/nothing: no such folder, nor a name to load .* `cmr-fast train mlm`"):
        MaskedLM.load("nobody/nothing")
    assert len(asked) == 1 and constants.HF_HUB_OFFLINE is False
    with hub.hub_for("nobody/nothing"):
        assert constants.HF_HUB_OFFLINE is True
    monkeypatch.setattr(hub.urllib.request, "getproxies", lambda: {"https": "http://proxy:1"})
    with hub.hub_for("nobody/nothing"):
        assert constants.HF_HUB_OFFLINE is False
    assert len(asked) == 2


@pytest.mark.parametrize(
    ("endpoint", "proxies", "place"),
    [
        ("https://hub.local", {}, ("hub.local", 443)),
        ("http://hub.local", {}, ("hub.local", 80)),
        ("http://hub.local:8080", {"https": "http://proxy:1"}, ("hub.local", 8080)),
        ("https://hub.local", {"all": "socks5://proxy:1"}, None),  # for the proxy to say
    ],
)
def test_the_hub_is_asked_where_it_is(monkeypatch, endpoint, proxies, place):
    asked = []

    def connect(address, timeout):
        asked.append(address)
        raise OSError

    monkeypatch.setattr(hub.socket, "create_connection", connect)
    monkeypatch.setattr(hub.urllib.request, "getproxies", lambda: proxies)
    monkeypatch.setattr(hub.urllib.request, "proxy_bypass", lambda _: False)
    assert hub.reached(endpoint) is (place is None)
    assert asked == ([] if place is None else [place])


def test_threads_out_of_the_hubs_reach_leave_it_as_they_found_it(monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "reached", lambda _: False)
    first, second = hub._offline(constants), hub._offline(constants)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert constants.HF_HUB_OFFLINE is True  # the second is still inside
    second.__exit__(None, None, None)
    assert constants.HF_HUB_OFFLINE is False


def test_a_tokenizer_of_far_fewer_pieces_than_the_weights_is_refused(folder):
    config = transformers.BertConfig(
        vocab_size=2 * len(VOCABULARY), hidden_size=32, num_hidden_layers=1, num_attention_heads=1, intermediate_size=32
    )
    transformers.BertForMaskedLM(config).save_pretrained(folder)
    with pytest.raises(InputError, match=r"pieces .* embeddings: they do not belong together"):
        MaskedLM.load(folder)


def test_pieces_and_words():
    model = masked_lm()
    (pieces,) = model.pieces(["snowboarders"])
    assert model.word(pieces) == model.text(pieces) == "snowboarders"
    assert model.word(pieces[1:]) is None and model.text(pieces[1:]).startswith("##")
    assert model.word([tokenizer().sep_token_id]) is None


def test_training_lowers_the_loss_and_keeps_the_random_state():
    state = torch.get_rng_state()
    model = MaskedLM.scratch(CAPTIONS * 4, vocabulary=200, width=32, layers=1)
    before, after = train_mlm(model, CAPTIONS * 4, MLMConfig(steps=40, batch=8, lr=3e-3), valid=CAPTIONS)
    assert after.loss < before.loss - 0.5 and after.pieces == before.pieces >= len(CAPTIONS)
    assert not model.training and torch.equal(torch.get_rng_state(), state)
    with pytest.raises(InputError, match="none with a word"):
        train_mlm(model, ["", "  "])


def test_training_repeats():
    losses = []
    for model in (copy.deepcopy(masked_lm()), copy.deepcopy(masked_lm())):
        losses.append(train_mlm(model, CAPTIONS, MLMConfig(steps=3, batch=4), valid=CAPTIONS)[1].loss)
    assert losses[0] == losses[1]


def test_texts(tmp_path):
    sentences = [{"raw": " a dog runs "}, {"raw": ""}]
    images = [{"filename": f"{s}.jpg", "split": s, "sentences": sentences} for s in ("train", "restval", "val")]
    (tmp_path / "dataset_x.json").write_text(json.dumps({"images": images}))
    assert load_texts(tmp_path) == ["a dog runs"] * 2 and load_texts(tmp_path, "val") == ["a dog runs"]
    (tmp_path / "captions.txt").write_text("one\n\ntwo \n")
    assert load_texts(tmp_path / "captions.txt") == ["one", "two"] and not load_texts(tmp_path / "captions.txt", "val")
    (tmp_path / "dataset_x.json").write_text("[1]")
    with pytest.raises(InputError, match="expected images with filename"):
        load_texts(tmp_path)
    (tmp_path / "table.csv").write_text("path,caption\na.jpg,one\na.jpg,two\n")
    (tmp_path / "tokens.txt").write_text("a.jpg#0\tone\na.jpg#1\ttwo\n")
    assert load_texts(tmp_path / "table.csv") == load_texts(tmp_path / "tokens.txt") == ["one", "two"]
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(InputError, match="no captions"):
        load_texts(tmp_path / "empty.txt")


def test_the_sentence_encoder_of_the_package():
    pytest.importorskip("all_minilm_l6_v2")
    with pytest.raises(InputError, match="no masked language model"):
        MaskedLM.load(minilm())
    model = MaskedLM.on_encoder(minilm())
    assert model.context == 512 and model.pieces(["snowboarder"]) == [[4586, 6277, 2121]]


def test_a_trained_model_gives_candidates(tmp_path):
    model = MaskedLM.scratch(CAPTIONS * 4, vocabulary=200, width=32, layers=1)
    train_mlm(model, CAPTIONS * 4, MLMConfig(steps=20, batch=8, lr=3e-3))
    changed = BertAttack(victim(), model, threshold=0.0)(CAPTIONS)
    assert sum(a != b for a, b in zip(CAPTIONS, changed, strict=True)) > 3
