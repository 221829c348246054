"""TTC: its points step by step, its ball, batches, and attacks that know of it or not."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from cmr_fast.attacks.multimodal import registry
from cmr_fast.attacks.multimodal.base import DualEncoder as Attacked
from cmr_fast.attacks.multimodal.ttc import UNIT, Counterattack, Through
from cmr_fast.attacks.problem import STREAM
from cmr_fast.attacks.text.encoder import FlatTexts
from cmr_fast.errors import InputError
from cmr_fast.models.dual import DualEncoder
from cmr_fast.ops.pgd import pgd_noise

EPS, ALPHA, BETA = 16 / 255, 5 / 255, 1.5


class Tiny(DualEncoder):
    """A convolution and two layers; captions are single letters, each the embedding of an image."""

    def __init__(self, dtype: torch.dtype = torch.float64, images: int = 12) -> None:
        super().__init__((0.5, 0.4, 0.3), (0.2, 0.3, 0.25))
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.see = nn.Sequential(
                nn.Conv2d(3, 8, 3, stride=2), nn.GELU(), nn.Flatten(), nn.Linear(200, 32), nn.GELU(), nn.Linear(32, 16)
            )
            self.pixels = torch.rand(images, 3, 12, 12, dtype=dtype)
        self.to(dtype)
        with torch.no_grad():
            self.register_buffer("words", self.image_embedding(self.normalised(self.pixels)))

    def image_embedding(self, normalised):
        return self.see(normalised)

    def text_embedding(self, ids, mask):
        return self.get_buffer("words")[ids[:, 0]]

    def tokens(self, texts):
        ids = torch.tensor([[ord(text) - ord("a")] for text in texts])
        return ids, torch.ones_like(ids, dtype=torch.bool)


@pytest.fixture(scope="module")
def tiny():
    return Tiny()


def ttc(model, **changes):
    return Counterattack(model, **{"eps": EPS, "alpha": ALPHA, "beta": BETA, "steps": 3, "threshold": 0.08} | changes)


def oracle(model, x, threshold, seed=0, steps=3):
    """One image (3, H, W), with a loop and numbers alone; the image that is embedded, and tau."""

    def f(pixels):
        return model.see(((pixels - model.mean) / model.std)[None])[0]

    number = torch.tensor([int((x * UNIT).floor().sum())])
    noise = pgd_noise(number, x.numel(), seed=seed).double().reshape(x.shape)
    delta = (x + EPS * noise).clamp(0, 1) - x
    clean = f(x).detach()
    deltas = [delta]
    tau = float((f(x + delta) - clean).detach().norm() / clean.norm())
    for _ in range(steps):
        moving = (x + delta).requires_grad_()
        (gradient,) = torch.autograd.grad((f(moving) - clean).square().sum(), moving)
        delta = (delta + ALPHA * gradient.sign()).clamp(-EPS, EPS)
        delta = (x + delta).clamp(0, 1) - x
        deltas.append(delta)
    if tau >= threshold:
        return x + deltas[0], tau
    weights = torch.tensor([BETA * k for k in range(steps + 1)], dtype=torch.float64).exp()
    return x + sum(w * d for w, d in zip(weights / weights.sum(), deltas, strict=True)), tau


def test_images_are_where_the_oracle_puts_them(tiny):
    moved = [oracle(tiny, x, 0.08) for x in tiny.pixels]
    taus = torch.tensor([tau for _, tau in moved])
    assert 0 < int((taus < 0.08).sum()) < len(taus)  # some are driven off, some keep the noise
    found = ttc(tiny).counterattacked(tiny.pixels)
    assert_close(found, torch.stack([x for x, _ in moved]), rtol=0, atol=1e-12)
    assert_close(ttc(tiny).encode_image(tiny.pixels), tiny.encode_image(found), rtol=0, atol=0)
    other = ttc(tiny, seed=7).counterattacked(tiny.pixels[:1])
    assert_close(other[0], oracle(tiny, tiny.pixels[0], 0.08, seed=7)[0], rtol=0, atol=1e-12)
    assert float((other[0] - found[0]).abs().max()) > 1e-3


@pytest.mark.parametrize("threshold", [0.0, 1e9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_ball_and_the_box_are_held_exactly(threshold, dtype):
    model = Tiny(dtype)
    x = torch.cat([model.pixels, torch.zeros_like(model.pixels[:1]), torch.ones_like(model.pixels[:1])])
    out = ttc(model, threshold=threshold).counterattacked(x)
    assert out.dtype == dtype and float(out.min()) >= 0 and float(out.max()) <= 1
    assert float((out.double() - x.double()).abs().max()) <= EPS
    assert float((out.double() - x.double()).abs().max()) > 0.9 * EPS


def test_an_image_is_the_same_in_every_batch_and_mode():
    model = Tiny(torch.float32).train()
    defended = ttc(model)
    whole = defended.counterattacked(model.pixels)
    alone = torch.cat([defended.counterattacked(x[None]) for x in model.pixels])
    assert_close(whole, alone, rtol=0, atol=1e-6)
    with torch.inference_mode():
        assert_close(defended.counterattacked(model.pixels.clone()), whole, rtol=0, atol=0)
    assert len(defended.encode_image(model.pixels[:0])) == 0
    through = Through(defended, draws=3)
    parts = torch.cat([through.encode_image(x) for x in model.pixels.split(5)])
    assert_close(through.encode_image(model.pixels), parts, rtol=0, atol=1e-5)
    assert model.training and all(p.requires_grad and p.grad is None for p in model.parameters())


def test_the_gradient_is_that_of_the_whole_defence_with_its_noise_and_signs_held(tiny):
    defended = ttc(tiny)
    x = tiny.pixels[:2].clamp(0.2, 0.8).requires_grad_()
    (gradient,) = torch.autograd.grad(defended.encode_image(x).square()[:, 0].sum(), x)
    moved = defended.counterattacked(x).requires_grad_()
    (wanted,) = torch.autograd.grad(tiny.encode_image(moved).square()[:, 0].sum(), moved)
    assert_close(gradient, wanted, rtol=0, atol=0)


def test_an_attack_sees_the_image_itself_and_other_noise_than_the_defences(tiny):
    defended, x = ttc(tiny), tiny.pixels[:1]
    number = int((x * UNIT).floor().sum())
    each = [
        tiny.encode_image(defended._moved(x, STREAM, torch.tensor([2 * number + draw]))).detach() for draw in range(2)
    ]
    assert float((each[0] - each[1]).abs().max()) > 1e-3
    wanted = nn.functional.normalize(sum(each) / 2 + tiny.encode_image(x), dim=1)
    assert_close(Through(defended, draws=2, seed=0).encode_image(x), wanted)


def trained(images):
    """A Tiny that tells its images apart in some noise."""
    model = Tiny(torch.float32, images)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        words, step = (
            nn.functional.normalize(torch.randn(images, 16), dim=1),
            torch.optim.Adam(model.parameters(), 1e-3),
        )
        for _ in range(300):
            x = (model.pixels + 0.02 * torch.randn_like(model.pixels)).clamp(0, 1)
            step.zero_grad()
            nn.functional.cross_entropy(10 * model.encode_image(x) @ words.T, torch.arange(images)).backward()
            step.step()
    model.get_buffer("words").copy_(words)
    return model


def test_an_attack_that_knows_of_the_defence_takes_more():
    model = trained(12)
    options = {"eps": 16 / 255, "alpha": 4 / 255, "threshold": 9.0}
    through = Through(Counterattack(model, **options), draws=4)
    assert isinstance(through.defended, Attacked) and isinstance(through, Attacked)
    truth = torch.arange(12)
    texts = [chr(ord("a") + int(i)) for i in truth]
    words = FlatTexts(model)(texts)

    def attacked(victim):
        return registry.make("pgd50", victim, eps=20 / 255, captions=(texts, truth))(model.pixels, texts, truth)[0]

    def margin(images, *readers):
        with torch.no_grad():
            scores = torch.stack([reader.encode_image(images) @ words.T for reader in readers])
        others = scores.masked_fill(torch.eye(12, dtype=torch.bool), -torch.inf).amax(dim=2)
        return float((scores.diagonal(dim1=1, dim2=2) - others).mean())

    defended = [Counterattack(model, **options, seed=seed) for seed in range(5)]
    carried, adaptive = attacked(model), attacked(through)
    assert margin(model.pixels, *defended) > 0.5 and margin(carried, model) < 0
    assert margin(carried, *defended) > 0.05  # what does not know of the defence, it holds against
    assert margin(adaptive, *defended) < margin(carried, *defended) - 0.03


def test_what_does_not_fit_is_refused(tiny):
    with pytest.raises(InputError, match="DualEncoder, got Linear"):
        Counterattack(nn.Linear(2, 2))
    for name, value in (("eps", -1.0), ("alpha", 0.0), ("steps", 0), ("threshold", -0.1), ("beta", float("nan"))):
        with pytest.raises(InputError, match=name):
            Counterattack(tiny, **{name: value})
    with pytest.raises(InputError, match="draws must be"):
        Through(ttc(tiny), draws=0)
    with pytest.raises(InputError, match=r"pixels must be floats \(N, 3, H, W\)"):
        ttc(tiny).encode_image(torch.zeros(2, 3, 12, 12, dtype=torch.uint8))
    with pytest.raises(InputError, match="must lie in bounds"):
        ttc(tiny).encode_image(tiny.pixels * 2)
