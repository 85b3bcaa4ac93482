"""The manifest of a folder of built kernels, and how such a folder is written: aside first, then renamed into place."""

import contextlib
import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mlagen.errors import BuildError, RequestError

MANIFEST = "manifest.json"
FORMAT = 1
"""Raised when the manifest's fields change meaning."""

Entries = dict[str, dict[str, Any]]


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def manifest_text(kernels: Mapping[str, Any]) -> str:
    """The manifest of `kernels` by name; the same kernels give the same text."""
    return json.dumps({"format": FORMAT, "kernels": dict(sorted(kernels.items()))}, indent=1, sort_keys=True) + "\n"


def read_manifest(folder: Path) -> Entries:
    """Kernels by name.  Raises RequestError for a folder without a manifest that this version can read."""
    path = folder / MANIFEST
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RequestError(f"{folder}: no {MANIFEST} there; name a folder that `mlagen build --out` wrote") from None
    except OSError as error:
        raise RequestError(f"{path}: {error.strerror}; name a readable folder") from None
    except (ValueError, RecursionError):
        raise RequestError(f"{path}: not a manifest that mlagen wrote; build into an empty folder") from None
    if not isinstance(data, dict) or data.get("format") != FORMAT or not isinstance(data.get("kernels"), dict):
        found = data.get("format") if isinstance(data, dict) else None
        raise RequestError(f"{path}: manifest format {found!r}, this version reads {FORMAT}; build the folder again")
    kernels: Entries = data["kernels"]
    for name, entry in kernels.items():
        if not isinstance(entry, dict) or not isinstance(entry.get("source"), dict):
            raise RequestError(f"{path}: its entry {name!r} is damaged; build the folder again")
    return kernels


def damaged_files(folder: Path, kernels: Entries) -> list[str]:
    """One line for each file of the folder that is missing or is not what the manifest says."""
    lines = []
    for name, entry in sorted(kernels.items()):
        for kind in ("source", "binary"):
            file = entry.get(kind) or {}
            path = folder / str(file.get("file", ""))
            if "file" not in file:
                continue
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
    if out.exists() and not out.is_dir():
        raise RequestError(f"--out {out}: it is a file, name a folder")
    existing = out
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    if not existing.is_dir():
        raise RequestError(f"--out {out}: {existing} is a file, name a folder")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise RequestError(f"--out {out}: no permission to write to {existing}; name another folder")


def write_folder(out: Path, files: Mapping[str, bytes]) -> None:
    """Write `files` by name into `out`, the manifest last; other files there stay.

    Everything is written and synced in a temporary folder on the same file system before the first file appears under its name.
    Raises BuildError, with nothing half-written, where the disk or the permissions do not allow it.
    """
    with _reported(out):
        out.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(prefix=".mlagen-", dir=out))
        try:
            for name, data in files.items():
                with open(aside / name, "wb") as file:
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
            for name in sorted(files, key=lambda name: name == MANIFEST):
                os.replace(aside / name, out / name)
        finally:
            shutil.rmtree(aside, ignore_errors=True)


@contextlib.contextmanager
def _reported(out: Path) -> Iterator[None]:
    """Turn an OSError into one clear line."""
    try:
        yield
    except OSError as error:
        remedy = "free some space" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "name another folder with --out"
        raise BuildError(f"--out {out}: {error.strerror or error}; nothing was replaced, {remedy}") from None
