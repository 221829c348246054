"""Files that people have: each is opened, or refused with what it is and what to do."""

import gzip
import io
import json
import os
import pickle
import socket
import tarfile
import zipfile

import h5py
import numpy as np
import pytest
import scipy.io
import scipy.sparse
import torch

from cmr_fast.data import PairedDataset, Pairs, load, load_images, save_pairs
from cmr_fast.data.readers import SUFFIXES
from cmr_fast.errors import InputError

RANDOM = np.random.default_rng(0)
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"ab" * 32 + b"\nsize 327925944\n"


@pytest.mark.parametrize("name", [f"a{suffix}" for suffix in (*SUFFIXES, "")])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (LFS, "is a Git LFS pointer, not the file of 327925944 bytes .*git lfs pull"),
        (b"/annex/objects/SHA256E-s3--ab.mat\n", "is a git-annex pointer.*git annex get"),
    ],
)
def test_pointers_are_named_in_a_file_and_in_a_folder(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=rf"{name}: {message}"):
        load(tmp_path / name)
    if "." in name:
        with pytest.raises(InputError, match=message):
            load(tmp_path)


@pytest.mark.parametrize("ending", ["", ".mat"])
def test_pointers_in_the_place_of_images_are_named(tmp_path, ending):
    for number in range(1, 6):
        (tmp_path / f"data_batch_{number}{ending}").write_bytes(LFS)
    (tmp_path / f"test_batch{ending}").write_bytes(LFS)
    with pytest.raises(InputError, match=rf"data_batch_1{ending}: is a Git LFS pointer"):
        load_images(tmp_path)
    for name in ("train", "test"):
        (tmp_path / f"{name}_32x32.mat").write_bytes(LFS)
    for file in tmp_path.glob("*_batch*"):
        file.unlink()
    with pytest.raises(InputError, match=r"train_32x32\.mat: is a Git LFS pointer"):
        load_images(tmp_path)


def saved_by_torch(**options):
    buffer = io.BytesIO()
    torch.save({"image": torch.rand(6, 3), "text": torch.rand(6, 2), "labels": torch.arange(6) % 2}, buffer, **options)
    return buffer.getvalue()


def archived(files):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def tarred():
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("image.npy"))
    return buffer.getvalue()


def tensors():
    header = json.dumps({"x": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    return len(header).to_bytes(8, "little") + header + bytes(4)


OTHERS = {
    "torch.save": (saved_by_torch(), "torch.load"),
    "torch.save ": (saved_by_torch(_use_new_zipfile_serialization=False), "torch.load"),
    "zip archive of a.csv, b.csv": (archived({"a.csv": "1", "b.csv": "2"}), "unpack"),
    "Office": (archived({"[Content_Types].xml": "x"}), "npz"),
    "tar archive": (tarred(), "unpack"),
    "gzip": (gzip.compress(pickle.dumps([1])), "gunzip"),
    "web page": (b"<!DOCTYPE html>\n<html><body>404</body></html>", "download it again"),
    "web page ": (b"\n  <HTML><body>quota exceeded</body></HTML>", "download it again"),
    "safetensors": (tensors(), "npz"),
    "Parquet": (b"PAR1" + bytes(20), "pandas"),
    "PNG": (b"\x89PNG\r\n\x1a\n" + bytes(200), "encode"),
    "index of cmr_fast": (b"CMRFHAM\n" + bytes(100), "HammingIndex"),
}


@pytest.mark.parametrize("name", ["a.pkl", "a.npz", "a.mat", "a.pt"])
@pytest.mark.parametrize("what", OTHERS)
def test_other_files_are_named_with_what_to_do(tmp_path, name, what):
    content, todo = OTHERS[what]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=rf"{name}: .*{what.strip()}.*{todo}"):
        load(tmp_path / name)


class Tensor:
    """Pickled, a torch tensor."""

    def __reduce__(self):
        return torch._utils._rebuild_tensor_v2, ()


@pytest.mark.parametrize(
    ("value", "what"),
    [(Tensor(), "torch tensors"), (scipy.sparse.csr_matrix(np.eye(3)), r"sparse matrices .*toarray")],
)
def test_pickles_of_other_kinds_are_named(tmp_path, value, what):
    (tmp_path / "a.pkl").write_bytes(pickle.dumps({"image": value}))
    with pytest.raises(InputError, match=rf"a\.pkl: .*so it holds {what}.* nothing was run"):
        load(tmp_path / "a.pkl")


def test_what_is_no_file_is_refused_before_it_is_opened(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "fifo.mat")
    with socket.socket(socket.AF_UNIX) as server:
        monkeypatch.chdir(tmp_path)
        server.bind("socket.npz")
    for name, kind in (("fifo.mat", "FIFO"), ("socket.npz", "socket"), ("/dev/zero", "device")):
        for loader in (load, load_images):
            with pytest.raises(InputError, match=f"{name}: is a {kind}, expected a file or a folder"):
                loader(tmp_path / name)
    # beside data they are left alone
    np.savez(tmp_path / "data.npz", image=np.eye(40), text=np.eye(40), labels=np.arange(40) % 2)
    assert load(tmp_path).image_dim == 40


@pytest.mark.parametrize("path", ["x" * 5000, "a\0b", "~nobody_of_this_name/x", 5, None, b"bytes", ["a"]])
def test_paths_that_cannot_be(path):
    for loader in (load, load_images):
        with pytest.raises(InputError, match=r"no data at|expected a path"):
            loader(path)


def test_a_loop_of_links(tmp_path):
    (tmp_path / "a").symlink_to(tmp_path / "b")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    with pytest.raises(InputError, match="no data at"):
        load(tmp_path / "a")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root reads everything")
def test_what_may_not_be_read(tmp_path):
    (tmp_path / "a.npz").write_bytes(b"PK")
    (tmp_path / "a.npz").chmod(0)
    with pytest.raises(InputError, match=r"a\.npz: cannot be read \(Permission denied\)"):
        load(tmp_path / "a.npz")


@pytest.mark.parametrize("folder", ["data.npz", "data.mat"])
def test_a_folder_named_like_a_file(tmp_path, folder):
    (tmp_path / folder).mkdir()
    with pytest.raises(InputError, match=rf"{folder}: no data set found"):
        load(tmp_path / folder)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (("annotations/captions_train2017.json", "train2017/1.jpg"), "photos and captions.* encode both"),
        (("Flickr8k.token.txt", "Images/1.jpg"), "photos and captions"),
        (("1.JPG", "2.png"), "photos without texts"),
        (("dataset_flickr30k.json",), "captions but no features"),
        (("train.pt", "test.pth"), r"torch\.load"),
        (("train.csv",), "Tables are not read"),
        (("cifar.tar.gz",), "unpack"),
    ],
)
def test_folders_of_other_things_are_named(tmp_path, files, message):
    for name in files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    with pytest.raises(InputError, match=rf"no data set found.* it holds .*{message}"):
        load(tmp_path)


COUNT = 40
CAPTIONS = [f"a picture, number {i}" for i in range(COUNT)]
TEXTS = {
    "variable utf-8": (CAPTIONS, {"dtype": h5py.string_dtype()}),
    "fixed ascii": (np.array([c.encode() for c in CAPTIONS]), {}),
    "a column": (np.array(CAPTIONS, dtype=object)[:, None], {"dtype": h5py.string_dtype()}),
}


@pytest.mark.parametrize("kind", TEXTS)
def test_captions_in_hdf5(tmp_path, kind):
    values, options = TEXTS[kind]
    image = RANDOM.random((COUNT, 6)).astype(np.float32)
    with h5py.File(tmp_path / "a.h5", "w") as opened:
        opened.create_dataset("text", data=values, **options)
        opened["image"], opened["labels"] = image, np.arange(COUNT) % 3
    data = load(tmp_path / "a.h5")
    whole = dict(zip(map(tuple, image.tolist()), CAPTIONS, strict=True))
    assert [text for (text,) in data.database.text] == [whole[tuple(row)] for row in data.database.image.tolist()]


@pytest.mark.parametrize("names", [["cat", "dog"], ["Würfel", "élan"]])
def test_class_names_as_labels_in_hdf5(tmp_path, names):
    with h5py.File(tmp_path / "a.h5", "w") as opened:
        opened["image"], opened["text"] = RANDOM.random((COUNT, 6)), RANDOM.random((COUNT, 4))
        opened.create_dataset("labels", data=names * (COUNT // 2), dtype=h5py.string_dtype())
    data = load(tmp_path / "a.h5")
    assert data.class_names == tuple(sorted(names)) and set(data.train.labels.tolist()) == {0, 1}


@pytest.mark.parametrize("words", [("train", "test"), ("train", "query"), ("Train", "Test"), ("training", "testing")])
def test_groups_of_hdf5_by_the_names_of_splits(tmp_path, words):
    with h5py.File(tmp_path / "a.h5", "w") as opened:
        for word, count in zip(words, (12, 8), strict=True):
            opened[f"{word}/image"] = RANDOM.random((count, 6))
            opened.create_dataset(f"{word}/text", data=CAPTIONS[:count], dtype=h5py.string_dtype())
            opened.create_dataset(f"{word}/labels", data=["cat", "dog"] * (count // 2), dtype=h5py.string_dtype())
    data = load(tmp_path / "a.h5")
    assert (len(data.train), len(data.query)) == (12, 8)
    assert data.query.text[3] == (CAPTIONS[3],) and data.class_names == ("cat", "dog")


def test_text_as_bytes_in_numpy_files_and_pickles(tmp_path):
    arrays = {"image": RANDOM.random((COUNT, 6)), "text": np.array(CAPTIONS).astype("S"), "labels": [b"a", b"b"] * 20}
    np.savez(tmp_path / "a.npz", **arrays)
    assert load(tmp_path / "a.npz").train.text[0][0].startswith("a picture")
    (tmp_path / "a.pkl").write_bytes(pickle.dumps(arrays | {"text": CAPTIONS}))
    assert load(tmp_path / "a.pkl").class_names == ("a", "b")


SPLIT_NAMES = {
    "NRCH": ("Img{}", "Tag{}", "Lab{}", "Train", "Query", "DataBase"),
    "LtCMH": ("I_{}", "T_{}", "L_{}", "tra", "te", "tr"),
    "in words": ("I_{}", "T_{}", "L_{}", "train", "test", "retrieval"),
}


def three_splits(layout):
    *patterns, train, query, database = SPLIT_NAMES[layout]
    arrays = {}
    for word, count in ((train, 50), (query, 20), (database, 180)):
        values = RANDOM.random((count, 32)), RANDOM.random((count, 9)), np.arange(count)[:, None] % [2, 3, 5, 7] == 0
        arrays |= {p.format(word): v.astype(float) for p, v in zip(patterns, values, strict=True)}
    return arrays


@pytest.mark.parametrize("layout", SPLIT_NAMES)
@pytest.mark.parametrize("ending", ["h5", "mat"])
def test_layouts_of_three_splits(tmp_path, layout, ending):
    arrays, file = three_splits(layout), tmp_path / f"a.{ending}"
    if ending == "mat":
        scipy.io.savemat(file, arrays)
    else:
        with h5py.File(file, "w") as opened:
            opened.update(arrays)
    data = load(file)
    assert (len(data.train), len(data.query), len(data.database)) == (50, 20, 180)


@pytest.mark.parametrize("lacking", ["I_tra", "T_tra", "L_tra"])
def test_a_training_set_with_a_part_missing_is_not_left_out_without_a_word(tmp_path, lacking):
    arrays = three_splits("LtCMH")
    del arrays[lacking]
    scipy.io.savemat(tmp_path / "a.mat", arrays)
    with pytest.raises(InputError, match=rf"looks like LtCMH, .* has no train \w+ \({lacking}\)"):
        load(tmp_path / "a.mat")


@pytest.mark.parametrize("image", [(COUNT, 64, 1, 1), (COUNT, 1, 64), (COUNT, 64, 1), (COUNT, 3, 1, 1)])
@pytest.mark.parametrize("text", [(COUNT, 10), (COUNT, 10, 1, 1)])
def test_pooled_features_keep_their_rows(tmp_path, image, text):
    x = RANDOM.random(image).astype(np.float32)
    np.savez(tmp_path / "a.npz", train_image=x, train_text=RANDOM.random(text), train_labels=np.arange(COUNT) % 3,
             query_image=x, query_text=RANDOM.random(text), query_labels=np.arange(COUNT) % 3)  # fmt: skip
    data = load(tmp_path / "a.npz")
    assert np.array_equal(data.train.image, x.reshape(COUNT, -1)) and data.text_dim == 10
    np.savez(tmp_path / "b.npz", image=x, text=RANDOM.random(text), labels=np.arange(COUNT) % 3)
    assert load(tmp_path / "b.npz").image_dim == x[0].size


def test_feature_maps_say_what_to_do(tmp_path):
    np.savez(tmp_path / "a.npz", image=np.ones((40, 64, 7, 7)), text=np.ones((40, 10)), labels=np.arange(40) % 3)
    with pytest.raises(InputError, match=r"features \(N, D\), got shape \(40, 64, 7, 7\); .* mean over their last two"):
        load(tmp_path / "a.npz")


@pytest.mark.parametrize("below", ["", "cifar-10-batches-mat"])
def test_cifar10_in_its_matlab_version(tmp_path, below):
    folder = tmp_path / below
    folder.mkdir(exist_ok=True)
    batches = {}
    for name in [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]:
        data, labels = (
            RANDOM.integers(0, 256, (20, 3072), dtype=np.uint8),
            RANDOM.integers(0, 10, (20, 1), dtype=np.uint8),
        )
        scipy.io.savemat(folder / f"{name}.mat", {"data": data, "labels": labels, "batch_label": name})
        batches[name] = data, labels
    names = np.array([f"class{i}" for i in range(10)], dtype=object)[:, None]
    scipy.io.savemat(folder / "batches.meta.mat", {"label_names": names})
    result = load_images(tmp_path)
    data, labels = batches["data_batch_2"]
    assert (len(result.train), len(result.test), result.class_names[3]) == (100, 20, "class3")
    assert np.array_equal(result.train.image[20:40].numpy().reshape(20, -1), data)
    assert result.train.labels[20:40].tolist() == labels[:, 0].tolist()
    (folder / "data_batch_4.mat").unlink()
    with pytest.raises(InputError, match=r"data_batch_4 not found"):
        load_images(tmp_path)


WRONG = ["abc", 2.5, -1, True, "1e3", None, [3]]


@pytest.mark.parametrize("value", [v for v in WRONG if v is not None])
@pytest.mark.parametrize("option", ["query", "train", "seed"])
def test_numbers_of_other_kinds_for_files(tmp_path, option, value):
    np.savez(tmp_path / "a.npz", image=np.eye(60), text=np.eye(60), labels=np.arange(60) % 3)
    with pytest.raises(InputError, match=f"{option} must be an integer of .* or more.*, got"):
        load(tmp_path / "a.npz", **{option: value})


@pytest.mark.parametrize("value", WRONG)
@pytest.mark.parametrize("option", ["count", "train", "query", "database", "seed"])
def test_numbers_of_other_kinds_for_the_shapes(option, value):
    if option == "count" and value is None:
        return
    with pytest.raises(InputError, match=f"{option} must be an integer"):
        load("shapes", **{option: value})


@pytest.mark.parametrize("value", [v for v in WRONG if v is not None])
@pytest.mark.parametrize("option", ["train", "test", "seed"])
def test_numbers_of_other_kinds_for_images(option, value):
    with pytest.raises(InputError, match=f"{option} must be an integer"):
        load_images("shapes", **{option: value})


def test_text_options_of_other_kinds(tmp_path):
    np.savez(tmp_path / "a.npz", image=np.eye(60), text=np.eye(60), labels=np.arange(60) % 3)
    for options in ({"image": 3}, {"text": ["a"]}, {"database": 1}, {"database": ["query"]}):
        with pytest.raises(InputError, match=f"{next(iter(options))} must be"):
            load(tmp_path / "a.npz", **options)
    with pytest.raises(InputError, match="form must be"):
        load("shapes", form=["raw"])


def test_what_cannot_be_saved_is_refused_before_anything_is_written(tmp_path):
    pairs = Pairs(torch.eye(3), torch.eye(3, 2), torch.arange(3))
    data = PairedDataset("x", pairs, pairs, pairs)
    (tmp_path / "folder.npz").mkdir()
    for path, value, message in (
        (tmp_path / "a.mat", data, r"ends in \.npz, got"),
        (tmp_path / "a", data, r"ends in \.npz, got"),
        (None, data, r"ends in \.npz, got 'None'"),
        (tmp_path / "folder.npz", data, "is a folder"),
        (tmp_path / "a.npz", {"a": 1}, "dataset must be a PairedDataset, got dict"),
        (tmp_path / "a.npz", None, "got NoneType"),
        (tmp_path / "a.npz", pairs, "got Pairs"),
    ):
        with pytest.raises(InputError, match=message):
            save_pairs(path, value)
    assert [file.name for file in tmp_path.iterdir()] == ["folder.npz"]


def test_masked_arrays_and_sparse_matrices_are_refused_by_name():
    x = np.ones((3, 2), np.float32)
    for value in (np.ma.masked_array(x, x > 0), scipy.sparse.csr_matrix(x)):
        with pytest.raises(InputError, match=f"image must be .* got {type(value).__name__}"):
            Pairs(value, x, np.arange(3))
