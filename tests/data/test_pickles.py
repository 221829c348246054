import builtins
import collections
import os
import pickle

import numpy as np
import pytest

from cmr_fast.data import load, pickles
from cmr_fast.errors import InputError


def dumped(tmp_path, value, protocol):
    file = tmp_path / "value.pkl"
    file.write_bytes(pickle.dumps(value, protocol=protocol))
    return pickles.load(file)


def loaded(tmp_path, content):
    file = tmp_path / "value.pkl"
    file.write_bytes(content)
    return pickles.load(file)


ARRAYS = [
    np.arange(6.0).reshape(2, 3),
    np.arange(6, dtype=">f4").reshape(2, 3),
    np.asfortranarray(np.arange(6, dtype=np.uint8).reshape(2, 3)),
    np.arange(12)[::-2],
    np.array(["ab", "c"]),
    np.array([b"ab", b"c"]),
    np.array([True, False]),
    np.zeros((0, 3), dtype=np.float32),
    np.array(5),
    np.float32(3),
    np.int64(-3),
]


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_plain_data_comes_back(tmp_path, protocol):
    for array in ARRAYS:
        found = dumped(tmp_path, array, protocol)
        assert np.asarray(found).dtype == array.dtype
        assert np.array_equal(found, array)
    shared = np.arange(3)
    value = {"a": [1, 2.5, "ü", None, True, b"", b"\xff", (1, (2,))], 7: {1, 2}, "o": collections.OrderedDict(x=shared)}
    found = dumped(tmp_path, [value, shared], protocol)
    assert found[0]["a"] == value["a"]
    assert found[0][7] == {1, 2}
    assert found[0]["o"]["x"].tolist() == found[1].tolist() == [0, 1, 2]
    ragged = np.array([np.arange(2), [1, 2, 3]], dtype=object)
    assert [list(row) for row in dumped(tmp_path, ragged, protocol)] == [[0, 1], [1, 2, 3]]
    grid = np.array([[1, "a"], [2, "b"]], dtype=object)
    assert dumped(tmp_path, grid, protocol) == [[1, "a"], [2, "b"]]


def test_pickles_of_python_2(tmp_path):
    # {"labels": numpy.array([1.0, 255.0]), "name": "caf\xe9"} in the byte strings that Python 2.7 writes
    text = (
        b"\x80\x02}q\x01(U\x06labelsq\x02cnumpy.core.multiarray\n_reconstruct\nq\x03cnumpy\nndarray\nq\x04K\x00\x85"
        b"U\x01b\x87Rq\x05(K\x01K\x02\x85cnumpy\ndtype\nq\x06U\x02f8K\x00K\x01\x87Rq\x07(K\x03U\x01<NNNJ\xff\xff\xff\xff"
        b"J\xff\xff\xff\xffK\x00tb\x89U\x10\x00\x00\x00\x00\x00\x00\xf0?\x00\x00\x00\x00\x00\xe0o@tbU\x04nameq\x08"
        b"U\x04caf\xe9q\x09u."
    )
    found = loaded(tmp_path, text)
    assert found["labels"].tolist() == [1, 255]
    assert found["name"] == "café"


class Call:
    """A value whose pickle calls `function` with `arguments` when it is loaded, then sets its state."""

    def __init__(self, function, *arguments, state=None):
        self.reduced = (function, arguments) if state is None else (function, arguments, state)

    def __reduce__(self):
        return self.reduced


@pytest.mark.parametrize(
    "call",
    [
        Call(os.system, "touch {file}"),
        Call(builtins.eval, "open('{file}', 'w')"),
        Call(builtins.exec, "open('{file}', 'w')"),
        Call(builtins.open, "{file}", "w"),
        Call(builtins.getattr, "{file}", "upper"),
        Call(np.save, "{file}", 1),
        Call(np.load, "{file}"),
    ],
)
@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_nothing_is_run(tmp_path, call, protocol):
    trace = tmp_path / "trace"
    function, arguments = call.reduced
    arguments = [a.format(file=trace) if isinstance(a, str) else a for a in arguments]
    content = pickle.dumps({"train_img": [Call(function, *arguments)]}, protocol=protocol)
    with pytest.raises(InputError, match=r"the pickle wants to use \w[\w.]+; .* nothing was run"):
        loaded(tmp_path, content)
    assert not trace.exists()
    with pytest.raises(InputError, match="nothing was run"):
        load(tmp_path / "value.pkl")


def test_names_with_dots_and_modules_are_refused(tmp_path):
    for module, name in (("numpy", "ndarray.tofile"), ("numpy", "core.multiarray._reconstruct"), ("os", "path.join")):
        content = (
            b"\x80\x04\x8c" + bytes([len(module)]) + module.encode() + b"\x8c" + bytes([len(name)]) + name.encode()
        )
        with pytest.raises(InputError, match="wants to use"):
            loaded(tmp_path, content + b"\x93.")
    with pytest.raises(InputError):
        loaded(tmp_path, b"\x80\x02Pid\n.")


ALLOWED = [(b"numpy", b"dtype"), (b"numpy", b"ndarray"), (b"_codecs", b"encode"), (b"builtins", b"set")]
ALLOWED += [(b"numpy.core.multiarray", b"_reconstruct"), (b"numpy.core.multiarray", b"scalar")]


@pytest.mark.parametrize(("module", "name"), ALLOWED)
def test_what_is_allowed_cannot_be_changed(tmp_path, module, name):
    found = b"\x80\x02c" + module + b"\n" + name + b"\n"
    before = dict(vars(pickles._ALLOWED[module.decode(), name.decode()]))
    for state in (b"N}U\x07__new__Nsq\x01\x86b.", b"}U\x07__new__Nsb.", b"N}U\x0c__setstate__Ns\x86b."):
        with pytest.raises(InputError):
            loaded(tmp_path, found + state)
    assert dict(vars(pickles._ALLOWED[module.decode(), name.decode()])) == before
    assert dumped(tmp_path, np.arange(3), 2).tolist() == [0, 1, 2]


def array_state(shape, code, content, order="<"):
    """The pickle of an array with any shape, dtype and contents."""
    dtype = Call(np.dtype, code, False, True, state=(3, order, None, None, None, -1, -1, 0))
    return Call(np._core.multiarray._reconstruct, np.ndarray, (0,), b"b", state=(1, shape, dtype, False, content))


@pytest.mark.parametrize(
    ("shape", "code", "content"),
    [
        ((1 << 40,), "f8", b"12345678"),
        ((2,), "f8", b"12345678"),
        ((-1,), "f8", b"12345678"),
        ((1,), "O", b"12345678"),
        ((3,), "O", [1]),
        ((1,), "f8,f8", b"0123456789abcdef"),
        ((1,), "(2,)f8", b"0123456789abcdef"),
        ((1,), "V8", b"12345678"),
        ((1,), "M8[s]", b"12345678"),
        ((1,), "nonsense", b"12345678"),
        ((1 << 62, 4, 0), "f8", "text"),
    ],
)
def test_arrays_that_lie_are_refused(tmp_path, shape, code, content):
    with pytest.raises(InputError, match=r"value\.pkl"):
        dumped(tmp_path, array_state(shape, code, content), 2)


def test_array_state_is_a_true_array_when_honest(tmp_path):
    assert dumped(tmp_path, array_state((1, 2), "i4", b"\x01\0\0\0\x02\0\0\0"), 2).tolist() == [[1, 2]]
    assert dumped(tmp_path, array_state((1, 2), "i4", b"\0\0\0\x01\0\0\0\x02", ">"), 2).tolist() == [[1, 2]]


def test_damaged(tmp_path):
    whole = pickle.dumps({"a": np.arange(100.0)}, protocol=2)
    for cut in range(0, len(whole), 7):
        with pytest.raises(InputError, match=r"value\.pkl: "):
            loaded(tmp_path, whole[:cut])
    for content in (b"not a pickle", b"\x80\x02r\xff\xff\xff\x7f.", b"\x80\x02(" * 9, b"\x80\x02cnumpy\nndarray\n."):
        with pytest.raises(InputError, match=r"value\.pkl: "):
            loaded(tmp_path, content)


def test_nesting_is_bounded_and_sharing_is_not_unfolded(tmp_path):
    loop = []
    loop.append(loop)
    with pytest.raises(InputError, match="8 deep"):
        dumped(tmp_path, loop, 2)
    many = np.arange(2)
    for _ in range(7):
        many = [many] * 1000
    assert len(dumped(tmp_path, many, 2)) == 1000


def test_objects_of_other_classes_are_refused(tmp_path):
    with pytest.raises(InputError, match=r"collections\.Counter"):
        dumped(tmp_path, collections.Counter("ab"), 2)
    with pytest.raises(InputError, match="keys of a dict must be text or numbers"):
        dumped(tmp_path, {(1, 2): 3}, 2)
