"""The Unix socket between a caller and an actor: what is answered, raised, given up and broken."""

import os
import signal
import socket
import struct
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from cmr_fast import HammingIndex, InputError
from cmr_fast.distributed import ShardedIndex, ShardLostError, _line
from cmr_fast.distributed._worker import ShardWorker


class Target:
    def double(self, x):
        return 2 * x

    def refuse(self, text):
        raise ValueError(text)

    def late(self, seconds, x):
        time.sleep(seconds)
        return x


@pytest.fixture
def target(tmp_path):
    _line.serve(str(tmp_path / "s"), Target())
    return str(tmp_path / "s")


def called(line, method, *arguments):
    assert line.take()
    try:
        line.send(method, arguments)
        return line.receive()
    finally:
        line.give_back()


def test_calls_are_answered_one_after_the_other(target):
    line = _line.Line(target, 30.0)
    for x in (0, 3, np.arange(500_000)):
        assert np.array_equal(called(line, "double", x), 2 * x)
    assert line.take()
    assert not line.take()
    line.give_back()
    assert called(line, "double", 1) == 2


def test_what_the_target_raises_comes_back_with_where(target):
    line = _line.Line(target, None)
    found = called(line, "refuse", "no such code")
    assert isinstance(found, ValueError)
    assert str(found) == "no such code"
    assert "in refuse" in found.__notes__[0]
    assert isinstance(called(line, "absent"), AttributeError)
    assert called(line, "double", 1) == 2


def test_a_line_whose_answer_was_not_waited_for_is_closed_and_the_target_takes_another(target):
    line = _line.Line(target, None)
    assert line.take()
    line.send("double", (np.zeros(500_000),))  # more than the socket holds: the target waits for a reader
    line.give_back(answered=False)
    assert line.broken
    assert not line.take()
    assert called(_line.Line(target, 30.0), "double", 7) == 14


def test_an_answer_that_does_not_come_ends_the_line(target):
    line = _line.Line(target, 0.05)
    with pytest.raises(TimeoutError):
        called(line, "late", 5.0, 1)
    assert line.broken
    assert not line.take()


def test_an_answer_that_stops_in_the_middle_is_none(tmp_path):
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "s"))
        listener.listen()
        line = _line.Line(str(tmp_path / "s"), 0.3)
        peer, _ = listener.accept()
        with peer:
            peer.sendall(struct.pack("!i", 1000) + b"0123456789")
            line.take()
            with pytest.raises(TimeoutError):
                line.receive()
            assert line.broken


def test_a_line_to_a_process_that_died_raises_and_is_broken(tmp_path):
    code = f"""
        import time
        from cmr_fast.distributed import _line
        class Target:
            def sleep(self, seconds): time.sleep(seconds)
        _line.serve({str(tmp_path / "s")!r}, Target())
        print("ready", flush=True)
        time.sleep(60)
    """
    with subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        line = _line.Line(str(tmp_path / "s"), 30.0)
        line.take()
        line.send("sleep", (60,))
        os.kill(process.pid, signal.SIGKILL)
        with pytest.raises((EOFError, OSError)):
            line.receive()
        assert line.broken
        with pytest.raises(OSError, match="closed"):
            line.send("sleep", (60,))


def test_a_worker_listens_once_and_nowhere_that_is_not_there(tmp_path):
    worker = ShardWorker(str(tmp_path), 64)
    assert worker.listen(str(tmp_path / "absent")) is None
    address = worker.listen(str(tmp_path))
    assert worker.listen(str(tmp_path)) == address
    assert len(list(tmp_path.iterdir())) == 1
    assert isinstance(called(_line.Line(address, 30.0), "absent"), AttributeError)


@pytest.fixture
def ray(monkeypatch):
    ray = pytest.importorskip("ray")
    monkeypatch.setenv("RAY_worker_niceness", "0")
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield ray
    ray.shutdown()


@pytest.mark.timeout(400)
def test_searches_go_by_lines_once_actors_listen_and_by_ray_while_one_is_started_anew(ray, tmp_path, monkeypatch):
    codes = np.random.default_rng(0).integers(0, 256, (200, 8), dtype=np.uint8)
    ShardedIndex.build(tmp_path / "x", codes, shards=2)
    one = HammingIndex(64)
    one.add(codes)
    expected = one.search(codes[:3], 5)

    def until_both_have_lines(sharded):
        for _ in range(600):
            found = sharded.search(codes[:3], 5)
            assert all((a == b).all() for a, b in zip(found, expected, strict=True))
            lines = [shard[0].line for shard in sharded._pool.shards]
            if all(line is not None and not line.broken for line in lines):
                return lines
            time.sleep(0.1)
        raise AssertionError("no lines")

    with ShardedIndex(tmp_path / "x", replicas=1) as sharded:
        lines = until_both_have_lines(sharded)
        sent = []
        monkeypatch.setattr(
            _line.Line, "send", lambda line, *call, send=_line.Line.send: (sent.append(line), send(line, *call))
        )
        sharded.search(codes[:3], 5)
        sharded.search(codes[:3], 5, where=np.arange(200))
        assert sent == [*lines, *lines]
        sharded.range_search(codes[:3], 8)  # hits may be many: by Ray
        sharded.search(np.tile(codes, (60, 1)), 5)  # 96 kB of queries: too many for a socket's buffer
        sharded.search(np.tile(codes, (80, 1)), 5)  # 128 kB: stored once for all
        assert sent == [*lines, *lines]
        ray.kill(sharded.actors(0)[0], no_restart=False)
        anew = lines
        for _ in range(600):
            try:
                anew = until_both_have_lines(sharded)
            except ShardLostError:  # it is not back yet
                time.sleep(0.1)
            if anew[0] is not lines[0]:
                break
        assert anew[0] is not lines[0]
        assert anew[1] is lines[1]
        folder = Path(sharded._pool._sockets)
        child = os.fork()
        if not child:
            sharded._pool._sweep()
            os._exit(0)
        os.waitpid(child, 0)
        assert folder.is_dir(), "a child that ends leaves its parent's sockets"
    assert not folder.exists()


@pytest.mark.timeout(400)
def test_an_actor_that_stands_still_is_named_in_time_and_a_closed_index_says_so(ray, tmp_path):
    codes = np.random.default_rng(0).integers(0, 256, (400_000, 8), dtype=np.uint8)
    ShardedIndex.build(tmp_path / "x", codes, shards=2)
    with ShardedIndex(tmp_path / "x", timeout=2.0) as sharded:
        sharded.search(codes[:3], 5)
        pid = ray.get(sharded.actors(0)[0].ready.remote(sharded._manifest.shards[0])).found
        os.kill(pid, signal.SIGSTOP)
        try:
            for where in (None, np.ones(400_000, bool)):
                found = sharded.search(codes[:3], 5, where=where, partial=True)
                assert found.missing == (0,)
        finally:
            os.kill(pid, signal.SIGCONT)
        until, errors = time.monotonic() + 60, []

        def ask():
            while time.monotonic() < until:
                try:
                    sharded.search(codes[:3], 5)
                except ShardLostError:
                    pass
                except InputError as error:
                    errors.append(str(error))
                    return

        askers = [threading.Thread(target=ask) for _ in range(3)]
        for asker in askers:
            asker.start()
        time.sleep(1)
    for asker in askers:
        asker.join()
    assert len(errors) == 3 and all("closed" in error for error in errors)
