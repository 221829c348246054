"""The gradient of a loss that couples a whole batch, at the activation memory of a part (Gao et al. 2021, GradCache).

First the parts go through their network without a graph, which gives the loss and its gradient at the embeddings; then
each goes through once more and takes its rows of that gradient on to the weights. The last part of each side keeps the
graph of its first pass, so k parts cost (k - 1) / k of a forward pass more than the whole batch at once. What a part
draws, dropout say, is the same both times.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from cmr_fast.methods._ranks import Ranks
from cmr_fast.ops.info_nce import info_nce
from cmr_fast.ops.info_nce_distributed import distributed_info_nce

Pass = Callable[[], Tensor]


def descend(
    sides: Sequence[Sequence[Pass]],
    loss_of: Callable[..., Tensor],
    backward: Callable[[Tensor], None],
    device: torch.device,
    twice: bool,
) -> Tensor:
    """The gradient of `loss_of(*embeddings)`, each side's embeddings those of its passes one after the other.

    Parameters
    ----------
    sides
        Passes of each side, which give (n, d) each.
    loss_of
        Of one (N, d) a side, a scalar.
    backward
        What calls backward, of scalars.
    device
        Whose random state the passes draw from, beside the CPU's.
    twice
        Hold the graph of one pass of each side at a time.

    Returns
    -------
    Tensor
        The loss, detached.
    """
    if not twice:
        loss = loss_of(*(torch.cat([encode() for encode in passes]) for passes in sides))
        backward(loss)
        return loss.detach()
    states: list[list[tuple[Tensor, Tensor | None]]] = []
    leaves: list[list[Tensor]] = []
    kept: list[Tensor] = []
    for passes in sides:
        states.append([])
        leaves.append([])
        for number, encode in enumerate(passes):
            last = number == len(passes) - 1
            torch.clear_autocast_cache()  # weights that were cast without a graph
            states[-1].append(_random_state(device))
            with torch.set_grad_enabled(last):
                vectors = encode()
            if last:
                kept.append(vectors)
            leaves[-1].append(vectors.detach().requires_grad_())
    after = _random_state(device)
    loss = loss_of(*map(torch.cat, leaves))
    backward(loss)
    for vectors, side in zip(kept, leaves, strict=True):
        _onwards(vectors, side[-1], backward)
    kept.clear()
    del vectors
    for passes, side, before in zip(sides, leaves, states, strict=True):
        for encode, leaf, state in zip(passes[:-1], side, before, strict=False):
            _set_random_state(state, device)
            _onwards(encode(), leaf, backward)
    _set_random_state(after, device)
    return loss.detach()


def _onwards(vectors: Tensor, leaf: Tensor, backward: Callable[[Tensor], None]) -> None:
    assert leaf.grad is not None
    if vectors.requires_grad:
        backward((vectors * leaf.grad).sum())


def _random_state(device: torch.device) -> tuple[Tensor, Tensor | None]:
    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None


def _set_random_state(state: tuple[Tensor, Tensor | None], device: torch.device) -> None:
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1], device)


def contrast(
    ranks: Ranks,
    image: Tensor,
    text: Tensor,
    scale: Tensor,
    ids: tuple[Tensor, Tensor],
    direction: str = "both",
) -> Tensor:
    """InfoNCE over ranks, by `ranks.contrastive`: the loss of the whole batch, or the mean of the ranks' own losses.

    Parameters
    ----------
    ranks
        All of which have the same inputs.
    image, text
        Float (B, d) and (M, d) of the whole batch.
    scale
        1 / temperature.
    ids
        int64 (B,) and (M,), which image each row belongs to.
    direction
        As of info_nce.

    Returns
    -------
    Tensor
        A scalar, the same on every rank; the mean of the ranks' gradients is the loss's.
    """
    if ranks.world == 1 or ranks.contrastive == "gather":
        return _whole(image, text, scale, ids, direction)
    rows = ranks.own(len(image))  # images, and the texts of these
    mine = rows.start + torch.argsort(ids[0][rows], stable=True)
    theirs = torch.isin(ids[1], ids[0][rows]).nonzero()[:, 0]
    theirs = theirs[torch.argsort(ids[1][theirs], stable=True)]
    own = ids[0][mine], ids[1][theirs]
    if ranks.contrastive == "ring":
        # of those that belong together one by one, in even shares
        partners = len(ids[0].unique()) == len(image) == len(text) and len(image) % ranks.world == 0
        if direction != "both" or not partners:
            return _whole(image, text, scale, ids, direction)
        return _mean_value(ranks, distributed_info_nce(image[mine], text[theirs], scale, form="ring"))
    if not len(mine):
        return _mean_value(ranks, 0 * (image.sum() + text.sum() + scale))
    share = ranks.world * len(mine) / len(image)
    return _mean_value(ranks, share * _whole(image[mine], text[theirs], scale, own, direction))


def _whole(image: Tensor, text: Tensor, scale: Tensor, ids: tuple[Tensor, Tensor], direction: str) -> Tensor:
    loss: Tensor = info_nce(image, text, scale, positives=ids, direction=direction)  # type: ignore[assignment,arg-type]
    return loss


def _mean_value(ranks: Ranks, loss: Tensor) -> Tensor:
    """The ranks' mean, with the gradient of this rank's own."""
    return loss + (ranks.total(loss) / ranks.world - loss.detach())
