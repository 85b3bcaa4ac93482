"""The prologue from W_UK as the model holds it: packed when a kernel first needs it, and again when it has changed.

    torch.ops.mlagen.decode_prologue_weights(q, q_pe?, kv_c, k_pe?, weight, kv_cache, slot_mapping, positions?, cos_sin_cache?,
                                             sin?, q_scale?, k_scale?, *, w_size, w_stride, w_offset, spec, arch="") -> q_out

is decode_prologue with W_UK [H,P,L] as elements of the storage of `weight`, a parameter: with sizes and strides w_size and
w_stride, w_offset after the first element of `weight`.  A kv_cache [slots, L+R] is one of blocks of one slot.

A graph cannot hold the packed tensor itself.  What a pass made would be missing in a process that takes the compiled graph from a
cache; a constant would not follow a later change of the parameter; and a result of an operator belongs to the compiler, which uses
its memory again.  So the operator looks the packed tensor up by the storage of the parameter, for as long as that lives, and checks
torch's count of in-place writes: a changed parameter is packed anew, into the same memory.

A graph replay runs no such check.  After a change of weights under a captured graph, and of those made in inference mode, whose
writes torch does not count, call repack().
"""

import threading
import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from mlagen import ops
from mlagen.errors import MlagenError

WITH_WEIGHTS = (
    "decode_prologue_weights(Tensor q, Tensor? q_pe, Tensor kv_c, Tensor? k_pe, Tensor weight, Tensor(a!) kv_cache, "
    "Tensor slot_mapping, Tensor? positions, Tensor? cos_sin_cache, Tensor? sin, Tensor? q_scale, Tensor? k_scale, *, "
    'SymInt[] w_size, SymInt[] w_stride, SymInt w_offset, str spec, str arch="") -> Tensor'
)

Made = TypeVar("Made")
weak_reference: Any = StorageWeakRef  # without types


@dataclass
class Packed:
    """A packed W_UK, and what it was made from: the storage by a weak reference, the writes counted then."""

    tensor: torch.Tensor
    storage: Any
    address: int
    version: int | None
    view: Callable[[torch.Tensor], torch.Tensor]
    dtype: torch.dtype
    spec: str
    arch: str


_PACKED: dict[tuple[Any, ...], Packed] = {}
_lock = threading.Lock()


def packed_weights(
    weight: torch.Tensor, size: Sequence[int], stride: Sequence[int], offset: int, spec: str, arch: str
) -> torch.Tensor:
    """What pack_weights gives for a W_UK within the storage of `weight`; the same tensor as long as that is not written to."""
    storage: Any = weak_reference(weight.untyped_storage())
    offset += int(weight.storage_offset())
    key = (storage.cdata, weight.device, weight.dtype, tuple(size), tuple(stride), offset, spec, arch)
    version = None if weight.is_inference() else weight._version
    found = _PACKED.get(key)
    if found is not None and found.version == version and found.address == weight.data_ptr() and not found.storage.expired():
        return found.tensor
    if weight.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise MlagenError("weight: it is not packed yet, and the current stream is being captured: run the graph once before")

    def view(of: torch.Tensor) -> torch.Tensor:
        return of.as_strided(tuple(size), tuple(stride), offset)

    with _lock:
        new: torch.Tensor = _outside_of_pools(
            weight.device, lambda: torch.ops.mlagen.pack_weights(view(weight.detach()), spec=spec, arch=arch)
        )
        if found is not None and not found.storage.expired():
            new = found.tensor.copy_(new)  # where captured graphs read it
        for gone in [each for each, entry in _PACKED.items() if entry.storage.expired()]:
            del _PACKED[gone]
        _PACKED[key] = Packed(new, storage, weight.data_ptr(), version, view, weight.dtype, spec, arch)
    return new


def repack() -> int:
    """Pack every weight that is in use anew, in place; returns how many these are.

    To be called after weights have changed that captured graphs use, or that are inference tensors.
    """
    with _lock:
        entries = [each for each in _PACKED.values() if not each.storage.expired()]
        for each in entries:
            storage = torch.UntypedStorage._new_with_weak_ptr(each.storage.cdata)
            base = torch.empty(0, dtype=each.dtype, device=storage.device).set_(storage)
            each.tensor.copy_(torch.ops.mlagen.pack_weights(each.view(base), spec=each.spec, arch=each.arch))
    return len(entries)


def _outside_of_pools(device: torch.device, make: Callable[[], Made]) -> Made:
    """What `make` gives, its memory from the process's own pool.

    torch.compile's graph trees give what is allocated by a thread during their first runs to a pool of theirs, and refuse a tensor
    that stays there.  Another thread, on its own stream, allocates as ever.
    """
    if device.type != "cuda":
        with torch.no_grad():
            return make()
    torch.cuda.current_stream(device).synchronize()
    made: list[Made] = []
    raised: list[BaseException] = []

    def run() -> None:
        try:
            with torch.cuda.device(device), torch.no_grad():
                made.append(make())
                torch.cuda.current_stream(device).synchronize()
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if raised:
        raise raised[0]
    return made[0]


MaybeTensor = torch.Tensor | None


def _decode_prologue_weights(
    q: torch.Tensor, q_pe: MaybeTensor, kv_c: torch.Tensor, k_pe: MaybeTensor, weight: torch.Tensor, kv_cache: torch.Tensor,
    slot_mapping: torch.Tensor, positions: MaybeTensor, cos_sin_cache: MaybeTensor, sin: MaybeTensor, q_scale: MaybeTensor,
    k_scale: MaybeTensor, *, w_size: Sequence[int], w_stride: Sequence[int], w_offset: int, spec: str, arch: str = "",
) -> torch.Tensor:  # fmt: skip
    packed = packed_weights(weight, w_size, w_stride, w_offset, spec, arch)
    kv_cache = kv_cache.unsqueeze(1) if kv_cache.dim() == 2 else kv_cache
    return typing.cast(torch.Tensor, torch.ops.mlagen.decode_prologue(
        q, q_pe, kv_c, k_pe, packed, kv_cache, slot_mapping, positions, cos_sin_cache, sin, q_scale, k_scale, spec=spec, arch=arch,
    ))  # fmt: skip


def _fake_decode_prologue_weights(
    q: torch.Tensor, q_pe: MaybeTensor, kv_c: torch.Tensor, k_pe: MaybeTensor, weight: torch.Tensor, kv_cache: torch.Tensor,
    slot_mapping: torch.Tensor, positions: MaybeTensor, cos_sin_cache: MaybeTensor, sin: MaybeTensor, q_scale: MaybeTensor,
    k_scale: MaybeTensor, *, w_size: Sequence[int], w_stride: Sequence[int], w_offset: int, spec: str, arch: str = "",
) -> torch.Tensor:  # fmt: skip
    w_uk = weight.new_empty_strided(tuple(w_size), tuple(w_stride))
    packed = torch.ops.mlagen.pack_weights(w_uk, spec=spec, arch=arch)
    kv_cache = kv_cache.unsqueeze(1) if kv_cache.dim() == 2 else kv_cache
    return typing.cast(torch.Tensor, torch.ops.mlagen.decode_prologue(
        q, q_pe, kv_c, k_pe, packed, kv_cache, slot_mapping, positions, cos_sin_cache, sin, q_scale, k_scale, spec=spec, arch=arch,
    ))  # fmt: skip


def _register() -> object:
    """Define the operator; it lives as long as what is returned."""
    library: typing.Any = torch.library  # parts of it have no types
    fragment = library.Library("mlagen", "FRAGMENT")
    strides = getattr(torch.Tag, "needs_exact_strides", torch.Tag.needs_fixed_stride_order)
    fragment.define(WITH_WEIGHTS, tags=(torch.Tag.pt2_compliant_tag, strides))
    for device in ("CPU", "CUDA"):
        fragment.impl("decode_prologue_weights", _decode_prologue_weights, device)
    library.register_fake("mlagen::decode_prologue_weights", _fake_decode_prologue_weights, lib=fragment)
    return fragment


assert ops.DECODE_PROLOGUE, "the operators that this one calls are registered with that module"
if not hasattr(torch.ops.mlagen, "decode_prologue_weights"):  # a second import, or a reload, finds it there
    _LIBRARY = _register()
