"""A step of a projected gradient attack on a GPU; ops/pgd.py and csrc/cpu/pgd_kernel.h say what it computes.

    linf   x <- clip(origin + clip(x + alpha sign(g) - origin, -eps, eps)), the eager formula's operations in its order
    l2     |d|^2 = |x - origin|^2 + 2 alpha (x - origin) . g / |g| + alpha^2 of d = x + alpha g / |g| - origin, from
           three sums of one pass; a second pass moves x

Layout: a program takes BLOCK elements of one sample. The sums of a program are float64 and have one writer, and the
programs of the second pass add them in one order: the same bits from run to run. A sample of more than MOST_PARTS
blocks is summed in parts of several.
Bound: memory. linf moves 16 bytes an element (three reads, a write), l2 28.
Deterministic, and never contracted into multiply-adds. Not measured on a GPU yet: the block size is an estimate.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024  # elements of a program
MOST_PARTS = 256  # of a sample, each with sums of its own


@triton.jit
def _value(values, per_sample, per_channel, sample, channels, INNER: tl.constexpr):
    """The value of a sample, or those of its elements where channels have their own."""
    at = values + sample * per_sample
    return tl.load(at + channels * per_channel) if INNER else tl.load(at)


@triton.jit
def _clip(x, low, high):
    x = tl.where(x > low, x, low)
    return tl.where(x < high, x, high)


@triton.jit
def _flag(broken, sample, step, seen):
    """Where `seen`. Programs of one sample all write the same."""
    if seen:
        before = tl.load(broken + sample)
        if before < 0:
            tl.atomic_cas(broken + sample, before, step)


@triton.jit(do_not_specialize=["step"])
def _linf(
    x, gradient, origin, alpha, alpha_sample, alpha_channel, eps, eps_sample, eps_channel, low, low_sample, low_channel,
    high, high_sample, high_channel, broken, step, elements, inner, blocks,
    CHANNELS: tl.constexpr, FLAGS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    sample = (tl.program_id(0) // blocks).to(tl.int64)
    i = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    inside = i < elements
    at = sample * elements + i
    g = tl.load(gradient + at, mask=inside, other=0.0)
    start = tl.load(origin + at, mask=inside, other=0.0)
    channel = tl.where(inside, i, 0) // inner
    size = _value(alpha, alpha_sample, alpha_channel, sample, channel, CHANNELS)
    radius = _value(eps, eps_sample, eps_channel, sample, channel, CHANNELS)
    sign = (g > 0).to(tl.float32) - (g < 0).to(tl.float32)
    delta = _clip(tl.load(x + at, mask=inside, other=0.0) + size * sign - start, -radius, radius)
    least = _value(low, low_sample, low_channel, sample, channel, CHANNELS)
    most = _value(high, high_sample, high_channel, sample, channel, CHANNELS)
    tl.store(x + at, _clip(start + delta, least, most), mask=inside)
    if FLAGS:
        _flag(broken, sample, step, tl.min((tl.abs(g) < float("inf")).to(tl.int32), 0) == 0)


@triton.jit
def _sums(x, gradient, origin, sums, stride, elements, each, parts, BLOCK: tl.constexpr):
    """|g|^2, (x - origin) . g and |x - origin|^2 of a part to sums (3, samples, parts), `stride` apart."""
    sample, part = (tl.program_id(0) // parts).to(tl.int64), tl.program_id(0) % parts
    squares = tl.zeros((BLOCK,), dtype=tl.float64)
    along = tl.zeros((BLOCK,), dtype=tl.float64)
    offsets = tl.zeros((BLOCK,), dtype=tl.float64)
    for first in range(part * each, min(elements, (part + 1) * each), BLOCK):
        i = first + tl.arange(0, BLOCK)
        at = sample * elements + i
        g = tl.load(gradient + at, mask=i < elements, other=0.0).to(tl.float64)
        offset = tl.load(x + at, mask=i < elements, other=0.0) - tl.load(origin + at, mask=i < elements, other=0.0)
        offset = offset.to(tl.float64)
        squares += g * g
        along += g * offset
        offsets += offset * offset
    out = sums + tl.program_id(0)
    tl.store(out, tl.sum(squares, 0))
    tl.store(out + stride, tl.sum(along, 0))
    tl.store(out + 2 * stride, tl.sum(offsets, 0))


@triton.jit(do_not_specialize=["step"])
def _move(
    x, gradient, origin, sums, stride, alpha, alpha_sample, eps, eps_sample, low, low_sample, low_channel,
    high, high_sample, high_channel, broken, step, elements, inner, blocks, parts,
    CHANNELS: tl.constexpr, FLAGS: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    sample, block = (tl.program_id(0) // blocks).to(tl.int64), tl.program_id(0) % blocks
    part = tl.arange(0, PARTS)
    own = sums + sample * parts + part
    square = tl.sum(tl.load(own, mask=part < parts, other=0.0), 0)
    if square < float("inf"):  # a sum of squares is finite unless one of them is not
        along = tl.sum(tl.load(own + stride, mask=part < parts, other=0.0), 0)
        offset = tl.sum(tl.load(own + 2 * stride, mask=part < parts, other=0.0), 0)
        size = tl.load(alpha + sample * alpha_sample).to(tl.float64)
        radius = tl.load(eps + sample * eps_sample).to(tl.float64)
        norm = tl.sqrt(square)
        scale = tl.where(norm > 0, size / tl.where(norm > 0, norm, 1.0), 0.0)
        distance = offset + 2 * scale * along + scale * norm * scale * norm
        distance = tl.sqrt(tl.where(distance > 0, distance, 0.0))
        factor = tl.where(distance > radius, radius / tl.where(distance > 0, distance, 1.0), 1.0).to(tl.float32)

        i = block * BLOCK + tl.arange(0, BLOCK)
        inside = i < elements
        at = sample * elements + i
        start = tl.load(origin + at, mask=inside, other=0.0)
        g = tl.load(gradient + at, mask=inside, other=0.0).to(tl.float64)
        delta = tl.load(x + at, mask=inside, other=0.0) + (scale * g).to(tl.float32) - start
        channel = tl.where(inside, i, 0) // inner
        least = _value(low, low_sample, low_channel, sample, channel, CHANNELS)
        most = _value(high, high_sample, high_channel, sample, channel, CHANNELS)
        tl.store(x + at, _clip(start + delta * factor, least, most), mask=inside)
    elif FLAGS:
        _flag(broken, sample, step, block == 0)


def step(
    x: Tensor, gradient: Tensor, origin: Tensor, values: list[Tensor], broken: Tensor | None, step: int, l2: bool
) -> None:
    """Move x (B, ...) in place, not empty; all contiguous, values alpha, eps, low and high (1 or B, 1 or C)."""
    samples, elements = len(x), x.numel() // len(x)
    channels = max(v.shape[1] for v in values)
    described: list[Any] = []
    for v in values:
        described += [v, v.shape[1] if v.shape[0] > 1 else 0, 1 if v.shape[1] > 1 else 0]
    size = min(BLOCK, triton.next_power_of_2(elements))
    blocks = triton.cdiv(elements, size)
    flags = x if broken is None else broken
    rest = flags, step
    options: dict[str, Any] = {
        "CHANNELS": channels > 1, "FLAGS": broken is not None, "BLOCK": size, "enable_fp_fusion": False
    }  # fmt: skip
    with torch.cuda.device_of(x):
        if not l2:
            _linf[samples * blocks,](
                x, gradient, origin, *described, *rest, elements, elements // channels, blocks, **options
            )  # fmt: skip
            return
        each = size * triton.cdiv(blocks, MOST_PARTS)
        parts = triton.cdiv(elements, each)
        shared = torch.empty((3, samples, parts), dtype=torch.float64, device=x.device), samples * parts
        _sums[samples * parts,](x, gradient, origin, *shared, elements, each, parts, BLOCK=size, enable_fp_fusion=False)
        _move[samples * blocks,](
            x, gradient, origin, *shared, *described[:2], *described[3:5], *described[6:], *rest,
            elements, elements // channels, blocks, parts, PARTS=triton.next_power_of_2(parts), **options,
        )  # fmt: skip
