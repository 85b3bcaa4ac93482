"""Generated source: the same bytes for the same spec anywhere, one kernel for every platform, and nothing left over in it."""

import dataclasses
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import jinja2
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlagen import codegen, rendering
from mlagen.abi import kernel_arguments
from mlagen.codegen import MARK, GeneratedKernel, generate, kernel_name, render
from mlagen.dtypes import DType
from mlagen.errors import SpecError
from mlagen.ir import CacheWrite, Program, Quantize
from mlagen.layout import Layout
from mlagen.lowering import lower
from mlagen.schedule import choose_schedule
from mlagen.spec import PrologueSpec
from mlagen.target import TARGETS, find_target

ROOT = Path(codegen.__file__).parents[1]
LONGEST_LINE = 132
ARCHS = tuple(TARGETS)
GOOD = {"heads": 16, "nope_dim": 128, "lora_rank": 512, "rope_dim": 64, "rope_style": "gptj"}

# Each takes another way through the templates.
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "neox": {"rope_style": "neox"},
    "unrotated": {"rope_style": "none"},
    "no rope": {"rope_style": "none", "rope_dim": 0},
    "narrow rope": {"rope_dim": 6},
    "stepwise": {"rounding": "stepwise"},
    "stepwise fp16": {"rounding": "stepwise", "dtype": "fp16"},
    "bf16 out": {"q_dtype": "bf16", "kv_dtype": "bf16"},
    "bf16 cache": {"kv_dtype": "bf16", "rope_style": "neox"},
    "absorbed": {"weight": "none"},
    "absorbed, copied": {"weight": "none", "q_dtype": "bf16", "kv_dtype": "bf16", "rope_style": "none"},
    "padded": {"nope_dim": 48, "lora_rank": 80},
    "padded, for groups": {"nope_dim": 48, "lora_rank": 256},
    "fp8 weights": {"weight": "fp8"},
    "fp8 weights, fp16": {"weight": "fp8", "dtype": "fp16", "nope_dim": 48, "lora_rank": 80},
    "blocks": {"weight": "fp8-block", "nope_dim": 192},
    "blocks, a row of them": {"weight": "fp8-block"},
    "mxfp4": {"weight": "mxfp4"},
    "a8": {"weight": "fp8", "compute": "a8"},
    "a8, groups": {"weight": "fp8", "compute": "a8", "nope_dim": 208},
    "largest": {"heads": 4096, "nope_dim": 512, "lora_rank": 2048, "rope_dim": 512},
    "limit": {"fp8_max": 224.0},
    "rope first": {"nope_first": False},
    "KV heads": {"kv_heads": 2},
    "KV heads, copied": {"kv_heads": 4096, "kv_dtype": "bf16", "rope_style": "none", "weight": "none"},
    "segmented": {"kv_layout": "segmented"},
    "fp8_ds_mla": {"kv_layout": "fp8_ds_mla"},
    "fp8_ds_mla, copied": {"kv_layout": "fp8_ds_mla", "weight": "none", "rope_style": "none", "lora_rank": 2048},
    "fp8_ds_mla, no rope": {"kv_layout": "fp8_ds_mla", "rope_style": "none", "rope_dim": 0, "q_dtype": "bf16"},
    "segmented, copied": {"kv_layout": "segmented", "kv_dtype": "bf16", "rope_style": "none"},
    "segmented, no rope": {"kv_layout": "segmented", "rope_style": "none", "rope_dim": 0},
    "token": {"q_scaling": "token"},
    "token, absorbed": {"q_scaling": "token", "weight": "none", "rope_style": "neox"},
    "token, no rope, stepwise": {"q_scaling": "token", "rope_style": "none", "rope_dim": 0, "rounding": "stepwise"},
    "token, rope first, passes": {
        "q_scaling": "token",
        "nope_dim": 256,
        "lora_rank": 1024,
        "nope_first": False,
        "rounding": "stepwise",
    },
    "token, blocks, passes": {"q_scaling": "token", "weight": "fp8-block", "nope_dim": 256, "lora_rank": 1024},
    "token, a8": {"q_scaling": "token", "weight": "fp8", "compute": "a8", "kv_layout": "fp8_ds_mla"},
    "token, mxfp4, no cache": {"q_scaling": "token", "weight": "mxfp4", "write_kv": False},
    "token, copied": {"q_scaling": "token", "weight": "none", "rope_style": "none", "kv_heads": 2},
    "split": {"q_split": True},
    "split, bf16": {"q_split": True, "q_dtype": "bf16", "nope_first": False, "rope_style": "neox"},
    "split, absorbed, no cache": {"q_split": True, "weight": "none", "write_kv": False},
    "no query": {"write_q": False},
    "no query, copied": {"write_q": False, "rope_style": "none", "rope_dim": 0, "kv_dtype": "bf16"},
    "no cache": {"write_kv": False},
    "no cache, no rope": {"write_kv": False, "rope_style": "none", "rope_dim": 0},
    "rope first, absorbed": {"nope_first": False, "weight": "none", "rope_style": "neox", "q_dtype": "bf16"},
}

LAYOUTS = {"sm_90": (Layout(1, None, True), Layout(4, 32), Layout(8, 16, True))}
"""Layouts of each arch besides the default, which lead through templates of their own."""

STAGED = (Layout(4, 32), Layout(8, 16, True))
DOES_NOT_FIT = {
    *(("padded", layout) for layout in STAGED),  # five latent tiles, and four waves multiply together
    *(("fp8 weights, fp16", layout) for layout in STAGED),
    *(("blocks", layout) for layout in STAGED),  # the sums of a product from shared memory have one scale
    *((variant, layout) for variant in ("a8", "a8, groups") for layout in STAGED),  # its query is the model's dtype
    *((variant, layout) for variant in VARIANTS if "token" in variant for layout in STAGED),  # one workgroup has whole rows
}


def spec(**changes: Any) -> PrologueSpec:
    return PrologueSpec(**{**GOOD, **changes})


def of(variant: str, arch: str, layout: Layout = Layout()) -> GeneratedKernel:  # noqa: B008
    return generate(spec(**VARIANTS[variant]), find_target(arch), layout)


each_variant = pytest.mark.parametrize(
    ("variant", "arch", "layout"),
    [
        pytest.param(variant, arch, layout, id=f"{variant}-{arch}{layout.suffix}".replace(" ", "-"))
        for variant in VARIANTS
        for arch in ARCHS
        for layout in (Layout(), *LAYOUTS.get(arch, ()))
        if (variant, layout) not in DOES_NOT_FIT
    ],
)


@each_variant
def test_host_and_device_share_the_kernel(variant, arch, layout):
    kernel = of(variant, arch, layout)
    (library, device), (host_library, host) = (text.split(MARK) for text in (kernel.source, kernel.host_source))
    assert host.startswith(device), "the host's kernel is another one"
    assert "mlagen_host_launch" in host
    assert "mlagen_host_launch" not in device
    assert library != host_library
    assert not re.search(r"__builtin_amdgcn|\basm\b|__\w+_sync", device), "a platform's primitive outside the library"


@each_variant
def test_the_source_reads_well(variant, arch, layout):
    """Short lines, no blank runs, no trailing blanks, nothing of the template language, one newline at the end."""
    kernel = of(variant, arch, layout)
    for text in (kernel.source, kernel.host_source):
        lines = text.split("\n")
        assert max(map(len, lines)) <= LONGEST_LINE, max(lines, key=len)
        assert not [line for line in lines if line != line.rstrip() or "\t" in line]
        assert not re.search(r"\n\n\n|//%|<%|%>|\$\{|<#|None|\bTrue\b|\bFalse\b|Undefined", text)
        assert text.endswith("}\n")
        assert text.isascii()


@each_variant
def test_the_head_says_what_it_is(variant, arch, layout):
    kernel = of(variant, arch, layout)
    head = kernel.source[:2000]
    assert head.startswith(f"// {kernel.name}\n")
    assert arch in head
    program = spec(**VARIANTS[variant]).program(find_target(arch))
    for line in str(program).splitlines():
        assert f"//     {line}".rstrip() in kernel.source
    in_grid = [segment.name for segment in kernel.lowered.segments]
    if kernel.schedule.staging:
        in_grid.sort(key=lambda name: not name.startswith("absorb"))
    assert re.findall(r"^//     (\w+): ", kernel.source, re.MULTILINE) == in_grid


@each_variant
def test_every_argument_is_used(variant, arch, layout):
    """Declared once, passed once, and read by the kernel; the driver fills exactly these."""
    kernel = of(variant, arch, layout)
    body = kernel.source.partition(MARK)[2]
    code = re.sub(r"//.*", "", body)
    for argument in kernel.arguments:
        assert re.search(rf"\bargs\.{argument.name}\b", code), f"{argument.name} is never read"
    read = set(re.findall(r"\bargs\.(\w+)", code))
    assert read == {argument.name for argument in kernel.arguments}
    signature = re.search(rf"void {kernel.name}\(([^)]*)\)", code)
    assert signature is not None
    declared = [part.split()[-1] for part in signature.group(1).split(",")]
    assert declared == [argument.name for argument in kernel.arguments]


@each_variant
def test_every_function_and_constant_of_the_kernel_is_used(variant, arch, layout):
    """What a variant does not need is not in its source."""
    code = re.sub(r"//.*", "", of(variant, arch, layout).source.partition(MARK)[2])
    defined = re.findall(r"^MLAGEN_DEVICE [\w:*& ]*?(\w+)\(", code, re.MULTILINE)
    defined += re.findall(r"^constexpr \w+ (\w+) =", code, re.MULTILINE)
    assert defined
    assert not [name for name in defined if len(re.findall(rf"\b{name}\b", code)) < 2]


@each_variant
def test_primitives_of_one_layout_are_only_there_where_they_are_used(variant, arch, layout):
    kernel = of(variant, arch, layout)
    of_staging = ("group_barrier", "publish_shared", "dynamic_shared", "load_shared", "store_shared", "multiply_block")
    of_dependence = ("dependents_may_start", "wait_for_previous")
    used = {*(of_staging if kernel.schedule.staging else ()), *(of_dependence if layout.dependent else ())}
    for text in (kernel.source, kernel.host_source):
        library, body = re.sub(r"//.*", "", text.replace(MARK, "\0")).split("\0")
        for part in (library, body):
            assert {name for name in (*of_staging, *of_dependence) if re.search(rf"\b{name}\(", part)} == used


@pytest.mark.parametrize("variant", VARIANTS)
def test_rows_that_start_anywhere_are_written_in_pieces(variant):
    """A 16-bit element of a byte cache may lie at an odd address, where this hardware takes no 16-bit store."""
    kernel = generate(spec(**VARIANTS[variant]), find_target("sm_90"), aligned=False)
    assert not re.search(r"\.bits = uint16_t", kernel.source)
    assert "static_cast<uint8_t*>(to)[i] =" in kernel.source


def test_a_name_tells_the_layout():
    """What is compiled is found by its name, in a bundle and in a code object."""
    target = find_target("sm_90")
    layouts = [Layout(waves, block, dependent) for waves in (4, 8) for block in (None, 16, 32) for dependent in (False, True)]
    kernels = [generate(spec(), target, layout, aligned=aligned) for layout in (Layout(), *layouts) for aligned in (True, False)]
    assert len({kernel.name for kernel in kernels}) == len({kernel.source for kernel in kernels}) == len(kernels)
    assert {kernel.name.partition("sm_90")[0] + "sm_90" for kernel in kernels} == {kernel_name(spec(), target)}
    assert all(kernel.name.isidentifier() for kernel in kernels)
    assert [kernel.dependent for kernel in kernels] == ["_pdl" in kernel.name for kernel in kernels]


# The same bytes


@pytest.mark.parametrize("hash_seed", ["0", "1", "4711"])
def test_the_same_bytes_in_another_process(hash_seed, tmp_path):
    """Another hash seed, folder, time zone and locale: sets, paths and dates would show."""
    code = """
import hashlib
from mlagen.codegen import generate
from mlagen.spec import PrologueSpec
from mlagen.target import TARGETS
for target in TARGETS.values():
    for weight in ("bf16", "none"):
        spec = PrologueSpec(heads=16, nope_dim=48, lora_rank=512, rope_dim=64, rope_style="neox", weight=weight, fp8_max=224)
        kernel = generate(spec, target)
        print(kernel.name, kernel.source_sha256, hashlib.sha256(kernel.host_source.encode()).hexdigest())
"""

    def run(**environment: str) -> str:
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        settings = {**os.environ, "PYTHONPATH": path, **environment}
        command = [sys.executable, "-c", code]
        return subprocess.run(command, cwd=tmp_path, env=settings, capture_output=True, text=True, check=True).stdout

    ours = run()
    assert len(ours.splitlines()) == 2 * len(ARCHS)
    assert run(PYTHONHASHSEED=hash_seed, TZ="Asia/Tokyo", LC_ALL="C", HOME=str(tmp_path)) == ours


@each_variant
def test_nothing_of_this_machine_is_in_the_source(variant, arch, layout):
    kernel = of(variant, arch, layout)
    for text in (kernel.source, kernel.host_source):
        assert str(ROOT) not in text
        assert not re.search(r"/(home|tmp|root|usr|work|mnt)/|\b20\d\d-\d\d-\d\d\b|0x[0-9a-f]{9,}", text)


def test_rendering_is_pure():
    """Rendered twice, and for other heads: the same text."""
    target = find_target("gfx942")
    program = spec(heads=3).program(target)
    lowered = lower(program)
    again = render(kernel_name(spec(), target), program, lowered, choose_schedule(lowered, target), target)
    assert again.source == generate(spec(), target).source
    assert again.host_source == generate(spec(), target).host_source


@pytest.mark.parametrize("waves", [1, 2, 4, 8])
def test_a_wave_number_is_made_uniform_where_there_are_several(waves):
    target = find_target("gfx950")
    program = spec().program(target)
    lowered = lower(program)
    kernel = render("kernel", program, lowered, choose_schedule(lowered, target, waves_per_workgroup=waves), target)
    assert f"constexpr uint32_t THREADS = {64 * waves};" in kernel.source
    assert ("uniform(" in kernel.source.partition(MARK)[2]) == (waves > 1)


# Templates


def test_an_undefined_name_is_an_error(monkeypatch):
    templates = {"kernel.hip.j2": "int x = ${nonsense};\n"}
    texts, environment = rendering.template_texts(), rendering.environment()
    assert environment.undefined is jinja2.StrictUndefined
    monkeypatch.setattr(environment, "loader", jinja2.DictLoader({**texts, **templates}))
    environment.cache.clear()
    try:
        with pytest.raises(jinja2.UndefinedError, match="nonsense"):
            generate.__wrapped__(spec(), find_target("gfx942")).source  # noqa: B018 -- rendered when it is asked for
    finally:
        environment.cache.clear()


def test_braces_of_cpp_survive():
    source = re.sub(r"//.*", "", of("plain", "gfx942").host_source)
    assert "Accumulator sums[M_TILES] = {};" in source
    assert all(source.count(opening) == source.count(closing) for opening, closing in ("{}", "()", "[]"))


# Programs that a spec does not build

Q_ONLY = ("q_nope", "w_uk", "q_pe", "cos_sin_cache", "positions", "q_scale")
KV_ONLY = ("kv_c", "k_pe", "cos_sin_cache", "positions", "k_scale", "slot_mapping", "kv_cache")


def part_of(program: Program, result: str) -> Program:
    """The stages and inputs that `result` is made of."""
    needed, stages = {result}, []
    for stage in reversed(program.stages):
        if stage.output in needed:
            needed.update(stage.operands)
            stages.append(stage)
    inputs = tuple((name, tensor) for name, tensor in program.inputs if name in needed)
    return Program(program.name, inputs, tuple(reversed(stages)), (result,))


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("style", ["none", "gptj", "neox"])
@pytest.mark.parametrize(
    ("result", "inputs", "gone"),
    [
        ("q_out", Q_ONLY, ("slot_mapping", "cache_entry", "k_pe")),
        ("kv_cache_written", KV_ONLY, ("q_out", "heads", "w_uk", "multiply")),
    ],
    ids=["q only", "kv only"],
)
def test_subsets_render(result, inputs, gone, style, arch):
    target = find_target(arch)
    program = part_of(spec(rope_style=style).program(target), result)
    assert set(dict(program.inputs)) <= set(inputs)
    lowered = lower(program)
    kernel = render("part", program, lowered, choose_schedule(lowered, target), target)
    body = kernel.source.partition(MARK)[2]
    assert not [name for name in gone if re.search(rf"\b{name}\b", body)]
    assert set(re.findall(r"\bargs\.(\w+)", re.sub(r"//.*", "", body))) == {argument.name for argument in kernel.arguments}


def test_a_program_without_scales():
    """A Quantize without a scale multiplies by 1."""
    target = find_target("gfx942")
    program = part_of(spec(rope_style="none").program(target), "kv_cache_written")
    stages = tuple(dataclasses.replace(s, scale=None) if isinstance(s, Quantize) else s for s in program.stages)
    bare = Program("bare", tuple(i for i in program.inputs if i[0] != "k_scale"), stages, program.results)
    assert isinstance(stages[-1], CacheWrite)
    lowered = lower(bare)
    source = render("bare", bare, lowered, choose_schedule(lowered, target), target).source
    assert "quantize(to, x, 1.0f, 240.0f);" in source
    assert "scale" not in {argument.name for argument in kernel_arguments(lowered)}


# Arguments


def test_what_the_first_loads_need_comes_first():
    """The hardware can preload the first 14 dwords; the weights and the query must be among them."""
    names = [argument.name for argument in of("plain", "gfx950").arguments]
    assert names[:5] == ["w_uk", "q_nope", "q_nope_token_stride", "q_nope_head_stride", "tokens"]


@given(
    nope_dim=st.integers(1, 32).map(lambda n: 16 * n),
    lora_rank=st.integers(1, 128).map(lambda n: 16 * n),
    rope_dim=st.integers(0, 256).map(lambda n: 2 * n),
    style=st.sampled_from(["none", "gptj", "neox"]),
    dtype=st.sampled_from(["bf16", "fp16"]),
    arch=st.sampled_from(ARCHS),
)
def test_any_spec_renders(nope_dim, lora_rank, rope_dim, style, dtype, arch):
    try:
        wanted = spec(nope_dim=nope_dim, lora_rank=lora_rank, rope_dim=rope_dim, rope_style=style, dtype=dtype)
    except SpecError:
        assert rope_dim == 0
        assert style != "none"
        return
    kernel = generate(wanted, find_target(arch))
    assert kernel.name == kernel_name(wanted, find_target(arch))
    assert kernel.name.isidentifier()
    assert max(map(len, (kernel.source + kernel.host_source).split("\n"))) <= LONGEST_LINE
    assert str(find_target(arch).fp8) in kernel.source


def test_the_flavour_is_the_arches():
    for arch, flavour in (("gfx942", DType.E4M3FNUZ), ("gfx950", DType.E4M3FN)):
        source = of("plain", arch).source
        assert f"using target_fp8 = {flavour.value.cpp};" in source
        assert f"{flavour.largest:g}.0f" in source


# Dependent launch


@pytest.mark.parametrize("layout", [Layout(1, None, True), Layout(2, None, True), Layout(8, 16, True)], ids=str)
def test_a_dependent_kernel_waits_before_it_touches_what_others_write(layout):
    """Only weights and arguments come before the wait; on the CPU, where kernels follow each other, none would be missed."""
    body = re.sub(r"//.*", "", generate(spec(), find_target("sm_90"), layout).source.partition(MARK)[2])
    absorb, kernel = body.split("MLAGEN_DEVICE void absorb_q_nope(")[1].split('extern "C"')
    for text, first_touches in (
        (absorb, ("load_query", "args.q_nope", "args.q_scale", "quantize(", "store_words(", "stage_query(")),
        (kernel.partition("absorb_q_nope(args")[2], ("rotate_k_pe(", "rotate_q_pe(", "copy_kv_c(")),
    ):
        waited = text.index("wait_for_previous();")
        assert text.index("dependents_may_start();") < waited
        for touch in first_touches:
            assert touch not in text[:waited], touch
        assert any(touch in text[waited:] for touch in first_touches)
    assert absorb.index("load_weights(") < absorb.index("dependents_may_start();"), "loads of the next kernel would get ahead"
    assert kernel.count("wait_for_previous();") == 1
