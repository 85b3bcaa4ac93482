"""Programs that the tests run in a process of their own, since a HIP runtime is loaded once and for all.

`python programs.py NAME [ARGUMENT...]` prints what the function NAME returns, as JSON.
"""

import contextlib
import ctypes
import json
import os
import sys
import threading
from pathlib import Path

import torch
from standin.rocm_torch import OnGpu, pretend

import mlagen
from mlagen.drivers.hip import HipModule, loaded_runtimes
from mlagen.drivers.parameters import Parameters
from mlagen.errors import MlagenError
from mlagen.target import find_target
from mlagen.verify import require

SPEC = mlagen.PrologueSpec(heads=2, nope_dim=64, lora_rank=128, rope_dim=32, rope_style="gptj")


def generated(arch):
    return mlagen.generate(SPEC, find_target(arch))


def code_object(arch):
    return Path(os.environ["MLAGEN_STANDIN_KERNELS"], f"{generated(arch).name}.co").read_bytes()


def module_of(kernel):
    """The driver's module of a kernel that has one for any number of tokens, as AMD's tables have."""
    (module,) = {each.module() for each in kernel.variants}
    return module


def last_launch(runtime):
    """Stream and device of this thread's last launch."""
    values = (ctypes.c_uint64 * 2)()
    runtime.standin_last_launch(values)
    return list(values)


def new_stream():
    """The handle of a stream on the current device, made by hip-python."""
    from hip import hip

    status, stream = hip.hipStreamCreate()
    assert not status
    return int(stream)


def error_of(function, *arguments):
    try:
        function(*arguments)
    except MlagenError as error:
        return str(error)
    return "no error"


def hip_python_is_changed():
    """Whether what steered hip-python 10 to torch's runtime is still in place."""
    paths = sys.modules.get("rocm.bindings.util.paths")
    return paths is not None and paths.get_library_path.__name__ != "get_library_path"


def verify(library="libamdhip64.so"):
    """load, launch and compare every output with the oracle, on device "cuda" of a torch that uses the runtime `library`."""
    runtime = pretend(library)
    early = "hip" in sys.modules
    with OnGpu():
        kernel = mlagen.load(SPEC, "cuda")
        require(kernel, (1, 7, 33))
    module = module_of(kernel)
    return {
        "arch": kernel.target.arch,
        "driver": type(module).__name__,
        "list": type(module.parameters(0)).__name__,
        "hip-python imported early": early,
        "hip-python changed": hip_python_is_changed(),
        "launches": runtime.standin_launches(),
        "runtimes": loaded_runtimes(),
        "threads": [kernel.generated.schedule.threads, module.attribute("MAX_THREADS_PER_BLOCK")],
        "registers": module.attribute("NUM_REGS"),
        "scratch": module.attribute("LOCAL_SIZE_BYTES"),
    }


def two_devices():
    """Launches on both devices, whichever is current, on the default stream and on the caller's; where they arrived."""
    runtime = pretend()
    kernels, streams, seen, expected = [], [], [], []
    for index in (0, 1):
        with torch.cuda.device(index):
            streams.append(new_stream())
        with OnGpu(index):
            kernels.append(mlagen.load(SPEC, f"cuda:{index}"))
    for current in (0, 1):
        for index, kernel in enumerate(kernels):
            for stream in (0, streams[index]):
                with torch.cuda.device(index), torch.cuda.stream(stream), torch.cuda.device(current), OnGpu(index):
                    require(kernel, [3])
                    assert torch.cuda.current_device() == current
                    assert module_of(kernel).attribute("NUM_REGS") > 0
                    assert torch.cuda.current_device() == current
                seen.append(last_launch(runtime))
                expected.append([stream, index])
    return {"seen": seen, "expected": expected, "archs": [kernel.target.arch for kernel in kernels]}


def threads():
    """Eight threads launch one kernel, each on its own stream with its own inputs, and all have written their arguments before
    any of them launches.
    """
    runtime = pretend()
    with OnGpu():
        kernel = mlagen.load(SPEC, "cuda")
    together, failures = threading.Barrier(8, timeout=60), []
    launch = module_of(kernel)._launch_kernel

    def launch_together(*arguments):
        together.wait()
        return launch(*arguments)

    def work(number):
        try:
            stream = new_stream()
            with OnGpu(), torch.cuda.stream(stream):
                for turn in range(3):
                    require(kernel, [1 + number], seed=10 * number + turn)
                    assert last_launch(runtime) == [stream, 0]
        except BaseException as error:
            failures.append(repr(error))

    module_of(kernel)._launch_kernel = launch_together
    workers = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return {"failures": failures, "launches": runtime.standin_launches()}


def refusals():
    """What is said of everything that the runtime refuses; device 0 is a gfx942."""
    runtime = pretend()
    kernel, good = generated("gfx942"), code_object("gfx942")
    block = kernel.schedule.threads
    module, count = HipModule(good, kernel.name, 0), len(kernel.arguments)
    memory = Parameters(bytes(8 * count), range(count))
    arguments = module.parameters(memory.address)

    def on_dead_stream():
        stream = new_stream()
        assert runtime.hipStreamDestroy(ctypes.c_void_p(stream)) == 0
        with torch.cuda.stream(stream):
            module.launch(1, block, arguments)

    def with_unknown_code():
        from hip import hip

        other = HipModule(good, kernel.name, 0)
        other._launch_kernel = lambda *_: (hip.hipError_t(123456),)
        other.launch(1, block, arguments)

    return {
        "other arch": error_of(HipModule, code_object("gfx950"), generated("gfx950").name, 0),
        "no code object": error_of(HipModule, b"#!/bin/sh\n" + bytes(100), kernel.name, 0),
        "missing function": error_of(HipModule, good, "elsewhere", 0),
        "empty grid": error_of(module.launch, 0, block, arguments),
        "large block": error_of(module.launch, 1, 2 * block, arguments),
        "dead stream": error_of(on_dead_stream),
        "no arguments": error_of(module.launch, 1, block, module.parameters(0)),
        "unknown attribute": error_of(module.attribute, "PTX_VERSION"),
        "unknown code": error_of(with_unknown_code),
        "launches": runtime.standin_launches(),
    }


def hip_python_first(library):
    """hip-python finds a runtime by itself before torch loads its own, and then a kernel is loaded twice."""
    from hip import hip

    hip.hipInit(0)
    pretend(library)
    with OnGpu():
        return {"errors": [error_of(mlagen.load, SPEC, "cuda") for _ in range(2)], "runtimes": loaded_runtimes()}


def no_runtime():
    """The error where the loader finds no runtime; nothing if there is one where it always looks."""
    with contextlib.suppress(OSError):
        ctypes.CDLL("libamdhip64.so")
        return None
    return error_of(HipModule, b"", "kernel", 0)


def no_package():
    pretend()
    sys.modules["hip"] = None  # what an import of it then says is what a missing one says
    with OnGpu():
        return error_of(mlagen.load, SPEC, "cuda")


if __name__ == "__main__":
    name, *arguments = sys.argv[1:]
    print(json.dumps(globals()[name](*arguments)))
