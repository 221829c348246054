"""One step of a projected gradient attack, in place, and the noise that such attacks start from."""

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from cmr_fast.errors import InputError
from cmr_fast.ops import _dispatch
from cmr_fast.ops._library import register
from cmr_fast.ops._tensors import as_integer, check_float, described

Norm = Literal["linf", "l2"]
NORMS = ("linf", "l2")
Value = float | Sequence[float] | np.ndarray | Tensor


def pgd_step_(
    x: Tensor,
    gradient: Tensor,
    origin: Tensor,
    *,
    alpha: Value,
    eps: Value,
    bounds: tuple[Value, Value] = (0.0, 1.0),
    norm: Norm = "linf",
    broken: Tensor | None = None,
    step: int = 0,
    backend: str | None = None,
    threads: int | None = None,
) -> Tensor:
    """Move x along the gradient, back into the ball around origin, and into the box. Changes x and returns it.

    Parameters
    ----------
    x, gradient, origin
        Float (B, ...), x contiguous; dimension 1 is the channel.
    alpha, eps, bounds
        A number, (B,) for every sample, (1, C) for every channel, or (B, C); eps and bounds in the units of x. L2 takes
        one alpha and one eps a sample.
    norm
        linf: x <- clip(origin + clip(x + alpha sign(g) - origin, -eps, eps)), bit for bit the eager formula in float32;
        a gradient that is NaN does not move x.
        l2: x <- x + alpha g / |g|, delta <- delta min(1, eps / |delta|), clip; a gradient of zero does not move x, nor
        does one that is not finite.
    broken, step
        int32 (B,): where it is negative and a sample's gradient is not finite, it becomes `step`.
    backend, threads
        None: the first backend that fits, as many threads as this process has processors (or CMR_FAST_THREADS says).

    Returns
    -------
    Tensor
        x itself.

    Raises
    ------
    InputError
        For tensors that do not go together, and a backend that cannot run.

    Notes
    -----
    gradient and origin may be x itself, or share its memory: they are read as they were before. The step has no
    derivative: x must not require grad where grads are enabled, and its version is counted as by torch's own in-place
    operators. No bit of a sample depends on its batch.
    """
    alpha, eps, low, high = check_step(x, gradient, origin, alpha, eps, bounds, norm, broken)
    torch.ops.cmr_fast.pgd_step_(
        x, gradient, origin, alpha, eps, low, high, broken, step, norm == "l2", *_dispatch.how(backend, threads)
    )
    return x


def check_step(
    x: Tensor, gradient: Tensor, origin: Tensor, alpha: Value, eps: Value, bounds: tuple[Value, Value], norm: str,
    broken: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The arguments of pgd_step_, checked; alpha, eps and the bounds as tensors (1 or B, 1 or C) of x's kind."""
    if norm not in NORMS:
        raise InputError(f"norm must be one of {', '.join(NORMS)}, got {norm!r}")
    if not isinstance(x, Tensor) or x.layout != torch.strided or not x.is_floating_point() or x.ndim < 1:
        raise InputError(f"x must be a float tensor (B, ...), got {described(x)}")
    check_float(x, "x")
    if not x.is_contiguous():
        raise InputError(f"x is changed in place and must be contiguous, got strides {x.stride()} for {tuple(x.shape)}")
    for name, tensor in (("gradient", gradient), ("origin", origin)):
        if not isinstance(tensor, Tensor) or (tensor.layout, tensor.shape, tensor.dtype, tensor.device) != (
            x.layout,
            x.shape,
            x.dtype,
            x.device,
        ):
            raise InputError(f"{name} must be like x, {described(x)}, got {described(tensor)}")
    if broken is not None and not isinstance(broken, Tensor):
        raise InputError(f"broken must be int32 ({len(x)},) on {x.device}, got {described(broken)}")
    if broken is not None and (broken.dtype, broken.shape, broken.device) != (torch.int32, x.shape[:1], x.device):
        raise InputError(f"broken must be int32 ({len(x)},) on {x.device}, got {described(broken)}")
    if not isinstance(bounds, (tuple, list)) or len(bounds) != 2:
        raise InputError(f"bounds must be a pair, the least and the greatest value, got {bounds!r}")
    each = {"alpha": alpha, "eps": eps, "low": bounds[0], "high": bounds[1]}
    values = [as_values(value, x, name) for name, value in each.items()]
    if norm == "l2" and max(values[0].shape[1], values[1].shape[1]) > 1:
        raise InputError("the L2 step takes one alpha and one eps a sample, got one for every channel")
    return values[0], values[1], values[2], values[3]


def as_values(value: Value, x: Tensor, name: str) -> Tensor:
    """A number, (B,), (1, C) or (B, C) as a tensor (1 or B, 1 or C) of x's dtype and device."""
    if isinstance(value, int | float):  # a kernel's argument: a copy to a GPU would wait for it
        if value != value:
            raise InputError(f"{name} must be a number, or numbers, got {value!r}")
        return torch.full((1, 1), value, dtype=x.dtype, device=x.device)
    try:
        tensor = torch.as_tensor(value, dtype=x.dtype, device=x.device)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"{name} must be a number, or numbers, got {value!r}") from error
    if tensor.ndim < 2:
        tensor = tensor.reshape(-1, 1)
    channels = x.shape[1] if x.ndim > 1 else 1
    if tensor.ndim != 2 or tensor.shape[0] not in (1, len(x)) or tensor.shape[1] not in (1, channels):
        raise InputError(
            f"{name} must be a number, ({len(x)},), (1, {channels}) or ({len(x)}, {channels}) for x {tuple(x.shape)}, "
            f"got shape {tuple(torch.as_tensor(value).shape)}"
        )
    return tensor


def pgd_noise(
    index: Tensor, count: int, *, seed: int = 0, backend: str | None = None, threads: int | None = None
) -> Tensor:
    """Uniform numbers in (-1, 1): row i depends on the seed and on index[i] alone.

    Parameters
    ----------
    index
        int64 (B,), a sample's number in its data set, say: its noise is the same in every batch and on every device,
        bit for bit.
    count
        How many numbers a sample.
    seed
        0 to 2^64 - 1.
    backend, threads
        None: the first backend that fits, as many threads as this process has processors (or CMR_FAST_THREADS says).

    Returns
    -------
    Tensor
        float32 (B, count).

    Raises
    ------
    InputError
        For an index, count or seed of another kind, and a backend that cannot run.

    Notes
    -----
    Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3").
    """
    if not isinstance(index, Tensor) or index.layout != torch.strided or index.dtype != torch.int64 or index.ndim != 1:
        raise InputError(f"index must be an int64 tensor (B,), got {described(index)}")
    count, seed = as_integer(count, "count", 0), as_integer(seed, "seed", 0, 2**64 - 1)
    # torch's schemas know signed integers only
    signed = seed - 2**64 if seed >= 2**63 else seed
    noise: Tensor = torch.ops.cmr_fast.pgd_noise(index, count, signed, *_dispatch.how(backend, threads))
    return noise


def _step(
    x: Tensor,
    gradient: Tensor,
    origin: Tensor,
    alpha: Tensor,
    eps: Tensor,
    low: Tensor,
    high: Tensor,
    broken: Tensor | None,
    step: int,
    l2: bool,
    backend: str | None,
    threads: int | None,
) -> None:
    chosen = _dispatch.choose_backend("pgd_step_", x.device.type, backend, _unfit(x))
    if not x.numel():
        return
    if chosen == "torch":
        _torch_step(x, gradient, origin, alpha, eps, low, high, broken, step, l2)
        return
    values = [_apart(v.contiguous(), x) for v in (alpha, eps, low, high)]
    gradient, origin = _apart(gradient.contiguous(), x), _apart(origin.contiguous(), x)
    if chosen == "triton":
        from cmr_fast.ops.triton import pgd as kernels

        kernels.step(x, gradient, origin, values, broken, step, l2)
        return
    shape = _shape(x, values)
    tensors = (x.data_ptr(), gradient.data_ptr(), origin.data_ptr())
    described = [_described(v) for v in values]
    flags = 0 if broken is None else broken.data_ptr()
    if chosen == "cuda":
        native = _dispatch.native_cuda()
        needed = native.pgd_workspace(shape[0], shape[1] * shape[2]) if l2 else 0
        workspace = torch.empty(needed, dtype=torch.uint8, device=x.device)
        native.pgd_step(_dispatch.queue(x), *shape, *tensors, described, flags, step, l2, workspace.data_ptr())
        return
    _dispatch.native().pgd_step(
        _dispatch.choose_isa(), *shape, *tensors, described, flags, step, l2, _dispatch.choose_threads(threads)
    )


def _unfit(x: Tensor) -> dict[str, str]:
    if x.dtype != torch.float32:
        return dict.fromkeys(("cpp", "cuda", "triton"), f"it takes float32, x is {x.dtype}")
    if x.numel() >= max(1, len(x)) << 31:
        return {"triton": f"it takes samples of fewer than 2^31 elements, these have {x.numel() // len(x)}"}
    return {}


def _apart(y: Tensor, x: Tensor) -> Tensor:
    """`y`, a copy where the kernels would write to it as they write to `x`; both contiguous."""
    ends = [(t.data_ptr(), t.data_ptr() + t.numel() * t.element_size()) for t in (x, y)]
    return y.clone() if ends[0][0] < ends[1][1] and ends[1][0] < ends[0][1] else y


def _shape(x: Tensor, values: list[Tensor]) -> tuple[int, int, int]:
    """(samples, channels, elements of a channel), with one channel where none has a value of its own."""
    channels = max(v.shape[1] for v in values)
    return len(x), channels, x.numel() // len(x) // channels


def _described(value: Tensor) -> tuple[int, int, int]:
    """Address, and the strides by sample and by channel: 0 where the value is the same for all."""
    rows, columns = value.shape
    return value.data_ptr(), columns if rows > 1 else 0, 1 if columns > 1 else 0


def _torch_step(
    x: Tensor, gradient: Tensor, origin: Tensor, alpha: Tensor, eps: Tensor, low: Tensor, high: Tensor,
    broken: Tensor | None, step: int, l2: bool,
) -> None:  # fmt: skip
    shape = (len(x), 1) if x.ndim < 2 else (len(x), x.shape[1], x[0, 0].numel())
    flat, g, start = (t.reshape(shape) for t in (x, gradient, origin))
    alpha, eps, low, high = (v.reshape(*v.shape, *[1] * (flat.ndim - 2)) for v in (alpha, eps, low, high))
    finite = g.isfinite().flatten(1).all(1)
    if broken is not None:
        broken.copy_(torch.where((broken < 0) & ~finite, torch.full_like(broken, step), broken))
    if l2:
        usable = finite.reshape(-1, *[1] * (flat.ndim - 1))
        g = torch.where(usable, g, torch.zeros_like(g)).double()
        norm = row_norms(g)
        moved = flat + (alpha.double() / torch.where(norm > 0, norm, 1.0) * g).to(x.dtype)
        delta = moved - start
        distance = row_norms(delta)
        factor = torch.where(distance > eps, eps.double() / distance, 1.0).to(x.dtype)
        found = torch.minimum(torch.maximum(start + delta * factor, low), high)
        flat.copy_(torch.where(usable, found, flat))
        return
    sign = (g > 0).to(x.dtype) - (g < 0).to(x.dtype)
    delta = torch.minimum(torch.maximum(flat + alpha * sign - start, -eps), eps)
    flat.copy_(torch.minimum(torch.maximum(start + delta, low), high))


def row_sums(x: Tensor) -> Tensor:
    """Sums of each sample, (B, ...) -> float64 (B, 1, ...): by halves, so that no bit depends on the batch.

    torch's own sum picks its order by the whole shape.
    """
    total = x.double().flatten(1)
    if not total.shape[1]:
        total = total.new_zeros((len(x), 1))
    while (width := total.shape[1]) > 1:
        half = width // 2
        folded = total[:, :half] + total[:, half : 2 * half]
        total = torch.cat([folded, total[:, 2 * half :]], dim=1) if width % 2 else folded
    return total.reshape(-1, *[1] * (x.ndim - 1))


def row_norms(x: Tensor) -> Tensor:
    """L2 norms of each sample, (B, ...) -> float64 (B, 1, ...)."""
    return row_sums(x.double().square()).sqrt()


def _noise(index: Tensor, count: int, seed: int, backend: str | None, threads: int | None) -> Tensor:
    chosen = _dispatch.choose_backend("pgd_noise", index.device.type, backend)
    if chosen == "torch":
        return _torch_noise(index, count, seed)
    out = torch.empty((len(index), count), dtype=torch.float32, device=index.device)
    index, seed = index.contiguous(), seed % 2**64
    if chosen == "cuda":
        queue = _dispatch.queue(index)
        _dispatch.native_cuda().pgd_noise(queue, seed, index.data_ptr(), len(index), count, out.data_ptr())
        return out
    _dispatch.native().pgd_noise(
        _dispatch.choose_isa(), seed, index.data_ptr(), len(index), count, out.data_ptr(),
        _dispatch.choose_threads(threads),
    )  # fmt: skip
    return out


LOW_WORD = 0xFFFFFFFF


def _torch_noise(index: Tensor, count: int, seed: int) -> Tensor:
    """Philox4x32-10 in int64: a 32-bit word times a constant is taken in 16-bit halves, so that nothing overflows."""
    block = torch.arange(-(-count // 4), dtype=torch.int64, device=index.device)[None, :].expand(len(index), -1)
    row = index[:, None].expand_as(block)
    c = [block & LOW_WORD, block >> 32, row & LOW_WORD, row >> 32 & LOW_WORD]
    key = [seed & LOW_WORD, seed >> 32 & LOW_WORD]
    for _ in range(10):
        a_high, a_low = _multiply(c[0], 0xD2511F53)
        b_high, b_low = _multiply(c[2], 0xCD9E8D57)
        c = [b_high ^ c[1] ^ key[0], b_low, a_high ^ c[3] ^ key[1], a_low]
        key = [(key[0] + 0x9E3779B9) & LOW_WORD, (key[1] + 0xBB67AE85) & LOW_WORD]
    words = torch.stack(c, dim=2).flatten(1)[:, :count]
    return (2 * (words >> 9) + 1 - 2**23).float() * 2.0**-23


def _multiply(word: Tensor, constant: int) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of the product."""
    low = word * (constant & 0xFFFF)
    high = word * (constant >> 16)
    total = (high << 16 & LOW_WORD) + (low & LOW_WORD)
    return (high >> 16) + (low >> 32) + (total >> 32), total & LOW_WORD


register(
    "pgd_step_(Tensor(a!) x, Tensor gradient, Tensor origin, Tensor alpha, Tensor eps, Tensor low, Tensor high, "
    "Tensor(b!)? broken, int step, bool l2, str? backend, int? threads) -> ()",
    _step,
    lambda *arguments: None,
)
register(
    "pgd_noise(Tensor index, int count, int seed, str? backend, int? threads) -> Tensor",
    _noise,
    lambda index, count, seed, backend, threads: index.new_empty((index.shape[0], count), dtype=torch.float32),
)
