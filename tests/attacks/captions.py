"""A small BERT with random weights in float64 as victim and as masked LM, and captions that its vocabulary splits."""

import tempfile
from functools import lru_cache
from pathlib import Path

import pytest
import torch
from torch import nn

transformers = pytest.importorskip("transformers")

from cmr_fast.models.mlm import MaskedLM  # noqa: E402

_WORDS = (
    "dog dogs man woman child ball grass water street red blue green small big young runs plays jumps sits walks holds "
    "throws brown black white bike snow beach park tree house shirt hat camera crowd the a in on of with and is her his"
)
WORDS = _WORDS.split()
PIECES = ["##ing", "##er", "##s", "##es", "##ly", "##board", "##man", "##ed"]
LETTERS = [*"abcdefghijklmnopqrstuvwxyz0123456789.,'!-"]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
VOCABULARY = list(dict.fromkeys([*SPECIAL, *LETTERS, *(f"##{x}" for x in LETTERS[:36]), *PIECES, *WORDS]))
CAPTIONS = (
    "a small dog runs on the grass",
    "the man in a red shirt throws a ball",
    "woman walking with her dogs in the park",
    "two children playing on a beach",
    "a snowboarder jumps",
    "dog",
    "the man's hat is blue , and the house is big .",
    "a black and white dog is jumping over a tree in the snow with a ball",
    "street",
    "young woman sits by the water holding a camera",
)


@lru_cache(1)
def tokenizer():
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "vocab.txt").write_text("\n".join(VOCABULARY) + "\n")
        return transformers.BertTokenizerFast.from_pretrained(folder, model_max_length=64)


def config(**options):
    return transformers.BertConfig(
        vocab_size=len(VOCABULARY), hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
        max_position_embeddings=64, initializer_range=0.35, **options,
    )  # fmt: skip


class Victim(nn.Module):
    """A text tower: mean over the mask, a projection, rows of length 1; and linear images."""

    def __init__(self, seed: int = 0, context: int = 64) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.network = transformers.BertModel(config(), add_pooling_layer=False).double()
            self.project = nn.Linear(32, 16, bias=False).double()
            self.see = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2), nn.GELU(), nn.Flatten(), nn.LazyLinear(16)).double()
            self.see(torch.zeros(1, 3, 12, 12, dtype=torch.float64))
        self.tokenizer, self.context = tokenizer(), context
        self.texts = 0

    def tokenize(self, texts):
        encoded = self.tokenizer(
            list(texts), padding=True, truncation=True, max_length=self.context, return_tensors="pt"
        )
        return encoded["input_ids"], encoded["attention_mask"].bool()

    def encode_text(self, ids, mask):
        self.texts += len(ids)
        hidden = self.network(input_ids=ids, attention_mask=mask.long()).last_hidden_state
        mean = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        return nn.functional.normalize(self.project(mean), dim=-1)

    def encode_image(self, pixels):
        return nn.functional.normalize(self.see(pixels), dim=-1)


@lru_cache(1)
def whole_mlm():
    """transformers' own model, for the oracles."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return transformers.BertForMaskedLM(config()).double().eval()


@lru_cache(1)
def masked_lm():
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return MaskedLM(transformers.BertForMaskedLM(config()).double(), tokenizer())


@lru_cache(2)
def victim(context: int = 64):
    return Victim(context=context).eval()
