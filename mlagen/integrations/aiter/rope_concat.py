"""AITER's HIP operators of the prologue without absorb; their signatures are in its aiter/ops/cache.py."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from mlagen.errors import ArgumentError, SpecError
from mlagen.integrations.aiter.tensors import FP8, MODEL_DTYPES, by_name, dtype_name, one_element, rows, table
from mlagen.runtime import Kernel, load
from mlagen.spec import PrologueSpec

_TENSORS = (
    *("q_nope", "q_pe", "kv_c", "k_pe", "kv_cache", "q_out", "slot_mapping", "k_scale", "q_scale"),
    *("positions", "cos_cache", "sin_cache"),
)

_NAMES = {
    "q": "q_nope",
    "q[0] (q_nope)": "q_nope",
    "q[1] (q_pe)": "q_pe",
    "cos_sin_cache[0] (cos)": "cos_cache",
    "cos_sin_cache[1] (sin)": "sin_cache",
    "out": "q_out",
}
"""AITER's names of arguments to which a kernel gives other ones in its errors."""

_Key = tuple[object, ...]
_KERNELS: dict[_Key, Kernel] = {}
"""The kernels that ran, by what of a call chooses them."""


def fused_qk_rope_concat_and_cache_mla(
    q_nope: torch.Tensor,
    q_pe: torch.Tensor,
    kv_c: torch.Tensor,
    k_pe: torch.Tensor,
    kv_cache: torch.Tensor,
    q_out: torch.Tensor,
    slot_mapping: torch.Tensor,
    k_scale: torch.Tensor,
    q_scale: torch.Tensor,
    positions: torch.Tensor,
    cos_cache: torch.Tensor,
    sin_cache: torch.Tensor,
    is_neox: bool,
    is_nope_first: bool,
    compute_all_q_rope: bool = False,
) -> None:
    """Rotate q_pe and k_pe, write the query rows to q_out and the key rows to kv_cache at slot_mapping, each to its dtype.

    q_nope [T,H,L], already absorbed; q_pe [T,H,R]; kv_c [T,L] or [T,K,L]; k_pe [T,R] or [T,K,R]: bf16 or fp16, unit last stride,
    other strides free.  kv_cache [blocks, block_size, L+R] or [blocks, block_size, K, L+R] and q_out [T, H' >= H, L+R]: that dtype
    or the arch's fp8, the cache also uint8, which is read as that.  slot_mapping, positions [T]; k_scale, q_scale: one fp32 value,
    on the device, value = code * scale; not read where the output is not fp8.  cos_cache, sin_cache: [max_position, R/2] or
    [max_position, 1, 1, R/2].  is_neox: halves are rotated, else neighbouring pairs.  is_nope_first: rows are [L | R], else
    [R | L].  T is the number of slots, or of q_nope's rows if these are fewer; what other tensors have beyond T is left alone.

    On a GPU it is launched on the caller's current stream and returns at once, without allocating and without waiting.  The first
    call of a kind loads a kernel, which must not happen in a graph capture.  On the CPU it runs the program of gfx942 where an
    output is e4m3fnuz, else that of gfx950.

    The results are AITER's bit for bit, but where AITER's are a defect:

    - Every row of q_out is written.  AITER leaves those of negative slots as they were unless compute_all_q_rope is set, which it
      takes for some shapes only; here it changes nothing, and any shape may have it.
    - Finite values saturate in the rotary columns too; in AITER's they overflow to NaN.  NaN stays NaN.
    - slot_mapping and positions may be int32; AITER reads any tensor as int64.
    - Positions are clamped to the table for every shape; in AITER not by the kernel for unusual ones.
    - cos_cache and sin_cache may be fp32, and have any row stride; AITER reads them as dense rows of q_nope's dtype.
    - Addresses have 64 bits; AITER's strides have 32.
    - Several KV heads (K > 1) may lie anywhere.  AITER bounds a token's rows by K*L and K*(L+R) elements: of heads that do not
      follow one another without a gap it reads zeros, and leaves cache entries unwritten.
    - What AITER refuses: a uint8 cache, an fp8 q_out beside a cache that is not, and more KV heads than query heads.

    AITER also takes fp32; mlagen does not.  Raises ArgumentError, naming the argument, what it was and what it may be, before
    anything is launched, and what mlagen.load raises.
    """
    _run(
        (
            *(q_nope, q_pe, kv_c, k_pe, kv_cache, q_out, slot_mapping, k_scale, q_scale),
            *(positions, cos_cache, sin_cache),
        ),
        is_neox=bool(is_neox),
        is_nope_first=bool(is_nope_first),
    )


def fused_qk_rope_concat_and_cache_mla_seg(
    q_nope: torch.Tensor,
    q_pe: torch.Tensor,
    kv_c: torch.Tensor,
    k_pe: torch.Tensor,
    kv_cache: torch.Tensor,
    q_out: torch.Tensor,
    slot_mapping: torch.Tensor,
    k_scale: torch.Tensor,
    q_scale: torch.Tensor,
    positions: torch.Tensor,
    cos_cache: torch.Tensor,
    sin_cache: torch.Tensor,
    is_neox: bool,
    is_nope_first: bool = True,
) -> None:
    """The same with the segmented cache: a page holds the latent columns of all its slots, then their rotary columns.

    kv_cache [pages, page_size * (L+R)], flat; the other dimensions may be any that lie in a page without gaps.  q_out
    [T, H' >= H, >= L+R]: [L | R | what was there].  is_nope_first is True; AITER takes nothing else either.  The other arguments
    are those of fused_qk_rope_concat_and_cache_mla, and so are the launch and what the CPU runs.

    The results are AITER's bit for bit, but where AITER's are a defect:

    - Every row of q_out is written.  AITER leaves those of negative slots as they were.
    - Finite values saturate in the rotary columns too; in AITER's they overflow to NaN.  NaN stays NaN.
    - slot_mapping and positions may be int32; AITER reads any tensor as int64.
    - Positions are clamped to the table; in AITER not at all.
    - cos_cache and sin_cache may be fp32; AITER reads them as q_nope's dtype.
    - What AITER refuses: widths other than L = 512 and R = 64, pages of other than 64 slots, a q_out or a cache of q_nope's dtype,
      and a uint8 cache.  The page's size is the width of kv_cache over L+R.

    Raises as fused_qk_rope_concat_and_cache_mla does.
    """
    _run(
        (
            *(q_nope, q_pe, kv_c, k_pe, kv_cache, q_out, slot_mapping, k_scale, q_scale),
            *(positions, cos_cache, sin_cache),
        ),
        is_neox=bool(is_neox),
        is_nope_first=bool(is_nope_first),
        kv_layout="segmented",
    )


def _run(tensors: Sequence[torch.Tensor], *, is_neox: bool, is_nope_first: bool, kv_layout: str = "paged") -> None:
    """A call with the tensors in the order of _TENSORS."""
    if {*map(type, tensors)} != {torch.Tensor}:  # a subclass, or something else
        for name, value in zip(_TENSORS, tensors, strict=True):
            if not isinstance(value, torch.Tensor):
                raise ArgumentError(f"{name}: expected a tensor, got {type(value).__name__}")
    q_nope, q_pe, kv_c, k_pe, kv_cache, q_out, slot_mapping, k_scale, q_scale, positions, cos_cache, sin_cache = tensors
    kv_heads = kv_c.shape[1] if kv_c.ndim == 3 and kv_c.shape[1] > 1 else 1
    key = (
        *(q_nope.dtype, q_nope.shape[1:], k_pe.shape[-1:], kv_cache.dtype, q_out.dtype, q_nope.device),
        *(is_neox, is_nope_first, kv_heads, kv_layout),
    )
    kernel = _KERNELS.get(key)
    if kernel is None:
        options = {"nope_first": is_nope_first, "kv_heads": kv_heads, "kv_layout": kv_layout}
        kernel = _KERNELS[key] = _load(q_nope, kv_c, k_pe, kv_cache, q_out, is_neox=is_neox, options=options)
    spec = kernel.spec

    if kv_c.ndim != 2 and kv_heads == 1:
        kv_c = _one_head("kv_c", kv_c, 1, "T", spec.lora_rank)
    if k_pe.ndim != 2 and kv_heads == 1:
        k_pe = _one_head("k_pe", k_pe, 1, "T", spec.rope_dim)
    if kv_layout == "segmented":
        if kv_cache.ndim != 2:
            kv_cache = _flat("kv_cache", kv_cache)
        if q_out.ndim == 3 and q_out.shape[2] > spec.entry_dim:
            q_out = q_out[..., : spec.entry_dim]
    elif kv_cache.ndim != 3 and kv_heads == 1:
        kv_cache = _one_head("kv_cache", kv_cache, 2, "blocks, block_size", spec.entry_dim)
    if slot_mapping.ndim != 1:
        raise ArgumentError(f"slot_mapping: shape {list(slot_mapping.shape)}, expected [T]")
    tokens = min(q_nope.shape[0], slot_mapping.shape[0])
    try:
        whole = q_nope.shape[0] == q_pe.shape[0] == kv_c.shape[0] == k_pe.shape[0] == q_out.shape[0] == positions.shape[0] == tokens
    except IndexError:  # a tensor without dimensions, which the kernel refuses
        whole = False
    if not whole:
        q_nope, q_pe, kv_c, k_pe, q_out, positions = (rows(each, tokens) for each in (q_nope, q_pe, kv_c, k_pe, q_out, positions))
    try:
        kernel(
            (q_nope, q_pe if spec.rope_dim else None), kv_c, k_pe, None, kv_cache, slot_mapping, positions,
            (cos_cache if cos_cache.ndim == 2 else table(cos_cache), sin_cache if sin_cache.ndim == 2 else table(sin_cache)),
            q_scale=one_element(q_scale) if spec.q_dtype == "fp8" else None,
            k_scale=one_element(k_scale) if spec.kv_dtype == "fp8" else None,
            out=q_out,
        )  # fmt: skip
    except ArgumentError as error:
        raise by_name(error, _NAMES) from None


def _load(
    q_nope: torch.Tensor, kv_c: torch.Tensor, k_pe: torch.Tensor, kv_cache: torch.Tensor, q_out: torch.Tensor,
    *, is_neox: bool, options: Mapping[str, Any],
) -> Kernel:  # fmt: skip
    """The kernel for tensors like these."""
    if q_nope.dtype not in MODEL_DTYPES:
        raise ArgumentError(f"q_nope: dtype {dtype_name(q_nope.dtype)}, expected {' or '.join(map(dtype_name, MODEL_DTYPES))}")
    if q_nope.dim() != 3:
        raise ArgumentError(f"q_nope: shape {list(q_nope.shape)}, expected [T, H, L]")
    if not k_pe.dim():
        raise ArgumentError("k_pe: shape [], expected [T, R] or [T, 1, R]")
    dtypes = {}
    for name, output, others in (("kv_cache", kv_cache, (*FP8, torch.uint8)), ("q_out", q_out, FP8)):
        if output.dtype not in (q_nope.dtype, *others):
            expected = " or ".join(map(dtype_name, (q_nope.dtype, *others)))
            raise ArgumentError(
                f"{name}: dtype {dtype_name(output.dtype)}, expected {expected}, beside a q_nope of {dtype_name(q_nope.dtype)}"
            )
        dtypes[name] = "fp8" if output.dtype in others else MODEL_DTYPES[q_nope.dtype]
    rope_dim = k_pe.shape[-1]
    try:
        spec = PrologueSpec(
            heads=q_nope.shape[1],
            nope_dim=128,  # of no meaning without the absorb
            lora_rank=q_nope.shape[2],
            rope_dim=rope_dim,
            rope_style="none" if rope_dim == 0 else "neox" if is_neox else "gptj",
            dtype=MODEL_DTYPES[q_nope.dtype],
            weight="none",
            q_dtype=dtypes["q_out"],
            kv_dtype=dtypes["kv_cache"],
            **options,
        )
    except SpecError as error:
        if str(error).startswith("kv_layout"):
            raise ArgumentError("is_nope_first: False, expected True: a segmented page has the latent columns first") from None
        blamed = {"rope_dim": ("k_pe", k_pe), "kv_heads": ("kv_c", kv_c)}
        name, tensor = blamed.get(str(error).partition("=")[0], ("q_nope", q_nope))
        raise ArgumentError(f"{name}: shape {list(tensor.shape)}, {error}") from None
    arch = None
    if q_nope.device.type == "cpu":
        arch = "gfx942" if torch.float8_e4m3fnuz in (kv_cache.dtype, q_out.dtype) else "gfx950"
    return load(spec, q_nope.device, arch=arch)


def _one_head(name: str, tensor: torch.Tensor, axis: int, rows: str, width: int) -> torch.Tensor:
    """`tensor` without its dimension number `axis`, that of the KV heads."""
    if tensor.dim() == axis + 2 and tensor.shape[axis] == 1:
        return tensor.select(axis, 0)
    raise ArgumentError(f"{name}: shape {list(tensor.shape)}, expected [{rows}, {width}] or [{rows}, 1, {width}]: one KV head")


def _flat(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """`tensor` with all dimensions after the first in one, in the same memory."""
    try:
        return tensor.view(tensor.shape[0], -1)
    except (RuntimeError, IndexError):
        raise ArgumentError(
            f"{name}: shape {list(tensor.shape)}, strides {list(tensor.stride())}, expected [pages, page_size * (L+R)] without gaps"
        ) from None
