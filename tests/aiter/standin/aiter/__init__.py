"""What AITER's op_tests/test_concat_cache_mla.py imports by the name of aiter: the operator under test is mlagen's.

AITER's file computes what it expects with two more of AITER's operators, which are plain torch here, so that nothing of mlagen is
on that side of its comparisons.
"""

import logging

import torch

from mlagen.integrations.aiter import fused_qk_rope_concat_and_cache_mla as fused_qk_rope_concat_and_cache_mla

logger = logging.getLogger("aiter")

NEOX, GPTJ = 0, 1


def rope_cached_positions_fwd(
    x: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor,
    rotate_style: int,
    reuse_freqs_front_part: bool,
    nope_first: bool,
) -> torch.Tensor:
    """x [s,b,h,d], rotated in fp32 and rounded to its dtype; cos, sin [max_position,1,1,d/2]; positions [s,b]."""
    assert reuse_freqs_front_part, "tables of d columns are not what the test file has"
    cos, sin = (table[positions][..., 0, :].float() for table in (cos, sin))
    values = x.float()
    if rotate_style == NEOX:
        a, b = values.chunk(2, -1)
        return torch.cat((a * cos - b * sin, b * cos + a * sin), -1).to(x.dtype)
    assert rotate_style == GPTJ
    a, b = values[..., 0::2], values[..., 1::2]
    return torch.stack((a * cos - b * sin, b * cos + a * sin), -1).flatten(-2).to(x.dtype)


def concat_and_cache_mla(
    kv_c: torch.Tensor,
    k_pe: torch.Tensor,
    kv_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    kv_cache_dtype: str,
    scale: torch.Tensor,
) -> None:
    """[kv_c | k_pe] to the entries of kv_cache [blocks, block_size, L+R] at the slots that are not negative."""
    kept = slot_mapping >= 0
    slots, block_size = slot_mapping[kept], kv_cache.shape[1]
    rows = torch.cat((kv_c, k_pe), -1)[kept].float()
    codes = (rows / scale if kv_cache_dtype == "fp8" else rows).to(kv_cache.dtype)
    integer = torch.uint8 if codes.dtype.itemsize == 1 else torch.int16  # torch cannot index fp8
    kv_cache.view(integer)[slots // block_size, slots % block_size] = codes.view(integer)
