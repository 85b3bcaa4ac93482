"""PrologueSpec: what it accepts, the one line with which it refuses, and the program that it builds."""

import dataclasses
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlagen.codegen import generate, kernel_name
from mlagen.dtypes import DType
from mlagen.errors import ModelError, SpecError
from mlagen.ir import CacheWrite, Concat, GroupScale, Quantize
from mlagen.spec import MAX_HEADS, MAX_LORA_RANK, MAX_NOPE_DIM, MAX_ROPE_DIM, PrologueSpec
from mlagen.target import TARGETS, find_target

GOOD = {"heads": 16, "nope_dim": 128, "lora_rank": 512, "rope_dim": 64, "rope_style": "gptj"}


def spec(**changes: Any) -> PrologueSpec:
    return PrologueSpec(**{**GOOD, **changes})


def test_what_is_filled_in():
    bf16, fp16 = spec(), spec(dtype="fp16")
    assert (bf16.weight, bf16.q_dtype, bf16.kv_dtype, bf16.rounding, bf16.fp8_max) == ("bf16", "fp8", "fp8", "fused", None)
    assert fp16.weight == "fp16"
    assert (bf16.q_nope_dim, bf16.entry_dim) == (128, 576)
    assert spec(weight="none").q_nope_dim == 512


@pytest.mark.parametrize(
    "changes",
    [
        {"heads": 1},
        {"heads": MAX_HEADS},
        {"nope_dim": 16},
        {"nope_dim": MAX_NOPE_DIM},
        {"lora_rank": 16},
        {"lora_rank": MAX_LORA_RANK},
        {"rope_dim": 2},
        {"rope_dim": MAX_ROPE_DIM},
        {"rope_dim": 0, "rope_style": "none"},
        {"rope_style": "none"},
        {"q_dtype": "bf16", "kv_dtype": "bf16"},
        {"fp8_max": 224},
        {"fp8_max": 0.5, "kv_dtype": "bf16"},
        {"nope_first": False, "rope_dim": 2},
        {"kv_heads": 2},
        {"kv_heads": MAX_HEADS, "rope_dim": 0, "rope_style": "none", "kv_dtype": "bf16"},
        {"kv_layout": "fp8_ds_mla"},
        {"kv_layout": "fp8_ds_mla", "lora_rank": 128, "rope_dim": 2, "q_dtype": "bf16", "rope_style": "neox"},
        {"kv_layout": "fp8_ds_mla", "fp8_max": 224.0},
        {"kv_layout": "segmented"},
        {"kv_layout": "segmented", "lora_rank": 16, "rope_dim": 2, "kv_dtype": "bf16"},
        {"kv_layout": "segmented", "rope_dim": 0, "rope_style": "none", "nope_first": False},
        {"write_q": False, "lora_rank": 16, "rope_dim": 0, "rope_style": "none"},
        {"write_kv": False, "lora_rank": MAX_LORA_RANK},
        {"q_split": True, "rope_dim": 2},
        {"weight": "fp8", "nope_dim": 16, "lora_rank": 16},
        {"weight": "fp8", "nope_dim": MAX_NOPE_DIM, "dtype": "fp16"},
        {"weight": "fp8", "compute": "a8", "nope_dim": 16, "lora_rank": 16},
        {"weight": "fp8", "compute": "a8", "nope_dim": MAX_NOPE_DIM, "lora_rank": MAX_LORA_RANK, "dtype": "fp16"},
        {"weight": "fp8-block", "nope_dim": 32, "lora_rank": 16},
        {"weight": "fp8-block", "nope_dim": MAX_NOPE_DIM - 32, "lora_rank": MAX_LORA_RANK - 16, "dtype": "fp16"},
        {"weight": "mxfp4", "nope_dim": 32, "lora_rank": 16},
        {"weight": "mxfp4", "nope_dim": MAX_NOPE_DIM, "lora_rank": MAX_LORA_RANK},
        {"q_scaling": "token", "lora_rank": 16},
    ],
    ids=str,
)
def test_the_limits_are_inside(changes):
    """Every extreme that a spec takes has kernels."""
    for target in TARGETS.values():
        assert generate(spec(**changes), target).source


# The field that the message must begin with, and a word of what it may be.
REFUSED = [
    ({"heads": 0}, "heads=0", "from 1"),
    ({"heads": -3}, "heads=-3", "from 1"),
    ({"heads": MAX_HEADS + 1}, "heads=", str(MAX_HEADS)),
    ({"heads": 2.0}, "heads=2.0", "integer"),
    ({"heads": True}, "heads=True", "integer"),
    ({"heads": "16"}, "heads='16'", "integer"),
    ({"heads": None}, "heads=None", "integer"),
    ({"nope_dim": 0}, "nope_dim=0", "multiple of 16"),
    ({"nope_dim": 120}, "nope_dim=120", "multiple of 16"),
    ({"nope_dim": MAX_NOPE_DIM + 16}, "nope_dim=", str(MAX_NOPE_DIM)),
    ({"lora_rank": 500}, "lora_rank=500", "multiple of 16"),
    ({"lora_rank": MAX_LORA_RANK + 16}, "lora_rank=", str(MAX_LORA_RANK)),
    ({"rope_dim": 63}, "rope_dim=63", "multiple of 2"),
    ({"rope_dim": -2}, "rope_dim=-2", "from 0"),
    ({"rope_dim": MAX_ROPE_DIM + 2}, "rope_dim=", str(MAX_ROPE_DIM)),
    ({"rope_dim": 0}, "rope_style='gptj'", "rope_style='none'"),
    ({"rope_style": "yarn"}, "rope_style='yarn'", "none, gptj, neox"),
    ({"rope_style": None}, "rope_style=None", "none, gptj, neox"),
    ({"dtype": "fp32"}, "dtype='fp32'", "bf16, fp16"),
    ({"dtype": "fp8"}, "dtype='fp8'", "bf16, fp16"),
    ({"weight": "fp16"}, "weight='fp16'", "bf16, fp8, fp8-block, mxfp4, none for a bf16 model"),
    ({"weight": "int4"}, "weight='int4'", "bf16, fp8, fp8-block, mxfp4, none"),
    ({"compute": "a4"}, "compute='a4'", "a16, a8"),
    ({"compute": None}, "compute=None", "a16, a8"),
    *(
        ({"compute": "a8", "weight": weight}, f"compute='a8' with weight={weight!r}", "use weight='fp8' or compute='a16'")
        for weight in ("bf16", "fp8-block", "mxfp4", "none")
    ),
    ({"compute": "a8"}, "compute='a8' with weight='bf16'", "use weight='fp8'"),
    ({"weight": "fp8-block", "nope_dim": 48}, "weight='fp8-block' with nope_dim=48", "a multiple of 32; use weight='fp8'"),
    ({"weight": "mxfp4", "nope_dim": 16}, "weight='mxfp4' with nope_dim=16", "a multiple of 32; use weight='fp8'"),
    ({"weight": "mxfp4", "dtype": "fp16"}, "weight='mxfp4' with dtype='fp16'", "use bf16"),
    ({"q_dtype": "fp16"}, "q_dtype='fp16'", "fp8, bf16 for a bf16 model"),
    ({"kv_dtype": "e5m2"}, "kv_dtype='e5m2'", "fp8, bf16"),
    ({"dtype": "fp16", "kv_dtype": "bf16"}, "kv_dtype='bf16'", "fp8, fp16 for a fp16 model"),
    ({"rounding": "exact"}, "rounding='exact'", "fused, stepwise"),
    ({"fp8_max": 0}, "fp8_max=0", "positive"),
    ({"fp8_max": -1.0}, "fp8_max=-1.0", "positive"),
    ({"fp8_max": 449}, "fp8_max=449", "448"),
    ({"fp8_max": float("nan")}, "fp8_max=nan", "positive"),
    ({"fp8_max": float("inf")}, "fp8_max=inf", "448"),
    ({"fp8_max": True}, "fp8_max=True", "number"),
    ({"fp8_max": "224"}, "fp8_max='224'", "number"),
    ({"fp8_max": 224, "q_dtype": "bf16", "kv_dtype": "bf16"}, "fp8_max=224", "without an fp8 output"),
    ({"nope_first": None}, "nope_first=None", "True or False"),
    ({"nope_first": 0}, "nope_first=0", "True or False"),
    ({"kv_layout": "fp8_ds_mla", "lora_rank": 192}, "kv_layout='fp8_ds_mla' with lora_rank=192", "multiple of 128"),
    ({"kv_layout": "fp8_ds_mla", "kv_dtype": "bf16"}, "kv_layout='fp8_ds_mla' with kv_dtype='bf16'", "use kv_dtype='fp8'"),
    ({"kv_layout": "fp8_ds_mla", "nope_first": False}, "kv_layout='fp8_ds_mla' with nope_first=False", "the latent columns first"),
    (
        {"kv_layout": "fp8_ds_mla", "fp8_max": 224, "q_dtype": "bf16"},
        "kv_layout='fp8_ds_mla' with fp8_max=224",
        "leave fp8_max out",
    ),
    ({"kv_heads": 0}, "kv_heads=0", "from 1"),
    ({"kv_heads": MAX_HEADS + 1}, "kv_heads=", str(MAX_HEADS)),
    ({"kv_heads": 2.0}, "kv_heads=2.0", "integer"),
    ({"kv_heads": 2, "kv_layout": "segmented"}, "kv_heads=2 with kv_layout='segmented'", "one KV head"),
    ({"kv_heads": 2, "kv_layout": "fp8_ds_mla"}, "kv_heads=2 with kv_layout='fp8_ds_mla'", "one KV head"),
    ({"kv_layout": "flat"}, "kv_layout='flat'", "paged, segmented, fp8_ds_mla"),
    ({"kv_layout": None}, "kv_layout=None", "paged, segmented"),
    ({"kv_layout": "segmented", "nope_first": False}, "kv_layout='segmented' with nope_first=False", "the latent columns first"),
    ({"q_scaling": "row"}, "q_scaling='row'", "static, token"),
    ({"q_scaling": "token", "q_dtype": "bf16"}, "q_scaling='token' with q_dtype='bf16'", "joined fp8 q_out"),
    ({"q_scaling": "token", "q_split": True}, "q_scaling='token' with q_split=True", "joined fp8 q_out"),
    ({"q_scaling": "token", "write_q": False}, "q_scaling='token' with write_q=False", "joined fp8 q_out"),
    ({"q_split": None}, "q_split=None", "True or False"),
    ({"q_split": True, "rope_dim": 0, "rope_style": "none"}, "q_split=True with rope_dim=0", "nothing to split"),
    ({"q_split": True, "write_q": False}, "q_split=True with write_q=False", "no query to split"),
    ({"write_q": None}, "write_q=None", "True or False"),
    ({"write_kv": 1}, "write_kv=1", "True or False"),
    ({"write_q": False, "write_kv": False}, "write_q=False with write_kv=False", "nothing would be written"),
    ({"write_q": False, "weight": "int4"}, "weight='int4'", "bf16, fp8, fp8-block, mxfp4, none"),
    ({"write_kv": False, "kv_dtype": "e5m2"}, "kv_dtype='e5m2'", "fp8, bf16"),
    ({"write_q": False, "kv_dtype": "bf16", "fp8_max": 224}, "fp8_max=224", "without an fp8 output"),
    ({"write_kv": False, "q_dtype": "bf16", "fp8_max": 224}, "fp8_max=224", "without an fp8 output"),
]


@pytest.mark.parametrize(("changes", "start", "word"), REFUSED, ids=[str(changes) for changes, _, _ in REFUSED])
def test_a_wrong_field_is_refused_by_name(changes, start, word):
    with pytest.raises(SpecError) as caught:
        spec(**changes)
    message = str(caught.value)
    assert message.startswith(start), message
    assert word in message
    assert "\n" not in message
    assert caught.value.exit_status == 2


# Hypothesis reaches combinations that the table does not have.
ANYTHING = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5), st.lists(st.integers(), max_size=2))


def field(*likely: Any) -> st.SearchStrategy[Any]:
    """Mostly one of `likely`, sometimes anything."""
    return st.sampled_from(likely) | st.sampled_from(likely) | ANYTHING


@given(
    heads=field(1, 16, 128),
    nope_dim=field(16, 48, 128),
    lora_rank=field(16, 80, 512),
    rope_dim=field(0, 6, 64),
    rope_style=field("none", "gptj", "neox"),
    dtype=field("bf16", "fp16"),
    weight=field(None, "none", "bf16", "fp8", "fp8-block", "mxfp4"),
    q_dtype=field("fp8", "bf16", "fp16"),
    kv_dtype=field("fp8", "bf16", "fp16"),
    rounding=field("fused", "stepwise"),
    fp8_max=field(None, 224, 240.0, 448),
    nope_first=field(True, False),
    q_scaling=field("static", "token"),
    q_split=field(True, False),
    write_q=field(True, False),
    write_kv=field(True, False),
    kv_heads=field(1, 2),
    kv_layout=field("paged", "segmented", "fp8_ds_mla"),
    compute=field("a16", "a8"),
    arch=st.sampled_from(list(TARGETS)),
)
def test_anything_is_a_kernel_or_a_spec_error(arch, **fields):
    try:
        generated = generate(PrologueSpec(**fields), find_target(arch))
    except SpecError as error:
        message = str(error)
    else:
        message = generated.name
        assert message in generated.source
    assert message
    assert "\n" not in message


def test_a_limit_that_only_one_flavour_has():
    assert spec(fp8_max=288).program(find_target("gfx950"))
    with pytest.raises(SpecError, match="fp8_max=288: gfx942's fp8_e4m3fnuz ends at 240"):
        spec(fp8_max=288).program(find_target("gfx942"))


def test_from_model():
    assert PrologueSpec.from_model("deepseek-r1", tp=8) == spec()
    options = {"weight": "none", "q_dtype": "bf16", "kv_dtype": "bf16", "rounding": "stepwise", "nope_first": False}
    for more in ({}, {"write_q": False}, {"write_kv": False}, {"q_split": True}, {"q_scaling": "token", "q_dtype": "fp8"}):
        changes = {**options, **more}
        assert PrologueSpec.from_model("deepseek-r1", tp=8, **changes) == spec(**changes)
    with pytest.raises(ModelError, match="tp"):
        PrologueSpec.from_model("deepseek-r1", tp=7)
    assert PrologueSpec.from_model("deepseek-r1", tp=8, kv_layout="segmented") == spec(kv_layout="segmented")


def test_names_of_kernels_tell_weights_apart():
    specs = [spec(weight=weight) for weight in ("bf16", "fp8", "fp8-block", "mxfp4", "none")]
    names = [kernel_name(each, find_target("gfx950")) for each in (*specs, spec(weight="fp8", compute="a8"))]
    assert len(set(names)) == 6
    assert all(name.isidentifier() for name in names)
    assert "_p128_wfp8_a8_" in names[-1]


@pytest.mark.parametrize(("weight", "bits"), [(None, 16), ("fp8", 8), ("fp8-block", 8), ("mxfp4", 4), ("none", 16)])
def test_bits_of_a_weight(weight, bits):
    assert {spec(weight=weight).weight_bits(target) for target in TARGETS.values()} == {bits}


def test_a_spec_is_a_value():
    assert spec() == spec(weight="bf16")
    assert hash(spec(fp8_max=224)) == hash(spec(fp8_max=224.0))
    with pytest.raises(dataclasses.FrozenInstanceError):
        spec().heads = 3  # type: ignore[misc]


@pytest.mark.parametrize(("rounding", "carried"), [("fused", DType.FP32), ("stepwise", DType.BF16)])
def test_rounding_is_in_the_types(rounding, carried):
    types = spec(rounding=rounding).program(find_target("gfx942")).verify()
    assert {types[name].dtype for name in ("ql_nope", "q_pe_rotated", "k_pe_rotated")} == {carried}


@pytest.mark.parametrize("arch", list(TARGETS))
def test_fp8_is_the_flavour_of_the_arch(arch):
    target = find_target(arch)
    stages = {stage.output: stage for stage in spec(kv_dtype="bf16").program(target).stages if isinstance(stage, Quantize)}
    assert (stages["q_out"].dtype, stages["q_out"].scale) == (target.fp8, "q_scale")
    assert (stages["kv_entry"].dtype, stages["kv_entry"].scale) == (DType.BF16, None)


def test_without_rope_nothing_of_it_is_left():
    program = spec(rope_dim=0, rope_style="none").program(find_target("gfx942"))
    assert not {"positions", "cos_sin_cache", "q_pe", "k_pe"} & set(dict(program.inputs))
    carried = spec(rope_style="none").program(find_target("gfx942"))
    assert {"q_pe", "k_pe"} <= set(dict(carried.inputs))
    assert not {"positions", "cos_sin_cache"} & set(dict(carried.inputs))


@pytest.mark.parametrize(
    "changes",
    [
        {"nope_dim": 64},
        {"lora_rank": 256},
        {"rope_dim": 32},
        {"rope_style": "neox"},
        {"rope_style": "none"},
        {"dtype": "fp16"},
        {"weight": "none"},
        {"q_dtype": "bf16"},
        {"kv_dtype": "bf16"},
        {"rounding": "stepwise"},
        {"fp8_max": 224.0},
        {"fp8_max": 0.5},
        {"nope_first": False},
        {"kv_layout": "segmented"},
        {"kv_layout": "fp8_ds_mla"},
        {"kv_heads": 2},
        {"write_q": False},
        {"write_kv": False},
        {"q_split": True},
        {"q_scaling": "token"},
    ],
    ids=str,
)
def test_kernels_that_differ_have_names_that_differ(changes):
    """Each field moves the name and, apart from the name, the source; the arch does too."""
    for target in TARGETS.values():
        plain, other = (generate(each, target) for each in (spec(), spec(**changes)))
        assert plain.name != other.name
        assert plain.source.replace(plain.name, "") != other.source.replace(other.name, "")
    assert len({kernel_name(spec(**changes), target) for target in TARGETS.values()}) == len(TARGETS)


@pytest.mark.parametrize("limit", [0.3, 0.30000001, 447.99999, 1e-5, 1e-30, 1e-320, 5e-324])
def test_a_limit_of_many_digits(limit):
    """It is refused, or has a kernel whose name is a C++ name and no other kernel's."""
    target = find_target("gfx950")
    names = {kernel_name(spec(fp8_max=each), target) for each in (0.25, 448.0)}
    try:
        generated = generate(spec(fp8_max=limit), target)
        shorter = generate(spec(fp8_max=float(f"{limit:g}")), target)
    except SpecError:
        return
    assert generated.name.isidentifier()
    assert generated.name not in names
    assert (generated.name == shorter.name) == (generated.source == shorter.source)


@pytest.mark.parametrize("weight", ["bf16", "none"])
@pytest.mark.parametrize("rope_style", ["none", "gptj"])
def test_nope_first_is_the_order_of_the_columns(weight, rope_style):
    """Which columns are whose is the only difference, in the program as in what is made of it."""
    target = find_target("gfx950")
    first, last = (spec(weight=weight, rope_style=rope_style, nope_first=order) for order in (True, False))
    assert (first.nope_columns, first.rope_columns) == (slice(0, 512), slice(512, 576))
    assert (last.nope_columns, last.rope_columns) == (slice(64, 576), slice(0, 64))
    swapped = [stage for stage in last.program(target).stages if not isinstance(stage, Concat)]
    assert swapped == [stage for stage in first.program(target).stages if not isinstance(stage, Concat)]
    rows = [[stage for stage in each.program(target).stages if isinstance(stage, Concat)] for each in (first, last)]
    for one, other in zip(*rows, strict=True):
        assert (one.a, one.b, one.output) == (other.b, other.a, other.output)
    columns = {
        order: {segment.name: segment.column for segment in generate(each, target).lowered.segments}
        for order, each in ((True, first), (False, last))
    }
    for name, column in columns[True].items():
        assert columns[False][name] == (64 if column == 0 else 0), name


def test_without_rope_columns_there_is_no_order():
    none = {"rope_dim": 0, "rope_style": "none"}
    assert spec(**none, nope_first=False) == spec(**none)


@pytest.mark.parametrize(
    ("left_out", "meaningless"),
    [
        ("write_q", {"weight": "none"}),
        ("write_q", {"q_dtype": "bf16"}),
        ("write_kv", {"kv_dtype": "bf16"}),
    ],
)
def test_what_is_left_out_has_no_types(left_out, meaningless):
    """One kernel for each meaning."""
    part = {left_out: False}
    assert spec(**part, **meaningless) == spec(**part)
    assert spec(**part, **meaningless, fp8_max=224) == spec(**part, fp8_max=224)


def test_without_a_cache_a_split_query_has_no_order():
    assert spec(q_split=True, write_kv=False, nope_first=False) == spec(q_split=True, write_kv=False)
    assert spec(q_split=True, nope_first=False) != spec(q_split=True)


@pytest.mark.parametrize("q_dtype", ["fp8", "bf16"])
def test_a_split_query_is_two_results(q_dtype):
    target = find_target("gfx950")
    split = spec(q_split=True, q_dtype=q_dtype)
    types = split.program(target).verify()
    element = target.fp8 if q_dtype == "fp8" else DType.BF16
    assert split.q_results == ("ql_nope_out", "q_pe_out")
    assert [(types[name].shape, types[name].dtype) for name in split.q_results] == [
        (("T", "H", 512), element),
        (("T", "H", 64), element),
    ]
    assert split.program(target).results == ("ql_nope_out", "q_pe_out", "kv_cache_written")
    segments = {segment.source: segment for segment in generate(split, target).lowered.segments}
    assert (segments["q_nope"].sink.tensor, segments["q_nope"].column) == ("ql_nope_out", 0)
    assert (segments["q_pe"].sink.tensor, segments["q_pe"].column) == ("q_pe_out", 0)


def test_a_program_without_the_query():
    program = spec(write_q=False).program(find_target("gfx950"))
    assert not {"q_nope", "w_uk", "q_pe", "q_scale"} & set(dict(program.inputs))
    assert program.results == ("kv_cache_written",)
    assert spec(write_q=False).q_results == ()


def test_a_program_without_the_cache():
    program = spec(write_kv=False).program(find_target("gfx950"))
    assert not {"kv_c", "k_pe", "k_scale", "slot_mapping", "kv_cache"} & set(dict(program.inputs))
    assert program.results == spec(write_kv=False).q_results == ("q_out",)


def test_the_name_of_the_usual_order_says_nothing_of_it():
    """Names and sources of kernels from before there was an order stay as they were: `mlagen build --check` compares the latter."""
    name = "mla_prologue_p128_wbf16_l512_r64_gptj_bf16_qfp8_kvfp8_fused"
    assert kernel_name(spec(), find_target("gfx950")) == f"{name}_gfx950"
    assert kernel_name(spec(nope_first=False), find_target("gfx950")) == f"{name}_ropefirst_gfx950"
    assert kernel_name(spec(kv_layout="segmented"), find_target("gfx950")) == f"{name}_segmented_gfx950"


def test_kernels_that_coincide_share_a_name():
    target = find_target("gfx942")
    for changes in ({"heads": 3}, {"fp8_max": 240.0}):
        plain, other = (generate(each, target) for each in (spec(), spec(**changes)))
        assert plain.name == other.name
    several = [generate(spec(kv_heads=heads), target) for heads in (2, 7)]
    assert several[0].source == several[1].source
    absorbed = [generate(spec(weight="none", nope_dim=width), target) for width in (64, 128)]
    assert absorbed[0].source == absorbed[1].source


@pytest.mark.parametrize(("arch", "divisor"), [("gfx942", 224.0), ("gfx950", 448.0), ("sm_90", 448.0)])
def test_an_entry_of_fp8_ds_mla(arch, divisor):
    """DeepSeek's 656 bytes; what vLLM divides by is that of the flavour."""
    wanted, target = spec(kv_layout="fp8_ds_mla"), find_target(arch)
    assert (wanted.cache_width, wanted.rotary_byte, wanted.scale_groups) == (656, 528, 4)
    assert wanted.cache_dtype(target) is DType.UINT8
    assert spec(kv_layout="fp8_ds_mla", rope_dim=0, rope_style="none").cache_width == 528
    stages = {stage.output: stage for stage in wanted.program(target).stages}
    assert stages["kv_scales"] == GroupScale("kv_scales", "kv_c", 128, divisor, 2.0**-13)
    writes = {stage.x: stage.column for stage in stages.values() if isinstance(stage, CacheWrite)}
    assert writes == {"kv_codes": 0, "kv_scales": 512, "kv_pe": 528}
    assert "k_scale" not in dict(wanted.program(target).inputs)


@pytest.mark.parametrize("limit", [None, 224.0])
def test_scales_of_rows_are_a_result(limit):
    token, target = spec(q_scaling="token", fp8_max=limit), find_target("gfx942")
    program = token.program(target)
    types = program.verify()
    assert token.q_results == ("q_out", "q_scales")
    assert program.results == ("q_out", "q_scales", "kv_cache_written")
    assert (types["q_scales"].shape, types["q_scales"].dtype) == (("T", "H"), DType.FP32)
    assert "q_scale" not in types
    assert program.producer("q_scales").divisor == program.producer("q_out").limit == (limit or 240.0)
