import h5py
import numpy as np
import pytest
import scipy.io
import scipy.sparse
from saving import save_h5, save_matlab73

from cmr_fast.data.convert import as_array
from cmr_fast.data.readers import read_arrays
from cmr_fast.errors import InputError

MATRIX = np.arange(12.0).reshape(3, 4)
IMAGES = np.arange(2 * 3 * 4 * 5, dtype=np.uint8).reshape(2, 3, 4, 5)


SAVE = {
    "v5.mat": scipy.io.savemat,
    "compressed.mat": lambda file, arrays: scipy.io.savemat(file, arrays, do_compression=True),
    "v73.mat": save_matlab73,
    "data.h5": save_h5,
    "data.h5py": save_h5,
    "data.npz": lambda file, arrays: np.savez(file, **arrays),
}


@pytest.fixture(params=SAVE)
def saved(request, tmp_path):
    SAVE[request.param](tmp_path / request.param, {"I_tr": MATRIX, "images": IMAGES})
    return tmp_path / request.param


def test_every_format_gives_the_same_arrays(saved):
    arrays = read_arrays(saved)
    assert set(arrays) == {"I_tr", "images"}
    assert np.array_equal(arrays["I_tr"](), MATRIX)
    assert np.array_equal(arrays["images"](), IMAGES)
    assert arrays["images"]().dtype == np.uint8


def test_the_name_does_not_matter(saved):
    other = saved.rename(saved.with_name("other.bin"))
    assert np.array_equal(read_arrays(other)["I_tr"](), MATRIX)


def read_all(file):
    return {key: call() for key, call in read_arrays(file).items()}


def test_cut_short_is_one_clear_error_wherever_it_is_cut(saved):
    whole = saved.read_bytes()
    for part in (20, 127, 128, 140, 200, 600, len(whole) // 2, len(whole) - 30):
        saved.write_bytes(whole[: min(part, len(whole) - 1)])
        try:
            found = read_all(saved)
        except InputError as error:
            assert str(error).startswith(str(saved))
        else:
            # MATLAB v5 has no list of contents: cut between two arrays, it is a file of fewer
            assert saved.suffix == ".mat"
            assert len(found) < 2


def test_reading_does_not_make_or_change_a_file(saved, tmp_path):
    before = saved.read_bytes(), saved.stat().st_mtime_ns
    read_all(saved)
    assert (saved.read_bytes(), saved.stat().st_mtime_ns) == before
    with pytest.raises(InputError, match="no such file"):
        read_arrays(tmp_path / "absent.h5")
    assert not (tmp_path / "absent.h5").exists()


def test_npy_and_pickles_are_known_by_their_name(tmp_path):
    np.save(tmp_path / "train_img.npy", MATRIX)
    assert np.array_equal(read_all(tmp_path / "train_img.npy")["train_img"], MATRIX)
    (tmp_path / "train_labels.pkl").write_bytes(b"\x80\x02]q\x00(K\x01K\x02e.")
    assert read_all(tmp_path / "train_labels.pkl") == {"train_labels": [1, 2]}


def test_arrays_of_objects_in_numpy_files_are_not_run(tmp_path):
    np.save(tmp_path / "a.npy", np.array([{}], dtype=object), allow_pickle=True)
    np.savez(tmp_path / "a.npz", x=np.array([{}], dtype=object))
    for name in ("a.npy", "a.npz"):
        with pytest.raises(InputError, match="holds Python objects"):
            read_all(tmp_path / name)


def test_groups_strings_and_cells(tmp_path):
    with h5py.File(tmp_path / "a.h5", "w") as opened:
        opened["train/image"] = MATRIX
        opened["captions"] = ["ein", "Würfel"]
        opened["#refs#/a"] = MATRIX
    found = read_all(tmp_path / "a.h5")
    assert set(found) == {"train_image", "captions"}
    assert found["captions"].tolist() == ["ein", "Würfel"]


def test_links_to_other_files_are_not_followed(tmp_path):
    save_h5(tmp_path / "secret.h5", {"x": MATRIX})
    with h5py.File(tmp_path / "a.h5", "w") as opened:
        opened["image"] = h5py.ExternalLink("secret.h5", "/x")
        opened["text"] = h5py.SoftLink("/image")
    assert read_all(tmp_path / "a.h5") == {}


def test_sparse_matrices_are_made_dense(tmp_path):
    scipy.io.savemat(tmp_path / "a.mat", {"YAll": scipy.sparse.csc_matrix(MATRIX)})
    assert np.array_equal(read_all(tmp_path / "a.mat")["YAll"], MATRIX)


def test_sparse_matrices_of_matlab_73(tmp_path):
    sparse = scipy.sparse.csc_matrix(MATRIX)
    save_matlab73(tmp_path / "a.mat", {"LAll": MATRIX})
    with h5py.File(tmp_path / "a.mat", "r+") as opened:
        for key, parts in (("YAll", ("data", "ir", "jc")), ("ZAll", ("jc",))):
            opened.create_group(key).attrs["MATLAB_sparse"] = np.uint64(3)
            for part, value in zip(("data", "ir", "jc"), (sparse.data, sparse.indices, sparse.indptr), strict=True):
                if part in parts:
                    opened[key][part] = value if key == "YAll" else value * 0
    found = read_all(tmp_path / "a.mat")
    assert set(found) == {"LAll", "YAll", "ZAll"}
    assert np.array_equal(found["YAll"], MATRIX)
    assert np.array_equal(found["ZAll"], np.zeros((3, 4)))


@pytest.mark.parametrize("content", [b"I_tr,T_tr\n1,2\n", b"\x89PNG\r\n\x1a\n" + b"0" * 200, b"MATLAB 4"])
def test_other_files_are_refused_with_what_they_begin_with(tmp_path, content):
    (tmp_path / "a.mat").write_bytes(content)
    with pytest.raises(InputError, match=r"a\.mat: expected MATLAB v5 or v7\.3, HDF5.*it begins with b'"):
        read_arrays(tmp_path / "a.mat")


def test_an_empty_file(tmp_path):
    (tmp_path / "a.mat").touch()
    with pytest.raises(InputError, match="is empty"):
        read_arrays(tmp_path / "a.mat")


@pytest.mark.realdata
def test_real_mirflickr_files(data_root):
    tags = read_arrays(data_root / "mirflickr25k" / "mirflickr25k-yall.mat")["YAll"]()
    labels = read_arrays(data_root / "mirflickr25k" / "mirflickr25k-lall.mat")["LAll"]()
    assert tags.shape == (20015, 1386)
    assert labels.shape == (20015, 24)
    assert set(np.unique(tags)) == set(np.unique(labels)) == {0, 1}


@pytest.mark.parametrize("encoding", ["utf-8", "latin-1"])
@pytest.mark.parametrize("kind", ["fixed", "declared", "variable", "npz", "mat"])
def test_letters_beyond_ascii(tmp_path, kind, encoding):
    texts = ["café", "né", "nà", "plain"]
    rows = np.array([text.encode(encoding) for text in texts])
    if kind == "npz":
        np.savez(file := tmp_path / "a.npz", x=rows)
    elif kind == "mat":
        scipy.io.savemat(file := tmp_path / "a.mat", {"x": np.array(texts)})
    else:
        dtype = {"fixed": rows.dtype, "declared": h5py.string_dtype("utf-8", 5), "variable": h5py.string_dtype()}[kind]
        with h5py.File(file := tmp_path / "a.h5", "w") as opened:
            opened.create_dataset("x", data=list(rows) if kind == "variable" else rows.astype(dtype), dtype=dtype)
    assert as_array(read_arrays(file)["x"](), "x").tolist() == texts
