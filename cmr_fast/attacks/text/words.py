"""The words of a caption where they stand in it, so that a swap leaves everything else as it was written."""

import unicodedata
from collections.abc import Sequence
from functools import lru_cache
from itertools import groupby

from cmr_fast.errors import InputError

UNKNOWN = "[UNK]"  # in the place of a word whose importance is asked

_STOPS = """
    a about above across after afterwards again against ain all almost alone along already also although am among
    amongst an and another any anyhow anyone anything anyway anywhere are aren aren't around as at back been before
    beforehand behind being below beside besides between beyond both but by can cannot could couldn couldn't d didn
    didn't doesn doesn't don don't down due during either else elsewhere empty enough even ever everyone everything
    everywhere except first for former formerly from hadn hadn't hasn hasn't haven haven't he hence her here hereafter
    hereby herein hereupon hers herself him himself his how however hundred i if in indeed into is isn isn't it it's its
    itself just latter latterly least ll may me meanwhile mightn mightn't mine more moreover most mostly must mustn
    mustn't my myself namely needn needn't neither never nevertheless next no nobody none noone nor not nothing now
    nowhere o of off on once one only onto or other others otherwise our ours ourselves out over per please s same shan
    shan't she she's should've shouldn shouldn't somehow something sometime somewhere such t than that that'll the their
    theirs them themselves then thence there thereafter thereby therefore therein thereupon these they this those
    through throughout thru thus to too toward towards under unless until up upon used ve was wasn wasn't we were weren
    weren't what whatever when whence whenever where whereafter whereas whereby wherein whereupon wherever whether which
    while whither who whoever whole whom whose why with within without won won't would wouldn wouldn't y yet you you'd
    you'll you're you've your yours yourself yourselves . - / ? some " , b & ! @ % ^ * ( ) + = < > | : ; ～ ·
"""  # noqa: RUF001
STOP_WORDS = frozenset(_STOPS.split()) | {"a the"}  # what Co-Attack and SGA never swap, nor swap for


class Caption:
    """A caption as words and what stands between them.

    Parameters
    ----------
    text
        The caption.
    spaces
        Words are what single spaces part, as in Co-Attack's code. Otherwise they are the runs of letters, digits and
        marks, as BERT reads them, and punctuation belongs to none.

    Attributes
    ----------
    words
        As they stand.
    gaps
        What stands before each word and after the last one, one more than the words.
    """

    def __init__(self, text: str, *, spaces: bool = False) -> None:
        self.text = text
        if spaces:
            self.words = text.split(" ")
            self.gaps = ["", *[" "] * (len(self.words) - 1), ""]
            return
        self.words, self.gaps = [], [""]
        for within, run in groupby(text, _in_word):
            part = "".join(run)
            if within:
                self.words.append(part)
                self.gaps.append("")
            else:
                self.gaps[-1] += part

    def swapped(self, number: int, word: str, words: Sequence[str] | None = None) -> str:
        """The caption with another word in the place of one.

        Parameters
        ----------
        number
            Which word.
        word
            What stands there instead.
        words
            The other words, where they have changed.
        """
        now = list(self.words if words is None else words)
        now[number] = word
        return self.joined(now)

    def joined(self, words: Sequence[str]) -> str:
        """The caption with these words.

        Parameters
        ----------
        words
            As many as it has.
        """
        return "".join(part for pair in zip(self.gaps, [*words, ""], strict=True) for part in pair)


@lru_cache(1 << 14)
def _in_word(character: str) -> bool:
    """Neither white space nor what BERT takes for punctuation, ASCII symbols among it."""
    if character.isspace():
        return False
    ascii_symbol = character.isascii() and not character.isalnum()
    return not ascii_symbol and unicodedata.category(character)[0] not in "PCZ"


def is_word(text: str) -> bool:
    """Whether a text is one word and nothing else.

    Parameters
    ----------
    text
        Any.
    """
    return bool(text) and all(map(_in_word, text))


def check_texts(texts: object) -> list[str]:
    """Captions as a list.

    Parameters
    ----------
    texts
        As they were given.

    Raises
    ------
    InputError
        For anything but a list of texts, a text without a letter or a digit, and one with half a character.
    """
    if isinstance(texts, (str, bytes)) or not isinstance(texts, Sequence):
        raise InputError(f"texts must be a list of captions, got {type(texts).__name__}")
    for number, text in enumerate(texts):
        if not isinstance(text, str):
            raise InputError(f"texts[{number}] must be a caption, got {type(text).__name__}")
        if any("\ud800" <= character <= "\udfff" for character in text):
            raise InputError(f"texts[{number}] has half a character, a surrogate: {text!r}")
        if not any(map(_in_word, text)):
            raise InputError(f"texts[{number}] has no word: {text!r}")
    return list(texts)
