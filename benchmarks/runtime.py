"""What the runtime costs: compiling, loading, calling, replaying.  Prints; asserts nothing.  `make bench-runtime` runs it.

Compile and load times are wall clock in this process, the first render of which compiles the templates.  GPU figures need a GPU.
"""

import os
import statistics
import tempfile
import time
from collections.abc import Callable

import torch

from mlagen import cuda_toolchain, toolchain
from mlagen.binaries import device_binary
from mlagen.codegen import generate
from mlagen.errors import MlagenError
from mlagen.runtime import Kernel, load
from mlagen.spec import PrologueSpec
from mlagen.target import TARGETS, Target

SPEC = PrologueSpec.from_model("deepseek-r1", tp=8)
TOKENS, CALLS, NODES = 1, 2000, 300


def milliseconds(action: Callable[[], object]) -> float:
    start = time.perf_counter()
    action()
    return 1e3 * (time.perf_counter() - start)


def compile_and_load(target: Target) -> str:
    """Times of one target's kernel: rendering, compiling, loading with and without an entry in a cache of its own."""
    render = milliseconds(lambda: generate(SPEC, target))
    generated = generate(SPEC, target)
    compiler = cuda_toolchain if target.platform == "nvidia" else toolchain

    def find() -> bytes:
        return device_binary(SPEC, generated, target, None)

    try:
        cold = milliseconds(lambda: compiler.compile_device(generated.source, generated.arch, name=generated.name))
    except MlagenError as error:
        return f"not compiled: {error}"
    with tempfile.TemporaryDirectory() as folder:
        os.environ["MLAGEN_CACHE_DIR"] = folder
        missed = milliseconds(find)
        hit = statistics.median(milliseconds(find) for _ in range(20))
    return f"render {render:.1f} ms, compile {cold:.0f} ms, cold load {missed:.0f} ms, warm load {hit:.2f} ms"


def arguments(kernel: Kernel) -> dict[str, object]:
    """A call's tensors on the kernel's device."""
    spec, device = kernel.spec, kernel.device
    dtype, fp8 = torch.bfloat16, torch.float8_e4m3fn

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=device).to(dtype)

    return {
        "q": draw(TOKENS, spec.heads, spec.nope_dim + spec.rope_dim),
        "kv_c": draw(TOKENS, spec.lora_rank),
        "k_pe": draw(TOKENS, spec.rope_dim),
        "packed": kernel.pack_weights(draw(spec.heads, spec.nope_dim, spec.lora_rank)),
        "kv_cache": torch.zeros(64, 16, spec.entry_dim, device=device, dtype=fp8),
        "slot_mapping": torch.arange(TOKENS, device=device),
        "positions": torch.arange(TOKENS, device=device),
        "cos_sin_cache": draw(4096, spec.rope_dim),
        "q_scale": torch.ones((), device=device),
        "k_scale": torch.ones((), device=device),
        "out": torch.empty(TOKENS, spec.heads, spec.entry_dim, device=device, dtype=fp8),
    }


def calls(action: Callable[[], object]) -> float:
    """Median microseconds until a call returns; the queue never fills."""
    times = []
    for number in range(CALLS):
        start = time.perf_counter()
        action()
        times.append(time.perf_counter() - start)
        if number % 50 == 0:
            torch.cuda.synchronize()
    return 1e6 * statistics.median(times)


def replay(action: Callable[[], object]) -> float:
    """Microseconds for each node of a graph of NODES launches: the median of 20 replays."""
    action()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(NODES):
            action()
    times = []
    for _ in range(20):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / NODES)
    return statistics.median(times)


def triton_launch(count: int) -> Callable[[], object] | None:
    """Triton's launch of an empty kernel with `count` tensors as arguments, or None where Triton is not installed."""
    try:
        import triton
    except ImportError:
        return None
    names = ", ".join(f"p{number}" for number in range(count))
    source = f"import triton\n@triton.jit\ndef empty({names}):\n    pass\n"
    with tempfile.NamedTemporaryFile("w", suffix=".py", delete=False) as file:
        file.write(source)  # Triton reads a kernel's source from its file
    namespace: dict[str, object] = {}
    exec(compile(source, file.name, "exec"), namespace)
    tensors = [torch.zeros(16, device="cuda") for _ in range(count)]
    empty = namespace["empty"]
    assert isinstance(empty, triton.runtime.JITFunction)
    return lambda: empty[(1,)](*tensors)


def main() -> None:
    for target in TARGETS.values():
        print(f"{target.arch}: {compile_and_load(target)}")
    if not torch.cuda.is_available():
        print("no GPU: calls and graphs are not timed")
        return
    kernel = load(SPEC, "cuda")
    tensors = arguments(kernel)
    print(f"{torch.cuda.get_device_name()}: call {calls(lambda: kernel(**tensors)):.1f} us")
    count = len(kernel.generated.arguments)
    triton_call = triton_launch(count)
    if triton_call:
        triton_call()
        print(f"  Triton, a kernel with {count} arguments: {calls(triton_call):.1f} us")
        print(f"  graph node, Triton's empty kernel: {replay(triton_call):.2f} us")
    print(f"  graph node, W_UK warm in L2: {replay(lambda: kernel(**tensors)):.2f} us")


if __name__ == "__main__":
    main()
