"""MATLAB's files of every version: scipy and h5py write them, scipy's reader is the oracle for what they hold."""

import struct
import subprocess
import sys
import zlib

import h5py
import numpy as np
import pytest
import scipy.io
import scipy.sparse
from saving import save_matlab73

from cmr_fast.data import load
from cmr_fast.data.readers import read_arrays
from cmr_fast.errors import InputError

RANDOM = np.random.default_rng(0)
CAPTIONS = [f"a photo, number {i}" for i in range(8)]


def read(file):
    return {key: call() for key, call in read_arrays(file).items()}


def cells(*items):
    made = np.empty((len(items), 1), dtype=object)
    made[:, 0] = items
    return made


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dtype", ["u1", "i1", "u2", "i2", "u4", "i4", "u8", "i8", "f4", "f8", "?"])
def test_numbers_of_every_type_are_as_scipy_reads_them(tmp_path, dtype, packed):
    shapes = {"row": (1, 7), "column": (3, 1), "one": (1, 1), "cube": (2, 3, 4), "none": (0, 5), "large": (60, 70)}
    arrays = {name: (RANDOM.random(shape) * 100).astype(dtype) for name, shape in shapes.items()}
    scipy.io.savemat(tmp_path / "a.mat", arrays, do_compression=packed)
    result, expected = read(tmp_path / "a.mat"), scipy.io.loadmat(tmp_path / "a.mat")
    for name in shapes:
        assert result[name].dtype == expected[name].dtype and np.array_equal(result[name], expected[name])


@pytest.mark.parametrize("dtype", ["f8", "f4", "i4", "i2", "u2", "u1"])
def test_version_4(tmp_path, dtype):
    matrix = (RANDOM.random((5, 3)) * 100).astype(dtype)
    sparse = scipy.sparse.csc_matrix(np.array([[0, 2.5, 0], [1, 0, 0]]))
    scipy.io.savemat(tmp_path / "a.mat", {"x": matrix, "s": sparse, "names": ["cat", "horse"]}, format="4")
    result = read(tmp_path / "a.mat")
    assert result["x"].dtype == dtype and np.array_equal(result["x"], matrix)
    assert np.array_equal(result["s"], sparse.toarray())
    assert result["names"].tolist() == ["cat", "horse"]


def test_a_file_of_version_4_in_the_other_byte_order(tmp_path):
    head = struct.pack(">5i", 1000, 2, 3, 0, 2)
    (tmp_path / "a.mat").write_bytes(head + b"x\0" + np.arange(6.0).astype(">f8").tobytes())
    assert read(tmp_path / "a.mat")["x"].tolist() == [[0, 2, 4], [1, 3, 5]]


def element(kind, content, order="<"):
    return struct.pack(order + "II", kind, len(content)) + content + b"\0" * (-len(content) % 8)


def matrix(kind, name, shape, *parts, order="<"):
    sizes = [] if shape is None else [element(5, struct.pack(f"{order}{len(shape)}i", *shape), order)]
    head = [element(6, struct.pack(order + "II", kind, 0), order), *sizes, element(1, name.encode(), order)]
    return element(14, b"".join([*head, *parts]), order)


def opaque(name, kind):
    """As MATLAB writes a string, table or datetime: without dimensions."""
    return matrix(
        17, name, None, element(1, b"MCOS"), element(1, kind.encode()), matrix(13, "", (1, 1), element(6, b""))
    )


def packed(variable):
    content = zlib.compress(variable)
    return struct.pack("<II", 15, len(content)) + content


def header(order="<"):
    return b"MATLAB 5.0 MAT-file".ljust(124) + (b"\x00\x01IM" if order == "<" else b"\x01\x00MI")


def test_version_5_in_the_other_byte_order(tmp_path):
    numbers = matrix(6, "x", (2, 3), element(9, np.arange(6.0).astype(">f8").tobytes(), ">"), order=">")
    text = matrix(4, "t", (1, 2), element(4, "éa".encode("utf-16-be"), ">"), order=">")
    (tmp_path / "a.mat").write_bytes(header(">") + numbers + text)
    result = read(tmp_path / "a.mat")
    assert result["x"].tolist() == [[0, 2, 4], [1, 3, 5]] and result["t"].tolist() == ["éa"]


KINDS = {
    "string": "cellstr",
    "categorical": "cellstr",
    "table": "table2array",
    "datetime": "datenum",
    "Thing": "numbers",
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", ["plain", "packed", "7.3"])
def test_an_object_beside_the_numbers_is_refused_only_when_it_is_asked_for(tmp_path, kind, form):
    file = tmp_path / "a.mat"
    arrays = {"image": RANDOM.random((8, 3)), "text": RANDOM.random((8, 2)), "label": np.arange(8.0)[:, None] % 2}
    if form == "7.3":
        save_matlab73(file, arrays)
        with h5py.File(file, "r+") as opened:
            opened["notes"] = np.array([[0xDD000000, 2, 1, 1, 1, 1]], dtype=np.uint32)
            opened["notes"].attrs.update({"MATLAB_class": np.bytes_(kind), "MATLAB_object_decode": np.int32(3)})
    else:
        scipy.io.savemat(file, arrays)
        objects = opaque("notes", kind), matrix(13, "", (1, 8), element(2, b"12345678"))
        file.write_bytes(file.read_bytes() + b"".join(packed(o) if form == "packed" else o for o in objects))
    assert len(load(file).train) and set(read_arrays(file)) == {*arrays, "notes"}
    with pytest.raises(
        InputError, match=rf"a\.mat: notes is a MATLAB {kind}, which is not read; .* save {KINDS[kind]}"
    ):
        read(file)


def mat73(file, write):
    """As MATLAB does, with `write` to fill the file."""
    save_matlab73(file, {})
    with h5py.File(file, "r+") as opened:
        write(opened)


def put(place, name, value, kind):
    place[name] = value
    place[name].attrs["MATLAB_class"] = np.bytes_(kind)
    return place[name]


def put_text(place, name, text):
    return put(place, name, np.frombuffer(text.encode("utf-16-le"), "<u2")[:, None], "char")


def put_cells(opened, name, texts, shape):
    refs = opened.require_group("#refs#")
    made = [put_text(refs, f"{name}{i}", text).ref for i, text in enumerate(texts)]
    array = np.array(made, dtype=h5py.ref_dtype).reshape(shape, order="F")
    return put(opened, name, array.T, "cell")


@pytest.mark.parametrize("version", ["5", "7.3"])
def test_text_is_text(tmp_path, version):
    file = tmp_path / "a.mat"
    rows, words = ["cat  ", "horse", "élan "], ["ein", "Würfel 🎲", ""]
    if version == "5":
        scipy.io.savemat(file, {"rows": rows, "row": "one text ", "cells": cells(*words), "none": ""})
    else:

        def write(opened):
            codes = np.array([[ord(letter) for letter in row] for row in rows], dtype=np.uint16)
            put(opened, "rows", codes.T, "char")
            put_text(opened, "row", "one text ")
            refs = opened.create_group("#refs#")
            made = [put_text(refs, f"c{i}", text).ref for i, text in enumerate(words[:2])]
            empty = put(refs, "c2", np.array([0, 0], np.uint64), "char")
            empty.attrs["MATLAB_empty"] = np.uint8(1)
            put(opened, "cells", np.array([[*made, empty.ref]], dtype=h5py.ref_dtype), "cell")
            put(opened, "none", np.array([0, 0], np.uint64), "char").attrs["MATLAB_empty"] = np.uint8(1)

        mat73(file, write)
    result = read(file)
    assert result["rows"].tolist() == ["cat", "horse", "élan"]
    assert result["row"].tolist() == ["one text"] and result["none"].tolist() in ([""], [])
    assert result["cells"].tolist() == words


@pytest.mark.parametrize("version", ["5", "7.3"])
@pytest.mark.parametrize("shape", [(8, 1), (1, 8)])
def test_captions_in_a_cell_array(tmp_path, version, shape):
    file = tmp_path / "a.mat"
    image, label = RANDOM.random((8, 3)), np.arange(8.0)[:, None] % 2
    if version == "5":
        scipy.io.savemat(file, {"image": image, "label": label, "text": cells(*CAPTIONS).reshape(shape)})
    else:

        def write(opened):
            opened["image"], opened["label"] = image.T, label.T
            put_cells(opened, "text", CAPTIONS, shape)

        mat73(file, write)
    data = load(file)
    whole = dict(zip(map(tuple, np.float32(image).tolist()), CAPTIONS, strict=True))
    assert [texts for texts in data.database.text] == [(whole[tuple(x)],) for x in data.database.image.tolist()]


def test_several_captions_a_cell_and_cells_of_numbers(tmp_path):
    several = cells(cells("a", "b"), cells("c"), np.array(["d"]))
    table = np.array([["a", "b"], ["c", "d"], ["e", "f"]], dtype=object)
    numbers = cells(np.arange(2.0), np.arange(2.0) + 5)
    mixed = cells("a", np.arange(2.0))
    scipy.io.savemat(tmp_path / "a.mat", {"several": several, "table": table, "numbers": numbers, "mixed": mixed})
    result = read(tmp_path / "a.mat")
    assert result["several"].tolist() == [["a", "b"], ["c", ""], ["d", ""]]
    assert result["table"].tolist() == table.tolist()
    assert np.array_equal(np.array(result["numbers"]).reshape(2, 2), [[0, 1], [5, 6]])
    assert len(result["mixed"]) == 2


def splits(base=1):
    sizes = {"tr": 12, "te": 8}
    return {
        f"{role}_{split}": value
        for split, n in sizes.items()
        for role, value in (
            ("I", RANDOM.random((n, 5))),
            ("T", RANDOM.random((n, 4))),
            ("L", (np.arange(n) % 3 + base)[:, None].astype(float)),
        )
    }


@pytest.mark.parametrize("version", ["5", "7.3"])
@pytest.mark.parametrize("beside", [False, True])
@pytest.mark.parametrize("deep", [False, True])
def test_arrays_in_a_struct(tmp_path, version, beside, deep):
    arrays = splits()
    other = {"seed": np.ones((1, 1))} if beside else {}
    file = tmp_path / "a.mat"
    if version == "5":
        scipy.io.savemat(file, {"data": {"inner": arrays} if deep else arrays} | other)
    else:
        path = "data/inner/" if deep else "data/"
        mat73(file, lambda opened: opened.update({path + k: v.T for k, v in arrays.items()} | other))
    data = load(file)
    assert np.array_equal(data.train.image, np.float32(arrays["I_tr"])) and len(data.query) == 8


@pytest.mark.parametrize("version", ["5", "7.3"])
@pytest.mark.parametrize("words", [("train", "test"), ("train", "query"), ("Training", "Testing")])
def test_structs_and_groups_by_the_names_of_splits(tmp_path, version, words):
    arrays = splits()
    names = {"image": "I", "text": "T", "labels": "L"}
    made = {w: {n: arrays[f"{r}_{s}"] for n, r in names.items()} for w, s in zip(words, ("tr", "te"), strict=True)}
    file = tmp_path / "a.mat"
    if version == "5":
        scipy.io.savemat(file, made)
    else:
        mat73(file, lambda o: o.update({f"{w}/{n}": v.T for w, parts in made.items() for n, v in parts.items()}))
    data = load(file)
    assert (len(data.train), len(data.query), data.train.labels[:4].tolist()) == (12, 8, [0, 1, 2, 0])


@pytest.mark.parametrize("name", ["data", "d"])
def test_two_views_and_labels_in_a_struct(tmp_path, name):
    views = {"X1": RANDOM.random((40, 5)), "X2": RANDOM.random((40, 4)), "Y": np.arange(40.0)[:, None] % 3 + 1}
    scipy.io.savemat(tmp_path / "a.mat", {name: views})
    data = load(tmp_path / "a.mat")
    assert (data.image_dim, data.text_dim, data.num_classes) == (5, 4, 3)


def test_an_array_of_structs_is_a_field_over_all(tmp_path):
    rows = np.zeros((1, 8), dtype=[("image", object), ("text", object), ("label", object)])
    for i, caption in enumerate(CAPTIONS):
        rows[0, i] = (np.full((1, 3), float(i)), caption, float(i % 2))
    scipy.io.savemat(tmp_path / "a.mat", {"items": rows})
    result = read(tmp_path / "a.mat")
    assert result["text"].tolist() == CAPTIONS
    assert np.array(result["image"]).reshape(8, 3)[5].tolist() == [5, 5, 5]


def test_names_that_would_be_the_same_keep_their_groups(tmp_path):
    scipy.io.savemat(tmp_path / "a.mat", {"a": {"x": np.ones((2, 2))}, "b": {"x": np.zeros((2, 2)), "y": np.ones(3)}})
    assert set(read(tmp_path / "a.mat")) == {"a_x", "b_x", "y"}


@pytest.mark.parametrize("version", ["5", "7.3"])
def test_a_split_of_empty_arrays_is_said_to_be_empty(tmp_path, version):
    arrays, file = splits(), tmp_path / "a.mat"
    names = ("I_db", "T_db", "L_db")
    if version == "5":
        scipy.io.savemat(file, arrays | {name: np.zeros((0, 0)) for name in names})
    else:

        def write(opened):
            opened.update({key: value.T for key, value in arrays.items()})
            for name in names:
                put(opened, name, np.zeros(2, "u8"), "double").attrs["MATLAB_empty"] = np.uint8(1)

        mat73(file, write)
    with pytest.raises(InputError, match=r"the database split is empty.*I_db is \(0, 0\)"):
        load(file)


@pytest.mark.parametrize("offset", [512, 1024, 4096])
@pytest.mark.parametrize(
    "head", [b"MATLAB 7.3 MAT-file, Platform", b"MATLAB 7.4 something", b"written by another program"]
)
def test_hdf5_behind_a_block_of_any_size_under_any_words(tmp_path, offset, head):
    arrays = splits()
    with h5py.File(tmp_path / "a.mat", "w", userblock_size=offset) as opened:
        for key, value in arrays.items():
            put(opened, key, value.T, "double")
    with open(tmp_path / "a.mat", "r+b") as stream:
        stream.write(head.ljust(128))
    assert np.array_equal(read(tmp_path / "a.mat")["I_tr"], arrays["I_tr"])


def test_complex_numbers_and_functions_are_refused_by_name(tmp_path):
    scipy.io.savemat(tmp_path / "a.mat", {"z": np.ones((2, 2)) * 1j})
    with pytest.raises(InputError, match="z is a MATLAB complex array"):
        read(tmp_path / "a.mat")


def zoo(folder):
    """Small files of each kind, by what they are."""
    mixed = {
        "x": RANDOM.random((4, 3)),
        "s": scipy.sparse.csc_matrix(np.eye(4)),
        "t": ["ab", "cde"],
        "c": cells("a", np.arange(3)),
        "d": {"a": np.arange(4, dtype=np.uint8), "b": "text"},
    }
    scipy.io.savemat(folder / "v5.mat", mixed)
    scipy.io.savemat(folder / "packed.mat", mixed, do_compression=True)
    scipy.io.savemat(folder / "v4.mat", {"x": mixed["x"], "s": mixed["s"], "t": mixed["t"]}, format="4")
    file = folder / "object.mat"
    file.write_bytes(header() + opaque("o", "string") + matrix(6, "x", (1, 2), element(9, np.ones(2).tobytes())))
    return sorted(folder.glob("*.mat"))


def survives(file):
    try:
        for call in read_arrays(file).values():
            try:
                call()
            except InputError as error:
                assert str(error).startswith(str(file))
    except InputError as error:
        assert str(error).startswith(str(file))


def test_damaged_files_are_read_or_refused_and_nothing_else(tmp_path):
    (tmp_path / "zoo").mkdir()
    random = np.random.default_rng(1)
    for file in zoo(tmp_path / "zoo"):
        whole = file.read_bytes()
        for cut in range(1, len(whole), max(1, len(whole) // 120)):
            file.write_bytes(whole[:cut])
            survives(file)
        for _ in range(250):
            damaged = bytearray(whole)
            for place in random.integers(0 if file.name == "v4.mat" else 124, len(whole), random.integers(1, 4)):
                damaged[place] = random.choice([0, 1, 255, 127, 128, int(random.integers(256))])
            file.write_bytes(damaged)
            survives(file)


@pytest.mark.parametrize(
    "variable",
    [
        matrix(6, "x", (2**31 - 1, 2**31 - 1), element(9, b"12345678")),
        matrix(6, "x", (-1, 2), element(9, b"12345678")),
        matrix(1, "x", (2**31 - 1, 2**31 - 1)),
        matrix(2, "x", (2**31 - 1, 1), element(5, struct.pack("<i", 8)), element(1, b"a" * 8)),
        matrix(2, "x", (1, 1), element(5, struct.pack("<i", 0)), element(1, b"a" * 8)),
        matrix(5, "x", (2**31 - 1, 2**31 - 1), element(5, b""), element(5, b"\0" * 8), element(9, b"")),
        matrix(
            5,
            "x",
            (2, 1),
            element(5, struct.pack("<i", 9)),
            element(5, struct.pack("<2i", 0, 1)),
            element(9, b"12345678"),
        ),
        matrix(4, "x", (5, 2**31 - 1), element(4, b"abcd")),
        matrix(6, "x", (1, 1), element(99, b"12345678")),
        struct.pack("<II", 14, 2**32 - 8),
        struct.pack("<II", 15, 8) + b"12345678",
        b"\x0e\0\0\0\x10\0\0",
        packed(matrix(6, "x", (1, 3), element(9, b"12345678"))),
        packed(b"\0" * 10**7),
    ],
)
def test_variables_that_lie_are_refused(tmp_path, variable):
    (tmp_path / "a.mat").write_bytes(header() + variable)
    with pytest.raises(InputError, match=r"a\.mat: begins like a MATLAB v5 file, but .* damaged or cut short"):
        read(tmp_path / "a.mat")


def test_cells_in_cells_without_end_are_refused(tmp_path):
    variable = matrix(6, "", (1, 1), element(9, b"12345678"))
    for _ in range(200):
        variable = matrix(1, "x", (1, 1), variable)
    (tmp_path / "a.mat").write_bytes(header() + variable)
    with pytest.raises(InputError, match="16 deep"):
        read(tmp_path / "a.mat")


def test_no_compiled_reader_sees_the_file(tmp_path):
    """scipy's reader can end the process on a damaged file; here one stands in that ends it on any."""
    script = (
        "import os, sys, scipy.io, cmr_fast.data\n"
        "for name in ('loadmat', 'whosmat'): setattr(scipy.io, name, lambda *a, **k: os._exit(9))\n"
        "try: cmr_fast.data.load(sys.argv[1])\n"
        "except cmr_fast.data.catalogue.InputError as error: print(error)\n"
    )
    scipy.io.savemat(tmp_path / "a.mat", splits())
    for damage in (False, True):
        if damage:
            whole = (tmp_path / "a.mat").read_bytes()
            (tmp_path / "a.mat").write_bytes(whole[: len(whole) // 2])
        run = subprocess.run([sys.executable, "-c", script, tmp_path / "a.mat"], capture_output=True, text=True)
        assert run.returncode == 0, run.stderr
        assert ("damaged or cut short" in run.stdout) == damage


def test_groups_that_hold_each_other_are_walked_once(tmp_path):
    with h5py.File(tmp_path / "a.h5", "w") as opened:
        opened["a/x"] = np.eye(2)
        opened["a/b"] = opened["/"]
        opened["c"] = opened["a"]
    assert all(np.array_equal(value, np.eye(2)) for value in read(tmp_path / "a.h5").values())
