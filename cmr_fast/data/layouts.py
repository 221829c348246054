"""The names under which the field's projects keep their arrays, and how a set of arrays is told to be one of them."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from cmr_fast.errors import InputError

Names = tuple[str, ...]

SPLITS: dict[str, Names] = {
    "train": ("train", "training", "trn", "tr", "tra"),
    "valid": ("valid", "val", "validation", "va", "dev"),
    "query": ("test", "testing", "te", "query", "queries"),
    "database": ("database", "db", "retrieval", "gallery"),
}
"""The words that splits are called by. Those of valid and database are known in every layout with splits."""
WORDS = {word: split for split, words in SPLITS.items() for word in words}


@dataclass(frozen=True)
class Layout:
    """The names that a group of projects uses.

    words     split to the words that stand for it in names, preferred first; "whole" for a set that is not split. Those
              of SPLITS for valid and database need not be said
    roles     image, text, labels (and text_labels where they are kept twice) to names, preferred first, {} for the word
    database  what the test items rank where no database is named: each other ("query"), or the training items
    own_words whether the words that are said are all
    """

    name: str
    words: Mapping[str, Names]
    roles: Mapping[str, Names]
    database: str = "query"
    own_words: bool = False

    @property
    def splits(self) -> Names:
        """Those that files of this layout may hold."""
        return tuple(self.words) if self.own_words or "whole" in self.words else tuple(SPLITS)

    def names(self, split: str, role: str, first: str | None = None) -> Names:
        """Those that a split may use for a role; where `first` is one of any split's, its pattern comes first."""

        def behind(pattern: str) -> bool:
            return first not in [pattern.format(word) for split in self.splits for word in self._of(split)]

        patterns = sorted(self.roles[role], key=behind)
        return tuple(pattern.format(word) for pattern in patterns for word in self._of(split))

    def expected(self, split: str, role: str, used: set[str]) -> Names:
        """`names` of the words that the split has in the names `used`; where there are none, of those said of it."""
        words = [word for word in self._of(split) if self._has(word, used)] or self.words.get(split) or self._of(split)
        return tuple(pattern.format(word) for pattern in self.roles[role] for word in words)

    def _of(self, split: str) -> Names:
        said = self.words.get(split, ())
        more = () if self.own_words or (split in ("train", "query", "whole") and said) else SPLITS.get(split, ())
        taken = {word.casefold() for words in self.words.values() for word in words}
        return (*said, *(word for word in more if word not in taken))

    def drawn(self, names: Mapping[str, Mapping[str, str]]) -> bool:
        """Whether the training items are drawn from the database, since `names` have one and no training split."""
        return not self.own_words and "database" in names and "train" not in names

    def left_over(self, keys: Iterable[str], names: Mapping[str, Mapping[str, str]]) -> list[str]:
        """Those of `keys`, of which `names` are used, that look like a split of this layout.

        They have the word of a split in the place of it, or one for which there are image, text and labels.
        """
        used = {name for roles in names.values() for name in roles.values()}
        found: dict[str, dict[str, str]] = {}
        for role, patterns in self.roles.items():
            for pattern in patterns:
                before, slot, after = pattern.casefold().partition("{}")
                for key in keys:
                    word = key.casefold().removeprefix(before).removesuffix(after)
                    if slot and word and key not in used and before + word + after == key.casefold():
                        found.setdefault(word, {}).setdefault(role, key)
        taken = {word.casefold() for split in names for word in self._of(split) if self._has(word, used)}
        left = []
        for word, roles in found.items():
            new = any(part in WORDS and WORDS[part] not in names for part in word.split("_"))
            other = word in WORDS and word not in taken
            if new or other or {"image", "text", "labels"} <= set(roles):
                left += [roles[role] for role in self.roles if role in roles]
        return left

    def _has(self, word: str, used: set[str]) -> bool:
        folded = {name.casefold() for name in used}
        return any(pattern.format(word).casefold() in folded for role in self.roles for pattern in self.roles[role])


NATIVE = Layout(
    "cmr_fast's own .npz",
    {"train": ("train",), "query": ("query",)},
    {"image": ("{}_image",), "text": ("{}_text",), "labels": ("{}_labels",)},
)
LAYOUTS = (
    NATIVE,
    Layout(
        "one set without splits (DCMH, torchcmh, TA-DCH)",
        {"whole": ("",)},
        {
            "image": ("XAll", "FAll", "image", "images", "imgs", "IAll"),
            "text": ("YAll", "TAll", "text", "texts", "tags", "captions", "caption"),
            "labels": ("LAll", "labels", "label"),
        },
    ),
    Layout(
        "MATLAB hashing code (MIRFLICKR.mat, WIKI.mat, raw_mir.mat)",
        {"train": ("tr", "train"), "query": ("te", "test")},
        {"image": ("I_{}",), "text": ("T_{}",), "labels": ("L_{}",)},
        database="train",
    ),
    Layout(
        "LtCMH, where tra is for training and tr the retrieval set",
        {"train": ("tra",), "query": ("te",), "database": ("tr",)},
        {"image": ("I_{}",), "text": ("T_{}",), "labels": ("L_{}",)},
        database="train",
        own_words=True,
    ),
    Layout(
        "NRCH (MIRFlickr.h5, NUS-WIDE.h5)",
        {"train": ("Train",), "query": ("Query", "Test"), "database": ("DataBase",)},
        {
            "image": ("Img{}", "Image{}"),
            "text": ("Tag{}", "Txt{}", "Text{}"),
            "labels": ("Lab{}", "Label{}", "Labels{}"),
        },
    ),
    Layout(
        "XMedia",
        {"train": ("tr",), "query": ("te",)},
        {"image": ("I_{}_CNN",), "text": ("T_{}_BOW",), "labels": ("{}ImgCat",), "text_labels": ("{}TxtCat",)},
    ),
    Layout(
        "INRIA Websearch",
        {"train": ("tr",), "query": ("te",)},
        {"image": ("{}_img",), "text": ("{}_txt",), "labels": ("{}_img_lab",), "text_labels": ("{}_txt_lab",)},
    ),
    Layout(
        "DSCMR",
        {"train": ("train",), "query": ("test",)},
        {"image": ("{}_img",), "text": ("{}_txt",), "labels": ("{}_img_lab",), "text_labels": ("{}_txt_lab",)},
    ),
    Layout(
        "SDML, MRL",
        {"train": ("train",), "query": ("test",)},
        {
            "image": ("{}_imgs_deep",),
            "text": ("{}_texts", "{}_text"),
            "labels": ("{}_imgs_labels",),
            "text_labels": ("{}_texts_labels",),
        },
    ),
    Layout(
        "ACMR",
        {"train": ("train",), "query": ("test",)},
        {"image": ("{}_img_feats",), "text": ("{}_txt_vecs",), "labels": ("{}_labels",)},
    ),
    Layout(
        "DLFH, UCCH",
        {"query": ("Test",), "database": ("Database",)},
        {"image": ("V{}", "X{}"), "text": ("Y{}",), "labels": ("{}L",)},
    ),
    Layout(
        "two views of one set (X1, X2 and Y)",
        {"whole": ("",)},
        {"image": ("X1",), "text": ("X2",), "labels": ("Y", "gt", "labels", "label")},
    ),
    Layout(
        "a group for train and one for test",
        {},
        {
            "image": ("{}_image", "{}_images", "{}_img", "{}_imgs"),
            "text": ("{}_text", "{}_texts", "{}_txt", "{}_tags", "{}_captions"),
            "labels": ("{}_labels", "{}_label", "{}_lab"),
        },
    ),
)
_NOT_DATA = {
    ("Qi", "Qt", "Di", "Dt"): "saved hash codes; evaluate_codes measures them",
    ("q_img", "q_txt", "r_img", "r_txt"): "saved hash codes; evaluate_codes measures them",
    ("index", "caption"): "paths of images and their captions (DCHMT), not features; encode them first and save image, "
    "text and labels in one .npz",
}


def recognise(keys: Iterable[str], wanted: Mapping[str, str | None]) -> tuple[Layout, dict[str, dict[str, str]]]:
    """The layout that arrays of these names belong to, and the name for each of its splits and roles.

    wanted: role to the name that is to be taken for it where several would do; case does not matter in the files.
    Raises InputError naming what is missing from the layout that fits best, or what looks like one more split.
    """
    folded: dict[str, list[str]] = {}
    for array in keys:
        folded.setdefault(array.casefold(), []).append(array)
    every = sorted(key for alike in folded.values() for key in alike)
    here = ", ".join(every[:12]) + (", …" if len(every) > 12 else "") or "nothing"
    fits = [_fit(layout, folded, wanted) for layout in LAYOUTS]
    # the complete ones first, then by the number of arrays found
    layout, names, missing = max(fits, key=lambda fit: (not fit[2], sum(map(len, fit[1].values()))))
    if not missing:
        # what belongs to a split with parts missing is not left out without a word, see LtCMH
        used = _arrays(names)
        more = [fit for fit in fits if _arrays(fit[1]) > used]
        layout, names, missing = max(more, key=lambda fit: len(_arrays(fit[1])), default=(layout, names, missing))
    if missing:
        for signs, what in _NOT_DATA.items():
            if all(sign.casefold() in folded for sign in signs):
                raise InputError(f"holds {here}: {what}")
        if all(set(roles) <= {"labels"} for roles in names.values()):
            own = "image, text and labels, or train_image, train_text, …, query_labels"
            raise InputError(f"no known names among its arrays ({here}); the simplest layout is one .npz of {own}")
        raise InputError(
            f"looks like {layout.name}, but has no {', no '.join(missing)}; it holds {here}. "
            "If they are in other files, put these in one folder and give that"
        )
    for role, key in wanted.items():
        if key is not None and not any(key == chosen.get(role) for chosen in names.values()):
            raise InputError(f"{role}={key!r} is not among the names for the {role} of {layout.name}; it holds {here}")
    for found in sorted(_arrays(names) - set(wanted.values())):
        if len(alike := folded[found.casefold()]) > 1:
            raise InputError(f"{' and '.join(alike)} differ in case only: cannot tell which is meant; keep one of them")
    left = layout.left_over(every, names)
    if "whole" in names:
        splits = [roles for _, parts, _ in fits for split, roles in parts.items() if split != "whole"]
        whole = [roles for roles in splits if {"image", "text", "labels"} <= set(roles)]
        left = sorted({name for roles in whole for name in roles.values()} - _arrays(names))
    if left:
        taken = ", ".join(f"{roles['image']} for {split}" for split, roles in names.items())
        raise InputError(
            f"{', '.join(left)}: looks like one more split of {layout.name}, but which? Taken would be {taken}. "
            f"A database is called {', '.join(SPLITS['database'])}; a validation split {', '.join(SPLITS['valid'])}; "
            "what is neither belongs in another file"
        )
    return layout, names


def _arrays(names: Mapping[str, Mapping[str, str]]) -> set[str]:
    return {name for roles in names.values() for name in roles.values()}


def _fit(
    layout: Layout, folded: Mapping[str, list[str]], wanted: Mapping[str, str | None]
) -> tuple[Layout, dict[str, dict[str, str]], list[str]]:
    """What a layout finds of its names: split and role to name; and what it misses, in words."""
    result: dict[str, dict[str, str]] = {}
    for split in layout.splits:
        chosen = {}
        for role in layout.roles:
            names = layout.names(split, role, wanted.get(role))
            present = [folded[name.casefold()] for name in names if name.casefold() in folded]
            if present:
                chosen[role] = next((key for key in present[0] if key == wanted.get(role)), present[0][0])
        if chosen:
            result[split] = chosen
    needed = {"whole"} if "whole" in layout.words else {"query"} if layout.drawn(result) else {"train", "query"}
    missing = []
    for split in layout.splits:
        if split in result or split in needed:
            lacking = [role for role in ("image", "text", "labels") if role not in result.get(split, {})]
            what = "" if split == "whole" else f"{split} "
            used = set(result.get(split, {}).values())
            missing += [f"{what}{role} ({' or '.join(layout.expected(split, role, used))})" for role in lacking]
    return layout, result, missing
