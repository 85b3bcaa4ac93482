"""Custom operators of serving libraries, by name, and what they mean in the terms of the passes.

The libraries are no dependencies: an operator is known by its name in a graph, and its arguments by theirs in its schema.  `needs`
are the arguments that choose the form that is meant; with another value a call is left alone.

Sources: the schemas of vLLM 0.33 (_custom_ops.py, _aiter_ops.py), its kernels (csrc/quantization, csrc/cache_kernels.cu), and those
of SGLang (sglang.jit_kernel.per_tensor_quant_fp8, sgl-kernel) and of AITER (csrc/kernels/quant_kernels.cu).
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import fx

from mlagen.fx.index import Index, OtherForm, Unreadable, may_be_same, reshaped, within
from mlagen.fx.mutation import Call, Sizes
from mlagen.fx.nodes import Place, value_of

FNUZ_REDUCED = 224.0
"""What vLLM and SGLang clamp e4m3fnuz to; the format holds 240."""


@dataclass(frozen=True)
class Quantizer:
    """codes = fp8(clamp(value / scale)), one scale.  `divides` where that is no product with the reciprocal rounded to fp32."""

    codes: str
    value: str
    scale: str
    needs: Mapping[str, Any] = field(default_factory=dict)
    fnuz_limit: float = FNUZ_REDUCED
    divides: bool = False

    @property
    def writes(self) -> tuple[str, ...]:
        return (self.codes,)


@dataclass(frozen=True)
class Turner:
    """Rotates its arguments `turned`, [T,...,R] or [T,heads * R], in place, by rows of cos_sin_cache [X,R] = [cos | sin]."""

    turned: tuple[str, ...]
    needs: Mapping[str, Any] = field(default_factory=dict)

    @property
    def writes(self) -> tuple[str, ...]:
        return self.turned


@dataclass(frozen=True)
class CacheWriter:
    """Writes [kv_c | k_pe] to kv_cache at slot_mapping, leaving negative slots out; for "fp8" divided by `scale`."""

    scale: str
    needs: Mapping[str, Any] = field(default_factory=dict)

    @property
    def writes(self) -> tuple[str, ...]:
        return ("kv_cache",)


@dataclass(frozen=True)
class Concatenation:
    """whole = [parts[0] | parts[1]] along the last dimension."""

    whole: str
    parts: tuple[str, str]
    needs: Mapping[str, Any] = field(default_factory=dict)

    @property
    def writes(self) -> tuple[str, ...]:
        return (self.whole,)


Meaning = Quantizer | Turner | CacheWriter | Concatenation

KNOWN: dict[str, tuple[Meaning, ...]] = {
    "_C::static_scaled_fp8_quant": (Quantizer("result", "input", "scale", {"group_shape": None}),),
    "sglang::per_tensor_quant_fp8": (Quantizer("output_q", "input", "output_s", {"is_static": True}),),
    "sgl_kernel::sgl_per_tensor_quant_fp8": (Quantizer("output_q", "input", "output_s", {"is_static": True}),),
    # AITER takes the hardware's approximate reciprocal.
    "aiter::static_per_tensor_quant": (Quantizer("out", "input", "scale", fnuz_limit=240.0, divides=True),),
    "vllm::rocm_aiter_per_tensor_quant": (
        Quantizer("out", "x", "scale", {"is_dynamic": False}, fnuz_limit=240.0, divides=True),
    ),
    "_C::rotary_embedding": (Turner(("query", "key"), {"rope_dim_offset": 0, "inverse": False}),),
    "vllm::rocm_aiter_triton_rotary_embedding": (Turner(("query", "key"), {"offsets": None}),),
    "_C_cache_ops::concat_and_cache_mla": (CacheWriter("scale", {"skip_scale": False}),),
    "_C_cache_ops::concat_and_cache_mla_rope_fused": (Turner(("q_pe", "k_pe")), CacheWriter("kv_cache_scale")),
    "_C_cache_ops::concat_mla_q": (Concatenation("q_out", ("ql_nope", "q_pe")),),
}  # fmt: skip

Kind = TypeVar("Kind", Quantizer, Turner, CacheWriter, Concatenation)


def meaning(call: Call, kind: type[Kind]) -> Kind | None:
    """What a call means, of a kind; None where it has no such meaning.  Raises OtherForm."""
    found = next((each for each in KNOWN.get(call.name, ()) if isinstance(each, kind)), None)
    if found is None:
        return None
    for name, expected in found.needs.items():
        given = call.given(name)
        if given != expected:
            raise OtherForm(f"{call.name} with {name}={given!r}, expected {expected!r}")
    return found


def writes_cache(call: Call) -> bool:
    """Whether an operator writes entries of a cache, in whatever form."""
    return any(isinstance(each, CacheWriter) for each in KNOWN.get(call.name, ()))


def copied(call: Call, name: str, index: Sequence[Index], sizes: Sizes) -> Place | None:
    """Where an element that a call wrote came from, if it was only moved; None where it was computed.  Raises Unreadable."""
    concatenation = meaning(call, Concatenation)
    if concatenation is not None:
        first = call.view(concatenation.parts[0])
        width = first.shape[-1] if first else None
        if not isinstance(width, int):
            raise Unreadable(f"{call.node.name} joins along a symbol")
        if within(index[-1], 0, width, sizes):
            return call.element(concatenation.parts[0], index, sizes)
        return call.element(concatenation.parts[1], (*index[:-1], index[-1] + -width), sizes)
    return call.element(name, index, sizes) if name in untouched(call) else None


def untouched(call: Call) -> tuple[str, ...]:
    """The arguments that a known operator is declared to write to, but in this form does not."""
    kinds = KNOWN.get(call.name, ())
    if any(call.given(name) != expected for kind in kinds for name, expected in kind.needs.items()):
        return ()
    return tuple(name for name in call.written if kinds and not any(name in kind.writes for kind in kinds))


def keeps_within(call: Call, node: fx.Node, results: Collection[fx.Node]) -> bool:
    """Whether a known call hands what it makes of `node` on to none but `results`."""
    kinds = KNOWN.get(call.name, ())
    if not kinds or not any(user in results for user in call.node.users):
        return False
    plain = [value for name, value in call.node.kwargs.items() if not name.startswith("_") and name not in call.written]
    for user in call.node.users:
        if user in results:
            continue
        number = user.args[1]
        names = [name for name in call.written if call.result(name) == number]
        apart = any(isinstance(kind, Turner) for kind in kinds) and node not in plain  # a rotation turns each argument for itself
        sources = {call.before(call.result(name)) for name in ("k_pe",) if "kv_cache" in names and name in call.written}
        if not (set(names) <= set(untouched(call)) or (apart and node not in {call.before(number), *sources})):  # type: ignore[arg-type]
            return False
    return True


@dataclass(frozen=True)
class Codes:
    """An fp8 code that an operator made: the number before, and how."""

    value: Place
    scale: fx.Node
    limit: float
    divides: bool


def codes(call: Call, name: str, index: Sequence[Index], dtype: torch.dtype, sizes: Sizes) -> Codes | None:
    """The quantisation that wrote an element; None where that is none.  Raises Unreadable."""
    found = meaning(call, Quantizer)
    if found is None or name != found.codes:
        return None
    written, value, scale = (call.view(each) for each in (found.codes, found.value, found.scale))
    if written is None or value is None or scale is None:
        raise Unreadable(f"{call.node.name}: {call.name} without a tensor that it needs")
    if len(written.shape) != len(value.shape) or not all(map(may_be_same, written.shape, value.shape)):
        raise Unreadable(f"{call.node.name}: codes {list(written.shape)} of numbers {list(value.shape)}")
    limit = torch.finfo(dtype).max if dtype is torch.float8_e4m3fn else found.fnuz_limit
    return Codes(call.element(found.value, index, sizes), scale.base, limit, found.divides)


@dataclass(frozen=True)
class Row:
    """A number that an operator looks up itself: a column of the row of `table` [X,R] that `positions` [T] names for a token."""

    table: fx.Node
    positions: fx.Node
    token: Index
    column: int


@dataclass(frozen=True)
class Turned:
    """An element that an operator rotated, the sum of two products: each a sign, what is turned and its cosine or sine."""

    products: tuple[tuple[int, Place, Row], ...]


def turned(call: Call, name: str, index: Sequence[Index], sizes: Sizes) -> Turned | None:
    """The rotation that wrote an element; None where that is none.  Raises Unreadable."""
    found = meaning(call, Turner)
    if found is None or name not in found.turned:
        return None
    view, table, positions = call.view(name), call.given("cos_sin_cache"), call.given("positions")
    assert view is not None, "the element was read from it"
    width, rows = value_of(table).shape[-1], value_of(positions)
    if not isinstance(width, int) or width % 2 or value_of(table).dim() != 2 or call.given("head_size") not in (None, width):
        raise Unreadable(f"{call.node.name}: {call.name} turns some columns of a head, or by a table that is not [X, R]")
    if rows.dim() != 1 or not may_be_same(rows.shape[0], view.shape[0]):
        raise Unreadable(f"{call.node.name}: positions {list(rows.shape)} for {view.shape[0]} rows")
    parts = _parts(call, view.shape, width)
    token, *head, column = reshaped(index, view.shape, parts, sizes)
    if column.terms:
        raise Unreadable(f"{call.node.name}: {call.name} read at all columns at once")
    half, j, neox = width // 2, column.const, bool(call.given("is_neox"))
    number, second = (j % half, j >= half) if neox else (j // 2, bool(j % 2))
    other = (j + half) % width if neox else j ^ 1

    def product(sign: int, of: int, entry: int) -> tuple[int, Place, Row]:
        place = reshaped((token, *head, Index(of)), parts, view.shape, sizes)
        return sign, call.element(name, place, sizes), Row(table, positions, token, entry)

    return Turned((product(1, j, number), product(1 if second else -1, other, half + number)))


def _parts(call: Call, shape: Sequence[Any], width: int) -> list[Any]:
    """The extents with a dimension of `width` columns at the end."""
    if shape[-1] == width:
        return list(shape)
    if len(shape) != 2 or not isinstance(shape[-1], int) or shape[-1] % width:
        raise Unreadable(f"{call.node.name}: {call.name} of {list(shape)}, expected heads of {width} columns")
    return [shape[0], shape[-1] // width, width]
