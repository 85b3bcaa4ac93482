"""The folder of entries, without any compiler: publishing, damage, owners, full and read-only disks, leftovers."""

import contextlib
import errno
import hashlib
import json
import os
import resource
import shutil
import signal
import stat
import tempfile
import threading
import warnings
from pathlib import Path

import filelock  # noqa: F401 -- imported before a test gives up the right to read it
import pytest

from mlagen import cache
from mlagen.cache import BINARY, META, SOURCE, CacheWarning, DiskCache, Entry, Key, read_entry
from mlagen.errors import MlagenError

TEMPORARY = tempfile.gettempdir()
BINARY_BYTES = bytes(range(256)) * 256


def key_of(source: str = "source", arch: str = "gfx950") -> Key:
    return Key("host", arch, hashlib.sha256(source.encode()).hexdigest(), "compiler", ("-O2",), 1)


class Compile:
    """Stands for the compiler: counts its calls."""

    def __init__(self, source: str = "source", binary: bytes = BINARY_BYTES) -> None:
        self.entry, self.calls = Entry(binary, source, {"kernel": "k", "compiler": "compiler"}), 0

    def __call__(self) -> Entry:
        self.calls += 1
        return self.entry


@pytest.fixture
def store(cache_root) -> DiskCache:
    return DiskCache()


@pytest.fixture
def warm(store) -> Path:
    """The folder of one published entry."""
    store.get(key_of(), Compile())
    return store.entries_folder / key_of().digest


def names(store: DiskCache) -> list[str]:
    """What lies in the folder of entries, lock files left out."""
    return sorted(path.name for path in store.entries_folder.iterdir() if path.suffix != ".lock")


@contextlib.contextmanager
def silence():
    with warnings.catch_warnings():
        warnings.simplefilter("error", CacheWarning)
        yield


@contextlib.contextmanager
def one_warning(*words: str):
    with pytest.warns(CacheWarning) as caught:
        yield
    assert len(caught) == 1
    for word in words:
        assert word in str(caught[0].message)


# Publishing


def test_an_entry_is_compiled_once_and_read_from_then_on(store):
    first, second = Compile(), Compile()
    with silence():
        published = store.get(key_of(), first)
        read = store.get(key_of(), second)
    assert (first.calls, second.calls) == (1, 0)
    assert published.binary == read.binary == BINARY_BYTES
    assert names(store) == [key_of().digest]


def test_an_entry_says_what_it_is(store, warm):
    assert sorted(path.name for path in warm.iterdir()) == sorted([BINARY, META, SOURCE])
    meta = json.loads((warm / META).read_text())
    assert meta["arch"] == meta["key"]["arch"] == "gfx950"
    assert meta["binary_sha256"] == hashlib.sha256(BINARY_BYTES).hexdigest()
    assert meta["kernel"] == "k"
    assert store.read(key_of())[0].meta == meta


def test_everything_is_synced_before_its_name_appears(store, monkeypatch):
    synced, fsync, rename = [], os.fsync, os.rename

    def spy_fsync(descriptor):
        synced.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        fsync(descriptor)

    def spy_rename(source, target):
        assert {Path(path).name for path in synced} == {BINARY, META, SOURCE, Path(source).name}
        rename(source, target)

    monkeypatch.setattr(os, "fsync", spy_fsync)
    monkeypatch.setattr(os, "rename", spy_rename)
    store.get(key_of(), Compile())
    assert synced[-1] == str(store.entries_folder)


def test_who_comes_second_takes_what_the_first_published(store):
    def compile_while_another_publishes():
        store._publish(key_of(), Entry(BINARY_BYTES, "source", {"kernel": "the winner's"}))
        return Compile().entry

    with silence():
        assert store.get(key_of(), compile_while_another_publishes).meta["kernel"] == "the winner's"
    assert names(store) == [key_of().digest]


def test_a_compile_that_fails_leaves_nothing_and_frees_the_lock(store):
    def fail():
        raise MlagenError("no")

    for _ in range(2):
        with pytest.raises(MlagenError, match="no"):
            store.get(key_of(), fail)
    assert names(store) == []


def test_threads_compile_once(store):
    compile_, barrier, found = Compile(), threading.Barrier(8), []

    def load():
        barrier.wait()
        found.append(DiskCache().get(key_of(), compile_).binary)

    threads = [threading.Thread(target=load) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert found == [BINARY_BYTES] * 8
    assert compile_.calls == 1


# Damage


def flip(path: Path, bit: int = 4) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1 << bit
    path.write_bytes(data)


def edit(folder: Path, **changes) -> None:
    meta = json.loads((folder / META).read_text())
    (folder / META).write_text(json.dumps({**meta, **changes}))


def become_another(folder: Path) -> None:
    other = key_of(arch="gfx942")
    DiskCache().get(other, Compile())
    shutil.rmtree(folder)
    os.rename(folder.with_name(other.digest), folder)


def become_a_file(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.write_text("what")


def become_a_link(folder: Path) -> None:
    folder.rename(folder.with_name("elsewhere"))
    folder.symlink_to("elsewhere")


DAMAGE = {
    "binary truncated": (lambda folder: os.truncate(folder / BINARY, 1000), "sha256"),
    "binary empty": (lambda folder: os.truncate(folder / BINARY, 0), "sha256"),
    "binary grown": (lambda folder: (folder / BINARY).write_bytes(BINARY_BYTES + b"\0"), "sha256"),
    "binary flipped": (lambda folder: flip(folder / BINARY), "sha256"),
    "source flipped": (lambda folder: flip(folder / SOURCE, 0), "sha256"),
    "source no text": (lambda folder: (folder / SOURCE).write_bytes(b"\xff\xfe"), "garbage"),
    "binary missing": (lambda folder: (folder / BINARY).unlink(), "No such file"),
    "source missing": (lambda folder: (folder / SOURCE).unlink(), "No such file"),
    "meta missing": (lambda folder: (folder / META).unlink(), "No such file"),
    "meta empty": (lambda folder: os.truncate(folder / META, 0), "garbage"),
    "meta truncated": (lambda folder: os.truncate(folder / META, 100), "garbage"),
    "meta binary": (lambda folder: (folder / META).write_bytes(b"\x80\0\xff"), "garbage"),
    "meta too deep": (lambda folder: (folder / META).write_text("[" * 100_000), "garbage"),
    "meta null": (lambda folder: (folder / META).write_text("null"), "no key"),
    "meta a list": (lambda folder: (folder / META).write_text("[1, 2]"), "no key"),
    "meta a string": (lambda folder: (folder / META).write_text('"key"'), "no key"),
    "key missing": (lambda folder: edit(folder, key=None), "no key"),
    "key a list": (lambda folder: edit(folder, key=["arch"]), "no key"),
    "key a string": (lambda folder: edit(folder, key="gfx942"), "no key"),
    "key empty": (lambda folder: edit(folder, key={}), "another kernel"),
    "key odd": (lambda folder: edit(folder, key={"arch": [1], "flags": None}), "another kernel"),
    "arch edited": (lambda folder: edit(folder, arch="gfx942"), "gfx942"),
    "hash missing": (lambda folder: edit(folder, binary_sha256=None), "sha256"),
    "another arch's": (become_another, "another kernel, for gfx942"),
    "folder empty": (lambda folder: [path.unlink() for path in folder.iterdir()], "No such file"),
    "a file": (become_a_file, "cannot be opened"),
    "a link": (become_a_link, "cannot be opened"),
    "a link inside": (lambda folder: ((folder / BINARY).unlink(), (folder / BINARY).symlink_to("/dev/zero")), BINARY),
    "open to others": (lambda folder: folder.chmod(0o777), "others can write"),
    "a file open to others": (lambda folder: (folder / BINARY).chmod(0o666), "others can write"),
}


@pytest.mark.parametrize(("break_", "reason"), DAMAGE.values(), ids=DAMAGE.keys())
def test_a_damaged_entry_is_reported_once_set_aside_and_rebuilt(store, warm, break_, reason):
    break_(warm)
    compile_ = Compile()
    assert store.read(key_of())[0] is None
    with one_warning(reason, "set aside"):
        assert store.get(key_of(), compile_).binary == BINARY_BYTES
    with silence():
        assert store.get(key_of(), compile_).binary == BINARY_BYTES
    assert compile_.calls == 1
    assert f"{key_of().digest}.damaged" in names(store)


def test_of_each_kernel_one_damaged_entry_is_kept(store, warm):
    for size in (10, 20):
        os.truncate(warm / BINARY, size)
        with pytest.warns(CacheWarning):
            store.get(key_of(), Compile())
        cache._WARNED.clear()
    (aside,) = store.damaged()
    assert (aside / BINARY).stat().st_size == 20


def test_looking_changes_nothing(store, warm):
    (warm / META).unlink()
    before = names(store)
    with silence():
        assert store.read(key_of()) == (None, f"{META}: No such file or directory")
        assert read_entry(warm)[0] is None
    assert names(store) == before


def test_a_damaged_entry_that_cannot_be_set_aside_is_passed_over(store, warm, monkeypatch):
    flip(warm / BINARY)

    def refuse(*_):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(os, "rename", refuse)
    with pytest.warns(CacheWarning) as caught:  # noqa: PT031 -- the second and third time are silent
        for _ in range(3):
            assert store.get(key_of(), Compile()).binary == BINARY_BYTES
    assert sorted("cannot be set aside" in str(each.message) for each in caught) == [False, True]


# Owners


@pytest.mark.parametrize("mode", [0o777, 0o775, 0o702, 0o1777])
@pytest.mark.parametrize("place", ["root", "entries"])
def test_a_folder_that_others_can_write_is_refused(store, warm, mode, place):
    folder = store.root if place == "root" else store.entries_folder
    folder.chmod(mode)
    compile_ = Compile()
    for act in (lambda: store.get(key_of(), compile_), store.refuse_unsafe, store.clear):
        with pytest.raises(MlagenError, match=rf"{folder}: others can write to it \(mode {mode:04o}\).*chmod go-w"):
            act()
    assert compile_.calls == 0
    folder.chmod(0o700)
    assert store.get(key_of(), compile_).binary == BINARY_BYTES


def test_a_folder_of_somebody_else_is_refused(store, warm, monkeypatch):
    me = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: me + 1)
    with pytest.raises(MlagenError, match=f"belongs to user {me}, this process runs as {me + 1}.*MLAGEN_CACHE_DIR"):
        store.get(key_of(), Compile())


@pytest.mark.skipif(os.geteuid() != 0, reason="root")
def test_an_entry_of_somebody_else_is_not_read(store, warm):
    os.chown(warm, 12345, 12345)
    with one_warning("belongs to user 12345"):
        assert store.get(key_of(), Compile()).binary == BINARY_BYTES


def test_a_root_that_is_no_folder_is_refused(cache_root):
    cache_root.write_text("")
    with pytest.raises(MlagenError, match="not a folder"):
        DiskCache().get(key_of(), Compile())


@pytest.mark.parametrize("umask", [0o000, 0o002, 0o022])
def test_folders_are_made_for_the_user_alone(cache_root, monkeypatch, umask):
    """Those above the root, too, and whatever the umask."""
    root = cache_root / "not" / "there" / "yet"
    monkeypatch.setenv("MLAGEN_CACHE_DIR", str(root))
    before = os.umask(umask)
    try:
        DiskCache().get(key_of(), Compile())
    finally:
        os.umask(before)
    made = [cache_root, *(path for path in cache_root.rglob("*") if path.is_dir())]
    assert len(made) == 6
    assert {stat.S_IMODE(path.stat().st_mode) for path in made} == {0o700}
    with silence():
        assert DiskCache().get(key_of(), pytest.fail).binary == BINARY_BYTES


def test_a_link_to_a_folder_of_ones_own_will_do(cache_root, tmp_path):
    (tmp_path / "disk").mkdir(mode=0o700)
    cache_root.symlink_to("disk")
    with silence():
        DiskCache().get(key_of(), Compile())
    assert (tmp_path / "disk" / cache.LAYOUT / key_of().digest).is_dir()


def test_a_link_to_nowhere_costs_a_warning(cache_root):
    cache_root.symlink_to("nowhere")
    with one_warning("cannot be written"):
        assert DiskCache().get(key_of(), Compile()).binary == BINARY_BYTES


# Where it is


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"MLAGEN_CACHE_DIR": "/a", "XDG_CACHE_HOME": "/b", "HOME": "/c"}, "/a"),
        ({"MLAGEN_CACHE_DIR": "", "XDG_CACHE_HOME": "/b", "HOME": "/c"}, "/b/mlagen"),
        ({"XDG_CACHE_HOME": "relative", "HOME": "/c"}, "/c/.cache/mlagen"),
        ({"XDG_CACHE_HOME": "", "HOME": "/c"}, "/c/.cache/mlagen"),
    ],
)
def test_where_it_is(monkeypatch, variables, expected):
    for name in ("MLAGEN_CACHE_DIR", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert cache.cache_root() == Path(expected)


def test_a_user_without_a_home_gets_a_temporary_folder(monkeypatch):
    for name in ("MLAGEN_CACHE_DIR", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # what it does for a user id without a name
    assert cache.cache_root() == Path(tempfile.gettempdir(), f"mlagen-{os.geteuid()}")


# Disks that are full or read-only


@pytest.fixture
def bound_by_permissions(tmp_path, monkeypatch):
    """A cache root, not there yet, of a user whom permissions bind: root gives up its rights for as long as the test runs."""
    if os.geteuid():
        yield tmp_path / "cache"
        return
    with tempfile.TemporaryDirectory(prefix="mlagen-test-", dir=TEMPORARY) as folder:  # pytest's folders are private to root
        os.chown(folder, 65534, 65534)
        monkeypatch.setenv("MLAGEN_CACHE_DIR", f"{folder}/cache")
        os.seteuid(65534)
        try:
            if not os.access(folder, os.X_OK, effective_ids=True):
                pytest.skip("TMPDIR is private to root")
            yield Path(folder, "cache")
        finally:
            os.seteuid(0)


def test_a_read_only_cache_serves_what_it_has_and_warns_once_about_the_rest(bound_by_permissions):
    root = bound_by_permissions
    store, compile_ = DiskCache(), Compile("other")
    store.get(key_of(), Compile())
    for folder in (root, store.entries_folder):
        folder.chmod(0o500)
    with silence():
        assert store.get(key_of(), pytest.fail).binary == BINARY_BYTES
    with one_warning("Permission denied", "MLAGEN_CACHE_DIR"):
        for _ in range(3):
            assert store.get(key_of("other"), compile_).source == "other"
    assert compile_.calls == 3
    for folder in (root, store.entries_folder):
        folder.chmod(0o700)
    with silence():
        store.get(key_of("other"), compile_)


def test_a_cache_that_cannot_be_made_costs_one_warning(bound_by_permissions):
    parent = bound_by_permissions.parent
    parent.chmod(0o500)
    with one_warning("Permission denied"):
        for _ in range(3):
            assert DiskCache().get(key_of(), Compile()).binary == BINARY_BYTES
    parent.chmod(0o700)


@pytest.mark.parametrize("root", ["/proc/mlagen", "/dev/null/mlagen"])
def test_an_impossible_root_costs_one_warning(monkeypatch, root):
    monkeypatch.setenv("MLAGEN_CACHE_DIR", root)
    with one_warning("cannot be written"):
        for _ in range(3):
            assert DiskCache().get(key_of(), Compile()).binary == BINARY_BYTES


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
@pytest.mark.parametrize("call", ["fsync", "rename"])
def test_a_full_disk_costs_one_warning_and_leaves_nothing(store, monkeypatch, number, call):
    def refuse(*_):
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(os, call, refuse)
        with one_warning(os.strerror(number)):
            for _ in range(2):
                assert store.get(key_of(), Compile()).binary == BINARY_BYTES
        assert names(store) == []
    with silence():
        store.get(key_of(), Compile())
    assert names(store) == [key_of().digest]


def test_a_file_that_may_not_grow_costs_one_warning_and_leaves_nothing(store):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(BINARY_BYTES) // 2, hard))
    try:
        with one_warning("File too large"):
            assert store.get(key_of(), Compile()).binary == BINARY_BYTES
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert names(store) == []


# What killed processes leave


KILLED = """
import os, signal
from mlagen.cache import DiskCache, Entry, Key
os.{call} = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
DiskCache().get(Key{key!r}, lambda: Entry(b"x" * 1000, "source", {{}}))
"""


@pytest.mark.parametrize("call", ["fsync", "rename"])
def test_a_process_killed_while_it_publishes_leaves_no_entry(store, start, call):
    """Killed with half of the files written, or with all of them but not yet under their name."""
    key = key_of()
    fields = (key.kind, key.arch, key.source_sha256, key.compiler, key.flags, key.abi, key.mlagen)
    process = start(KILLED.format(call=call, key=fields))
    assert process.wait(60) == -signal.SIGKILL
    (leftover,) = names(store)
    assert leftover.endswith(".tmp")
    with silence():
        assert store.get(key, Compile()).binary == BINARY_BYTES
    assert names(store) == sorted([key.digest, leftover])


def test_leftovers_go_once_they_are_old(store, warm, monkeypatch):
    (store.entries_folder / "0123.abc.tmp").mkdir()
    (store.entries_folder / "0123.damaged").mkdir()
    (store.entries_folder / "0124.damaged").write_text("a file")
    keep = [warm.name, "0123.abc.tmp", "0123.damaged", "0124.damaged", key_of("other").digest]
    store.get(key_of("other"), Compile("other"))
    assert names(store) == sorted(keep)
    monkeypatch.setattr(cache, "LEFTOVER_SECONDS", -1)
    store.get(key_of("third"), Compile("third"))
    assert names(store) == sorted([warm.name, key_of("other").digest, key_of("third").digest])


def test_clear_removes_everything_of_this_layout(store, warm):
    flip(warm / BINARY)
    with pytest.warns(CacheWarning):
        store.get(key_of(), Compile())
    other = store.root / "v0"
    other.mkdir()
    assert store.clear() == 1
    assert list(store.entries_folder.iterdir()) == []
    assert other.is_dir()
    assert store.clear() == 0
    assert store.get(key_of(), Compile()).binary == BINARY_BYTES
