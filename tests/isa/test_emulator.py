"""The emulator's own part: what it must refuse, and what it must count."""

import functools
import struct
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from isa.emulator import EmulationError, Kernel, Span, WaveTrace
from isa.machine import ARCHS, emulator

from mlagen import toolchain

pytestmark = [pytest.mark.isa, pytest.mark.compiler]

SOURCE = """
#define KERNEL extern "C" __attribute__((global, amdgpu_flat_work_group_size(64, 64))) void
using u32 = unsigned int;

KERNEL copy(const u32* from, u32* to, int distance)
{
    to[__builtin_amdgcn_workitem_id_x() + distance] = from[__builtin_amdgcn_workitem_id_x()];
}

KERNEL chase(const u32* from, u32* to, int loads)
{
    u32 at = __builtin_amdgcn_workitem_id_x();
    for (int i = 0; i < loads; ++i) at = from[at];
    to[__builtin_amdgcn_workitem_id_x()] = at;
}

KERNEL side_by_side(const u32* from, u32* to, int distance)
{
    const u32 lane = __builtin_amdgcn_workitem_id_x();
    to[lane] = from[lane] + from[lane + distance] + from[lane + 2 * distance];
}

KERNEL codes(const float* from, u32* to, int saturate)
{
    if (saturate) __builtin_amdgcn_s_setreg(1 | 23 << 6, 1);  // one bit of MODE: FP16_OVFL
    const u32 lane = __builtin_amdgcn_workgroup_id_x() * 64 + __builtin_amdgcn_workitem_id_x();
    const u32 low = __builtin_amdgcn_cvt_pk_fp8_f32(from[4 * lane], from[4 * lane + 1], 0, false);
    to[lane] = __builtin_amdgcn_cvt_pk_fp8_f32(from[4 * lane + 2], from[4 * lane + 3], low, true);
}
"""


@functools.cache
def kernel(name: str, arch: str) -> Kernel:
    return emulator(arch).load(toolchain.compile_device(SOURCE, arch, name="driver").binary, name)


def launch(
    name: str, arch: str, source: torch.Tensor, target: torch.Tensor, number: int, spans: Sequence[Span] = (), *, grid: int = 1
) -> list[WaveTrace]:
    """Run kernel `name`, by default with all of `source` to read and of `target` to write."""
    spans = spans or (Span(source.data_ptr(), source.nbytes, "r"), Span(target.data_ptr(), target.nbytes, "w"))
    return kernel(name, arch).launch(grid, 64, struct.pack("<QQi", source.data_ptr(), target.data_ptr(), number), spans)


@pytest.mark.parametrize("arch", ARCHS)
def test_accesses_outside_the_given_memory_are_refused(arch: str) -> None:
    source, target = torch.arange(64, dtype=torch.int32), torch.zeros(64, dtype=torch.int32)
    launch("copy", arch, source, target, 0)
    assert torch.equal(source, target)
    for distance in (1, -1, 10**6):
        with pytest.raises(EmulationError, match="outside its memory"):
            launch("copy", arch, source, target, distance)
    read, written = Span(source.data_ptr(), source.nbytes, "r"), Span(target.data_ptr(), target.nbytes, "w")
    short = Span(source.data_ptr(), source.nbytes - 1, "r")
    with pytest.raises(EmulationError, match="outside its memory"):
        launch("copy", arch, source, target, 0, (short, written))
    for spans in ((written, read), (read, Span(target.data_ptr(), target.nbytes, "r"))):
        swapped = (target, source) if spans[0] is written else (source, target)
        with pytest.raises(EmulationError, match="memory of mode"):
            launch("copy", arch, *swapped, 0, spans)


def test_writes_are_counted() -> None:
    source, target = torch.arange(64, dtype=torch.int32), torch.zeros(65, dtype=torch.int32)
    spans = Span(source.data_ptr(), source.nbytes, "r"), Span(target.data_ptr(), target.nbytes, "w")
    launch("copy", "gfx942", source, target, 0, spans, grid=2)
    launch("copy", "gfx942", source, target, 1, spans)
    assert spans[1].writes.tolist() == [2] * 4 + [3] * 252 + [1] * 4


@pytest.mark.parametrize("arch", ARCHS)
def test_dependent_loads_are_round_trips(arch: str) -> None:
    source, target = torch.arange(64, dtype=torch.int32).roll(1), torch.zeros(64, dtype=torch.int32)
    for loads in (1, 2, 7):
        (trace,) = launch("chase", arch, source, target, loads)
        assert torch.equal(target, torch.arange(64, dtype=torch.int32).roll(loads))
        assert trace.round_trips == loads
        assert trace.counts["global_load_dword"] == loads
    (trace,) = launch("side_by_side", arch, torch.arange(192, dtype=torch.int32), target, 64)
    assert target.tolist() == [3 * i + 192 for i in range(64)]
    assert trace.round_trips == 1


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("saturate", [False, True])
def test_fp8_conversion(arch: str, saturate: bool) -> None:
    """Against torch's conversions; what is too large becomes NaN, unless MODE says otherwise."""
    dtype, largest, overflow = {
        "gfx942": (torch.float8_e4m3fnuz, 240.0, 248.0),
        "gfx950": (torch.float8_e4m3fn, 448.0, 464.0 * (1 + 2**-23)),
    }[arch]
    values = torch.cat((torch.arange(2**16) << 16, torch.randint(0, 2**32, (2**16,), generator=torch.Generator().manual_seed(0))))
    values = torch.from_numpy(values.numpy().astype(np.uint32)).view(torch.float32)
    codes = torch.zeros(len(values) // 4, dtype=torch.int32)
    launch("codes", arch, values, codes, saturate, grid=len(codes) // 64)
    got, expected = codes.view(torch.uint8), values.clamp(-largest, largest).to(dtype).view(torch.uint8)
    is_nan = values.isnan() | ((values.abs() >= overflow) & (not saturate))
    assert torch.equal(got[~is_nan], expected[~is_nan])
    assert got[is_nan].view(dtype).float().isnan().all()


def test_an_unknown_kernel_is_an_error() -> None:
    with pytest.raises(EmulationError, match="no symbol"):
        kernel("missing", "gfx942")
