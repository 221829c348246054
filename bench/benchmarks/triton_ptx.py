"""Compiles the Triton kernels for a GPU that is not here, by the calls that launch them: `python triton_ptx.py FOLDER`.

Writes the PTX of each instance to FOLDER and prints a line of JSON for it: its kernel, its case, the file, the options
that Triton gives ptxas for it and the shared memory. A process of its own, because it takes Triton's driver away.
"""

import json
import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

CAPABILITY = 90
PGD = ("linf", "l2")
DTYPES = ("float32", "bfloat16")
FORMS = {"onepass": ("_stats", "_side"), "chunked": ("_stats", "_to_gradient")}
KERNELS = (
    *("pgd _linf", "pgd _sums", "pgd _move"),
    *(f"{form} {name} {dtype}" for form, names in FORMS.items() for name in names for dtype in DTYPES),
    *(f"sigmoid _to_sigmoid {dtype}" for dtype in DTYPES),
)


def cases() -> list[tuple[str, str, Callable[[], object]]]:
    """What to call, and the words before and after the kernels' names. The numbers in the tensors do not matter."""
    import torch

    from cmr_fast.ops.triton import info_nce, pgd

    options = info_nce._options
    info_nce._options = lambda x: {**options(x), "WIDEN": False}  # as on a GPU
    x, flags = torch.empty(4, 3, 64, 64), torch.empty(4, dtype=torch.int32)
    values = [torch.ones(1, 1)] * 4
    found: list[tuple[str, str, Callable[[], object]]] = [
        ("pgd", "", partial(pgd.step, x, x, x, values, flags, 0, norm == "l2")) for norm in PGD
    ]
    for name in DTYPES:
        features, scale = torch.empty(512, 256, dtype=getattr(torch, name)), torch.ones(())
        for form in FORMS:
            found.append((form, name, partial(one_step, form, features, scale)))
        sigmoid = partial(info_nce.sigmoid, features, features, scale, scale, Pairs(), (1.0, -1.0), True, None)
        found.append(("sigmoid", name, sigmoid))
    return found


class Pairs:
    """Row i belongs to column i."""

    offset = 0


def one_step(form: str, features: object, scale: object) -> None:
    """InfoNCE forward and backward."""
    import torch

    from cmr_fast.ops.triton import info_nce

    os.environ["CMR_FAST_INFONCE_FORM"] = form
    rows, columns = torch.ones(4, 512), torch.ones(4, 512)
    info_nce.forward(features, features, scale, Pairs(), rows, columns, torch.empty(0), None)
    info_nce.backward(features, features, scale, Pairs(), rows, columns, torch.empty(0), None)


def main() -> None:
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver, jit

    class Target:
        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", CAPABILITY, 32)

        def get_current_device(self) -> int:
            return 0

        def get_current_stream(self, device: object = None) -> int:
            return 0

    compiled: dict[str, tuple[str, object]] = {}
    driver.set_active(Target())

    def compile_alone(kernel: jit.JITFunction, grid: object) -> Callable[..., None]:
        def call(*arguments: object, **options: object) -> None:
            made = kernel.warmup(*arguments, grid=grid, **options)
            compiled[made.hash] = kernel.fn.__name__, made

        return call

    jit.JITFunction.__getitem__ = compile_alone
    for before, after, call in cases():
        compiled.clear()
        call()
        for hashed, (name, made) in compiled.items():
            path = Path(sys.argv[1], f"{hashed}.ptx")
            path.write_text(made.asm["ptx"])
            fused = ["--fmad=false"] if not made.metadata.enable_fp_fusion else []
            print(
                json.dumps(
                    {
                        "kernel": " ".join(filter(None, (before, name, after))),
                        "path": str(path),
                        "options": [*fused, "--regAllocOptLevel=2", "-lineinfo"],
                        "shared": made.metadata.shared,
                    }
                )
            )


if __name__ == "__main__":
    main()
