"""MAT, multimodal adversarial training of a dual encoder, and what the paper compares it with (ICLR 2025 submission).

    T' = argmax |g(T') - g(T)|                 Eq. 4: BERT-Attack, one word
    I' = argmin cos(f(I'), g(T'))              Eq. 5: PGD in the L-inf ball
    minimise InfoNCE(f(I'), g(T'))             Eq. 6: both directions halved, both towers and the temperature

    mat-img     T' = T
    tecoa       I' = argmax InfoNCE_I(f(I'), g(T)), and the image tower alone learns InfoNCE_I (Eq. 3; Mao et al. 2023)
    finetune    I' = I, T' = T

All begin with the weights of one run (`start`) and take so many steps, whatever the data. The first caption of an image
is its text; what else is paired with it is MA2T's data (cmr_fast.methods.ma2t).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from math import cos, pi
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cmr_fast.attacks.multimodal.base import ImageTower, summed
from cmr_fast.attacks.pgd import PGD
from cmr_fast.attacks.text.bert import BertAttack
from cmr_fast.attacks.text.encoder import FlatTexts
from cmr_fast.attacks.victim import widened
from cmr_fast.data.captions import CaptionedDataset, CaptionedImages
from cmr_fast.data.streamed import StreamedImages
from cmr_fast.errors import InputError
from cmr_fast.methods._gradcache import contrast, descend
from cmr_fast.methods._settings import check_choices, check_finite, check_kinds, check_least
from cmr_fast.methods.loop import load_model
from cmr_fast.methods.ma2t import BOTH, AugmentConfig, MorePairs, more_pairs
from cmr_fast.methods.method import CaptionRetriever, Method
from cmr_fast.models.clip import TwoTowers, dual_encoder
from cmr_fast.models.dual import trimmed
from cmr_fast.models.mlm import MaskedLM

_TEXTS = 64  # that go through a tower at a time
ATTACKS = "its attacks call the towers as often as a rank's own rows ask for, and sharded ones need all ranks"


@dataclass(frozen=True)
class FinetuneConfig(AugmentConfig):
    """The paper's settings (section 4.1); what it does not say is marked as ours."""

    start: str = ""
    """A run of `train clip` (or any on captions) whose weights and towers to begin with. None: the pretrained towers,
    under heads that are random where the towers bring none."""
    towers: str = "efficientnet-lite0+minilm"
    """As of `train clip` (the paper: CLIP ViT-B/16, open_clip/ViT-B-16@openai); of a `start` its own."""
    dim: int = 512
    """Of the common space (of IMAGE+TEXT); of a `start` its own."""
    hidden: int = 512
    """Of the heads' hidden layer; of a `start` its own."""
    dropout: float = 0.0
    """Of the heads' hidden layer (ours: attacks see none)."""
    max_steps: int = 5000
    """Batches in all, whatever the data."""
    batch_size: int = 128
    """Images a batch."""
    lr: float = 1e-4
    """Of SGD in the beginning; a cosine down to 0."""
    momentum: float = 0.9
    """Of SGD (ours, as TeCoA's code)."""
    weight_decay: float = 1e-4
    """Of SGD."""
    captions: int = 1
    """Captions of an image, the first so many, all of them its positives; 0: all."""
    frozen_blocks: int = 0
    """Of the image tower's blocks the first so many, and what lies before them, keep their weights (ours: none)."""
    chunk: int = 0
    """Images, and texts, that go through the towers at once, for less memory; the loss is that of the whole batch all
    the same, at the cost of up to one forward pass more. 0: all of them."""

    def __post_init__(self) -> None:
        check_kinds(self)
        check_least(self, dim=1, hidden=1, batch_size=2, captions=0, frozen_blocks=0, chunk=0)
        check_finite(self, "lr", "momentum", "weight_decay")
        if not (0 <= self.dropout < 1 and self.momentum < 1):
            raise InputError(
                f"dropout and momentum must be at least 0 and below 1, got {self.dropout} and {self.momentum}"
            )
        self.check_augment()


@dataclass(frozen=True)
class PgdConfig(FinetuneConfig):
    """Of those that attack images."""

    eps: float = 2 / 255
    """Radius of the L-inf ball, of pixels from 0 to 1."""
    alpha: float = 0.5 / 255
    """Step of PGD (ours)."""
    steps: int = 10
    """Steps of PGD, from a random start (ours)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_least(self, steps=1)
        if not 0 < self.eps <= 1 or not 0 < self.alpha <= 1:
            raise InputError(
                f"eps and alpha are of pixels from 0 to 1 (2/255 is 0.00784), got {self.eps} and {self.alpha}"
            )


@dataclass(frozen=True)
class TecoaConfig(PgdConfig):
    """TeCoA on captions (Eq. 3)."""

    away: Literal["infonce", "cosine"] = "infonce"
    """What PGD raises: InfoNCE among the texts of the batch (Eq. 3), or minus the cosine with its own (Eq. 5)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choices(self, away=("infonce", "cosine"))


@dataclass(frozen=True)
class MatImgConfig(TecoaConfig):
    """MAT of images alone."""

    away: Literal["infonce", "cosine"] = "cosine"
    """What PGD raises: minus the cosine with its own texts (Eq. 5), or InfoNCE among those of the batch (Eq. 3)."""


@dataclass(frozen=True)
class MatConfig(MatImgConfig):
    """MAT of both."""

    mlm: str = ""
    """The masked language model's folder that BERT-Attack takes words from, as `train mlm` makes it; required."""
    words: int = 1
    """Words of a caption that may change (the paper says one of its evaluation, nothing of its training)."""
    k: int = 10
    """Of the masked language model's likeliest pieces at a position (ours, as Co-Attack)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_least(self, words=1, k=1)


def presets_of(kind: type[FinetuneConfig], lr: float = 1e-3) -> dict[str, Any]:
    """`small` with its rate, and `steps2` and `steps10` of those that attack images."""
    small = kind(max_steps=300, batch_size=64, lr=lr)  # SGD at 1e-2 lets attacked embeddings fall together
    if not issubclass(kind, PgdConfig):
        return {"small": small}
    two: dict[str, Any] = {"steps": 2, "alpha": 1 / 255}
    return {"small": replace(small, **two), "steps2": kind(**two), "steps10": kind()}


@dataclass(frozen=True)
class PairBatch:
    """B images and their M texts, as they are or attacked.

    Attributes
    ----------
    pixels
        Float (B, 3, H, W) from 0 to 1.
    texts
        M of them.
    owner
        int64 (M,), the row of each one's image.
    ids
        int64 (B,), which image each row is of; rows of one image have its texts in common as positives.
    seen
        Embeddings of the texts in evaluation mode, float (M, d), where they are known; in FARE and LEAF what the towers
        said of the clean side before.
    copies
        How often each image of the batch is in it.
    first
        Over ranks, the number of the first text among those of the whole batch.
    idle
        Over ranks, whether this rank has no rows: these stand in, and count nothing.
    """

    pixels: Tensor
    texts: list[str]
    owner: Tensor
    ids: Tensor
    seen: Tensor | None = None
    copies: int = 1
    first: int = 0
    idle: bool = False

    def positive(self, of_text: Tensor | None = None) -> Tensor:
        """float32 (B, M): texts of the same image, each row summing to 1; of_text: (M,), which image each is of."""
        same = (self.ids[:, None] == (self.ids[self.owner] if of_text is None else of_text)).float()
        return same / same.sum(dim=1, keepdim=True)

    def mean_of_own(self, texts: Tensor) -> Tensor:
        """(B, d): the mean over the texts of each row."""
        count = len(self.pixels)
        own = torch.bincount(self.owner, minlength=count)[:, None]
        return summed(texts, self.owner, count) / own.to(texts)


class Finetune(CaptionRetriever):
    """Clean training of a dual encoder, both towers: what the defences are compared with."""

    name: ClassVar[str] = "finetune"
    Config: ClassVar[type] = FinetuneConfig
    presets: ClassVar[dict[str, Any]] = presets_of(FinetuneConfig)
    replicas_only: ClassVar[str] = ""
    contrasts = True
    keeps_last: ClassVar[bool] = True  # clean validation would take the weights that learned least of the attacks
    image_alone: ClassVar[bool] = False
    """Whether the image tower alone learns, and of the images' side of the loss."""

    def __init__(self, config: FinetuneConfig) -> None:
        super().__init__(config)
        self.config: Any = config
        c = config
        self.dual = dual_encoder(c.towers, dim=c.dim, hidden=c.hidden, dropout=c.dropout, pretrained=False)
        self.dual.requires_grad_(True)
        if c.frozen_blocks and not isinstance(self.dual, TwoTowers):
            raise InputError(f"{c.towers} has no blocks to freeze, expected frozen_blocks 0, got {c.frozen_blocks}")
        if isinstance(self.dual, TwoTowers):
            self.dual.freeze_blocks(c.frozen_blocks)
        self._more: MorePairs | None = None

    @classmethod
    def completed(cls, config: Any) -> Any:
        """The towers and widths of the run that is begun with."""
        if not config.start:
            return config
        theirs = _started(config.start).config
        default, taken = cls.Config(), {}
        for name in ("towers", "dim", "hidden"):
            given, taken[name] = getattr(config, name), getattr(theirs, name)
            if given not in (getattr(default, name), taken[name]):
                raise InputError(f"{name} is {taken[name]!r} in {config.start}, which this begins with; got {given!r}")
        return replace(config, **taken)

    def enlarge(self, train: Any) -> Any:
        """The first captions, and MA2T's pairs where they are asked for. InputError for these of a stream."""
        if isinstance(train, StreamedImages):
            if self.config.augments:
                raise InputError("augmented pairs are of images that are held, expected none with a stream")
            return train.first(self.config.captions)
        self._more = more_pairs(train, self.config, self.config.captions)
        return self._more.split

    def fit_inputs(self, train: CaptionedImages) -> None:
        """Take the weights of `start`, or the pretrained ones."""
        if self.config.start:
            self.dual.load_state_dict(_started(self.config.start).dual.state_dict())
        else:
            self.dual.load()

    def trained(self) -> dict[str, list[nn.Parameter]]:
        """The parameters that learn, by what they are called in an error."""
        parts = self.dual.parts()
        return {"image tower": parts["image"], "text tower": parts["text"], "heads": parts["heads"]}

    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        """SGD. InputError where a part that must learn is frozen."""
        c, trained = self.config, self.trained()
        for what, parameters in trained.items():
            if not any(p.requires_grad for p in parameters):
                raise InputError(
                    f"{self.name} trains the {what}, all of which is frozen: expected weights that require grad"
                )
        parameters = [p for part in trained.values() for p in part]
        return {"all": torch.optim.SGD(parameters, lr=c.lr, momentum=c.momentum, weight_decay=c.weight_decay)}

    def step(
        self,
        batch: CaptionedImages,
        optimizers: dict[str, torch.optim.Optimizer],
        backward: Callable[[Tensor], None],
        progress: float,
    ) -> dict[str, Tensor]:
        """Attack texts, then images against them, and one step of SGD on the loss of both."""
        c, optimizer, where = self.config, optimizers["all"], self.dual.log_scale
        for group in optimizer.param_groups:
            group["lr"] = c.lr * (1 + cos(pi * progress)) / 2
        batch, first, idle = self._share(batch)
        pixels = batch.pixels() if self._more is None else self._more.pixels(batch)
        texts = [caption for row in batch.text for caption in row]
        owner = torch.repeat_interleave(torch.tensor([len(row) for row in batch.text])).to(where.device)
        pairs = PairBatch(
            pixels.to(where.device, where.dtype), texts, owner, batch.labels.to(where.device), first=first, idle=idle
        )
        with _named(f"step {round(progress * c.max_steps) + 1} of {c.max_steps}"):
            pairs, logged = self.attacked(pairs, batch.rows)
            optimizer.zero_grad()
            loss = self._descend(self._joined(pairs), backward)
        optimizer.step()
        if not self.image_alone:
            self.dual.clamp_scale()
        return {"loss": loss, "scale": self.dual.scale.detach()} | logged

    def _share(self, batch: CaptionedImages) -> tuple[CaptionedImages, int, bool]:
        """The rows that this rank takes, the number of their first text, and whether it has none: then a stand-in."""
        if self.ranks.world == 1:
            return batch, 0, False
        own = self.ranks.own(len(batch))
        idle = own.start == own.stop
        rows = torch.arange(len(batch), device=batch.labels.device)[slice(0, 1) if idle else own]
        share = replace(batch.select(rows), rows=None if batch.rows is None else batch.rows[rows])
        return share, sum(map(len, batch.text[: own.start])), idle

    def _joined(self, pairs: PairBatch) -> PairBatch:
        """The texts of the whole batch, as every rank then has them; the pixels stay this rank's."""
        ranks = self.ranks
        if ranks.world == 1:
            return pairs
        rows, gather = len(pairs.pixels) // pairs.copies, ranks.gather
        ids, owner, texts, before = [], [], [], 0
        for copy in range(pairs.copies):
            here = slice(copy * rows, copy * rows if pairs.idle else (copy + 1) * rows)
            mine = ((pairs.owner >= here.start) & (pairs.owner < here.stop)).nonzero()[:, 0]
            ids.append(gather(pairs.ids[here]))
            owner.append(gather(pairs.owner[mine] - here.start + ranks.own(len(ids[-1])).start + before))
            texts += ranks.joined([pairs.texts[i] for i in mine.tolist()])
            before += len(ids[-1])
        seen = None if pairs.seen is None else gather(pairs.seen[: 0 if pairs.idle else None])
        return replace(pairs, ids=torch.cat(ids), owner=torch.cat(owner), texts=texts, seen=seen)

    def attacked(self, pairs: PairBatch, rows: Tensor | None = None) -> tuple[PairBatch, dict[str, Tensor]]:
        """What a batch is trained on in its place, and what to log of it; rows number the images' noise."""
        return pairs, {}

    def _descend(self, pairs: PairBatch, backward: Callable[[Tensor], None]) -> Tensor:
        """The gradient of the whole batch's loss: of parts that go through the towers twice, where there is a chunk."""
        c = self.config
        sides, back = [self.image_passes(pairs, self.dual.encode_image)], None
        if not self.image_alone:
            texts, back = self.text_passes(pairs.texts, lambda *x: F.normalize(self.dual.text_embedding(*x), dim=1))
            sides.append(texts)

        def loss_of(image: Tensor, *text: Tensor) -> Tensor:
            parts = image.chunk(pairs.copies)
            image = torch.cat([self.ranks.gather(part[: 0 if pairs.idle else None]) for part in parts])
            against = self.targets(pairs).to(image) if back is None else text[0][back]
            scale = self.dual.scale.detach() if self.image_alone else self.dual.scale
            loss = self.contrast(image, against, scale, pairs.ids, pairs.ids[pairs.owner])
            _refuse_broken(loss, image, against, pairs)
            return loss

        return descend(sides, loss_of, backward, self.dual.log_scale.device, twice=c.chunk > 0)

    def contrast(self, image: Tensor, text: Tensor, scale: Tensor, of_image: Tensor, of_text: Tensor) -> Tensor:
        """The loss of embeddings (B, d) and (M, d), by the image numbers (B,) and (M,) that they belong to."""
        direction = "image" if self.image_alone else "both"
        return contrast(self.ranks, image, text, scale, (of_image, of_text), direction)

    def image_passes(self, pairs: PairBatch, encode: Callable[[Tensor], Tensor]) -> list[Callable[[], Tensor]]:
        """Passes over this rank's images. InputError where ranks would not draw dropout alike."""
        chunk, ranks = self.config.chunk, self.ranks
        if ranks.world == 1 or chunk:
            if ranks.world > 1 and self.config.dropout:
                raise InputError(
                    f"over ranks a chunk needs dropout 0, got chunk {chunk}, dropout {self.config.dropout}"
                )
            most = pairs.copies * max(ranks.counts(len(pairs.ids) // pairs.copies))
            passes = -(-most // (chunk or most))  # as many on every rank, which sharded towers need
            return [_wide(encode, part) for part in pairs.pixels.tensor_split(passes)]

        def drawn() -> Tensor:
            with ranks.draws(len(pairs.ids)):
                return widened(encode(pairs.pixels))

        return [drawn]

    def text_passes(
        self, texts: Sequence[str], encode: Callable[[Tensor, Tensor], Tensor]
    ) -> tuple[list[Callable[[], Tensor]], Tensor]:
        """Passes over texts of like length, and the rows of their results that restore the order."""
        device = self.dual.log_scale.device
        ids, mask = self.dual.tokenize(texts)
        order = torch.argsort(mask.sum(dim=1), stable=True)
        parts = [[x.to(device) for x in trimmed(ids[r], mask[r])] for r in order.split(self.config.chunk or _TEXTS)]
        over = partial(self.ranks.over, lambda *part: widened(encode(*part)))
        return [partial(over, *part) for part in parts], torch.argsort(order).to(device)

    def share_of(self, pairs: PairBatch, texts: Sequence[bool]) -> Tensor:
        """The share of a batch's texts, of all ranks, of which it is true."""
        counted = torch.tensor([sum(texts), len(texts)], device=pairs.ids.device) * (not pairs.idle)
        true, count = self.ranks.total(counted).tolist()
        return torch.tensor(true / count)

    def targets(self, pairs: PairBatch) -> Tensor:
        """Embeddings of a batch's texts in evaluation mode, without a graph, float32 or wider (M, d)."""
        if pairs.seen is not None:
            return pairs.seen
        encode = FlatTexts(self.dual, mixed_dtype(pairs.pixels.device))
        with encode.prepare():
            return encode(pairs.texts)

    def trouble(self, history: Sequence[Mapping[str, float]]) -> str | None:
        """MA2T with both sides augmented, and heads that began at random."""
        if self.config.augment_both:
            return BOTH
        if isinstance(self.dual, TwoTowers) and not self.config.start:
            return "the heads began at random: expected --start RUN, a run of `cmr-fast train clip`"
        return None

    @property
    def perturbation(self) -> str:
        """What the training pairs were replaced by, in words."""
        return "none"

    def test(self, dataset: CaptionedDataset) -> dict[str, Any]:
        """R@1, R@5, R@10 and ranks both ways on the test split, and what was trained on."""
        return {"perturbation": self.perturbation} | super().test(dataset)


class MatImg(Finetune):
    """MAT of images alone: PGD on images, both towers learn."""

    name: ClassVar[str] = "mat-img"
    Config: ClassVar[type] = MatImgConfig
    presets: ClassVar[dict[str, Any]] = presets_of(MatImgConfig)
    replicas_only: ClassVar[str] = ATTACKS

    def attacked(self, pairs: PairBatch, rows: Tensor | None = None) -> tuple[PairBatch, dict[str, Tensor]]:
        """Images away from their texts (Eq. 5, or the maximum of Eq. 3)."""
        c, device = self.config, pairs.pixels.device
        dtype, numbers = mixed_dtype(device), torch.arange(len(pairs.pixels)) if rows is None else rows
        with torch.autocast(device.type, enabled=False):  # towers run in 16 bits all the same, objectives do not
            targets = self.targets(pairs)
            among, of_text = targets, pairs.ids[pairs.owner]
            if c.away == "infonce":
                among, of_text = (self.ranks.gather(x[:0] if pairs.idle else x) for x in (targets, of_text))
            infonce = partial(_infonce, among, self.dual.scale.detach())
            guides = pairs.positive(of_text).to(targets) if c.away == "infonce" else pairs.mean_of_own(targets)
            atk = PGD(
                ImageTower(self.dual), c.eps, c.alpha, c.steps, loss=infonce if c.away == "infonce" else _cosine,
                strict=True, dtype=dtype, seed=int(torch.randint(2**62, ())), check=False, progress=False,
            )  # fmt: skip
            parts = torch.arange(len(pairs.pixels)).split(c.chunk or len(pairs.pixels))
            moved = [atk(pairs.pixels[part], guides[part], index=numbers[part]) for part in parts]
        return replace(pairs, pixels=torch.cat(moved), seen=targets), {}

    @property
    def perturbation(self) -> str:
        """The image attack."""
        c = self.config
        return f"images by PGD, {c.steps} x {c.alpha * 255:.3g}/255 within {c.eps * 255:.3g}/255 ({c.away})"


class Tecoa(MatImg):
    """TeCoA on captions (Mao et al. 2023): PGD on images, the image tower alone learns."""

    name: ClassVar[str] = "tecoa"
    Config: ClassVar[type] = TecoaConfig
    presets: ClassVar[dict[str, Any]] = presets_of(TecoaConfig)
    image_alone: ClassVar[bool] = True

    def trained(self) -> dict[str, list[nn.Parameter]]:
        """The image tower, and its head."""
        image = self.dual.parts()["image"]
        if not isinstance(self.dual, TwoTowers):
            return {"image tower": image}
        return {"image tower": image, "image head": [*self.dual.image_head.parameters()]}


class Mat(MatImg):
    """Multimodal adversarial training: BERT-Attack on texts, PGD on images against them, both towers learn."""

    name: ClassVar[str] = "mat"
    Config: ClassVar[type] = MatConfig
    presets: ClassVar[dict[str, Any]] = presets_of(MatConfig)
    raised: ClassVar[str] = "l2"
    """What the attack on texts raises."""

    def __init__(self, config: MatConfig) -> None:
        super().__init__(config)
        self._words: list[MaskedLM] = []  # in a list: no part of what is trained and stored

    @classmethod
    def completed(cls, config: Any) -> Any:
        """As of the others; InputError without a masked language model."""
        if not config.mlm:
            raise InputError(
                f"{cls.name} attacks captions with words of a masked language model: expected mlm, the folder of one "
                "that `cmr-fast train mlm` made; mat-img attacks images alone"
            )
        return super().completed(config)

    def fit_inputs(self, train: CaptionedImages) -> None:
        """The weights to begin with, and the masked language model."""
        super().fit_inputs(train)
        self._words = [MaskedLM.load(self.config.mlm)]

    def attacked(self, pairs: PairBatch, rows: Tensor | None = None) -> tuple[PairBatch, dict[str, Tensor]]:
        """Texts away from themselves (Eq. 4), then images away from these."""
        pairs, changed = self.attacked_texts(pairs)
        pairs, logged = super().attacked(pairs, rows)
        return pairs, {"changed": changed} | logged

    def attacked_texts(self, pairs: PairBatch) -> tuple[PairBatch, Tensor]:
        """The batch with its texts attacked, and the share of them that has changed."""
        c, device = self.config, pairs.pixels.device
        (mlm,) = self._words
        with torch.autocast(device.type, enabled=False):
            atk = BertAttack(
                self.dual, mlm.to(device), words=c.words, k=c.k, objective=self.raised, dtype=mixed_dtype(device),
                check=False,
            )  # fmt: skip
            with atk.holding():
                prepared = atk.prepare(pairs.texts)
                found = atk.finish(prepared)
                texts = [result.text for result in found]
                seen = atk.embedded(prepared, texts)
        changed = self.share_of(pairs, [bool(result.changes) for result in found])
        return replace(pairs, texts=texts, seen=seen), changed

    @property
    def perturbation(self) -> str:
        """Both attacks."""
        words = "1 word" if self.config.words == 1 else f"{self.config.words} words"
        return f"texts by BERT-Attack, {words} ({self.raised}), {super().perturbation}"


def _wide(encode: Callable[..., Tensor], *inputs: Any) -> Callable[[], Tensor]:
    """A pass whose vectors are float32 or wider."""
    return lambda: widened(encode(*inputs))


def _infonce(targets: Tensor, scale: Tensor, outputs: Tensor, positive: Tensor) -> Tensor:
    """(B,): InfoNCE of images (B, d) among texts (M, d); positives (B, M) sum to 1 in each row."""
    logits = scale.to(outputs) * (outputs @ targets.to(outputs).T)
    return -(positive * logits.log_softmax(dim=1)).sum(dim=1)


def _cosine(outputs: Tensor, own: Tensor) -> Tensor:
    """(B,): minus the cosine of images (B, d) with their texts (B, d), of several the mean."""
    return -(outputs * own.to(outputs)).sum(dim=1)


def mixed_dtype(device: torch.device) -> torch.dtype | None:
    """What autocast around the step computes in; None where there is none."""
    return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None


def _started(run: str) -> CaptionRetriever:
    model: Method = load_model(run)
    if not isinstance(model, CaptionRetriever):
        raise InputError(f"start={run}: a run of {model.name}, expected one on captions (clip)")
    return model


@contextmanager
def _named(step: str) -> Iterator[None]:
    """An InputError from inside says in which step."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{step}: {error}") from error


def _refuse_broken(loss: Tensor, image: Tensor, text: Tensor, pairs: PairBatch) -> None:
    """InputError for a loss that is not finite: whose embedding it comes from."""
    if bool(loss.isfinite()):
        return
    whose = "no embedding is broken, the temperature may be"
    for what, vectors, ids in (("image", image, pairs.ids), ("a caption of image", text, pairs.ids[pairs.owner])):
        broken = (~vectors.isfinite().all(dim=1)).nonzero()[:, 0]
        if len(broken):
            whose = f"{what} {int(ids[broken[0]])} has an embedding that is not finite"
            break
    raise InputError(
        f"the loss is {loss.item()} ({whose}); expected a finite one: lower lr. A checkpoint, if there is one, holds "
        "an earlier step"
    )
