"""The host driver: a kernel built for the CPU, called through ctypes."""

import ctypes
import os
import tempfile

from mlagen.errors import MlagenError

_ERROR_BYTES = 256


class HostModule:
    """A loaded shared library with one kernel.

    `library` is the bytes of the file; nothing stays on the disk.  A launch runs on up to `cpu_threads` threads.
    """

    def __init__(self, library: bytes) -> None:
        with tempfile.TemporaryDirectory(prefix="mlagen-") as folder:
            path = os.path.join(folder, "kernel.so")
            with open(path, "wb") as file:
                file.write(library)
            self._library = ctypes.CDLL(path)
        self._launch = self._library.mlagen_host_launch
        self._launch.restype = ctypes.c_int
        self._launch.argtypes = (ctypes.c_uint32, ctypes.c_void_p, ctypes.c_uint32, ctypes.c_char_p, ctypes.c_size_t)
        self.cpu_threads = os.cpu_count() or 1

    def parameters(self, address: int) -> int:
        """What launch() takes, of the address of a list of pointers to the arguments."""
        return address

    def launch(self, grid: int, block: int, parameters: int, shared_bytes: int = 0) -> None:
        """Run `grid` workgroups to their end; `block` is fixed by the build, and shared memory is always all that there may be.

        Raises MlagenError where lanes of a wave do not meet at an operation that the hardware needs them all for.
        """
        error = ctypes.create_string_buffer(_ERROR_BYTES)
        if self._launch(grid, parameters, self.cpu_threads, error, _ERROR_BYTES):
            raise MlagenError(f"host run: {error.value.decode()}")
