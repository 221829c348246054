"""write_aside: whole files or none, through links, never over devices, and nothing left of saves that were killed."""

import os
import signal
import stat
import threading

import pytest

from cmr_fast import _files
from cmr_fast._files import as_path, pointer, write_aside
from cmr_fast.errors import InputError


def save(path, text="new"):
    with write_aside(path) as aside:
        aside.write_text(text)


def names(folder):
    return sorted(os.listdir(folder))


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "deep" / "er" / "a.txt"
    save(path, "one")
    with pytest.raises(KeyError), write_aside(path) as aside:
        aside.write_text("half")
        raise KeyError
    assert path.read_text() == "one" and names(path.parent) == ["a.txt"]


def test_the_aside_is_an_empty_file_of_the_same_name(tmp_path):
    with write_aside(tmp_path / "a.b.npz") as aside:
        assert aside.name == "a.b.npz" and aside.stat().st_size == 0
        assert aside.parent.stat().st_mode & 0o077 == 0
    assert names(tmp_path) == ["a.b.npz"]


def test_a_writer_that_renames_over_the_aside(tmp_path):
    """As safetensors does."""
    with write_aside(tmp_path / "a") as aside:
        (aside.parent / "other").write_text("whole")
        (aside.parent / "left").write_text("")
        os.replace(aside.parent / "other", aside)
        save(tmp_path / "a", "another's")
    assert (tmp_path / "a").read_text() == "whole" and names(tmp_path) == ["a"]


def test_permissions_stay(tmp_path):
    path = tmp_path / "a"
    save(path)
    assert path.stat().st_mode & 0o777 == 0o666 & ~_files._umask()
    path.chmod(0o640)
    save(path)
    assert path.stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize("absolute", [True, False])
def test_a_link_stays_and_the_file_that_it_names_is_replaced(tmp_path, absolute):
    (tmp_path / "store").mkdir()
    real, link, again = tmp_path / "store" / "real", tmp_path / "link", tmp_path / "again"
    link.symlink_to(real if absolute else "store/real")
    again.symlink_to("link")
    for text in ("the first makes the file", "the second replaces it"):
        save(again, text)
        assert real.read_text() == text and link.is_symlink() and again.is_symlink()
        assert (real.stat().st_mode & 0o777) == 0o666 & ~_files._umask()
    assert names(tmp_path) == ["again", "link", "store"] and names(real.parent) == ["real"]


def test_links_in_a_circle(tmp_path):
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    with pytest.raises(OSError, match=str(tmp_path / "a")):
        save(tmp_path / "a")


@pytest.mark.parametrize("through_a_link", [False, True])
@pytest.mark.parametrize("kind", ["folder", "fifo", "device", "socket"])
def test_what_is_no_file_is_refused_and_stays(tmp_path, kind, through_a_link):
    path = tmp_path / "x"
    if kind == "folder":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/null")
    else:
        os.mknod(path, 0o600 | stat.S_IFSOCK)
    before = os.stat(path)
    if through_a_link:
        (tmp_path / "link").symlink_to("x")
    asked = tmp_path / "link" if through_a_link else path
    with pytest.raises(InputError, match=rf"^{asked}: is a (folder|device, FIFO or socket), expected the name"):
        save(asked)
    assert os.path.samestat(before, os.stat(path)) and os.stat(path).st_mode == before.st_mode


def test_errors_of_the_system_name_the_path(tmp_path):
    for path in (tmp_path / ("n" * 256), "/proc/cmr_fast.index"):
        with pytest.raises(OSError, match=str(path)) as info:
            save(path)
        assert info.value.errno and info.value.filename == str(path)
    with pytest.raises(OSError, match=f"No space left on device: '{tmp_path}/a'"), write_aside(tmp_path / "a"):
        raise OSError(28, "No space left on device")
    with pytest.raises(FileNotFoundError, match="elsewhere"), write_aside(tmp_path / "a"):
        os.open("/elsewhere", os.O_RDONLY)
    save(tmp_path / "a")
    with pytest.raises(InputError, match=f"{tmp_path}/a/b: cannot be made, since {tmp_path}/a is not a folder"):
        save(tmp_path / "a" / "b" / "c")


def test_names_as_long_as_the_system_takes(tmp_path):
    for name in ("n" * 255, "ü" * 127, "a." + "b" * 253):
        save(tmp_path / name)
        save(tmp_path / name, "again")
        assert (tmp_path / name).read_text() == "again"
    assert len(names(tmp_path)) == 3


@pytest.mark.parametrize("path", [None, 3, "", "a\0b", ["a"]])
def test_what_is_no_path_is_refused(path):
    with pytest.raises(InputError, match="path must be the path of a file"):
        save(path)
    assert str(as_path(b"a/b")) == "a/b"


def killed_while_saving(path):
    """A child that has begun to write, killed."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        with write_aside(path) as aside:
            aside.write_text("x" * 1000)
            os.write(writer, b"1")
            signal.pause()
    os.read(reader, 1)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    os.close(reader)
    os.close(writer)


@pytest.mark.parametrize("name", ["s.cmrx", "n" * 255])
def test_the_next_save_removes_what_killed_ones_left(tmp_path, name):
    path = tmp_path / name
    for _ in range(3):
        killed_while_saving(path)
    killed_while_saving(tmp_path / "other")
    others = {".s.cmrx.swp", ".s.cmrx.abcdefgh.cmrx", ".s.cmrx.abcdefgh.aside.txt"}
    for other in others:
        (tmp_path / other).write_text("somebody else's")
    assert len(names(tmp_path)) == 5, "each removes what the one before left"
    save(path)
    assert {name, *others} < set(names(tmp_path)) and len(names(tmp_path)) == 5
    save(tmp_path / "other")
    assert {name, "other", *others} == set(names(tmp_path))


def test_saves_of_live_processes_and_threads_are_left_alone(tmp_path):
    path = tmp_path / "a"
    begun, finish = threading.Event(), threading.Event()

    def slow():
        with write_aside(path) as aside:
            begun.set()
            assert finish.wait(30)
            aside.write_text("the slow one")

    thread = threading.Thread(target=slow)
    thread.start()
    assert begun.wait(30)
    save(path, "the fast one")
    child = os.fork()  # another process, which has inherited the open lock
    if child == 0:
        save(path, "the child's")
        os._exit(0)
    os.waitpid(child, 0)
    assert path.read_text() == "the child's" and len(names(tmp_path)) == 2
    finish.set()
    thread.join()
    assert path.read_text() == "the slow one" and names(tmp_path) == ["a"]


def test_many_at_once(tmp_path):
    failed = []

    def work(number):
        try:
            for i in range(30):
                save(tmp_path / "a", f"{number} {i}" * 50)
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed and names(tmp_path) == ["a"]


def test_pointers_are_named():
    lfs = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"ab" * 32 + b"\nsize 327925944\n"
    assert "Git LFS pointer, not the file of 327925944 bytes" in pointer(lfs)
    assert "git annex get" in pointer(b"/annex/objects/MD5E-s3--0")
    assert pointer(b"CMRFHAM\n") is None
