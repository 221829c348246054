import multiprocessing
import os
import signal
import threading
import time
from pathlib import Path

import pytest
import torch

from cmr_fast.errors import InputError
from cmr_fast.ops._dispatch import choose_threads
from cmr_fast.reports.reproduce import common


def _note(folder, number):
    (folder / f"{number}").touch()
    if number == 0:
        raise InputError("the first fails")
    time.sleep(0.5)


def test_a_training_that_fails_leaves_out_those_that_have_not_begun(tmp_path):
    with pytest.raises(InputError, match="the first fails"):
        common.Pool(2).run(_note, [(tmp_path, number) for number in range(60)], True)
    begun = len(list(tmp_path.iterdir()))
    time.sleep(1.2)
    assert len(list(tmp_path.iterdir())) == begun < 30, "and none of them runs on"


def _note_threads(file):
    file.write_text(f"{torch.get_num_threads()} {choose_threads()}")


def _run_on(folder, number):
    (folder / f"{number}").touch()
    time.sleep(2)


def test_what_a_process_was_handed_does_not_begin_after_ctrl_c(tmp_path):
    timer = threading.Timer(6, signal.raise_signal, [signal.SIGINT])
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        common.Pool(1).run(_run_on, [(tmp_path, number) for number in range(60)], True)
    begun = len(list(tmp_path.iterdir()))
    time.sleep(2.5)
    assert len(list(tmp_path.iterdir())) == begun


def _be_killed(folder):
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_process_has_one_thread_and_one_that_is_killed_is_said(tmp_path):
    common.Pool(2).run(_note_threads, [(tmp_path / "0",), (tmp_path / "1",)], True)
    assert [(tmp_path / name).read_text() for name in "01"] == ["1 1", "1 1"]
    pool = common.Pool(2)
    with pytest.raises(common.KilledError, match="one of 2 processes was killed, as for lack of memory"):
        pool.run(_be_killed, [(tmp_path,), (tmp_path,)], True)
    pool.run(_note_threads, [(tmp_path / "2",)], True)  # anew
    (worker,) = pool._executor._processes
    os.kill(worker, signal.SIGKILL)  # while it has nothing to do
    while alive(worker):
        time.sleep(0.05)
    with pytest.raises(common.KilledError):
        for _ in range(100):  # until the executor has seen it
            pool.run(_note_threads, [(tmp_path / "3",)], True)
            time.sleep(0.05)


def _say_and_stay(folder, number):
    (folder / f"{number}").write_text(str(os.getpid()))
    time.sleep(600)


def _two_that_stay(folder):
    common.Pool(2).run(_say_and_stay, [(folder, 0), (folder, 1)], True)


@pytest.mark.timeout(180)
def test_what_trains_ends_with_a_parent_that_is_killed(tmp_path):
    parent = multiprocessing.get_context("spawn").Process(target=_two_that_stay, args=(tmp_path,))
    parent.start()
    files = [tmp_path / "0", tmp_path / "1"]
    while not all(file.exists() and file.read_text() for file in files):
        time.sleep(0.1)
    parent.kill()
    parent.join()
    for file in files:
        while alive(int(file.read_text())):
            time.sleep(0.1)


def alive(pid):
    """Whether a process runs; one that is dead and not waited for does not."""
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False
