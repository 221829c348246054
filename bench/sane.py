"""Did the whole suite run, and are its numbers numbers? `python bench/sane.py [COMMIT]`, after `asv run`.

Fails where a benchmark of the suite has no result at a commit, a number is not finite or below zero, or one was skipped
that `absent` does not excuse: asv itself counts a benchmark that became skipped as unchanged.
"""

import argparse
import fnmatch
import itertools
import json
import math
import shutil
import subprocess
from importlib.util import find_spec
from pathlib import Path

from asv.results import Results, iter_results

from cmr_fast.ops import _dispatch

ROOT = Path(__file__).resolve().parents[1]
LIBRARIES = {
    "open_clip": "*open_clip*",
    "faiss": "*over_faiss*",
    "torchattacks": "*over_torchattacks*",
    "usearch": "*over_usearch*",
    "numkong": "*over_numkong*",
    "adv_lib": "*over_adv_lib*",
    "timm": "pgd.Attack.*",
    "ot": "*over_pot*",
    "geomloss": "*over_geomloss*",
    "triton": "kernels.Triton.*",
}
PROGRAMS = {"nvcc": "kernels.Cuda.*", "valgrind": "instructions.*"}


def absent() -> tuple[str, ...]:
    """What this machine and environment do not have, as patterns of `benchmark(parameter, parameter)`."""
    here = set(_dispatch.native().available_isas())
    isas = [f"ways.Ways.*, {isa})" for isa in ("avx512_vpopcntdq", "avx512bw", "avx2", "neon") if isa not in here]
    cuda = ["package.Library.*(_cuda)"] if find_spec("cmr_fast._cuda") is None else []
    others = [pattern for package, pattern in LIBRARIES.items() if find_spec(package) is None]
    others += [pattern for program, pattern in PROGRAMS.items() if shutil.which(program) is None]
    # what works on pretrained towers and captions, which the user brings
    given = ["*BertAttackCaptions*", "*CharacterAttackCaptions*", "pair_attacks.*", "mat_step.*"]
    return (*isas, *cuda, *others, *given)


def faults(suite: dict, results: list[Results], excused: tuple[str, ...]) -> tuple[list[str], int]:
    """What is wrong, and how many numbers there are."""
    found: dict[str, object] = {}
    for result in results:
        for name in result.get_all_result_keys():
            params = result.get_result_params(name)
            labels = [", ".join(x.strip("'") for x in one) for one in itertools.product(*params)]
            found |= {
                f"{name}({label})" if label else name: value
                for label, value in zip(labels, result.get_result_value(name, params), strict=True)
            }
    wrong = [f"{name}: not run" for name in suite if not any(x.partition("(")[0] == name for x in found)]
    numbers = 0
    for name, value in found.items():
        if value is None:
            wrong.append(f"{name}: failed")
        elif math.isnan(value):
            if not any(fnmatch.fnmatchcase(name, pattern) for pattern in excused):
                wrong.append(f"{name}: skipped")
        elif math.isinf(value) or value < 0:
            wrong.append(f"{name}: {value}")
        else:
            numbers += 1
    return wrong, numbers


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("commit", nargs="?", default="HEAD")
    parser.add_argument("--results", type=Path, default=ROOT / ".asv" / "results", help="default %(default)s")
    arguments = parser.parse_args()
    git = ["git", "-C", str(ROOT), "rev-parse", arguments.commit]
    commit = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    suite = json.loads((arguments.results / "benchmarks.json").read_text())
    suite.pop("version", None)
    results = [result for result in iter_results(str(arguments.results)) if result.commit_hash == commit]
    wrong, numbers = faults(suite, results, absent())
    for line in wrong:
        print(line)
    print(f"{numbers} numbers of {len(suite)} benchmarks at {commit[:10]}, {len(wrong)} wrong")
    return 1 if wrong or not numbers else 0


if __name__ == "__main__":
    raise SystemExit(main())
