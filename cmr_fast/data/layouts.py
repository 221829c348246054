"""The names under which the field's projects keep their arrays, and how a set of arrays is told to be one of them."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from cmr_fast.errors import InputError

Names = tuple[str, ...]


@dataclass(frozen=True)
class Layout:
    """The names that a group of projects uses.

    words     split to the word, or the words, that stand for it in names; "whole" for a set that is not split
    roles     image, text, labels (and text_labels where they are kept twice) to names, preferred first, {} for the word
    database  what the test items rank where no database is named: each other ("query"), or the training items
    """

    name: str
    words: Mapping[str, str | Names]
    roles: Mapping[str, Names]
    database: str = "query"

    def names(self, split: str, role: str, first: str | None = None) -> Names:
        """Those that a split may use for a role; where `first` is one of any split's, its pattern comes first."""

        def behind(pattern: str) -> bool:
            return first not in [pattern.format(word) for split in self.words for word in self._of(split)]

        patterns = sorted(self.roles[role], key=behind)
        return tuple(pattern.format(word) for pattern in patterns for word in self._of(split))

    def _of(self, split: str) -> Names:
        words = self.words[split]
        return (words,) if isinstance(words, str) else words


NATIVE = Layout(
    "cmr_fast's own .npz",
    {"train": "train", "valid": "valid", "query": "query", "database": "database"},
    {"image": ("{}_image",), "text": ("{}_text",), "labels": ("{}_labels",)},
)
LAYOUTS = (
    NATIVE,
    Layout(
        "one set without splits (DCMH, torchcmh, TA-DCH)",
        {"whole": ""},
        {
            "image": ("XAll", "FAll", "image", "images", "imgs", "IAll"),
            "text": ("YAll", "TAll", "text", "texts", "tags", "captions", "caption"),
            "labels": ("LAll", "labels", "label"),
        },
    ),
    Layout(
        "MATLAB hashing code (MIRFLICKR.mat, WIKI.mat, raw_mir.mat)",
        {"train": ("tr", "train"), "valid": ("va", "val"), "query": ("te", "test"), "database": ("db", "retrieval")},
        {"image": ("I_{}",), "text": ("T_{}",), "labels": ("L_{}",)},
        database="train",
    ),
    Layout(
        "LtCMH, where tra is for training and tr the retrieval set",
        {"train": "tra", "query": "te", "database": "tr"},
        {"image": ("I_{}",), "text": ("T_{}",), "labels": ("L_{}",)},
        database="train",
    ),
    Layout(
        "NRCH (MIRFlickr.h5, NUS-WIDE.h5)",
        {
            "train": "Train",
            "valid": ("Val", "Valid"),
            "query": ("Query", "Test"),
            "database": ("DataBase", "Retrieval"),
        },
        {
            "image": ("Img{}", "Image{}"),
            "text": ("Tag{}", "Txt{}", "Text{}"),
            "labels": ("Lab{}", "Label{}", "Labels{}"),
        },
    ),
    Layout(
        "XMedia",
        {"train": "tr", "query": "te"},
        {"image": ("I_{}_CNN",), "text": ("T_{}_BOW",), "labels": ("{}ImgCat",), "text_labels": ("{}TxtCat",)},
    ),
    Layout(
        "INRIA Websearch",
        {"train": "tr", "valid": "val", "query": "te"},
        {"image": ("{}_img",), "text": ("{}_txt",), "labels": ("{}_img_lab",), "text_labels": ("{}_txt_lab",)},
    ),
    Layout(
        "DSCMR",
        {"train": "train", "valid": "valid", "query": "test"},
        {"image": ("{}_img",), "text": ("{}_txt",), "labels": ("{}_img_lab",), "text_labels": ("{}_txt_lab",)},
    ),
    Layout(
        "SDML, MRL",
        {"train": "train", "valid": "valid", "query": "test"},
        {
            "image": ("{}_imgs_deep",),
            "text": ("{}_texts", "{}_text"),
            "labels": ("{}_imgs_labels",),
            "text_labels": ("{}_texts_labels",),
        },
    ),
    Layout(
        "ACMR",
        {"train": "train", "query": "test"},
        {"image": ("{}_img_feats",), "text": ("{}_txt_vecs",), "labels": ("{}_labels",)},
    ),
    Layout(
        "DLFH, UCCH",
        {"query": "Test", "database": "Database"},
        {"image": ("V{}", "X{}"), "text": ("Y{}",), "labels": ("{}L",)},
    ),
    Layout(
        "two views of one set (X1, X2 and Y)",
        {"whole": ""},
        {"image": ("X1",), "text": ("X2",), "labels": ("Y", "gt", "labels", "label")},
    ),
    Layout(
        "a group for train and one for test",
        {
            "train": ("train", "training"),
            "valid": ("valid", "val", "validation"),
            "query": ("test", "testing", "query"),
            "database": ("database", "retrieval", "db"),
        },
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
    Raises InputError naming what is missing from the layout that fits best.
    """
    folded = {key.casefold(): key for key in keys}
    here = ", ".join(sorted(folded.values())[:12]) + (", …" if len(folded) > 12 else "") or "nothing"
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
    return layout, names


def _arrays(names: dict[str, dict[str, str]]) -> set[str]:
    return {name for roles in names.values() for name in roles.values()}


def _fit(
    layout: Layout, folded: Mapping[str, str], wanted: Mapping[str, str | None]
) -> tuple[Layout, dict[str, dict[str, str]], list[str]]:
    """What a layout finds of its names: split and role to name; and what it misses, in words."""
    result: dict[str, dict[str, str]] = {}
    missing = []
    for split in layout.words:
        chosen = {}
        for role in layout.roles:
            names = layout.names(split, role, wanted.get(role))
            present = [folded[name.casefold()] for name in names if name.casefold() in folded]
            if present:
                chosen[role] = present[0]
        if chosen:
            result[split] = chosen
        if chosen or split not in ("valid", "database"):
            lacking = [role for role in ("image", "text", "labels") if role not in chosen]
            what = "" if split == "whole" else f"{split} "
            missing += [f"{what}{role} ({' or '.join(layout.names(split, role))})" for role in lacking]
    return layout, result, missing
