"""The compilers of both platforms behind one call: source text in, a binary and what it takes of the GPU out."""

from mlagen import cuda_toolchain, machine_code
from mlagen import toolchain as amd_toolchain
from mlagen.cuda_toolchain import CudaBinary
from mlagen.errors import RequestError
from mlagen.machine_code import InstructionMix, Resources
from mlagen.resource_usage import ResourceUsage, read_usage, refuse_local_memory
from mlagen.target import find_target
from mlagen.toolchain import DeviceBinary


def compile_device(source: str, arch: str, *, name: str, toolchain: str = "auto") -> DeviceBinary | CudaBinary:
    """Compile self-contained `source` for `arch` with a compiler of its platform; `name` is the stem of its files.

    Raises TargetError for an unknown arch, RequestError for a toolchain that is not the platform's, ToolchainError if the compiler
    is missing, BuildError with the compiler's words if it fails.
    """
    if _is_nvidia(arch):
        return cuda_toolchain.compile_device(source, arch, name=name, toolchain=toolchain)
    return amd_toolchain.compile_device(source, arch, name=name, toolchain=toolchain)


def fingerprint(arch: str) -> tuple[str, tuple[str, ...]]:
    """Identity and flags of the compiler for `arch`: what of it moves a binary.  Raises TargetError or ToolchainError."""
    return cuda_toolchain.fingerprint() if _is_nvidia(arch) else amd_toolchain.fingerprint()


def refuse_unfit(arch: str, toolchain: str) -> None:
    """Raises RequestError unless `toolchain` compiles for `arch` and tells what a kernel takes of the GPU; TargetError."""
    if _is_nvidia(arch):
        cuda_toolchain.wanted(toolchain)
    elif not amd_toolchain.gives_assembly(toolchain):
        raise RequestError(
            "toolchain hiprtc does not tell what a kernel takes of the GPU: it is for mlagen.load(); build with zig or rocm"
        )


def suffix(compiled: DeviceBinary | CudaBinary) -> str:
    """What the name of the binary's file ends with."""
    return "cubin" if isinstance(compiled, CudaBinary) else "co"


def read_resources(compiled: DeviceBinary | CudaBinary, name: str) -> Resources | ResourceUsage | None:
    """What the kernel takes of the GPU; None from hiprtc, which never tells.  Raises BuildError where another does not."""
    if isinstance(compiled, CudaBinary):
        return read_usage(compiled.usage, name)
    return machine_code.read_resources(compiled.assembly, name) if compiled.assembly else None


def read_instruction_mix(compiled: DeviceBinary | CudaBinary, name: str) -> InstructionMix | None:
    """The kernel's instructions; None where no compiler writes assembly.  Raises BuildError if the kernel is not in it."""
    if isinstance(compiled, CudaBinary) or not compiled.assembly:
        return None
    return machine_code.read_instruction_mix(compiled.assembly, name)


def refuse_spills(resources: Resources | ResourceUsage, name: str) -> None:
    """Raises BuildError if the kernel keeps anything in memory where registers were meant."""
    if isinstance(resources, ResourceUsage):
        refuse_local_memory(resources, name)
    else:
        machine_code.refuse_spills(resources, name)


def _is_nvidia(arch: str) -> bool:
    return find_target(arch).platform == "nvidia"
