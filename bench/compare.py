"""Print every comparison as one table: `python bench/compare.py [op ...] [--rounds 7] [--json FILE]`.

Ours and the alternative do the same work in the same run, one thread pinned, order rotated; speed-up is the median of
the per-round ratios. A comparison whose correctness gate is red is reported as such, without a time, and the exit
code is 1.
"""

import argparse
import importlib
import json
import platform
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from benchmarks.common import compare, one_thread

OPS = (
    *("hamming", "hamming_calls", "ranking", "multi_index", "hamming_range", "triplet", "acmr_step", "infonce"),
    *("pairwise", "pgd", "sinkhorn", "scatter_step", "dcmh_step", "cmla", "bert_attack", "character_attack"),
    *("pair_attacks", "mat_step", "textattack_peer"),
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "ops", nargs="*", default=[], metavar="op", help=f"which ones (default: all of {', '.join(OPS)})"
    )
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--quick", action="store_true", help="one round of a small case: shows that everything runs")
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    arguments = parser.parse_args()
    if unknown := set(arguments.ops) - set(OPS):
        parser.error(f"unknown op {', '.join(sorted(unknown))}; the ops are {', '.join(OPS)}")
    rows, red = [], 0
    print("| comparison | alternative | ours | theirs | speed-up | share of limit |")
    print("|---|---|---|---|---|---|")
    with one_thread():
        for op in arguments.ops or OPS:
            for item in importlib.import_module(f"benchmarks.{op}").comparisons(quick=arguments.quick):
                try:
                    timing = compare(item, 1 if arguments.quick else arguments.rounds)
                except AssertionError as error:
                    red += 1
                    print(f"| {item.name} | {item.alternative} | RED: {str(error).strip().splitlines()[0]} | | | |")
                    continue
                share = timing.share_of_limit
                print(
                    f"| {item.name} | {item.alternative} | {item.work / timing.ours:.2f} {item.unit}/s "
                    f"| {item.work / timing.theirs:.2f} {item.unit}/s | {timing.speedup:.1f}x "
                    f"| {'' if share is None else f'{share:.0%}'} |",
                    flush=True,
                )
                rows.append(
                    {
                        "comparison": item.name,
                        "alternative": item.alternative,
                        "ours_s": timing.ours,
                        "theirs_s": timing.theirs,
                        "speedup": timing.speedup,
                        "limit": timing.limit,
                        "share_of_limit": timing.share_of_limit,
                        "unit": item.unit,
                    }
                )
    if arguments.json:
        arguments.json.write_text(json.dumps({"machine": machine(), "rows": rows}, indent=1) + "\n")
    return 1 if red else 0


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


if __name__ == "__main__":
    raise SystemExit(main())
