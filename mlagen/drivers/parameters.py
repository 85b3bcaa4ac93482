"""The list of pointers to its arguments through which CUDA, HIP and the host build take a launch."""

import ctypes
from collections.abc import Sequence

WORD_BYTES = 8


class Parameters:
    """Such a list, and the memory that it points to: words, little endian, the first of which are written anew for each launch.

    `address` is the list's.  One launch at a time may use it, and may be given the next words as soon as it returns: the runtimes
    copy the arguments before that.
    """

    def __init__(self, words: bytes, places: Sequence[int]) -> None:
        """`places` says for each argument in which of the `words` it is; one that is smaller is at the word's start."""
        self._memory = ctypes.create_string_buffer(words, len(words))
        base = ctypes.addressof(self._memory)
        self._list = (ctypes.c_void_p * len(places))(*(base + WORD_BYTES * place for place in places))
        self.address = ctypes.addressof(self._list)

    def write(self, words: bytes) -> None:
        """Replace the first words."""
        self._memory.raw = words
