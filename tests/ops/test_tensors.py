"""What every op does with what comes in and goes out; and a lint: no tensor takes torch's defaults."""

import ast
from pathlib import Path

import numpy as np
import pytest
import torch

from cmr_fast import ops
from cmr_fast.errors import InputError
from cmr_fast.ops import _tensors
from cmr_fast.ops.labels import share_bit, share_label

MAKERS = {
    *("arange", "empty", "empty_strided", "eye", "full", "linspace", "logspace", "ones", "rand", "randint", "randn"),
    *("randperm", "scalar_tensor", "tensor", "zeros"),
}
FOLDER = Path(ops.__file__).parent


def calls(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            yield from [node] if ast.unparse(node.func.value) == "torch" else []


def test_every_tensor_names_its_device_and_dtype():
    """torch.set_default_device and set_default_dtype must not reach inside an op: native code is given addresses."""
    wrong = [
        f"{path.relative_to(FOLDER)}:{node.lineno} torch.{node.func.attr} without {name}="
        for path in sorted(FOLDER.rglob("*.py"))
        for node in calls(path)
        for name in ("device", "dtype")
        if node.func.attr in MAKERS and name not in {keyword.arg for keyword in node.keywords}
    ]
    assert not wrong, "\n".join(wrong)


def test_the_lint_sees_what_it_should(tmp_path):
    path = tmp_path / "op.py"
    path.write_text("import torch\ndef f(x):\n    return torch.zeros(3, dtype=x.dtype)\n")
    assert [node.func.attr for node in calls(path)] == ["zeros"]


@pytest.mark.parametrize("bad", [None, "x", [1.0], object(), torch.eye(3).to_sparse(), np.array(["a"])])
def test_what_is_no_tensor_is_refused_by_name(bad):
    with pytest.raises(InputError, match=r"^codes must be"):
        _tensors.as_tensor(bad, "codes")


def test_read_only_memory_is_shared():
    x = np.arange(6, dtype=np.uint8).reshape(2, 3)
    x.flags.writeable = False
    tensor, was_numpy = _tensors.as_tensor(x, "x")
    assert was_numpy and tensor.data_ptr() == x.ctypes.data and np.array_equal(tensor.numpy(), x)


def test_labels_packed_or_not_say_the_same():
    rng = np.random.default_rng(0)
    query, database = (rng.random((n, 11)) < 0.2 for n in (5, 40))
    want = (query[:, None] & database).any(2)
    assert np.array_equal(share_label(*(torch.from_numpy(x) for x in (query, database))).numpy(), want)
    packed = (ops.pack_codes(torch.from_numpy(x)) for x in (query, database))
    assert np.array_equal(share_bit(*packed).numpy(), want)
    ids = torch.tensor([1, 2]), torch.tensor([2, 2, 1])
    assert share_bit(*ids).tolist() == share_label(*ids).tolist() == [[False, False, True], [True, True, False]]
