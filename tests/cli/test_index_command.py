"""`cmr-fast index` and `cmr-fast search` over files of several kinds, in blocks."""

import numpy as np
import pytest
from commands import refused

from cmr_fast.cli import main, search
from cmr_fast.retrieval.index import HammingIndex

CODES = np.random.default_rng(0).integers(0, 256, (300, 4), dtype=np.uint8)
QUERIES = np.random.default_rng(1).integers(0, 256, (23, 4), dtype=np.uint8)


def ran(capsys, *argv):
    assert main([str(a) for a in argv]) == 0, capsys.readouterr().err
    return capsys.readouterr().out


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.save("a.npy", CODES[:200])
    np.save("b.npy", CODES[200:])
    np.save("q.npy", QUERIES)
    return tmp_path


def test_an_index_grows_by_files(folder, capsys):
    assert "200 codes of 32 bits" in ran(capsys, "index", "a.npy", "--out", "x.cmrx")
    assert "300 codes of 32 bits" in ran(capsys, "index", "b.npy", "--out", "x.cmrx", "--append")
    assert "300 codes" in ran(capsys, "index", "a.npy", "b.npy", "--out", "y.cmrx")
    for name in ("x.cmrx", "y.cmrx"):
        index = HammingIndex.load(name)
        np.testing.assert_array_equal(index.codes, CODES)
        np.testing.assert_array_equal(index.ids, np.arange(300))
    np.save("ids.npy", np.arange(100)[::-1] + 1000)
    ran(capsys, "index", "b.npy", "--out", "y.cmrx", "--append", "--ids", "ids.npy")
    assert HammingIndex.load("y.cmrx").ids[300:].tolist() == list(range(1099, 999, -1))
    before = (folder / "y.cmrx").read_bytes()
    assert "ids must be new" in refused(capsys, "index", "b.npy", "--out", "y.cmrx", "--append", "--ids", "ids.npy")
    assert "knows its own" in refused(capsys, "index", "b.npy", "--out", "y.cmrx", "--append", "--bits", 32)
    assert "no index file" in refused(capsys, "index", "b.npy", "--out", "none.cmrx", "--append")
    np.save("wide.npy", np.zeros((3, 8), np.uint8))
    assert "8 bytes, expected 4" in refused(capsys, "index", "wide.npy", "--out", "y.cmrx", "--append")
    assert (folder / "y.cmrx").read_bytes() == before


def test_a_column_of_parquet_is_indexed_a_block_at_a_time(folder, capsys):
    arrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    def write(name, codes, kind="uint8"):
        flat = arrow.array(codes.reshape(-1), getattr(arrow, kind)())
        lists = arrow.FixedSizeListArray.from_arrays(flat, codes.shape[1])
        parquet.write_table(arrow.table({"id": range(len(codes)), "hash": lists}), folder / name)

    write("a.parquet", CODES[:200])
    write("b.parquet", CODES[200:])
    files = ("a.parquet", "b.parquet", "--column", "hash")
    assert "x.cmrx: 300 codes of 32 bits" in ran(capsys, "index", *files, "--out", "x.cmrx")
    assert (HammingIndex.load("x.cmrx").codes == CODES).all()
    assert "300 codes of 32 bits in 4 shards" in ran(capsys, "index", *files, "--out", "shards", "--shards", 4)
    assert (HammingIndex.open("shards").codes == CODES).all()
    before = (folder / "x.cmrx").read_bytes()
    assert "a.parquet: no column" in refused(capsys, "index", *files[:2], "--out", "y.cmrx")
    for argv in (
        (*files, "--append", "--out", "x.cmrx"),
        (*files, "--ids", "a.npy", "--out", "y"),
        ("a.npy", *files, "--out", "y"),
    ):
        assert "go into a new index" in refused(capsys, "index", *argv)
    write("c.parquet", CODES[:3] & 1)
    assert "are bits, not packed" in refused(capsys, "index", "c.parquet", *files[2:], "--out", "y.cmrx")
    write("d.parquet", CODES[:3].astype(np.float32), "float32")
    assert "d.parquet: codes of block 0" in refused(capsys, "index", "d.parquet", *files[2:], "--out", "y.cmrx")
    write("e.parquet", np.zeros((3, 8), np.uint8))
    said = refused(capsys, "index", *files[:2], "e.parquet", *files[2:], "--out", "y.cmrx")
    assert "e.parquet: column hash has 8 numbers, that of a.parquet 4" in said
    assert (folder / "x.cmrx").read_bytes() == before
    assert not (folder / "y.cmrx").exists()


def test_files_of_codes_of_others_are_indexed_and_searched(folder, capsys):
    h5py = pytest.importorskip("h5py")
    (folder / "a.u8bin").write_bytes(np.array([200, 4], "<u4").tobytes() + CODES[:200].tobytes())
    (folder / "b.bvecs").write_bytes(b"".join(np.array([4], "<i4").tobytes() + code.tobytes() for code in CODES[200:]))
    assert "300 codes of 32 bits" in ran(capsys, "index", "a.u8bin", "b.bvecs", "--out", "x.cmrx")
    np.testing.assert_array_equal(HammingIndex.load("x.cmrx").codes, CODES)
    bits = np.unpackbits(CODES, axis=1, bitorder="little").astype(bool)
    with h5py.File("c.hdf5", "w") as file:
        file.attrs["distance"] = "hamming"
        file["train"], file["test"] = bits[:, :30], bits[7:12, :30]
    assert "300 codes of 30 bits" in ran(capsys, "index", "c.hdf5", "--out", "y.cmrx")
    ran(capsys, "search", "y.cmrx", "c.hdf5", "--k", 1, "--out", "hits.npz")
    with np.load("hits.npz") as hits:
        assert hits["ids"][:, 0].tolist() == list(range(7, 12)) and not hits["distances"].any()
    assert "30 bits, expected 32" in refused(capsys, "index", "c.hdf5", "--out", "x.cmrx", "--append")
    (folder / "a.u8bin").write_bytes((folder / "a.u8bin").read_bytes()[:-1])
    assert "a.u8bin is truncated" in refused(capsys, "index", "a.u8bin", "--out", "z.cmrx")


def test_index_and_faiss_files_bring_their_ids(folder, capsys):
    index = HammingIndex(32)
    index.add(CODES[:50], np.arange(50)[::-1] * 2)
    index.save("mine.cmrx")
    index.to_faiss("theirs.faiss")
    ran(capsys, "index", "theirs.faiss", "b.npy", "--out", "x.cmrx")
    assert HammingIndex.load("x.cmrx").ids.tolist() == [*range(98, -1, -2), *range(99, 199)]
    assert "in the index already" in refused(capsys, "index", "mine.cmrx", "theirs.faiss", "--out", "y.cmrx")
    ran(capsys, "search", "theirs.faiss", "mine.cmrx", "--k", 1, "--out", "hits.npz")
    with np.load("hits.npz") as hits:
        np.testing.assert_array_equal(hits["ids"][:, 0], index.ids)
        assert (hits["distances"] == 0).all()
    short = HammingIndex(12)
    short.add(CODES[:9, :2] & 15)
    short.to_faiss("short.faiss")
    ran(capsys, "index", "short.faiss", "--out", "short.cmrx", "--bits", 12)
    assert HammingIndex.load("short.cmrx").bits == 12


@pytest.mark.parametrize("k", [1, 7, 400])
def test_searched_in_blocks_as_at_once(folder, capsys, monkeypatch, k):
    monkeypatch.setattr(search, "_QUERIES", 6)
    monkeypatch.setattr(search, "_HITS", 30)
    ran(capsys, "index", "a.npy", "b.npy", "--out", "x.cmrx")
    index = HammingIndex(32)
    index.add(CODES)
    distances, ids = index.search(QUERIES, min(k, index.ntotal))
    out = ran(capsys, "search", "x.cmrx", "q.npy", "--k", k, "--show", 9, "--out", "hits.npz")
    assert "and 14 more queries" in out
    assert (f"holds {index.ntotal} codes, fewer than k = {k}" in out) is (k > index.ntotal)
    rows = [line.split() for line in out.splitlines() if line.lstrip()[:1].isdigit()]
    assert [row[0] for row in rows] == [str(i) for i in range(9)]
    assert [row[1] for row in rows] == [str(i) for i in ids[:9, 0]]
    with np.load("hits.npz") as hits:
        np.testing.assert_array_equal(hits["distances"], distances)
        np.testing.assert_array_equal(hits["ids"], ids)
        assert (hits["distances"].dtype, hits["ids"].dtype) == (np.int32, np.int64)
    ran(capsys, "search", "x.cmrx", "q.npy", "--k", k, "--out", "hits.csv")
    table = np.loadtxt("hits.csv", delimiter=",", skiprows=1, dtype=np.int64)
    real = ids >= 0
    np.testing.assert_array_equal(table[:, 2], ids[real])
    np.testing.assert_array_equal(table[:, 3], distances[real])
    np.testing.assert_array_equal(table[:, 0], np.nonzero(real)[0])
    assert "--out FILE searches all" in ran(capsys, "search", "x.cmrx", "q.npy", "--show", 2)


def test_hits_within_a_radius(folder, capsys):
    index = HammingIndex(32)
    index.add(CODES)
    index.to_faiss("x.faiss")
    distances, ids = index.search(QUERIES, 5, radius=8)
    assert 0 < (ids < 0).sum() < ids.size
    out = ran(capsys, "search", "x.faiss", "q.npy", "--k", 5, "--radius", 8, "--show", 23, "--out", "hits.npz")
    assert "23 queries, 5 hits at most, within 8 bits" in out
    assert [line.split().count("-") for line in out.splitlines()[2:25]] == (ids < 0).sum(axis=1).tolist()
    with np.load("hits.npz") as hits:
        np.testing.assert_array_equal(hits["distances"], distances)
        np.testing.assert_array_equal(hits["ids"], ids)
    ran(capsys, "search", "x.faiss", "q.npy", "--k", 5, "--radius", 8, "--out", "hits.csv")
    table = np.loadtxt("hits.csv", delimiter=",", skiprows=1, dtype=np.int64)
    np.testing.assert_array_equal(table[:, 2], ids[ids >= 0])
    assert "--radius must be 0 or more, got -1" in refused(capsys, "search", "x.faiss", "q.npy", "--radius", -1)


def test_negative_ids_of_faiss_are_hits(folder):
    ids, distances = np.array([[-7, -1]]), np.array([[0, 33]], np.int32)
    search.write_hits(folder / "hits.csv", [(distances, ids)], (1, 2), 32)
    assert (folder / "hits.csv").read_text().split() == ["query,rank,id,distance", "0,1,-7,0"]


def test_a_damaged_index_is_one_line(folder, capsys):
    ran(capsys, "index", "a.npy", "--out", "x.cmrx")
    data = bytearray((folder / "x.cmrx").read_bytes())
    data[8192 + 100] ^= 4
    (folder / "x.cmrx").write_bytes(data)
    assert "is damaged: 1 of 1 blocks" in refused(capsys, "search", "x.cmrx", "q.npy")
    assert "is damaged" in refused(capsys, "index", "x.cmrx", "--out", "y.cmrx")
    assert not (folder / "y.cmrx").exists()


def test_a_full_disk_is_one_line(folder, capsys, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    ran(capsys, "index", "a.npy", "--out", "x.cmrx")
    before = (folder / "x.cmrx").read_bytes()
    monkeypatch.setattr("os.pwrite", full)
    for extra in ("--append", "--force"):
        assert "No space left" in refused(capsys, "index", "b.npy", "--out", "x.cmrx", extra)
    assert (folder / "x.cmrx").read_bytes() == before


@pytest.mark.parametrize("k", [2**31 - 1, 2**31, 2**40, 10**25])
def test_k_beyond_the_index_is_what_it_holds(folder, capsys, k):
    ran(capsys, "index", "a.npy", "--out", "x.cmrx")
    count = len(np.load("a.npy"))
    out = ran(capsys, "search", "x.cmrx", "a.npy", "--k", k, "--out", "hits.npz")
    assert f"holds {count} codes, fewer than k = {k}" in out
    with np.load("hits.npz") as hits:
        assert hits["ids"].shape == (count, count) and (np.sort(hits["ids"]) == np.arange(count)).all()


def test_a_folder_of_shards_is_built_grows_and_is_searched_as_a_file_is(folder, capsys):
    assert "200 codes of 32 bits in 3 shards" in ran(capsys, "index", "a.npy", "--out", "x", "--shards", "3")
    assert "300 codes of 32 bits in 3 shards" in ran(capsys, "index", "b.npy", "--out", "x", "--append")
    ran(capsys, "index", "a.npy", "b.npy", "--out", "x.cmrx")
    assert (HammingIndex.open("x").codes == CODES).all()
    assert (HammingIndex.open("x", mmap=False).ids == np.arange(300)).all()
    for name in ("x", "x.cmrx"):
        ran(capsys, "search", name, "q.npy", "--k", "7", "--out", f"{name}-hits.npz")
    found, expected = np.load("x-hits.npz"), np.load("x.cmrx-hits.npz")
    for key in ("distances", "ids"):
        np.testing.assert_array_equal(found[key], expected[key])
    np.save("ids.npy", np.arange(100))
    assert "ids must be new" in refused(capsys, "index", "b.npy", "--out", "x", "--append", "--ids", "ids.npy")
    assert "is not an empty folder" in refused(capsys, "index", "a.npy", "--out", "x", "--shards", "2")
    assert "--shards is for a new index" in refused(capsys, "index", "b.npy", "--out", "x", "--append", "--shards", "2")
    assert "shards must be 1 or more" in refused(capsys, "index", "b.npy", "--out", "z", "--shards", "0")
    assert len(HammingIndex.open("x")) == 300
    assert "--force is for a file" in refused(capsys, "index", "a.npy", "--out", "x", "--shards", "2", "--force")
    np.save("short.npy", np.uint8([[255, 15], [3, 1]]))
    np.save("stray.npy", np.uint8([[255, 31]]))
    ran(capsys, "index", "short.npy", "--out", "s", "--shards", "2", "--bits", "12")
    assert "no bits set beyond bit 12" in refused(capsys, "index", "stray.npy", "--out", "s", "--append")
    assert len(HammingIndex.open("s")) == 2
