"""The host driver: a kernel built for the CPU, called through ctypes."""

import ctypes
import os
import tempfile
from collections.abc import Iterator, Sequence

from mlagen.errors import MlagenError

_ERROR_BYTES = 256
_SIZES = {"pointer": 8, "int32": 4, "int64": 8, "uint64": 8}


class HostModule:
    """A loaded shared library with one kernel, whose arguments are of the given `kinds`.

    `library` is the bytes of the file; nothing stays on the disk.  A launch runs on up to `cpu_threads` threads.
    """

    def __init__(self, library: bytes, kinds: Sequence[str]) -> None:
        with tempfile.TemporaryDirectory(prefix="mlagen-") as folder:
            path = os.path.join(folder, "kernel.so")
            with open(path, "wb") as file:
                file.write(library)
            self._library = ctypes.CDLL(path)
        self._launch = self._library.mlagen_host_launch
        self._launch.restype = ctypes.c_int
        self._launch.argtypes = (ctypes.c_uint32, ctypes.c_void_p, ctypes.c_uint32, ctypes.c_char_p, ctypes.c_size_t)
        self._offsets = tuple(_offsets(kinds))
        self.cpu_threads = os.cpu_count() or 1

    def launch(self, grid: int, block: int, arguments: bytes) -> None:
        """Run `grid` workgroups to their end; `block` is fixed by the build.

        Raises MlagenError where lanes of a wave do not meet at an operation that the hardware needs them all for.
        """
        holder = ctypes.create_string_buffer(arguments, len(arguments))
        base = ctypes.addressof(holder)
        parameters = (ctypes.c_void_p * len(self._offsets))(*(base + offset for offset in self._offsets))
        error = ctypes.create_string_buffer(_ERROR_BYTES)
        if self._launch(grid, parameters, self.cpu_threads, error, _ERROR_BYTES):
            raise MlagenError(f"host run: {error.value.decode()}")


def _offsets(kinds: Sequence[str]) -> Iterator[int]:
    """Where each argument starts in a block, at its natural alignment."""
    offset = 0
    for kind in kinds:
        offset += -offset % _SIZES[kind]
        yield offset
        offset += _SIZES[kind]
