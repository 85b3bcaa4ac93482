"""The IR: typed tensors, the five stages of the prologue, and the Program that orders them.

A Program is in single assignment: every stage names its result once, and reads program inputs or earlier results.  Dimensions are
integers or symbols ("T" tokens, "H" heads of this rank, "N" cache slots, "X" rotary positions), so one program serves every T.
Rounding is part of the types: a stage whose result is fp32 keeps full precision, one whose result is bf16 rounds there.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from mlagen.dtypes import DType
from mlagen.errors import ProgramError

Dim = int | str


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
    """ql_nope[t,h,:] = q_nope[t,h,:] @ w_uk[h], summed in fp32, rounded to `dtype`."""

    q_nope: str
    w_uk: str
    dtype: DType

    template: ClassVar[str] = "q_absorb"

    @property
    def operands(self) -> tuple[str, ...]:
        return (self.q_nope, self.w_uk)

    def infer(self, types: Types) -> TensorType:
        q_nope, w_uk = self.float_rows(self.q_nope, types), self.float_rows(self.w_uk, types)
        if len(q_nope.shape) != 3 or len(w_uk.shape) != 3:
            raise self.reject(f"expected q_nope [T,H,P] and w_uk [H,P,L], got {q_nope} and {w_uk}")
        (tokens, heads, nope), (w_heads, w_nope, lora) = q_nope.shape, w_uk.shape
        if (heads, nope) != (w_heads, w_nope):
            raise self.reject(f"{self.q_nope} {q_nope} and {self.w_uk} {w_uk} differ in heads or in the nope width")
        if q_nope.dtype != w_uk.dtype:
            raise self.reject(f"{self.q_nope} is {q_nope.dtype} and {self.w_uk} is {w_uk.dtype}: the product needs one type")
        return TensorType((tokens, heads, lora), self.dtype)


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
class Quantize(Stage):
    """Conversion to the output type.

    To fp8: code = rne(x * (1 / scale)), the reciprocal rounded to fp32 first; saturates at `fp8_max` (the format's limit where
    None) and keeps NaN.  To bf16 or fp16: round to nearest even, without a scale.  `scale` None means 1.
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
        if self.scale is not None and types[self.scale] != TensorType((), DType.FP32):
            raise self.reject(f"{self.scale} is {types[self.scale]}, expected fp32[]")
        if not 0 < self.limit <= self.dtype.largest:
            raise self.reject(f"fp8_max={self.fp8_max} is outside (0, {self.dtype.largest:g}], what {self.dtype} can hold")
        return TensorType(x.shape, self.dtype)


@dataclass(frozen=True)
class CacheWrite(Stage):
    """cache[slot_mapping[t], :] = x[t, :] where slot_mapping[t] >= 0; nothing at all where it is negative."""

    x: str
    cache: str
    slot_mapping: str

    template: ClassVar[str] = "cache_write"

    @property
    def operands(self) -> tuple[str, ...]:
        return (self.x, self.cache, self.slot_mapping)

    def infer(self, types: Types) -> TensorType:
        x, cache = types[self.x], types[self.cache]
        self.index(self.slot_mapping, types)
        if len(x.shape) != 2 or x.width != cache.width:
            raise self.reject(f"{self.x} {x} does not fill the entries of {self.cache} {cache}")
        if x.dtype != cache.dtype:
            raise self.reject(f"{self.x} is {x.dtype} and {self.cache} is {cache.dtype}: Quantize comes before CacheWrite")
        return cache


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
            options = [f"{key}={value}" for key in ("style", "fp8_max") if (value := getattr(stage, key, None)) is not None]
            call = f"{stage.template}({', '.join([*stage.operands, *options])})"
            lines.append(f"         {stage.output:<{width}} = {call} : {types[stage.output]}")
        lines.append(f"  result {', '.join(self.results)}")
        return "\n".join(lines)
