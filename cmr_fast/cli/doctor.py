"""What this installation can do, and why: versions, processor, instruction set, backends per op, extras, data."""

import json
import os
import platform
import re
import sys
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, metadata, requires, version
from pathlib import Path
from typing import Any

CPU_FLAGS = (
    "sse4_2",
    "avx",
    "avx2",
    "fma",
    "avx512f",
    "avx512bw",
    "avx512_vpopcntdq",
    "avx512_bf16",
    "amx_bf16",
    "asimd",
    "sve",
)
VARIABLES = (
    "CMR_FAST_DATA",
    "CMR_FAST_BACKEND",
    "CMR_FAST_ISA",
    "CMR_FAST_THREADS",
    "OMP_NUM_THREADS",
    "CUDA_VISIBLE_DEVICES",
)


@dataclass(frozen=True, kw_only=True)
class Doctor:
    """Versions, instruction set, the backends of each op, extras and data: what is there, what is not, and why.

    Example:  cmr-fast doctor --json
    """

    json: bool = False
    """Print JSON."""

    def __call__(self) -> None:
        """Run the command."""
        report = examine()
        if self.json:
            print(json.dumps(report, indent=2))
        else:
            print_report(report)


def examine() -> dict[str, Any]:
    """Everything that `cmr-fast doctor` prints, as JSON values. Never raises for something that is merely absent."""
    import torch

    import cmr_fast
    from cmr_fast.ops import _dispatch

    return {
        "cmr_fast": {"version": cmr_fast.__version__, "path": str(Path(cmr_fast.__file__).parent)},
        "python": {"version": platform.python_version(), "executable": sys.executable, "system": platform.platform()},
        "libraries": {name: _version(name) for name in _requirements("")},
        "cpu": _cpu() | {"torch_threads": torch.get_num_threads()},
        "gpu": _gpu(),
        "instruction_set": _instruction_set(),
        "ops": {
            op: {device: _backends(op, device, names) for device, names in devices.items()}
            for op, devices in _dispatch.BACKENDS.items()
        },
        "extras": {extra: {name: _version(name) for name in _requirements(extra)} for extra in _extras()},
        "data": _data(),
        "wrong_variables": _wrong_variables(),
        "environment": {name: os.environ[name] for name in VARIABLES if name in os.environ},
    }


def _extras() -> list[str]:
    try:
        return [extra for extra in metadata("cmr-fast").get_all("Provides-Extra") or [] if extra != "all"]
    except PackageNotFoundError:
        return []


def _requirements(extra: str) -> list[str]:
    """The packages that this installation's metadata names for `extra` ("" for what is always needed)."""
    try:
        lines = requires("cmr-fast") or []
    except PackageNotFoundError:
        return []
    wanted = [line for line in lines if extra == "".join(re.findall(r"extra == ['\"]([^'\"]+)", line))]
    return [re.split(r"[^\w.-]", line, maxsplit=1)[0] for line in wanted]


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _cpu() -> dict[str, Any]:
    model, flags = platform.processor() or platform.machine(), set()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                model = value.strip()
            elif key.strip() in ("flags", "Features"):
                flags = set(value.split())
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "model": model,
        "machine": platform.machine(),
        "usable_processors": usable,
        "features": [f for f in CPU_FLAGS if f in flags],
    }


def _gpu() -> dict[str, Any]:
    import torch

    if torch.cuda.is_available():
        return {
            "devices": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
            "why": "torch sees CUDA",
        }
    why = "torch was built without CUDA" if torch.version.cuda is None else "torch sees no CUDA device or driver"
    return {"devices": [], "why": why}


def _instruction_set() -> dict[str, Any]:
    """`runs`: the one that native CPU ops use, None where there is no native module; `why`; `available` best first."""
    from cmr_fast.ops import _dispatch

    module = _dispatch.native()
    if isinstance(module, ImportError):
        return {
            "runs": None,
            "why": f"cmr_fast._cpu cannot be imported ({module}); `pip install .` builds it",
            "available": [],
        }
    available = list(module.available_isas())
    try:
        runs = _dispatch.choose_isa()
    except ValueError as error:
        return {"runs": None, "why": str(error), "available": available}
    forced = os.environ.get("CMR_FAST_ISA")
    why = f"forced by CMR_FAST_ISA={forced}" if forced else "the best that this processor and this build have"
    return {"runs": runs, "why": why, "available": available}


def _backends(op: str, device: str, names: tuple[str, ...]) -> dict[str, Any]:
    """Which backend would run `op`, and for each candidate 'available' or the reason why not."""
    import torch

    from cmr_fast.ops import _dispatch

    if device == "cuda" and not torch.cuda.is_available():
        why = {name: _dispatch.unavailable(name, device) or "no CUDA device here" for name in names}
        return {"runs": None, "candidates": why}
    candidates = {name: _dispatch.unavailable(name, device) or "available" for name in names}
    try:
        return {"runs": _dispatch.choose_backend(op, device), "candidates": candidates}
    except ValueError as error:
        return {"runs": None, "candidates": candidates, "error": str(error)}


def _wrong_variables() -> dict[str, str]:
    """The variables that ops would refuse, and why."""
    from cmr_fast.ops import _dispatch

    wrong = {}
    threads = os.environ.get("CMR_FAST_THREADS")
    if threads is not None and not (threads.isascii() and threads.isdecimal() and 0 < int(threads) < 1 << 31):
        wrong["CMR_FAST_THREADS"] = "expected a whole number, 1 or more"
    backend = os.environ.get("CMR_FAST_BACKEND")
    known = sorted({name for devices in _dispatch.BACKENDS.values() for names in devices.values() for name in names})
    if backend and backend not in known:
        wrong["CMR_FAST_BACKEND"] = f"expected one of {', '.join(known)}"
    return wrong


def _data() -> dict[str, Any]:
    root = os.environ.get("CMR_FAST_DATA")
    if root is None:
        return {
            "root": None,
            "sets": [],
            "why": "CMR_FAST_DATA is not set: give --data a path, or `shapes` for the built-in set",
        }
    folder = Path(root)
    if not folder.is_dir():
        return {"root": root, "sets": [], "why": f"CMR_FAST_DATA={root} is not a folder"}
    return {"root": root, "sets": sorted(p.name for p in folder.iterdir() if p.is_dir()), "why": "CMR_FAST_DATA"}


def print_report(report: dict[str, Any]) -> None:
    """What `examine` returned, for people."""
    from rich.markup import escape

    from cmr_fast._terminal import new_table, show

    python, cpu, isa, gpu, data = (report[name] for name in ("python", "cpu", "instruction_set", "gpu", "data"))
    head = new_table("", "")
    head.show_header = False
    head.add_row("installed in", report["cmr_fast"]["path"])
    head.add_row("python", f"{python['version']}  {python['executable']}")
    head.add_row("system", python["system"])
    head.add_row("processor", f"{cpu['model']}, {cpu['usable_processors']} usable")
    head.add_row("its features", " ".join(cpu["features"]) or "not known on this system")
    head.add_row("instruction set", f"[bold]{isa['runs'] or 'none'}[/bold]: {isa['why']}")
    head.add_row("  to choose from", ", ".join(isa["available"]) or "none")
    head.add_row("GPU", f"{', '.join(gpu['devices']) or 'none'}: {gpu['why']}")
    head.add_row("data", f"{data['root'] or 'none'}: {', '.join(data['sets']) or data['why']}")
    for name, value in report["environment"].items():
        why = report["wrong_variables"].get(name)
        head.add_row(f"  {name}", escape(value) + (f" [red]not valid: {escape(why)}[/red]" if why else ""))
    libraries = ", ".join(f"{name} {seen or '[red]missing[/red]'}" for name, seen in report["libraries"].items())
    head.add_row("libraries", libraries or "not known: cmr-fast is not installed as a package (pip install .)")
    show("cmr-fast " + report["cmr_fast"]["version"], head)

    ops = new_table("op", "device", "runs", "candidates, in order of preference")
    for op, devices in report["ops"].items():
        for device, backend in devices.items():
            reasons = "; ".join(f"{name}: {why}" for name, why in backend["candidates"].items())
            ops.add_row(op, device, f"[bold]{backend['runs'] or 'none'}[/bold]", backend.get("error") or reasons)
    show("\nBackends", ops)

    extras = new_table("extra", "state", "packages")
    for name, packages in report["extras"].items():
        missing = [package for package, seen in packages.items() if seen is None]
        state = f'missing {", ".join(missing)}: pip install "cmr-fast\\[{name}]"' if missing else "installed"
        extras.add_row(name, state, ", ".join(f"{p} {v}" for p, v in packages.items() if v))
    if report["extras"]:
        show("\nOptional extras", extras)
