"""A folder of shards: what is written, joined, removed, and what a change that stops halfway leaves."""

import json
import os
import shutil

import numpy as np
import pytest

from cmr_fast import HammingIndex, InputError
from cmr_fast.distributed import ShardedIndex
from cmr_fast.distributed._worker import ShardWorker
from cmr_fast.retrieval import _shards
from cmr_fast.retrieval._segments import Part


@pytest.fixture(autouse=True)
def no_grace(monkeypatch):
    monkeypatch.setattr(_shards, "GRACE", 0.0)


def codes_of(seed, count, nbytes=8):
    return np.random.default_rng(seed).integers(0, 4, (count, nbytes), dtype=np.uint8)


def one_of(folder):
    """All codes and ids of a folder, in its order."""
    held = _shards.read(folder)
    parts = [part for files in held.shards for file in files for part in _shards.opened(folder, file, held.bits)]
    empty = np.empty((0, -(-held.bits // 8)), np.uint8)
    return np.concatenate([empty, *(part.codes for part in parts)]), np.concatenate(
        [np.empty(0, np.int64), *(np.asarray(part.ids) for part in parts)]
    )


def add(folder, codes, first_id):
    with _shards.writing(folder) as old:
        parts = [Part(codes, range(first_id, first_id + len(codes)))]
        _shards.write(folder, _shards.added(folder, old, parts, first_id + len(codes)))


@pytest.mark.parametrize(("count", "shards"), [(0, 3), (1, 4), (10, 4), (10, 1), (103, 7)])
def test_build_cuts_codes_into_shards_of_equal_size_in_their_order(tmp_path, count, shards):
    codes = codes_of(0, count)
    ShardedIndex.build(tmp_path / "x", codes, shards=shards, bits=64)
    held = _shards.read(tmp_path / "x")
    assert len(held.rows) == shards
    assert sum(held.rows) == count
    assert max(held.rows) - min(held.rows) <= 1
    found, ids = one_of(tmp_path / "x")
    assert (found == codes).all()
    assert ids.tolist() == list(range(count))


@pytest.mark.parametrize(("count", "rows", "shards"), [(0, 3, [0]), (1, 3, [1]), (6, 3, [3, 3]), (10, 4, [4, 4, 2])])
@pytest.mark.parametrize("step", [1, 3, 4, 100])
def test_build_from_an_iterator_cuts_shards_of_so_many_rows(tmp_path, count, rows, shards, step):
    codes, told = codes_of(0, count), []
    blocks = (codes[start : start + step] for start in range(0, count, step))
    ShardedIndex.build(tmp_path / "x", blocks, rows=rows, bits=64, progress=told.append)
    held = _shards.read(tmp_path / "x")
    assert list(held.rows) == shards
    assert sum(told) == held.next_id == count
    found, ids = one_of(tmp_path / "x")
    assert (found == codes).all()
    assert ids.tolist() == list(range(count))
    named = {file.name for files in held.shards for file in files}
    assert {path.name for path in (tmp_path / "x").glob("*.cmr")} == named


def test_build_from_an_iterator_that_fails_leaves_an_empty_folder(tmp_path):
    blocks = iter([codes_of(0, 5), np.zeros((2, 9), np.uint8)])
    with pytest.raises(InputError, match="codes of block 1 must have 64 bits"):
        ShardedIndex.build(tmp_path / "x", blocks, rows=2)
    assert not any((tmp_path / "x").iterdir())
    for codes, options in ((iter([codes_of(0, 5)]), {}), (codes_of(0, 5), {"rows": 2})):
        with pytest.raises(InputError, match="rows, codes of a shard, are for an iterator"):
            ShardedIndex.build(tmp_path / "x", codes, **options)


def test_build_takes_ids_and_indexes_along(tmp_path):
    index = HammingIndex(64)
    index.add(codes_of(0, 5), [9, 4, 11, 0, 7])
    ShardedIndex.build(tmp_path / "x", index, shards=2)
    assert one_of(tmp_path / "x")[1].tolist() == [9, 4, 11, 0, 7]
    ShardedIndex.build(tmp_path / "y", codes_of(0, 3), ids=[5, 3, 8], shards=2)
    assert one_of(tmp_path / "y")[1].tolist() == [5, 3, 8]
    assert _shards.read(tmp_path / "y").next_id == 9


def test_what_is_added_is_joined_to_few_files_and_begins_shards_where_one_is_full(tmp_path, monkeypatch):
    folder = tmp_path / "x"
    ShardedIndex.build(folder, codes_of(0, 8), shards=2)
    held = _shards.read(folder)
    _shards.write(folder, _shards.replace(held, capacity=40))
    codes = codes_of(1, 100)
    for start in range(100):
        add(folder, codes[start : start + 1], 8 + start)
    held = _shards.read(folder)
    assert held.rows == (4, 40, 40, 24)
    assert all(len(files) <= 6 for files in held.shards)
    found, ids = one_of(folder)
    assert (found == np.concatenate([codes_of(0, 8), codes])).all()
    assert ids.tolist() == list(range(108))
    with _shards.writing(folder):
        pass
    named = {file.name for files in held.shards for file in files}
    assert {path.name for path in folder.glob("*.cmr")} == named, "files of earlier states stay"


def test_a_change_that_stops_before_the_manifest_has_not_happened(tmp_path):
    folder = tmp_path / "x"
    ShardedIndex.build(folder, codes_of(0, 10), shards=2)
    before = one_of(folder)
    with _shards.writing(folder) as old:
        _shards.added(folder, old, [Part(codes_of(1, 5), range(10, 15))], 15)
    assert len(list(folder.glob("*.cmr"))) == 3
    assert (one_of(folder)[0] == before[0]).all()
    with _shards.writing(folder):
        assert len(list(folder.glob("*.cmr"))) == 2, "what was left is removed by who writes next"


def test_removing_keeps_the_others_ids_and_order(tmp_path):
    folder = tmp_path / "x"
    ShardedIndex.build(folder, codes_of(0, 10), shards=3)
    with _shards.writing(folder) as old:
        new, count = _shards.removed(folder, old, np.array([0, 4, 9]))
        _shards.write(folder, new)
    assert count == 3
    found, ids = one_of(folder)
    assert ids.tolist() == [1, 2, 3, 5, 6, 7, 8]
    assert (found == codes_of(0, 10)[ids]).all()
    with _shards.writing(folder) as old, pytest.raises(InputError, match="1 are not, the first is 4"):
        _shards.removed(folder, old, np.array([1, 4]))


def test_a_folder_is_copied_as_any_other(tmp_path):
    ShardedIndex.build(tmp_path / "x", codes_of(0, 10), shards=2)
    shutil.copytree(tmp_path / "x", tmp_path / "y", copy_function=shutil.copyfile)
    assert (HammingIndex.open(tmp_path / "y").codes == codes_of(0, 10)).all()


def test_files_of_the_state_before_stay_for_who_searches_them(tmp_path, monkeypatch):
    monkeypatch.setattr(_shards, "GRACE", 60.0)
    folder = tmp_path / "x"
    ShardedIndex.build(folder, codes_of(0, 4), shards=1)
    for path in folder.glob("*.cmr"):
        os.utime(path, (1, 1))  # of long ago
    before = _shards.read(folder)
    add(folder, codes_of(1, 6), 4)
    add(folder, codes_of(2, 20), 10)
    assert (np.concatenate([p.codes for p in _shards.all_parts(folder, before)]) == codes_of(0, 4)).all()


def test_a_folder_that_holds_something_is_refused(tmp_path):
    (tmp_path / "note").write_text("mine")
    with pytest.raises(InputError, match="is not an empty folder"):
        ShardedIndex.build(tmp_path, codes_of(0, 4))
    assert [path.name for path in tmp_path.iterdir()] == ["note"]


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": "cmr_fast shards", "version": 1}', "\0"])
def test_a_manifest_that_is_something_else_is_refused(tmp_path, text):
    (tmp_path / "shards.json").write_text(text)
    with pytest.raises(InputError, match="does not describe shards"):
        _shards.read(tmp_path)


def test_a_missing_folder_and_a_later_version_are_refused(tmp_path):
    with pytest.raises(InputError, match=r"is a folder without shards\.json"):
        _shards.read(tmp_path)
    with pytest.raises(InputError, match="there is no sharded index at"):
        _shards.read(tmp_path / "none")
    ShardedIndex.build(tmp_path / "x", codes_of(0, 4))
    held = json.loads((tmp_path / "x/shards.json").read_text())
    (tmp_path / "x/shards.json").write_text(json.dumps({**held, "version": 9}))
    with pytest.raises(InputError, match="is of version 9; this release reads version 1"):
        _shards.read(tmp_path / "x")


class TestWorker:
    """What answers for a shard, without Ray."""

    @pytest.fixture
    def shard(self, tmp_path):
        ShardedIndex.build(tmp_path / "x", codes_of(0, 200), shards=1)
        return tmp_path / "x", _shards.read(tmp_path / "x").shards[0]

    def test_a_worker_begun_anew_answers_as_the_one_before(self, shard):
        folder, files = shard
        add(folder, codes_of(1, 50), 200)
        now = _shards.read(folder).shards[0]
        worker = ShardWorker(str(folder), 64)
        assert worker.ready(files).rows == 200
        first = worker.search(now, codes_of(2, 4), 7, None, None)
        again = ShardWorker(str(folder), 64).search(now, codes_of(2, 4), 7, None, None)
        assert first.rows == again.rows == 250
        assert all((a == b).all() for a, b in zip(first.found[:2], again.found[:2], strict=True))
        assert worker.search(files, codes_of(2, 4), 7, None, None).rows == 200, "an earlier state of the index"

    @pytest.mark.parametrize("mmap", [True, False])
    def test_answers_are_the_indexs_own(self, shard, mmap):
        folder, files = shard
        index = HammingIndex(64)
        index.add(codes_of(0, 200))
        q = codes_of(0, 3)
        worker = ShardWorker(str(folder), 64, mmap)
        rows, (near, ids, known) = worker.search(files, q, 5, 6, np.array([3, 70, 500]))
        expected = index.search(q, 5, radius=6, where=[3, 70])
        assert (rows, known) == (200, 2)
        assert (near == expected[0]).all()
        assert (ids == expected[1]).all()

    def test_a_file_that_others_changed_is_named(self, shard):
        folder, files = shard
        worker = ShardWorker(str(folder), 64)
        expected = worker.search(files, codes_of(0, 1), 3, None, None)
        path = folder / files[0].name
        os.utime(path, ns=(1, 1))  # as a copy of the folder has it
        found = worker.search(files, codes_of(0, 1), 3, None, None)
        assert all((a == b).all() for a, b in zip(found.found[:2], expected.found[:2], strict=True))
        whole = path.read_bytes()
        HammingIndex.build(path, codes_of(7, 200), bits=64)
        with pytest.raises(InputError, match=r"shard-00000-0\.cmr was changed after it was written"):
            worker.search(files, codes_of(0, 1), 1, None, None)
        path.write_bytes(whole[:9000] + bytes([whole[9000] ^ 1]) + whole[9001:])
        with pytest.raises(InputError, match="fail their checksum"):
            worker.search(files, codes_of(0, 1), 1, None, None)
        path.unlink()
        with pytest.raises(_shards.GoneError, match="is gone"):
            worker.search(files, codes_of(0, 1), 1, None, None)

    def test_damage_is_named_before_anything_is_answered(self, shard):
        folder, files = shard
        path = folder / files[0].name
        with open(path, "r+b") as file:
            file.seek(8192 + 100)
            byte = file.read(1)
            file.seek(8192 + 100)
            file.write(bytes([byte[0] ^ 1]))
        with pytest.raises(InputError, match="fail their checksum"):
            ShardWorker(str(folder), 64).search(files, codes_of(0, 1), 1, None, None)
