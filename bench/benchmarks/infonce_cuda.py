"""InfoNCE forward and backward on a GPU: both Triton forms, eager torch, and Inf-CL's kernels where `inf_cl` can be
imported: `python bench/benchmarks/infonce_cuda.py [--json FILE]`.

Times are device times, memory is torch's peak above the inputs, gradients included. Errors are those of the loss and of
the gradients of image and text, relative to float64, on 1,024 pairs of the same width; ours may be at most twice
eager's. float32 products are float32, not TF32. A contender that runs out of memory says so.
"""

import os
from collections.abc import Callable
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn import functional as F

import cmr_fast as cf

try:
    from .gpu import Report, in_turn, median, peak_bytes, ratio
except ImportError:  # started as a program
    from gpu import Report, in_turn, median, peak_bytes, ratio

CASES = ((32_768, 768), (8192, 512))
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
SCALE, SMALL = 50.0, 1024
FORMS = ("onepass", "chunked")
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


@contextmanager
def form(name: str):
    before = os.environ.get("CMR_FAST_INFONCE_FORM")
    os.environ["CMR_FAST_INFONCE_FORM"] = name
    try:
        yield
    finally:
        os.environ.pop("CMR_FAST_INFONCE_FORM")
        if before is not None:
            os.environ["CMR_FAST_INFONCE_FORM"] = before


def problem(size: int, width: int, dtype: torch.dtype) -> list[Tensor]:
    """Unit vectors, texts near their images, and the scale of a CLIP that has been training for a while."""
    image, noise = (torch.randn(size, width, device="cuda") for _ in range(2))
    pair = [F.normalize(image), F.normalize(image + 6 * noise)]
    return [x.to(dtype).requires_grad_() for x in pair] + [torch.tensor(SCALE, device="cuda").requires_grad_()]


def eager(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
    logits = scale.to(image.dtype) * image @ text.T
    target = torch.arange(len(image), device=image.device)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def ours(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
    return cf.info_nce(image, text, scale, backend="triton")


def inf_cl_loss() -> Loss | str:
    """Inf-CL's loss of one device, both directions, or why there is none."""
    try:
        from inf_cl import cal_flash_loss
    except ImportError as error:
        return str(error)

    def loss(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
        return (cal_flash_loss(image, text, scale=scale) + cal_flash_loss(text, image, scale=scale)).mean() / 2

    return loss


def train(name: str, loss: Loss, tensors: list[Tensor]) -> list[Tensor]:
    """Loss, and the gradients of image, text and scale."""
    if name not in FORMS:
        value = loss(*tensors)
        return [value.detach(), *torch.autograd.grad(value, tensors)]
    with form(name):
        value = loss(*tensors)
        return [value.detach(), *torch.autograd.grad(value, tensors)]


def errors(found: list[Tensor], exact: list[Tensor]) -> list[float]:
    return [float((a.double() - b).norm() / b.norm()) for a, b in zip(found[:3], exact[:3], strict=True)]


def case(report: Report, contenders: dict[str, Loss], size: int, width: int, dtype: torch.dtype) -> dict[str, object]:
    found: dict[str, object] = {}
    small = problem(min(size, SMALL), width, dtype)
    exact = train("float64", eager, [x.detach().double().requires_grad_() for x in small])
    apart = {}
    for name, loss in contenders.items():
        try:
            apart[name] = errors(train(name, loss, small), exact)
        except Exception as error:
            assert name == "inf_cl", f"{name}: {type(error).__name__}: {error}"
            found["inf_cl"] = f"{type(error).__name__}: {error}".splitlines()[0]
    for name in FORMS:
        for what, a, b in zip(("loss", "image", "text"), apart[name], apart["eager"], strict=True):
            assert a <= 2 * b + 1e-6, f"{name}: error of {what} {a:.1e}, eager has {b:.1e}"
    found |= {f"{name}_error": max(values[1:]) for name, values in apart.items()}

    tensors = problem(size, width, dtype)
    running = {}
    for name in apart:
        try:
            found[f"{name}_MB"] = peak_bytes(lambda name=name: train(name, contenders[name], tensors)) / 1e6
            running[name] = lambda name=name: train(name, contenders[name], tensors)
        except torch.OutOfMemoryError:
            found[f"{name}_MB"] = "out of memory"
        torch.cuda.empty_cache()
    times = in_turn(running, report.rounds)
    found |= {f"{name}_s": median(times, name) for name in running}
    for name in FORMS:
        found |= {f"{name}_over_{other}": ratio(times, other, name) for other in running if other not in FORMS}
    return found


def main() -> int:
    report = Report(__doc__, "triton")
    torch.backends.cuda.matmul.allow_tf32 = False
    contenders: dict[str, Loss] = {**dict.fromkeys(FORMS, ours), "eager": eager}
    other = inf_cl_loss()
    if isinstance(other, str):
        print(f"without Inf-CL: {other}")
    else:
        contenders["inf_cl"] = other
    for size, width in ((2048, 256),) if report.quick else CASES:
        for name, dtype in DTYPES.items():
            arguments = (report, contenders, size, width, dtype)
            report.row(f"InfoNCE {name}, N = {size:,}, d = {width}", lambda arguments=arguments: case(*arguments))
    return 1 if report.red else 0


if __name__ == "__main__":
    raise SystemExit(main())
