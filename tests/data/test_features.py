import pickle
import re

import numpy as np
import pytest
import scipy.io
import torch
from saving import save_h5, save_matlab73

from cmr_fast.data import load
from cmr_fast.errors import InputError

RANDOM = np.random.default_rng(0)
SIZES = {"train": 12, "valid": 6, "query": 8, "database": 10}


def made(split, classes=3):
    """image (N, 5), text (N, 4), ids (N,) from 0."""
    count = SIZES[split]
    return RANDOM.random((count, 5)), RANDOM.random((count, 4)), np.arange(count) % classes


SETS = {split: made(split) for split in SIZES}


def check(data, *splits, database):
    for split in splits:
        image, text, labels = SETS[split]
        pairs = getattr(data, split)
        assert torch.equal(pairs.image, torch.from_numpy(image).float())
        assert torch.equal(pairs.text, torch.from_numpy(text).float())
        assert pairs.labels.tolist() == labels.tolist()
    assert data.database is getattr(data, database)
    assert (data.valid is not None) == ("valid" in splits)


def named(patterns, words, base=0, column=False):
    """Arrays under names like "I_{}", for splits that names call `words`."""
    arrays = {}
    for split, word in words.items():
        image, text, labels = SETS[split]
        labels = labels + base
        values = (image, text, labels[:, None] if column else labels, labels[:, None] if column else labels)
        arrays |= {pattern.format(word): value for pattern, value in zip(patterns, values, strict=False)}
    return arrays


MATLAB = ("I_{}", "T_{}", "L_{}")
DSCMR = ("{}_img", "{}_txt", "{}_img_lab", "{}_txt_lab")
SDML = ("{}_imgs_deep", "{}_text", "{}_imgs_labels", "{}_texts_labels")
XMEDIA = ("I_{}_CNN", "T_{}_BOW", "{}ImgCat", "{}TxtCat")


@pytest.mark.parametrize("save", [scipy.io.savemat, save_matlab73])
@pytest.mark.parametrize("base", [0, 1])
def test_matlab_hashing_code_ranks_the_training_set(tmp_path, save, base):
    save(tmp_path / "WIKI.mat", named(MATLAB, {"train": "tr", "query": "te"}, base, column=True))
    data = load(tmp_path / "WIKI.mat")
    assert data.name == "WIKI"
    check(data, "train", "query", database="train")
    check(load(tmp_path / "WIKI.mat", database="query"), "train", "query", database="query")


def test_named_database_in_a_v73_file_with_items_by_columns(tmp_path):
    arrays = named(MATLAB, {"train": "tr", "query": "te", "database": "db"}, base=1, column=True)
    save_matlab73(tmp_path / "raw_mir.mat", {key: value.T for key, value in arrays.items()})
    check(load(tmp_path / "raw_mir.mat"), "train", "query", "database", database="database")
    with pytest.raises(InputError, match="database= is for files with train and test items only"):
        load(tmp_path / "raw_mir.mat", database="train")


def test_dscmr_is_a_folder_of_six_files(tmp_path):
    for key, value in named(DSCMR[:3], {"train": "train", "query": "test"}, column=True).items():
        scipy.io.savemat(tmp_path / f"{key}.mat", {key: value})
    check(load(tmp_path), "train", "query", database="query")
    with pytest.raises(
        InputError, match=r"looks like DSCMR, but has no train text \(train_txt\).*put these in one folder"
    ):
        load(tmp_path / "train_img.mat")


def test_sdml_with_valid_and_both_spellings(tmp_path):
    arrays = named(SDML, {"train": "train", "valid": "valid", "query": "test"}, base=4)
    save_h5(tmp_path / "wiki.h5py", arrays)
    check(load(tmp_path / "wiki.h5py"), "train", "valid", "query", database="query")
    arrays["train_texts"] = arrays.pop("train_text")
    del arrays["valid_text"]
    save_h5(tmp_path / "b.h5", arrays)
    with pytest.raises(InputError, match=r"no valid text \(valid_texts or valid_text\)"):
        load(tmp_path / "b.h5")


def test_xmedia_and_inria(tmp_path):
    scipy.io.savemat(tmp_path / "a.mat", named(XMEDIA, {"train": "tr", "query": "te"}, 1, column=True))
    check(load(tmp_path / "a.mat"), "train", "query", database="query")
    inria = named(DSCMR, {"train": "tr", "valid": "val", "query": "te"}, 1, column=True)
    scipy.io.savemat(tmp_path / "b.mat", inria)
    check(load(tmp_path / "b.mat"), "train", "valid", "query", database="query")


def test_labels_of_image_and_text_that_differ(tmp_path):
    arrays = named(XMEDIA, {"train": "tr", "query": "te"}, 1)
    arrays["teTxtCat"] = arrays["teTxtCat"][::-1].copy()
    scipy.io.savemat(tmp_path / "a.mat", arrays)
    with pytest.raises(InputError, match=r"teImgCat and teTxtCat differ in [1-8] of 8 rows"):
        load(tmp_path / "a.mat")


def test_acmr_pickles_of_python_2(tmp_path):
    for key, value in named(("{}_img_feats", "{}_txt_vecs"), {"train": "train", "query": "test"}).items():
        (tmp_path / f"{key}.pkl").write_bytes(pickle.dumps(list(value), protocol=2))
    for split, word in (("train", "train"), ("query", "test")):
        labels = [int(label) + 1 for label in SETS[split][2]]
        (tmp_path / f"{word}_labels.pkl").write_bytes(pickle.dumps(labels, protocol=2))
    check(load(tmp_path), "train", "query", database="query")


def acmr_nus(folder, several):
    for split, word in (("train", "train"), ("query", "test")):
        image, text, labels = SETS[split]
        ids = [f"photo{i}" for i in RANDOM.permutation(len(labels))]
        rows = {"ids": ids, "id_bow": text, f"id_label_{'map' if several else 'single'}": labels}
        if several:
            rows["id_label_map"] = np.stack([labels == 0, labels <= 1, labels == 2], axis=1).astype(int)
        for name, values in rows.items():
            value = values if name == "ids" else dict(zip(ids, values, strict=True))
            (folder / f"{word}_{name}.pkl").write_bytes(pickle.dumps(value, protocol=2))
        stored = dict(zip(ids, image, strict=True))
        (folder / f"img_{word}_id_feats.pkl").write_bytes(pickle.dumps(stored, protocol=2))


def test_acmr_dicts_by_id(tmp_path):
    acmr_nus(tmp_path, several=False)
    check(load(tmp_path), "train", "query", database="query")
    for file in tmp_path.iterdir():
        file.unlink()
    acmr_nus(tmp_path, several=True)
    assert load(tmp_path).train.labels[:3].tolist() == [[1, 1, 0], [0, 1, 0], [0, 0, 1]]
    file = tmp_path / "test_id_bow.pkl"
    rows = pickle.loads(file.read_bytes())
    rows.popitem()
    file.write_bytes(pickle.dumps(rows, protocol=2))
    with pytest.raises(InputError, match="test_id_bow lacks 1 of the 8 test_ids"):
        load(tmp_path)


def test_query_and_database_only(tmp_path):
    words = {"query": "Test", "database": "Database"}
    arrays = named(("X{}", "Y{}"), words) | {
        "testL": np.eye(3)[SETS["query"][2]],
        "databaseL": np.eye(3)[SETS["database"][2]],
    }
    scipy.io.savemat(tmp_path / "iapr.mat", arrays)
    data = load(tmp_path / "iapr.mat")
    check(data, "query", "database", database="train")
    some = load(tmp_path / "iapr.mat", train=6, seed=1).train
    assert len(some) == 6
    whole = data.database.image.tolist()
    assert all(row in whole for row in some.image.tolist())
    arrays |= {"VTest": np.ones((8, 2)), "VDatabase": np.ones((10, 2))}
    scipy.io.savemat(tmp_path / "iapr.mat", arrays)
    assert load(tmp_path / "iapr.mat").image_dim == 2
    assert load(tmp_path / "iapr.mat", image="XTest").image_dim == 5
    with pytest.raises(InputError, match="image='nonsense' is not among the names"):
        load(tmp_path / "iapr.mat", image="nonsense")


@pytest.fixture
def dcmh(tmp_path):
    """The three files of DCMH's split: pixels in v7.3 as H, W, 3, N, tags and labels in v5."""
    images = RANDOM.integers(0, 256, (40, 3, 6, 7), dtype=np.uint8)
    tags = RANDOM.integers(0, 2, (40, 9), dtype=np.uint8)
    labels = np.eye(4, dtype=np.uint8)[np.arange(40) % 4] | np.eye(4, dtype=np.uint8)[np.arange(40) % 3]
    save_matlab73(tmp_path / "mirflickr25k-iall.mat", {"IAll": images.transpose(2, 3, 1, 0)})
    scipy.io.savemat(tmp_path / "mirflickr25k-yall.mat", {"YAll": tags})
    scipy.io.savemat(tmp_path / "mirflickr25k-lall.mat", {"LAll": labels})
    return tmp_path, images, tags, labels


def test_dcmh_files_and_the_random_protocol(dcmh):
    folder, images, tags, labels = dcmh
    data = load(folder)
    assert [len(data.query), len(data.database), len(data.train)] == [4, 36, 10]
    row = {tuple(image.ravel()): i for i, image in enumerate(images)}
    found = {
        s: [row[tuple(image)] for image in getattr(data, s).image.flatten(1).numpy()]
        for s in ("query", "database", "train")
    }
    assert sorted(found["query"] + found["database"]) == list(range(40))
    assert set(found["train"]) < set(found["database"])
    for split, rows in found.items():
        assert np.array_equal(getattr(data, split).text.numpy(), tags[rows])
        assert np.array_equal(getattr(data, split).labels.numpy(), labels[rows])
    assert torch.equal(load(folder).query.image, data.query.image)
    assert not torch.equal(load(folder, seed=1).query.image, data.query.image)
    other = load(folder, query=7, train=20)
    assert [len(other.query), len(other.database), len(other.train)] == [7, 33, 20]


def test_protocol_of_the_papers_at_their_size(tmp_path):
    count = 20015
    np.savez(tmp_path / "a.npz", image=np.ones((count, 2)), text=np.ones((count, 1)), labels=np.arange(count) % 2)
    data = load(tmp_path / "a.npz")
    assert [len(data.query), len(data.database), len(data.train)] == [2000, 18015, 5000]


def test_features_are_preferred_to_pixels_and_may_be_ones_own(dcmh):
    folder = dcmh[0]
    np.save(folder / "XAll.npy", np.ones((40, 8)))
    assert load(folder).image_dim == 8
    assert load(folder, image="IAll").train.image.shape[1:] == (3, 6, 7)


@pytest.mark.parametrize("options", [{"query": 0}, {"query": 30, "train": 20}, {"train": 0}, {"database": "train"}])
def test_draws_that_cannot_be(dcmh, options):
    with pytest.raises(InputError):
        load(dcmh[0], **options)


def test_no_image_features(dcmh):
    (dcmh[0] / "mirflickr25k-iall.mat").unlink()
    with pytest.raises(InputError, match=r"has no image \(XAll or .*IAll\); it holds LAll, YAll"):
        load(dcmh[0])


@pytest.mark.realdata
def test_real_mirflickr_has_no_images_and_takes_ones_own(data_root, tmp_path):
    folder = data_root / "mirflickr25k"
    with pytest.raises(InputError, match="has no image"):
        load(folder)
    for file in folder.glob("*.mat"):
        (tmp_path / file.name).symlink_to(file)
    np.save(tmp_path / "XAll.npy", np.arange(20015.0)[:, None])
    data = load(tmp_path)
    assert [len(data.query), len(data.database), len(data.train)] == [2000, 18015, 5000]
    assert (data.text_dim, data.num_classes) == (1386, 24)


def test_two_files_with_the_same_array(dcmh):
    scipy.io.savemat(dcmh[0] / "nus-wide-tc10-yall.mat", {"YAll": np.ones((5, 2))})
    with pytest.raises(InputError, match=r"YAll is in mirflickr25k-yall.mat and nus-wide-tc10-yall.mat"):
        load(dcmh[0])


def test_items_that_disagree(tmp_path):
    arrays = named(MATLAB, {"train": "tr", "query": "te"})
    arrays["T_te"] = arrays["T_te"][:-1]
    scipy.io.savemat(tmp_path / "a.mat", arrays)
    with pytest.raises(InputError, match=r"a.mat: the arrays disagree .* I_te \(8, 5\), T_te \(7, 4\)"):
        load(tmp_path / "a.mat")


def test_values_that_cannot_be(tmp_path):
    for key, value, message in (
        ("I_tr", np.full((12, 5), np.nan), "a.mat: image features must be finite"),
        ("T_te", np.full((8, 4), 1e300), "a.mat: text features must be finite"),
        ("L_tr", np.ones((12, 1)), "the train labels hold one class only"),
        ("I_te", np.zeros((0, 5)), "disagree"),
        ("T_te", np.array(["a"] * 8, dtype=object), "T_te must be an array of numbers"),
    ):
        scipy.io.savemat(tmp_path / "a.mat", named(MATLAB, {"train": "tr", "query": "te"}) | {key: value})
        with pytest.raises(InputError, match=message):
            load(tmp_path / "a.mat")


def test_a_split_without_items(tmp_path):
    arrays = named(MATLAB, {"train": "tr", "query": "te"})
    for key in ("I_te", "T_te", "L_te"):
        arrays[key] = arrays[key][:0]
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(InputError, match="the query split is empty"):
        load(tmp_path / "a.npz")


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (("Qi", "Qt", "Di", "Dt", "query_L", "retrieval_L"), "saved hash codes"),
        (("index", "caption", "category"), "paths of images"),
        (("x", "y"), r"no known names among its arrays \(x, y\)"),
    ],
)
def test_other_things(tmp_path, keys, message):
    np.savez(tmp_path / "a.npz", **{key: np.ones((3, 2)) for key in keys})
    with pytest.raises(InputError, match=message):
        load(tmp_path / "a.npz")


def test_names_in_another_case(tmp_path):
    arrays = {key.upper(): value for key, value in named(MATLAB, {"train": "tr", "query": "te"}).items()}
    np.savez(tmp_path / "a.npz", **arrays)
    check(load(tmp_path / "a.npz"), "train", "query", database="train")


WITHOUT_TXT_LAB = DSCMR[:3]
NATIVE = ("{}_image", "{}_text", "{}_labels")


@pytest.mark.parametrize("word", ["database", "db", "retrieval", "gallery"])
@pytest.mark.parametrize(("patterns", "train", "query"), [
    (MATLAB, "tr", "te"), (NATIVE, "train", "query"), (NATIVE, "train", "test"), (DSCMR, "train", "test"),
    (WITHOUT_TXT_LAB, "tr", "te"), (SDML, "train", "test"), (XMEDIA, "tr", "te"),
    (("Img{}", "Tag{}", "Lab{}"), "Train", "Query"), (("X{}", "Y{}", "{}L"), "Train", "Test"),
])  # fmt: skip
def test_a_database_is_taken_by_any_of_its_words(tmp_path, word, patterns, train, query):
    np.savez(tmp_path / "a.npz", **named(patterns, {"train": train, "query": query, "database": word}))
    check(load(tmp_path / "a.npz"), "train", "query", "database", database="database")


@pytest.mark.parametrize("word", ["valid", "val", "validation"])
@pytest.mark.parametrize("patterns", [MATLAB, NATIVE, DSCMR, WITHOUT_TXT_LAB, SDML])
def test_a_validation_split_is_taken_by_any_of_its_words(tmp_path, word, patterns):
    np.savez(tmp_path / "a.npz", **named(patterns, {"train": "train", "query": "test", "valid": word}))
    database = "train" if patterns is MATLAB else "query"
    check(load(tmp_path / "a.npz"), "train", "query", "valid", database=database)


def test_groups_of_hdf5_by_any_of_their_words(tmp_path):
    arrays = named(("{}/image", "{}/text", "{}/labels"), {"train": "train", "query": "query", "database": "gallery"})
    save_h5(tmp_path / "a.h5", arrays)
    check(load(tmp_path / "a.h5"), "train", "query", "database", database="database")


@pytest.mark.parametrize("word", ["test_db", "base", "test"])
def test_one_more_split_is_not_left_out_without_a_word(tmp_path, word):
    np.savez(tmp_path / "a.npz", **named(NATIVE, {"train": "train", "query": "query", "database": word}))
    with pytest.raises(InputError, match=rf"{word}_image, {word}_text, {word}_labels: looks like one more split"):
        load(tmp_path / "a.npz")


def test_two_databases_and_a_split_beside_a_whole_set_are_refused(tmp_path):
    arrays = named(MATLAB, {"train": "tr", "query": "te", "database": "db"})
    np.savez(tmp_path / "a.npz", **arrays | named(MATLAB, {"valid": "retrieval"}))
    with pytest.raises(InputError, match="I_retrieval, T_retrieval, L_retrieval: looks like one more split"):
        load(tmp_path / "a.npz")
    image, text, labels = SETS["train"]
    whole = {"image": image, "text": text, "labels": labels}
    np.savez(tmp_path / "b.npz", **whole | named(NATIVE, {"database": "database"}))
    with pytest.raises(InputError, match="database_image, database_labels, database_text: looks like one more split"):
        load(tmp_path / "b.npz")


def test_arrays_of_no_split_beside_the_splits_are_passed_over(tmp_path):
    more = {"class_names": np.array(["a", "b", "c"]), "extra_image": np.zeros(3), "train_ids": np.arange(12)}
    np.savez(tmp_path / "a.npz", **named(NATIVE, {"train": "train", "query": "query"}), **more)
    check(load(tmp_path / "a.npz"), "train", "query", database="query")


@pytest.mark.parametrize("word", ["database", "gallery"])
def test_query_and_database_in_our_own_names_draw_the_training_items(tmp_path, word):
    np.savez(tmp_path / "a.npz", **named(NATIVE, {"query": "query", "database": word}))
    check(load(tmp_path / "a.npz"), "query", "database", database="database")
    data = load(tmp_path / "a.npz")
    assert data.train is data.database
    assert len(load(tmp_path / "a.npz", train=4).train) == 4


def test_names_that_differ_in_case_only_are_refused(tmp_path):
    image, text, labels = SETS["train"]
    arrays = {"XAll": image, "Xall": image + 100, "YAll": text, "LAll": labels}
    np.savez(tmp_path / "a.npz", **arrays)
    (tmp_path / "d").mkdir()
    for number, (name, value) in enumerate(arrays.items()):  # named in the file: file systems may not know case
        scipy.io.savemat(tmp_path / "d" / f"{number}.mat", {name: value})
    for path in (tmp_path / "a.npz", tmp_path / "d"):
        with pytest.raises(InputError, match="XAll and Xall differ in case only"):
            load(path)
        assert float(load(path, image="Xall").database.image.mean()) > 99
        assert float(load(path, image="XAll").database.image.mean()) < 1


def test_captions_as_objects_are_called_objects(tmp_path):
    image, _, labels = SETS["train"]
    np.savez(tmp_path / "a.npz", image=image, text=np.array(["a dog"] * 12, dtype=object), labels=labels)
    with pytest.raises(InputError, match=r"a.npz: text holds Python objects .* numpy.array\(x, dtype=str\)"):
        load(tmp_path / "a.npz")


@pytest.mark.parametrize("most", [1e20, 1e300, 2.0**63, float(2**31)])
@pytest.mark.parametrize("names", [("image", "text", "labels"), ("query_image", "query_text", "query_labels")])
def test_class_ids_that_no_integer_holds(tmp_path, most, names):
    image, text, labels = SETS["train"]
    ids = np.where(labels, most, 1.0)
    arrays = dict(zip(names, (image, text, ids), strict=True))
    if names[0] != "image":
        arrays |= dict(zip(("train_image", "train_text", "train_labels"), (image, text, ids), strict=True))
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(InputError, match=rf"labels.* must be class ids.*got 1.0 to {re.escape(str(most))}"):
        load(tmp_path / "a.npz")
