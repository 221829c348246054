"""Attacks. Each takes a model once and inputs as often as you like: `atk = PGD(model, eps=8/255); adv = atk(x, y)`."""

import importlib

_WHERE = {
    "PGD": "pgd",
    "FGSM": "pgd",
    "MIFGSM": "pgd",
    "CW": "pgd",
    "APGD": "apgd",
    "APGDT": "apgd",
    "FeatureScatter": "scatter",
    "LocalSearch": "search",
    "Ranker": "ranking",
    "recall_under_attack": "ranking",
    "Transfer": "transfer",
    "Square": "adapters",
    "FAB": "adapters",
    "AttackInfo": "base",
    "CMLA": "hashing",
    "CodeAttack": "by_codes",
    "QueryAttack": "by_codes",
    "anchor_code": "by_codes",
    "centre_codes": "by_codes",
    "BertAttack": "text.bert",
    "CharacterAttack": "text.characters",
    "TextInfo": "text.base",
    "CoAttack": "multimodal.coattack",
    "SGA": "multimodal.sga",
    "Counterattack": "multimodal.ttc",
}
_MODULES = ("losses", "checks")

__all__ = [*_WHERE, *_MODULES]


def __getattr__(name: str) -> object:
    if name in _WHERE:
        value = getattr(importlib.import_module(f"cmr_fast.attacks.{_WHERE[name]}"), name)
        globals()[name] = value
        return value
    if name in _MODULES:
        return importlib.import_module(f"cmr_fast.attacks.{name}")
    raise AttributeError(f"module 'cmr_fast.attacks' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
