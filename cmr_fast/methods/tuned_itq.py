"""CCA-ITQ with all that its paper leaves open chosen by validation: a rival tuned as hard as what stands beside it."""

import itertools
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any, Self

from torch import Tensor

from cmr_fast._terminal import counting
from cmr_fast.data.pairs import PairedDataset, Pairs
from cmr_fast.errors import InputError
from cmr_fast.methods.baselines import CCAITQ
from cmr_fast.methods.cmimh import Inputs
from cmr_fast.methods.evaluation import validate
from cmr_fast.modalities import MODALITIES, Modality

GRID: Mapping[str, tuple[Any, ...]] = {
    "inputs": ("standard", "hellinger"),
    "pca_dim": (0, 50),
    "scale": ("each", "global"),
    "ridge": (0.1, 0.3, 1.0, 3.0, 10.0, 30.0),
    "dim": (None, 7),
    "weight": (0.5, 1.0),
}
"""Input scaling, PCA before CCA (0: none), scaling after it, ridge, variates (None: all), power of the correlations."""
TUNED_BITS = 32


class TunedCCAITQ:
    """CCA-ITQ (Gong et al. 2013) behind an input scaling and a PCA, by one of GRID's settings.

    Parameters
    ----------
    bits
        Code length.
    settings
        A value for each name of GRID, as `tune` returns them.
    seed
        Of ITQ's first rotation.
    """

    name = "cca-itq-tuned"
    binary = True
    metric = "hamming"

    def __init__(self, bits: int, settings: Mapping[str, Any], *, seed: int = 0) -> None:
        if set(settings) != set(GRID):
            raise InputError(f"settings must name {', '.join(GRID)}, got {', '.join(settings)}")
        self.settings = dict(settings)
        rest = {name: value for name, value in settings.items() if name not in ("inputs", "pca_dim")}
        self.codes = CCAITQ(bits, **rest, seed=seed)
        self.stages: dict[str, Inputs] = {}

    def fit(self, train: Pairs) -> Self:
        """Learn from the training pairs; labels are not looked at. InputError as CCA-ITQ and the scalings raise it."""
        features: dict[str, Tensor] = {m: getattr(train, m) for m in MODALITIES}
        self.stages = {
            m: Inputs(self.settings["inputs"], x.shape[1], self.settings["pca_dim"]) for m, x in features.items()
        }
        for modality, stage in self.stages.items():
            stage.fit(features[modality])
        image, text = (self.stages[m](features[m]) for m in MODALITIES)
        self.codes.fit(Pairs(image, text, train.labels))
        return self

    def encode(self, modality: Modality, features: Tensor) -> Tensor:
        """(N, D) raw features -> float32 logits (N, bits), bit = logit >= 0."""
        if not self.stages:
            raise InputError(f"{self.name} is not fitted: call fit(train) first")
        return self.codes.encode(modality, self.stages[modality](features))


def tune(dataset: PairedDataset, *, quiet: bool = False) -> dict[str, Any]:
    """The setting of GRID with the highest labelled mAP at 32 bits on held-out training pairs.

    Parameters
    ----------
    dataset
        With a validation split, or a fifth of the training pairs is held out (seed 0). The test splits are not seen.
    quiet
        No progress on the terminal.

    Returns
    -------
    dict
        A value for each name of GRID. Settings that the features do not allow (Hellinger's of negative ones, more
        variates than there are) are left out.

    Raises
    ------
    InputError
        Where none can be had, such as for raw images.
    """
    held = dataset if dataset.valid is not None else dataset.hold_out(0.2, 0)
    assert held.valid is not None
    best, found, refusal = -1.0, dict[str, Any](), InputError("no setting")
    tried = [dict(zip(GRID, values, strict=True)) for values in itertools.product(*GRID.values())]
    with nullcontext(lambda n: None) if quiet else counting(len(tried), "settings of CCA-ITQ") as advance:
        for settings in tried:
            advance(1)
            try:
                model = TunedCCAITQ(TUNED_BITS, settings).fit(held.train)
            except InputError as error:
                refusal = error
                continue
            score = validate(model, held.valid)["valid_map"]
            if score > best:
                best, found = score, settings
    if not found:
        raise refusal
    return found
