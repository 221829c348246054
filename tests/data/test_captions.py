import csv
import io
import json
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from cmr_fast.data import CaptionedDataset, CaptionedImages, captions, load_captions, photos
from cmr_fast.errors import InputError


def photo(shade, mode="RGB", form="PNG", width=40, height=30):
    image = Image.new("RGB", (width, height), (shade, shade, shade)).convert(mode)
    file = io.BytesIO()
    image.save(file, form)
    return file.getvalue()


SPLITS = ("train", "restval", "val", "test", "train")


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    return folder / "cmr_fast"


@pytest.fixture
def folder(tmp_path):
    """Five photos of one shade each; photo i has i + 1 captions."""
    place = tmp_path / "set"
    (place / "Images").mkdir(parents=True)
    images = []
    for number, split in enumerate(SPLITS):
        (place / "Images" / f"{number}.png").write_bytes(photo(40 * number))
        sentences = [{"raw": f"caption {n} of {number}"} for n in range(number + 1)]
        images.append({"filename": f"{number}.png", "split": split, "sentences": sentences})
    (place / "dataset_five.json").write_text(json.dumps({"images": images}))
    return place


def shades(split):
    return [round(float(x) * 255) for x in split.pixels().mean(dim=(1, 2, 3))]


def edited(folder, change):
    file = folder / "dataset_five.json"
    data = json.loads(file.read_text())
    change(data["images"])
    file.write_text(json.dumps(data))


def test_a_photo_is_never_a_program():
    eps = io.BytesIO()
    Image.new("RGB", (20, 20), "red").save(eps, "EPS")
    with pytest.raises(InputError, match=r"x: not a photo that Pillow can read \(EPS is a program"):
        photos.decode("x", eps.getvalue(), 16)


def test_what_a_decoder_itself_fails_at_is_no_photo(monkeypatch):
    def fails(*_):
        raise RuntimeError("Failed to decode frame 0")  # as Pillow's AVIF

    monkeypatch.setattr(Image.Image, "convert", fails)
    file = io.BytesIO()
    Image.new("RGB", (20, 20)).save(file, "PNG")
    with pytest.raises(InputError, match=r"x: not a photo that Pillow can read .*frame 0"):
        photos.decode("x", file.getvalue(), 16)


def test_karpathy_with_restval_and_any_number_of_captions(folder):
    data = load_captions(folder, size=16)
    assert data.name == "five" and isinstance(data, CaptionedDataset)
    assert shades(data.train) == [0, 40, 160] and shades(data.valid) == [80] and shades(data.test) == [120]
    assert [len(row) for row in data.train.text] == [1, 2, 5] and data.train.text[1][1] == "caption 1 of 1"
    texts, owner = data.train.captions()
    assert owner.tolist() == [0, 1, 1, 2, 2, 2, 2, 2] and texts[2] == "caption 1 of 1"
    assert data.train.labels.tolist() == [0, 1, 4] and data.train.pixels().shape == (3, 3, 16, 16)
    assert str(data).count("captions") == 3


def test_one_caption_an_image(folder):
    data = load_captions(folder, size=16, captions=1)
    assert data.train.text == (("caption 0 of 0",), ("caption 0 of 1",), ("caption 0 of 4",))


def test_coco_names_its_folder(folder):
    (folder / "val2014").mkdir()
    (folder / "Images" / "0.png").rename(folder / "val2014" / "0.png")
    for number in range(1, 5):
        (folder / "Images" / f"{number}.png").rename(folder / "val2014" / f"{number}.png")
    (folder / "Images").rmdir()
    edited(folder, lambda images: [image.update(filepath="val2014") for image in images])
    assert shades(load_captions(folder, size=16).train) == [0, 40, 160]


def test_photos_elsewhere_and_in_a_tar(folder, tmp_path):
    with tarfile.open(tmp_path / "photos.tar", "w") as tar:
        tar.add(folder / "Images", "somewhere/Images")
    (folder / "Images").rename(tmp_path / "moved")
    for place in ("photos.tar", "moved"):
        data = load_captions(folder, size=16, photos=str(tmp_path / place))
        assert shades(data.train) == [0, 40, 160]
    with pytest.raises(InputError, match="no such folder or tar"):
        load_captions(folder, photos=str(tmp_path / "absent"))


@pytest.mark.parametrize("delimiter", [",", "\t", "|", ";"])
@pytest.mark.parametrize("head", [("path", "caption"), ("filepath", "title"), ("image_name", " comment")])
def test_tables(folder, delimiter, head):
    (folder / "dataset_five.json").unlink()
    with open(folder / "captions.csv", "w", newline="") as file:
        writer = csv.writer(file, delimiter=delimiter)
        writer.writerow([*head, "split"])
        for number in range(5):
            for n in range(2):
                split = ("train", "test", "valid")[number % 3]
                writer.writerow([f"{number}.png", f'caption {n},\n"so" {number}', split])
    data = load_captions(folder, size=16)
    assert data.name == "set" and shades(data.train) == [0, 120] and shades(data.test) == [40, 160]
    assert data.valid.text == (('caption 0,\n"so" 2', 'caption 1,\n"so" 2'),)


def test_a_table_without_splits_is_drawn_by_seed(folder):
    rows = "\n".join(f"{number}.png#{n}\ta caption, {n}" for number in range(5) for n in range(2))
    (folder / "dataset_five.json").unlink()
    (folder / "Flickr5.token.txt").write_text(rows + "\n")
    first, again = (load_captions(folder, size=16) for _ in range(2))
    assert len(first.test) == 1 and len(first.train) == 4 and first.valid is None
    assert first.test.labels.tolist() == again.test.labels.tolist() and first.train.text[0] == (
        "a caption, 0",
        "a caption, 1",
    )
    drawn = {load_captions(folder, size=16, seed=seed).test.labels.item() for seed in range(8)}
    assert len(drawn) > 1
    held = first.hold_out(0.5, seed=3)
    assert len(held.train) == len(held.valid) == 2 and held.valid.rows is None
    together = sorted([*shades(held.train), *shades(held.valid)])
    assert together == sorted(shades(first.train)) and held.train.joined(held.valid).pixels().shape[0] == 4


def test_photos_are_looked_for_in_every_folder_and_only_where_they_are_said_to_be(folder, tmp_path):
    (folder / "Images").rename(folder / "images")
    (folder / "Images").mkdir()
    assert shades(load_captions(folder, size=16).train) == [0, 40, 160]
    with tarfile.open(tmp_path / "empty.tar", "w"):
        pass
    with pytest.raises(InputError, match="names 5 of 5 photos that are not there"):
        load_captions(folder, size=16, photos=str(tmp_path / "empty.tar"))
    (tmp_path / "none").mkdir()
    with pytest.raises(InputError, match="names 5 of 5 photos that are not there"):
        load_captions(folder, size=16, photos=str(tmp_path / "none"))


def test_webdataset(tmp_path):
    for shard in range(2):
        with tarfile.open(tmp_path / f"{shard}.tar", "w") as tar:
            for number in range(5):
                parts = {"png": photo(20 * number), "json": json.dumps({"caption": f"c {number}"}).encode()}
                if number == 4:
                    parts = {"png": parts["png"], "txt": b"one\ntwo\n"}
                for ending, data in parts.items():
                    info = tarfile.TarInfo(f"./a.b/{shard}{number:03}.{ending}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    data = load_captions(tmp_path, size=16)
    assert len(data.train) == 9 and len(data.test) == 1
    pairs = dict(zip(shades(data.train), data.train.text, strict=True))
    assert pairs[20] == ("c 1",) and pairs[80] == ("one", "two")


def test_missing_photos_and_empty_captions_are_named_and_skipped_only_on_request(folder, capsys):
    (folder / "Images" / "1.png").unlink()
    with pytest.raises(InputError, match=r"names 1 of 5 photos that are not there, 1\.png first"):
        load_captions(folder, size=16)
    edited(folder, lambda images: images[4]["sentences"][0].update(raw=" "))
    data = load_captions(folder, size=16, broken="skip")
    assert shades(data.train) == [0, 160] and len(data.train.text[1]) == 4
    assert "left out 1.png, an empty caption of 4.png" in capsys.readouterr().err
    (folder / "Images" / "1.png").write_bytes(photo(40))
    with pytest.raises(InputError, match=r"4\.png has an empty caption"):
        load_captions(folder, size=16)


@pytest.mark.parametrize(
    ("caption", "fault"),
    [(" ... !", "without words"), ("\u200b", "without words"), ("a \ud83d dog", "with half a character")],
)
def test_captions_that_no_tower_reads_are_named_and_skipped_only_on_request(folder, capsys, caption, fault):
    edited(folder, lambda images: images[4]["sentences"][0].update(raw=caption))
    with pytest.raises(InputError, match=rf"4\.png has a caption {fault}; expected words, or broken=skip"):
        load_captions(folder, size=16)
    assert len(load_captions(folder, size=16, broken="skip").train.text[-1]) == 4
    assert f"left out a caption {fault} of 4.png" in capsys.readouterr().err
    edited(folder, lambda images: images[4]["sentences"][0].update(raw="一只狗"))
    assert "一只狗" in load_captions(folder, size=16).train.text[-1]


def test_broken_photos_are_named_and_skipped_only_on_request(folder, capsys):
    whole = (folder / "Images" / "4.png").read_bytes()
    (folder / "Images" / "4.png").write_bytes(b"GIF?")
    with pytest.raises(InputError, match=r"4\.png: not a photo that Pillow can read \(of no kind that it knows\)"):
        load_captions(folder, size=16).train.pixels()
    (folder / "Images" / "4.png").write_bytes(whole[: len(whole) // 2])
    data = load_captions(folder, size=16)
    assert data.train.select(torch.tensor([0, 1])).pixels().shape[0] == 2
    with pytest.raises(InputError, match=r"4\.png: not a photo"):
        data.train.pixels()
    assert shades(load_captions(folder, size=16, broken="skip").train) == [0, 40]
    assert "left out 4.png" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("mode", "form"),
    [("L", "PNG"), ("L", "JPEG"), ("1", "PNG"), ("P", "GIF"), ("RGBA", "PNG"), ("LA", "PNG"), ("CMYK", "JPEG")],
)
def test_grey_palette_transparent_and_cmyk_photos(mode, form):
    expected = 255 if mode == "1" else 200
    pixels = photos.decode("a", photo(200 if mode != "1" else 255, mode, form), 16)
    assert pixels.shape == (3, 16, 16) and abs(int(pixels.mean()) - expected) <= 2


def test_sixteen_bits_keep_the_high_ones():
    file = io.BytesIO()
    Image.fromarray(np.full((20, 30), 200 * 257, dtype=np.uint16)).save(file, "PNG")
    assert (photos.decode("a", file.getvalue(), 16) == 200).all()


@pytest.mark.parametrize(("width", "height"), [(1, 1), (16, 400), (401, 17)])
def test_photos_of_any_size(width, height):
    assert (photos.decode("a", photo(90, width=width, height=height), 16) == 90).all()


def test_photos_are_decoded_once_and_kept(folder, cache, monkeypatch):
    made = []

    def counted(name, data, size, original=photos.decode):
        made.append(name)
        return original(name, data, size)

    monkeypatch.setattr(photos, "decode", counted)
    data = load_captions(folder, size=16)
    assert not made and not cache.exists()
    first = data.train.select(torch.tensor([2, 0])).pixels()
    assert sorted(made) == ["0.png", "4.png"]
    assert torch.equal(data.train.pixels()[[2, 0]], first) and sorted(made) == ["0.png", "1.png", "4.png"]
    assert torch.equal(load_captions(folder, size=16).train.pixels(), data.train.pixels()) and len(made) == 3
    load_captions(folder, size=17).train.pixels()
    assert len(made) == 6  # another size
    (file,) = (f for f in cache.iterdir() if f.suffix == ".u8" and f.stat().st_size == 5 * 3 * 16 * 16)
    file.write_bytes(file.read_bytes()[:10])  # damaged: made anew
    assert torch.equal(load_captions(folder, size=16).train.pixels()[[2, 0]], first)


def test_without_a_cache_photos_are_decoded_each_time(folder, tmp_path):
    (tmp_path / "file").write_text("no folder")
    data = load_captions(folder, size=16, cache=str(tmp_path / "file"))
    assert shades(data.train) == shades(data.train) == [0, 40, 160]


def test_fingerprints_tell_sets_apart(folder):
    data, again = (load_captions(folder, size=16) for _ in range(2))
    assert data.train.fingerprint() == again.train.fingerprint()
    folder.rename(folder.parent / "moved")
    folder = folder.parent / "moved"
    moved = load_captions(folder, size=16)
    assert moved.train.fingerprint() == data.train.fingerprint() and moved.train.image.key() != data.train.image.key()
    (folder / "Images" / "4.png").write_bytes(photo(160, width=900))
    assert load_captions(folder, size=16).train.fingerprint() != data.train.fingerprint()
    edited(folder, lambda images: images[0]["sentences"][0].update(raw="another"))
    assert load_captions(folder, size=16).train.text[0] == ("another",)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda images: images[0].pop("split"), "damaged or another file"),
        (lambda images: images[0].update(split="dev"), "of split 'dev'"),
        (lambda images: images[0].update(filename="../0.png"), "without folders"),
        (lambda images: images[0].update(sentences=[{"raw": None}]), "raw is None, not a text"),
        (lambda images: images[0].update(sentences=[]), r"0\.png has no caption"),
        (lambda images: images[1].update(filename="0.png", split="val"), r"0\.png is in two splits"),
        (lambda images: [image.update(split="train") for image in images], "the test split has no image"),
    ],
)
def test_damaged_json(folder, change, message):
    edited(folder, change)
    with pytest.raises(InputError, match=message):
        load_captions(folder, size=16)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "an empty file"),
        ("a,b\nc,d\n", "names the columns image"),
        ("path,caption\n0.png\n", "row 2 has 1 columns"),
        ("path,caption,split\n0.png,words,dev\n", "row 2 is of split 'dev'"),
        ("0.png#0\ta\n1.png\n", "line 2 is not name#number"),
    ],
)
def test_damaged_tables(folder, text, message):
    (folder / "captions.csv").write_text(text)
    with pytest.raises(InputError, match=message):
        load_captions(folder / "captions.csv", size=16)


def test_options_and_places_that_are_not_there(folder, tmp_path):
    with pytest.raises(InputError, match="take no option features; they take size, captions"):
        load_captions(folder, features="lda")
    with pytest.raises(InputError, match="refuse or skip"):
        load_captions(folder, broken="ignore")
    with pytest.raises(InputError, match="captions must be an integer of 1 or more"):
        load_captions(folder, captions=0)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="no images with captions found"):
        load_captions(tmp_path / "empty")


def test_the_built_in_shapes_have_captions():
    data = load_captions("shapes", count=50, size=32)
    assert len(data.train) == 40 and len(data.test) == 10 and all(len(row) == 5 for row in data.train.text)
    assert data.train.pixels().shape == (40, 3, 32, 32)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"text": (("a",),)}, "same number of rows"),
        ({"text": (("a",), ())}, "image 1 has none"),
        ({"text": (("a",), (" ",))}, "image 1 has an empty caption"),
        ({"text": (("a",), ("b", "?!"))}, "image 1 has a caption without words"),
        ({"text": ("a", "b")}, "N tuples"),
        ({"image": torch.zeros(2, 4)}, "uint8"),
        ({"labels": torch.zeros(2)}, "int64"),
    ],
)
def test_parts_that_do_not_fit(parts, message):
    whole = {"image": torch.zeros(2, 3, 8, 8, dtype=torch.uint8), "text": (("a",), ("b",)), "labels": torch.arange(2)}
    with pytest.raises(InputError, match=message):
        CaptionedImages(**(whole | parts))


@pytest.mark.realdata
def test_flickr8k(data_root):
    folder = data_root / "flickr8k"
    if not captions.holds(folder):
        pytest.skip(f"no Flickr8k at {folder}")
    data = load_captions(folder, size=32)
    assert [len(split) for split in (data.train, data.valid, data.test)] == [6000, 1000, 1000]
    assert len(data.test.captions()[0]) == 5000 and data.test.select(torch.arange(3)).pixels().shape == (3, 3, 32, 32)
