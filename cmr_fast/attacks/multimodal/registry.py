"""What attacks on images and captions are called: one name, one maker. An attack is added by a line in MAKERS.

bert-attack    captions, one word; bert-attack-l2, bert-attack-similarity: other objectives
character      captions, one character
co-attack      images and captions; co-attack-image and the like: its modes
sga            images and captions; dra, sa-aet: its successors
pgd20, ...     images, by an attack on rankings (attacks.registry) away from all of their captions
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from cmr_fast.attacks import registry as alone
from cmr_fast.attacks.multimodal.base import DualEncoder, ImageTower
from cmr_fast.attacks.multimodal.coattack import CoAttack
from cmr_fast.attacks.multimodal.sga import SCALES, SGA
from cmr_fast.attacks.ranking import Ranker
from cmr_fast.attacks.text.base import TextAttack
from cmr_fast.attacks.text.bert import BertAttack
from cmr_fast.attacks.text.candidates import WordModel
from cmr_fast.attacks.text.characters import CharacterAttack
from cmr_fast.attacks.text.encoder import FlatTexts, evaluating
from cmr_fast.errors import InputError

NO_WORDS = (
    "takes words from a masked language model, got none: train one with `cmr-fast train mlm`, or attack with "
    "`character`, which needs none"
)


class PairAttack(Protocol):
    """Images and captions -> adversarial ones; what an attack leaves alone comes back as it was."""

    def __call__(
        self, images: Tensor, texts: Sequence[str], image_of: object = None, *, index: object = None
    ) -> tuple[Tensor, list[str]]:
        """Like MultimodalAttack's."""


@dataclass(frozen=True)
class Setting:
    """What every maker is told: victim, masked LM if there is one, radius, seed, type of the towers, the gallery."""

    victim: DualEncoder
    mlm: WordModel | None
    eps: float
    seed: int
    dtype: torch.dtype | None
    captions: tuple[Sequence[str], Tensor] | None

    @property
    def words(self) -> WordModel:
        """The masked LM. InputError where there is none."""
        if self.mlm is None:
            raise InputError(f"this attack {NO_WORDS}")
        return self.mlm


class CaptionsAlone:
    """A text attack as a PairAttack: images stay.

    Parameters
    ----------
    attack
        On captions.
    """

    def __init__(self, attack: TextAttack) -> None:
        self.attack = attack

    def __call__(
        self, images: Tensor, texts: Sequence[str], image_of: object = None, *, index: object = None
    ) -> tuple[Tensor, list[str]]:
        """As of PairAttack; `index` numbers the images, the captions are numbered by their places."""
        return images, self.attack(texts)


class ImagesAlone:
    """An attack on rankings as a PairAttack: captions stay, each image leaves the neighbourhood of all of its own.

    Parameters
    ----------
    name
        Of `attacks.registry`, like "pgd20" or "apgd50-dlr".
    setting
        What every maker is told.
    """

    def __init__(self, name: str, setting: "Setting") -> None:
        self.name, self.setting = name, setting
        self.gallery: Tensor | None = None

    def __call__(
        self, images: Tensor, texts: Sequence[str], image_of: object = None, *, index: object = None
    ) -> tuple[Tensor, list[str]]:
        """As of PairAttack."""
        s = self.setting
        owner = torch.arange(len(texts)) if image_of is None else torch.as_tensor(image_of)
        rows = torch.arange(len(images)) if index is None else torch.as_tensor(index)
        if s.captions is None:
            gallery, relevant = self._encoded(texts), owner[None] == torch.arange(len(images))[:, None]
        else:
            if self.gallery is None:
                self.gallery = self._encoded(s.captions[0])
            gallery, relevant = self.gallery, s.captions[1][None] == rows[:, None]
        if why := alone.unfit([self.name], len(gallery), "captions in the gallery"):
            raise InputError(f"{self.name} {why[self.name]}; leave it out")
        ranker = Ranker(ImageTower(s.victim), gallery)
        atk = alone.make(
            self.name, ranker, eps=s.eps, losses=alone.RANKING, seed=s.seed, dtype=s.dtype, check=False, progress=False
        )
        assert atk is not None
        with evaluating(s.victim):
            return atk(images, relevant, index=rows), list(texts)

    def _encoded(self, texts: Sequence[str]) -> Tensor:
        encode = FlatTexts(self.setting.victim, self.setting.dtype)
        with encode.prepare():
            return encode(texts)


def _bert(objective: str, s: Setting) -> PairAttack:
    return CaptionsAlone(BertAttack(s.victim, s.words, objective=objective, dtype=s.dtype))


def _character(s: Setting) -> PairAttack:
    return CaptionsAlone(CharacterAttack(s.victim, seed=s.seed, dtype=s.dtype))


def _coattack(mode: Any, s: Setting) -> PairAttack:
    return CoAttack(s.victim, s.words, mode=mode, eps=s.eps, seed=s.seed, dtype=s.dtype)


def _sga(scales: Sequence[float], samples: int, s: Setting) -> PairAttack:
    return SGA(
        s.victim, s.words, eps=s.eps, alpha=None, scales=scales, samples=samples, seed=s.seed, dtype=s.dtype
    )  # fmt: skip


def _aligned(s: Setting) -> PairAttack:
    if s.captions is None:
        raise InputError("sa-aet looks at the captions of the gallery, got none")
    return SGA(
        s.victim, s.words, eps=s.eps, alpha=None, samples=5, corpus=s.captions[0], seed=s.seed, dtype=s.dtype
    )  # fmt: skip


MAKERS: Mapping[str, Callable[[Setting], PairAttack]] = {
    "bert-attack": partial(_bert, "kl"),
    "bert-attack-l2": partial(_bert, "l2"),
    "bert-attack-similarity": partial(_bert, "similarity"),
    "character": _character,
    "co-attack": partial(_coattack, "joint"),
    "co-attack-image": partial(_coattack, "image"),
    "co-attack-separate": partial(_coattack, "separate"),
    "sga": partial(_sga, SCALES, 0),
    "sga-single-scale": partial(_sga, (), 0),
    "dra": partial(_sga, SCALES, 5),
    "sa-aet": _aligned,
}
NAMES = ", ".join((*MAKERS, *alone.STANDARD_RANKING)) + " and the like"


def check_names(names: Sequence[str], words: bool) -> None:
    """Refuse unknown names, and attacks that change words where there are none to take.

    Parameters
    ----------
    names
        As of `make`, and "clean".
    words
        Whether there is a masked language model.

    Raises
    ------
    InputError
        As `make` would.
    """
    for name in names:
        if name not in (*MAKERS, "clean"):
            _alone(name)
        elif name not in ("character", "clean") and not words:
            raise InputError(f"{name} {NO_WORDS}")


def _alone(name: str) -> None:
    """InputError for a name that is no attack on images by rankings."""
    try:
        named = alone.read(name)
    except InputError:
        raise InputError(f"unknown attack {name!r} on images and captions, expected one of {NAMES}") from None
    if named.entry.make is None or not named.entry.rankings or named.transfer or named.restarts > 1:
        raise InputError(f"{name} is no attack on images and captions, expected one of {NAMES}")


def make(
    name: str, victim: DualEncoder, mlm: WordModel | None = None, *, eps: float = 2 / 255, seed: int = 0,
    dtype: torch.dtype | None = None, captions: tuple[Sequence[str], Tensor] | None = None,
) -> PairAttack:  # fmt: skip
    """The attack that a name stands for, with the settings of its paper; steps of images are eps / 4.

    Parameters
    ----------
    name
        One of MAKERS, or of `attacks.registry` for rankings.
    victim
        A dual encoder.
    mlm
        A masked language model; attacks that change words need one.
    eps
        Radius of the L-inf ball, of pixels from 0 to 1.
    seed
        Of what is random in it.
    dtype
        torch.bfloat16: towers run under autocast.
    captions
        All captions of the gallery, and int64 (M,), the number of each one's image, as in a call's `index`: what
        attacks on images alone see, and sa-aet. None: the captions of the call.

    Raises
    ------
    InputError
        For an unknown name, and where the masked language model is missing.
    """
    setting = Setting(victim, mlm, eps, seed, dtype, captions)
    if name in MAKERS:
        return MAKERS[name](setting)
    _alone(name)
    return ImagesAlone(name, setting)
