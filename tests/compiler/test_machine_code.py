"""What a compiled kernel costs: read from kernels of known content, and from text that has its oddities."""

import dataclasses
import json
import re

import pytest

from mlagen.errors import BuildError, TargetError
from mlagen.machine_code import Resources, read_instruction_mix, read_resources, refuse_spills
from mlagen.toolchain import compile_device

ARCHES = ("gfx942", "gfx950")

HEAD = """\
#define KERNEL(threads) extern "C" __attribute__((global)) __attribute__((amdgpu_flat_work_group_size(threads, threads)))
#define LANE __builtin_amdgcn_workitem_id_x()
using float4 = float __attribute__((ext_vector_type(4)));
using short4 = short __attribute__((ext_vector_type(4)));
using words2 = unsigned __attribute__((ext_vector_type(2)));
using words3 = unsigned __attribute__((ext_vector_type(3)));
using words4 = unsigned __attribute__((ext_vector_type(4)));
"""

KERNELS = (
    HEAD
    + """
KERNEL(64) void multiply(const short4* a, const short4* b, const float4* c, float4* out)
{
    out[LANE] = __builtin_amdgcn_mfma_f32_16x16x16bf16_1k(a[LANE], b[LANE], c[LANE], 0, 0, 0);
}

KERNEL(64) void widths(const unsigned char* a, const short* b, const int* c, const words2* d, const words3* e, const words4* f,
                       unsigned char* out)
{
    out[LANE] = a[LANE] + b[LANE] + c[LANE];
    ((short*)out)[LANE] = 1;
    ((words2*)out)[LANE] = d[LANE];
    ((words3*)out)[LANE + 2048] = e[LANE];
    ((words4*)out)[LANE + 4096] = f[LANE];
    ((words4*)out)[LANE + 8192] = f[LANE + 64];
}

KERNEL(256) void through_lds(const int* a, int* out)
{
    __attribute__((shared)) static int both[10000];
    both[LANE] = a[LANE];
    __builtin_amdgcn_fence(__ATOMIC_RELEASE, "workgroup");
    __builtin_amdgcn_s_barrier();
    __builtin_amdgcn_fence(__ATOMIC_ACQUIRE, "workgroup");
    out[LANE] = both[255 - LANE];
}

KERNEL(256) void more_arguments(const float* a, const float* b, const float* c, const float* d, const float* e, const float* f,
                                const float* g, const float* h, float* out)
{
    out[LANE] = a[LANE] + b[LANE] + c[LANE] + d[LANE] + e[LANE] + f[LANE] + g[LANE] + h[LANE];
}

struct Both { const float* a; float* out; };
KERNEL(256) void struct_argument(Both both) { both.out[LANE] = both.a[LANE]; }

KERNEL(256) void accumulation_registers(const float* a, float* out)
{
    float x = a[LANE], held;
    asm volatile("v_accvgpr_write_b32 %0, %1" : "=a"(held) : "v"(x));
    asm volatile("; %0" ::"a"(held) : "a9");
    asm volatile("v_accvgpr_read_b32 %0, %1" : "=v"(x) : "a"(held));
    out[LANE] = x;
}

KERNEL(256) void many_vgprs(const float* a, float* out)
{
    asm volatile("v_mov_b32 v130, 0" ::: "v130");
    out[LANE] = a[LANE];
}

KERNEL(256) void many_sgprs(const float* a, float* out)
{
    asm volatile("s_mov_b32 s97, 0" ::: "s97");
    out[LANE] = a[LANE];
}

KERNEL(256) void add_atomically(float* sum) { __builtin_amdgcn_global_atomic_fadd_f32(
    (__attribute__((address_space(1))) float*)sum, 1.0f); }

KERNEL(64) void dynamic_index(const int* a, int* out)
{
    int kept[64];
    for (int i = 0; i < 64; ++i) kept[i] = a[LANE * 64 + i];
    for (int i = 0; i < 64; ++i) out[LANE * 64 + i] = kept[a[i] & 63];
}

KERNEL(1024) __attribute__((amdgpu_waves_per_eu(8, 8))) void spilling(const float4* a, float4* out)
{
    float4 kept[40];
#pragma unroll
    for (int i = 0; i < 40; ++i) kept[i] = a[LANE + i * 1024];
    __builtin_amdgcn_s_barrier();
    asm volatile("" ::: "memory");
#pragma unroll
    for (int i = 0; i < 40; ++i) out[LANE + i * 1024] = kept[i] * kept[39 - i];
}

__attribute__((device, noinline)) int call_me(int x, const int* a) { return x + a[x]; }
KERNEL(64) void calling(const int* a, int* out) { out[LANE] = call_me(a[LANE], a); }

__attribute__((device, noinline)) int recurse(int n, const int* a)
{
    return n < 2 ? a[n] : recurse(n - 1, a) * recurse(n - 2, a) + 3;
}
KERNEL(64) void recursing(const int* a, int* out) { out[LANE] = recurse(a[LANE], a); }
"""
)

ALL = re.findall(r"\) void (\w+)\(", KERNELS)
SOLVABLE = [name for name in ALL if name != "recursing"]


@pytest.fixture(scope="module", params=ARCHES)
def arch(request):
    return request.param


@pytest.fixture(scope="module")
def assembly(arch):
    return compile_device(KERNELS, arch, name="kernels").assembly


@pytest.mark.compiler
def test_the_resources_of_a_small_kernel(assembly):
    resources = read_resources(assembly, "multiply")
    assert 8 <= resources.vgprs <= 16
    assert 10 <= resources.sgprs <= 20
    assert resources == Resources(
        vgprs=resources.vgprs,
        agprs=0,
        sgprs=resources.sgprs,
        lds_bytes=0,
        scratch_bytes=0,
        vgpr_spills=0,
        sgpr_spills=0,
        waves_per_simd=8,
        kernarg_bytes=32,
        kernarg_preload_sgprs=8,
    )
    refuse_spills(resources, "multiply")


@pytest.mark.compiler
def test_the_instructions_of_a_small_kernel(assembly):
    mix = read_instruction_mix(assembly, "multiply")
    assert mix.mfma == {"v_mfma_f32_16x16x16_bf16": 1}
    assert mix.global_loads == {"64": 2, "128": 1}
    assert mix.global_stores == {"128": 1}
    assert mix.lds == mix.flat == mix.scratch == mix.barriers == mix.branches == mix.calls == 0
    assert mix.other == 1  # the end
    assert 1 <= mix.valu <= 4
    assert mix.waits >= 2


@pytest.mark.compiler
def test_the_prologue_for_old_firmware_is_not_counted(assembly):
    body = assembly[assembly.index("\nmultiply:") : assembly.index(".amdhsa_kernel multiply")]
    assert "s_load_dword" in body  # if this fails, the compiler has dropped the prologue and _instructions can forget it
    mix = read_instruction_mix(assembly, "multiply")
    assert mix.scalar_loads == 0
    assert mix.salu == 0


@pytest.mark.compiler
def test_the_widths_of_loads_and_stores(assembly):
    mix = read_instruction_mix(assembly, "widths")
    assert mix.global_loads == {"8": 1, "16": 1, "32": 1, "64": 1, "96": 1, "128": 2}
    assert mix.global_stores == {"8": 1, "16": 1, "64": 1, "96": 1, "128": 2}
    assert list(mix.global_loads) == sorted(mix.global_loads, key=int)


@pytest.mark.compiler
def test_lds_and_barriers(assembly):
    mix = read_instruction_mix(assembly, "through_lds")
    assert (mix.lds, mix.barriers) == (2, 1)
    assert read_resources(assembly, "through_lds").lds_bytes == 40000


@pytest.mark.compiler
def test_atomics_are_something_else(assembly):
    mix = read_instruction_mix(assembly, "add_atomically")
    assert (mix.global_loads, mix.global_stores, mix.other) == ({}, {}, 2)


@pytest.mark.compiler
def test_how_many_arguments_are_preloaded(assembly):
    assert read_resources(assembly, "more_arguments").kernarg_preload_sgprs == 14  # of 18
    assert read_instruction_mix(assembly, "more_arguments").scalar_loads == 1  # the other two pointers
    assert read_resources(assembly, "struct_argument").kernarg_preload_sgprs == 0


@pytest.mark.compiler
def test_accumulation_registers_are_part_of_the_unified_file(assembly):
    resources = read_resources(assembly, "accumulation_registers")
    assert resources.agprs == 10
    assert resources.vgprs == 4 + 10  # they start at a multiple of four


@pytest.mark.compiler
@pytest.mark.parametrize("kernel", SOLVABLE)
def test_waves_are_as_many_as_the_compiler_says(assembly, kernel):
    said = re.search(rf"^{kernel}:.*?^; Occupancy: (\d+)", assembly, re.MULTILINE | re.DOTALL)
    assert read_resources(assembly, kernel).waves_per_simd == int(said.group(1))


@pytest.mark.compiler
def test_registers_limit_the_waves(assembly):
    assert read_resources(assembly, "many_vgprs").waves_per_simd == 3  # 131 registers are 136, and 512 / 136 is 3.8
    assert read_resources(assembly, "many_sgprs").waves_per_simd == 7


@pytest.mark.compiler
@pytest.mark.parametrize("kernel", ALL)
def test_the_total_is_the_sum(assembly, kernel):
    counts = dataclasses.asdict(read_instruction_mix(assembly, kernel))
    total = counts.pop("total")
    assert total == sum(sum(count.values()) if isinstance(count, dict) else count for count in counts.values())
    assert total > 0


@pytest.mark.compiler
def test_the_values_survive_json(assembly):
    for value in (read_resources(assembly, "widths"), read_instruction_mix(assembly, "widths")):
        values = dataclasses.asdict(value)
        assert json.loads(json.dumps(values)) == values
        assert type(value)(**values) == value


@pytest.mark.compiler
def test_scratch_is_refused(assembly):
    resources = read_resources(assembly, "dynamic_index")
    assert resources.scratch_bytes >= 256
    assert resources.vgpr_spills == resources.sgpr_spills == 0
    assert read_instruction_mix(assembly, "dynamic_index").scratch >= 64 + 16
    with pytest.raises(BuildError, match=rf"dynamic_index: {resources.scratch_bytes} bytes of scratch .*smaller tile"):
        refuse_spills(resources, "dynamic_index")


@pytest.mark.compiler
def test_spills_are_refused(assembly):
    resources = read_resources(assembly, "spilling")
    assert resources.vgpr_spills > 0
    with pytest.raises(BuildError, match=rf"{resources.vgpr_spills} spilled VGPRs and {resources.sgpr_spills} spilled SGPRs"):
        refuse_spills(resources, "spilling")


@pytest.mark.parametrize("field", ["scratch_bytes", "vgpr_spills", "sgpr_spills"])
def test_each_kind_of_spill_is_refused(field):
    none = Resources(64, 0, 32, 0, 0, 0, 0, 8, 64, 14)
    refuse_spills(none, "kernel")
    with pytest.raises(BuildError, match=r"kernel: .*4"):
        refuse_spills(dataclasses.replace(none, **{field: 4}), "kernel")


@pytest.mark.compiler
def test_calls_are_seen(assembly):
    assert read_instruction_mix(assembly, "calling").calls == 1
    assert read_instruction_mix(assembly, "multiply").calls == 0
    with pytest.raises(BuildError, match="recursing: its scratch memory has no known size"):
        read_resources(assembly, "recursing")


@pytest.mark.compiler
def test_an_unknown_kernel_is_told_from_the_known(assembly):
    for read in (read_resources, read_instruction_mix):
        for name in ("multipl", "multiply2", "call_me", ".*"):
            with pytest.raises(BuildError, match=r"the kernels in it: multiply, widths, "):
                read(assembly, name)


# Text by hand: what the kernels above do not show.

TEXT = """\
	.amdgcn_target "amdgcn-amd-amdhsa--gfx942"
	.text
other:                                  ; @other
	s_nop 0
	s_endpgm
.Lfunc_end0:
kernel:                                 ; @kernel
; %bb.0:                                ; v_mov_b32 in a comment
	;;#ASMSTART
	v_add_f32_dpp v0, v1, v2 row_shr:1
	;;#ASMEND
.LBB1_1:                                ; =>This Inner Loop Header: Depth=1
	global_load_short_d16_hi v0, v1, s[0:1]
	global_load_ubyte_d16 v0, v1, s[0:1]
	global_load_lds_dwordx4 v0, s[0:1]
	buffer_load_dwordx3 v[0:2], v3, s[0:3], 0 offen
	buffer_store_byte_d16_hi v0, v3, s[0:3], 0 offen
	flat_load_dword v0, v[0:1]
	s_buffer_load_dwordx4 s[0:3], s[0:3], 0x0
	v_mfma_f32_32x32x16_bf16 a[0:15], v[0:3], v[4:7], a[0:15]
	v_mfma_f32_32x32x16_bf16 a[0:15], v[0:3], v[4:7], 0
	v_smfmac_f32_16x16x32_bf16 v[0:3], v[0:1], v[0:3], v4
	v_accvgpr_read_b32 v0, a0
	ds_bpermute_b32 v0, v1, v2
	s_sleep 1
	s_setprio 1
	buffer_wbl2 sc1
	s_add_u32 s0, s0, s1
	s_cbranch_scc1 .LBB1_1
	s_endpgm
	.section	.rodata,"a",@progbits
	.amdhsa_kernel kernel
		.amdhsa_next_free_vgpr max(totalnumvgprs(kernel.num_agpr, kernel.num_vgpr), 1, 0)
	.end_amdhsa_kernel
	.text
.Lfunc_end1:
	.size	kernel, .Lfunc_end1-kernel
	.amdgpu_metadata
---
amdhsa.kernels:
  - .agpr_count:     16
    .args:
      - .name:           kernel
        .offset:         0
        .sgpr_count:     99
    .group_segment_fixed_size: 0
    .kernarg_segment_size: 8
    .name:           other
    .private_segment_fixed_size: 0
    .sgpr_count:     10
    .sgpr_spill_count: 0
    .vgpr_count:     20
    .vgpr_spill_count: 0
  - .agpr_count:     16
    .group_segment_fixed_size: 512
    .kernarg_segment_size: 16
    .language_version:
      - 2
      - 0
    .name:           'kernel'
    .private_segment_fixed_size: 4
    .sgpr_count:     30
    .sgpr_spill_count: 1
    .uses_dynamic_stack: false
    .vgpr_count:     80
    .vgpr_spill_count: 2
amdhsa.target:   amdgcn-amd-amdhsa--gfx942
amdhsa.version:
  - 1
  - 2
...
	.end_amdgpu_metadata
"""


def test_metadata_is_read_as_it_is_nested():
    assert read_resources(TEXT, "kernel") == Resources(
        vgprs=80,
        agprs=16,
        sgprs=30,
        lds_bytes=512,
        scratch_bytes=4,
        vgpr_spills=2,
        sgpr_spills=1,
        waves_per_simd=6,
        kernarg_bytes=16,
        kernarg_preload_sgprs=0,
    )


def test_each_instruction_counts_once_as_what_it_is():
    mix = read_instruction_mix(TEXT, "kernel")
    assert mix.mfma == {"v_mfma_f32_32x32x16_bf16": 2, "v_smfmac_f32_16x16x32_bf16": 1}
    assert mix.global_loads == {"8": 1, "16": 1, "96": 1, "128": 1}
    assert mix.global_stores == {"8": 1}
    assert (mix.lds, mix.flat, mix.scratch, mix.scalar_loads, mix.barriers) == (1, 1, 0, 1, 0)
    assert (mix.valu, mix.salu, mix.branches, mix.waits, mix.calls) == (2, 1, 1, 1, 0)
    assert mix.other == 3  # the priority, the cache's write-back and the end
    assert mix.total == 3 + 5 + 3 + 5 + 3


def test_registers_that_are_reserved_count_for_the_waves():
    text = re.sub(r"next_free_vgpr .*", "next_free_vgpr 97", TEXT)
    assert read_resources(text, "kernel").waves_per_simd == 4
    assert read_resources(text, "kernel").vgprs == 80


def test_a_prologue_is_one_only_if_arguments_are_preloaded():
    prologue = "\ts_load_dword s2, s[0:1], 0x0\n\ts_waitcnt lgkmcnt(0)\n\ts_branch .LBB1_0\n\t.p2align\t8\n.LBB1_0:\n"
    with_prologue = TEXT.replace("; %bb.0:", prologue + "; %bb.0:")
    loads = read_instruction_mix(TEXT, "kernel").scalar_loads
    assert read_instruction_mix(with_prologue, "kernel").scalar_loads == loads + 1
    preloaded = with_prologue.replace(
        "\t.end_amdhsa_kernel", "\t\t.amdhsa_user_sgpr_kernarg_preload_length 1\n\t.end_amdhsa_kernel"
    )
    assert read_instruction_mix(preloaded, "kernel") == read_instruction_mix(TEXT, "kernel")
    assert read_resources(preloaded, "kernel").kernarg_preload_sgprs == 1


@pytest.mark.parametrize("damage", ["    .vgpr_count:     80\n", "    .private_segment_fixed_size: 4\n"])
def test_what_is_missing_is_named(damage):
    key = damage.split(":")[0].strip(" .")
    with pytest.raises(BuildError, match=f"kernel: cannot read its resources: {key} is 'missing'"):
        read_resources(TEXT.replace(damage, ""), "kernel")
    with pytest.raises(BuildError, match=f"{key} is 'x'"):
        read_resources(TEXT.replace(damage, f"    .{key}: x\n"), "kernel")


def test_text_that_is_cut_off():
    for end in ("\t.amdhsa_kernel kernel", "\t.end_amdhsa_kernel", "---", "  - .agpr_count:     16\n    .group_segment"):
        with pytest.raises(BuildError, match="no complete kernel kernel"):
            read_resources(TEXT[: TEXT.index(end)], "kernel")
    with pytest.raises(BuildError, match=r"no complete kernel kernel.*: none"):
        read_instruction_mix("", "kernel")


def test_an_unknown_arch():
    with pytest.raises(TargetError, match="gfx1250"):
        read_resources(TEXT.replace("gfx942", "gfx1250"), "kernel")
