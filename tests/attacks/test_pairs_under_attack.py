"""Attacks on images and captions by name, and what they leave of retrieval."""

import numpy as np
import pytest
import torch
from captions import CAPTIONS, Victim, masked_lm, victim

from cmr_fast.attacks.multimodal import registry
from cmr_fast.attacks.multimodal.recall import pairs_under_attack
from cmr_fast.errors import InputError

OWNER = torch.tensor([0, 0, 1, 1, 2, 2, 3, 3, 4, 4])


def ranks(images, texts):
    """Plain: a query's rank is one more than the items that score higher."""
    with torch.no_grad():
        x, y = victim().encode_image(images), victim().encode_text(*victim().tokenize(texts))
    scores = (x @ y.T).numpy()
    owner = OWNER.numpy()
    tr = [min(1 + (scores[i] > scores[i, j]).sum() for j in np.flatnonzero(owner == i)) for i in range(len(scores))]
    ir = [1 + (scores[:, j] > scores[i, j]).sum() for j, i in enumerate(owner)]
    return {"tr": np.array(tr), "ir": np.array(ir)}


def pictures():
    """Images that their captions find: moved until they do."""
    images = torch.rand((5, 3, 12, 12), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    texts = victim().encode_text(*victim().tokenize(CAPTIONS)).detach()
    guides = torch.zeros(5, 16, dtype=torch.float64).index_add_(0, OWNER, texts)
    for _ in range(80):
        images.requires_grad_()
        loss = torch.nn.functional.cross_entropy(20 * victim().encode_image(images) @ guides.T, torch.arange(5))
        images = (images - 0.02 * torch.autograd.grad(loss, images)[0].sign()).detach().clamp(0, 1)
    return images


def test_an_undefended_model_falls():
    images = pictures()
    seen = {"clean": ranks(images, CAPTIONS)}
    for name in registry.MAKERS:
        attack = registry.make(name, victim(), masked_lm(), eps=16 / 255, captions=(CAPTIONS, OWNER))
        moved, texts = attack(images, list(CAPTIONS), OWNER)
        assert float((moved - images).abs().max()) <= 16 / 255 + 1e-15
        seen[name] = ranks(moved, texts)
    result = pairs_under_attack(seen, k=(1, 2))
    assert result.clean["tr"][1] >= 0.8
    for name in ("sga", "sga-single-scale"):
        assert result.by_attack[name]["ir"][1] < result.clean["ir"][1], name
        assert result.success[name]["tr"][1] > 0.3, name
    assert result.worst["tr"][1] <= min(recall["tr"][1] for recall in result.by_attack.values())
    assert [name for name, _ in result.rows()] == ["clean", *registry.MAKERS, "worst case of a query"]


def test_rates_by_hand():
    seen = {
        "clean": {"tr": np.array([1, 1, 3]), "ir": np.array([1, 2, 1, 1])},
        "one": {"tr": np.array([4, 1, 1]), "ir": np.array([1, 1, 9, 1])},
        "two": {"tr": np.array([1, 2, 1]), "ir": np.array([1, 2, 1, 2])},
    }
    result = pairs_under_attack(seen, k=[1, 3])
    assert result.clean == {"tr": {1: 2 / 3, 3: 1.0}, "ir": {1: 0.75, 3: 1.0}}
    assert result.success["one"]["tr"] == {1: 0.5, 3: 1 / 3} and result.drop["one"]["tr"][1] == 0.0
    assert result.success["one"]["ir"] == {1: 1 / 3, 3: 0.25} and result.drop["one"]["ir"] == {1: 0.0, 3: 0.25}
    assert result.worst == {"tr": {1: 1 / 3, 3: 2 / 3}, "ir": {1: 0.25, 3: 0.75}}
    assert result.success["worst"]["tr"] == {1: 1.0, 3: 1 / 3} and result.drop["worst"]["ir"] == {1: 0.5, 3: 0.25}


def test_nothing_right_before():
    seen = {name: {"tr": np.array([2]), "ir": np.array([2])} for name in ("clean", "sga")}
    assert pairs_under_attack(seen, k=[1]).success["sga"]["tr"] == {1: 0.0}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"clean": None}, 'must hold "clean"'),
        ({"sga": {"tr": np.array([1, 2])}}, '"tr" and "ir"'),
        ({"sga": {"tr": np.array([1]), "ir": np.array([1, 1])}}, r"integers \(2,\) as the clean ones"),
        ({"sga": {"tr": np.array([0, 1]), "ir": np.array([1, 1])}}, "ranks count from 1"),
        ({"sga": {"tr": np.array([0.5, 1]), "ir": np.array([1, 1])}}, "integers"),
    ],
)
def test_bad_ranks_are_named(change, message):
    good = {"tr": np.array([1, 2]), "ir": np.array([1, 2])}
    seen = {name: value for name, value in ({"clean": good, "sga": good} | change).items() if value is not None}
    with pytest.raises(InputError, match=message):
        pairs_under_attack(seen)


def test_names():
    with pytest.raises(InputError, match="unknown attack 'square20' on images and captions"):
        registry.make("square20", victim())
    with pytest.raises(InputError, match="cmr-fast train mlm"):
        registry.make("sga", victim())
    images = torch.rand(1, 3, 12, 12)
    same, texts = registry.make("character", Victim())(images, ["a dog"])
    assert same is images and texts != ["a dog"]
