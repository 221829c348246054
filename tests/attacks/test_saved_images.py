"""Adversarial images as files."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cmr_fast.attacks import saved
from cmr_fast.errors import InputError

Image = pytest.importorskip("PIL.Image")


def images(count=3, seed=0, size=20):
    generator = torch.Generator().manual_seed(seed)
    clean = torch.randint(0, 256, (count, 3, size, size), generator=generator).float() / 255
    return clean, torch.rand(clean.shape, generator=generator) * 2 - 1


@given(st.sampled_from([0.5, 1, 1.5, 2, 7.9, 8, 300]), st.integers(0, 100))
def test_rounding_stays_in_the_ball_and_is_the_nearest_there(levels, seed):
    clean, noise = images(seed=seed, size=5)
    eps = levels / 255
    moved = (clean + eps * noise).clamp(0, 1)
    out, level = saved.to_uint8(moved, clean, eps).long(), (clean * 255).round().long()
    assert int((out - level).abs().max()) <= int(levels)
    every = torch.arange(256).view(256, 1, 1, 1, 1)
    allowed = (every - level).abs() <= int(levels)
    distance = torch.where(allowed, (every - moved.double() * 255).abs(), torch.inf)
    nearest = distance.amin(dim=0)
    assert torch.allclose((out - moved.double() * 255).abs(), nearest, atol=1e-4)


def test_whole_steps_are_kept_and_nothing_is_truncated():
    clean = torch.tensor([100.0, 0, 255, 7]).view(1, 1, 2, 2) / 255
    moved = clean + torch.tensor([2.0, 2, -2, -2]).view(1, 1, 2, 2) / 255
    assert saved.to_uint8(moved, clean, 2 / 255).flatten().tolist() == [102, 2, 253, 5]
    assert saved.to_uint8(clean + 0.9 / 255 * (clean < 1), clean, 2 / 255).flatten().tolist() == [101, 1, 255, 8]


@pytest.mark.parametrize("decoder", saved.decoders())
def test_png_is_the_same_pixels_and_jpeg_is_what_pillow_reads(tmp_path, decoder):
    clean, _ = images()
    pixels = (clean * 255).round().to(torch.uint8)
    png = saved.write_images(tmp_path / "new", pixels, ["a", "b", "c"], "png")
    assert [path.name for path in png] == ["a.png", "b.png", "c.png"]
    assert torch.equal(saved.read_images(png, decoder), pixels)
    jpeg = saved.write_images(tmp_path, pixels, ["a", "b", "c"], "jpeg")
    read = saved.read_images(jpeg, decoder)
    assert read.shape == pixels.shape and not torch.equal(read, pixels)
    assert np.array_equal(read[1].permute(1, 2, 0).numpy(), np.asarray(Image.open(jpeg[1])))


def test_bad_images_are_named(tmp_path):
    clean, _ = images()
    with pytest.raises(InputError, match="between two levels"):
        saved.to_uint8(clean, clean * 0.99, 0.1)
    with pytest.raises(InputError, match="adversarial images must lie in 0 to 1"):
        saved.to_uint8(clean + 1, clean, 0.1)
    with pytest.raises(InputError, match="floats of one shape"):
        saved.to_uint8(clean[:1], clean, 0.1)
    with pytest.raises(InputError, match=r"must be uint8 \(1, 3, H, W\)"):
        saved.write_images(tmp_path, clean, ["a"], "png")
