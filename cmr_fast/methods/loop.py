"""The one training loop: every method of this package is trained, resumed, validated and evaluated here."""

import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn

from cmr_fast.data.images import ImageDataset
from cmr_fast.data.pairs import PairedDataset
from cmr_fast.errors import InputError
from cmr_fast.methods import METHODS, checkpoint
from cmr_fast.methods._runfolder import (
    CHECKPOINT,
    MODEL,
    claim,
    describe,
    forgotten_if_refused,
    refuse_used,
    same,
    write_json,
)
from cmr_fast.methods._runlog import RunLog
from cmr_fast.methods.evaluation import (
    Modality,
    averaged,
    encode_all,
    evaluate_model,
    final_results,
    validate,
)

__all__ = [
    "Method",
    "Modality",
    "Run",
    "RunConfig",
    "averaged",
    "encode_all",
    "evaluate_model",
    "load_model",
    "save_model",
    "train",
]


Dataset = PairedDataset | ImageDataset


class Method(nn.Module):
    """Base of every trained method: its networks, its optimizers, one batch of its algorithm, and its encoder.

    Whatever a run needs to go on after a kill lives in parameters, buffers and optimizers; the loop stores these.
    Buffers get their final shape in `__init__`.
    """

    name: ClassVar[str]
    output: ClassVar[Literal["embedding", "code", "logits"]]
    """embedding: compared by `metric`; code: compared by Hamming distance of the bits `encode(...) >= 0`; logits: a
    classifier of images, trained on an ImageDataset."""
    metric: str = "cosine"
    Config: ClassVar[type[Any]]
    """A frozen dataclass with at least `epochs` and `batch_size`; the paper's values are the defaults."""
    sizes: ClassVar[tuple[str, ...]] = ("image_dim", "text_dim", "num_classes")
    """What `__init__` takes beside the config: properties of the data set, attributes of the method."""
    validated: tuple[str, ...] = ("valid_i2t", "valid_t2i", "valid_map")
    """What `validate` returns; the weights with the highest value of the last one are kept, of
    equals those with the highest of the one before it."""
    presets: ClassVar[dict[str, Any]] = {}
    """Configs chosen by validation on a data set, by name; `cmr-fast train --preset` starts from one."""

    def __init__(self, config: Any, image_dim: int, text_dim: int, num_classes: int) -> None:
        super().__init__()
        self.config = config
        self.image_dim, self.text_dim, self.num_classes = image_dim, text_dim, num_classes

    def fit_inputs(self, train: Any) -> None:
        """Learn input statistics from the training split alone and keep them as buffers."""

    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        """The optimizers, by the name that `step` uses."""
        raise NotImplementedError

    def step(
        self,
        batch: Any,
        optimizers: dict[str, torch.optim.Optimizer],
        backward: Callable[[Tensor], None],
        progress: float,
    ) -> dict[str, Tensor]:
        """Every update for one batch of Pairs, or of Images. progress goes from 0 (first batch) to 1 (end of training).

        Returns the scalars to log, detached; each must be finite.
        """
        raise NotImplementedError

    def encode(self, modality: Modality, features: Tensor) -> Tensor:
        """(N, dim) features -> (N, d) embeddings, or (N, bits) values whose signs are the code."""
        raise NotImplementedError

    def validate(self, valid: Any) -> dict[str, float]:
        """The `validated` scores of a validation split; higher is better."""
        return validate(self, valid)

    def measure(self, dataset: Any) -> dict[str, Any]:
        """The final scores for results.json, on the splits that training has not seen."""
        return final_results(self, dataset)


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
    resume: bool = False
    """Go on from the run folder's checkpoint; starts afresh where there is none yet."""
    valid_fraction: float = 0.1
    """Share of the training split held out for early stopping, if the data set has no validation split; 0 for none."""
    patience: int = 20
    """Stop after this many epochs without a better validation score; 0 never stops early."""
    eval_every: int = 1
    """Epochs between validations."""
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
        if not 0 <= self.valid_fraction < 1:
            raise InputError(f"valid_fraction must be at least 0 and below 1, got {self.valid_fraction}")
        for name, least in (("patience", 0), ("eval_every", 1), ("threads", 0), ("seed", 0), ("checkpoint_seconds", 0)):
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
    """What results.json holds: results["all"] and results["topk_hits@50"], each with i2t, t2i and average."""


@dataclass
class _State:
    """Everything beside tensors that a resumed run needs."""

    epoch: int = 0
    best_epoch: int = 0
    best_scores: list[float] = field(default_factory=list)
    done: bool = False


def train(method: str | type[Method], config: Any, dataset: Dataset, run: RunConfig) -> Run:
    """Train `method` on `dataset` and evaluate the best weights on its query and database splits, or its test split.

    method   a name of METHODS or a Method class
    config   the method's Config, or None for its defaults
    dataset  a PairedDataset; an ImageDataset for a classifier

    The folder `run.out` gets config.json, metrics.csv, tensorboard/, checkpoint.safetensors, model.safetensors and
    results.json. The random state is set from (seed, epoch) at every epoch, so a run that is killed and resumed ends
    with the weights of one that was not (exactly, on the CPU with the same number of threads).

    Raises InputError for bad settings, a run folder that holds something already, a checkpoint that is damaged or of
    other settings, and a loss that is no longer finite.
    """
    kind = METHODS[method] if isinstance(method, str) else method
    config = kind.Config() if config is None else config
    if not isinstance(config, kind.Config):
        raise InputError(f"{kind.name} needs a {kind.Config.__name__} config, got {type(config).__name__}")
    wanted = ImageDataset if kind.output == "logits" else PairedDataset
    if not isinstance(dataset, wanted):
        raise InputError(f"{kind.name} is trained on a {wanted.__name__}, got a {type(dataset).__name__}")
    if run.refit:
        return _refit(kind, config, dataset, run)
    if dataset.valid is None and run.valid_fraction > 0:
        dataset = dataset.hold_out(run.valid_fraction, run.seed)
    if config.epochs < 1 or config.batch_size < 2:
        raise InputError(f"at least 1 epoch and a batch of 2, got {config.epochs} and {config.batch_size}")
    if len(dataset.train) < 2:
        raise InputError(f"{dataset.name}: training needs at least two pairs, got {len(dataset.train)}")
    devices = torch.cuda.device_count() if torch.cuda.is_available() else 0
    with torch.random.fork_rng(devices=range(devices)), _threads(run.threads):
        return _train(kind, config, dataset, run)


def _train(kind: type[Method], config: Any, dataset: Dataset, run: RunConfig) -> Run:
    fabric = _fabric(run)
    _reseed(run.seed, 0)
    model = kind(config, *(getattr(dataset, name) for name in kind.sizes))
    model.fit_inputs(dataset.train)
    fabric.setup_module(model)
    plain = model.optimizers()
    optimizers = dict(zip(plain, _as_tuple(fabric.setup_optimizers(*plain.values())), strict=True))

    folder = Path(run.out)
    described = describe(kind, config, dataset, run)
    claim(folder, described, run.resume)
    state = _State()
    history: list[dict[str, float]] = []
    best: dict[str, Tensor] | None = None
    if run.resume and (folder / CHECKPOINT).exists():
        state, history, best = _restore(folder / CHECKPOINT, model, optimizers, described)
    saved_at = time.monotonic()
    pairs = _to(dataset.train, model)
    monitor, title = model.validated[-1], f"{kind.name} on {dataset.name}"
    with (
        forgotten_if_refused(folder, fresh=not run.resume),
        RunLog(folder, history, config.epochs, title, monitor, run.quiet) as log,
    ):
        if state.epoch:
            log.say(f"resumed {folder} after epoch {state.epoch}")
        while not state.done:
            started = time.perf_counter()
            state.epoch += 1
            means = _epoch(fabric, model, optimizers, pairs, config, run.seed, state.epoch, log.within)
            row = {"epoch": state.epoch} | means
            last = state.epoch == config.epochs
            if dataset.valid is not None:
                scores = dict.fromkeys(model.validated, math.nan)
                if state.epoch % run.eval_every == 0 or last:
                    scores = model.validate(dataset.valid)
                    ranked = [scores[name] for name in reversed(model.validated)]
                    if ranked > state.best_scores:
                        state.best_scores, state.best_epoch = ranked, state.epoch
                        best = _snapshot(model)
                row |= scores
            log.epoch(row | {"seconds": time.perf_counter() - started})
            waited = state.epoch - state.best_epoch
            stop_early = dataset.valid is not None and run.patience > 0 and waited >= run.patience
            state.done = last or stop_early
            if state.done or time.monotonic() - saved_at >= run.checkpoint_seconds:
                _save(folder / CHECKPOINT, model, optimizers, state, history, best, described)
                saved_at = time.monotonic()

    model.eval()
    if best is not None:
        model.load_state_dict(best)
    else:
        state.best_epoch = state.epoch
    results = {
        "method": kind.name,
        "data": dataset.name,
        "seed": run.seed,
        "epochs": state.epoch,
        "best_epoch": state.best_epoch,
        monitor: state.best_scores[0] if best is not None else None,
        "train_seconds": sum(row["seconds"] for row in history),
    } | model.measure(dataset)
    save_model(folder / MODEL, model, {"epoch": state.best_epoch, "run": described})
    write_json(folder / "results.json", results)
    return Run(folder, model, history, results)


def _refit(kind: type[Method], config: Any, dataset: Dataset, run: RunConfig) -> Run:
    """Find the number of epochs by validation, then train that long on everything but test."""
    if dataset.valid is None and run.valid_fraction == 0:
        raise InputError("refit needs a validation split to find the number of epochs: valid_fraction above 0, got 0")
    folder = Path(run.out)
    if not run.resume:
        refuse_used(folder)
    selection = train(kind, config, dataset, replace(run, out=folder / "selection", refit=False))
    if dataset.valid is not None:
        dataset = replace(dataset, train=_joined(dataset.train, dataset.valid), valid=None)
    config = replace(config, epochs=selection.results["best_epoch"])
    return train(kind, config, dataset, replace(run, valid_fraction=0.0, refit=False, resume=True))


def _joined(a: Any, b: Any) -> Any:
    """Two splits as one, part by part."""
    parts = {f.name: (getattr(a, f.name), getattr(b, f.name)) for f in fields(a)}
    both = {name: torch.cat([x, y]) if isinstance(x, Tensor) else (*x, *y) for name, (x, y) in parts.items()}
    return type(a)(**both)


def _epoch(
    fabric: Any, model: Method, optimizers: dict[str, Any], pairs: Any, config: Any, seed: int, epoch: int,
    tell: Callable[[float], None],
) -> dict[str, float]:  # fmt: skip
    """One pass over the training split; returns the mean of each logged scalar."""
    _reseed(seed, epoch)
    model.train()
    order = torch.randperm(len(pairs))
    batches = [rows for rows in order.split(config.batch_size) if len(rows) > 1]
    sums: dict[str, Tensor] = {}
    for number, rows in enumerate(batches):
        progress = (epoch - 1 + number / len(batches)) / config.epochs
        with fabric.autocast():
            logged = model.step(pairs.select(rows.to(pairs.labels.device)), optimizers, fabric.backward, progress)
        tell(epoch - 1 + (number + 1) / len(batches))
        for name, value in logged.items():
            sums[name] = sums[name] + value if name in sums else value
    means = {name: float(value) / len(batches) for name, value in sums.items()}
    wrong = [name for name, value in means.items() if not math.isfinite(value)]
    wrong += [
        f"parameter {name}" for name, value in model.named_parameters() if not wrong and not value.isfinite().all()
    ]
    if wrong:
        raise InputError(
            f"{model.name}: {wrong[0]} is no longer finite in epoch {epoch}; a checkpoint, if there is one, holds an "
            "earlier epoch. Expected finite losses: lower the learning rate or the weight of that term"
        )
    return means


def load_model(path: str | os.PathLike[str]) -> Method:
    """The trained model of a run folder or a model.safetensors file, in eval mode on the CPU.

    Raises InputError for a run that has not ended, and for a file that is damaged or holds something else.
    """
    file = Path(path)
    if file.is_dir():
        if not (file / MODEL).exists() and (file / CHECKPOINT).exists():
            raise InputError(f"{file}: this run has not ended; end it with resume, then its model can be loaded")
        file = file / MODEL
    tensors, meta = checkpoint.load(file, "model")
    kind = METHODS[meta["method"]]
    config = _config_from(kind, meta["config"], file)
    model = kind(config, *(meta[name] for name in kind.sizes))
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        raise InputError(f"{file}: its tensors do not fit {kind.name} with the config stored in it: {error}") from error
    return model.eval()


def save_model(path: str | os.PathLike[str], model: Method, extra: dict[str, Any] | None = None) -> None:
    """Write a model that `load_model` reads; extra is stored beside the config."""
    meta = {"method": model.name, "config": asdict(model.config)}
    meta |= {name: getattr(model, name) for name in model.sizes}
    checkpoint.save(path, "model", model.state_dict(), meta | (extra or {}))


def _save(
    path: Path,
    model: Method,
    optimizers: dict[str, Any],
    state: _State,
    history: list[dict[str, float]],
    best: dict[str, Tensor] | None,
    described: dict[str, Any],
) -> None:
    tensors = {f"model.{name}": value for name, value in model.state_dict().items()}
    tensors |= {f"best.{name}": value for name, value in (best or {}).items()}
    rest = {}
    for name, optimizer in optimizers.items():
        values, rest[name] = checkpoint.flatten_optimizer(f"optimizer.{name}", optimizer.state_dict())
        tensors |= values
    meta = {"described": described, "state": asdict(state), "history": history, "optimizers": rest}
    checkpoint.save(path, "checkpoint", tensors, meta)


def _restore(
    path: Path, model: Method, optimizers: dict[str, Any], described: dict[str, Any]
) -> tuple[_State, list[dict[str, float]], dict[str, Tensor] | None]:
    tensors, meta = checkpoint.load(path, "checkpoint")
    same(path, meta["described"], described)
    if set(meta["state"]) != {f.name for f in fields(_State)}:
        raise InputError(f"{path}: written by another version of cmr_fast, expected one of this version; begin anew")
    model.load_state_dict(_under("model.", tensors))
    for name, optimizer in optimizers.items():
        optimizer.load_state_dict(
            checkpoint.unflatten_optimizer(f"optimizer.{name}", tensors, meta["optimizers"][name])
        )
    return _State(**meta["state"]), meta["history"], _under("best.", tensors) or None


def _under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def _snapshot(model: Method) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def _to(split: Any, model: Method) -> Any:
    """The split on the model's device, features in its dtype."""
    weight = next(model.parameters())

    def move(values: Any) -> Any:
        if not isinstance(values, Tensor):
            return values
        return values.to(weight.device, weight.dtype if values.is_floating_point() else None)

    return type(split)(**{f.name: move(getattr(split, f.name)) for f in fields(split)})


def _fabric(run: RunConfig) -> Any:
    from lightning.fabric import Fabric

    name, _, number = run.device.partition(":")
    if name not in ("auto", "cpu", "cuda") or (number and not (name == "cuda" and number.isdecimal())):
        raise InputError(f"device must be auto, cpu, cuda or cuda:N, got {run.device!r}")
    if name == "cuda" and int(number or 0) >= (torch.cuda.device_count() if torch.cuda.is_available() else 0):
        raise InputError(f"device {run.device} was asked for, but torch sees {torch.cuda.device_count()} CUDA devices")
    fabric = Fabric(accelerator=name, devices=[int(number)] if number else 1, precision=run.precision)
    fabric.launch()
    return fabric


def _reseed(seed: int, epoch: int) -> None:
    torch.manual_seed(int(np.random.SeedSequence([seed, epoch]).generate_state(1)[0]))


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    if count:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _as_tuple(value: Any) -> tuple[Any, ...]:
    return value if isinstance(value, tuple) else (value,)


def _config_from(kind: type[Method], stored: dict[str, Any], where: Path) -> Any:
    """A method's config from JSON, where tuples have become lists."""
    known = {f.name for f in fields(kind.Config)}
    if set(stored) - known:
        raise InputError(f"{where}: its {kind.name} config has unknown fields {sorted(set(stored) - known)}")
    return kind.Config(**{name: tuple(v) if isinstance(v, list) else v for name, v in stored.items()})
