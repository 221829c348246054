"""open_clip's ClipLoss and SigLipLoss, in one process or over ranks, without the N x N logits."""

from typing import Any, Literal, cast, overload

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from cmr_fast.errors import InputError
from cmr_fast.losses._checks import as_count, as_scalar, check_features
from cmr_fast.ops._library import refuse_transforms
from cmr_fast.ops.info_nce import info_nce, sigmoid_loss
from cmr_fast.ops.info_nce_distributed import distributed_info_nce, distributed_sigmoid_loss


def _features(image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
    """What open_clip's towers give, or InputError. Under autocast it may come in two types; the wider one, then."""
    check_features(image, "image_features")
    check_features(text, "text_features")
    if image.shape != text.shape:
        shapes = f"{tuple(image.shape)} and {tuple(text.shape)}"
        raise InputError(f"image_features and text_features must both be (n, d), got {shapes}")
    if image.dtype == text.dtype or not torch.is_autocast_enabled(image.device.type):
        return image, text
    wide = torch.promote_types(image.dtype, text.dtype)
    return image.to(wide), text.to(wide)


def _overrides(loss: nn.Module, base: type[nn.Module], *names: str) -> bool:
    """Whether a subclass, or the object itself, has methods of its own by these names."""
    return any(getattr(getattr(loss, name), "__func__", None) is not getattr(base, name) for name in names)


def _logits(image: Tensor, text: Tensor, scale: Tensor | float, bias: Tensor | float | None) -> Tensor:
    """(n, m) in full, as open_clip makes them."""
    logits = scale * image @ text.T
    return logits if bias is None else logits + bias


class ClipLoss(nn.Module):
    """open_clip's ClipLoss, argument for argument, in O(N) memory: change the import and nothing else.

    The loss is float32 for float16 and bfloat16 features. With local_loss and gather_with_grad one tile serves both
    directions, see ops/info_nce_distributed.py; the gradient of logit_scale is then averaged over ranks, all others
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
        self.local_loss, self.gather_with_grad, self.cache_labels = local_loss, gather_with_grad, cache_labels
        self.rank, self.world_size = _checked_rank(rank, world_size)
        self.use_horovod = use_horovod
        self.ring, self.backend, self.threads = ring, backend, _checked_threads(threads)
        self.prev_num_logits = 0  # with labels: get_ground_truth's cache, by open_clip's names
        self.labels: dict[torch.device, Tensor] = {}

    def get_ground_truth(self, device: torch.device, num_logits: int) -> Tensor:
        """Return the column of each row's own partner, for losses that build on this one (open_clip's CoCaLoss).

        Parameters
        ----------
        device : torch.device
            Where to make them.
        num_logits : int
            Rows of the logits.

        Returns
        -------
        Tensor
            int64 (num_logits,), counted on from this rank's first column with local_loss.
        """
        device = torch.device(device)
        if device in self.labels and self.prev_num_logits == num_logits:
            return self.labels[device]
        with torch.inference_mode(False):  # labels kept from a validation must serve training as well
            labels = torch.arange(num_logits, device=device)
            if self.world_size > 1 and self.local_loss:
                labels = labels + num_logits * self.rank
        if self.cache_labels:
            if self.prev_num_logits != num_logits:
                self.labels.clear()
            self.labels[device], self.prev_num_logits = labels, num_logits
        return labels

    def get_logits(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        logit_bias: Tensor | float | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return the logits in full, for losses that need them (open_clip's DistillClipLoss); `forward` does not.

        Parameters
        ----------
        image_features, text_features : Tensor
            Float (n, d).
        logit_scale : Tensor or float
            1 / temperature.
        logit_bias : Tensor or float, optional
            Added to all logits.

        Returns
        -------
        tuple of Tensor
            Logits of images among texts and of texts among images: (n, n), or over ranks (n, N) with local_loss and
            (N, N) without.

        Raises
        ------
        InputError
            On features that are no (n, d) of one shape, and on scales that are no number.
        """
        image, text = _features(image_features, text_features)
        scale = as_scalar(logit_scale, "logit_scale", image)
        bias = None if logit_bias is None else as_scalar(logit_bias, "logit_bias", image)
        if self.world_size == 1:
            return _logits(image, text, scale, bias), _logits(text, image, scale, bias)
        all_image, all_text = self._gathered(image, text)
        if self.local_loss:
            return _logits(image, all_text, scale, bias), _logits(text, all_image, scale, bias)
        per_image = _logits(all_image, all_text, scale, bias)
        return per_image, per_image.T

    def _gathered(self, image: Tensor, text: Tensor) -> list[Tensor]:
        _check_group(self.rank, self.world_size)
        own_gradient = not self.local_loss
        return [_gather(x, self.rank, self.gather_with_grad, own_gradient=own_gradient) for x in (image, text)]

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
        image, text = _features(image_features, text_features)
        scale = as_scalar(logit_scale, "logit_scale", image)
        bias = None if logit_bias is None else as_scalar(logit_bias, "logit_bias", image)
        if _overrides(self, ClipLoss, "get_logits", "get_ground_truth"):
            per_image, per_text = self.get_logits(image_features, text_features, logit_scale, logit_bias=logit_bias)
            labels = self.get_ground_truth(image_features.device, per_image.shape[0])
            loss = (F.cross_entropy(per_image, labels) + F.cross_entropy(per_text, labels)) / 2
        else:
            loss = self._without_logits(image, text, scale, bias)
        return {"contrastive_loss": loss} if output_dict else loss

    def _without_logits(
        self, image: Tensor, text: Tensor, scale: Tensor | float, bias: Tensor | float | None
    ) -> Tensor:
        choice: dict[str, Any] = {"backend": self.backend, "threads": self.threads}
        if self.world_size == 1:
            return cast(Tensor, info_nce(image, text, scale, logit_bias=bias, **choice))
        if self.local_loss and self.gather_with_grad:
            _check_group(self.rank, self.world_size)
            form: Any = "ring" if self.ring else "gather"
            loss = distributed_info_nce(image, text, scale, form=form, **choice)
            return loss + 0 * bias.sum() if isinstance(bias, Tensor) else loss
        all_image, all_text = self._gathered(image, text)
        if not self.local_loss:
            return cast(Tensor, info_nce(all_image, all_text, scale, logit_bias=bias, **choice))
        choice |= {"offset": self.rank * len(image), "direction": "image"}
        of_image: Any = info_nce(image, all_text, scale, logit_bias=bias, **choice)
        of_text: Any = info_nce(text, all_image, scale, **choice)
        return cast(Tensor, (of_image + of_text) / 2)


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
    chunk_size : int
        Accepted, as in open_clip's main branch: memory is O(N) whatever it is.
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
        chunk_size: int = 0,
        *,
        backend: str | None = None,
        threads: int | None = None,
    ) -> None:
        super().__init__()
        self.cache_labels, self.chunk_size = cache_labels, as_count(chunk_size, "chunk_size", 0)
        self.prev_num_logits = 0  # with labels: open_clip has both, and uses neither
        self.labels: dict[torch.device, Tensor] = {}
        self.dist_impl = dist_impl or "bidir"
        if self.dist_impl not in ("bidir", "shift", "reduce", "gather"):
            raise InputError(f"dist_impl must be bidir, shift, reduce or gather, got {dist_impl!r}")
        self.rank, self.world_size = _checked_rank(rank, world_size)
        self.backend, self.threads = backend, _checked_threads(threads)

    def get_ground_truth(
        self, device: torch.device, dtype: torch.dtype, num_logits: int, negative_only: bool = False
    ) -> Tensor:
        """Return 1 where a pair belongs together and -1 elsewhere, for losses that build on this one.

        Parameters
        ----------
        device : torch.device
            Where to make them.
        dtype : torch.dtype
            In which type.
        num_logits : int
            Rows and columns.
        negative_only : bool
            No pair belongs together: another rank's texts.

        Returns
        -------
        Tensor
            (num_logits, num_logits).
        """
        labels = -torch.ones((num_logits, num_logits), device=device, dtype=dtype)
        return labels if negative_only else labels.fill_diagonal_(1)

    def get_logits(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        logit_bias: Tensor | float | None = None,
    ) -> Tensor:
        """Return the logits (n, n) in full, for losses that need them; `forward` does not.

        Parameters
        ----------
        image_features, text_features : Tensor
            Float (n, d).
        logit_scale : Tensor or float
            1 / temperature.
        logit_bias : Tensor or float, optional
            Added to all logits.

        Returns
        -------
        Tensor
            (n, n), images among texts.

        Raises
        ------
        InputError
            On features that are no (n, d) of one shape, and on scales that are no number.
        """
        image, text = _features(image_features, text_features)
        bias = None if logit_bias is None else as_scalar(logit_bias, "logit_bias", image)
        return _logits(image, text, as_scalar(logit_scale, "logit_scale", image), bias)

    def _loss(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        logit_bias: Tensor | float | None = None,
        negative_only: bool = False,
    ) -> Tensor:
        """Of these images among these texts, none of them theirs where negative_only, as in open_clip."""
        if _overrides(self, SigLipLoss, "get_logits", "get_ground_truth"):
            logits = self.get_logits(image_features, text_features, logit_scale, logit_bias)
            count = image_features.shape[0]
            labels = self.get_ground_truth(
                image_features.device, image_features.dtype, count, negative_only=negative_only
            )
            return -F.logsigmoid(labels * logits).sum() / count
        image, text = _features(image_features, text_features)
        scale = as_scalar(logit_scale, "logit_scale", image)
        bias = None if logit_bias is None else as_scalar(logit_bias, "logit_bias", image)
        choice: dict[str, Any] = {"backend": self.backend, "threads": self.threads}
        return sigmoid_loss(image, text, scale, bias, offset=None if negative_only else 0, **choice)

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
        image, text = _features(image_features, text_features)
        if self.world_size == 1:
            loss = self._loss(image_features, text_features, logit_scale, logit_bias)
        elif _overrides(self, SigLipLoss, "_loss", "get_logits", "get_ground_truth"):
            _check_group(self.rank, self.world_size)
            loss = self._loss(image_features, text_features, logit_scale, logit_bias)
            texts = _gather(text_features, self.rank, True, own_gradient=True).chunk(self.world_size)
            for rank in range(self.world_size):
                if rank != self.rank:
                    other = self._loss(image_features, texts[rank], logit_scale, logit_bias, negative_only=True)
                    loss = loss + other
        else:
            _check_group(self.rank, self.world_size)
            scale = as_scalar(logit_scale, "logit_scale", image)
            bias = None if logit_bias is None else as_scalar(logit_bias, "logit_bias", image)
            form: Any = "gather" if self.dist_impl in ("gather", "reduce") else "ring"
            loss = distributed_sigmoid_loss(
                image, text, scale, bias, form=form, backend=self.backend, threads=self.threads
            )
        return {"contrastive_loss": loss} if output_dict else loss


def _checked_rank(rank: int, world_size: int) -> tuple[int, int]:
    world_size, rank = as_count(world_size, "world_size", 1), as_count(rank, "rank", 0)
    if rank >= world_size:
        raise InputError(f"rank must be from 0 to world_size - 1 = {world_size - 1}, got {rank}")
    return rank, world_size


def _checked_threads(threads: int | None) -> int | None:
    return None if threads is None else as_count(threads, "threads", 1)


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
    refuse_transforms("a loss over ranks")
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
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        gradient = gradient.clone()
        dist.all_reduce(gradient)
        return gradient.chunk(dist.get_world_size())[dist.get_rank()]
