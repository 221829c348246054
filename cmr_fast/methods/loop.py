"""The one training loop: every method of this package is trained, resumed, validated and evaluated here."""

import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from cmr_fast.data.streamed import Share, StreamedDataset, StreamedImages
from cmr_fast.errors import DivergedError, InputError
from cmr_fast.methods import METHODS, checkpoint
from cmr_fast.methods._ranks import Ranks, alone, facts_of, launched
from cmr_fast.methods._runfolder import (
    CHECKPOINT,
    CONFIG,
    MODEL,
    RESULTS,
    claim,
    describe,
    disk_errors,
    forgotten_if_refused,
    held,
    refuse_used,
    same,
    write_json,
)
from cmr_fast.methods._runlog import RunLog, SilentLog
from cmr_fast.methods._shards import gathered, is_cut, is_sharded, like, shard, state_like, whole
from cmr_fast.methods.evaluation import averaged, encode_all, evaluate_model
from cmr_fast.methods.method import CaptionRetriever, Classifier, Dataset, Method, Retriever, Run, RunConfig
from cmr_fast.modalities import Modality

__all__ = [
    "Classifier",
    "Method",
    "Modality",
    "Retriever",
    "Run",
    "RunConfig",
    "averaged",
    "encode_all",
    "evaluate_model",
    "load_model",
    "save_model",
    "train",
]


STREAMED_ROUND = 1000
"""Steps of a round of a stream, at most, unless round_steps says otherwise."""


@dataclass
class _State:
    """Everything beside tensors that a resumed run needs."""

    epoch: int = 0
    best_epoch: int = 0
    best_scores: list[float] = field(default_factory=list)
    done: bool = False


def train(
    method: str | type[Method], config: Any, dataset: Dataset, run: RunConfig, *, start: Method | None = None,
    notes: Mapping[str, Mapping[str, Any]] | None = None,
) -> Run:  # fmt: skip
    """Train `method` on `dataset` and evaluate the best weights on its query and database splits, or its test split.

    method   a name of METHODS or a Method class
    config   the method's Config, or None for its defaults
    dataset  a PairedDataset; an ImageDataset for a classifier; for methods on captions a CaptionedDataset, or a
             StreamedDataset, whose training pairs are read from shards while they are trained on
    start    a trained model of the method whose weights (and input scaling) to go on from, instead of random ones
    notes    what else config.json says of the training, by a name; a run is resumed with the same notes alone

    The folder `run.out` gets config.json, metrics.csv, tensorboard/, checkpoint.safetensors, model.safetensors and
    results.json. The random state is set from (seed, epoch) at every epoch, so a run that is killed and resumed ends
    with the weights of one that was not (exactly, on the CPU with the same number of threads).

    Over ranks (`run.devices`, or torchrun) rank 0 alone writes; every rank returns the same results, but for seconds.

    Raises InputError for bad settings, a run folder that holds something already, a checkpoint that is damaged or of
    other settings, and ranks that differ; DivergedError, its kind, for a loss that is no longer finite; RankLostError
    where a rank has ended.
    """
    kind = METHODS[method] if isinstance(method, str) else method
    config = kind.Config() if config is None else config
    if not isinstance(config, kind.Config):
        raise InputError(f"{kind.name} needs a {kind.Config.__name__} config, got {type(config).__name__}")
    if not isinstance(dataset, kind.dataset):
        raise InputError(f"{kind.name} is trained on a {kind.dataset.__name__}, got a {type(dataset).__name__}")
    config = kind.completed(config)
    dataset = _dense(kind, dataset)
    if start is not None and (type(start) is not kind or run.refit):
        seen = "refit" if run.refit else type(start).__name__
        raise InputError(f"start must be a trained {kind.__name__}, and is for a training without refit; got {seen}")
    if isinstance(dataset, StreamedDataset):
        _check_streamed(dataset, run)
    if run.refit:
        return _refit(kind, config, dataset, run)
    rows, held_rows = len(dataset.train), 0
    if dataset.valid is None and run.valid_fraction > 0:
        held_rows = len(torch.arange(0, rows, 1 / run.valid_fraction))
        if rows - held_rows >= 2:
            try:
                dataset = dataset.hold_out(run.valid_fraction, run.seed)
            except InputError as error:
                raise InputError(
                    f"{error} (validation took {held_rows} of {rows} training rows; valid_fraction 0 takes none)"
                ) from error
    unit, length = ("step", config.max_steps) if hasattr(config, "max_steps") else ("epoch", config.epochs)
    if length < 1 or config.batch_size < 2:
        raise InputError(f"at least 1 {unit} and a batch of 2, got {length} and {config.batch_size}")
    if rows - held_rows < 2:
        taken = f", of which the validation split took {held_rows} (valid_fraction 0 takes none)" if held_rows else ""
        raise InputError(f"{dataset.name}: training needs at least two pairs, got {rows}{taken}")
    devices = torch.cuda.device_count() if torch.cuda.is_available() else 0
    with torch.random.fork_rng(devices=range(devices)), _threads(run.threads):
        return _train(kind, config, dataset, run, start, notes or {})


def _train(
    kind: type[Method], config: Any, dataset: Dataset, run: RunConfig, start: Method | None, notes: Mapping[str, Any]
) -> Run:
    fabric, ranks = launched(run)
    if ranks.world > 1 and (reason := kind.one_process):
        raise InputError(f"{kind.name} is trained in one process, got {ranks.world} ranks: {reason}")
    if run.strategy == "fsdp" and (reason := kind.replicas_only):
        raise InputError(f"strategy fsdp does not train {kind.name}, expected ddp, a replica a rank: {reason}")
    if run.contrastive != "gather" and not kind.contrasts:
        raise InputError(f"contrastive {run.contrastive} is for methods that train by InfoNCE, got {kind.name}")
    _reseed(run.seed, 0)
    model = kind(config, *(getattr(dataset, name) for name in kind.init_arguments))
    if isinstance(tower := getattr(model, "tower", None), torch.nn.Module):
        tower.to(fabric.device)  # a pretrained network says there what it sees in every image
    model.fit_inputs(dataset.train)
    if start is not None:
        try:
            model.load_state_dict(start.state_dict())
        except RuntimeError as error:
            raise InputError(f"start: its weights do not fit the config and the data: {error}") from error
    fabric.setup_module(model)
    model.ranks = ranks
    folder = Path(run.out)
    described = describe(kind, config, dataset, run) | dict(notes)
    with ranks.watched(folder / CHECKPOINT):
        ranks.refuse_others("training", facts_of(described, model) if ranks.world > 1 else {})
        if run.strategy == "fsdp" and ranks.world > 1:
            shard(cast(CaptionRetriever, model).dual.towers(), ranks)
        plain = model.optimizers()
        for optimizer in plain.values():
            optimizer.register_step_pre_hook(_averaged_over(ranks))
        optimizers = dict(zip(plain, _as_tuple(fabric.setup_optimizers(*plain.values())), strict=True))
        if not run.resume:
            ranks.on_first(lambda: refuse_used(folder))
        cleared = alone(ranks, lambda: forgotten_if_refused(folder, fresh=not run.resume))
        with alone(ranks, lambda: disk_errors(folder)), cleared, alone(ranks, lambda: held(folder)):
            return _rounds(fabric, model, optimizers, dataset, run, described)


def _rounds(
    fabric: Any, model: Method, optimizers: dict[str, Any], dataset: Dataset, run: RunConfig, described: dict[str, Any]
) -> Run:
    """Every round that is left, the weights of the best one, and its scores."""
    folder, kind, config, ranks = Path(run.out), type(model), model.config, model.ranks
    ranks.on_first(lambda: claim(folder, described, run.resume, kind))
    weight = next(model.parameters())
    split = model.enlarge(dataset.train).to(weight.device, weight.dtype)
    schedule = _Schedule.of(config, split, run)
    state = _State()
    history: list[dict[str, float]] = []
    best: dict[str, Tensor] | None = None
    planned = schedule.rounds
    if run.resume and ranks.on_first((folder / CHECKPOINT).exists):
        state, history, best, before = _restore(folder / CHECKPOINT, model, optimizers, described)
        planned = _Schedule.of(before, split, run).rounds
        if planned < schedule.rounds and state.epoch == planned:
            state.done = False
        ranks.on_first(lambda: write_json(folder / CONFIG, described))
    saved_at = time.monotonic()
    monitor, title = model.monitor[-1], f"{kind.name} on {dataset.name}"
    trouble: str | None = None
    samples = schedule.samples(schedule.rounds, len(split)) if isinstance(split, StreamedImages) else 0
    kind_of_log = RunLog if ranks.rank == 0 else SilentLog
    with kind_of_log(folder, history, schedule.rounds, title, monitor, run.quiet, samples) as log:
        if state.epoch:
            log.say(f"resumed {folder} after epoch {state.epoch}")
        if planned < schedule.rounds:
            log.say(
                f"{folder} stopped early in epoch {state.epoch}, as patience {run.patience} asks; it stays so"
                if state.done
                else f"{folder} was planned for {planned} epochs and goes on to {schedule.rounds}: what follows the "
                "progress of the training (learning rates) now follows the longer one"
            )
        if note := _preset_of_other_data(kind, config, dataset.name):
            log.say(note)
        while not state.done:
            started = time.perf_counter()
            state.epoch += 1
            means = _round(fabric, model, optimizers, split, schedule, run.seed, state.epoch, log.within, log.say)
            row = {"epoch": state.epoch} | means
            last = state.epoch == schedule.rounds
            if dataset.valid is not None:
                scores = dict.fromkeys((*model.observed, *model.monitor), math.nan)
                if state.epoch % run.eval_every == 0 or last:
                    try:
                        scores = ranks.on_first(partial(dict, model.validate(dataset.valid)))
                    except InputError as error:
                        raise InputError(
                            f"{kind.name}: validation after epoch {state.epoch}: {error}. A checkpoint, if there is "
                            "one, holds an earlier epoch; where embeddings are not finite, lower the learning rate"
                        ) from error
                    ranked = [scores[name] for name in reversed(model.monitor)]
                    if model.keeps_last or ranked > state.best_scores:
                        state.best_scores, state.best_epoch = ranked, state.epoch
                        best = _snapshot(model)
                row |= scores
            log.epoch(row | {"seconds": time.perf_counter() - started})
            said, trouble = trouble, model.trouble(history)
            if trouble and not said:
                log.say(f"epoch {state.epoch}: {trouble}")
            waited = state.epoch - state.best_epoch
            stop_early = dataset.valid is not None and run.patience > 0 and waited >= run.patience
            state.done = last or stop_early
            due = state.done or time.monotonic() - saved_at >= run.checkpoint_seconds
            if is_sharded(model):  # all ranks gather what rank 0 writes
                due = ranks.on_first(partial(bool, due))
            if due and (ranks.rank == 0 or is_sharded(model)):
                _save(folder / CHECKPOINT, model, optimizers, state, history, best, described)
                saved_at = time.monotonic()

    model.eval()
    if best is not None:
        model.load_state_dict(best)
    else:
        state.best_epoch = state.epoch
    model = model.unsharded()
    results = {
        "method": kind.name,
        "data": dataset.name,
        "seed": run.seed,
        "epochs": state.epoch,
        "best_epoch": state.best_epoch,
        **({"best_step": min(schedule.total, state.best_epoch * schedule.every)} if schedule.by_steps else {}),
        **(
            dict(zip(reversed(model.monitor), state.best_scores, strict=False)) if best is not None else {monitor: None}
        ),
        "train_seconds": sum(row["seconds"] for row in history),
        **({"skipped": sum(row["skipped"] for row in history)} if "skipped" in history[0] else {}),
    } | ranks.on_first(partial(model.test, dataset))
    if warning := model.trouble(history):
        results["warnings"] = [warning]
    settings = {name: value for name, value in described["run"].items() if name not in _PLACE}

    def write() -> None:
        save_model(folder / MODEL, model, {"epoch": state.best_epoch, "run": described | {"run": settings}})
        write_json(folder / RESULTS, results)

    ranks.on_first(write)
    return Run(folder, model, history, results, ranks.rank)


# where and how, not what: equal runs write equal models
_PLACE = ("out", "resume", "quiet", "checkpoint_seconds", "devices", "strategy")


def _preset_of_other_data(kind: type[Method], config: Any, data: str) -> str | None:
    """What to say where all that a preset chose for one data set is used on another."""
    default = asdict(kind.Config())
    used = {}
    for name, source in kind.preset_data.items():
        chosen = {k: v for k, v in asdict(kind.presets[name]).items() if v != default[k] and k != "epochs"}
        if all(getattr(config, k) == v for k, v in chosen.items()):
            used[source] = name
    if not used or any(data.startswith(source) for source in used):
        return None
    source, name = next(iter(used.items()))
    return f"preset {name} was made for {source}; on {data} compare it with the default config"


def _dense(kind: type[Method], dataset: Any) -> Any:
    """The data set with class ids numbered through, where most numbers up to the largest are no class."""
    if "num_classes" not in kind.init_arguments:
        return dataset
    splits = {
        n: s for n in ("train", "valid", "query", "database", "test") if (s := getattr(dataset, n, None)) is not None
    }
    if dataset.class_names or any(split.labels.ndim != 1 for split in splits.values()):
        return dataset
    ids = torch.cat([split.labels for split in splits.values()]).unique()
    if dataset.num_classes <= max(1000, 2 * len(ids)):
        return dataset
    if issubclass(kind, Classifier):  # its answers are class ids
        raise InputError(
            f"{dataset.name}: {len(ids)} classes, ids to {int(ids[-1])}, would need {dataset.num_classes} outputs; "
            "expected ids that count from 0 without gaps"
        )
    numbered = {n: replace(s, labels=torch.searchsorted(ids, s.labels)) for n, s in splits.items()}
    for name, split in splits.items():  # one object stays one
        for other in numbered:
            if splits[other] is split:
                numbered[other] = numbered[name]
    return replace(dataset, **numbered)


def _refit(kind: type[Method], config: Any, dataset: Dataset, run: RunConfig) -> Run:
    """Find the number of epochs by validation, then train that long on everything but test."""
    if dataset.valid is None and run.valid_fraction == 0:
        raise InputError("refit needs a validation split to find the number of epochs: valid_fraction above 0, got 0")
    folder = Path(run.out)
    if not run.resume:
        launched(run)[1].on_first(lambda: refuse_used(folder))
    selection = train(kind, config, dataset, replace(run, out=folder / "selection", refit=False))
    if dataset.valid is not None:
        train_split: Any = dataset.train
        dataset = replace(dataset, train=train_split.joined(dataset.valid), valid=None)
    config, best = selection.model.settled(), selection.results["best_epoch"]
    if hasattr(config, "max_steps"):
        config = replace(config, max_steps=selection.results["best_step"])
    else:
        config = replace(config, epochs=best)
    return train(kind, config, dataset, replace(run, valid_fraction=0.0, refit=False, resume=True))


def _check_streamed(dataset: StreamedDataset, run: RunConfig) -> None:
    """InputError for what cannot be done with a stream."""
    if run.refit:
        raise InputError(f"{dataset.name}: a stream takes no validation pairs in, expected a run without refit")
    if dataset.valid is None and run.valid_fraction > 0:
        dataset.hold_out(run.valid_fraction, run.seed)


@dataclass(frozen=True)
class _Schedule:
    """How a training is cut into rounds: after each it is logged, validated and may be saved.

    Of methods that count epochs a round is one. Of those that count steps, and of streams, it is `every` batches, which
    may begin and end within a pass over the data.
    """

    batch_size: int
    per_pass: int
    """Batches of a pass; a last one of a single row is left out."""
    every: int
    total: int
    by_steps: bool

    @classmethod
    def of(cls, config: Any, split: Any, run: RunConfig) -> "_Schedule":
        rows, streamed = len(split), isinstance(split, StreamedImages)
        per_pass = max(1, rows // config.batch_size + (rows % config.batch_size > 1))
        by_steps = streamed or hasattr(config, "max_steps")
        if run.round_steps and not by_steps:
            raise InputError(
                f"round_steps is for methods that count steps and for streams, expected 0, got {run.round_steps}"
            )
        most = STREAMED_ROUND if streamed else per_pass
        every = (run.round_steps or min(per_pass, most)) if by_steps else per_pass
        total = config.max_steps if hasattr(config, "max_steps") else config.epochs * per_pass
        return cls(config.batch_size, per_pass, every, total, by_steps)

    @property
    def rounds(self) -> int:
        return math.ceil(self.total / self.every)

    def steps(self, number: int) -> range:
        """The steps of round `number`, from 1."""
        return range((number - 1) * self.every, min(number * self.every, self.total))

    def samples(self, number: int, rows: int) -> int:
        """How many pairs of a split of so many have been gone through after round `number`."""
        done, place = divmod(self.steps(number).stop, self.per_pass)
        return done * min(rows, self.per_pass * self.batch_size) + place * self.batch_size

    def rows(self, rows: int, seed: int, number: int) -> Iterator[tuple[int, Tensor]]:
        """(step from 0 over the whole training, rows of the split) of round `number`, from 1."""
        if not self.by_steps:  # by the random state, which the round began with
            yield from zip(self.steps(number), self._kept(torch.randperm(rows)), strict=True)
            return
        order: list[Tensor] = []
        for step in self.steps(number):
            done, place = divmod(step, self.per_pass)
            if not order or place == 0:
                order = self._kept(torch.randperm(rows, generator=torch.Generator().manual_seed(_mixed(seed, done, 1))))
            yield step, order[place]

    def _kept(self, order: Tensor) -> list[Tensor]:
        return [batch for batch in order.split(self.batch_size) if len(batch) > 1]


def _round(
    fabric: Any, model: Method, optimizers: dict[str, Any], split: Any, schedule: _Schedule, seed: int, number: int,
    advance: Callable[[float], None], say: Callable[[str], None],
) -> dict[str, float]:  # fmt: skip
    """An epoch, or so many steps; returns the mean of each logged scalar."""
    _reseed(seed, number)
    model.train()
    model.begin_round(split, (number - 1) * schedule.every / schedule.total)
    sums: dict[str, Tensor] = {}
    left_out: list[str] = []
    count = 0
    # the true precisions need no context: networks and data have the dtype, and Fabric's would change torch's default
    mixed = "mixed" in str(fabric._precision.precision)
    for step, batch in _batches(split, schedule, seed, number, left_out, model.ranks):
        with fabric.autocast() if mixed else nullcontext():
            logged = model.step(batch, optimizers, fabric.backward, step / schedule.total)
        count += 1
        advance((step + 1) / schedule.every)
        for name, value in logged.items():
            sums[name] = sums[name] + value if name in sums else value
    if not count and number == 1:
        raise InputError(
            f"{model.name}: epoch {number} has no batch with two whole pairs, {len(left_out)} were left out, "
            f"{left_out[0]} first"
        )
    means = {name: float(value) / count for name, value in sums.items()}
    wrong = [name for name, value in means.items() if not math.isfinite(value)]
    wrong += [
        f"parameter {name}"
        for name, value in model.named_parameters()
        if not wrong and not whole(value.detach().isfinite().all())
    ]
    if wrong:
        raise DivergedError(
            f"{model.name}: {wrong[0]} is no longer finite in epoch {number}; a checkpoint, if there is one, holds an "
            "earlier epoch. Expected finite losses: lower the learning rate or the weight of that term"
        )
    if isinstance(split, StreamedImages):
        means |= {"samples": schedule.samples(number, len(split)), "skipped": len(left_out)}
        if left_out:
            say(f"epoch {number}: left out {', '.join(left_out[:3])}{' and more' if len(left_out) > 3 else ''}")
    return means


def _batches(
    split: Any, schedule: _Schedule, seed: int, number: int, left_out: list[str], ranks: Ranks
) -> Iterator[tuple[int, Any]]:
    """(step, batch) of a round; `left_out` gets the names of broken pairs of a stream."""
    if isinstance(split, StreamedImages):
        share = Share(ranks.own, ranks.joined) if ranks.world > 1 else None
        size = schedule.batch_size
        yield from split.batches(schedule.steps(number), schedule.per_pass, size, seed, left_out, share)
        return
    for step, rows in schedule.rows(len(split), seed, number):
        yield step, split.select(rows.to(split.labels.device))


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
    model = kind(config, *(meta[name] for name in kind.init_arguments))
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        raise InputError(f"{file}: its tensors do not fit {kind.name} with the config stored in it: {error}") from error
    return model.eval()


def save_model(path: str | os.PathLike[str], model: Method, extra: dict[str, Any] | None = None) -> None:
    """Write a model that `load_model` reads; extra is stored beside the config."""
    meta = {"method": model.name, "config": asdict(model.config)}
    meta |= {name: getattr(model, name) for name in model.init_arguments}
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
    """Write the checkpoint; of a sharded model all ranks gather it, and rank 0 writes."""
    tensors = {f"model.{name}": value for name, value in model.state_dict().items()}
    tensors |= {f"best.{name}": value for name, value in (best or {}).items()}
    rest = {}
    for name, optimizer in optimizers.items():
        values, rest[name] = checkpoint.flatten_optimizer(f"optimizer.{name}", optimizer.state_dict())
        tensors |= values
    meta = {"described": described, "state": asdict(state), "history": history, "optimizers": rest}
    if tensors := gathered(tensors, model.ranks):
        checkpoint.save(path, "checkpoint", tensors, meta)


def _restore(
    path: Path, model: Method, optimizers: dict[str, Any], described: dict[str, Any]
) -> tuple[_State, list[dict[str, float]], dict[str, Tensor] | None, Any]:
    tensors, meta = checkpoint.load(path, "checkpoint")
    same(path, meta["described"], described, type(model), longer=meta["state"].get("done", False))
    if set(meta["state"]) != {f.name for f in fields(_State)}:
        raise InputError(f"{path}: written by another version of cmr_fast, expected one of this version; begin anew")
    held = model.state_dict()
    model.load_state_dict(like(held, _under("model.", tensors)))
    for name, optimizer in optimizers.items():
        stored = checkpoint.unflatten_optimizer(f"optimizer.{name}", tensors, meta["optimizers"][name])
        optimizer.load_state_dict(state_like(optimizer, stored))
    before = _config_from(type(model), meta["described"]["config"], path)
    return _State(**meta["state"]), meta["history"], like(held, _under("best.", tensors)) or None, before


def _under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def _snapshot(model: Method) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def _averaged_over(ranks: Ranks) -> Callable[..., None]:
    def average(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        ranks.average(p for group in optimizer.param_groups for p in group["params"] if not is_cut(p))

    return average


def _reseed(seed: int, epoch: int) -> None:
    torch.manual_seed(_mixed(seed, epoch))


def _mixed(*numbers: int) -> int:
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


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
    stored = kind.read_config(stored)
    if set(stored) - known:
        raise InputError(f"{where}: its {kind.name} config has unknown fields {sorted(set(stored) - known)}")
    return kind.Config(**{name: tuple(v) if isinstance(v, list) else v for name, v in stored.items()})
