"""The host driver: a kernel built for the CPU, called through ctypes."""

import ctypes
import os
import tempfile
from collections.abc import Sequence

from mlagen.errors import MlagenError

_ERROR_BYTES = 256
_CTYPES = {"pointer": ctypes.c_uint64, "int32": ctypes.c_int32, "int64": ctypes.c_int64}


class HostModule:
    """A loaded shared library with one kernel.  `library` is the bytes of the file; nothing stays on the disk."""

    def __init__(self, library: bytes) -> None:
        with tempfile.TemporaryDirectory(prefix="mlagen-") as folder:
            path = os.path.join(folder, "kernel.so")
            with open(path, "wb") as file:
                file.write(library)
            self._library = ctypes.CDLL(path)
        self._launch = self._library.mlagen_host_launch
        self._launch.restype = ctypes.c_int
        self._launch.argtypes = (ctypes.c_uint32, ctypes.c_void_p, ctypes.c_uint32, ctypes.c_char_p, ctypes.c_size_t)

    def launch(self, grid: int, kinds: Sequence[str], values: Sequence[int], *, cpu_threads: int | None = None) -> None:
        """Run `grid` workgroups to their end on up to `cpu_threads` threads (all cores where None).

        `kinds` and `values` are the kernel's arguments in order, a pointer as its address.  Raises MlagenError where lanes of a
        wave do not meet at an operation that the hardware needs them all for.
        """
        holders = [_CTYPES[kind](value) for kind, value in zip(kinds, values, strict=True)]
        parameters = (ctypes.c_void_p * len(holders))(*(ctypes.addressof(holder) for holder in holders))
        error = ctypes.create_string_buffer(_ERROR_BYTES)
        if self._launch(grid, parameters, cpu_threads or os.cpu_count() or 1, error, _ERROR_BYTES):
            raise MlagenError(f"host run: {error.value.decode()}")
