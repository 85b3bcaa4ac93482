"""Compilers for NVIDIA GPUs: NVRTC through cuda-bindings, or nvcc where asked for or where there is no NVRTC.

MLAGEN_CUDA_TOOLCHAIN is auto (the default), nvrtc or nvcc; it decides where a caller's toolchain is auto.
"""

import functools
import importlib.util
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlagen.errors import BuildError, RequestError, TargetError, ToolchainError
from mlagen.libraries import identify, loaded_libraries
from mlagen.resource_usage import split_usage

TOOLCHAINS = ("auto", "nvrtc", "nvcc")

_NVRTC = "libnvrtc.so"

# As for AMD: nothing contracted, division correctly rounded (the default), so that all platforms round alike.
# ptxas tells the resources; the newer ones write their options into the cubin, so that all compiles have to ask.
_FLAGS = ("-std=c++17", "-fmad=false", "--ptxas-options=-v")

# What NVRTC takes from the cache that it shares with the driver, it says nothing about.
_NO_CACHE = "--no-cache"

# Hopper's wgmma belongs to the instructions that later architectures need not have.
_WITH_ALL_INSTRUCTIONS = {"sm_90": "sm_90a"}


@dataclass(frozen=True)
class CudaBinary:
    """A kernel compiled for one arch; the fields mean what they mean in toolchain.DeviceBinary."""

    binary: bytes  # a cubin: a linked ELF file
    usage: str  # what ptxas said of its resources; see mlagen.resource_usage
    compiler: str
    command: str
    warnings: str


def compile_device(source: str, arch: str, *, name: str, toolchain: str = "auto") -> CudaBinary:
    """Compile self-contained source for `arch`, such as sm_90, to a cubin.

    Raises TargetError for an arch that is not an NVIDIA GPU, RequestError for an unknown toolchain, ToolchainError if the compiler
    is missing, BuildError with the compiler's words if it fails.
    """
    if not re.fullmatch(r"sm_[0-9]{2,3}a?", arch):
        raise TargetError(f"arch={arch!r} is not an NVIDIA GPU architecture; sm_90, for example")
    arch = _WITH_ALL_INSTRUCTIONS.get(arch, arch)
    if _chosen(toolchain) == "nvrtc":
        return _nvrtc(source, arch, name)
    return _nvcc(source, arch, name)


def fingerprint(toolchain: str = "auto") -> tuple[str, tuple[str, ...]]:
    """Identity and flags of the compiler that compile_device would run: what of it moves a binary.

    Raises RequestError for an unknown toolchain, ToolchainError if its compiler is missing.
    """
    if _chosen(toolchain) == "nvcc":
        return nvcc_identity(), _FLAGS
    nvrtc_version()  # loads it
    return _nvrtc_build(loaded_libraries((_NVRTC,))), _FLAGS


def likely_fingerprint() -> tuple[str, tuple[str, ...]] | None:
    """What fingerprint() most likely says, told without loading the compiler, which takes longer than a load from the disk.

    A binary that is found under it was made by just that compiler.  What is compiled now belongs under fingerprint(), since
    another library may be loaded after all.  None where there is no telling.
    """
    library = _wheels_nvrtc() if wanted("auto") in ("auto", "nvrtc") else None
    return None if library is None else (_nvrtc_build([library]), _FLAGS)


@functools.cache
def _wheels_nvrtc() -> Path | None:
    """The libnvrtc of NVIDIA's wheels, where cuda-bindings looks first; None unless there is just one."""
    try:
        found = importlib.util.find_spec("cuda.bindings.nvrtc") and importlib.util.find_spec("nvidia")
    except ImportError:
        found = None
    folders = found.submodule_search_locations if found else None
    libraries = {path.resolve() for folder in folders or () for path in Path(folder).glob(f"*/lib/{_NVRTC}.*")}
    return libraries.pop() if len(libraries) == 1 else None


def _nvrtc_build(libraries: Sequence[Path]) -> str:
    """Which build of NVRTC this is, its built-in headers included.  Raises ToolchainError."""
    builtins = {path.resolve() for library in libraries for path in library.parent.glob("libnvrtc-builtins.so*")}
    try:
        return f"NVRTC ({identify({*libraries, *builtins})})"
    except OSError as error:
        raise ToolchainError(f"NVRTC was replaced since this process found it ({error}): start the process again") from None


def wanted(toolchain: str) -> str:
    """nvrtc, nvcc, or auto where MLAGEN_CUDA_TOOLCHAIN leaves the choice, too; raises RequestError for any other name."""
    origin = "toolchain"
    if toolchain == "auto":
        origin, toolchain = "MLAGEN_CUDA_TOOLCHAIN", os.environ.get("MLAGEN_CUDA_TOOLCHAIN") or "auto"
    if toolchain not in TOOLCHAINS:
        raise RequestError(f"{origin}={toolchain!r} is not a toolchain for NVIDIA GPUs; possible are {', '.join(TOOLCHAINS)}")
    return toolchain


def _chosen(toolchain: str) -> str:
    """nvrtc or nvcc; raises RequestError or ToolchainError."""
    named = wanted(toolchain)
    if named != "auto":
        return named
    if _load_nvrtc() is not None:
        return "nvrtc"
    if shutil.which("nvcc"):
        return "nvcc"
    raise ToolchainError("no compiler for NVIDIA GPUs; run `pip install 'mlagen[cuda]'` for NVRTC, or install the CUDA toolkit")


@functools.cache
def _load_nvrtc() -> Any:
    """cuda-bindings' nvrtc module, or None where it or the library behind it is missing."""
    try:
        from cuda.bindings import nvrtc
    except ImportError:
        return None
    try:
        nvrtc.nvrtcVersion()
    except RuntimeError:  # no libnvrtc
        return None
    return nvrtc


def nvrtc_version() -> str:
    """NVRTC's name and version.  Raises ToolchainError if it is missing."""
    nvrtc = _load_nvrtc()
    if nvrtc is None:
        raise ToolchainError("NVRTC is not installed; run `pip install 'mlagen[cuda]'`, or use toolchain nvcc, the CUDA toolkit's")
    _, major, minor = nvrtc.nvrtcVersion()
    return f"NVRTC {major}.{minor}"


def _nvrtc(source: str, arch: str, name: str) -> CudaBinary:
    identity = nvrtc_version()
    nvrtc = _load_nvrtc()
    options = [f"--gpu-architecture={arch}", *_FLAGS]

    def call(function: str, *arguments: Any) -> Any:
        status, *values = getattr(nvrtc, function)(*arguments)
        if int(status):
            raise BuildError(f"{name}: {identity}: {function} failed: {nvrtc.nvrtcGetErrorString(status)[1].decode()}")
        return values[0] if values else None

    program = call("nvrtcCreateProgram", source.encode(), f"{name}.hip".encode(), 0, [], [])
    try:
        for tried in ([*options, _NO_CACHE], options):  # older ones do not know it, and have no cache
            (status,) = nvrtc.nvrtcCompileProgram(program, len(tried), [option.encode() for option in tried])
            if status != nvrtc.nvrtcResult.NVRTC_ERROR_INVALID_OPTION:
                break
        log = b" " * call("nvrtcGetProgramLogSize", program)
        call("nvrtcGetProgramLog", program, log)
        said = log.rstrip(b"\0 ").decode("utf-8", "replace")
        command = f"nvcc -x cu -cubin -arch={arch} {' '.join(_FLAGS)} {name}.hip -o {name}.cubin"
        if int(status):
            kept = _keep(source, name)
            raise BuildError(f"{name}: {identity} failed\nsource: {kept}\ncommand: cd {kept.parent} && {command}\n{said}")
        binary = b" " * call("nvrtcGetCUBINSize", program)
        call("nvrtcGetCUBIN", program, binary)
    finally:
        nvrtc.nvrtcDestroyProgram(program)
    usage, warnings = split_usage(said)
    return CudaBinary(binary, usage, identity, command, warnings)


def _keep(source: str, name: str) -> Path:
    """The source of a failed compile, in a file of its own."""
    path = Path(tempfile.mkdtemp(prefix=f"mlagen-{name}-"), f"{name}.hip")
    path.write_text(source, encoding="utf-8")
    return path


@functools.cache
def nvcc_identity() -> str:
    """nvcc's name and version.  Raises ToolchainError if it is missing or does not run."""
    if shutil.which("nvcc") is None:
        raise ToolchainError(
            "nvcc is not on the PATH; install the CUDA toolkit, or use toolchain nvrtc, which is `pip install 'mlagen[cuda]'`"
        )
    done = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=False)
    found = re.search(r"V[0-9.]+", done.stdout)
    if done.returncode or not found:
        raise ToolchainError(f"nvcc does not run: {(done.stderr or done.stdout).strip()}")
    return f"nvcc {found.group()[1:]}"


def _environment() -> dict[str, str]:
    """The environment without the variables that change what nvcc does: they are in no cache's key."""
    unwanted = ("NVCC_APPEND_FLAGS", "NVCC_PREPEND_FLAGS", "CPATH", "C_INCLUDE_PATH", "CPLUS_INCLUDE_PATH")
    return {key: value for key, value in os.environ.items() if key not in unwanted}


def _nvcc(source: str, arch: str, name: str) -> CudaBinary:
    identity = nvcc_identity()
    command = ["nvcc", "-x", "cu", "-cubin", f"-arch={arch}", *_FLAGS, f"{name}.hip", "-o", f"{name}.cubin"]
    try:
        with tempfile.TemporaryDirectory(prefix=f"mlagen-{name}-") as folder:
            Path(folder, f"{name}.hip").write_text(source, encoding="utf-8")
            done = subprocess.run(command, cwd=folder, env=_environment(), capture_output=True, text=True, check=False)
            if done.returncode == 0:
                usage, warnings = split_usage(done.stderr)
                binary = Path(folder, f"{name}.cubin").read_bytes()
                return CudaBinary(binary, usage, identity, " ".join(command), warnings)
        kept = _keep(source, name)
    except OSError as error:
        raise BuildError(f"{name}: cannot build in {tempfile.gettempdir()}: {error}; free some space, or set TMPDIR") from error
    raise BuildError(f"{name}: {identity} failed\nsource: {kept}\ncommand: cd {kept.parent} && {' '.join(command)}\n{done.stderr}")
