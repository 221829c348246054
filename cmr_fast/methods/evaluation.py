"""Quality of anything that encodes both modalities (trained methods and baselines alike), and of classifiers."""

from collections.abc import Mapping, Sequence
from math import log
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from cmr_fast.data.images import Images
from cmr_fast.data.pairs import PairedDataset, Pairs
from cmr_fast.errors import InputError
from cmr_fast.modalities import MODALITIES, Modality

if TYPE_CHECKING:
    from cmr_fast.data.captions import CaptionedImages
    from cmr_fast.retrieval import CaptionRetrieval, RetrievalResult

_ENCODE_ROWS = 4096
_CLASSIFY_ROWS = 500


def evaluate_model(
    model: Any, dataset: PairedDataset, *, k: int | None = None, convention: str = "all", ties: str = "index"
) -> "dict[str, RetrievalResult]":
    """Retrieval quality on the query and database splits.

    Parameters
    ----------
    model
        Anything with `binary`, `metric` (for embeddings) and `encode(modality, features)`.
    dataset
        Whose query and database splits are ranked.
    k, convention, ties
        As in `cmr_fast.retrieval.metrics`.

    Returns
    -------
    dict
        "i2t": image queries over texts; "t2i": the reverse.

    Raises
    ------
    InputError
        For settings that the metrics refuse.
    """
    (result,) = evaluate_many(model, dataset, [{"k": k, "convention": convention, "ties": ties}])
    if isinstance(result, InputError):
        raise result
    return result


def evaluate_many(
    model: Any, dataset: PairedDataset, settings: Sequence[Mapping[str, Any]]
) -> "list[dict[str, RetrievalResult] | InputError]":
    """`evaluate_model` under several settings (k, convention, ties), each side encoded once.

    A setting that the metrics refuse gives its InputError in that place.
    """
    return _evaluate(model, dataset.query, dataset.database, settings)[0]


def validate(model: Any, valid: Pairs) -> dict[str, float]:
    """mAP(all) of the validation split, each pair a query over the whole split: valid_i2t, valid_t2i, valid_map."""
    (result,) = _evaluate(model, valid, valid, [{"convention": "all"}])[0]
    if isinstance(result, InputError):
        raise result
    scores = averaged(result)
    return {"valid_i2t": scores["i2t"], "valid_t2i": scores["t2i"], "valid_map": scores["average"]}


def final_results(model: Any, dataset: PairedDataset) -> dict[str, Any]:
    """mAP of the query and database splits over the whole ranking and, as most of the field reports, at 50 hits.

    Of codes also "codes": how many bits are the same for every row of the database, and the bits' mean entropy (0 to
    1), each by modality.
    """
    settings: dict[str, dict[str, Any]] = {
        "all": {"convention": "all"},
        "topk_hits@50": {"convention": "topk_hits", "k": 50},
    }
    results, database = _evaluate(model, dataset.query, dataset.database, list(settings.values()))
    scores: dict[str, Any] = {}
    for name, result in zip(settings, results, strict=True):
        if isinstance(result, InputError):
            raise result
        scores[name] = averaged(result)
    return scores | ({"codes": _code_health(database)} if model.binary else {})


def averaged(result: "Mapping[str, RetrievalResult]") -> dict[str, float]:
    """The mAP of both directions and their average: {"i2t", "t2i", "average"}."""
    i2t, t2i = float(result["i2t"].map), float(result["t2i"].map)
    return {"i2t": i2t, "t2i": t2i, "average": (i2t + t2i) / 2}


def _evaluate(
    model: Any, query: Pairs, database: Pairs, settings: Sequence[Mapping[str, Any]]
) -> "tuple[list[dict[str, RetrievalResult] | InputError], dict[Modality, Tensor]]":
    """One {"i2t", "t2i"} per setting, and the encoded database; each split is encoded once."""
    from cmr_fast.ops import pack_codes
    from cmr_fast.retrieval.metrics import evaluate_codes, evaluate_embeddings

    asked = {m: encode_all(model, m, getattr(query, m)) for m in MODALITIES}
    answered = asked if database is query else {m: encode_all(model, m, getattr(database, m)) for m in MODALITIES}
    labels = query.labels, database.labels

    def compare(of: Modality, over: Modality, setting: Mapping[str, Any]) -> "RetrievalResult":
        if not model.binary:
            return evaluate_embeddings(asked[of], answered[over], *labels, metric=model.metric, **setting)
        codes, base = (pack_codes(side >= 0) for side in (asked[of], answered[over]))
        return evaluate_codes(codes, base, *labels, bits=asked[of].shape[1], **setting)

    results: list[dict[str, RetrievalResult] | InputError] = []
    for setting in settings:
        try:
            results.append({"i2t": compare("image", "text", setting), "t2i": compare("text", "image", setting)})
        except InputError as error:
            results.append(error)
    return results, answered


def _code_health(encoded: Mapping[Modality, Tensor]) -> dict[str, dict[str, float]]:
    shares = {m: (values >= 0).double().mean(dim=0) for m, values in encoded.items()}  # (bits,)
    entropy = {m: torch.special.entr(torch.stack([p, 1 - p])).sum(0) / log(2) for m, p in shares.items()}
    return {
        "constant_bits": {m: int(((p == 0) | (p == 1)).sum()) for m, p in shares.items()},
        "mean_entropy": {m: float(e.mean()) for m, e in entropy.items()},
    }


def recalls(model: Any, split: "CaptionedImages") -> "CaptionRetrieval":
    """Images among all captions and captions among all images of a split, embedded in eval mode by `model.embed`."""
    from cmr_fast.retrieval import evaluate_captions

    training = model.training
    model.eval()
    with torch.no_grad():
        image, text = (model.embed(modality, split) for modality in MODALITIES)
    model.train(training)
    return evaluate_captions(image, text, split.captions()[1])


def caption_results(scores: "CaptionRetrieval") -> dict[str, Any]:
    """What results.json holds of a retriever of captions: by way R@1, R@5, R@10, median and mean rank; rsum."""
    ways: dict[str, Any] = {
        way: {f"R@{k}": value for k, value in shares.items()}
        | {"median_rank": scores.median_rank[way], "mean_rank": scores.mean_rank[way]}
        for way, shares in scores.recall().items()
    }
    return ways | {"rsum": scores.rsum}


@torch.no_grad()
def encode_all(model: Any, modality: Modality, features: Tensor | Sequence[Any], how: str = "encode") -> Tensor:
    """All rows of `features` through `model.encode` in eval mode, a few thousand at a time.

    Parameters
    ----------
    model
        A trained method or a baseline.
    modality
        "image" or "text".
    features
        (N, dim) floats, (N, L) token ids, or N captions.
    how
        The model's function: encode, or subspace of a `Retriever`.

    Returns
    -------
    Tensor
        (N, d) floats on the CPU.
    """
    training = getattr(model, "training", False)
    weight = next(model.parameters(), None) if isinstance(model, nn.Module) else None
    if training:
        model.eval()
    parts = []
    for start in range(0, max(1, len(features)), _ENCODE_ROWS):
        rows: Any = features[start : start + _ENCODE_ROWS]
        if weight is not None and isinstance(rows, Tensor):
            rows = rows.to(weight.device, weight.dtype if rows.is_floating_point() else None)
        encoded = torch.as_tensor(getattr(model, how)(modality, rows))
        parts.append(encoded.to("cpu", torch.promote_types(encoded.dtype, torch.float32)))
    if training:
        model.train()
    return torch.cat(parts)


@torch.no_grad()
def accuracy(model: nn.Module, images: Images, attack: Any = None) -> float:
    """The share of images that a classifier in evaluation mode has right, perturbed by `attack` where there is one."""
    training, weight = model.training, next(model.parameters())
    model.eval()
    right = 0
    for number, rows in enumerate(torch.arange(len(images)).split(_CLASSIFY_ROWS)):
        part = images.select(rows.to(images.labels.device))
        x, y = part.pixels().to(weight.device, weight.dtype), part.labels.to(weight.device)
        if attack is not None:
            x = attack(x, y, index=torch.arange(len(x)) + number * _CLASSIFY_ROWS)
        right += int((model(x).argmax(dim=1) == y).sum())
    model.train(training)
    return right / len(images)
