import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cmr_fast.errors import InputError
from cmr_fast.retrieval import evaluate_captions, evaluate_embeddings


def oracle(image, text, owner):
    """Ranks by sorting whole rows; equal scores by index."""
    scores = (image @ text.T).numpy()
    caption_ranks = np.array([1 + np.argsort(-scores[o], kind="stable").tolist().index(j) for j, o in enumerate(owner)])
    text_ranks = np.array([1 + np.argsort(-scores[:, j], kind="stable").tolist().index(o) for j, o in enumerate(owner)])
    best = np.array([min(r for r, o in zip(caption_ranks, owner, strict=True) if o == i) for i in range(len(image))])
    return caption_ranks, best, text_ranks


@given(st.integers(1, 12), st.integers(0, 20), st.integers(1, 3), st.integers(0, 10_000))
@settings(max_examples=60, deadline=None)
def test_ranks_are_those_of_sorted_rows(images, more, dim, seed):
    random = np.random.default_rng(seed)
    owner = np.concatenate([np.arange(images), random.integers(0, images, more)])
    random.shuffle(owner)
    # unit rows with few values: exact ties, of scores that float64 holds
    units = torch.cat([torch.eye(dim), -torch.eye(dim)]).double()
    image, text = (units[torch.from_numpy(random.integers(0, 2 * dim, n))] for n in (images, len(owner)))
    result = evaluate_captions(image, text, owner)
    for found, expected in zip(
        (result.caption_ranks, result.image_ranks, result.text_ranks), oracle(image, text, owner), strict=True
    ):
        assert found.tolist() == expected.tolist()


def test_recalls_are_those_of_evaluate_embeddings():
    random = np.random.default_rng(0)
    owner = np.repeat(np.arange(40), random.integers(1, 6, 40))
    image = random.standard_normal((40, 5))
    text = image[owner] + random.standard_normal((len(owner), 5))
    text[7] = text[11]
    result, shares = evaluate_captions(image, text, owner), {}
    shares["tr"] = evaluate_embeddings(image, text, np.arange(40), owner).recall_one_at([1, 5, 10])
    shares["ir"] = evaluate_embeddings(text, image, owner, np.arange(40)).recall_one_at([1, 5, 10])
    for way, expected in shares.items():
        assert list(result.recall()[way].values()) == pytest.approx(expected.tolist(), abs=1e-12)
    assert result.rsum == pytest.approx(100 * sum(float(s.sum()) for s in shares.values()))
    assert result.median_rank["ir"] == np.floor(np.median(result.text_ranks))
    assert result.mean_rank["tr"] == result.image_ranks.mean()


def test_any_order_of_captions_and_any_number_an_image():
    random = np.random.default_rng(1)
    owner = np.repeat(np.arange(9), random.integers(1, 5, 9))
    image, text = torch.randn(9, 4), torch.randn(len(owner), 4)
    order = random.permutation(len(owner))
    straight = evaluate_captions(image, text, owner)
    shuffled = evaluate_captions(image, text[order], owner[order])
    assert shuffled.caption_ranks.tolist() == straight.caption_ranks[order].tolist()
    assert shuffled.text_ranks.tolist() == straight.text_ranks[order].tolist()


@pytest.mark.parametrize(
    ("owner", "message"),
    [
        ([0, 1], r"integers \(3,\)"),
        ([0, 1, 5], "from 0 to 1"),
        ([0, 0, 0], "image 1 first"),
        ([0.0, 1.0, 1.0], "integers"),
    ],
)
def test_owners_that_do_not_fit(owner, message):
    with pytest.raises(InputError, match=message):
        evaluate_captions(torch.eye(2), torch.ones(3, 2), np.array(owner))


def test_folds_are_ranked_within_themselves():
    random = np.random.default_rng(2)
    owner = random.permutation(np.repeat(np.arange(20), 3))
    image, text = random.standard_normal((20, 6)), random.standard_normal((60, 6))
    result = evaluate_captions(image, text, owner, folds=5)
    shares = []
    for fold in range(5):
        images, mine = slice(4 * fold, 4 * fold + 4), owner // 4 == fold
        alone = evaluate_captions(image[images], text[mine], owner[mine] - 4 * fold)
        assert result.image_ranks[images].tolist() == alone.image_ranks.tolist()
        assert result.text_ranks[mine].tolist() == alone.text_ranks.tolist()
        assert result.caption_ranks[mine].tolist() == alone.caption_ranks.tolist()
        shares.append(alone.rsum)
    assert result.rsum == pytest.approx(np.mean(shares))
    with pytest.raises(InputError, match="folds must divide the 20 images, got 3"):
        evaluate_captions(image, text, owner, folds=3)
