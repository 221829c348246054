import pytest
import torch

from cmr_fast.data import PairedDataset, Pairs, load, load_images
from cmr_fast.errors import InputError


def pairs(labels, image=None, text=None):
    labels = torch.as_tensor(labels)
    count = len(labels)
    return Pairs(
        torch.randn(count, 3) if image is None else image, torch.randn(count, 2) if text is None else text, labels
    )


def test_rows_must_agree():
    with pytest.raises(InputError, match=r"same number of rows, got \{'image': 4, 'text': 3, 'labels': 3\}"):
        pairs([0, 1, 2], image=torch.zeros(4, 3))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("modality", ["image", "text"])
def test_features_must_be_finite(bad, modality):
    values = torch.zeros(5, 4)
    values[3, 1] = values[4, 0] = bad
    with pytest.raises(InputError, match=f"{modality} features must be finite: 2 rows are not, the first is row 3"):
        pairs([0, 1, 0, 1, 0], **{modality: values})


@pytest.mark.parametrize(
    "values", [torch.zeros(2, dtype=torch.float32), torch.zeros(2, 3, dtype=torch.int32), torch.zeros(2, 3, 1)]
)
def test_features_must_be_a_matrix_of_floats(values):
    with pytest.raises(InputError, match=r"must be floats \(N, dim\)"):
        pairs([0, 1], text=values)


def test_raw_images_must_have_three_channels_first():
    pairs([0, 1], image=torch.zeros(2, 3, 8, 8, dtype=torch.uint8))
    for shape, more in (((2, 8, 8, 3), r".*permute\(0, 3, 1, 2\)"), ((2, 3), "")):
        with pytest.raises(InputError, match=r"\(N, 3, H, W\)" + more):
            pairs([0, 1], image=torch.zeros(shape, dtype=torch.uint8))


@pytest.mark.parametrize(
    "labels",
    [
        torch.tensor([0.0, 1.0]),
        torch.tensor([-1, 1]),
        torch.tensor([[0, 2], [1, 0]], dtype=torch.uint8),
        torch.eye(2),
        torch.zeros(2, 2, 2, dtype=torch.uint8),
    ],
)
def test_labels_must_be_ids_or_multi_hot(labels):
    with pytest.raises(InputError):
        pairs(labels)


def test_select_keeps_rows_together():
    captions = tuple((str(i),) for i in range(4))
    chosen = pairs([0, 1, 2, 3], image=torch.arange(4.0)[:, None], text=captions).select(torch.tensor([2, 0]))
    assert chosen.image[:, 0].tolist() == [2, 0]
    assert chosen.text == (("2",), ("0",))
    assert chosen.labels.tolist() == [2, 0]


@pytest.mark.parametrize("split", ["train", "query", "database", "valid"])
def test_no_split_may_be_empty(split):
    splits = dict.fromkeys(("train", "query", "database", "valid"), pairs([0, 1]))
    splits[split] = pairs(torch.zeros(0, dtype=torch.int64))
    with pytest.raises(InputError, match=f"the {split} split is empty"):
        PairedDataset("made", **splits)


@pytest.mark.parametrize(
    "labels",
    [
        torch.zeros(4, dtype=torch.int64),
        torch.full((4,), 7),
        torch.tensor([[0, 1, 0]] * 4, dtype=torch.uint8),
        torch.ones(4, 1, dtype=torch.uint8),
    ],
)
@pytest.mark.parametrize("split", ["train", "database"])
def test_one_class_only_is_refused(labels, split):
    two = torch.tensor([0, 7, 7, 0]) if labels.ndim == 1 else torch.ones(4, labels.shape[1], dtype=torch.uint8)
    splits = dict.fromkeys(("train", "query", "database"), pairs(two)) | {split: pairs(labels)}
    with pytest.raises(
        InputError, match=f"{split} labels hold one class only" if labels.ndim == 1 else "one class only"
    ):
        PairedDataset("made", **splits)


def test_one_query_is_enough():
    both = pairs([0, 1])
    assert PairedDataset("made", both, pairs([1]), both).num_classes == 2


def test_widths_must_agree_over_splits():
    with pytest.raises(InputError, match="text must have one width"):
        PairedDataset("made", pairs([0, 1]), pairs([0, 1], text=torch.zeros(2, 5)), pairs([0, 1]))


def test_class_names_must_fit():
    both = pairs([0, 1])
    PairedDataset("made", both, both, both, class_names=("a", "b", "never seen"))
    with pytest.raises(InputError, match="1 class names for labels of 2 classes"):
        PairedDataset("made", both, both, both, class_names=("a",))


def test_hold_out_takes_from_every_class_and_loses_nothing():
    labels = torch.arange(100) % 4
    whole = pairs(labels, image=torch.arange(100.0)[:, None])
    data = PairedDataset("made", whole, whole, whole)
    held = data.hold_out(0.2, seed=3)
    assert torch.bincount(held.valid.labels).tolist() == [5, 5, 5, 5]
    together = torch.cat([held.train.image, held.valid.image])[:, 0].sort().values
    assert torch.equal(together, whole.image[:, 0])
    assert torch.equal(held.valid.image, data.hold_out(0.2, seed=3).valid.image)
    assert not torch.equal(held.valid.image, data.hold_out(0.2, seed=4).valid.image)
    with pytest.raises(InputError, match="between 0 and 1"):
        data.hold_out(1.0, seed=0)


def test_features_without_columns_and_ids_that_do_not_count_from_0_are_refused():
    image, text, labels = torch.randn(4, 3), torch.randn(4, 2), torch.tensor([0, 1, 0, 1])
    with pytest.raises(InputError, match=r"image features must have at least one column, got shape \(4, 0\)"):
        Pairs(image[:, :0], text, labels)
    with pytest.raises(InputError, match="below 1000000, got 1000000000000"):
        Pairs(image, text, labels * 10**12)


@pytest.mark.parametrize("seed", [2**64, 2**70, -1, 1.5])
def test_seeds_that_torch_does_not_take(seed):
    for draw in (
        lambda: load("shapes", count=60, seed=seed),
        lambda: load("shapes", count=60).hold_out(0.2, seed),
        lambda: load_images("shapes", train=9, test=9, seed=seed),
        lambda: load_images("shapes", train=9, test=9).hold_out(0.2, seed),
        lambda: load_images("shapes", train=9, test=9).train.sample(3, seed),
    ):
        with pytest.raises(InputError, match="seed must be an integer of 0 or more and below 18446744073709551616"):
            draw()


def test_the_largest_seed():
    data = load("shapes", count=60, seed=2**64 - 1).hold_out(0.2, 2**64 - 1)
    assert data.valid is not None and len(data.valid) == 6
