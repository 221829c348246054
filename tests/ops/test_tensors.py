"""What every op does with what comes in and goes out; and a lint: no tensor takes torch's defaults."""

import ast
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch

import cmr_fast as cf
from cmr_fast import losses, ops
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


HUGE = 10**400  # no float holds it; 10**5000 is not even printed by Python
ROWS, IDS = torch.randn(4, 3, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 0, 1, 1])
NUMBERS = {
    "margin": lambda n: ops.triplet_margin(ROWS, IDS, n),
    "scale": lambda n: ops.pairwise_nll(ROWS, ROWS, (IDS, IDS), scale=n),
    "reg": lambda n: ops.sinkhorn(ROWS.abs(), n),
    "beta": lambda n: ops.ipot(ROWS.abs(), n),
    "threshold": lambda n: cf.pack_codes(ROWS, threshold=n),
    "k": lambda n: cf.HammingIndex(8).search(np.zeros((1, 1), np.uint8), n),
    "threads": lambda n: cf.hamming_topk(np.zeros((1, 1), np.uint8), np.zeros((1, 1), np.uint8), 1, threads=n),
    "logit_scale": lambda n: losses.ClipLoss()(ROWS, ROWS, n),
    "kappa": lambda n: cf.attacks.CW(torch.nn.Flatten(), kappa=n),
    "eps": lambda n: cf.attacks.PGD(torch.nn.Flatten(), eps=n),
}


@pytest.mark.parametrize("name", NUMBERS)
def test_integers_that_no_float_holds(name):
    for number in (HUGE, -HUGE, 10**5000, Fraction(HUGE, 3)):
        with pytest.raises(InputError, match=rf"{name} must be .*got") as caught:
            NUMBERS[name](number)
        assert len(str(caught.value)) < 350
    assert ops.triplet_margin(ROWS, IDS, Fraction(1, 2)) == ops.triplet_margin(ROWS, IDS, 0.5)


TAKEN = {
    "pack_codes": cf.pack_codes,
    "info_nce": lambda x: cf.info_nce(x, x, 1.0),
    "sigmoid_loss": lambda x: ops.sigmoid_loss(x, x, 1.0),
    "js_critic": lambda x: ops.js_critic(x, x),
    "scale": lambda x: cf.info_nce(ROWS, ROWS, x[0, 0]),
    "positives": lambda x: cf.info_nce(ROWS[:3], ROWS[:3], 1.0, positives=x[:3]),
    "triplet_margin": lambda x: ops.triplet_margin(x, IDS, 0.2),
    "pairwise_nll": lambda x: ops.pairwise_nll(x, x, (IDS, IDS)),
    "sinkhorn": lambda x: ops.sinkhorn(x, 0.1),
    "ipot": lambda x: ops.ipot(x, 0.1),
    "pgd_step_": lambda x: ops.pgd_step_(x, x, x.clone(), alpha=0.1, eps=0.1),
    "ClipLoss": lambda x: losses.ClipLoss()(x, x, 1.0),
    "SigLipLoss": lambda x: losses.SigLipLoss()(x, x, 1.0),
    "logit_scale": lambda x: losses.ClipLoss()(ROWS, ROWS, x[0, 0]),
    "TripletMarginLoss": lambda x: losses.TripletMarginLoss()(x, IDS),
    "labels": lambda x: losses.TripletMarginLoss()(ROWS, x[:, 0]),
    "frobenius": losses.frobenius,
    "gradient_reversal": losses.gradient_reversal,
    "PGD": lambda x: cf.attacks.PGD(torch.nn.Flatten(), eps=0.1)(x, IDS),
}


@pytest.mark.parametrize("name", TAKEN)
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_floats_of_8_bits_are_named(name, dtype):
    with pytest.raises(InputError, match=r"must be float16, bfloat16, float32 or float64, got torch\.float8"):
        TAKEN[name](ROWS.to(dtype))


def test_meta_tensors_give_shapes_or_an_error():
    x, ids = ROWS.to("meta"), IDS.to("meta")
    codes = cf.pack_codes(x)
    assert codes.is_meta and codes.shape == (4, 1) and codes.dtype == torch.uint8
    assert cf.pack_codes(x > 0).is_meta and cf.hamming_topk(codes, codes, 2)[1].shape == (4, 2)
    for call in (
        lambda: cf.hamming_range(codes, codes, 2),
        lambda: cf.evaluate_codes(codes, codes, IDS, IDS),
        lambda: cf.evaluate_codes(cf.pack_codes(ROWS), cf.pack_codes(ROWS), ids, ids),
        lambda: cf.evaluate_embeddings(x, x, IDS, IDS),
        lambda: cf.HammingIndex(3).add(codes),
        lambda: cf.HammingIndex(3).search(codes, 1),
    ):
        with pytest.raises(InputError, match="must hold values, got torch"):
            call()
