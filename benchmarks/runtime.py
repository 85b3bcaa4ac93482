"""What the runtime costs: compiling, loading, calling, replaying.  Prints; asserts nothing.  `make bench-runtime` runs it.

Compile times are wall clock in this process, the first render of which compiles the templates; load times are those of processes
that have done nothing before.  GPU figures need a GPU.
"""

import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from mlagen import cuda_toolchain, toolchain
from mlagen.arguments import TENSORS
from mlagen.codegen import generate
from mlagen.errors import MlagenError
from mlagen.layout import Layout
from mlagen.runtime import Kernel, Variant, load
from mlagen.spec import PrologueSpec
from mlagen.tables import Range
from mlagen.target import TARGETS, Target
from mlagen.torch_types import torch_dtype

SPEC = PrologueSpec.from_model("deepseek-r1", tp=8)
TOKENS, CALLS, NODES, FRESH_LOADS = 1, 2000, 300, 5
FRESH_LOAD = str(Path(__file__).with_name("fresh_load.py"))


def milliseconds(action: Callable[[], object]) -> float:
    start = time.perf_counter()
    action()
    return 1e3 * (time.perf_counter() - start)


def compile_and_load(target: Target) -> str:
    """Times of one target's kernel in this process: rendering and compiling."""
    generated = generate(SPEC, target)
    render = milliseconds(lambda: generated.source)
    compiler = cuda_toolchain if target.platform == "nvidia" else toolchain
    try:
        compile_ = milliseconds(lambda: compiler.compile_device(generated.source, generated.arch, name=generated.name))
    except MlagenError as error:
        return f"not compiled: {error}"
    return f"render {render:.1f} ms, compile {compile_:.0f} ms"


def fresh_loads(where: str) -> str:
    """Times of loads in new processes: with an empty cache, then the best of FRESH_LOADS with what that left."""

    def load() -> dict[str, float]:
        done = subprocess.run([sys.executable, FRESH_LOAD, where], capture_output=True, text=True, check=True)
        return json.loads(done.stdout)

    with tempfile.TemporaryDirectory() as folder:
        os.environ["MLAGEN_CACHE_DIR"] = folder
        try:
            cold = load()["total"]
            warm = min((load() for _ in range(FRESH_LOADS)), key=lambda times: times["total"])
        except subprocess.CalledProcessError as error:
            return f"not loaded: {error.stderr.strip().splitlines()[-1]}"
    parts = ", ".join(f"{name} {took:.1f}" for name, took in warm.items() if name != "total")
    return f"cold load {cold:.0f} ms, warm load {warm['total']:.1f} ms ({parts})"


def arguments(kernel: Kernel, tokens: int = TOKENS) -> dict[str, object]:
    """A call's tensors on the kernel's device."""
    spec, device = kernel.spec, kernel.device
    dtype, fp8 = torch.bfloat16, torch_dtype(kernel.target.fp8)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=device).to(dtype)

    return {
        "q": draw(tokens, spec.heads, spec.nope_dim + spec.rope_dim),
        "kv_c": draw(tokens, spec.lora_rank),
        "k_pe": draw(tokens, spec.rope_dim),
        "packed": kernel.pack_weights(draw(spec.heads, spec.nope_dim, spec.lora_rank)),
        "kv_cache": torch.zeros(64, 16, spec.entry_dim, device=device, dtype=fp8),
        "slot_mapping": torch.arange(tokens, device=device),
        "positions": torch.arange(tokens, device=device),
        "cos_sin_cache": draw(4096, spec.rope_dim),
        "q_scale": torch.ones((), device=device),
        "k_scale": torch.ones((), device=device),
        "out": torch.empty(tokens, spec.heads, spec.entry_dim, device=device, dtype=fp8),
    }


def calls(action: Callable[[], object]) -> float:
    """Median microseconds until a call returns; the queue never fills."""
    times = []
    for number in range(CALLS):
        start = time.perf_counter()
        action()
        times.append(time.perf_counter() - start)
        if number % 50 == 0 and torch.cuda.is_available():
            torch.cuda.synchronize()
    return 1e6 * statistics.median(times)


class NoLaunch:
    """A module whose launch does nothing: what remains of a call is Python and torch."""

    def parameters(self, address: int) -> int:
        return address

    def launch(self, grid: int, block: int, parameters: int, shared_bytes: int = 0) -> None:
        pass


def call_parts(kernel: Kernel, tensors: dict[str, object]) -> str:
    """What a call that was seen before takes without its launch, and of that, recognising the tensors and asking where they are."""
    module = NoLaunch()
    silent = Kernel(kernel.spec, kernel.target, kernel.device, [replace(each, module=lambda: module) for each in kernel.variants])
    silent._on_cpu = False  # on the CPU a call also looks at the slots
    whole = calls(lambda: silent(**tensors))
    (form,) = (each for each in silent._forms.values() if each.recent)
    assert form.recent is not None
    given = [tensors[TENSORS[place]] for place in form.places]
    matches = form.recent.matches
    return (
        f"without its launch {whole:.1f} us; recognising {len(given)} tensors {calls(lambda: matches(*given)):.1f} us, "
        f"asking for their addresses {calls(lambda: list(map(torch.Tensor.data_ptr, given))):.1f} us"
    )


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
        print(f"{target.arch}: {compile_and_load(target)}; {fresh_loads(target.arch)}")
    if not torch.cuda.is_available():
        target = TARGETS["sm_90"]
        module = NoLaunch()
        silent = Variant(Range(None, Layout()), generate(SPEC, target), lambda: module)
        kernel = Kernel(SPEC, target, torch.device("cpu"), [silent])
        print(f"no GPU: a call with tensors of the CPU, {call_parts(kernel, arguments(kernel))}")
        return
    print(f"{torch.cuda.get_device_name()}: {fresh_loads('cuda')}")
    kernel = load(SPEC, "cuda")
    tensors = arguments(kernel)
    print(f"  call: {calls(lambda: kernel(**tensors)):.1f} us; {call_parts(kernel, tensors)}")
    others = [arguments(kernel, tokens) for tokens in (1, 2, 3, 4)]
    turns = itertools.cycle(others)
    print(f"  call with another number of tokens than the last: {calls(lambda: kernel(**next(turns))):.1f} us")
    alone = {**tensors, "out": None}
    print(f"  call without out: {calls(lambda: kernel(**alone)):.1f} us")
    count = len(kernel.generated.arguments)
    triton_call = triton_launch(count)
    if triton_call:
        triton_call()
        print(f"  Triton, a kernel with {count} arguments: {calls(triton_call):.1f} us")
        print(f"  graph node, Triton's empty kernel: {replay(triton_call):.2f} us")
    print(f"  graph node, W_UK warm in L2: {replay(lambda: kernel(**tensors)):.2f} us")


if __name__ == "__main__":
    main()
