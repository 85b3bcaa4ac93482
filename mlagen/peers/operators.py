"""The prologue as separate torch operators, each rounding to its operands' type, as a model in plain PyTorch has it."""

from collections.abc import Callable

import torch

from mlagen.timing.workload import Workload


def absorb(q_nope: torch.Tensor, w_uk: torch.Tensor) -> torch.Tensor:
    """[T,H,P] and [H,P,L] to [T,H,L]."""
    return torch.bmm(q_nope.transpose(0, 1), w_uk).transpose(0, 1)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, style: str) -> torch.Tensor:
    """RoPE of x [...,R] with cos and sin [...,R/2] in fp32, rounded to x's type."""
    if style == "gptj":
        a, b = x[..., 0::2].float(), x[..., 1::2].float()
        return torch.stack((a * cos - b * sin, b * cos + a * sin), -1).flatten(-2).to(x.dtype)
    a, b = (half.float() for half in x.chunk(2, -1))
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1).to(x.dtype)


def quantize(x: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype, limit: float) -> torch.Tensor:
    """`x` as codes of `dtype` where it is an fp8 type; as it is where it is x's own."""
    return (x.float() / scale).clamp(-limit, limit).to(dtype) if dtype.itemsize == 1 else x


Rest = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""q_out from ql_nope [T,H,L] and a layer's cache as rest_of takes it."""


def rest_of(workload: Workload) -> Rest:
    """All that follows the absorb: RoPE, concat, quantise, cache write.

    The cache comes as `storage` gives it, since torch does not index fp8 everywhere.
    """
    style, nope_first = workload.spec.rope_style, workload.spec.nope_first
    q_dtype, kv_dtype = workload.q_dtype, workload.caches[0].dtype
    q_limit, kv_limit = (_limit(workload, dtype) for dtype in (q_dtype, kv_dtype))
    q_pe, kv_c, k_pe, table = workload.q_pe, workload.kv_c, workload.k_pe, workload.cos_sin_cache
    positions, slots, q_scale, k_scale = workload.positions, workload.slot_mapping, workload.q_scale, workload.k_scale

    def row(latent: torch.Tensor, rotary: torch.Tensor) -> torch.Tensor:
        return torch.cat((latent, rotary) if nope_first else (rotary, latent), -1)

    def rest(ql_nope: torch.Tensor, cache: torch.Tensor) -> torch.Tensor:
        rotated_q, rotated_k = q_pe, k_pe
        if style != "none":
            cos, sin = table[positions].float().chunk(2, -1)
            rotated_q = rotate(q_pe, cos[:, None], sin[:, None], style)
            rotated_k = rotate(k_pe, cos, sin, style)
        entries = quantize(row(kv_c, rotated_k), k_scale, kv_dtype, kv_limit)
        cache[slots] = entries.view(cache.dtype)
        return quantize(row(ql_nope, rotated_q), q_scale, q_dtype, q_limit)

    return rest


def storage(cache: torch.Tensor) -> torch.Tensor:
    """A cache as torch can index it: fp8 as bytes."""
    return cache.view(torch.uint8) if cache.dtype.itemsize == 1 else cache


def _limit(workload: Workload, dtype: torch.dtype) -> float:
    """The magnitude at which an output saturates."""
    own = torch.finfo(dtype).max
    return own if workload.spec.fp8_max is None or dtype.itemsize > 1 else min(own, workload.spec.fp8_max)
