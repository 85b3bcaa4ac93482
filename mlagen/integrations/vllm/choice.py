"""Which kernel a layer of vLLM needs, or why none fits it."""

from dataclasses import dataclass
from typing import Any

import torch

from mlagen.errors import SpecError
from mlagen.integrations.vllm.deployment import BACKENDS, FP8_CACHES, fp8_limit, is_pair
from mlagen.spec import PrologueSpec
from mlagen.target import Target

MODEL_DTYPES = {torch.bfloat16: "bf16", torch.float16: "fp16"}


class Unfit(Exception):
    """Why a layer keeps vLLM's own path."""


@dataclass(frozen=True)
class Choice:
    """A kernel's spec, and how many heads its query has room for: what attention would pad otherwise."""

    spec: PrologueSpec
    room: int


def refuse_unknown(wrapper: Any) -> None:
    """Raises Unfit for an MLA layer of a kind that the kernel does not do, or that was not tested with it."""
    from vllm import envs
    from vllm.platforms import current_platform

    attn = wrapper.mla_attn
    backend = attn.attn_backend.get_name()
    facts = {
        f"platform {current_platform.device_name}: only ROCm was tested": not current_platform.is_rocm(),
        "sparse MLA": wrapper.is_sparse or wrapper.indexer is not None or attn.impl.is_sparse,
        "decode context parallelism (DCP)": attn.impl.dcp_world_size > 1 or wrapper.dcp_q_replicate,
        "prefill context parallelism (PCP)": attn.use_pcp,
        "a sparse cache in host memory": attn.hisparse_cache is not None,
        f"attention backend {backend}: {' and '.join(BACKENDS)} were tested": backend not in BACKENDS,
        "an attention backend that pads heads itself": attn.q_pad_num_heads is not None,
        "sliding window attention": attn.sliding_window is not None,
        "attention that is called without an operator": attn.use_direct_call,
        "weights packed for AMX": attn.is_amx_bmm_enabled,
        # A request decodes by the kernel, and by vLLM's operators as soon as a prefill is in its batch.
        "VLLM_BATCH_INVARIANT": envs.VLLM_BATCH_INVARIANT,
    }
    for reason, holds in facts.items():
        if holds:
            raise Unfit(reason)


def rope_style(rotary: Any, rope_dim: int) -> str:
    """A spec's word for the rotation that vLLM's module does.  Raises Unfit where it does something else."""
    if rotary is None or rope_dim == 0:
        return "none"
    from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbedding
    from vllm.model_executor.layers.rotary_embedding.deepseek_scaling_rope import DeepseekScalingRotaryEmbedding

    # Scalings such as YaRN have tables of their own and this rotation; whoever rotates in another way overrides it.
    known = (RotaryEmbedding.forward_native, DeepseekScalingRotaryEmbedding.forward_native)
    if getattr(type(rotary), "forward_native", None) not in known:
        raise Unfit(f"RoPE of kind {type(rotary).__name__}")
    if rotary.rotary_dim != rope_dim or rotary.head_size != rope_dim or rotary.cos_sin_cache.shape[1:] != (rope_dim,):
        raise Unfit(f"RoPE of {rotary.rotary_dim} of {rope_dim} columns")
    return "neox" if rotary.is_neox_style else "gptj"


def choose(wrapper: Any, dtype: torch.dtype, weight: str | None, target: Target) -> Choice:
    """The kernel for a layer of a model of this dtype, whose W_UK is of type `weight` (a spec's word; None is the model's dtype).

    Raises Unfit.
    """
    attn = wrapper.mla_attn
    if dtype not in MODEL_DTYPES:
        raise Unfit(f"a model of dtype {dtype}")
    model = MODEL_DTYPES[dtype]
    own = ("auto", str(dtype).removeprefix("torch."))
    if attn.kv_cache_dtype not in (*own, *FP8_CACHES):
        raise Unfit(f"a KV cache of type {attn.kv_cache_dtype} in a model of {own[1]}")
    kv_dtype = "fp8" if attn.kv_cache_dtype in FP8_CACHES else model
    q_dtype = "fp8" if kv_dtype == "fp8" and attn.impl.supports_quant_query_input else model
    is_aiter = attn.attn_backend.get_name() == "ROCM_AITER_MLA"
    has_pair = is_aiter and is_pair(q_dtype, attn.num_heads, attn.qk_rope_head_dim)
    try:
        spec = PrologueSpec(
            heads=attn.num_heads,
            nope_dim=attn.qk_nope_head_dim,
            lora_rank=attn.kv_lora_rank,
            rope_dim=attn.qk_rope_head_dim,
            rope_style=rope_style(wrapper.rotary_emb, attn.qk_rope_head_dim),
            dtype=model,
            weight=weight,
            q_dtype=q_dtype,
            kv_dtype=kv_dtype,
            fp8_max=fp8_limit(q_dtype, target),
            q_split=has_pair,
        )
    except SpecError as error:
        raise Unfit(str(error)) from None
    room = attn.num_heads
    if is_aiter and not has_pair:
        room = _aiter_heads(attn.num_heads)
    return Choice(spec, room)


def _aiter_heads(heads: int) -> int:
    """Heads of the tensor in which AITER wants these, where it takes them without a copy.

    It repeats each head where that fills the tensor; otherwise the first heads count, and what is behind them does not.
    """
    from vllm.v1.attention.backends.mla.rocm_aiter_mla import AiterMLAHelper

    wanted = int(AiterMLAHelper.get_actual_mla_num_heads(heads))
    return heads if wanted % heads == 0 else wanted
