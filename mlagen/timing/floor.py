"""The floors: an empty kernel, and kernels that only read and write what a prologue must, on the grids that suit a GPU."""

import torch

from mlagen import cuda_toolchain, toolchain
from mlagen.binaries import jit_allowed
from mlagen.codegen import FLOOR_THREADS, floor_arguments, floor_source
from mlagen.errors import MissingKernelError
from mlagen.plan import Module, fixed_parameters
from mlagen.runtime import open_module
from mlagen.target import Target
from mlagen.timing.candidate import Candidate, Result
from mlagen.timing.check import nothing
from mlagen.timing.workload import Workload

PIECE_BYTES = 16
WORKGROUPS_PER_UNIT = (0.5, 1, 2, 4, 8)
"""For each compute unit; which is best depends on how many bytes there are."""


class Floor:
    """The floors of one GPU; its kernels are compiled when they are first asked for."""

    def __init__(self, target: Target, device: torch.device) -> None:
        self._target, self._device = target, device
        self._binary: bytes | None = None
        self._modules: dict[str, Module] = {}

    def empty(self, workload: Workload) -> list[Candidate]:
        """One workgroup that does nothing: what a launch costs."""
        module, out = self._module("mlagen_empty"), workload.empty(1, workload.q_dtype)
        memory = fixed_parameters(floor_arguments()[:1], [out.data_ptr()])
        given = memory, module.parameters(memory.address)

        def launch(layer: int) -> torch.Tensor:
            module.launch(1, FLOOR_THREADS[0], given[1])
            return out

        return [Candidate("empty", launch, nothing)]

    def stream(self, workload: Workload) -> list[Candidate]:
        """Each layer's bytes of W_UK, q, kv_c and k_pe read, and as many as q_out and the new cache entries have written.

        What the spec leaves out is not read and not written.
        """
        units = torch.cuda.get_device_properties(self._device).multi_processor_count
        out = workload.empty(workload.spec.entry_dim, workload.q_dtype) if workload.spec.write_q else None
        found = []
        for threads in FLOOR_THREADS:
            module = self._module(f"mlagen_stream_{threads}")
            for share in WORKGROUPS_PER_UNIT:
                found.append(self._stream(workload, module, out, max(1, int(units * share)), threads))
        return found

    def _stream(self, workload: Workload, module: Module, out: torch.Tensor | None, workgroups: int, threads: int) -> Candidate:
        layers = range(workload.layers)
        memories = [fixed_parameters(floor_arguments(), [*self.arguments(workload, each, out), workgroups]) for each in layers]
        given = [(memory, module.parameters(memory.address)) for memory in memories]

        def launch(layer: int) -> Result:
            module.launch(workgroups, threads, given[layer][1])
            return out

        return Candidate(f"{workgroups} x {threads}", launch, nothing)

    @staticmethod
    def arguments(workload: Workload, layer: int, out: torch.Tensor | None) -> list[int]:
        """Address and whole pieces of each tensor of a layer; entries are written from the cache's first row on."""
        spec = workload.spec
        q = workload.q if spec.write_q else None
        rows = (workload.kv_c, workload.k_pe) if spec.write_kv else (None, None)
        entries = workload.caches[layer][: workload.tokens] if spec.write_kv else None
        # Codes are fewer bytes than the tensor of their values, from which they are read all the same.
        values = [workload.w_uk[layer].data_ptr(), workload.weight_bytes // PIECE_BYTES] if workload.w_uk else [0, 0]
        for tensor in (q, *rows, out, entries):
            values += [0, 0] if tensor is None else [tensor.data_ptr(), tensor.nbytes // PIECE_BYTES]
        return values

    def _module(self, kernel: str) -> Module:
        if kernel not in self._modules:
            self._modules[kernel] = open_module(self._compiled(), kernel, self._target, self._device)
        return self._modules[kernel]

    def _compiled(self) -> bytes:
        """Raises ToolchainError, BuildError, or MissingKernelError where MLAGEN_JIT=0."""
        if self._binary is None:
            if not jit_allowed():
                raise MissingKernelError("MLAGEN_JIT=0 forbids the compiler")
            source, compiler = floor_source(self._target), cuda_toolchain if self._target.platform == "nvidia" else toolchain
            self._binary = compiler.compile_device(source, self._target.arch, name=f"mlagen_floor_{self._target.arch}").binary
        return self._binary
