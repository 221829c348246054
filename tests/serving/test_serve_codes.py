"""`cmr-fast serve` over an index file: answers as HammingIndex's, refusals, metrics, limits, signals; by a socket."""

import base64
import re
import signal
import socket
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from commands import refused
from serving_cases import serving

from cmr_fast import HammingIndex

pytest.importorskip("fastapi")
pytestmark = pytest.mark.timeout(300)
BITS = 20


def codes_of(seed: int, count: int) -> np.ndarray:
    codes = np.random.default_rng(seed).integers(0, 256, (count, 3), dtype=np.uint8)
    codes[:, -1] &= 15
    return codes


@pytest.fixture(scope="module")
def index() -> HammingIndex:
    made = HammingIndex(BITS)
    made.add(codes_of(0, 500), np.random.default_rng(1).permutation(5000)[:500])
    return made


@pytest.fixture(scope="module")
def server(index, tmp_path_factory):
    folder = tmp_path_factory.mktemp("server")
    index.save(folder / "db.cmrx")
    with serving(folder, "db.cmrx", "--most-megabytes", 1) as running:
        yield running


def listed(found) -> dict[str, list[list[int]]]:
    """What the server answers for a result of `search`: without the padding."""
    distances, ids = found
    kept = [[i for i, d in enumerate(row) if d <= BITS] for row in distances]
    return {n: [[int(row[i]) for i in r] for row, r in zip(x, kept, strict=True)]
            for n, x in (("distances", distances), ("ids", ids))}  # fmt: skip


def test_answers_are_those_of_the_index(server, index):
    q = codes_of(5, 4)
    hexes = [bytes(code).hex() for code in q]
    for k in (1, 7, 1000):
        assert server.ask("/search", {"codes": hexes, "k": k}).json == {"bits": BITS, **listed(index.search(q, k))}
    within = {"bits": BITS, **listed(index.search(q, 9, radius=5))}
    assert 0 < sum(map(len, within["ids"])) < 36
    assert server.ask("/search", {"codes": hexes, "k": 9, "radius": 5}).json == within
    some = index.ids[:40].tolist()
    among = {"bits": BITS, **listed(index.search(q, 3, where=some))}
    assert server.ask("/search", {"codes": hexes, "k": 3, "where": some}).json == among


def test_a_code_is_hex_or_base64_or_bytes_and_one_needs_no_list(server, index):
    code = codes_of(6, 1)[0]
    text, coded = bytes(code).hex(), base64.b64encode(code.tobytes()).decode()
    expected = listed(index.search(code[None], 10))["ids"]
    for one in (text, coded, code.tolist()):
        assert server.ask("/search", {"codes": one}).json["ids"] == expected
    three = server.ask("/search", {"codes": [text, coded, code.tolist()]}).json["ids"]
    assert three == expected * 3


@pytest.mark.parametrize("nbytes", [1, 2, 3, 4, 5, 8])
def test_hex_and_base64_of_one_length_are_told_apart(nbytes):
    from cmr_fast.serving.requests import queries_of

    for code in np.random.default_rng(nbytes).integers(0, 256, (50, nbytes), dtype=np.uint8):
        for text in (bytes(code).hex(), base64.b64encode(code.tobytes()).decode()):
            np.testing.assert_array_equal(queries_of(text, 8 * nbytes), code[None])


def test_a_body_that_does_not_come_leaves_its_place(index, monkeypatch, caplog):
    from serving_cases import Served

    from cmr_fast.serving import InProcess, app, make_app

    monkeypatch.setattr(app, "_PATIENCE", 0.2)
    running = Served(make_app(InProcess(index), most_requests=1))
    host, port = running.address.removeprefix("http://").split(":")
    head = b"POST /search HTTP/1.1\r\nHost: x\r\nContent-Length: 18\r\n\r\n{"
    with socket.create_connection((host, int(port)), timeout=60) as slow:
        slow.sendall(head)
        assert slow.recv(100).startswith(b"HTTP/1.1 408 ")
    assert running.ask("/search", {"codes": "000000"}).status == 200
    monkeypatch.setattr(app, "_PATIENCE", 60.0)
    with socket.create_connection((host, int(port)), timeout=60) as gone:
        gone.sendall(head)
    refusals = b'cmr_fast_requests_total{outcome="refused"} 2.0'
    deadline = time.monotonic() + 60
    while refusals not in running.ask("/metrics").content:
        assert time.monotonic() < deadline
    assert running.ask("/search", {"codes": "000000"}).status == 200
    assert "Traceback" not in caplog.text  # the failure of a client is none of the server


@pytest.mark.parametrize(
    ("status", "body", "says"),
    [
        (400, b"{", "expected a JSON object"),
        (400, [1], "expected a JSON object"),
        (422, {}, "expected one of codes, text and row, got none"),
        (422, {"codes": "000000", "row": 1}, "got codes and row"),
        (422, {"query": "000000"}, "query: no such field, expected codes, text"),
        (422, {"codes": "00"}, "expected a packed code of 20 bits, as 6 hex digits, base64 or a list of 3 bytes"),
        (422, {"codes": ["000000", "00zz00"]}, r"codes\[1\]: expected"),
        (422, {"codes": [[0, 0, 256]]}, "from 0 to 255"),
        (422, {"codes": [True, False, True]}, "expected a packed code"),
        (422, {"codes": []}, "got none"),
        (422, {"codes": 5}, "expected a packed code"),
        (422, {"codes": "0000ff"}, "20"),  # bits beyond the length
        (422, {"codes": "000000", "k": 0}, "k: "),
        (422, {"codes": "000000", "k": "3"}, "k: .*integer"),
        (422, {"codes": "000000", "radius": -1}, "radius: "),
        (422, {"codes": "000000", "where": [10**9]}, "where must name ids of the index: 1 are not"),
        (422, {"codes": "000000", "where": "all"}, "where: "),
        (422, {"codes": "000000", "by": "embeddings"}, "codes are compared as they are"),
        (422, {"text": "a dog"}, "started without --run"),
        (422, {"codes": ["000000"] * 3000, "k": 500}, "at most 1048576 hits"),
    ],
)  # fmt: skip
def test_what_is_refused_says_what_was_expected(server, status, body, says):
    assert re.search(says, server.refused(status, body))


def test_other_kinds_of_bodies_and_long_ones_are_refused(server):
    assert "application/json or image/" in server.refused(415, b"codes=00", "application/x-www-form-urlencoded")
    assert "without --run" in server.refused(422, b"\x89PNG", "image/png")
    assert server.refused(413, {"codes": ["00" * 3] * 200_000}) == "expected a body of at most 1048576 bytes"
    assert server.ask("/nothing").status == 404
    assert "without --run" in server.ask("/items/0").json["error"]


def test_a_body_that_does_not_say_its_length_is_cut_as_well(server):
    host, port = server.address.removeprefix("http://").split(":")
    chunk = b"10000\r\n" + b" " * 0x10000 + b"\r\n"
    with socket.create_connection((host, int(port)), timeout=60) as client:
        client.sendall(b"POST /search HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
                       b"Transfer-Encoding: chunked\r\n\r\n" + chunk * 17 + b"0\r\n\r\n")  # fmt: skip
        assert client.recv(100).startswith(b"HTTP/1.1 413 ")


def test_health_and_metrics_count_what_was_done(server):
    def counted() -> dict[str, float]:
        lines = server.ask("/metrics").content.decode().splitlines()
        return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines if line[0] != "#")}

    health = server.ask("/health")
    assert (health.status, health.json) == (
        200, {"status": "ok", "bits": BITS, "codes": 500, "shards": {"all": 1, "alive": 1}},
    )  # fmt: skip
    before = counted()
    server.ask("/search", {"codes": ["000000"] * 5})
    server.refused(422, {})
    after = counted()
    rise = {name: after[name] - before[name] for name in after if "_created" not in name}
    assert rise['cmr_fast_requests_total{outcome="ok"}'] == rise['cmr_fast_requests_total{outcome="refused"}'] == 1
    assert rise["cmr_fast_queries_total"] == 5
    assert rise["cmr_fast_search_seconds_count"] == 1
    assert (after["cmr_fast_codes"], after["cmr_fast_queue"], after["cmr_fast_lost_shards"]) == (500, 0, 0)


def test_callers_at_once_get_their_own_answers(server, index):
    q = codes_of(9, 60)
    with ThreadPoolExecutor(12) as pool:
        found = list(pool.map(lambda code: server.ask("/search", {"codes": code.tolist()}).json["ids"][0], q))
    assert found == index.search(q, 10)[1].tolist()


def test_beyond_the_requests_allowed_a_caller_is_told_when_to_come_again(index, tmp_path):
    index.save(tmp_path / "db.cmrx")
    with serving(tmp_path, "db.cmrx", "--most-requests", 1) as running:
        host, port = running.address.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=60) as slow:
            slow.sendall(b"POST /search HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
                         b"Content-Length: 18\r\n\r\n{\"codes\":")  # fmt: skip
            deadline = time.monotonic() + 60
            while (answer := running.ask("/search", {"codes": "000000"})).status == 200:
                assert time.monotonic() < deadline
            assert answer.status == 503 and answer.headers["Retry-After"] == "1"
            assert answer.json["error"] == "1 searches are under way, 1 are allowed"
            assert running.ask("/health").status == 200
            # the one that is under way is answered although the server is told to stop
            running.process.send_signal(signal.SIGTERM)
            time.sleep(0.5)
            assert running.process.poll() is None
            slow.sendall(b'"000000"}')
            assert slow.recv(100).startswith(b"HTTP/1.1 200 ")
        assert running.process.wait(60) == 0
        assert running.process.stdout.read() == "stopped\n"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_it(index, tmp_path, number):
    """In a process that ignores SIGINT too, as a shell's background jobs do."""
    ignoring = signal.signal(signal.SIGINT, signal.SIG_IGN)  # the server inherits it
    index.save(tmp_path / "db.cmrx")
    with serving(tmp_path, "db.cmrx") as running:
        assert running.said[0] == "db.cmrx: 500 codes of 20 bits"
        signal.signal(signal.SIGINT, ignoring)
        assert running.stop(number) == 0
    assert (tmp_path / "stderr").read_text() == ""


def test_a_folder_of_shards_is_searched_in_this_process(index, tmp_path):
    from cmr_fast.distributed import ShardedIndex

    ShardedIndex.build(tmp_path / "shards", index, shards=3)
    q = codes_of(3, 2)
    with serving(tmp_path, "shards") as running:
        found = running.ask("/search", {"codes": q.tolist(), "k": 5}).json
    assert found == {"bits": BITS, **listed(index.search(q, 5))}


def test_what_cannot_be_served_is_refused(index, tmp_path, capsys):
    file = tmp_path / "db.cmrx"
    index.save(file)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert re.fullmatch(
            rf"--port {port} of 127.0.0.1 is in use; --port \d+ is free now",
            refused(capsys, "serve", file, "--port", port),
        )
    assert "no such file" in refused(capsys, "serve", tmp_path / "other", "--port", 0)
    (tmp_path / "text").write_text("no index")
    assert str(tmp_path / "text") in refused(capsys, "serve", tmp_path / "text", "--port", 0)
    assert "--host nowhere.invalid" in refused(capsys, "serve", file, "--host", "nowhere.invalid")
    assert "cannot be listened at" in refused(capsys, "serve", file, "--host", "192.0.2.1")
    assert "65535 or less" in refused(capsys, "serve", file, "--port", 70000)
    assert "--replicas is for shards over --ray" in refused(capsys, "serve", file, "--replicas", 2)
    assert "--ray is for a folder of shards" in refused(capsys, "serve", file, "--ray", "local", "--port", 0)


def test_a_server_that_follows_at_the_same_port_shows_items_of_its_own(index):
    from serving_cases import Served

    from cmr_fast.serving import InProcess, make_app

    pages = [Served(make_app(InProcess(index))).ask("/").content.decode() for _ in range(2)]
    begun = [re.search(r'"begun": "(\w+)"', page)[1] for page in pages]
    assert begun[0] != begun[1]  # browsers keep items by their address, of which this is a part
    assert all("`items/${id}?of=${settings.begun}`" in page for page in pages)


def test_an_item_that_cannot_be_read_is_an_error_as_others_are(index):
    from serving_cases import Served

    from cmr_fast import InputError
    from cmr_fast.serving import InProcess, make_app

    class Gone:
        count = 1

        def item(self, number):
            raise InputError(f"{number}.jpg: cannot be read")

    running = Served(make_app(InProcess(index), Gone()))
    assert running.refused(503, None, path="/items/0") == "0.jpg: cannot be read"
