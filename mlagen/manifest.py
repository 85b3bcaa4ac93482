"""The manifest of a folder of built kernels, and how such a folder is written: aside first, then renamed into place."""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from mlagen.errors import BuildError, RequestError

MANIFEST = "manifest.json"
FORMAT = 1
"""Raised when the manifest's fields change meaning."""

Entries = dict[str, dict[str, Any]]

_FIELDS = {"arch": str, "spec": dict, "serves": list, "source": dict, "binary": dict, "resources": dict, "instructions": dict}
_PLAIN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]*")
_ASIDE = ".mlagen-"


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def manifest_text(kernels: Mapping[str, Any]) -> str:
    """The manifest of `kernels` by name; the same kernels give the same text."""
    return json.dumps({"format": FORMAT, "kernels": dict(sorted(kernels.items()))}, indent=1, sort_keys=True) + "\n"


def read_manifest(folder: Path) -> Entries:
    """Kernels by name.  Raises RequestError for a folder without a manifest that this version can read."""
    path = folder / MANIFEST
    remedy = "delete it and build again, or name another folder"
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RequestError(f"{folder}: no {MANIFEST} there; name a folder that `mlagen build --out` wrote") from None
    except OSError as error:
        raise RequestError(f"{path}: {error.strerror}; name a folder that `mlagen build --out` wrote") from None
    except (ValueError, RecursionError):
        raise RequestError(f"{path}: not a manifest that mlagen wrote; {remedy}") from None
    if not isinstance(data, dict) or data.get("format") != FORMAT or not isinstance(data.get("kernels"), dict):
        found = data.get("format") if isinstance(data, dict) else None
        raise RequestError(f"{path}: manifest format {found!r:.40}, this version reads {FORMAT}; {remedy}")
    kernels: Entries = data["kernels"]
    for name, entry in kernels.items():
        if not _is_sound(name, entry):
            raise RequestError(f"{path}: its entry {name!r:.100} is damaged; {remedy}")
    return kernels


def _is_sound(name: str, entry: object) -> bool:
    """Whether an entry has the fields of one, and its files are in the manifest's own folder."""
    if not isinstance(entry, dict) or not all(isinstance(entry.get(field), kind) for field, kind in _FIELDS.items()):
        return False
    files = [entry[kind]["file"] for kind in ("source", "binary") if "file" in entry[kind]]
    return all(isinstance(each, str) and _PLAIN_NAME.fullmatch(each) for each in (name, *files))


def damaged_files(folder: Path, kernels: Entries) -> list[str]:
    """One line for each file of the folder that is missing or is not what the manifest says."""
    lines = []
    for name, entry in sorted(kernels.items()):
        for kind in ("source", "binary"):
            file = entry[kind]
            if "file" not in file:
                continue
            path = folder / file["file"]
            try:
                actual = sha256(path.read_bytes())
            except OSError as error:
                lines.append(f"{name}: {kind} {path.name}: {error.strerror}")
                continue
            if actual != file.get("sha256"):
                lines.append(f"{name}: {kind} {path.name} is not the file that was built: its sha256 differs")
    return lines


def check_writable(out: Path) -> None:
    """Raise RequestError unless `out` is, or can become, a folder that can be written."""
    try:
        os.stat(out)
    except OSError as error:
        if error.errno in (errno.ENAMETOOLONG, errno.ELOOP):
            raise RequestError(f"--out {out}: {error.strerror}; name another folder") from None
    existing = out
    while not os.path.lexists(existing) and existing != existing.parent:
        existing = existing.parent
    if not os.access(existing, os.F_OK):  # lexists sees a link that leads nowhere
        raise RequestError(f"--out {out}: {existing} leads nowhere; name another folder")
    if not os.path.isdir(existing):
        what = "it" if existing == out else existing
        raise RequestError(f"--out {out}: {what} is a file, name a folder")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise RequestError(f"--out {out}: no permission to write to {existing}; name another folder")


def write_folder(out: Path, files: Mapping[str, bytes], entries: Callable[[], Entries]) -> None:
    """Write `files` by name into `out`, and the manifest last; other files there stay.

    Builds that write to the same folder take turns, and `entries`, which makes the manifest, is called when it is this one's turn.
    Everything is written and synced in a temporary folder on the same file system before the first file appears under its name.

    Raises BuildError, with nothing half-written, where the disk or the permissions do not allow it.
    """
    with _reported(out), _folder(out) as alone:
        if alone:
            for left in out.glob(f"{_ASIDE}*"):  # by a build that was killed
                shutil.rmtree(left, ignore_errors=True)
        contents = {**files, MANIFEST: manifest_text(entries()).encode()}
        for name in contents:
            if (out / name).is_dir():  # found now, not when half of the files are in place
                raise IsADirectoryError(errno.EISDIR, f"{name} is a folder there")
        aside = Path(tempfile.mkdtemp(prefix=_ASIDE, dir=out))
        try:
            for name, data in contents.items():
                with open(aside / name, "wb") as file:
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
            for name in contents:
                os.replace(aside / name, out / name)
        finally:
            shutil.rmtree(aside, ignore_errors=True)


@contextlib.contextmanager
def _folder(out: Path) -> Iterator[bool]:
    """`out`, made if it is not there, and unmade if the block fails; yields whether other builds are kept out meanwhile."""
    made = [folder for folder in (out, *out.parents) if not folder.exists()]
    try:
        out.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(out, os.O_RDONLY | os.O_DIRECTORY)
        try:
            yield _locked(descriptor)
        finally:
            os.close(descriptor)
    except BaseException:
        with contextlib.suppress(OSError):
            for folder in made:
                folder.rmdir()
        raise


def _locked(descriptor: int) -> bool:
    """Wait for a lock, which closing the descriptor gives up; False where the file system has none, as some of networks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    except OSError:
        return False
    return True


@contextlib.contextmanager
def _reported(out: Path) -> Iterator[None]:
    """Turn an OSError into one clear line."""
    try:
        yield
    except OSError as error:
        remedy = "free some space" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "name another folder with --out"
        raise BuildError(f"--out {out}: {error.strerror or error}; nothing is left half-written; {remedy}") from None
