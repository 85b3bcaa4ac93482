"""The compilers for NVIDIA GPUs: how one is chosen, and what they tell of kernels of known content."""

import dataclasses
import json
import re
import shutil
import struct
import subprocess
from pathlib import Path

import pytest

from mlagen import cuda_toolchain
from mlagen.compilers import read_instruction_mix, read_resources, refuse_spills, suffix
from mlagen.cuda_toolchain import compile_device, fingerprint
from mlagen.errors import BuildError, RequestError, TargetError, ToolchainError

PLAIN = 'extern "C" __global__ void plain(const float* a, float* out) { out[threadIdx.x] = a[threadIdx.x]; }\n'

THROUGH_SHARED = """\
extern "C" __global__ void through_shared(const int* a, int* out)
{
    __shared__ int both[1000];
    both[threadIdx.x] = a[threadIdx.x];
    __syncthreads();
    out[threadIdx.x] = both[255 - threadIdx.x];
}
"""

DYNAMIC_INDEX = """\
extern "C" __global__ void dynamic_index(const int* a, int* out)
{
    int kept[64];
    for (int i = 0; i < 64; ++i) kept[i] = a[threadIdx.x * 64 + i];
    for (int i = 0; i < 64; ++i) out[threadIdx.x * 64 + i] = kept[a[i] & 63];
}
"""

# Two workgroups of 1024 lanes leave 32 registers to each lane.
SPILLING = """\
extern "C" __global__ __launch_bounds__(1024, 2) void spilling(const float* a, float* out)
{
    float kept[120];
#pragma unroll
    for (int i = 0; i < 120; ++i) kept[i] = a[threadIdx.x + i * 1024];
    __syncthreads();
#pragma unroll
    for (int i = 0; i < 120; ++i) out[threadIdx.x + i * 1024] = kept[i] * kept[119 - i];
}
"""

RECURSING = """\
__device__ __noinline__ int recurse(int n, const int* a) { return n < 2 ? a[n] : recurse(n - 1, a) * recurse(n - 2, a) + 3; }
extern "C" __global__ void recursing(const int* a, int* out) { out[threadIdx.x] = recurse(a[threadIdx.x], a); }
"""


@pytest.fixture(autouse=True)
def no_settings(monkeypatch):
    monkeypatch.delenv("MLAGEN_CUDA_TOOLCHAIN", raising=False)


@pytest.fixture(params=["nvrtc", "nvcc"])
def toolchain(request) -> str:
    try:
        fingerprint(request.param)
    except ToolchainError:
        pytest.skip(request.param)
    return request.param


def version(toolchain: str) -> str:
    """What the compiler calls itself; its fingerprint tells its builds apart."""
    return {"nvrtc": cuda_toolchain.nvrtc_version, "nvcc": cuda_toolchain.nvcc_identity}[toolchain]()


def compile_for_hopper(source: str, toolchain: str = "auto") -> cuda_toolchain.CudaBinary:
    """The kernel of a source, which is called as the last function in it."""
    return compile_device(source, "sm_90", name=name_of(source), toolchain=toolchain)


def name_of(source: str) -> str:
    return re.findall(r"void (\w+)\(", source)[-1]


def driver_reads(cubin: bytes, kernel: str) -> tuple[int, int]:
    """Registers and stack bytes of `kernel` in the cubin's section .nv.info, where the driver looks."""
    places, size, count, names = *struct.unpack_from("<Q", cubin, 40), *struct.unpack_from("<3H", cubin, 58)
    sections = [struct.unpack_from("<IIQQQQIIQQ", cubin, places + size * number) for number in range(count)]

    def text(section: int, place: int) -> str:
        first = sections[section][4] + place
        return cubin[first : cubin.index(b"\0", first)].decode()

    by_name = {text(names, each[0]): each for each in sections}
    symbols = by_name[".symtab"]
    numbers = range(symbols[5] // 24)
    (symbol,) = [i for i in numbers if text(symbols[6], *struct.unpack_from("<I", cubin, symbols[4] + 24 * i)) == kernel]
    place, end = by_name[".nv.info"][4], by_name[".nv.info"][4] + by_name[".nv.info"][5]
    found = {}
    while place < end:
        kind, attribute, length = struct.unpack_from("<BBH", cubin, place)
        assert kind == 4, "a list of words"
        words = struct.unpack_from(f"<{length // 4}I", cubin, place + 4)
        place += 4 + length
        if words[0] == symbol:
            found[attribute] = words[1]
    return found[0x2F], found[0x11]  # EIATTR_REGCOUNT, EIATTR_FRAME_SIZE


# Compiling


@pytest.mark.cuda
def test_a_cubin_is_for_its_arch(toolchain):
    compiled = compile_for_hopper(PLAIN, toolchain)
    osabi, machine, flags = compiled.binary[7], *struct.unpack_from("<H", compiled.binary, 18), compiled.binary[48:52]
    assert (compiled.binary[:5], machine) == (b"\x7fELF\x02", 190)
    assert flags[1 if osabi == 0x41 else 0] == 90  # where a version of the format has the arch
    assert "-arch=sm_90a " in compiled.command  # wgmma is only there
    assert suffix(compiled) == "cubin"
    assert compiled.warnings == ""
    assert compiled.compiler == version(toolchain)


@pytest.mark.cuda
def test_the_surroundings_change_no_byte(toolchain, tmp_path, monkeypatch):
    first = compile_for_hopper(THROUGH_SHARED, toolchain)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setenv("NVCC_APPEND_FLAGS", "-lineinfo")
    monkeypatch.chdir(tmp_path)
    assert compile_for_hopper(THROUGH_SHARED, toolchain).binary == first.binary
    assert not list(tmp_path.iterdir())


@pytest.mark.cuda
def test_warnings_are_kept(toolchain):
    source = PLAIN.replace("{", "{ int unused;", 1)
    compiled = compile_for_hopper(source, toolchain)
    assert re.search(r"plain\.hip\(1\): warning .*unused", compiled.warnings)
    assert "registers" not in compiled.warnings


@pytest.mark.cuda
def test_a_failure_is_reported_whole(toolchain, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    source = PLAIN + "int first = missing_one;\nint second = missing_two;\n"
    with pytest.raises(BuildError) as caught:
        compile_for_hopper(source, toolchain)
    error = str(caught.value)
    assert error.startswith(f"plain: {version(toolchain)} failed\n")
    for words in ('identifier "missing_one"', 'identifier "missing_two"'):
        assert words in error
    kept, command = (re.search(rf"^{word}: (.*)$", error, re.MULTILINE).group(1) for word in ("source", "command"))
    assert Path(kept).read_text() == source
    if shutil.which("nvcc"):
        again = subprocess.run(command, shell=True, capture_output=True, text=True, timeout=60)
        assert again.returncode
        assert 'identifier "missing_two"' in again.stderr


@pytest.mark.parametrize("arch", ["", "gfx942", "sm_9", "sm_90 -v", "compute_90", "SM_90"])
def test_an_unusable_arch(arch):
    with pytest.raises(TargetError, match="arch="):
        compile_device(PLAIN, arch, name="plain")


# What a kernel costs


@pytest.mark.cuda
@pytest.mark.parametrize("source", [PLAIN, THROUGH_SHARED, DYNAMIC_INDEX, SPILLING], ids=name_of)
def test_the_driver_reads_the_same(source, toolchain):
    compiled = compile_for_hopper(source, toolchain)
    usage = read_resources(compiled, name_of(source))
    assert (usage.registers, usage.local_bytes) == driver_reads(compiled.binary, name_of(source))
    assert usage.shared_bytes == (4000 if source is THROUGH_SHARED else 0)
    assert usage.waves_per_simd == 16
    assert read_instruction_mix(compiled, name_of(source)) is None
    assert json.loads(json.dumps(dataclasses.asdict(usage))) == dataclasses.asdict(usage)


@pytest.mark.cuda
@pytest.mark.parametrize("source", [PLAIN, THROUGH_SHARED], ids=name_of)
def test_a_kernel_in_registers_is_accepted(source, toolchain):
    refuse_spills(read_resources(compile_for_hopper(source, toolchain), name_of(source)), name_of(source))


@pytest.mark.cuda
def test_spills_are_refused(toolchain):
    usage = read_resources(compile_for_hopper(SPILLING, toolchain), "spilling")
    assert usage.registers == 32
    assert usage.spill_store_bytes >= 4 * (120 - 32) <= usage.spill_load_bytes
    with pytest.raises(BuildError, match=rf"{usage.spill_store_bytes} bytes of spill stores and {usage.spill_load_bytes} of"):
        refuse_spills(usage, "spilling")


@pytest.mark.cuda
def test_an_array_in_local_memory_is_refused(toolchain):
    usage = read_resources(compile_for_hopper(DYNAMIC_INDEX, toolchain), "dynamic_index")
    assert (usage.local_bytes, usage.spill_store_bytes, usage.spill_load_bytes) == (256, 0, 0)
    with pytest.raises(BuildError, match=r"dynamic_index: 256 bytes of local memory per lane"):
        refuse_spills(usage, "dynamic_index")


@pytest.mark.cuda
def test_a_stack_of_unknown_depth_is_refused(toolchain):
    usage = read_resources(compile_for_hopper(RECURSING, toolchain), "recursing")
    with pytest.raises(BuildError, match=r"recursing: [1-9]\d* bytes of local memory"):
        refuse_spills(usage, "recursing")


# The choice of a toolchain


@pytest.fixture
def both(monkeypatch) -> list[str]:
    """Both compilers are there, and only say which of them was called."""
    called: list[str] = []
    for name in ("nvrtc", "nvcc"):
        monkeypatch.setattr(cuda_toolchain, f"_{name}", lambda *_, name=name: called.append(name))
    for name, tells in (("nvrtc", "nvrtc_version"), ("nvcc", "nvcc_identity")):
        monkeypatch.setattr(cuda_toolchain, tells, lambda name=name: called.append(name) or name)
    monkeypatch.setattr(cuda_toolchain, "_nvrtc_build", lambda libraries: "nvrtc")
    monkeypatch.setattr(cuda_toolchain, "_load_nvrtc", object)
    return called


@pytest.mark.parametrize(
    ("option", "variable", "expected"),
    [
        ("auto", None, "nvrtc"),
        ("auto", "", "nvrtc"),
        ("auto", "auto", "nvrtc"),
        ("auto", "nvcc", "nvcc"),
        ("auto", "nvrtc", "nvrtc"),
        ("nvcc", None, "nvcc"),
        ("nvcc", "nvrtc", "nvcc"),
        ("nvrtc", "nvcc", "nvrtc"),
    ],
)
def test_the_option_comes_before_the_variable(both, monkeypatch, option, variable, expected):
    if variable is not None:
        monkeypatch.setenv("MLAGEN_CUDA_TOOLCHAIN", variable)
    compile_device(PLAIN, "sm_90", name="plain", toolchain=option)
    assert fingerprint(option)[0] == expected
    assert both == [expected, expected]


def test_an_unknown_toolchain(both, monkeypatch):
    for name in ("zig", "", "NVCC"):
        with pytest.raises(RequestError, match=f"^toolchain='{name}' is not a toolchain for NVIDIA GPUs; possible are auto, nvrtc"):
            compile_device(PLAIN, "sm_90", name="plain", toolchain=name)
    monkeypatch.setenv("MLAGEN_CUDA_TOOLCHAIN", "gcc")
    with pytest.raises(RequestError, match=r"^MLAGEN_CUDA_TOOLCHAIN='gcc' is not a toolchain for NVIDIA GPUs"):
        fingerprint()
    assert not both


@pytest.fixture
def neither(monkeypatch):
    """No compiler for NVIDIA GPUs."""
    monkeypatch.setattr(cuda_toolchain, "_load_nvrtc", lambda: None)
    monkeypatch.setenv("PATH", "")
    cuda_toolchain.nvcc_identity.cache_clear()
    yield
    cuda_toolchain.nvcc_identity.cache_clear()


@pytest.mark.usefixtures("neither")
@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("auto", ["no compiler for NVIDIA GPUs", "pip install 'mlagen[cuda]'", "install the CUDA toolkit"]),
        ("nvrtc", ["NVRTC is not installed", "pip install 'mlagen[cuda]'"]),
        ("nvcc", ["nvcc is not on the PATH", "install the CUDA toolkit", "pip install 'mlagen[cuda]'"]),
    ],
)
def test_a_missing_compiler_is_named_with_the_remedy(option, words):
    for ask in (lambda: compile_device(PLAIN, "sm_90", name="plain", toolchain=option), lambda: fingerprint(option)):
        with pytest.raises(ToolchainError) as caught:
            ask()
        assert "\n" not in str(caught.value)
        assert [word for word in words if word not in str(caught.value)] == []


def test_nvcc_serves_where_there_is_no_nvrtc(both, monkeypatch):
    monkeypatch.setattr(cuda_toolchain, "_load_nvrtc", lambda: None)
    monkeypatch.setattr(shutil, "which", lambda name: f"/bin/{name}")
    assert fingerprint()[0] == "nvcc"
