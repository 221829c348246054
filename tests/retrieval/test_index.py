import copy
import multiprocessing
import pickle
import shutil
import tempfile
import threading
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from cmr_fast.errors import InputError
from cmr_fast.ops import _reference, pack_codes
from cmr_fast.retrieval import _collection, _indexfile
from cmr_fast.retrieval import index as module
from cmr_fast.retrieval._ids import IdSet
from cmr_fast.retrieval.index import HammingIndex

BITS = 20


def small_blocks(monkeypatch):
    """Files of several blocks whose parts are all mapped, from a few codes."""
    monkeypatch.setattr(_indexfile, "_BLOCK_BYTES", 64)
    monkeypatch.setattr(module, "_SMALL_BYTES", 0)


def codes(count, seed=0, bits=BITS):
    return pack_codes(np.random.default_rng(seed).integers(0, 2, (count, bits)))


def filled(count=50, ids=None, seed=0):
    index = HammingIndex(BITS)
    index.add(codes(count, seed), ids)
    return index


def assert_same(a, b):
    q = codes(7, seed=99)
    assert (a.bits, a.ntotal) == (b.bits, b.ntotal)
    for left, right in zip(
        (*a.search(q, 9), *a.range_search(q, 8)), (*b.search(q, 9), *b.range_search(q, 8)), strict=True
    ):
        np.testing.assert_array_equal(left, right)


@pytest.mark.parametrize("bits", [1, 7, 8, 20, 64, 129])
def test_search_equals_a_stable_sort(bits):
    db, q = codes(40, 1, bits), codes(6, 2, bits)
    index = HammingIndex(bits)
    index.add(db)
    for k in (1, 5, 40, 43):
        distances, ids = index.search(q, k, threads=2)
        want = _reference.hamming_topk(q, db, k, bits)
        np.testing.assert_array_equal(distances, want[0])
        np.testing.assert_array_equal(ids, want[1])
        assert (distances.dtype, ids.dtype) == (np.int32, np.int64)


def test_ids_of_ones_own():
    db, q = codes(30), codes(4, seed=1)
    ids = np.random.default_rng(2).permutation(10**12 + np.arange(30) * 7)
    index = HammingIndex(BITS)
    index.add(db[:10], ids[:10])
    index.add(db[10:], ids[10:].tolist())
    distances, found = index.search(q, 33)
    want = _reference.hamming_topk(q, db, 33, BITS)
    np.testing.assert_array_equal(distances, want[0])
    np.testing.assert_array_equal(found, np.where(want[1] < 0, -1, ids[want[1]]))
    for got, expected in zip(index.range_search(q, 7), _reference.hamming_range(q, db, 7), strict=True):
        np.testing.assert_array_equal(
            got, ids[expected] if expected.dtype == np.int64 and len(expected) != 5 else expected
        )


def test_adding_in_pieces_equals_adding_at_once():
    db = codes(100)
    index = HammingIndex(BITS)
    for piece in np.array_split(db, 17):
        index.add(piece)
    index.add(db[:0])
    assert len(index) == index.ntotal == 100
    assert_same(index, filled(100))


def test_ids_count_on_from_the_highest():
    index = HammingIndex(BITS)
    index.add(codes(2), [10, 3])
    index.add(codes(2, seed=1))
    index.remove_ids([12])
    index.add(codes(1, seed=2))
    lims, _, ids = index.range_search(codes(1), BITS)
    np.testing.assert_array_equal(ids, [10, 3, 11, 13])
    np.testing.assert_array_equal(lims, [0, 4])


def test_removed_codes_are_gone_and_order_stays():
    index = filled(50)
    assert index.remove_ids(torch.tensor([0, 49, 7])) == 3
    assert index.remove_ids([]) == 0
    kept = np.setdiff1d(np.arange(50), [0, 7, 49])
    assert_same(index, filled_with(codes(50)[kept], kept))


def filled_with(rows, ids):
    index = HammingIndex(BITS)
    index.add(rows, ids)
    return index


def test_empty_index():
    index = HammingIndex(BITS)
    distances, ids = index.search(codes(2), 3)
    assert (distances == BITS + 1).all() and (ids == -1).all()
    lims, _, ids = index.range_search(codes(2), 3)
    assert lims.tolist() == [0, 0, 0] and len(ids) == 0


def test_torch_in_torch_out():
    index = HammingIndex(BITS)
    index.add(torch.from_numpy(codes(50)), torch.arange(50))
    q = codes(3, seed=4)
    found = index.search(torch.from_numpy(q), 5)
    assert all(isinstance(x, torch.Tensor) for x in (*found, *index.range_search(torch.from_numpy(q), 4)))
    np.testing.assert_array_equal(found[1].numpy(), filled().search(q, 5)[1])


@pytest.mark.parametrize("mmap", [True, False])
@pytest.mark.parametrize("count", [0, 1, 50])
@pytest.mark.parametrize("own_ids", [True, False])
def test_saved_and_loaded(tmp_path, monkeypatch, mmap, count, own_ids):
    small_blocks(monkeypatch)
    path = tmp_path / "codes.idx"
    index = filled(count, np.arange(count)[::-1] * 3 if own_ids else None)
    index.save(path)
    loaded = HammingIndex.load(path, mmap=mmap)
    loaded.verify()
    assert_same(index, loaded)
    for one in (index, loaded):
        one.add(codes(4, seed=5))
    assert_same(index, loaded)
    if count:
        for one in (index, loaded):
            one.remove_ids([0])
    assert_same(index, loaded)
    loaded.save(path)
    assert_same(index, HammingIndex.load(path))
    assert [p.name for p in tmp_path.iterdir()] == ["codes.idx"]


def test_a_mapped_index_can_be_saved_over_itself(tmp_path):
    path = tmp_path / "codes.idx"
    filled().save(path)
    mapped = HammingIndex.load(path)
    mapped.save(path)
    assert_same(mapped, filled())
    assert_same(HammingIndex.load(path, mmap=False), filled())


BAD_CALLS = {
    "from 1 to 4096, got 0": lambda index: HammingIndex(0),
    "got 4097": lambda index: HammingIndex(4097),
    "got 2.0": lambda index: HammingIndex(2.0),
    "must have 20 bits": lambda index: index.add(codes(3, bits=32)),
    "q must have 20 bits": lambda index: index.search(codes(3, bits=12), 1),
    "bits set beyond bit 20": lambda index: index.add(codes(30, bits=24)),
    "uint8": lambda index: index.add(codes(3).astype(np.int8)),
    "got list": lambda index: index.range_search([[1, 2, 3]], 1),
    "k must be": lambda index: index.search(codes(3), 0),
    "radius must be": lambda index: index.range_search(codes(3), -1),
    "k must be an integer .*got 2.0": lambda index: index.search(codes(3), 2.0),
    "k must be an integer .*got '2'": lambda index: index.search(codes(3), "2"),
    "k must be an integer .*got True": lambda index: index.search(codes(3), True),
    "threads must be an integer": lambda index: index.search(codes(3), 2, threads="2"),
    "radius must be an integer .*got 1.5": lambda index: index.range_search(codes(3), 1.5),
    "threads must be": lambda index: index.range_search(codes(3), 1, threads=0),
    r"meant as x.view\(uint8\)": lambda index: index.add(codes(3).view(np.int8)),
    r"must have 20 bits \(3 bytes\) a code, got 20 bytes: are these bits, not packed yet\? See pack_codes": (
        lambda index: index.add(np.ones((5, 20), np.uint8))
    ),
    r"got torch.int64 \(5, 20\): see pack_codes": lambda index: index.add(np.ones((5, 20), np.int64)),
    r"got torch.float32 \(5, 20\): see pack_codes": lambda index: index.add(torch.ones(5, 20)),
    r"got torch.bool \(5, 20\): see pack_codes": lambda index: index.search(np.ones((5, 20), bool), 1),
    r"x\[None\] for one code": lambda index: index.search(codes(3)[0], 1),
    "big-endian": lambda index: index.add(np.packbits(np.ones((5, 20), bool), axis=1)),
    "must not be masked": lambda index: index.add(np.ma.masked_array(codes(3), codes(3) > 9)),
    "must be a dense tensor": lambda index: index.add(torch.from_numpy(codes(3)).to_sparse()),
    "ids must not be masked": lambda index: index.add(codes(3), np.ma.masked_array([70, 71, 72], [0, 1, 0])),
    "ids must be integers .*got <U1": lambda index: index.add(codes(1), ["a"]),
    r"ids must be integers .*\(list\)": lambda index: index.add(codes(2), [[1], [1, 2]]),
    "ids must be int64, got 9223372036854775808": lambda index: index.remove_ids(np.array([2**63], np.uint64)),
    "ids must be integers \\(3,\\)": lambda index: index.add(codes(3), [100, 101]),
    "got float64": lambda index: index.add(codes(1), [0.5]),
    "2 are in the index already, the first is 49": lambda index: index.add(codes(3), [49, 50, 2]),
    "must not repeat: 1 do, the first is 70": lambda index: index.add(codes(3), [70, 71, 70]),
    r"got -1 to -1 \(-1 is what searches pad with\)": lambda index: index.add(codes(1), [-1]),
    r"ids must be in the index, which holds 50 codes, got range\(0, 1099511627776\)": (
        lambda index: index.remove_ids(range(2**40))
    ),
    r"ids must be integers \(3,\), got range\(0, 1099511627776\)": lambda index: index.add(codes(3), range(2**40)),
    "ids must be a dense tensor of values .*on meta": (
        lambda index: index.add(codes(3), torch.ones(3, dtype=torch.int64, device="meta"))
    ),
    "2 are not, the first is 50": lambda index: index.remove_ids([4, 50, 60]),
    "the first is 4": lambda index: index.remove_ids([4, 4]),
}


@pytest.mark.parametrize("message", BAD_CALLS)
def test_bad_input_is_refused_and_changes_nothing(message):
    index = filled()
    with pytest.raises(InputError, match=message):
        BAD_CALLS[message](index)
    assert_same(index, filled())


def test_the_last_id_leaves_none_to_count_on_from():
    index = HammingIndex(BITS)
    index.add(codes(1), [2**63 - 2])
    with pytest.raises(InputError, match="no ids left"):
        index.add(codes(1))


def test_codes_ids_and_memory(tmp_path, monkeypatch):
    small_blocks(monkeypatch)
    index = filled(50)
    index.add(codes(5, seed=1), [90, 70, 80, 60, 50])
    np.testing.assert_array_equal(index.codes, np.concatenate([codes(50), codes(5, seed=1)]))
    np.testing.assert_array_equal(index.ids, [*range(50), 90, 70, 80, 60, 50])
    assert index.codes.flags.writeable is False and index.nbytes == 55 * (3 + 8)
    used = index.memory_usage()
    assert used["mapped"] == 0 and used["memory"] >= index.nbytes
    index.save(tmp_path / "a")
    mapped = HammingIndex.load(tmp_path / "a")
    assert mapped.memory_usage() == {"memory": 0, "mapped": 55 * (3 + 8)}
    mapped.add(codes(2, seed=3))
    assert mapped.memory_usage()["mapped"] == 55 * (3 + 8), "adding must not copy what is mapped"
    np.testing.assert_array_equal(mapped.ids[-3:], [50, 91, 92])
    np.testing.assert_array_equal(mapped.codes, np.concatenate([index.codes, codes(2, seed=3)]))
    empty = HammingIndex(BITS)
    assert empty.codes.shape == (0, 3) and empty.ids.shape == (0,) and empty.nbytes == 0


def test_what_was_taken_out_stays_as_it_was():
    index = filled(50)
    before, ids = index.codes, index.ids
    index.add(codes(1000, seed=1))
    index.remove_ids(range(40))
    np.testing.assert_array_equal(before, codes(50))
    np.testing.assert_array_equal(ids, np.arange(50))


@given(st.lists(st.tuples(st.booleans(), st.sets(st.integers(0, 40), max_size=12)), max_size=25), st.integers(0, 30))
def test_id_set_is_a_set(steps, first):
    mine, model = IdSet([range(first, first + 5)]), set(range(first, first + 5))
    for adding, ids in steps:
        ids = np.array(sorted(ids - model if adding else ids, key=lambda i: i * 7 % 41), dtype=np.int64)
        (mine.add if adding else mine.discard)(np.sort(ids) if not adding else ids)
        model = model | set(ids.tolist()) if adding else model - set(ids.tolist())
        np.testing.assert_array_equal(mine.contains(np.arange(-2, 50)), [i in model for i in range(-2, 50)])


def test_ids_in_any_order_cost_little_each():
    known = IdSet()
    order = np.random.default_rng(0).permutation(3000) * 2
    most = 0
    for i in order:
        known.add(np.array([i]))
        most = max(most, len(known._runs))
    assert most <= 13, "runs must merge as they grow"
    assert known.contains(np.arange(6000)).tolist() == [True, False] * 3000
    known.add(np.arange(3000) * 2 + 1)
    assert known.nbytes == 16, "neighbours make one interval"


def test_adding_out_of_order_looks_at_the_index_once(monkeypatch):
    index = filled(10, np.arange(10) * 10 + 1000)
    looks = []
    monkeypatch.setattr(_collection, "IdSet", lambda ids: looks.append(1) or IdSet(ids))
    for i in range(20):
        index.add(codes(1, seed=i), [500 - i])
    with pytest.raises(InputError, match="first is 490"):
        index.add(codes(1), [490])
    index.remove_ids([490])
    index.add(codes(1), [490])
    assert looks == [1]


def test_searches_see_one_moment_while_others_add_and_remove():
    """Groups of ids come and go as a whole, each code is a function of its id: no search may see anything else."""
    size, groups = 16, 40
    table = codes(size * groups, seed=5, bits=64)
    index = HammingIndex(64)
    query = codes(3, seed=6, bits=64)
    truth = np.bitwise_count(query[:, None] ^ table).sum(-1) if hasattr(np, "bitwise_count") else None
    if truth is None:
        truth = np.unpackbits(query[:, None] ^ table, axis=-1).sum(-1)
    done, wrong, seen = threading.Event(), [], [0]

    def member(group):
        return np.arange(group * size, (group + 1) * size)

    def write(first):
        rng = np.random.default_rng(first)
        inside = []
        for _ in range(150):
            if inside and rng.random() < 0.45:
                index.remove_ids(member(inside.pop(rng.integers(len(inside)))))
            else:
                free = [g for g in range(first, groups, 2) if g not in inside]
                if free:
                    group = free[rng.integers(len(free))]
                    index.add(table[member(group)], member(group))
                    inside.append(group)

    def look():
        while not done.is_set():
            lims, distances, ids = index.range_search(query, 64)
            near, names = index.search(query, size * groups, threads=2)
            for i in range(len(query)):
                mine = ids[lims[i] : lims[i + 1]]
                whole = len(mine) % size == 0 and (mine.reshape(-1, size) % size == np.arange(size)).all()
                if not whole or (distances[lims[i] : lims[i + 1]] != truth[i, mine]).any():
                    wrong.append(mine)
                found = names[i][names[i] >= 0]
                if (
                    len(found) % size
                    or (near[i, : len(found)] != truth[i, found]).any()
                    or (np.diff(near[i]) < 0).any()
                ):
                    wrong.append(found)
            seen[0] += 1

    readers = [threading.Thread(target=look) for _ in range(6)]
    writers = [threading.Thread(target=write, args=(first,)) for first in (0, 1)]
    for thread in readers + writers:
        thread.start()
    for thread in writers:
        thread.join()
    done.set()
    for thread in readers:
        thread.join()
    assert not wrong and seen[0] > 0
    assert sorted(index.ids.tolist()) == sorted(index.range_search(query[:1], 64)[2].tolist())


class Named(HammingIndex):
    """A user's own kind of index."""

    def __init__(self, bits, name):
        super().__init__(bits)
        self.name = name


COPIES = {"pickle": lambda x: pickle.loads(pickle.dumps(x)), "copy": copy.copy, "deepcopy": copy.deepcopy}


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("mapped", [False, True])
def test_a_copy_is_an_index_of_its_own(tmp_path, monkeypatch, mapped, how):
    small_blocks(monkeypatch)
    index = filled(50, np.arange(50)[::-1] * 3)
    if mapped:
        monkeypatch.chdir(tmp_path)
        index.save("index")
        index = HammingIndex.load("index")
        monkeypatch.chdir("/")  # the path that is pickled does not depend on the folder
    index.add(codes(9, seed=1))
    index.remove_ids([0, 148])
    index.tables = False
    twin = COPIES[how](index)
    assert_same(index, twin)
    assert twin.tables is False and twin.memory_usage()["mapped"] == index.memory_usage()["mapped"]
    twin.verify()
    before, after = index.ids, filled_with(index.codes, index.ids)
    for i in range(40):  # the copy grows, in few parts, and the original knows nothing of it
        twin.add(codes(3, seed=i))
        after.add(codes(3, seed=i))
        twin = COPIES[how](twin)
    twin.remove_ids([3])
    after.remove_ids([3])
    assert_same(twin, after)
    assert len(twin._parts) <= 12
    np.testing.assert_array_equal(index.ids, before)
    index.add(codes(4, seed=77))
    assert_same(twin, after)
    with pytest.raises(InputError, match="ids must be new"):
        twin.add(codes(1), [6])


def test_a_pickle_holds_what_is_in_use_and_what_users_add():
    index = Named(BITS, "mine")
    index.add(codes(50), np.arange(50) * 2)
    index.search(codes(3), 4)
    again = pickle.loads(pickle.dumps(index))
    assert type(again) is Named and again.name == "mine"
    assert_same(index, again)
    large = HammingIndex(64)
    large.add(np.zeros((100_000, 8), np.uint8))
    large.add(np.zeros((1, 8), np.uint8))  # the buffer grows by half
    assert len(pickle.dumps(large)) < 810_000
    assert len(HammingIndex(8)) == len(pickle.loads(pickle.dumps(HammingIndex(8)))) == 0


@pytest.mark.parametrize("kind", ["ours", "faiss"])
def test_a_mapped_index_is_pickled_by_the_path_of_its_file(tmp_path, monkeypatch, kind):
    small_blocks(monkeypatch)
    path = tmp_path / "index"
    index = filled(5000)
    save = index.save if kind == "ours" else index.to_faiss
    save(path)
    mapped = HammingIndex.open(path)
    stored = pickle.dumps(mapped)
    assert len(stored) < (3000 if kind == "faiss" else 5000)
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        _, ids = pool.submit(mapped.search, codes(3), 5).result(60)
    np.testing.assert_array_equal(ids, index.search(codes(3), 5)[1])
    if kind == "ours":
        HammingIndex.append(path, codes(60, seed=1))  # what was there stays
        assert_same(pickle.loads(stored), index)
    filled(5000, seed=2).save(path) if kind == "ours" else filled(5000, seed=2).to_faiss(path)
    assert_same(mapped, copy.deepcopy(mapped))  # they have the file of before open
    with pytest.raises(InputError, match=rf"{path} (has changed|is damaged, or another one) since"):
        pickle.loads(stored).search(codes(3), 5)
    filled(3).save(path)
    with pytest.raises(InputError, match=rf"by the path of its file: {path}"):
        pickle.loads(stored)
    path.unlink()
    with pytest.raises(InputError, match=rf"by the path of its file: there is no (index|faiss) file at {path}"):
        pickle.loads(stored)


def test_an_index_is_pickled_while_others_add():
    index, done, failed = filled(50), threading.Event(), []

    def add():
        for i in range(300):
            index.add(codes(2, seed=i))
        done.set()

    thread = threading.Thread(target=add)
    thread.start()
    while not done.is_set():
        again = pickle.loads(pickle.dumps(index))
        if not np.array_equal(again.ids, np.arange(len(again))):
            failed.append(again.ids)
    thread.join()
    assert not failed and len(index) == 650


def test_the_ends_of_int64_in_an_id_set():
    ends = np.array([-(2**63), -(2**63) + 1, -1, 0, 5, 2**63 - 2, 2**63 - 1])
    for cut in range(1 << len(ends)):
        gone = ends[[bool(cut >> i & 1) for i in range(len(ends))]]
        mine = IdSet([np.concatenate([ends, ends[:2]]), np.array([7])])
        mine.discard(gone)
        np.testing.assert_array_equal(mine.contains(ends), ~np.isin(ends, gone))
        assert mine.contains(np.array([7, 8, 6, 1])).tolist() == [True, False, False, False]


small_ids = st.integers(0, 60)


class IndexModel(RuleBasedStateMachine):
    """An index, in memory, mapped or in a file that grows, against a list of ids and codes."""

    @initialize(bits=st.sampled_from([5, 8, 20, 64]))
    def start(self, bits):
        self.folder = Path(tempfile.mkdtemp())
        self.bits, self.index, self.model, self.next_id = bits, HammingIndex(bits), [], 0

    def teardown(self):
        shutil.rmtree(self.folder, ignore_errors=True)

    @rule(count=st.integers(0, 6), seed=st.integers(0, 9), on_disk=st.booleans())
    def add(self, count, seed, on_disk):
        self.put(codes(count, seed, self.bits), None, on_disk)
        self.grow(codes(count, seed, self.bits), range(self.next_id, self.next_id + count))

    @rule(ids=st.lists(small_ids, max_size=6, unique=True), seed=st.integers(0, 9), on_disk=st.booleans())
    def add_with_ids(self, ids, seed, on_disk):
        rows = codes(len(ids), seed, self.bits)
        if {i for i, _ in self.model} & set(ids):
            with pytest.raises(InputError, match="must be new"):
                self.put(rows, ids, on_disk)
        else:
            self.put(rows, ids, on_disk)
            self.grow(rows, ids)

    def put(self, rows, ids, on_disk):
        if not on_disk:
            self.index.add(rows, ids)
            return
        path = self.folder / "index"
        self.index.save(path)
        try:
            HammingIndex.append(path, rows, ids)
        finally:
            self.index = HammingIndex.load(path)

    def grow(self, rows, ids):
        self.model += list(zip(ids, rows, strict=True))
        self.next_id = max([self.next_id, *(i + 1 for i in ids)])

    @rule(ids=st.lists(small_ids, max_size=4, unique=True))
    def remove(self, ids):
        if set(ids) <= {i for i, _ in self.model}:
            assert self.index.remove_ids(ids) == len(ids)
            self.model = [(i, row) for i, row in self.model if i not in ids]
        else:
            with pytest.raises(InputError, match="must be in the index"):
                self.index.remove_ids(ids)

    @rule(mmap=st.booleans())
    def reload(self, mmap):
        self.index.save(self.folder / "index")
        self.index = HammingIndex.load(self.folder / "index", mmap=mmap)

    @rule()
    def build(self):
        HammingIndex.build(self.folder / "index", [self.index])
        self.index = HammingIndex.load(self.folder / "index")
        self.next_id = self.index._next_id  # an id that was removed may come again

    @invariant()
    def same(self):
        db = np.array([row for _, row in self.model], dtype=np.uint8).reshape(-1, -(-self.bits // 8))
        ids = np.array([i for i, _ in self.model], dtype=np.int64)
        q = codes(3, 77, self.bits)
        assert len(self.index) == len(ids)
        np.testing.assert_array_equal(self.index.ids, ids)
        for k in (1, 4, len(ids) + 2):
            want = _reference.hamming_topk(q, db, k, self.bits)
            distances, found = self.index.search(q, k, threads=1)
            np.testing.assert_array_equal(distances, want[0])
            np.testing.assert_array_equal(found, np.where(want[1] < 0, -1, np.append(ids, -1)[want[1]]))
        want = _reference.hamming_range(q, db, self.bits // 2)
        for got, expected in zip(
            self.index.range_search(q, self.bits // 2, threads=1), (want[0], want[1], ids[want[2]]), strict=True
        ):
            np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("small", [0, 12, module._SMALL_BYTES])
def test_index_is_a_list_of_ids_and_codes(monkeypatch, small):
    monkeypatch.setattr(module, "_SMALL_BYTES", small)
    monkeypatch.setattr(_indexfile, "_BLOCK_BYTES", 16)
    monkeypatch.setattr(_indexfile, "_SPARE_BYTES", 0)
    limits = settings(max_examples=25, stateful_step_count=12, deadline=None, suppress_health_check=list(HealthCheck))
    run_state_machine_as_test(IndexModel, settings=limits)
