"""The IR: what verify() infers, how a program prints, and every program that verify() or lower() refuses."""

import dataclasses
from typing import Any

import pytest

from mlagen.dtypes import DType
from mlagen.errors import ProgramError
from mlagen.ir import CacheWrite, Concat, GroupScale, Program, QAbsorb, Quantize, Rope, RowScale, TensorType
from mlagen.lowering import lower
from mlagen.spec import PrologueSpec
from mlagen.target import find_target

BF16, FP16, FP32, FN, I64 = DType.BF16, DType.FP16, DType.FP32, DType.E4M3FN, DType.INT64
E2M1, E8M0 = DType.E2M1, DType.E8M0

INPUTS = {
    "q_nope": TensorType(("T", "H", 128), BF16),
    "w_uk": TensorType(("H", 128, 512), BF16),
    "q_pe": TensorType(("T", "H", 64), BF16),
    "cos_sin_cache": TensorType(("X", 64), BF16),
    "positions": TensorType(("T",), I64),
    "q_scale": TensorType((), FP32),
    "kv_c": TensorType(("T", 512), BF16),
    "k_pe": TensorType(("T", 64), BF16),
    "k_scale": TensorType((), FP32),
    "slot_mapping": TensorType(("T",), I64),
    "kv_cache": TensorType(("N", 576), FN),
}
ABSORB = QAbsorb("ql_nope", "q_nope", "w_uk", FP32)
Q_ROPE = Rope("q_rotated", "q_pe", "cos_sin_cache", "positions", "gptj", FP32)
Q_ROW = Concat("q_row", "ql_nope", "q_rotated")
Q_OUT = Quantize("q_out", "q_row", FN, "q_scale")
K_ROPE = Rope("k_rotated", "k_pe", "cos_sin_cache", "positions", "gptj", FP32)
KV_ROW = Concat("kv_row", "kv_c", "k_rotated")
ENTRY = Quantize("kv_entry", "kv_row", FN, "k_scale")
WRITE = CacheWrite("written", "kv_entry", "kv_cache", "slot_mapping")

SCALES = GroupScale("scales", "kv_c", 128, 448.0, 2.0**-13)
CODES = Quantize("codes", "kv_c", FN, "scales")
CODES_WRITE = CacheWrite("codes_written", "codes", "kv_cache", "slot_mapping")
SCALES_WRITE = CacheWrite("scales_written", "scales", "kv_cache", "slot_mapping", column=512)
SCALED = (SCALES, CODES, CODES_WRITE, SCALES_WRITE)
BYTES = TensorType(("N", 656), DType.UINT8)

ROW_SCALES = RowScale("q_scales", "q_row", 448.0)
TOKEN_OUT = Quantize("q_out", "q_row", FN, "q_scales")
TOKEN_STAGES = (ABSORB, Q_ROPE, Q_ROW, ROW_SCALES, TOKEN_OUT)

Q_STAGES, KV_STAGES = (ABSORB, Q_ROPE, Q_ROW, Q_OUT), (K_ROPE, KV_ROW, ENTRY, WRITE)


def program(stages: Any = Q_STAGES + KV_STAGES, results: Any = ("q_out", "written"), **inputs: TensorType | None) -> Program:
    """A program of `stages` with the inputs that they read; `inputs` changes the type of some, None leaves one out."""
    read = {operand for stage in stages for operand in stage.operands}
    types = {name: inputs.get(name, tensor) for name, tensor in INPUTS.items() if name in read or name in inputs}
    return Program("test", tuple((name, tensor) for name, tensor in types.items() if tensor), tuple(stages), tuple(results))


def with_stage(stage: Any, stages: Any = Q_STAGES + KV_STAGES) -> list[Any]:
    """`stages` with the one of the same output replaced."""
    return [stage if each.output == stage.output else each for each in stages]


def changed(stage: Any, **changes: Any) -> Program:
    return program(with_stage(dataclasses.replace(stage, **changes)))


def scaled(*changes: Any, stages: Any = SCALED, results: Any = ("codes_written", "scales_written"), **inputs: Any) -> Program:
    """A cache of codes with scales of their own, each stage of `changes` in the place of the one of its name."""
    for stage in changes:
        stages = with_stage(stage, stages)
    return program(stages, results, **{"kv_cache": BYTES, **inputs})


CODED = dataclasses.replace(ABSORB, w_scale="w_scale")


def coded(stage: Any = CODED, **inputs: Any) -> Program:
    """W_UK in codes, fp8 with a scale for each head but for what `inputs` says."""
    scale = inputs.pop("w_scale", TensorType(("H",), FP32))
    made = program(with_stage(stage), **{"w_uk": TensorType(("H", 128, 512), FN), **inputs})
    return made if stage.w_scale is None else dataclasses.replace(made, inputs=(*made.inputs, ("w_scale", scale)))


@pytest.mark.parametrize(
    ("weight", "scale", "block"),
    [
        (TensorType(("H", 128, 512), FN), TensorType(("H",), FP32), (128, 512)),
        (TensorType(("H", 128, 512), FN), TensorType(("H", 1, 4), FP32), (128, 128)),
        (TensorType(("H", 128, 80), FN), TensorType(("H", 1, 1), FP32), (128, 128)),
        (TensorType(("H", 192, 576), FN), TensorType(("H", 3, 5), FP32), (64, 128)),
        (TensorType(("H", 128, 512), E2M1), TensorType(("H", 4, 512), E8M0), (32, 1)),
    ],
    ids=str,
)
def test_blocks_of_codes(weight, scale, block):
    types = {"q_nope": TensorType(("T", "H", weight.shape[1]), BF16), "w_uk": weight, "w_scale": scale}
    assert CODED.scale_block(types) == block
    assert CODED.infer(types) == TensorType(("T", "H", weight.shape[2]), FP32)


def test_a_program_shows_what_is_rounded_to_fp8():
    line = "ql_nope = q_absorb(q_nope, w_uk, w_scale, activation=fp8_e4m3fn) : fp32[T, H, 512]"
    shown = str(coded(dataclasses.replace(CODED, activation=FN)))
    assert line in " ".join(shown.split())
    assert lower(coded()).operand_dtype is BF16
    assert lower(coded(dataclasses.replace(CODED, activation=FN))).operand_dtype is FN


def test_types_of_codes_with_scales_of_their_own():
    types = scaled().verify()
    assert {name: str(tensor) for name, tensor in types.items() if name not in INPUTS} == {
        "scales": "fp32[T, 4]",
        "codes": "fp8_e4m3fn[T, 512]",
        "codes_written": "uint8[N, 656]",
        "scales_written": "uint8[N, 656]",
    }
    lines = str(scaled()).splitlines()
    assert "         scales         = group_scale(kv_c, group=128, divisor=448.0, least=0.0001220703125) : fp32[T, 4]" in lines
    assert "         scales_written = cache_write(scales, kv_cache, slot_mapping, column=512) : uint8[N, 656]" in lines


def test_types_of_the_whole_prologue():
    types = program().verify()
    assert {name: str(tensor) for name, tensor in types.items() if name not in INPUTS} == {
        "ql_nope": "fp32[T, H, 512]",
        "q_rotated": "fp32[T, H, 64]",
        "q_row": "fp32[T, H, 576]",
        "q_out": "fp8_e4m3fn[T, H, 576]",
        "k_rotated": "fp32[T, 64]",
        "kv_row": "fp32[T, 576]",
        "kv_entry": "fp8_e4m3fn[T, 576]",
        "written": "fp8_e4m3fn[N, 576]",
    }


def test_types_of_a_query_with_scales_of_its_rows():
    scaled_rows = program(TOKEN_STAGES, ("q_out", "q_scales"))
    types = scaled_rows.verify()
    assert [str(types[name]) for name in ("q_scales", "q_out")] == ["fp32[T, H]", "fp8_e4m3fn[T, H, 576]"]
    assert "row_scale(q_row, divisor=448.0) : fp32[T, H]" in str(scaled_rows)


def test_a_concat_has_the_wider_type():
    mixed = program([dataclasses.replace(ABSORB, dtype=BF16), Q_ROPE, Q_ROW, Q_OUT], ["q_out"])
    assert mixed.verify()["q_row"].dtype is FP32


def test_a_program_prints_its_inputs_stages_and_results():
    text = str(program(with_stage(dataclasses.replace(ENTRY, fp8_max=224.0))))
    lines = [line.rstrip() for line in text.splitlines()]
    assert lines[0] == "program test"
    assert "  input  w_uk          : bf16[H, 128, 512]" in lines
    assert "         q_rotated     = rope(q_pe, cos_sin_cache, positions, style=gptj) : fp32[T, H, 64]" in lines
    assert "         kv_entry      = quantize(kv_row, k_scale, fp8_max=224.0) : fp8_e4m3fn[T, 576]" in lines
    assert lines[-1] == "  result q_out, written"
    assert len(lines) == 2 + len(INPUTS) + len(Q_STAGES + KV_STAGES)


def tensor(*shape: int | str, dtype: DType = BF16) -> TensorType:
    return TensorType(shape, dtype)


# What is wrong: the program, the stage that must be named (None: the program), and a word of the reason.
REJECTED = {
    # order
    "rope after its use": (program([ABSORB, Q_ROW, Q_ROPE, Q_OUT], ["q_out"]), "Concat 'q_row'", "only by a later stage"),
    "an operand of itself": (changed(Q_ROW, b="q_row"), "Concat 'q_row'", "only by a later stage"),
    "an operand of nobody": (changed(Q_ROW, b="q_turned"), "Concat 'q_row'", "by no stage and by no input"),
    "a missing input": (program(w_uk=None), "QAbsorb 'ql_nope'", "by no stage and by no input"),
    "defined twice": (program([ABSORB, ABSORB, Q_ROPE, Q_ROW, Q_OUT], ["q_out"]), "QAbsorb 'ql_nope'", "defined already"),
    "an output called as an input": (
        program([dataclasses.replace(ABSORB, output="q_nope")], ["q_nope"]),
        "QAbsorb 'q_nope'",
        "defined already",
    ),
    "the cache read after its write": (
        program([*KV_STAGES, Quantize("copy", "written", BF16)], ["copy", "written"]),
        "Quantize 'copy'",
        "never read",
    ),
    "no result": (program(results=[]), None, "no result"),
    "a result of nobody": (program(results=["q_out", "written", "q_in"]), None, "'q_in' is no stage's output"),
    "an input as result": (program(results=["q_out", "written", "q_pe"]), None, "'q_pe' is no stage's output"),
    "a stage for nothing": (program(results=["q_out"]), None, "'written' is never read"),
    "an input for nothing": (program(Q_STAGES, ["q_out"], kv_c=INPUTS["kv_c"]), None, "'kv_c' is never read"),
    "a layout of nobody": (changed(WRITE, layout="flat"), "CacheWrite 'written'", "layout 'flat'"),
    # QAbsorb
    "w_uk without heads": (program(w_uk=tensor(128, 512)), "QAbsorb 'ql_nope'", "w_uk [H,P,L]"),
    "q_nope without heads": (program(q_nope=tensor("T", 128)), "QAbsorb 'ql_nope'", "q_nope [T,H,P]"),
    "widths that differ": (program(w_uk=tensor("H", 64, 512)), "QAbsorb 'ql_nope'", "nope width"),
    "heads that differ": (program(w_uk=tensor("G", 128, 512)), "QAbsorb 'ql_nope'", "heads"),
    "types that differ": (program(w_uk=tensor("H", 128, 512, dtype=FP16)), "QAbsorb 'ql_nope'", "one type"),
    "fp8 weights": (program(w_uk=tensor("H", 128, 512, dtype=FN)), "QAbsorb 'ql_nope'", "the product needs one type"),
    # Rope
    "an unknown style": (changed(Q_ROPE, style="yarn"), "Rope 'q_rotated'", "'yarn' is not one of gptj, neox"),
    "an odd width": (program(q_pe=tensor("T", "H", 63)), "Rope 'q_rotated'", "needs pairs"),
    "no width": (program(q_pe=tensor("T", "H", 0)), "Rope 'q_rotated'", "needs pairs"),
    "a table of another width": (program(cos_sin_cache=tensor("X", 32)), "Rope 'q_rotated'", "expected 64 columns"),
    "positions of float": (program(positions=tensor("T", dtype=FP32)), "Rope 'q_rotated'", "expected int32[T] or int64[T]"),
    "positions by head": (program(positions=tensor("T", "H", dtype=I64)), "Rope 'q_rotated'", "expected int32[T]"),
    "a table of integers": (program(cos_sin_cache=tensor("X", 64, dtype=I64)), "Rope 'q_rotated'", "bf16, fp16 or fp32"),
    "a quantised operand": (program(q_pe=tensor("T", "H", 64, dtype=FN)), "Rope 'q_rotated'", "it comes before Quantize"),
    # Concat
    "rows that differ": (changed(KV_ROW, b="q_rotated"), "Concat 'kv_row'", "differ in their rows"),
    # Quantize
    "to an integer": (changed(Q_OUT, dtype=I64), "Quantize 'q_out'", "not an output type"),
    "to fp32": (changed(Q_OUT, dtype=FP32), "Quantize 'q_out'", "not an output type"),
    "a scale for bf16": (changed(Q_OUT, dtype=BF16), "Quantize 'q_out'", "belongs to an fp8 result"),
    "a limit for bf16": (changed(Q_OUT, dtype=BF16, scale=None, fp8_max=224.0), "Quantize 'q_out'", "belongs to an fp8 result"),
    "a scale of a type": (program(q_scale=tensor(dtype=BF16)), "Quantize 'q_out'", "expected fp32[]"),
    "a scale of a shape": (program(q_scale=tensor(1, dtype=FP32)), "Quantize 'q_out'", "expected fp32[]"),
    "a limit beyond the format": (changed(Q_OUT, fp8_max=449.0), "Quantize 'q_out'", "outside (0, 448]"),
    "a limit of zero": (changed(Q_OUT, fp8_max=0.0), "Quantize 'q_out'", "outside (0, 448]"),
    "quantised twice": (
        program([*KV_STAGES[:3], Quantize("again", "kv_entry", FN), dataclasses.replace(WRITE, x="again")], ["written"]),
        "Quantize 'again'",
        "comes before Quantize",
    ),
    "scales of other rows": (
        scaled(
            kv_c=tensor("T", 512),
            stages=(SCALES, dataclasses.replace(CODES, x="k_pe"), CODES_WRITE, SCALES_WRITE),
            k_pe=tensor("S", 64),
        ),
        "Quantize 'codes'",
        "expected fp32[], or fp32 for groups",
    ),
    "scales that do not divide": (
        scaled(dataclasses.replace(CODES, x="k_pe"), dataclasses.replace(SCALES, group=16), k_pe=tensor("T", 80)),
        "Quantize 'codes'",
        "fp32 for groups of columns",
    ),
    # RowScale
    "a scale of rows without heads": (
        program([dataclasses.replace(ROW_SCALES, x="kv_c")], ["q_scales"]),
        "RowScale 'q_scales'",
        "expected rows [T,H,:]",
    ),
    "a scale of codes": (
        program([*Q_STAGES, dataclasses.replace(ROW_SCALES, x="q_out")], ["q_scales"]),
        "RowScale 'q_scales'",
        "it comes before Quantize",
    ),
    "rows over zero": (
        program([dataclasses.replace(ROW_SCALES, x="q_pe", divisor=0.0)], ["q_scales"]),
        "RowScale 'q_scales'",
        "divisor=0",
    ),
    "a divisor that is no number": (
        program([dataclasses.replace(ROW_SCALES, x="q_pe", divisor=float("nan"))], ["q_scales"]),
        "RowScale 'q_scales'",
        "divisor=nan",
    ),
    # GroupScale
    "groups of no power of two": (scaled(dataclasses.replace(SCALES, group=64 * 3)), "GroupScale 'scales'", "groups of 192"),
    "groups that do not divide": (scaled(kv_c=tensor("T", 320)), "GroupScale 'scales'", "groups of 128 columns"),
    "groups of too many lanes": (
        scaled(dataclasses.replace(SCALES, group=1024), kv_c=tensor("T", 1024)),
        "GroupScale 'scales'",
        "1024",
    ),
    "a divisor of zero": (scaled(dataclasses.replace(SCALES, divisor=0.0)), "GroupScale 'scales'", "divisor=0.0"),
    "a least scale of 1e-4": (scaled(dataclasses.replace(SCALES, least=1e-4)), "GroupScale 'scales'", "least=0.0001"),
    "scales of codes": (scaled(kv_c=tensor("T", 512, dtype=FN)), "GroupScale 'scales'", "it comes before Quantize"),
    # QAbsorb of codes
    "codes without a scale": (coded(ABSORB), "QAbsorb 'ql_nope'", "the product needs one type"),
    "elements with a scale": (coded(w_uk=tensor("H", 128, 512)), "QAbsorb 'ql_nope'", "no scale for w_uk bf16[H, 128, 512]"),
    "a scale for each column": (coded(w_scale=tensor("H", 512, dtype=FP32)), "QAbsorb 'ql_nope'", "is no scale for w_uk"),
    "a scale for all": (coded(w_scale=tensor(dtype=FP32)), "QAbsorb 'ql_nope'", "w_scale is fp32[], which is no scale"),
    "scales of another type": (coded(w_scale=tensor("H", dtype=BF16)), "QAbsorb 'ql_nope'", "w_scale is bf16[H]"),
    "scales of tokens": (coded(w_scale=tensor("T", dtype=FP32)), "QAbsorb 'ql_nope'", "w_scale is fp32[T]"),
    "too few blocks": (coded(w_scale=tensor("H", 1, 3, dtype=FP32)), "QAbsorb 'ql_nope'", "w_scale is fp32[H, 1, 3]"),
    "blocks of 16 rows": (coded(w_scale=tensor("H", 8, 4, dtype=FP32)), "QAbsorb 'ql_nope'", "w_scale is fp32[H, 8, 4]"),
    "blocks of bytes": (coded(w_scale=tensor("H", 1, 4, dtype=E8M0)), "QAbsorb 'ql_nope'", "w_scale is e8m0[H, 1, 4]"),
    "e2m1 with one scale": (coded(w_uk=tensor("H", 128, 512, dtype=E2M1)), "QAbsorb 'ql_nope'", "no scale for w_uk fp4_e2m1"),
    "e2m1 with fp32 scales": (
        coded(w_uk=tensor("H", 128, 512, dtype=E2M1), w_scale=tensor("H", 4, 512, dtype=FP32)),
        "QAbsorb 'ql_nope'",
        "w_scale is fp32[H, 4, 512]",
    ),
    "e2m1 in groups of 64": (
        coded(w_uk=tensor("H", 128, 512, dtype=E2M1), w_scale=tensor("H", 2, 512, dtype=E8M0)),
        "QAbsorb 'ql_nope'",
        "w_scale is e8m0[H, 2, 512]",
    ),
    "e2m1 with a half group": (
        coded(q_nope=tensor("T", "H", 48), w_uk=tensor("H", 48, 512, dtype=E2M1), w_scale=tensor("H", 1, 512, dtype=E8M0)),
        "QAbsorb 'ql_nope'",
        "w_scale is e8m0[H, 1, 512]",
    ),
    "codes of unknown width": (
        coded(q_nope=tensor("T", "H", "P"), w_uk=tensor("H", "P", 512, dtype=FN)),
        "QAbsorb 'ql_nope'",
        "codes need known widths",
    ),
    "fp8 products of elements": (changed(ABSORB, activation=FN), "QAbsorb 'ql_nope'", "the product needs one fp8 type"),
    "fp8 products of another flavour": (
        coded(dataclasses.replace(CODED, activation=DType.E4M3FNUZ)),
        "QAbsorb 'ql_nope'",
        "activation fp8_e4m3fnuz and w_uk fp8_e4m3fn",
    ),
    "fp8 products of e2m1": (
        coded(
            dataclasses.replace(CODED, activation=FN),
            w_uk=tensor("H", 128, 512, dtype=E2M1),
            w_scale=tensor("H", 4, 512, dtype=E8M0),
        ),
        "QAbsorb 'ql_nope'",
        "the product needs one fp8 type",
    ),
    "products of bf16 codes": (
        coded(dataclasses.replace(CODED, activation=BF16)),
        "QAbsorb 'ql_nope'",
        "the product needs one fp8 type",
    ),
    "fp8 products with blocks": (
        coded(dataclasses.replace(CODED, activation=FN), w_scale=tensor("H", 1, 4, dtype=FP32)),
        "QAbsorb 'ql_nope'",
        "fp8 products have one scale for a head",
    ),
    # CacheWrite
    "bytes beyond the entry": (scaled(dataclasses.replace(SCALES_WRITE, column=644)), "CacheWrite 'scales_written'", "from 644 on"),
    "scales off their alignment": (
        scaled(dataclasses.replace(SCALES_WRITE, column=514)),
        "CacheWrite 'scales_written'",
        "from 514 on",
    ),
    "segments of bytes": (scaled(dataclasses.replace(CODES_WRITE, layout="segmented")), "CacheWrite 'codes_written'", "bytes"),
    "a part of an entry of elements": (changed(WRITE, column=1), "CacheWrite 'written'", "only a cache of bytes"),
    "an entry too narrow": (program(kv_cache=tensor("N", 640, dtype=FN)), "CacheWrite 'written'", "does not fill"),
    "rows of heads": (changed(WRITE, x="q_out"), "CacheWrite 'written'", "does not fill"),
    "another flavour": (program(kv_cache=tensor("N", 576, dtype=DType.E4M3FNUZ)), "CacheWrite 'written'", "Quantize comes before"),
    "KV heads in one entry": (
        program(kv_c=tensor("T", "K", 512), k_pe=tensor("T", "K", 64)),
        "CacheWrite 'written'",
        "does not fill",
    ),
    "slots of float": (program(slot_mapping=tensor("T", dtype=FP32)), "CacheWrite 'written'", "expected int32[T] or int64[T]"),
}


@pytest.mark.parametrize(("wrong", "stage", "reason"), REJECTED.values(), ids=[name.replace(" ", "-") for name in REJECTED])
def test_verify_names_stage_and_reason(wrong, stage, reason):
    with pytest.raises(ProgramError) as caught:
        wrong.verify()
    message = str(caught.value)
    assert message.startswith(stage or "program 'test'"), message
    assert reason in message
    assert "\n" not in message


def test_an_input_declared_twice():
    twice = dataclasses.replace(program(), inputs=(*program().inputs, ("q_pe", INPUTS["q_pe"])))
    with pytest.raises(ProgramError, match="'q_pe' is declared twice"):
        twice.verify()


def test_a_symbol_as_last_dimension():
    with pytest.raises(ProgramError, match="the last dimension must be a number"):
        program(q_pe=tensor("T", "H", "R")).verify()


# Well-typed, but not what one launch can do.
NOT_LOWERED = {
    "a cache of computed rows": (
        program([CacheWrite("written", "kv_c", "kv_cache", "slot_mapping")], ["written"], kv_cache=tensor("N", 512)),
        "must come from Quantize",
    ),
    "a result in between": (program([ABSORB], ["ql_nope"]), "neither a quantised"),
    "an entry as result": (program(KV_STAGES[:3], ["kv_entry"]), "neither a quantised"),
    "two writes of one byte": (scaled(dataclasses.replace(SCALES_WRITE, column=508)), "it writes byte 508"),
    "an entry written twice": (
        program([*KV_STAGES, dataclasses.replace(WRITE, output="again")], ["written", "again"]),
        "it writes byte 0 of an entry",
    ),
    "codes without scales": (
        scaled(stages=(SCALES, CODES, CODES_WRITE), results=["codes_written"]),
        "has the codes and not their scales",
    ),
    "scales of other values": (
        scaled(stages=(dataclasses.replace(SCALES, x="k_pe", group=16), *SCALED[1:]), kv_c=tensor("T", 512)),
        "the scales must be those of 'kv_c'",
    ),
    "scales of rotated values": (
        scaled(K_ROPE, stages=(K_ROPE, dataclasses.replace(SCALES, x="k_rotated", group=16),
                               dataclasses.replace(CODES, x="k_rotated"),
                               CODES_WRITE, SCALES_WRITE)),
        "and that an input",
    ),
    "scales alone": (scaled(stages=(SCALES, SCALES_WRITE), results=["scales_written"]), "is computed but no result is made of it"),
    "rows' codes without scales": (program(TOKEN_STAGES, ["q_out"]), "the scales are no result"),
    "scales of other rows than the codes": (
        program([ABSORB, Q_ROPE, Q_ROW, dataclasses.replace(ROW_SCALES, x="ql_nope"), TOKEN_OUT], ["q_out", "q_scales"]),
        "the scales must be those of 'q_row'",
    ),
    "rows' scales alone": (program(TOKEN_STAGES[:-1], ["q_scales"]), "is computed but no result is made of it"),
    "two RoPE styles": (changed(K_ROPE, style="neox"), "it mixes RoPE styles: gptj, neox"),
    "two queries": (program([*Q_STAGES, dataclasses.replace(Q_OUT, output="again")], ["q_out", "again"]), "the same rows"),
    "two model types": (program(kv_c=tensor("T", 512, dtype=FP16)), "it mixes model types"),
    "rope of rope": (
        program([ABSORB, Q_ROPE, Rope("turned", "q_rotated", "cos_sin_cache", "positions", "gptj", FP32),
                 dataclasses.replace(Q_ROW, b="turned"), Q_OUT], ["q_out"]),
        "passes through two",
    ),
    "three parts": (
        program([ABSORB, Q_ROPE, Q_ROW, Concat("longer", "q_row", "q_pe"), dataclasses.replace(Q_OUT, x="longer")], ["q_out"]),
        "only an input, QAbsorb or Rope can feed",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("wrong", "reason"), NOT_LOWERED.values(), ids=[name.replace(" ", "-") for name in NOT_LOWERED])
def test_lowering_refuses_what_one_launch_cannot_do(wrong, reason):
    wrong.verify()
    with pytest.raises(ProgramError) as caught:
        lower(wrong)
    assert reason in str(caught.value)


SUBSETS = {
    "whole": (program(), ["rotate_k_pe", "rotate_q_pe", "copy_kv_c", "absorb_q_nope"]),
    "q only": (program(Q_STAGES, ["q_out"]), ["rotate_q_pe", "absorb_q_nope"]),
    "kv only": (program(KV_STAGES, ["written"]), ["rotate_k_pe", "copy_kv_c"]),
    "absorb only": (
        program([ABSORB, Quantize("q_out", "ql_nope", BF16)], ["q_out"]),
        ["absorb_q_nope"],
    ),
    "scales of rows": (
        program([*TOKEN_STAGES, *KV_STAGES], ["q_out", "q_scales", "written"]),
        ["rotate_k_pe", "copy_kv_c", "absorb_q_nope"],
    ),
    "kv_c only": (
        program([Quantize("kv_entry", "kv_c", FN), WRITE], ["written"], kv_cache=tensor("N", 512, dtype=FN)),
        ["copy_kv_c"],
    ),
}


@pytest.mark.parametrize(("sound", "segments"), SUBSETS.values(), ids=[name.replace(" ", "-") for name in SUBSETS])
def test_subsets_lower_to_segments(sound, segments):
    """The longest chain of dependent loads starts first, the absorb comes last."""
    assert [segment.name for segment in lower(sound).segments] == segments


def test_scales_go_with_their_codes():
    (segment,) = lower(scaled()).segments
    assert (segment.name, segment.sink.groups, segment.sink.scale_write) == ("copy_kv_c", SCALES, SCALES_WRITE)
    assert (segment.sink.stored, segment.sink.scale) == (DType.UINT8, None)


def test_the_parts_of_rows_with_scales_go_together():
    (segment,) = lower(program(TOKEN_STAGES, ["q_out", "q_scales"])).segments
    assert (segment.name, segment.beside.name, segment.column, segment.beside.column) == ("absorb_q_nope", "rotate_q_pe", 0, 512)
    assert (segment.sink.row_scale, segment.sink.scale) == (ROW_SCALES, None)


def test_segments_know_their_heads():
    several = program(kv_c=tensor("T", "K", 512), k_pe=tensor("T", "K", 64), kv_cache=tensor("N", "K", 576, dtype=FN))
    for each, kv in ((program(), None), (several, "kv_heads")):
        heads = {segment.name: segment.heads for segment in lower(each).segments}
        assert heads == {"rotate_k_pe": kv, "rotate_q_pe": "heads", "copy_kv_c": kv, "absorb_q_nope": "heads"}


def test_segments_know_their_columns():
    lowered = lower(program())
    places = {segment.name: (segment.sink.tensor, segment.column, segment.width) for segment in lowered.segments}
    assert places == {
        "rotate_k_pe": ("kv_cache", 512, 64),
        "rotate_q_pe": ("q_out", 512, 64),
        "copy_kv_c": ("kv_cache", 0, 512),
        "absorb_q_nope": ("q_out", 0, 512),
    }
    assert lowered.model_dtype is BF16


@pytest.mark.parametrize("arch", ["gfx942", "gfx950"])
def test_the_program_of_a_spec_is_the_one_above(arch):
    """What PrologueSpec builds has the types that the design names."""
    target = find_target(arch)
    spec = PrologueSpec(heads=16, nope_dim=128, lora_rank=512, rope_dim=64, rope_style="gptj")
    types = spec.program(target).verify()
    assert types["q_out"] == TensorType(("T", "H", 576), target.fp8)
    assert types["kv_cache"] == TensorType(("N", 576), target.fp8)
    assert [type(stage) for stage in spec.program(target).stages] == [type(stage) for stage in Q_STAGES + KV_STAGES]
