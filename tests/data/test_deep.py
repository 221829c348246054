"""Features of images with captions by towers: their values, their labels, and what is kept of a stopped run."""

import io
import json

import numpy as np
import pytest
import tiny_towers
import torch
from PIL import Image
from torch.testing import assert_close

from cmr_fast.data import deep, load_captions
from cmr_fast.data.flickr8k import NOUNS
from cmr_fast.errors import InputError
from cmr_fast.models.clip import TwoTowers, dual_encoder
from cmr_fast.models.towers import TorchvisionTower

WORDS = [["A dog", "it runs", "a man and a dog"], ["Snow", "cold", "a boy in the snow"], ["sand", "the sea", "nothing"]]


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    return folder / "cmr_fast"


@pytest.fixture(scope="module")
def shapes():
    return load_captions("shapes", count=40)


@pytest.fixture(scope="module")
def dual(tmp_path_factory, shapes):
    words = {w for row in shapes.train.text for caption in row for w in caption.lower().split()}
    found = sorted(words | {w for row in WORDS for caption in row for w in caption.lower().split()})
    return dual_encoder(tiny_towers.towers(tmp_path_factory.mktemp("towers"), found, shapes.train.pixels()))


@pytest.fixture
def folder(tmp_path):
    """Seven photos of noise: four for training, one for validation, two for test."""
    place, images = tmp_path / "set", []
    (place / "Images").mkdir(parents=True)
    for number, split in enumerate(("train", "train", "train", "train", "val", "test", "test")):
        noise = np.random.default_rng(number).integers(0, 256, (32, 32, 3), dtype=np.uint8)
        file = io.BytesIO()
        Image.fromarray(noise).save(file, "PNG")
        (place / "Images" / f"{number}.png").write_bytes(file.getvalue())
        captions = WORDS[number % 2 if number != 3 else 2]
        images.append({"filename": f"{number}.png", "split": split, "sentences": [{"raw": c} for c in captions]})
    (place / "dataset_seven.json").write_text(json.dumps({"images": images}))
    return place


def test_features_are_what_heads_would_see_and_the_mean_of_captions(dual, shapes):
    pairs = deep.deep_pairs(shapes, dual, "images")
    with torch.no_grad():
        image = dual.image_features(shapes.test.pixels())
        one = [
            torch.nn.functional.normalize(dual.text_features(*dual.tokenize([c])), dim=1) for c in shapes.test.text[3]
        ]
    assert_close(pairs.query.image, image, atol=1e-5, rtol=0)
    assert_close(pairs.query.text[3], torch.cat(one).mean(dim=0), atol=1e-5, rtol=0)
    assert pairs.database is pairs.query and pairs.query.labels.tolist() == [*range(32, 40)]
    assert pairs.train.image.dtype == pairs.train.text.dtype == torch.float32 and len(pairs.train) == 32


def test_nouns_label_by_captions_3_and_on_and_texts_are_of_captions_1_and_2(dual, folder):
    data = load_captions(folder, size=32)
    assert deep.label_rule(data) == "nouns"
    pairs = deep.deep_pairs(data, dual)
    names = [{list(NOUNS)[i] for i in row.nonzero()[:, 0].tolist()} for row in pairs.train.labels]
    assert names == [{"man", "dog"}, {"boy", "snow"}, {"man", "dog"}]  # the fourth names nothing
    assert len(pairs.database) == 4 and len(pairs.valid) == 1 and pairs.class_names == tuple(NOUNS)
    with torch.no_grad():
        first = dual.text_features(*dual.tokenize(WORDS[0][:2]))
    assert_close(pairs.train.text[0], torch.nn.functional.normalize(first, dim=1).mean(dim=0), atol=1e-5, rtol=0)


def test_labels_of_a_file_go_by_the_names_of_the_photos(dual, folder, tmp_path):
    data, file = load_captions(folder, size=32), tmp_path / "labels.csv"
    rows = ["image,label", *(f"{n}.png,{'big' if n % 2 else 'traffic light'}" for n in range(7))]
    file.write_text("\n".join(rows))
    pairs = deep.deep_pairs(data, dual, str(file))
    assert pairs.class_names == ("big", "traffic light") and pairs.train.labels.tolist() == [1, 0, 1, 0]
    file.write_text("\n".join([*rows, "0.png,big"]).replace("2.png,traffic light", "Images/2.png,big|traffic light"))
    assert deep.deep_pairs(data, dual, str(file)).train.labels.tolist() == [[1, 1], [1, 0], [1, 1], [1, 0]]


def test_what_a_stopped_run_saw_is_not_made_again(dual, shapes, cache, monkeypatch):
    whole = deep.tower_features(dual, shapes.train)
    for file in cache.glob("towers-*"):
        file.unlink()
    monkeypatch.setattr(deep, "SHARD", 10)
    seen = []

    def dying(self, pixels, original=TwoTowers.image_features):
        if len(seen) == 2:
            raise KeyboardInterrupt
        seen.append(len(pixels))
        return original(self, pixels)

    with monkeypatch.context() as patch:
        patch.setattr(TwoTowers, "image_features", dying)
        with pytest.raises(KeyboardInterrupt):
            deep.tower_features(dual, shapes.train)
    assert len(list(cache.glob("towers-*.safetensors"))) == 2 and not list(cache.glob(".towers*"))
    for value, expected in zip(deep.tower_features(dual, shapes.train), whole, strict=True):
        assert_close(value, expected, atol=1e-5, rtol=0)
    assert len(list(cache.glob("towers-*.safetensors"))) == 4


@pytest.mark.parametrize(
    ("labels", "table", "message"),
    [
        ("nouns", None, "the train split has no image whose captions 3 and on name one of the 24 nouns"),
        ("nowhere.csv", None, "there is no table of labels; labels are nouns, images or a file at nowhere.csv"),
        (None, "image,label\n0.png,a\n", "labels go by the names of image files, and these images have none"),
        (None, "name,label\n0.png,a\n", "names the columns image and label, got ['name', 'label']"),
        (None, "image,label\n0.png,a|\n", "row 2 has no label or other columns"),
    ],
)
def test_labels_that_cannot_be_are_refused_before_the_towers(shapes, tmp_path, labels, table, message):
    if table is not None:
        labels = str(tmp_path / "labels.csv")
        (tmp_path / "labels.csv").write_text(table)
    with pytest.raises(InputError) as error:
        deep.deep_pairs(shapes, None, labels)
    assert message in str(error.value)


def test_a_name_that_two_folders_share_labels_no_third_photo(folder, tmp_path):
    file = tmp_path / "labels.csv"
    file.write_text("image,label\na/0.png,cat\nb/0.png,dog\na/1.png,cat\nb/1.png,cat\n2.png,dog\n3.png,dog\n")
    with pytest.raises(InputError, match=r"has no label of 1 images of the \w+ split, .*0\.png first"):
        deep.deep_pairs(load_captions(folder, size=32), None, str(file))


def test_images_without_a_label_are_named(folder, tmp_path):
    (tmp_path / "labels.csv").write_text("image,label\n0.png,a\n1.png,b\n")
    with pytest.raises(InputError, match=r"has no label of 2 images of the train split, 2\.png first"):
        deep.deep_pairs(load_captions(folder, size=32), None, str(tmp_path / "labels.csv"))


def test_fc7_of_alexnet_is_the_network_less_its_last_layer(tmp_path):
    torchvision = pytest.importorskip("torchvision")
    torch.manual_seed(0)
    whole = torchvision.models.alexnet(weights=None).eval()
    torch.save(whole.state_dict(), tmp_path / "alexnet.pth")
    tower = TorchvisionTower("alexnet", str(tmp_path / "alexnet.pth"))
    tower.load()
    pixels = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        found = tower.train().network(pixels)
        assert found.shape == (2, tower.width) and found.min() == 0
        assert_close(whole.classifier[-1](found), whole(pixels))
    torch.save({"a": torch.zeros(1)}, tmp_path / "other.pth")
    for name, weights, message in (
        ("resnet18", "alexnet.pth", "towers of torchvision are alexnet, vgg11"),
        ("alexnet", "none.pth", "no such file, expected torchvision's weights"),
        ("alexnet", "other.pth", "it lacks 'features.0.weight'"),
    ):
        with pytest.raises(InputError, match=message):
            TorchvisionTower(name, str(tmp_path / weights)).load()
