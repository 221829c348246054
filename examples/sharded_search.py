"""Shards of an index in processes of their own, searched as one; what happens when one of them dies.

    pip install "cmr-fast[dist]"
    python examples/sharded_search.py                      # on this machine
    python examples/sharded_search.py --address auto       # in a Ray cluster whose nodes all see --folder

The answers are those of one HammingIndex. Every shard has two actors here, so one of them may die at any moment.
"""

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
import ray

import cmr_fast as cf
from cmr_fast.distributed import ShardedIndex


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--codes", type=int, default=200_000)
    parser.add_argument("--shards", type=int, default=2)
    parser.add_argument("--folder", type=Path, help="where the shards are to lie (default: a temporary folder)")
    parser.add_argument("--address", help="of a Ray cluster; none begins one here")
    args = parser.parse_args()

    codes = np.random.default_rng(0).integers(0, 256, (args.codes, 8), dtype=np.uint8)
    queries = codes[:8] ^ np.eye(8, dtype=np.uint8)  # a bit away from the first eight
    one = cf.HammingIndex(64)
    one.add(codes)

    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary) / "shards"
        ShardedIndex.build(folder, codes, shards=args.shards)
        ray.init(address=args.address, include_dashboard=False, log_to_driver=False)
        with ShardedIndex(folder, replicas=2) as sharded:
            print(sharded, "codes of each:", sharded.shards)
            found, expected = sharded.search(queries, 5), one.search(queries, 5)
            assert all((a == b).all() for a, b in zip(found, expected, strict=True))

            ray.kill(sharded.actors(0)[0], no_restart=False)
            began = time.perf_counter()
            found = sharded.search(queries, 5)
            assert all((a == b).all() for a, b in zip(found, expected, strict=True))
            print(f"one actor was killed; the other answered in {1e3 * (time.perf_counter() - began):.1f} ms")

            sharded.add(codes[:3] ^ 1)  # on disk, and found, when this returns
            print("ids of what was added:", sharded.search(codes[:3] ^ 1, 1)[1][:, 0].tolist())
        ray.shutdown()


if __name__ == "__main__":
    main()
