import numpy as np
import pytest
import torch

from cmr_fast.data import convert
from cmr_fast.errors import InputError


def numbered(*shape):
    return np.arange(np.prod(shape)).reshape(shape)


@pytest.mark.parametrize("turn", [(), ("image",), ("text",), ("labels",), ("image", "text", "labels")])
def test_the_shared_size_is_the_number_of_items(turn):
    rows = {"image": numbered(7, 5), "text": numbered(7, 3), "labels": numbered(7, 1)}
    found = convert.rows_first({name: a.T if name in turn else a for name, a in rows.items()})
    assert all(np.array_equal(found[name], rows[name]) for name in rows)


def test_a_square_matrix_lies_as_the_others_do():
    square, labels = numbered(7, 7), numbered(7)
    columns = {"image": square.T, "text": numbered(7, 3).T, "labels": labels}
    assert np.array_equal(convert.rows_first(columns)["image"], square)
    rows = {"image": square, "text": numbered(7, 3), "labels": labels[None]}
    assert np.array_equal(convert.rows_first(rows)["image"], square)
    alone = {"image": square, "text": square, "labels": labels}
    assert np.array_equal(convert.rows_first(alone)["image"], square)
    with pytest.raises(InputError, match="on which axis of image"):
        convert.rows_first({"image": square, "text": numbered(7, 3), "labels": numbered(4, 7)})


def test_two_numbers_that_both_fit():
    both = {"image": numbered(7, 5), "text": numbered(7, 5), "labels": numbered(7, 5)}
    assert np.array_equal(convert.rows_first(both)["image"], both["image"])
    with pytest.raises(InputError, match=r"\[5, 7\] items would both fit: .*labels \(5, 7\)"):
        convert.rows_first(both | {"labels": numbered(5, 7)})


def test_no_number_fits():
    with pytest.raises(InputError, match=r"disagree on the number of items: image \(7, 5\), text \(6, 3\)"):
        convert.rows_first({"image": numbered(7, 5), "text": numbered(6, 3), "labels": numbered(7)})


def test_one_item_and_one_feature():
    one = {"image": numbered(1, 5), "text": numbered(1, 3), "labels": numbered(1, 1)}
    assert {name: a.shape for name, a in convert.rows_first(one).items()} == {name: a.shape for name, a in one.items()}
    narrow = {"image": numbered(7, 1), "text": numbered(1, 7), "labels": numbered(7, 1)}
    assert {a.shape for a in convert.rows_first(narrow).values()} == {(7, 1)}


@pytest.mark.parametrize("axes", [(0, 1, 2, 3), (0, 2, 3, 1), (2, 3, 1, 0), (1, 2, 3, 0), (3, 2, 1, 0), (0, 2, 1, 3)])
def test_images_in_any_order(axes):
    stack = numbered(7, 3, 4, 5).astype(np.uint8)
    turned = convert.rows_first({"images": stack.transpose(axes), "labels": numbered(7)})["images"]
    found = convert.image(turned, "images")
    assert found.dtype == torch.uint8
    # height and width keep the order that they had on disk
    keeps = axes.index(2) < axes.index(3)
    assert np.array_equal(found.numpy(), stack if keeps else stack.swapaxes(2, 3))
    assert torch.equal(convert.image(turned.astype(np.float64), "images"), found)


def test_images_that_are_none():
    with pytest.raises(InputError, match="3 channels"):
        convert.image(np.zeros((2, 4, 5, 6), dtype=np.uint8), "images")
    for value in (0.5, 256, -1, np.nan):
        with pytest.raises(InputError, match="whole numbers from 0 to 255"):
            convert.image(np.full((2, 3, 5, 6), value), "images")


IDS = torch.tensor([0, 2, 1, 2])


@pytest.mark.parametrize(
    "given",
    [
        np.array([0, 2, 1, 2], dtype=np.uint8),
        np.array([1.0, 3.0, 2.0, 3.0]),
        np.array([[5], [7], [6], [7]]),
        np.eye(3)[[0, 2, 1, 2]],
        2 * np.eye(3, dtype=int)[[0, 2, 1, 2]] - 1,
        np.eye(3, dtype=bool)[[0, 2, 1, 2]],
    ],
)
def test_single_labels_in_every_dress(given):
    (first, second), names = convert.labels([given[:3], given[3:]], "labels")
    assert torch.equal(torch.cat([first, second]), IDS)
    assert first.dtype == torch.int64
    assert names == ()


def test_the_base_is_told_from_all_splits():
    (train, test), _ = convert.labels([np.array([1, 2]), np.array([2, 3])], "labels")
    assert (train.tolist(), test.tolist()) == ([0, 1], [1, 2])


def test_several_labels():
    rows = np.array([[1, 0, 1], [0, 0, 0], [0, 1, 0]])
    for given in (rows, rows.astype(float), 2 * rows - 1):
        (found,), _ = convert.labels([given], "labels")
        assert found.dtype == torch.uint8
        assert np.array_equal(found.numpy(), rows)
    (first, second), _ = convert.labels([np.eye(3), np.array([[1, 1, 0]])], "labels")
    assert first.dtype == second.dtype == torch.uint8


def test_labels_in_words():
    (found,), names = convert.labels([np.array(["sea", "art", "sea"])], "labels")
    assert found.tolist() == [1, 0, 1]
    assert names == ("art", "sea")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (np.array([0.5, 1]), "whole numbers"),
        (np.array([-1, 1]), "whole numbers of 0 or more"),
        (np.array([0, np.nan]), "finite"),
        (np.array([[0, 3], [1, 0]]), "0/1 or -1/1 columns, got"),
        (np.array([[0, -1], [1, 0]]), "0/1 or -1/1"),
        (np.array([0, 123456]), "123456 apart in 2 rows"),
        (np.zeros((0,)), "empty"),
        (np.zeros((2, 2, 2)), "columns"),
        (np.array([["a", "b"]]), "text"),
    ],
)
def test_labels_that_are_none(given, message):
    with pytest.raises(InputError, match=message):
        convert.labels([given], "LAll")


def test_splits_with_different_kinds_of_labels():
    with pytest.raises(InputError, match=r"the same in all splits, got \(2, 3\), \(2,\)"):
        convert.labels([np.zeros((2, 3)), np.zeros(2)], "labels")


@pytest.mark.parametrize("value", [{"a": 1}, [[1, 2], [3]], 3, ["a", None], np.array(5), [[0] * 10**6] * 10**6])
def test_what_is_no_array(value):
    with pytest.raises(InputError, match="tags"):
        convert.as_array(value, "tags")


def test_features_and_captions():
    assert convert.features(np.array([[1, 2]], dtype=np.uint8), "t").dtype == torch.float32
    assert convert.features(np.array([[1e300]]), "t").isinf().all()
    with pytest.raises(InputError, match="tags must be numbers"):
        convert.features(np.array(["a"]), "tags")
    assert convert.text(np.array([["a b", ""], ["c", "d"]]), "t") == (("a b",), ("c", "d"))
    assert convert.text(np.array(["a", "b"]), "t") == (("a",), ("b",))
