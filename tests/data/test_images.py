import pickle

import numpy as np
import pytest
import scipy.io
import torch

from cmr_fast.data import ImageDataset, Images, load, load_images
from cmr_fast.errors import InputError

NAMES = [f"data_batch_{n}" for n in range(1, 6)] + ["test_batch"]


def write_cifar(folder, each=20, protocol=2, keys=bytes):
    random = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    batches = {}
    for name in NAMES:
        data = random.integers(0, 256, (each, 3072), dtype=np.uint8)
        labels = random.integers(0, 10, each).tolist()
        key = (lambda text: text.encode()) if keys is bytes else str
        (folder / name).write_bytes(
            pickle.dumps({key("data"): data, key("labels"): labels, key("batch_label"): key(name)}, protocol)
        )
        batches[name] = data, labels
    classes = [f"class{n}".encode() for n in range(10)]
    (folder / "batches.meta").write_bytes(pickle.dumps({b"label_names": classes}, protocol))
    return batches


@pytest.mark.parametrize("keys", [bytes, str])
@pytest.mark.parametrize("below", ["", "cifar-10-batches-py"])
def test_cifar10_as_it_lies_on_disk(tmp_path, keys, below):
    batches = write_cifar(tmp_path / below, keys=keys)
    found = load_images(tmp_path)
    assert (found.name, len(found.train), len(found.test), found.num_classes) == ("cifar10", 100, 20, 10)
    data, labels = batches["data_batch_2"]
    assert np.array_equal(found.train.image[20:40].numpy().reshape(20, -1), data)
    assert found.train.labels[20:40].tolist() == labels
    assert found.train.image[21, 1, 0, 2] == data[1, 1024 + 2]  # red, green, blue planes, by rows
    assert found.class_names[3] == "class3"
    assert found.test.pixels().max() <= 1 and found.test.pixels().dtype == torch.float32


@pytest.mark.parametrize("matlab", [False, True])
def test_cifar100_with_its_fine_labels(tmp_path, matlab):
    random = np.random.default_rng(0)
    folder = tmp_path / ("cifar-100-matlab" if matlab else "cifar-100-python")
    folder.mkdir()
    kept = {}

    def write(name, values):
        if matlab:
            scipy.io.savemat(folder / f"{name}.mat", values)
        else:
            (folder / name).write_bytes(pickle.dumps({key.encode(): v for key, v in values.items()}, 2))

    for name, count in (("train", 30), ("test", 11)):
        data = random.integers(0, 256, (count, 3072), dtype=np.uint8)
        fine, coarse = random.integers(0, 100, count).tolist(), random.integers(0, 20, count).tolist()
        if matlab:
            fine, coarse = (np.array(ids, dtype=np.uint8)[:, None] for ids in (fine, coarse))
        write(name, {"data": data, "fine_labels": fine, "coarse_labels": coarse})
        kept[name] = data, np.ravel(fine).tolist()
    names = [f"class{n}" for n in range(100)]
    write("meta", {"fine_label_names": np.array(names, dtype=object)[:, None] if matlab else names})
    for place in (tmp_path, folder):
        found = load_images(place)
        assert (found.name, len(found.train), len(found.test), found.num_classes) == ("cifar100", 30, 11, 100)
        assert found.test.labels.tolist() == kept["test"][1] and found.class_names[42] == "class42"
        assert np.array_equal(found.train.image.numpy().reshape(30, -1), kept["train"][0])
    write("test", {"data": data, "fine_labels": np.full((11, 1), 100) if matlab else [100] * 11})
    with pytest.raises(InputError, match="CIFAR-100 has classes 0 to 99, got 100 to 100"):
        load_images(tmp_path)


@pytest.mark.realdata
def test_the_real_cifar10(data_root, tmp_path):
    import subprocess
    import sys

    pytest.importorskip("PIL")
    subprocess.run([sys.executable, data_root / "unpack.py", tmp_path, "cifar10"], check=True, capture_output=True)
    found = load_images(tmp_path)
    assert (
        found.train.labels.bincount().tolist() == [5000] * 10 and found.test.labels.bincount().tolist() == [1000] * 10
    )
    assert found.class_names[:2] == ("airplane", "automobile")
    few = load_images(tmp_path, train=1000, test=101, seed=1)
    assert few.train.labels.bincount().tolist() == [100] * 10 and len(few.test) == 101
    assert not torch.equal(few.train.image, load_images(tmp_path, train=1000, seed=2).train.image)


def test_svhn_as_it_lies_on_disk(tmp_path):
    random = np.random.default_rng(0)
    arrays = {}
    for split, count in (("train", 30), ("test", 11)):
        x = random.integers(0, 256, (32, 32, 3, count), dtype=np.uint8)
        y = random.integers(1, 11, (count, 1), dtype=np.uint8)
        y[:2] = [[10], [9]]
        scipy.io.savemat(tmp_path / f"{split}_32x32.mat", {"X": x, "y": y})
        arrays[split] = x, y
    found = load_images(tmp_path)
    x, y = arrays["train"]
    assert found.name == "svhn" and found.num_classes == 10
    assert found.train.labels[:2].tolist() == [0, 9]
    assert np.array_equal(found.train.image[7].numpy(), x[..., 7].transpose(2, 0, 1))


def test_shapes_are_the_same_again_and_splits_differ():
    a, b = (load_images("shapes", train=50, test=20) for _ in range(2))
    assert torch.equal(a.train.image, b.train.image) and a.num_classes == 8
    assert not torch.equal(a.train.image[:20], a.test.image)
    assert not torch.equal(a.train.image, load_images("shapes", train=50, test=20, seed=1).train.image)


def test_hold_out_takes_each_class_its_share():
    data = load_images("shapes", train=800, test=10)
    split = data.hold_out(0.25, seed=3)
    assert split.valid is not None and len(split.valid) + len(split.train) == 800
    shares = split.valid.labels.bincount() / data.train.labels.bincount()
    assert ((shares > 0.2) & (shares < 0.3)).all()


def break_label(folder):
    (folder / "data_batch_3").write_bytes(pickle.dumps({b"data": np.zeros((2, 3072), np.uint8), b"labels": [0, 10]}))


def break_shape(folder):
    (folder / "data_batch_3").write_bytes(pickle.dumps({b"data": np.zeros((2, 3073), np.uint8), b"labels": [0, 1]}))


def break_count(folder):
    (folder / "test_batch").write_bytes(pickle.dumps({b"data": np.zeros((2, 3072), np.uint8), b"labels": [0]}))


def cut(folder):
    (folder / "data_batch_5").write_bytes((folder / "data_batch_5").read_bytes()[:1000])


class Evil:
    def __reduce__(self):
        return (print, ("run",))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (break_label, "classes 0 to 9"),
        (break_shape, r"uint8 \(N, 3072\)"),
        (break_count, "labels must be 2 integers"),
        (cut, "damaged"),
        (lambda f: (f / "data_batch_4").unlink(), "data_batch_4 not found"),
        (lambda f: (f / "test_batch").write_bytes(pickle.dumps(Evil())), "nothing was run"),
        (lambda f: (f / "test_batch").write_bytes(pickle.dumps({b"x": 1})), "has no 'data'"),
    ],
)
def test_damaged_files_are_refused(tmp_path, damage, message):
    write_cifar(tmp_path)
    damage(tmp_path)
    with pytest.raises(InputError, match=message):
        load_images(tmp_path)


def test_what_is_not_there_is_said(tmp_path):
    with pytest.raises(InputError, match="no data at"):
        load_images(tmp_path / "nothing")
    with pytest.raises(InputError, match="no labelled images found"):
        load_images(tmp_path)
    write_cifar(tmp_path)
    with pytest.raises(InputError, match="without texts"):
        load(tmp_path)
    with pytest.raises(InputError, match="from 1 to the 100"):
        load_images(tmp_path, train=101)
    images = Images(torch.zeros(2, 3, 4, 4, dtype=torch.uint8), torch.tensor([0, 1]))
    with pytest.raises(InputError, match="one size"):
        ImageDataset("x", images, Images(torch.zeros(1, 3, 5, 4, dtype=torch.uint8), torch.tensor([0])))
    with pytest.raises(InputError, match="uint8"):
        Images(torch.zeros(2, 3, 4, 4), torch.tensor([0, 1]))
    with pytest.raises(InputError, match="one an image"):
        Images(torch.zeros(2, 3, 4, 4, dtype=torch.uint8), torch.tensor([0]))


def test_a_sample_is_mixed_and_takes_each_class_its_share():
    images = Images(torch.zeros(60, 3, 4, 4, dtype=torch.uint8), torch.arange(60) // 20)  # sorted by class, as some are
    few = images.sample(30)
    assert few.labels.bincount().tolist() == [10, 10, 10] and len(few.labels[:10].unique()) == 3
    assert torch.equal(few.labels, images.sample(30).labels)
    assert sorted(images.sample(1000).labels.tolist()) == images.labels.tolist()
