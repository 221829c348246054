"""What the loop trains: a method, its settings, and what a finished run holds. No paper's algorithm is here."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

import torch
from torch import Tensor, nn

from cmr_fast._terminal import track
from cmr_fast.data.captions import CaptionedDataset, CaptionedImages
from cmr_fast.data.images import ImageDataset
from cmr_fast.data.pairs import PairedDataset
from cmr_fast.errors import InputError
from cmr_fast.methods._ranks import ONE, Ranks
from cmr_fast.methods._settings import check_choices, check_kinds
from cmr_fast.methods._shards import is_sharded, unsharded
from cmr_fast.methods.evaluation import accuracy, caption_results, final_results, recalls, validate
from cmr_fast.modalities import Modality
from cmr_fast.models.dual import DualEncoder, by_length
from cmr_fast.ops._tensors import as_seed

_IMAGES = 64  # that go through a tower at a time
Dataset = PairedDataset | CaptionedDataset | ImageDataset  # a StreamedDataset is a CaptionedDataset
M = TypeVar("M", bound="Method")


class Method(nn.Module):
    """Base of every trained method: its networks, its optimizers and one batch of its algorithm.

    Whatever a run needs to go on after a kill lives in parameters, buffers and optimizers; the loop stores these.
    Buffers get their final shape in `__init__`. Subclasses are `Retriever`s, `CaptionRetriever`s or `Classifier`s.
    """

    name: ClassVar[str]
    Config: ClassVar[type[Any]]
    """A frozen dataclass with `batch_size` and `epochs`; the paper's values are the defaults. A method whose paper
    counts steps has `max_steps` instead of epochs: batches in all, whatever the data."""
    dataset: ClassVar[type[Any]]
    """What it is trained on."""
    init_arguments: ClassVar[tuple[str, ...]]
    """What `__init__` takes beside the config: properties of the data set, attributes of the method."""
    monitor: tuple[str, ...]
    """What `validate` returns; the weights with the highest value of the last one are kept, of equals those with the
    highest of the one before it."""
    observed: ClassVar[tuple[str, ...]] = ()
    """What `validate` returns beside them: it is logged, and no weights are kept by it."""
    keeps_last: ClassVar[bool] = False
    """Whether the last weights are kept whatever validation says, as of a paper that trains so many steps."""
    presets: ClassVar[dict[str, Any]] = {}
    """Configs by name; `cmr-fast train --preset` starts from one."""
    preset_data: ClassVar[dict[str, str]] = {}
    """Of the presets that were made for one data set: preset -> the data set's name."""
    protocol: ClassVar[Mapping[str, Any]] = {}
    """Of `RunConfig`, what the paper's training protocol sets otherwise than its defaults: hold-out, patience."""
    preset_protocols: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    """Of a preset whose runs depart from `protocol`: what they set, in place of it."""
    one_process: ClassVar[str] = ""
    """Why it is not trained over ranks, where it is not."""
    replicas_only: ClassVar[str] = "its networks are small enough for a replica on each rank"
    """Why strategy fsdp does not shard it over ranks, where it does not."""
    contrasts: ClassVar[bool] = False
    """Whether its loss is InfoNCE, so that `RunConfig.contrastive` says how it goes over ranks."""
    ranks: Ranks = ONE
    """The processes that share each batch; `step` is called on all of them with the whole batch."""

    def __init__(self, config: Any, num_classes: int = 0) -> None:
        super().__init__()
        self.config, self.num_classes = config, num_classes

    @classmethod
    def completed(cls, config: Any) -> Any:
        """The config that a run goes by: settings that follow from others filled in, before anything else is done."""
        return config

    @classmethod
    def all_presets(cls) -> dict[str, Any]:
        """Every preset by name: `default`, `paper` (the same where the method has no other), and the method's own."""
        return {"default": cls.Config(), "paper": cls.Config(), **cls.presets}

    @classmethod
    def run_settings(cls, preset: str = "default") -> dict[str, Any]:
        """What a preset's runs set of `RunConfig`."""
        return dict(cls.preset_protocols.get(preset, cls.protocol))

    @classmethod
    def read_config(cls, stored: dict[str, Any]) -> dict[str, Any]:
        """A stored config's fields, as this version names them."""
        return stored

    def enlarge(self, train: Any) -> Any:
        """The split that batches are drawn from: the training split, or more rows that a method makes of it."""
        return train

    def fit_inputs(self, train: Any) -> None:
        """Learn input statistics from the training split alone and keep them as buffers."""

    def unsharded(self: M) -> M:
        """The model itself; where its towers are sharded a new one with the whole weights, on all ranks at once."""
        if not is_sharded(self):
            return self
        with torch.random.fork_rng(devices=[]):
            fresh = type(self)(self.config, *(getattr(self, name) for name in self.init_arguments))
        return unsharded(self, fresh)

    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        """The optimizers, by the name that `step` uses."""
        raise NotImplementedError

    def begin_round(self, split: Any, progress: float) -> None:
        """Called before the batches of an epoch (or round) with the whole training split, on the device.

        progress as in `step`: that of the first batch.
        """

    def step(
        self,
        batch: Any,
        optimizers: dict[str, torch.optim.Optimizer],
        backward: Callable[[Tensor], None],
        progress: float,
    ) -> dict[str, Tensor]:
        """Every update for one batch: a split of the data set's kind that knows its `rows` of the training split.

        progress goes from 0 (first batch) to 1 (end of training). Returns the scalars to log, detached; each must be
        finite.
        """
        raise NotImplementedError

    def trouble(self, history: Sequence[Mapping[str, float]]) -> str | None:
        """One line on a training that goes wrong without an error, from the rows of metrics.csv; None if well."""
        return None

    def validate(self, valid: Any) -> dict[str, float]:
        """The `monitor` scores of a validation split, where higher is better, and what is `observed`."""
        raise NotImplementedError

    def settled(self) -> Any:
        """The config, with what validation chose in place of what was left to it: a refit trains by that."""
        return self.config

    def test(self, dataset: Any) -> dict[str, Any]:
        """The final scores for results.json, on the splits that training has not seen."""
        raise NotImplementedError


class Retriever(Method):
    """A method that encodes images and texts into one space, trained on a PairedDataset."""

    dataset: ClassVar[type[Any]] = PairedDataset
    init_arguments: ClassVar[tuple[str, ...]] = ("image_dim", "text_dim", "num_classes")
    monitor: tuple[str, ...] = ("valid_i2t", "valid_t2i", "valid_map")
    binary: ClassVar[bool] = False
    """Whether the signs of `encode(...)` are a code, compared by Hamming distance; else embeddings, by `metric`."""
    metric: str = "cosine"

    def __init__(self, config: Any, image_dim: int, text_dim: int, num_classes: int) -> None:
        super().__init__(config, num_classes)
        self.image_dim, self.text_dim = image_dim, text_dim

    def encode(self, modality: Modality, features: Tensor) -> Tensor:
        """(N, dim) features -> (N, d) embeddings, or (N, bits) values whose signs are the code."""
        raise NotImplementedError

    def subspace(self, modality: Modality, features: Tensor) -> Tensor:
        """(N, dim) features -> (N, d) where both modalities meet: what signs are taken of, and t-SNE draws."""
        return self.encode(modality, features)

    def validate(self, valid: Any) -> dict[str, float]:
        """mAP(all) of the validation split, each pair a query over the whole split, both ways and their mean."""
        return validate(self, valid)

    def test(self, dataset: Any) -> dict[str, Any]:
        """mAP of the query and database splits over the whole ranking and at 50 hits."""
        return final_results(self, dataset)


class CaptionRetriever(Method):
    """A method that encodes images and their captions into one space, trained on a CaptionedDataset."""

    dual: DualEncoder
    dataset: ClassVar[type[Any]] = CaptionedDataset
    init_arguments: ClassVar[tuple[str, ...]] = ()
    monitor: tuple[str, ...] = ("valid_tr1", "valid_ir1", "valid_rsum")

    def embed(self, modality: Modality, split: CaptionedImages) -> Tensor:
        """(N, d) embeddings of the images, or (M, d) of all their captions, image by image; on the CPU."""
        if modality == "image":
            return self._images(split, self.dual.encode_image)
        return by_length(self.dual, split.captions()[0], self.dual.encode_text).cpu()

    def _images(self, split: CaptionedImages, encode: Callable[[Tensor], Tensor]) -> Tensor:
        """`encode` of all pixels of a split, some at a time; on the CPU."""
        where = self.dual.log_scale
        parts = track(list(torch.arange(len(split)).split(_IMAGES)), "images through the tower")
        return torch.cat([encode(split.select(r).pixels().to(where.device, where.dtype)).cpu() for r in parts])

    def validate(self, valid: Any) -> dict[str, float]:
        """R@1 both ways and rsum (0 to 600) of the validation split, all captions of an image its own."""
        scores = recalls(self, valid)
        share = scores.recall()
        return {"valid_tr1": share["tr"][1], "valid_ir1": share["ir"][1], "valid_rsum": scores.rsum}

    def test(self, dataset: Any) -> dict[str, Any]:
        """R@1, R@5, R@10 and ranks both ways on the test split."""
        return caption_results(recalls(self, dataset.test))


class Classifier(Method):
    """A method that classifies images, trained on an ImageDataset; called with pixels it returns logits."""

    dataset: ClassVar[type[Any]] = ImageDataset
    init_arguments: ClassVar[tuple[str, ...]] = ("num_classes",)
    monitor: tuple[str, ...] = ("valid_accuracy",)

    def validate(self, valid: Any) -> dict[str, float]:
        """Accuracy on the validation split."""
        return {"valid_accuracy": accuracy(self, valid)}

    def test(self, dataset: Any) -> dict[str, Any]:
        """Accuracy on the test split."""
        return {"accuracy": accuracy(self, dataset.test)}


@dataclass(frozen=True)
class RunConfig:
    """How a run goes, whatever the method."""

    out: Path = Path("runs/latest")
    """Folder that the run writes; it must not exist yet, or be empty, unless resume is given."""
    seed: int = 0
    """Seed of the weights, the batches and the validation split."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    precision: Literal["32-true", "64-true", "bf16-mixed", "bf16-true"] = "32-true"
    """Arithmetic of the training steps, by Lightning Fabric's names."""
    devices: int = 1
    """Ranks on this machine, a process each, started here; or start them by torchrun, on several machines too. They
    share every batch: batch_size is of all, and the losses are those of one process."""
    strategy: Literal["auto", "ddp", "fsdp"] = "auto"
    """How ranks hold the model: ddp, a replica each (auto is this); fsdp, of clip and finetune: each its share of
    the towers' weights, gradients and optimizer state."""
    contrastive: Literal["gather", "ring", "local"] = "gather"
    """InfoNCE over ranks: of the whole batch, embeddings gathered or, where each image has one text, passed round a
    ring (both are the loss of one process); local: each rank's rows among themselves, another loss."""
    resume: bool = False
    """Go on from the run folder's checkpoint; starts afresh where there is none yet."""
    valid_fraction: float = 0.1
    """Share of the training split held out for early stopping, if the data set has no validation split; 0 for none."""
    patience: int = 20
    """Stop after this many epochs without a better validation score; 0 never stops early."""
    eval_every: int = 1
    """Epochs (of a method that counts steps: rounds) between validations."""
    round_steps: int = 0
    """Of a method that counts steps, and of a stream: how many make a round, after which it is logged, validated and
    may be saved. 0: one pass over the training split; of a stream at most 1,000 steps."""
    refit: bool = False
    """Once the best epoch is known, train anew that long on train and validation together, and keep that model. The
    first training is then in the run folder's `selection`."""
    checkpoint_seconds: float = 5.0
    """Write the checkpoint at the first epoch end this long after the last one; 0 writes it every epoch."""
    threads: int = 0
    """CPU threads of torch; 0 leaves them as they are. Sums may differ in the last bit between thread counts."""
    quiet: bool = False
    """Print nothing."""

    def __post_init__(self) -> None:
        check_kinds(self)
        as_seed(self.seed)
        check_choices(self, strategy=("auto", "ddp", "fsdp"), contrastive=("gather", "ring", "local"))
        if not 0 <= self.valid_fraction < 1:
            raise InputError(f"valid_fraction must be at least 0 and below 1, got {self.valid_fraction}")
        for name in ("patience", "eval_every", "threads", "checkpoint_seconds", "round_steps", "devices"):
            least = 1 if name in ("eval_every", "devices") else 0
            if not getattr(self, name) >= least:
                raise InputError(f"{name} must be at least {least}, got {getattr(self, name)}")


@dataclass(frozen=True)
class Run:
    """A finished run."""

    path: Path
    model: Method
    """The weights of the best epoch by validation; of the last epoch where there is no validation split."""
    history: list[dict[str, float]]
    """One row per epoch, as in metrics.csv."""
    results: dict[str, Any]
    """What results.json holds. Of a retriever "all" and "topk_hits@50", each with i2t, t2i and average; of one of
    captions "tr" and "ir" with R@K and ranks, and "rsum"; "warnings" where something went wrong without an error."""
    rank: int = 0
    """Of this process; the folder is written by rank 0."""
