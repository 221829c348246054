"""Sharded search beside one index, and while actors are killed: `python bench/sharded.py [--json F] [--markdown F]`.

Speed     shards held by Ray actors on this machine against one `HammingIndex` with the same number of threads in all,
          both mapped: in every round both answer, the order turned round each time; ratios and differences are medians
          over the rounds.
Kills     `--kills N`: callers search from several threads while N times, at a random moment, a random actor is killed
          (in turn by Ray and by SIGKILL of its process) and now and then codes are added. Every answer is compared with
          that of one index of the codes as they were at some moment of the call.

Ray runs its workers at niceness 15 unless RAY_worker_niceness says otherwise, and on a machine that does other things
as well they hardly run: this sets it to 0.
"""

import argparse
import json
import os
import random
import signal
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path

os.environ.setdefault("RAY_worker_niceness", "0")
os.environ.setdefault("RAY_AUTH_MODE", "disabled")
sys.path.insert(0, str(Path(__file__).resolve().parent))

import numpy as np
from peers import commit, machine

from cmr_fast import HammingIndex
from cmr_fast.distributed import ShardedIndex, ShardLostError

BITS, K = 64, 10
PAUSE = 0.02  # seconds of a caller between two searches: the machine has to start actors as well


def codes_of(seed: int, count: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, BITS // 8), dtype=np.uint8)


def speed(folder: Path, codes: int, shards: int, threads: int, rounds: int) -> list[dict]:
    """Rows of one query and of 256."""
    ShardedIndex.build(folder / "shards", codes_of(0, codes), shards=shards)
    HammingIndex.build(folder / "one.cmr", codes_of(0, codes))
    one = HammingIndex.load(folder / "one.cmr")
    rows = []
    with ShardedIndex(folder / "shards", threads=threads) as sharded:
        for queries in (1, 256):
            q = codes_of(1, queries)
            sides = {
                "one_index": lambda q=q: one.search(q, K, shards * threads),
                "sharded": lambda q=q: sharded.search(q, K),
            }
            for _ in range(3):
                found = [side() for side in sides.values()]
                assert all((a == b).all() for a, b in zip(*found, strict=True)), "the answers differ"
            seconds: dict[str, list[float]] = {name: [] for name in sides}
            for turn in range(rounds):
                for name in sorted(sides, reverse=bool(turn % 2)):
                    start = time.perf_counter()
                    sides[name]()
                    seconds[name].append(time.perf_counter() - start)
            pairs = list(zip(seconds["one_index"], seconds["sharded"], strict=True))
            rows.append(
                {
                    "queries": queries,
                    "codes": codes,
                    "bits": BITS,
                    "k": K,
                    "shards": shards,
                    "threads": shards * threads,
                    "one_index_s": statistics.median(seconds["one_index"]),
                    "sharded_s": statistics.median(seconds["sharded"]),
                    "ratio": statistics.median(b / a for a, b in pairs),
                    "added_s": statistics.median(b - a for a, b in pairs),
                    "rounds": rounds,
                    "load": os.getloadavg()[0],
                }
            )
            print(json.dumps(rows[-1]), flush=True)
    return rows


class Truth:
    """What one index answers, of each state that the codes were in."""

    def __init__(self, codes: np.ndarray, groups: list[np.ndarray]) -> None:
        self._index = HammingIndex(BITS)
        self._groups = groups
        self.states: list[list[tuple[np.ndarray, np.ndarray]]] = []
        self.in_force = 0  # the state that every search has to know of
        self.adding(codes)

    def adding(self, codes: np.ndarray) -> None:
        """Note the next state, which searches may see from now on."""
        self._index.add(codes)
        self.states.append([self._index.search(q, K, 1) for q in self._groups])

    def holds(self, group: int, since: int, found: tuple[np.ndarray, np.ndarray]) -> bool:
        return any(
            all((a == b).all() for a, b in zip(state[group], found, strict=True)) for state in self.states[since:]
        )


def kills(
    folder: Path, codes: int, shards: int, replicas: int, count: int, callers: int, every: float, wait: float
) -> dict:
    """One row of answers while `count` actors are killed, each `every` seconds at most after the one before."""
    import ray

    base, groups = codes_of(0, codes), [codes_of(10 + i, 4) for i in range(8)]
    ShardedIndex.build(folder / "shards", base, shards=shards)
    truth, draw = Truth(base, groups), random.Random(0)
    stop, lost, slowest = threading.Event(), Counter(), [0.0]

    def ask(seed: int) -> Counter:
        seen, mine = Counter(), random.Random(seed)
        while not stop.is_set():
            group, since, start = mine.randrange(len(groups)), truth.in_force, time.perf_counter()
            try:
                found = sharded.search(groups[group], K)
            except ShardLostError as error:
                seen["failed"] += 1
                lost[error.shard] += 1
            else:
                seen["answered"] += 1
                seen["wrong"] += not truth.holds(group, since, found)
                slowest[0] = max(slowest[0], time.perf_counter() - start)
            time.sleep(PAUSE)
        return seen

    with (
        ShardedIndex(folder / "shards", replicas=replicas, threads=1, wait=wait) as sharded,
        ThreadPoolExecutor(callers) as pool,
    ):
        begun = time.monotonic()
        askers = [pool.submit(ask, seed) for seed in range(callers)]
        how = Counter()
        try:
            for number in range(count):
                time.sleep(every * draw.random())
                shard, replica = draw.randrange(shards), draw.randrange(replicas)
                actor = sharded.actors(shard)[replica]
                pid = None
                if number % 2:
                    try:
                        pid = ray.get(actor.__ray_call__.remote(lambda _: os.getpid()), timeout=every)
                    except ray.exceptions.RayError:  # it is being started
                        pid = None
                if pid is None:
                    ray.kill(actor, no_restart=False)
                else:
                    os.kill(pid, signal.SIGKILL)
                how["SIGKILL" if pid else "ray.kill"] += 1
                if number % 5 == 0:
                    more = groups[number % len(groups)][:2] ^ np.uint8(number % 3)  # changes what is nearest
                    truth.adding(more)
                    sharded.add(more)
                    truth.in_force += 1
                if number % 10 == 9:
                    print(f"{number + 1} kills, {time.monotonic() - begun:.0f} s", flush=True)
        finally:
            stop.set()
        seen = sum((asker.result(300) for asker in askers), Counter())
        return {
            "kills": count,
            "by_sigkill": how["SIGKILL"],
            "replicas": replicas,
            "shards": shards,
            "codes": codes,
            "callers": callers,
            "answered": seen["answered"],
            "wrong": seen["wrong"],
            "failed": seen["failed"],
            "added": truth.in_force,
            "slowest_s": slowest[0],
            "wait_s": wait,
            "seconds": time.monotonic() - begun,
        }


def markdown(found: dict) -> str:
    lines = []
    if found.get("speed"):
        lines += ["| queries | codes | one index | sharded | ratio | added |", "|---|---|---|---|---|---|"]
        for r in found["speed"]:
            lines.append(
                f"| {r['queries']} | {r['codes']:,} | {1e3 * r['one_index_s']:.1f} ms | {1e3 * r['sharded_s']:.1f} ms "
                f"| {r['ratio']:.2f} | {1e3 * r['added_s']:.1f} ms |"
            )
        lines.append("")
    if found.get("kills"):
        lines += ["| kills | replicas | answers | wrong | failed | slowest |", "|---|---|---|---|---|---|"]
        for r in found["kills"]:
            lines.append(
                f"| {r['kills']} | {r['replicas']} | {r['answered']:,} | {r['wrong']} | {r['failed']} "
                f"| {r['slowest_s']:.1f} s |"
            )
        lines.append("")
    said = ", ".join(f"{name} {value}" for name, value in found["machine"].items())
    return "\n".join([*lines, f"Measured with {said}."]) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--codes", type=int, help="default: 20,000,000, with --kills 200,000")
    parser.add_argument("--shards", type=int, default=4)
    parser.add_argument("--threads", type=int, default=1, help="of each actor; one index has as many as all together")
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--kills", type=int, default=0, help="kill so many actors, instead of measuring the speed")
    parser.add_argument("--replicas", type=int, nargs="*", default=[2], help="with --kills: of each shard, in turn")
    parser.add_argument("--callers", type=int, default=3)
    parser.add_argument("--every", type=float, default=8.0, help="most seconds between two kills")
    parser.add_argument("--wait", type=float, default=120.0, help="seconds for a shard that lost all its replicas")
    parser.add_argument("--folder", type=Path, help="where to put the files (default: a temporary folder)")
    parser.add_argument("--json", type=Path, help="write the rows to this file; rows of the other kind there stay")
    parser.add_argument("--markdown", type=Path, help="write the tables to this file")
    arguments = parser.parse_args()
    found = {"machine": machine() | {"commit": commit(), "ray": version("ray"), "processors": str(os.cpu_count())}}
    if arguments.json and arguments.json.exists():
        found = json.loads(arguments.json.read_text()) | found
    if arguments.kills:
        found["kills"] = []
    for replicas in arguments.replicas if arguments.kills else [1]:
        with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
            folder, shards = Path(name), arguments.shards
            if arguments.kills:
                size, callers, every = arguments.codes or 200_000, arguments.callers, arguments.every
                row = kills(folder, size, shards, replicas, arguments.kills, callers, every, arguments.wait)
                print(json.dumps(row), flush=True)
                found["kills"].append(row)
            else:
                found["speed"] = speed(
                    folder, arguments.codes or 20_000_000, shards, arguments.threads, arguments.rounds
                )
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1) + "\n")
    if arguments.markdown:
        arguments.markdown.write_text(markdown(found))
    failed = any(row["wrong"] or (row["failed"] and row["replicas"] > 1) for row in found.get("kills", []))
    return int(failed)


if __name__ == "__main__":
    raise SystemExit(main())
