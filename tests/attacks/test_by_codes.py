"""CgAT's and DHTA's attacks of queries by the codes of a database."""

import pytest
import torch
from test_hashing import BITS, Linear, items

from cmr_fast.attacks import CMLA, QueryAttack, anchor_code, by_codes, centre_codes
from cmr_fast.attacks.codes import Budget
from cmr_fast.errors import InputError
from cmr_fast.losses.dcmh import signs


@pytest.mark.parametrize("multi", [False, True])
def test_queries_leave_the_centres_of_their_labels(multi):
    model, (image, text, labels) = Linear(), items(30)
    labels = torch.nn.functional.one_hot(labels, 4) if multi else labels
    atk = QueryAttack(model, image, text, labels, image_eps=0.1, text_eps=0.2, steps=20)
    got = atk(image[:7], text[:7], labels[:7])
    for modality, x, eps in (("image", image, 0.1), ("text", text, 0.2)):
        other = "text" if modality == "image" else "image"
        codes = signs(model.encode(other, text if other == "text" else image).detach())
        centres = centre_codes(codes, labels, labels[:7])
        moved = getattr(got, modality)
        before, after = (model.encode(modality, v).tanh() * centres for v in (x[:7], moved))
        assert (after.sum(dim=1) < before.sum(dim=1)).all()
        assert 0 < float((moved - x[:7]).abs().max()) <= eps + 1e-12 and moved.min() >= 0 and moved.max() <= 1
        assert got.distortion[modality] == pytest.approx(float((moved - x[:7]).square().mean(dim=1).sqrt().mean()))
    assert got.targets is None and not got.losses
    again = atk(image[:7], text[:7], labels[:7])
    assert torch.equal(again.image, got.image)  # by its seed


@pytest.mark.parametrize("multi", [False, True])
def test_queries_are_led_to_the_anchor_of_another_label(multi):
    model, (image, text, labels) = Linear(), items(30)
    ids = 2 * labels  # class ids need not be counted from 0
    labels = torch.nn.functional.one_hot(labels, 4) if multi else ids  # of 4 labels nobody bears the last
    atk = QueryAttack(model, image, text, labels, targeted=True, image_eps=0.3, text_eps=0.3, steps=30, voters=30)
    got = atk(image[:9], text[:9], labels[:9])
    assert got.targets.shape == labels[:9].shape
    if multi:
        assert (
            (got.targets.sum(dim=1) == 1).all() and not (got.targets * labels[:9]).any() and not got.targets[:, 3].any()
        )
        targets = 2 * got.targets.argmax(dim=1)
    else:
        targets = got.targets
    assert (targets != ids[:9]).all() and len(targets.unique()) > 1
    codes = signs(model.encode("text", text).detach())
    anchors = torch.stack([anchor_code(codes[ids == t]) for t in targets])  # all that bear it vote
    agreement = [(model.encode("image", x).tanh() * anchors).sum(dim=1) for x in (image[:9], got.image)]
    assert (agreement[1] > agreement[0]).all()


def test_centre_codes_of_many_queries_are_made_some_at_a_time(monkeypatch):
    codes = signs(torch.randn(30, BITS, generator=torch.Generator().manual_seed(0)))
    labels, asked = torch.arange(30) % 4, torch.arange(11) % 5
    whole = centre_codes(codes, labels, asked)
    sizes, centres = [], by_codes.centres
    monkeypatch.setattr(by_codes, "centres", lambda c, b, q: sizes.append(len(q)) or centres(c, b, q))
    monkeypatch.setattr(by_codes, "_TOGETHER", 100)
    assert torch.equal(centre_codes(codes, labels, asked), whole) and sizes == [3, 3, 3, 2]


@pytest.mark.parametrize("multi", [False, True])
@pytest.mark.parametrize("targeted", [False, True])
def test_query_attacks_of_few_and_of_uneven_pairs(targeted, multi):
    model, (image, text, labels) = Linear(), items()
    labels = torch.nn.functional.one_hot(labels) if multi else labels
    atk = QueryAttack(model, image, text, labels, targeted=targeted, steps=1)
    state = torch.get_rng_state()
    for count in (0, 1):
        got = atk(image[:count], text[:count], labels[:count])
        assert got.image.shape == (count, 6) and got.text.shape == (count, 5)
        assert (got.targets is not None) == targeted and (not targeted or got.targets.shape == labels[:count].shape)
    assert torch.equal(torch.get_rng_state(), state)
    for counts in ((7, 7, 5), (7, 7, 9), (7, 5, 7), (5, 7, 7)):
        given = [x[:count] for x, count in zip((image, text, labels), counts, strict=True)]
        with pytest.raises(InputError, match="of one length, got {}, {} and {}".format(*counts)):
            atk(*given)
        with pytest.raises(InputError, match="of one length, got {}, {} and {}".format(*counts)):
            QueryAttack(model, *given, targeted=targeted, steps=1)


def test_query_attacks_refuse_what_they_cannot_aim_at():
    model, (image, text, labels) = Linear(), items()
    atk = QueryAttack(model, image, text, labels, targeted=True, steps=1)
    with pytest.raises(InputError, match="must be of the database's kind"):
        atk(image, text, torch.nn.functional.one_hot(labels))
    one_hot = torch.nn.functional.one_hot(labels)
    one_hot[0] = 1
    got = QueryAttack(model, image, text, one_hot, targeted=True, steps=1)(image, text, one_hot)
    assert torch.equal(got.image[0], image[0]) and not got.targets[0].any()  # it bears all labels
    assert (got.image[1:] != image[1:]).any(dim=1).all() and got.targets[1:].any(dim=1).all()
    with pytest.raises(InputError, match="got none for any of 12 queries"):
        QueryAttack(model, image, text, labels * 0, targeted=True, steps=1)(image, text, labels * 0)
    one_class = QueryAttack(model, image, text, labels * 0, targeted=True, steps=1)(image, text, labels)
    assert (one_class.targets == 0).all()  # items of class 0 can be led nowhere, the others to it
    stays = labels == 0
    assert stays.any() and torch.equal(one_class.image[stays], image[stays])
    assert (one_class.image[~stays] != image[~stays]).any(dim=1).all()
    with pytest.raises(InputError, match="voters"):
        QueryAttack(model, image, text, labels, voters=0)


def test_pixels_of_a_database_become_floats_a_batch_at_a_time(monkeypatch):
    model, (image, text, labels) = Linear().float(), items(11)
    pixels, text = (image * 255).to(torch.uint8), text.float()
    sizes, inputs = [], Budget.inputs
    monkeypatch.setattr(Budget, "inputs", lambda self, x, name: sizes.append(len(x)) or inputs(self, x, name))
    atk = QueryAttack(model, pixels, text, labels, image_bounds=(0, 255), batch=4, steps=1)
    assert sizes == [4, 4, 3, 4, 4, 3]
    assert torch.equal(atk._codes["image"], signs(model.encode("image", pixels.float())))


@pytest.mark.parametrize("modality", [0, 1])
def test_codes_that_are_no_numbers_are_refused(modality):
    """NaN would be taken for the bit 0, in a database without a word."""
    model, (image, text, labels) = Linear(), items()
    encoders = [lambda x: model.encode("image", x), lambda x: model.encode("text", x)]
    right = encoders[modality]
    encoders[modality] = lambda x: torch.where(torch.arange(len(x))[:, None] == 2, torch.nan, right(x))
    name = ("image", "text")[modality]
    with pytest.raises(InputError, match=f"the {name} encoder returns NaN for 1 of 12 items"):
        QueryAttack(encoders, image, text, labels)
    with pytest.raises(InputError, match=f"the {name} encoder returns NaN for 1 of 12 items"):
        CMLA(encoders, steps=1, check=False)(image, text, labels)


def test_progress_is_told_of_every_step_of_every_item():
    model, (image, text, labels) = Linear(), items(11)
    for make in (
        lambda: CMLA(model, steps=3, batch=4),
        lambda: CMLA(model, steps=3, batch=4, alternate=True),
        lambda: QueryAttack(model, image, text, labels, steps=3, batch=4),
    ):
        told = []
        make()(image, text, labels, progress=told.append)
        assert sum(told) == 2 * 3 * 11 and max(told) == 4
