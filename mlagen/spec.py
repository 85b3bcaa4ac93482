"""PrologueSpec: what is wanted of a kernel, apart from how it is done."""

import math
import os
from dataclasses import dataclass
from typing import Any

from mlagen import models
from mlagen.dtypes import MODEL_DTYPES, DType, model_dtype
from mlagen.errors import SpecError
from mlagen.ir import (
    MX_GROUP,
    SCALE_BLOCK,
    CacheWrite,
    Concat,
    GroupScale,
    Program,
    QAbsorb,
    Quantize,
    Rope,
    RowScale,
    Stage,
    TensorType,
)
from mlagen.target import Target

ROPE_STYLES = ("none", "gptj", "neox")
ROUNDINGS = ("fused", "stepwise")
WEIGHT_CODES = ("fp8", "fp8-block", "mxfp4")
COMPUTES = ("a16", "a8")
Q_SCALINGS = ("static", "token")
KV_LAYOUTS = ("paged", "segmented", "fp8_ds_mla")
MAX_NOPE_DIM, MAX_LORA_RANK, MAX_ROPE_DIM, MAX_HEADS = 512, 2048, 512, 4096

SCALE_GROUP = 128
"""Columns that share a scale in a cache of layout fp8_ds_mla."""

SCALE_DIVISOR = {DType.E4M3FN: 448.0, DType.E4M3FNUZ: 224.0}
"""What vLLM divides the largest magnitude of such a group by; on FNUZ it stays below the format's limit of 240."""

LEAST_SCALE = 2.0**-13
"""The smallest of these scales: 1e-4 in vLLM, before it takes the next power of two."""


@dataclass(frozen=True)
class PrologueSpec:
    """The MLA decode prologue of one model on one rank.

    heads: query heads H on this rank; nope_dim P, lora_rank L (multiples of 16) and rope_dim R (even, may be 0): widths in
    elements.
    rope_style: "none", "gptj" (interleaved pairs) or "neox" (halves); with "none" the R columns are carried over unrotated.
    dtype: the model's, "bf16" or "fp16".  weight: the type of W_UK, or "none" where q_nope arrives absorbed as [T,H,L]; None takes
    the model's.  "fp8" (the arch's flavour, one fp32 scale for all or for each head), "fp8-block" (the same with a scale for each
    128 x 128 block) and "mxfp4" (e2m1, an e8m0 scale for each 32 rows of a column) are codes, which become the model's dtype in
    registers, exactly: half and a quarter of the bytes, and no rounding but that of the weights.  compute: "a16" multiplies q_nope
    as it is.  "a8" rounds it to fp8 first, in groups of 128 columns with a scale of their own, and multiplies fp8 codes, as AITER's
    Triton kernels do: there for parity with them, since it costs accuracy (about 2.5 % of ql_nope's norm) and wins no bytes.
    q_dtype, kv_dtype: "fp8" (in the arch's flavour) or the model's dtype.  rounding: "fused" keeps fp32 up to the
    final conversion, "stepwise" rounds to the model dtype where separate operators would.  fp8_max lowers the magnitude at which
    fp8 saturates (vLLM uses 224 on FNUZ); None is the format's own limit.  nope_first: in the rows of both outputs the L latent
    columns come before the R rotary ones; False is the other way round.
    kv_heads: KV heads K of this rank; with several kv_c is [T,K,L], k_pe [T,K,R] and the cache [blocks, block_size, K, L+R].
    kv_layout: "paged", where the entries of a block follow one another; "segmented", the pages of AITER's `_seg` operators, flat
    [blocks, block_size * (L+R)]: the latent columns of all slots of a block, then the rotary columns of all; "fp8_ds_mla", vLLM's
    format for sparse attention, bytes: L fp8 codes, L/128 fp32 scales of 128 codes each, which the kernel computes (ir.GroupScale),
    and R rotary values of the model's dtype.  It needs kv_dtype "fp8", and k_scale and fp8_max do not concern it.

    q_scaling="token" computes the scale of each row (token, head) of an fp8 q_out, the row's largest magnitude over fp8_max or the
    format's limit, and returns the scales; "static" is one scale, which the call brings.  q_split=True gives the query as two
    tensors, ql_nope [T,H,L] and q_pe [T,H,R], each with strides of its own; nope_first then speaks of the cache alone.
    write_q=False leaves the query out: only the cache is written, nothing absorbs.  write_kv=False leaves the cache out: only the
    query is made.  A field of what is left out has no meaning and is set to one value, so that equal kernels have equal specs: with
    write_q=False weight is "none" and q_dtype the model's dtype, with write_kv=False kv_dtype is.

    Raises SpecError, naming the field, what it was and what it may be.
    """

    heads: int
    nope_dim: int
    lora_rank: int
    rope_dim: int
    rope_style: str
    dtype: str = "bf16"
    weight: str | None = None
    q_dtype: str = "fp8"
    kv_dtype: str = "fp8"
    rounding: str = "fused"
    fp8_max: float | None = None
    nope_first: bool = True
    compute: str = "a16"
    q_scaling: str = "static"
    q_split: bool = False
    write_q: bool = True
    write_kv: bool = True
    kv_heads: int = 1
    kv_layout: str = "paged"

    def __post_init__(self) -> None:
        model_dtype(self.dtype)
        if self.weight is None:
            object.__setattr__(self, "weight", self.dtype)
        self._check_width("heads", 1, MAX_HEADS, 1)
        self._check_width("nope_dim", 16, MAX_NOPE_DIM, 16)
        self._check_width("lora_rank", 16, MAX_LORA_RANK, 16)
        self._check_width("rope_dim", 0, MAX_ROPE_DIM, 2)
        self._check_choice("rope_style", ROPE_STYLES)
        self._check_choice("weight", (self.dtype, *WEIGHT_CODES, "none"))
        self._check_choice("q_dtype", ("fp8", self.dtype))
        self._check_choice("kv_dtype", ("fp8", self.dtype))
        self._check_choice("rounding", ROUNDINGS)
        self._check_choice("compute", COMPUTES)
        self._check_choice("q_scaling", Q_SCALINGS)
        self._check_width("kv_heads", 1, MAX_HEADS, 1)
        self._check_choice("kv_layout", KV_LAYOUTS)
        for field in ("nope_first", "q_split", "write_q", "write_kv"):
            self._check_truth(field)
        if not self.write_q and not self.write_kv:
            raise SpecError("write_q=False with write_kv=False: nothing would be written, leave one of them out")
        if self.q_split and self.rope_dim == 0:
            raise SpecError("q_split=True with rope_dim=0: there is nothing to split, leave q_split out")
        if self.q_split and not self.write_q:
            raise SpecError("q_split=True with write_q=False: there is no query to split, leave one of them out")
        if self.q_scaling == "token":
            for field, wanted in (("write_q", True), ("q_dtype", "fp8"), ("q_split", False)):
                if getattr(self, field) != wanted:
                    value = getattr(self, field)
                    raise SpecError(
                        f"q_scaling='token' with {field}={value!r}: rows of a joined fp8 q_out have a scale of their own"
                    )
        self._set_what_has_no_meaning()
        if self.rope_dim == 0 and self.rope_style != "none":
            raise SpecError(f"rope_style={self.rope_style!r} with rope_dim=0: there is nothing to rotate, use rope_style='none'")
        if self.fp8_max is not None:
            if "fp8" not in (self.q_dtype, self.kv_dtype):
                raise SpecError(f"fp8_max={self.fp8_max!r} without an fp8 output: leave it out, or ask for an fp8 query or cache")
            object.__setattr__(self, "fp8_max", self._limit())
        self._check_weight()
        self._check_cache()

    def _set_what_has_no_meaning(self) -> None:
        """One value for each field that changes nothing, whatever was asked for: it is the same kernel."""
        if not self.write_q:
            object.__setattr__(self, "weight", "none")
            object.__setattr__(self, "compute", "a16")
            object.__setattr__(self, "q_dtype", self.dtype)
        if not self.write_kv:
            object.__setattr__(self, "kv_dtype", self.dtype)
            object.__setattr__(self, "kv_heads", 1)
            object.__setattr__(self, "kv_layout", "paged")
        if self.rope_dim == 0 or (self.q_split and not self.write_kv):
            object.__setattr__(self, "nope_first", True)  # one part has no order

    def _check_weight(self) -> None:
        if self.compute == "a8" and self.weight != "fp8":
            raise SpecError(f"compute='a8' with weight={self.weight!r}: it multiplies fp8 codes, use weight='fp8' or compute='a16'")
        if self.weight in ("fp8-block", "mxfp4") and self.nope_dim % MX_GROUP:
            raise SpecError(
                f"weight={self.weight!r} with nope_dim={self.nope_dim}: its scales are for {MX_GROUP} rows of W_UK or more, so "
                f"nope_dim must be a multiple of {MX_GROUP}; use weight='fp8' or weight={self.dtype!r}"
            )
        if self.weight == "mxfp4" and self.dtype != "bf16":
            raise SpecError(f"weight='mxfp4' with dtype={self.dtype!r}: e8m0 scales reach beyond what {self.dtype} holds, use bf16")

    def _check_cache(self) -> None:
        if self.kv_layout != "paged" and self.kv_heads > 1:
            raise SpecError(f"kv_heads={self.kv_heads} with kv_layout={self.kv_layout!r}: its entries are those of one KV head")
        if self.kv_layout != "paged" and not self.nope_first:
            reason = "this layout has the latent columns first; leave nope_first out, or use kv_layout='paged'"
            raise SpecError(f"kv_layout={self.kv_layout!r} with nope_first=False: {reason}")
        if self.kv_layout == "fp8_ds_mla":
            self._check_ds_mla()

    def _check_ds_mla(self) -> None:
        if self.lora_rank % SCALE_GROUP:
            raise SpecError(f"kv_layout='fp8_ds_mla' with lora_rank={self.lora_rank}: must be a multiple of {SCALE_GROUP}")
        if self.kv_dtype != "fp8":
            raise SpecError(f"kv_layout='fp8_ds_mla' with kv_dtype={self.kv_dtype!r}: its latent is fp8, use kv_dtype='fp8'")
        if self.fp8_max is not None and self.q_dtype != "fp8":
            reason = "its codes have scales of their own, and the query is not fp8; leave fp8_max out"
            raise SpecError(f"kv_layout='fp8_ds_mla' with fp8_max={self.fp8_max:g}: {reason}")

    def _limit(self) -> float:
        """fp8_max, checked: a limit that fp8 does not hold would itself be rounded, perhaps upwards."""
        value = self.fp8_max
        if isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= DType.E4M3FN.largest:
            # Four significant bits, and no finer than the smallest subnormal of either flavour.
            if math.ldexp(math.frexp(value)[0], 4).is_integer() and math.ldexp(value, 10).is_integer():
                return float(value)
            raise SpecError(f"fp8_max={value!r}: must be a value that fp8 holds exactly, such as 224 or 240")
        raise SpecError(f"fp8_max={value!r}: must be a positive number, up to 448 (OCP) or 240 (FNUZ), or None")

    def _check_width(self, field: str, low: int, high: int, step: int) -> None:
        value = getattr(self, field)
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high or value % step:
            shape = f"a multiple of {step} from {low} to {high}" if step > 1 else f"from {low} to {high}"
            raise SpecError(f"{field}={value!r}: must be an integer, {shape}")

    def _check_truth(self, field: str) -> None:
        if not isinstance(getattr(self, field), bool):
            raise SpecError(f"{field}={getattr(self, field)!r}: must be True or False")

    def _check_choice(self, field: str, choices: tuple[str, ...]) -> None:
        value = getattr(self, field)
        if value not in choices:
            hint = ""
            if isinstance(value, str) and (value in MODEL_DTYPES or value == "fp8"):
                hint = f" for a {self.dtype} model"
            raise SpecError(f"{field}={value!r}: must be one of {', '.join(choices)}{hint}")

    @classmethod
    def from_model(
        cls,
        model: str | os.PathLike[str],
        *,
        tp: int = 1,
        weight: str | None = None,
        q_dtype: str = "fp8",
        kv_dtype: str = "fp8",
        rounding: str = "fused",
        fp8_max: float | None = None,
        nope_first: bool = True,
        compute: str = "a16",
        q_scaling: str = "static",
        q_split: bool = False,
        write_q: bool = True,
        write_kv: bool = True,
        kv_heads: int = 1,
        kv_layout: str = "paged",
    ) -> "PrologueSpec":
        """The spec of a preset, of a config.json, or of a directory that holds one, on one of `tp` ranks.

        Raises ModelError where the model or `tp` does not fit, SpecError where the options do not.
        """
        return cls.of_shape(
            models.resolve_model(model),
            tp,
            weight=weight,
            q_dtype=q_dtype,
            kv_dtype=kv_dtype,
            rounding=rounding,
            fp8_max=fp8_max,
            nope_first=nope_first,
            compute=compute,
            q_scaling=q_scaling,
            q_split=q_split,
            write_q=write_q,
            write_kv=write_kv,
            kv_heads=kv_heads,
            kv_layout=kv_layout,
        )

    @classmethod
    def of_shape(cls, shape: models.ModelShape, tp: int, **options: Any) -> "PrologueSpec":
        """The spec of a model of this shape on one of `tp` ranks; `options` and errors are from_model's."""
        return cls(
            heads=models.heads_per_rank(shape, tp),
            nope_dim=shape.nope_dim,
            lora_rank=shape.lora_rank,
            rope_dim=shape.rope_dim,
            rope_style=shape.rope_style,
            dtype=shape.dtype,
            **options,
        )

    @property
    def absorbs(self) -> bool:
        """Whether the kernel multiplies by W_UK."""
        return self.weight != "none"

    @property
    def q_nope_dim(self) -> int:
        """Width of the nope part of q as it arrives: P, or L where it is already absorbed."""
        return self.nope_dim if self.absorbs else self.lora_rank

    @property
    def q_results(self) -> tuple[str, ...]:
        """The names of the tensors that a call returns, as `out` has them too; none where no query is written."""
        if not self.write_q:
            return ()
        if self.q_scaling == "token":
            return ("q_out", "q_scales")
        return ("ql_nope_out", "q_pe_out") if self.q_split else ("q_out",)

    @property
    def entry_dim(self) -> int:
        """Width of a row of q_out and of a cache entry: L + R."""
        return self.lora_rank + self.rope_dim

    @property
    def kv_inner(self) -> tuple[int, ...]:
        """What stands between the tokens, or the slots, and the columns of kv_c, k_pe and the cache: K, where there are several."""
        return (self.kv_heads,) if self.kv_heads > 1 else ()

    @property
    def scale_groups(self) -> int:
        """Scales in a cache entry."""
        return self.lora_rank // SCALE_GROUP if self.kv_layout == "fp8_ds_mla" else 0

    @property
    def cache_width(self) -> int:
        """Elements of a cache entry: L + R, or bytes where the layout is fp8_ds_mla."""
        if self.kv_layout == "fp8_ds_mla":
            return self.rotary_byte + self.rope_dim * model_dtype(self.dtype).bytes
        return self.entry_dim

    @property
    def rotary_byte(self) -> int:
        """Where the rotary values of an entry start where the layout is fp8_ds_mla."""
        return self.lora_rank + self.scale_groups * DType.FP32.bytes

    @property
    def nope_columns(self) -> slice:
        """Where the latent is in a row of a joined q_out and in a cache entry."""
        first = 0 if self.nope_first else self.rope_dim
        return slice(first, first + self.lora_rank)

    @property
    def rope_columns(self) -> slice:
        """Where the rotary part is in a row of a joined q_out and in a cache entry."""
        first = self.lora_rank if self.nope_first else 0
        return slice(first, first + self.rope_dim)

    def output_dtype(self, name: str, target: Target) -> DType:
        """Resolve "fp8" to the arch's flavour, or the model's own type."""
        return target.fp8 if name == "fp8" else model_dtype(name)

    def cache_dtype(self, target: Target) -> DType:
        """Type of the cache's elements."""
        return DType.UINT8 if self.kv_layout == "fp8_ds_mla" else self.output_dtype(self.kv_dtype, target)

    def _weight_types(self, target: Target) -> tuple[DType, TensorType | None]:
        """The element of W_UK, and the type of its scales where it has any."""
        if self.weight == "fp8":
            return target.fp8, TensorType(("H",), DType.FP32)
        if self.weight == "fp8-block":
            rows, columns = self.nope_dim // math.gcd(self.nope_dim, SCALE_BLOCK), -(-self.lora_rank // SCALE_BLOCK)
            return target.fp8, TensorType(("H", rows, columns), DType.FP32)
        if self.weight == "mxfp4":
            return DType.E2M1, TensorType(("H", self.nope_dim // MX_GROUP, self.lora_rank), DType.E8M0)
        return model_dtype(self.dtype), None

    def weight_bits(self, target: Target) -> int:
        """Bits of an element of W_UK, without its scales."""
        return self._weight_types(target)[0].value.bits

    def program(self, target: Target) -> Program:
        """The verified Program of this prologue on `target`.  Raises SpecError where fp8_max exceeds the target's flavour."""
        if self.fp8_max is not None and self.fp8_max > target.fp8.largest:
            raise SpecError(f"fp8_max={self.fp8_max:g}: {target.arch}'s {target.fp8} ends at {target.fp8.largest:g}")
        dtype = model_dtype(self.dtype)
        carried = DType.FP32 if self.rounding == "fused" else dtype
        inputs: list[tuple[str, TensorType]] = []
        stages: list[Stage] = []
        results: list[str] = []

        def take(name: str, shape: tuple[int | str, ...], element: DType) -> str:
            if name not in dict(inputs):
                inputs.append((name, TensorType(shape, element)))
            return name

        def add(stage: Stage) -> str:
            stages.append(stage)
            return stage.output

        def rotated(x: str) -> str:
            if self.rope_style == "none":
                return x
            cos_sin = take("cos_sin_cache", ("X", self.rope_dim), dtype)
            positions = take("positions", ("T",), DType.INT64)
            return add(Rope(f"{x}_rotated", x, cos_sin, positions, self.rope_style, carried))

        def quantized(output: str, x: str, name: str, scale: str) -> str:
            element = self.output_dtype(name, target)
            fp8 = element.is_fp8
            return add(Quantize(output, x, element, take(scale, (), DType.FP32) if fp8 else None, self.fp8_max if fp8 else None))

        def row(output: str, latent: str, pe: str, pe_shape: tuple[int | str, ...], name: str, scale: str) -> str:
            x = latent
            if self.rope_dim:
                rotary = rotated(take(pe, pe_shape, dtype))
                x = add(Concat(f"{output}_row", *((latent, rotary) if self.nope_first else (rotary, latent))))
            if scale == "q_scales":
                limit = target.fp8.largest if self.fp8_max is None else self.fp8_max
                return add(Quantize(output, x, self.output_dtype(name, target), add(RowScale(scale, x, limit)), self.fp8_max))
            return quantized(output, x, name, scale)

        inner = ("K",) if self.kv_heads > 1 else ()

        def written(entry: str, name: str, column: int = 0) -> None:
            slots = take("slot_mapping", ("T",), DType.INT64)
            cache = take("kv_cache", ("N", *inner, self.cache_width), self.cache_dtype(target))
            layout = "segmented" if self.kv_layout == "segmented" else None
            results.append(add(CacheWrite(name, entry, cache, slots, layout, column)))

        if self.write_q:
            latent = take("q_nope", ("T", "H", self.q_nope_dim), dtype)
            if self.absorbs:
                code, scale = self._weight_types(target)
                w_uk = take("w_uk", ("H", self.nope_dim, self.lora_rank), code)
                w_scale = take("w_scale", scale.shape, scale.dtype) if scale else None
                activation = target.fp8 if self.compute == "a8" else None
                latent = add(QAbsorb("ql_nope", "q_nope", w_uk, carried, w_scale, activation))
            q_pe_shape = ("T", "H", self.rope_dim)
            if self.q_split:
                results.append(quantized("ql_nope_out", latent, self.q_dtype, "q_scale"))
                results.append(quantized("q_pe_out", rotated(take("q_pe", q_pe_shape, dtype)), self.q_dtype, "q_scale"))
            else:
                q_scale = "q_scales" if self.q_scaling == "token" else "q_scale"
                results.append(row("q_out", latent, "q_pe", q_pe_shape, self.q_dtype, q_scale))
                results += ["q_scales"] if self.q_scaling == "token" else []
        if self.write_kv:
            kv_c = take("kv_c", ("T", *inner, self.lora_rank), dtype)
            if self.kv_layout == "fp8_ds_mla":
                scales = add(GroupScale("kv_scales", kv_c, SCALE_GROUP, SCALE_DIVISOR[target.fp8], LEAST_SCALE))
                written(add(Quantize("kv_codes", kv_c, target.fp8, scales)), "kv_codes_written")
                written(scales, "kv_scales_written", self.lora_rank)
                if self.rope_dim:
                    rotary = add(Quantize("kv_pe", rotated(take("k_pe", ("T", self.rope_dim), dtype)), dtype))
                    written(rotary, "kv_pe_written", self.rotary_byte)
            else:
                entry = row("kv_entry", kv_c, "k_pe", ("T", *inner, self.rope_dim), self.kv_dtype, "k_scale")
                written(entry, "kv_cache_written")
        program = Program("mla_decode_prologue", tuple(inputs), tuple(stages), tuple(results))
        program.verify()
        return program
