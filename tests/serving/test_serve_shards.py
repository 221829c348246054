"""`cmr-fast serve --ray` on a cluster of this machine: answers of one index, and what is said of a lost shard."""

import os
import time

import numpy as np
import pytest
from serving_cases import Served, serving

from cmr_fast import HammingIndex
from cmr_fast.distributed import OverloadedError, ShardedIndex

pytest.importorskip("fastapi")
ray = pytest.importorskip("ray")
from cmr_fast.serving import OverShards, make_app  # noqa: E402

pytestmark = pytest.mark.timeout(400)
CODES = np.random.default_rng(0).integers(0, 256, (300, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def cluster():
    from ray.cluster_utils import Cluster

    os.environ.setdefault("RAY_worker_niceness", "0")
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
    ray.init(address=made.address, log_to_driver=False)
    yield made
    ray.shutdown()
    made.shutdown()


@pytest.fixture
def folder(tmp_path):
    ShardedIndex.build(tmp_path / "shards", CODES, shards=3)
    return tmp_path / "shards"


def listed(index: HammingIndex, q: np.ndarray, k: int) -> dict[str, object]:
    distances, ids = index.search(q, k)
    return {"bits": 24, "distances": distances.tolist(), "ids": ids.tolist()}


def one_of(*parts: np.ndarray) -> HammingIndex:
    made = HammingIndex(24)
    made.add(np.concatenate(parts))
    return made


def test_the_command_joins_a_cluster_and_answers_as_one_index(cluster, folder):
    with serving(folder.parent, "shards", "--ray", cluster.address, "--replicas", 2) as running:
        assert running.said[0] == "shards: 300 codes of 24 bits in 3 shards"
        answer = running.ask("/search", {"codes": CODES[:4].tolist(), "k": 6})
        assert answer.json == listed(one_of(CODES), CODES[:4], 6)
        assert running.ask("/health").json["shards"] == {"all": 3, "alive": 3}
        assert running.stop() == 0


def test_a_lost_shard_is_an_error_that_names_it_or_a_partial_answer_that_says_so(cluster, folder):
    body = {"codes": CODES[:4].tolist(), "k": 6}
    with ShardedIndex(folder) as sharded:
        client, partial = Served(make_app(OverShards(sharded))), Served(make_app(OverShards(sharded, True)))
        for each in (client, partial):
            assert each.ask("/search", body).json == listed(one_of(CODES), CODES[:4], 6)
            assert each.ask("/health").status == 200
        pid = ray.get(sharded.actors(2)[0].ready.remote(sharded._manifest.shards[2])).found
        ray.kill(sharded.actors(2)[0], no_restart=True)
        for _ in range(600):  # until its process is gone it may answer yet
            if not os.path.exists(f"/proc/{pid}"):
                break
            time.sleep(0.1)
        lost = client.ask("/search", body)
        assert lost.status == 503 and lost.json["shard"] == 2 and lost.headers["Retry-After"] == "5"
        assert lost.json["error"].startswith("shard 2 of 3 (100 codes) does not answer")
        found = partial.ask("/search", body)
        assert found.status == 200
        rest = listed(one_of(CODES[:200]), CODES[:4], 6)
        assert found.json == rest | {"missing": [2], "missing_codes": 100}
        for each, outcome in ((client, "lost"), (partial, "partial")):
            health = each.ask("/health")
            assert (health.status, health.json) == (
                503,
                {
                    "status": "lost", "bits": 24, "codes": 300, "shards": {"all": 3, "alive": 2},
                    "lost": {"2": 100},
                },
            )  # fmt: skip
            text = each.ask("/metrics").content.decode()
            assert f'cmr_fast_requests_total{{outcome="{outcome}"}} 1.0' in text and "cmr_fast_lost_shards 1.0" in text


def test_a_file_that_was_changed_is_said_by_health_and_by_searches(cluster, folder):
    with ShardedIndex(folder) as sharded:
        client = Served(make_app(OverShards(sharded)))
        file = next(folder.glob("shard-00001-*"))
        file.write_bytes(file.read_bytes() + b"more")
        for answer in (client.ask("/health"), client.ask("/search", {"codes": CODES[0].tolist()})):
            assert answer.status == 503
            assert f"{file.name} was changed after it was written" in answer.json["error"]


def test_an_index_that_is_overloaded_says_when_to_come_again():
    class Full:
        bits, count, shards = 24, 300, 1

        def search(self, *arguments):
            raise OverloadedError("9 queries wait")

    answer = Served(make_app(Full())).ask("/search", {"codes": "000000"})
    assert (answer.status, answer.headers["Retry-After"], answer.json) == (503, "1", {"error": "9 queries wait"})
