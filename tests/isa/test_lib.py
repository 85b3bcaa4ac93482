"""The device library, primitive by primitive: its machine code against the host library, for the same text."""

import functools
import itertools
import struct
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pytest
from isa.emulator import Kernel, Span
from isa.machine import ARCHS, emulator

from mlagen import toolchain
from mlagen.codegen import MARK, generate
from mlagen.drivers.host import HostModule
from mlagen.drivers.parameters import Parameters
from mlagen.spec import PrologueSpec
from mlagen.target import TARGETS

pytestmark = [pytest.mark.isa, pytest.mark.compiler, pytest.mark.host]

WIDTHS = (1, 2, 4, 8, 16)
SIZES = {"bf16": 2, "fp16": 2, "float": 4, "target_fp8": 1}
ELEMENTS = 2**16
"""Elements that each operation handles: as many as there are 16-bit codes."""

THREADS = 128

TEXT = """
constexpr uint32_t THREADS = 128;

// What each test does with one lane's elements: from in[i * N] on to out[i * N] on.
template <int N, class From, class To>
MLAGEN_DEVICE void convert(const From* in, To* out, uint32_t i)
{
    float x[N];
    load(in + i * N, x);
    if constexpr (sizeof(To) == 1) for (int j = 0; j < N; ++j) x[j] = saturate(x[j], LIMIT);
    store(out + i * N, x);
}

template <int N, class Element>
MLAGEN_DEVICE void round(const float* in, Element* out, uint32_t i)
{
    float x[N];
    load(in + i * N, x);
    round_to<Element>(x);
    store(out + i * N, x);
}

// Lanes of another wave wrote what this one reads.
MLAGEN_DEVICE void exchange(const uint32_t* in, uint32_t* out)
{
    MLAGEN_SHARED uint32_t shared[THREADS];
    const uint32_t thread = thread_id(), first = workgroup_id() * THREADS;
    for (int round = 0; round < 3; ++round) {
        shared[thread] = in[first + thread] + round;
        barrier();
        out[(first + thread) * 3 + round] = shared[(thread * 37 + 64) % THREADS];
        barrier();
    }
}

MLAGEN_DEVICE void move_across(const uint32_t* in, uint32_t* out)
{
    const uint32_t i = workgroup_id() * THREADS + thread_id();
    const uint32_t value = in[i];
    out[i * 3] = shuffle(value, thread_id() * 7 + 3);
    out[i * 3 + 1] = shuffle(value, value % 64);
    out[i * 3 + 2] = uniform(value);
}

extern "C" MLAGEN_KERNEL(THREADS) void conformance(const uint8_t* in, uint8_t* out, int32_t what)
{
    const uint32_t i = workgroup_id() * THREADS + thread_id();
    switch (what) {
CASES
    }
}
"""

HOST_ENTRY = """
static void run_lane(void** parameters)
{
    conformance(*static_cast<const uint8_t**>(parameters[0]), *static_cast<uint8_t**>(parameters[1]),
                *static_cast<int32_t*>(parameters[2]));
}

extern "C" int mlagen_host_launch(uint32_t grid, void** parameters, uint32_t cpu_threads, char* error, size_t error_size)
{
    return host::launch<run_lane, 64, THREADS>(grid, parameters, cpu_threads, error, error_size);
}
"""


@dataclass(frozen=True)
class Operation:
    """A statement on in, out and i; `width` elements are read for each lane, `written_bytes` bytes written."""

    statement: str
    source: str
    width: int
    element_bytes: int
    written_bytes: int


def _operations() -> dict[str, Operation]:
    found = {}

    def add(name: str, call: str, source: str, target: str, width: int) -> None:
        statement = f"{call}(reinterpret_cast<const {source}*>(in), reinterpret_cast<{target}*>(out), i)"
        found[name] = Operation(statement, source, width, SIZES[source], width * SIZES[target])

    for (source, target), width in itertools.product(itertools.product(SIZES, SIZES), WIDTHS):
        if source != "target_fp8" and target != "float":
            add(f"{source} to {target}, {width}", f"convert<{width}>", source, target, width)
    for target, width in itertools.product(("bf16", "fp16"), WIDTHS):
        add(f"round to {target}, {width}", f"round<{width}>", "float", target, width)
        statement = (
            f"copy<{width}>(reinterpret_cast<{target}*>(out) + i * {width}, reinterpret_cast<const {target}*>(in) + i * {width})"
        )
        found[f"copy {target}, {width}"] = Operation(statement, "bits", width, 2, 2 * width)
    for name, size, flag in (("int32", 4, 0), ("int64", 8, 1)):
        found[f"index {name}"] = Operation(f"reinterpret_cast<int64_t*>(out)[i] = load_index(in, i, {flag})", "bits", 1, size, 8)
    for name, function in (("barrier", "exchange"), ("across", "move_across")):
        statement = f"{function}(reinterpret_cast<const uint32_t*>(in), reinterpret_cast<uint32_t*>(out))"
        found[name] = Operation(statement, "bits", 1, 4, 12)
    return found


OPERATIONS = _operations()


@functools.cache
def build(arch: str) -> tuple[Kernel, HostModule]:
    """One kernel with every operation, on both machines."""
    target = TARGETS[arch]
    generated = generate(PrologueSpec(1, 16, 16, 2, "gptj"), target)
    cases = (f"    case {number}: {each.statement}; break;" for number, each in enumerate(OPERATIONS.values()))
    text = TEXT.replace("LIMIT", f"{target.fp8.largest}f").replace("CASES", "\n".join(cases))
    device, host = (source.split(MARK)[0] + text for source in (generated.source, generated.host_source))
    binary = toolchain.compile_device(device, arch, name="conformance").binary
    library = toolchain.compile_host(host + HOST_ENTRY, name="conformance")
    return emulator(arch).load(binary, "conformance"), HostModule(library)


def contents(source: str, size: int) -> npt.NDArray[np.uint8]:
    """`size` bytes that hold the values at which conversions differ: every 16-bit code, or all kinds of fp32."""
    generator = np.random.default_rng(0)
    if source in ("bf16", "fp16"):
        codes = np.resize(np.arange(2**16).astype(np.uint16), size // 2)
        # Converting an fp16 to fp32 and back makes a signalling NaN quiet, unless the compiler sees that it may leave both out.
        signalling = (codes & 0x7FFF > 0x7C00) & (codes & 0x0200 == 0)
        return np.where((source == "fp16") & signalling, codes | 0x0200, codes).view(np.uint8)
    if source == "bits":
        return generator.integers(0, 256, size, np.uint8)
    random = generator.integers(0, 2**32, size // 4, np.uint32)
    # Values near the ends of the 16-bit and 8-bit formats, ties among them, and NaN of every kind.
    near = (generator.normal(size=size // 4) * 2.0 ** generator.integers(-40, 20, size // 4)).astype(np.float32).view(np.uint32)
    ties = near & np.uint32(0xFFFF0000) | np.uint32(0x8000)
    half_ties = near & np.uint32(0xFFFFE000) | np.uint32(0x1000)
    special = np.array([0, 1, 0x7F800000, 0x7F800001, 0x7FC00000, 0x7FFFFFFF, 0x7F7FFFFF, 0x477FF000, 0x33000000], np.uint32)
    special = np.resize(np.concatenate((special, special | np.uint32(1 << 31))), size // 4)
    kinds = np.stack((random, near, ties, half_ties, special))
    return kinds[generator.integers(0, 5, size // 4), np.arange(size // 4)].view(np.uint8)


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("name", OPERATIONS)
def test_primitive(name: str, arch: str) -> None:
    kernel, host = build(arch)
    operation, number = OPERATIONS[name], list(OPERATIONS).index(name)
    workgroups = ELEMENTS // (operation.width * THREADS)
    read, written = ELEMENTS * operation.element_bytes, workgroups * THREADS * operation.written_bytes
    # Aligned, and off by one element: rows may start at any.
    for shift in (0, operation.element_bytes):
        data = np.zeros(read + 64, np.uint8)
        data[shift : shift + read] = contents(operation.source, read)
        results = np.full((2, written + 64), 0xA5, np.uint8)
        arguments = [[data.ctypes.data + shift, result.ctypes.data + shift, number] for result in results]
        parameters = Parameters(struct.pack("QQq", *arguments[0]), (0, 1, 2))
        host.launch(workgroups, THREADS, parameters.address)
        spans = [Span(arguments[1][0], read, "r"), Span(arguments[1][1], written, "w")]
        kernel.launch(workgroups, THREADS, struct.pack("QQi", *arguments[1]), spans)
        assert np.array_equal(*results), f"shift {shift}: {_difference(results)}"


def _difference(results: npt.NDArray[np.uint8]) -> str:
    at = np.flatnonzero(results[0] != results[1])
    return f"{len(at)} bytes differ, the first at {at[0]}: host {results[0, at[0]]:#x}, device {results[1, at[0]]:#x}"
