"""One trainer per folder: who is refused, and which locks are stale."""

import json
import os
import subprocess
import sys
import threading
import time

import pytest

from memformer.training import lock
from memformer.training.config import RunError
from memformer.training.folder import check_same_config, read_run_config, write_run_config
from memformer.training.lock import LOCK, run_lock
from tests.training.small import small_config


def leave(folder, **changed):
    """A lock as a killed trainer leaves it."""
    with run_lock(str(folder)):
        owner = json.loads((folder / LOCK).read_text())
    (folder / LOCK).write_text(json.dumps({**owner, **changed}))
    return folder / LOCK


def ended():
    """The id of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_the_second_is_refused_and_the_first_releases(tmp_path):
    with run_lock(str(tmp_path)):
        with pytest.raises(RunError, match=f"another trainer is running .*process {os.getpid()} on host .*--workdir"):
            with run_lock(str(tmp_path)):
                pytest.fail("two owners")
        assert os.listdir(tmp_path) == [LOCK]
    assert os.listdir(tmp_path) == []
    with pytest.raises(KeyError), run_lock(str(tmp_path)):
        raise KeyError
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    "changed",
    [lambda: {"pid": ended()}, lambda: {"start": "1"}, lambda: {"pid": None}],
    ids=["ended", "reused id", "no id"],
)
def test_stale_on_this_host(tmp_path, changed):
    leave(tmp_path, **changed())
    with run_lock(str(tmp_path)):
        assert json.loads((tmp_path / LOCK).read_text())["pid"] == os.getpid()


def test_killed_but_not_waited_for(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    start = lock._start(process.pid)
    leave(tmp_path, pid=process.pid, start=start)
    with pytest.raises(RunError, match=f"process {process.pid}"), run_lock(str(tmp_path)):
        pytest.fail("it is running")
    process.kill()
    while lock._start(process.pid) is not None:
        time.sleep(0.01)
    with run_lock(str(tmp_path)):
        pass
    process.communicate()


def test_a_stale_lock_is_replaced_by_one(tmp_path, monkeypatch):
    """Eight trainers find the lock of a dead one; slow reads make each act on what is no longer there."""
    leave(tmp_path, pid=ended())
    read, inside, most, refused = lock._Lock._read, [], [], []

    def slow(self):
        owner = read(self)
        time.sleep(0.02)
        return owner

    def start():
        try:
            with run_lock(str(tmp_path)):
                inside.append(0)
                most.append(len(inside))
                done.wait(10)
                inside.pop()
        except RunError as error:
            refused.append(str(error))

    monkeypatch.setattr(lock._Lock, "_read", slow)
    done = threading.Event()
    threads = [threading.Thread(target=start) for _ in range(8)]
    for thread in threads:
        thread.start()
    while len(refused) < 7 and any(thread.is_alive() for thread in threads):
        time.sleep(0.01)
        if len(most) > 1:
            break
    done.set()
    for thread in threads:
        thread.join()
    assert most == [1] and len(refused) == 7 and all("another trainer is running" in said for said in refused)
    assert os.listdir(tmp_path) == []


def test_a_folder_in_place_of_the_lock(tmp_path):
    (tmp_path / LOCK).mkdir()
    with pytest.raises(RunError, match="lock.json must be the lock of a run, a file, and is a folder"):
        with run_lock(str(tmp_path)):
            pytest.fail("there is no lock")


def test_a_lock_that_cannot_be_written_leaves_nothing(tmp_path, monkeypatch):
    """Equal process ids of two containers share no file."""
    opened = []

    def full(path, mode="r", **options):
        opened.append(path)
        file = open(path, mode, **options)
        file.close()
        raise OSError(28, "No space left on device")

    for _ in range(2):
        monkeypatch.setattr(lock, "open", full, raising=False)
        with (
            pytest.raises(RunError, match="cannot write .*: No space left.*MiB free"),
            run_lock(str(tmp_path)),
        ):
            pytest.fail("there is no lock")
    assert len(set(opened)) == 2 and os.listdir(tmp_path) == []


@pytest.mark.parametrize("content", ["", "{", "[]", '{"host": null}'])
def test_unreadable(tmp_path, content, monkeypatch):
    """A full disk leaves such files."""
    monkeypatch.setattr(lock, "STALE", 0.05)
    monkeypatch.setattr(lock, "POLL", 0.01)
    (tmp_path / LOCK).write_text(content)
    with run_lock(str(tmp_path)):
        assert json.loads((tmp_path / LOCK).read_text())["pid"] == os.getpid()


@pytest.mark.parametrize("where", ["host", "boot", "namespace"])
def test_an_owner_elsewhere_is_judged_by_its_heartbeat(tmp_path, monkeypatch, where):
    """On another host, on one of the same name, or in another container of this host."""
    monkeypatch.setattr(lock, "STALE", 0.3)
    monkeypatch.setattr(lock, "POLL", 0.01)
    path = leave(tmp_path, **{where: "elsewhere", "pid": 1})
    with run_lock(str(tmp_path)):
        assert json.loads(path.read_text())[where] != "elsewhere"
    path = leave(tmp_path, **{where: "elsewhere", "pid": 1})
    stop = threading.Event()

    def beat():
        while not stop.wait(0.02):
            os.utime(path)

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        with pytest.raises(RunError, match="another trainer is running .* process 1 on host"), run_lock(str(tmp_path)):
            pytest.fail("it is running")
    finally:
        stop.set()
        thread.join()
    assert json.loads(path.read_text())[where] == "elsewhere"


def test_heartbeat(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "BEAT", 0.01)
    with run_lock(str(tmp_path)):
        first = os.stat(tmp_path / LOCK).st_mtime_ns
        end = time.monotonic() + 10
        while os.stat(tmp_path / LOCK).st_mtime_ns == first:
            assert time.monotonic() < end
            time.sleep(0.01)


def test_a_lock_taken_over_is_not_released(tmp_path):
    with run_lock(str(tmp_path)):
        (tmp_path / LOCK).write_text('{"host": "elsewhere"}')
    assert (tmp_path / LOCK).exists()


def test_folder_that_cannot_be_written(tmp_path):
    with pytest.raises(RunError, match="cannot write .*lock.json"), run_lock(str(tmp_path / "none")):
        pytest.fail("there is no folder")


def test_a_config_written_while_this_trainer_started(tmp_path):
    folder = str(tmp_path)
    check_same_config(folder, None)
    write_run_config(folder, None, small_config().to_dict())
    check_same_config(folder, read_run_config(folder))
    with pytest.raises(RunError, match="another trainer wrote to"):
        check_same_config(folder, None)
