"""Likelihoods of pairwise similarities (DCMH, SSAH) without an n x N array: the loss and its gradients in one pass.

Theta = scale * f g^T is made in tiles that stay in cache; of a tile, the loss is summed in double and its gradient
takes Theta's place, from where a second product carries it to f and g. Results do not change from run to run or with
`threads`.
"""

import functools
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from cmr_fast.errors import InputError
from cmr_fast.ops import _dispatch
from cmr_fast.ops._library import call, derivative_wanted, register_loss
from cmr_fast.ops._tensors import Array, as_number, as_tensor, like_input
from cmr_fast.ops.hamming import pack_codes
from cmr_fast.ops.labels import share_bit

Similarities = Tensor | np.ndarray | tuple[Tensor | np.ndarray, Tensor | np.ndarray]

_CPU_TILE, _CPU_ROWS = 1 << 17, 256  # elements of a tile, 512 KiB, and its rows at most
_CUDA_TILE, _CUDA_ROWS = 1 << 24, 4096


def pairwise_nll(
    f: Array,
    g: Array,
    s: Similarities,
    *,
    scale: float = 0.5,
    positive: float = 1.0,
    reduction: str = "sum",
    backend: str | None = None,
    threads: int | None = None,
) -> Array:
    """DCMH's negative log-likelihood of the similarities of all pairs, finite for any finite Theta.

        sum_ij log(1 + e^Theta_ij) - S_ij Theta_ij,    Theta = scale * f g^T

    Parameters
    ----------
    f, g : Tensor or numpy.ndarray
        Float (n, bits) and (N, bits), of one dtype; float16 and bfloat16 are computed in float32. The gradient of
        either is made only where it is asked for, so one may be a buffer of the whole training set.
    s : pair of Tensor, or Tensor
        What is similar: a pair (f_labels, g_labels) of packed multi-hot labels, uint8 (n, L) and (N, L) (see
        `pack_codes`; bool (n, classes) is packed here), S_ij = 1 where a bit is shared; a pair of integer class ids
        (n,) and (N,), S_ij = 1 where equal; or S itself, (n, N) bool, integer or float. No gradient goes to S.
    scale : float
        1/2 is DCMH's.
    positive : float
        S is multiplied by it.
    reduction : {"sum", "mean"}
        "mean" over the n * N pairs (0 where there are none).
    backend : {"cpp", "torch"}, optional
        Forces one; the device chooses otherwise.
    threads : int, optional
        Of the native kernel; the products use torch's.

    Returns
    -------
    Tensor or numpy.ndarray
        A scalar of the dtype of f (float32 for halves) and of its kind; differentiable once.

    Raises
    ------
    InputError
        On shapes, dtypes, devices or labels that do not fit.
    """
    return _loss("pairwise_nll", f, g, s, scale, positive, reduction, backend, threads)


def pairwise_squared(
    f: Array,
    g: Array,
    s: Similarities,
    *,
    scale: float = 0.5,
    positive: float = 0.999,
    reduction: str = "sum",
    backend: str | None = None,
    threads: int | None = None,
) -> Array:
    """SSAH's squared form, 1/2 || S * Theta - log(1 + e^Theta) ||^2 with S in {0, 0.999}.

    Parameters
    ----------
    f, g, s, scale, positive, reduction, backend, threads
        As in `pairwise_nll`, but S is multiplied by 0.999 where nothing is said.

    Returns
    -------
    Tensor or numpy.ndarray
        A scalar of the dtype of f (float32 for halves) and of its kind; differentiable once.

    Raises
    ------
    InputError
        On shapes, dtypes, devices or labels that do not fit.
    """
    return _loss("pairwise_squared", f, g, s, scale, positive, reduction, backend, threads)


def _loss(
    op: Literal["pairwise_nll", "pairwise_squared"],
    f: Array,
    g: Array,
    s: Similarities,
    scale: float,
    positive: float,
    reduction: str,
    backend: str | None,
    threads: int | None,
) -> Array:
    left, was_numpy = as_tensor(f, "f")
    right, _ = as_tensor(g, "g")
    if left.ndim != 2 or right.ndim != 2 or left.shape[1] != right.shape[1] or left.shape[1] == 0:
        raise InputError(f"f and g must be (n, bits) and (N, bits), got {tuple(left.shape)} and {tuple(right.shape)}")
    if not left.is_floating_point() or left.dtype != right.dtype or left.device != right.device:
        raise InputError(
            f"f and g must be of one float dtype on one device, got {left.dtype} on {left.device} and {right.dtype} "
            f"on {right.device}"
        )
    if reduction not in ("sum", "mean"):
        raise InputError(f"reduction must be sum or mean, got {reduction!r}")
    pairs = len(left), len(right)
    matrix, f_labels, g_labels = None, None, None
    if isinstance(s, (tuple, list)):
        if len(s) != 2:
            raise InputError(f"labels must be a pair, those of f and those of g, got {len(s)}")
        f_labels, g_labels = (_labels(x, n, left, name) for x, n, name in zip(s, pairs, ("f", "g"), strict=True))
        if f_labels.dtype != g_labels.dtype or f_labels.shape[1:] != g_labels.shape[1:]:
            raise InputError(
                f"the labels must be of one kind and width, got {f_labels.dtype} {tuple(f_labels.shape)} and "
                f"{g_labels.dtype} {tuple(g_labels.shape)}"
            )
    else:
        matrix = as_tensor(s, "s")[0]
        if matrix.shape != pairs or matrix.device != left.device or matrix.is_complex():
            raise InputError(
                f"s must be a real matrix {pairs} on {left.device}, or a pair of labels, got {matrix.dtype} "
                f"{tuple(matrix.shape)} on {matrix.device}"
            )
        if matrix.requires_grad:
            raise InputError("s gets no gradient; got one that requires it, use s.detach()")
    needs = [derivative_wanted(x) for x in (left, right)]
    total = call(
        op, left, right, matrix, f_labels, g_labels, as_number(scale, "scale"), as_number(positive, "positive"), *needs,
        *_dispatch.how(backend, threads),
    )[0]  # fmt: skip
    if reduction == "mean":
        total = total / max(1, pairs[0] * pairs[1])
    result: Array = like_input(total, was_numpy)
    return result


def _labels(x: object, count: int, codes: Tensor, name: str) -> Tensor:
    labels = as_tensor(x, f"{name}'s labels")[0]
    if labels.dtype == torch.bool and labels.ndim == 2:
        labels = pack_codes(labels)
    packed = labels.dtype == torch.uint8 and labels.ndim == 2 and labels.shape[1] > 0
    classes = labels.dtype in (torch.int32, torch.int64) and labels.ndim == 1
    if not (packed or classes) or len(labels) != count or labels.device != codes.device:
        raise InputError(
            f"{name}'s labels must be packed uint8 ({count}, L), bool ({count}, classes) or int ({count},) on "
            f"{codes.device}, got {labels.dtype} {tuple(labels.shape)} on {labels.device}"
        )
    return labels.long() if classes else labels


def _pairwise(
    op: Literal["pairwise_nll", "pairwise_squared"],
    f: Tensor,
    g: Tensor,
    s: Tensor | None,
    f_labels: Tensor | None,
    g_labels: Tensor | None,
    scale: float,
    positive: float,
    needs_f: bool,
    needs_g: bool,
    backend: str | None,
    threads: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    loss, grad_f, grad_g = _outputs(f, g, needs_f, needs_g)
    chosen = _dispatch.choose_backend(op, f.device.type, backend, _unfit(f))
    n, size = len(f), len(g)
    scaled, codes = f.to(loss.dtype) * scale, g.to(loss.dtype).contiguous()
    slope_f = scaled.new_zeros(scaled.shape if needs_f else 0)
    slope_g = scaled.new_zeros(codes.shape if needs_g else 0)
    most, most_rows = (_CPU_TILE, _CPU_ROWS) if f.device.type == "cpu" else (_CUDA_TILE, _CUDA_ROWS)
    rows = max(1, min(n, most_rows))
    columns = max(1, min(size, most // rows))
    buffer = scaled.new_empty(rows * columns)
    tiles = _NativeTiles if chosen == "cpp" else _TorchTiles
    run = tiles(s, f_labels, g_labels, rows, positive, op == "pairwise_squared", needs_f or needs_g, scaled, threads)
    for i in range(0, n, rows):
        left = scaled[i : i + rows]
        for j in range(0, size, columns):
            right = codes[j : j + columns]
            theta = buffer[: len(left) * len(right)].view(len(left), len(right))
            torch.mm(left, right.T, out=theta)
            run(theta, i, j)
            if needs_f:
                slope_f[i : i + rows].addmm_(theta, right)
            if needs_g:
                slope_g[j : j + columns].addmm_(theta.T, left)
    loss.copy_(run.total)
    if needs_f:
        grad_f.copy_(slope_f.mul_(scale))
    if needs_g:
        grad_g.copy_(slope_g)
    return loss, grad_f, grad_g


def _unfit(f: Tensor) -> dict[str, str]:
    return {"cpp": "it computes in float32, these are float64"} if f.dtype == torch.float64 else {}


class _TorchTiles:
    """Theta -> its gradient, in place; the loss is added to total."""

    def __init__(
        self, s: Tensor | None, f_labels: Tensor | None, g_labels: Tensor | None, rows: int, positive: float,
        squared: bool, gradient: bool, codes: Tensor, threads: int | None,
    ) -> None:  # fmt: skip
        self.s, self.labels, self.positive = s, (f_labels, g_labels), positive
        self.squared, self.gradient = squared, gradient
        self.total = torch.zeros((), dtype=torch.float64, device=codes.device)

    def __call__(self, theta: Tensor, i: int, j: int) -> None:
        rows, columns = slice(i, i + theta.shape[0]), slice(j, j + theta.shape[1])
        if self.s is not None:
            s = self.s[rows, columns].to(theta.dtype)
        else:
            f_labels, g_labels = self.labels
            assert f_labels is not None and g_labels is not None
            s = share_bit(f_labels[rows], g_labels[columns]).to(theta.dtype)
        s = s * self.positive
        e = theta.abs().neg_().exp_()
        u = e + 1
        # log1p(e) by Kahan: torch's own is ten times slower than its log
        soft = torch.where(u == 1, e, u.log() * (e / (u - 1)))
        above = theta.clamp(min=0)
        if self.squared:
            rest = (s * theta - above) - soft
            self.total += 0.5 * rest.square().sum(dtype=torch.float64)
            slope = rest * (s - theta.sigmoid())
        else:
            self.total += ((above - s * theta) + soft).sum(dtype=torch.float64)
            slope = theta.sigmoid() - s
        if self.gradient:
            theta.copy_(slope)


class _NativeTiles:
    """The same by csrc/cpu/pairwise.cpp."""

    def __init__(
        self, s: Tensor | None, f_labels: Tensor | None, g_labels: Tensor | None, rows: int, positive: float,
        squared: bool, gradient: bool, codes: Tensor, threads: int | None,
    ) -> None:  # fmt: skip
        self.s, self.options = s, (positive, squared, gradient)
        self.native, self.isa = _dispatch.native(), _dispatch.choose_isa()
        self.threads = _dispatch.choose_threads(threads)
        self.sums = torch.empty(rows, dtype=torch.float64, device="cpu")
        self.total = torch.zeros((), dtype=torch.float64, device="cpu")
        if f_labels is not None and g_labels is not None:
            self.classes = f_labels.ndim == 1
            self.own, others = _words(f_labels), _words(g_labels)
            self.planes = others.T.contiguous()

    def __call__(self, theta: Tensor, i: int, j: int) -> None:
        rows, columns = theta.shape
        if self.s is None:
            words, stride = self.planes.shape
            where = (
                int(self.classes), self.own.data_ptr() + 4 * i * words, self.planes.data_ptr() + 4 * j, words, stride,
                0, 0,
            )  # fmt: skip
        else:
            s = self.s[i : i + rows, j : j + columns]
            if s.dtype != torch.bool and s.dtype != torch.uint8:
                s = s.to(torch.float32)
            if s.stride(1) != 1:
                s = s.contiguous()
            where = (3 if s.dtype == torch.float32 else 2, 0, 0, 0, 0, s.data_ptr(), s.stride(0))
        self.native.pairwise(
            self.isa, theta.data_ptr(), rows, columns, *where, *self.options, self.sums.data_ptr(),
            self.total.data_ptr(), self.threads,
        )  # fmt: skip


def _words(labels: Tensor) -> Tensor:
    """int32 (N, words): packed labels filled up with zero bytes, or class ids."""
    if labels.ndim == 1:
        words = labels.to(torch.int32)
        if not torch.equal(words.long(), labels):
            raise InputError("class ids must fit in 32 bits, got larger ones")
        return words[:, None]
    words = labels.new_zeros((len(labels), -(-labels.shape[1] // 4) * 4))
    words[:, : labels.shape[1]] = labels
    return words.view(torch.int32)


def _outputs(f: Tensor, g: Tensor, needs_f: bool, needs_g: bool) -> tuple[Tensor, Tensor, Tensor]:
    dtype = torch.promote_types(f.dtype, torch.float32)
    return f.new_empty((), dtype=dtype), f.new_empty(f.shape if needs_f else 0), g.new_empty(g.shape if needs_g else 0)


for name in ("pairwise_nll", "pairwise_squared"):
    register_loss(
        f"{name}(Tensor f, Tensor g, Tensor? s, Tensor? f_labels, Tensor? g_labels, float scale, float positive, "
        "bool needs_f, bool needs_g, str? backend, int? threads) -> (Tensor, Tensor, Tensor)",
        functools.partial(_pairwise, name),
        lambda f, g, s, f_labels, g_labels, scale, positive, needs_f, needs_g, *rest: _outputs(f, g, needs_f, needs_g),
        differentiable=(0, 1),
    )
