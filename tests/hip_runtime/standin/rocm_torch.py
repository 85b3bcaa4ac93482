"""torch's CPU build in the role of its ROCm build, as far as mlagen looks at it.

pretend() loads a HIP runtime, as importing torch's ROCm build does, and lets torch.cuda's functions ask that runtime.  Inside
OnGpu(), CPU tensors say that they lie on the GPU, and whoever wants a tensor there gets one on the CPU: the stand-in runtime's
kernels run on the CPU.  Nothing else of torch is changed, and nothing of mlagen.
"""

import ctypes
import threading
from contextlib import contextmanager
from types import SimpleNamespace

import torch
from torch.overrides import TorchFunctionMode


class OnGpu(TorchFunctionMode):
    """In this thread, tensors are on GPU number `index`."""

    def __init__(self, index=0):
        super().__init__()
        self.device = torch.device("cuda", index)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func == torch.Tensor.device.__get__:
            return self.device
        return func(*map(_to_cpu, args), **{name: _to_cpu(value) for name, value in (kwargs or {}).items()})


def _to_cpu(value):
    return torch.device("cpu") if isinstance(value, torch.device) else value


def pretend(library="libamdhip64.so"):
    """From now on torch is a ROCm build that uses the stand-in runtime in the file `library`, which is returned."""
    runtime = ctypes.CDLL(library)
    runtime.standin_arch.restype = ctypes.c_char_p
    runtime.standin_launches.restype = ctypes.c_uint64
    of_thread = threading.local()  # torch keeps a current stream for each thread and device

    def ask(function):
        value = ctypes.c_int()
        assert function(ctypes.byref(value)) == 0
        return value.value

    def current_device():
        return ask(runtime.hipGetDevice)

    @contextmanager
    def device(index):
        before = current_device()
        assert runtime.hipSetDevice(index) == 0
        try:
            yield
        finally:
            assert runtime.hipSetDevice(before) == 0

    def handles():
        return vars(of_thread).setdefault("handles", {})

    def current_stream(index=None):
        handle = handles().get(current_device() if index is None else index, 0)
        return SimpleNamespace(cuda_stream=handle, synchronize=lambda: None)  # each launch runs to its end

    @contextmanager
    def stream(handle):
        index, before = current_device(), current_stream().cuda_stream
        handles()[index] = handle
        try:
            yield
        finally:
            handles()[index] = before

    torch.version.hip = "7.2.0"
    torch.cuda.is_available = lambda: True
    torch.cuda.is_current_stream_capturing = lambda: False
    torch.cuda.device_count = lambda: ask(runtime.hipGetDeviceCount)
    torch.cuda.current_device, torch.cuda.device = current_device, device
    torch.cuda.current_stream, torch.cuda.stream = current_stream, stream
    torch._C._cuda_getDevice, torch._C._cuda_getCurrentRawStream = current_device, lambda index: handles().get(index, 0)
    torch.cuda.get_device_properties = lambda index: SimpleNamespace(
        gcnArchName=runtime.standin_arch(index).decode() + ":sramecc+:xnack-"
    )
    return runtime
