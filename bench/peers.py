"""Ours beside every alternative, as one table: `python bench/peers.py [op ...] [--rounds 7] [--json F] [--markdown F]`.

Ours and the alternative do the same work in the same run, one thread pinned, order rotated; speed-up is the median of
the per-round ratios. A comparison whose correctness gate is red is reported as such, without a time, and the exit
code is 1. One whose alternative is not installed is left out and says so; where nothing is left, that fails too. Both
files name the commit, the machine and the versions that were measured.
"""

import argparse
import importlib
import json
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from benchmarks.common import Timing, compare, one_thread

OPS = (
    *("hamming", "hamming_calls", "ranking", "multi_index", "hamming_range", "triplet", "acmr_step", "infonce"),
    *("pairwise", "pgd", "sinkhorn", "scatter_step", "dcmh_step", "cmla", "bert_attack", "character_attack"),
    *("pair_attacks", "mat_step", "textattack_peer"),
)


# What the rows run beside; the ones that are installed are named with the numbers.
PEERS = (
    *("faiss-cpu", "faiss-gpu", "pynear", "open_clip_torch", "pytorch-metric-learning", "torchattacks", "adv-lib"),
    *("usearch", "numkong", "POT", "geomloss", "torchmetrics", "textattack", "timm", "transformers"),
)
HEAD = "| comparison | alternative | ours | theirs | speed-up | share of limit |\n|---|---|---|---|---|---|"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "ops", nargs="*", default=[], metavar="op", help=f"which ones (default: all of {', '.join(OPS)})"
    )
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--quick", action="store_true", help="one round of a small case: shows that everything runs")
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    parser.add_argument("--markdown", type=Path, help="also write the table to this file")
    arguments = parser.parse_args()
    if unknown := set(arguments.ops) - set(OPS):
        parser.error(f"unknown op {', '.join(sorted(unknown))}; the ops are {', '.join(OPS)}")
    table, rows, red = [HEAD], [], 0
    print(HEAD)
    with one_thread():
        for op in arguments.ops or OPS:
            try:
                for item in importlib.import_module(f"benchmarks.{op}").comparisons(quick=arguments.quick):
                    try:
                        timing = compare(item, 1 if arguments.quick else arguments.rounds)
                    except ModuleNotFoundError as error:
                        table.append(left_out(f"{item.name} | {item.alternative}", error))
                    except AssertionError as error:
                        red += 1
                        said = (str(error).strip() or "they differ").splitlines()[0]
                        table.append(f"| {item.name} | {item.alternative} | RED: {said} | | | |")
                    else:
                        table.append(line(timing))
                        rows.append(row(timing))
                    print(table[-1], flush=True)
            except ModuleNotFoundError as error:
                table.append(left_out(f"{op} | ", error))
                print(table[-1], flush=True)
    measured = machine() | {"commit": commit(), **versions()}
    if arguments.json:
        arguments.json.write_text(json.dumps({"machine": measured, "rows": rows}, indent=1) + "\n")
    if arguments.markdown:
        said = ", ".join(f"{name} {value}" for name, value in measured.items())
        arguments.markdown.write_text("\n".join([*table, "", f"Measured with {said}."]) + "\n")
    return 1 if red or not rows else 0


def left_out(name: str, error: ModuleNotFoundError) -> str:
    """The line of a comparison without its alternative; a module of ours that is not there is no reason."""
    if (error.name or "").partition(".")[0] in ("cmr_fast", "benchmarks"):
        raise error
    return f"| {name} | left out: {error} | | | |"


def line(timing: Timing) -> str:
    item, share = timing.comparison, timing.share_of_limit
    rates = " | ".join(f"{item.work / seconds:.2f} {item.unit}/s" for seconds in (timing.ours, timing.theirs))
    return (
        f"| {item.name} | {item.alternative} | {rates} | {timing.speedup:.1f}x "
        f"| {'' if share is None else f'{share:.0%}'} |"
    )


def row(timing: Timing) -> dict[str, object]:
    return {
        "comparison": timing.comparison.name,
        "alternative": timing.comparison.alternative,
        "ours_s": timing.ours,
        "theirs_s": timing.theirs,
        "speedup": timing.speedup,
        "limit": timing.limit,
        "share_of_limit": timing.share_of_limit,
        "unit": timing.comparison.unit,
    }


def machine() -> dict[str, str]:
    import torch

    from cmr_fast.ops import _dispatch

    model = platform.processor()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), model)
    return {
        "processor": model,
        "isa": _dispatch.choose_isa(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def commit() -> str:
    """The commit of this tree, with a + where the tree is no longer it."""
    git = ["git", "-C", str(Path(__file__).parent)]
    done = subprocess.run([*git, "describe", "--always", "--abbrev=10", "--dirty=+"], capture_output=True, text=True)
    return done.stdout.strip() or "unknown"


def versions() -> dict[str, str]:
    found = {}
    for name in PEERS:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


if __name__ == "__main__":
    raise SystemExit(main())
