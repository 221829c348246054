import numpy as np
import pytest
import scipy.io
import torch

from cmr_fast.data import load
from cmr_fast.errors import InputError


@pytest.fixture
def folder(tmp_path):
    """The real layout, 6 and 4 pairs of it."""
    random = np.random.default_rng(0)
    arrays = {f"{m}_{s}": random.random((n, d)) for m, d in (("I", 5), ("T", 3)) for s, n in (("tr", 6), ("te", 4))}
    scipy.io.savemat(tmp_path / "raw_features.mat", arrays)
    words = {f"T_tfidf_{s}": random.random((n, 9)) for s, n in (("tr", 6), ("te", 4))}
    scipy.io.savemat(tmp_path / "raw_features_with_tfidf.mat", arrays | words)
    for name, classes in (("trainset", [1, 2, 3, 1, 2, 3]), ("testset", [3, 2, 1, 1])):
        lines = "".join(f"text-{i}.1\timage{i}\t{c}\n" for i, c in enumerate(classes))
        (tmp_path / f"{name}_txt_img_cat.list").write_text(lines)
    (tmp_path / "categories.list").write_text("art\nbiology\nsport\n")
    return tmp_path


def test_made_folder(folder):
    data = load(folder)
    stored = scipy.io.loadmat(folder / "raw_features.mat")
    assert torch.equal(data.train.image, torch.from_numpy(stored["I_tr"]).float())
    assert torch.equal(data.query.text, torch.from_numpy(stored["T_te"]).float())
    assert data.train.labels.tolist() == [0, 1, 2, 0, 1, 2]
    assert data.query.labels.tolist() == [2, 1, 0, 0]
    assert data.query is data.database
    assert data.class_names == ("art", "biology", "sport")
    assert load(folder, features="tfidf").text_dim == 9
    assert torch.equal(load(folder / "raw_features.mat").train.image, data.train.image)


def test_lda_is_also_in_the_larger_file(folder):
    expected = load(folder).train.text
    (folder / "raw_features.mat").unlink()
    assert torch.equal(load(folder).train.text, expected)


def test_tfidf_needs_its_file(folder):
    (folder / "raw_features_with_tfidf.mat").unlink()
    with pytest.raises(InputError, match=r"features='tfidf' needs raw_features_with_tfidf.mat"):
        load(folder, features="tfidf")


def test_unknown_features(folder):
    with pytest.raises(InputError, match="one of lda, tfidf"):
        load(folder, features="bert")


def test_missing_list(folder):
    (folder / "testset_txt_img_cat.list").unlink()
    with pytest.raises(InputError, match=r"testset_txt_img_cat.list: not found"):
        load(folder)


@pytest.mark.parametrize("line", ["a b 3", "a\tb\tsport", "a\tb\t0", "a\tb", ""])
def test_wrong_line(folder, line):
    (folder / "trainset_txt_img_cat.list").write_text("a\tb\t1\n" + line + "\n")
    with pytest.raises(InputError, match="line 2 is"):
        load(folder)


def test_lists_of_another_length(folder):
    file = folder / "trainset_txt_img_cat.list"
    file.write_text(file.read_text() + "a\tb\t1\n")
    with pytest.raises(InputError, match=r"I_tr has shape \(6, 5\), but trainset.* names 7 pairs"):
        load(folder)


def test_other_arrays(folder):
    scipy.io.savemat(folder / "raw_features.mat", {"X": np.zeros((6, 2))})
    with pytest.raises(InputError, match="has no I_tr, T_tr, only X"):
        load(folder)


def test_nan(folder):
    stored = {key: value for key, value in scipy.io.loadmat(folder / "raw_features.mat").items() if key[0] != "_"}
    stored["T_te"][2, 1] = np.nan
    scipy.io.savemat(folder / "raw_features.mat", stored)
    with pytest.raises(InputError, match="text features must be finite: 1 rows are not, the first is row 2"):
        load(folder)


def test_more_classes_than_names(folder):
    (folder / "categories.list").write_text("art\n")
    with pytest.raises(InputError, match="names 1 classes, but the lists use 3"):
        load(folder)
    (folder / "categories.list").unlink()
    assert load(folder).class_names == ()


@pytest.mark.realdata
def test_real_wikipedia(data_root, monkeypatch):
    data = load(data_root / "wikipedia")
    assert (data.train.image.shape, data.train.text.shape) == ((2173, 128), (2173, 10))
    assert (data.query.image.shape, data.query.text.shape) == ((693, 128), (693, 10))
    for values in (data.train.image, data.train.text, data.query.image, data.query.text):
        assert torch.allclose(values.sum(dim=1), torch.ones(len(values)), atol=1e-5)
    # counted from the lists with cut and uniq
    assert torch.bincount(data.train.labels).tolist() == [138, 272, 244, 248, 202, 178, 186, 144, 214, 347]
    assert torch.bincount(data.query.labels).tolist() == [34, 88, 96, 85, 65, 58, 51, 41, 71, 104]
    assert data.class_names[0] == "art"
    assert data.class_names[9] == "warfare"
    assert data.query is data.database
    words = load(data_root / "wikipedia", features="tfidf")
    assert words.text_dim == 1000
    assert torch.allclose(words.train.image, data.train.image)
    monkeypatch.setenv("CMR_FAST_DATA", str(data_root))
    assert torch.equal(load("wikipedia").train.text, data.train.text)


def test_lists_that_are_empty_or_stand_for_others(folder):
    file = folder / "trainset_txt_img_cat.list"
    for content, message in (("", "is empty"), ("version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer")):
        file.write_text(content)
        with pytest.raises(InputError, match=rf"trainset_txt_img_cat\.list: (is a )?{message}"):
            load(folder)
