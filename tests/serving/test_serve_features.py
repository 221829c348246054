"""A run on features behind the server: rows of its test split as queries, clean and attacked by CMLA."""

import pytest
from serving_cases import Served

from cmr_fast import HammingIndex, pack_codes
from cmr_fast.data import load
from cmr_fast.methods.dcmh import DCMHConfig
from cmr_fast.methods.evaluation import encode_all
from cmr_fast.methods.loop import RunConfig, train

pytest.importorskip("fastapi")
from cmr_fast.serving import InProcess, make_app
from cmr_fast.serving.galleries import Features, check_items


@pytest.fixture(scope="module")
def pairs():
    return load("shapes", count=80)


@pytest.fixture(scope="module")
def model(pairs, tmp_path_factory):
    config = DCMHConfig(bits=16, epochs=3, image_hidden=16, text_hidden=16)
    run = RunConfig(out=tmp_path_factory.mktemp("runs") / "dcmh", quiet=True, valid_fraction=0.0)
    return train("dcmh", config, pairs, run).model.eval()


@pytest.fixture(scope="module")
def served(model, pairs):
    index = HammingIndex(16)
    index.add(pack_codes(encode_all(model, "text", pairs.database.text), threshold=0.0).numpy())
    gallery = Features("dcmh", model, pairs, "text", None)
    check_items(gallery, InProcess(index), "dcmh")
    return Served(make_app(InProcess(index), gallery)), index


def test_rows_are_queries_by_codes_and_by_embeddings(served, model, pairs):
    client, index = served
    values = encode_all(model, "image", pairs.query.image)
    expected = index.search(pack_codes(values[2:3], threshold=0.0).numpy(), 5)
    found = client.ask("/search", {"row": 2, "k": 5}).json
    assert (found["distances"], found["ids"]) == tuple(x.tolist() for x in expected)
    text = encode_all(model, "text", pairs.query.text)[4]
    near = client.ask("/search", {"row": 4, "modality": "text", "k": 5, "by": "embeddings"}).json
    database = encode_all(model, "text", pairs.database.text)
    cosines = database.double() @ text.double() / database.double().norm(dim=1) / text.double().norm()
    assert near["distances"][0] == pytest.approx((1 - cosines).sort().values[:5].tolist(), abs=1e-6)
    labels = [pairs.class_names[c] for c in pairs.database.labels[3].nonzero()[:, 0].tolist()]
    assert client.ask("/items/3").content.decode() == ", ".join(labels)


def test_an_attacked_row_lies_elsewhere(served):
    client, _ = served
    clean, moved = (
        client.ask("/search", {"row": 2, "k": 3, "by": "embeddings", "attacked": a}).json for a in (False, True)
    )
    assert clean["distances"] != moved["distances"]


def test_captions_and_images_are_refused(served):
    client, _ = served
    assert "reads features of texts" in client.refused(422, {"text": "a red circle"})
    assert "reads features of images" in client.refused(422, b"x", "image/png")
