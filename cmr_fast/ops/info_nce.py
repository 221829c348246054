"""Contrastive losses over every pair of a batch, in O(N) memory: InfoNCE, the sigmoid loss, a Jensen-Shannon critic.

Similarities exist one tile at a time: torch multiplies the tile, a fused epilogue takes from it what rows and columns
need or turns it into the gradient, and torch multiplies that with the features. Forward is one product, backward three
(the tile again, and a gradient to either side); what of the similarities fits KEEP_BYTES is not computed twice. The
passes over the tiles are in _info_nce_tiles.py; results depend neither on the number of threads nor on the instruction
set.
"""

import math
import numbers
from typing import Any, Literal

import torch
from torch import Tensor

from cmr_fast.errors import InputError
from cmr_fast.ops import _dispatch
from cmr_fast.ops._info_nce_tiles import (
    CPP_DTYPES,
    Pairs,
    cpp_backward,
    cpp_forward,
    cpp_sigmoid,
    info_nce_outputs,
    rows_to_keep,
    sigmoid_outputs,
    softplus,
    torch_backward,
    torch_forward,
    torch_sigmoid,
)
from cmr_fast.ops._library import call, derivative_wanted, refuse_twice, register, register_derivative, register_loss
from cmr_fast.ops._tensors import as_number, check_float, described

Positives = Tensor | tuple[Tensor, Tensor] | None
Reduction = Literal["mean", "sum", "none"]
Direction = Literal["both", "image", "text"]


def info_nce(
    image: Tensor,
    text: Tensor,
    logit_scale: Tensor | float,
    *,
    logit_bias: Tensor | float | None = None,
    offset: int = 0,
    positives: Positives = None,
    direction: Direction = "both",
    reduction: Reduction = "mean",
    backend: str | None = None,
    threads: int | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """CLIP's loss (MAT Eq. 1, both directions halved) on logits z_ij = logit_scale * image_i . text_j.

    An image (text) without a positive has the loss 0, no gradient, and does not count in the mean; without a negative
    its loss is 0 by itself; the mean over none is 0.

    Parameters
    ----------
    image, text : Tensor
        Float (n, d) and (m, d), of one dtype on one device; usually of unit length, which is not done here.
    logit_scale : Tensor or float
        1 / temperature: a number, or a tensor of one element.
    logit_bias : Tensor or float, optional
        As open_clip passes it: a softmax does not see it, its gradient is 0.
    offset : int
        Text i + offset is the positive of image i, 0 <= offset <= m - n (a rank's share of a large batch).
    positives : Tensor or pair of Tensor, optional
        Instead of one positive each: int64 ids (n,), or a pair of them (n,) and (m,), positive where equal, all alike;
        or bool (n, m), or float (n, m) of 0 or more, each row (column) of which is divided by its sum.
    direction : {"both", "image", "text"}
        "image": each image among the texts; "text": each text among the images; "both": their mean.
    reduction : {"mean", "sum", "none"}
        "mean" over the images and over the texts that have a positive; "sum" (for both directions: halved); "none":
        the losses of the images and those of the texts, empty where `direction` leaves them out.
    backend : {"cpp", "triton", "torch"}, optional
        Forces one; the device chooses otherwise.
    threads : int, optional
        Of the native kernels; default all processors of this process. Results do not depend on it.

    Returns
    -------
    Tensor or tuple of Tensor
        A scalar; for "none" (n,) and (m,). float32, also for features of 16 bits, or float64 for float64 features.
        Differentiable once, in image, text and logit_scale.

    Raises
    ------
    InputError
        On shapes, dtypes or devices that disagree, and values that are none of the named ones.
    """
    backend, threads = _dispatch.how(backend, threads)
    scale = _inputs(image, text, logit_scale)
    image_ids, text_ids, weights = _positives(image, text, offset, positives)
    if direction not in ("both", "image", "text"):
        raise InputError(f"direction must be both, image or text, got {direction!r}")
    if reduction not in ("mean", "sum", "none"):
        raise InputError(f"reduction must be mean, sum or none, got {reduction!r}")
    needs_gradient = derivative_wanted(image, text, scale)
    *losses, row_stats, column_stats, _ = call(
        "info_nce", image, text, scale, image_ids, text_ids, weights, offset, direction != "text", direction != "image",
        rows_to_keep(image, text) if needs_gradient else 0, backend, threads,
    )  # fmt: skip
    if reduction == "none":
        return losses[0], losses[1]
    total: Tensor = losses[0].sum(dtype=torch.float64) * 0
    for loss, stats in zip(losses, (row_stats, column_stats), strict=True):
        part = loss.sum(dtype=torch.float64)
        total = total + (part / (stats[3] > 0).sum().clamp(min=1) if reduction == "mean" else part)
    total = (total / 2 if direction == "both" else total).to(scale.dtype)
    if isinstance(logit_bias, Tensor):
        total = total + 0 * logit_bias.sum().to(total.dtype)
    return total


def sigmoid_loss(
    image: Tensor,
    text: Tensor,
    logit_scale: Tensor | float,
    logit_bias: Tensor | float | None = None,
    *,
    offset: int | None = 0,
    positives: Positives = None,
    reduction: Literal["mean", "sum"] = "mean",
    backend: str | None = None,
    threads: int | None = None,
) -> Tensor:
    """SigLIP's loss (Zhai et al. 2023, Algorithm 1): softplus(-z_ij) of positives and softplus(z_ij) of all others.

    z_ij = logit_scale * image_i . text_j + logit_bias, and the sum over all pairs. The gradient is made in the same
    pass.

    Parameters
    ----------
    image, text : Tensor
        Float (n, d) and (m, d), of one dtype on one device.
    logit_scale, logit_bias : Tensor or float
        Numbers, or tensors of one element. No bias is 0.
    offset : int, optional
        Text i + offset is the positive of image i; None: there are no positives (another rank's texts).
    positives : Tensor or pair of Tensor, optional
        As for `info_nce`, but they weigh 1 each: ids, or bool (n, m).
    reduction : {"mean", "sum"}
        "mean" divides the sum by n.
    backend, threads
        As in `info_nce`.

    Returns
    -------
    Tensor
        A scalar, float32 or, for float64 features, float64; differentiable once, in all four.

    Raises
    ------
    InputError
        On shapes, dtypes or devices that disagree, and on positives with weights.
    """
    backend, threads = _dispatch.how(backend, threads)
    scale = _inputs(image, text, logit_scale)
    if reduction not in ("mean", "sum"):
        raise InputError(f"reduction must be mean or sum, got {reduction!r}")
    if offset is not None or positives is not None:
        image_ids, text_ids, mask = _positives(image, text, offset or 0, positives)
    else:
        image_ids = text_ids = mask = None
    if mask is not None and mask.dtype != torch.bool:
        raise InputError(f"positives of the sigmoid loss must be ids or bool, got {mask.dtype}")
    each = 1.0 / max(1, len(image)) if reduction == "mean" else 1.0
    bias = _scalar(0.0 if logit_bias is None else logit_bias, image, "logit_bias")
    place = len(text) if offset is None else offset  # past the last column: no diagonal
    gradients = derivative_wanted(image, text, scale, bias)
    loss: Tensor = call(
        "sigmoid_loss", image, text, scale, bias, image_ids, text_ids, mask, place, each, gradients, backend, threads
    )[0]
    return loss


def js_critic(
    image: Tensor,
    text: Tensor,
    *,
    marginals: Literal["all", "permutation"] = "all",
    backend: str | None = None,
    threads: int | None = None,
) -> Tensor:
    """CMIMH's Jensen-Shannon bound (Eq. 5) from a separable critic, T_ij = image_i . text_j; at most 2 log 2.

        2 log 2 - mean over pairs of softplus(-T_ii) - mean over the product of marginals of softplus(T_ij)

    Parameters
    ----------
    image, text : Tensor
        Float (B, d), B of 2 or more, row i of both from pair i.
    marginals : {"all", "permutation"}
        "all": the B (B - 1) pairs i != j; "permutation": B of them, by a random cycle.
    backend, threads
        As in `info_nce`.

    Returns
    -------
    Tensor
        A scalar, float32 or, for float64 features, float64; differentiable, once for "all".

    Raises
    ------
    InputError
        On shapes, dtypes or devices that disagree.
    """
    backend, threads = _dispatch.how(backend, threads)
    _inputs(image, text, 1.0)
    count = len(image)
    if image.shape != text.shape or count < 2:
        raise InputError(f"image and text must both be (B, d) with B >= 2, got {_shapes(image, text)}")
    if marginals not in ("all", "permutation"):
        raise InputError(f"marginals must be all or permutation, got {marginals!r}")
    if marginals == "all":
        gradients = derivative_wanted(image, text)
        bound: Tensor = call("js_critic", image, text, gradients, backend, threads)[0]
        return bound
    cycle = torch.randperm(count, dtype=torch.int64, device=image.device)
    joint, apart = (image * text).sum(1), (image[cycle] * text[cycle.roll(1)]).sum(1)
    return 2 * math.log(2) - (softplus(-joint).mean() + softplus(apart).mean())


def _shapes(*tensors: Tensor) -> str:
    return " and ".join(str(tuple(x.shape)) for x in tensors)


def _inputs(image: Tensor, text: Tensor, logit_scale: Tensor | float) -> Tensor:
    """Refuse what does not fit; the scale as a tensor () in the dtype that the loss is computed in."""
    for x, name in ((image, "image"), (text, "text")):
        if not isinstance(x, Tensor) or x.layout != torch.strided or x.ndim != 2 or not x.is_floating_point():
            raise InputError(f"{name} must be a floating-point tensor (N, d), got {described(x)}")
        check_float(x, name)
    if image.shape[1] != text.shape[1]:
        raise InputError(f"image and text must have one width, got {_shapes(image, text)}")
    if image.dtype != text.dtype or image.device != text.device:
        raise InputError(
            f"image and text must agree in dtype and device, got {image.dtype} on {image.device} and "
            f"{text.dtype} on {text.device}"
        )
    return _scalar(logit_scale, image, "logit_scale")


def _wide(x: Tensor) -> Tensor:
    """A scalar of the dtype that losses of x are computed in."""
    return x.new_empty((), dtype=torch.promote_types(x.dtype, torch.float32))


def _scalar(x: Tensor | float, like: Tensor, name: str) -> Tensor:
    dtype = torch.promote_types(like.dtype, torch.float32)
    if not isinstance(x, Tensor):
        return torch.full((), as_number(x, name, finite=False), dtype=dtype, device=like.device)
    if x.layout != torch.strided or x.numel() != 1 or not x.is_floating_point():
        raise InputError(f"{name} must be a number or a tensor of one float, got {described(x)}")
    check_float(x, name)
    if x.device != like.device:
        raise InputError(f"{name} must be on {like.device} as the features are, got {x.device}")
    return x.reshape(()).to(dtype)


def _positives(
    image: Tensor, text: Tensor, offset: int, positives: Positives
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """-> image_ids, text_ids, weights as the op takes them; all None is the diagonal."""
    n, m = len(image), len(text)
    if positives is None:
        if isinstance(offset, bool) or not isinstance(offset, numbers.Integral):
            raise InputError(f"offset must be an integer, got {offset!r}")
        if offset == 0 and n > m:
            raise InputError(f"each image needs its text: expected at least {n} texts, got {m} (or give positives)")
        if not 0 <= offset <= m - n:
            raise InputError(f"offset must be from 0 to {m - n}, so that each of {n} images has its text among {m}, "
                             f"got {offset}")  # fmt: skip
        return None, None, None
    if offset:
        raise InputError(f"offset is for one positive each: it must be 0 where positives are given, got {offset}")
    if isinstance(positives, tuple) and len(positives) != 2:
        raise InputError(f"positives must be a pair of ids, those of image and of text, got {len(positives)}")
    ids = positives if isinstance(positives, tuple) else (positives, positives)
    for x in ids:
        if not isinstance(x, Tensor) or x.layout != torch.strided or x.device != image.device:
            raise InputError(f"positives must be dense tensors on {image.device}, got {described(x)}")
        check_float(x, "positives")
    first, second = ids
    if isinstance(positives, tuple) or first.ndim == 1:
        if first.dtype != torch.int64 or second.dtype != torch.int64 or first.shape != (n,) or second.shape != (m,):
            raise InputError(
                f"ids of positives must be int64 ({n},) and ({m},), got {first.dtype} {tuple(first.shape)} and "
                f"{second.dtype} {tuple(second.shape)}"
            )
        return first, second, None
    if first.shape != (n, m) or not (first.dtype == torch.bool or first.is_floating_point()):
        raise InputError(
            f"positives must be ids ({n},), or bool or float ({n}, {m}), got {first.dtype} {tuple(first.shape)}"
        )
    if first.dtype != torch.bool and first.device.type == "cpu" and not torch.compiler.is_compiling():
        first = first.detach()
        low, high = first.aminmax() if first.numel() else (first.new_zeros(()), first.new_zeros(()))
        if not 0 <= float(low) <= float(high) < math.inf:
            raise InputError(f"weights of positives must be finite and 0 or more, got {float(low)} to {float(high)}")
    return None, None, first.detach()


# Rows of the statistics (4, N) of one direction, `sum` as its logarithm once the forward pass is over.
# max, sum of exp(z - max), sum of weight * z, sum of weight


def _losses(stats: Tensor) -> Tensor:
    most, logsum, positive, weight = stats
    return torch.where(weight > 0, (most - positive / weight) + logsum, 0.0)


def _coefficients(gradient: Tensor, stats: Tensor) -> Tensor:
    """(4, N): max, logsum, and what the softmax and the weights of a row are multiplied by in the gradient."""
    most, logsum, _, weight = stats
    gradient = torch.where(weight > 0, gradient, 0.0)
    return torch.stack([most, logsum, gradient, gradient / torch.where(weight > 0, weight, 1.0)])


def _info_nce(
    image: Tensor,
    text: Tensor,
    scale: Tensor,
    image_ids: Tensor | None,
    text_ids: Tensor | None,
    weights: Tensor | None,
    offset: int,
    rows: bool,
    columns: bool,
    keep: int,
    backend: str | None,
    threads: int | None,
) -> tuple[Tensor, ...]:
    """-> losses of rows (n,) and of columns (m,), their statistics (4, n) and (4, m), kept similarities.

    Lenient where the public function is not: the diagonal i + offset may lie partly or wholly outside.
    """
    _dispatch.check_finite(image=image, text=text, logit_scale=scale, positives=weights)
    *_, row_stats, column_stats, kept = info_nce_outputs(image, text, scale, rows, columns, keep)
    for stats in (row_stats, column_stats):
        stats.zero_()
        stats[0] = -math.inf
    pairs = Pairs(image_ids, text_ids, weights, offset)
    if len(image) and len(text):
        chosen = _dispatch.choose_backend("info_nce", image.device.type, backend, _unfit(image, pairs))
        forward = {"cpp": cpp_forward, "torch": torch_forward}.get(chosen) or _triton().forward
        forward(image.detach(), text.detach(), scale, pairs, row_stats, column_stats, kept, threads)
    for stats in (row_stats, column_stats):
        stats[1].log_()
    return _losses(row_stats), _losses(column_stats), row_stats, column_stats, kept


def _info_nce_backward(
    row_gradient: Tensor,
    column_gradient: Tensor,
    image: Tensor,
    text: Tensor,
    scale: Tensor,
    image_ids: Tensor | None,
    text_ids: Tensor | None,
    weights: Tensor | None,
    offset: int,
    row_stats: Tensor,
    column_stats: Tensor,
    kept: Tensor,
    backend: str | None,
    threads: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """-> gradients of image, text and scale. The statistics may be those of a larger batch than these rows, columns."""
    directions = _coefficients(row_gradient, row_stats), _coefficients(column_gradient, column_stats)
    if not len(image) or not len(text):
        return image.new_zeros(image.shape), text.new_zeros(text.shape), torch.zeros_like(scale)
    pairs = Pairs(image_ids, text_ids, weights, offset)
    chosen = _dispatch.choose_backend("info_nce", image.device.type, backend, _unfit(image, pairs))
    backward = {"cpp": cpp_backward, "torch": torch_backward}.get(chosen) or _triton().backward
    return backward(image.detach(), text.detach(), scale, pairs, *directions, kept, threads)


def _sigmoid_loss(
    image: Tensor,
    text: Tensor,
    scale: Tensor,
    bias: Tensor,
    image_ids: Tensor | None,
    text_ids: Tensor | None,
    mask: Tensor | None,
    offset: int,
    weight: float,
    gradients: bool,
    backend: str | None,
    threads: int | None,
) -> tuple[Tensor, ...]:
    """-> loss (), and where `gradients` its gradients with respect to image, text, scale, bias (else empty)."""
    pairs = Pairs(image_ids, text_ids, mask, offset)
    return _sigmoid("sigmoid_loss", image, text, scale, bias, pairs, (weight, weight), gradients, backend, threads)


def _js_critic(
    image: Tensor, text: Tensor, gradients: bool, backend: str | None, threads: int | None
) -> tuple[Tensor, ...]:
    """-> the bound (), and where `gradients` its gradients with respect to image and text (else empty)."""
    scale, count = _scalar(1.0, image, "logit_scale"), max(2, len(image))
    each = 1 / count, 1 / (count * (count - 1))
    pairs, bias = Pairs(None, None, None, 0), torch.zeros_like(scale)
    loss, of_image, of_text, *_ = _sigmoid(
        "js_critic", image, text, scale, bias, pairs, each, gradients, backend, threads
    )
    return 2 * math.log(2) - loss, -of_image, -of_text


def _sigmoid_pairs(
    image: Tensor, text: Tensor, scale: Tensor, bias: Tensor, image_ids: Tensor | None, text_ids: Tensor | None,
    mask: Tensor | None, offset: int, positive: float, negative: float, gradients: bool, backend: str | None,
    threads: int | None,
) -> tuple[Tensor, ...]:  # fmt: skip
    pairs = Pairs(image_ids, text_ids, mask, offset)
    return _sigmoid("sigmoid_loss", image, text, scale, bias, pairs, (positive, negative), gradients, backend, threads)


def _sigmoid(
    op: str, image: Tensor, text: Tensor, scale: Tensor, bias: Tensor, pairs: Pairs, each: tuple[float, float],
    gradients: bool, backend: str | None, threads: int | None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """each[0] * sum over positives of softplus(-z) + each[1] * sum over the others of softplus(z); its gradients."""
    _dispatch.check_finite(image=image, text=text, logit_scale=scale, logit_bias=bias)
    if not len(image) or not len(text):
        outputs = sigmoid_outputs(image, text, scale, bias, gradients)
        return tuple(x.zero_() for x in outputs)
    chosen = _dispatch.choose_backend(op, image.device.type, backend, _unfit(image, pairs))
    run = {"cpp": cpp_sigmoid, "torch": torch_sigmoid}.get(chosen) or _triton().sigmoid
    return run(image.detach(), text.detach(), scale, bias, pairs, each, gradients, threads)


def _triton() -> Any:
    from cmr_fast.ops.triton import info_nce as kernels

    return kernels


def _unfit(image: Tensor, pairs: Pairs) -> dict[str, str]:
    reasons = {}
    if image.dtype not in CPP_DTYPES:
        reasons["cpp"] = f"it computes on float32 and bfloat16, the features are {image.dtype}"
    if image.dtype not in (*CPP_DTYPES, torch.float16):
        reasons["triton"] = f"it computes on float32, bfloat16 and float16, the features are {image.dtype}"
    elif pairs.image_ids is not None or pairs.weights is not None:
        reasons["triton"] = "it takes one positive per image, by offset, not ids or weights of positives"
    elif image.shape[1] == 0:
        reasons["triton"] = "the features have no width"
    return reasons


register(
    "info_nce(Tensor image, Tensor text, Tensor scale, Tensor? image_ids, Tensor? text_ids, Tensor? weights, "
    "int offset, bool rows, bool columns, int keep, str? backend, int? threads) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _info_nce,
    lambda image, text, scale, image_ids, text_ids, weights, offset, rows, columns, keep, backend, threads: (
        info_nce_outputs(image, text, scale, rows, columns, keep)
    ),
)
register(
    "info_nce_backward(Tensor row_gradient, Tensor column_gradient, Tensor image, Tensor text, Tensor scale, "
    "Tensor? image_ids, Tensor? text_ids, Tensor? weights, int offset, Tensor row_stats, Tensor column_stats, "
    "Tensor kept, str? backend, int? threads) -> (Tensor, Tensor, Tensor)",
    _info_nce_backward,
    lambda row_gradient, column_gradient, image, text, scale, *rest: (
        image.new_empty(image.shape),
        text.new_empty(text.shape),
        torch.empty_like(scale),
    ),
)
register_loss(
    "sigmoid_loss(Tensor image, Tensor text, Tensor scale, Tensor bias, Tensor? image_ids, Tensor? text_ids, "
    "Tensor? mask, int offset, float weight, bool gradients, str? backend, int? threads) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _sigmoid_loss,
    lambda image, text, scale, bias, image_ids, text_ids, mask, offset, weight, gradients, *rest: sigmoid_outputs(
        image, text, scale, bias, gradients
    ),
    differentiable=(0, 1, 2, 3),
)
register_loss(  # sigmoid_loss of before 0.2: programs exported with it hold this name
    "sigmoid_pairs(Tensor image, Tensor text, Tensor scale, Tensor bias, Tensor? image_ids, Tensor? text_ids, "
    "Tensor? mask, int offset, float positive, float negative, bool gradients, str? backend, int? threads) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _sigmoid_pairs,
    lambda image, text, scale, bias, image_ids, text_ids, mask, offset, positive, negative, gradients, *rest: (
        sigmoid_outputs(image, text, scale, bias, gradients)
    ),
    differentiable=(0, 1, 2, 3),
)
register_loss(
    "js_critic(Tensor image, Tensor text, bool gradients, str? backend, int? threads) -> (Tensor, Tensor, Tensor)",
    _js_critic,
    lambda image, text, gradients, *rest: sigmoid_outputs(image, text, _wide(image), _wide(image), gradients)[:3],
    differentiable=(0, 1),
)


def _remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    image, text, scale, image_ids, text_ids, weights, ctx.offset, _, _, _, ctx.backend, ctx.threads = inputs
    ctx.save_for_backward(image, text, scale, image_ids, text_ids, weights, *output[2:])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, of_rows: Tensor | None, of_columns: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    image, text, scale, image_ids, text_ids, weights, row_stats, column_stats, kept = ctx.saved_tensors
    of_rows = torch.zeros_like(row_stats[0]) if of_rows is None else of_rows
    of_columns = torch.zeros_like(column_stats[0]) if of_columns is None else of_columns
    gradients = call(
        "info_nce_backward", of_rows, of_columns, image, text, scale, image_ids, text_ids, weights, ctx.offset,
        row_stats, column_stats, kept, ctx.backend, ctx.threads,
    )  # fmt: skip
    return *gradients, *[None] * 9


register_derivative("info_nce", _backward, _remember)
register_derivative("info_nce_backward", refuse_twice)
