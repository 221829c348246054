import h5py
import numpy as np
import pytest
import torch
from saving import save_h5, save_matlab73

from cmr_fast.data import hdf5, load, mirflickr
from cmr_fast.errors import InputError

COUNT = 40
RANDOM = np.random.default_rng(0)
PIXELS = RANDOM.integers(0, 256, (COUNT, 3, 6, 7), dtype=np.uint8)
TAGS = RANDOM.integers(0, 2, (COUNT, 9)).astype(np.float32)
TAGS[:, 0] = np.arange(COUNT) + 2  # tells rows apart
LABELS = np.eye(4, dtype=np.uint8)[np.arange(COUNT) % 4] | np.eye(4, dtype=np.uint8)[np.arange(COUNT) % 3]
ROWS = {"Query": slice(0, 6), "Train": slice(6, 26), "DataBase": slice(6, 40)}


def whole(folder, images=PIXELS, tags=TAGS, names=("IAll", "TAll", "LAll")):
    for file, name, values in zip(("Img", "Tag", "Lab"), names, (images, tags, LABELS), strict=True):
        save_h5(folder / f"{file}.h5", {name: values})


def in_splits(folder, images):
    for file, values in (("Img", images), ("Tag", TAGS), ("Lab", LABELS.astype(np.float64))):
        save_h5(folder / f"{file}.h5", {f"{file}{word}": values[rows] for word, rows in ROWS.items()})


def rows_of(pairs):
    return (pairs.text[:, 0] - 2).long().tolist()


KINDS = {
    "N, 3, H, W": PIXELS,
    "N, H, W, 3": PIXELS.transpose(0, 2, 3, 1),
    "float32": PIXELS.astype(np.float32).transpose(0, 2, 3, 1),
    "float64, not whole": PIXELS.clip(1, 254) + 0.3,
    "int32": PIXELS.astype(np.int32),
}


@pytest.mark.parametrize("kind", KINDS)
def test_one_set_is_divided_as_the_authors_do(tmp_path, kind, monkeypatch):
    monkeypatch.setattr(hdf5, "_SLICE", 500)  # several slices
    whole(tmp_path, KINDS[kind])
    data = load(tmp_path)
    assert [len(data.query), len(data.database), len(data.train)] == [4, 36, 20]
    expected = PIXELS.clip(1, 254) if "whole" in kind else PIXELS
    for pairs in (data.query, data.database, data.train):
        rows = rows_of(pairs)
        assert pairs.image.dtype == torch.uint8 and np.array_equal(pairs.image, expected[rows])
        assert np.array_equal(pairs.labels, LABELS[rows])
    assert set(rows_of(data.train)) < set(rows_of(data.database))
    assert sorted(rows_of(data.query) + rows_of(data.database)) == list(range(COUNT))
    assert rows_of(load(tmp_path, seed=1).query) != rows_of(data.query)
    assert [len(load(tmp_path, query=5, train=7).query), len(load(tmp_path, query=5, train=7).train)] == [5, 7]


def test_splits_that_the_files_name(tmp_path):
    in_splits(tmp_path, PIXELS)
    data = load(tmp_path)
    for split, word in (("query", "Query"), ("train", "Train"), ("database", "DataBase")):
        pairs = getattr(data, split)
        assert rows_of(pairs) == list(range(COUNT))[ROWS[word]] and np.array_equal(pairs.image, PIXELS[ROWS[word]])
    assert data.name == tmp_path.name and data.num_classes == 4
    with pytest.raises(InputError, match=r"train= is for files without a training split; these name train, query"):
        load(tmp_path, train=5)
    with pytest.raises(InputError, match="query= is for one set without splits; these files name train, query"):
        load(tmp_path, query=5)


def test_names_of_other_layouts(tmp_path):
    """UCCH's without a training split; MATLAB's, whose queries rank the training items; class names are kept."""
    test, base = slice(0, 6), slice(6, 40)
    for name, pattern, values in (("Img", "X{}", PIXELS), ("Tag", "Y{}", TAGS), ("Lab", "{}L", LABELS)):
        arrays = {pattern.format("Test"): values[test], pattern.format("Database"): values[base]}
        save_h5(tmp_path / f"{name}.h5", arrays)
    data = load(tmp_path)
    assert rows_of(data.query) == list(range(6)) and rows_of(data.database) == rows_of(data.train) == list(range(6, 40))
    assert np.array_equal(data.train.image, PIXELS[6:])
    assert len(load(tmp_path, train=7).train) == 7
    matlab = tmp_path / "matlab"
    matlab.mkdir()
    for name, letter, values in (("Img", "I", PIXELS), ("Tag", "T", TAGS), ("Lab", "L", LABELS)):
        save_h5(matlab / f"{name}.h5", {f"{letter}_te": values[test], f"{letter}_tr": values[base]})
    with h5py.File(matlab / "Lab.h5", "a") as opened:
        opened["class_names"] = ["sea", "sky", "tree", "dog"]
    data = load(matlab)
    assert data.database is data.train and rows_of(data.train) == list(range(6, 40))
    assert data.class_names == ("sea", "sky", "tree", "dog")


@pytest.mark.parametrize("beside", [False, True])
def test_features_in_such_files_are_read_as_features(tmp_path, beside):
    features = RANDOM.standard_normal((COUNT, 64)).astype(np.float32)
    whole(tmp_path, features, names=("XAll" if beside else "IAll", "YAll", "LAll"))
    if beside:  # pixels
        with h5py.File(tmp_path / "Img.h5", "a") as opened:
            opened["IAll"] = PIXELS
    assert not mirflickr.holds(tmp_path)
    data = load(tmp_path)
    assert np.array_equal(data.train.image, features[rows_of(data.train)]) and data.image_dim == 64
    with pytest.raises(InputError, match=r"expected a folder of Img\.h5 with images or paths .* it holds Img\.h5"):
        mirflickr.load(tmp_path)


def test_arrays_in_a_group_and_folders_without_them(tmp_path):
    whole(tmp_path, names=("g/IAll", "g/TAll", "g/LAll"))
    data = load(tmp_path)
    assert np.array_equal(data.query.image, PIXELS[rows_of(data.query)])
    with pytest.raises(InputError, match=r"nope: expected a folder of .*; no such folder"):
        mirflickr.load(tmp_path / "nope")
    (tmp_path / "Tag.h5").unlink()
    with pytest.raises(InputError, match=r"Tag\.h5 and Lab\.h5; it holds Img\.h5, Lab\.h5"):
        mirflickr.load(tmp_path)


def test_sizes_of_the_authors(tmp_path, monkeypatch):
    monkeypatch.setattr(mirflickr, "QUERY", 3)
    monkeypatch.setattr(mirflickr, "TRAIN", 11)
    whole(tmp_path)
    data = load(tmp_path)
    assert [len(data.query), len(data.train), len(data.database)] == [3, 11, 37]


def test_other_names_and_items_by_columns(tmp_path):
    whole(tmp_path, tags=TAGS.T, names=("images", "YAll", "LAll"))
    data = load(tmp_path)
    assert np.array_equal(data.query.image, PIXELS[rows_of(data.query)])
    for file in tmp_path.iterdir():
        file.rename(tmp_path / file.name.lower())
    assert load(tmp_path).text_dim == 9


def test_the_mean_is_added_where_it_was_subtracted(tmp_path):
    mean = RANDOM.random((6, 7, 3)).astype(np.float32) * 200
    whole(tmp_path, PIXELS.transpose(0, 2, 3, 1) - mean)
    with pytest.raises(InputError, match=r"Img\.h5: IAll must be pixels from 0 to 255, got -"):
        load(tmp_path)
    save_h5(tmp_path / "Mean.h5", {"Mean": mean})
    data = load(tmp_path)
    assert np.array_equal(data.query.image, PIXELS[rows_of(data.query)])
    whole(tmp_path)  # of 0 to 255: left as they are
    assert np.array_equal(load(tmp_path).query.image, PIXELS[rows_of(data.query)])
    whole(tmp_path, PIXELS.transpose(0, 2, 3, 1) - mean)
    save_h5(tmp_path / "Mean.h5", {"Mean": mean[:3]})
    with pytest.raises(InputError, match=r"a mean of shape \(3, 7, 3\); expected \(3, 6, 7\)"):
        load(tmp_path)
    save_h5(tmp_path / "Mean.h5", {"other": mean})
    with pytest.raises(InputError, match="expected the mean image under Mean, it holds other"):
        load(tmp_path)


def test_standardised_images_are_not_pixels_beside_a_mean_either(tmp_path):
    images = np.random.default_rng(1).standard_normal((COUNT, 6, 7, 3)).clip(-4, 4)
    images[0, 0, 0] = -4, 4, 0
    whole(tmp_path, images)
    save_h5(tmp_path / "Mean.h5", {"Mean": np.full((6, 7, 3), 110.0)})
    with pytest.raises(InputError, match=r"Img\.h5: IAll must be pixels .* -4 to 4, a span of 8; .* Standardised"):
        load(tmp_path)
    whole(tmp_path, images * 2.5)  # a span of 20: few greys, but pixels
    data, grey = load(tmp_path), np.rint(images * 2.5 + 110).transpose(0, 3, 1, 2)
    assert np.array_equal(data.query.image, grey[rows_of(data.query)])


def test_paths_of_photos_as_the_authors_file_has_them(tmp_path):
    image = pytest.importorskip("PIL.Image")
    photos, folder = tmp_path / "photos", tmp_path / "FLICKR-25K"
    for place in (photos, folder):
        place.mkdir()
    for row in range(COUNT):
        image.new("RGB", (30, 20), (6 * row,) * 3).save(photos / f"im{row}.png")
    in_splits(folder, np.array([f"/home/authors/mirflickr/im{row}.png".encode() for row in range(COUNT)]))
    with pytest.raises(InputError, match=r"no photo .*im6\.png; expected photos="):
        load(folder)
    data = load(folder, photos=str(photos), size=16)
    assert data.train.image.shape == (20, 3, 16, 16)
    assert data.train.image[:, 0, 8, 8].tolist() == [6 * row for row in range(6, 26)]
    for file in photos.iterdir():
        file.rename(folder / file.name)
    assert torch.equal(load(folder, size=16).train.image, data.train.image)
    in_splits(folder, PIXELS)
    with pytest.raises(InputError, match="holds images, photos= is for paths"):
        load(folder, photos=str(photos))


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (PIXELS / 255.0, r"IAll must be pixels from 0 to 255, got 0 to 1; times 255"),
        (PIXELS * 2.0, r"from 0 to 255, got \d+ to [345]"),
        (np.full((COUNT, 6, 7, 3), np.nan), "from 0 to 255, got nan"),
        (PIXELS / 128.0, "numbers that are not whole, 0 to 1.99219, a span of 1.99219; expected 20 at least"),
        (PIXELS[:, :2], r"must be images \(N, H, W, 3\)"),
        (PIXELS[:30], "disagree on the number of items"),
    ],
)
def test_images_that_cannot_be(tmp_path, images, message):
    whole(tmp_path, images)
    with pytest.raises(InputError, match=message):
        load(tmp_path)


def test_damaged_and_missing(tmp_path):
    whole(tmp_path)
    save_h5(tmp_path / "Lab.h5", {"other": LABELS})
    with pytest.raises(InputError, match=r"no LAll|has no labels"):
        load(tmp_path)
    (tmp_path / "Tag.h5").write_bytes((tmp_path / "Img.h5").read_bytes()[:600])
    with pytest.raises(InputError, match=r"Tag\.h5: .*damaged"):
        load(tmp_path)
    (tmp_path / "Tag.h5").unlink()
    assert not mirflickr.holds(tmp_path)


@pytest.mark.parametrize("kind", [np.float32, np.float64, np.uint8])
def test_images_of_a_matlab_file_are_read_by_slices_too(tmp_path, kind, monkeypatch):
    monkeypatch.setattr(hdf5, "_SLICE", 500)
    arrays = {"images": PIXELS.transpose(0, 2, 3, 1).astype(kind), "YAll": TAGS, "LAll": LABELS}
    save_matlab73(tmp_path / "FLICKR-25K.mat", arrays)
    read = hdf5.read_hdf5(tmp_path / "FLICKR-25K.mat", matlab=True)["images"]()
    assert read.dtype == np.uint8 and np.array_equal(read, arrays["images"])
    data = load(tmp_path / "FLICKR-25K.mat")
    assert np.array_equal(data.query.image, PIXELS[rows_of(data.query)])
    with h5py.File(tmp_path / "maps.h5", "w") as opened:
        opened["image"] = np.full((4, 3, 5, 5), 0.5)
    assert hdf5.read_hdf5(tmp_path / "maps.h5", matlab=False)["image"]().dtype == np.float64


@pytest.mark.parametrize("words", ["tc10", "tc21"])
def test_nus_wide_by_its_split_files(tmp_path, words):
    """DJSRH's have YAll in v7.3, UCCH's in v5; items by rows or by columns."""
    import scipy.io

    save_matlab73(tmp_path / f"nus-wide-{words}-iall.mat", {"IAll": PIXELS.transpose(2, 3, 1, 0)})
    scipy.io.savemat(tmp_path / f"nus-wide-{words}-lall.mat", {"LAll": LABELS})
    expected = None
    for save in (save_matlab73, scipy.io.savemat):
        save(tmp_path / f"nus-wide-{words}-yall.mat", {"YAll": TAGS})
        data = load(tmp_path)
        assert np.array_equal(data.query.image, PIXELS[rows_of(data.query)])
        assert expected is None or rows_of(data.query) == expected
        expected = rows_of(data.query)
