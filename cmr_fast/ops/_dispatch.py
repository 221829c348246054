"""Which backend runs an op, and which instruction set the native one uses.

The tensor's device selects a fixed tuple of backends per op; the first available one wins. `backend=` or
CMR_FAST_BACKEND forces one, CMR_FAST_ISA forces an instruction set; a forced choice that cannot run raises.
"""

import functools
import importlib
import importlib.util
import numbers
import os
import warnings
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from cmr_fast.errors import InputError
from cmr_fast.ops._tensors import shown

BACKENDS: dict[str, dict[str, tuple[str, ...]]] = {
    "hamming_topk": {"cpu": ("cpp", "torch"), "cuda": ("cuda", "torch")},
    "hamming_range": {"cpu": ("cpp", "torch"), "cuda": ("cuda", "torch")},
    "hamming_distances": {"cpu": ("cpp", "torch"), "cuda": ("cuda", "torch")},
    "ranking": {"cpu": ("cpp", "torch"), "cuda": ("cuda", "torch")},
    "triplet_margin": {"cpu": ("cpp", "torch"), "cuda": ("cuda", "torch")},
    "acmr_triplet": {"cpu": ("cpp", "torch"), "cuda": ("torch",)},
    "pairwise_nll": {"cpu": ("cpp", "torch"), "cuda": ("torch",)},
    "pairwise_squared": {"cpu": ("cpp", "torch"), "cuda": ("torch",)},
    "pgd_step_": {"cpu": ("cpp", "triton", "torch"), "cuda": ("cuda", "triton", "torch")},
    "pgd_noise": {"cpu": ("cpp", "torch"), "cuda": ("cuda", "torch")},
    "info_nce": {"cpu": ("cpp", "torch"), "cuda": ("triton", "torch")},
    "sigmoid_loss": {"cpu": ("cpp", "torch"), "cuda": ("triton", "torch")},
    "js_critic": {"cpu": ("cpp", "torch"), "cuda": ("triton", "torch")},
    "sinkhorn": {"cpu": ("cpp", "torch"), "cuda": ("cuda", "torch")},
    "ipot": {"cpu": ("cpp", "torch"), "cuda": ("cuda", "torch")},
}


MAX_THREADS = 4096


@functools.cache
def native() -> Any:
    """The compiled module cmr_fast._cpu, or the ImportError that says why there is none."""
    try:
        return importlib.import_module("cmr_fast._cpu")
    except ImportError as reason:
        return reason


def setting(name: str) -> str | None:
    """An environment variable, None where it is not set: what os.environ.get says, in a tenth of its time."""
    if torch.compiler.is_compiling():  # which follows os.environ, but not the import of the kernels
        return os.environ.get(name)
    module = native()
    return os.environ.get(name) if isinstance(module, ImportError) else module.environment(name)


@functools.cache
def native_cuda() -> Any:
    """The compiled module cmr_fast._cuda, or the ImportError that says why there is none."""
    try:
        return importlib.import_module("cmr_fast._cuda")
    except ImportError as reason:
        return reason


def queue(x: Tensor) -> Any:
    """The current CUDA stream of x's device, as the native kernels take it."""
    index = x.device.index if x.device.index is not None else torch.cuda.current_device()
    return native_cuda().Queue(index, torch.cuda.current_stream(x.device).cuda_stream)


@functools.cache
def _cuda_unavailable() -> str | None:
    """Why the CUDA kernels cannot run here. The module is imported, and the driver asked, on the first call only."""
    module = native_cuda()
    if not isinstance(module, ModuleType):
        return f"cmr_fast._cuda was not built ({module}); pip install . builds it where nvcc is found"
    if not torch.cuda.is_available():
        return "torch was built without CUDA" if torch.version.cuda is None else "torch sees no CUDA device or driver"
    if problem := module.device_problem():
        return f"the CUDA runtime of cmr_fast._cuda finds no device ({problem}): the driver may be too old for it"
    if old := sorted(
        c for i in range(torch.cuda.device_count()) if (c := torch.cuda.get_device_capability(i)) < (8, 0)
    ):
        return f"it needs compute capability 8.0 or more, a device here has {old[0][0]}.{old[0][1]}"
    return None


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def _triton_unavailable(device: str) -> str | None:
    """Why Triton's kernels cannot run on tensors of `device`; its interpreter runs them on those of the CPU."""
    if not _has_triton():
        return "triton is not installed"
    if os.environ.get("TRITON_INTERPRET") == "1":
        return None
    return None if device == "cuda" else f"triton runs on cuda tensors, these are on {device} (or TRITON_INTERPRET=1)"


def unavailable(backend: str, device: str) -> str | None:
    """Why `backend` cannot run on `device` here, or None where it can."""
    if backend == "torch":
        return None
    if backend == "triton":
        return _triton_unavailable(device)
    if backend == "cuda":
        return _cuda_unavailable() if device == "cuda" else f"cuda runs on cuda tensors, these are on {device}"
    if backend == "cpp":
        if device != "cpu":
            return f"cpp runs on cpu tensors, these are on {device}"
        module = native()
        return (
            None
            if isinstance(module, ModuleType)
            else f"cmr_fast._cpu cannot be imported ({module}); pip install . builds it"
        )
    return f"there is no backend called {backend!r}"


def choose_backend(op: str, device: str, forced: str | None = None, unfit: dict[str, str] | None = None) -> str:
    """The backend that runs `op` on tensors of `device`. A forced one that cannot run raises, with the reason.

    unfit    backends that cannot do this very call, and why
    """
    unfit = unfit or {}
    candidates = BACKENDS[op].get(device, ("torch",))
    chosen = forced or setting("CMR_FAST_BACKEND")
    if chosen:
        source = f"backend={forced!r}" if forced else f"CMR_FAST_BACKEND={chosen}"
        if chosen not in candidates:
            raise InputError(f"{op} on {device} has the backends {', '.join(candidates)}, got {source}")
        reason = unavailable(chosen, device) or unfit.get(chosen)
        if reason:
            raise InputError(f"{source} of {op} cannot run: {reason}")
        return chosen
    for name in candidates[:-1]:
        if name not in unfit and unavailable(name, device) is None:
            return name
    if device == "cpu" and "cpp" in candidates and "cpp" not in unfit:
        _warn_of_no_kernels()
    return candidates[-1]  # torch


@functools.cache
def _warn_of_no_kernels() -> None:
    """Once: who built the kernels and stands in the source folder runs without them, and would not see it."""
    root = Path(__file__).resolve().parents[2]
    where = (
        f" of {root}, the source tree: run from another folder, or pip install -e ." if (root / "csrc").is_dir() else ""
    )
    warnings.warn(
        f"cmr_fast runs without its native kernels, slower ({native()}); this is the copy{where or f' in {root}'}",
        RuntimeWarning,
        stacklevel=2,
    )


@functools.cache
def _best_isa(module: ModuleType) -> str:
    return str(module.available_isas()[0])


def choose_isa() -> str:
    """The instruction set of the native CPU kernels: CMR_FAST_ISA, else the best that this processor has."""
    module = native()
    if not isinstance(module, ModuleType):
        raise InputError(f"no native kernels: {module}")
    forced = setting("CMR_FAST_ISA")
    if not forced:
        return _best_isa(module)
    available = module.available_isas()
    if forced not in available:
        raise InputError(
            f"CMR_FAST_ISA={forced!r} cannot run here: this build and processor have {', '.join(available)}"
        )
    return forced


def isa_of_arrays(op: str, backend: str | None) -> str | None:
    """The instruction set with which the native kernels run `op` on numpy arrays; None: another backend runs it."""
    module = native()
    free = backend is None and not isinstance(module, ImportError) and not torch.compiler.is_compiling()
    if free and not module.forced():
        return _best_isa(module)
    return choose_isa() if choose_backend(op, "cpu", backend) == "cpp" else None


def choose_threads(threads: int | None = None) -> int:
    """`threads`, else CMR_FAST_THREADS, else the processors that this process may use."""
    if threads is not None:
        return _as_threads(threads)
    text = setting("CMR_FAST_THREADS")
    if not text:
        return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if not (text.isascii() and text.isdigit() and 1 <= int(text) <= MAX_THREADS):
        raise InputError(f"CMR_FAST_THREADS must be an integer from 1 to {MAX_THREADS}, got {text!r}")
    return int(text)


def _as_threads(threads: object) -> int:
    if type(threads) is not int and (isinstance(threads, bool) or not isinstance(threads, numbers.Integral)):
        raise InputError(f"threads must be an integer of 1 or more, or None, got {shown(threads)}")
    number = int(threads)
    if not 1 <= number <= MAX_THREADS:
        raise InputError(
            f"threads must be {'1 or more' if number < 1 else f'at most {MAX_THREADS}'}, got {shown(number)}"
        )
    return number


def how(backend: object, threads: object) -> tuple[str | None, int | None]:
    """`backend` and `threads` of a public function, as the ops take them."""
    if backend is not None and not isinstance(backend, str):
        raise InputError(f"backend must be the name of one, or None, got {backend!r}")
    return backend, None if threads is None else _as_threads(threads)


def check_finite(**tensors: Any) -> None:
    """Where CMR_FAST_CHECK_FINITE=1 is set, refuse the first tensor that holds an infinity or NaN, by its name."""
    if os.environ.get("CMR_FAST_CHECK_FINITE") != "1":
        return
    for name, x in tensors.items():
        if x is not None and x.is_floating_point() and not (finite := x.isfinite()).all():
            where = (~finite).nonzero()
            raise InputError(f"{name} must be finite, got {len(where)} that are not, the first at {where[0].tolist()}")


@dataclass(frozen=True)
class Explanation:
    """What would run and why; printed, a line for each candidate.

    Attributes
    ----------
    op, device : str
        What was asked.
    backend : str
        What would run.
    isa : str or None
        The instruction set of the native CPU kernels.
    reasons : tuple of str
        A line for each candidate.
    """

    op: str
    device: str
    backend: str
    isa: str | None
    reasons: tuple[str, ...]

    def __str__(self) -> str:
        head = f"{self.op} on {self.device}: {self.backend}" + (f" ({self.isa})" if self.isa else "")
        return "\n".join([head, *(f"  {line}" for line in self.reasons)])


def explain(op: str, *tensors: object) -> Explanation:
    """Which backend and instruction set an op would use, and why.

    Parameters
    ----------
    op : str
        The name of a function of cmr_fast.ops.
    *tensors : Tensor or numpy.ndarray
        What it would be called with; arrays count as cpu.

    Returns
    -------
    Explanation
        To print, or to read.

    Raises
    ------
    InputError
        On a name that is none, and a backend forced by CMR_FAST_BACKEND that cannot run.
    """
    if op not in BACKENDS:
        raise InputError(f"unknown op {op!r}; the ops are {', '.join(sorted(BACKENDS))}")
    device = next((t.device.type for t in tensors if hasattr(t, "device") and hasattr(t.device, "type")), "cpu")
    backend = choose_backend(op, device)
    forced = [f"{name}={os.environ[name]}" for name in ("CMR_FAST_BACKEND", "CMR_FAST_ISA") if os.environ.get(name)]
    reasons = [
        f"{name}: {'chosen' if name == backend else unavailable(name, device) or 'available'}"
        for name in BACKENDS[op].get(device, ("torch",))
    ]
    isa = None
    if backend == "cpp":
        isa = choose_isa()
        reasons.append(f"instruction sets here: {', '.join(native().available_isas())}")
    elif backend == "cuda":
        reasons.append(f"form of top-k: {os.environ.get('CMR_FAST_CUDA_FORM') or 'popc'} (CMR_FAST_CUDA_FORM)")
    return Explanation(op, device, backend, isa, tuple(reasons + [f"forced by {f}" for f in forced]))
