"""The text side under attack: any number of texts in one flat batch, each different one encoded once.

Texts that the victim's tokenizer does not tell apart are one; rows are trimmed to their tokens and batched by length,
so that next to nothing is spent on padding.
"""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from cmr_fast.attacks.victim import held, widened
from cmr_fast.errors import InputError

CPU_TOKENS, GPU_TOKENS = 512, 65536  # a forward pass: on a CPU of each thread, what its caches hold


@runtime_checkable
class TextEncoder(Protocol):
    """What is attacked: the text half of a dual encoder."""

    def tokenize(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """int64 ids and bool mask (N, L), padded on the right to the longest."""

    def encode_text(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Embeddings, float (N, d), which do not depend on the padding."""


class FlatTexts:
    """Embeddings of texts by way of a victim.

    Parameters
    ----------
    model
        With `tokenize` and `encode_text`.
    dtype
        torch.bfloat16 or torch.float16: encoded under autocast. None: as the model is.
    tokens
        Of a forward pass, padding counted; None: 512 for each thread of a CPU, 65,536 elsewhere.

    Raises
    ------
    InputError
        For a model without these functions.

    Attributes
    ----------
    queries
        Texts that went through the model since the object was made.
    """

    def __init__(self, model: TextEncoder, dtype: torch.dtype | None = None, tokens: int | None = None) -> None:
        if not isinstance(model, TextEncoder):
            raise InputError(
                f"the victim must have tokenize(texts) and encode_text(ids, mask), {type(model).__name__} has not"
            )
        if dtype not in (None, torch.bfloat16, torch.float16):
            raise InputError(f"dtype must be torch.bfloat16, torch.float16 or None (as the model is), got {dtype}")
        self.model, self.dtype, self.tokens = model, dtype, tokens
        self.queries = 0

    @property
    def device(self) -> torch.device:
        """Where the victim's weights are; the CPU where it has none."""
        parameters = self.model.parameters() if isinstance(self.model, nn.Module) else iter(())
        return next((p.device for p in parameters), torch.device("cpu"))

    @contextmanager
    def prepare(self) -> Iterator[None]:
        """Evaluation mode and no gradients inside; outside everything as before."""
        with torch.inference_mode(False), torch.no_grad(), evaluating(self.model):
            yield

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """Embeddings of texts.

        Parameters
        ----------
        texts
            N of them; equal ones cost nothing.

        Returns
        -------
        Tensor
            float32 or wider (N, d).

        Raises
        ------
        InputError
            For a victim that returns something else than it should.
        """
        number = {text: row for row, text in enumerate(dict.fromkeys(texts))}
        ids, mask = self._tokenized(list(number))
        lengths = mask.sum(dim=1)
        array, sizes = ids.numpy(), lengths.tolist()
        rows: dict[bytes, int] = {}  # by tokens
        which = [rows.setdefault(array[i, :size].tobytes(), i) for i, size in enumerate(sizes)]
        chosen = torch.tensor(list(rows.values()))
        place = {row: i for i, row in enumerate(rows.values())}
        vectors = self._encoded(ids[chosen], mask[chosen], lengths[chosen])
        self.queries += len(chosen)
        back = torch.tensor([place[which[number[text]]] for text in texts], device=vectors.device)
        return vectors[back]

    def _tokenized(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        ids, mask = self.model.tokenize(texts)
        if ids.dtype != torch.int64 or ids.shape != mask.shape or mask.dtype != torch.bool or len(ids) != len(texts):
            raise InputError(
                f"tokenize must return int64 ids and a bool mask ({len(texts)}, L), got {ids.dtype} "
                f"{tuple(ids.shape)} and {mask.dtype} {tuple(mask.shape)}"
            )
        return ids.cpu().contiguous(), mask.cpu()

    def _encoded(self, ids: Tensor, mask: Tensor, lengths: Tensor) -> Tensor:
        """Float (N, d), by way of passes over rows of like length, the longest first."""
        device = self.device
        order = lengths.argsort(descending=True, stable=True)
        most = self.tokens or tokens_on(device)

        def encode(rows: Tensor) -> Tensor:
            longest = max(1, int(lengths[rows[0]]))
            part = ids[rows, :longest].to(device), mask[rows, :longest].to(device)
            with torch.autocast(device.type, dtype=self.dtype, enabled=self.dtype is not None):
                result = self.model.encode_text(*part)
            if result.ndim != 2 or len(result) != len(rows) or not result.is_floating_point():
                raise InputError(
                    f"encode_text must return floats ({len(rows)}, d), got {result.dtype} {tuple(result.shape)}"
                )
            return widened(result)

        vectors = torch.cat(
            [encoded for rows in chunks(lengths[order], most) for encoded in split(encode, order[rows])]
        )
        if not bool(vectors.isfinite().all()):
            raise InputError("encode_text returned values that are not finite")
        back = torch.empty_like(order)
        back[order] = torch.arange(len(order))
        return vectors[back.to(vectors.device)]


def evaluating(model: object) -> AbstractContextManager[None]:
    """Evaluation mode inside, of a model that has one.

    Parameters
    ----------
    model
        A module or anything else.
    """
    return held(model) if isinstance(model, nn.Module) else nullcontext()


def tokens_on(device: torch.device) -> int:
    """Tokens of a forward pass that a device is fast with.

    Parameters
    ----------
    device
        Where the model is.
    """
    return CPU_TOKENS * torch.get_num_threads() if device.type == "cpu" else GPU_TOKENS


def chunks(lengths: Tensor, tokens: int) -> Iterator[slice]:
    """Rows that make a forward pass.

    Parameters
    ----------
    lengths
        int64 (N,), falling.
    tokens
        Most tokens of a pass, padding counted; one row is always allowed.
    """
    start, count = 0, len(lengths)
    while start < count:
        rows = max(1, tokens // max(1, int(lengths[start])))
        yield slice(start, start + rows)
        start += rows


def split(encode: Callable[[Tensor], Tensor], rows: Tensor) -> Iterator[Tensor]:
    """What `encode` makes of the rows; where memory runs out, of halves of them.

    Parameters
    ----------
    encode
        Rows -> Tensor.
    rows
        int64 (M,).
    """
    try:
        yield encode(rows)
    except (torch.OutOfMemoryError, RuntimeError) as error:
        if len(rows) == 1 or not (isinstance(error, torch.OutOfMemoryError) or "allocate memory" in str(error)):
            raise
        warnings.warn(f"{len(rows)} texts do not fit into memory: split into halves", RuntimeWarning, stacklevel=2)
        yield from split(encode, rows[: len(rows) // 2])
        yield from split(encode, rows[len(rows) // 2 :])
