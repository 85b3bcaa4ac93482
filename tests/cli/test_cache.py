"""mlagen cache: where the cache is, what is in it, whether it is sound, and an end to it."""

import hashlib
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from mlagen.cache import BINARY, META, DiskCache, Entry, Key
from mlagen.cli import main


class Done(NamedTuple):
    returncode: int
    stdout: str
    stderr: str


@pytest.fixture
def mlagen(tmp_path, monkeypatch, capsys) -> Callable[..., Done]:
    """Run `mlagen cache` in this process: its exit status, standard output and standard error."""
    monkeypatch.setenv("MLAGEN_CACHE_DIR", str(tmp_path / "cache"))

    def run(*words: str) -> Done:
        monkeypatch.setattr(sys, "argv", ["mlagen", "cache", *words])
        with pytest.raises(SystemExit) as caught:
            main()
        return Done(caught.value.code or 0, *capsys.readouterr())

    return run


@pytest.fixture
def store(tmp_path) -> DiskCache:
    """A cache with two kernels."""
    store = DiskCache(tmp_path / "cache")
    for kernel, arch in (("first", "gfx942"), ("second", "gfx950")):
        key = Key("device", arch, hashlib.sha256(b"source").hexdigest(), "zig", ("-O3",), 1)
        store.get(key, lambda kernel=kernel: Entry(b"b" * 5000, "source", {"kernel": kernel, "compiler": "zig 1"}))
    return store


def folder_of(store: DiskCache, kernel: str) -> Path:
    (folder,) = (path for path in store.entries() if json.loads((path / META).read_text())["kernel"] == kernel)
    return folder


def test_path(mlagen, tmp_path, monkeypatch):
    done = mlagen("path")
    assert (done.returncode, done.stdout) == (0, f"{tmp_path / 'cache'}\n")
    monkeypatch.setenv("MLAGEN_CACHE_DIR", "")
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert mlagen("path").stdout == "/x/mlagen\n"
    assert not (tmp_path / "cache").exists()


def test_list_names_what_is_there(mlagen, store):
    done = mlagen("list")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    for kernel, arch in (("first", "gfx942"), ("second", "gfx950")):
        digest = folder_of(store, kernel).name[:12]
        (line,) = (line.split() for line in lines if digest in line)
        assert line[:4] == [digest, kernel, "device", arch]
        assert 4 < int(line[4]) < 10  # KiB
    assert lines[-1] == f"2 kernels in {store.root}"


def test_list_as_json(mlagen, store):
    rows = json.loads(mlagen("list", "--json").stdout)
    assert [row["digest"] for row in rows] == [path.name for path in store.entries()]
    assert {row["kernel"]: row["arch"] for row in rows} == {"first": "gfx942", "second": "gfx950"}
    assert all(row["damage"] == "" and row["bytes"] > 5000 and row["compiler"] == "zig 1" for row in rows)


def test_list_and_verify_find_damage(mlagen, store):
    assert mlagen("verify").stdout == f"2 kernels in {store.root}, 0 damaged\n"
    assert mlagen("verify").returncode == 0
    first, second = folder_of(store, "first"), folder_of(store, "second")
    os.truncate(first / BINARY, 10)
    (second / META).write_bytes(b"\xff")
    done = mlagen("verify")
    assert (done.returncode, done.stdout) == (1, f"2 kernels in {store.root}, 2 damaged\n")
    assert sorted(done.stderr.splitlines()) == sorted(
        [
            f"mlagen: {first}: kernel.bin is not what was compiled, its sha256 differs",
            f"mlagen: {second}: kernel.src or meta.json is garbage",
        ]
    )
    listed = mlagen("list")
    assert listed.returncode == 0, listed.stderr
    assert listed.stdout.count("damaged: ") == 2
    assert first.is_dir()  # looking changes nothing
    assert second.is_dir()


def test_clear(mlagen, store):
    done = mlagen("clear")
    assert (done.returncode, done.stdout) == (0, f"removed 2 kernels from {store.root}\n")
    assert mlagen("list").stdout == f"0 kernels in {store.root}\n"
    assert mlagen("clear").stdout == f"removed 0 kernels from {store.root}\n"


@pytest.mark.parametrize("command", ["list", "verify", "clear"])
def test_an_unsafe_cache_is_refused(mlagen, store, command):
    store.root.chmod(0o777)
    done = mlagen(command)
    assert done.returncode == 1
    assert done.stderr.startswith(f"mlagen: cache {store.root}: others can write to it (mode 0777)")
    assert len(done.stderr.splitlines()) == 1
    assert len(list(store.entries())) == 2


@pytest.mark.parametrize("command", ["path", "list", "verify", "clear"])
def test_a_cache_that_is_not_there_is_empty(mlagen, tmp_path, command):
    done = mlagen(command)
    assert (done.returncode, done.stderr) == (0, "")
    assert not (tmp_path / "cache").exists()
