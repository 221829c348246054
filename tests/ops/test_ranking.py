"""ranking against a sort query by query: every instruction set, the torch path, odd shapes, ties, labels, threads."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ways import ISAS, NATIVE

import cmr_fast as cf
from cmr_fast.ops import _reference, pack_codes, ranking

CUTS = ("rank", "relevant", "hits")


def labels(rng, n, classes, share):
    return pack_codes(rng.random((n, classes)) < share)


def problem(seed, queries, size, nbytes, classes=7, share=0.15, values=256):
    """Codes of few byte values tie often; `classes` None makes class ids. The last query has nothing to find."""
    rng = np.random.default_rng(seed)
    q, db = (rng.integers(0, values, (n, nbytes), dtype=np.uint8) for n in (queries, size))
    if classes is None:
        ql, dl = (rng.integers(-3, 3, n).astype(np.int32) for n in (queries, size))
        ql[-1:] = 100
    else:
        ql, dl = labels(rng, queries, classes, share), labels(rng, size, classes, share)
        ql[-1:] = 0
    return q, db, ql, dl


def assert_ranking(q, db, ql, dl, partners=None, **options):
    want = _reference.ranking(q, db, ql, dl, partners=partners, **options)
    got = ranking(q, db, ql, dl, curves=True, partners=partners, threads=2, **options)
    for name in ("items", "relevant", "hits", "first", "hit_steps") + (
        ("tied_before",) if partners is not None else ()
    ):
        value = getattr(got, name)
        assert value.dtype == np.int64
        np.testing.assert_array_equal(value, want[name], err_msg=name)
    for name in ("sums", "recall_steps"):
        np.testing.assert_allclose(getattr(got, name), want[name], rtol=1e-13, atol=1e-13, err_msg=name)


# single bytes to 512; one word, the specialised word counts, the general one; more than 255 values of 2 d + relevant
@pytest.mark.parametrize("nbytes", [1, 2, 3, 4, 5, 8, 9, 16, 20, 32, 33, 64, 512])
@pytest.mark.parametrize("values", [256, 2])
def test_equals_a_sort(run, nbytes, values):
    for size in (1, 2, 63, 64, 65, 300):
        q, db, ql, dl = problem(size, 6, size, nbytes, values=values)
        partners = np.random.default_rng(0).integers(0, size, 6)
        assert_ranking(q, db, ql, dl, partners=partners)


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("k", [None, 1, 7, 40, 64, 100, 10**9])
def test_cuts(run, cut, k):
    assert_ranking(*problem(1, 9, 150, 1), k=k, cut=cut)


@pytest.mark.parametrize("classes", [1, 8, 9, 24, 31, 32, 33, 64, 80, 300, None])
def test_labels_of_any_width_and_class_ids(run, classes):
    assert_ranking(*problem(2, 5, 200, 8, classes, share=1.5 / ((classes or 0) + 3)))


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_nothing_and_everything_relevant(run, share):
    q, db, _, _ = problem(3, 4, 500, 2)
    rng = np.random.default_rng(3)
    assert_ranking(q, db, labels(rng, 4, 5, share), labels(rng, 500, 5, share))


def test_no_codes_and_no_queries(run):
    q, db, ql, dl = problem(4, 3, 5, 8)
    empty = ranking(q, db[:0], ql, dl[:0], curves=True)
    assert empty.items.sum() == 0 and (empty.sums == 0).all() and (empty.first == 0).all() and len(empty.hit_steps) == 0
    none = ranking(q[:0], db, ql[:0], dl, curves=True)
    assert none.items.shape == (0, 65) and len(none.sums) == 0 and (none.hit_steps == 0).all()


@pytest.mark.parametrize("kind", ["random", "one distance", "far apart", "sorted"])
def test_many_chunks(run, kind):
    """Several chunks, the last one short; extremes of the distances in one chunk; runs that cross words and chunks."""
    q, db, ql, dl = problem(5, 3, 40_001, 32, share=0.3)
    if kind == "one distance":
        db[:] = 77
    elif kind == "far apart":
        db[::2], db[1::2] = q[0], ~q[0]
    elif kind == "sorted":
        db = db[np.argsort(_reference.hamming_distances(q[:1], db)[0])]
    assert_ranking(q, db, ql, dl, partners=np.array([0, 16_384, 40_000]))


def test_histograms_alone(run):
    q, db, ql, dl = problem(6, 5, 20_000, 8)
    whole, part = ranking(q, db, ql, dl), ranking(q, db, ql, dl, order=False)
    np.testing.assert_array_equal(whole.items, part.items)
    np.testing.assert_array_equal(whole.relevant, part.relevant)
    assert [len(x) for x in part[2:]] == [0] * 6 and [len(x) for x in whole[5:]] == [0] * 3


def test_same_bits_on_every_instruction_set_and_number_of_threads(monkeypatch):
    """Sums of floats, too: their order is fixed."""
    q, db, ql, dl = problem(7, 300, 20_000, 8, share=0.2)
    results = []
    for isa in ISAS:
        monkeypatch.setenv("CMR_FAST_ISA", isa)
        results += [ranking(q, db, ql, dl, curves=True, threads=threads) for threads in (1, 2, 7)]
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            np.testing.assert_array_equal(a, b)


@given(
    nbytes=st.integers(1, 40),
    size=st.integers(0, 300),
    queries=st.integers(0, 20),
    values=st.integers(1, 256),
    classes=st.one_of(st.none(), st.integers(1, 70)),
    k=st.one_of(st.none(), st.integers(1, 320)),
    cut=st.sampled_from(CUTS),
    seed=st.integers(0, 2**32 - 1),
    isa=st.sampled_from(ISAS or ["scalar"]),
)
@settings(max_examples=120, deadline=None)
def test_arbitrary_shapes(nbytes, size, queries, values, classes, k, cut, seed, isa):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CMR_FAST_ISA", isa)
        assert_ranking(*problem(seed, queries, size, nbytes, classes, values=values), k=k, cut=cut)


@pytest.mark.parametrize("isa", ISAS)
def test_forced_instruction_set_is_the_one_that_ran(isa, monkeypatch):
    monkeypatch.setenv("CMR_FAST_ISA", isa)
    NATIVE.reset_last_isa()
    ranking(*problem(8, 3, 10, 8))
    assert NATIVE.last_isa() == isa
    assert cf.explain("ranking", np.zeros(1)).isa == isa


def test_inputs_that_are_not_contiguous():
    q, db, ql, dl = problem(9, 6, 200, 20)
    wide = np.repeat(dl, 2, axis=1)
    assert_ranking(q[::2, 3:11], db[::2, 3:11], ql[::2], wide[::2, ::2])


def test_torch_in_torch_out():
    arrays = problem(10, 6, 100, 8)
    tensors = [torch.from_numpy(x) for x in arrays]
    a, b = ranking(*arrays, curves=True), ranking(*tensors, curves=True)
    for x, y in zip(a, b, strict=True):
        assert isinstance(y, torch.Tensor) and np.array_equal(x, y.numpy())


def test_opcheck_and_compile():
    q, db, ql, dl = (torch.from_numpy(x) for x in problem(11, 4, 50, 8))
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    for backend, partners in (("cpp", torch.arange(4)), ("torch", None)):
        arguments = (q, db, ql, dl, partners, 10, "relevant", True, True, backend, 1)
        torch.library.opcheck(torch.ops.cmr_fast.ranking.default, arguments, test_utils=tests)

    def mean(q, db):
        found = ranking(q, db, ql, dl)
        return (found.sums / found.relevant.sum(dim=1).clamp(min=1)).mean()

    assert torch.compile(mean, fullgraph=True, backend="aot_eager")(q, db) == mean(q, db)


Q, DB, QL, DL = problem(12, 3, 9, 8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q_labels": QL.astype(np.int16)}, "q_labels must be uint8"),
        ({"db_labels": DL[:4]}, "db_labels must have a row for each of 9"),
        ({"db_labels": np.zeros(9, np.int32)}, "one kind and width"),
        ({"db_labels": np.zeros((9, 2), np.uint8)}, "one kind and width"),
        ({"db": DB[:, :4]}, "same bits"),
        ({"k": 0}, "k must be an integer of 1 or more, or None, got 0"),
        ({"k": 1.5}, "got 1.5"),
        ({"cut": "all"}, "rank, relevant, hits, got 'all'"),
        ({"curves": True, "order": False}, "need order=True"),
        ({"partners": np.array([0, 1])}, r"int64 \(3,\)"),
        ({"partners": np.array([0, 1, 9])}, "rows from 0 to 8"),
        ({"backend": "cuda"}, "cuda"),
    ],
)
def test_bad_input_is_refused_with_what_was_seen(change, message):
    with pytest.raises(cf.InputError, match=message):
        ranking(**({"q": Q, "db": DB, "q_labels": QL, "db_labels": DL} | change))


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_evaluation_of_a_large_database_takes_little_memory():
    """As large as NUS-WIDE's: what one thread takes above the inputs, all curves included."""
    script = (
        "import re, numpy as np, cmr_fast as cf\n"
        "rng = np.random.default_rng(0)\n"
        "q, db = (rng.integers(0, 256, (n, 8), dtype=np.uint8) for n in (300, 184_577))\n"
        "ql, dl = (rng.integers(0, 2, (n, 24), dtype=np.uint8) & rng.integers(0, 2, (n, 24), dtype=np.uint8)\n"
        "          for n in (300, 184_577))\n"
        "cf.evaluate_codes(q[:1], db[:100], ql[:1], dl[:100])\n"
        "def peak(what): return int(re.search(what + r':\\s+(\\d+)', open('/proc/self/status').read())[1]) / 1024\n"
        "open('/proc/self/clear_refs', 'w').write('5')\n"
        "before = peak('VmRSS')\n"
        "cf.evaluate_codes(q, db, ql, dl, threads=1)\n"
        "print(peak('VmHWM') - before)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300, check=True)
    assert float(done.stdout) < 100
