"""Prompts, what is read of a model's answer, and small random models that are asked until they have said enough."""

import pytest
import tiny_generators
import torch

from cmr_fast.errors import InputError
from cmr_fast.models import generate
from cmr_fast.models.generate import Captioner, Painter, Rewriter, Sampling, as_pictures, rewrite_prompt, rewritings

pytest.importorskip("transformers")
WORDS = ["a", "dog", "cat", "runs", "on", "grass", "red", "circle", "blue"]
OTHERS = [[f"{name} {n}" for n in range(1, 7)] for name in ("one", "two", "three")]
SHORT = Sampling(new_tokens=30)


def test_the_prompt_is_the_papers():
    assert rewrite_prompt("a dog runs", OTHERS[:2]) == (
        "Rewrite image captions in 4 different ways.\n\n"
        "one 1\n=> one 2\n=> one 3\n=> one 4\n=> one 5\n\n"
        "two 1\n=> two 2\n=> two 3\n=> two 4\n=> two 5\n\n"
        "a dog runs\n=>"
    )
    assert "in 2 different ways" in rewrite_prompt("x", OTHERS, 2) and "one 4" not in rewrite_prompt("x", OTHERS, 2)


@pytest.mark.parametrize(
    ("continuation", "texts"),
    [
        (" a dog\n=> the  dog\n=> one dog\n\nanother caption\n=> x", ["a dog", "the dog", "one dog"]),
        ("a dog => the dog =>", ["a dog", "the dog"]),
        ("\n\n", []),
        ("=> a dog\n \n=> b", ["a dog"]),
    ],
)
def test_what_a_model_answers_is_read_line_by_line(continuation, texts):
    assert rewritings(continuation) == texts


def test_a_model_is_asked_again_for_what_is_missing():
    asked = []

    def ask(rows, again):
        asked.append((list(rows), again))
        return [["Red", "a", "A", "b", "c"] if row == 0 else ["d"] * (again > 1) for row in rows]

    assert generate._enough(["red", "x", "y"], ask, 2) == [["a", "b"], ["d"], ["d"]]
    assert asked == [([0, 1, 2], 0)] + [([1, 2], n) for n in range(1, generate.TRIES)]


@pytest.mark.parametrize("kind", ["causal", "seq2seq"])
def test_rewritings_of_a_small_model(kind, tmp_path):
    model = Rewriter(str(getattr(tiny_generators, kind)(tmp_path, WORDS)), SHORT)
    seen = []

    def examples(row, again):
        seen.append((row, again))
        return OTHERS

    torch.manual_seed(3)
    made = model(["a dog", "a cat runs"], examples, 2)
    torch.manual_seed(3)
    assert model(["a dog", "a cat runs"], examples, 2) == made and seen[:2] == [(0, 0), (1, 0)]
    known = {*WORDS, *tiny_generators.PROMPTS}
    for texts in made:
        assert len(set(texts)) == 2 and all(text.split() and set(text.split()) <= known for text in texts)
        assert not any("[" in text or "\n" in text or "=>" in text for text in texts)


def test_more_than_four_rewritings_take_more_prompts(tmp_path, monkeypatch):
    model = Rewriter(str(tiny_generators.causal(tmp_path, WORDS)), SHORT)
    asked = []

    def answered(self, prompts):
        asked.append(prompts)
        return [f"{len(asked)} a => {len(asked)} b"] * len(prompts)

    monkeypatch.setattr(Rewriter, "_continued", answered)
    (made,) = model(["a dog"], lambda row, again: OTHERS, 9)
    assert made == [f"{n} {x}" for n in range(1, 6) for x in "ab"][:9]
    assert all(prompt.startswith("Rewrite image captions in 4 different ways.") for (prompt,) in asked)


def test_what_has_no_words_is_no_rewriting(tmp_path, monkeypatch):
    model = Rewriter(str(tiny_generators.causal(tmp_path, WORDS)), SHORT)
    monkeypatch.setattr(Rewriter, "_continued", lambda self, prompts: ["... => a cat => - => 狗"] * len(prompts))
    assert model(["a dog"], lambda row, again: OTHERS, 2) == [["a cat", "狗"]]


def test_a_prompt_longer_than_the_context_is_refused(tmp_path):
    model = Rewriter(str(tiny_generators.causal(tmp_path, WORDS, context=40)), SHORT)
    with pytest.raises(InputError, match=r"the prompt takes \d+ tokens and 30 are to follow .*a context of 40"):
        model(["a dog"], lambda row, again: OTHERS)


@pytest.mark.parametrize(
    ("kind", "prompt"),
    [("asked_captioner", None), ("asked_captioner", ""), ("captioner", ""), ("chat_captioner", None)],
)
def test_captions_of_a_small_model(kind, prompt, tmp_path):
    prompt = generate.CAPTION_PROMPT if prompt is None else prompt
    model = Captioner(str(getattr(tiny_generators, kind)(tmp_path, WORDS)), prompt, Sampling(new_tokens=10))
    pictures = as_pictures(torch.randint(256, (3, 3, 40, 40), generator=torch.manual_seed(0)).byte())
    torch.manual_seed(1)
    made = model(pictures, 2)
    torch.manual_seed(1)
    assert model(pictures, 2) == made and len(made) == 3
    for texts in made:
        assert len({t.casefold() for t in texts}) == 2
        assert not any(text.startswith("what does the image") or "[" in text for text in texts)


def test_a_captioner_that_reads_no_prompt_is_not_given_one(tmp_path):
    with pytest.raises(InputError, match="reads no prompt, expected prompt ''; got 'what does"):
        Captioner(str(tiny_generators.captioner(tmp_path, WORDS)))


def test_a_picture_depends_on_its_caption_and_seed(tmp_path):
    model = Painter(str(tiny_generators.painter(tmp_path)), steps=2, size=32)
    one, two, other = (picture.tobytes() for picture in model(["a dog"] * 3, [1, 1, 2]))
    assert one == two != other and len(one) == 32 * 32 * 3


@pytest.mark.parametrize("kind", [Rewriter, Captioner, Painter])
def test_models_that_are_not_there_are_refused_once(kind, tmp_path, monkeypatch):
    pytest.importorskip("diffusers" if kind is Painter else "transformers")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    for name in (str(tmp_path), "nobody/nothing"):
        with pytest.raises(InputError, match=r"expected a folder, or a name where the hub can be reached"):
            kind(name)


def test_images_without_diffusers_say_how_to_get_it(monkeypatch):
    monkeypatch.setattr(generate.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r'not installed: pip install "cmr-fast\[diffusion\]"'):
        Painter("x")


@pytest.mark.parametrize("settings", [{"temperature": 0}, {"top_p": 1.1}, {"new_tokens": 0}])
def test_sampling_out_of_range(settings):
    with pytest.raises(InputError, match="temperature must be above 0, top_p above 0"):
        Sampling(**settings)
