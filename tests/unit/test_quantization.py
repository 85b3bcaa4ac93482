"""Weights to codes, against restatements of how others round, and a checkpoint's blocks against the matrix that they stand for."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mlagen.errors import ArgumentError
from mlagen.quantization import E8M0_BIAS, WeightCodes, quantize_weights, split_kv_b_proj
from mlagen.reference import dequantize_weights
from mlagen.spec import PrologueSpec

FP8 = (torch.float8_e4m3fn, torch.float8_e4m3fnuz)
FN, FNUZ = FP8
MODEL = {"bf16": torch.bfloat16, "fp16": torch.float16}


def quantized(w_uk: torch.Tensor, weight: str, fp8: torch.dtype = FN) -> WeightCodes:
    heads, nope_dim, lora_rank = w_uk.shape
    dtype = {dtype: name for name, dtype in MODEL.items()}[w_uk.dtype]
    spec = PrologueSpec(
        heads=heads, nope_dim=nope_dim, lora_rank=lora_rank, rope_dim=0, rope_style="none", dtype=dtype, weight=weight
    )
    return quantize_weights(w_uk, spec, fp8)


def values(codes: WeightCodes) -> torch.Tensor:
    return dequantize_weights(codes.w_uk if codes.w_uk.dtype is torch.uint8 else codes.w_uk.double(), codes.scale)


def draw(*shape: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0, binades: int = 8) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    spread = torch.randint(-binades, 1, shape, generator=generator)
    return torch.ldexp(torch.randn(*shape, generator=generator) / 16, spread).to(dtype)


def same_codes(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    return torch.equal(ours.view(torch.uint8), theirs.view(torch.uint8))


# fp8, one scale for all.


def per_tensor(w_uk: torch.Tensor, fp8: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """vLLM's rounding, one step after another: each in the weights' own dtype but for the scale's reciprocal."""
    largest = torch.finfo(fp8).max
    low, high = w_uk.aminmax()
    magnitude = torch.maximum(low.abs(), high.abs()).clamp(min=1e-10)
    factor = largest / magnitude
    assert factor.dtype is w_uk.dtype
    product = w_uk * factor
    assert product.dtype is w_uk.dtype
    return product.clamp(-largest, largest).to(fp8), factor.float().reciprocal()


@pytest.mark.parametrize("fp8", FP8, ids=str)
@pytest.mark.parametrize("dtype", MODEL.values(), ids=MODEL)
def test_fp8_is_rounded_as_vllm_does(dtype, fp8):
    for seed in range(20):
        w_uk = draw(3, 32, 48, dtype=dtype, seed=seed)
        codes, (expected, scale) = quantized(w_uk, "fp8", fp8), per_tensor(w_uk, fp8)
        assert same_codes(codes.w_uk, expected)
        assert codes.scale.dtype is torch.float32
        assert codes.scale.tolist() == [scale.item()] * 3, "one for each head, all the same"


@pytest.mark.parametrize("fp8", FP8, ids=str)
def test_fp8_with_every_mantissa_of_the_largest_weight(fp8):
    """The factor is rounded to bf16 and so is the product, which may pass the largest code: it is cut off there."""
    above = 0
    for mantissa in range(128):
        w_uk = draw(1, 16, 16, seed=mantissa)
        w_uk[0, 3, 5] = (-1) ** mantissa * (1 + mantissa / 128)
        codes, (expected, scale) = quantized(w_uk, "fp8", fp8), per_tensor(w_uk, fp8)
        assert same_codes(codes.w_uk, expected)
        assert codes.scale.item() == scale.item()
        assert codes.w_uk.float().abs().max() <= torch.finfo(fp8).max
        above += bool((w_uk * (torch.finfo(fp8).max / w_uk.abs().amax())).abs().max() > torch.finfo(fp8).max)
    assert above, "no product passed the largest code: the clamp is not tested"


@pytest.mark.parametrize("dtype", MODEL.values(), ids=MODEL)
@pytest.mark.parametrize("largest", [0.0, 2.0**-24, 2.0**-14, 0.005, 0.0068, 0.007, 1.0, 60000.0])
def test_fp8_holds_weights_of_any_size(dtype, largest):
    """fp16 does not hold the factor of small weights: it stops at its largest number, and the weights keep what fp8 gives them."""
    w_uk = (torch.linspace(-1, 1, 16 * 16).reshape(1, 16, 16) * largest).to(dtype)
    found = values(quantized(w_uk, "fp8"))
    assert found.isfinite().all()
    # Half a unit in the last of three places, of a subnormal code, and of what the scale and the product lost.
    step = 2.0**-10 * max(quantized(w_uk, "fp8").scale.item(), 2.0**-24)
    assert ((found - w_uk.double()).abs() <= w_uk.double().abs() * (2.0**-4 + 2.0**-6) + step).all()


# fp8 in blocks.


def per_block(w_uk: torch.Tensor, fp8: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """DeepGEMM's rounding, block after block: scale = amax / largest, codes by its reciprocal, all in fp32."""
    heads, nope_dim, lora_rank = w_uk.shape
    rows, largest = math.gcd(nope_dim, 128), torch.finfo(fp8).max
    codes = torch.empty(w_uk.shape, dtype=fp8)
    scale = torch.empty(heads, nope_dim // rows, -(-lora_rank // 128))
    for head in range(heads):
        for row in range(scale.shape[1]):
            for column in range(scale.shape[2]):
                place = (head, slice(row * rows, (row + 1) * rows), slice(column * 128, (column + 1) * 128))
                block = w_uk[place].float()
                scale[head, row, column] = block.abs().max().clamp(min=1e-4) / largest
                codes[place] = (block * (1.0 / scale[head, row, column])).to(fp8)
    return codes, scale


@pytest.mark.parametrize("fp8", FP8, ids=str)
@pytest.mark.parametrize("dtype", MODEL.values(), ids=MODEL)
@pytest.mark.parametrize(("nope_dim", "lora_rank"), [(128, 512), (192, 512), (64, 64), (96, 160), (256, 576)])
def test_fp8_blocks_are_rounded_as_deepgemm_does(dtype, fp8, nope_dim, lora_rank):
    w_uk = draw(2, nope_dim, lora_rank, dtype=dtype)
    w_uk[0] *= torch.linspace(0.25, 4, lora_rank).to(dtype)  # blocks of other sizes side by side
    w_uk[1, :32, :128] = 0
    codes, (expected, scale) = quantized(w_uk, "fp8-block", fp8), per_block(w_uk, fp8)
    assert same_codes(codes.w_uk, expected)
    assert torch.equal(codes.scale, scale)


@pytest.mark.parametrize("fp8", FP8, ids=str)
def test_fp8_blocks_with_every_mantissa_of_the_largest_weight(fp8):
    """The reciprocal may be rounded up: the largest weight still becomes the largest code, none becomes NaN."""
    w_uk = torch.zeros(128, 32, 128, dtype=torch.bfloat16)
    w_uk[:, 7, 99] = 1 + torch.arange(128).to(torch.bfloat16) / 128
    codes = quantized(w_uk, "fp8-block", fp8)
    assert same_codes(codes.w_uk, per_block(w_uk, fp8)[0])
    assert codes.w_uk.float()[:, 7, 99].tolist() == [torch.finfo(fp8).max] * 128


def test_fp8_blocks_of_almost_nothing():
    """Below 1e-4 a block has the scale of 1e-4; zeros are zeros."""
    codes = quantized(torch.full((1, 32, 128), 2.0**-20, dtype=torch.bfloat16), "fp8-block")
    assert codes.scale.item() == pytest.approx(1e-4 / 448, rel=1e-6)
    assert values(codes).mean().item() == pytest.approx(2.0**-20, rel=2.0**-4)
    assert not quantized(torch.zeros(1, 32, 128, dtype=torch.bfloat16), "fp8-block").w_uk.float().any()


# mxfp4.


def e2m1_by_bits(x: torch.Tensor) -> torch.Tensor:
    """Codes of fp32 values as AITER makes them: of the bits, with a bias, or by the addition that rounds at a fixed place."""
    bits = x.view(torch.int32).long() & 0xFFFFFFFF
    sign, bits = bits >> 31, bits & 0x7FFFFFFF
    magnitude = bits.int().view(torch.float32)
    odd = bits >> 22 & 1
    normal = (bits - (126 << 23) + (1 << 21) - 1 + odd) >> 22
    place = 126 + 22 + 1 << 23  # 2^22: its last place is a half
    offset = torch.tensor(place, dtype=torch.int32).view(torch.float32)
    subnormal = (magnitude + offset).view(torch.int32).long() - place
    code = torch.where(magnitude >= 6, 7, torch.where(magnitude < 1, subnormal, normal))
    return (code | sign << 3).to(torch.uint8)


def mx_groups(groups: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes [N,32] and e8m0 bytes [N] of groups [N,32], fp32, in AITER's steps."""
    largest = groups.abs().amax(-1)
    power = ((largest.view(torch.int32) + 0x200000) & 0x7F800000).view(torch.float32)
    exponent = (torch.log2(power.double()).floor() - 2).clamp(-127, 127)
    scaled = (groups.double() * torch.exp2(-exponent)[:, None]).float()  # exact: a power of two
    return e2m1_by_bits(scaled), (exponent + 127).to(torch.uint8)


def assert_mxfp4(groups: torch.Tensor) -> None:
    """groups [N,32], bf16: each becomes a column of 32 rows."""
    assert len(groups) % 16 == 0
    w_uk = groups.mT.reshape(1, 32, -1)
    for first in range(0, w_uk.shape[2], 2048):
        part = w_uk[..., first : first + 2048]
        ours = quantized(part, "mxfp4")
        codes, exponents = mx_groups(part[0].mT.float())
        assert torch.equal(ours.scale[0, 0], exponents)
        assert torch.equal(ours.w_uk[0], (codes[:, 0::2] | codes[:, 1::2] << 4).mT), "row 2i in the low nibble"


def finite_bf16() -> torch.Tensor:
    every = torch.arange(1 << 16).to(torch.int16).view(torch.bfloat16)
    return every[every.isfinite()]


def test_mxfp4_of_every_number_alone_in_its_group():
    """Each bf16 number as the largest, both signs, subnormals and zeros among them.

    From 1.75 * 2^127 on AITER takes the group's power of two for infinite and gives its codes two bits less; values that round
    beyond what fp32 holds are no weights.
    """
    every = finite_bf16()
    every = every[every.abs().float() < 1.75 * 2.0**127]
    groups = torch.zeros(len(every) + -len(every) % 16, 32, dtype=torch.bfloat16)
    groups[torch.arange(len(every)), torch.arange(len(every)) % 32] = every
    assert_mxfp4(groups)


@pytest.mark.parametrize("largest", [1.0, 1.7421875, 1.75, 1.9921875, -(2.0**-126), 2.0**-133, 1.5 * 2**127])
def test_mxfp4_of_every_number_in_a_group(largest):
    """Every bf16 number up to the largest of a group, at each of which codes round: ties, what saturates, what vanishes."""
    every = finite_bf16()
    every = every[every.abs() <= abs(largest)]
    count = -(-len(every) // 31)
    groups = torch.zeros(count + -count % 16, 32, dtype=torch.bfloat16)
    groups[:, 31] = largest
    flat = torch.zeros(groups.shape[0] * 31, dtype=torch.bfloat16)
    flat[: len(every)] = every
    groups[:, :31] = flat.view(-1, 31)
    assert_mxfp4(groups)


@given(st.integers(0, 2**32 - 1), st.integers(-120, 100), st.integers(0, 12))
def test_mxfp4_of_any_group(seed, power, binades):
    x = torch.ldexp(draw(16, 32, seed=seed, binades=binades).float(), torch.tensor(power)).to(torch.bfloat16)
    assert_mxfp4(x)


def test_mxfp4_by_hand():
    """A group whose largest is 4 has the scale 1, one whose largest is 7 has 2, since 7 is nearer to 8 than to 6; ties to even."""
    column = torch.zeros(32)
    column[:10] = torch.tensor([4.0, 0.25, 0.75, 1.25, 1.75, 2.5, 3.5, -0.25, -0.3, 5.0])
    other = torch.zeros(32)
    other[:3] = torch.tensor([7.0, -7.0, 1.0])
    saturated = torch.zeros(32)
    saturated[:2] = torch.tensor([6.96875, -5.0])  # below 7: the scale stays, and the largest code is 6
    w_uk = torch.stack([column, other, saturated, *[torch.zeros(32)] * 13], 1)[None].to(torch.bfloat16)
    codes = quantized(w_uk, "mxfp4")
    assert codes.scale[0, 0, :4].tolist() == [E8M0_BIAS, E8M0_BIAS + 1, E8M0_BIAS, 0]
    found = values(codes)[0]
    assert found[:10, 0].tolist() == [4.0, 0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 0.0, -0.5, 4.0]
    assert found[:3, 1].tolist() == [8.0, -8.0, 1.0]
    assert found[:2, 2].tolist() == [6.0, -4.0]
    assert not found[:, 3:].any()


# What no code holds.


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("weight", ["fp8", "fp8-block", "mxfp4"])
def test_weights_that_are_not_finite_are_refused(weight, bad):
    w_uk = draw(1, 32, 16)
    w_uk[0, 31, 15] = bad
    with pytest.raises(ArgumentError, match=rf"^w_uk: it has weights that are not finite, which {weight} codes cannot hold"):
        quantized(w_uk, weight)


# kv_b_proj.


def checkpoint(heads: int, width: int, columns: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A kv_b_proj in blocks of 128 x 128, its scales, all different, and the matrix that they stand for, in fp64."""
    rows = heads * width
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)).to(FN)
    shape = -(-rows // 128), -(-columns // 128)
    scale = torch.arange(1, math.prod(shape) + 1).reshape(shape).float() / 64
    whole = scale.double().repeat_interleave(128, 0)[:rows].repeat_interleave(128, 1)[:, :columns]
    return weight, scale, weight.double() * whole


@pytest.mark.parametrize(
    ("heads", "nope_dim", "value_dim", "columns"),
    [(4, 128, 128, 512), (3, 192, 256, 512), (5, 64, 64, 192), (2, 32, 96, 128), (3, 192, 192, 80)],
)
def test_a_checkpoint_is_split_without_a_change(heads, nope_dim, value_dim, columns):
    weight, scale, whole = checkpoint(heads, nope_dim + value_dim, columns)
    w_uk, scales = split_kv_b_proj(weight, scale, heads, nope_dim)
    assert w_uk.data_ptr() == weight.data_ptr(), "a view"
    assert w_uk.shape == (heads, nope_dim, columns)
    assert scales.shape == (heads, nope_dim // math.gcd(nope_dim, 128), -(-columns // 128))
    expected = whole.view(heads, nope_dim + value_dim, columns)[:, :nope_dim]
    assert torch.equal(dequantize_weights(w_uk.double(), scales), expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"heads": 3}, r"^weight: shape \[1024, 512\], expected \[3 \* \(128 \+ V\), L\]"),
        ({"heads": 0}, r"^weight: shape \[1024, 512\], expected \[0 \* "),
        ({"nope_dim": 256}, r"^weight: shape \[1024, 512\], expected \[4 \* \(256 \+ V\), L\]"),
        ({"weight": torch.zeros(4, 256, 512)}, r"^weight: shape \[4, 256, 512\], expected"),
        ({"scale": torch.zeros(8, 5)}, r"^scale: shape \[8, 5\], expected \[8, 4\]: one for 128 x 128"),
        ({"scale": torch.zeros(4, 8, 4)}, r"^scale: shape \[4, 8, 4\], expected \[8, 4\]"),
        # Heads of 352 rows, P = 192: blocks of the second head end inside of 64 rows.
        (
            {"heads": 2, "nope_dim": 192, "weight": torch.zeros(704, 128), "scale": torch.zeros(6, 1)},
            r"^weight: heads of 352 rows put the borders of its blocks inside of 64 rows; dequantise it",
        ),
    ],
    ids=lambda value: str(sorted(value)) if isinstance(value, dict) else "",
)
def test_a_checkpoint_that_does_not_fit_is_refused(arguments, message):
    weight, scale, _ = checkpoint(4, 256, 512)
    with pytest.raises(ArgumentError, match=message):
        split_kv_b_proj(**{"weight": weight, "scale": scale, "heads": 4, "nope_dim": 128, **arguments})
