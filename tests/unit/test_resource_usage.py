"""What ptxas says of a kernel's resources, in the words of its versions, and what is refused of it."""

import dataclasses

import pytest

from mlagen.errors import BuildError, TargetError
from mlagen.resource_usage import ResourceUsage, read_usage, refuse_local_memory, split_usage

NVRTC_13 = """\
ptxas info    : 56 bytes gmem
ptxas info    : Compiling entry function 'spilling' for 'sm_90'
ptxas info    : Function properties for spilling
ptxas         .     664 bytes stack frame, 768 bytes spill stores, 772 bytes spill loads
ptxas info    : Used 32 registers, used 1 barriers, 664 bytes cumulative stack size
ptxas info    : Compile time = 26.843 ms
ptxas info    : Compiling entry function 'shared' for 'sm_90'
ptxas info    : Function properties for shared
ptxas         .     0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 122 registers, used 1 barriers, 4000 bytes smem
ptxas info    : Compile time = 1.980 ms
"""

NVRTC_12 = """\
ptxas info    : 56 bytes gmem
ptxas info    : Compiling entry function 'spilling' for 'sm_90'
ptxas info    : Function properties for spilling
ptxas         .     664 bytes stack frame, 768 bytes spill stores, 772 bytes spill loads
ptxas info    : Used 32 registers, 664 bytes cumulative stack size
ptxas info    : Compiling entry function 'shared' for 'sm_90'
ptxas info    : Function properties for shared
ptxas         .     0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 122 registers, 4000 bytes smem, 552 bytes cmem[0]
"""

VERSIONS = {"NVRTC 13": NVRTC_13, "NVRTC 12": NVRTC_12, "nvcc": NVRTC_13.replace("ptxas         .", "")}
each_version = pytest.mark.parametrize("usage", VERSIONS.values(), ids=VERSIONS.keys())

RECURSING = """\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'recursing' for 'sm_90'
ptxas info    : Function properties for recursing
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 24 registers, used 0 barriers
ptxas info    : Function properties for _Z3reciPKi
    32 bytes stack frame, 28 bytes spill stores, 24 bytes spill loads
"""

NONE = ResourceUsage(64, 4000, 0, 0, 0, 8)


@each_version
def test_each_version_is_read(usage):
    assert read_usage(usage, "spilling") == ResourceUsage(32, 0, 664, 768, 772, 16)
    assert read_usage(usage, "shared") == ResourceUsage(122, 4000, 0, 0, 0, 4)


@pytest.mark.parametrize(("registers", "waves"), [(10, 16), (32, 16), (40, 12), (41, 10), (128, 4), (129, 3), (255, 2)])
def test_waves_are_what_the_registers_leave_room_for(registers, waves):
    """Of the 512 of each lane of a SIMD, in blocks of 8; a SIMD holds 16 waves at most."""
    assert read_usage(NVRTC_13.replace("Used 122", f"Used {registers}"), "shared").waves_per_simd == waves


def test_functions_that_are_called_count():
    assert read_usage(RECURSING, "recursing") == ResourceUsage(24, 0, 32, 28, 24, 16)


def test_the_stack_of_a_chain_of_calls_counts():
    text = RECURSING.replace("used 0 barriers", "used 0 barriers, 96 bytes cumulative stack size")
    assert read_usage(text, "recursing").local_bytes == 96


@pytest.mark.parametrize("lost", ["Compiling", "Used", "stack frame"])
def test_what_is_not_told_is_an_error(lost):
    text = "".join(line for line in NVRTC_13.splitlines(keepends=True) if lost not in line)
    with pytest.raises(BuildError, match="shared: ptxas does not tell its resources"):
        read_usage(text, "shared")


def test_the_resources_of_another_kernel_are_not_taken():
    before, _, after = NVRTC_13.partition("ptxas info    : Compiling entry function 'shared'")
    for text in (before, after):
        with pytest.raises(BuildError, match=r"shared: ptxas does not tell .*: (spilling|none)$"):
            read_usage(text, "shared")
    with pytest.raises(BuildError, match="of which it tells any: spilling, shared"):
        read_usage(NVRTC_13, "share")


def test_an_arch_without_a_target():
    with pytest.raises(TargetError, match="sm_75"):
        read_usage(NVRTC_13.replace("sm_90", "sm_75"), "shared")


# Warnings


@each_version
def test_the_usage_is_no_warning(usage):
    assert split_usage(usage) == (usage, "")
    assert split_usage("") == ("", "")


@pytest.mark.parametrize(
    "warning",
    [
        "ptxas warning : Stack size for entry function 'shared' cannot be statically determined",
        "ptxas info    : (C7510) Potential Performance Loss: wgmma.mma_async instructions are serialized",
        'k.hip(3): warning #177-D: variable "i" was declared but never referenced',
    ],
)
@each_version
def test_warnings_are_told_apart(usage, warning):
    for place in (0, len(usage)):
        assert split_usage(f"{usage[:place]}{warning}\n{usage[place:]}") == (usage, warning)


# Refusal


def test_a_kernel_without_local_memory_is_accepted():
    refuse_local_memory(NONE, "kernel")


@pytest.mark.parametrize("field", ["local_bytes", "spill_store_bytes", "spill_load_bytes"])
def test_each_kind_of_local_memory_is_refused(field):
    with pytest.raises(BuildError, match=r"^kernel: .*\b24 .*; it uses 64 registers: take a schedule with a smaller tile"):
        refuse_local_memory(dataclasses.replace(NONE, **{field: 24}), "kernel")


@each_version
def test_what_was_read_is_refused(usage):
    refuse_local_memory(read_usage(usage, "shared"), "shared")
    words = "spilling: 664 bytes of local memory per lane, 768 bytes of spill stores and 772 of spill loads"
    with pytest.raises(BuildError, match=words):
        refuse_local_memory(read_usage(usage, "spilling"), "spilling")
