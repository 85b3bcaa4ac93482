"""Element types: one member owns its spellings and its limits.

The two fp8 flavours are different members, because the same byte means values that differ by a factor of two: e4m3fn (OCP, bias 7)
reaches 448, e4m3fnuz (bias 8) reaches 240.  Two types are those of mxfp4 weights: their codes, of which a byte holds two, and
their scales, which are powers of two and have neither sign nor zero.  User-facing names ("bf16", "fp8") are resolved here and
nowhere else; "fp8" has no flavour until a Target gives it one.
"""

import enum
from dataclasses import dataclass

from mlagen.errors import SpecError


@dataclass(frozen=True)
class Format:
    """Facts of one element type; `largest` is the largest finite magnitude, None for integers."""

    label: str
    bits: int
    cpp: str
    torch: str
    largest: float | None


class DType(enum.Enum):
    """An element type.  `cpp` is the spelling in generated code, `torch` the attribute of the torch module."""

    BF16 = Format("bf16", 16, "bf16", "bfloat16", float.fromhex("0x1.fep127"))
    FP16 = Format("fp16", 16, "fp16", "float16", 65504.0)
    FP32 = Format("fp32", 32, "float", "float32", float.fromhex("0x1.fffffep127"))
    E4M3FN = Format("fp8_e4m3fn", 8, "fp8_e4m3fn", "float8_e4m3fn", 448.0)
    E4M3FNUZ = Format("fp8_e4m3fnuz", 8, "fp8_e4m3fnuz", "float8_e4m3fnuz", 240.0)
    E2M1 = Format("fp4_e2m1", 4, "fp4_e2m1", "uint8", 6.0)
    E8M0 = Format("e8m0", 8, "uint8_t", "uint8", float.fromhex("0x1p127"))
    UINT8 = Format("uint8", 8, "uint8_t", "uint8", None)
    INT32 = Format("int32", 32, "int32_t", "int32", None)
    INT64 = Format("int64", 64, "int64_t", "int64", None)

    @property
    def bytes(self) -> int:
        return self.value.bits // 8

    @property
    def is_fp8(self) -> bool:
        return self in (DType.E4M3FN, DType.E4M3FNUZ)

    @property
    def is_float(self) -> bool:
        return self.value.largest is not None

    @property
    def largest(self) -> float:
        """Largest finite magnitude of a floating-point type."""
        assert self.value.largest is not None, f"{self} has no largest magnitude"
        return self.value.largest

    def __str__(self) -> str:
        return self.value.label


MODEL_DTYPES = {"bf16": DType.BF16, "fp16": DType.FP16}
"""Types that a model computes in, by the names that users write."""


def model_dtype(name: str) -> DType:
    """The model dtype called `name`.  Raises SpecError for any other name."""
    if not isinstance(name, str) or name not in MODEL_DTYPES:
        raise SpecError(f"dtype={name!r}: a model's dtype is one of {', '.join(MODEL_DTYPES)}")
    return MODEL_DTYPES[name]
