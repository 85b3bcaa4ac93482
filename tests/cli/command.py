"""Running `mlagen` in tests: `run` in this process, `start` in one of its own, for what only a process shows."""

import contextlib
import io
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import mlagen
from mlagen.cli import main

ROOT = Path(mlagen.__file__).parents[1]


@dataclass(frozen=True)
class Result:
    status: int
    out: str
    err: str


def run(*arguments: str | os.PathLike[str]) -> Result:
    """What `mlagen ARGUMENTS` answers; whatever is not meant to be raised comes through."""
    out, err = io.StringIO(), io.StringIO()
    with (
        mock.patch.object(sys, "argv", ["mlagen", *map(os.fspath, arguments)]),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            main()
        except SystemExit as end:
            return Result(int(end.code or 0), out.getvalue(), err.getvalue())
    raise AssertionError("main() returned")


def start(
    *arguments: str | bytes | os.PathLike[str], through: Sequence[str] = (), environment: dict[str, str] | None = None, **options
) -> subprocess.Popen:
    """`mlagen ARGUMENTS` as a process with pipes on both of its outputs.

    `through` are words before its own, which run it; `environment` comes on top of this one's.  Output is buffered, as for users.
    """
    code = "from mlagen.cli import main; main()"
    settings = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "", **(environment or {})}
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": settings, **options}
    return subprocess.Popen([*through, sys.executable, "-c", code, *map(os.fspath, arguments)], **options)


def finish(process: subprocess.Popen) -> Result:
    out, err = process.communicate(timeout=120)
    return Result(process.returncode, out or "", err or "")


def line(result: Result, status: int) -> str:
    """The one line of a refusal: nothing else was said, and the exit status is `status`."""
    assert result.status == status, result
    assert result.out == ""
    assert result.err.startswith("mlagen: ")
    assert result.err.count("\n") == 1
    assert result.err.endswith("\n")
    return result.err.removeprefix("mlagen: ").rstrip("\n")
