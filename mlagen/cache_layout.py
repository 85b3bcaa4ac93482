"""The cache as a tensor: its shape in each layout of a spec, and where in it the entries of its slots lie."""

from collections.abc import Sequence

import torch

from mlagen.spec import PrologueSpec


def cache_shape(spec: PrologueSpec, blocks: int, block_size: int) -> tuple[int, ...]:
    """Shape of a cache of `blocks` times `block_size` slots."""
    if spec.kv_layout == "segmented":
        return (blocks, block_size * spec.entry_dim)
    return (blocks, block_size, spec.entry_dim)


def slots_of_block(spec: PrologueSpec, shape: Sequence[int]) -> int:
    """Slots of a block of a cache of this shape; of a segmented one, whose block is no multiple of L+R wide, the whole ones."""
    return shape[1] // spec.entry_dim if spec.kv_layout == "segmented" else shape[1]


def parts(spec: PrologueSpec, cache: torch.Tensor) -> list[torch.Tensor]:
    """Views [blocks, block_size, columns] of a cache, which together hold the columns of its entries in order."""
    if spec.kv_layout != "segmented":
        return [cache]
    size = slots_of_block(spec, cache.shape)
    held = cache.split([size * spec.lora_rank, size * spec.rope_dim], 1)
    return [part.unflatten(1, (size, width)) for part, width in zip(held, (spec.lora_rank, spec.rope_dim), strict=True)]


def entries(spec: PrologueSpec, cache: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
    """[slots, L+R]: the entries of the given slots, none of them negative, on the cache's device."""
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
