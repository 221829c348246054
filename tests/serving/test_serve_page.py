"""`cmr-fast serve --run`: captions and images as queries, by codes and embeddings, attacked; the page in Chromium."""

import base64
import io
import json
import os
import shutil
import subprocess
import time
from dataclasses import replace

import numpy as np
import pytest
import tiny_towers
import torch
from commands import refused
from serving_cases import serving

from cmr_fast import HammingIndex, pack_codes
from cmr_fast.cli import main
from cmr_fast.data import load_captions
from cmr_fast.methods.clip import ClipConfig
from cmr_fast.methods.loop import RunConfig, train

pytest.importorskip("fastapi")
Image = pytest.importorskip("PIL.Image")
pytestmark = pytest.mark.timeout(400)
SMALL = ClipConfig(dim=24, hidden=16, epochs=12, head_epochs=12, batch_size=16, head_lr=1e-2, captions=0)
SHAPES = ("--data", "shapes", "--options", "count=60")


@pytest.fixture(scope="module")
def data():
    return load_captions("shapes", count=60)


@pytest.fixture(scope="module")
def run(data, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        words = sorted({w for row in data.train.text for caption in row for w in caption.lower().split()})
        towers = tiny_towers.towers(tmp_path_factory.mktemp("towers"), words, data.train.pixels())
        out = tmp_path_factory.mktemp("runs") / "clip"
        return train("clip", replace(SMALL, towers=towers), data, RunConfig(out=out, quiet=True, valid_fraction=0.0))


@pytest.fixture(scope="module")
def indexes(run, tmp_path_factory):
    """A folder with image.cmrx and text.cmrx, as the command line makes them."""
    folder = tmp_path_factory.mktemp("indexes")
    for items in ("image", "text"):
        codes = str(folder / f"{items}.npy")
        assert main(["encode", str(run.path), *SHAPES, "--modality", items, "--bits", "--out", codes]) == 0
        assert main(["index", codes, "--out", str(folder / f"{items}.cmrx")]) == 0
    return folder


@pytest.fixture(scope="module")
def of_images(run, indexes):
    with serving(indexes, "image.cmrx", "--run", run.path, *SHAPES, "--eps", 16 / 255) as running:
        yield running


@pytest.fixture(scope="module")
def embedded(run, data):
    model = run.model.eval()
    with torch.no_grad():
        return {items: model.embed(items, data.test).float() for items in ("image", "text")}


def photo(data, row: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(data.test.image[row].permute(1, 2, 0).numpy()).save(file, "PNG")
    return file.getvalue()


def pixels_of(address: str) -> np.ndarray:
    assert address.startswith("data:image/png;base64,")
    with Image.open(io.BytesIO(base64.b64decode(address.partition(",")[2]))) as opened:
        return np.asarray(opened).astype(int)


def test_a_caption_finds_the_images_whose_codes_are_near(of_images, embedded, data):
    caption = data.test.text[3][0]
    answer = of_images.ask("/search", {"text": caption, "k": 5}).json
    q, db = (pack_codes(x, threshold=0.0).numpy() for x in (embedded["text"][15:16], embedded["image"]))
    index = HammingIndex(24)
    index.add(db)
    distances, ids = index.search(q, 5)
    assert answer == {
        "bits": 24, "distances": distances.tolist(), "ids": ids.tolist(), "query": {"text": caption},
    }  # fmt: skip


def test_an_image_finds_itself_first_by_codes_and_by_embeddings(of_images, data, embedded):
    for by in ("codes", "embeddings"):
        answer = of_images.ask(f"/search?k=4&by={by}", photo(data, 7), "image/png").json
        assert answer["ids"][0][0] == 7 and answer["distances"][0][0] == pytest.approx(0, abs=1e-6)
        assert (pixels_of(answer["query"]["image"]) == data.test.image[7].permute(1, 2, 0).numpy()).all()
    far = 1 - embedded["image"].double() @ embedded["image"][7].double()
    assert answer["ids"][0] == far.argsort()[:4].tolist()
    assert answer["distances"][0] == pytest.approx(far.sort().values[:4].tolist(), abs=1e-5)
    same = of_images.ask("/search", {"row": 7, "k": 4, "by": "embeddings"}).json
    assert same["ids"] == answer["ids"]


def test_an_attacked_image_stays_in_the_ball_and_goes_away_from_what_it_finds(of_images, data):
    clean, moved = (
        of_images.ask(f"/search?k=1&by=embeddings&attacked={a}", photo(data, 2), "image/png").json
        for a in ("false", "true")
    )
    away = np.abs(pixels_of(moved["query"]["image"]) - pixels_of(clean["query"]["image"])).max()
    assert 0 < away <= 16
    assert clean["ids"] == [[2]] and clean["distances"][0][0] < 1e-6
    again = of_images.ask("/search", {"row": 2, "k": 12, "by": "embeddings", "attacked": True}).json
    assert dict(zip(again["ids"][0], again["distances"][0], strict=True))[2] > 0.01


def test_an_attacked_caption_differs_by_one_character(of_images, data):
    caption = data.test.text[3][0]
    clean, moved = (
        of_images.ask("/search", {"text": caption, "by": "embeddings", "attacked": a}).json for a in (False, True)
    )
    other = moved["query"]["text"]
    assert other != caption and abs(len(other) - len(caption)) <= 1
    assert clean["distances"] != moved["distances"]


def test_items_are_images_or_captions(run, indexes, of_images, data):
    item = of_images.ask("/items/4")
    assert item.headers["Content-Type"] == "image/png"
    with Image.open(io.BytesIO(item.content)) as opened:
        assert (np.asarray(opened) == data.test.image[4].permute(1, 2, 0).numpy()).all()
    assert of_images.ask("/items/12").status == 404
    with serving(indexes, "text.cmrx", "--run", run.path, *SHAPES, "--items", "text") as running:
        assert running.ask("/items/16").content.decode() == data.test.text[3][1]
        found = running.ask("/search", {"text": data.test.text[3][1], "by": "embeddings", "k": 1}).json
        assert data.test.text[found["ids"][0][0] // 5][found["ids"][0][0] % 5] == data.test.text[3][1]


@pytest.mark.parametrize(
    ("body", "kind", "path", "says"),
    [
        (b"no image", "image/png", "/search", "not a photo"),
        (b"no image", "image/png", "/search?k=0", "k: "),
        (b"no image", "image/png", "/search?row=1", "an image is the query"),
        ({"row": 12}, "application/json", "/search", "row: expected a number below 12"),
        ({"text": ""}, "application/json", "/search", "text: "),
        ({"row": 1, "by": "embeddings", "radius": 3}, "application/json", "/search", "radius and where are for codes"),
    ],
)
def test_queries_that_are_none_are_refused(of_images, body, kind, path, says):
    assert says in of_images.refused(422, body, kind, path)


def test_an_index_of_something_else_is_refused(run, indexes, tmp_path, capsys):
    common = ("--run", run.path, *SHAPES, "--port", 0)
    assert "the index has 60 codes, there are 12 images" in refused(capsys, "serve", indexes / "text.cmrx", *common)
    other = HammingIndex(16)
    other.add(np.zeros((12, 2), np.uint8))
    other.save(tmp_path / "other.cmrx")
    assert "the index has 16 bits, codes of" in refused(capsys, "serve", tmp_path / "other.cmrx", *common)
    zeros = HammingIndex(24)
    zeros.add(np.zeros((12, 3), np.uint8))
    zeros.save(tmp_path / "zeros.cmrx")
    assert "of 24 bits away from what" in refused(capsys, "serve", tmp_path / "zeros.cmrx", *common)
    zeros = HammingIndex(24)
    zeros.add(np.zeros((2, 3), np.uint8), [5, 6])
    zeros.save(tmp_path / "ids.cmrx")
    assert "has no id 0" in refused(capsys, "serve", tmp_path / "ids.cmrx", *common)
    assert "--eps is for queries and items of a --run" in refused(
        capsys, "serve", indexes / "text.cmrx", "--eps", 0.1, "--port", 0
    )


class Browser:
    """Chromium without a window, told what to do through a pipe."""

    def __init__(self, folder):
        mine, theirs = os.pipe(), os.pipe()
        command = [
            "chromium", "--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe",
            "--host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE 127.0.0.1", f"--user-data-dir={folder}",
        ]  # fmt: skip
        shell = f'exec 3<&{mine[0]} 4>&{theirs[1]}; exec "$0" "$@"'
        self.process = subprocess.Popen(
            ["bash", "-c", shell, *command], pass_fds=(mine[0], theirs[1]), stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(mine[0])
        os.close(theirs[1])
        self._to, self._from = os.fdopen(mine[1], "wb", 0), os.fdopen(theirs[0], "rb")
        self._buffer, self._number, self._session = b"", 0, None

    def tell(self, method, **parameters):
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        self._to.write(json.dumps(message).encode() + b"\0")
        while True:
            while b"\0" not in self._buffer:
                read = self._from.read1(1 << 16)
                assert read, "the browser ended"
                self._buffer += read
            text, _, self._buffer = self._buffer.partition(b"\0")
            said = json.loads(text)
            if said.get("id") == self._number:
                assert "result" in said, said
                return said["result"]

    def open(self, address):
        target = self.tell("Target.createTarget", url=address)["targetId"]
        self._session = self.tell("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        self.tell("Emulation.setDeviceMetricsOverride", width=390, height=800, deviceScaleFactor=1, mobile=True)
        self.until("location.protocol == 'http:' && document.readyState == 'complete'")

    def value(self, expression):
        result = self.tell("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def until(self, expression):
        deadline = time.monotonic() + 60
        while not (value := self.value(expression)):
            assert time.monotonic() < deadline, (expression, self.value("document.body.innerText"))
            time.sleep(0.05)
        return value

    def close(self):
        self._to.close()
        self._from.close()
        self.process.kill()
        self.process.wait()


@pytest.fixture
def browser(tmp_path):
    if not shutil.which("chromium"):
        pytest.skip("no chromium")
    made = Browser(tmp_path / "profile")
    yield made
    made.close()


DONE = "said.textContent == '' && hits.children.length"


def test_the_page_searches_by_captions_and_images_clean_and_attacked(browser, of_images, data, tmp_path):
    caption = data.test.text[3][0]
    browser.open(of_images.address + "/")
    browser.value(f"text.value = {json.dumps(caption)}; document.querySelector('#of-text button').click()")
    assert browser.until(DONE) == 10
    expected = of_images.ask("/search", {"text": caption}).json
    shown = browser.value("[...hits.querySelectorAll('span')].map(e => e.textContent)")
    pairs = zip(expected["ids"][0], expected["distances"][0], strict=True)
    assert shown == [f"id {i}, {d} of 24 bits" for i, d in pairs]
    # the thumbnails are there, nothing of the page is wider than a phone, and nothing was asked of another host
    browser.until("[...hits.querySelectorAll('img')].filter(e => e.naturalWidth == 32).length == 10")
    assert browser.value("document.documentElement.scrollWidth <= 390")
    asked = browser.value("performance.getEntriesByType('resource').map(e => e.name)")
    assert asked and all(name.startswith((of_images.address, "data:")) for name in asked)

    browser.value("by.value = 'embeddings'; by.dispatchEvent(new Event('change'))")
    browser.until(DONE + " && hits.textContent.includes('cosine distance')")
    browser.value("attacked.click()")
    browser.until(DONE + " && query.textContent.includes('Attacked query')")
    assert browser.value("query.querySelector('p').textContent") != caption

    (tmp_path / "photo.png").write_bytes(photo(data, 7))
    root = browser.tell("DOM.getDocument")["root"]["nodeId"]
    field = browser.tell("DOM.querySelector", nodeId=root, selector="#file")["nodeId"]
    browser.value("attacked.checked = false; by.value = 'codes'")
    browser.tell("DOM.setFileInputFiles", nodeId=field, files=[str(tmp_path / "photo.png")])
    browser.until(DONE + " && query.querySelector('img') !== null")
    assert browser.value("hits.querySelector('span').textContent") == "id 7, 0 of 24 bits"
    dropped = base64.b64encode(photo(data, 5)).decode()
    browser.value(
        f"bytes = Uint8Array.from(atob('{dropped}'), c => c.charCodeAt(0)); moved = new DataTransfer();"
        "moved.items.add(new File([bytes], 'x.png', {type: 'image/png'}));"
        "document.getElementById('drop').dispatchEvent(new DragEvent('drop', {dataTransfer: moved, cancelable: true}))"
    )
    expected = of_images.ask("/search", photo(data, 5), "image/png").json
    browser.until(DONE + f" && query.querySelector('img').src == '{expected['query']['image']}'")
    assert browser.value("hits.querySelector('span').textContent") == f"id {expected['ids'][0][0]}, 0 of 24 bits"


def test_without_a_run_the_page_takes_codes_and_says_what_is_wrong(browser, indexes):
    with serving(indexes, "image.cmrx") as running:
        browser.open(running.address + "/")
        browser.value("code.value = '00000'; document.querySelector('#of-code button').click()")
        assert "expected a packed code of 24 bits" in browser.until("said.className == 'error' && said.textContent")
        browser.value("code.value = 'ff00ff'; document.querySelector('#of-code button').click()")
        browser.until(DONE)
        found = running.ask("/search", {"codes": "ff00ff"}).json
        first = f"id {found['ids'][0][0]}, {found['distances'][0][0]} of 24 bits"
        assert browser.value("hits.querySelector('span').textContent") == first
