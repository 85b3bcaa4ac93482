"""The HIP driver: a code object, launched through hip-python on the caller's stream.

hip-python finds libamdhip64.so by itself, and PyTorch brings one of its own or uses the system's.  Streams, devices and memory of
one runtime mean nothing to another, so hip-python is made to open the file that torch uses, and a process with two is refused.
"""

import contextlib
import importlib
import os
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch

from mlagen.errors import MlagenError

_opening = threading.Lock()
_bindings: Any = None


class HipModule:
    """One kernel of a code object, loaded on a device of the HIP runtime that torch uses."""

    def __init__(self, binary: bytes, kernel: str, device_index: int) -> None:
        """Raises MlagenError without hip-python or the HIP runtime, with two of the latter, and where the runtime refuses the
        binary, as it does one of another architecture.
        """
        self._hip = hip = open_bindings()
        self._device_index = device_index
        self._binary = binary  # the runtime does not copy it
        where = f"; {kernel} on device {device_index}, a {torch.cuda.get_device_properties(device_index).gcnArchName}"
        with torch.cuda.device(device_index):
            self._module = self._call(hip.hipModuleLoadData, binary, context=where)
            try:
                self._function = self._call(hip.hipModuleGetFunction, self._module, kernel.encode(), context=where)
            except MlagenError:
                hip.hipModuleUnload(self._module)
                raise
        self._launch_kernel = hip.hipModuleLaunchKernel
        self._list_of_pointers, self._no_extra = _launch_types(hip)
        # torch.cuda's functions of these names check first whether the GPU is initialised, which takes longer than the answer.
        self._current_device, self._current_stream = torch._C._cuda_getDevice, torch._C._cuda_getCurrentRawStream

    def attribute(self, name: str) -> int:
        """A function attribute such as "NUM_REGS" or "LOCAL_SIZE_BYTES"."""
        key = getattr(self._hip.hipFunction_attribute, f"HIP_FUNC_ATTRIBUTE_{name}")
        with torch.cuda.device(self._device_index):
            return int(self._call(self._hip.hipFuncGetAttribute, key, self._function))

    def parameters(self, address: int) -> Any:
        """What launch() takes, of the address of a list of pointers to the arguments."""
        return self._list_of_pointers(address)

    def launch(self, grid: int, block: int, parameters: Any, shared_bytes: int = 0) -> None:
        """Run `grid` workgroups of `block` lanes on torch's current stream of this module's device.

        Each has `shared_bytes` of LDS besides what the kernel itself declares.

        Raises MlagenError where the runtime refuses the launch; errors of the kernel itself come with a later call, as always.
        """
        if self._current_device() != self._device_index:
            with torch.cuda.device(self._device_index):
                self._launch(grid, block, parameters, shared_bytes)
        else:
            self._launch(grid, block, parameters, shared_bytes)

    def _launch(self, grid: int, block: int, parameters: Any, shared_bytes: int) -> None:
        stream = self._current_stream(self._device_index)
        try:
            (status,) = self._launch_kernel(
                self._function, grid, 1, 1, block, 1, 1, shared_bytes, stream, parameters, self._no_extra
            )
        except ValueError as error:  # from hip-python, for a code that it does not know
            raise MlagenError(f"hipModuleLaunchKernel: {error}, grid {grid}, block {block}") from None
        if status:
            raise MlagenError(f"hipModuleLaunchKernel: {_name(self._hip, status)}, grid {grid}, block {block}")

    def _call(self, function: Callable[..., Any], *arguments: Any, context: str = "") -> Any:
        """What a function of hip-python returns after its status."""
        try:
            status, value = function(*arguments)
        except ValueError as error:  # a code that hip-python does not know
            raise MlagenError(f"{function.__name__}: {error}{context}") from None
        if status:
            raise MlagenError(f"{function.__name__}: {_name(self._hip, status)}{context}")
        return value


def open_bindings() -> Any:
    """hip-python's module `hip`, with the runtime open that torch uses.

    Raises MlagenError if the package or the runtime is missing, or if two runtimes are loaded.
    """
    global _bindings
    with _opening:
        if _bindings is None:
            _bindings = _open_bindings()
        return _bindings


def _open_bindings() -> Any:
    try:
        from hip import hip as module
    except ImportError as error:
        raise MlagenError(f"hip-python cannot be imported ({error}): run `pip install 'mlagen[rocm]'`") from None
    hip: Any = module
    loaded = loaded_runtimes()
    _refuse_several(loaded)
    try:
        with _finding(hip, loaded[0]) if loaded else contextlib.nullcontext():
            hip.hipRuntimeGetVersion()  # the first call opens the library; of those that raise if there is none, the cheapest
    except RuntimeError as error:
        raise MlagenError(
            f"hip-python cannot open the HIP runtime ({error}): install ROCm, and start Python with LD_LIBRARY_PATH set to the "
            "folder that has libamdhip64.so, such as /opt/rocm/lib"
        ) from None
    _refuse_several(loaded_runtimes())
    return hip


def loaded_runtimes() -> list[str]:
    """The HIP runtimes that this process has loaded, as paths; a file that goes by several names counts once."""
    found: dict[tuple[str, str], str] = {}
    with open("/proc/self/maps", encoding="utf-8", errors="surrogateescape") as maps:
        for line in maps:
            _, permissions, _, device, inode, *path = line.rstrip("\n").split(maxsplit=5)
            name = os.path.basename(path[0]) if path else ""
            if "x" in permissions and name.startswith("libamdhip64") and ".so" in name:
                found.setdefault((device, inode), path[0])
    return sorted(found.values())


def _refuse_several(runtimes: list[str]) -> None:
    if len(runtimes) > 1:
        raise MlagenError(
            f"{len(runtimes)} HIP runtimes are loaded in this process, {' and '.join(runtimes)}, and torch and hip-python must "
            "share one: use hip-python only after the first mlagen.load, which makes it open torch's, or start Python with "
            "LD_LIBRARY_PATH=DIR/lib and ROCM_PATH=DIR, where DIR/lib has torch's libamdhip64.so"
        )


@contextlib.contextmanager
def _finding(hip: Any, library: str) -> Iterator[None]:
    """Have hip-python open `library` where its own search, which knows nothing of torch, might find another file.

    It has no option for that.  Should these names change, its own search decides, and what it finds is checked afterwards.
    """
    package = _package(hip)
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(ImportError, AttributeError):
            if package == "hip":  # up to 7: the name of the library is a constant
                calls: Any = importlib.import_module("hip.chip")
                calls.DLL = os.fsencode(library)
            else:  # from 10 on: a function is asked for the path, once
                paths: Any = importlib.import_module(f"{package}.util.paths")
                stack.callback(setattr, paths, "get_library_path", paths.get_library_path)
                paths.get_library_path = lambda *_: os.fsencode(library)
        yield


def _launch_types(hip: Any) -> tuple[Callable[[int], Any], Any]:
    """What makes hip-python's `kernelParams` of the address of a list, and its empty `extra`.

    hip-python makes them of plain values too, but anew in each launch, which doubles its time.
    """
    try:
        helpers: Any = importlib.import_module(f"{_package(hip)}._hip_helpers")
        types: Any = importlib.import_module("hip")
        return types._util.types.ListOfPointer, helpers.HipModuleLaunchKernel_extra(None)
    except (ImportError, AttributeError):
        return int, None


def _package(hip: Any) -> str:
    """Where hip-python's modules are: "hip" up to version 7, "rocm.bindings" from 10 on."""
    return str(hip.__name__.rpartition(".")[0])


def _name(hip: Any, status: Any) -> str:
    """A status as "hipErrorNotFound (named symbol not found)"."""
    (_, name), (_, text) = hip.hipGetErrorName(status), hip.hipGetErrorString(status)
    return f"{name} ({text})"
