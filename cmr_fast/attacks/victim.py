"""The model under attack: in evaluation mode and frozen while it is attacked, and left as it was."""

import copy
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from cmr_fast.attacks import losses
from cmr_fast.errors import InputError
from cmr_fast.ops.pgd import Value

Model = Callable[[Tensor], Tensor]
_LOCK = threading.RLock()
_held: dict[int, list[Any]] = {}  # id of a module or parameter -> [itself, attacks that hold it, as it was before]
_random: dict[torch.device, list[Any]] = {}  # device -> [attacks that may draw there, its random state before]


def widened(x: Tensor) -> Tensor:
    """float32 of 16-bit floats; everything else as it is.

    Parameters
    ----------
    x
        Of any type.
    """
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


class Victim:
    """A model under attack: evaluation mode, parameters frozen, nothing left behind.

    Parameters
    ----------
    model
        A torch module or any callable, inputs (B, ...) to outputs (B, ...).
    normalize
        (mean, std), a number or a value a channel each, applied to inputs before the model sees them.
    dtype
        torch.bfloat16 or torch.float16: gradients are computed under autocast. None: as the model is.
    channels_last
        Run a copy of the convolutions' weights in that layout.
    fold
        Merge batch normalisation into the convolutions of a copy (torch.fx).

    Raises
    ------
    InputError
        For a model that cannot be called, and options that do not fit it.

    Notes
    -----
    `prepare` gives the victim of one call; two threads may attack one model at once, each through its own.
    """

    def __init__(
        self,
        model: Model,
        normalize: tuple[Value, Value] | None = None,
        dtype: torch.dtype | None = None,
        channels_last: bool = False,
        fold: bool = False,
    ) -> None:
        if not callable(model):
            raise InputError(f"model must be a torch module or a callable, got {type(model).__name__}")
        if (channels_last or fold) and not isinstance(model, nn.Module):
            raise InputError(f"channels_last and fold need a torch module, got {type(model).__name__}")
        if dtype is not None and not any(dtype is kind for kind in (torch.bfloat16, torch.float16)):
            raise InputError(f"dtype must be torch.bfloat16, torch.float16 or None (as the model is), got {dtype}")
        self.model, self.dtype = model, dtype
        self.normalize: tuple[Tensor, Tensor] | None = None if normalize is None else per_channel(normalize)
        self.channels_last, self.fold = channels_last, fold
        self.training = (False, False, False)  # the model's mode under attack, its batch normalisation's, its dropout's
        self.queries = 0
        self.copied = False  # whether weights of this call are copies
        self._traced: list[Any] = []  # the model as torch.fx has traced it, and the modules that it had then
        self._exact: Model = model
        self._run: Model = model
        self._input_dtype = torch.float32

    @contextmanager
    def prepare(self, x: Tensor) -> Iterator["Victim"]:
        """The victim while x (B, ...) is attacked, with a count of its own.

        Inside: evaluation mode, frozen parameters, gradients on, inference mode off. Outside: modes, requires_grad and
        the global random numbers as before.

        Parameters
        ----------
        x
            Floats (B, ...); `input` gives the model this type.

        Raises
        ------
        InputError
            For a model that torch.fx cannot fold.
        """
        with ExitStack() as stack:
            stack.enter_context(_random_state({torch.device("cpu"), x.device}))
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.enable_grad())
            call = copy.copy(self)
            call.queries, call._input_dtype = 0, x.dtype
            if self.normalize is not None:
                check_channels(self.normalize, x)
                mean, std = (v.to(x, copy=True) for v in self.normalize)
                call.normalize = mean, std
            if isinstance(self.model, nn.Module):
                stack.enter_context(held(self.model, self.training))
                call._exact, call._run = call._functions(self.model)
            yield call

    def _functions(self, model: nn.Module) -> tuple[Model, Model]:
        """The model, and what runs faster in its place; made anew for every attack, since weights change."""
        tensors = [*model.named_parameters(), *model.named_buffers()]
        # autograd cannot save what was made under inference_mode
        copied = {name: t.clone() for name, t in tensors if t.is_inference()}
        exact = _with_weights(model, copied) if copied else model
        self.copied = bool(copied)
        fast = model
        if self.fold:
            fast = self._folded(model)
            copied = {name: t.clone() for name, t in fast.named_parameters() if t.is_inference()}
        if self.channels_last:
            for name, p in fast.named_parameters():
                if p.ndim == 4:
                    copied[name] = p.detach().clone(memory_format=torch.channels_last)
        return exact, _with_weights(fast, copied) if copied else fast

    def _folded(self, model: nn.Module) -> nn.Module:
        """A copy of the model with its weights of now. It is traced once: then no other thread may run a module."""
        from torch.fx import symbolic_trace
        from torch.fx.experimental.optimization import fuse

        # what a trace holds: the modules, and the tensors as they lay then
        parts = [*model.modules(), *model.parameters(), *model.buffers()]
        with _LOCK:
            try:
                if list(map(id, self._traced[1:])) != list(map(id, parts)):
                    self._traced[:] = [symbolic_trace(model), *parts]
                return fuse(self._traced[0], no_trace=True)
            except Exception as error:
                raise InputError(f"fold=True needs a model that torch.fx can trace: {error}") from error

    @property
    def approximate(self) -> bool:
        """Whether gradients come from something that rounds otherwise than the model itself."""
        return self.dtype is not None or self.fold

    def input(self, x: Tensor) -> Tensor:
        """What the model is given for x: in the type of the call's input, normalised; counted as queries.

        Parameters
        ----------
        x
            Floats (B, ...).
        """
        self.queries += len(x)
        x = x.to(self._input_dtype)
        if self.normalize is None:
            return x.clone()  # neither a leaf nor the caller's: the first layer may work in place
        mean, std = (v.reshape(1, -1, *[1] * (x.ndim - 2)) for v in self.normalize)
        return (x - mean) / std

    def outputs(self, x: Tensor) -> Tensor:
        """Outputs of the model as it is, with their graph.

        Parameters
        ----------
        x
            Floats (B, ...).

        Returns
        -------
        Tensor
            (B, ...), float32 or more.

        Raises
        ------
        InputError
            For a model that returns anything else than a float row a sample.
        """
        return widened(self._outputs(self._exact, self.input(x)))

    def scores(self, x: Tensor) -> Tensor:
        """Outputs of the model as it is, whatever the gradients are computed with: success is decided by these.

        Parameters
        ----------
        x
            Floats (B, ...).

        Returns
        -------
        Tensor
            As of `outputs`, without a graph.
        """
        with torch.no_grad():
            return self.outputs(x)

    def gradient(self, x: Tensor, loss: losses.Loss, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Outputs, losses (B,) in float32 or more, and the gradient of their sum: each sample's own.

        Parameters
        ----------
        x
            Floats (B, ...).
        loss
            (outputs, labels) -> (B,).
        labels
            One row a sample.

        Returns
        -------
        outputs, losses, gradient
            (B, ...), (B,), like x.

        Raises
        ------
        InputError
            For a loss of another shape, or one that has no gradient with respect to x.
        """
        x = x.detach().requires_grad_()
        try:
            outputs = widened(self._fast(x))
            values = losses.one_each(loss(outputs, labels), len(x))
        except RuntimeError as error:
            if "nference tensor" not in str(error):
                raise
            raise InputError(
                "the model or the loss holds tensors made under torch.inference_mode, through which there is no "
                "gradient; make them outside, or pass the torch module itself, whose weights are copied"
            ) from error
        if not values.requires_grad:
            raise InputError("the loss has no gradient with respect to the input: does the model detach it?")
        (gradient,) = torch.autograd.grad(values.sum(), x)
        return outputs.detach(), values.detach(), gradient

    def _fast(self, x: Tensor) -> Tensor:
        """Outputs by way of what was asked for: 16 bits, channels_last, folded."""
        x = self.input(x)
        if self.channels_last and x.ndim == 4:
            x = x.contiguous(memory_format=torch.channels_last)
        if self.dtype is None:
            return self._outputs(self._run, x)
        with torch.autocast(x.device.type, dtype=self.dtype):
            return self._outputs(self._run, x)

    def _outputs(self, run: Model, x: Tensor) -> Tensor:
        try:
            result: object = run(x)
        except RuntimeError as error:
            if words := _explained(self.model, x):
                raise InputError(f"{words} ({error})") from error
            raise
        if isinstance(result, Tensor) and result.is_floating_point() and result.ndim and len(result) == len(x):
            return result
        seen = f"{result.dtype} {tuple(result.shape)}" if isinstance(result, Tensor) else f"a {type(result).__name__}"
        raise InputError(
            f"the model must return a float tensor ({len(x)}, ...), a row a sample, got {seen}; wrap it so that it does"
        )

    def probe(self, x: Tensor, low: Tensor, high: Tensor) -> None:
        """Refuse a model that is random, or whose output for a sample depends on the rest of its batch.

        Three forward passes of two samples.

        Parameters
        ----------
        x, low, high
            Samples (B, ...), and the box, (1, 1 or C) each.

        Raises
        ------
        InputError
            For such a model.
        """
        low, high = (v.reshape(*v.shape, *[1] * (x.ndim - 2)) for v in (low, high))
        second = x[1:2] if len(x) > 1 else low + high - x
        batches = torch.cat([x[:1], second]), torch.cat([x[:1], (x[:1] + low) / 2])
        first, again, beside = (self.scores(batch) for batch in (batches[0], *batches))
        rounding = 1e-4 if self._input_dtype in (torch.float32, torch.float64) else 1e-2
        scale = float(first.abs().max()) + 1e-30
        apart = float((first - again).abs().max()) / scale
        if apart > rounding:
            raise InputError(
                f"the model is random: two passes over the same input differ by {apart:.3g} of their size"
                f"{self._suspects('Dropout', 'DropPath', 'RReLU')}. An attack needs one function: average over several "
                "passes inside the model (EoT), or pass check=False"
            )
        apart = float((first[0] - beside[0]).abs().max()) / scale
        if apart > rounding:
            raise InputError(
                f"the model's output for a sample depends on the rest of its batch (it changed by {apart:.3g} of its "
                "size): batch normalisation in training mode, or without running statistics"
                f"{self._suspects('BatchNorm')}? Use running statistics, or pass check=False"
            )

    def _suspects(self, *kinds: str) -> str:
        if not isinstance(self.model, nn.Module):
            return ""
        named = [
            name
            for name, module in self.model.named_modules()
            if any(kind in base.__name__ for base in type(module).__mro__ for kind in kinds)
            and getattr(module, "running_mean", None) is None
        ]
        return f" ({', '.join(named[:3])}{' ...' if len(named) > 3 else ''})" if named else ""


@contextmanager
def _random_state(devices: set[torch.device]) -> Iterator[None]:
    """The global random numbers of these devices as they were, once the last attack inside is done."""
    devices = {device for device in devices if device.type in ("cpu", "cuda")}
    with _LOCK:
        for device in devices:
            state = torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()
            _random.setdefault(device, [0, state])[0] += 1
    try:
        yield
    finally:
        with _LOCK:
            for device in devices:
                _random[device][0] -= 1
                if not _random[device][0]:
                    state = _random.pop(device)[1]
                    torch.cuda.set_rng_state(state, device) if device.type == "cuda" else torch.set_rng_state(state)


@contextmanager
def held(model: nn.Module, training: tuple[bool, bool, bool] = (False, False, False)) -> Iterator[None]:
    """Evaluation mode (or the mode asked for), no parameter that requires grad, until the last attack is done."""
    modules, parameters = list(model.modules()), [p for p in model.parameters() if not p.is_inference()]
    moving = [b for b in model.buffers() if not b.is_inference()] if training[0] and training[1] else []
    with _LOCK:
        for module in modules:
            _hold(module, module.training)
        for parameter in parameters:
            _hold(parameter, parameter.requires_grad)
        for buffer in moving:
            _hold(buffer, buffer.clone)
        if training[0]:
            model.train()
            for module in modules:
                kind = type(module).__name__
                if ("BatchNorm" in kind and not training[1]) or ("Dropout" in kind and not training[2]):
                    module.eval()
        elif any(module.training for module in modules):
            model.eval()
        for parameter in parameters:
            if parameter.requires_grad:
                parameter.requires_grad_(False)
    try:
        yield
    finally:
        with _LOCK, torch.no_grad():
            for module in modules:
                if (mode := _released(module)) is not None:
                    module.training = mode
            for parameter in parameters:
                if _released(parameter):
                    parameter.requires_grad_(True)
            for buffer in moving:
                if (before := _released(buffer)) is not None:
                    buffer.copy_(before)


def _hold(thing: object, before: Any) -> None:
    """Count one attack more; the first one in says what was before, or how to copy it."""
    if id(thing) not in _held:
        _held[id(thing)] = [thing, 0, before() if callable(before) else before]
    _held[id(thing)][1] += 1


def _released(thing: object) -> Any:
    """What the last one out restores; None where others are inside still."""
    entry = _held[id(thing)]
    entry[1] -= 1
    return _held.pop(id(thing))[2] if not entry[1] else None


def _with_weights(model: nn.Module, weights: dict[str, Tensor]) -> Model:
    def run(x: Tensor) -> Tensor:
        with _LOCK:  # functional_call swaps the module's weights for the time of the call
            result: Tensor = torch.func.functional_call(model, weights, (x,))
        return result

    return run


def _explained(model: Model, x: Tensor) -> str | None:
    """What is wrong with x where a model's error shows it, else None."""
    weights = [p for p in model.parameters() if p.is_floating_point()] if isinstance(model, nn.Module) else []
    if weights and weights[0].device != x.device:
        return f"x is on {x.device}, the model's weights on {weights[0].device}: move one of them, or atk.set_device"
    if weights and weights[0].dtype != x.dtype:
        numpys = ", which numpy makes by itself" if x.dtype == torch.float64 else ""
        return f"x must be {weights[0].dtype} as the model's weights are, got {x.dtype}{numpys}"
    return f"the model cannot take x{_channels_last(x)}" if _channels_last(x) else None


def _channels_last(x: Tensor) -> str:
    """What to say of images that seem to have their channels last."""
    if x.ndim != 4 or x.shape[-1] not in (1, 3, 4) or x.shape[1] in (1, 3, 4):
        return ""
    return (
        f": (B, {', '.join(map(str, x.shape[1:]))}) looks like images with channels last, expected (B, C, H, W): "
        "x.transpose(0, 3, 1, 2) in numpy, x.permute(0, 3, 1, 2) in torch"
    )


def per_channel(normalize: tuple[Value, Value]) -> tuple[Tensor, Tensor]:
    """Mean and std as (1, C) or (1, 1).

    Parameters
    ----------
    normalize
        (mean, std), a number or a value a channel each.

    Raises
    ------
    InputError
        For a std that is not above 0, and what is no numbers.
    """
    if not isinstance(normalize, (tuple, list)) or len(normalize) != 2:
        raise InputError(f"normalize must be (mean, std), got {normalize!r}")
    try:
        mean, std = (torch.as_tensor(v, dtype=torch.float64).reshape(1, -1).clone() for v in normalize)
    except (RuntimeError, TypeError, ValueError) as error:
        raise InputError(f"normalize must be (mean, std), numbers or a value a channel, got {normalize!r}") from error
    if not bool(mean.isfinite().all() and std.isfinite().all() and (std > 0).all()):
        raise InputError(f"normalize must be a finite mean and a std above 0, got {normalize!r}")
    return mean, std


def check_channels(normalize: tuple[Tensor, Tensor], x: Tensor, name: str = "x") -> None:
    """Raise InputError unless mean and std have one value or one for each channel of x.

    Parameters
    ----------
    normalize
        As `per_channel` returns it.
    x
        Floats (B, C, ...).
    name
        What the error calls x.

    Raises
    ------
    InputError
        Saying how many values and channels there are.
    """
    channels = x.shape[1] if x.ndim > 1 else 1
    if any(v.shape[1] not in (1, channels) for v in normalize):
        counts = " and ".join(str(v.shape[1]) for v in normalize)
        raise InputError(
            f"normalize must be (mean, std), a number or a value for each of {channels} channels, got {counts} values "
            f"for {name} {tuple(x.shape)}{_channels_last(x)}"
        )
