"""The CUDA driver: a cubin, launched through cuda-bindings on the caller's stream."""

from typing import Any

import torch
from cuda.bindings import driver as cuda

from mlagen.drivers.packed import ArgumentList
from mlagen.errors import MlagenError

_LIST_END = 0  # CU_LAUNCH_PARAM_END of cuda.h


class CudaModule:
    """One kernel of a cubin, loaded into a device's primary context, which torch shares."""

    def __init__(self, binary: bytes, kernel: str, device_index: int) -> None:
        """Raises MlagenError where the driver refuses the binary, as it does one of another architecture."""
        with torch.cuda.device(device_index):
            torch.cuda.current_stream().synchronize()  # makes torch's primary context current
            self._module = _check(cuda.cuModuleLoadData(binary), "cuModuleLoadData")
            self._function = _check(cuda.cuModuleGetFunction(self._module, kernel.encode()), "cuModuleGetFunction")
        self._device_index = device_index
        self._arguments = ArgumentList(_LIST_END, int)

    def attribute(self, name: str) -> int:
        """A function attribute such as "NUM_REGS" or "LOCAL_SIZE_BYTES"."""
        key = getattr(cuda.CUfunction_attribute, f"CU_FUNC_ATTRIBUTE_{name}")
        return int(_check(cuda.cuFuncGetAttribute(key, self._function), "cuFuncGetAttribute"))

    def launch(self, grid: int, block: int, arguments: bytes) -> None:
        """Run `grid` workgroups of `block` lanes on torch's current stream of this module's device.

        Raises MlagenError where the driver refuses the launch; errors of the kernel itself come with a later call, as always.
        """
        if torch.cuda.current_device() != self._device_index:
            with torch.cuda.device(self._device_index):
                self._launch(grid, block, arguments)
        else:
            self._launch(grid, block, arguments)

    def _launch(self, grid: int, block: int, arguments: bytes) -> None:
        stream = torch.cuda.current_stream(self._device_index).cuda_stream
        extra = self._arguments.filled(arguments)
        (status,) = cuda.cuLaunchKernel(self._function, grid, 1, 1, block, 1, 1, 0, stream, 0, extra)
        if status != cuda.CUresult.CUDA_SUCCESS:
            raise MlagenError(f"cuLaunchKernel: {_name(status)}, grid {grid}, block {block}")


def _check(result: tuple[Any, ...], call: str) -> Any:
    status, *values = result
    if status != cuda.CUresult.CUDA_SUCCESS:
        raise MlagenError(f"{call}: {_name(status)}")
    return values[0] if values else None


def _name(status: Any) -> str:
    _, text = cuda.cuGetErrorName(status)
    return text.decode() if isinstance(text, bytes) else str(status)
