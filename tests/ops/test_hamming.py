"""hamming ops against the naive oracles: every instruction set, the torch path, odd shapes, ties, threads."""

import concurrent.futures
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ways import ISAS, NATIVE

import cmr_fast as cf
from cmr_fast.errors import InputError
from cmr_fast.ops import _reference
from cmr_fast.ops._tensors import hits_room


def codes(rng, n, nbytes, kind="random"):
    x = rng.integers(0, 256, (n, nbytes), dtype=np.uint8)
    if kind == "tied":  # few different codes, far apart in the array
        x = x[rng.integers(0, max(1, min(n, 4)), n)] if n else x
    if kind == "equal":
        x[:] = 170
    return x


def assert_topk(q, db, k, **options):
    distances, indices = cf.hamming_topk(q, db, k, **options)
    expected = _reference.hamming_topk(q, db, k, options.get("bits") or 8 * db.shape[1])
    np.testing.assert_array_equal(distances, expected[0])
    np.testing.assert_array_equal(indices, expected[1])
    assert distances.dtype == np.int32 and indices.dtype == np.int64


def test_native_module_is_built():
    # without it everything would silently run on the torch path
    assert "scalar" in ISAS


def test_best_instruction_set_of_this_processor_is_offered_and_runs(monkeypatch):
    monkeypatch.delenv("CMR_FAST_ISA", raising=False)
    monkeypatch.delenv("CMR_FAST_BACKEND", raising=False)
    if not os.path.exists("/proc/cpuinfo"):
        pytest.skip("no /proc/cpuinfo to compare with")
    with open("/proc/cpuinfo") as text:
        flags = set(next((line for line in text if line.startswith(("flags", "Features"))), "").split())
    if {"avx512f", "avx512bw", "avx512_vpopcntdq"} <= flags:
        best = "avx512_vpopcntdq"
    elif {"avx512f", "avx512bw", "avx512dq", "avx512vl"} <= flags:
        best = "avx512bw"
    else:
        best = "avx2" if "avx2" in flags else "scalar"
    assert ISAS[0] == best
    x = np.zeros((3, 8), np.uint8)
    cf.hamming_topk(x, x, 1)
    assert NATIVE.last_isa() == best
    explanation = cf.explain("hamming_topk", x, x)
    assert (explanation.backend, explanation.isa) == ("cpp", best)


@pytest.mark.parametrize("isa", ISAS)
def test_forced_instruction_set_is_the_one_that_ran(isa, monkeypatch):
    monkeypatch.setenv("CMR_FAST_ISA", isa)
    x = np.zeros((3, 8), np.uint8)
    for call in (
        lambda: cf.hamming_topk(x, x, 1),
        lambda: cf.hamming_range(x, x, 1),
        lambda: cf.hamming_distances(x, x),
    ):
        NATIVE.reset_last_isa()
        call()
        assert NATIVE.last_isa() == isa
    assert cf.explain("hamming_topk", x).isa == isa


# 1 byte to 512 bytes; word sizes and the odd ones between them; each specialised word count and the general one
@pytest.mark.parametrize("nbytes", [1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 20, 24, 31, 32, 33, 64, 257, 512])
@pytest.mark.parametrize("kind", ["random", "tied", "equal"])
def test_topk_equals_stable_sort(run, nbytes, kind):
    rng = np.random.default_rng(nbytes)
    for n in (0, 1, 31, 32, 33, 257):
        db = codes(rng, n, nbytes, kind)
        q = np.concatenate([codes(rng, 9, nbytes), db[:2]])
        for k in (1, 5, n + 3):
            assert_topk(q, db, k)


@pytest.mark.parametrize("k", [1, 64, 1000, 20000])
def test_topk_over_many_tiles_and_compactions(run, k):
    rng = np.random.default_rng(k)
    db = codes(rng, 20000, 8)
    db[::3] = db[7]
    assert_topk(codes(rng, 3, 8), db, k)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("order", ["shuffled", "nearest last", "nearest first", "near ones where no sample looks"])
def test_topk_with_sampled_limits(isa, order, monkeypatch):
    """k and n large enough that limits come from a sample, on orders that mislead it."""
    monkeypatch.setenv("CMR_FAST_ISA", isa)
    rng = np.random.default_rng(0)
    db = codes(rng, 200_000, 4)
    q = codes(rng, 2, 4)
    ranks = np.argsort(_reference.hamming_distances(q[:1], db)[0], kind="stable")
    if order == "nearest last":
        db = db[ranks[::-1]]
    elif order == "nearest first":
        db = db[ranks]
    elif order == "near ones where no sample looks":
        db = np.concatenate([np.full((190_000, 4), ~q[0]), np.repeat(q[:1], 10_000, 0)])
    for k in (100, 3000):
        assert_topk(q, db, k, threads=1)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("share", [1, 2, 31, 32, 33, 40])
@pytest.mark.parametrize("nbytes", [1, 2, 3, 8, 9, 40])
def test_large_k_of_tied_and_random_codes(isa, nbytes, share, monkeypatch):
    monkeypatch.setenv("CMR_FAST_ISA", isa)
    rng = np.random.default_rng(share)
    q, n = codes(rng, 5, nbytes), 4096 + 200 + share
    for kind in ("random", "tied", "equal"):
        for threads in (1, 3):
            assert_topk(q, codes(rng, n, nbytes, kind), -(-n // share), threads=threads)


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_topk_and_range_do_not_depend_on_threads_or_splits(threads):
    rng = np.random.default_rng(3)
    db = codes(rng, 150_000, 3)  # 24 bits: many ties across the splits
    q = codes(rng, 3, 3)
    for k in (50, 4000, 60_000):
        assert_topk(q, db, k, threads=threads)
        assert_topk(q[:1], db, k, threads=threads)
    for got, expected in zip(
        cf.hamming_range(q, db, 5, threads=threads), _reference.hamming_range(q, db, 5), strict=True
    ):
        np.testing.assert_array_equal(got, expected)


@given(
    nbytes=st.integers(1, 40),
    n=st.integers(0, 300),
    nq=st.integers(0, 12),
    k=st.integers(1, 320),
    values=st.integers(1, 256),
    threads=st.integers(1, 3),
    seed=st.integers(0, 2**32 - 1),
    isa=st.sampled_from(ISAS or ["scalar"]),
)
@settings(max_examples=150, deadline=None)
def test_topk_range_and_table_on_arbitrary_shapes(nbytes, n, nq, k, values, threads, seed, isa):
    rng = np.random.default_rng(seed)
    q = rng.integers(0, values, (nq, nbytes), dtype=np.uint8)
    db = rng.integers(0, values, (n, nbytes), dtype=np.uint8)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CMR_FAST_ISA", isa)
        assert_topk(q, db, k, threads=threads)
        radius = int(rng.integers(0, 8 * nbytes + 20))
        for got, expected in zip(
            cf.hamming_range(q, db, radius, threads=threads), _reference.hamming_range(q, db, radius), strict=True
        ):
            np.testing.assert_array_equal(got, expected)
        np.testing.assert_array_equal(cf.hamming_distances(q, db), _reference.hamming_distances(q, db))


@pytest.mark.parametrize("nbytes", [1, 4, 6, 8, 16, 24, 32, 40])
def test_range_and_table(run, nbytes):
    rng = np.random.default_rng(nbytes)
    q, db = codes(rng, 9, nbytes), codes(rng, 333, nbytes)
    for radius in (0, 4 * nbytes - 1, 4 * nbytes, 8 * nbytes, 10**6):
        got = cf.hamming_range(q, db, radius)
        for a, b in zip(got, _reference.hamming_range(q, db, radius), strict=True):
            np.testing.assert_array_equal(a, b)
        assert [a.dtype for a in got] == [np.int64, np.int32, np.int64]
    np.testing.assert_array_equal(cf.hamming_distances(q, db), _reference.hamming_distances(q, db))


def test_agrees_with_faiss():
    faiss = pytest.importorskip("faiss")
    rng = np.random.default_rng(0)
    q, db = codes(rng, 20, 8), codes(rng, 5000, 8)
    index = faiss.IndexBinaryFlat(64)
    index.add(db)
    np.testing.assert_array_equal(cf.hamming_topk(q, db, 50)[0], index.search(q, 50)[0])


@pytest.mark.parametrize("radius", [0, 1, 20, 64, 65, 66])
@pytest.mark.parametrize("count", [0, 300])
@pytest.mark.parametrize("backend", ["cpp", "torch"])
def test_a_strict_radius_is_that_of_faiss(backend, count, radius):
    faiss = pytest.importorskip("faiss")
    rng = np.random.default_rng(radius)
    q, db = codes(rng, 5, 8), codes(rng, count, 8)
    if count:
        q[0], db[1] = db[0], ~q[1]
    index = faiss.IndexBinaryFlat(64)
    index.add(db)
    lims, near, found = index.range_search(q, radius)
    got = cf.hamming_range(q, db, radius, strict=True, backend=backend)
    own = cf.HammingIndex(64)
    own.add(db)
    for ours in (got, own.range_search(q, radius, strict=True)):
        np.testing.assert_array_equal(ours[0], lims)
        for i in range(len(q)):
            pairs = zip(*(x[lims[i] : lims[i + 1]].tolist() for x in (ours[2], ours[1])), strict=True)
            theirs = zip(*(x[lims[i] : lims[i + 1]].tolist() for x in (found, near)), strict=True)
            assert list(pairs) == sorted(theirs)
    if radius:
        for a, b in zip(got, cf.hamming_range(q, db, radius - 1, backend=backend), strict=True):
            np.testing.assert_array_equal(a, b)


def test_odd_bits_set_the_padding_distance():
    x = cf.pack_codes(np.eye(3, 13, dtype=bool))
    distances, indices = cf.hamming_topk(x, x, 5, bits=13)
    assert distances[0].tolist() == [0, 2, 2, 14, 14] and indices[0].tolist() == [0, 1, 2, -1, -1]


def test_inputs_that_are_not_contiguous_or_read_only():
    rng = np.random.default_rng(0)
    wide = codes(rng, 100, 20)
    q, db = wide[:5, 3:11], wide[::2, 3:11]
    assert_topk(q, db, 7)
    frozen = db.copy()
    frozen.flags.writeable = False
    assert_topk(q, frozen, 7)
    unaligned = np.frombuffer(bytes(1) + db.tobytes(), dtype=np.uint8, offset=1).reshape(db.shape)
    assert_topk(q, unaligned, 7)


def test_torch_in_torch_out():
    x = torch.randint(0, 256, (20, 8), dtype=torch.uint8)
    distances, indices = cf.hamming_topk(x, x, 3)
    assert isinstance(distances, torch.Tensor) and distances.dtype == torch.int32 and indices.dtype == torch.int64
    assert torch.equal(indices[:, 0], torch.arange(20))
    assert all(isinstance(t, torch.Tensor) for t in cf.hamming_range(x, x, 3))


def test_many_python_threads_at_once():
    rng = np.random.default_rng(0)
    db = codes(rng, 70_000, 8)
    queries = [codes(rng, 4, 8) for _ in range(12)]
    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        found = list(pool.map(lambda q: cf.hamming_topk(q, db, 10, threads=3), queries))
    for q, got in zip(queries, found, strict=True):
        np.testing.assert_array_equal(got[1], _reference.hamming_topk(q, db, 10, 64)[1])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_search_works_in_a_forked_child():
    script = (
        "import os, numpy as np, cmr_fast as cf\n"
        "x = np.arange(2_000_000 * 8, dtype=np.uint32).astype(np.uint8).reshape(-1, 8)\n"
        "first = cf.hamming_topk(x[:2], x, 5, threads=3)[1]\n"
        "child = os.fork()\n"
        "if child == 0:\n"
        "    os._exit(0 if (cf.hamming_topk(x[:2], x, 5, threads=3)[1] == first).all() else 1)\n"
        "raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))\n"
    )
    assert subprocess.run([sys.executable, "-c", script], timeout=120).returncode == 0


# --- packing


@pytest.mark.parametrize("bits", [1, 7, 8, 9, 64, 100, 4096])
@pytest.mark.parametrize("kind", [np.bool_, np.uint8, np.int64, np.float32, np.float64, np.float16])
def test_pack_and_unpack(bits, kind):
    rng = np.random.default_rng(bits)
    truth = rng.integers(0, 2, (5, bits)).astype(bool)
    truth[0, 0], truth[1, 0] = True, False
    x = (
        truth.astype(kind)
        if kind == np.bool_
        else (truth * 2 - 1).astype(kind)
        if kind != np.uint8
        else truth.astype(kind)
    )
    packed = cf.pack_codes(x)
    assert packed.dtype == np.uint8
    np.testing.assert_array_equal(packed, _reference.pack_codes(truth))
    np.testing.assert_array_equal(cf.unpack_codes(packed, bits), truth.astype(np.uint8))
    tensor = cf.pack_codes(torch.from_numpy(x))
    assert isinstance(tensor, torch.Tensor) and np.array_equal(tensor.numpy(), packed)


@pytest.mark.parametrize("kind", [np.uint8, np.int8, np.uint16, np.uint32, np.uint64, np.int64])
def test_integers_that_are_no_bits_are_refused(kind):
    """Codes packed already, say; bits {0, 1} of every integer type are packed."""
    bits = np.eye(8, dtype=kind)
    np.testing.assert_array_equal(cf.pack_codes(bits)[:, 0], 1 << np.arange(8))
    wrong = [bits * 2, np.full((3, 8), np.iinfo(kind).max, dtype=kind)] + (
        [bits * kind(-2)] if np.issubdtype(kind, np.signedinteger) else []
    )
    for x in wrong:
        with pytest.raises(cf.InputError, match=f"x must hold bits.*{np.dtype(kind).name}"):
            cf.pack_codes(x)
    with pytest.raises(cf.InputError, match="packed codes are used as they are"):
        cf.pack_codes(cf.pack_codes(np.random.default_rng(0).standard_normal((50, 64))))


@pytest.mark.parametrize("threshold", [float("nan"), float("inf"), "0", [0.0], np.zeros(12), torch.zeros(12)])
def test_threshold_is_one_finite_number(threshold):
    x = np.random.default_rng(0).standard_normal((5, 12))
    with pytest.raises(cf.InputError, match="threshold must be a finite number"):
        cf.pack_codes(x, threshold=threshold)
    for one in (0.25, np.float32(0.25), np.array(0.25), torch.tensor(0.25)):
        np.testing.assert_array_equal(cf.pack_codes(x, threshold=one), cf.pack_codes(x >= 0.25))


@pytest.mark.parametrize(
    ("codes", "hint"),
    [
        (np.zeros((3, 8), np.int8), r"view\(uint8\)"),
        (np.zeros((3, 600), np.uint8), "not packed yet"),
        (np.zeros(8, np.uint8), "one row for each code"),
        (np.zeros((3, 8), np.float32), "pack_codes"),
        (np.ma.masked_array(np.zeros((3, 8), np.uint8)), "masked"),
    ],
)
def test_what_codes_probably_are_is_said(codes, hint):
    with pytest.raises(cf.InputError, match=hint):
        cf.hamming_topk(codes, codes, 1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bits", [64, 1024, 4096])
def test_autocast_leaves_the_integers_exact(bits, dtype, run):
    """Products of +-1 in 16 bits would be even numbers above 256. numpy goes round the dispatcher."""
    rng = np.random.default_rng(bits)
    q, db = (rng.integers(0, 256, (n, bits // 8), dtype=np.uint8) for n in (5, 60))
    table = cf.hamming_distances(q, db)
    with torch.autocast("cpu", dtype=dtype):
        np.testing.assert_array_equal(cf.hamming_distances(q, db), table)
        distances, indices = cf.hamming_topk(q, db, 60)
        lims, near, _ = cf.hamming_range(q, db, bits // 2)
    np.testing.assert_array_equal(indices, np.argsort(table, axis=1, kind="stable"))
    np.testing.assert_array_equal(distances, np.sort(table, axis=1))
    np.testing.assert_array_equal(near, table[table <= bits // 2])
    assert lims[-1] == (table <= bits // 2).sum()


@pytest.mark.parametrize("threads", ["2", 1.5, True, 0, -1, 10**20, [1]])
def test_threads_of_the_wrong_kind_are_refused(threads):
    codes = np.zeros((3, 2), np.uint8)
    for call in (
        lambda: cf.hamming_topk(codes, codes, 1, threads=threads),
        lambda: cf.hamming_topk(torch.from_numpy(codes), torch.from_numpy(codes), 1, threads=threads),
        lambda: cf.hamming_range(codes, codes, 1, threads=threads),
        lambda: cf.hamming_distances(codes, codes, threads=threads),
    ):
        with pytest.raises(cf.InputError, match="threads must be"):
            call()
    assert cf.hamming_topk(codes, codes, 1, threads=np.int64(2))[0].shape == (3, 1)


@pytest.mark.parametrize("text", ["abc", "-1", "1.5", "9" * 20, "\N{SUPERSCRIPT TWO}"])
def test_variables_are_named_in_their_errors(monkeypatch, text):
    codes = np.zeros((3, 2), np.uint8)
    monkeypatch.setenv("CMR_FAST_THREADS", text)
    with pytest.raises(cf.InputError, match=f"CMR_FAST_THREADS must be .* got '{text}'"):
        cf.hamming_topk(codes, codes, 1)
    monkeypatch.delenv("CMR_FAST_THREADS")
    monkeypatch.setenv("CMR_FAST_BACKEND", "cuda")
    with pytest.raises(cf.InputError, match="got CMR_FAST_BACKEND=cuda"):
        cf.hamming_topk(codes, codes, 1)


@pytest.mark.parametrize(
    "call",
    [
        lambda c: cf.unpack_codes(c, 16.0),
        lambda c: cf.unpack_codes(c, None),
        lambda c: cf.unpack_codes(c, "16"),
        lambda c: cf.hamming_topk(c, c, 1.0),
        lambda c: cf.hamming_topk(c, c, 1, bits="16"),
        lambda c: cf.hamming_topk(c, c, 1, backend=1),
        lambda c: cf.hamming_range(c, c, 1.0),
    ],
)
def test_numbers_of_the_wrong_kind_are_refused(call):
    with pytest.raises(cf.InputError):
        call(np.zeros((3, 2), np.uint8))


def test_a_radius_beyond_all_distances_finds_everything():
    codes = np.arange(3, dtype=np.uint8)[:, None]
    assert cf.hamming_range(codes, codes, 10**30)[0].tolist() == [0, 3, 6, 9]


def test_pack_rules_for_zero_and_threshold():
    assert cf.pack_codes(np.array([[-0.5, 0.0, 0.5]])).tolist() == [[0b110]]  # floats: 0 counts as 1
    assert cf.pack_codes(np.array([[-1, 0, 1]])).tolist() == [[0b100]]  # integers: it does not
    assert cf.pack_codes(np.array([[0.0, 1.0, 1.0]]), threshold=0.5).tolist() == [[0b110]]
    assert cf.pack_codes(np.array([[0.2, 0.7]]), threshold=0.5).tolist() == [[0b10]]
    assert cf.pack_codes(np.zeros((0, 12), np.float32)).shape == (0, 2)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: cf.pack_codes(np.array([[0.0, 1.0]])), "threshold=0.5"),
        (lambda: cf.pack_codes(np.array([[np.nan, 1.0]])), "NaN"),
        (lambda: cf.pack_codes(np.array([1, 0])), r"\(N, bits\).*\(2,\)"),
        (lambda: cf.pack_codes(np.zeros((2, 5000), bool)), "4096"),
        (lambda: cf.pack_codes(np.array([[1, 2]]), threshold=1.0), "threshold is for floats"),
        (lambda: cf.pack_codes([[1, 0]]), "numpy array or a torch tensor, got list"),
        (lambda: cf.unpack_codes(np.zeros((2, 2), np.uint8), 24), "24 bits need codes of 3 bytes"),
        (lambda: cf.hamming_topk(np.zeros((1, 8), np.uint8), np.zeros((4, 8), np.uint8), 0), "k must be .* got 0"),
        (lambda: cf.hamming_topk(np.zeros((1, 8), np.uint8), np.zeros((4, 8), np.uint8), 1.5), "got 1.5"),
        (
            lambda: cf.hamming_topk(np.zeros((1, 8), np.uint8), np.zeros((4, 4), np.uint8), 1),
            "q has 8 bytes a code, db has 4",
        ),
        (lambda: cf.hamming_topk(np.zeros((1, 8), np.int8), np.zeros((4, 8), np.uint8), 1), "int8"),
        (lambda: cf.hamming_topk(np.zeros((1, 8), np.uint8), torch.zeros((4, 8), dtype=torch.uint8), 1), "both"),
        (lambda: cf.hamming_topk(np.zeros((1, 8), np.uint8), np.zeros((4, 8), np.uint8), 1, bits=50), "57 to 64"),
        (lambda: cf.hamming_topk(np.zeros((1, 8), np.uint8), np.zeros((4, 8), np.uint8), 1, threads=0), "1 or more"),
        (lambda: cf.hamming_topk(np.zeros((1, 8), np.uint8), np.zeros((4, 8), np.uint8), 1, backend="cuda"), "cuda"),
        (lambda: cf.hamming_range(np.zeros((1, 8), np.uint8), np.zeros((4, 8), np.uint8), -1), "radius .* got -1"),
        (
            lambda: cf.hamming_range(np.zeros((1, 8), np.uint8), np.zeros((4, 8), np.uint8), -1, strict=True),
            "radius .* got -1",
        ),
        (
            lambda: cf.hamming_range(np.zeros((1, 8), np.uint8), np.zeros((4, 8), np.uint8), 1, strict=1),
            "strict must be True or False, got 1",
        ),
        (lambda: cf.hamming_topk(np.zeros((1, 8), np.uint8), np.zeros((4, 8), np.uint8), 2**63), "below 2"),
        (lambda: cf.pack_codes(np.ones((2, 8), ">f4")), ">f4"),
        (lambda: cf.pack_codes(torch.eye(4).to_sparse()), "dense"),
        (lambda: cf.explain("nothing"), "hamming_topk"),
    ],
)
def test_bad_input_is_refused_with_what_was_seen(call, message):
    with pytest.raises(cf.InputError, match=message):
        call()


def test_forced_choices_that_cannot_run_raise(monkeypatch):
    x = np.zeros((2, 8), np.uint8)
    monkeypatch.setenv("CMR_FAST_ISA", "neon512")
    with pytest.raises(cf.InputError, match=r"neon512.*scalar"):
        cf.hamming_topk(x, x, 1)
    monkeypatch.delenv("CMR_FAST_ISA")
    monkeypatch.setenv("CMR_FAST_BACKEND", "triton")
    with pytest.raises(cf.InputError, match="triton"):
        cf.hamming_topk(x, x, 1)


# --- torch.library


def test_opcheck():
    x = torch.randint(0, 256, (6, 8), dtype=torch.uint8)
    ops = torch.ops.cmr_fast
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(ops.hamming_topk.default, (x, x, 3, 64, None, None), test_utils=tests)
    torch.library.opcheck(ops.hamming_distances.default, (x, x, "cpp", 2), test_utils=tests)
    torch.library.opcheck(ops.hamming_range.default, (x, x, 30, True, "torch", 1), test_utils=tests[:2])
    torch.library.opcheck(ops.pack_codes.default, (x > 100,), test_utils=tests)


def test_compile_fullgraph():
    x = torch.randint(0, 256, (6, 8), dtype=torch.uint8)

    def nearest(q, db):
        distances, indices = cf.hamming_topk(q, db, 2)
        return distances + 1, indices

    got = torch.compile(nearest, fullgraph=True, backend="aot_eager")(x, x)
    assert all(torch.equal(a, b) for a, b in zip(got, nearest(x, x), strict=True))


def test_results_that_no_memory_holds_are_refused():
    """2^17 queries: more bytes than a process has addresses for."""
    q = np.zeros((1 << 17, 1), np.uint8)
    tables = cf.ops.multi_index.SearchTables.build(np.arange(256, dtype=np.uint8)[:, None])
    index = cf.HammingIndex(8)
    searches = [lambda k: cf.hamming_topk(q, q[:2], k), lambda k: tables.search(q, k), lambda k: index.search(q, k)]
    for search in searches:
        with pytest.raises(InputError, match=r"k=2147483647 for 131072 queries takes 3377699718955008 bytes"):
            search(2**31 - 1)
        for k in (2**31, 10**25, 0, True):
            with pytest.raises(InputError, match="k must be an integer of 1 or more and below 2147483648"):
                search(k)
    index.add(q[:2])
    for distances, ids in (cf.hamming_topk(q[:2], q[:2], 5), index.search(q[:2], 5)):
        assert distances.tolist() == [[0, 0, 9, 9, 9]] * 2 and ids.tolist() == [[0, 1, -1, -1, -1]] * 2


def test_bits_and_threads_are_integers(tmp_path):
    q = np.zeros((2, 3), np.uint8)
    for bits in (True, "24", 24.0):
        with pytest.raises(InputError, match="bits must be an integer"):
            cf.hamming_topk(q, q, 1, bits=bits)
    index = cf.HammingIndex(24)
    with pytest.raises(InputError, match="threads must be an integer"):
        index.search(q, 1, threads="x")
    index.add(q)
    index.save(tmp_path / "own")
    index.to_faiss(tmp_path / "faiss")
    for name in ("own", "faiss"):
        with pytest.raises(InputError, match=r"bits must be an integer from 1 to 4096, got '24'"):
            cf.HammingIndex.open(tmp_path / name, bits="24")
        assert cf.HammingIndex.open(tmp_path / name, bits=np.int64(24)).bits == 24


def test_what_does_not_fit_memory_says_what_is_too_large():
    with pytest.raises(InputError, match=r"radius must be small enough .* within it take 864691128455135232 bytes"):
        hits_room(2**56, "cpu")
    many = torch.zeros(1, 1, dtype=torch.uint8).expand(2**24, 1)
    with pytest.raises(InputError, match="16777216 by 16777216 distances take 1125899906842624 bytes"):
        cf.hamming_distances(many, many)
