"""FARE and LEAF: one tower learns to say of attacked inputs what it said of clean ones before; no pairs are needed.

    fare    I' = argmax |f(I') - f0(I)|^2,  minimise |f(I') - f0(I)|^2     images, by PGD in the L-inf ball
    leaf    T' = argmax |g(T') - g0(T)|^2,  minimise |g(T') - g0(T)|^2     texts, one character changed

f and g are embeddings as they are, not normalised; f0 and g0 are those of the weights that training began with. FARE:
Schlarmann et al. 2024, "Robust CLIP", Eq. 3. LEAF: Abad Rocamora et al. 2025, "Robustness in both domains: CLIP needs a
robust text encoder"; a FARE run as `start` of LEAF gives both towers.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from cmr_fast.attacks.pgd import PGD
from cmr_fast.attacks.text.characters import CharacterAttack
from cmr_fast.attacks.victim import widened
from cmr_fast.data.captions import CaptionedImages
from cmr_fast.errors import InputError
from cmr_fast.methods._settings import check_choices, check_least
from cmr_fast.methods.mat import ATTACKS, Finetune, FinetuneConfig, PairBatch, PgdConfig, mixed_dtype, presets_of
from cmr_fast.models.clip import TwoTowers
from cmr_fast.models.dual import DualEncoder, by_length, trimmed


@dataclass(frozen=True)
class _Optimizer:
    """The optimizer of both."""

    optimizer: Literal["adamw", "sgd"] = "adamw"
    """Authors: AdamW."""


@dataclass(frozen=True)
class FareConfig(_Optimizer, PgdConfig):
    """FARE's settings; its authors take 20,000 steps on ImageNet with a warm-up."""

    lr: float = 1e-5
    """In the beginning; a cosine down to 0."""
    weight_decay: float = 1e-4
    """Of AdamW."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choices(self, optimizer=("adamw", "sgd"))


@dataclass(frozen=True)
class LeafConfig(_Optimizer, FinetuneConfig):
    """LEAF's settings; its authors take 30 epochs of 80,000 captions with a warm-up."""

    lr: float = 1e-5
    """In the beginning; a cosine down to 0."""
    weight_decay: float = 1e-4
    """Of AdamW."""
    edits: int = 1
    """Characters of a caption that may change."""
    tries: int = 50
    """Places, and then characters, that are tried (rho)."""
    dictionary: str = ""
    """A file of words in UTF-8, one a line: an edit must break one and make none. None: any edit."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_least(self, edits=1, tries=1)
        check_choices(self, optimizer=("adamw", "sgd"))


class _EmbeddingDistance(Finetune):
    """What both share: a copy of the towers as they were, and a loss that is a sum over items."""

    side: ClassVar[Literal["image", "text"]]
    replicas_only: ClassVar[str] = ATTACKS
    contrasts = False
    image_alone: ClassVar[bool] = True  # the temperature stays

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self._before: list[DualEncoder] = []  # in a list: no part of what is trained and stored

    def fit_inputs(self, train: CaptionedImages) -> None:
        """The weights to begin with, and a copy that stays."""
        super().fit_inputs(train)
        self._before = [copy.deepcopy(self.dual).eval().requires_grad_(False)]

    def before(self) -> DualEncoder:
        """The towers as they were, where those that learn are."""
        (dual,) = self._before
        return dual.to(self.dual.log_scale.device, self.dual.log_scale.dtype)

    def trained(self) -> dict[str, list[nn.Parameter]]:
        """One tower, and its head."""
        side = self.side
        parts = self.dual.parts()[side]
        if not isinstance(self.dual, TwoTowers):
            return {f"{side} tower": parts}
        head = self.dual.image_head if side == "image" else self.dual.text_head
        return {f"{side} tower": parts, f"{side} head": [*head.parameters()]}

    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        """AdamW, or SGD. InputError where a part that must learn is frozen."""
        made = super().optimizers()
        if self.config.optimizer == "sgd":
            return made
        groups = made["all"].param_groups[0]["params"]
        return {"all": torch.optim.AdamW(groups, lr=self.config.lr, weight_decay=self.config.weight_decay)}

    def _descend(self, pairs: PairBatch, backward: Callable[[Tensor], None]) -> Tensor:
        """The gradient of the mean over items, part by part."""
        assert pairs.seen is not None
        passes, back = self.passes(pairs)
        wanted = pairs.seen if back is None else pairs.seen[torch.argsort(back)]
        side, ids = ("image", pairs.ids) if back is None else ("a caption of image", pairs.ids[pairs.owner])
        ids = ids if back is None else ids[torch.argsort(back)]
        total, first = torch.zeros((), device=wanted.device), 0
        weight = 1.0 / len(wanted)
        if back is None:  # over ranks each has its own images, one without any a stand-in that counts nothing
            weight *= 0 if pairs.idle else self.ranks.world
            own = self.ranks.own(len(ids)) if not pairs.idle else slice(0, 1)
            wanted, ids = wanted[own], ids[own]
        for encode in passes:
            vectors = widened(encode())
            apart = squared(vectors, wanted[first : first + len(vectors)].to(vectors))
            if len(broken := (~apart.isfinite()).nonzero()):
                raise InputError(
                    f"the loss is {apart.sum().item()} ({side} {int(ids[first + int(broken[0])])} has a distance that "
                    "is not finite); expected a finite one: lower lr. A checkpoint, if there is one, holds an earlier "
                    "step"
                )
            loss = weight * apart.sum()
            backward(loss)
            total, first = total + loss.detach(), first + len(vectors)
        return total if back is not None else self.ranks.total(total) / self.ranks.world

    def passes(self, pairs: PairBatch) -> tuple[list[Callable[[], Tensor]], Tensor | None]:
        """Passes over the side that learns, and the rows of their results that restore the order."""
        raise NotImplementedError


class Fare(_EmbeddingDistance):
    """FARE: PGD away from the clean embedding, the image tower alone learns."""

    name: ClassVar[str] = "fare"
    Config: ClassVar[type] = FareConfig
    presets: ClassVar[dict[str, Any]] = presets_of(FareConfig, 1e-5)
    side: ClassVar[Literal["image", "text"]] = "image"

    def attacked(self, pairs: PairBatch, rows: Tensor | None = None) -> tuple[PairBatch, dict[str, Tensor]]:
        """Images away from what the towers said of them before."""
        c, device = self.config, pairs.pixels.device
        dtype, numbers = mixed_dtype(device), torch.arange(len(pairs.pixels)) if rows is None else rows
        parts = torch.arange(len(pairs.pixels)).split(c.chunk or len(pairs.pixels))
        with torch.no_grad():
            wanted = torch.cat([widened(_raw_image(self.before(), pairs.pixels[part])) for part in parts])
        with torch.autocast(device.type, enabled=False):
            atk = PGD(
                _RawImages(self.dual), c.eps, c.alpha, c.steps, loss=squared, strict=True, dtype=dtype,
                seed=int(torch.randint(2**62, ())), check=False, progress=False,
            )  # fmt: skip
            moved = [atk(pairs.pixels[part], wanted[part], index=numbers[part]) for part in parts]
        return replace(pairs, pixels=torch.cat(moved), seen=wanted), {}

    def passes(self, pairs: PairBatch) -> tuple[list[Callable[[], Tensor]], Tensor | None]:
        """Of images."""
        return self.image_passes(pairs, partial(_raw_image, self.dual)), None

    @property
    def perturbation(self) -> str:
        """The image attack."""
        c = self.config
        steps = f"{c.steps} x {c.alpha * 255:.3g}/255 within {c.eps * 255:.3g}/255"
        return f"images by PGD, {steps} (distance from the clean embedding)"


class Leaf(_EmbeddingDistance):
    """LEAF: characters changed away from the clean embedding, the text tower alone learns."""

    name: ClassVar[str] = "leaf"
    Config: ClassVar[type] = LeafConfig
    presets: ClassVar[dict[str, Any]] = presets_of(LeafConfig, 1e-5)
    side: ClassVar[Literal["image", "text"]] = "text"
    _dictionary: frozenset[str] | None = None

    def fit_inputs(self, train: CaptionedImages) -> None:
        """As of both; InputError for a dictionary that is no text file."""
        super().fit_inputs(train)
        self._dictionary = _words(self.config.dictionary) if self.config.dictionary else None

    def attacked(self, pairs: PairBatch, rows: Tensor | None = None) -> tuple[PairBatch, dict[str, Tensor]]:
        """Captions away from what the towers said of them before."""
        c, device = self.config, pairs.pixels.device
        before = self.before()
        with torch.no_grad():
            wanted = widened(by_length(before, pairs.texts, before.text_embedding))
        with torch.autocast(device.type, enabled=False):
            atk = CharacterAttack(
                _RawTexts(self.dual), edits=c.edits, tries=c.tries, objective=_apart, dictionary=self._dictionary,
                seed=int(torch.randint(2**62, ())), dtype=mixed_dtype(device), check=False,
            )  # fmt: skip
            numbers = pairs.first + torch.arange(len(pairs.texts))
            texts, info = atk(pairs.texts, wanted, index=numbers, return_info=True)
        changed = self.share_of(pairs, [bool(change) for change in info.changes])
        return replace(pairs, texts=texts, seen=wanted), {"changed": changed}

    def passes(self, pairs: PairBatch) -> tuple[list[Callable[[], Tensor]], Tensor | None]:
        """Of texts."""
        return self.text_passes(pairs.texts, self.dual.text_embedding)

    @property
    def perturbation(self) -> str:
        """The text attack."""
        c = self.config
        edits = "1 character" if c.edits == 1 else f"{c.edits} characters"
        return f"texts by characters, {edits} of {c.tries} tried (distance from the clean embedding)"


def _words(path: str) -> frozenset[str]:
    try:
        text = Path(path).read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: expected a text file of words, one a line ({error})") from error
    return frozenset(text.lower().split())


class _RawImages(nn.Module):
    """The image side, embeddings as they are, as PGD holds it."""

    def __init__(self, dual: DualEncoder) -> None:
        super().__init__()
        self.dual = dual

    def forward(self, pixels: Tensor) -> Tensor:
        return _raw_image(self.dual, pixels)


class _RawTexts(nn.Module):
    """The text side, embeddings as they are, as text attacks hold it."""

    def __init__(self, dual: DualEncoder) -> None:
        super().__init__()
        self.dual = dual
        self.tokenize = dual.tokenize

    def encode_text(self, ids: Tensor, mask: Tensor) -> Tensor:
        return self.dual.text_embedding(*trimmed(ids, mask))


def squared(outputs: Tensor, wanted: Tensor) -> Tensor:
    """(B,): the squared distance of embeddings (B, d)."""
    return (outputs - wanted.to(outputs)).square().sum(dim=1)


def _apart(changed: Tensor, clean: Tensor, wanted: Tensor | None) -> Tensor:
    assert wanted is not None
    return squared(changed, wanted)


def _raw_image(dual: DualEncoder, pixels: Tensor) -> Tensor:
    return dual.image_embedding(dual.normalised(pixels))
