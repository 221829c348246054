"""Dual encoders: an image tower and a text tower into one space, and a temperature.

    f(x) = norm(image((x - mean) / std))        pixels x from 0 to 1: normalisation is part of the graph
    g(t) = norm(text(ids, mask))                ids padded on the right; the padding does not change a row
    z_ij = scale f(x_i) . g(t_j)                scale = exp(log_scale), 1 / temperature

Whoever trains, attacks or measures one needs no more of it than this.
"""

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cmr_fast.errors import InputError

TEMPERATURE = 0.07
LARGEST_SCALE = 100.0  # as CLIP's
Encode = Callable[[Tensor, Tensor], Tensor]


class DualEncoder(nn.Module):
    """Base of dual encoders: what `image_embedding`, `text_embedding` and `tokens` of a subclass give, normalised.

    Parameters
    ----------
    mean, std : sequence of float
        Of the three colours, of pixels from 0 to 1.
    temperature : float
        To begin with; its logarithm is learned.
    side : int, optional
        Pixels a side of the images, where the tower takes one size alone.

    Attributes
    ----------
    log_scale : Parameter
        0-d, the logarithm of 1 / temperature.
    """

    def __init__(
        self,
        mean: Sequence[float],
        std: Sequence[float],
        temperature: float = TEMPERATURE,
        side: int | None = None,
    ) -> None:
        super().__init__()
        if not 0 < temperature < math.inf:
            raise InputError(f"temperature must be finite and above 0, got {temperature}")
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32).view(3, 1, 1), persistent=False)
        self.log_scale = nn.Parameter(torch.tensor(-math.log(temperature)))
        self.side = side

    @property
    def scale(self) -> Tensor:
        """0-d: 1 / temperature, of a training at most `LARGEST_SCALE`."""
        return self.log_scale.exp()

    def load(self) -> None:
        """Take the pretrained weights that the model's name stands for, if any."""
        raise NotImplementedError

    def parts(self) -> dict[str, list[nn.Parameter]]:
        """The parameters to train: of "image" and "text", the towers, and of "heads", the temperature with them."""
        raise NotImplementedError

    def towers(self) -> list[nn.Module]:
        """The networks below the embeddings, each called as a module and by no part of it: what may be sharded."""
        raise NotImplementedError

    def image_embedding(self, normalised: Tensor) -> Tensor:
        """(N, 3, H, W) pixels less their mean, over their deviation -> (N, d), of any length."""
        raise NotImplementedError

    def text_embedding(self, ids: Tensor, mask: Tensor) -> Tensor:
        """(N, L) ids and mask, L the longest row's length -> (N, d), of any length."""
        raise NotImplementedError

    def tokens(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Ids int64 (N, L) and mask bool (N, L) of texts, padded on the right."""
        raise NotImplementedError

    def encode_image(self, pixels: Tensor) -> Tensor:
        """Embed images.

        Parameters
        ----------
        pixels : Tensor
            Float (N, 3, H, W) from 0 to 1; the gradient reaches them.

        Returns
        -------
        Tensor
            (N, d), rows of length 1.

        Raises
        ------
        InputError
            For other shapes or dtypes, and where the tower takes images of another size.
        """
        if not isinstance(pixels, Tensor) or not pixels.is_floating_point() or pixels.ndim != 4 or pixels.shape[1] != 3:
            seen = f"{pixels.dtype} {tuple(pixels.shape)}" if isinstance(pixels, Tensor) else type(pixels).__name__
            raise InputError(f"pixels must be floats (N, 3, H, W) from 0 to 1, got {seen}")
        if self.side is not None and pixels.shape[2:] != (self.side, self.side):
            raise InputError(f"images must be {self.side} x {self.side} for this tower, got {tuple(pixels.shape[2:])}")
        return F.normalize(self.image_embedding(self.normalised(pixels)), dim=1)

    def normalised(self, pixels: Tensor) -> Tensor:
        """Pixels from 0 to 1 as the image tower was trained on them."""
        return (pixels - self.get_buffer("mean").to(pixels.dtype)) / self.get_buffer("std").to(pixels.dtype)

    def encode_text(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Embed texts.

        Parameters
        ----------
        ids : Tensor
            int64 (N, L), from `tokenize` or like it: padded on the right.
        mask : Tensor
            bool (N, L), False on the padding. Columns that are padding in every row are cut first.

        Returns
        -------
        Tensor
            (N, d), rows of length 1, the same (to rounding) whatever the padding.

        Raises
        ------
        InputError
            For other shapes or dtypes, and a row without tokens.
        """
        if ids.dtype != torch.int64 or ids.ndim != 2 or mask.dtype != torch.bool or mask.shape != ids.shape:
            raise InputError(
                f"ids must be int64 (N, L) and mask bool of that shape, got {ids.dtype} {tuple(ids.shape)} and "
                f"{mask.dtype} {tuple(mask.shape)}"
            )
        return F.normalize(self.text_embedding(*trimmed(ids, mask)), dim=1)

    def tokenize(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Turn texts into what `encode_text` takes.

        Parameters
        ----------
        texts : sequence of str
            One or more; a text without a word is its special tokens alone.

        Returns
        -------
        ids : Tensor
            int64 (N, L), L the length of the longest, at most the tower's context.
        mask : Tensor
            bool (N, L), False on the padding, which is on the right.

        Raises
        ------
        InputError
            For anything but texts, and for none.
        """
        if isinstance(texts, str) or not len(texts) or not all(isinstance(text, str) for text in texts):
            seen = repr(texts[:40]) if isinstance(texts, str) else f"{len(texts)} of {_kinds(texts)}"
            raise InputError(f"texts must be a sequence of one or more strings, got {seen}")
        return trimmed(*self.tokens(texts))

    @torch.no_grad()
    def embedded_texts(self, texts: Sequence[str], rows: int = 256) -> Tensor:
        """Many texts, without gradients: the short ones together, each batch as wide as its longest.

        Parameters
        ----------
        texts : sequence of str
            N of them.
        rows : int
            Of a batch.

        Returns
        -------
        Tensor
            (N, d) on the device of the towers, in the order of `texts`.
        """
        return by_length(self, texts, self.encode_text, rows)

    def clamp_scale(self) -> None:
        """Keep `scale` from 1 to `LARGEST_SCALE`: what a trainer calls after each step."""
        with torch.no_grad():
            self.log_scale.clamp_(0, math.log(LARGEST_SCALE))


def by_length(model: DualEncoder, texts: Sequence[str], encode: Encode, rows: int = 256) -> Tensor:
    """`encode(ids, mask)` of many texts, the short ones together; back in the order of `texts`."""
    ids, mask = model.tokenize(texts)
    lengths = mask.sum(dim=1)
    order = torch.argsort(lengths, stable=True)
    device = model.log_scale.device
    parts = [encode(*(x.to(device) for x in trimmed(ids[part], mask[part]))) for part in order.split(rows)]
    return torch.cat(parts)[torch.argsort(order).to(device)]


def trimmed(ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Ids and mask without the columns that are padding in every row.

    Raises
    ------
    InputError
        Where a row has no token, or its padding is not on the right.
    """
    lengths = mask.sum(dim=1)
    within = torch.arange(mask.shape[1], device=mask.device) < lengths[:, None]
    if not bool(((lengths > 0) & (within == mask).all(dim=1)).all()):
        raise InputError("each row of mask must be True on one token or more and False on the padding right of them")
    longest = int(lengths.max()) if len(mask) else 0
    return ids[:, :longest], mask[:, :longest]


def _kinds(texts: Sequence[object]) -> str:
    return ", ".join(sorted({type(text).__name__ for text in texts})) or "nothing"
