"""Augmentation: EDA of captions (Wei and Zou 2019), RandAugment of images in ALBEF's form.

    replace   n words, none of them a stop word, everywhere in the caption by a synonym
    insert    n times a synonym of some word at a random place
    swap      n times two words
    delete    each word with probability alpha, but never all

with n = max(1, int(alpha length)). Unlike the authors' code it leaves digits, case and punctuation of the other words
as they are, draws from generators of its own, repeats from run to run, and takes captions of any length. Synonyms are
WordNet's, read from its files, or what a masked language model finds to fit.
"""

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
from torch import Tensor

from cmr_fast.data._checks import check_count
from cmr_fast.errors import InputError

OPERATIONS = ("replace", "insert", "swap", "delete")
Synonyms = Callable[[Sequence[str], int], Sequence[str]]  # (words, which one) -> words or phrases for it
_STOPS = """
i me my myself we our ours ourselves you your yours yourself yourselves he him his himself she her hers herself it its
itself they them their theirs themselves what which who whom this that these those am is are was were be been being have
has had having do does did doing a an the and but if or because as until while of at by for with about against between
into through during before after above below to from up down in out on off over under again further then once here
there when where why how all any both each few more most other some such no nor not only own same so than too very
s t can will just don should now
"""
STOP_WORDS = frozenset(_STOPS.split())  # of EDA's code


class EDA:
    """Easy data augmentation of captions: `more = EDA(synonyms=WordNet())(captions)`, a list of texts for each.

    Parameters
    ----------
    alpha
        Share of a caption's words that an operation changes.
    count
        Texts for each caption; each operation makes its share of them, which texts are kept is drawn.
    synonyms
        (words, which one) -> synonyms, as WordNet and MaskedSynonyms have it; or a mapping of lower-case words. None:
        only swap and delete.
    operations
        Of OPERATIONS; those without synonyms to draw on may not be asked for.
    seed
        Of the draws, which depend on it and on a caption's `index`, and on nothing else.

    Raises
    ------
    InputError
        For settings out of their range.

    Notes
    -----
    Wei and Zou 2019, "EDA: easy data augmentation techniques for boosting performance on text classification tasks",
    section 2; their defaults. MAT's are alpha 0.3 and count 4.
    """

    def __init__(
        self,
        alpha: float = 0.1,
        count: int = 9,
        *,
        synonyms: Synonyms | Mapping[str, Sequence[str]] | None = None,
        operations: Sequence[str] | None = None,
        seed: int = 0,
    ) -> None:
        if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not 0 < alpha <= 1:
            raise InputError(f"alpha must be a number above 0 and at most 1, got {alpha!r}")
        if operations is None:
            operations = OPERATIONS if synonyms is not None else ("swap", "delete")
        if isinstance(operations, str) or not operations or not set(operations) <= set(OPERATIONS):
            raise InputError(f"operations must be some of {', '.join(OPERATIONS)}, got {operations!r}")
        if synonyms is None and not {"replace", "insert"}.isdisjoint(operations):
            raise InputError("replace and insert draw on synonyms: pass synonyms=WordNet(FOLDER) or another source")
        if synonyms is not None and not isinstance(synonyms, Mapping) and not callable(synonyms):
            raise InputError(f"synonyms must be a function or a mapping, got {type(synonyms).__name__}")
        self.alpha, self.count = float(alpha), check_count("count", count)
        self.operations, self.seed = tuple(operations), check_count("seed", seed, least=0)
        self._synonyms = synonyms

    def __call__(self, texts: Sequence[str], index: Sequence[int] | None = None) -> list[list[str]]:
        """`count` texts for each caption.

        Parameters
        ----------
        texts
            Captions.
        index
            Numbers that a caption's draws depend on. None: their places.

        Returns
        -------
        list of list of str
            Some may equal the caption, where nothing in it can be changed.

        Raises
        ------
        InputError
            For anything but a list of texts that have words.
        """
        if isinstance(texts, str) or not isinstance(texts, Sequence):
            raise InputError(f"texts must be a list of captions, got {type(texts).__name__}")
        numbers = range(len(texts)) if index is None else list(index)
        if len(numbers) != len(texts):
            raise InputError(f"index must have a number for each of {len(texts)} texts, got {len(numbers)}")
        for place, text in enumerate(texts):
            if not isinstance(text, str) or not text.split():
                raise InputError(f"texts[{place}] must be a text with a word, got {text!r}")
        return [self._augmented(text.split(), int(number)) for text, number in zip(texts, numbers, strict=True)]

    def _augmented(self, words: list[str], number: int) -> list[str]:
        random = np.random.default_rng([self.seed, number])
        each = self.count // len(self.operations) + 1
        made = [" ".join(getattr(self, f"_{name}")(words, random)) for name in self.operations for _ in range(each)]
        return [made[i] for i in random.permutation(len(made))[: self.count]]

    def _times(self, words: list[str]) -> int:
        return max(1, int(self.alpha * len(words)))

    def _known(self, words: Sequence[str], which: int) -> list[str]:
        """Synonyms of a word, the word itself left out."""
        core = _core(words[which])
        if isinstance(self._synonyms, Mapping):
            known: Sequence[str] = self._synonyms.get(core, ())
        else:
            assert self._synonyms is not None
            known = self._synonyms(words, which) if core else ()
        return [word for word in dict.fromkeys(known) if word.lower() != core]

    def _replace(self, words: list[str], random: np.random.Generator) -> list[str]:
        cores = [_core(word) for word in words]
        places = {core: i for i, core in reversed(list(enumerate(cores))) if core and core not in STOP_WORDS}
        now, changed = list(words), 0
        for core in [list(places)[i] for i in random.permutation(len(places))]:
            known = self._known(words, places[core])
            if not known:
                continue
            synonym = known[random.integers(len(known))]
            now = [_with(word, synonym) if c == core else word for word, c in zip(now, cores, strict=True)]
            changed += 1
            if changed == self._times(words):
                break
        return now

    def _insert(self, words: list[str], random: np.random.Generator) -> list[str]:
        now = list(words)
        for _ in range(self._times(words)):
            for _ in range(10):  # tries, as in their code
                known = self._known(words, int(random.integers(len(words))))
                if known:
                    now.insert(int(random.integers(len(now) + 1)), known[random.integers(len(known))])
                    break
        return now

    def _swap(self, words: list[str], random: np.random.Generator) -> list[str]:
        now = list(words)
        for _ in range(self._times(words) if len(words) > 1 else 0):
            i, j = random.choice(len(now), 2, replace=False)
            now[i], now[j] = now[j], now[i]
        return now

    def _delete(self, words: list[str], random: np.random.Generator) -> list[str]:
        kept = [word for word, u in zip(words, random.random(len(words)), strict=True) if u > self.alpha]
        if any(any(map(str.isalnum, word)) for word in kept):
            return kept
        spoken = [word for word in words if any(map(str.isalnum, word))] or words  # "." alone is no caption
        return [spoken[random.integers(len(spoken))]]


def _core(word: str) -> str:
    """A word in lower case without the punctuation around it."""
    return word.lower().strip(".,;:!?\"'()[]")


def _with(word: str, synonym: str) -> str:
    """A synonym in the place of a word, with the punctuation that is around it."""
    core = _core(word)
    start = word.lower().index(core)
    return word[:start] + synonym + word[start + len(core) :]


class WordNet:
    """Synonyms of WordNet's own files: data.* and index.* of its four parts of speech, *.exc where they are.

    Parameters
    ----------
    folder
        WordNet's dict folder, such as /usr/share/wordnet of Debian's package wordnet-base.

    Raises
    ------
    InputError
        Where it has not all eight of them, and for files of another form.
    """

    PARTS = ("noun", "verb", "adj", "adv")
    # Morphy's rules (WordNet's morphy(7WN)): an ending, and what stands in its place
    ENDINGS: ClassVar[Mapping[str, tuple[tuple[str, str], ...]]] = {
        "noun": (("s", ""), ("ses", "s"), ("xes", "x"), ("zes", "z"), ("ches", "ch"), ("shes", "sh"), ("men", "man"),
                 ("ies", "y")),
        "verb": (("s", ""), ("ies", "y"), ("es", "e"), ("es", ""), ("ed", "e"), ("ed", ""), ("ing", "e"), ("ing", "")),
        "adj": (("er", ""), ("est", ""), ("er", "e"), ("est", "e")),
        "adv": (),
    }  # fmt: skip

    def __init__(self, folder: str | Path = "/usr/share/wordnet") -> None:
        self.folder = Path(folder)
        missing = [
            n for part in self.PARTS for n in (f"index.{part}", f"data.{part}") if not (self.folder / n).is_file()
        ]
        if missing:
            raise InputError(f"{folder}: lacks {', '.join(missing[:3])}: expected WordNet's dict folder (wordnet-base)")
        self._index = {part: self._indexed(part) for part in self.PARTS}
        self._data = {part: (self.folder / f"data.{part}").read_bytes() for part in self.PARTS}
        self._irregular = {part: self._exceptions(part) for part in self.PARTS}

    def __call__(self, words: Sequence[str], which: int) -> list[str]:
        """Synonyms of a word: the lemmas of all its synsets, in WordNet's order, the word itself left out.

        Parameters
        ----------
        words, which
            A text, and which of its words.
        """
        return self.synonyms(_core(words[which]))

    def synonyms(self, word: str) -> list[str]:
        """The same of a word alone, in lower case.

        Parameters
        ----------
        word
            Lower-case.
        """
        found = dict.fromkeys(
            lemma
            for part in self.PARTS
            for base in self._bases(word, part)
            for offset in self._index[part][base]
            for lemma in self._lemmas(part, offset)
        )
        return [lemma for lemma in found if lemma != word]

    def _bases(self, word: str, part: str) -> list[str]:
        forms = [word, *self._irregular[part].get(word, ())]
        forms += [word[: -len(end)] + new for end, new in self.ENDINGS[part] if word.endswith(end)]
        return [form for form in dict.fromkeys(forms) if form in self._index[part]]

    def _lines(self, name: str) -> list[str]:
        lines = (self.folder / name).read_text("utf-8", errors="replace").splitlines()
        return [line for line in lines if line and not line.startswith("  ")]  # the licence is indented

    def _indexed(self, part: str) -> dict[str, list[int]]:
        """Lemma -> where its synsets stand."""
        index = {}
        try:
            for line in self._lines(f"index.{part}"):
                fields = line.split()
                index[fields[0]] = [int(offset) for offset in fields[-int(fields[2]) :]]
        except (ValueError, IndexError) as error:
            raise InputError(f"{self.folder / f'index.{part}'}: not an index of WordNet ({line[:60]!r})") from error
        return index

    def _exceptions(self, part: str) -> dict[str, list[str]]:
        if not (self.folder / f"{part}.exc").is_file():
            return {}
        return {fields[0]: fields[1:] for line in self._lines(f"{part}.exc") if (fields := line.split())}

    def _lemmas(self, part: str, offset: int) -> list[str]:
        data = self._data[part]
        fields = data[offset : max(offset, data.find(b"\n", offset))].decode("utf-8", "replace").split()
        try:
            if int(fields[0]) != offset:
                raise ValueError(fields[0])
            words = fields[4 : 4 + 2 * int(fields[3], 16) : 2]
        except (ValueError, IndexError) as error:
            raise InputError(
                f"{self.folder / f'data.{part}'}: has no synset at {offset}, where the index says"
            ) from error
        return [
            word.partition("(")[0].replace("_", " ").lower() for word in words
        ]  # "able(p)": a place in the sentence


class _Masked(Protocol):
    """What of a masked language model is needed (models.mlm.MaskedLM has it)."""

    mask: int
    context: int

    @property
    def ends(self) -> tuple[int, int]: ...

    @property
    def device(self) -> torch.device: ...

    def pieces(self, words: Sequence[str]) -> list[list[int]]: ...

    def word(self, pieces: Sequence[int]) -> str | None: ...

    def hidden(self, ids: Tensor, mask: Tensor) -> Tensor: ...

    def logits(self, hidden: Tensor) -> Tensor: ...


class MaskedSynonyms:
    """What a masked language model would put in the place of a word of a text: no synonyms, but words that fit there.

    Parameters
    ----------
    mlm
        As of cmr_fast.models.mlm.MaskedLM.load, in evaluation mode.
    k
        Of its likeliest pieces; those that are whole words are kept.
    """

    def __init__(self, mlm: _Masked, k: int = 10) -> None:
        self.mlm, self.k = mlm, check_count("k", k)

    @torch.no_grad()
    def __call__(self, words: Sequence[str], which: int) -> list[str]:
        """Words for one of a text's, the likeliest first.

        Parameters
        ----------
        words, which
            A text, and which of its words; none for a text longer than the model's context.
        """
        pieces = self.mlm.pieces(words)
        first, last = self.mlm.ends
        before = [first, *(piece for word in pieces[:which] for piece in word)]
        after = [*(piece for word in pieces[which + 1 :] for piece in word), last]
        if len(before) + 1 + len(after) > self.mlm.context:
            return []
        ids = torch.tensor([[*before, self.mlm.mask, *after]], device=self.mlm.device)
        hidden = self.mlm.hidden(ids, torch.ones_like(ids, dtype=torch.bool))[0, len(before)]
        likeliest = self.mlm.logits(hidden).topk(self.k).indices.tolist()
        found = [self.mlm.word([piece]) for piece in likeliest]
        return [word for word in found if word is not None and word.isalnum()]


class RandAugment:
    """Random augmentation of images as ALBEF has it: `more = RandAugment(2, 7)(images)`.

    `count` operations with replacement out of OPERATIONS, each applied with probability 0.5, at one fixed level:

        brightness, sharpness    factor 0.1 + 1.8 level / 10: at level 5 it is 1, and they do nothing (MAT's level)
        shear, translate, rotate by 0.3, 10 pixels and 30 degrees times level / 10, to either side; what comes in is 128

    Parameters
    ----------
    count
        Operations an image. ALBEF and MAT take 2.
    level
        From 0 to 10. ALBEF takes 7, MAT 5.
    seed
        Of the draws, which depend on it and on an image's `index`, and on nothing else.

    Raises
    ------
    InputError
        For settings out of their range, and where Pillow is missing.

    Attributes
    ----------
    no_ops
        The operations that change nothing at this level.

    Notes
    -----
    Li et al. 2021, "Align before fuse", in the form of their code; Cubuk et al. 2020, "RandAugment". It takes and gives
    bytes, so there is no gradient through it.
    """

    OPERATIONS = (
        *("identity", "autocontrast", "equalize", "brightness", "sharpness"),
        *("shear x", "shear y", "translate x", "translate y", "rotate"),
    )

    def __init__(self, count: int = 2, level: float = 7, *, seed: int = 0) -> None:
        if isinstance(level, bool) or not isinstance(level, int | float) or not 0 <= level <= 10:
            raise InputError(f"level must be a number from 0 to 10, got {level!r}")
        if importlib.util.find_spec("PIL") is None:
            raise InputError("RandAugment needs Pillow: pip install pillow")
        self.count, self.level = check_count("count", count, least=0), float(level)
        self.seed = check_count("seed", seed, least=0)
        self.factor = 0.1 + 1.8 * self.level / 10
        still = ("brightness", "sharpness") if abs(self.factor - 1) < 1e-9 else ()
        moved = self.OPERATIONS[5:] if not self.level else ()
        self.no_ops = ("identity", *still, *moved)

    def __call__(self, images: Tensor, index: Sequence[int] | None = None) -> Tensor:
        """Augmented images.

        Parameters
        ----------
        images
            uint8 (N, 3, H, W).
        index
            Numbers that an image's draws depend on. None: their places.

        Returns
        -------
        Tensor
            uint8 (N, 3, H, W).

        Raises
        ------
        InputError
            For images of another kind.
        """
        from PIL import Image

        if not isinstance(images, Tensor) or images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
            seen = f"{images.dtype} {tuple(images.shape)}" if isinstance(images, Tensor) else type(images).__name__
            raise InputError(f"images must be uint8 (N, 3, H, W), got {seen}")
        numbers = range(len(images)) if index is None else list(index)
        if len(numbers) != len(images):
            raise InputError(f"index must have a number for each of {len(images)} images, got {len(numbers)}")
        out = torch.empty_like(images)
        for row, number in enumerate(numbers):
            random = np.random.default_rng([self.seed, int(number)])
            image = Image.fromarray(images[row].permute(1, 2, 0).contiguous().cpu().numpy())
            for which in random.integers(len(self.OPERATIONS), size=self.count):
                applied, sign = random.random(2) < 0.5
                if applied:
                    image = self.apply(image, self.OPERATIONS[which], -1 if sign else 1)
            out[row] = torch.from_numpy(np.array(image)).permute(2, 0, 1)
        return out

    def apply(self, image: Any, operation: str, sign: int = 1) -> Any:
        """One operation on a Pillow image.

        Parameters
        ----------
        image
            Of mode RGB.
        operation
            Of OPERATIONS.
        sign
            1 or -1: to which side it is sheared, moved or turned.
        """
        from PIL import Image, ImageEnhance, ImageOps

        if operation in self.no_ops:
            return image
        if operation in ("autocontrast", "equalize"):
            return getattr(ImageOps, operation)(image)
        if operation in ("brightness", "sharpness"):
            return getattr(ImageEnhance, operation.capitalize())(image).enhance(self.factor)
        share, grey = sign * self.level / 10, (128, 128, 128)
        if operation == "rotate":
            return image.rotate(30 * share, Image.Resampling.BILINEAR, fillcolor=grey)
        shear, move = 0.3 * share, 10 * share
        matrix = {
            "shear x": (1, shear, 0, 0, 1, 0),
            "shear y": (1, 0, 0, shear, 1, 0),
            "translate x": (1, 0, move, 0, 1, 0),
            "translate y": (1, 0, 0, 0, 1, move),
        }[operation]
        return image.transform(image.size, Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR, fillcolor=grey)


def random_crops(images: Tensor, least: float, *, seed: int = 0, index: Sequence[int] | None = None) -> Tensor:
    """A part of each image scaled to the size of the whole: of `least` to all of its area, sides from 3:4 to 4:3.

    Parameters
    ----------
    images
        uint8 (N, 3, H, W).
    least
        Above 0, at most 1.
    seed
        Of the draws, which depend on it and on an image's `index`, and on nothing else.
    index
        Numbers that an image's draws depend on. None: their places.

    Returns
    -------
    Tensor
        uint8 (N, 3, H, W).

    Raises
    ------
    InputError
        For a share out of its range.

    Notes
    -----
    torchvision's RandomResizedCrop, bicubic as ALBEF has it: area and logarithm of the sides' ratio are uniform; where
    ten draws do not fit into the image, it stays whole.
    """
    from PIL import Image

    if not 0 < least <= 1:
        raise InputError(f"least must be a share of the area above 0 and at most 1, got {least!r}")
    out = images.clone()
    height, width = images.shape[2:]
    for row, number in enumerate(range(len(images)) if index is None else index):
        random = np.random.default_rng([seed, int(number), 1])
        for _ in range(10):
            area = height * width * random.uniform(least, 1)
            ratio = np.exp(random.uniform(np.log(3 / 4), np.log(4 / 3)))
            w, h = round(float(np.sqrt(area * ratio))), round(float(np.sqrt(area / ratio)))
            if 0 < w <= width and 0 < h <= height:
                x, y = int(random.integers(width - w + 1)), int(random.integers(height - h + 1))
                image = Image.fromarray(images[row].permute(1, 2, 0).contiguous().cpu().numpy())
                part = image.resize((width, height), Image.Resampling.BICUBIC, box=(x, y, x + w, y + h))
                out[row] = torch.from_numpy(np.array(part)).permute(2, 0, 1)
                break
    return out
