"""Dual encoders by name: a pair of pretrained towers with projection heads, or a model of open_clip.

    efficientnet-lite0+minilm         two packages of pretrained weights (extra `towers`)
    IMAGE+TEXT                        IMAGE: efficientnet-lite0, timm/NAME, timm/NAME@FILE or, AlexNet and VGG up to
                                      fc7, torchvision/NAME@FILE; TEXT: minilm, or a folder of transformers
    open_clip/NAME                    an architecture of open_clip, at random
    open_clip/NAME@WEIGHTS            with a pretrained tag of open_clip, or a checkpoint file, by its own loading code
    transformers/FOLDER               a CLIPModel of transformers
    fare2 fare4 tecoa2 tecoa4 leaf    robust ViT-L/14 from the hub: images (Schlarmann et al. 2024, Mao et al. 2023), of
                                      leaf texts too (Abad Rocamora et al. 2025)

A head is a linear map plus a network with one hidden layer, of what its tower gives.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cmr_fast.errors import InputError
from cmr_fast.models.dual import DualEncoder
from cmr_fast.models.hub import hub_for
from cmr_fast.models.text import SentenceTower, minilm, transformers_library
from cmr_fast.models.towers import Lite0, TorchvisionTower, weights_file

LITE0, MINILM, TIMM, OPEN_CLIP, TRANSFORMERS = "efficientnet-lite0", "minilm", "timm/", "open_clip/", "transformers/"
TORCHVISION = "torchvision/"
ROBUST = {name: f"hf-hub:chs20/{name}-clip" for name in ("fare2", "fare4", "tecoa2", "tecoa4")}
LEAF = {"leaf": "LEAF-CLIP/CLIP-ViT-L-rho50-k1-constrained-FARE2"}
INSTALL = 'pip install "cmr-fast[clip]"'


def dual_encoder(
    towers: str, *, dim: int = 512, hidden: int = 512, dropout: float = 0.3, pretrained: bool = True
) -> DualEncoder:
    """The dual encoder of that name.

    Parameters
    ----------
    towers : str
        As the module lists them.
    dim, hidden : int
        Of the space, and of the heads' hidden layer; open_clip's models have their own.
    dropout : float
        Of the heads' hidden layer.
    pretrained : bool
        Bring the weights; else they are random, to be replaced by a stored state.

    Returns
    -------
    DualEncoder
        In eval mode.

    Raises
    ------
    InputError
        For names that are none of these, and where packages, files or the hub are out of reach: what to do then.
    """
    model: DualEncoder
    if towers in LEAF or towers.startswith(TRANSFORMERS):
        model = TransformersClip(towers)
    elif towers in ROBUST or towers.startswith(OPEN_CLIP):
        model = OpenClip(towers)
    elif "+" in towers:
        model = TwoTowers(towers, dim, hidden, dropout)
    else:
        names = ", ".join((*ROBUST, *LEAF))
        raise InputError(
            f"towers must be IMAGE+TEXT (such as {LITE0}+{MINILM}), {OPEN_CLIP}NAME, {TRANSFORMERS}FOLDER or one of "
            f"{names}, got {towers!r}"
        )
    if pretrained:
        model.load()
    return model.eval()


class Head(nn.Module):
    """(N, width) of a tower -> (N, dim)."""

    def __init__(self, width: int, dim: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.linear = nn.Linear(width, dim)
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Dropout(dropout), nn.Linear(hidden, dim))

    def forward(self, features: Tensor) -> Tensor:
        """Linear plus one hidden layer."""
        return cast(Tensor, self.linear(features) + self.mlp(features))


class TimmTower(nn.Module):
    """A network of timm without its classifier; batch normalisation by the stored statistics, always in eval mode."""

    def __init__(self, name: str, weights: str | None = None) -> None:
        super().__init__()
        try:
            import timm
        except ImportError as error:
            raise InputError("image towers need timm: pip install timm") from error
        if name not in timm.list_models():
            raise InputError(f"timm has no network {name!r}, expected a name of timm.list_models()")
        network: Any = timm.create_model(name, pretrained=False)
        self.weights = weights
        config = timm.data.resolve_data_config({}, model=network)
        network.reset_classifier(0)
        self.network: Any = network
        self.width: int = network.num_features
        self.mean, self.std = config["mean"], config["std"]

    def load(self) -> None:
        """Take the weights of the file, where one was named. InputError where it holds something else."""
        if self.weights is None:
            return
        import timm

        if not Path(self.weights).is_file():
            raise InputError(f"{self.weights}: no such file, expected weights for timm")
        try:
            stored = timm.models.load_state_dict(self.weights)
            self.network.load_state_dict(stored, strict=False)
            lacking = set(self.network.state_dict()) - set(stored)
        except Exception as error:
            raise InputError(f"{self.weights}: not weights of this network ({error})") from error
        if lacking:
            raise InputError(f"{self.weights}: lacks {len(lacking)} of the network's tensors, {min(lacking)} first")

    def train(self, mode: bool = True) -> "TimmTower":
        """Stay in eval mode."""
        return super().train(False)


class TwoTowers(DualEncoder):
    """An image tower and a text tower, each under a head of its own.

    Parameters
    ----------
    towers : str
        IMAGE+TEXT, as the module lists them. The weights are random until `load` or a stored state.
    dim, hidden, dropout
        Of the heads.

    Raises
    ------
    InputError
        For unknown names, and packages or files that are missing.
    """

    def __init__(self, towers: str, dim: int = 512, hidden: int = 512, dropout: float = 0.3) -> None:
        image, _, text = towers.partition("+")
        tower: Any = _image_tower(image)
        super().__init__(tower.mean, tower.std)
        self.image_tower = tower.to(memory_format=torch.channels_last)  # half as long again on a CPU without it
        self.text_tower = SentenceTower(minilm() if text == MINILM else text)
        self.image_head = Head(tower.width, dim, hidden, dropout)
        self.text_head = Head(self.text_tower.width, dim, hidden, dropout)

    def load(self) -> None:
        """Take the towers' pretrained weights; the heads stay random."""
        if isinstance(self.image_tower, Lite0):
            self.image_tower.load(weights_file())
        else:
            self.image_tower.load()
        self.text_tower.load()

    def parts(self) -> dict[str, list[nn.Parameter]]:
        """Both towers less what is frozen, and the heads."""
        heads = [*self.image_head.parameters(), *self.text_head.parameters(), self.log_scale]
        towers = {"image": self.image_tower, "text": self.text_tower}
        return {n: [p for p in tower.parameters() if p.requires_grad] for n, tower in towers.items()} | {"heads": heads}

    def towers(self) -> list[nn.Module]:
        """Both, without the heads."""
        return [self.image_tower.network, self.text_tower.network]

    def freeze_blocks(self, count: int) -> None:
        """Keep the weights of the image tower's first `count` blocks, and of what lies before them.

        Raises
        ------
        InputError
            Where the tower has no such blocks.
        """
        network = self.image_tower.network
        if count and len(getattr(network, "blocks", ())) < count:
            raise InputError(f"the image tower has {len(getattr(network, 'blocks', ()))} blocks to freeze, got {count}")
        for name, child in network.named_children() if count else ():
            if name == "blocks":
                child[:count].requires_grad_(False)
                return
            child.requires_grad_(False)

    def image_features(self, pixels: Tensor) -> Tensor:
        """(N, 3, H, W) pixels from 0 to 1 -> (N, width), what the image head sees."""
        return self._image_features(self.normalised(pixels))

    def _image_features(self, normalised: Tensor) -> Tensor:
        return cast(Tensor, self.image_tower.network(normalised.contiguous(memory_format=torch.channels_last)))

    def text_features(self, ids: Tensor, mask: Tensor) -> Tensor:
        """(N, L) ids and mask -> (N, width), what the text head sees."""
        return cast(Tensor, self.text_tower(ids, mask))

    def image_embedding(self, normalised: Tensor) -> Tensor:
        """Tower, then head."""
        return cast(Tensor, self.image_head(self._image_features(normalised)))

    def text_embedding(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Tower, then head."""
        return cast(Tensor, self.text_head(self.text_tower(ids, mask)))

    def tokens(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """By the text tower's tokenizer."""
        return self.text_tower.tokenize(texts)


class OpenClip(DualEncoder):
    """A model of open_clip, with texts trimmed to their length where its text tower is causal.

    Parameters
    ----------
    name : str
        open_clip/NAME, open_clip/NAME@WEIGHTS or a robust checkpoint's name. The weights are random until `load`.

    Raises
    ------
    InputError
        Where open_clip is missing or knows no such architecture, or the hub cannot be reached for its description.
    """

    def __init__(self, name: str) -> None:
        architecture, _, weights = ROBUST.get(name, name.removeprefix(OPEN_CLIP)).partition("@")
        model = _open_clip_model(architecture, None)
        preprocess = model.visual.preprocess_cfg if hasattr(model.visual, "preprocess_cfg") else {}
        size = model.visual.image_size
        mean = preprocess.get("mean", _CLIP_MEAN)
        std = preprocess.get("std", _CLIP_STD)
        super().__init__(mean, std, side=int(size[0] if isinstance(size, list | tuple) else size))
        self.architecture, self.weights = architecture, weights or None
        self.model = model
        _take_scale(self, model)
        self.tokenizer = _open_clip_tokenizer(architecture)
        self.context = int(model.context_length)
        pool = getattr(self.text, "text_pool_type", getattr(self.text, "pool_type", None))
        causal = getattr(self.text, "attn_mask", None) is not None and getattr(self.text, "cls_emb", None) is None
        self.cuts = causal and pool in ("argmax", "eos")

    def load(self) -> None:
        """Take the weights of the tag, file or hub, where one is named. InputError where they are out of reach."""
        hub = self.architecture.startswith("hf-hub:")
        if self.weights is not None or hub:
            stored = _open_clip_model(self.architecture, self.weights, hub=hub)
            _take_scale(self, stored)
            self.model.load_state_dict(stored.state_dict())

    def parts(self) -> dict[str, list[nn.Parameter]]:
        """open_clip's image tower, and everything else of the text's; of heads there is the temperature alone."""
        image = [*self.model.visual.parameters()]
        known = {id(p) for p in (*image, self.log_scale, self.model.logit_bias)}
        return {
            "image": image,
            "text": [p for p in self.model.parameters() if id(p) not in known],
            "heads": [self.log_scale],
        }

    def towers(self) -> list[nn.Module]:
        """The image tower, and of the text's the network and the words' vectors."""
        text = [getattr(self.text, name, None) for name in ("transformer", "token_embedding")]
        return [self.model.visual, *(part for part in text if part is not None)]

    def image_embedding(self, normalised: Tensor) -> Tensor:
        """open_clip's own."""
        return cast(Tensor, self.model.encode_image(normalised))

    def text_embedding(self, ids: Tensor, mask: Tensor) -> Tensor:
        """open_clip's, which refuses rows shorter than its context: with the positions and the causal mask cut here."""
        if not self.cuts:  # the padding is seen, and belongs to the text
            return cast(Tensor, self.model.encode_text(F.pad(ids, (0, self.context - ids.shape[1]), value=self._pad)))
        text, length = self.text, ids.shape[1]
        dtype = text.transformer.get_cast_dtype()
        x = text.token_embedding(ids).to(dtype) + text.positional_embedding[:length].to(dtype)
        x = text.ln_final(text.transformer(x, attn_mask=text.attn_mask[:length, :length]))
        x = x[torch.arange(len(x), device=x.device), mask.sum(dim=1) - 1]  # the end of the text
        if text.text_projection is None:
            return cast(Tensor, x)
        linear = isinstance(text.text_projection, nn.Linear)
        return cast(Tensor, text.text_projection(x) if linear else x @ text.text_projection)

    @property
    def text(self) -> Any:
        """The module of the text tower's parts, of some architectures the model itself."""
        return getattr(self.model, "text", self.model)

    @property
    def _pad(self) -> int:
        return int(getattr(self.text, "pad_id", 0) or 0)

    def tokens(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """By open_clip's tokenizer; of texts too long the end is cut and the end token kept."""
        ids: Tensor = self.tokenizer(list(texts), context_length=self.context)
        if self.cuts:  # the end token has the highest id
            return ids, torch.arange(ids.shape[1]) <= ids.argmax(dim=1, keepdim=True)
        used = (ids != self._pad).flip(1).cumsum(1).flip(1) > 0  # up to the last token that is no padding
        used[:, 0] = True
        return ids, used


class TransformersClip(DualEncoder):
    """A CLIPModel of transformers, texts by CLIP's own tokenizer (open_clip brings its words).

    Parameters
    ----------
    name : str
        transformers/FOLDER, or a robust checkpoint's name. The weights are random until `load`.

    Raises
    ------
    InputError
        Where transformers or open_clip is missing, the folder holds no CLIPModel, or the hub cannot be reached.
    """

    def __init__(self, name: str) -> None:
        place = LEAF.get(name, name.removeprefix(TRANSFORMERS))
        config = _from_hub("AutoConfig", place)
        if config.model_type != "clip":
            raise InputError(f"{place}: a model of type {config.model_type}, expected CLIP")
        super().__init__(_CLIP_MEAN, _CLIP_STD, side=int(config.vision_config.image_size))
        self.place = place
        self.model: Any = transformers_library().CLIPModel(config).float()
        _take_scale(self, self.model)
        self.context = int(config.text_config.max_position_embeddings)
        self.tokenizer: Any = _open_clip().SimpleTokenizer(context_length=self.context)
        if self.tokenizer.vocab_size > config.text_config.vocab_size:
            raise InputError(
                f"{place}: weights of {config.text_config.vocab_size} words, CLIP's tokenizer has "
                f"{self.tokenizer.vocab_size}"
            )

    def load(self) -> None:
        """Take the weights of the folder or the hub. InputError where they are out of reach."""
        stored = _from_hub("CLIPModel", self.place, dtype=torch.float32)
        _take_scale(self, stored)
        self.model.load_state_dict(stored.state_dict())

    def parts(self) -> dict[str, list[nn.Parameter]]:
        """Both towers with their projections; of heads there is the temperature alone."""
        image = [*self.model.vision_model.parameters(), *self.model.visual_projection.parameters()]
        text = [*self.model.text_model.parameters(), *self.model.text_projection.parameters()]
        return {"image": image, "text": text, "heads": [self.log_scale]}

    def towers(self) -> list[nn.Module]:
        """Both, without the projections."""
        return [self.model.vision_model, self.model.text_model]

    def image_embedding(self, normalised: Tensor) -> Tensor:
        """transformers' own."""
        seen = self.model.vision_model(pixel_values=normalised).pooler_output
        return cast(Tensor, self.model.visual_projection(seen))

    def text_embedding(self, ids: Tensor, mask: Tensor) -> Tensor:
        """What transformers has at the end of the text, which sees nothing right of it."""
        hidden = self.model.text_model(input_ids=ids, attention_mask=mask.long()).last_hidden_state
        end = hidden[torch.arange(len(ids), device=ids.device), mask.sum(dim=1) - 1]
        return cast(Tensor, self.model.text_projection(end))

    def tokens(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """By CLIP's tokenizer; of texts too long the end is cut and the end token kept."""
        ids: Tensor = self.tokenizer(list(texts), context_length=self.context)
        return ids, torch.arange(ids.shape[1]) <= ids.argmax(dim=1, keepdim=True)


_CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
_CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def _take_scale(dual: DualEncoder, model: Any) -> None:
    """Move the logarithm of the scale from a model of a library, so that it is stored once."""
    with torch.no_grad():
        dual.log_scale.copy_(model.logit_scale.detach().reshape(()))
    model.register_parameter("logit_scale", None)


def _image_tower(name: str) -> nn.Module:
    if name == LITE0:
        return Lite0()
    if name.startswith(TIMM):
        network, _, weights = name.removeprefix(TIMM).partition("@")
        return TimmTower(network, weights or None)
    if name.startswith(TORCHVISION) and "@" in name:
        network, _, weights = name.removeprefix(TORCHVISION).partition("@")
        return TorchvisionTower(network, weights)
    raise InputError(
        f"the image tower must be {LITE0}, {TIMM}NAME, {TIMM}NAME@FILE or {TORCHVISION}NAME@FILE, got {name!r}"
    )


def _open_clip() -> Any:
    try:
        import open_clip
    except ImportError as error:
        raise InputError(f"models of open_clip need it installed: {INSTALL}") from error
    return open_clip


def _open_clip_model(architecture: str, weights: str | None, hub: bool = False) -> Any:
    open_clip = _open_clip()
    if not architecture.startswith("hf-hub:") and architecture not in open_clip.list_models():
        raise InputError(f"open_clip has no architecture {architecture!r}, expected one of open_clip.list_models()")
    tags = open_clip.list_pretrained_tags_by_model(architecture)
    if weights is not None and weights not in tags and not Path(weights).is_file():
        raise InputError(f"{weights!r} is no file, and no tag of {architecture}: {', '.join(tags) or 'it has none'}")
    try:
        with hub_for(architecture) if weights in tags or architecture.startswith("hf-hub:") else nullcontext():
            return open_clip.create_model(architecture, pretrained=weights, load_weights=hub or weights is not None)
    except Exception as error:  # of urllib, huggingface_hub, torch and safetensors
        reason = str(error).partition("\n")[0]
        if weights is not None and Path(weights).is_file():
            raise InputError(f"{weights}: open_clip cannot load it as {architecture} ({reason})") from error
        raise InputError(
            f"{architecture}: its weights cannot be reached ({reason}); fetch the checkpoint where there is a network, "
            f"then name the file: {OPEN_CLIP}ARCHITECTURE@FILE"
        ) from error


def _from_hub(kind: str, place: str, **options: Any) -> Any:
    """What transformers loads from a folder, or by name from the hub."""
    local = place not in LEAF.values()
    try:
        with hub_for(place):
            return getattr(transformers_library(), kind).from_pretrained(place, local_files_only=local, **options)
    except (OSError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        advice = "expected a folder of transformers" if local else f"fetch it elsewhere, then {TRANSFORMERS}FOLDER"
        raise InputError(f"{place}: no CLIPModel can be loaded ({reason}); {advice}") from error


def _open_clip_tokenizer(architecture: str) -> Any:
    try:
        with hub_for(architecture):
            return _open_clip().get_tokenizer(architecture)
    except Exception as error:
        reason = str(error).partition("\n")[0]
        raise InputError(
            f"{architecture}: its tokenizer cannot be reached ({reason}); fetch it where there is a network into "
            "the hub's cache (HF_HOME), or take an architecture with CLIP's own"
        ) from error
