"""Builds cmr_fast._cpu. Neither torch nor OpenMP is needed: one build serves every torch version.

Each instruction set is a translation unit of its own that switches the compiler over by a pragma, so the module is
built for the plain platform and picks at run time what the processor has.
"""

from glob import glob

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension, build_ext
from setuptools import setup

ParallelCompile("CMR_FAST_BUILD_JOBS", default=0).install()

setup(
    ext_modules=[
        Pybind11Extension(
            "cmr_fast._cpu",
            sorted(glob("csrc/cpu/*.cpp")),
            include_dirs=["csrc/cpu"],
            depends=[*sorted(glob("csrc/cpu/*.h")), "setup.py"],
            cxx_std=17,
            extra_compile_args=["-O3", "-fvisibility=hidden", "-Wall", "-Wextra", "-pthread", "-ffp-contract=off"],
            extra_link_args=["-pthread"],
        )
    ],
    cmdclass={"build_ext": build_ext},
)
