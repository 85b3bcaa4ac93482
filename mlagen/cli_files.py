"""Files that commands write: refused early where they cannot be written, and whole or not at all."""

import os
import stat
import tempfile
from pathlib import Path

import typer

from mlagen.errors import MlagenError, RequestError


def file_name(text: str) -> Path:
    if not text:  # an unset variable of a script
        raise typer.BadParameter("it is empty; name a file")
    return Path(text)


def refuse_unwritable(option: str, path: Path) -> None:
    """Raise RequestError unless a file can be written to `path`."""

    def refused(reason: str) -> RequestError:
        return RequestError(f"{option} {path}: {reason}; name another file")

    try:
        if not stat.S_ISDIR(os.stat(path.parent).st_mode):
            raise refused(f"{path.parent} is a file")
        if path.exists() and not path.is_file():
            raise refused("it is not a regular file")
    except OSError as error:
        raise refused(f"{path.parent}: {error.strerror}") from None
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise refused(f"no permission to write to {path.parent}")


def write_whole(option: str, path: Path, content: bytes) -> None:
    """Write a whole file or none.  Raises MlagenError."""
    try:
        with tempfile.TemporaryDirectory(prefix=".mlagen-", dir=path.parent) as aside:
            whole = Path(aside, path.name)
            whole.write_bytes(content)
            os.replace(whole, path)
    except OSError as error:
        raise MlagenError(f"{option} {path}: {error.strerror}; nothing is left half-written; name another file") from None
