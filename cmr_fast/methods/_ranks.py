"""Training over ranks: what one process does with a batch, done by several, to the same loss and gradient.

Every rank draws the batches, captions, noise and dropout that one process would draw, and takes its rows of them. What
a loss needs of the whole batch is gathered, with the gradient of all ranks, and every rank computes the whole loss: the
mean of the ranks' gradients is then that of one process, whatever lies below or above the gathering. Parameters stay
replicas, as each rank takes the same step.
"""

import logging
import os
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, TypeVar, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from cmr_fast.errors import InputError

T = TypeVar("T")
_BUCKET = 1 << 23  # gradients are averaged so many numbers at a time


class RankLostError(ConnectionError):
    """Another rank has ended, so this one cannot go on."""


@dataclass(frozen=True)
class Ranks:
    """The processes that train one model; the default is one, which takes everything and gathers nothing."""

    rank: int = 0
    world: int = 1
    contrastive: Literal["gather", "ring", "local"] = "gather"
    """How InfoNCE goes over ranks, see RunConfig."""

    def counts(self, count: int) -> list[int]:
        """How many of `count` rows each rank takes: as even as can be, in the order of the ranks."""
        base, more = divmod(count, self.world)
        return [base + (rank < more) for rank in range(self.world)]

    def own(self, count: int) -> slice:
        """Which of `count` rows this rank takes; none, at times."""
        counts = self.counts(count)
        first = sum(counts[: self.rank])
        return slice(first, first + counts[self.rank])

    def over(self, function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        """`function` of inputs (n, ...), each rank of its rows: the result (n, ...) of all, with its gradient.

        function must treat rows independently of each other; what it draws by row is drawn for all rows.
        """
        if self.world == 1:
            return function(*inputs)
        count = len(inputs[0])
        rows = self.own(count)
        idle = rows.stop == rows.start  # a row that counts nothing keeps this rank's graph like the others'
        taken = slice(0, 1) if idle else rows
        with self.draws(count):
            result = function(*(x[taken] for x in inputs))
        return self.gather(result[:0] if idle else result, self.counts(count))

    def draws(self, count: int) -> AbstractContextManager[Any]:
        """What is drawn here for this rank's rows of `count` is what one process draws for them."""
        rows = self.own(count)
        return _DrawsOfAll(count, slice(0, 1) if rows.start == rows.stop else rows)

    def joined(self, values: list[T]) -> list[T]:
        """The lists of all ranks, one after the other."""
        every: list[Any] = [None] * self.world
        dist.all_gather_object(every, values)
        return [value for rank in every for value in rank]

    def gather(self, x: Tensor, counts: list[int] | None = None) -> Tensor:
        """(n, ...) of every rank -> (N, ...), rank after rank, with the gradient of all of them; n may differ.

        counts: every rank's n, where they are known.
        """
        if self.world == 1:
            return x
        if counts is None:
            sizes = [torch.empty(1, dtype=torch.int64, device=x.device) for _ in range(self.world)]
            dist.all_gather(sizes, torch.tensor([len(x)], device=x.device))
            counts = [int(size) for size in sizes]
        return cast(Tensor, _Gather.apply(x, counts, self.rank))

    def total(self, x: Tensor) -> Tensor:
        """The sum over ranks, without gradient."""
        x = x.detach().clone()
        if self.world > 1:
            dist.all_reduce(x)
        return x

    def average(self, parameters: Iterable[Tensor]) -> None:
        """Put the mean over ranks in place of each gradient."""
        if self.world == 1:
            return
        bucket: list[Tensor] = []
        for gradient in [p.grad for p in parameters if p.grad is not None]:
            if bucket and (
                gradient.dtype != bucket[0].dtype or sum(g.numel() for g in bucket) + gradient.numel() > _BUCKET
            ):
                self._average(bucket)
                bucket = []
            bucket.append(gradient)
        if bucket:
            self._average(bucket)

    def _average(self, gradients: list[Tensor]) -> None:
        flat = torch.cat([g.reshape(-1) for g in gradients])
        dist.all_reduce(flat)
        flat /= self.world
        for gradient, mean in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(mean.view_as(gradient))

    def on_first(self, call: Callable[[], T]) -> T:
        """What `call` gives on rank 0, which alone makes it: its result, or its error, on every rank."""
        if self.world == 1:
            return call()
        outcome: list[Any] = [None]
        if self.rank == 0:
            try:
                outcome = [(call(), None)]
            except (InputError, OSError) as error:
                outcome = [(None, error)]
        dist.broadcast_object_list(outcome)
        result, failed = outcome[0]
        if failed is not None:
            raise failed
        return cast(T, result)

    def refuse_others(self, what: str, facts: dict[str, Any]) -> None:
        """InputError on all ranks where one has other facts than rank 0; names the first that differs."""
        if self.world == 1:
            return
        everyone: list[Any] = [None] * self.world
        dist.all_gather_object(everyone, facts)
        for rank, theirs in enumerate(everyone):
            for name in everyone[0] | theirs:
                first, seen = everyone[0].get(name), theirs.get(name)
                if first != seen:
                    raise InputError(
                        f"every rank must have the same {what}: {name} is {first!r} on rank 0 and {seen!r} on rank "
                        f"{rank}"
                    )

    @contextmanager
    def watched(self, checkpoint: Path) -> Iterator[None]:
        """A rank that is gone is a RankLostError here, which says how to go on."""
        try:
            yield
        except RuntimeError as error:
            if self.world == 1 or not _of_group(error):
                raise
            state = "no checkpoint was written yet"
            if checkpoint.exists():
                state = "resume goes on from the last checkpoint, with any number of ranks"
            raise RankLostError(
                f"{checkpoint.parent}: rank {self.rank} of {self.world} has lost another rank, which was killed or has "
                f"failed; {state}"
            ) from error


ONE = Ranks()


def _of_group(error: RuntimeError) -> bool:
    return isinstance(error, dist.DistError) or any(
        word in str(error) for word in ("gloo", "NCCL", "Connection closed by peer", "Connection reset by peer")
    )


class _Gather(torch.autograd.Function):
    """Rows of every rank, as many as `counts` says; backward adds up what all ranks have for this rank's rows."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, counts: list[int], rank: int) -> Tensor:
        ctx.counts, ctx.rank = counts, rank
        padded = x.new_zeros((max(counts), *x.shape[1:]))
        padded[: len(x)] = x
        parts = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(parts, padded)
        return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        gradient = gradient.contiguous().clone()
        dist.all_reduce(gradient)
        return gradient.split(ctx.counts)[ctx.rank], None, None


class _DrawsOfAll(TorchFunctionMode):
    """Dropout, and torch.rand by row, of `rows` of a batch of `count`: drawn for all, so that ranks draw alike.

    Attention's dropout is that of torch's unfused form, which a CPU computes; on a GPU ranks draw other masks.
    """

    def __init__(self, count: int, rows: slice) -> None:
        super().__init__()
        self.count, self.rows = count, rows

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.rand and args:
            shape = torch.Size(args[0] if len(args) == 1 and not isinstance(args[0], int) else args)
            if shape and shape[0] == self.rows.stop - self.rows.start:
                return func(self.count, *shape[1:], **kwargs)[self.rows]
        if func is F.dropout:
            return self._dropout(*args, **kwargs)
        if func is F.scaled_dot_product_attention and kwargs.get("dropout_p"):
            return self._attention(*args, **kwargs)
        return func(*args, **kwargs)

    def _dropout(self, x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        if not training or not p:
            return x
        return x * F.dropout(x.new_ones((self.count, *x.shape[1:])), p)[self.rows]

    def _attention(
        self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
        is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
    ) -> Tensor:  # fmt: skip
        if is_causal or enable_gqa or query.is_cuda:
            return F.scaled_dot_product_attention(
                query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
            )
        logits = query @ key.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scale is None else scale)
        if attn_mask is not None:
            logits = logits.masked_fill(~attn_mask, -torch.inf) if attn_mask.dtype == torch.bool else logits + attn_mask
        return self._dropout(logits.softmax(dim=-1), dropout_p) @ value


@lru_cache
def _sources() -> int:
    """A checksum of the package's Python."""
    root, checksum = Path(__file__).parent.parent, 0
    for path in sorted(root.rglob("*.py")):
        checksum = zlib.crc32(path.read_bytes(), checksum)
    return checksum


def facts_of(described: dict[str, Any], model: torch.nn.Module) -> dict[str, Any]:
    """What must be the same on every rank: code, config, run, data and the weights to begin with."""
    from cmr_fast import __version__

    facts: dict[str, Any] = {"cmr_fast": __version__, "code (crc32 of its sources)": _sources()}
    for part, values in described.items():
        if isinstance(values, dict):
            facts |= {f"{part} {name}": value for name, value in values.items() if name not in _OF_A_RANK}
        else:
            facts[part] = values
    checksum = 0
    for value in model.state_dict().values():
        checksum = zlib.crc32(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy(), checksum)
    return facts | {"weights (crc32)": checksum}


_OF_A_RANK = ("device", "threads", "quiet")


def launched(run: Any) -> tuple[Any, Ranks]:
    """Fabric, and the ranks: `devices` of a RunConfig, started here, or those that torchrun has started.

    Raises InputError for devices that are not there, and where flags and torchrun disagree.
    """
    with _hushed(run.quiet):
        return _launched(run)


@contextmanager
def _hushed(quiet: bool) -> Iterator[None]:
    """Lightning tells what it begins with; not to one who asked for quiet."""
    import lightning.fabric  # noqa: F401  # which chooses the logger when it is imported
    from lightning_utilities.core import rank_zero

    log = cast(logging.Logger, rank_zero.log)
    before = log.level
    log.setLevel(logging.WARNING if quiet else before)
    try:
        yield
    finally:
        log.setLevel(before)


def _launched(run: Any) -> tuple[Any, Ranks]:
    from lightning.fabric import Fabric
    from lightning.fabric.plugins.environments import TorchElasticEnvironment

    name, _, number = run.device.partition(":")
    if name not in ("auto", "cpu", "cuda") or (number and not (name == "cuda" and number.isdecimal())):
        raise InputError(f"device must be auto, cpu, cuda or cuda:N, got {run.device!r}")
    cuda = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "cuda" and int(number or 0) >= cuda:
        raise InputError(f"device {run.device} was asked for, but torch sees {cuda} CUDA devices")
    devices, nodes = run.devices, 1
    if TorchElasticEnvironment.detect():
        devices = int(os.environ["LOCAL_WORLD_SIZE"])
        nodes = int(os.environ["WORLD_SIZE"]) // devices
        if run.devices not in (1, devices):
            raise InputError(f"torchrun has started {devices} processes a machine, devices says {run.devices}")
    if devices * nodes == 1:
        fabric = Fabric(accelerator=name, devices=[int(number)] if number else 1, precision=run.precision)
        fabric.launch()
        return fabric, ONE
    if number:
        raise InputError(f"device must be auto, cpu or cuda with {devices * nodes} ranks, got {run.device}")
    if (name == "cuda" or (name == "auto" and cuda)) and cuda < devices:
        raise InputError(f"{devices} ranks a machine need as many GPUs, torch sees {cuda}; device cpu needs none")
    if (
        not TorchElasticEnvironment.detect()
        and sys.modules["__main__"].__spec__ is None
        and not os.path.isfile(sys.argv[0])
    ):
        raise InputError(
            f"devices {devices} starts the program anew for each rank, expected a script or a module to run, "
            f"got {sys.argv[0] or 'none'!r} (python -c, or standard input); torchrun starts ranks as well"
        )
    fabric = Fabric(
        accelerator=name, devices=devices, num_nodes=nodes, strategy=_replicas(), precision=run.precision
    )  # fmt: skip
    fabric.launch()
    return fabric, Ranks(fabric.global_rank, fabric.world_size, run.contrastive)


def _replicas() -> Any:
    """Fabric's processes without DistributedDataParallel, which does not see a step that calls parts of a model."""
    from lightning.fabric.strategies import DDPStrategy

    class Replicas(DDPStrategy):
        def setup_module(self, module: Any) -> Any:
            return module

    return Replicas(timeout=timedelta(days=1))  # others wait while rank 0 tests


def alone(ranks: Ranks, context: Callable[[], Any]) -> Any:
    """A context that rank 0 alone enters; what it raises on entering, every rank raises."""
    return context() if ranks.world == 1 else _Alone(ranks, context)


class _Alone:
    def __init__(self, ranks: Ranks, context: Callable[[], Any]) -> None:
        self.ranks = ranks
        self.context = context() if ranks.rank == 0 else nullcontext()

    def __enter__(self) -> None:
        self.ranks.on_first(lambda: self.context.__enter__() and None)

    def __exit__(self, *error: Any) -> Any:
        return self.context.__exit__(*error)
