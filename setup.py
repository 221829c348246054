"""Builds cmr_fast._cpu always, and cmr_fast._cuda where nvcc is found. Neither torch nor OpenMP is needed: one build
serves every torch version.

Each instruction set of the CPU is a translation unit of its own that switches the compiler over by a pragma, so the
module is built for the plain platform and picks at run time what the processor has.

CMR_FAST_CUDA=0 leaves the CUDA kernels out, =1 insists on them. CMR_FAST_CUDA_ARCHS names the targets, as in
"80 90a 80+PTX" (the default): machine code for each, and code that a driver compiles for newer devices. CUDA's runtime
is linked in, so the module asks for no CUDA library; the driver is looked for when a kernel is first wanted.
"""

import os
import shutil
import sys
from glob import glob
from importlib.util import find_spec
from pathlib import Path

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension
from pybind11.setup_helpers import build_ext as pybind11_build_ext
from setuptools import Extension, setup

ParallelCompile("CMR_FAST_BUILD_JOBS", default=0).install()


def find_nvcc() -> str | None:
    """In $CUDA_HOME or $CUDA_PATH, on the PATH, or in NVIDIA's pip packages."""
    for name in ("CUDA_HOME", "CUDA_PATH"):
        if (home := os.environ.get(name)) and (found := shutil.which("nvcc", path=str(Path(home) / "bin"))):
            return found
    if found := shutil.which("nvcc"):
        return found
    packages = find_spec("nvidia")
    folders = [Path(p) for p in (packages.submodule_search_locations or [])] if packages else []
    return next((str(p) for folder in folders for p in sorted(folder.glob("*/bin/nvcc"), reverse=True)), None)


def architectures() -> list[str]:
    flags = []
    for target in os.environ.get("CMR_FAST_CUDA_ARCHS", "80 90a 80+PTX").split():
        number, plus, _ = target.partition("+PTX")
        flags += ["-gencode", f"arch=compute_{number},code={'compute' if plus else 'sm'}_{number}"]
    return flags


class CudaExtension(Extension):
    """Compiled and linked by nvcc."""


class build_ext(pybind11_build_ext):
    def build_extension(self, extension: Extension) -> None:
        if not isinstance(extension, CudaExtension):
            super().build_extension(extension)
            return
        target, folder = Path(self.get_ext_fullpath(extension.name)), Path(self.build_temp) / "cuda"
        newest = max(Path(p).stat().st_mtime for p in [*extension.sources, *extension.depends])
        if not self.force and target.exists() and target.stat().st_mtime > newest:
            return
        folder.mkdir(parents=True, exist_ok=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        include = [f"-I{path}" for path in [*extension.include_dirs, *self.include_dirs]]
        objects = []
        for source in extension.sources:
            objects.append(str(folder / f"{Path(source).name}.o"))
            flags = architectures() if source.endswith(".cu") else []
            self.nvcc("-c", source, "-o", objects[-1], "-O3", "-std=c++17", "--threads", "0", *flags, *include)
        self.nvcc("-shared", *objects, "-o", str(target), "-cudart", "static")

    def nvcc(self, *arguments: str) -> None:
        self.spawn([nvcc, "-Xcompiler", "-fPIC,-fvisibility=hidden,-Wall", *arguments])


cuda = os.environ.get("CMR_FAST_CUDA", "auto")
nvcc = find_nvcc() if cuda != "0" else None
extensions: list[Extension] = [
    Pybind11Extension(
        "cmr_fast._cpu",
        sorted(glob("csrc/cpu/*.cpp")),
        include_dirs=["csrc/cpu"],
        depends=[*sorted(glob("csrc/cpu/*.h")), "setup.py"],
        cxx_std=17,
        extra_compile_args=[
            "-O3",
            "-fvisibility=hidden",
            "-Wall",
            "-Wextra",
            "-pthread",
            "-ffp-contract=off",
            "-fno-math-errno",
        ],
        extra_link_args=["-pthread"],
    )
]
if nvcc:
    import pybind11

    extensions.append(
        CudaExtension(
            "cmr_fast._cuda",
            [*sorted(glob("csrc/cuda/*.cu")), "csrc/cuda/module.cpp"],
            include_dirs=["csrc/cuda", pybind11.get_include()],
            depends=[*sorted(glob("csrc/cuda/*.cuh")), "csrc/cuda/kernels.h", "setup.py"],
            optional=cuda != "1",  # an nvcc that cannot build it must not keep the rest from being installed
        )
    )
elif cuda == "1":
    raise SystemExit("CMR_FAST_CUDA=1, but no nvcc was found in CUDA_HOME, on the PATH or in NVIDIA's pip packages")
else:
    why = "CMR_FAST_CUDA=0" if cuda == "0" else "no nvcc in CUDA_HOME, on the PATH or in NVIDIA's pip packages"
    print(f"cmr_fast: the CUDA kernels are left out: {why}", file=sys.stderr)

setup(ext_modules=extensions, cmdclass={"build_ext": build_ext})
