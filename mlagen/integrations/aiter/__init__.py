"""AITER's decode prologue on mlagen's kernels: replace the import, and nothing else.

    from mlagen.integrations.aiter import fused_qk_rope_concat_and_cache_mla, fused_qk_rope_concat_and_cache_mla_seg
    from mlagen.integrations.aiter import fused_fp8_bmm_rope_cat_and_cache_mla

The signatures are those of ROCm/aiter at commit e404860.
"""

from mlagen.integrations.aiter.fp8_bmm import fused_fp8_bmm_rope_cat_and_cache_mla
from mlagen.integrations.aiter.rope_concat import fused_qk_rope_concat_and_cache_mla, fused_qk_rope_concat_and_cache_mla_seg

__all__ = [
    "fused_fp8_bmm_rope_cat_and_cache_mla",
    "fused_qk_rope_concat_and_cache_mla",
    "fused_qk_rope_concat_and_cache_mla_seg",
]
