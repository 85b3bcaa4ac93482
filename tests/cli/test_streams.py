"""Terminals, pipes, encodings and signals: what the surroundings of a command may be."""

import contextlib
import fcntl
import os
import pty
import re
import signal
import struct
import termios
from pathlib import Path

import pytest
from cli.command import Result, finish, run, start

from mlagen import cli

KERNEL = "mla_prologue_p64_wbf16_l256_r32_neox_bf16_qfp8_kvfp8_fused_gfx950"
BUILD = ("build", "minicpm3", "--arch", "gfx950", "--out")


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("built")
    assert run(*BUILD, out).status == 0
    return out


# A terminal


def on_terminal(*arguments, columns: int, **environment: str) -> tuple[int, str]:
    """The exit status of a command on a terminal, and all that it writes to it, escape sequences included."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    environment = {"TERM": "xterm", "COLUMNS": "", "NO_COLOR": "", **environment}
    process = start(*arguments, stdin=theirs, stdout=theirs, stderr=theirs, environment=environment)
    os.close(theirs)
    text = b""
    with contextlib.suppress(OSError):  # how a terminal's end is told
        while part := os.read(ours, 4096):
            text += part
    os.close(ours)
    return process.wait(timeout=60), text.decode().replace("\r\n", "\n")


def plain(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)


@pytest.mark.compiler
def test_a_terminal_sees_a_bar(tmp_path):
    status, text = on_terminal(*BUILD, tmp_path / "new", columns=80)
    assert status == 0
    assert re.search(r"building \S+ +1/1 mla_prologue_p64", plain(text))
    assert "\x1b[?25h" in text  # the cursor is back
    assert "\x1b[2K" in text.rpartition("building")[2]  # and the bar is gone
    assert "built 1/1" not in text


@pytest.mark.host
def test_a_terminal_is_told_what_verify_waits_for(tmp_path):
    """With an empty cache: what is there is loaded before a line could be drawn."""
    command = ("verify", "minicpm3", "--tp", "8", "--arch", "gfx942", "--tokens", "1")
    status, text = on_terminal(*command, columns=80, MLAGEN_CACHE_DIR=str(tmp_path))
    assert status == 0
    assert "loading or compiling gfx942's kernel" in plain(text)
    assert text.endswith("ok: rounding explains every element\n")


@pytest.mark.parametrize("columns", [20, 80, 500])
def test_names_are_whole_on_any_terminal(columns, built):
    status, text = on_terminal("inspect", built, columns=columns)
    assert status == 0
    lines = [line.split() for line in plain(text).splitlines()]
    assert [line[0] for line in lines if line and "mla_prologue" in line[0]] == [KERNEL] * (2 if columns == 500 else 1)
    words = " ".join(plain(text).split())
    assert bool(re.search(r"vgprs: \d+; .* barriers: \d+", words)) == (columns < 500)


def test_colours_can_be_off():
    assert "\x1b[1m" in on_terminal("models", columns=120)[1]
    assert "\x1b" not in on_terminal("models", columns=120, TERM="dumb")[1]


def test_no_terminal_no_colours(built):
    for arguments in (["models"], ["inspect", str(built)], ["-h"]):
        result = run(*arguments)
        assert "\x1b" not in result.out
        assert not result.err


# Encodings


@pytest.mark.compiler
def test_a_path_that_the_encoding_cannot_spell(tmp_path):
    result = finish(start(*BUILD, "ü", cwd=tmp_path, environment={"PYTHONIOENCODING": "ascii"}))
    assert result.status == 0
    assert result.out.endswith("1 kernel in \\xfc\n")
    assert (tmp_path / "ü" / "manifest.json").is_file()


def test_a_path_that_is_not_text():
    result = finish(start("inspect", b"\xff\n", environment={"PYTHONUTF8": "1"}))
    assert result == Result(2, "", "mlagen: \\udcff\\n: no manifest.json there; name a folder that `mlagen build --out` wrote\n")


# Pipes


def test_a_process_ends_as_main_does():
    assert finish(start("frobnicate")) == Result(2, "", "mlagen: No such command 'frobnicate'; see `mlagen --help`\n")


@pytest.mark.parametrize("command", ["models", "models --json", "inspect {}", "--version", "--help"])
def test_a_reader_that_goes_away(command, built):
    reader, writer = os.pipe()
    os.close(reader)
    process = start(*command.format(built).split(), stdout=writer)
    os.close(writer)
    assert finish(process) == Result(1, "", "")


@pytest.mark.parametrize("command", ["models", "models --json", "inspect {}"])
def test_output_that_cannot_be_written(command, built):
    with open("/dev/full", "w") as full:
        result = finish(start(*command.format(built).split(), stdout=full))
    assert result == Result(1, "", "mlagen: output: No space left on device; make room, or name another place\n")


@pytest.mark.compiler
@pytest.mark.parametrize("closed", [">&-", "2>&-"])
def test_a_closed_stream(closed, tmp_path):
    """The command works all the same, and what belongs on one stream does not end up on another."""
    result = finish(start(*BUILD, tmp_path / "new", through=("/bin/sh", "-c", f'exec "$@" {closed}', "sh")))
    assert result.status == 0
    assert result.err == ("" if closed == "2>&-" else f"built 1/1 {KERNEL}\n")
    assert result.out.count("\n") == (0 if closed == ">&-" else 3)
    assert (tmp_path / "new" / "manifest.json").is_file()


# Signals


@pytest.mark.compiler
@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGKILL, -signal.SIGKILL)])
def test_a_build_that_is_stopped(number, status, tmp_path):
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    process = start(
        *("build", "--all", "--out", tmp_path / "new"),
        environment={"TMPDIR": str(temporary)},
        start_new_session=True,
        through=("env", "--default-signal=INT"),  # it may be ignored around here
    )
    assert process.stderr.readline().startswith("built 1/")
    os.killpg(process.pid, number)
    result = finish(process)
    assert result.status == status
    assert result.out == ""
    assert not (tmp_path / "new").exists()
    if number == signal.SIGINT:
        assert result.err.endswith("mlagen: interrupted; nothing is left half-written\n")
        assert "Traceback" not in result.err
        # A compiler that the signal hit as well may have left its source, as one does that fails.
        assert {path.suffix for path in temporary.rglob("*") if path.is_file()} <= {".hip"}


# Warnings


@pytest.mark.host
def test_a_warning_is_one_line(tmp_path):
    environment = {"MLAGEN_CACHE_DIR": str(tmp_path / "cache")}
    words = ("verify", "minicpm3", "--tp", "8", "--arch", "gfx942", "--tokens", "1")
    assert finish(start(*words, environment=environment)).err == ""
    (kernel,) = tmp_path.glob("cache/v1/*/kernel.bin")
    kernel.write_bytes(b"damaged")
    result = finish(start(*words, environment=environment))
    assert result.status == 0
    assert result.err.startswith(f"mlagen: cache entry {tmp_path}")
    assert result.err.endswith("and compiled again\n")
    assert result.err.count("\n") == 1


def test_a_warning_of_others_is_pythons():
    assert cli._warning_text("words", UserWarning, "file.py", 3, "code") == "file.py:3: UserWarning: words\n  code\n"
