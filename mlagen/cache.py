"""The on-disk cache of compiled kernels.

An entry is a folder named by the sha256 of everything that moves the binary.  It appears by one rename, complete and synced, and is
checked against its name and its own hashes whenever it is read: that a file exists proves nothing.  Processes that want the same
kernel queue on a lock that the operating system frees with its holder; whoever waits too long compiles for itself.

What lies here runs in the process that loads it, so only what belongs to its user, and to nobody else, is read.  That is checked on
the opened entry itself: whoever may rename a folder above it can put another in its place, but none that belongs to this user.
"""

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import stat
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mlagen import __version__
from mlagen.errors import MlagenError, RequestError

LAYOUT = "v1"
"""Raised when an entry's files change meaning; other layouts are left alone."""

META, BINARY, SOURCE = "meta.json", "kernel.bin", "kernel.src"
LOCK_TIMEOUT_SECONDS = 60.0
LEFTOVER_SECONDS = 7 * 24 * 3600
"""How long damaged entries, and what killed processes left half-written, stay."""


@dataclass(frozen=True)
class Key:
    """Everything that moves a binary.

    `kind` is "device" or "host"; `compiler` and `flags` are what the toolchain calls its fingerprint; `mlagen`, the version, stands
    for whatever else this package does on the way from the source to the binary.
    """

    kind: str
    arch: str
    source_sha256: str
    compiler: str
    flags: tuple[str, ...]
    abi: int
    mlagen: str = __version__

    @property
    def digest(self) -> str:
        return _digest(asdict(self))


@dataclass(frozen=True)
class Entry:
    """A compiled kernel with what is known about it; `meta` holds only what JSON can."""

    binary: bytes
    source: str
    meta: Mapping[str, Any]


class CacheWarning(UserWarning):
    """The cache could not be used as meant; the kernel is right all the same."""


def cache_root() -> Path:
    """MLAGEN_CACHE_DIR, else mlagen in XDG's cache folder; for a user without a home, a folder among the temporary ones."""
    named = os.environ.get("MLAGEN_CACHE_DIR")
    if named:
        return Path(named)
    base = os.environ.get("XDG_CACHE_HOME")
    if base and os.path.isabs(base):
        return Path(base, "mlagen")
    home = os.path.expanduser("~")
    return Path(home, ".cache", "mlagen") if os.path.isabs(home) else Path(tempfile.gettempdir(), f"mlagen-{os.geteuid()}")


def lock_timeout() -> float:
    """Seconds to wait for another process's compile: MLAGEN_LOCK_TIMEOUT, else LOCK_TIMEOUT_SECONDS.  Raises RequestError."""
    text = os.environ.get("MLAGEN_LOCK_TIMEOUT") or str(LOCK_TIMEOUT_SECONDS)
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds < float("inf"):
        raise RequestError(f"MLAGEN_LOCK_TIMEOUT={text!r}: expected a number of seconds, 0 or more")
    return seconds


class DiskCache:
    """The cache under one root folder.  Every method may be called from several threads and processes."""

    def __init__(self, root: Path | None = None, layout: str = LAYOUT) -> None:
        self.root = root or cache_root()
        self.entries_folder = self.root / layout

    def get(self, key: Key, compile_: Callable[[], Entry]) -> Entry:
        """The entry of `key`; where it is missing or damaged it is compiled and published.

        Where the folder cannot be written the compiled entry is returned all the same, with one warning.  Raises MlagenError as
        refuse_unsafe does, and what `compile_` raises.
        """
        self.refuse_unsafe()
        found, _ = self.read(key)
        if found:
            return found
        with self._lock(key):
            found, damage = self.read(key)  # by now another process may have been here
            if found:
                return found
            if damage:
                self._set_aside(key, damage)
            return self._publish(key, compile_())

    def read(self, key: Key) -> tuple[Entry | None, str]:
        """The entry of `key`, or None and what is wrong with it: "" where there is none."""
        return read_entry(self.entries_folder / key.digest)

    def refuse_unsafe(self) -> None:
        """Raise MlagenError where the cache is there but its code must not run in this process."""
        for folder in (self.root, self.entries_folder):
            try:
                found = folder.stat()
            except OSError:
                return  # nothing to be read
            if not stat.S_ISDIR(found.st_mode):
                raise MlagenError(f"cache {folder}: not a folder: remove it, or set MLAGEN_CACHE_DIR to another one")
            reason = _foreign(found)
            if reason:
                remedy = f"`chmod go-w {folder}`, or " if found.st_uid == os.geteuid() else ""
                raise MlagenError(
                    f"cache {folder}: {reason}, and what lies there would run in this process: "
                    f"{remedy}set MLAGEN_CACHE_DIR to a folder of your own"
                )

    def entries(self) -> Iterator[Path]:
        """The folder of every entry, in order; of an unreadable cache none."""
        return (path for path in self._contents() if re.fullmatch("[0-9a-f]{64}", path.name))

    def damaged(self) -> Iterator[Path]:
        """What was set aside."""
        return (path for path in self._contents() if path.suffix == ".damaged")

    def clear(self) -> int:
        """Remove everything of this layout; how many entries there were.  Raises MlagenError as refuse_unsafe does, OSError.

        A compile that is under way goes on and publishes.
        """
        self.refuse_unsafe()
        count = len(list(self.entries()))
        for path in self._contents():
            doomed = path.with_name(f"{path.name}.{os.getpid()}.tmp")
            with contextlib.suppress(FileNotFoundError):  # somebody else clears as well
                os.rename(path, doomed)  # gone at once, whole, for those who read it now
                _remove(doomed)
        return count

    def _contents(self) -> list[Path]:
        try:
            return sorted(self.entries_folder.iterdir())
        except OSError:
            return []

    @contextlib.contextmanager
    def _lock(self, key: Key) -> Iterator[None]:
        """Hold the key's lock, or go on without it: after the timeout, or where the file system has none."""
        import filelock  # on a miss only: it takes longer than a load from the cache

        timeout = lock_timeout()
        # No soft locks, which are files that outlive their holder: without flock, two processes may compile the same kernel.
        lock = filelock.FileLock(self.entries_folder / f"{key.digest}.lock", thread_local=False, fallback_to_soft=False)
        held = False
        try:
            _make_private(self.entries_folder)
            lock.acquire(timeout=timeout)
            held = True
        except filelock.Timeout:
            message = f"cache {self.root}: waited {timeout:g} s for another process's compile; compiling here as well"
            _warn_once(f"lock {self.root}", message)
        except OSError:
            pass  # _publish says so, if it cannot write either
        try:
            yield
        finally:
            if held:
                lock.release()

    def _publish(self, key: Key, entry: Entry) -> Entry:
        """Put the entry under its name by one rename; where another process was first, take what it published."""
        meta = {
            **entry.meta,
            "arch": key.arch,
            "binary_sha256": _sha256(entry.binary),
            "key": asdict(key),
        }
        complete = Entry(entry.binary, entry.source, meta)
        files = {BINARY: entry.binary, SOURCE: entry.source.encode(), META: json.dumps(meta, sort_keys=True, indent=1).encode()}
        aside = None
        try:
            _make_private(self.entries_folder)
            aside = Path(tempfile.mkdtemp(prefix=f"{key.digest[:16]}.", suffix=".tmp", dir=self.entries_folder))
            for name, data in files.items():
                _write_synced(aside / name, data)
            _sync_folder(aside)
            os.rename(aside, self.entries_folder / key.digest)
            _sync_folder(self.entries_folder)
        except OSError as error:
            if aside is not None and error.errno in (errno.EEXIST, errno.ENOTEMPTY):
                return self.read(key)[0] or complete
            _warn_once(
                f"write {self.root}",
                f"cache {self.root} cannot be written ({error.strerror}): every process compiles what is missing there "
                "and keeps it in memory; MLAGEN_CACHE_DIR names another folder",
            )
        else:
            self._sweep()
        finally:
            if aside is not None:
                shutil.rmtree(aside, ignore_errors=True)  # after the rename it is not there
        return complete

    def _set_aside(self, key: Key, reason: str) -> None:
        """Move a damaged entry out of the way, so that it can be looked at and is not met again; one of each key is kept."""
        folder = self.entries_folder / key.digest
        target = folder.with_name(f"{key.digest}.damaged")
        try:
            _remove(target)
            os.rename(folder, target)
            outcome = f"set aside as {target.name}"
        except OSError as error:
            outcome = f"it cannot be set aside ({error.strerror})"
        _warn_once(f"damage {folder} {reason}", f"cache entry {folder}: {reason}; {outcome} and compiled again")

    def _sweep(self) -> None:
        """Remove what was set aside, or left half-written by a killed process, long ago."""
        for path in self._contents():
            with contextlib.suppress(OSError):
                if path.suffix in (".tmp", ".damaged") and time.time() - path.lstat().st_ctime > LEFTOVER_SECONDS:
                    _remove(path)


def read_entry(folder: Path) -> tuple[Entry | None, str]:
    """The entry in `folder`, or None and what is wrong with it: "" where there is none."""
    try:
        opened = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError as error:
        return None, f"it cannot be opened: {error.strerror}" if os.path.lexists(folder) else ""
    try:
        reason = _foreign(os.fstat(opened))
        if reason:
            return None, reason
        binary, source, meta = (_read_at(opened, name) for name in (BINARY, SOURCE, META))
        entry = Entry(binary, source.decode(), json.loads(meta))
    except OSError as error:
        return None, f"{error.filename}: {error.strerror}"
    except (ValueError, RecursionError):
        return None, f"{SOURCE} or {META} is garbage"
    finally:
        os.close(opened)
    damage = _damage(entry, folder.name)
    return (None, damage) if damage else (entry, "")


def _damage(entry: Entry, digest: str) -> str:
    """Why the entry is not what `digest` and its own meta say; "" if it is.  The key holds the arch and the source's sha256."""
    meta = entry.meta if isinstance(entry.meta, dict) else {}
    key = meta.get("key")
    if not isinstance(key, dict):
        return f"{META} has no key"
    if _digest(key) != digest:
        return f"it holds another kernel, for {key.get('arch')}"
    if meta.get("arch") != key.get("arch"):
        return f"{META} says {meta.get('arch')}, its key {key.get('arch')}"
    if meta.get("binary_sha256") != _sha256(entry.binary):
        return f"{BINARY} is not what was compiled, its sha256 differs"
    if key.get("source_sha256") != _sha256(entry.source.encode()):
        return f"{SOURCE} is not what was compiled, its sha256 differs"
    return ""


def _foreign(found: os.stat_result) -> str:
    """How somebody else than this user can have written there; "" where nobody can."""
    if found.st_uid != os.geteuid():
        return f"it belongs to user {found.st_uid}, this process runs as {os.geteuid()}"
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return f"others can write to it (mode {stat.S_IMODE(found.st_mode):04o})"
    return ""


def _read_at(folder: int, name: str) -> bytes:
    with open(os.open(name, os.O_RDONLY | os.O_NOFOLLOW, dir_fd=folder), "rb") as file:
        reason = _foreign(os.fstat(file.fileno()))
        if reason:
            raise PermissionError(errno.EPERM, reason, name)
        return file.read()


def _make_private(folder: Path) -> None:
    """Make the folder, and the parents that it lacks, for this user alone."""
    missing = []
    while not folder.exists():
        missing.append(folder)
        folder = folder.parent
    for each in reversed(missing):
        each.mkdir(mode=0o700, exist_ok=True)


def _remove(path: Path) -> None:
    """Remove a file or a whole folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _write_synced(path: Path, data: bytes) -> None:
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _digest(key: Mapping[str, Any]) -> str:
    return _sha256(json.dumps(key, sort_keys=True).encode())


_WARNED: set[str] = set()


def _warn_once(about: str, message: str) -> None:
    """Warn, once a process for each `about`."""
    if about not in _WARNED:
        _WARNED.add(about)
        warnings.warn(message, CacheWarning, stacklevel=2)
