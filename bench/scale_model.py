"""What search over 1e9, 1e10 and 1e12 codes of 64 bits takes, from what was measured: `python bench/scale_model.py`.

`--measure FILE` measures how a search over shards grows with their number, on Ray actors of this machine that hold
few codes each, so that the time is that of sending, answering and merging, not of scanning; needs Ray, and 0.3 GB of
memory an actor. Without it the model is printed, from that file and others in bench/results.

    one query       n / (M x min(cores x one, bandwidth / 8 bytes)) + call(S) + network
    throughput      M x cores x many / n queries a second, in batches of 256
    machines        M: as many as hold the codes in 0.8 of their memory, a copy of each
    shards          S: one a machine; call(S) = begun + each x (S - 1): the time of a search over one actor, and the
                    caller's own processor time for each further one (its actors are on other machines)

`many` and `one` are comparisons a second of a core in batches and for one query alone. Assumed, not measured: a machine
of 32 cores, 128 GB of memory at 200 GB/s, a disk of 2 GB/s, a network of 10 Gbit/s and 0.2 ms there and back.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("RAY_worker_niceness", "0")
os.environ.setdefault("RAY_AUTH_MODE", "disabled")
sys.path.insert(0, str(Path(__file__).resolve().parent))

import numpy as np
from peers import commit, machine

RESULTS = Path(__file__).resolve().parent / "results"
CORES, MEMORY, BANDWIDTH, DISK, NETWORK, TRIP = 32, 128e9, 200e9, 2e9, 10e9 / 8, 2e-4  # assumed
NBYTES, K, TOGETHER = 8, 10, 256


def measure(path: Path, shards: list[int], rounds: int) -> None:
    """Time of a search against the number of actors, and of the merge alone."""
    import ray

    from cmr_fast.distributed import ShardedIndex
    from cmr_fast.retrieval._searching import nearest_of_all

    ray.init(include_dashboard=False, log_to_driver=False)
    codes = np.random.default_rng(0).integers(0, 256, (100 * max(shards), NBYTES), dtype=np.uint8)
    rows = []
    for count in shards:
        with tempfile.TemporaryDirectory() as folder:
            ShardedIndex.build(f"{folder}/x", codes, shards=count)
            with ShardedIndex(f"{folder}/x", threads=1) as index:
                for (replica,) in index._pool.shards:
                    replica.apart, replica.offer = True, None  # by Ray, as between machines
                for queries in (1, TOGETHER):
                    q = codes[:queries]
                    found = [(np.sort(np.tile(np.arange(K, dtype=np.int32), (queries, 1))),) * 2] * count
                    found = [(near, near.astype(np.int64)) for near, _ in found]
                    row = {"actors": count, "queries": queries, "k": K}
                    for name, run in {
                        "search_s": lambda q=q, index=index: index.search(q, K),
                        "merge_s": lambda found=found, queries=queries: nearest_of_all(found, queries, K, 64),
                    }.items():
                        seconds = []
                        for _ in range(rounds + 2):
                            start, cpu = time.perf_counter(), time.process_time()
                            run()
                            seconds.append((time.perf_counter() - start, time.process_time() - cpu))
                        row[name] = statistics.median(wall for wall, _ in seconds[2:])
                        row[name.replace("_s", "_processor_s")] = statistics.median(cpu for _, cpu in seconds[2:])
                    rows.append(row | {"load": os.getloadavg()[0]})
                    print(json.dumps(rows[-1]), flush=True)
    held = {"machine": machine() | {"commit": commit(), "ray": ray.__version__}, "actors": rows}
    path.write_text(json.dumps(held, indent=1) + "\n")


def constants() -> dict[str, float]:
    """What was measured."""
    scaling = json.loads((RESULTS / "hamming_scaling.json").read_text())["sizes"]
    largest = max(r["codes"] for r in scaling)  # far beyond any cache
    rate = {r["queries"]: r["queries"] * r["codes"] / r["ours_s"] for r in scaling if r["codes"] == largest}
    actors = [r for r in json.loads((RESULTS / "sharded_actors.json").read_text())["actors"] if r["queries"] == 1]
    each = np.polyfit([r["actors"] for r in actors], [r["search_processor_s"] for r in actors], 1)[0]
    begun = next(r["search_s"] for r in actors if r["actors"] == 1)
    return {"one": rate[1], "many": rate[TOGETHER], "begun": begun, "each": float(each)}


def model(codes: float, c: dict[str, float]) -> dict[str, float]:
    machines = max(1, int(np.ceil(codes * NBYTES / (0.8 * MEMORY))))
    scan = codes / (machines * min(CORES * c["one"], BANDWIDTH / NBYTES))
    call = c["begun"] + c["each"] * (machines - 1) if machines > 1 else 0.0
    answers = machines * TOGETHER * K * 12 / NETWORK  # of a batch, all into one caller
    return {
        "codes": codes,
        "machines": machines,
        "cores": machines * CORES,
        "file_GB": codes * NBYTES / 1e9,
        "one_query_s": scan + call + (TRIP if machines > 1 else 0),
        "calls_s": call,
        "queries_a_second": machines * CORES * c["many"] / codes,
        "batch_s": TOGETHER * codes / (machines * CORES * c["many"]) + call + answers,
        "answers_of_a_batch_s": answers,
        "cold_start_s": codes * NBYTES / machines / DISK,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", type=Path, help="measure actors into this file")
    parser.add_argument("--actors", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--json", type=Path, help="also write constants and model to this file")
    arguments = parser.parse_args()
    if arguments.measure:
        measure(arguments.measure, arguments.actors, arguments.rounds)
        return 0
    c = constants()
    rows = [model(codes, c) for codes in (1e9, 1e10, 1e12)]
    print(json.dumps(c))
    print("| codes | machines | one query | queries a second | a batch of 256 | reading all of it once |")
    print("|---|---|---|---|---|---|")
    for r in rows:
        print(
            f"| {r['codes']:.0e} | {r['machines']} | {1e3 * r['one_query_s']:.0f} ms | {r['queries_a_second']:.0f} "
            f"| {r['batch_s']:.1f} s | {r['cold_start_s']:.0f} s |"
        )
    if arguments.json:
        held = {"constants": c, "model": rows}
        arguments.json.write_text(json.dumps(held, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
