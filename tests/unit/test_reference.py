"""The oracle against values worked out by hand, and its bounds against what it must allow and what it must not."""

import dataclasses
import math

import pytest
import torch

from mlagen.dtypes import DType
from mlagen.ir import Concat, GroupScale, Program, QAbsorb, Quantize, Rope, RowScale, TensorType
from mlagen.reference import (
    Bounded,
    _quantize,
    _row_scale,
    dequantize_weights,
    evaluate,
    quantize_activation,
    saturating_fp8,
)
from mlagen.spec import PrologueSpec
from mlagen.target import find_target
from mlagen.torch_types import torch_dtype

BF16, FP16, FP32, FN, FNUZ = DType.BF16, DType.FP16, DType.FP32, DType.E4M3FN, DType.E4M3FNUZ


def value(stage, **inputs: torch.Tensor | None) -> Bounded:
    """What the oracle says of one stage."""
    return evaluate(Program("test", (), (stage,), (stage.output,)), inputs)[stage.output]


def rope(x: list[float], table: list[list[float]], position: int, style: str, dtype: DType = FP32) -> list[float]:
    rows = torch.tensor([x])
    stage = Rope("y", "x", "table", "positions", style, dtype)
    return value(stage, x=rows, table=torch.tensor(table), positions=torch.tensor([position])).exact[0].tolist()


def test_absorb_is_a_product_for_each_head():
    q = torch.tensor([[[1.0, 2.0], [3.0, 4.0]]])  # [T=1, H=2, P=2]
    w = torch.tensor([[[1.0, 0.0, 2.0], [0.0, 1.0, 3.0]], [[5.0, 0.0, 0.0], [0.0, 0.0, 7.0]]])  # [H, P, L=3]
    got = value(QAbsorb("y", "q", "w", FP32), q=q, w=w)
    assert got.exact.tolist() == [[[1.0, 2.0, 8.0], [15.0, 0.0, 28.0]]]


# Codes


def test_codes_times_the_scale_of_their_head():
    codes = torch.tensor([[[1.0, 2.0], [3.0, -4.0]], [[1.0, 0.5], [0.0, -0.0]]])
    found = dequantize_weights(codes.double(), torch.tensor([2.0, -0.5]))
    assert found.tolist() == [[[2.0, 4.0], [6.0, -8.0]], [[-0.5, -0.25], [0.0, 0.0]]]


@pytest.mark.parametrize(("nope_dim", "lora_rank", "rows"), [(256, 256, 128), (192, 160, 64), (96, 80, 32)])
def test_codes_times_the_scale_of_their_block(nope_dim, lora_rank, rows):
    columns = -(-lora_rank // 128)
    scale = torch.arange(1.0, 2 * nope_dim // rows * columns + 1).reshape(2, nope_dim // rows, columns)
    found = dequantize_weights(torch.ones(2, nope_dim, lora_rank, dtype=torch.float64), scale)
    assert found.shape == (2, nope_dim, lora_rank)
    for head, p, column in ((0, 0, 0), (0, rows - 1, min(127, lora_rank - 1)), (1, rows, 0), (1, nope_dim - 1, lora_rank - 1)):
        assert found[head, p, column] == scale[head, p // rows, column // 128]


def test_e2m1_codes_and_their_powers_of_two():
    """All sixteen codes in a column, twice; the scales end at 2^-127 and 2^127, and 255 is NaN."""
    pairs = torch.tensor([low | (low + 1) << 4 for low in range(0, 16, 2)] * 2, dtype=torch.uint8)
    scale = torch.tensor([[[0, 127, 128, 254, 255]]], dtype=torch.uint8)
    found = dequantize_weights(pairs.view(1, 16, 1).expand(1, 16, 5), scale)
    magnitudes = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    column = torch.tensor([*magnitudes, *(-each for each in magnitudes)] * 2, dtype=torch.float64)
    for place, factor in enumerate((2.0**-127, 1.0, 2.0, 2.0**127)):
        assert torch.equal(found[0, :, place], column * factor)
    assert found[0, :, 4].isnan().all()


# fp8 activations


@pytest.mark.parametrize("dtype", [FN, FNUZ])
@pytest.mark.parametrize("width", [16, 128, 208, 512])
def test_a_groups_largest_value_becomes_the_largest_code(dtype, width):
    q = torch.randn(5, 3, width, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    found = quantize_activation(q.double(), dtype)
    assert found.shape == q.shape
    for first in range(0, width, 128):
        x, y = q[..., first : first + 128].double(), found[..., first : first + 128]
        scale = (x.abs().amax(-1, keepdim=True).float() * torch.tensor(1 / dtype.largest, dtype=torch.float32)).double()
        codes = y / scale
        assert torch.equal(codes.abs().amax(-1), torch.full((5, 3), dtype.largest).double())
        assert torch.equal(codes, codes.float().to(torch_dtype(dtype)).double()), "codes that fp8 has"
        assert ((x - y).abs() <= x.abs() * 2.0**-4 * (1 + 2.0**-20) + scale * 2.0**-10).all(), "the nearest of them"


def test_groups_of_activations_do_not_see_each_other():
    q = torch.ones(1, 208)
    q[0, :128] = 1000.0
    q[0, 128:] = 2.0**-20
    assert quantize_activation(q, FN)[0].tolist() == pytest.approx([1000.0] * 128 + [2.0**-20] * 80, rel=1e-6)


def test_activations_that_are_no_numbers():
    """NaN stays in its place and counts for no scale; an infinity has an infinite scale, of which no code is a number."""
    q = torch.ones(3, 256)
    q[0, 5] = math.nan
    q[1, 130] = -math.inf
    q[2] = math.nan
    found = quantize_activation(q, FN)
    assert found[0].isnan().nonzero().tolist() == [[5]]
    assert found[0, :5].tolist() == pytest.approx([1.0] * 5, rel=1e-6)
    assert not found[1, :128].isnan().any()
    assert found[1, 128:].isnan().all()
    assert found[2].isnan().all()


def test_activations_of_zero_have_a_scale():
    assert torch.equal(quantize_activation(torch.zeros(2, 128), FNUZ), torch.zeros(2, 128, dtype=torch.float64))
    # Below the least magnitude a group loses places, but not its sign or its size.
    tiny = quantize_activation(torch.full((1, 128), -(2.0**-35)), FN)
    assert tiny[0, 0].item() == pytest.approx(-(2.0**-35), rel=2.0**-4)


@pytest.mark.parametrize("arch", ["gfx942", "gfx950"])
@pytest.mark.parametrize("dims", [(128, 512), (192, 512)], ids=str)
def test_what_fp8_activations_cost(arch, dims):
    """On normal data ql_nope is off by 1 to 4 % of its norm, which PrologueSpec's documentation puts at about 2.5 %."""
    target = find_target(arch)
    spec = PrologueSpec(heads=2, nope_dim=dims[0], lora_rank=dims[1], rope_dim=0, rope_style="none", weight="fp8", compute="a8")
    generator = torch.Generator().manual_seed(0)
    w_uk = torch.randn(2, *dims, generator=generator).to(torch_dtype(target.fp8))
    inputs = {
        "q_nope": torch.randn(64, 2, dims[0], generator=generator).to(torch.bfloat16),
        "w_uk": w_uk,
        "w_scale": torch.full((2,), 0.01),
        "kv_c": torch.zeros(64, dims[1], dtype=torch.bfloat16),
    }
    results = [
        evaluate(dataclasses.replace(spec, compute=compute).program(target), inputs)["ql_nope"].exact for compute in ("a8", "a16")
    ]
    assert 0.01 < ((results[0] - results[1]).norm() / results[1].norm()).item() < 0.04
    assert "about 2.5 %" in PrologueSpec.__doc__


def test_gptj_rotates_neighbours_and_neox_halves():
    table = [[9.0, 9.0, 9.0, 9.0], [0.0, 1.0, 1.0, 0.0]]  # position 1: cos 0, 1 and sin 1, 0: a quarter turn, and none
    assert rope([1.0, 2.0, 3.0, 4.0], table, 1, "gptj") == [-2.0, 1.0, 3.0, 4.0]
    assert rope([1.0, 2.0, 3.0, 4.0], table, 1, "neox") == [-3.0, 2.0, 1.0, 4.0]


def test_rope_turns_by_the_angle():
    angle = 0.3
    table = [[math.cos(angle), math.sin(angle)]]
    x, y = rope([math.cos(1.0), math.sin(1.0)], table, 0, "gptj")
    assert (x, y) == pytest.approx((math.cos(1.3), math.sin(1.3)), rel=1e-6)


@pytest.mark.parametrize(("position", "row"), [(-1, 0), (-(2**62), 0), (0, 0), (1, 1), (2, 1), (2**62, 1)])
def test_positions_are_clamped(position, row):
    assert rope([1.0, 0.0], [[10.0, 0.0], [11.0, 0.0]], position, "neox") == [10.0 + row, 0.0]


def test_rope_of_heads_shares_the_position_of_the_token():
    x = torch.tensor([[[1.0, 0.0], [2.0, 0.0]], [[3.0, 0.0], [4.0, 0.0]]])  # [T=2, H=2, R=2]
    table = torch.tensor([[10.0, 0.0], [100.0, 0.0]])
    got = value(Rope("y", "x", "table", "positions", "gptj", FP32), x=x, table=table, positions=torch.tensor([1, 0]))
    assert got.exact[..., 0].tolist() == [[100.0, 200.0], [30.0, 40.0]]


def test_concat_joins_columns():
    got = value(Concat("y", "a", "b"), a=torch.ones(2, 3), b=torch.zeros(2, 1))
    assert got.exact.tolist() == [[1.0, 1.0, 1.0, 0.0]] * 2


@pytest.mark.parametrize(("dtype", "limit"), [(FN, 448.0), (FNUZ, 240.0)])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_fp8_saturates_and_keeps_nan(dtype, limit, sign):
    x = torch.tensor([limit, limit + 1, 1e30, math.inf, 100.0]) * sign
    assert saturating_fp8(x, dtype).double().tolist() == [sign * each for each in (limit, limit, limit, limit, 104.0 - 8.0)]
    assert saturating_fp8(x, dtype, 96.0).double().tolist() == [sign * 96.0] * 5
    assert saturating_fp8(torch.tensor([math.nan]), dtype).double().isnan().all()


def test_quantize_multiplies_by_the_rounded_reciprocal():
    """Next to the midpoints of two codes x * (1 / scale) and x / scale round differently for some x."""
    scale = torch.tensor(0.0213)
    codes = torch.arange(0x7F).to(torch.uint8).view(torch.float8_e4m3fn).float()
    midpoints = (codes[1:] + codes[:-1]) / 2 * scale
    x = (midpoints.view(torch.int32)[:, None] + torch.arange(-3, 4, dtype=torch.int32)).view(torch.float32).reshape(-1)
    product, quotient = (each.to(torch.float8_e4m3fn).float() for each in (x * (1 / scale), x / scale))
    assert (product != quotient).any(), "no value tells them apart"
    got = value(Quantize("y", "x", FN, "scale"), x=x, scale=scale)
    assert torch.equal(got.exact.float(), product)


def test_no_scale_is_one():
    x = torch.tensor([1.0, 3.3, -7.0])
    for scale in (None, torch.tensor(1.0), torch.tensor([1.0])):
        got = value(Quantize("y", "x", FN, "scale"), x=x, scale=scale)
        assert got.exact.float().tolist() == [1.0, 3.25, -7.0]


@pytest.mark.parametrize(("dtype", "rounded"), [(BF16, 1.0078125), (FP16, 1.0048828125), (FP32, 1.005)])
def test_stages_round_to_their_type(dtype, rounded):
    x = torch.tensor([[1.005, 0.0]], dtype=torch.float64)
    got = value(
        Rope("y", "x", "table", "positions", "gptj", dtype), x=x, table=torch.tensor([[1.0, 0.0]]), positions=torch.tensor([0])
    )
    assert got.exact[0, 0] == rounded


def test_certain_values_have_no_range():
    """What no arithmetic touches before its conversion must come out exactly, ties included."""
    x = torch.arange(1 << 16).to(torch.int16).view(torch.bfloat16)
    for scale in (None, torch.tensor(0.037)):
        got = value(Quantize("y", "x", FN, "scale"), x=x, scale=scale)
        for end in (got.low, got.high):
            assert torch.equal(end.view(torch.uint8), got.exact.view(torch.uint8))


@pytest.mark.parametrize("rounding", ["fused", "stepwise"])
def test_the_range_holds_any_order_of_summation(rounding):
    """Sums in fp32, forwards, backwards and shuffled: inside, and the range is a few codes wide at most."""
    generator = torch.Generator().manual_seed(0)
    spec = PrologueSpec(
        heads=2, nope_dim=512, lora_rank=64, rope_dim=0, rope_style="none", q_dtype="bf16", kv_dtype="bf16", rounding=rounding
    )
    inputs = {
        "q_nope": torch.randn(3, 2, 512, generator=generator).bfloat16(),
        "w_uk": torch.randn(2, 512, 64, generator=generator).bfloat16(),
        "kv_c": torch.zeros(3, 64).bfloat16(),
    }
    got = evaluate(spec.program(find_target("gfx942")), inputs)["q_out"]
    for order in (torch.arange(512), torch.arange(511, -1, -1), torch.randperm(512, generator=generator)):
        total = torch.zeros(3, 2, 64)
        for p in order.tolist():
            total += inputs["q_nope"][:, :, p, None].float() * inputs["w_uk"][None, :, p].float()
        assert ((got.low <= total.bfloat16()) & (total.bfloat16() <= got.high)).all()
    exact = torch.einsum("thp,hpl->thl", inputs["q_nope"].double(), inputs["w_uk"].double())
    assert torch.equal(got.exact, exact.float().bfloat16())
    large = exact.abs() > 16
    assert large.any()
    assert (((got.high.double() - got.low.double()) / exact.abs())[large] <= 2.0**-6).all()


@pytest.mark.parametrize(("rope_dim", "rope_style"), [(0, "none"), (2, "none"), (2, "gptj"), (2, "neox")])
@pytest.mark.parametrize("kv_dtype", ["fp8", "bf16"])
def test_infinities_are_explained(rope_dim, rope_style, kv_dtype):
    """They saturate in fp8 and stay in bf16, and the range is that value alone."""
    spec = PrologueSpec(
        heads=1, nope_dim=16, lora_rank=16, rope_dim=rope_dim, rope_style=rope_style, kv_dtype=kv_dtype, q_dtype="bf16",
        weight="none",
    )  # fmt: skip
    latent = torch.zeros(1, 16, dtype=torch.bfloat16)
    latent[0, :3] = torch.tensor([math.inf, -math.inf, math.nan])
    pe = torch.tensor([[math.inf, 1.0]])[:, :rope_dim].bfloat16()
    inputs = {
        "q_nope": latent.unsqueeze(1),
        "q_pe": pe.unsqueeze(1),
        "kv_c": latent,
        "k_pe": pe,
        "cos_sin_cache": torch.ones(1, rope_dim, dtype=torch.bfloat16),
        "positions": torch.zeros(1, dtype=torch.int64),
    }
    got = evaluate(spec.program(find_target("gfx950")), inputs)
    for name, largest in (("kv_entry", 448.0 if kv_dtype == "fp8" else math.inf), ("q_out", math.inf)):
        for end in (got[name].low, got[name].exact, got[name].high):
            row = end.double().reshape(-1)
            assert row[:2].tolist() == [largest, -largest]
            assert row[2].isnan()
            assert row[16:].tolist() == ([largest, 1.0 if rope_style == "none" else largest] if rope_dim else [])


def test_the_inputs_types_are_those_of_the_program():
    """A program's CacheWrite is the row that it writes: the oracle needs no cache."""
    spec = PrologueSpec(heads=1, nope_dim=16, lora_rank=16, rope_dim=0, rope_style="none", weight="none")
    program = spec.program(find_target("gfx942"))
    assert TensorType(("N", 16), FNUZ) in dict(program.inputs).values()
    inputs = {"q_nope": torch.ones(2, 1, 16).bfloat16(), "kv_c": torch.full((2, 16), 3.0).bfloat16(), "q_scale": None}
    values = evaluate(program, inputs)
    assert values["kv_cache_written"] is values["kv_entry"]
    assert values["kv_entry"].exact.float().tolist() == [[3.0] * 16] * 2


@pytest.mark.parametrize(
    ("values", "scale"),
    [
        ([336.0, 1.0], 1.0),  # vLLM's own example: 0.75 becomes 1
        ([448.0, -448.0], 1.0),
        ([-449.0, 0.0], 2.0),
        ([448.0 * 2.0**100, 1.0], 2.0**100),
        ([0.0, -0.0], 2.0**-13),
        ([448.0 * 2.0**-13, 0.0], 2.0**-13),
        ([449.0 * 2.0**-13, 0.0], 2.0**-12),
        ([math.nan, 3.0], 2.0**-7),
        ([math.nan, math.nan], 2.0**-13),
        ([math.inf, 1.0], math.inf),
    ],
)
def test_a_group_scale_is_the_next_power_of_two(values, scale):
    stage = GroupScale("s", "x", 2, 448.0, 2.0**-13)
    got = value(stage, x=torch.tensor([[7.0, 7.0, *values]]))
    assert got.exact.tolist() == got.low.tolist() == got.high.tolist() == [[2.0**-6, scale]]


def test_codes_take_the_scale_of_their_group():
    stage = Quantize("y", "x", FN, "s")
    x, scales = torch.tensor([[1.0, 3.0, 5.0, 900.0]]), torch.tensor([[0.5, 2.0]])
    assert value(stage, x=x, s=scales).exact.float().tolist() == [[2.0, 6.0, 2.5, 448.0]]


@pytest.mark.parametrize(
    ("values", "scale"),
    [
        ([448.0, -1.0], 1.0),
        ([1.0, -896.0], 2.0),
        ([1.0, 0.0], float(torch.tensor(1.0) / 448.0)),
        ([0.0, -0.0], 2.0**-126),
        ([2.0**-120, 0.0], 2.0**-126),
        ([math.nan, 448.0], 1.0),
        ([math.nan, math.nan], 2.0**-126),
        ([-math.inf, math.nan], math.inf),
    ],
)
def test_a_row_scale_is_the_largest_magnitude_over_the_limit(values, scale):
    got = value(RowScale("s", "x", 448.0), x=torch.tensor([[[7.0, 3.0], values]]))
    assert got.exact.tolist() == got.low.tolist() == got.high.tolist() == [[1.0 / 64, scale]]


def test_codes_take_the_scale_of_their_row():
    x, scales = torch.tensor([[[1.0, 3.0], [5.0, -900.0]]]), torch.tensor([[0.5, 2.0]])
    got = value(Quantize("y", "x", FN, "s"), x=x, s=scales)
    assert got.exact.float().tolist() == got.low.float().tolist() == [[[2.0, 6.0], [2.5, -448.0]]]


def uncertain(low: list[float], exact: list[float], high: list[float]) -> Bounded:
    return Bounded(*(torch.tensor([[each]], dtype=torch.float64) for each in (low, exact, high)))


def test_the_bounds_of_a_row_scale_are_those_of_its_largest_values():
    """Of what may be zero nothing is sure; a small value that may be large counts as far as it may go."""
    x = uncertain([-2.0, 1.0, math.nan, -9.0], [-1.0, 3.0, math.nan, -5.0], [1.0, 4.0, math.nan, -4.5])
    got = _row_scale(RowScale("s", "x", 0.5), {"x": x})
    assert [end.item() for end in (got.low, got.exact, got.high)] == [9.0, 10.0, 18.0]
    several = uncertain([-2.0, 3.0], [0.0, 3.5], [5.0, 4.0])
    got = _row_scale(RowScale("s", "x", 1.0), {"x": several})
    assert [end.item() for end in (got.low, got.exact, got.high)] == [3.0, 3.5, 5.0]


def test_codes_of_an_uncertain_scale_hold_every_product():
    """Whatever value and scale a kernel has within their bounds, its code is within those of the code, and not much else is."""
    generator = torch.Generator().manual_seed(0)
    exact = torch.randn(50, 3, 16, generator=generator, dtype=torch.float64) * 100
    x = Bounded(exact - 0.5, exact, exact + 0.5)
    values = {"x": x, "s": _row_scale(RowScale("s", "x", 448.0), {"x": x})}
    stage = Quantize("y", "x", FN, "s")
    got = _quantize(stage, values)
    for _ in range(20):
        taken = (exact + torch.rand(exact.shape, generator=generator, dtype=torch.float64) - 0.5).float()
        scale = taken.abs().amax(-1) / 448.0
        codes = saturating_fp8(taken * (1.0 / scale)[..., None], FN).double()
        assert (codes >= got.low.double()).all()
        assert (codes <= got.high.double()).all()
    wide = got.high.double() - got.low.double()
    assert (wide <= 0.2 * exact.abs() * 448 / exact.abs().amax(-1, keepdim=True) + 16).all()
