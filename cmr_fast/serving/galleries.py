"""What a trained run makes of queries, and the images or texts that the ids of an index stand for.

Id i is row i of one modality of a split, as `cmr-fast encode` writes it. Queries are encoded as that command encodes;
attacked ones are made by the attacks of `cmr-fast attack`, each alone: an image leaves the items that it finds.
"""

import base64
import io
import threading
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from cmr_fast.attacks import registry
from cmr_fast.attacks.multimodal.base import ImageTower
from cmr_fast.attacks.ranking import Ranker
from cmr_fast.attacks.text.characters import CharacterAttack
from cmr_fast.data.captions import CaptionedImages
from cmr_fast.data.pairs import PairedDataset
from cmr_fast.data.photos import decode
from cmr_fast.errors import InputError
from cmr_fast.methods.evaluation import encode_all
from cmr_fast.methods.hardening import named_attack, perturb
from cmr_fast.methods.method import CaptionRetriever, Retriever
from cmr_fast.modalities import Modality
from cmr_fast.ops import pack_codes

_FOUND = 5  # items that an attacked image leaves: those that it finds first
_PIXELS, _LETTERS, _CODES = "pgd20", "character", "cmla100"


class Query(NamedTuple):
    """An encoded query: values (1, d), for codes and for embeddings, and what it looks like."""

    signs: Tensor
    embedding: Tensor
    shown: dict[str, str]


class Gallery:
    """Base of both kinds: items, their embeddings, and the lock of a model that one thread uses at a time.

    Parameters
    ----------
    name : str
        Of the run.
    items : {"image", "text"}
        What the ids of the index stand for.
    embeddings : Tensor
        (N, d), of the items in the order of their ids; their cosines are compared in float64.
    bits : int
        Of the run's codes.
    """

    texts: bool = False
    """Whether a caption is a query."""
    images: bool = False
    """Whether an image file is a query."""
    queries: int = 0
    """Test queries, by number."""
    attacks: dict[Modality, str]
    """How queries are attacked."""

    def __init__(self, name: str, items: Modality, embeddings: Tensor, bits: int) -> None:
        self.name, self.items, self.bits, self.count = name, items, bits, len(embeddings)
        self.embeddings = embeddings
        self._unit = torch.nn.functional.normalize(embeddings.double(), dim=1)
        self._one = threading.Lock()

    def described(self) -> dict[str, Any]:
        """What the page offers."""
        return {
            "name": self.name, "items": self.items, "texts": self.texts, "images": self.images,
            "queries": self.queries, "attacks": self.attacks,
        }  # fmt: skip

    def query(
        self, text: str | None, image: bytes | None, row: int | None, modality: Modality, attacked: bool
    ) -> Query:
        """Encode a caption, an image file or a test query, attacked or as it is.

        Raises
        ------
        InputError
            For what the run does not read, files that are no images, and rows that there are not.
        """
        if text is not None and not self.texts:
            raise InputError(f"{self.name} reads features of texts: expected the row of a test query, got a caption")
        if image is not None and not self.images:
            raise InputError(f"{self.name} reads features of images: expected the row of a test query, got an image")
        if row is not None and row >= self.queries:
            raise InputError(f"row: expected a number below {self.queries}, the test queries, got {row}")
        kind: Modality = "text" if text is not None else "image" if image is not None else modality
        if attacked and kind not in self.attacks:
            raise InputError(f"{self.name}: there is no attack on {kind} queries of such a run")
        with self._one:
            return self._query(text, image, row, kind, attacked)

    def nearest(self, query: Query, k: int) -> tuple[list[float], list[int]]:
        """Cosine distances and ids of the k nearest embeddings, equal ones by id."""
        far = 1 - (self._unit @ torch.nn.functional.normalize(query.embedding.double(), dim=1)[0])
        order = torch.argsort(far, stable=True)[:k]
        return far[order].tolist(), order.tolist()

    def codes_of(self, rows: Sequence[int]) -> np.ndarray:
        """Packed codes of items, uint8 (R, bytes)."""
        raise NotImplementedError

    def item(self, number: int) -> tuple[str, bytes]:
        """Media type and content of an item."""
        raise NotImplementedError

    def _query(
        self, text: str | None, image: bytes | None, row: int | None, kind: Modality, attacked: bool
    ) -> Query:  # fmt: skip
        raise NotImplementedError


class Captions(Gallery):
    """Of a run on images with captions, which reads both as people have them.

    Parameters
    ----------
    name : str
        Of the run.
    model : CaptionRetriever
        In eval mode.
    split : CaptionedImages
        The items, and the test queries.
    items : {"image", "text"}
        As of Gallery.
    eps : float
        Radius of the ball of attacked images, of pixels from 0 to 1.
    """

    texts = images = True

    def __init__(
        self, name: str, model: CaptionRetriever, split: CaptionedImages, items: Modality, eps: float
    ) -> None:  # fmt: skip
        with torch.no_grad():
            embeddings = model.embed(items, split).float()
        super().__init__(name, items, embeddings, embeddings.shape[1])
        self.model, self.split, self.eps = model, split, eps
        self.captions = split.captions()[0]
        self.queries = len(split)
        self.attacks = {"image": _PIXELS, "text": _LETTERS}

    def codes_of(self, rows: Sequence[int]) -> np.ndarray:
        """Signs of embeddings."""
        return np.asarray(pack_codes(self.embeddings[list(rows)], threshold=0.0).numpy())

    def item(self, number: int) -> tuple[str, bytes]:
        """PNG or plain text."""
        if self.items == "text":
            return "text/plain; charset=utf-8", self.captions[number].encode()
        return "image/png", png(self._pixels(number))

    def _pixels(self, row: int) -> Tensor:
        return self.split.select(torch.tensor([row])).pixels()

    def _query(
        self, text: str | None, image: bytes | None, row: int | None, kind: Modality, attacked: bool
    ) -> Query:  # fmt: skip
        dual = self.model.dual
        where = dual.log_scale
        if kind == "text":
            words = self.split.text[row][0] if row is not None else text or ""
            if attacked:
                (words,) = CharacterAttack(dual)([words])
            with torch.no_grad():
                values = dual.encode_text(*(x.to(where.device) for x in dual.tokenize([words]))).float().cpu()
            return Query(values, values, {"text": words})
        if row is not None:
            pixels = self._pixels(row)
        else:
            size = self.split.image.shape[-1]
            pixels = torch.from_numpy(decode("the image", image or b"", size).copy())[None].float() / 255
        pixels = pixels.to(where.device, where.dtype)
        if attacked:
            pixels = self._moved(pixels)
        with torch.no_grad():
            values = dual.encode_image(pixels).float().cpu()
        return Query(values, values, {"image": as_address(pixels)})

    def _moved(self, pixels: Tensor) -> Tensor:
        """PGD away from the items that the clean image finds, within the ball."""
        gallery = self.embeddings.to(pixels)
        with torch.no_grad():
            close = (self.model.dual.encode_image(pixels) @ gallery.T).topk(min(_FOUND, len(gallery))).indices
        relevant = torch.zeros(1, len(gallery), dtype=torch.bool, device=pixels.device).scatter_(1, close, True)
        attack = registry.make(
            _PIXELS, Ranker(ImageTower(self.model.dual), gallery), eps=self.eps, losses=registry.RANKING, check=False,
            progress=False,
        )  # fmt: skip
        assert attack is not None
        return attack(pixels, relevant)


class Features(Gallery):
    """Of a run on pairs, whose queries are rows of the test split; of a run on pixels image files too.

    Parameters
    ----------
    name : str
        Of the run.
    model : Retriever
        In eval mode.
    dataset : PairedDataset
        Its database is the items, its query split the queries.
    items : {"image", "text"}
        As of Gallery.
    eps : float, optional
        Budget of attacked images, a share of their range; None: CMLA's.
    """

    def __init__(
        self, name: str, model: Retriever, dataset: PairedDataset, items: Modality, eps: float | None
    ) -> None:  # fmt: skip
        self.model, self.dataset, self.eps = model, dataset, eps
        held = getattr(dataset.database, items)
        values = encode_all(model, items, held)
        self._signs = values if model.binary else encode_all(model, items, held, "subspace")
        super().__init__(name, items, values, self._signs.shape[1])
        self.images = dataset.query.image.dtype == torch.uint8
        self.queries = len(dataset.query)
        features = isinstance(dataset.query.text, Tensor) and dataset.query.text.is_floating_point()
        self.attacks = {"image": _CODES, "text": _CODES} if model.binary and features else {}

    def codes_of(self, rows: Sequence[int]) -> np.ndarray:
        """Signs of what the model says of the items."""
        return np.asarray(pack_codes(self._signs[list(rows)], threshold=0.0).numpy())

    def item(self, number: int) -> tuple[str, bytes]:
        """PNG of pixels, else what is known in words."""
        database = self.dataset.database
        if self.items == "image" and database.image.dtype == torch.uint8:
            return "image/png", png(database.image[number : number + 1].float() / 255)
        return "text/plain; charset=utf-8", self._words(database, number).encode()

    def _words(self, split: Any, row: int) -> str:
        if not isinstance(split.text, Tensor):
            return split.text[row] if isinstance(split.text[row], str) else " / ".join(split.text[row])
        labels = split.labels[row]
        classes = labels.nonzero()[:, 0].tolist() if labels.ndim else [int(labels)]
        names = self.dataset.class_names
        return ", ".join(names[c] if names else f"class {c}" for c in classes) or "no label"

    def _query(
        self, text: str | None, image: bytes | None, row: int | None, kind: Modality, attacked: bool
    ) -> Query:  # fmt: skip
        if row is None:
            if attacked:
                raise InputError(f"{self.name}: attacks move test queries, which have labels: expected a row")
            size = self.dataset.query.image.shape[-1]
            pixels = torch.from_numpy(decode("the image", image or b"", size).copy())[None]
            return self._encoded("image", pixels, {"image": as_address(pixels.float() / 255)})
        pairs = self.dataset.query.select(torch.tensor([row]))
        shown = {"text": f"{kind} of test query {row}: {self._words(pairs, 0)}"}
        if attacked:
            pairs = perturb(named_attack(_CODES, self.model, self.dataset, share=self.eps), pairs)[0]
        if kind == "image" and self.images:
            shown = {"image": as_address(pairs.image.float() / 255)}
        return self._encoded(kind, getattr(pairs, kind), shown)

    def _encoded(self, kind: Modality, rows: Any, shown: dict[str, str]) -> Query:
        values = encode_all(self.model, kind, rows)
        signs = values if self.model.binary else encode_all(self.model, kind, rows, "subspace")
        return Query(signs, values, shown)


def png(pixels: Tensor) -> bytes:
    """A file of float (1, 3, H, W) from 0 to 1."""
    from PIL import Image

    levels = (pixels[0].float().clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy()
    file = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(levels)).save(file, "PNG")
    return file.getvalue()


def as_address(pixels: Tensor) -> str:
    """An image in place of an address, for the page."""
    return "data:image/png;base64," + base64.b64encode(png(pixels)).decode()


def check_items(gallery: Gallery, index: Any, trained: object) -> None:
    """Refuse an index whose codes are not those of the gallery's items; `index` is a Searchable.

    A few codes are compared, each with the one of its id; rounding may turn a bit in some.

    Raises
    ------
    InputError
        With what differs.
    """
    made = f"`cmr-fast encode {trained} --modality {gallery.items} --out codes.npy`, --bits where it makes embeddings"
    if index.bits != gallery.bits:
        raise InputError(f"the index has {index.bits} bits, codes of {trained} {gallery.bits}: expected one of {made}")
    if index.count > gallery.count or not index.count:
        raise InputError(
            f"the index has {index.count} codes, there are {gallery.count} {gallery.items}s to show: expected one of "
            f"{made}, or the other --items"
        )
    rows = sorted({n * (index.count - 1) // 7 for n in range(8)})
    for row, code in zip(rows, gallery.codes_of(rows), strict=True):
        try:
            distance = int(index.search(code[None], 1, None, [row]).distances[0, 0])
        except InputError as error:
            raise InputError(f"the index has no id {row}, expected ids that count {gallery.items}s: {made}") from error
        if distance > gallery.bits // 10:
            raise InputError(
                f"the code of id {row} is {distance} of {gallery.bits} bits away from what {trained} makes of "
                f"{gallery.items} {row}: expected an index of {made}"
            )
