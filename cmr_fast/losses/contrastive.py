"""open_clip's ClipLoss and SigLipLoss, in one process or over ranks, without the N x N logits."""

from typing import Any, Literal, cast, overload

import torch
import torch.distributed as dist
from torch import Tensor, nn

from cmr_fast.errors import InputError
from cmr_fast.ops.infonce import info_nce, sigmoid_loss
from cmr_fast.ops.infonce_distributed import distributed_info_nce, distributed_sigmoid_loss


def _one_dtype(image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
    """Under autocast features may come in two types; the wider one, then."""
    if image.dtype == text.dtype or not torch.is_autocast_enabled(image.device.type):
        return image, text
    wide = torch.promote_types(image.dtype, text.dtype)
    return image.to(wide), text.to(wide)


class ClipLoss(nn.Module):
    """open_clip's ClipLoss, argument for argument, in O(N) memory: change the import and nothing else.

    The loss is float32 for float16 and bfloat16 features. With local_loss and gather_with_grad one tile serves both
    directions, see ops/infonce_distributed.py; the gradient of logit_scale is then averaged over ranks, all others
    follow open_clip.

    Parameters
    ----------
    local_loss : bool
        Over ranks: this rank's rows of the logits only.
    gather_with_grad : bool
        Over ranks: gradients reach the features of the other ranks.
    cache_labels : bool
        Accepted; the loss itself has no labels to cache.
    rank, world_size : int
        Of torch.distributed's default group.
    use_horovod : bool
        Must be False.
    ring : bool
        Over ranks, with local_loss and gather_with_grad: texts travel instead of being gathered.
    backend, threads
        As in `cmr_fast.info_nce`.

    Raises
    ------
    InputError
        On Horovod, and where world_size or the shapes of the ranks disagree.
    """

    def __init__(
        self,
        local_loss: bool = False,
        gather_with_grad: bool = False,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        use_horovod: bool = False,
        *,
        ring: bool = False,
        backend: str | None = None,
        threads: int | None = None,
    ) -> None:
        super().__init__()
        if use_horovod:
            raise InputError("use_horovod must be False: features are gathered by torch.distributed")
        if ring and not (local_loss and gather_with_grad):
            raise InputError("ring needs local_loss and gather_with_grad")
        _check_rank(rank, world_size)
        self.local_loss, self.gather_with_grad, self.cache_labels = local_loss, gather_with_grad, cache_labels
        self.rank, self.world_size, self.use_horovod = rank, world_size, use_horovod
        self.ring, self.backend, self.threads = ring, backend, threads

    @overload
    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        logit_bias: Tensor | float | None = None,
        output_dict: Literal[False] = False,
    ) -> Tensor: ...

    @overload
    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        logit_bias: Tensor | float | None = None,
        *,
        output_dict: Literal[True],
    ) -> dict[str, Tensor]: ...

    @overload
    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        logit_bias: Tensor | float | None = None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]: ...

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        logit_bias: Tensor | float | None = None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        """Compute the mean of the cross-entropies of images among texts and of texts among images.

        Parameters
        ----------
        image_features, text_features : Tensor
            Float (n, d), row i of both from pair i; usually of unit length, which is not done here.
        logit_scale : Tensor or float
            1 / temperature.
        logit_bias : Tensor or float, optional
            Added to all logits; a softmax does not see it, its gradient is 0.
        output_dict : bool
            Return {"contrastive_loss": loss}.

        Returns
        -------
        Tensor or dict of str to Tensor
            A scalar, differentiable in all four.

        Raises
        ------
        InputError
            On shapes, dtypes or devices that disagree.
        """
        choice: dict[str, Any] = {"backend": self.backend, "threads": self.threads}
        loss: Any
        image_features, text_features = _one_dtype(image_features, text_features)
        if image_features.shape != text_features.shape:
            shapes = f"{tuple(image_features.shape)} and {tuple(text_features.shape)}"
            raise InputError(f"image_features and text_features must both be (n, d), got {shapes}")
        if self.world_size == 1:
            loss = info_nce(image_features, text_features, logit_scale, logit_bias=logit_bias, **choice)
        elif self.local_loss and self.gather_with_grad:
            _check_group(self.rank, self.world_size)
            form: Any = "ring" if self.ring else "gather"
            loss = distributed_info_nce(image_features, text_features, logit_scale, form=form, **choice)
            if isinstance(logit_bias, Tensor):
                loss = loss + 0 * logit_bias.sum()
        else:
            _check_group(self.rank, self.world_size)
            everything = [
                _gather(x, self.rank, self.gather_with_grad, own_gradient=not self.local_loss)
                for x in (image_features, text_features)
            ]
            if self.local_loss:
                choice |= {"offset": self.rank * len(image_features), "direction": "image"}
                loss = info_nce(image_features, everything[1], logit_scale, logit_bias=logit_bias, **choice)
                loss = (loss + info_nce(text_features, everything[0], logit_scale, **choice)) / 2
            else:
                image, text = everything
                loss = info_nce(image, text, logit_scale, logit_bias=logit_bias, **choice)
        return {"contrastive_loss": loss} if output_dict else loss


class SigLipLoss(nn.Module):
    """open_clip's SigLipLoss, argument for argument, in O(N) memory.

    Over ranks the gradients of logit_scale and logit_bias are averaged.

    Parameters
    ----------
    cache_labels : bool
        Accepted; there are no labels to cache.
    rank, world_size : int
        Of torch.distributed's default group.
    dist_impl : str, optional
        Over ranks, all exact: "gather" and "reduce" gather the texts, "bidir" (the default) and "shift" pass them
        round a ring.
    backend, threads
        As in `cmr_fast.info_nce`.

    Raises
    ------
    InputError
        Where dist_impl is none of these, and where world_size or the shapes of the ranks disagree.
    """

    def __init__(
        self,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        dist_impl: str | None = None,
        *,
        backend: str | None = None,
        threads: int | None = None,
    ) -> None:
        super().__init__()
        self.cache_labels, self.rank, self.world_size = cache_labels, rank, world_size
        self.dist_impl = dist_impl or "bidir"
        if self.dist_impl not in ("bidir", "shift", "reduce", "gather"):
            raise InputError(f"dist_impl must be bidir, shift, reduce or gather, got {dist_impl!r}")
        _check_rank(rank, world_size)
        self.backend, self.threads = backend, threads

    @overload
    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        logit_bias: Tensor | float | None = None,
        output_dict: Literal[False] = False,
    ) -> Tensor: ...

    @overload
    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        logit_bias: Tensor | float | None = None,
        *,
        output_dict: Literal[True],
    ) -> dict[str, Tensor]: ...

    @overload
    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        logit_bias: Tensor | float | None = None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]: ...

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        logit_bias: Tensor | float | None = None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        """Compute the sum over all pairs of softplus(-z) where they belong together, else softplus(z), divided by n.

        Parameters
        ----------
        image_features, text_features : Tensor
            Float (n, d), row i of both from pair i; usually of unit length, which is not done here.
        logit_scale : Tensor or float
            1 / temperature.
        logit_bias : Tensor or float, optional
            Added to all logits.
        output_dict : bool
            Return {"contrastive_loss": loss}.

        Returns
        -------
        Tensor or dict of str to Tensor
            A scalar, differentiable in all four.

        Raises
        ------
        InputError
            On shapes, dtypes or devices that disagree.
        """
        choice: dict[str, Any] = {"backend": self.backend, "threads": self.threads}
        image_features, text_features = _one_dtype(image_features, text_features)
        if image_features.shape != text_features.shape:
            shapes = f"{tuple(image_features.shape)} and {tuple(text_features.shape)}"
            raise InputError(f"image_features and text_features must both be (n, d), got {shapes}")
        if self.world_size == 1:
            loss = sigmoid_loss(image_features, text_features, logit_scale, logit_bias, **choice)
        else:
            _check_group(self.rank, self.world_size)
            form: Any = "gather" if self.dist_impl in ("gather", "reduce") else "ring"
            loss = distributed_sigmoid_loss(image_features, text_features, logit_scale, logit_bias, form=form, **choice)
        return {"contrastive_loss": loss} if output_dict else loss


def _check_rank(rank: int, world_size: int) -> None:
    if not 0 <= rank < world_size:
        raise InputError(f"rank must be from 0 to world_size - 1 = {world_size - 1}, got {rank}")


def _check_group(rank: int, world_size: int) -> None:
    if not (dist.is_available() and dist.is_initialized()):
        raise InputError(f"world_size is {world_size}, but torch.distributed has no process group")
    if (rank, world_size) != (dist.get_rank(), dist.get_world_size()):
        raise InputError(
            f"rank {rank} of world_size {world_size} must be torch.distributed's, "
            f"which is rank {dist.get_rank()} of {dist.get_world_size()}"
        )


def _gather(x: Tensor, rank: int, with_grad: bool, own_gradient: bool) -> Tensor:
    """(n, d) of every rank -> (N, d): with the gradient of all of them, of this rank's own, or of none."""
    shapes = [torch.empty(2, dtype=torch.int64, device=x.device) for _ in range(dist.get_world_size())]
    dist.all_gather(shapes, torch.tensor(x.shape, device=x.device))
    seen = [tuple(shape.tolist()) for shape in shapes]
    if len(set(seen)) > 1:
        raise InputError(f"every rank must have features of the same shape, got {', '.join(map(str, seen))}")
    if with_grad:
        return cast(Tensor, _Gather.apply(x))
    parts = [torch.empty_like(x) for _ in seen]
    dist.all_gather(parts, x.detach().contiguous())
    if own_gradient:
        parts[rank] = x
    return torch.cat(parts)


class _Gather(torch.autograd.Function):
    """(n, d) of every rank -> (N, d); backward adds up what all ranks have for this rank's rows."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        gradient = gradient.clone()
        dist.all_reduce(gradient)
        return gradient.chunk(dist.get_world_size())[dist.get_rank()]
