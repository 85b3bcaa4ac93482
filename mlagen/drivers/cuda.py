"""The CUDA driver: a cubin, launched through cuda-bindings on the caller's stream."""

from typing import Any

import torch
from cuda.bindings import driver as cuda

from mlagen.errors import MlagenError

_SUCCESS, _NO_CONTEXT = cuda.CUresult.CUDA_SUCCESS, cuda.CUresult.CUDA_ERROR_INVALID_CONTEXT


class CudaModule:
    """One kernel of a cubin, loaded into a device's primary context, which torch shares."""

    def __init__(self, binary: bytes, kernel: str, device_index: int) -> None:
        """Raises MlagenError where the driver refuses the binary, as it does one of another architecture."""
        with torch.cuda.device(device_index):
            torch.cuda.current_stream().synchronize()  # makes torch's primary context current
            self._context = _check(cuda.cuCtxGetCurrent(), "cuCtxGetCurrent")
            self._module = _check(cuda.cuModuleLoadData(binary), "cuModuleLoadData")
            self._function = _check(cuda.cuModuleGetFunction(self._module, kernel.encode()), "cuModuleGetFunction")
        self._device_index = device_index
        # torch.cuda's functions of these names check first whether CUDA is initialised, which takes longer than the answer.
        self._current_device, self._current_stream = torch._C._cuda_getDevice, torch._C._cuda_getCurrentRawStream

    def attribute(self, name: str) -> int:
        """A function attribute such as "NUM_REGS" or "LOCAL_SIZE_BYTES"."""
        key = getattr(cuda.CUfunction_attribute, f"CU_FUNC_ATTRIBUTE_{name}")
        return int(_check(cuda.cuFuncGetAttribute(key, self._function), "cuFuncGetAttribute"))

    def parameters(self, address: int) -> int:
        """What launch() takes, of the address of a list of pointers to the arguments."""
        return address

    def launch(self, grid: int, block: int, parameters: int) -> None:
        """Run `grid` workgroups of `block` lanes on torch's current stream of this module's device.

        Raises MlagenError where the driver refuses the launch; errors of the kernel itself come with a later call, as always.
        """
        if self._current_device() != self._device_index:
            with torch.cuda.device(self._device_index):
                self._launch(grid, block, parameters)
        else:
            self._launch(grid, block, parameters)

    def _launch(self, grid: int, block: int, parameters: int) -> None:
        stream = self._current_stream(self._device_index)
        (status,) = cuda.cuLaunchKernel(self._function, grid, 1, 1, block, 1, 1, 0, stream, parameters, 0)
        if status == _SUCCESS:
            return
        if status == _NO_CONTEXT:  # in a thread that has not used the device before
            _check(cuda.cuCtxSetCurrent(self._context), "cuCtxSetCurrent")
            (status,) = cuda.cuLaunchKernel(self._function, grid, 1, 1, block, 1, 1, 0, stream, parameters, 0)
        if status != _SUCCESS:
            raise MlagenError(f"cuLaunchKernel: {_name(status)}, grid {grid}, block {block}")


def _check(result: tuple[Any, ...], call: str) -> Any:
    status, *values = result
    if status != _SUCCESS:
        raise MlagenError(f"{call}: {_name(status)}")
    return values[0] if values else None


def _name(status: Any) -> str:
    _, text = cuda.cuGetErrorName(status)
    return text.decode() if isinstance(text, bytes) else str(status)
