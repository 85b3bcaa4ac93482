"""The arguments of a launch: every one is checked, and only then turned into the kernel's argument values.

All checks read shapes, types, strides and devices; none reads device memory, so none waits for the device.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from mlagen.cache_layout import slots_of_block
from mlagen.dtypes import model_dtype
from mlagen.errors import ArgumentError
from mlagen.ir import MX_GROUP, SCALE_BLOCK
from mlagen.spec import WEIGHT_CODES, PrologueSpec
from mlagen.target import Target
from mlagen.torch_types import torch_dtype


@dataclass(frozen=True)
class Binding:
    """What the arguments of a launch fix apart from where they lie.

    `values` are the arguments that are numbers; `pointers` say, for each argument that is an address, in which of the call's
    tensors it lies and how many bytes from its start; `wide` are those that the kernel reads or writes 16 bytes at a time, and
    `aligned` says that all of their strides are multiples of 16 bytes, and so is where the second part of a written row starts.
    """

    tokens: int
    values: dict[str, int]
    pointers: dict[str, tuple[int, int]]
    wide: tuple[str, ...]
    aligned: bool


TENSORS = (
    *("q", "q_pe", "kv_c", "k_pe", "packed", "kv_cache", "slot_mapping", "positions"),
    *("cos_sin_cache", "sin", "q_scale", "k_scale", "out", "out_second"),
)
"""The tensors of a call in order; a pair takes the place of its joined tensor and the one after it."""


class Checker:
    """Checks against one spec and target; every method raises ArgumentError."""

    def __init__(self, spec: PrologueSpec, target: Target, device: torch.device) -> None:
        self.spec, self.target, self.device = spec, target, device
        self.model = torch_dtype(model_dtype(spec.dtype))
        self.fp8 = torch_dtype(target.fp8)
        types = spec.program(target).verify()
        self.results = {name: types[name] for name in spec.q_results}  # what a call returns

    def tensor(
        self,
        name: str,
        value: object,
        shape: Sequence[int | str | None],
        dtypes: Sequence[torch.dtype],
        *,
        rows_free: bool = True,
        last_free: bool = False,
    ) -> torch.Tensor:
        """A tensor of the given shape (None: any extent, a string: at least that many), type and device.

        Its last stride is 1 unless `last_free`; its other strides are free if `rows_free`.
        """
        if not isinstance(value, torch.Tensor):
            raise ArgumentError(f"{name}: expected a tensor {_shape(shape)}, got {type(value).__name__}")
        fits = value.dim() == len(shape) and all(
            wanted is None or (extent >= int(wanted[2:]) if isinstance(wanted, str) else extent == wanted)
            for extent, wanted in zip(value.shape, shape, strict=True)
        )
        if not fits:
            raise ArgumentError(f"{name}: shape {list(value.shape)}, expected {_shape(shape)}")
        if value.dtype not in dtypes:
            raise ArgumentError(f"{name}: dtype {_name(value.dtype)}, {self._expected(value.dtype, dtypes)}")
        if value.device != self.device:
            raise ArgumentError(f"{name}: on device {value.device}, this kernel runs on {self.device}")
        if not last_free and value.dim() and value.shape[-1] > 1 and value.stride(-1) != 1:
            raise ArgumentError(f"{name}: last stride {value.stride(-1)}, expected 1: call .contiguous() on it")
        if not rows_free and not value.is_contiguous():
            raise ArgumentError(f"{name}: strides {list(value.stride())}, expected contiguous: call .contiguous() on it")
        return value

    def _expected(self, dtype: torch.dtype, dtypes: Sequence[torch.dtype]) -> str:
        text = f"expected {' or '.join(_name(each) for each in dtypes)}"
        if dtype in (torch.float8_e4m3fn, torch.float8_e4m3fnuz) and self.fp8 in dtypes:
            text += f": the other fp8 flavour; {self.target.arch} computes in {self.target.fp8}, the same bytes mean other values"
        return text

    def pair(self, name: str, parts: str, value: object) -> tuple[object, object]:
        """The two members of a pair."""
        if not isinstance(value, tuple | list) or len(value) != 2:
            size = f"{len(value)} tensors" if isinstance(value, tuple | list) else type(value).__name__
            raise ArgumentError(f"{name}: {size}, expected one tensor or a pair {parts}")
        return value[0], value[1]

    def weights(self, w_uk: object) -> torch.Tensor:
        """W_UK of any strides: [H,P,L] in the model's dtype or in the spec's fp8, or [H,P/2,L] in pairs of e2m1 codes."""
        spec = self.spec
        shape, layout = (spec.heads, spec.nope_dim, spec.lora_rank), "[H, P, L]"
        dtypes = [self.model]
        if spec.weight in ("fp8", "fp8-block"):
            dtypes.append(self.fp8)
        elif spec.weight == "mxfp4" and isinstance(w_uk, torch.Tensor) and w_uk.dtype is not self.model:
            shape, layout = (spec.heads, spec.nope_dim // 2, spec.lora_rank), "[H, P/2, L]"
            dtypes += [torch.uint8, *_named("float4_e2m1fn_x2")]
        if isinstance(w_uk, torch.Tensor) and tuple(w_uk.shape) == shape:
            return self.tensor("w_uk", w_uk, shape, dtypes, last_free=True)
        found = list(w_uk.shape) if isinstance(w_uk, torch.Tensor) else type(w_uk).__name__
        raise ArgumentError(f"w_uk: {found}, expected a tensor {list(shape)} as {layout}; transpose it with .mT if need be")

    def weight_scale(self, w_uk: torch.Tensor, scale: object) -> torch.Tensor | None:
        """The scales of w_uk, which weights() gave, in the shape of quantization.WeightCodes; None for one in the model's dtype."""
        spec = self.spec
        if w_uk.dtype is self.model:
            if scale is not None:
                raise ArgumentError(f"scale: w_uk is {_name(w_uk.dtype)} and has none: pass None, or the codes that it belongs to")
            return None
        if not isinstance(scale, torch.Tensor):
            raise ArgumentError(f"scale: got {type(scale).__name__}, expected a tensor, the scales of the codes in w_uk")
        if spec.weight == "mxfp4":
            shape = (spec.heads, spec.nope_dim // MX_GROUP, spec.lora_rank)
            dtypes = (torch.uint8, *_named("float8_e8m0fnu"))
            return self.tensor("scale", scale, shape, dtypes, last_free=True).contiguous().view(torch.uint8)
        heads, floats = spec.heads, (torch.float32,)
        if spec.weight == "fp8":
            one, by_head = ((), (1,), (1, 1, 1)), ((heads,), (heads, 1), (heads, 1, 1))
            if tuple(scale.shape) not in (*one, *by_head):
                raise ArgumentError(f"scale: shape {list(scale.shape)}, expected [] or [1] for all heads, or [{heads}]")
            return self.tensor("scale", scale, scale.shape, floats).reshape(-1).expand(heads)
        columns, step = -(-spec.lora_rank // SCALE_BLOCK), math.gcd(spec.nope_dim, SCALE_BLOCK)
        rows, whole = spec.nope_dim // step, -(-spec.nope_dim // SCALE_BLOCK)
        if tuple(scale.shape) == (heads, whole, columns):
            found = self.tensor("scale", scale, scale.shape, floats, last_free=True)
            return found.repeat_interleave(SCALE_BLOCK // step, dim=1)[:, :rows] if rows != whole else found
        return self.tensor("scale", scale, (heads, rows, columns), floats, last_free=True)

    @property
    def packed_dtype(self) -> torch.dtype:
        """Of what pack_weights gives."""
        return torch.uint8 if self.spec.weight in WEIGHT_CODES else self.model

    def packed(self, value: object, shape: Sequence[int]) -> torch.Tensor:
        """What pack_weights gives; `shape` is that of one head."""
        return self.tensor("packed", value, (self.spec.heads, *shape), (self.packed_dtype,), rows_free=False)

    def no_weights(self, packed: object) -> None:
        """Nothing, where there is no absorb."""
        if packed is not None:
            raise ArgumentError("packed: this kernel does no absorb (weight='none'), pass None")

    def no_output(self, out: object) -> None:
        """Nothing, where no query is written."""
        if out is not None:
            raise ArgumentError("out: this kernel writes no query (write_q=False), pass None")

    def query(self, q: object) -> tuple[torch.Tensor, torch.Tensor | None]:
        """q_nope [T,H,P] and q_pe [T,H,R] from one tensor or from a pair."""
        spec = self.spec
        if isinstance(q, tuple):
            q_nope = self.tensor("q[0] (q_nope)", q[0], (None, spec.heads, spec.q_nope_dim), (self.model,))
            if spec.rope_dim == 0 and q[1] is None:
                return q_nope, None
            return q_nope, self.tensor("q[1] (q_pe)", q[1], (q_nope.shape[0], spec.heads, spec.rope_dim), (self.model,))
        whole = self.tensor("q", q, (None, spec.heads, spec.q_nope_dim + spec.rope_dim), (self.model,))
        return whole[..., : spec.q_nope_dim], whole[..., spec.q_nope_dim :]

    def rotary(self, cos_sin_cache: object) -> tuple[torch.Tensor, ...]:
        """The joined table [max_position, R] alone, or the pair cos, sin [max_position, R/2]."""
        half = self.spec.rope_dim // 2
        dtypes = (self.model, torch.float32)
        if isinstance(cos_sin_cache, tuple):
            cos = self.tensor("cos_sin_cache[0] (cos)", cos_sin_cache[0], (">=1", half), dtypes)
            return cos, self.tensor("cos_sin_cache[1] (sin)", cos_sin_cache[1], (cos.shape[0], half), (cos.dtype,))
        return (self.tensor("cos_sin_cache", cos_sin_cache, (">=1", 2 * half), dtypes),)

    def scale(self, name: str, value: object) -> torch.Tensor:
        """A 0-dim or one-element fp32 tensor on the device."""
        if not isinstance(value, torch.Tensor):
            raise ArgumentError(
                f"{name}: expected an fp32 tensor on {self.device} or None, got {type(value).__name__}: "
                "the kernel reads the scale from device memory, so that a captured graph sees it change"
            )
        if value.dim() > 1 or value.numel() != 1:
            raise ArgumentError(f"{name}: shape {list(value.shape)}, expected [] or [1]")
        return self.tensor(name, value, value.shape, (torch.float32,))

    def indices(self, name: str, value: object, extent: int | str) -> torch.Tensor:
        """An int64 or int32 vector."""
        return self.tensor(name, value, (extent,), (torch.int64, torch.int32), rows_free=False)

    def no_scale(self, q_scale: object) -> None:
        """Nothing, where the scales of the query are computed."""
        if q_scale is not None:
            raise ArgumentError("q_scale: this kernel computes and returns the query's scales (q_scaling='token'), pass None")

    def output_pair(self, out: object) -> tuple[object, object]:
        """The members of `out`, where a call returns two tensors."""
        if not isinstance(out, tuple | list) or len(out) != 2:
            size = f"{len(out)} tensors" if isinstance(out, tuple | list) else type(out).__name__
            raise ArgumentError(f"out: {size}, expected a pair ({', '.join(self.results)}) or None")
        return out[0], out[1]

    def output(self, result: str, out: object, tokens: int) -> torch.Tensor:
        """One of the tensors [T, H' >= H, ...] that a call returns."""
        type_ = self.results[result]
        name = "out" if len(self.results) == 1 else f"out[{[*self.results].index(result)}] ({result})"
        found = self.tensor(name, out, (tokens, f">={self.spec.heads}", *type_.widths), (torch_dtype(type_.dtype),))
        return self.distinct_rows(name, found)

    def empty(self, result: str, tokens: Any, heads: int) -> torch.Tensor:
        """A new tensor for it, contiguous."""
        type_ = self.results[result]
        shape: Any = (tokens, heads, *type_.widths)
        return torch.empty(shape, dtype=torch_dtype(type_.dtype), device=self.device)

    def distinct_rows(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor that is written: none of its dimensions is one row seen many times."""
        if any(stride == 0 and extent > 1 for extent, stride in zip(tensor.shape, tensor.stride(), strict=True)):
            raise ArgumentError(
                f"{name}: strides {list(tensor.stride())}, its rows overlap: pass one that was not made by expand()"
            )
        return tensor

    def cache(self, value: object) -> torch.Tensor:
        """kv_cache [blocks, block_size, L+R], or as the spec's layout has it; uint8 is read as the arch's fp8."""
        spec = self.spec
        dtypes: tuple[torch.dtype, ...] = (self.fp8, torch.uint8) if spec.kv_dtype == "fp8" else (self.model,)
        if spec.kv_layout == "fp8_ds_mla":
            dtypes = (torch.uint8,)
        if spec.kv_layout == "segmented":
            cache = self.tensor("kv_cache", value, (None, f">={spec.entry_dim}"), dtypes)
            if cache.shape[1] % spec.entry_dim:
                raise ArgumentError(
                    f"kv_cache: shape {list(cache.shape)}, expected [blocks, block_size * {spec.entry_dim}]: a segmented block is "
                    f"whole slots of {spec.lora_rank} latent and {spec.rope_dim} rotary columns"
                )
        else:
            cache = self.tensor("kv_cache", value, (None, ">=1", *spec.kv_inner, spec.cache_width), dtypes)
        self.distinct_rows("kv_cache", cache)
        block_size = slots_of_block(spec, cache.shape)
        if cache.shape[0] * block_size**2 >= RECIPROCAL_ONE:
            raise ArgumentError(f"kv_cache: {cache.shape[0]} blocks of {block_size} slots are more than the kernel can number")
        return cache


WIDE = ("q_nope", "q_pe", "kv_c", "k_pe", "cos", "sin", "q_out", "ql_nope_out", "q_pe_out", "kv_cache")
"""Arguments that point to rows, which the kernel reads and writes WIDE_BYTES at a time."""

WIDE_BYTES = 16

RECIPROCAL_ONE = 2**63
"""The kernel divides a slot by a product with RECIPROCAL_ONE // block_size + 1: exact while slot * block_size is below this."""


def bind(checker: Checker, packed_shape: Sequence[int], tensors: Sequence[object], *, q_pair: bool, cos_sin_pair: bool) -> Binding:
    """Check the tensors of a call, in the order of TENSORS.  Raises ArgumentError before anything is launched."""
    spec = checker.spec
    given = dict(zip(TENSORS, tensors, strict=True))
    views: dict[str, tuple[str, torch.Tensor]] = {}
    tokens = None
    if spec.write_q:
        views |= _query_views(checker, given, packed_shape, q_pair=q_pair)
        tokens = views["q_nope"][1].shape[0]
    else:
        checker.no_weights(given["packed"])
    if spec.write_kv:
        views |= _cache_views(checker, given, tokens)
        tokens = views["kv_c"][1].shape[0]
    assert tokens is not None, "something is written"
    values: dict[str, int] = {"tokens": tokens, "heads": spec.heads}
    if spec.rope_style != "none":
        tables = checker.rotary((given["cos_sin_cache"], given["sin"]) if cos_sin_pair else given["cos_sin_cache"])
        cos, sin = tables if cos_sin_pair else tables[0].chunk(2, -1)
        positions = checker.indices("positions", given["positions"], tokens)
        views |= {"positions": ("positions", positions), "cos": ("cos_sin_cache", cos)}
        views["sin"] = ("sin" if cos_sin_pair else "cos_sin_cache", sin)
        values |= {
            "cos_stride": cos.stride(0),
            "sin_stride": sin.stride(0),
            "max_position": cos.shape[0],
            "positions_int64": int(positions.dtype is torch.int64),
            "cos_sin_float": int(cos.dtype is torch.float32),
        }
    for name in [*(["q_scale"] if spec.write_q and spec.q_scaling == "static" else []), *(["k_scale"] if spec.write_kv else [])]:
        views[name] = (name, checker.scale(name, given[name]))
    for name, slot in zip(checker.results, ("out", "out_second"), strict=False):
        views[name] = (slot, checker.output(name, given[slot], tokens))
    for name in ("q_nope", "q_pe", *checker.results):
        if name in views:
            values |= {f"{name}_token_stride": views[name][1].stride(0), f"{name}_head_stride": views[name][1].stride(1)}
    for name in ("kv_c", "k_pe"):
        if name in views:
            values[f"{name}_token_stride"] = views[name][1].stride(0)
            if spec.kv_heads > 1:
                values[f"{name}_head_stride"] = views[name][1].stride(1)
    if spec.write_kv:
        cache = views["kv_cache"][1]
        block_size = slots_of_block(spec, cache.shape)
        values |= {
            "block_stride": cache.stride(0),
            "entry_stride": cache.stride(1),
            "block_size": block_size,
            "block_reciprocal": RECIPROCAL_ONE // block_size + 1,
            "slots_int64": int(views["slot_mapping"][1].dtype is torch.int64),
        }
        if spec.kv_heads > 1:
            values |= {"kv_heads": spec.kv_heads, "kv_head_stride": cache.stride(2)}
    pointers = {}
    for name, (tensor, view) in views.items():
        base = given[tensor]
        assert isinstance(base, torch.Tensor), "only tensors were accepted"
        pointers[name] = (TENSORS.index(tensor), view.data_ptr() - base.data_ptr())
    wide = tuple(name for name in views if name in WIDE)
    strides = [stride * view.element_size() for _, view in map(views.__getitem__, wide) for stride in view.stride()[:-1]]
    if not spec.nope_first:  # the latent starts that far into a row, which must not take it off its alignment
        strides += [spec.rope_dim * views[name][1].element_size() for name in ("q_out", "kv_cache") if name in views]
    if spec.kv_layout == "segmented":  # the rotary columns of a block's slots follow one another
        strides.append(spec.rope_dim * cache.element_size())
    if spec.kv_layout == "fp8_ds_mla" and spec.rope_dim:
        strides.append(spec.rotary_byte)
    return Binding(tokens, values, pointers, wide, not any(stride % WIDE_BYTES for stride in strides))


def _query_views(
    checker: Checker, given: Mapping[str, object], packed_shape: Sequence[int], *, q_pair: bool
) -> dict[str, tuple[str, torch.Tensor]]:
    """What the query is made of: the query as it arrives, and the weights."""
    spec = checker.spec
    q_nope, q_pe = checker.query((given["q"], given["q_pe"]) if q_pair else given["q"])
    views = {"q_nope": ("q", q_nope)}
    if spec.rope_dim:
        assert q_pe is not None, "query() gives q_pe where there is one"
        views["q_pe"] = ("q_pe" if q_pair else "q", q_pe)
    if spec.absorbs:
        views["w_uk"] = ("packed", checker.packed(given["packed"], packed_shape))
    else:
        checker.no_weights(given["packed"])
    return views


def _cache_views(checker: Checker, given: Mapping[str, object], tokens: int | None) -> dict[str, tuple[str, torch.Tensor]]:
    """What the cache's entries are made of, and where they go; `tokens` is None where kv_c says how many there are."""
    spec = checker.spec
    latent = checker.tensor("kv_c", given["kv_c"], (tokens, *spec.kv_inner, spec.lora_rank), (checker.model,))
    tokens = latent.shape[0]
    cache = checker.cache(given["kv_cache"])
    slots = checker.indices("slot_mapping", given["slot_mapping"], f">={tokens}")
    views = {"kv_c": ("kv_c", latent), "slot_mapping": ("slot_mapping", slots), "kv_cache": ("kv_cache", cache)}
    if spec.rope_dim:
        k_pe = given["k_pe"]
        one_head = spec.kv_heads == 1 and isinstance(k_pe, torch.Tensor) and k_pe.dim() == 3
        shape = (tokens, *((1,) if one_head else spec.kv_inner), spec.rope_dim)
        views["k_pe"] = ("k_pe", checker.tensor("k_pe", k_pe, shape, (checker.model,)))
    return views


def _shape(shape: Sequence[int | str | None]) -> str:
    return "[" + ", ".join("any" if extent is None else str(extent) for extent in shape) + "]"


def _named(*names: str) -> tuple[torch.dtype, ...]:
    """The dtypes with these names, of those that this torch has."""
    return tuple(getattr(torch, name) for name in names if hasattr(torch, name))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
