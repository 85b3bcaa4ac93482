"""What was made of tensors, once: remembered for as long as these live, and made anew where they were changed."""

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.multiprocessing import reductions

from mlagen.errors import ArgumentError

Made = tuple[torch.Tensor, ...]

_storage_reference: Any = reductions.StorageWeakRef
"""torch's weak reference to a tensor's memory: while there is one, no other memory gets the same `_cdata`."""


@dataclass
class _Entry:
    state: tuple[object, ...]
    made: Made
    storages: list[Any]


class Remembered:
    """What a function made of tensors, by where these lie; safe to use from several threads.

    A tensor is known by its memory, not by its object: another view of the same elements is the same.  The memory is held weakly,
    and a tensor at the address of a freed one is not taken for it.  That elements were changed in place is seen by torch's version
    counter: it counts what is done to a tensor and to its views, but not what is done through `.data` or by other libraries, and
    tensors made in inference mode have none.
    """

    def __init__(self) -> None:
        self._entries: dict[tuple[object, ...], _Entry] = {}
        self._lock = threading.Lock()

    def find(self, name: str, of: object, tensors: Sequence[torch.Tensor], make: Callable[[], Made]) -> Made:
        """What `make` gives, or gave, of `tensors` for the purpose `of`.

        What is made anew is copied to where the old one lies, since graphs may read it there.  Raises ArgumentError, naming `name`,
        where something has to be made and the current stream is being captured.
        """
        key = (of, *map(_place, tensors))
        state = tuple(map(_state, tensors))
        entry = self._entries.get(key)
        if entry is not None and entry.state == state:
            return entry.made
        on_gpu = tensors[0].device.type == "cuda"
        if on_gpu and torch.cuda.is_current_stream_capturing():
            raise ArgumentError(
                f"{name}: new or changed since the last call, and the current stream is being captured: make a call with it before"
            )
        with self._lock:
            entry = self._entries.get(key)
            if entry is None:
                entry = _Entry(state, make(), [_storage_reference(each.untyped_storage()) for each in tensors])
                # Those of freed tensors go: what was made of them is as large as they were.
                alive = {k: e for k, e in self._entries.items() if not any(each.expired() for each in e.storages)}
                self._entries = {**alive, key: entry}
            elif entry.state != state:
                for old, new in zip(entry.made, make(), strict=True):
                    old.copy_(new)
                entry.state = state
            if on_gpu:
                torch.cuda.current_stream(tensors[0].device).synchronize()  # the next call may be on another stream
        return entry.made


def _place(tensor: torch.Tensor) -> tuple[object, ...]:
    return tensor.untyped_storage()._cdata, tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype


def _state(tensor: torch.Tensor) -> tuple[object, ...]:
    return tensor.data_ptr(), None if tensor.is_inference() else tensor._version
