"""Streams of pairs: one order for any number of ranks and workers, resumed at every sample, and what is refused."""

import io
import json
import os
import re
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from cmr_fast import HammingIndex, InputError
from cmr_fast.data import stream, stream_column

COUNTS = (5, 0, 7, 1, 4)  # samples of each file; one has none
TOTAL = sum(COUNTS)


def photo(shade):
    file = io.BytesIO()
    Image.new("RGB", (20, 24), (shade,) * 3).save(file, "PNG")
    return file.getvalue()


def write_tar(path, members):
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


@pytest.fixture(params=["tar", "parquet"])
def folder(request, tmp_path):
    """Files of pairs; the caption of the n-th of all is its number, its photo has that shade."""
    numbers = iter(range(TOTAL))
    for file, count in enumerate(COUNTS):
        mine = [next(numbers) for _ in range(count)]
        if request.param == "tar":
            members = []
            for n in mine:
                caption = ("txt", b"%d" % n) if n % 2 else ("json", json.dumps({"caption": str(n)}).encode())
                members += [(f"a.b/{n:04}.png", photo(10 * n)), (f"a.b/{n:04}.{caption[0]}", caption[1])]
            write_tar(tmp_path / f"{file}.tar", members)
        else:
            arrow = pytest.importorskip("pyarrow")
            from pyarrow import parquet

            columns = {
                "other": arrow.array(mine, arrow.int64()),
                "jpg": arrow.array([photo(10 * n) for n in mine], arrow.binary()),
                "caption": arrow.array(map(str, mine), arrow.string()),
            }
            parquet.write_table(arrow.table(columns), tmp_path / f"{file}.parquet", row_group_size=3)
    return tmp_path


def numbers_of(batches):
    """The samples of some batches, whose photos and captions have to agree."""
    out = []
    for batch in batches:
        assert batch.image.dtype == torch.uint8
        assert batch.image.shape[1:] == (3, 16, 16)
        found = [int(caption) for (caption,) in batch.text]
        assert [10 * n for n in found] == batch.image[:, 0, 8, 8].tolist()
        out += found
    return out


def made(folder, batch=3, **options):
    return stream(folder, **{"batch": batch, "size": 16, "buffer": 6, **options})


def test_a_pattern_names_files(folder):
    one = made(folder / "[02].*", shuffle=False)
    assert numbers_of(one) == [0, 1, 2, 3, 4, *range(5, 12)]


def test_without_shuffle_the_order_is_that_of_the_files(folder):
    batches = list(made(folder, shuffle=False))
    assert numbers_of(batches) == list(range(TOTAL))
    assert [len(batch.names) for batch in batches] == [3, 3, 3, 3, 3, 2]
    assert [batch.state["position"] for batch in batches] == [3, 6, 9, 12, 15, 17]
    assert batches[0].names[0].startswith(str(folder / "0."))


@pytest.mark.parametrize("buffer", [1, 4, 6, 100])
def test_each_sample_comes_once_an_epoch_in_an_order_of_seed_and_epoch(folder, buffer):
    reader = made(folder, buffer=buffer)
    first = numbers_of(reader)
    assert sorted(first) == list(range(TOTAL))
    assert numbers_of(reader) == first, "a pass is what is left of the epoch"
    assert numbers_of(made(folder, buffer=buffer, batch=5)) == first
    reader.set_epoch(1)
    second = numbers_of(reader)
    assert sorted(second) == list(range(TOTAL))
    orders = {tuple(order) for order in (first, second, numbers_of(made(folder, buffer=buffer, seed=1)), range(TOTAL))}
    assert len(orders) == 4


def test_windows_hold_samples_that_follow_on_each_other(folder):
    """Within a window all orders, across windows that of the files."""
    whole = numbers_of(made(folder, buffer=1))
    mixed = numbers_of(made(folder, buffer=6))
    assert mixed != whole
    for start in range(0, TOTAL, 6):
        assert sorted(mixed[start : start + 6]) == sorted(whole[start : start + 6])


@pytest.mark.parametrize(("batch", "buffer"), [(1, 6), (1, 1), (3, 6), (7, 2), (2, 100)])
def test_resumed_at_every_batch_the_order_is_the_undisturbed_one(folder, batch, buffer):
    reader = made(folder, batch=batch, buffer=buffer)
    reader.set_epoch(2)
    batches = list(reader)
    whole = numbers_of(batches)
    for number, before in enumerate(batches):
        other = made(folder, batch=batch, buffer=buffer)
        other.load_state_dict(json.loads(json.dumps(before.state)))
        other.set_epoch(2)  # the epoch that was resumed: nothing changes
        done = batch * (number + 1)
        assert numbers_of(other) == whole[done:]
        other = made(folder, batch=4, buffer=buffer)
        other.load_state_dict(before.state)
        rest = list(other)
        assert numbers_of(rest) == whole[done:]
        if rest:
            last = made(folder, batch=2, buffer=buffer)
            last.load_state_dict(rest[0].state)  # of one that was resumed itself
            assert numbers_of(last) == whole[done + 4 :]
    walked = iter(reader)
    for before in batches:
        next(walked)
        assert reader.state_dict() == before.state


@pytest.mark.parametrize("buffer", [1, 6, 100])
def test_seek_begins_at_any_pair(folder, buffer):
    """By place in the order alone, in a reader that has read nothing."""
    for epoch in range(2):
        reader = made(folder, buffer=buffer, batch=1)
        reader.set_epoch(epoch)
        whole = list(reader)
        for position in range(TOTAL + 1):
            other = made(folder, buffer=buffer, batch=1)
            other.seek(epoch, position)
            assert numbers_of(other) == numbers_of(whole[position:])
            if position:
                other.seek(epoch, position)
                assert other.state_dict()["position"] == whole[position - 1].state["position"]
            pairs = [(file, row, sample.text) for file, row, sample in other.samples()]
            starts = np.cumsum([0, *COUNTS])
            assert [starts[file] + row for file, row, _ in pairs] == [int(text) for _, _, (text,) in pairs]
            assert [text for _, _, text in pairs] == [batch.text[0] for batch in whole[position:]]


@pytest.mark.parametrize("world", [2, 3, 5])
@pytest.mark.parametrize("batch", [1, 2, 4])
def test_ranks_together_hold_the_batches_of_one_reader(folder, world, batch):
    whole = numbers_of(made(folder, batch=1))
    ranks = [list(made(folder, batch=batch, rank=rank, world=world)) for rank in range(world)]
    together = [
        n for turn in range(len(ranks[0])) for rank in ranks for n in numbers_of(rank[turn : turn + 1])
    ]  # global batch by global batch
    assert together == whole
    assert len({batch.state["position"] for rank in ranks for batch in rank}) == len(ranks[0])
    ends = [len(list(made(folder, batch=batch, rank=rank, world=world, drop_last=True))) for rank in range(world)]
    assert ends == [TOTAL // (batch * world)] * world
    one = made(folder, batch=1)
    one.load_state_dict(ranks[-1][0].state)  # goes on alone behind the first global batch
    assert numbers_of(one) == whole[batch * world :]


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_change_nothing(folder, workers):
    reader = made(folder, batch=2)
    whole = list(reader)
    loader = torch.utils.data.DataLoader(reader, batch_size=None, num_workers=workers)
    read = list(loader)
    assert numbers_of(read) == numbers_of(whole)
    assert [batch.state for batch in read] == [batch.state for batch in whole]
    reader.load_state_dict(read[3].state)
    assert numbers_of(loader) == numbers_of(whole[4:])


def test_a_state_of_another_order_is_refused(folder):
    state = made(folder).state_dict()
    for options in ({"seed": 1}, {"buffer": 7}, {"shuffle": False}):
        with pytest.raises(InputError, match="of other files, or of another seed, buffer or shuffle"):
            made(folder, **options).load_state_dict(state)
    next(folder.glob("4.*")).unlink()
    with pytest.raises(InputError, match="of other files"):
        made(folder).load_state_dict(state)
    with pytest.raises(InputError, match="state must be that of a batch"):
        made(folder).load_state_dict({"epoch": 1})
    with pytest.raises(InputError, match="of version 9"):
        made(folder).load_state_dict({**state, "version": 9})


def test_members_of_a_tar_that_is_damaged_are_named(tmp_path):
    path = tmp_path / "x.tar"
    members = [(f"{n}.{end}", data) for n in range(3) for end, data in (("png", photo(n)), ("txt", b"word"))]
    write_tar(path, members)
    whole = path.read_bytes()
    with tarfile.open(path) as tar:
        header = tar.getmember("2.png").offset
        data = tar.getmember("1.png").offset_data
    path.write_bytes(whole[:header] + b"\1" * 512 + whole[header + 512 :])  # tarfile alone ends here without a word
    with pytest.raises(InputError, match=r"x\.tar: damaged after 1\.txt"):
        list(made(path))
    path.write_bytes(whole[: header + 520])
    with pytest.raises(InputError, match=r"x\.tar: damaged after"):
        list(made(path))
    path.write_bytes(whole[:data] + bytes(60) + whole[data + 60 :])
    with pytest.raises(InputError, match=r"x\.tar: 1: not a photo"):
        list(made(path))
    (batch,) = made(path, broken="skip", shuffle=False)
    assert batch.names == (f"{path}: 0", f"{path}: 2")
    assert batch.skipped == (f"{path}: 1",)
    path.write_bytes(b"")
    with pytest.raises(InputError, match=r"x\.tar: damaged, or no tar"):
        list(made(path))


def test_samples_without_a_side_or_a_word_are_named(tmp_path):
    write_tar(tmp_path / "0.tar", [("a.png", photo(0)), ("a.txt", b"one"), ("b.png", photo(1)), ("b.md", b"")])
    with pytest.raises(InputError, match=r"0\.tar: b has no text; expected one of \.txt, .* beside \.md, \.png"):
        list(made(tmp_path))
    write_tar(tmp_path / "0.tar", [("b.txt", b"one")])
    with pytest.raises(InputError, match=r"0\.tar: b has no image"):
        list(made(tmp_path))
    write_tar(tmp_path / "0.tar", [("a.png", photo(0)), ("a.txt", b"  \n")])
    with pytest.raises(InputError, match=r"0\.tar: a has no caption"):
        list(made(tmp_path))
    assert list(made(tmp_path, broken="skip")) == []
    for ending, text in (("txt", b"\xff\xfe"), ("json", b"{")):
        write_tar(
            tmp_path / "0.tar", [("a.png", photo(0)), (f"a.{ending}", text), ("b.png", photo(1)), ("b.txt", b"b")]
        )
        with pytest.raises(InputError, match=rf"a\.{ending} is no caption"):
            list(made(tmp_path))
        (batch,) = made(tmp_path, broken="skip", shuffle=False)
        assert batch.text == (("b",),) and batch.skipped == (f"{tmp_path / '0.tar'}: a",)
    write_tar(tmp_path / "0.tar", [])
    with pytest.raises(InputError, match="no pair in any of 1 files"):
        list(made(tmp_path))


def test_members_are_chosen_by_their_endings_and_features_read_as_they_are(tmp_path):
    def npy(values):
        file = io.BytesIO()
        np.save(file, np.asarray(values, np.float32))
        return file.getvalue()

    pairs = [[("image.npy", npy([n, 2])), ("text.npy", npy([n, 4, 5])), ("cap.txt", b"two\nlines")] for n in range(3)]
    write_tar(tmp_path / "0.tar", [(f"{n}.{end}", data) for n in range(3) for end, data in pairs[n]])
    (batch,) = made(tmp_path, shuffle=False)
    assert batch.image.tolist() == [[0, 2], [1, 2], [2, 2]]
    assert batch.text.tolist() == [[0, 4, 5], [1, 4, 5], [2, 4, 5]]
    (batch,) = made(tmp_path, text="cap.txt", shuffle=False)
    assert batch.text == (("two", "lines"),) * 3
    write_tar(tmp_path / "1.tar", [("x.image.npy", npy([1, 2, 3])), ("x.txt", b"word")])
    with pytest.raises(
        InputError, match=r"1\.tar: x has float32 \(3,\), .*0\.tar: 0 float32 \(2,\); expected one kind"
    ):
        list(made([tmp_path / "0.tar", tmp_path / "1.tar"], batch=9, shuffle=False))
    write_tar(tmp_path / "0.tar", [("x.image.npy", b"nothing"), ("x.txt", b"word")])
    with pytest.raises(InputError, match=r"0\.tar: x\.image\.npy is no \.npy array"):
        list(made(tmp_path / "0.tar"))


def table(path, **columns):
    arrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(arrow.table(columns), path, row_group_size=2)


def test_columns_of_parquet(tmp_path):
    arrow = pytest.importorskip("pyarrow")
    features = arrow.array([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]], arrow.list_(arrow.float32(), 2))
    struct = arrow.array([{"bytes": photo(10 * n), "path": "x"} for n in range(3)])
    table(tmp_path / "0.parquet", f=features, image=struct, captions=[["a", "b"], ["c"], ["d"]])
    (batch,) = made(tmp_path, shuffle=False)
    assert batch.image[:, 0, 0, 0].tolist() == [0, 10, 20]
    assert batch.text == (("a", "b"), ("c",), ("d",))
    (batch,) = made(tmp_path, image="f", shuffle=False)
    assert batch.image.tolist() == [[1, 2], [3, 4], [5, 6]]
    with pytest.raises(
        InputError, match=r"0\.parquet: no column for image; expected nothing.*it has f, image, captions"
    ):
        list(made(tmp_path, image="nothing"))
    table(tmp_path / "1.parquet", f=[[1.0], [2.0]], image=[b"no photo"] * 2, captions=["a", "b"])
    with pytest.raises(InputError, match=r"1\.parquet: row 0: not a photo"):
        list(made(tmp_path / "1.parquet", shuffle=False))
    with pytest.raises(InputError, match=r"1\.parquet: row 0 has float64 \(1,\), .*0\.parquet: row 0 float32 \(2,\)"):
        list(made(tmp_path, image="f", batch=9, shuffle=False))
    for message, columns in {
        "lists of 1 and of 2 numbers": {"image": [[1.0], [2.0, 3.0]]},
        "has 1 missing values": {"image": [[1.0], None]},
        r"is bool, expected bytes of photos": {"image": [True, False]},
    }.items():
        table(tmp_path / "2.parquet", captions=["a", "b"], **columns)
        with pytest.raises(InputError, match=rf"2\.parquet: column image, rows from 0 on, .*{message}"):
            list(made(tmp_path / "2.parquet", shuffle=False))
    damaged = (tmp_path / "0.parquet").read_bytes()
    (tmp_path / "0.parquet").write_bytes(damaged[:4] + bytes(200) + damaged[204:])
    with pytest.raises(InputError, match=r"0\.parquet: damaged"):
        list(made(tmp_path / "0.parquet"))
    (tmp_path / "0.parquet").write_bytes(b"PAR1")
    with pytest.raises(InputError, match=r"0\.parquet: damaged, or no Parquet file"):
        list(made(tmp_path / "0.parquet"))


def test_there_may_be_more_files_than_can_be_open(tmp_path):
    arrow = pytest.importorskip("pyarrow")
    import resource

    from pyarrow import parquet

    for n in range(60):
        parquet.write_table(
            arrow.table({"image": [[float(n)]] * 3, "text": [f"{n}"] * 3}), tmp_path / f"{n:02}.parquet"
        )
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 20, limits[1]))
    try:
        for buffer in (2, 16, 500):
            ranks = [list(stream(tmp_path, batch=2, buffer=buffer, rank=rank, world=2)) for rank in (0, 1)]
            found = [int(caption) for batches in ranks for batch in batches for (caption,) in batch.text]
            assert sorted(found) == sorted([*range(60)] * 3)
            assert all(b.image[:, 0].tolist() == [float(c) for (c,) in b.text] for batches in ranks for b in batches)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_a_caption_that_is_missing_in_a_list_and_columns_of_one_name_are_named(tmp_path):
    arrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    path = tmp_path / "pairs.parquet"
    parquet.write_table(arrow.table({"image": [[1.0], [2.0]], "captions": [["a", None], ["b"]]}), path)
    with pytest.raises(InputError, match="row 0 has an empty caption"):
        list(stream(path, batch=2))
    (batch,) = stream(path, batch=2, broken="skip")
    assert batch.text == (("b",),) and batch.image.tolist() == [[2.0]]
    columns = [arrow.array([[1.0]]), arrow.array(["a"]), arrow.array(["b"])]
    parquet.write_table(arrow.table(columns, names=["image", "text", "text"]), path)
    with pytest.raises(InputError, match="2 columns are named text, expected one"):
        list(stream(path, batch=2))


def test_what_is_no_stream_is_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    for path, message in {
        tmp_path / "none": "none: not found",
        tmp_path / "*.tar": "*.tar: no file matches",
        tmp_path / "empty": "expected .tar or .parquet files in it, found none",
        tmp_path: "expected .tar or .parquet files in it, found none",
    }.items():
        with pytest.raises(InputError, match=re.escape(message)):
            made(path)
    write_tar(tmp_path / "a.tar", [])
    (tmp_path / "b.parquet").write_bytes(b"")
    with pytest.raises(InputError, match=r"of one kind, got \.parquet, \.tar"):
        made(tmp_path)
    for options, message in (
        ({"rank": 2, "world": 2}, "rank must be below world, got 2 of 2"),
        ({"buffer": 0}, "buffer must be"),
        ({"broken": "keep"}, "broken must be refuse or skip"),
    ):
        with pytest.raises(InputError, match=message):
            made(tmp_path / "a.tar", **options)


def test_a_column_of_codes_becomes_an_index_block_by_block(tmp_path):
    arrow = pytest.importorskip("pyarrow")
    codes = np.random.default_rng(0).integers(0, 256, (700, 8), dtype=np.uint8)
    lists = arrow.FixedSizeListArray.from_arrays(arrow.array(codes[:400].reshape(-1)), 8)
    table(tmp_path / "0.parquet", codes=lists)
    table(tmp_path / "1.parquet", codes=arrow.array([row.tobytes() for row in codes[400:]], arrow.binary(8)))
    blocks = list(stream_column(tmp_path, "codes", rows=100))
    assert max(map(len, blocks)) < 400
    HammingIndex.build(tmp_path / "index", iter(blocks))
    assert (HammingIndex.load(tmp_path / "index").codes == codes).all()
    table(tmp_path / "2.parquet", codes=[[1, 2]])
    with pytest.raises(InputError, match=r"2\.parquet: column codes has 2 numbers, that of .*0\.parquet 8"):
        list(stream_column(tmp_path, "codes"))
    with pytest.raises(InputError, match=r"no column for the values; expected none.*it has codes"):
        list(stream_column(tmp_path, "none"))
