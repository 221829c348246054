"""CMLA against a trained hashing method, and defences: fine-tuning on adversarial samples beside the clean, and CgAT.

The author response's Table 2 and the authors' code: N training pairs are attacked, their perturbed copies join the
training split with the labels of the originals, and training goes on from the trained weights (code: 5 epochs).
"""

import inspect
import re
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from cmr_fast._terminal import counting
from cmr_fast.attacks.by_codes import QueryAttack
from cmr_fast.attacks.hashing import CMLA, Perturbed
from cmr_fast.data.pairs import PairedDataset, Pairs
from cmr_fast.errors import InputError
from cmr_fast.methods.cgat import IMAGE_SHARE, TEXT_SHARE, CgATConfig, Victim, bounds_in
from cmr_fast.methods.loop import train
from cmr_fast.methods.method import Retriever, Run, RunConfig
from cmr_fast.modalities import MODALITIES, Modality

VARIANTS: dict[str, dict[str, Any]] = {
    "cmla": {},
    "cmla-positives": {"flip": "positives"},
    "cmla-both": {"keep_intra": False},
    "cmla-nointra": {"intra": 0.0},
    "cmla-single": {"single_modal": True},
    "cmla-turns": {"alternate": True},
    "cmla-sign": {"optimizer": "sign"},
    "cmla-compat": {"compat": "cmla"},
}
"""CMLA by name; a number after the name is the steps, 500 where there is none."""
BY_CODES = {"cgat": 100, "dhta": 2000}
"""Attacks by the database's codes, and their steps where the name has no number: those of their authors."""


def bounds_of(dataset: PairedDataset, modality: Modality) -> tuple[float, float]:
    """The range that perturbed inputs stay in: 0 to 255 of pixels, else the least and largest value of all splits."""
    return bounds_in([getattr(s, modality) for s in (dataset.train, dataset.query, dataset.database)], modality)


def named_attack(
    name: str,
    model: Retriever,
    dataset: PairedDataset,
    *,
    share: float | None = None,
    options: Mapping[str, Any] | None = None,
    database: Pairs | None = None,
    seed: int = 0,
) -> CMLA | QueryAttack:
    """The attack of a name, such as cmla, cmla100, cmla-single or cgat, for a model on a data set.

    Parameters
    ----------
    name : str
        One of VARIANTS or BY_CODES, with the number of steps after it or none.
    share : float, optional
        The image budget as a share of the inputs' range; the text's stays in the authors' proportion, 0.01 to 10/255.
        None: the authors' own.
    options : mapping, optional
        Of CMLA, or of QueryAttack, beside those that the name says.
    database : Pairs, optional
        Whose codes and labels those of BY_CODES go by. None: the data set's database.
    seed : int
        Of what those of BY_CODES draw.

    Raises
    ------
    InputError
        For other names, a share outside 0 to 1, and a model that makes no codes or is a baseline.
    """
    variant, _ = check_name(name)
    if not model.binary:
        raise InputError(f"{name} attacks codes, but {model.name} makes embeddings; expected a hashing method")
    if not isinstance(model, torch.nn.Module):
        raise InputError(f"{name} needs gradients, {type(model).__name__} has none; expected a trained method")
    settings = attack_settings(name, dataset, share=share, options=options, seed=seed)
    if variant not in BY_CODES:
        return CMLA(Victim(model), **settings)
    database = dataset.database if database is None else database
    image, text = (getattr(database, m).to(_device(model)) for m in MODALITIES)
    return QueryAttack(Victim(model), image, text, database.labels, **settings)


def attack_settings(
    name: str,
    dataset: PairedDataset,
    *,
    share: float | None = None,
    options: Mapping[str, Any] | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Every setting that `named_attack` gives CMLA or QueryAttack, those left at their defaults too."""
    variant, steps = check_name(name)
    share = IMAGE_SHARE if share is None else share
    if not 0 <= share <= 1:
        raise InputError(f"eps must be from 0 to 1, a share of the inputs' range, got {share}")
    kind = QueryAttack if variant in BY_CODES else CMLA
    parameters = inspect.signature(kind).parameters.values()
    settings: dict[str, Any] = {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY} | {"steps": steps}
    for modality, part in zip(MODALITIES, (share, share * TEXT_SHARE / IMAGE_SHARE), strict=True):
        low, high = bounds_of(dataset, modality)
        settings |= {f"{modality}_eps": part * (high - low), f"{modality}_bounds": (low, high)}
    own = {"targeted": variant == "dhta", "seed": seed} if variant in BY_CODES else VARIANTS[variant]
    return settings | own | dict(options or {})


def check_name(name: str) -> tuple[str, int]:
    """The variant and the steps of an attack's name. InputError for others."""
    match = re.fullmatch(r"([a-z-]+?)(\d*)", name)
    if match is None or match[1] not in VARIANTS | BY_CODES or match[2] == "0":
        known = ", ".join([*VARIANTS, *BY_CODES])
        raise InputError(f"unknown attack {name!r} on hash codes, expected one of {known}, as in cmla100")
    return match[1], int(match[2] or BY_CODES.get(match[1], 500))


def perturb(attack: CMLA | QueryAttack, pairs: Pairs, what: str = "") -> tuple[Pairs, Perturbed]:
    """Attack pairs.

    Parameters
    ----------
    attack
        Whose model's device is used.
    pairs
        N pairs of images and text features.
    what : str
        A name for the progress that is shown on standard error; "" shows none.

    Returns
    -------
    Pairs, Perturbed
        The pairs as the attack leaves them, on the CPU, pixels as floats; and what it says of them.

    Raises
    ------
    InputError
        For texts that are captions or token ids, and as of CMLA.
    """
    if not isinstance(pairs.text, Tensor) or not pairs.text.is_floating_point():
        raise InputError("attacks on codes perturb text features; the texts of this data set are captions or token ids")
    device = _device(*attack.model.modules)
    given = pairs.image.to(device), pairs.text.to(device), pairs.labels.to(device)
    total = 2 * attack.steps * len(pairs)
    with counting(total, f"{what}, steps of all items") if what else nullcontext() as progress:
        result = attack(*given, progress=progress)
    return pairs._unchecked({"image": result.image.cpu(), "text": result.text.cpu(), "labels": pairs.labels}), result


def harden(
    model: Retriever,
    dataset: PairedDataset,
    run: RunConfig,
    count: int,
    *,
    epochs: int = 5,
    rounds: int = 1,
    attack: str = "cmla",
    share: float | None = None,
    options: Mapping[str, Any] | None = None,
) -> Run:
    """Adversarial training of a trained hashing method: fine-tune on the training split and on attacked copies of it.

    Parameters
    ----------
    model : Retriever
        The trained model to go on from; it is not changed.
    dataset : PairedDataset
        Its validation split, if any, stays out: weights are those of the last epoch. Of queries and database nothing
        is trained on; of their features the range counts, which the budget is a share of.
    run : RunConfig
        Folder, seed and device of the fine-tuning.
    count : int
        Adversarial samples: so many training pairs, drawn by the seed, are attacked. 0 is the control: the same
        epochs on the clean pairs alone.
    epochs : int
        Of fine-tuning in all (code: 5), at the rates of the model's config (code: 1e-4 of images, 1e-2 of texts).
    rounds : int
        Above 1 the samples are made anew, against the model of that moment, so many times; `epochs` is divided among
        them.
    attack, share, options
        As in `named_attack`.

    Returns
    -------
    Run
        Of the last round, in `run.out`; earlier rounds are beside it, named -round1, -round2 ... Its config.json says
        under "adversarial" how many samples there are, of which attack, and every setting of that.

    Raises
    ------
    InputError
        Where `count` is not from 0 to the training pairs, or `rounds` does not divide `epochs`.
    """
    if not isinstance(count, int) or not 0 <= count <= len(dataset.train):
        raise InputError(f"expected 0 to {len(dataset.train)} adversarial samples, the training pairs; got {count}")
    if rounds < 1 or epochs % rounds:
        raise InputError(f"rounds must divide the epochs, {epochs}, got {rounds}")
    drawn = torch.randperm(len(dataset.train), generator=torch.Generator().manual_seed(run.seed))[:count]
    config = replace(model.config, epochs=epochs // rounds)
    if isinstance(config, CgATConfig):  # one defence at a time
        config = replace(config, defence="none")
    start, done = model, None
    for number in range(1, rounds + 1):
        more = replace(dataset, valid=None)
        note: dict[str, Any] = {"samples": count, "round": number, "rounds": rounds}
        if count:
            train_split = dataset.train
            attacker = named_attack(
                attack, start, dataset, share=share, options=options, database=train_split, seed=run.seed
            )
            what = "" if run.quiet else f"{attack} on {count} training pairs"
            samples, _ = perturb(attacker, train_split.select(drawn), what)
            if dataset.train.image.dtype == torch.uint8:
                samples = samples._unchecked({**samples._parts(), "image": samples.image.round().to(torch.uint8)})
            more = replace(more, train=dataset.train.joined(samples))
            used = attack_settings(attack, dataset, share=share, options=options, seed=run.seed)
            note |= {"attack": attack, "settings": used}
        out = run.out if number == rounds else run.out.with_name(f"{run.out.name}-round{number}")
        settings = replace(run, out=out, valid_fraction=0.0, refit=False)
        done = train(type(model), config, more, settings, start=start, notes={"adversarial": note})
        assert isinstance(done.model, Retriever)
        start = done.model
    assert done is not None
    return done


def harden_on_the_fly(model: Retriever, dataset: PairedDataset, run: RunConfig, *, epochs: int = 5) -> Run:
    """CgAT of a trained hashing method: fine-tune it on batches that are attacked anew in every step.

    Parameters
    ----------
    model : Retriever
        The trained model to go on from, of a method whose config is a `CgATConfig`, which says budget, steps and
        weight; it is not changed.
    dataset, run
        As in `harden`.
    epochs : int
        Of fine-tuning (CgAT's code: 30).

    Raises
    ------
    InputError
        For methods without this defence.
    """
    if not isinstance(model.config, CgATConfig):
        raise InputError(f"expected a method that CgAT is built into, dcmh or ssah, got {model.name}")
    config = replace(model.config, epochs=epochs, defence="cgat")  # type: ignore[call-arg]
    settings = replace(run, valid_fraction=0.0, refit=False)
    return train(type(model), config, replace(dataset, valid=None), settings, start=model)


def _device(*modules: torch.nn.Module) -> torch.device:
    parameter = next((p for module in modules for p in module.parameters()), None)
    return torch.device("cpu") if parameter is None else parameter.device
