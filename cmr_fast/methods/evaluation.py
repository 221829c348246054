"""Retrieval quality of anything that encodes both modalities: trained methods and baselines alike."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from cmr_fast.data.pairs import PairedDataset, Pairs
from cmr_fast.errors import InputError

if TYPE_CHECKING:
    from cmr_fast.retrieval import RetrievalResult

Modality = Literal["image", "text"]
_ENCODE_ROWS = 4096


def evaluate_model(
    model: Any, dataset: PairedDataset, *, k: int | None = None, convention: str = "all", ties: str = "index"
) -> "dict[str, RetrievalResult]":
    """Retrieval quality on the query and database splits: {"i2t": image queries over texts, "t2i": the reverse}.

    model: anything with `output`, `metric` (for embeddings) and `encode(modality, features)`; k, convention and ties
    as in cmr_fast.retrieval.metrics.
    """
    return _evaluate(model, dataset.query, dataset.database, [{"k": k, "convention": convention, "ties": ties}])[0]


def evaluate_many(
    model: Any, dataset: "PairedDataset", settings: Sequence[Mapping[str, Any]]
) -> "list[dict[str, RetrievalResult] | InputError]":
    """`evaluate_model` under several settings (k, convention, ties), each side encoded once.

    A setting that the metrics refuse gives its InputError in that place.
    """
    from cmr_fast.ops import pack_codes
    from cmr_fast.retrieval.metrics import evaluate_codes, evaluate_embeddings

    modalities: tuple[Modality, ...] = ("image", "text")
    query = {m: encode_all(model, m, getattr(dataset.query, m)) for m in modalities}
    database = query
    if dataset.database is not dataset.query:
        database = {m: encode_all(model, m, getattr(dataset.database, m)) for m in modalities}
    labels = dataset.query.labels, dataset.database.labels

    def compare(asked: Modality, answered: Modality, setting: Mapping[str, Any]) -> "RetrievalResult":
        if model.output == "embedding":
            return evaluate_embeddings(query[asked], database[answered], *labels, metric=model.metric, **setting)
        codes, base = (pack_codes(side, threshold=0.0) for side in (query[asked], database[answered]))
        return evaluate_codes(codes, base, *labels, bits=query[asked].shape[1], **setting)

    found: list[dict[str, RetrievalResult] | InputError] = []
    for setting in settings:
        try:
            found.append({"i2t": compare("image", "text", setting), "t2i": compare("text", "image", setting)})
        except InputError as error:
            found.append(error)
    return found


def validate(model: Any, valid: Pairs) -> dict[str, float]:
    """mAP(all) of the validation split, each pair a query over the whole split."""
    found = _evaluate(model, valid, valid, [{"convention": "all"}])[0]
    i2t, t2i = float(found["i2t"].map), float(found["t2i"].map)
    return {"valid_i2t": i2t, "valid_t2i": t2i, "valid_map": (i2t + t2i) / 2}


def final_results(model: Any, dataset: PairedDataset) -> dict[str, dict[str, float]]:
    """mAP of the query and database splits over the whole ranking and, as most of the field reports, at 50 hits."""
    settings: dict[str, dict[str, Any]] = {
        "all": {"convention": "all"},
        "topk_hits@50": {"convention": "topk_hits", "k": 50},
    }
    found = _evaluate(model, dataset.query, dataset.database, list(settings.values()))
    return {name: averaged(result) for name, result in zip(settings, found, strict=True)}


def averaged(found: "dict[str, RetrievalResult]") -> dict[str, float]:
    """The mAP of both directions and their average: {"i2t", "t2i", "average"}."""
    i2t, t2i = float(found["i2t"].map), float(found["t2i"].map)
    return {"i2t": i2t, "t2i": t2i, "average": (i2t + t2i) / 2}


def _evaluate(
    model: Any, query: Pairs, database: Pairs, settings: list[dict[str, Any]]
) -> "list[dict[str, RetrievalResult]]":
    """One {"i2t", "t2i"} per setting; everything is encoded once."""
    from cmr_fast.retrieval.metrics import evaluate_codes, evaluate_embeddings

    encoded = {
        (modality, split): encode_all(model, modality, getattr(pairs, modality))
        for split, pairs in (("query", query), ("database", database))
        for modality in ("image", "text")
    }

    def compare(asked: str, answered: str, options: dict[str, Any]) -> "RetrievalResult":
        sides = encoded[asked, "query"], encoded[answered, "database"]
        labels = query.labels, database.labels
        if model.output == "embedding":
            return evaluate_embeddings(*sides, *labels, metric=model.metric, **options)
        from cmr_fast.ops.hamming import pack_codes

        asked_codes, answered_codes = (pack_codes(side >= 0) for side in sides)
        return evaluate_codes(asked_codes, answered_codes, *labels, bits=sides[0].shape[1], **options)

    return [{"i2t": compare("image", "text", o), "t2i": compare("text", "image", o)} for o in settings]


@torch.no_grad()
def encode_all(model: Any, modality: Modality, features: Tensor) -> Tensor:
    """All rows of `features` through `model.encode` in eval mode, a few thousand at a time -> floats on the CPU."""
    training = getattr(model, "training", False)
    weight = next(model.parameters(), None) if isinstance(model, nn.Module) else None
    if training:
        model.eval()
    parts = []
    for rows in features.split(_ENCODE_ROWS):
        if weight is not None:
            rows = rows.to(weight.device, weight.dtype if rows.is_floating_point() else None)
        encoded = torch.as_tensor(model.encode(modality, rows))
        parts.append(encoded.to("cpu", torch.promote_types(encoded.dtype, torch.float32)))
    if training:
        model.train()
    return torch.cat(parts)
