"""CLIP with pretrained towers on Flickr8k, frozen and trained: bench/results/clip_flickr8k.{json,md}.

    python bench/experiments/clip_flickr8k.py              # seeds 0 and 1, heads alone and both towers
    python bench/experiments/clip_flickr8k.py --tables     # only write the table of the runs there are

The data are found under $CMR_FAST_DATA (or --data), the towers are the extra `towers`. Every finished run is kept in
the JSON file and not run again. What the frozen towers see is kept in the user's cache; the time of a run holds it only
where it was not there yet. CPU time is that of the process, all threads.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

from cmr_fast._files import write_aside
from cmr_fast.data import load_captions
from cmr_fast.methods.clip import Clip, ClipConfig
from cmr_fast.methods.loop import RunConfig, train
from cmr_fast.reports.captions import HEAD, row_of

RESULTS = Path(__file__).resolve().parent.parent / "results" / "clip_flickr8k"
CONFIGS = {"heads alone": Clip.presets["frozen"], "heads, then both towers": ClipConfig()}


def write(runs: dict[str, Any]) -> None:
    """The JSON file and the table."""
    with write_aside(RESULTS.with_suffix(".json")) as aside:
        aside.write_text(json.dumps(runs, indent=2) + "\n")
    lines = [
        "# CLIP with pretrained towers on Flickr8k",
        "",
        "EfficientNet-Lite0 and MiniLM at 128 pixels, official split: 1,000 test images, 5,000 captions, in percent.",
        "Weights of the best epoch by validation rsum. Written by `bench/experiments/clip_flickr8k.py`.",
        "",
        f"| trained | seed | {' | '.join(HEAD)} | validation rsum | CPU minutes |",
        "|---|" + "---:|" * (len(HEAD) + 3),
    ]
    for name, run in runs.items():
        trained, _, seed = name.rpartition(", seed ")
        cpu = "" if run["cpu_seconds"] is None else f"{run['cpu_seconds'] / 60:.1f}"
        cells = [*row_of(run["results"]), f"{run['results']['valid_rsum']:.1f}", cpu]
        lines.append(f"| {trained} | {seed} | {' | '.join(cells)} |")
    notes = dict.fromkeys(run["note"] for run in runs.values() if run.get("note"))
    lines += ["", *notes] if notes else []
    with write_aside(RESULTS.with_suffix(".md")) as aside:
        aside.write_text("\n".join(lines) + "\n")


def main() -> None:
    """Run what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="flickr8k")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--tables", action="store_true")
    given = parser.parse_args()
    file = RESULTS.with_suffix(".json")
    runs: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    data = None if given.tables else load_captions(given.data)
    for seed in given.seeds:
        for name, config in CONFIGS.items():
            if data is None or f"{name}, seed {seed}" in runs:
                continue
            with tempfile.TemporaryDirectory() as folder:
                cpu, wall = time.process_time(), time.perf_counter()
                settings = RunConfig(Path(folder) / "run", seed=seed, threads=given.threads, checkpoint_seconds=600)
                run = train("clip", config, data, settings)
                spent = {"cpu_seconds": time.process_time() - cpu, "seconds": time.perf_counter() - wall}
            runs[f"{name}, seed {seed}"] = {"results": run.results, **spent}
            write(runs)
    write(runs)


if __name__ == "__main__":
    main()
