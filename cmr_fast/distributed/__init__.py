"""Search over several processes and machines: shards of a HammingIndex held by Ray actors.

`retrieval._shards` is what lies on disk, `_worker` what answers for a shard, `_pool` the actors and what happens when
one is lost, `_batches` many callers at once, `sharded` the index that people use.
"""

from cmr_fast.distributed._asking import ShardLostError
from cmr_fast.distributed._batches import OverloadedError
from cmr_fast.distributed.sharded import PartialHits, PartialNeighbours, ShardedIndex

__all__ = ["OverloadedError", "PartialHits", "PartialNeighbours", "ShardLostError", "ShardedIndex"]
