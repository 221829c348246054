import subprocess
import sys

import numpy as np
import pytest
import torch

from cmr_fast.data import load, shapes
from cmr_fast.errors import InputError
from cmr_fast.methods.baselines import CCA
from cmr_fast.retrieval.metrics import evaluate_embeddings

SMALL = {"train": 60, "query": 20, "database": 40}


def named(caption):
    """The classes that a caption names, by the lexicon alone."""
    said = set(shapes.tokens(caption))
    colours = {name for name, (_, words) in shapes.COLOURS.items() if said & set(words)}
    return colours | {name for name, words in shapes.SHAPES.items() if said & set(words)}


def test_captions_say_what_the_labels_say():
    for pairs in (load("shapes", form="raw").train, load("shapes", form="raw", seed=1, **SMALL).query):
        for captions, row in zip(pairs.text, pairs.labels, strict=True):
            true = {shapes.CLASSES[i] for i in row.nonzero()[:, 0].tolist()}
            assert len(set(captions)) == 5
            assert set.union(*map(named, captions)) == true
            assert any(named(caption) == true for caption in captions)


def test_captions_may_tell_less_than_the_labels():
    pairs = load("shapes", form="raw", **SMALL).train
    assert any(len(named(text[0])) < int(row.sum()) for text, row in zip(pairs.text, pairs.labels, strict=True))


def test_words_name_one_thing():
    words = [word for _, group in shapes.COLOURS.values() for word in group]
    words += [word for group in shapes.SHAPES.values() for word in group]
    assert len(words) == len(set(words))


def test_images_show_the_colours_of_the_labels():
    random = np.random.default_rng(0)
    scenes = shapes.draw(200, random)
    images = shapes.render(scenes, random).astype(float)
    palette = np.array([rgb for rgb, _ in shapes.COLOURS.values()], dtype=float)
    for row in (scenes.number == 1).nonzero()[0]:
        pixels = images[row].reshape(3, -1).T
        vivid = pixels[(pixels.max(axis=1) - pixels.min(axis=1)).argsort()[-6:]].mean(axis=0)
        unit = palette / np.linalg.norm(palette, axis=1, keepdims=True)
        nearest = (unit @ (vivid / np.linalg.norm(vivid))).argsort()[-3:]
        assert scenes.colour[row, 0] in nearest


def test_labels_are_the_scene():
    scenes = shapes.Scenes(
        number=np.array([1, 2]),
        colour=np.array([[2, 7, 7], [0, 0, 5]]),
        shape=np.array([[1, 3, 3], [4, 6, 2]]),
        size=np.zeros((2, 3), dtype=int),
        place=np.zeros((2, 3), dtype=int),
    )
    found = [{shapes.CLASSES[i] for i in row.nonzero()[0]} for row in shapes.labels(scenes)]
    assert found == [{"yellow", "square"}, {"red", "cross", "diamond"}]


def test_raw_and_features_are_the_same_scenes():
    raw, data = load("shapes", form="raw", **SMALL), load("shapes", **SMALL)
    assert raw.train.image.shape == (60, 3, 32, 32)
    assert raw.train.image.dtype == torch.uint8
    assert (data.image_dim, data.text_dim, data.num_classes) == (204, len(shapes.vocabulary()), 16)
    for split in SMALL:
        assert torch.equal(getattr(raw, split).labels, getattr(data, split).labels)
        assert torch.equal(shapes.image_features(getattr(raw, split).image), getattr(data, split).image)
    reference = [caption for captions in raw.train.text for caption in captions]
    again = shapes.bag_of_words([captions[0] for captions in raw.query.text], reference)
    assert torch.equal(again, data.query.text)


def test_every_word_is_in_the_vocabulary():
    raw = load("shapes", form="raw")
    said = {word for captions in raw.train.text for caption in captions for word in shapes.tokens(caption)}
    assert said == set(shapes.vocabulary())


def test_bag_of_words_is_scikit_learns_tf_idf():
    from sklearn.feature_extraction.text import TfidfVectorizer

    raw = load("shapes", form="raw", **SMALL)
    reference = [caption for captions in raw.train.text for caption in captions]
    theirs = TfidfVectorizer(vocabulary=shapes.vocabulary(), token_pattern=r"[a-z]+").fit(reference)
    captions = ["A red, RED box", *(text[0] for text in raw.query.text)]
    expected = theirs.transform(captions).toarray()
    assert np.allclose(shapes.bag_of_words(captions, reference).numpy(), expected, atol=1e-6)
    assert shapes.bag_of_words(["xyzzy"], reference).abs().sum() == 0


DIGEST = """
import hashlib
from cmr_fast.data import load
data = load("shapes", form="raw", train=9, query=9, database=9, seed=5)
digest = hashlib.sha256(data.query.image.numpy().tobytes() + repr(data.query.text).encode()).hexdigest()
"""


def test_a_seed_gives_the_same_data_in_another_process():
    here: dict = {}
    exec(DIGEST, here)
    there = subprocess.run([sys.executable, "-c", DIGEST + "print(digest)"], capture_output=True, check=True, text=True)
    assert there.stdout.strip() == here["digest"]
    assert not torch.equal(load("shapes", **SMALL).train.labels, load("shapes", seed=1, **SMALL).train.labels)


def test_splits_do_not_repeat_each_other_or_depend_on_each_others_size():
    data = load("shapes", form="raw", **SMALL)
    assert torch.equal(load("shapes", form="raw", **SMALL | {"query": 7}).train.image, data.train.image)
    everything = torch.cat([data.train.image, data.query.image, data.database.image]).flatten(1)
    assert len(everything.unique(dim=0)) == 120


def test_learnable_and_not_trivial():
    data = load("shapes", seed=2)
    model = CCA(16, 1e-2).fit(data.train)
    relevant = data.query.labels.float() @ data.database.labels.T.float() > 0
    chance = float(relevant.float().mean())
    for query, other in (("image", "text"), ("text", "image")):
        rows = model.encode(query, getattr(data.query, query)), model.encode(other, getattr(data.database, other))
        found = evaluate_embeddings(*rows, data.query.labels, data.database.labels).map
        assert chance + 0.15 < found < 0.9
    assert chance < 0.55


def test_count_shares_out_all_scenes():
    data = load("shapes", count=100)
    assert [len(data.train), len(data.query), len(data.database)] == [50, 12, 38]


@pytest.mark.parametrize("wrong", [{"form": "pixels"}, {"query": 0}, {"seed": -1}, {"count": 3}])
def test_bad_options(wrong):
    with pytest.raises(InputError):
        load("shapes", **wrong)
