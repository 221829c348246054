"""Shards held by Ray actors, on a cluster of two nodes on this machine, answer as one HammingIndex, whatever dies."""

import os
import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

import cmr_fast as cf
from cmr_fast import HammingIndex, InputError
from cmr_fast.distributed import ShardedIndex, ShardLostError
from cmr_fast.retrieval import _shards

ray = pytest.importorskip("ray")
pytestmark = pytest.mark.timeout(400)
BITS = 24


@pytest.fixture(scope="module")
def cluster():
    from ray.cluster_utils import Cluster

    os.environ.setdefault("RAY_worker_niceness", "0")
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    made.add_node(num_cpus=1)
    ray.init(address=made.address, log_to_driver=False)
    yield made
    ray.shutdown()
    made.shutdown()


def codes_of(seed, count):
    """Codes of few values, so that most distances are equal."""
    return np.random.default_rng(seed).integers(0, 3, (count, BITS // 8), dtype=np.uint8)


@pytest.fixture(scope="module")
def pair(cluster, tmp_path_factory):
    """The same codes sharded, two replicas of each of two shards, and as one index."""
    folder = tmp_path_factory.mktemp("sharded") / "x"
    ShardedIndex.build(folder, codes_of(0, 300), shards=2)
    one = HammingIndex(BITS)
    one.add(codes_of(0, 300))
    with ShardedIndex(folder, replicas=2) as sharded:
        yield sharded, one


def same(a, b):
    assert len(a) == len(b)
    for x, y in zip(a, b, strict=True):
        assert type(x) is type(y)
        assert x.dtype == y.dtype
        assert (x == y).all()


def ended(sharded, shard):
    """End a shard's only actor for good; until its process is gone it may answer yet."""
    (actor,) = sharded.actors(shard)
    pid = ray.get(actor.ready.remote(sharded._manifest.shards[shard])).found
    ray.kill(actor, no_restart=True)
    until = time.monotonic() + 60
    while os.path.exists(f"/proc/{pid}") and time.monotonic() < until:
        time.sleep(0.05)


def test_answers_are_those_of_one_index_whatever_is_added_and_removed(pair):
    sharded, one = pair
    rng = np.random.default_rng(0)
    for turn in range(6):
        q = codes_of(100 + turn, 9)
        for k in (1, 40, 1000):
            same(sharded.search(q, k), one.search(q, k))
            same(sharded.search(q, k, radius=2), one.search(q, k, radius=2))
        some = one.ids[rng.permutation(len(one))[:50]]
        mask = rng.random(len(one)) < 0.3
        for where in (some, mask, range(0, 1), np.zeros(len(one), bool)):
            same(sharded.search(q, 7, where=where), one.search(q, 7, where=where))
            same(sharded.range_search(q, 3, where=where), one.range_search(q, 3, where=where))
        for radius in (0, 4, 99):
            same(sharded.range_search(q, radius), one.range_search(q, radius))
            same(sharded.range_search(q, radius, strict=True), one.range_search(q, radius, strict=True))
        more, ids = codes_of(turn, 30), rng.permutation(10_000)[:30] + 10_000 * (turn + 1)
        for index in (sharded, one):
            index.add(more, ids)
            index.add(more[:5])
        gone = one.ids[rng.permutation(len(one))[:20]][1:]
        assert sharded.remove_ids(gone) == one.remove_ids(gone) == 19
        assert sharded.ntotal == one.ntotal
    q = torch.from_numpy(codes_of(7, 2))
    same(sharded.search(q, 3), one.search(q, 3))


def test_what_a_search_refuses_one_index_refuses_too(pair):
    sharded, one = pair
    q, ids = codes_of(1, 1), one.ids
    for index in (sharded, one):
        with pytest.raises(InputError, match="q must have 24 bits"):
            index.search(np.zeros((1, 4), np.uint8), 1)
        with pytest.raises(InputError, match="where must name ids of the index: 1 are not"):
            index.search(q, 1, where=[int(ids[0]), 10**12])
        with pytest.raises(InputError, match=r"where must be \(\d+,\) bool"):
            index.search(q, 1, where=np.ones(3, bool))
        with pytest.raises(InputError, match="ids must be new: 1 are in the index already"):
            index.add(q, [int(ids[3])])
        with pytest.raises(InputError, match="ids must be in the index: 1 are not"):
            index.remove_ids([10**12])
        assert index.ntotal == len(ids)


def test_save_makes_one_index_of_it(pair, tmp_path):
    sharded, one = pair
    sharded.save(tmp_path / "one.cmr")
    loaded = HammingIndex.load(tmp_path / "one.cmr")
    assert (loaded.codes == one.codes).all()
    assert (loaded.ids == one.ids).all()


@pytest.mark.parametrize("ties", ["tie_aware", "optimistic", "pessimistic", "threshold"])
def test_an_evaluation_is_to_the_last_bit_that_of_one_array(pair, ties):
    sharded, one = pair
    rng = np.random.default_rng(1)
    q, q_labels, db_labels = codes_of(3, 11), rng.random((11, 5)) < 0.3, rng.random((len(one), 5)) < 0.3
    for labels in ((q_labels, db_labels), (q_labels.argmax(1), db_labels.argmax(1))):
        for k, convention in ((None, "all"), (20, "all")):
            found = sharded.evaluate(q, *labels, k=k, convention=convention, ties=ties)
            expected = cf.evaluate_codes(q, one.codes, *labels, k=k, convention=convention, ties=ties)
            assert found.map == expected.map
            assert (found.ap == expected.ap).all()
            assert (found.precision_at(range(1, 50)) == expected.precision_at(range(1, 50))).all()
            assert (found.recall_one_at(5)) == expected.recall_one_at(5)
            for a, b in zip(found.precision_recall_by_radius(), expected.precision_recall_by_radius(), strict=True):
                assert (a == b).all()
    with pytest.raises(InputError, match="ties='index' needs the order"):
        sharded.evaluate(q, q_labels, db_labels, ties="index")


def test_with_replicas_no_search_fails_or_is_wrong_while_actors_die(pair):
    sharded, one = pair
    q = codes_of(5, 4)
    expected = one.search(q, 12)
    stop, killed = threading.Event(), 0
    draw = random.Random(0)

    def ask():
        count = 0
        while not stop.is_set():
            same(sharded.search(q, 12), expected)
            count += 1
        return count

    with ThreadPoolExecutor(3) as pool:
        askers = [pool.submit(ask) for _ in range(3)]
        try:
            for _ in range(6):
                ray.kill(draw.choice(sharded.actors(draw.randrange(2))), no_restart=False)
                killed += 1
                stop.wait(draw.random())
        finally:
            stop.set()
        assert min(asker.result(300) for asker in askers) > 0
    assert killed == 6
    same(sharded.search(q, 12), expected)


def test_a_lost_shard_without_a_replica_is_named_and_left_out_on_request_alone(cluster, tmp_path):
    codes = codes_of(0, 300)
    ShardedIndex.build(tmp_path / "x", codes, shards=2)
    with ShardedIndex(tmp_path / "x") as sharded:
        q = codes[:5]
        whole = sharded.search(q, 9, partial=True)
        assert (whole.missing, whole.missing_codes) == ((), 0)
        ended(sharded, 1)
        for _ in range(2):
            with pytest.raises(ShardLostError, match=r"shard 1 of 2 \(150 codes\) does not answer") as caught:
                sharded.search(q, 9)
            assert caught.value.shard == 1
        with pytest.raises(ShardLostError, match="shard 1"):
            sharded.range_search(q, 2)
        rest = HammingIndex(BITS)
        rest.add(codes[:150])
        found = sharded.search(q, 9, partial=True)
        assert (found.missing, found.missing_codes) == ((1,), 150)
        same(found[:2], rest.search(q, 9))
        hits = sharded.range_search(q, 2, partial=True)
        assert (hits.missing, hits.missing_codes) == ((1,), 150)
        same(hits[:3], rest.range_search(q, 2))
        held = sharded.actors(0)[0]
        ray.kill(held, no_restart=False)  # begun anew from its constructor: nothing is lost
        with ShardedIndex(tmp_path / "x") as writer:
            writer.add(codes_of(9, 10))
            one = HammingIndex(BITS)
            one.add(np.concatenate([codes, codes_of(9, 10)]))
            same(writer.search(q, 9), one.search(q, 9))
            assert sharded.ntotal == 300
            sharded.refresh()
            assert sharded.ntotal == 310


def test_what_another_process_removes_is_seen_once_its_files_are_gone(cluster, tmp_path, monkeypatch):
    monkeypatch.setattr(_shards, "GRACE", 0.0)
    codes = codes_of(0, 100)
    ShardedIndex.build(tmp_path / "x", codes, shards=1)
    one = HammingIndex(BITS)
    one.add(codes)
    with ShardedIndex(tmp_path / "x") as reader, ShardedIndex(tmp_path / "x") as writer:
        writer.remove_ids([3])
        writer.remove_ids([4])
        writer.add(codes[:3])  # whoever writes next clears the files of the states before
        with pytest.raises(InputError, match="a mask is of the codes as they were"):
            reader.search(codes[:4], 5, where=np.ones(100, bool))
        one.remove_ids([3, 4])
        one.add(codes[:3])
        same(reader.search(codes[:4], 5), one.search(codes[:4], 5))
        assert reader.ntotal == 101


def test_many_queries_are_stored_once_for_all_shards_and_answered_alike(cluster, tmp_path, monkeypatch):
    codes = codes_of(0, 300)
    ShardedIndex.build(tmp_path / "x", codes, shards=2)
    one = HammingIndex(BITS)
    one.add(codes)
    with ShardedIndex(tmp_path / "x") as sharded:
        stored = []
        put = sharded._pool.stored
        monkeypatch.setattr(sharded._pool, "stored", lambda rows: stored.append(len(rows)) or put(rows))
        for count in (10, 40_000):
            q = codes_of(1, count)
            same(sharded.search(q, 2), one.search(q, 2))
        assert stored == [40_000]
        same(sharded.range_search(q, 0), one.range_search(q, 0))
        assert sharded.lost() == {}
