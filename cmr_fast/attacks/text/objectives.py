"""What a text attack raises: how far the embedding of a changed text is from that of the clean one, or of its image.

An objective takes embeddings of changed texts, of their clean texts and of their images, float32 or wider (M, d) each,
and returns one number a text, (M,). Embeddings may come from 16-bit arithmetic; the objective may not: on unit vectors
KL spans some 3e-4, less than bfloat16 resolves.
"""

from collections.abc import Callable, Mapping

import torch.nn.functional as F
from torch import Tensor

from cmr_fast.errors import InputError

Objective = Callable[[Tensor, Tensor, Tensor | None], Tensor]


def kl(changed: Tensor, clean: Tensor, images: Tensor | None = None) -> Tensor:
    """KL(softmax e(T) || softmax e(T')): Co-Attack's, and everyone's importance of a word.

    Parameters
    ----------
    changed, clean
        Embeddings, float (M, d).
    images
        Not used.

    Returns
    -------
    Tensor
        Float (M,).
    """
    return F.kl_div(changed.log_softmax(dim=-1), clean.softmax(dim=-1), reduction="none").sum(dim=-1)


def l2(changed: Tensor, clean: Tensor, images: Tensor | None = None) -> Tensor:
    """|e(T') - e(T)|: MAT's Eq. 4.

    Parameters
    ----------
    changed, clean
        Embeddings, float (M, d).
    images
        Not used.

    Returns
    -------
    Tensor
        Float (M,).
    """
    return (changed - clean).square().sum(dim=-1).sqrt()


def similarity(changed: Tensor, clean: Tensor, images: Tensor | None = None) -> Tensor:
    """-cos(e(T'), e(T)).

    Parameters
    ----------
    changed, clean
        Embeddings, float (M, d).
    images
        Not used.

    Returns
    -------
    Tensor
        Float (M,).
    """
    return -F.cosine_similarity(changed, clean, dim=-1)


def image(changed: Tensor, clean: Tensor, images: Tensor | None = None) -> Tensor:
    """-<e(T'), e(I)>: SGA's; of unit vectors the cosine.

    Parameters
    ----------
    changed
        Embeddings, float (M, d).
    clean
        Not used.
    images
        Embeddings of the texts' images, float (M, d).

    Returns
    -------
    Tensor
        Float (M,).

    Raises
    ------
    InputError
        Without images, and for images of another width.
    """
    if images is None:
        raise InputError("the objective 'image' compares texts with their images: pass images=(N, d) embeddings")
    if images.shape != changed.shape:
        raise InputError(f"images must be embeddings as wide as the texts', {changed.shape[1]}, got {images.shape[1]}")
    return -(changed * images).sum(dim=-1)


OBJECTIVES: Mapping[str, Objective] = {"kl": kl, "l2": l2, "similarity": similarity, "image": image}


def find(objective: str | Objective, name: str = "objective") -> Objective:
    """An objective by name, or as it is given.

    Parameters
    ----------
    objective
        One of OBJECTIVES, or a function (changed, clean, images) -> (M,).
    name
        What the setting is called.

    Raises
    ------
    InputError
        For anything else.
    """
    if callable(objective):
        return objective
    if not isinstance(objective, str) or objective not in OBJECTIVES:
        raise InputError(f"{name} must be one of {', '.join(OBJECTIVES)} or a function, got {objective!r}")
    return OBJECTIVES[objective]
