"""AITER's Triton operator that absorbs too, with W_K in fp8; see its aiter/ops/triton/fusions/fused_bmm_rope_kv_cache.py."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch.nn.functional import pad

from mlagen.errors import ArgumentError, SpecError
from mlagen.integrations.aiter.remembered import Made, Remembered
from mlagen.integrations.aiter.tensors import FP8, MODEL_DTYPES, by_name, dtype_name, one_element, table
from mlagen.ir import ACTIVATION_GROUP
from mlagen.runtime import Kernel, load
from mlagen.spec import PrologueSpec

_NARROWEST = 16
"""The least lora_rank of a kernel, for those whose latent columns nobody reads."""

_TENSORS = (
    *("q_nope", "w_k", "w_k_scale", "q_pe", "k_nope", "k_rope"),
    *("kv_cache", "slot_mapping", "positions", "cos", "sin"),
)

_NAMES = {
    "q": "q_nope",
    "q[0] (q_nope)": "q_nope",
    "q[1] (q_pe)": "q_pe",
    "kv_c": "k_nope",
    "k_pe": "k_rope",
    "cos_sin_cache[0] (cos)": "cos",
    "cos_sin_cache[1] (sin)": "sin",
    "w_uk": "w_k",
    "scale": "w_k_scale",
}
"""AITER's names of arguments to which a kernel gives other ones in its errors."""

_BLAMED = {"nope_dim": "q_nope", "heads": "q_nope", "lora_rank": "w_k", "kv_heads": "k_nope"}
"""The argument that a field of the spec comes from, where it is not q_pe."""

_KERNELS: dict[tuple[object, ...], Kernel] = {}
"""The kernels that ran, by what of a call chooses them."""

_PACKED, _TABLES = Remembered(), Remembered()


def fused_fp8_bmm_rope_cat_and_cache_mla(
    q_nope: torch.Tensor,
    w_k: torch.Tensor,
    w_k_scale: torch.Tensor,
    q_pe: torch.Tensor,
    k_nope: torch.Tensor,
    k_rope: torch.Tensor,
    kv_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    positions: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    group_size: int = 128,
    transpose_bm: bool = True,
    config: Mapping[str, Any] | None = None,
    k_scale: torch.Tensor | float | None = None,
    is_neox: bool = False,
    q_out_dtype: torch.dtype | None = torch.bfloat16,
    num_decode_toks_for_zeros: int = 0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Multiply q_nope by W_K, rotate q_pe and k_rope, make the query rows, and write the key rows to kv_cache at slot_mapping.

    q_nope [H,B,P]; w_k [H,L,P] in the arch's fp8, w_k_scale its one scale; q_pe [B,H,R]; k_nope [Bk,KH,L]; k_rope [Bk,KH,R],
    Bk >= B: bf16 or fp16, unit last stride, other strides free.  kv_cache [slots,KH,L+R]: that dtype or the arch's fp8, also uint8,
    which is read as that.  slot_mapping [S <= Bk]; positions [>= B].  cos, sin: [max_position, R/2], or [max_position, R] with each
    value wherever RoPE uses it; also with two dimensions of 1 in the middle; the model's dtype or fp32.  k_scale: one fp32 value,
    value = code * scale; None is 1.  q_out_dtype: q_nope's or the arch's fp8, which has no scale; None is bf16.  group_size: 128,
    or any that is not below P where P <= 128.  transpose_bm and config change nothing: the first is not used in AITER either, the
    second is of its launch.

    Returns four tensors: q_out [B,H,L+R]; q_pe rotated, [n,H,R]; k_rope rotated, [Bk,KH,R]; zeros [n,H,L].  The second and the
    last are of q_nope's dtype and for the first n = num_decode_toks_for_zeros rows.  Rows of k_nope from B on are a prefill's: as
    in AITER they are written to the cache with k_rope as it is, which is also what the third result has there.

    q_out and the cache are one launch.  The third result is a second one, which rotates k_rope alone; the second result a copy, or
    a launch where q_out is fp8; the cache entries of a prefill are a launch; and a k_scale beside a cache that is not fp8 meets
    k_nope and k_rope in torch's operators, before RoPE.  Nothing waits for the device.

    That is so after the first call with a w_k, which packs it, waits for the device, and must not happen in a graph capture; nor
    must the first call of a kind, which loads kernels.  What is packed, w_k and w_k_scale in as much memory as w_k, is kept for as
    long as the memory of both lives.  Where they were changed in place the next call packs again, into the same memory.  torch does
    not tell of changes made through `.data`, nor of those of tensors made in inference mode.  Tables [max_position, R] are looked
    at and kept likewise.  `mlagen build` makes no kernel for the third result: MLAGEN_JIT=0 needs it in the disk cache.

    On the CPU it runs the program of gfx942 where w_k is e4m3fnuz, else that of gfx950.

    q_nope goes through fp8 in groups of 128 columns, as in AITER's kernel, whose ql_nope differs by the order of its sums.  RoPE is
    computed in fp32 and rounded once; AITER rounds its steps to the 16-bit dtype, and then to the output's.  Where AITER's results
    are a defect, ours differ:

    - Positions are clamped to the table; in AITER not at all.
    - S may be less than B: rows without a slot have a query, and no cache entry.  AITER reads slots from behind the tensor.
    - Finite values saturate at the fp8 limit, NaN stays NaN; in AITER that is up to Triton's conversion.
    - Every element of the results is defined: k_rope is rotated in rows without a slot, too, and rows from B on of the second
      result are zero.  AITER leaves these unwritten.
    - Addresses have 64 bits; the strides in AITER's RoPE have 32.
    - sin has strides of its own; AITER reads it with those of cos.
    - A uint8 cache gets fp8 codes; AITER would make integers of the values.
    - What AITER refuses: L and R that are no powers of two, and any KH beside any H.

    Refused, where AITER computes something: a w_k_scale of several values, of which AITER takes the first; a q_out_dtype or a cache
    of 16 bits that is not q_nope's dtype; fp32 activations; other values of group_size; tables [max_position, R] whose halves, or
    columns of a pair, differ.

    Raises ArgumentError, naming the argument, what it was and what it may be, before anything is launched, and what mlagen.load
    raises.
    """
    tensors = (q_nope, w_k, w_k_scale, q_pe, k_nope, k_rope, kv_cache, slot_mapping, positions, cos, sin)
    for name, value in zip(_TENSORS, tensors, strict=True):
        if not isinstance(value, torch.Tensor):
            raise ArgumentError(f"{name}: expected a tensor, got {type(value).__name__}")
    sizes = _sizes(q_nope, w_k, q_pe, k_nope, k_rope, kv_cache, slot_mapping, positions)
    heads, tokens, rows, slots = sizes.heads, sizes.tokens, sizes.rows, sizes.slots
    if group_size != ACTIVATION_GROUP and not group_size >= sizes.nope_dim <= ACTIVATION_GROUP:
        wanted = f"{ACTIVATION_GROUP}, or {sizes.nope_dim} or more" if sizes.nope_dim <= ACTIVATION_GROUP else ACTIVATION_GROUP
        raise ArgumentError(f"group_size: {group_size}, expected {wanted}: a scale is for {ACTIVATION_GROUP} columns of q_nope")
    if num_decode_toks_for_zeros < 0:
        raise ArgumentError(f"num_decode_toks_for_zeros: {num_decode_toks_for_zeros}, expected 0 or more")

    model = _model_dtype(q_nope)
    style = "neox" if is_neox else "gptj"
    if w_k.dtype not in FP8:
        raise ArgumentError(f"w_k: dtype {dtype_name(w_k.dtype)}, expected {' or '.join(map(dtype_name, FP8))}")
    arch = None
    if q_nope.device.type == "cpu":
        arch = "gfx942" if w_k.dtype is torch.float8_e4m3fnuz else "gfx950"
    zeros, out_dtype = num_decode_toks_for_zeros, torch.bfloat16 if q_out_dtype is None else q_out_dtype

    def kernel(rope_style: str, heads: int, lora_rank: int, **options: Any) -> Kernel:
        widths = {"heads": heads, "nope_dim": sizes.nope_dim, "lora_rank": lora_rank, "rope_dim": sizes.rope_dim}
        return _kernel(q_nope.device, arch, **widths, rope_style=rope_style, dtype=model, **options)

    # All that this call needs is loaded before anything is launched.
    q_dtype = _output_dtype("q_out_dtype", out_dtype, q_nope.dtype, (w_k.dtype,))
    kv_dtype = _output_dtype("kv_cache", kv_cache.dtype, q_nope.dtype, (w_k.dtype, torch.uint8))
    query_is, cache_is = {"weight": "fp8", "compute": "a8", "q_dtype": q_dtype}, {"kv_heads": sizes.kv_heads, "kv_dtype": kv_dtype}
    rotary_is = {"weight": "none", "q_dtype": model, "q_split": True, "write_kv": False}
    queries = kernel(style, heads, sizes.lora_rank, **query_is, **cache_is)
    prefill = kernel("none", 1, sizes.lora_rank, **cache_is, write_q=False) if slots > tokens else None
    key_rotation = kernel(style, sizes.kv_heads, _NARROWEST, **rotary_is)
    query_rotation = kernel(style, heads, _NARROWEST, **rotary_is) if zeros and out_dtype is not q_nope.dtype else None

    (packed,) = _PACKED.find("w_k", queries, (w_k, w_k_scale), lambda: _pack(queries, w_k, w_k_scale))
    tables = _half_tables(table(cos), table(sin), sizes.rope_dim, is_neox=is_neox)
    positions = positions[:tokens]
    cached_nope, cached_rope, scale = k_nope, k_rope, _key_scale(k_scale, q_nope.device)
    if scale is not None and queries.spec.kv_dtype != "fp8":
        cached_nope, cached_rope = ((each.float() * scale.reciprocal()).to(each.dtype) for each in (k_nope, k_rope))
        scale = None
    cache = kv_cache.unsqueeze(1) if sizes.kv_heads > 1 else kv_cache

    q_out = _call(
        queries, (q_nope.transpose(0, 1), q_pe), _keys(cached_nope, 0, tokens), _keys(cached_rope, 0, tokens), packed, cache,
        slot_mapping if slots >= tokens else pad(slot_mapping, (0, tokens - slots), value=-1), positions, tables, k_scale=scale,
    )  # fmt: skip
    if prefill is not None:
        latent, rotary = (_keys(each, tokens, slots) for each in (cached_nope, cached_rope))
        _call(prefill, None, latent, rotary, None, cache, slot_mapping[tokens:], k_scale=scale)

    def rotate(rotation: Kernel, x: torch.Tensor, beside: torch.Tensor, out: torch.Tensor) -> None:
        """x [T,h,R], at the positions of the first rows; `beside` is anything [T,h,>= 16] of the same dtype."""
        beside = beside[: len(x), :, :_NARROWEST]
        _call(rotation, (beside, x), None, None, None, None, None, positions[: len(x)], tables, out=(torch.empty_like(beside), out))

    k_pe_out = torch.empty_like(k_rope, memory_format=torch.contiguous_format)
    rotate(key_rotation, k_rope[:tokens], k_nope, k_pe_out[:tokens])
    if rows > tokens:
        k_pe_out[tokens:] = k_rope[tokens:]
    decode_q_pe_out = q_pe.new_empty((zeros, heads, sizes.rope_dim))
    if zeros > tokens:
        decode_q_pe_out[tokens:] = 0
    if query_rotation is not None:
        rotate(query_rotation, q_pe[:zeros], q_nope.transpose(0, 1), decode_q_pe_out[:tokens])
    elif zeros:
        decode_q_pe_out[:tokens] = q_out[:zeros, :, sizes.lora_rank :]
    return q_out, decode_q_pe_out, k_pe_out, q_nope.new_zeros((zeros, heads, sizes.lora_rank))


class _Sizes(NamedTuple):
    """Extents of a call's tensors by the names of a spec's fields, B, Bk and S."""

    heads: int
    tokens: int
    nope_dim: int
    lora_rank: int
    rope_dim: int
    rows: int
    kv_heads: int
    slots: int


def _sizes(
    q_nope: torch.Tensor, w_k: torch.Tensor, q_pe: torch.Tensor, k_nope: torch.Tensor, k_rope: torch.Tensor,
    kv_cache: torch.Tensor, slot_mapping: torch.Tensor, positions: torch.Tensor,
) -> _Sizes:  # fmt: skip
    """The sizes of a call whose shapes fit each other."""
    heads, tokens, nope_dim = _extents("q_nope", q_nope, "[H, B, P]", None, None, None)
    _, lora_rank, _ = _extents("w_k", w_k, "[H, L, P]", heads, None, nope_dim)
    _, _, rope_dim = _extents("q_pe", q_pe, "[B, H, R]", tokens, heads, None)
    rows, kv_heads, _ = _extents("k_nope", k_nope, "[Bk, KH, L]", None, None, lora_rank)
    _extents("k_rope", k_rope, "[Bk, KH, R]", rows, kv_heads, rope_dim)
    _extents("kv_cache", kv_cache, "[slots, KH, L+R]", None, kv_heads, lora_rank + rope_dim)
    (slots,) = _extents("slot_mapping", slot_mapping, "[S]", None)
    (positioned,) = _extents("positions", positions, "[B or more]", None)
    if rows < max(tokens, slots):
        raise ArgumentError(f"k_nope: {rows} rows, expected {max(tokens, slots)} or more: B = {tokens}, S = {slots}")
    if positioned < tokens:
        raise ArgumentError(f"positions: shape {list(positions.shape)}, expected [>= {tokens}]")
    return _Sizes(heads, tokens, nope_dim, lora_rank, rope_dim, rows, kv_heads, slots)


def _extents(name: str, tensor: torch.Tensor, layout: str, *wanted: int | None) -> torch.Size:
    """The shape of a tensor, checked; None may be any."""
    shape = tensor.shape
    if len(shape) != len(wanted) or any(each is not None and each != found for each, found in zip(wanted, shape, strict=True)):
        expected = ", ".join("any" if each is None else str(each) for each in wanted)
        raise ArgumentError(f"{name}: shape {list(shape)}, expected {layout} = [{expected}]")
    return shape


def _model_dtype(q_nope: torch.Tensor) -> str:
    if q_nope.dtype not in MODEL_DTYPES:
        raise ArgumentError(f"q_nope: dtype {dtype_name(q_nope.dtype)}, expected {' or '.join(map(dtype_name, MODEL_DTYPES))}")
    return MODEL_DTYPES[q_nope.dtype]


def _output_dtype(name: str, dtype: torch.dtype, model: torch.dtype, fp8: Sequence[torch.dtype]) -> str:
    """A spec's word for an output's dtype, beside activations of dtype `model`."""
    if dtype not in (model, *fp8):
        expected = " or ".join(map(dtype_name, (model, *fp8)))
        raise ArgumentError(f"{name}: {dtype_name(dtype)}, expected {expected}, beside a q_nope of {dtype_name(model)}")
    return MODEL_DTYPES[model] if dtype is model else "fp8"


def _kernel(device: torch.device, arch: str | None, **options: Any) -> Kernel:
    """The kernel of a spec, loaded at the first call of a kind."""
    key = (device, arch, *options.items())
    kernel = _KERNELS.get(key)
    if kernel is None:
        try:
            spec = PrologueSpec(**options)
        except SpecError as error:
            raise ArgumentError(f"{_BLAMED.get(str(error).partition('=')[0], 'q_pe')}: {error}") from None
        kernel = _KERNELS[key] = load(spec, device, arch=arch)
    return kernel


def _call(kernel: Kernel, *arguments: Any, **options: Any) -> Any:
    """A kernel's call; its errors get AITER's names."""
    try:
        return kernel(*arguments, **options)
    except ArgumentError as error:
        raise by_name(error, _NAMES) from None


def _pack(kernel: Kernel, w_k: torch.Tensor, w_k_scale: torch.Tensor) -> Made:
    scale = one_element(w_k_scale)
    if scale.numel() != 1 or not scale.is_floating_point():
        found = f"shape {list(scale.shape)}, dtype {dtype_name(scale.dtype)}"
        raise ArgumentError(f"w_k_scale: {found}, expected one value, float32: AITER would take the first for all heads")
    try:
        return (kernel.pack_weights(w_k.mT, scale.float()),)
    except ArgumentError as error:
        raise by_name(error, _NAMES) from None


def _half_tables(cos: torch.Tensor, sin: torch.Tensor, rope_dim: int, *, is_neox: bool) -> Made:
    """cos and sin [max_position, R/2]; of tables [max_position, R] the columns that RoPE's style has twice, once."""
    if cos.dim() != 2 or sin.dim() != 2 or cos.shape[1] != rope_dim or cos.shape != sin.shape:
        return cos, sin

    def halve() -> Made:
        made = []
        for name, each in (("cos", cos), ("sin", sin)):
            first, second = each.chunk(2, -1) if is_neox else (each[:, 0::2], each[:, 1::2])
            if not torch.equal(first, second):
                parts = "halves" if is_neox else "columns of a pair"
                raise ArgumentError(
                    f"{name}: its {parts} differ, expected equal ones: RoPE takes {list(first.shape)} with is_neox={is_neox}"
                )
            made.append(first.clone(memory_format=torch.contiguous_format))
        return tuple(made)

    return _TABLES.find("cos, sin", is_neox, (cos, sin), halve)


def _key_scale(scale: torch.Tensor | float | None, device: torch.device) -> torch.Tensor | None:
    """A scale on the device; AITER's may be a number, which a captured graph keeps."""
    if scale is None:
        return None
    if not isinstance(scale, torch.Tensor):
        return torch.full((), scale, dtype=torch.float32, device=device)
    if scale.numel() != 1 or scale.dtype is not torch.float32:
        found = f"shape {list(scale.shape)}, dtype {dtype_name(scale.dtype)}"
        raise ArgumentError(f"k_scale: {found}, expected one value, float32, or a number, or None")
    return one_element(scale)


def _keys(tensor: torch.Tensor, first: int, last: int) -> torch.Tensor:
    """Rows of k_nope or k_rope, as a kernel takes them: without the dimension of a single head."""
    return tensor[first:last, 0] if tensor.shape[1] == 1 else tensor[first:last]
