import dataclasses
import zlib

import numpy as np
import pytest
import torch

from cmr_fast.data import ImageDataset, Images, PairedDataset, Pairs, load, load_images
from cmr_fast.errors import InputError

LABELS = torch.tensor([0, 1, 2, 1, 0])
IMAGES = torch.arange(5 * 3 * 2 * 2, dtype=torch.uint8).reshape(5, 3, 2, 2)
TEXTS = {
    "features": torch.arange(10.0).reshape(5, 2),
    "tokens": torch.arange(15).reshape(5, 3),
    "strings": tuple("abcde"),
    "captions": tuple((c, c + c) for c in "abcde"),
}
SPLITS = {name: Pairs(torch.arange(20.0).reshape(5, 4), text, LABELS) for name, text in TEXTS.items()}
SPLITS["images"] = Images(IMAGES, LABELS)


def parts(split):
    values = {f.name: getattr(split, f.name) for f in dataclasses.fields(split) if f.name != "rows"}
    return {name: v.tolist() if isinstance(v, torch.Tensor) else list(v) for name, v in values.items()}


@pytest.fixture(params=SPLITS)
def split(request):
    return SPLITS[request.param]


def test_a_batch_knows_its_rows_and_is_not_checked_again(split, monkeypatch):
    monkeypatch.setattr(type(split), "__post_init__", lambda self: pytest.fail("checked again"))
    rows = torch.tensor([3, 0, 3])
    batch = split.select(rows)
    assert split.rows is None and batch.rows is rows and len(batch) == 3
    assert parts(batch) == {name: [values[i] for i in (3, 0, 3)] for name, values in parts(split).items()}


def test_to_moves_floats_to_a_dtype_and_keeps_the_rest(split):
    moved = split.select(torch.tensor([1, 2])).to("cpu", torch.float64)
    assert moved.labels.dtype == torch.int64 and moved.rows.tolist() == [1, 2]
    assert moved.image.dtype == (torch.uint8 if isinstance(split, Images) else torch.float64)
    assert split.to("meta").labels.device.type == "meta"
    if not isinstance(split, Images) and not isinstance(split.text, torch.Tensor):
        assert moved.text == split.text[1:3]


def test_joined_is_one_after_the_other(split):
    both = split.select(torch.tensor([0, 1])).joined(split.select(torch.tensor([4])))
    assert both.rows is None and parts(both) == parts(split.select(torch.tensor([0, 1, 4])))


def test_splits_of_other_parts_are_not_joined():
    with pytest.raises(InputError, match=r"text of the two splits do not fit together: float32 \(5, 2\) and str x 5"):
        SPLITS["features"].joined(SPLITS["strings"])


def test_the_fingerprint_is_the_checksum_that_run_folders_hold():
    pairs = SPLITS["captions"]
    value = zlib.crc32(LABELS.numpy().tobytes())
    for raw in (pairs.image.numpy().tobytes(), repr(pairs.text).encode()):
        value = zlib.crc32(raw, value)
    assert pairs.fingerprint() == value
    # written by version 0.1
    assert load("shapes", form="raw", count=40).train.fingerprint() == 1165991646


def test_the_fingerprint_sees_each_part_and_not_the_rows(split):
    same = split.select(torch.arange(5))
    assert same.fingerprint() == split.fingerprint() != split.select(torch.tensor([1, 0, 2, 3, 4])).fingerprint()


def test_images_may_be_read_when_they_are_asked_for():
    class OnDisk:
        read = 0

        def __len__(self):
            return 5

        def __getitem__(self, rows):
            self.read += len(rows)
            return IMAGES[rows]

    lazy = dataclasses.replace(SPLITS["images"])
    object.__setattr__(lazy, "image", OnDisk())
    assert torch.equal(lazy.select(torch.tensor([4, 1])).pixels(), IMAGES[[4, 1]].float() / 255)
    assert lazy.image.read == 2


def test_arrays_of_numpy_are_taken():
    x = np.arange(6, dtype=np.float32).reshape(3, 2)
    pairs = Pairs(x, x.astype(np.int64), np.array([0, 1, 2]))
    assert torch.equal(pairs.image, torch.from_numpy(x)) and pairs.text.dtype == pairs.labels.dtype == torch.int64
    assert len(Images(IMAGES.numpy(), LABELS.numpy())) == 5


@pytest.mark.parametrize(
    ("image", "text", "labels", "message"),
    [
        ([[1.0]], [[1.0]], [0], "image must be a tensor or a numpy array .* got list"),
        (np.array([["a"]]), ("a",), torch.tensor([0]), "image must be an array of numbers, got dtype <U1"),
        (torch.zeros(3, 1), "abc", torch.tensor([0, 1, 0]), "N strings or tuples of strings, got str"),
        (torch.zeros(2, 1), ("a", ("b",)), torch.tensor([0, 1]), "got a tuple of str, tuple"),
        (torch.zeros(1, 1), None, torch.tensor([0]), "got NoneType"),
        (torch.zeros(1, 1), ("a",), None, "labels must be a tensor or a numpy array .* got NoneType"),
        (torch.zeros(1, 1), ("a",), torch.tensor(0), r"labels must .* got torch.strided \(\)"),
        (torch.eye(2).to_sparse(), ("a", "b"), torch.tensor([0, 1]), "torch.sparse_coo"),
        (torch.zeros(1, 1), ("a",), np.array([0], np.int32), r"int64 \(N,\) .* got torch.int32 \(1,\)"),
        (torch.zeros(1, 1), torch.zeros(1, 0, dtype=torch.int64), torch.tensor([0]), r"token ids must be int64 \(N, L"),
    ],
)
def test_parts_of_other_kinds_are_refused(image, text, labels, message):
    with pytest.raises(InputError, match=message):
        Pairs(image, text, labels)


def test_splits_of_other_kinds_are_refused():
    pairs = SPLITS["features"]
    with pytest.raises(InputError, match="the query split must be Pairs, got dict"):
        PairedDataset("x", pairs, {}, pairs)
    with pytest.raises(InputError, match="the test split must be Images, got NoneType"):
        ImageDataset("x", SPLITS["images"], None)


@pytest.mark.parametrize("dataset", [load("shapes", form="raw", count=40), load_images("shapes", train=20, test=10)])
def test_repr_is_a_summary_of_a_few_lines(dataset):
    lines = repr(dataset.hold_out(0.2, seed=0)).splitlines()
    assert len(lines) <= 5 and max(map(len, lines)) < 120 and dataset.name in lines[0]
    assert "valid" in repr(dataset.hold_out(0.2, seed=0)) and "uint8" in lines[1]
