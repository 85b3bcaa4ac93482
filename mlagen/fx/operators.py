"""The two halves of the prologue as operators in plain torch, for models whose attention is opaque to a compiler.

    torch.ops.mlagen.mla_decode_q_prep(q, q_pe?, w_uk, q_scale?, *, q_dtype=None, fp8_max=None) -> q_out
    torch.ops.mlagen.rope_kv_cache_update(q_pe, kv_c, k_pe, kv_cache, slot_mapping, positions, cos_sin_cache, sin?, k_scale?, *,
                                          rope_style, kv_dtype=None, fp8_max=None) -> rotated q_pe

They run everywhere, each as the separate operators that it stands for, rounding where these round.  A graph that calls both, the
first with what the second returned, is what FuseProloguePass makes one kernel of.

- q is [T,H,P+R], or q_nope [T,H,P] where q_pe [T,H,R] is given; w_uk [H,P,L].  q_out is [T,H,L+R], contiguous, for all T rows of q
  whatever the batch holds: in q_dtype, an fp8 type, or in q's own where that is None.
- q_pe [T,H,R], kv_c [T,L], k_pe [T,R]; cos_sin_cache [X,R] = [cos | sin], or cos [X,R/2] with sin.  kv_cache [blocks, block_size,
  L+R] holds q_pe's dtype or fp8; as uint8 it is seen as kv_dtype.  A negative slot leaves the cache alone, a position is clamped to
  the table; of slots, those behind the T-th are not read.  The rotated q_pe is new and contiguous.
- Scales are fp32, 0-dim or [1]; value = code * scale, and codes are made with the reciprocal, clamped to fp8_max or the format's
  largest number.  None is 1.
"""

import typing

import torch

from mlagen.errors import ArgumentError

Q_PREP = (
    "mla_decode_q_prep(Tensor q, Tensor? q_pe, Tensor w_uk, Tensor? q_scale=None, *, ScalarType? q_dtype=None, "
    "float? fp8_max=None) -> Tensor"
)
CACHE_UPDATE = (
    "rope_kv_cache_update(Tensor q_pe, Tensor kv_c, Tensor k_pe, Tensor(a!) kv_cache, Tensor slot_mapping, Tensor positions, "
    "Tensor cos_sin_cache, Tensor? sin=None, Tensor? k_scale=None, *, str rope_style, ScalarType? kv_dtype=None, "
    "float? fp8_max=None) -> Tensor"
)
FP8_TYPES = (torch.float8_e4m3fn, torch.float8_e4m3fnuz)

MaybeTensor = torch.Tensor | None


def _quantize(x: torch.Tensor, dtype: torch.dtype | None, scale: MaybeTensor, fp8_max: float | None) -> torch.Tensor:
    if dtype is None or dtype is x.dtype:
        return x
    largest = torch.finfo(dtype).max if fp8_max is None else fp8_max
    value = x.float() if scale is None else x.float() * scale.reciprocal()
    return value.clamp(-largest, largest).to(dtype)


def _split_query(q: torch.Tensor, q_pe: MaybeTensor, w_uk: torch.Tensor, q_dtype: torch.dtype | None) -> tuple[torch.Tensor, ...]:
    """q_nope and q_pe.  Raises ArgumentError where a shape or a type does not fit; no number of rows is asked for its value."""
    if q.dim() != 3 or w_uk.dim() != 3:
        raise ArgumentError(f"q, w_uk: {q.dim()} and {w_uk.dim()} dimensions, expected q [T,H,P+R] and w_uk [H,P,L]")
    heads, nope, _ = w_uk.shape
    if q_dtype is not None and q_dtype is not q.dtype and q_dtype not in FP8_TYPES:
        raise ArgumentError(f"q_dtype: {q_dtype}, expected None, {q.dtype} or one of {', '.join(map(str, FP8_TYPES))}")
    wide = q if q_pe is None else q_pe
    if q.shape[1] != heads or wide.dim() != 3 or wide.shape[1] != heads:
        raise ArgumentError(f"q: {q.shape[1]} heads, expected the {heads} of w_uk, as many in q_pe")
    if q.shape[2] < nope or (q_pe is not None and q.shape[2] != nope):
        raise ArgumentError(f"q: {q.shape[2]} columns, expected the {nope} of w_uk{' and those of q_pe' if q_pe is None else ''}")
    return (q[..., :nope], q[..., nope:]) if q_pe is None else (q, q_pe)


def _mla_decode_q_prep(
    q: torch.Tensor, q_pe: MaybeTensor, w_uk: torch.Tensor, q_scale: MaybeTensor = None, *, q_dtype: torch.dtype | None = None,
    fp8_max: float | None = None,
) -> torch.Tensor:  # fmt: skip
    q_nope, rotary = _split_query(q, q_pe, w_uk, q_dtype)
    absorbed = torch.bmm(q_nope.transpose(0, 1), w_uk).transpose(0, 1)
    return _quantize(torch.cat((absorbed, rotary), -1), q_dtype, q_scale, fp8_max).contiguous()


def _fake_mla_decode_q_prep(
    q: torch.Tensor, q_pe: MaybeTensor, w_uk: torch.Tensor, q_scale: MaybeTensor = None, *, q_dtype: torch.dtype | None = None,
    fp8_max: float | None = None,
) -> torch.Tensor:  # fmt: skip
    _, rotary = _split_query(q, q_pe, w_uk, q_dtype)
    return q.new_empty((q.shape[0], w_uk.shape[0], w_uk.shape[2] + rotary.shape[2]), dtype=q_dtype or q.dtype)


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, rope_style: str) -> torch.Tensor:
    """x [T,...,R] in fp32, turned by the angles of each token."""
    first, second = (x[..., ::2], x[..., 1::2]) if rope_style == "gptj" else x.chunk(2, -1)
    first, second = first.float(), second.float()
    turned = first * cos - second * sin, second * cos + first * sin
    return torch.stack(turned, -1).flatten(-2) if rope_style == "gptj" else torch.cat(turned, -1)


def _check_update(
    q_pe: torch.Tensor, kv_c: torch.Tensor, k_pe: torch.Tensor, kv_cache: torch.Tensor, rope_style: str,
    kv_dtype: torch.dtype | None,
) -> torch.dtype:  # fmt: skip
    """The type of the cache's numbers.  Raises ArgumentError."""
    if rope_style not in ("gptj", "neox"):
        raise ArgumentError(f"rope_style: {rope_style!r}, expected 'gptj' or 'neox'")
    if q_pe.dim() != 3 or kv_c.dim() != 2 or k_pe.dim() != 2 or q_pe.shape[2] != k_pe.shape[1]:
        shapes = ", ".join(str(list(each.shape)) for each in (q_pe, kv_c, k_pe))
        raise ArgumentError(f"q_pe, kv_c, k_pe: shapes {shapes}, expected [T,H,R], [T,L], [T,R]")
    if kv_cache.dim() != 3 or kv_cache.shape[2] != kv_c.shape[1] + k_pe.shape[1]:
        width = kv_c.shape[1] + k_pe.shape[1]
        raise ArgumentError(f"kv_cache: shape {list(kv_cache.shape)}, expected [blocks, block_size, {width}]")
    dtype = kv_dtype or kv_cache.dtype
    if dtype not in (q_pe.dtype, *FP8_TYPES) or kv_cache.dtype not in (dtype, torch.uint8):
        raise ArgumentError(
            f"kv_cache: {kv_cache.dtype} with kv_dtype={kv_dtype}, expected {q_pe.dtype}, an fp8 type, or uint8 with the fp8 type "
            "of its bytes as kv_dtype"
        )
    if kv_cache.dtype is torch.uint8 and dtype not in FP8_TYPES:
        raise ArgumentError(f"kv_dtype: {kv_dtype} for a cache of uint8, expected one of {', '.join(map(str, FP8_TYPES))}")
    return dtype


def _rope_kv_cache_update(
    q_pe: torch.Tensor, kv_c: torch.Tensor, k_pe: torch.Tensor, kv_cache: torch.Tensor, slot_mapping: torch.Tensor,
    positions: torch.Tensor, cos_sin_cache: torch.Tensor, sin: MaybeTensor = None, k_scale: MaybeTensor = None, *, rope_style: str,
    kv_dtype: torch.dtype | None = None, fp8_max: float | None = None,
) -> torch.Tensor:  # fmt: skip
    dtype = _check_update(q_pe, kv_c, k_pe, kv_cache, rope_style, kv_dtype)
    if not len(q_pe):
        return torch.empty_like(q_pe, memory_format=torch.contiguous_format)
    cos_table, sin_table = cos_sin_cache.chunk(2, -1) if sin is None else (cos_sin_cache, sin)
    rows = positions.clamp(0, len(cos_table) - 1)
    cos, sine = cos_table[rows].float(), sin_table[rows].float()
    rotary = _rotate(k_pe, cos, sine, rope_style).to(k_pe.dtype)
    entry = _quantize(torch.cat((kv_c, rotary), -1), dtype, k_scale, fp8_max)
    _write(kv_cache, entry, slot_mapping[: len(kv_c)])
    return _rotate(q_pe, cos[:, None], sine[:, None], rope_style).to(q_pe.dtype).contiguous()


def _write(kv_cache: torch.Tensor, entry: torch.Tensor, slots: torch.Tensor) -> None:
    """The rows of `entry` at their slots, without a shape that depends on data, so that a graph can capture it.

    A row without a slot repeats what another row writes, byte for byte: which of the two writes comes last does not matter.
    Where no row has a slot, all of them write what slot 0 holds.
    """
    as_bits = torch.uint8 if kv_cache.dtype.itemsize == 1 else kv_cache.dtype  # not every index takes fp8
    cache, entry = kv_cache.view(as_bits), entry.view(as_bits)
    valid = slots >= 0
    first = valid.to(torch.uint8).argmax()[None]
    held = torch.where(valid[first, None], entry[first], cache[0, :1])
    slots = torch.where(valid, slots, slots[first].clamp(min=0))
    cache[slots // cache.shape[1], slots % cache.shape[1]] = torch.where(valid[:, None], entry, held)


def _fake_rope_kv_cache_update(
    q_pe: torch.Tensor, kv_c: torch.Tensor, k_pe: torch.Tensor, kv_cache: torch.Tensor, slot_mapping: torch.Tensor,
    positions: torch.Tensor, cos_sin_cache: torch.Tensor, sin: MaybeTensor = None, k_scale: MaybeTensor = None, *, rope_style: str,
    kv_dtype: torch.dtype | None = None, fp8_max: float | None = None,
) -> torch.Tensor:  # fmt: skip
    _check_update(q_pe, kv_c, k_pe, kv_cache, rope_style, kv_dtype)
    return torch.empty_like(q_pe, memory_format=torch.contiguous_format)


def _register() -> object:
    """Define the operators; they live as long as what is returned."""
    library: typing.Any = torch.library  # parts of it have no types
    fragment = library.Library("mlagen", "FRAGMENT")
    for schema, run, fake in (
        (Q_PREP, _mla_decode_q_prep, _fake_mla_decode_q_prep),
        (CACHE_UPDATE, _rope_kv_cache_update, _fake_rope_kv_cache_update),
    ):
        fragment.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
        name = schema.partition("(")[0]
        fragment.impl(name, run, "CompositeExplicitAutograd")
        library.register_fake(f"mlagen::{name}", fake, lib=fragment)
    return fragment


if not hasattr(torch.ops.mlagen, "mla_decode_q_prep"):  # a second import, or a reload, finds them there
    _LIBRARY = _register()
