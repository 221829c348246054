import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.testing import assert_close

from cmr_fast.attacks import CMLA, CodeAttack, anchor_code, centre_codes
from cmr_fast.attacks.codes import within
from cmr_fast.errors import InputError
from cmr_fast.losses.dcmh import signs
from cmr_fast.ops import pack_codes
from cmr_fast.retrieval.metrics import evaluate_codes

BITS = 8


class Linear(nn.Module):
    """Two linear encoders whose classes have opposite codes."""

    def __init__(self, dtype=torch.float64):
        super().__init__()
        torch.manual_seed(1)
        self.image, self.text = nn.Linear(6, BITS).to(dtype), nn.Linear(5, BITS).to(dtype)

    def encode(self, modality, x):
        return (self.image if modality == "image" else self.text)(x)


def items(count=12, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    image = torch.rand(count, 6, generator=generator, dtype=dtype)
    text = torch.rand(count, 5, generator=generator, dtype=dtype)
    return image, text, torch.arange(count) % 3


def loops(values, other, own, labels, *, flip="all", keep=True, scale=0.5):
    """J without its last term, pair by pair."""
    total = 0.0
    for i in range(len(values)):
        for j in range(len(own)):
            s = float(labels[i] == labels[j])
            inter = scale * float(values[i] @ other[j])
            intra = scale * float(values[i] @ own[j])
            if flip == "all":
                total += math.log(1 + math.exp(-inter)) + s * inter
            elif s and flip == "positives":
                total += math.log(1 + math.exp(inter))
            log = math.log(1 + math.exp(intra))
            total += log - s * intra if keep else ((1 - s) * intra - log) ** 2
    return total


@pytest.mark.parametrize("flip", ["all", "positives"])
@pytest.mark.parametrize("keep", [True, False])
def test_objective_is_the_printed_sum(flip, keep):
    image, text, labels = items()
    model = Linear()
    atk = CMLA(model, flip=flip, keep_intra=keep)
    values = model.encode("image", image).tanh().detach()
    other, own = signs(model.encode("text", text)).detach(), signs(values)
    expected = loops(values, other, own, labels, flip=flip, keep=keep)
    assert float(atk._objective(values, other, own, labels, labels)) == pytest.approx(expected, rel=1e-12)


def test_single_modal_attacks_the_own_codes():
    image, _, labels = items()
    model = Linear()
    values = model.encode("image", image).tanh().detach()
    own = signs(values)
    expected = loops(values, own, own, labels) - loops(values, own, own, labels, flip="none")
    atk = CMLA(model, single_modal=True)
    assert float(atk._objective(values, -own, own, labels, labels)) == pytest.approx(expected, rel=1e-12)


def test_multi_label_pairs_share_any_label():
    model, (image, text, _) = Linear(), items(6)
    rows = torch.tensor([[1, 0, 1], [0, 1, 0], [0, 0, 1], [0, 0, 0], [1, 1, 0], [0, 1, 0]], dtype=torch.uint8)
    values = model.encode("image", image).tanh().detach()
    other = signs(model.encode("text", text)).detach()
    share = (rows.double() @ rows.double().T > 0).double()
    inter, intra = 0.5 * values @ other.T, 0.5 * values @ signs(values).T
    expected = (nn.functional.softplus(-inter) + share * inter + nn.functional.softplus(intra) - share * intra).sum()
    assert_close(CMLA(model)._objective(values, other, signs(values), rows, rows), expected)


@pytest.mark.parametrize(("norm", "p"), [("linf", torch.inf), ("l2", 2), ("l1", 1)])
def test_penalty_is_the_norm(norm, p):
    image, _, _ = items()
    moved = image + 0.1 * torch.randn(image.shape, dtype=image.dtype, generator=torch.Generator().manual_seed(3))
    expected = torch.linalg.vector_norm(moved - image, ord=p, dim=1).sum()
    assert_close(CMLA(Linear(), norm=norm, distortion=2.0)._penalty(moved, image), 2 * expected)
    x = image.clone().requires_grad_()
    (slope,) = torch.autograd.grad(CMLA(Linear(), norm=norm)._penalty(x, image), x)
    assert slope.isfinite().all()


def test_compat_takes_the_codes_first_steps():
    """The authors' two steps, as their formulas say: no 1/2, means, clip in the graph, Adam of TensorFlow, one side."""
    image, text, labels = items(7)
    text = (text > 0.5).double()  # a bag of words: every value on a bound
    model = Linear()
    eps, lr = 0.05, 0.02

    def clip(x):  # TensorFlow's clip_by_value: its gradient passes at the bounds
        return torch.where((x < 0) | (x > 1), x.detach().clamp(0, 1), x)

    result = CMLA(
        model, image_eps=eps, image_lr=lr, text_eps=0.01, text_lr=0.004, steps=2, compat="cmla", batch=7
    )(image, text, labels)  # fmt: skip
    share = (labels[:, None] == labels).double()
    codes = {"image": signs(model.encode("image", image)).detach(), "text": signs(model.encode("text", text)).detach()}
    for name, other, x, budget, rate in (
        ("image", "text", image, eps, lr), ("text", "image", text, 0.01, 0.004)
    ):  # fmt: skip
        noise = torch.zeros_like(x)
        m, v = torch.zeros_like(x), torch.zeros_like(x)
        for t in (1, 2):
            noise = noise.detach().requires_grad_()
            moved = clip(x + noise)
            hash_ = model.encode(name, moved).tanh()
            inter, intra = hash_ @ codes[other].T, hash_ @ codes[name].T
            loss = (share * inter + (1 + (-inter).exp()).log()).mean() + (x - moved).abs().mean()
            loss = loss + ((1 + intra.exp()).log() - share * intra).mean()
            (g,) = torch.autograd.grad(loss, noise)
            m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
            step = rate * math.sqrt(1 - 0.999**t) / (1 - 0.9**t)
            noise = (noise.detach() - step * m / (v.sqrt() + 1e-8)).clamp(0, budget)
        assert_close(getattr(result, name), (x + noise).clamp(0, 1), rtol=1e-9, atol=1e-12)
        assert (getattr(result, name) >= x).all() and (getattr(result, name) > x).any()


def test_compat_moves_words_and_pixels_at_the_ends_of_their_range():
    """Bags of words are 0 and 1; the authors' clip (TensorFlow's) has slope 1 there, torch's clamp has 0."""
    image, text, labels = items(7)
    image, text = image.round(), text.round()
    model, rate = Linear(), 0.004
    atk = CMLA(model, image_lr=rate, text_lr=rate, steps=1, compat="cmla", batch=7)
    result = atk(image, text, labels)
    share = (labels[:, None] == labels).double()
    for name, other, x, eps in (("image", "text", image, 10 / 255), ("text", "image", text, 0.01)):
        given = {"image": image, "text": text}
        codes = {m: signs(model.encode(m, given[m])).detach() for m in given}
        x.requires_grad_()
        hash_ = model.encode(name, x).tanh()
        inter, intra = hash_ @ codes[other].T, hash_ @ codes[name].T
        loss = (share * inter + (1 + (-inter).exp()).log()).mean() + ((1 + intra.exp()).log() - share * intra).mean()
        (g,) = torch.autograd.grad(loss, x)
        # Adam's first step is the rate along the sign
        expected = torch.where(g < 0, rate * g.abs() / (g.abs() + 1e-8 / 0.001**0.5), 0.0).clamp(max=eps)
        moved = (x.detach() + expected).clamp(max=1)
        assert_close(getattr(result, name), moved, rtol=1e-9, atol=1e-12)
        assert (moved != x).any()


def test_compat_batches_overlap_at_the_end():
    atk = CMLA(Linear(), compat="cmla", batch=5)
    assert [b.tolist() for b in atk._batches(12)] == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9], [7, 8, 9, 10, 11]]
    assert [len(b) for b in CMLA(Linear(), batch=5)._batches(12)] == [5, 5, 2]


@pytest.mark.parametrize("options", [{}, {"flip": "positives"}, {"keep_intra": False}, {"optimizer": "sign"}])
def test_a_result_does_not_depend_on_its_batch(options):
    image, text, labels = items()
    whole = CMLA(Linear(), steps=15, batch=12, **options)(image, text, labels)
    parts = CMLA(Linear(), steps=15, batch=5, **options)(image, text, labels)
    assert_close(parts.image, whole.image, rtol=1e-9, atol=1e-12)
    assert_close(parts.text, whole.text, rtol=1e-9, atol=1e-12)
    assert_close(parts.losses["image"], whole.losses["image"])


def in_turn(image, text, labels, steps, eps=0.5, lr=0.05):
    """Text, image, text, ... by Adam, each against the other's binary code before its last step; no distortion term."""
    model, clean = Linear(), {"image": image, "text": text}
    own = {m: signs(model.encode(m, x)).detach() for m, x in clean.items()}
    other = {m: codes.clone() for m, codes in own.items()}
    noise = {m: torch.zeros_like(x) for m, x in clean.items()}
    moments = {m: (torch.zeros_like(x), torch.zeros_like(x)) for m, x in clean.items()}
    share = (labels[:, None] == labels).double()
    for t in range(1, steps + 1):
        for m, theirs in (("text", "image"), ("image", "text")):
            delta = noise[m].clone().requires_grad_()
            values = model.encode(m, clean[m] + delta).tanh()
            inter, intra = 0.5 * values @ other[theirs].T, 0.5 * values @ own[m].T
            loss = (
                nn.functional.softplus(-inter) + share * inter + nn.functional.softplus(intra) - share * intra
            ).sum()
            (slope,) = torch.autograd.grad(loss, delta)
            first, second = moments[m]
            first.mul_(0.9).add_(0.1 * slope)
            second.mul_(0.999).add_(0.001 * slope * slope)
            step = lr * (first / (1 - 0.9**t)) / (second / (1 - 0.999**t)).sqrt().clamp(min=1e-30)
            moved = (noise[m] - step).clamp(-eps, eps)
            noise[m] = (clean[m] + moved).clamp(0, 1) - clean[m]
            other[m] = signs(values.detach())
    return {m: x + noise[m] for m, x in clean.items()}


def test_updates_in_turn_see_the_others_codes_of_that_moment():
    image, text, labels = items()
    options = {"image_eps": 0.5, "text_eps": 0.5, "image_lr": 0.05, "text_lr": 0.05, "steps": 20, "distortion": 0.0}
    apart, together = (CMLA(Linear(), alternate=a, **options)(image, text, labels) for a in (False, True))
    assert_close(together.text, in_turn(image, text, labels, 20)["text"], rtol=1e-9, atol=1e-12)
    assert_close(together.image, in_turn(image, text, labels, 20)["image"], rtol=1e-9, atol=1e-12)
    # the text's first step is the same, the image's already sees the text moved only where a bit flipped
    assert apart.losses["text"][0] == together.losses["text"][0]
    assert not torch.equal(apart.image, together.image)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
@pytest.mark.parametrize("optimizer", ["adam", "sign"])
def test_budget_and_box_are_held_exactly(norm, optimizer, dtype):
    image, text, labels = items(40, dtype)
    image[0], image[1] = 0, 1
    eps = 0.13
    result = CMLA(
        Linear(dtype), image_eps=eps, text_eps=0.07, image_lr=0.1, norm=norm, optimizer=optimizer, steps=8
    )(image, text, labels)  # fmt: skip
    ord_ = {"linf": torch.inf, "l2": 2, "l1": 1}[norm]
    for x, clean, most in ((result.image, image, eps), (result.text, text, 0.07)):
        size = torch.linalg.vector_norm(x.double() - clean.double(), ord=ord_, dim=1)
        assert (size <= most).all() and (size > 0.5 * most).any()
        assert (x >= 0).all() and (x <= 1).all() and x.dtype == dtype


@pytest.mark.parametrize("norm", ["l2", "l1"])
def test_projection_is_the_nearest_point_of_the_ball(norm):
    noise = torch.randn(20, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    ord_ = 2 if norm == "l2" else 1
    near = within(noise, 1.5, norm)
    assert (torch.linalg.vector_norm(near, ord=ord_, dim=1) <= 1.5 + 1e-12).all()
    inside = torch.randn(4000, 1, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    inside = inside * (1.5 / torch.linalg.vector_norm(inside, ord=ord_, dim=2, keepdim=True))
    best = (inside - noise).square().sum(dim=2).min(dim=0).values
    assert ((near - noise).square().sum(dim=1) <= best + 1e-12).all()
    assert_close(within(0.01 * noise, 1.5, norm), 0.01 * noise)


def test_a_budget_of_nothing_changes_nothing():
    image, text, labels = items()
    result = CMLA(Linear(), image_eps=0.0, text_eps=0.0, steps=3)(image, text, labels)
    assert torch.equal(result.image, image) and torch.equal(result.text, text)
    assert result.distortion == {"image": 0.0, "text": 0.0}


def test_distortion_is_the_root_mean_square_in_units_of_the_range():
    image, text, labels = items()
    result = CMLA(Linear(), image_eps=5.0, image_bounds=(-10, 10), steps=4)(10 * image, text, labels)
    moved = (result.image - 10 * image) / 20
    assert result.distortion["image"] == pytest.approx(float(moved.square().mean(dim=1).sqrt().mean()))


class Classes(nn.Module):
    """Class c's code is row c; items are one-hot classes with noise: an undefended hashing model."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(2)
        self.codes = nn.Parameter(torch.linalg.qr(torch.randn(16, 16))[0][:4].sign())

    def encode(self, modality, x):
        return (x - 0.5) @ self.codes


def scores(model, image, text, database, labels):
    """mAP of I2T and I2I, T2I and T2T."""

    def packed(modality, x):
        return pack_codes(model.encode(modality, x).detach() >= 0)

    base = {m: packed(m, database) for m in ("image", "text")}
    return {
        f"{a[0]}2{b[0]}": evaluate_codes(packed(a, x), base[b], labels, labels).map
        for a, x in (("image", image), ("text", text))
        for b in ("image", "text")
    }


def easy_items():
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(60) % 4
    return torch.eye(4)[labels] * 0.5 + 0.25 * torch.rand(60, 4, generator=generator), labels


def test_an_undefended_model_falls():
    x, labels = easy_items()
    model = Classes()
    clean = scores(model, x, x, x, labels)
    assert min(clean.values()) > 0.99
    result = CMLA(model, keep_intra=False, image_eps=0.5, text_eps=0.5, steps=60)(x, x, labels)
    after = scores(model, result.image, result.text, x, labels)
    assert after["i2t"] < 0.6 * clean["i2t"] and after["t2i"] < 0.6 * clean["t2i"]


def test_the_intra_term_keeps_what_the_attack_without_it_loses():
    x, labels = easy_items()
    model, agree = Classes(), {}
    own = signs(model.encode("image", x)).detach()
    for keep in (True, False):
        result = CMLA(model, keep_intra=keep, image_eps=0.5, text_eps=0.5, steps=60)(x, x, labels)
        moved = model.encode("image", result.image).tanh().detach()
        agree[keep] = float((moved @ own.T)[labels[:, None] == labels].mean())
    assert agree[True] > agree[False] + 0.5


def test_the_model_comes_back_as_it_was():
    image, text, labels = items()
    model = Linear().train()
    model.text.weight.requires_grad_(False)
    model.image.weight.grad = torch.ones_like(model.image.weight)
    state = torch.get_rng_state()
    CMLA(model, steps=2)(image, text, labels)
    assert model.training and model.image.training
    assert model.image.weight.requires_grad and not model.text.weight.requires_grad
    assert torch.equal(model.image.weight.grad, torch.ones_like(model.image.weight))
    assert torch.equal(torch.get_rng_state(), state)


def test_numpy_comes_back_as_numpy_and_pixels_as_floats():
    _, text, labels = items(4, torch.float32)
    pixels = torch.randint(0, 256, (4, 3, 8, 8), dtype=torch.uint8)
    network = nn.Sequential(nn.Flatten(), nn.Linear(192, BITS))
    atk = CMLA((network, nn.Linear(5, BITS)), image_eps=10.0, image_bounds=(0, 255), steps=2)
    result = atk(pixels.numpy(), text.numpy(), labels.numpy())
    assert isinstance(result.image, np.ndarray) and result.image.dtype == np.float32
    assert isinstance(result.text, np.ndarray) and result.image.shape == (4, 3, 8, 8)
    assert np.abs(result.image - pixels.numpy().astype(np.float32)).max() <= 10


def test_bad_input_is_named():
    image, text, labels = items()
    with pytest.raises(InputError, match=r"image must lie in its bounds, 0 to 1, got .* to 2"):
        CMLA(Linear())(2 * image / image.max(), text, labels)
    with pytest.raises(InputError, match="image must lie in its bounds"):
        CMLA(Linear())(image * torch.nan, text, labels)
    with pytest.raises(InputError, match="of one length"):
        CMLA(Linear())(image, text[:3], labels)
    with pytest.raises(InputError, match="labels must be integers"):
        CMLA(Linear())(image, text, labels[:3])
    for wrong in (labels == 0, labels[:, None], torch.ones(12, 3).long() * -1, torch.ones(12, 3).long() * 2):
        with pytest.raises(InputError, match="labels"):  # bits of one class, a column, -1 for absent, counts
            CMLA(Linear())(image, text, wrong)
    with pytest.raises(InputError, match=r"image encoder cannot take torch.float64 \(8, 4\)"):
        CMLA(Linear())(image[:, :4], text, labels)
    with pytest.raises(InputError, match=r"image encoder cannot take torch.float64"):
        CMLA(Linear(torch.float32))(image.numpy(), text.float(), labels)
    with pytest.raises(InputError, match=r"must return \(8, bits\), got \(8, 0\)"):
        CMLA((lambda x: x[:, :0], lambda x: x[:, :0]))(image, text, labels)
    with pytest.raises(InputError, match="codes of one length, got 8 bits and 4 bits"):
        CMLA((nn.Linear(6, 8).double(), nn.Linear(5, 4).double()))(image, text, labels)
    with pytest.raises(InputError, match="image_eps must be"):
        CMLA(Linear(), image_eps=-1.0)
    with pytest.raises(InputError, match="authors' code"):
        CMLA(Linear(), compat="cmla", keep_intra=False)
    with pytest.raises(InputError, match="flip must be"):
        CMLA(Linear(), flip="some")
    with pytest.raises(InputError, match="steps must be"):
        CMLA(Linear(), steps=0)
    with pytest.raises(InputError, match="model must have encode"):
        CMLA(nn.Linear(2, 2))
    with pytest.raises(InputError, match="detach"):
        CMLA((lambda x: x.detach() @ torch.ones(6, 4).double(), nn.Linear(5, 4).double()), steps=1)(image, text, labels)


def test_codes_that_depend_on_batch_mates_are_named():
    image, text, labels = items()
    network = nn.Sequential(nn.Linear(6, BITS), nn.BatchNorm1d(BITS, track_running_stats=False)).double()
    model = (network, nn.Linear(5, BITS).double())
    with pytest.raises(InputError, match="the image code of an item depends on the rest of its batch"):
        CMLA(model)(image, text, labels)


@pytest.mark.parametrize("rows", [slice(0, 1), [0] * 12], ids=["one item", "all alike"])
@pytest.mark.parametrize("kind", ["normalised", "centred", "dropout"])
def test_such_codes_are_named_whatever_the_batch(kind, rows):
    """Of callables, whose modules cannot be put in evaluation mode; by the attack on given codes as well."""
    image, text, labels = (x[rows] for x in items())
    linear, norm = nn.Linear(6, BITS).double(), nn.BatchNorm1d(BITS).double()
    encoder = {
        "normalised": lambda x: norm(linear(x)),
        "centred": lambda x: linear(x - x.mean(dim=0)),
        "dropout": lambda x: nn.functional.dropout(linear(x)),
    }[kind]
    model = encoder, nn.Linear(5, BITS).double()
    with pytest.raises(InputError, match="the image code of an item depends on the rest of its batch, or is random"):
        CMLA(model)(image, text, labels)
    with pytest.raises(InputError, match="the image code of an item depends on the rest of its batch, or is random"):
        CodeAttack(model)(image, torch.ones(BITS))
    if kind != "normalised":
        assert CodeAttack(model, steps=1, check=False)(image, torch.ones(BITS)).shape == image.shape


@pytest.mark.parametrize("options", [{}, {"flip": "positives"}, {"alternate": True}, {"compat": "cmla"}])
@pytest.mark.parametrize("narrow", [torch.float16, torch.bfloat16, torch.float32])
def test_encoders_of_two_dtypes_are_attacked_in_the_wider_one(narrow, options):
    image, text, labels = items()
    model = Linear()

    def run(dtype):
        pair = (lambda x: model.image(x).to(dtype), model.text)
        return CMLA(pair, image_eps=0.1, steps=3, **options)(image, text, labels)

    mixed, wide = run(narrow), run(torch.float64)
    assert_close(mixed.text, wide.text, rtol=0, atol=1e-9)
    assert (mixed.image - wide.image).abs().median() < 1e-3  # signs of small slopes may differ
    assert (mixed.image != image).any()


def test_class_ids_of_any_size():
    image, text, labels = items()
    near, far = (CMLA(Linear(), steps=2)(image, text, y) for y in (labels, labels * 2**40 - 7))
    assert torch.equal(near.image, far.image)


def test_bounds_are_numbers_of_the_inputs_dtype():
    """0.1 as float32 is above 0.1: inputs clipped to the bounds lie in them."""
    image, text, labels = items(dtype=torch.float32)
    model = Linear(torch.float32)
    high = {torch.float32: 0.1, torch.float16: 0.3}
    for dtype, top in high.items():
        x = image.clamp(max=top).to(dtype)
        x[0] = top
        assert float(x.max()) > top
        moved = CMLA(model, image_bounds=(0, top), image_eps=0.01, steps=2)(x, text, labels).image
        assert moved.max() <= x.max() and (moved != x).any()
        assert torch.equal(CMLA(model, image_bounds=(0, top), image_eps=0, steps=1)(x, text, labels).image, x)


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_a_budget_beyond_the_box_leaves_the_box_as_the_only_limit(norm):
    image, text, labels = items(dtype=torch.float32)
    result = CMLA(Linear(torch.float32), image_eps=1e30, text_eps=1e30, norm=norm, steps=2)(image, text, labels)
    for moved, clean in ((result.image, image), (result.text, text)):
        assert (moved != clean).any(dim=1).all() and moved.min() >= 0 and moved.max() <= 1


def test_inside_inference_mode():
    image, text, labels = items(5)
    outside = CMLA(Linear(), steps=2)(image, text, labels)
    model = Linear()
    with torch.inference_mode():
        inside = CMLA(model, steps=2)(image.clone(), text.clone(), labels)
        moved = CodeAttack(model, steps=2)(image, torch.ones(BITS))
    assert torch.equal(inside.image, outside.image) and torch.equal(inside.text, outside.text)
    assert torch.equal(moved, CodeAttack(model, steps=2)(image, torch.ones(BITS)))


def test_items_without_labels_and_none_at_all():
    image, text, _ = items(4)
    result = CMLA(Linear(), steps=2)(image, text, torch.zeros(4, 3, dtype=torch.uint8))
    assert result.image.isfinite().all()
    empty = CMLA(Linear(), steps=2)(image[:0], text[:0], torch.zeros(0, dtype=torch.int64))
    assert empty.image.shape == (0, 6) and empty.distortion["image"] == 0


# codes to aim at


def test_anchor_code_is_nearest_to_the_set_by_enumeration():
    codes = signs(torch.randn(7, 6, generator=torch.Generator().manual_seed(0)))
    every = torch.tensor([[1.0 if i >> b & 1 else -1.0 for b in range(6)] for i in range(64)])
    distances = (6 - every @ codes.T).sum(dim=1)
    assert (6 - anchor_code(codes) @ codes.T).sum() == distances.min()
    assert anchor_code(torch.tensor([[1.0], [-1.0]])).tolist() == [1.0]


def test_centre_codes_have_the_best_score_by_enumeration():
    codes = signs(torch.randn(9, 5, generator=torch.Generator().manual_seed(1)))
    labels, queries = torch.arange(9) % 2, torch.tensor([0, 1, 7])
    every = torch.tensor([[1.0 if i >> b & 1 else -1.0 for b in range(5)] for i in range(32)])
    for query, centre in zip(queries, centre_codes(codes, labels, queries), strict=True):
        same = labels == query
        near = codes[same].mean(dim=0) if same.any() else torch.zeros(5)
        far = codes[~same].mean(dim=0)
        assert_close(centre @ (near - far), (every @ (near - far)).max())


@pytest.mark.parametrize("away", [False, True])
def test_code_attack_moves_towards_or_away(away):
    image, _, _ = items(20)
    model = Linear()
    aim = signs(torch.randn(BITS, dtype=torch.float64, generator=torch.Generator().manual_seed(4)))
    moved = CodeAttack(model, "image", eps=0.2, steps=30, away=away)(image, aim)
    before, after = (model.encode("image", x).tanh() @ aim for x in (image, moved))
    assert (after < before).all() if away else (after > before).all()
    assert (moved - image).abs().max() <= 0.2 and moved.min() >= 0 and moved.max() <= 1


def test_code_attack_refuses_codes_that_do_not_fit():
    image, _, _ = items(5)
    with pytest.raises(InputError, match="codes must be"):
        CodeAttack(Linear())(image, torch.ones(3, BITS))
    with pytest.raises(InputError, match="of the model's 8 bits, got 4"):
        CodeAttack(Linear())(image, torch.ones(4))
    with pytest.raises(InputError, match="modality must be"):
        CodeAttack(Linear(), "sound")
    for bits in (torch.zeros(BITS), torch.ones(BITS, dtype=torch.bool), torch.full((BITS,), torch.nan)):
        with pytest.raises(InputError, match="codes must be -1 and 1"):
            CodeAttack(Linear())(image, bits)


def test_codes_to_aim_at_refuse_bits_and_labels_of_two_kinds():
    codes, labels = torch.tensor([[1.0, -1.0], [1.0, 1.0], [-1.0, 1.0]]), torch.tensor([0, 1, 1])
    hot = torch.eye(3, dtype=torch.uint8)
    for bits in (codes > 0, (codes > 0).to(torch.uint8), codes * torch.nan):
        with pytest.raises(InputError, match="codes must be -1 and 1"):
            anchor_code(bits)
        with pytest.raises(InputError, match="codes must be -1 and 1"):
            centre_codes(bits, labels, labels)
    for one, other in ((labels, hot), (hot, labels), (labels[:2], labels), (hot, hot[:, :2])):
        with pytest.raises(InputError, match="labels and query_labels must be"):
            centre_codes(codes, one, other)
    assert np.array_equal(
        centre_codes(codes.numpy(), labels.numpy(), labels.numpy()), centre_codes(codes, labels, labels)
    )
    assert np.array_equal(anchor_code(codes.numpy()), [1, 1])


def test_encoders_may_work_in_place():
    """The penalty is of the point that was tried, and inputs stay as they are."""

    class InPlace(Linear):
        def encode(self, modality, x):
            return super().encode(modality, x.sub_(0.25))

    class Copying(Linear):
        def encode(self, modality, x):
            return super().encode(modality, x - 0.25)

    image, text, labels = items()
    before = image.clone(), text.clone()
    one, other = (CMLA(kind(), steps=3)(image, text, labels) for kind in (InPlace, Copying))
    assert torch.equal(one.image, other.image) and torch.equal(one.text, other.text)
    assert all(torch.equal(one.losses[m], other.losses[m]) for m in one.losses)
    targets = torch.ones(len(image), BITS)
    assert torch.equal(*(CodeAttack(kind(), "image", steps=3)(image, targets) for kind in (InPlace, Copying)))
    assert torch.equal(image, before[0]) and torch.equal(text, before[1])


@pytest.mark.parametrize("optimizer", ["adam", "sign"])
def test_gradients_that_are_not_finite_are_named(optimizer):
    model = Linear()
    image, text, labels = items()
    image[4] = 0
    rooted = (lambda x: model.image(x.sqrt()), model.text)
    with pytest.raises(InputError, match="1 of 12 items is not finite, item 4 of the batch first at step 1"):
        CMLA(rooted, steps=2, optimizer=optimizer)(image, text, labels)
    with pytest.raises(InputError, match="item 4 of the batch"):
        CodeAttack(rooted, steps=2)(image, torch.ones(BITS))
