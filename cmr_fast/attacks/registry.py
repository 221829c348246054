"""What attacks are called: one name, one maker, for classifiers and for rankings.

    pgd20            N stands for a number of steps, as of pgdN
    apgd-dlr         APGD takes 100 steps unless its name says otherwise: apgd50-dlr
    transfer-pgd20   crafted on a surrogate
    pgd100x5         the same with 5 restarts

Only the loss differs between a classifier and a ranking. An attack is added by a line in ENTRIES.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Unpack

from cmr_fast.attacks.adapters import FAB, Square
from cmr_fast.attacks.apgd import APGD, APGDT
from cmr_fast.attacks.base import Attack, Options
from cmr_fast.attacks.losses import Loss, ranking_ce, ranking_dlr, ranking_margin
from cmr_fast.attacks.pgd import CW, FGSM, MIFGSM, PGD
from cmr_fast.attacks.search import LocalSearch
from cmr_fast.attacks.transfer import Transfer
from cmr_fast.attacks.victim import Model
from cmr_fast.errors import InputError
from cmr_fast.ops.pgd import Value

CLASSIFIER: Mapping[str, str | Loss] = {"ce": "ce", "margin": "cw", "dlr": "dlr"}
RANKING: Mapping[str, str | Loss] = {"ce": ranking_ce, "margin": ranking_margin, "dlr": ranking_dlr}


@dataclass(frozen=True)
class Entry:
    """What a name stands for.

    Attributes
    ----------
    make
        (model, eps=, loss=, ...) -> attack; None leaves the samples as they are.
    loss
        Its name in CLASSIFIER and RANKING.
    number
        The keyword that N is.
    settings
        Further keywords.
    classes
        How many the classifier must have, or items the gallery.
    slow
        Thousands of queries a sample, and no gradient in 16 bits.
    blind
        Asks the model under attack for no gradient.
    rankings
        Whether it attacks rankings too.
    in_ball
        Whether it keeps to the radius; what does not is no part of a worst case within it.
    words
        What its name does not say.
    """

    make: Callable[..., Attack] | None
    loss: str = "ce"
    number: str = "steps"
    settings: Mapping[str, Any] = field(default_factory=dict)
    classes: int = 2
    slow: bool = False
    blind: bool = False
    rankings: bool = True
    in_ball: bool = True
    words: str = ""


_STEPS = {"alpha": None}
ENTRIES: Mapping[str, Entry] = {
    "clean": Entry(None),
    "fgsm": Entry(FGSM),
    "fgsm-random": Entry(FGSM, settings={"random_start": True}, rankings=False, words="from a random start"),
    "pgdN": Entry(PGD, settings=_STEPS),
    "cwN": Entry(CW, "margin", settings=_STEPS),
    "mifgsmN": Entry(MIFGSM, settings=_STEPS),
    "targetedN": Entry(PGD, settings={**_STEPS, "targeted": "random"}, rankings=False, words="random targets"),
    "noiseN": Entry(
        PGD, number="restarts", settings={**_STEPS, "steps": 0}, blind=True, words="the worst of N random points"
    ),
    "apgd-ce": Entry(APGD),
    "apgd-dlr": Entry(APGD, "dlr", classes=3),
    "apgd-t": Entry(APGDT, "dlr", classes=4, rankings=False),
    "apgdN-ce": Entry(APGD),
    "apgdN-dlr": Entry(APGD, "dlr", classes=3),
    "apgdN-t": Entry(APGDT, "dlr", classes=4, rankings=False),
    "local-search": Entry(LocalSearch, settings={"rounds": 30}, slow=True, blind=True),
    "local-search-pixels": Entry(
        LocalSearch,
        settings={"eps": None},
        slow=True,
        blind=True,
        rankings=False,
        in_ball=False,
        words="as its paper has it: few pixels, by any amount",
    ),
    "square": Entry(Square, slow=True, blind=True, rankings=False, words="torchattacks'"),
    "fab": Entry(FAB, slow=True, rankings=False, words="torchattacks'"),
}
TRANSFERRED = ("pgdN", "cwN")
NAMES = (
    ", ".join(f"{name} ({entry.words})" if entry.words else name for name, entry in ENTRIES.items())
    + f", {' and '.join(f'transfer-{name}' for name in TRANSFERRED)} (with a surrogate)"
    + "; N steps, xR after a name for R restarts"
)
STANDARD = (
    *("clean", "fgsm", "pgd20", "pgd100x5", "cw20", "cw100x5", "apgd-ce", "apgd-dlr", "apgd-t"),
    *("transfer-pgd20", "transfer-pgd100", "transfer-cw20", "transfer-cw100", "local-search"),
)
STANDARD_RANKING = ("pgd20", "cw20", "apgd50-ce", "apgd50-dlr")


@dataclass(frozen=True)
class Named:
    """A name that was read.

    Attributes
    ----------
    name
        As it was given.
    entry
        What it stands for.
    number
        Its N, or None.
    restarts
        Its R, 1 unless said.
    transfer
        Whether it is crafted on a surrogate.
    """

    name: str
    entry: Entry
    number: int | None
    restarts: int
    transfer: bool

    @property
    def blind(self) -> bool:
        """Whether it sees no gradient of the model under attack."""
        return self.entry.blind or self.transfer


def read(name: str) -> Named:
    """What a name stands for.

    Parameters
    ----------
    name
        Like "pgd20", "apgd-dlr", "transfer-cw100", "cw100x5".

    Raises
    ------
    InputError
        For an unknown name, with those that there are.
    """
    matched = re.fullmatch(r"(transfer-)?([a-z-]+?)([1-9]\d*)?(-[a-z]+)?(?:x([1-9]\d*))?", str(name))
    if matched:
        key = f"{matched[2]}{'N' if matched[3] else ''}{matched[4] or ''}"
        if key in ENTRIES and (not matched[1] or key in TRANSFERRED):
            number = int(matched[3]) if matched[3] else None
            return Named(name, ENTRIES[key], number, int(matched[5] or 1), bool(matched[1]))
    raise InputError(f"unknown attack {name!r}, expected one of {NAMES}")


def make(
    name: str,
    model: Model,
    *,
    eps: Value,
    losses: Mapping[str, str | Loss] = CLASSIFIER,
    surrogate: Model | None = None,
    **options: Unpack[Options],
) -> Attack | Transfer | None:
    """The attack that a name stands for, without its restarts; steps are eps / 4.

    Parameters
    ----------
    name
        As of `read`.
    model
        The model under attack.
    eps
        Radius of the ball, in the units of the inputs.
    losses
        CLASSIFIER or RANKING: what "ce", "margin" and "dlr" are for this kind of model.
    surrogate
        What transfer attacks are crafted on.
    options
        norm, bounds, normalize, dtype, seed, check, progress, ...: as of PGD.

    Returns
    -------
    Attack, Transfer or None
        None for "clean".

    Raises
    ------
    InputError
        For an unknown name, a transfer without a surrogate, an attack that rankings do not have.
    """
    named = read(name)
    entry = named.entry
    if entry.make is None:
        return None
    if losses is RANKING and not entry.rankings:
        raise InputError(f"{name} attacks classifiers; rankings have {', '.join(STANDARD_RANKING)} and the like")
    if "loss" in options:
        raise InputError(f"the loss of {name} is in its name; expected no loss beside it, got {options['loss']!r}")
    settings: dict[str, Any] = {**{"eps": eps}, **entry.settings, **options}
    if named.number is not None:
        settings[entry.number] = named.number
    if not (losses is CLASSIFIER and entry.loss in ("ce", "margin")):  # those are the attacks' own
        settings["loss"] = losses[entry.loss]
    if entry.slow:
        settings.pop("dtype", None)
    if named.transfer:
        if surrogate is None:
            raise InputError(f"{name} is crafted on another model: expected a surrogate, got none")
        return Transfer(model, surrogate, entry.make, **settings)
    return entry.make(model, **settings)


def check_names(names: Iterable[str]) -> None:
    """Refuse unknown and repeated names, and none at all.

    Parameters
    ----------
    names
        As of `read`.

    Raises
    ------
    InputError
        For these.
    """
    if isinstance(names, (str, bytes)) or not isinstance(names, Iterable):
        raise InputError(f"attacks must be a list of names, got {names!r}")
    names = list(names)
    if not names:
        raise InputError(f"expected at least one attack of {NAMES}, got none")
    for name in names:
        read(name)
    if len(set(names)) != len(names):
        raise InputError(f"each attack can be named once, got {' '.join(names)}")


def unfit(names: Sequence[str], classes: int, what: str = "classes") -> dict[str, str]:
    """Those of the attacks that a model of so few classes, or a gallery of so few items, rules out.

    Parameters
    ----------
    names
        As of `read`.
    classes
        How many.
    what
        Their name in the plural.

    Returns
    -------
    dict of str
        The reason by name.
    """
    least = {name: read(name).entry.classes for name in names}
    return {n: f"needs at least {least[n]} {what}, there are {classes}" for n in names if least[n] > classes}
