"""Masked language models: any of transformers' from a folder or by name, or a new head on a sentence encoder.

The words that a text attack tries come from here. The vocabulary's layer, most of the cost, is kept apart from the
network: logits are made of the positions asked for and of no others.
"""

import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from cmr_fast.errors import InputError
from cmr_fast.models.hub import hub_for
from cmr_fast.models.text import transformers_library

LONGEST = 512  # tokens, where a model does not say


class MaskedLM(nn.Module):
    """A masked language model and its tokenizer.

    Parameters
    ----------
    network
        A masked LM of transformers (BertForMaskedLM and its kin), whose last layer gives a logit for each word piece.
    tokenizer
        Its fast tokenizer, of WordPiece or of pieces that mark where a word begins (Ġ, ▁).

    Raises
    ------
    InputError
        For a network without an output layer, or whose tokenizer has more pieces than it has embeddings, or far fewer.

    Attributes
    ----------
    context
        The most tokens that a text may have, the two at its ends counted.
    mask
        Number of [MASK].
    special
        Numbers of pieces that are no words: [CLS], [SEP], [PAD], [UNK], [MASK].
    """

    def __init__(self, network: Any, tokenizer: Any) -> None:
        super().__init__()
        decoder = network.get_output_embeddings()
        self._place = next((name for name, module in network.named_modules() if module is decoder), "")
        if not isinstance(decoder, nn.Linear) or not self._place:
            raise InputError(f"{type(network).__name__} has no linear output layer, expected a masked language model")
        self.network, self.tokenizer, self.decoder = network, tokenizer, decoder
        self.pieces_known = len(tokenizer)
        embeddings = network.get_input_embeddings().num_embeddings
        if not 0.9 * embeddings <= self.pieces_known <= embeddings or any(  # fewer by what weights are padded
            getattr(tokenizer, f"{name}_token_id") is None for name in ("cls", "sep", "pad", "mask", "unk")
        ):
            raise InputError(
                f"the tokenizer has {self.pieces_known} pieces and the special tokens {tokenizer.all_special_tokens}, "
                f"the model {embeddings} embeddings: they do not belong together"
            )
        self.special = frozenset(int(i) for i in tokenizer.all_special_ids)
        self.mask = int(tokenizer.mask_token_id)
        positions = int(getattr(network.config, "max_position_embeddings", LONGEST))
        offset = getattr(network.config, "pad_token_id", 0) + 1 if "roberta" in network.config.model_type else 0
        self.context = min(positions - offset, int(tokenizer.model_max_length))
        self._wordpiece = type(tokenizer.backend_tokenizer.model).__name__ == "WordPiece"
        self._known: dict[str, list[int]] = {}
        network.set_submodule(self._place, nn.Identity())

    @property
    def ends(self) -> tuple[int, int]:
        """Numbers of the pieces before and after a text: [CLS], [SEP]."""
        return int(self.tokenizer.cls_token_id), int(self.tokenizer.sep_token_id)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.decoder.weight.device

    def pieces(self, words: Sequence[str]) -> list[list[int]]:
        """Numbers of each word's pieces, without special ones around them.

        Parameters
        ----------
        words
            Single words.
        """
        new = list(dict.fromkeys(word for word in words if word not in self._known))
        if new:
            texts = new if self._wordpiece else [f" {word}" for word in new]
            encoded = self.tokenizer(texts, add_special_tokens=False, padding=False, truncation=False)["input_ids"]
            self._known.update(zip(new, encoded, strict=True))
        return [self._known[word] for word in words]

    def text(self, pieces: Sequence[int]) -> str:
        """What pieces read; ## or the mark of a word's beginning is kept where the first piece has it.

        Parameters
        ----------
        pieces
            Numbers, one or more.
        """
        tokens = [str(token) for token in self.tokenizer.convert_ids_to_tokens(list(pieces))]
        if not self._wordpiece:
            return tokens[0] if len(tokens) == 1 else str(self.tokenizer.convert_tokens_to_string(tokens)).strip()
        return tokens[0] + "".join(t[2:] if t.startswith("##") else f" {t}" for t in tokens[1:])

    def word(self, pieces: Sequence[int]) -> str | None:
        """What pieces read, or None where they are no whole word: ##ing, a special piece, a part of a character.

        Parameters
        ----------
        pieces
            Numbers, one or more.
        """
        if any(piece in self.special for piece in pieces):
            return None
        if self._wordpiece:
            text = self.text(pieces)
            return None if text.startswith("##") else text
        tokens = self.tokenizer.convert_ids_to_tokens(list(pieces))
        begins = tokens[0].startswith(("Ġ", "▁"))
        text = str(self.tokenizer.convert_tokens_to_string(tokens)).strip()
        return text if begins and "\ufffd" not in text else None  # that stands for a part of a character

    def hidden(self, ids: Tensor, mask: Tensor) -> Tensor:
        """What the output layer sees.

        Parameters
        ----------
        ids, mask
            int64 and bool (N, L), padded on the right.

        Returns
        -------
        Tensor
            Float (N, L, d).
        """
        return cast(Tensor, self.network(input_ids=ids, attention_mask=mask.long()).logits)

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits of the word pieces.

        Parameters
        ----------
        hidden
            Float (..., d), of positions of `hidden`.

        Returns
        -------
        Tensor
            Float (..., V), V the tokenizer's pieces.
        """
        return cast(Tensor, self.decoder(hidden))[..., : self.pieces_known]  # weights may be padded

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Logits (N, L, V) of every position, as transformers' model gives them."""
        return self.logits(self.hidden(ids, mask))

    def save(self, folder: Path) -> None:
        """Write model and tokenizer as transformers does, for `MaskedLM.load` and for transformers itself.

        Parameters
        ----------
        folder
            Made where it is missing; what it holds of an earlier save is replaced as a whole.
        """
        folder.parent.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        try:
            self.network.set_submodule(self._place, self.decoder)
            try:
                with _quiet(transformers_library()):
                    self.network.save_pretrained(aside)
            finally:
                self.network.set_submodule(self._place, nn.Identity())
            self.tokenizer.save_pretrained(aside)
            folder.mkdir(exist_ok=True)
            for file in sorted(aside.iterdir()):
                os.replace(file, folder / file.name)
        finally:
            shutil.rmtree(aside, ignore_errors=True)

    @classmethod
    def load(cls, name: str | Path, dtype: torch.dtype = torch.float32) -> "MaskedLM":
        """A masked LM as transformers stores it.

        Parameters
        ----------
        name
            A folder, or a name where the hub can be reached.
        dtype
            Of the weights.

        Raises
        ------
        InputError
            Where there is none, its tokenizer belongs to another, or its head was not in the file: such a head is drawn
            anew at each load.
        """
        network, tokenizer, missing = _opened(name, dtype)
        if missing:
            raise InputError(
                f"{name}: no masked language model, its file lacks {', '.join(sorted(missing)[:3])}"
                f"{' ...' if len(missing) > 3 else ''}, which would be random; give it a head with: cmr-fast train mlm "
                f"--base {name}"
            )
        return cls(network, tokenizer).eval()

    @classmethod
    def on_encoder(cls, name: str | Path, seed: int = 0) -> "MaskedLM":
        """A new head, tied to the word embeddings, on an encoder that has none; random until it is trained.

        Parameters
        ----------
        name
            Of the encoder (BertModel and its kin): a folder or a name.
        seed
            Of the head's first weights.

        Raises
        ------
        InputError
            Where there is no encoder, or more than the head is missing in its file.
        """
        with _seeded(seed):
            network, tokenizer, missing = _opened(name, torch.float32)
        inside = {key for key in missing if key.startswith(f"{network.base_model_prefix}.")}
        if inside:
            raise InputError(f"{name}: its file lacks parts of the encoder itself: {', '.join(sorted(inside)[:3])}")
        return cls(network, tokenizer).eval()

    @classmethod
    def scratch(
        cls, captions: Sequence[str], *, vocabulary: int = 8000, width: int = 128, layers: int = 2, seed: int = 0
    ) -> "MaskedLM":
        """A small BERT with random weights, and a WordPiece vocabulary of these captions.

        Parameters
        ----------
        captions
            Texts.
        vocabulary
            Most word pieces.
        width, layers
            Of the network; heads have 32 units.
        seed
            Of the weights.
        """
        transformers = transformers_library()
        from tokenizers import BertWordPieceTokenizer

        trained = BertWordPieceTokenizer()
        trained.train_from_iterator(captions, vocab_size=vocabulary, min_frequency=2, show_progress=False)
        with tempfile.TemporaryDirectory() as folder:
            trained.save_model(folder)
            tokenizer = transformers.BertTokenizerFast.from_pretrained(folder, model_max_length=LONGEST)
        config = transformers.BertConfig(
            vocab_size=len(tokenizer), hidden_size=width, num_hidden_layers=layers, num_attention_heads=width // 32,
            intermediate_size=4 * width, pad_token_id=tokenizer.pad_token_id,
        )  # fmt: skip
        with _seeded(seed):
            network = transformers.BertForMaskedLM(config)
        return cls(network, tokenizer).eval()


def _opened(name: str | Path, dtype: torch.dtype) -> tuple[Any, Any, set[str]]:
    """Network, tokenizer, and the names of the weights that the file lacks."""
    transformers = transformers_library()
    try:
        with _quiet(transformers), hub_for(name):  # what is missing is said here
            network, info = transformers.AutoModelForMaskedLM.from_pretrained(
                str(name), output_loading_info=True, dtype=dtype
            )
            tokenizer = _tokenizer(transformers, name)
        return network, tokenizer, set(info["missing_keys"])
    except InputError:
        raise
    except Exception as error:  # transformers raises OSError, ValueError, KeyError, and those of its hub
        reason = " ".join(str(error).split())[:200]
        if Path(name).is_dir():
            raise InputError(f"{name}: no masked language model in this folder ({reason})") from error
        raise InputError(
            f"{name}: no such folder, nor a name to load ({reason}); expected the folder of one, as `cmr-fast train "
            "mlm` makes it"
        ) from error


@contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """Without transformers' warnings and bars."""
    log = transformers.utils.logging
    level, bars = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity_error()
    log.disable_progress_bar()
    try:
        yield
    finally:
        log.set_verbosity(level)
        if bars:
            log.enable_progress_bar()


def _tokenizer(transformers: Any, name: str | Path) -> Any:
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(str(name), use_fast=True)
    except ValueError:  # a folder with vocab.txt alone, which only the class itself takes
        tokenizer = transformers.BertTokenizerFast.from_pretrained(str(name))
    if not tokenizer.is_fast:
        raise InputError(f"{name}: its tokenizer has no fast form, which the pieces of words are read from")
    return tokenizer


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """torch's global random numbers from `seed` on, and as they were after."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield
