"""The lock of a key: freed with its holder, waited for no longer than allowed, done without where there is none."""

import errno
import fcntl
import hashlib
import os
import signal
import threading
import time
import warnings

import pytest

from mlagen.cache import CacheWarning, DiskCache, Entry, Key, lock_timeout
from mlagen.errors import RequestError

KEY = Key("host", "gfx950", hashlib.sha256(b"source").hexdigest(), "compiler", (), 1)
ENTRY = Entry(b"binary", "source", {})

HOLD = """
import fcntl, sys
file = open({path!r}, "w")
fcntl.flock(file, fcntl.LOCK_EX)
print("held", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def holder(start, cache_root):
    """Another process that holds the key's lock until its standard input ends."""
    path = DiskCache().entries_folder / f"{KEY.digest}.lock"
    for folder in (cache_root, path.parent):
        folder.mkdir(mode=0o700)
    process = start(HOLD.format(path=str(path)))
    assert process.stdout.readline() == "held\n"
    return process


def get_timed() -> tuple[Entry, float]:
    started = time.monotonic()
    return DiskCache().get(KEY, lambda: ENTRY), time.monotonic() - started


@pytest.mark.parametrize("timeout", ["0", "0.4"])
def test_who_waits_too_long_compiles_alone(holder, monkeypatch, timeout):
    monkeypatch.setenv("MLAGEN_LOCK_TIMEOUT", timeout)
    with pytest.warns(CacheWarning, match=f"waited {timeout} s") as caught:
        entry, seconds = get_timed()
    assert len(caught) == 1
    assert entry.binary == ENTRY.binary
    assert float(timeout) <= seconds < 20
    assert DiskCache().read(KEY)[0] is not None  # and publishes, so that the next one need not wait
    assert get_timed()[1] < 5


@pytest.mark.parametrize("end", ["released", "killed"])
def test_the_lock_goes_with_its_holder(holder, end):
    def finish():
        time.sleep(0.5)
        holder.stdin.close() if end == "released" else holder.send_signal(signal.SIGKILL)

    thread = threading.Thread(target=finish)
    thread.start()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        entry, seconds = get_timed()
    thread.join()
    assert entry.binary == ENTRY.binary
    assert 0.3 < seconds < 20


def test_the_lock_of_another_key_is_another_lock(holder):
    other = Key("host", "gfx942", KEY.source_sha256, "compiler", (), 1)
    started = time.monotonic()
    DiskCache().get(other, lambda: ENTRY)
    assert time.monotonic() - started < 20


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_no_obstacle(cache_root, monkeypatch, number):
    """And none is made up by leaving a file that outlives its maker."""

    def refuse(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        entry, seconds = get_timed()
    assert entry.binary == ENTRY.binary
    assert seconds < 10
    assert DiskCache().read(KEY)[0] is not None


@pytest.mark.parametrize("text", ["soon", "-1", "inf", "nan"])
def test_an_impossible_timeout_is_an_error(monkeypatch, text):
    monkeypatch.setenv("MLAGEN_LOCK_TIMEOUT", text)
    with pytest.raises(RequestError, match=f"MLAGEN_LOCK_TIMEOUT='{text}': expected a number of seconds"):
        DiskCache().get(KEY, lambda: ENTRY)


def test_the_timeout_has_a_default(monkeypatch):
    monkeypatch.setenv("MLAGEN_LOCK_TIMEOUT", "")
    assert lock_timeout() == 60
