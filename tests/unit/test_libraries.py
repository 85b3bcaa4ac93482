"""Which build of a library a file is: its name, its size, its headers and its build id tell."""

import struct

import pytest

from mlagen.libraries import identify, loaded_libraries


def elf(*, build_id: bytes = b"\1" * 20, code: bytes = b"code", tables: int = 1, at: int = 8192) -> bytes:
    """An ELF file whose note segment lies at `at`, beyond what is hashed of every file."""
    note = struct.pack("<III4s", 4, len(build_id), 3, b"GNU\0") + build_id
    header = struct.pack("<16sHHIQQQIHHHHHH", b"\x7fELF\x02\x01\x01", 3, 62, 1, 0, 64, 0, 0, 64, 56, 1, 0, 0, 0)
    program = struct.pack("<IIQQQQQQ", 4, 4, at, at, at, len(note), len(note), 4) * tables
    return (header + program).ljust(5000, b"\0") + code.ljust(at - 5000, b"\0") + note


@pytest.fixture
def library(tmp_path):
    def write(data: bytes, name: str = "libcompiler.so.1", folder: str = "lib"):
        (tmp_path / folder).mkdir(exist_ok=True)
        path = tmp_path / folder / name
        path.write_bytes(data)
        return path

    return write


def test_the_same_build_is_the_same_wherever_it_lies(library):
    first = identify([library(elf())])
    assert first == identify([library(elf(), folder="elsewhere")])
    assert first.startswith("libcompiler.so.1; ")
    assert "/" not in first


@pytest.mark.parametrize(
    "other",
    [elf(build_id=b"\1" * 19 + b"\2"), elf(at=8196), elf() + b"\0", b"\x7fELF", b"", b"#!/bin/sh\n", elf()[:70]],
    ids=["build id", "layout", "size", "no more than magic", "empty", "script", "cut off"],
)
def test_another_build_is_another(library, other):
    assert identify([library(elf())]) != identify([library(other)])


def test_another_name_is_another(library):
    assert identify([library(elf())]) != identify([library(elf(), "libcompiler.so.2")])


def test_the_order_does_not_matter_and_each_file_does(library):
    one, other = library(elf(), "one"), library(elf(build_id=b"\3" * 20), "other")
    assert identify([one, other]) == identify([other, one])
    assert len({identify([one]), identify([other]), identify([one, other])}) == 3


def test_a_missing_file_is_an_error(tmp_path):
    with pytest.raises(OSError, match="nowhere"):
        identify([tmp_path / "nowhere"])


def test_loaded_libraries_are_those_of_this_process():
    found = loaded_libraries(("libc.so", "libc-"))
    assert found
    assert all(path.is_file() for path in found)
    assert loaded_libraries(("libnothing-of-this-name",)) == []
