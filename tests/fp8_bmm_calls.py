"""Calls of the drop-in for AITER's fused_fp8_bmm_rope_cat_and_cache_mla, and its results by name."""

from typing import Any

import torch
from aiter_triton_model import Call, Results, make_call

from mlagen.integrations.aiter import fused_fp8_bmm_rope_cat_and_cache_mla
from mlagen.target import TARGETS
from mlagen.torch_types import torch_dtype

RESULTS = ("q_out", "decode_q_pe_out", "k_pe_out", "q_nope_zeros_out")

SMALL = {
    "tokens": 5,
    "heads": (3, 1),
    "nope": 64,
    "latent": 64,
    "rotary": 16,
    "prefill": 0,
    "group": 128,
    "dtype": torch.bfloat16,
    "neox": True,
    "cache": "fp8",
    "query": "model",
    "slots": torch.int64,
    "table": "half",
    "scale": True,
    "zeros": 0,
    "tile_group": 1,
}
"""What make_call makes a call of, where a test does not say otherwise."""


def call_of(seed: int = 0, *, arch: str = "gfx950", **row: Any) -> Call:
    """A call with tensors on the CPU, its second slot -1."""
    return make_call({**SMALL, **row}, torch_dtype(TARGETS[arch].fp8), seed)


def run(call: Call) -> Results:
    """The four results, and kv_cache."""
    return named(call, fused_fp8_bmm_rope_cat_and_cache_mla(**call))


def named(call: Call, returned: tuple[torch.Tensor, ...]) -> Results:
    """What the call returned by name, and kv_cache."""
    return {**dict(zip(RESULTS, returned, strict=True)), "kv_cache": call["kv_cache"]}
