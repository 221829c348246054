"""MA2T's images from files, and which of the candidates are taken."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from small import ACMR_SMALL, small_dataset
from torch.testing import assert_close

from cmr_fast.cli import main
from cmr_fast.data import RandAugment
from cmr_fast.data.augment import random_crops
from cmr_fast.data.captions import CaptionedDataset, CaptionedImages
from cmr_fast.data.photos import Photo, Photos
from cmr_fast.errors import InputError
from cmr_fast.methods import candidates, ma2t
from cmr_fast.methods.loop import RunConfig, load_model, train

pytest.importorskip("transformers")
pytest.importorskip("PIL")
COUNT = 3  # candidates of each image


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


def picture(label, number, size):
    """uint8 (3, size, size) that tells which it is."""
    return torch.full((3, size, size), 0, dtype=torch.uint8) + torch.tensor([label, number * 40, 7])[:, None, None]


def write(path, pixels):
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels.permute(1, 2, 0).byte().numpy()).save(path)


@pytest.fixture(scope="module")
def made(tmp_path_factory, data):
    """A folder of three pictures of each training image, and images.json beside them."""
    folder, size = tmp_path_factory.mktemp("made"), data.train.image.shape[-1]
    for label in data.train.labels.tolist():
        for number in range(COUNT):
            write(folder / f"{label}_{number}.png", picture(label, number, size))
    listed = {str(n): [f"{n}_{k}.png" for k in range(COUNT)] for n in data.train.labels.tolist()}
    (folder / "images.json").write_text(json.dumps(listed))
    return folder


def pairs(data, **settings):
    return ma2t.more_pairs(data.train, ma2t.AugmentConfig(augment_count=2, **settings), 1)


def test_a_name_may_lack_its_folder_where_no_other_has_it(tmp_path):
    names = ["a/one.jpg", "a/two.jpg", "b/two.jpg"]
    for name in names:
        write(tmp_path / name, picture(1, 1, 16))
    split = CaptionedImages(Photos([Photo(n, tmp_path / n) for n in names], 16), (("x",),) * 3, torch.arange(3))
    file = tmp_path / "texts.json"
    file.write_text(json.dumps({"one.jpg": ["1"], "a/two.jpg": ["2"], "b/two.jpg": ["3"]}))
    assert candidates.texts_in(file, split, 1) == [["1"], ["2"], ["3"]]
    for name in ("made/one_0.png", "made/a/two_0.png", "made/b/two_0.png"):
        write(tmp_path / name, picture(1, 1, 16))
    found = candidates.images_in(tmp_path / "made", split, 1)
    assert [row[0].path.relative_to(tmp_path / "made").as_posix() for row in found] == [
        "one_0.png", "a/two_0.png", "b/two_0.png",
    ]  # fmt: skip
    file.write_text(json.dumps({"one.jpg": ["1"], "two.jpg": ["2"]}))
    with pytest.raises(InputError, match=r"names 1 of 2 images that are not in the data set, 'two\.jpg' first"):
        candidates.texts_in(file, split, 1)


@pytest.mark.parametrize("name", ["", "images.json"])
@pytest.mark.parametrize("text", ["none", "human"])
def test_images_of_files_stand_beside_their_captions(name, text, data, made):
    train, count = data.train, len(data.train)
    more = pairs(data, augment_image=str(made / name), augment_text=text)
    assert len(more.split) == (3 if text == "none" else 5) * count and more.images_from == len(more.split) - 2 * count
    rows = torch.tensor([more.images_from + 3, 1, more.images_from + count + 5, more.images_from - 1])
    batch = more.split.select(rows)
    seen = (more.pixels(batch) * 255).round().byte()
    size = train.image.shape[-1]
    assert torch.equal(seen[0], picture(int(train.labels[3]), 0, size)) and batch.text[0] == train.text[3][:1]
    assert torch.equal(seen[2], picture(int(train.labels[5]), 1, size)) and batch.text[2] == train.text[5][:1]
    assert torch.equal(seen[1], train.image[1]) and torch.equal(seen[3], train.image[count - 1])
    assert batch.labels[2] == train.labels[5]


def test_both_sides_augmented_are_paired_block_by_block(data, made):
    train, count = data.train, len(data.train)
    more = pairs(data, augment_image=str(made), augment_text="human", augment_both=True)
    batch = more.split.select(torch.tensor([count + 4, 2 * count + 4]))
    seen = (more.pixels(batch) * 255).round().byte()
    for number in range(2):
        assert torch.equal(seen[number], picture(int(train.labels[4]), number, train.image.shape[-1]))
        assert batch.text[number] == (train.text[4][1 + number],)


def test_the_best_aligned_are_those_of_a_loop(data, made, start):
    dual, train = load_model(start).dual, data.train
    more = pairs(data, augment_image=str(made), augment_select="top", augment_reference=str(start))
    texts = pairs(data, augment_text="human", augment_select="top", augment_reference=str(start))
    count = len(train)
    for row in range(0, count, 7):
        label = int(train.labels[row])
        with torch.no_grad():
            image = dual.encode_image(train.image[row][None].float() / 255)[0]
            own = dual.encode_text(*dual.tokenize([train.text[row][0]]))[0]
            files = [dual.encode_image(picture(label, k, 32)[None].float() / 255)[0] @ own for k in range(COUNT)]
            words = [dual.encode_text(*dual.tokenize([text]))[0] @ image for text in train.text[row][1:]]
        best = sorted(range(COUNT), key=lambda k: -float(files[k]))[:2]
        names = [more.files.name(block * count + row) for block in range(2)]
        assert names == [str(made / f"{label}_{k}.png") for k in best]
        best = sorted(range(len(words)), key=lambda k: -float(words[k]))[:2]
        taken = [texts.split.text[(1 + block) * count + row][0] for block in range(2)]
        assert_close([float(words[train.text[row].index(t) - 1]) for t in taken], [float(words[k]) for k in best])


def test_ties_keep_their_order_and_draws_depend_on_the_id_alone():
    rows = [list("abcd"), list("efgh")]
    scores = [np.array([0.1, 0.3, 0.3, 0.2]), np.array([0.5, 0.5, 0.5, 0.5])]
    assert candidates.taken(rows, 3, "top", [7, 8], scores) == [list("bcd"), list("efg")]
    assert candidates.taken(rows, 2, "first", [7, 8]) == [list("ab"), list("ef")]
    drawn = candidates.taken(rows, 3, "random", [7, 8])
    assert drawn[1] == candidates.taken(rows[1:], 3, "random", [8])[0] and len(set(drawn[0])) == 3
    many = candidates.taken([list("abcd")] * 200, 1, "random", range(200))
    assert {row[0] for row in many} == set("abcd")


def test_a_run_on_images_of_files(config_of, data, made, start, tmp_path):
    settings = {"augment_image": str(made), "augment_count": 2, "max_steps": 2, "steps": 1}
    settings |= {"augment_select": "top", "augment_reference": str(start)}
    run = train("mat-img", config_of("mat-img", **settings), data, RunConfig(out=tmp_path / "run", quiet=True))
    assert load_model(run.path).config.augment_image == str(made)


def test_strengths_crop_and_then_augment(data):
    train, count = data.train, len(data.train)
    for level, (least, operations, strength) in enumerate(ma2t.LEVELS, 1):
        more = pairs(data, augment_image="randaug", augment_level=level)
        seen = (more.pixels(more.split.select(torch.tensor([2 * count + 3]))) * 255).round().byte()
        number = [int(train.labels[3]) * 3 + 2]
        cropped = random_crops(train.image[3][None], least, index=number)
        assert torch.equal(seen, RandAugment(operations, strength)(cropped, index=number))


# ---- what is refused


def test_photos_are_called_by_their_names(tmp_path):
    for name in ("one.jpg", "two.jpg"):
        write(tmp_path / "photos" / name, picture(1, 1, 20))
        write(tmp_path / "more" / name.replace(".jpg", "_10.png"), picture(2, 1, 16))
        write(tmp_path / "more" / name.replace(".jpg", "_9.png"), picture(3, 1, 16))
    photos = Photos([Photo(n, tmp_path / "photos" / n) for n in ("one.jpg", "two.jpg")], 16)
    split = CaptionedImages(photos, (("a dog",), ("a cat",)), torch.arange(2))
    data = CaptionedDataset("two", split, split)
    more = pairs(data, augment_image=str(tmp_path / "more"))
    assert [more.files.name(row).rpartition("/")[2] for row in range(4)] == [
        "one_9.png", "two_9.png", "one_10.png", "two_10.png",
    ]  # fmt: skip
    write(tmp_path / "more" / "three_0.png", picture(1, 1, 16))
    with pytest.raises(InputError, match="names 1 of 3 images that are not in the data set, 'three' first"):
        pairs(data, augment_image=str(tmp_path / "more"))


def test_images_that_are_not_there_are_refused(data, made, tmp_path):
    names = [str(n) for n in data.train.labels.tolist()]
    with pytest.raises(InputError, match=r"or a folder or .json file of images, got 'sd', which is no folder"):
        pairs(data, augment_image="sd")
    listed = {n: [str(made / f"{n}_{k}.png") for k in range(2)] for n in names}
    file = tmp_path / "images.json"
    for changed, message in (
        ({"x.jpg": ["a.png"]}, r"names 1 of \d+ images that are not in the data set, 'x.jpg' first"),
        ({names[1]: [str(made / f"{names[1]}_0.png")]}, f"1 of {len(names)} have fewer, {names[1]} has 1"),
        ({names[0]: ["a.png", "b.png"]}, rf"2 of its {2 * len(names)} images are not there, .*a\.png first"),
        ({names[0]: "a.png"}, "each with a list of paths of images"),
    ):
        file.write_text(json.dumps(listed | changed))
        with pytest.raises(InputError, match=message):
            pairs(data, augment_image=str(file))
    wide = replace(data.train, image=data.train.image[:, :, :20])
    with pytest.raises(InputError, match="cut to squares, got a data set of 20 x 32"):
        ma2t.more_pairs(wide, ma2t.AugmentConfig(augment_image=str(made), augment_count=2), 1)


def test_a_reference_that_is_not_there_is_refused(start, tmp_path, capsys):
    command = ["train", "finetune", "--data", "shapes", "--options", "count=60", "--start", str(start)]
    command += ["--augment-text", "human", "--augment-select", "top", "--out", str(tmp_path / "run")]
    assert main([*command, "--augment-reference", str(tmp_path / "no")]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: there is no reference model at {tmp_path / 'no'}: expected a run on captions")
    assert not (tmp_path / "run").exists()
    other = train("acmr", ACMR_SMALL, small_dataset(), RunConfig(out=tmp_path / "other", quiet=True))
    with pytest.raises(InputError, match="a run of acmr, expected one on captions"):
        candidates.reference_model(str(other.path))
