"""PrologueSpec: what is wanted of a kernel, apart from how it is done."""

import math
import os
from dataclasses import dataclass

from mlagen import models
from mlagen.dtypes import MODEL_DTYPES, DType, model_dtype
from mlagen.errors import SpecError
from mlagen.ir import CacheWrite, Concat, Program, QAbsorb, Quantize, Rope, Stage, TensorType
from mlagen.target import Target

ROPE_STYLES = ("none", "gptj", "neox")
ROUNDINGS = ("fused", "stepwise")
MAX_NOPE_DIM, MAX_LORA_RANK, MAX_ROPE_DIM, MAX_HEADS = 512, 2048, 512, 4096


@dataclass(frozen=True)
class PrologueSpec:
    """The MLA decode prologue of one model on one rank.

    heads: query heads H on this rank; nope_dim P, lora_rank L (multiples of 16) and rope_dim R (even, may be 0): widths in
    elements.
    rope_style: "none", "gptj" (interleaved pairs) or "neox" (halves); with "none" the R columns are carried over unrotated.
    dtype: the model's, "bf16" or "fp16".  weight: the type of W_UK, or "none" where q_nope arrives absorbed as [T,H,L]; None takes
    the model's.  q_dtype, kv_dtype: "fp8" (in the arch's flavour) or the model's dtype.  rounding: "fused" keeps fp32 up to the
    final conversion, "stepwise" rounds to the model dtype where separate operators would.  fp8_max lowers the magnitude at which
    fp8 saturates (vLLM uses 224 on FNUZ); None is the format's own limit.  nope_first: in the rows of both outputs the L latent
    columns come before the R rotary ones; False is the other way round.

    q_split=True gives the query as two tensors, ql_nope [T,H,L] and q_pe [T,H,R], each with strides of its own; nope_first then
    speaks of the cache alone.  write_q=False leaves the query out: only the cache is written, nothing absorbs.  write_kv=False
    leaves the cache out: only the query is made.  A field of what is left out has no meaning and is set to one value, so that equal
    kernels have equal specs: with write_q=False weight is "none" and q_dtype the model's dtype, with write_kv=False kv_dtype is.

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
    q_split: bool = False
    write_q: bool = True
    write_kv: bool = True

    def __post_init__(self) -> None:
        model_dtype(self.dtype)
        if self.weight is None:
            object.__setattr__(self, "weight", self.dtype)
        self._check_width("heads", 1, MAX_HEADS, 1)
        self._check_width("nope_dim", 16, MAX_NOPE_DIM, 16)
        self._check_width("lora_rank", 16, MAX_LORA_RANK, 16)
        self._check_width("rope_dim", 0, MAX_ROPE_DIM, 2)
        self._check_choice("rope_style", ROPE_STYLES)
        self._check_choice("weight", (self.dtype, "none"))
        self._check_choice("q_dtype", ("fp8", self.dtype))
        self._check_choice("kv_dtype", ("fp8", self.dtype))
        self._check_choice("rounding", ROUNDINGS)
        for field in ("nope_first", "q_split", "write_q", "write_kv"):
            self._check_truth(field)
        if not self.write_q and not self.write_kv:
            raise SpecError("write_q=False with write_kv=False: nothing would be written, leave one of them out")
        if self.q_split and self.rope_dim == 0:
            raise SpecError("q_split=True with rope_dim=0: there is nothing to split, leave q_split out")
        if self.q_split and not self.write_q:
            raise SpecError("q_split=True with write_q=False: there is no query to split, leave one of them out")
        self._set_what_has_no_meaning()
        if self.rope_dim == 0 and self.rope_style != "none":
            raise SpecError(f"rope_style={self.rope_style!r} with rope_dim=0: there is nothing to rotate, use rope_style='none'")
        if self.fp8_max is not None:
            if "fp8" not in (self.q_dtype, self.kv_dtype):
                raise SpecError(f"fp8_max={self.fp8_max!r} without an fp8 output: leave it out, or ask for an fp8 query or cache")
            object.__setattr__(self, "fp8_max", self._limit())

    def _set_what_has_no_meaning(self) -> None:
        """One value for each field that changes nothing, whatever was asked for: it is the same kernel."""
        if not self.write_q:
            object.__setattr__(self, "weight", "none")
            object.__setattr__(self, "q_dtype", self.dtype)
        if not self.write_kv:
            object.__setattr__(self, "kv_dtype", self.dtype)
        if self.rope_dim == 0 or (self.q_split and not self.write_kv):
            object.__setattr__(self, "nope_first", True)  # one part has no order

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
        q_split: bool = False,
        write_q: bool = True,
        write_kv: bool = True,
    ) -> "PrologueSpec":
        """The spec of a preset, of a config.json, or of a directory that holds one, on one of `tp` ranks.

        Raises ModelError where the model or `tp` does not fit, SpecError where the options do not.
        """
        shape = models.resolve_model(model)
        return cls(
            heads=models.heads_per_rank(shape, tp),
            nope_dim=shape.nope_dim,
            lora_rank=shape.lora_rank,
            rope_dim=shape.rope_dim,
            rope_style=shape.rope_style,
            dtype=shape.dtype,
            weight=weight,
            q_dtype=q_dtype,
            kv_dtype=kv_dtype,
            rounding=rounding,
            fp8_max=fp8_max,
            nope_first=nope_first,
            q_split=q_split,
            write_q=write_q,
            write_kv=write_kv,
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
        return ("ql_nope_out", "q_pe_out") if self.q_split else ("q_out",)

    @property
    def entry_dim(self) -> int:
        """Width of a row of q_out and of a cache entry: L + R."""
        return self.lora_rank + self.rope_dim

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
            return quantized(output, x, name, scale)

        if self.write_q:
            latent = take("q_nope", ("T", "H", self.q_nope_dim), dtype)
            if self.absorbs:
                w_uk = take("w_uk", ("H", self.nope_dim, self.lora_rank), dtype)
                latent = add(QAbsorb("ql_nope", "q_nope", w_uk, carried))
            q_pe_shape = ("T", "H", self.rope_dim)
            if self.q_split:
                results.append(quantized("ql_nope_out", latent, self.q_dtype, "q_scale"))
                results.append(quantized("q_pe_out", rotated(take("q_pe", q_pe_shape, dtype)), self.q_dtype, "q_scale"))
            else:
                results.append(row("q_out", latent, "q_pe", q_pe_shape, self.q_dtype, "q_scale"))
        if self.write_kv:
            latent = take("kv_c", ("T", self.lora_rank), dtype)
            entry = row("kv_entry", latent, "k_pe", ("T", self.rope_dim), self.kv_dtype, "k_scale")
            slots = take("slot_mapping", ("T",), DType.INT64)
            cache = take("kv_cache", ("N", self.entry_dim), self.output_dtype(self.kv_dtype, target))
            results.append(add(CacheWrite("kv_cache_written", entry, cache, slots)))
        program = Program("mla_decode_prologue", tuple(inputs), tuple(stages), tuple(results))
        program.verify()
        return program
