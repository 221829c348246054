"""Semantic matching whose input maps and penalties validation chooses: a rival tuned as what stands beside it."""

import itertools
from collections.abc import Mapping
from contextlib import nullcontext, suppress
from typing import Self

from torch import Tensor

from cmr_fast._terminal import counting
from cmr_fast.data.pairs import PairedDataset, Pairs
from cmr_fast.errors import InputError
from cmr_fast.methods.baselines import as_features, label_distributions, softmax_regression
from cmr_fast.methods.evaluation import validate
from cmr_fast.methods.scaling import InputScaling, Scaling
from cmr_fast.modalities import MODALITIES, Modality
from cmr_fast.ops._tensors import as_number

MAPS: tuple[Scaling, ...] = ("standard", "hellinger", "chi2")
PENALTIES = (1.0, 10.0, 100.0, 1000.0, 10000.0)
WIDE = 1024
"""Features wider than this are no histograms, and their maps would take minutes: standard alone."""
Setting = tuple[Scaling, float]


class TunedSemanticMatching:
    """`SemanticMatching` (Rasiwasia et al. 2010) with an input map and a penalty of its own for each modality.

    Parameters
    ----------
    settings
        (input scaling, penalty) of "image" and "text", as `tune` returns them.
    """

    name = "semantic-matching-tuned"
    binary = False
    metric = "ip"

    def __init__(self, settings: Mapping[str, Setting]) -> None:
        if set(settings) != set(MODALITIES):
            raise InputError(f"settings must name {', '.join(MODALITIES)}, got {', '.join(settings)}")
        self.settings: dict[str, Setting] = {}
        for modality, setting in settings.items():
            if not isinstance(setting, tuple | list) or len(setting) != 2:
                raise InputError(f"{modality} needs an input scaling and a penalty, got {setting!r:.60}")
            self.settings[modality] = (setting[0], as_number(setting[1], "penalty", least=0))
        self.stages: dict[str, InputScaling] = {}
        self.widths: dict[str, int] = {}
        self.classifiers: dict[str, tuple[Tensor, Tensor]] = {}

    def fit(self, train: Pairs) -> Self:
        """Learn from the training pairs and their labels. InputError where a map refuses the features."""
        targets = label_distributions(train.labels)
        for modality, (kind, penalty) in self.settings.items():
            features = as_features(getattr(train, modality), modality)
            self.widths[modality] = features.shape[1]
            self.stages[modality] = stage = InputScaling(kind, features.shape[1])
            stage.fit(features)
            self.classifiers[modality] = softmax_regression(stage(features), targets, penalty)
        return self

    def encode(self, modality: Modality, features: Tensor) -> Tensor:
        """(N, D) raw features -> float32 (N, classes), label distributions."""
        if modality not in MODALITIES:
            raise InputError(f"modality must be one of {MODALITIES}, got {modality!r}")
        if not self.classifiers:
            raise InputError(f"{self.name} is not fitted: call fit(train) first")
        (weight, bias), x = self.classifiers[modality], as_features(features, modality)
        if x.shape[1] != self.widths[modality]:
            raise InputError(f"{modality} features must be {self.widths[modality]} wide, got {x.shape[1]}")
        return (self.stages[modality](x) @ weight + bias).softmax(dim=1).float()


def tune(dataset: PairedDataset, *, quiet: bool = False) -> dict[str, Setting]:
    """Of MAPS and PENALTIES the choice for each modality with the highest mAP(all) on held-out training pairs.

    Every pair of choices is judged, but each classifier is fitted once.

    Parameters
    ----------
    dataset
        With a validation split, or a fifth of the training pairs is held out (seed 0). The test splits are not seen.
    quiet
        No progress on the terminal.

    Returns
    -------
    dict
        (input scaling, penalty) of "image" and "text". Maps that the features do not allow are left out.
    """
    held = dataset if dataset.valid is not None else dataset.hold_out(0.2, 0)
    assert held.valid is not None
    targets = label_distributions(held.train.labels)
    answers: dict[str, dict[Setting, Tensor]] = {m: {} for m in MODALITIES}
    stages = {m: _maps(getattr(held.train, m), getattr(dataset.train, m)) for m in MODALITIES}
    total = sum(map(len, stages.values())) * len(PENALTIES)
    with nullcontext(lambda n: None) if quiet else counting(total, "settings of semantic matching") as advance:
        for modality, stage in [(m, stage) for m in MODALITIES for stage in stages[m]]:
            train, valid = (stage(getattr(pairs, modality).cpu().double()) for pairs in (held.train, held.valid))
            for penalty in PENALTIES:
                weight, bias = softmax_regression(train, targets, penalty)
                answers[modality][stage.kind, penalty] = (valid @ weight + bias).softmax(dim=1).float()
                advance(1)
    best, found = -1.0, dict[str, Setting]()
    for one, other in itertools.product(*answers.values()):
        pairs = Pairs(answers["image"][one], answers["text"][other], held.valid.labels)
        score = validate(_AsTheyAre(), pairs)["valid_map"]
        if score > best:
            best, found = score, {"image": one, "text": other}
    return found


def _maps(features: Tensor, whole: Tensor) -> list[InputScaling]:
    """Those of MAPS that the whole training split's features (N, D) allow, fitted to the held one's."""
    fitted = []
    for kind in MAPS if whole.shape[1] <= WIDE else MAPS[:1]:
        stage = InputScaling(kind, whole.shape[1])
        with suppress(InputError):  # of negative features there is no root
            stage.fit(whole)
            stage.fit(features)
            fitted.append(stage)
    return fitted


class _AsTheyAre:
    """Ranks distributions that were made before."""

    binary = False
    metric = "ip"

    def encode(self, modality: Modality, features: Tensor) -> Tensor:
        return features
