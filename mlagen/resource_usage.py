"""What a compiled kernel costs on an NVIDIA GPU, read from what ptxas, the last step of NVRTC and of nvcc, says of it.

The cubin tells it too, but in sections that are not documented, and with what the system reserves mixed in.
"""

import re
from dataclasses import dataclass

from mlagen.errors import BuildError
from mlagen.target import find_target

# NVRTC repeats the program's name at the start of each line, nvcc does not.
_MEMORY = r"(?:ptxas +\.)? +(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
_ENTRY = r"ptxas info +: Compiling entry function '([^']*)' for '([^']*)'"
_USED = r"ptxas info +: Used (\d+) registers\b(.*)"
_REST = r"ptxas info +: (?:\d+ bytes gmem|Function properties for|Compile time).*"
_USAGE_LINE = re.compile("|".join((_MEMORY, _ENTRY, _USED, _REST)))


@dataclass(frozen=True)
class ResourceUsage:
    """What a kernel occupies while it runs; registers and bytes are of one lane, except those that say otherwise."""

    registers: int
    shared_bytes: int  # of a workgroup, as far as known when it was compiled; what the system reserves comes on top
    local_bytes: int  # of stack, spilled registers included
    spill_store_bytes: int  # that its instructions write, each counted once
    spill_load_bytes: int
    waves_per_simd: int  # that its registers leave room for; shared memory and the number of workgroups may allow fewer


def split_usage(said: str) -> tuple[str, str]:
    """What a compiler said, in two: what read_usage reads, and all the rest, its warnings."""
    lines = said.splitlines(keepends=True)
    is_usage = [_USAGE_LINE.fullmatch(line.rstrip()) is not None for line in lines]
    usage, rest = ("".join(line for line, of in zip(lines, is_usage, strict=True) if of is kind) for kind in (True, False))
    return usage, rest.strip()


def read_usage(usage: str, kernel: str) -> ResourceUsage:
    """The resource usage of `kernel`; raises BuildError if ptxas did not tell, TargetError for an unknown arch."""
    parts = re.split(f"^{_ENTRY}$", usage, flags=re.MULTILINE)
    entries = {name: (arch, text) for name, arch, text in zip(parts[1::3], parts[2::3], parts[3::3], strict=True)}
    arch, text = entries.get(kernel, ("", ""))
    used = re.search(f"^{_USED}$", text, re.MULTILINE)
    # Of the kernel and of each function that was not inlined into it.
    memory = [tuple(map(int, each)) for each in re.findall(f"^{_MEMORY}$", text, re.MULTILINE)]
    if not used or not memory:
        known = ", ".join(entries) or "none"
        raise BuildError(f"{kernel}: ptxas does not tell its resources; the kernels of which it tells any: {known}")
    registers, rest = int(used.group(1)), used.group(2)
    stack = re.search(r"(\d+) bytes cumulative stack size", rest)  # not there for none, nor for recursion
    shared = re.search(r"(\d+) bytes smem", rest)  # not there for none
    return ResourceUsage(
        registers=registers,
        shared_bytes=int(shared.group(1)) if shared else 0,
        local_bytes=max(int(stack.group(1)) if stack else 0, *(frame for frame, _, _ in memory)),
        spill_store_bytes=sum(stores for _, stores, _ in memory),
        spill_load_bytes=sum(loads for _, _, loads in memory),
        waves_per_simd=find_target(arch.removesuffix("a")).waves_per_simd(registers),
    )


def refuse_local_memory(usage: ResourceUsage, name: str) -> None:
    """Raises BuildError if the kernel keeps anything in local memory, which lies in HBM, where registers were meant."""
    if usage.local_bytes or usage.spill_store_bytes or usage.spill_load_bytes:
        raise BuildError(
            f"{name}: {usage.local_bytes} bytes of local memory per lane, {usage.spill_store_bytes} bytes of spill stores and "
            f"{usage.spill_load_bytes} of spill loads, of which a kernel may have none; it uses {usage.registers} registers: "
            "take a schedule with a smaller tile, and index arrays by constants only"
        )
