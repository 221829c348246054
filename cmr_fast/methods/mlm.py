"""Training of a masked language model on captions (Devlin et al. 2019, section 3.1): what BERT-Attack takes words from.

15 % of the pieces are to be guessed, of which 80 % are replaced by [MASK], 10 % by another piece, 10 % by nothing. The
vocabulary's layer sees these positions alone. Captions of a batch are of like length.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from cmr_fast._terminal import track
from cmr_fast.errors import InputError
from cmr_fast.methods._settings import check_finite, check_kinds, check_least
from cmr_fast.models.mlm import MaskedLM


@dataclass(frozen=True)
class MLMConfig:
    """How a masked LM is trained; the defaults are BERT's own but for the rate and the few steps of a fine-tuning."""

    steps: int = 400
    """Batches."""
    batch: int = 64
    """Captions a batch."""
    lr: float = 3e-4
    """Of AdamW at its highest: a tenth of the steps go up to it, the rest down to 0."""
    weight_decay: float = 0.01
    """Of all weights but biases and normalisations."""
    share: float = 0.15
    """Of the pieces that are to be guessed."""
    seed: int = 0
    """Of the head's first weights, the batches and the masks."""

    def __post_init__(self) -> None:
        check_kinds(self)
        check_least(self, steps=1, batch=1, seed=0)
        check_finite(self, "lr", "weight_decay")
        if not 0 < self.share <= 1:
            raise InputError(f"share must be above 0 and at most 1, got {self.share}")


@dataclass(frozen=True)
class MLMScore:
    """How well masked pieces are guessed: `loss` in nats, shares from 0 to 1 that are the first guess or among ten."""

    loss: float
    top1: float
    top10: float
    pieces: int


@dataclass
class _Masker:
    """Batches whose pieces are hidden, from a generator of its own."""

    model: MaskedLM
    share: float
    generator: torch.Generator
    cls: int = field(init=False)
    sep: int = field(init=False)

    def __post_init__(self) -> None:
        self.cls, self.sep = self.model.ends

    def batch(self, rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """ids and mask (N, L), where something is hidden, bool (N, L), and what, int64 (M,)."""
        pad = int(self.model.tokenizer.pad_token_id)
        ids = torch.full((len(rows), 2 + max(map(len, rows))), pad)
        for number, row in enumerate(rows):
            ids[number, : len(row) + 2] = torch.tensor([self.cls, *row, self.sep])
        mask = ids != pad
        words = ~torch.isin(ids, torch.tensor(sorted(self.model.special)))
        draw, kind = torch.rand((2, *ids.shape), generator=self.generator)
        draw = draw.masked_fill(~words, 2.0)
        hidden = (draw < self.share) | ((draw == draw.amin(dim=1, keepdim=True)) & words)  # one a caption at least
        targets = ids[hidden]
        other = torch.randint(self.model.pieces_known, ids.shape, generator=self.generator)
        ids = torch.where(hidden & (kind < 0.8), self.model.mask, ids)
        ids = torch.where(hidden & (kind >= 0.9), other, ids)
        device = self.model.device
        return ids.to(device), mask.to(device), hidden.to(device), targets.to(device)


def train_mlm(
    model: MaskedLM, captions: Sequence[str], config: MLMConfig | None = None, *, valid: Sequence[str] = ()
) -> list[MLMScore]:
    """Train a masked LM on captions, in place.

    Parameters
    ----------
    model
        With or without a trained head; left in evaluation mode.
    captions
        Texts; longer ones than the model's context are cut.
    config
        None: the defaults.
    valid
        Captions to measure before and after.

    Returns
    -------
    list of MLMScore
        Of `valid` before and after; empty where there are none.

    Raises
    ------
    InputError
        For captions without words, and a loss that is not finite.
    """
    config = config or MLMConfig()
    rows = _rows(model, captions)
    masker = _Masker(model, config.share, torch.Generator().manual_seed(config.seed))
    scores = [score_mlm(model, valid, share=config.share)] if valid else []
    decay = [p for p in model.parameters() if p.ndim > 1]
    plain = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": decay, "weight_decay": config.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=config.lr)
    warm = max(1, config.steps // 10)
    rate = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warm, (config.steps - step) / max(1, config.steps - warm))
    )
    model.train()
    with torch.random.fork_rng(devices=[]), torch.enable_grad():  # dropout draws from the global generator
        torch.manual_seed(config.seed)
        batches = _batches(rows, config.batch, masker.generator)
        for step in track(range(config.steps), "training the masked LM"):
            ids, mask, hidden, targets = masker.batch(next(batches))
            loss = F.cross_entropy(model.logits(model.hidden(ids, mask)[hidden]), targets)
            if not math.isfinite(loss.item()):
                raise InputError(
                    f"the loss is {loss.item()} at step {step}: expected a finite one; lower lr={config.lr}"
                )
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            rate.step()
    model.eval()
    return [*scores, score_mlm(model, valid, share=config.share)] if valid else []


@torch.no_grad()
def score_mlm(model: MaskedLM, captions: Sequence[str], *, share: float = 0.15, batch: int = 64) -> MLMScore:
    """How well a masked LM guesses pieces of captions; which ones are hidden is always the same.

    Parameters
    ----------
    model
        In any mode; measured in evaluation mode.
    captions
        Texts.
    share
        Of the pieces that are hidden.
    batch
        Captions a forward pass.

    Raises
    ------
    InputError
        For captions without words.
    """
    masker = _Masker(model, share, torch.Generator().manual_seed(0))
    rows = sorted(_rows(model, captions), key=len)
    losses, first, ten = [], [], []
    training = model.training
    model.eval()
    try:
        for start in range(0, len(rows), batch):
            ids, mask, hidden, targets = masker.batch(rows[start : start + batch])
            logits = model.logits(model.hidden(ids, mask)[hidden]).float()
            losses.append(F.cross_entropy(logits, targets, reduction="none"))
            hits = logits.topk(min(10, logits.shape[1]), dim=1).indices == targets[:, None]
            first.append(hits[:, 0])
            ten.append(hits.any(dim=1))
    finally:
        model.train(training)
    loss = torch.cat(losses)
    return MLMScore(
        float(loss.mean()), float(torch.cat(first).float().mean()), float(torch.cat(ten).float().mean()), len(loss)
    )


def _rows(model: MaskedLM, captions: Sequence[str]) -> list[list[int]]:
    """The pieces of each caption that has any."""
    encoded = model.tokenizer(list(captions), add_special_tokens=False, padding=False, truncation=False)["input_ids"]
    rows = [row[: model.context - 2] for row in encoded if any(piece not in model.special for piece in row)]
    if not rows:
        raise InputError(f"{len(captions)} captions, none with a word that the masked LM knows: expected at least one")
    return rows


def _batches(rows: Sequence[Sequence[int]], batch: int, generator: torch.Generator) -> Iterator[list[Sequence[int]]]:
    """Shuffled batches without end, of captions of like length."""
    while True:
        order = torch.randperm(len(rows), generator=generator).tolist()
        pools = [order[start : start + 50 * batch] for start in range(0, len(order), 50 * batch)]
        parts = []
        for pool in pools:
            pool.sort(key=lambda number: len(rows[number]))
            parts += [pool[start : start + batch] for start in range(0, len(pool), batch)]
        for number in torch.randperm(len(parts), generator=generator).tolist():
            yield [rows[row] for row in parts[number]]
