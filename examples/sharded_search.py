"""Shards of an index in processes of their own, searched as one; what happens when one of them dies.

    pip install "cmr-fast[dist]"

Here Ray begins on this machine; `ray.init(address="auto")` is a cluster, whose nodes all have to see the folder. The
answers are those of one HammingIndex. Every shard has two actors, so one of them may die at any moment.
"""

import tempfile
import time

import numpy as np
import ray

import cmr_fast as cf
from cmr_fast.distributed import ShardedIndex


def main() -> None:
    codes = np.random.default_rng(0).integers(0, 256, (200_000, 8), dtype=np.uint8)
    queries = codes[:8] ^ np.eye(8, dtype=np.uint8)  # a bit away from the first eight
    one = cf.HammingIndex(64)
    one.add(codes)

    with tempfile.TemporaryDirectory() as temporary:
        folder = temporary + "/shards"
        ShardedIndex.build(folder, codes, shards=2)
        ray.init(include_dashboard=False, log_to_driver=False)
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
