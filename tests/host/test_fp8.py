"""Conversions, exhaustively: every 16-bit code, and around every rounding boundary, against torch's own conversions.

Without absorb and rotation q_nope and kv_c go straight to fp8.  With a rotation by (cos = value, sin = 0) of (1, 1) any fp32 value
reaches the conversion, since the tables may be fp32.
"""

import pytest
import torch

from mlagen.dtypes import model_dtype
from mlagen.runtime import Kernel, load
from mlagen.spec import PrologueSpec
from mlagen.target import TARGETS
from mlagen.torch_types import torch_dtype

pytestmark = pytest.mark.host

ARCHS = tuple(TARGETS)
DTYPES = ("bf16", "fp16")
CODES = 1 << 16
RANK, ROPE = 512, 64

# Powers of two, what vLLM calibrates, one that no binary fraction hits, limits, a subnormal, and one with an infinite reciprocal.
SCALES = (None, 1.0, 2.0**-10, 2.0**10, 0.037, 1 / 3, 448.0, 3e-39, 1e-39, 1e30)


def all_codes(dtype: str) -> torch.Tensor:
    """All 65536 values of a 16-bit type, NaN and infinities included."""
    return torch.arange(CODES).to(torch.int16).view(torch_dtype(model_dtype(dtype)))


def rounding_boundaries() -> torch.Tensor:
    """fp32 values: for each upper half of the bits, the lower halves next to where 16-bit and 8-bit types round."""
    upper = torch.arange(CODES, dtype=torch.int64) << 16
    lower = torch.tensor([0x0000, 0x0001, 0x0FFF, 0x1000, 0x1001, 0x7FFF, 0x8000, 0x8001, 0xEFFF, 0xF000, 0xF001, 0xFFFF])
    return (upper[:, None] | lower).to(torch.int32).view(torch.float32).reshape(-1)


def quantized(x: torch.Tensor, scale: float | None, dtype: torch.dtype, limit: float) -> torch.Tensor:
    """What design.md demands, in torch: the reciprocal rounded to fp32 first, then one product, saturation and rounding."""
    inverse = torch.tensor(1.0) / torch.tensor(1.0 if scale is None else scale)
    return (x.float() * inverse).clamp(-limit, limit).to(dtype)


def assert_same(ours: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal bits, and NaN where NaN is expected: which NaN is free."""
    integer = {1: torch.uint8, 2: torch.int16}[ours.dtype.itemsize]
    same = (ours.view(integer) == expected.view(integer)) | (ours.float().isnan() & expected.float().isnan())
    wrong = [f"{got} not {want}" for got, want in zip(ours[~same].tolist()[:5], expected[~same].tolist()[:5], strict=True)]
    assert same.all(), f"{int((~same).sum())} of {same.numel()} differ: {', '.join(wrong)}"


def plain_kernel(arch: str, dtype: str, fp8_max: float | None = None) -> Kernel:
    """q_nope and kv_c to fp8, nothing else."""
    spec = PrologueSpec(
        heads=1, nope_dim=16, lora_rank=RANK, rope_dim=0, rope_style="none", dtype=dtype, weight="none", fp8_max=fp8_max
    )
    return load(spec, "cpu", arch=arch)


def convert(kernel: Kernel, x: torch.Tensor, scale: float | None) -> dict[str, torch.Tensor]:
    """`x` through the query and through the cache of a plain kernel."""
    rows = x.reshape(-1, RANK)
    cache = torch.zeros(len(rows), 1, RANK, dtype=torch_dtype(kernel.target.fp8))
    given = None if scale is None else torch.tensor(scale)
    q_out = kernel(
        (rows.unsqueeze(1), None), rows, None, None, cache, torch.arange(len(rows)), q_scale=given, k_scale=given
    )  # fmt: skip
    return {"query": q_out.reshape(-1), "cache": cache.reshape(-1)}


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("arch", ARCHS)
def test_every_code_at_every_scale(arch, dtype, scale):
    kernel, x = plain_kernel(arch, dtype), all_codes(dtype)
    fp8 = kernel.target.fp8
    for ours in convert(kernel, x, scale).values():
        assert_same(ours, quantized(x, scale, torch_dtype(fp8), fp8.largest))


@pytest.mark.parametrize(("arch", "fp8_max"), [("gfx942", 224.0), ("gfx950", 240.0), ("gfx950", 0.5)])
def test_a_lower_limit(arch, fp8_max):
    kernel, x = plain_kernel(arch, "bf16", fp8_max), all_codes("bf16")
    for ours in convert(kernel, x, 0.037).values():
        assert_same(ours, quantized(x, 0.037, torch_dtype(kernel.target.fp8), fp8_max))


@pytest.mark.parametrize("arch", ARCHS)
def test_special_values(arch):
    """Said without torch's conversion: infinities and large values saturate, NaN stays NaN, FNUZ has no negative zero."""
    kernel = plain_kernel(arch, "bf16")
    x = torch.zeros(RANK, dtype=torch.bfloat16)
    x[:6] = torch.tensor([torch.inf, -torch.inf, 1e38, -1e38, torch.nan, -0.0])
    limit = kernel.target.fp8.largest
    for ours in convert(kernel, x, None).values():
        assert ours[:4].float().tolist() == [limit, -limit, limit, -limit]
        assert ours[4].float().isnan()
        assert ours.view(torch.uint8)[5] == (0x00 if arch == "gfx942" else 0x80)


@pytest.mark.parametrize("output", ["fp8", "same"])
@pytest.mark.parametrize("rounding", ["fused", "stepwise"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("arch", ARCHS)
def test_every_rounding_boundary(arch, dtype, rounding, output):
    """fp32 values to the model's type, to fp8, and by way of the one to the other."""
    name = dtype if output == "same" else "fp8"
    spec = PrologueSpec(
        heads=1, nope_dim=16, lora_rank=16, rope_dim=ROPE, rope_style="neox", dtype=dtype, weight="none",
        q_dtype=name, kv_dtype=name, rounding=rounding,
    )  # fmt: skip
    kernel, model = load(spec, "cpu", arch=arch), torch_dtype(model_dtype(dtype))
    cos = rounding_boundaries().reshape(-1, ROPE // 2)
    rows = len(cos)
    latent, ones = torch.zeros(rows, 16, dtype=model), torch.ones(rows, ROPE, dtype=model)
    out_dtype = torch_dtype(spec.output_dtype(name, kernel.target))
    cache = torch.zeros(rows, 1, spec.entry_dim, dtype=out_dtype)
    q_out = kernel(
        (latent.unsqueeze(1), ones.unsqueeze(1)), latent, ones, None, cache, torch.arange(rows), torch.arange(rows),
        (cos, torch.zeros_like(cos)),
    )  # fmt: skip
    limit = kernel.target.fp8.largest

    def expected(x: torch.Tensor) -> torch.Tensor:
        if output == "same":
            return x.to(model)
        return quantized(x.to(model) if rounding == "stepwise" else x, None, out_dtype, limit)

    for ours in (q_out, cache):
        low, high = ours[:, 0, 16:].split(ROPE // 2, -1)
        assert_same(low, expected(cos))  # a cos - b 0
        assert_same(high, expected(cos + 0.0))  # b cos + a 0: no negative zero
