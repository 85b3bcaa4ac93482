"""The IR: typed tensors, the seven kinds of stages of a prologue, and the Program that orders them.

A Program is in single assignment: every stage names its result once, and reads program inputs or earlier results.  Dimensions are
integers or symbols ("T" tokens, "H" heads of this rank, "K" its KV heads, "N" cache slots, "X" rotary positions), so one program
serves every T.  Rounding is part of the types: a stage whose result is fp32 keeps full precision, one whose result is bf16 rounds
there.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from mlagen.dtypes import DType
from mlagen.errors import ProgramError

Dim = int | str

OPTIONS = ("style", "fp8_max", "activation", "group", "divisor", "least", "layout", "column")
"""Fields of stages, besides operands and types, that a printed program shows where they are set."""

SCALE_BLOCK = 128
"""Rows, and columns, of W_UK in a block of fp8 codes with one scale, the rows also fewer where P is no multiple of it."""

MX_GROUP = 32
"""Neighbouring rows of a column of W_UK that share an e8m0 scale: OCP Microscaling Formats Specification 1.0, section 5.1."""

ACTIVATION_GROUP = 128
"""Columns of q_nope that are rounded to fp8 with one scale."""

LEAST_ACTIVATION = 2.0**-33
"""The magnitude that a group of q_nope is taken to reach at least, so that zeros have a scale: AITER's 1e-10, as a power of two."""

LEAST_ROW_SCALE = 2.0**-126
"""The scale of rows of zeros, and the least of all rows: the smallest normal fp32, whose reciprocal is finite."""


@dataclass(frozen=True)
class TensorType:
    """Shape and element type; a symbol stands for a dimension known at run time."""

    shape: tuple[Dim, ...]
    dtype: DType

    def __str__(self) -> str:
        return f"{self.dtype}[{', '.join(map(str, self.shape))}]"

    @property
    def width(self) -> int:
        """Extent of the last dimension, which is always known."""
        last = self.shape[-1] if self.shape else 1
        if not isinstance(last, int):
            raise ProgramError(f"{self}: the last dimension must be a number, it is the symbol {last}")
        return last

    @property
    def widths(self) -> tuple[int, ...]:
        """Extents that are known: those after T and H."""
        return tuple(extent for extent in self.shape if isinstance(extent, int))


Types = Mapping[str, TensorType]


@dataclass(frozen=True)
class Stage:
    """One step of the prologue: reads `operands`, defines `output`.  `template` names the partial that generates it."""

    output: str

    template: ClassVar[str]

    @property
    def operands(self) -> tuple[str, ...]:
        raise NotImplementedError

    def infer(self, types: Types) -> TensorType:
        """Type of the output.  Raises ProgramError, naming the stage and the reason, where the operands do not fit."""
        raise NotImplementedError

    def reject(self, reason: str) -> ProgramError:
        return ProgramError(f"{type(self).__name__} {self.output!r}: {reason}")

    def float_rows(self, name: str, types: Types) -> TensorType:
        """Type of an operand that must still be unquantised."""
        if types[name].dtype not in (DType.BF16, DType.FP16, DType.FP32):
            raise self.reject(f"{name} is {types[name]}, and this stage works on bf16, fp16 or fp32: it comes before Quantize")
        return types[name]

    def index(self, name: str, types: Types) -> None:
        """Check an operand that must be one integer for each token."""
        if types[name].dtype not in (DType.INT32, DType.INT64) or types[name].shape != ("T",):
            raise self.reject(f"{name} is {types[name]}, expected int32[T] or int64[T]")


@dataclass(frozen=True)
class QAbsorb(Stage):
    """ql_nope[t,h,:] = q_nope[t,h,:] @ w_uk[h], summed in fp32, rounded to `dtype`.

    Without `w_scale` W_UK is of q_nope's type.  Otherwise it is made of codes, and a weight is its code times its scale, exactly;
    `w_scale` is [H] (fp8 codes), [H, P/k, L/l] rounded up (fp8 codes, in blocks of k x l) or [H, P/32, L] (e2m1 codes).
    `activation`, an fp8 type, rounds q_nope to it in groups of ACTIVATION_GROUP columns of a row, as quantize_activation in
    mlagen.reference says.
    """

    q_nope: str
    w_uk: str
    dtype: DType
    w_scale: str | None = None
    activation: DType | None = None

    template: ClassVar[str] = "q_absorb"

    @property
    def operands(self) -> tuple[str, ...]:
        return (self.q_nope, self.w_uk) if self.w_scale is None else (self.q_nope, self.w_uk, self.w_scale)

    def infer(self, types: Types) -> TensorType:
        q_nope, w_uk = self.float_rows(self.q_nope, types), types[self.w_uk]
        if len(q_nope.shape) != 3 or len(w_uk.shape) != 3:
            raise self.reject(f"expected q_nope [T,H,P] and w_uk [H,P,L], got {q_nope} and {w_uk}")
        (tokens, heads, nope), (w_heads, w_nope, lora) = q_nope.shape, w_uk.shape
        if (heads, nope) != (w_heads, w_nope):
            raise self.reject(f"{self.q_nope} {q_nope} and {self.w_uk} {w_uk} differ in heads or in the nope width")
        if self.w_scale is None and q_nope.dtype != w_uk.dtype:
            raise self.reject(f"{self.q_nope} is {q_nope.dtype} and {self.w_uk} is {w_uk.dtype}: the product needs one type")
        if self.w_scale is not None:
            self.scale_block(types)
        if self.activation is not None and not (self.activation.is_fp8 and self.activation is w_uk.dtype):
            raise self.reject(f"activation {self.activation} and {self.w_uk} {w_uk}: the product needs one fp8 type")
        if self.activation is not None and self.w_scale and self.scale_block(types) != (nope, lora):
            raise self.reject(f"{self.w_scale} is {types[self.w_scale]}: fp8 products have one scale for a head")
        return TensorType((tokens, heads, lora), self.dtype)

    def scale_block(self, types: Types) -> tuple[int, int]:
        """(k, l): how many rows and columns of a head's W_UK share a scale."""
        assert self.w_scale is not None, "only codes have scales"
        w_uk, scale = types[self.w_uk], types[self.w_scale]
        heads, nope, lora = w_uk.shape
        if not isinstance(nope, int) or not isinstance(lora, int):
            raise self.reject(f"{self.w_uk} is {w_uk}: codes need known widths")
        if w_uk.dtype.is_fp8 and scale == TensorType((heads,), DType.FP32):
            return nope, lora
        if w_uk.dtype.is_fp8 and scale.dtype is DType.FP32 and len(scale.shape) == 3:
            block = math.gcd(nope, SCALE_BLOCK), SCALE_BLOCK
            if scale.shape == (heads, nope // block[0], -(-lora // block[1])):
                return block
        if w_uk.dtype is DType.E2M1 and scale == TensorType((heads, nope // MX_GROUP, lora), DType.E8M0) and nope % MX_GROUP == 0:
            return MX_GROUP, 1
        raise self.reject(f"{self.w_scale} is {scale}, which is no scale for {self.w_uk} {w_uk}")


@dataclass(frozen=True)
class Rope(Stage):
    """Rotary embedding of the last dimension, in fp32, rounded to `dtype`.

    style "gptj" rotates the pairs (x[2i], x[2i+1]), "neox" the pairs (x[i], x[i+R/2]), with cos and sin number i of the token's
    position.  Source of the formula: Su et al., RoFormer (2021), section 3.4.2; the two pairings are those of GPT-J and GPT-NeoX.
    """

    x: str
    cos_sin: str
    positions: str
    style: str
    dtype: DType

    template: ClassVar[str] = "rope"

    @property
    def operands(self) -> tuple[str, ...]:
        return (self.x, self.cos_sin, self.positions)

    def infer(self, types: Types) -> TensorType:
        x, cos_sin = self.float_rows(self.x, types), self.float_rows(self.cos_sin, types)
        self.index(self.positions, types)
        if self.style not in ("gptj", "neox"):
            raise self.reject(f"style {self.style!r} is not one of gptj, neox")
        if x.width % 2 or not x.width:
            raise self.reject(f"{self.x} is {x} wide: a rotation needs pairs")
        if cos_sin.width != x.width:
            raise self.reject(f"{self.cos_sin} is {cos_sin}, expected {x.width} columns: cos and sin halves for {self.x} {x}")
        return TensorType(x.shape, self.dtype)


@dataclass(frozen=True)
class Concat(Stage):
    """[a | b] along the last dimension, in the wider of the two types."""

    a: str
    b: str

    template: ClassVar[str] = "concat"

    @property
    def operands(self) -> tuple[str, ...]:
        return (self.a, self.b)

    def infer(self, types: Types) -> TensorType:
        a, b = self.float_rows(self.a, types), self.float_rows(self.b, types)
        if a.shape[:-1] != b.shape[:-1]:
            raise self.reject(f"{self.a} {a} and {self.b} {b} differ in their rows")
        return TensorType((*a.shape[:-1], a.width + b.width), a.dtype if a.dtype.bytes >= b.dtype.bytes else b.dtype)


@dataclass(frozen=True)
class RowScale(Stage):
    """One fp32 scale for each row [T,H,:]: its largest magnitude over `divisor`, or LEAST_ROW_SCALE where that is less.

    NaN counts for nothing.  A row with an infinity has an infinite scale, with which Quantize makes its infinities NaN and all
    other numbers 0.
    """

    x: str
    divisor: float

    template: ClassVar[str] = "row_scale"

    @property
    def operands(self) -> tuple[str, ...]:
        return (self.x,)

    def infer(self, types: Types) -> TensorType:
        x = self.float_rows(self.x, types)
        if len(x.shape) != 3:
            raise self.reject(f"{self.x} is {x}, expected rows [T,H,:]")
        if not self.divisor > 0:
            raise self.reject(f"divisor={self.divisor}: must be positive")
        return TensorType(x.shape[:-1], DType.FP32)


@dataclass(frozen=True)
class GroupScale(Stage):
    """The fp32 scale of every `group` neighbouring columns: the smallest power of two not below max |x| / `divisor`, nor `least`.

    NaN counts for nothing.  Source of the formula: vLLM 0.33.0, vllm/models/deepseek_v32/common/kernels.py, the writer of
    fp8_ds_mla, which vLLM's pull request 49435 made that of all its writers; before, the scale was not rounded to a power of two.
    """

    x: str
    group: int
    divisor: float
    least: float

    template: ClassVar[str] = "group_scale"

    @property
    def operands(self) -> tuple[str, ...]:
        return (self.x,)

    def infer(self, types: Types) -> TensorType:
        x = self.float_rows(self.x, types)
        if not 16 <= self.group <= 512 or self.group & (self.group - 1) or x.width % self.group:
            raise self.reject(f"{self.x} is {x}: groups of {self.group} columns are no power of two from 16 to 512 that divides it")
        if self.divisor <= 0 or math.frexp(self.least)[0] != 0.5:
            raise self.reject(f"divisor={self.divisor} must be positive, least={self.least} a power of two")
        return TensorType((*x.shape[:-1], x.width // self.group), DType.FP32)


@dataclass(frozen=True)
class Quantize(Stage):
    """Conversion to the output type.

    To fp8: code = rne(x * (1 / scale)), the reciprocal rounded to fp32 first; saturates at `fp8_max` (the format's limit where
    None) and keeps NaN.  `scale` is one value for all, one for each row, or one for each group of neighbouring columns of a row.
    To bf16 or fp16: round to nearest even, without a scale.  `scale` None means 1.
    """

    x: str
    dtype: DType
    scale: str | None = None
    fp8_max: float | None = None

    template: ClassVar[str] = "quantize"

    @property
    def operands(self) -> tuple[str, ...]:
        return (self.x,) if self.scale is None else (self.x, self.scale)

    @property
    def limit(self) -> float:
        """Magnitude at which an fp8 result saturates."""
        return self.dtype.largest if self.fp8_max is None else self.fp8_max

    def infer(self, types: Types) -> TensorType:
        x = self.float_rows(self.x, types)
        if not self.dtype.is_float or self.dtype is DType.FP32:
            raise self.reject(f"{self.dtype} is not an output type: bf16, fp16 or an fp8 type")
        if not self.dtype.is_fp8 and (self.scale is not None or self.fp8_max is not None):
            raise self.reject(f"a scale or fp8_max belongs to an fp8 result, this one is {self.dtype}")
        if self.scale is not None and types[self.scale] not in (TensorType((), DType.FP32), TensorType(x.shape[:-1], DType.FP32)):
            scale = types[self.scale]
            groups = scale.shape[-1] if scale.dtype is DType.FP32 and scale.shape[:-1] == x.shape[:-1] else None
            if not isinstance(groups, int) or x.width % groups:
                raise self.reject(f"{self.scale} is {scale}, expected fp32[], or fp32 for groups of columns or for rows of {x}")
        if not 0 < self.limit <= self.dtype.largest:
            raise self.reject(f"fp8_max={self.fp8_max} is outside (0, {self.dtype.largest:g}], what {self.dtype} can hold")
        return TensorType(x.shape, self.dtype)


@dataclass(frozen=True)
class CacheWrite(Stage):
    """cache[slot_mapping[t], ...] = x[t, ...] where slot_mapping[t] >= 0; nothing at all where it is negative.

    `layout` says how the entries lie in a block: None, one after the other; "segmented", the columns of the first part of the row
    that `x` was made of for all slots, then those of the second part.  A cache of bytes takes `x` of any type, from byte `column`
    of the entry on.
    """

    x: str
    cache: str
    slot_mapping: str
    layout: str | None = None
    column: int = 0

    template: ClassVar[str] = "cache_write"

    @property
    def operands(self) -> tuple[str, ...]:
        return (self.x, self.cache, self.slot_mapping)

    def infer(self, types: Types) -> TensorType:
        x, cache = types[self.x], types[self.cache]
        self.index(self.slot_mapping, types)
        if cache.dtype is DType.UINT8:
            if len(x.shape) != 2 or self.layout or self.column % x.dtype.bytes or not self.bytes_of(x).stop <= cache.width:
                raise self.reject(f"{self.x} {x} does not lie in the bytes of {self.cache} {cache} from {self.column} on")
            return cache
        if self.column:
            raise self.reject(f"column={self.column}: {self.cache} is {cache}, only a cache of bytes is written in parts")
        if len(x.shape) < 2 or x.shape[0] != "T" or x.shape[1:] != cache.shape[1:]:
            raise self.reject(f"{self.x} {x} does not fill the entries of {self.cache} {cache}")
        if x.dtype != cache.dtype:
            raise self.reject(f"{self.x} is {x.dtype} and {self.cache} is {cache.dtype}: Quantize comes before CacheWrite")
        if self.layout not in (None, "segmented"):
            raise self.reject(f"layout {self.layout!r} is not None or segmented")
        return cache

    def bytes_of(self, x: TensorType) -> range:
        """The bytes of an entry that rows of `x` take, in a cache of bytes."""
        return range(self.column, self.column + x.width * x.dtype.bytes)


@dataclass(frozen=True)
class Program:
    """Inputs with their types, stages in order, and the names of the results."""

    name: str
    inputs: tuple[tuple[str, TensorType], ...]
    stages: tuple[Stage, ...]
    results: tuple[str, ...]

    def verify(self) -> dict[str, TensorType]:
        """Type of every value.  Raises ProgramError, naming stage and reason, for a program that is ill-typed or ill-ordered."""
        types: dict[str, TensorType] = {}
        for name, tensor in self.inputs:
            if name in types:
                raise ProgramError(f"program {self.name!r}: the input {name!r} is declared twice")
            types[name] = tensor
        defined = {stage.output: number for number, stage in enumerate(self.stages)}
        read: set[str] = set(self.results)
        for number, stage in enumerate(self.stages):
            for operand in stage.operands:
                if operand not in types:
                    when = "only by a later stage" if defined.get(operand, -1) >= number else "by no stage and by no input"
                    raise stage.reject(f"its operand {operand!r} is defined {when}")
                if any(isinstance(other, CacheWrite) and other.output == operand for other in self.stages):
                    raise stage.reject(f"it reads {operand!r} after the cache write: the cache is written, never read")
            if stage.output in types:
                raise stage.reject("this name is defined already")
            types[stage.output] = stage.infer(types)
            read.update(stage.operands)
        for name in self.results:
            if name not in defined:
                raise ProgramError(f"program {self.name!r}: its result {name!r} is no stage's output")
        if not self.results:
            raise ProgramError(f"program {self.name!r}: it has no result")
        for name in types:
            if name not in read:
                raise ProgramError(f"program {self.name!r}: {name!r} is never read and is no result")
        return types

    def producer(self, name: str) -> Stage | None:
        """The stage that defines `name`; None for an input."""
        return next((stage for stage in self.stages if stage.output == name), None)

    def __str__(self) -> str:
        types = self.verify()
        width = max(len(name) for name in types)
        lines = [f"program {self.name}"]
        lines += [f"  input  {name:<{width}} : {tensor}" for name, tensor in self.inputs]
        for stage in self.stages:
            named = ((key, getattr(stage, key, None)) for key in OPTIONS)
            options = [f"{key}={value}" for key, value in named if value]
            call = f"{stage.template}({', '.join([*stage.operands, *options])})"
            lines.append(f"         {stage.output:<{width}} = {call} : {types[stage.output]}")
        lines.append(f"  result {', '.join(self.results)}")
        return "\n".join(lines)
