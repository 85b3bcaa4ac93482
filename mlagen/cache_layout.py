"""The cache as a tensor: its shape in each layout of a spec, and where in it the entries of its slots lie."""

from collections.abc import Sequence

import torch

from mlagen.dtypes import DType, model_dtype
from mlagen.spec import PrologueSpec
from mlagen.target import Target
from mlagen.torch_types import torch_dtype


def cache_shape(spec: PrologueSpec, blocks: int, block_size: int) -> tuple[int, ...]:
    """Shape of a cache of `blocks` times `block_size` slots."""
    if spec.kv_layout == "segmented":
        return (blocks, block_size * spec.entry_dim)
    return (blocks, block_size, *spec.kv_inner, spec.cache_width)


def slots_of_block(spec: PrologueSpec, shape: Sequence[int]) -> int:
    """Slots of a block of a cache of this shape; of a segmented one, whose block is no multiple of L+R wide, the whole ones."""
    return shape[1] // spec.entry_dim if spec.kv_layout == "segmented" else shape[1]


def parts(spec: PrologueSpec, cache: torch.Tensor) -> list[torch.Tensor]:
    """Views [blocks, block_size, columns], or [..., K, columns], of a cache, which together hold its entries' columns in order."""
    if spec.kv_layout != "segmented":
        return [cache]
    size = slots_of_block(spec, cache.shape)
    held = cache.tensor_split((size * spec.lora_rank,), 1)
    widths = (spec.lora_rank, spec.rope_dim)
    return [part.as_strided((len(part), size, width), (part.stride(0), width, 1)) for part, width in zip(held, widths, strict=True)]


def entries(spec: PrologueSpec, cache: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
    """[slots, L+R], [slots, K, L+R] or bytes of fp8_ds_mla: the entries of the slots, none negative, on the cache's device."""
    block, place = slots // slots_of_block(spec, cache.shape), slots % slots_of_block(spec, cache.shape)
    views = parts(spec, cache.view(torch.uint8) if cache.dtype.itemsize == 1 else cache)  # not every index takes fp8
    return torch.cat([view[block, place] for view in views], -1).view(cache.dtype)


def written(spec: PrologueSpec, cache: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
    """True where the entries of these slots lie; of the cache's shape, on the CPU."""
    block, place = slots // slots_of_block(spec, cache.shape), slots % slots_of_block(spec, cache.shape)
    mask = torch.zeros(cache.shape, dtype=torch.bool)
    for view in parts(spec, mask):
        view[block, place] = True
    return mask


def values(spec: PrologueSpec, target: Target, rows: torch.Tensor) -> torch.Tensor:
    """Entries as numbers: those of fp8_ds_mla [slots, L + L/128 + R] in fp64, codes, scales and rotary; others as they are."""
    if spec.kv_layout != "fp8_ds_mla":
        return rows
    places = (spec.lora_rank, spec.rotary_byte)
    dtypes = (target.fp8, DType.FP32, model_dtype(spec.dtype))
    held = zip(rows.tensor_split(places, -1), dtypes, strict=True)
    return torch.cat([each.contiguous().view(torch_dtype(dtype)).double() for each, dtype in held], -1)
