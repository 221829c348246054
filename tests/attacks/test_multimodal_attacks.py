"""Co-Attack and SGA: against loops over images, captions and scales, written as the papers' codes, in float64."""

import math

import numpy as np
import pytest
import torch
from captions import CAPTIONS, Victim, masked_lm, victim
from torch.nn import functional as F

from cmr_fast.attacks import SGA, BertAttack, CoAttack
from cmr_fast.attacks.multimodal import registry
from cmr_fast.attacks.problem import STREAM
from cmr_fast.errors import InputError
from cmr_fast.ops.pgd import pgd_noise

EPS = 8 / 255
OWNER = [0, 2, 0, 1, 2, 2, 1]
TEXTS = list(CAPTIONS[: len(OWNER)])
CORPUS = ["a dog", "two men walk in the snow", "a red ball", "the street", "a woman sits on the grass by a tree"]


def pixels(count=3):
    return torch.rand((count, 3, 12, 12), generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def begin(images, eps=EPS):
    noise = torch.rand(images.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64) * 2 - 1
    return (images + eps * noise).clamp(0, 1)


def embed_text(text):
    ids, mask = victim().tokenize([text])
    return victim().encode_text(ids, mask)[0]


def kl(p, q):
    return (p * (p.log() - q.log())).sum()


def stepped(x, origin, gradient, alpha):
    x = x + alpha * gradient.sign()
    return torch.min(torch.max(x, origin - EPS), origin + EPS).clamp(0, 1).detach()


def coattack_image(image, start, captions, mode, steps, weight, chosen):
    """One image after Co-Attack, by autograd of the whole objective."""
    clean = victim().encode_image(image[None])[0].detach()
    x = start
    for _ in range(steps):
        x = x.requires_grad_()
        e = victim().encode_image(x[None])[0]
        loss = kl(clean.softmax(0), e.softmax(0))
        if mode == "joint":
            texts = captions if chosen == "all" else captions[-1:]
            for text in texts:
                loss = loss + weight / len(texts) * kl(embed_text(text).detach().softmax(0), e.softmax(0))
        x = stepped(x.detach(), image, torch.autograd.grad(loss, x)[0], 1.25 * EPS / steps)
    return x


@pytest.mark.parametrize("captions", ["all", "last"])
@pytest.mark.parametrize("mode", ["clean", "text", "image", "separate", "joint"])
def test_coattack_equals_the_oracle(mode, captions):
    images, start = pixels(), begin(pixels())
    atk = CoAttack(victim(), masked_lm(), mode=mode, eps=EPS, steps=4, captions=captions, batch=2, threshold=0.0)
    adversarial, texts = atk(images, TEXTS, OWNER, start=start)
    expected = BertAttack(victim(), masked_lm(), threshold=0.0)(TEXTS)
    assert texts == (TEXTS if mode in ("clean", "image") else expected) and expected != TEXTS
    if mode in ("clean", "text"):
        assert torch.equal(adversarial, images)
        return
    for i, image in enumerate(images):
        own = [text for text, owner in zip(texts, OWNER, strict=True) if owner == i]
        slow = coattack_image(image, start[i], own, mode, 4, 3.0, captions)
        torch.testing.assert_close(adversarial[i], slow, rtol=0, atol=1e-12)
    assert float((adversarial - images).abs().max()) <= EPS and adversarial.min() >= 0


def sga_view(x, number, scale, step, scales, seed, sigma, clamp):
    """SGA's get_scaled_imgs of one image, its noise from this project's generator."""
    half = (x.numel() + 1) // 2
    noise = pgd_noise(torch.tensor([number]), 2 * half, seed=(seed + (step * scales + scale[0] + 1) * STREAM) % 2**64)
    u = (noise[0].double() + 1) / 2
    radius = (-2 * u[:half].log()).sqrt()
    normal = torch.cat([radius * (2 * math.pi * u[half:]).cos(), radius * (2 * math.pi * u[half:]).sin()])
    noisy = x + sigma * normal[: x.numel()].reshape(x.shape)
    small = F.interpolate(noisy[None], [int(scale[1] * s) for s in x.shape[1:]], mode="bicubic").clamp(0, 1)
    back = F.interpolate(small, x.shape[1:], mode="bicubic")
    return back.clamp(0, 1) if clamp else back


def sga(images, start, steps, scales, seed, compat):
    text = BertAttack(victim(), masked_lm(), objective="image", compat=compat and "coattack", threshold=0.0)
    with torch.no_grad():
        first = text(TEXTS, torch.stack([victim().encode_image(images[i][None])[0] for i in OWNER]))
    adversarial = []
    for i, image in enumerate(images):
        x = start[i]
        guides = [embed_text(t).detach() for t, owner in zip(first, OWNER, strict=True) if owner == i]
        for step in range(steps):
            x = x.requires_grad_()
            views = [x[None]]
            views += [sga_view(x, i, s, step, len(scales), seed, 0.05, compat is None) for s in enumerate(scales)]
            loss = -sum((victim().encode_image(view)[0] * guide).sum() for view in views for guide in guides)
            x = stepped(x.detach(), image, torch.autograd.grad(loss, x)[0], 0.5 / 255)
        adversarial.append(x)
    with torch.no_grad():
        seen = torch.stack([victim().encode_image(adversarial[i][None])[0] for i in OWNER])
    return torch.stack(adversarial), text(TEXTS, seen)


@pytest.mark.parametrize("compat", [None, "sga"])
@pytest.mark.parametrize("scales", [(), (0.5, 1.5)])
def test_sga_equals_the_oracle(scales, compat):
    images, start = pixels(), begin(pixels())
    atk = SGA(
        victim(), masked_lm(), eps=EPS, steps=3, scales=scales, seed=5, batch=2, compat=compat, threshold=0.0
    )  # fmt: skip
    adversarial, texts = atk(images, TEXTS, OWNER, start=start)
    slow, slow_texts = sga(images, start, 3, scales, 5, compat)
    torch.testing.assert_close(adversarial, slow, rtol=0, atol=1e-12)
    assert texts == slow_texts != TEXTS


def in_order(u):
    """SA-AET's shares of the image and of the clean one: drawn one after the other, those in order kept."""
    kept = [(a, b) for a in range(1, 101) for b in range(1, 101 - a) if 1 <= a < 100 - a - b < b]
    chances = [1 / 100 / (100 - a) for a, _ in kept]
    total, passed = sum(chances), 0.0
    for pair, chance in zip(kept, chances, strict=True):
        passed += chance / total
        if u < passed:
            return pair
    return kept[-1]


@pytest.mark.parametrize("corpus", [None, CORPUS], ids=["dra", "sa-aet"])
def test_attacks_along_the_trajectory_equal_the_oracle(corpus):
    images, start, scales, seed, samples, steps, alpha = pixels(), begin(pixels()), (0.5,), 4, 3, 4, 0.5 / 255
    options = {"eps": EPS, "steps": steps, "scales": scales, "seed": seed, "samples": samples, "threshold": 0.0}
    options["corpus"] = corpus
    adversarial, texts = SGA(victim(), masked_lm(), batch=2, **options)(images, TEXTS, OWNER, start=start)
    text = BertAttack(victim(), masked_lm(), objective="image", threshold=0.0)
    with torch.no_grad():
        clean = victim().encode_image(images)
        first = text(TEXTS, clean[OWNER])

    span = torch.eye(16, dtype=torch.float64)  # of the embeddings that are compared
    if corpus is not None:
        rows = torch.stack([embed_text(caption).detach() for caption in corpus])
        span = torch.linalg.svd(rows, full_matrices=False).Vh[1:].T
        assert span.shape == (16, len(corpus) - 1)

    def loss(pictures, guides):
        seen = [victim().encode_image(picture[None])[0] @ span for picture in pictures]
        return -sum((picture * (g @ span)).sum() for picture in seen for g in guides)

    def slope(at, views, guides):
        at = at.clone().requires_grad_()
        return torch.autograd.grad(loss(views(at), guides), at)[0]

    mixed = []
    for i, image in enumerate(images):
        guides = [embed_text(t).detach() for t, owner in zip(first, OWNER, strict=True) if owner == i]
        x, before = start[i], None
        for step in range(steps):
            views = lambda p, s=step, n=i: [p, sga_view(p, n, (0, 0.5), s, 1, seed, 0.05, True)[0]]  # noqa: E731
            at = x
            if before is not None:
                u = pgd_noise(torch.tensor([i]), 2 * samples, seed=(seed + ((1 << 20) + step) * STREAM) % 2**64)[0]
                u = ((u.double() + 1) / 2).tolist()
                points = []
                for k in range(samples):
                    r1 = 1 + math.floor(98 * u[k])
                    r2 = 1 + math.floor((99 - r1) * u[samples + k])
                    if corpus is not None:
                        r1, r2 = in_order(u[k])
                    points.append(r1 / 100 * x + r2 / 100 * image + (100 - r1 - r2) / 100 * before)
                tried = [x + alpha * slope(p, lambda q: [q], guides).sign() for p in points]
                values = [float(loss([y], guides).detach()) for y in tried]
                at = points[values.index(max(values))]
            x, before = stepped(x, image, slope(at, views, guides), alpha), x
        # of a slope next to 0 the sign is rounding's
        assert float(((adversarial[i] - x).abs() > 1e-12).double().mean()) < 0.01
        with torch.no_grad():
            last, earlier = (victim().encode_image(p[None])[0] for p in (x, before))
        mixed.append(0.6 * clean[i] + 0.2 * last + 0.2 * earlier)
    assert texts == text(TEXTS, torch.stack([mixed[i] for i in OWNER]))


@pytest.mark.parametrize("kind", [CoAttack, SGA])
def test_batches_seeds_and_the_ball(kind):
    images, seed = pixels().float(), 11
    model = Victim().float()
    make = lambda **options: kind(model, masked_lm(), eps=2 / 255, steps=3, threshold=0.0, **options)  # noqa: E731
    whole, texts = make(seed=seed)(images, TEXTS, OWNER)
    assert whole.dtype == torch.float32 and float((whole.double() - images.double()).abs().max()) <= 2 / 255
    parts, again = make(seed=seed, batch=1)(images, TEXTS, OWNER)
    torch.testing.assert_close(parts, whole, rtol=0, atol=1e-6)
    assert again == texts
    other, _ = make(seed=12)(images, TEXTS, OWNER)
    assert not torch.equal(other, whole)
    as_numpy, _ = make(seed=seed)(images.numpy(), TEXTS, OWNER)
    assert isinstance(as_numpy, np.ndarray) and np.array_equal(as_numpy, whole.numpy())
    assert model.training and all(p.requires_grad and p.grad is None for p in model.parameters())


@pytest.mark.parametrize("kind", [CoAttack, SGA])
def test_the_attack_takes_matching_pairs_apart(kind):
    images = pixels(7)

    def similarity(pictures, texts):
        with torch.no_grad():
            return float((victim().encode_image(pictures) * torch.stack([embed_text(t) for t in texts])).sum())

    adversarial, texts = kind(victim(), masked_lm(), eps=EPS, words=2)(images, TEXTS)
    if kind is SGA:
        assert similarity(adversarial, texts) < similarity(images, texts) < similarity(images, TEXTS)
    with torch.no_grad():
        apart = [kl(victim().encode_image(images[:1])[0].softmax(0), victim().encode_image(x)[0].softmax(0))
                 for x in (images[:1], adversarial[:1])]  # fmt: skip
    assert apart[1] > apart[0]


@pytest.mark.parametrize("kind", [CoAttack, SGA])
def test_bfloat16_towers(kind):
    images, model = pixels().float(), Victim().float()
    adversarial, texts = kind(model, masked_lm(), eps=EPS, steps=2, dtype=torch.bfloat16)(images, TEXTS, OWNER)
    assert adversarial.dtype == torch.float32 and texts != TEXTS
    assert 0 < float((adversarial.double() - images.double()).abs().max()) <= EPS


@pytest.mark.parametrize("kind", [CoAttack, SGA])
def test_the_l2_ball(kind):
    images = pixels()
    options = {"alpha": None} if kind is SGA else {}
    adversarial, _ = kind(victim(), masked_lm(), eps=0.5, norm="l2", steps=3, **options)(images, TEXTS, OWNER)
    size = (adversarial - images).flatten(1).norm(dim=1)
    assert float(size.min()) > 0.05 and float(size.max()) <= 0.5 and 0 <= adversarial.min() <= adversarial.max() <= 1


def test_coattacks_start_is_one_sided():
    images = 0.2 + 0.5 * pixels()
    atk = CoAttack(victim(), masked_lm(), eps=EPS, steps=1, compat="coattack", mode="image")
    atk.image.alpha = 1e-9
    adversarial, _ = atk(images, TEXTS, OWNER)
    delta = adversarial - images
    assert float(delta.min()) >= -1e-8 and float(delta.max()) > 0.9 * EPS


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda atk: atk(pixels(), TEXTS), "7 captions of 3 images: expected image_of"),
        (lambda atk: atk(pixels(), TEXTS, [0] * 7), "image 1 has no caption"),
        (lambda atk: atk(pixels(), TEXTS, [0, 1, 2, 3, 0, 0, 0]), "image_of must be from 0 to 2, caption 3 has 3"),
        (lambda atk: atk(pixels(), TEXTS, OWNER[:-1]), r"image_of must be integers \(7,\)"),
        (lambda atk: atk(pixels()[0], TEXTS, OWNER), r"images must be floats \(N, 3, H, W\)"),
        (lambda atk: atk((255 * pixels()).byte(), TEXTS, OWNER), "images must be floats"),
        (lambda atk: atk(255 * pixels(), TEXTS, OWNER), "divide by 255"),
        (lambda atk: atk(pixels(), TEXTS, OWNER, start=pixels(2)), "start must be like images"),
        (lambda atk: SGA(victim(), masked_lm(), compat="coattack"), "compat must be 'sga'"),
        (lambda atk: CoAttack(victim(), masked_lm(), mode="both"), "mode must be one of clean, text"),
        (lambda atk: CoAttack(len, masked_lm()), "must have encode_image"),
        (lambda atk: SGA(victim(), masked_lm(), eps=2), "is a / 255 missing"),
        (lambda atk: SGA(victim(), masked_lm(), corpus=["a dog"]), "expected samples=5, say, got 0"),
        (lambda atk: SGA(victim(), masked_lm(), samples=5, corpus="a dog"), "texts must be a list of captions"),
        (lambda atk: registry.make("sa-aet", victim(), masked_lm()), "looks at the captions of the gallery, got none"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(InputError, match=message):
        call(SGA(victim(), masked_lm(), steps=1))(pixels(), TEXTS, OWNER)
