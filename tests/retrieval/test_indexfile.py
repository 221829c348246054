"""The file of a HammingIndex under damage, kills, full disks and forgery."""

import os
import random
import resource
import signal
import struct
import tempfile
import threading
import time
import zlib
from pathlib import Path

import numpy as np
import pytest

from cmr_fast.errors import InputError
from cmr_fast.retrieval import _indexfile, _searching
from cmr_fast.retrieval import index as module
from cmr_fast.retrieval.index import HammingIndex

BITS = 20
REFUSED = "truncated|damaged|version|not a HammingIndex"
TABLE = np.random.default_rng(0).integers(0, 256, (3000, 3), dtype=np.uint8) & [255, 255, 15]
TABLE = TABLE.astype(np.uint8)
QUERIES = TABLE[::700]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Files of several blocks whose parts are all mapped, from a few codes."""
    monkeypatch.setattr(_indexfile, "_BLOCK_BYTES", 64)
    monkeypatch.setattr(module, "_SMALL_BYTES", 0)


@pytest.fixture
def scratch(tmp_path):
    """A folder in memory, where there is one: for thousands of files."""
    if not os.access("/dev/shm", os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        yield Path(folder)


def filled(count, ids=None, first=0):
    index = HammingIndex(BITS)
    index.add(TABLE[first : first + count], ids)
    return index


def answers(index):
    """What an index says, as bytes."""
    found = (*index.search(QUERIES, 9, threads=1), *index.range_search(QUERIES, 8, threads=1), index.ids, index.codes)
    return index.bits, [x.tobytes() for x in found]


def of_file(path, mmap=True):
    return answers(HammingIndex.load(path, mmap=mmap))


def grown(path, own_ids=False, pieces=(60, 20, 7)):
    """A file of several parts with leavings between them."""
    first = 0
    for count in pieces:
        ids = 5000 - np.arange(first, first + count) * 3 if own_ids else None
        if first:
            HammingIndex.append(path, TABLE[first : first + count], ids)
        else:
            filled(count, ids).save(path)
        first += count
    return path


def places_of(data):
    """(place, length) of the directory, by the first root."""
    return _indexfile._ROOT.unpack_from(data)[4:6]


@pytest.mark.parametrize("own_ids", [True, False])
def test_every_shorter_file_is_refused(scratch, own_ids):
    path = grown(scratch / "index", own_ids)
    whole = path.read_bytes()
    for size in [*range(0, 200), *range(4000, 4200), *range(8180, len(whole), 3), len(whole) - 1]:
        path.write_bytes(whole[:size])
        with pytest.raises(InputError, match=REFUSED):
            HammingIndex.load(path)


def test_what_a_killed_append_left_is_ignored_and_overwritten(tmp_path):
    path = grown(tmp_path / "index")
    want = of_file(path)
    with open(path, "ab") as file:
        file.write(bytes(1000))
    assert of_file(path) == want
    HammingIndex.append(path, TABLE[87:90])
    assert of_file(path) == answers(filled(90))


@pytest.mark.parametrize("own_ids", [True, False])
def test_every_flipped_bit_is_found_or_harmless(scratch, own_ids):
    path = grown(scratch / "index", own_ids, (30, 9))
    whole = path.read_bytes()
    want = of_file(path)
    refused = 0
    for byte in [*range(64), *range(4096, 4160), *range(8192, len(whole))]:
        damaged = bytearray(whole)
        damaged[byte] ^= 1 << byte % 8
        path.write_bytes(damaged)
        for mmap in (True, False):
            try:
                assert of_file(path, mmap) == want, byte
            except InputError as error:
                assert any(word in str(error) for word in REFUSED.split("|")), error
                assert byte >= 8192, "one root of two is enough"
                refused += 1
    codes_and_ids = 39 * (3 + 8 * own_ids)
    assert refused >= 2 * (codes_and_ids + places_of(whole)[1])


def test_a_mapped_part_is_checked_before_its_first_use(tmp_path):
    path = tmp_path / "index"
    filled(60, np.arange(60) * 2).save(path)
    for at in (8192 + 70, 8192 + 192 + 70):  # a code, an id
        damaged = bytearray(path.read_bytes())
        damaged[at] ^= 1
        other = tmp_path / "damaged"
        other.write_bytes(damaged)
        index = HammingIndex.load(other)
        uses = (
            lambda i: i.search(QUERIES, 3),
            lambda i: i.range_search(QUERIES, 3),
            lambda i: i.remove_ids([2]),
            lambda i: i.add(TABLE[:1], [3]),
            lambda i: i.save(tmp_path / "copy"),
            lambda i: i.to_faiss(tmp_path / "copy"),
            lambda i: HammingIndex.build(tmp_path / "copy", i),
            lambda i: i.codes,
            lambda i: i.verify(),
        )
        for use in uses * 2:
            with pytest.raises(InputError, match=r"1 of \d+ blocks fail"):
                use(index)
        trusted = HammingIndex.load(other, check=False)
        trusted.search(QUERIES, 3)
        for use in (uses[4], uses[-1]):
            with pytest.raises(InputError, match=r"1 of \d+ blocks fail"):
                use(trusted)
        assert not (tmp_path / "copy").exists()


def test_files_of_others_and_of_other_versions_are_refused(tmp_path):
    path = tmp_path / "index"
    for foreign in (b"IBxF" + bytes(20000), b"\x93NUMPY" + bytes(9000), b"", b"CMR"):
        path.write_bytes(foreign)
        with pytest.raises(InputError, match="not a HammingIndex file"):
            HammingIndex.load(path)
    with pytest.raises(InputError, match="no index file"):
        HammingIndex.load(tmp_path / "missing")
    with pytest.raises(InputError, match="no index file"):
        HammingIndex.append(tmp_path / "missing", TABLE[:1])
    path.write_bytes(struct.pack("<8sI", b"CMRFHAM\n", 1).ljust(300, b"\0"))
    with pytest.raises(InputError, match="is of version 1; this release reads version 2"):
        HammingIndex.load(path)
    filled(9).save(path)
    newer = bytearray(path.read_bytes())
    for place in (0, 4096):
        struct.pack_into("<I", newer, place + 8, 3)
    path.write_bytes(newer)
    with pytest.raises(InputError, match="is of version 3"):
        HammingIndex.load(path)
    sign_roots(newer)
    path.write_bytes(newer)
    for use in (HammingIndex.load, lambda p: HammingIndex.append(p, TABLE[:1])):
        with pytest.raises(InputError, match="is of version 3"):
            use(path)


def sign_roots(data, places=(0, 4096)):
    for place in places:
        struct.pack_into("<I", data, place + 60, zlib.crc32(data[place : place + 60]))


def sign_directory(data):
    for place in (0, 4096):
        at, length = _indexfile._ROOT.unpack_from(data, place)[4:6]
        if at + length <= len(data):
            struct.pack_into("<I", data, place + 40, zlib.crc32(data[at : at + length]))
    sign_roots(data)


def test_two_headers_that_differ_are_refused(tmp_path):
    path = tmp_path / "index"
    filled(9).save(path)
    data = bytearray(path.read_bytes())
    struct.pack_into("<I", data, 12, 21)
    sign_roots(data)
    path.write_bytes(data)
    with pytest.raises(InputError, match="two headers differ"):
        HammingIndex.load(path)


def mutated(rng, base, others):
    """One of many ways to harm a file."""
    data = bytearray(base)
    interesting = [(0, 64), (4096, 4160), places_of(base) and (places_of(base)[0], len(base)), (8192, len(base))]

    def spot():
        first, last = rng.choice(interesting)
        return rng.randrange(first, last)

    kind = rng.randrange(9)
    if kind == 0:
        for _ in range(rng.choice([1, 1, 2, 5, 50])):
            data[spot()] ^= 1 << rng.randrange(8)
    elif kind == 1:
        del data[rng.choice([spot(), rng.randrange(len(data))]) :]
    elif kind == 2:
        length, source, target = rng.choice([1, 8, 32, 64, 500]), spot(), spot()
        data[target : target + length] = data[source : source + length]
    elif kind == 3:
        other = rng.choice(others)
        cut, length = spot(), rng.choice([4, 32, 64, 200, len(data)])
        data[cut : cut + length] = other[cut : cut + length]
    elif kind == 4:
        at, length = spot(), rng.randrange(1, 70)
        if rng.random() < 0.5:
            del data[at : at + length]
        else:
            data[at:at] = rng.randbytes(length)
    elif kind == 5:
        at = spot()
        data[at : at + rng.choice([1, 4, 8, 64])] = rng.choice([b"\0", b"\xff", b"\x7f"]) * rng.choice([1, 4, 8, 64])
    elif kind in (6, 7):  # a field of the headers, signed again
        places = rng.choice([(0,), (4096,), (0, 4096)])
        field, width = rng.choice([(8, 4), (12, 4), (16, 8), (24, 8), (32, 8), (40, 4)])
        for place in places:
            old = int.from_bytes(data[place + field : place + field + width], "little")
            new = rng.choice([old + 1, old - 1, old * 2, old ^ 1 << rng.randrange(8 * width), 0, rng.getrandbits(64)])
            data[place + field : place + field + width] = (new % (1 << 8 * width)).to_bytes(width, "little")
        sign_roots(data, places)
    else:  # a field of the directory after the next id, everything above it signed again
        at, length = places_of(base)
        field = at + 8 + rng.randrange(0, length - 11, 4)
        old = struct.unpack_from("<I", data, field)[0]
        new = rng.choice([old + 1, old - 1, old + 64, old - 64, old ^ 1 << rng.randrange(32), 0, rng.getrandbits(32)])
        struct.pack_into("<I", data, field, new % (1 << 32))
        sign_directory(data)
    return bytes(data)


def test_no_mutated_file_gives_a_wrong_answer(scratch):
    bases = [
        grown(scratch / "a", own_ids=False, pieces=(40,)).read_bytes(),
        grown(scratch / "b", own_ids=True, pieces=(30,)).read_bytes(),
        grown(scratch / "c", own_ids=False).read_bytes(),
        grown(scratch / "d", own_ids=True, pieces=(40, 9, 9, 2)).read_bytes(),
    ]
    rights = [of_file(scratch / name) for name in "abcd"]
    rng = random.Random(7)
    path = scratch / "mutated"
    right = refused = 0
    for i in range(10_000):
        data = mutated(rng, bases[i % 4], bases)
        path.write_bytes(data)
        try:
            got = of_file(path, mmap=i % 8 < 4)
        except InputError as error:
            assert any(word in str(error) for word in REFUSED.split("|")), error
            refused += 1
            continue
        # headers of another file that was spliced in whole make it that file
        assert got in (rights if data[:8192] != bases[i % 4][:8192] else rights[i % 4 : i % 4 + 1]), i
        right += 1
    assert refused > 4000 and right > 500


def test_appending_equals_adding(tmp_path):
    rng = np.random.default_rng(3)
    path = tmp_path / "index"
    memory = HammingIndex(BITS)
    memory.save(path)
    most = 0
    for step in range(60):
        count = int(rng.integers(0, 30))
        rows = TABLE[step * 30 : step * 30 + count]
        ids = rng.permutation(count) * 2 + 100_000 - 100 * step if step % 7 == 3 else None
        memory.add(rows, ids)
        HammingIndex.append(path, rows, ids)
        most = max(most, len(_indexfile.read(path).parts))
        assert of_file(path, mmap=bool(step % 2)) == answers(memory)
    assert 3 <= most <= 10, "small parts must be merged"
    assert HammingIndex.load(path)._next_id == memory._next_id
    with pytest.raises(InputError, match="1 are in the index already, the first is 7"):
        HammingIndex.append(path, TABLE[:2], [7, 10**6])
    with pytest.raises(InputError, match="must have 20 bits"):
        HammingIndex.append(path, TABLE[:, :2])
    assert of_file(path) == answers(memory)


def test_many_small_appends_take_little_room(tmp_path, monkeypatch):
    monkeypatch.setattr(_indexfile, "_SPARE_BYTES", 2000)
    monkeypatch.setattr(os, "fsync", lambda _: None)
    path = tmp_path / "index"
    filled(1).save(path)
    written, pwrite = [0], os.pwrite

    def counted(fd, data, at):
        written[0] += len(data)
        return pwrite(fd, data, at)

    monkeypatch.setattr(os, "pwrite", counted)
    for i in range(1, 1500):
        HammingIndex.append(path, TABLE[i : i + 1])
    assert of_file(path) == answers(filled(1500))
    assert path.stat().st_size < 2 * (8192 + 4500) + 2000 + 4500
    assert written[0] < 1500 * 1000


def test_an_open_index_stays_as_it_was_while_its_file_grows(tmp_path):
    path = grown(tmp_path / "index")
    mapped = HammingIndex.load(path)
    for i in range(20):
        HammingIndex.append(path, TABLE[87 + i : 88 + i])
    assert answers(mapped) == answers(filled(87))
    filled(5).save(path)
    assert answers(mapped) == answers(filled(87))


def test_appends_wait_for_each_other(tmp_path, monkeypatch):
    monkeypatch.setattr(_indexfile, "_SPARE_BYTES", 500)
    path = tmp_path / "index"
    filled(10).save(path)

    def work(first):
        for i in range(25):
            HammingIndex.append(path, TABLE[first + i : first + i + 1], [first + i])

    threads = [threading.Thread(target=work, args=(100 * (n + 1),)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    index = HammingIndex.load(path)
    np.testing.assert_array_equal(
        np.sort(index.ids), [*range(10), *(100 * (n + 1) + i for n in range(4) for i in range(25))]
    )
    np.testing.assert_array_equal(index.codes, TABLE[index.ids])


def test_build_from_pieces(tmp_path):
    path = tmp_path / "index"
    np.save(tmp_path / "codes.npy", TABLE[:500])
    mapped = np.load(tmp_path / "codes.npy", mmap_mode="r")
    told = []
    HammingIndex.build(path, [mapped, TABLE[500:507][::1], TABLE[:0]], bits=BITS, progress=told.append)
    assert of_file(path) == answers(filled(507)) and sum(told) == 507
    HammingIndex.append(path, [TABLE[507:510], TABLE[510:512]], progress=told.append)
    assert of_file(path) == answers(filled(512)) and sum(told) == 512
    ids = np.random.default_rng(0).permutation(600)[:512]
    HammingIndex.build(path, TABLE[:512], ids, bits=BITS)
    assert of_file(path) == answers(filled(512, ids))
    a, b = filled(4, [9, 3, 5, 4]), filled(3, first=4)
    HammingIndex.build(path, [a, TABLE[8:9], b])
    assert HammingIndex.load(path).ids.tolist() == [9, 3, 5, 4, 10, 0, 1, 2]
    HammingIndex.append(path, a, ids=[20, 21, 22, 23])
    assert HammingIndex.load(path).ids.tolist() == [9, 3, 5, 4, 10, 0, 1, 2, 20, 21, 22, 23]
    HammingIndex.build(path, [], bits=BITS)
    assert len(HammingIndex.load(path)) == 0
    before = path.read_bytes()
    for message, call in {
        "3 are in the index already, the first is 3": lambda: HammingIndex.build(path, [filled(6), a, filled(1)]),
        r"ids must be integers \(4,\)": lambda: HammingIndex.build(path, a, ids=[1]),
        "must have 20 bits, got a HammingIndex of 21": lambda: HammingIndex.build(path, [a, HammingIndex(21)]),
        "beyond bit 17": lambda: HammingIndex.build(path, TABLE, bits=17),
        "bits must say": lambda: HammingIndex.build(path, []),
    }.items():
        with pytest.raises(InputError, match=message):
            call()
    assert path.read_bytes() == before


def test_other_files_are_named(tmp_path):
    path = tmp_path / "x.cmrx"
    lfs = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"ab" * 32 + b"\nsize 327925944\n"
    filled(3).to_faiss(tmp_path / "faiss")
    np.save(tmp_path / "codes.npy", TABLE)
    for data, message in {
        lfs: "is a Git LFS pointer, not the file of 327925944 bytes .*git lfs pull",
        b"/annex/objects/MD5E-s123--abc": "git annex get",
        b"": "is empty",
        (tmp_path / "codes.npy").read_bytes(): r"is a \.npy array; HammingIndex.build",
        b"PK\x03\x04": "a zip archive",
        b"IxF2" + bytes(40): "a faiss index of floats",
        b"hello": "begins with b'hello'",
    }.items():
        path.write_bytes(data)
        for call in (HammingIndex.load, HammingIndex.open, HammingIndex.from_faiss):
            with pytest.raises(InputError, match=f"^{path}.*{message}"):
                call(path)
        with pytest.raises(InputError, match=f"^{path}.*{message}"):
            HammingIndex.append(path, TABLE[:3])
        assert path.read_bytes() == data
    path.write_bytes(b"IBHf" + bytes(40))  # of faiss's other kinds only what takes them reads them
    for refused in (lambda: HammingIndex.load(path), lambda: HammingIndex.append(path, TABLE[:3])):
        with pytest.raises(InputError, match=r"which HammingIndex.from_faiss and HammingIndex.open read"):
            refused()
    with pytest.raises(InputError, match=r"is an index of faiss, which HammingIndex\.from_faiss and .*open read"):
        HammingIndex.load(tmp_path / "faiss")
    filled(3).save(path)
    with pytest.raises(InputError, match=r"is an index of cmr_fast, which HammingIndex\.load and .*open read"):
        HammingIndex.from_faiss(path)


@pytest.mark.parametrize("mmap", [True, False])
def test_open_knows_both_formats(tmp_path, mmap):
    index = filled(300, np.arange(300)[::-1] * 2)
    index.save(tmp_path / "ours")
    index.to_faiss(tmp_path / "faiss")
    for name, bits in (("ours", None), ("ours", 20), ("faiss", 20)):
        opened = HammingIndex.open(str(tmp_path / name), mmap, bits)
        assert answers(opened) == answers(index)
        assert opened.memory_usage()["mapped"] == (300 * (3 + 8) if mmap else 0)
    assert HammingIndex.open(tmp_path / "faiss").bits == 24
    with pytest.raises(InputError, match=f"^{tmp_path}/ours: its codes have 20 bits, expected 24"):
        HammingIndex.open(tmp_path / "ours", bits=24)


@pytest.mark.parametrize("call", ["load", "open", "from_faiss", "append"])
def test_what_is_no_file_is_not_read(tmp_path, call):
    arguments = (TABLE[:3],) if call == "append" else ()
    os.mkfifo(tmp_path / "fifo")
    for path, message in {
        tmp_path: "is a folder",
        tmp_path / "fifo": "is a device, FIFO or socket",
        "/dev/null": "is a device",
        tmp_path / "missing": "there is no (index|faiss) file at",
        tmp_path / "fifo" / "under": "there is no (index|faiss) file at",
    }.items():
        with pytest.raises(InputError, match=rf"{message}.*") as info:
            getattr(HammingIndex, call)(path, *arguments)
        assert str(path) in str(info.value)
    with pytest.raises(OSError, match="nnnn"):
        getattr(HammingIndex, call)(tmp_path / ("n" * 300), *arguments)
    for path in (None, 3, ""):
        with pytest.raises(InputError, match="path must be the path of a file"):
            getattr(HammingIndex, call)(path, *arguments)


@pytest.mark.parametrize("step", [1, 7, 100, 3000])
def test_build_from_an_iterator_writes_what_one_array_gives(tmp_path, step):
    blocks = (TABLE[start : start + step] for start in range(0, 512, step))
    told = []
    whole = sum(len(TABLE[start : start + step]) for start in range(0, 512, step))
    HammingIndex.build(tmp_path / "stream", blocks, bits=BITS, progress=told.append)
    HammingIndex.build(tmp_path / "array", TABLE[:whole], bits=BITS)
    assert (tmp_path / "stream").read_bytes() == (tmp_path / "array").read_bytes()
    assert sum(told) == whole
    HammingIndex.append(tmp_path / "stream", TABLE[:3])
    assert HammingIndex.load(tmp_path / "stream").ids[-3:].tolist() == [whole, whole + 1, whole + 2]


def test_build_from_an_iterator_that_fails_leaves_the_file_before(tmp_path):
    path = tmp_path / "index"
    HammingIndex.build(path, iter([TABLE[:0], TABLE[:5]]), bits=BITS)
    assert of_file(path) == answers(filled(5))
    HammingIndex.build(path, iter([]), bits=BITS)
    assert len(HammingIndex.load(path)) == 0
    before = path.read_bytes()

    def ends_early():
        yield TABLE[:4]
        raise RuntimeError("the stream ended")

    for error, message, call in (
        (RuntimeError, "the stream ended", lambda: HammingIndex.build(path, ends_early(), bits=BITS)),
        (InputError, "codes of block 1 must have 20 bits", lambda: HammingIndex.build(
            path, iter([TABLE[:4], np.zeros((2, 4), np.uint8)]), bits=BITS)),
        (InputError, "codes of block 1 .*uint8", lambda: HammingIndex.build(path, iter([TABLE, TABLE * 1.0]))),
        (InputError, "ids must be None", lambda: HammingIndex.build(path, iter([TABLE[:4]]), [1, 2, 3, 4])),
        (InputError, "bits must say", lambda: HammingIndex.build(path, iter([]))),
    ):  # fmt: skip
        with pytest.raises(error, match=message):
            call()
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["index"]


@pytest.mark.parametrize("ids", [None, np.random.default_rng(0).permutation(len(TABLE))])
@pytest.mark.parametrize(("stretch", "first"), [(3, 3000), (300, 3000), (4096, 1365), (8997, 2999)])
def test_a_mapped_index_is_searched_stretch_by_stretch(tmp_path, monkeypatch, ids, stretch, first):
    memory = HammingIndex(BITS)
    memory.add((TABLE & [3, 0, 1]).astype(np.uint8), ids)  # most distances are equal
    memory.save(tmp_path / "index")
    mapped, seen, topk = HammingIndex.load(tmp_path / "index"), [], _searching.hamming_topk

    def noted(q, codes, *arguments, **options):
        seen.append(len(codes))
        return topk(q, codes, *arguments, **options)

    monkeypatch.setattr(_searching, "hamming_topk", noted)
    monkeypatch.setattr(_searching, "_STRETCH", stretch)
    for k, radius in ((1, None), (7, None), (7, 1), (4000, None)):  # 4000: more than a stretch would give is kept whole
        found, expected = mapped.search(QUERIES[:1], k, radius=radius), memory.search(QUERIES[:1], k, radius=radius)
        for a, b in zip(found, expected, strict=True):
            np.testing.assert_array_equal(a, b)
    assert seen[0] == first


@pytest.mark.parametrize("call", ["save", "to_faiss", "build"])
def test_what_cannot_be_written_is_named(tmp_path, call):
    index = filled(9)
    write = {"save": index.save, "to_faiss": index.to_faiss, "build": lambda path: HammingIndex.build(path, index)}
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "file").write_text("")
    for path, message in {
        tmp_path: "is a folder",
        tmp_path / "fifo": "is a device, FIFO or socket",
        "/dev/null": "is a device",
        tmp_path / "file" / "under": "is not a folder",
    }.items():
        with pytest.raises(InputError, match=message) as info:
            write[call](path)
        assert str(path) in str(info.value) or "file/under" in str(path)
    for path in (tmp_path / ("n" * 256), "/proc/x.cmrx"):
        with pytest.raises(OSError) as error:
            write[call](path)
        assert error.value.filename == str(path)
    for path in (None, 3, ""):
        with pytest.raises(InputError, match="path must be the path of a file"):
            write[call](path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["fifo", "file"]


def test_save_and_append_follow_a_link(tmp_path):
    (tmp_path / "latest").symlink_to("real")
    filled(3).save(tmp_path / "latest")
    HammingIndex.append(tmp_path / "latest", TABLE[3:5])
    filled(7).to_faiss(tmp_path / "real.faiss")
    assert len(HammingIndex.load(tmp_path / "real")) == 5 and (tmp_path / "latest").is_symlink()
    filled(9).save(tmp_path / "latest")
    assert len(HammingIndex.load(tmp_path / "real")) == 9 and (tmp_path / "latest").is_symlink()


def test_a_full_disk_is_named(tmp_path, monkeypatch):
    path = grown(tmp_path / "index")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    for call in (lambda: filled(100).save(path), lambda: HammingIndex.append(path, TABLE[87:100])):
        with pytest.raises(OSError, match=rf"No space left on device: '{path}'"):
            call()


def test_progress_that_cannot_be_called(tmp_path):
    for call in (HammingIndex.build, HammingIndex.append):
        with pytest.raises(InputError, match="progress must be called with"):
            call(tmp_path / "index", TABLE, progress=3)


@pytest.mark.parametrize("how", ["save", "append"])
def test_a_full_disk_leaves_the_old_file(tmp_path, how):
    path = grown(tmp_path / "index")
    whole, want = path.read_bytes(), of_file(path)
    larger = filled(1500)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    succeeded = 0
    for limit in [0, 1, 4000, 8192, 8200, len(whole), len(whole) + 1, len(whole) + 500, 12000, 13000, 20000]:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        try:
            if how == "save":
                larger.save(path)
            else:
                HammingIndex.append(path, TABLE[87:1500])
            succeeded += 1
        except OSError:
            pass
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert [p.name for p in tmp_path.iterdir()] == ["index"]
        if succeeded:
            assert of_file(path) == answers(larger)
            break
        assert path.read_bytes() == whole and of_file(path) == want
    assert succeeded == 1 and limit > len(whole)


@pytest.mark.parametrize("function", ["fsync", "pwrite"])
@pytest.mark.parametrize("how", ["save", "append"])
def test_an_error_of_the_disk_leaves_a_whole_file(tmp_path, monkeypatch, function, how):
    path = grown(tmp_path / "index")
    real = getattr(os, function)
    for fails_at in range(12):
        grown(path)
        before, calls = of_file(path), [0]

        def failing(*arguments, calls=calls, fails_at=fails_at):
            calls[0] += 1
            if calls[0] > fails_at:
                raise OSError("input/output error")
            return real(*arguments)

        monkeypatch.setattr(os, function, failing)
        try:
            if how == "save":
                filled(100).save(path)
            else:
                HammingIndex.append(path, TABLE[87:100])
            allowed = [answers(filled(100))]
        except OSError:
            allowed = [before, answers(filled(100))] if function == "fsync" and fails_at else [before]
        monkeypatch.setattr(os, function, real)
        assert of_file(path) in allowed
        assert [p.name for p in tmp_path.iterdir()] == ["index"]
        HammingIndex.append(path, TABLE[200:203])


def test_any_power_cut_leaves_the_state_before_or_after(scratch, monkeypatch):
    """Writes since the last flush may be lost, kept or torn, in any combination."""
    rng = random.Random(1)
    path, crashed = scratch / "index", scratch / "crashed"
    pwrite, fsync = os.pwrite, os.fsync
    for pieces in ((40,), (60, 20, 7), (40, 9, 9, 2)):
        grown(path, pieces=pieces)
        base, steps, count = path.read_bytes(), [], sum(pieces)
        before = of_file(path)
        monkeypatch.setattr(os, "pwrite", lambda fd, d, at: steps.append((at, bytes(d))) or pwrite(fd, d, at))  # noqa: B023
        monkeypatch.setattr(os, "fsync", lambda fd: steps.append(None) or fsync(fd))  # noqa: B023
        HammingIndex.append(path, TABLE[count : count + 15])
        monkeypatch.undo()
        monkeypatch.setattr(module, "_SMALL_BYTES", 0)
        after = of_file(path)
        flushes = [i for i, step in enumerate(steps) if step is None]
        assert len(flushes) == 3
        for cut in range(len(steps) + 1):
            for _ in range(8):
                flushed = max((i for i in flushes if i < cut), default=0)
                data = bytearray(base)
                for i, step in enumerate(steps[:cut]):
                    if step is None or (i > flushed and rng.random() < 0.3):
                        continue
                    at, piece = step
                    if i > flushed or not flushed:
                        piece = piece[: rng.choice([len(piece), rng.randrange(len(piece) + 1)])]
                    data.extend(bytes(max(0, at + len(piece) - len(data))))
                    data[at : at + len(piece)] = piece
                crashed.write_bytes(data)
                state = of_file(crashed)
                assert state in ([before, after] if cut <= flushes[1] else [after])
                # and it can be appended to
                start = count if state == before else count + 15
                HammingIndex.append(crashed, TABLE[start : start + 5])
                assert of_file(crashed) == answers(filled(start + 5))


def test_a_file_can_be_opened_while_it_grows(scratch, monkeypatch):
    monkeypatch.setattr(_indexfile, "_SPARE_BYTES", 3000)
    path = scratch / "index"
    filled(10).save(path)
    child = os.fork()
    if child == 0:
        try:
            for i in range(10, 700, 3):
                HammingIndex.append(path, TABLE[i : i + 3])
        finally:
            os._exit(0)
    sizes = [10]
    while os.waitpid(child, os.WNOHANG) == (0, 0):
        index = HammingIndex.load(path, mmap=len(sizes) % 2 == 0)
        np.testing.assert_array_equal(index.codes, TABLE[: len(index)])
        assert len(index) >= sizes[-1]
        sizes.append(len(index))
    assert len(HammingIndex.load(path)) == 700 and len(set(sizes)) > 5


def killed(work, delay):
    """Run `work(report)` in a child that is killed after `delay` seconds; returns what it had reported as done."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(reader)
            os.write(writer, b"\0\0\0\0")
            work(lambda number: os.write(writer, struct.pack("<I", number)))
        finally:
            os._exit(0)
    os.close(writer)
    os.read(reader, 4)
    time.sleep(delay)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    done = b""
    while piece := os.read(reader, 1 << 16):
        done += piece
    os.close(reader)
    return struct.unpack("<I", done[-4:])[0] if done else 0


def test_a_killed_append_loses_nothing_that_was_done(scratch, monkeypatch):
    monkeypatch.setattr(_indexfile, "_SPARE_BYTES", 3000)
    rng = random.Random(0)
    path = scratch / "index"
    filled(10).save(path)
    grew, delay = 0, 0.005
    for _ in range(120):
        start = len(HammingIndex.load(path))
        if start > 2000:
            filled(10).save(path)
            start = 10

        def work(report, start=start):
            sizes = random.Random(start)
            while start < 2900:
                count = sizes.choice([1, 2, 5, 40])
                HammingIndex.append(path, TABLE[start : start + count])
                start += count
                report(start)

        done = killed(work, rng.random() * delay)
        index = HammingIndex.load(path, mmap=False)
        assert len(index) >= max(done, start)
        np.testing.assert_array_equal(index.codes, TABLE[: len(index)])
        np.testing.assert_array_equal(index.ids, np.arange(len(index)))
        grew += len(index) > start
        delay *= 0.8 if len(index) > start else 1.2  # whatever the load: kills on both sides of the first commit
    assert grew > 20


def test_a_killed_save_leaves_the_old_or_the_new_file(scratch):
    rng = random.Random(0)
    path = scratch / "index"
    filled(10).save(path)
    versions = [filled(2000 + i) for i in range(8)]
    changed, delay = 0, 0.005
    for _ in range(100):
        before = len(HammingIndex.load(path))

        def work(report):
            for i in range(1000):
                versions[i % 8].save(path)
                report(2000 + i % 8)

        done = killed(work, rng.random() * delay)
        index = HammingIndex.load(path, mmap=False)
        assert len(index) in (({before} if not done else set()) | {2000 + i for i in range(8)})
        assert not done or len(index) in (done, 2000 + (done - 2000 + 1) % 8)
        np.testing.assert_array_equal(index.codes, TABLE[: len(index)])
        changed += len(index) != before
        delay *= 0.8 if len(index) != before else 1.2
    assert changed > 20
