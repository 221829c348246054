"""Two small pretrained towers in their libraries' files, for tests of what stands on towers."""

from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from torch import Tensor

PROBE = ("a", "man", "and", "woman", "walk", "with", "dog", "on", "the", "street")


def text_folder(place: Path, words: Iterable[str], **settings: object) -> Path:
    """A small BERT and its tokenizer, with random weights, in transformers' files."""
    transformers = pytest.importorskip("transformers")
    vocabulary = list(dict.fromkeys(("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *PROBE, *words)))
    (place / "vocab.txt").write_text("\n".join(vocabulary) + "\n")
    transformers.BertTokenizerFast.from_pretrained(place).save_pretrained(place)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    torch.manual_seed(0)
    config = transformers.BertConfig(**({"vocab_size": len(vocabulary), "initializer_range": 0.5, **sizes} | settings))
    transformers.BertModel(config).save_pretrained(place)
    return place


def image_file(place: Path, images: Tensor) -> Path:
    """Weights of timm's test_efficientnet, random but for the statistics of these images."""
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    network = timm.create_model("test_efficientnet").train()
    for _ in range(30):
        network(images)
    torch.save(network.state_dict(), place / "image.pth")
    return place / "image.pth"


def towers(place: Path, words: Iterable[str], images: Tensor) -> str:
    """What `--towers` takes: both of them, in the folder `place`."""
    return f"timm/test_efficientnet@{image_file(place, images)}+{text_folder(place, words)}"
