"""The Unix socket between a caller and an actor: what is answered, raised, given up and broken."""

import os
import signal
import subprocess
import sys
import textwrap
import time

import numpy as np
import pytest

from cmr_fast import HammingIndex
from cmr_fast.distributed import ShardedIndex, ShardLostError, _line


class Target:
    def double(self, x):
        return 2 * x

    def refuse(self, text):
        raise ValueError(text)

    def late(self, seconds, x):
        time.sleep(seconds)
        return x


@pytest.fixture
def line(tmp_path):
    _line.serve(str(tmp_path / "s"), Target())
    made = _line.Line(str(tmp_path / "s"))
    yield made
    made.close()


def called(line, method, *arguments, timeout=30.0):
    assert line.take()
    try:
        line.send(method, arguments)
        return line.receive(timeout)
    finally:
        line.give_back()


def test_calls_are_answered_one_after_the_other(line):
    for x in (0, 3, np.arange(50_000)):
        assert np.array_equal(called(line, "double", x), 2 * x)
    assert line.take()
    assert not line.take()
    line.give_back()
    assert called(line, "double", 1) == 2


def test_what_the_target_raises_comes_back(line):
    found = called(line, "refuse", "no such code")
    assert isinstance(found, ValueError)
    assert str(found) == "no such code"
    assert isinstance(called(line, "absent"), AttributeError)
    assert called(line, "double", 1) == 2


def test_the_answer_of_a_call_that_was_given_up_is_no_other_calls_answer(line):
    assert line.take()
    line.send("double", (5,))
    line.give_back()
    assert called(line, "double", 7) == 14


def test_an_answer_that_does_not_come_ends_the_line(line):
    with pytest.raises(TimeoutError):
        called(line, "late", 5.0, 1, timeout=0.05)
    assert line.broken
    assert not line.take()


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
        line = _line.Line(str(tmp_path / "s"))
        line.take()
        line.send("sleep", (60,))
        os.kill(process.pid, signal.SIGKILL)
        with pytest.raises((EOFError, OSError)):
            line.receive(30.0)
        assert line.broken
        with pytest.raises(OSError, match="closed"):
            line.send("sleep", (60,))


def test_an_address_that_cannot_be_is_refused(tmp_path):
    with pytest.raises(OSError, match="No such file"):
        _line.serve(str(tmp_path / "absent" / "s"), Target())


@pytest.fixture
def ray(monkeypatch):
    ray = pytest.importorskip("ray")
    monkeypatch.setenv("RAY_worker_niceness", "0")
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield ray
    ray.shutdown()


@pytest.mark.timeout(400)
def test_searches_go_by_lines_once_actors_listen_and_by_ray_while_one_is_started_anew(ray, tmp_path):
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
        before = [line._number for line in lines]
        sharded.search(codes[:3], 5)
        sharded.range_search(codes[:3], 8)
        assert [line._number for line in lines] == [n + 2 for n in before]
        sharded.search(np.tile(codes, (80, 1)), 5)  # 128 kB of queries are stored once for all: by Ray
        assert [line._number for line in lines] == [n + 2 for n in before]
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
