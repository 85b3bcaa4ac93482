"""The CUDA driver: a cubin, launched through cuda-bindings on the caller's stream."""

from typing import Any

import torch
from cuda.bindings import driver as cuda

from mlagen.errors import MlagenError

_SUCCESS, _NO_CONTEXT = cuda.CUresult.CUDA_SUCCESS, cuda.CUresult.CUDA_ERROR_INVALID_CONTEXT


class CudaModule:
    """One kernel of a cubin, loaded into a device's primary context, which torch shares."""

    def __init__(self, binary: bytes, kernel: str, device_index: int, *, shared_limit: int = 0, dependent: bool = False) -> None:
        """Launches may ask for up to `shared_limit` bytes of shared memory; `dependent` ones start before the kernel before ends.

        Raises MlagenError where the driver refuses the binary, as it does one of another architecture.
        """
        with torch.cuda.device(device_index):
            torch.cuda.current_stream().synchronize()  # makes torch's primary context current
            self._context = _check(cuda.cuCtxGetCurrent(), "cuCtxGetCurrent")
            self._module = _check(cuda.cuModuleLoadData(binary), "cuModuleLoadData")
            self._function = _check(cuda.cuModuleGetFunction(self._module, kernel.encode()), "cuModuleGetFunction")
            if shared_limit:
                attribute = cuda.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
                _check(cuda.cuFuncSetAttribute(self._function, attribute, shared_limit), "cuFuncSetAttribute")
        self._early = _early_start() if dependent else None
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

    def launch(self, grid: int, block: int, parameters: int, shared_bytes: int = 0) -> None:
        """Run `grid` workgroups of `block` lanes on torch's current stream of this module's device.

        Each has `shared_bytes` of shared memory besides what the kernel itself declares.

        Raises MlagenError where the driver refuses the launch; errors of the kernel itself come with a later call, as always.
        """
        if self._current_device() != self._device_index:
            with torch.cuda.device(self._device_index):
                self._launch(grid, block, parameters, shared_bytes)
        else:
            self._launch(grid, block, parameters, shared_bytes)

    def _launch(self, grid: int, block: int, parameters: int, shared_bytes: int) -> None:
        stream = self._current_stream(self._device_index)
        status = self._start(grid, block, parameters, shared_bytes, stream)
        if status == _SUCCESS:
            return
        if status == _NO_CONTEXT:  # in a thread that has not used the device before
            _check(cuda.cuCtxSetCurrent(self._context), "cuCtxSetCurrent")
            status = self._start(grid, block, parameters, shared_bytes, stream)
        if status != _SUCCESS:
            raise MlagenError(f"cuLaunchKernel: {_name(status)}, grid {grid}, block {block}, {shared_bytes} bytes of shared memory")

    def _start(self, grid: int, block: int, parameters: int, shared_bytes: int, stream: int) -> Any:
        """The status of the launch."""
        if self._early is None:
            return cuda.cuLaunchKernel(self._function, grid, 1, 1, block, 1, 1, shared_bytes, stream, parameters, 0)[0]
        config = cuda.CUlaunchConfig()  # one for each launch: threads may launch at the same time
        config.gridDimX, config.gridDimY, config.gridDimZ = grid, 1, 1
        config.blockDimX, config.blockDimY, config.blockDimZ = block, 1, 1
        config.sharedMemBytes, config.hStream = shared_bytes, stream
        config.attrs, config.numAttrs = [self._early], 1
        return cuda.cuLaunchKernelEx(config, self._function, parameters, 0)[0]


def _early_start() -> Any:
    """The launch attribute of programmatic dependent launch: the kernel itself waits for the one before it."""
    attribute = cuda.CUlaunchAttribute()
    attribute.id = cuda.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
    attribute.value.programmaticStreamSerializationAllowed = 1
    return attribute


def _check(result: tuple[Any, ...], call: str) -> Any:
    status, *values = result
    if status != _SUCCESS:
        raise MlagenError(f"{call}: {_name(status)}")
    return values[0] if values else None


def _name(status: Any) -> str:
    _, text = cuda.cuGetErrorName(status)
    return text.decode() if isinstance(text, bytes) else str(status)
