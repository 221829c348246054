"""What ptxas says of the GPU kernels on sm_90a: registers, spills, shared memory. No GPU is needed.

nvcc compiles csrc/cuda, where a kernel has an instance for each of its template's arguments. Triton compiles ahead of
time (`triton_ptx.py`) and tells no counts without a driver, so ptxas assembles its PTX once more.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from collections import defaultdict
from importlib.util import find_spec
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory

from .common import SkipNotImplemented
from .triton_ptx import KERNELS

ARCHITECTURE = "sm_90a"
SOURCES = Path(__file__).resolve().parents[2] / "csrc" / "cuda"
DECLARED = re.compile(r"__global__ void(?:\s+__launch_bounds__\([^)]*\))?\s+(\w+)\(")
ENTRY = re.compile(r"Compiling entry function '(\w+)'")
SPILLED = re.compile(r"(\d+) bytes spill (?:stores|loads)")
Instance = dict[str, int]  # "registers" of a thread, "spilled" and "shared" bytes


def declared() -> tuple[str, ...]:
    """The kernels of csrc/cuda, by their names in the sources."""
    files = sorted([*SOURCES.glob("*.cu"), *SOURCES.glob("*.cuh")])
    return tuple(name for path in files for name in DECLARED.findall(path.read_text()))


def parsed(log: str) -> list[tuple[str, Instance]]:
    """The entry functions of ptxas -v, by their mangled names; what an entry calls spills for it."""
    found = []
    heads = [*ENTRY.finditer(log)]
    for i in range(len(heads)):
        text = log[heads[i].end() : heads[i + 1].start() if i + 1 < len(heads) else len(log)]
        registers, shared = re.search(r"Used (\d+) registers", text), re.search(r"(\d+) bytes smem", text)
        if registers is None or not SPILLED.search(text):
            raise ValueError(f"ptxas tells no registers or no spills of {heads[i][1]}: {text[:300]}")
        found.append(
            (
                heads[i][1],
                {
                    "registers": int(registers[1]),
                    "spilled": sum(map(int, SPILLED.findall(text))),
                    "shared": int(shared[1]) if shared else 0,
                },
            )
        )
    return found


def told(*command: str) -> str:
    """What a compiler writes."""
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr[-2000:]}")
    return done.stderr + done.stdout


def cuda() -> dict[str, list[Instance]] | str:
    """The instances of every kernel, or why there are none."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        return "no nvcc on the PATH"
    found = defaultdict(list)
    with TemporaryDirectory() as folder:
        for source in sorted(SOURCES.glob("*.cu")):
            flags = f"-arch={ARCHITECTURE}", "-cubin", "-Xptxas", "-v", "-O3", "-std=c++17"  # as in setup.py
            log = told(nvcc, *flags, str(source), "-o", str(Path(folder, source.stem)))
            for mangled, instance in parsed(log):
                (name,) = (name for name in declared() if f"{len(name)}{name}" in mangled)
                found[name].append(instance)
    return dict(found)


def triton() -> dict[str, list[Instance]] | str:
    """The same of Triton's."""
    if find_spec("triton") is None:
        return "no triton here"
    from triton import knobs

    found = defaultdict(list)
    with TemporaryDirectory() as folder:
        env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        env |= {"TRITON_CACHE_DIR": str(Path(folder, "cache"))}
        script = Path(__file__).with_name("triton_ptx.py")
        done = subprocess.run([sys.executable, script, folder], capture_output=True, text=True, env=env)
        if done.returncode:
            raise RuntimeError(f"{script.name}: {done.stderr[-2000:]}")
        for line in done.stdout.splitlines():
            made = json.loads(line)
            options = *made["options"], f"--gpu-name={ARCHITECTURE}", "-o", str(Path(folder, "cubin"))
            ((_, instance),) = parsed(told(knobs.nvidia.ptxas.path, "-v", *options, made["path"]))
            found[made["kernel"]].append({**instance, "shared": made["shared"]})  # which a launch asks for
    return dict(found)


class _Kernels:
    """Lower is better."""

    version = "1"
    param_names = ("kernel",)
    timeout = 900

    def setup(self, found: dict[str, list[Instance]] | str, kernel: str) -> None:
        if isinstance(found, str):
            raise SkipNotImplemented(found)
        self.instances = found[kernel]

    def track_registers(self, found: object, kernel: str) -> float:
        return fmean(x["registers"] for x in self.instances)  # of the most, one at its limit would hide the others

    track_registers.unit = "registers of a thread, mean of the instances"

    def track_spilled(self, found: object, kernel: str) -> float:
        return float(sum(x["spilled"] for x in self.instances))

    track_spilled.unit = "bytes stored and loaded, all instances"

    def track_shared(self, found: object, kernel: str) -> float:
        return float(max(x["shared"] for x in self.instances))

    track_shared.unit = "bytes of shared memory"


class Cuda(_Kernels):
    """Shared memory is what a kernel has in itself, not what its launch asks for."""

    params = (declared(),)

    def setup_cache(self) -> dict[str, list[Instance]] | str:
        return cuda()


class Triton(_Kernels):
    """Features of 256, rows of 512."""

    params = (KERNELS,)

    def setup_cache(self) -> dict[str, list[Instance]] | str:
        return triton()
