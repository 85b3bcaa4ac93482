"""The same kernel twice, behind the same arguments: run by the host, and as machine code by the emulator."""

import ctypes
import functools
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from helpers import Launch, Workload, make_launch, output_bytes, single_kernel
from isa.emulator import Emulator, Span, WaveTrace

from mlagen import codegen, runtime, schedule, toolchain
from mlagen.drivers.host import HostModule
from mlagen.lowering import lower
from mlagen.spec import PrologueSpec
from mlagen.target import TARGETS
from mlagen.verify import compare_case, describe

ARCHS = ("gfx942", "gfx950")


@functools.cache
def emulator(arch: str) -> Emulator:
    return Emulator(arch)


class EmulatedModule:
    """Stands where a driver's module stands.  `memory` is what the next launch may use, `traces` what the last one did."""

    def __init__(self, generated: codegen.GeneratedKernel) -> None:
        device = toolchain.compile_device(generated.source, generated.arch, name=generated.name)
        self.assembly, self.arguments = device.assembly, generated.arguments
        self.kernel = emulator(generated.arch).load(device.binary, generated.name)
        self.memory: Sequence[Span] = ()
        self.preload = True
        self.traces: list[WaveTrace] = []

    def parameters(self, address: int) -> int:
        return address

    def launch(self, grid: int, block: int, parameters: int, shared_bytes: int = 0) -> None:
        assert not shared_bytes, "only kernels for NVIDIA GPUs ask for shared memory"
        self.traces = self.kernel.launch(grid, block, self._segment(parameters), self.memory, preload=self.preload)

    def _segment(self, parameters: int) -> bytes:
        """The kernel argument segment that a runtime makes of a list of pointers: each value at its natural alignment."""
        segment = b""
        sizes = [4 if argument.kind == "int32" else 8 for argument in self.arguments]
        for pointer, size in zip((ctypes.c_void_p * len(sizes)).from_address(parameters), sizes, strict=True):
            segment += bytes(-len(segment) % size) + ctypes.string_at(pointer, size)
        return segment


@dataclass(frozen=True)
class Pair:
    """One kernel on both machines; `module` is the device's."""

    generated: codegen.GeneratedKernel
    host: runtime.Kernel
    device: runtime.Kernel
    module: EmulatedModule

    def plan(self, tokens: int) -> schedule.Launch:
        return self.generated.schedule.launch(
            self.generated.lowered.segments, tokens, self.host.spec.heads, kv_heads=self.host.spec.kv_heads
        )


@functools.cache
def build(spec: PrologueSpec, arch: str, *, waves_per_workgroup: int = 1, compute_units: int | None = None) -> Pair:
    """Both kernels of `spec`; fewer `compute_units` than the arch has make a workgroup take more token tiles."""
    target = TARGETS[arch]
    program = spec.program(target)
    lowered = lower(program)
    chosen = schedule.choose_schedule(lowered, target, waves_per_workgroup=waves_per_workgroup)
    if compute_units:
        chosen = replace(chosen, compute_units=compute_units)
    generated = codegen.render(codegen.kernel_name(spec, target), program, lowered, chosen, target)
    module: Any = EmulatedModule(generated)
    host = HostModule(toolchain.compile_host(generated.host_source, name=generated.name))
    on_host, on_device = (single_kernel(spec, generated, each) for each in (host, module))
    return Pair(generated, on_host, on_device, module)


def run_on_device(pair: Pair, launch: Launch, *, preload: bool = True) -> list[WaveTrace]:
    """Run a launch in the emulator.  The machine code may read rows of inputs, write each byte of the outputs once, and no more."""
    tensors = _tensors(launch.arguments)
    written = [_whole(tensors.pop(name), "w") for name in ("out", "out[0]", "out[1]", "kv_cache") if name in tensors]
    read = (*tensors.values(), *pair.device.unit_scales)
    pair.module.memory = [*itertools.chain.from_iterable(map(_rows, read)), *written]
    pair.module.preload = preload
    pair.device(**launch.arguments)
    assert max(int(output.writes.max(initial=0)) for output in written) <= 1, "a byte of an output was written more than once"
    return pair.module.traces


def run_both(pair: Pair, on_device: Launch, on_host: Launch, *, preload: bool = True) -> list[WaveTrace]:
    """Run two launches with equal inputs, one on each machine: they leave the same bytes, guards included.

    A NaN need only be one on both: a compiler may turn a - b into a + -b, and with that the sign of a NaN.
    """
    traces = run_on_device(pair, on_device, preload=preload)
    pair.host(**on_host.arguments)
    differ = int((output_bytes(on_device) != output_bytes(on_host)).sum())
    for device, host in zip(_outputs(on_device), _outputs(on_host), strict=True):
        both_nan = device.float().isnan() & host.float().isnan()
        ours, theirs = (bits(tensor)[both_nan].view(torch.uint8) for tensor in (device, host))
        differ -= int((ours != theirs).sum())
    assert not differ, f"{differ} bytes differ from the host run"
    return traces


def _outputs(launch: Launch) -> list[torch.Tensor]:
    return [guarded.tensor for guarded in (*launch.case.queries, launch.case.kv_cache) if guarded]


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """The same memory as integers."""
    return tensor.view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[tensor.dtype.itemsize])


def check(pair: Pair, workload: Workload, *, preload: bool = True) -> list[WaveTrace]:
    """Run a workload on both machines: the same bytes, and nothing that the oracle does not explain."""
    on_device, on_host = (make_launch(kernel, workload) for kernel in (pair.device, pair.host))
    traces = run_both(pair, on_device, on_host, preload=preload)
    compared = compare_case(pair.host.spec, pair.host.target, on_device.case)
    failed = [describe(part) for part in compared if not part.passed]
    assert not failed, failed
    return traces


def _tensors(arguments: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The tensors among a kernel's arguments, pairs taken apart."""
    found = {}
    for name, value in arguments.items():
        for number, part in enumerate(value if isinstance(value, tuple) else (value,)):
            if part is not None:
                found[f"{name}[{number}]" if isinstance(value, tuple) else name] = part
    return found


def _whole(tensor: torch.Tensor, mode: str) -> Span:
    """All of a tensor's storage."""
    storage = tensor.untyped_storage()
    return Span(storage.data_ptr(), storage.nbytes(), mode)


def _rows(tensor: torch.Tensor) -> Iterator[Span]:
    """Each row of a tensor, or all of it where nothing lies between its rows."""
    if tensor.is_contiguous():
        yield Span(tensor.data_ptr(), tensor.nbytes, "r")
    else:
        for place in itertools.product(*map(range, tensor.shape[:-1])):
            yield Span(tensor[place].data_ptr(), tensor[place].nbytes, "r")
