"""InfoNCE and the sigmoid loss over the batches of all ranks of a process group, exact in value and gradient.

Images stay where they are and one tile serves both directions, so a rank's share is n rows of N = n * ranks columns.

    gather    every rank holds all texts, O(N d) memory; their gradients are summed and each rank keeps its own
    ring      texts travel round with what belongs to them (the statistics of their columns, their gradient), O(n d)

What a rank returns is the loss of its own images and texts; gradients are those of the sum over the ranks, as
differentiable collectives make them, so that averaging over ranks (DistributedDataParallel) gives the gradient of the
loss of the whole batch. That of logit_scale is averaged already.
"""

import math
from collections.abc import Iterator
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from cmr_fast.errors import InputError
from cmr_fast.ops import _dispatch
from cmr_fast.ops._library import refuse_transforms
from cmr_fast.ops.info_nce import _inputs, _losses, _scalar

Form = Literal["gather", "ring"]
FORMS = ("gather", "ring")


def distributed_info_nce(
    image: Tensor,
    text: Tensor,
    logit_scale: Tensor | float,
    *,
    form: Form = "gather",
    group: Any = None,
    backend: str | None = None,
    threads: int | None = None,
) -> Tensor:
    """info_nce of the batch of all ranks of `group`: the mean over this rank's n images and n texts, halved and added.

    Every rank must call it.

    Parameters
    ----------
    image, text : Tensor
        Float (n, d), the same n, d and dtype on every rank; row i of both from pair i.
    logit_scale : Tensor or float
        1 / temperature.
    form : {"gather", "ring"}
        The same on every rank.
    group : torch.distributed.ProcessGroup, optional
        Default all ranks.
    backend, threads
        As in `info_nce`.

    Returns
    -------
    Tensor
        A scalar, float32 or, for float64 features, float64; differentiable once.

    Raises
    ------
    InputError
        On all ranks where shapes, dtypes or forms disagree, or some want gradients and some do not.
    """
    backend, threads = _dispatch.how(backend, threads)
    scale = _agreed(image, text, logit_scale, None, form, group)
    loss: Tensor = _InfoNCE.apply(image, text, scale, form, group, backend, threads)
    return loss


def distributed_sigmoid_loss(
    image: Tensor,
    text: Tensor,
    logit_scale: Tensor | float,
    logit_bias: Tensor | float | None = None,
    *,
    form: Form = "ring",
    group: Any = None,
    backend: str | None = None,
    threads: int | None = None,
) -> Tensor:
    """sigmoid_loss of this rank's n images against the texts of all ranks, divided by n.

    Every rank must call it. The gradient is made in the forward pass, so every rank must scale its loss alike before
    backward.

    Parameters
    ----------
    image, text : Tensor
        Float (n, d), the same n, d and dtype on every rank; row i of both from pair i.
    logit_scale, logit_bias : Tensor or float
        As in `sigmoid_loss`.
    form, group
        As in `distributed_info_nce`.
    backend, threads
        As in `info_nce`.

    Returns
    -------
    Tensor
        A scalar, float32 or, for float64 features, float64; differentiable once.

    Raises
    ------
    InputError
        On all ranks where shapes, dtypes or forms disagree, or some want gradients and some do not.
    """
    backend, threads = _dispatch.how(backend, threads)
    scale = _agreed(image, text, logit_scale, logit_bias, form, group)
    bias = _scalar(0.0 if logit_bias is None else logit_bias, image, "logit_bias")
    loss: Tensor = _Sigmoid.apply(image, text, scale, bias, form, group, backend, threads)
    return loss


def _agreed(
    image: Tensor, text: Tensor, logit_scale: Tensor | float, logit_bias: Tensor | float | None, form: str, group: Any
) -> Tensor:
    """The scale as a tensor, once every rank has seen that all have the same kind of features and all want gradients.

    A rank that does not, under no_grad say, would never come to the others' backward pass, and they would wait.
    """
    if not (dist.is_available() and dist.is_initialized()):
        raise InputError("there is no process group: call torch.distributed.init_process_group first")
    refuse_transforms("a loss over ranks")
    scale = _inputs(image, text, logit_scale)
    if image.shape != text.shape:
        raise InputError(f"image and text must both be (n, d), got {tuple(image.shape)} and {tuple(text.shape)}")
    if form not in FORMS:
        raise InputError(f"form must be one of {', '.join(FORMS)}, got {form!r}")
    inputs = (image, text, logit_scale, logit_bias)
    wanted = torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in inputs)
    kind = [*image.shape, image.dtype.itemsize, FORMS.index(form), int(wanted)]
    everyone = [x.tolist() for x in _gathered(torch.tensor(kind, dtype=torch.int64, device=image.device), group)]
    if any(x != everyone[0] for x in everyone):
        seen = "; ".join(
            f"rank {rank}: ({n}, {d}), {8 * size} bits, {FORMS[f]}, {'with' if grads else 'without'} gradients"
            for rank, (n, d, size, f, grads) in enumerate(everyone)
        )
        raise InputError(
            f"every rank must have a batch of the same shape, dtype and form, and all or none gradients, got {seen}"
        )
    return scale


class _InfoNCE(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, image: Tensor, text: Tensor, scale: Tensor, form: Form, group: Any, backend: str | None,
        threads: int | None,
    ) -> Tensor:  # fmt: skip
        rank, n = dist.get_rank(group), len(image)
        ctx.form, ctx.group, ctx.choice = form, group, (backend, threads)
        if form == "gather":
            all_text = torch.cat(_gathered(text, group))
            _, _, rows, columns, _ = _forward(image, all_text, scale, rank * n, *ctx.choice)
            columns = _merged_over_ranks(columns, group)
            ctx.save_for_backward(image, all_text, scale, rows, columns)
            own = columns[:, rank * n : (rank + 1) * n]
        else:
            rows, own = _no_columns(n, scale), _no_columns(n, scale)
            passing = text.contiguous()
            for owner in _owners(group):
                _, _, row_part, part, _ = _forward(image, passing, scale, (rank - owner) * n, *ctx.choice)
                rows, own = _merged(rows, row_part), _merged(own, part)
                passing, own = _pass_on([passing, own], group)
            ctx.save_for_backward(image, text, scale, rows, own)
        return ((_losses(rows).mean(dtype=torch.float64) + _losses(own).mean(dtype=torch.float64)) / 2).to(scale.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        image, text, scale, rows, columns = ctx.saved_tensors
        rank, n = dist.get_rank(ctx.group), len(image)
        # a column's loss is its own rank's, whose upstream gradient may be another
        each = torch.stack(_gathered(gradient, ctx.group)) / (2 * n)
        of_rows = each[rank].expand(n)
        if ctx.form == "gather":
            of_image, of_text, of_scale = torch.ops.cmr_fast.info_nce_backward(
                of_rows, each.repeat_interleave(n), image, text, scale, None, None, None, rank * n, rows, columns,
                image.new_empty(0), *ctx.choice,
            )  # fmt: skip
            of_text = of_text.to(scale.dtype)
            dist.all_reduce(of_text, group=ctx.group)
            of_text = of_text[rank * n : (rank + 1) * n]
        else:
            of_image, of_scale = torch.zeros(image.shape, dtype=scale.dtype, device=image.device), 0 * scale
            passing, of_text = text.contiguous(), torch.zeros_like(of_image)
            for owner in _owners(ctx.group):
                image_part, text_part, scale_part = torch.ops.cmr_fast.info_nce_backward(
                    of_rows, each[owner].expand(n), image, passing, scale, None, None, None, (rank - owner) * n, rows,
                    columns, image.new_empty(0), *ctx.choice,
                )  # fmt: skip
                of_image, of_text, of_scale = of_image + image_part, of_text + text_part, of_scale + scale_part
                passing, columns, of_text = _pass_on([passing, columns, of_text], ctx.group)
        return of_image.to(image.dtype), of_text.to(image.dtype), _mean(of_scale, ctx.group), *[None] * 4


class _Sigmoid(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, image: Tensor, text: Tensor, scale: Tensor, bias: Tensor, form: Form, group: Any,
        backend: str | None, threads: int | None,
    ) -> Tensor:  # fmt: skip
        rank, n = dist.get_rank(group), len(image)
        each, gradients = 1 / max(1, n), any(ctx.needs_input_grad)
        ctx.group = group

        def run(texts: Tensor, offset: int) -> tuple[Tensor, ...]:
            outputs: tuple[Tensor, ...] = torch.ops.cmr_fast.sigmoid_loss(
                image, texts, scale, bias, None, None, None, offset, each, gradients, backend, threads
            )
            return outputs

        if form == "gather":
            loss, *gradients_of = run(torch.cat(_gathered(text, group)), rank * n)
            if gradients:
                gradients_of[1] = gradients_of[1].to(scale.dtype)
                dist.all_reduce(gradients_of[1], group=group)
                gradients_of[1] = gradients_of[1][rank * n : (rank + 1) * n]
        else:
            loss, passing = 0 * scale, text.contiguous()
            of_image, of_text = (torch.zeros(text.shape, dtype=scale.dtype, device=text.device) for _ in range(2))
            of_scale, of_bias = 0 * scale, 0 * scale
            for owner in _owners(group):
                part, *parts = run(passing, (rank - owner) * n)
                loss = loss + part
                if gradients:
                    of_image, of_text = of_image + parts[0], of_text + parts[1]
                    of_scale, of_bias = of_scale + parts[2], of_bias + parts[3]
                passing, of_text = _pass_on([passing, of_text], group)
            gradients_of = [of_image, of_text, of_scale, of_bias]
        if gradients:
            ctx.save_for_backward(
                gradients_of[0].to(image.dtype),
                gradients_of[1].to(text.dtype),
                *(_mean(x, group) for x in gradients_of[2:]),
            )
        return loss

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        if any(x != gradient for x in _gathered(gradient, ctx.group)):
            raise InputError("every rank must scale its sigmoid loss by the same factor before backward")
        return *((gradient * x).to(x.dtype) for x in ctx.saved_tensors), *[None] * 4


def _forward(
    image: Tensor, text: Tensor, scale: Tensor, offset: int, backend: str | None, threads: int | None
) -> list[Tensor]:
    outputs: list[Tensor] = torch.ops.cmr_fast.info_nce(
        image, text, scale, None, None, None, offset, True, True, 0, backend, threads
    )
    return outputs


def _no_columns(n: int, like: Tensor) -> Tensor:
    """Statistics (4, n) over nothing: what _merged leaves the other side of as it is."""
    stats = like.new_zeros((4, n))
    stats[1] = -math.inf
    return stats


def _merged(a: Tensor, b: Tensor) -> Tensor:
    """Statistics (4, N) over two sets of columns as those over both."""
    most = torch.where(a[1] == -math.inf, b[0], torch.maximum(a[0], b[0]))
    logsum = torch.logaddexp(a[0] - most + a[1], b[0] - most + b[1])
    return torch.stack([most, logsum, a[2] + b[2], a[3] + b[3]])


def _merged_over_ranks(stats: Tensor, group: Any) -> Tensor:
    most = stats[0].clone()
    dist.all_reduce(most, dist.ReduceOp.MAX, group)
    sums = torch.stack([(stats[0] - most + stats[1]).exp(), stats[2], stats[3]])
    dist.all_reduce(sums, group=group)
    return torch.stack([most, sums[0].log(), sums[1], sums[2]])


def _gathered(x: Tensor, group: Any) -> list[Tensor]:
    x = x.detach().contiguous()
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, x, group=group)
    return parts


def _mean(x: Tensor, group: Any) -> Tensor:
    x = x.clone()
    dist.all_reduce(x, group=group)
    return x / dist.get_world_size(group)


def _owners(group: Any) -> Iterator[int]:
    """Whose text this rank holds, step by step of the ring: its own first, then the left neighbour's."""
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    return ((rank - step) % size for step in range(size))


def _pass_on(tensors: list[Tensor], group: Any) -> list[Tensor]:
    """Send to the right neighbour, receive from the left one. After as many steps as ranks, everything is at home."""
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    if size == 1:
        return tensors
    right, left = (rank + 1) % size, (rank - 1) % size
    if group is not None:
        right, left = dist.get_global_rank(group, right), dist.get_global_rank(group, left)
    tensors = [x.contiguous() for x in tensors]
    received = [torch.empty_like(x) for x in tensors]
    work = [dist.P2POp(dist.isend, x, right, group) for x in tensors]
    work += [dist.P2POp(dist.irecv, x, left, group) for x in received]
    for request in dist.batch_isend_irecv(work):
        request.wait()
    return received
