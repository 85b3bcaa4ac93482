"""Which build of a shared library a file is, told without loading it: a compiler takes longer to load than a kernel."""

import hashlib
import os
import struct
from collections.abc import Iterable
from pathlib import Path

_HEAD_BYTES = 4096
_NOTE = 4  # PT_NOTE of elf.h


def identify(libraries: Iterable[Path]) -> str:
    """The files' names, with a hash that tells one build of them from another.  Raises OSError if one cannot be read.

    Hashed are their sizes, their headers and their notes: where a linker writes a build id, it is a note, and where sections lie
    moves with nearly every change.
    """
    names, hashed = [], hashlib.sha256()
    for path in sorted(libraries):
        with path.open("rb") as file:
            head = file.read(_HEAD_BYTES)
            hashed.update(f"{path.name} {os.fstat(file.fileno()).st_size} ".encode() + head)
            for offset, size in _notes(head):
                file.seek(offset)
                hashed.update(file.read(size))
        names.append(path.name)
    return f"{', '.join(names)}; {hashed.hexdigest()[:16]}"


def _notes(head: bytes) -> list[tuple[int, int]]:
    """Offset and size of each note segment of a 64-bit little-endian ELF file, as far as its program headers are in `head`."""
    if head[:6] != b"\x7fELF\x02\x01" or len(head) < 64:
        return []
    (table,), (entry_bytes, count) = struct.unpack_from("<Q", head, 32), struct.unpack_from("<HH", head, 54)
    found = []
    for at in range(table, table + entry_bytes * count, entry_bytes or 1):
        if at + 40 > len(head):
            break
        kind, offset, size = struct.unpack_from("<I4xQ16xQ", head, at)
        if kind == _NOTE and size <= _HEAD_BYTES:
            found.append((offset, size))
    return found


def loaded_libraries(names: tuple[str, ...]) -> list[Path]:
    """The files that this process has loaded whose names begin with one of `names`."""
    found = set()
    with open("/proc/self/maps", encoding="utf-8", errors="surrogateescape") as maps:
        for line in maps:
            path = line.rstrip("\n").split(maxsplit=5)[5:]
            if path and os.path.basename(path[0]).startswith(names):
                found.add(Path(path[0]))
    return sorted(found)
