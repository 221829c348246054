"""The character attack, one edit of 50 places and 50 characters, against LEAF's loop: same victim, draws and picks.

Their loop makes the texts of a batch of captions one by one, and encodes them all padded to CLIP's 77 tokens, twice.
Needs what bert_attack.py needs but for the masked LM.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from cmr_fast.attacks import CharacterAttack
from cmr_fast.attacks.problem import STREAM
from cmr_fast.attacks.text.characters import ALPHABET
from cmr_fast.errors import InputError
from cmr_fast.models.text import minilm
from cmr_fast.ops.pgd import pgd_noise

from .bert_attack import Victim, captions
from .common import Comparison, SkipNotImplemented, cost

COUNT, QUICK, TRIES, LENGTH = 3, 2, 50, 77


def generate(text: str, place: int, character: str) -> str:
    """LEAF's generate_sentence, of one change."""
    spread = [c for c in "".join(["_" + c for c in text] + ["_"])]
    kept = [0, 1] * len(text) + [0]
    if character and spread[place] == character and kept[place]:
        kept[place] = 0
    elif character:
        spread[place], kept[place] = character, 1
    else:
        kept[place] = 0
    return "".join(c if kept[i] else "" for i, c in enumerate(spread))


def draws(count: int, number: int, stream: int) -> list[int]:
    """What ours draws, in the place of np.random.choice without a seed."""
    noise = pgd_noise(torch.tensor([number]), count, seed=stream * STREAM % 2**64)[0]
    return noise.argsort(stable=True)[:TRIES].tolist()


@torch.no_grad()
def port(victim: Victim, texts: Sequence[str]) -> list[str]:
    clean = victim.padded(texts, LENGTH)
    places = [draws(2 * len(text) + 1, i, 0) for i, text in enumerate(texts)]
    probed = [[generate(text, z, " ") for z in some] for text, some in zip(texts, places, strict=True)]
    best = [some[i] for some, i in zip(places, picked(victim, probed, clean), strict=True)]
    letters = [draws(len(ALPHABET), i, 1) for i in range(len(texts))]
    tried = [[generate(text, z, ALPHABET[u]) for u in some] for text, z, some in zip(texts, best, letters, strict=True)]
    return [some[i] for some, i in zip(tried, picked(victim, tried, clean), strict=True)]


def picked(victim: Victim, texts: Sequence[Sequence[str]], clean: Tensor) -> list[int]:
    vectors = victim.padded([text for some in texts for text in some], LENGTH).split([len(some) for some in texts])
    return [int((v - c).square().sum(-1).argmax()) for v, c in zip(vectors, clean, strict=True)]


def problem(count: int) -> tuple[Victim, list[str]]:
    return Victim(str(minilm())).eval(), captions(count)


def ours(victim: Victim, texts: list[str]) -> Callable[[], list[str]]:
    return lambda: CharacterAttack(victim, tries=TRIES)(texts)


def comparison(count: int) -> Comparison:
    victim, texts = problem(count)
    mine, theirs = ours(victim, texts), partial(port, victim, texts)

    def check() -> None:
        apart = sum(x != y for x, y in zip(mine(), theirs(), strict=True))
        assert not apart, f"{apart} of {count} captions differ"

    return Comparison(
        name=f"character attack, one edit, {2 * TRIES} texts a caption, {count} captions",
        alternative=f"port of LEAF's loop, padded to {LENGTH}",
        ours=mine,
        theirs=theirs,
        check=check,
        work=count,
        unit="captions",
    )


def comparisons(quick: bool = False) -> list[Comparison]:
    try:
        return [comparison(QUICK if quick else COUNT)]
    except (InputError, ImportError):  # the package or the captions are not here
        return []


class CharacterAttackCaptions:
    """Lower is better: seconds, and our time as a share of the port's."""

    version = "1"
    timeout = 900

    def setup(self) -> None:
        try:
            self.attack = ours(*problem(QUICK))
        except (InputError, ImportError) as error:
            raise SkipNotImplemented(str(error)) from error

    def time_attack(self) -> None:
        self.attack()

    def track_time_over_port(self) -> float:
        return cost(lambda: comparison(QUICK), 3)

    track_time_over_port.unit = "ours / port"
