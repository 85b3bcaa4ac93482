"""The `extra` list through which CUDA and HIP take a kernel's arguments as one packed block."""

import ctypes
import threading
from collections.abc import Callable
from typing import Any

# Keys of the list, in cuda.h and hip_runtime_api.h alike; only the key that ends it differs.
_BUFFER_POINTER, _BUFFER_SIZE = 1, 2


class ArgumentList:
    """One list for each thread, used again for every launch: the runtimes copy the block before a launch returns.

    `end` is the runtime's end key; `wrap` turns the list's address into what its Python package passes on.
    """

    def __init__(self, end: int, wrap: Callable[[int], Any]) -> None:
        self._end, self._wrap = end, wrap
        self._local = threading.local()

    def filled(self, arguments: bytes) -> Any:
        """The list with `arguments` in its block, which is of the same size in every call."""
        local = self._local
        if not hasattr(local, "block"):
            local.block = ctypes.create_string_buffer(len(arguments))
            local.size = ctypes.c_size_t(len(arguments))
            local.list = (ctypes.c_void_p * 5)(
                _BUFFER_POINTER, ctypes.addressof(local.block), _BUFFER_SIZE, ctypes.addressof(local.size), self._end
            )
            local.extra = self._wrap(ctypes.addressof(local.list))
        local.block.raw = arguments
        return local.extra
