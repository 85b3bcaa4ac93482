"""The folder of a build: whole files or none, whatever goes wrong, and a manifest that says what is in it."""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import resource
import threading
from pathlib import Path

import pytest

from mlagen import manifest
from mlagen.errors import BuildError, RequestError
from mlagen.manifest import damaged_files, manifest_text, read_manifest, sha256, write_folder

FILES = {"one.hip": b"source of one\n", "one.co": b"\x7fELF" * 1000}


def entry(**changes) -> dict:
    fields = {"arch": "gfx942", "spec": {}, "serves": [], "source": {}, "binary": {}, "resources": {}, "instructions": {}}
    return {**fields, **changes}


def entries_of(files: dict[str, bytes]) -> dict:
    """The manifest's entries for the files of one kernel."""
    kinds = {"hip": "source", "co": "binary"}
    return {"one": entry(**{kinds[name[4:]]: {"file": name, "sha256": sha256(data)} for name, data in files.items()})}


def write(out: Path, files: dict[str, bytes] = FILES) -> None:
    write_folder(out, files, lambda: entries_of(files))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_folder_is_what_was_asked_for(tmp_path):
    write(tmp_path / "new" / "folder")
    assert contents(tmp_path / "new" / "folder") == {**FILES, "manifest.json": manifest_text(entries_of(FILES)).encode()}
    assert read_manifest(tmp_path / "new" / "folder") == entries_of(FILES)


def test_files_are_for_all_to_read(tmp_path):
    before = os.umask(0o022)
    try:
        write(tmp_path / "new")
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "new").iterdir()} == {0o644}


def test_other_files_stay(tmp_path):
    (tmp_path / "notes").write_text("mine")
    write(tmp_path)
    write(tmp_path, {"one.hip": b"another"})
    assert contents(tmp_path).keys() == {*FILES, "notes", "manifest.json"}
    assert contents(tmp_path)["one.hip"] == b"another"


def test_the_manifest_comes_last(tmp_path, monkeypatch):
    """Whoever reads it finds the files that it lists."""
    order = []
    replace = os.replace
    monkeypatch.setattr(os, "replace", lambda old, new: order.append(Path(new).name) or replace(old, new))
    write(tmp_path)
    assert sorted(order[:-1]) == sorted(FILES)
    assert order[-1] == "manifest.json"


def test_the_same_entries_give_the_same_text():
    one, two = entry(arch="gfx942"), entry(arch="gfx950")
    backwards = dict(reversed(two.items()))
    assert manifest_text({"a": one, "b": two}) == manifest_text({"b": backwards, "a": one})
    assert json.loads(manifest_text({"b": two})) == {"format": 1, "kernels": {"b": two}}


def test_sha256():
    assert sha256(b"abc") == hashlib.sha256(b"abc").hexdigest()


# What goes wrong


@contextlib.contextmanager
def small_files(limit: int):
    """No file may grow beyond `limit` bytes: the system's own way to refuse a write half-way."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@contextlib.contextmanager
def full_disk():
    def refuse(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", refuse)
        yield


@pytest.mark.parametrize(
    ("trouble", "words"),
    [
        (full_disk(), "No space left on device; nothing is left half-written; free some space"),
        (small_files(1000), "File too large; nothing is left half-written; name another folder with --out"),
    ],
    ids=["full disk", "large file"],
)
def test_a_write_that_fails_changes_nothing(trouble, words, tmp_path):
    old = {"one.hip": b"old", "one.co": b"old"}
    write(tmp_path / "there", old)
    before = contents(tmp_path / "there")
    with trouble:
        for out in (tmp_path / "there", tmp_path / "new" / "folder"):
            with pytest.raises(BuildError) as raised:
                write(out)
            assert str(raised.value) == f"--out {out}: {words}"
    assert contents(tmp_path / "there") == before
    assert not (tmp_path / "new").exists()


def test_an_interrupt_changes_nothing(tmp_path, monkeypatch):
    def interrupt(descriptor: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("renamed", [0, 1, 2])
def test_a_rename_that_fails_leaves_whole_files(renamed, tmp_path, monkeypatch):
    old = {"one.hip": b"old", "one.co": b"old"}
    write(tmp_path, old)
    steps = iter([os.replace] * renamed)

    def replace(source, target):
        step = next(steps, None)
        if not step:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        step(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", replace)
        with pytest.raises(BuildError, match="Input/output error; nothing is left half-written"):
            write(tmp_path)
    found = contents(tmp_path)
    assert found.pop("manifest.json") == manifest_text(entries_of(old)).encode()
    assert sum(found[name] == FILES[name] for name in FILES) == renamed
    assert sum(found[name] == old[name] for name in FILES) == 2 - renamed
    assert found.keys() == FILES.keys()
    assert len(damaged_files(tmp_path, read_manifest(tmp_path))) == renamed


def test_a_folder_in_the_way_is_seen_in_time(tmp_path):
    (tmp_path / "one.co").mkdir()
    with pytest.raises(BuildError, match=r"one\.co is a folder there"):
        write(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["one.co"]


def test_a_manifest_that_cannot_be_merged_stops_the_write(tmp_path):
    def entries():
        raise RequestError("not ours")

    with pytest.raises(RequestError, match="not ours"):
        write_folder(tmp_path / "new", FILES, entries)
    assert not (tmp_path / "new").exists()


# Several builds, one folder


def test_builds_take_turns(tmp_path):
    descriptor = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    other = threading.Thread(target=write, args=(tmp_path,))
    try:
        other.start()
        other.join(timeout=0.3)
        assert other.is_alive()
        assert not list(tmp_path.iterdir())
    finally:
        os.close(descriptor)
        other.join(timeout=60)
    assert contents(tmp_path).keys() == {*FILES, "manifest.json"}


@pytest.mark.parametrize("locks", [True, False])
def test_what_a_killed_build_left_is_cleared_away(locks, tmp_path, monkeypatch):
    """Except where there are no locks: there it may be another build's that still runs."""
    left = tmp_path / ".mlagen-killed"
    left.mkdir()
    (left / "one.hip").write_text("half a so")
    if not locks:
        monkeypatch.setattr(fcntl, "flock", lambda *args: (_ for _ in ()).throw(OSError(errno.ENOLCK, "no locks")))
    write(tmp_path)
    assert left.exists() != locks
    assert {path.name for path in tmp_path.iterdir() if path != left} == {*FILES, "manifest.json"}


# Reading


@pytest.mark.parametrize("field", ["arch", "spec", "serves", "source", "binary", "resources", "instructions"])
def test_every_field_has_to_be_there(field, tmp_path):
    broken = {key: value for key, value in entry().items() if key != field}
    (tmp_path / "manifest.json").write_text(manifest_text({"one": entry(), "two": broken}))
    with pytest.raises(RequestError, match="its entry 'two' is damaged"):
        read_manifest(tmp_path)


@pytest.mark.parametrize("file", ["/etc/passwd", "../one.hip", "a/b.hip", "", "-o", ".hidden", None, 7, "a b", "one.hip\n"])
def test_files_are_in_the_folder_itself(file, tmp_path):
    (tmp_path / "manifest.json").write_text(manifest_text({"one": entry(binary={"file": file})}))
    with pytest.raises(RequestError, match="damaged"):
        read_manifest(tmp_path)


def test_fields_of_a_later_version_are_kept(tmp_path):
    later = entry(source={"file": "one.hip", "signed": True}, speed="fast")
    (tmp_path / "manifest.json").write_text(manifest_text({"one": later}))
    assert read_manifest(tmp_path) == {"one": later}


def test_damage_is_named(tmp_path):
    write(tmp_path)
    assert damaged_files(tmp_path, read_manifest(tmp_path)) == []
    (tmp_path / "one.hip").write_bytes(b"source of two\n")
    (tmp_path / "one.co").unlink()
    assert damaged_files(tmp_path, read_manifest(tmp_path)) == [
        "one: source one.hip is not the file that was built: its sha256 differs",
        "one: binary one.co: No such file or directory",
    ]


def test_a_format_is_read_by_its_version_only(tmp_path, monkeypatch):
    write(tmp_path)
    monkeypatch.setattr(manifest, "FORMAT", 2)
    with pytest.raises(RequestError, match="manifest format 1, this version reads 2"):
        read_manifest(tmp_path)
