"""hiprtc, the compiler inside a ROCm installation's libhiprtc.so, called in this process through hip-python.

It needs no hipcc and starts no process, but it gives no assembly: what a kernel takes of the GPU stays unknown.
"""

import functools
import os
import shlex
import tempfile
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlagen.errors import BuildError, ToolchainError
from mlagen.libraries import identify, loaded_libraries

# hiprtc includes a header of its own before the source, which needs none.  One that is too old, or too new, to know the option
# passes it on to clang, which refuses it; there the header stays, and its names are in namespaces or begin with underscores.
_NO_HEADER = "--hiprtc-no-builtin-header"

# Without that header hiprtc does not keep clang's away, either.
_HIPRTC_FLAGS = ("-nogpuinc",)

# Options that hiprtc adds to those it is given.
_VARIABLES = ("HIPRTC_COMPILE_OPTIONS_APPEND", "HIPRTC_LINK_OPTIONS_APPEND")

# What does the work; hiprtcVersion() is 9.0 in every release.
_LIBRARIES = ("libhiprtc.so", "libamd_comgr.so")

_compiling = threading.Lock()  # older ones are not thread-safe


@dataclass(frozen=True)
class HiprtcBinary:
    """A kernel compiled for one arch; the fields mean what they mean in toolchain.DeviceBinary."""

    binary: bytes
    compiler: str
    command: str
    warnings: str


def compile_device(
    source: str, arch: str, flags: Sequence[str], *, name: str, keep_dir: str | os.PathLike[str] | None = None
) -> HiprtcBinary:
    """Compile self-contained HIP `source` for `arch` with clang's `flags`.

    Raises ToolchainError if hip-python or hiprtc is missing, BuildError with the compiler's words if it fails or if it gives
    something other than a linked code object.
    """
    compiler = identity()
    options = [f"--offload-arch={arch}", *_HIPRTC_FLAGS, *flags]
    command = shlex.join(
        ["amdclang++", "-x", "hip", "--cuda-device-only", "--no-gpu-bundle-output", *options, f"{name}.hip", "-o", f"{name}.co"]
    )
    with _compiling:
        binary, said = _compile(source, [_NO_HEADER, *options], name)
        if binary is None and _NO_HEADER in said:
            binary, said = _compile(source, options, name)
    if binary is None:
        kept = _keep(source, name, keep_dir)
        raise BuildError(
            f"{name}: {compiler} failed\nsource: {kept}\ncommand: cd {shlex.quote(str(kept.parent))} && {command}\n{said}"
        )
    # e_type 3 is a shared object, e_machine 224 an AMD GPU.
    if binary[:4] != b"\x7fELF" or binary[16:20] != b"\x03\x00\xe0\x00":
        bundle = binary.startswith((b"__CLANG_OFFLOAD_BUNDLE__", b"CCOB"))
        what = "an offload bundle" if bundle else f"{len(binary)} bytes of something else"
        raise BuildError(f"{name}: {compiler} gave {what}, not a linked code object; use toolchain zig or rocm\ncommand: {command}")
    return HiprtcBinary(binary, compiler, command, said)


def fingerprint(flags: Sequence[str]) -> tuple[str, tuple[str, ...]]:
    """Identity and flags of the compiler: what of it moves a binary.  Raises ToolchainError if it is missing."""
    variables = [f"{variable}={os.environ[variable]}" for variable in _VARIABLES if os.environ.get(variable)]
    return identity(), (_NO_HEADER, *_HIPRTC_FLAGS, *flags, *variables)


@functools.cache
def identity() -> str:
    """The libraries' names, with a hash that tells one build of them from another.  Raises ToolchainError if they are missing."""
    hiprtc = _load()
    with _compiling:
        hiprtc.hiprtcDestroyProgram(_create(hiprtc, "", "empty").createRef())  # only a program loads all of the compiler
    try:
        return f"hiprtc ({identify(loaded_libraries(_LIBRARIES))})"
    except OSError as error:
        raise ToolchainError(f"hiprtc was replaced since this process loaded it ({error}): start the process again") from None


def _load() -> Any:
    """hip-python's module `hiprtc`, with the library open; raises ToolchainError."""
    try:
        from hip import hiprtc as module
    except ImportError as error:
        raise ToolchainError(
            f"hip-python cannot be imported ({error}); run `pip install 'mlagen[rocm]'`, or use toolchain zig, "
            "which is `pip install ziglang`"
        ) from None
    hiprtc: Any = module
    try:
        hiprtc.hiprtcVersion()  # the first call opens the library
    except RuntimeError as error:
        raise ToolchainError(
            f"hip-python cannot open hiprtc ({error}); install ROCm, and start Python with LD_LIBRARY_PATH set to the folder that "
            "has libhiprtc.so, such as /opt/rocm/lib, or use toolchain zig, which is `pip install ziglang`"
        ) from None
    return hiprtc


def _call(hiprtc: Any, name: str, function: Callable[..., Any], *arguments: Any) -> Any:
    """What a function of hip-python returns after its status; raises BuildError."""
    try:
        status, *values = function(*arguments)
        words = "" if not status else hiprtc.hiprtcGetErrorString(status)[1].decode()
    except ValueError as error:  # a code that hip-python does not know
        words = str(error)
    if words:
        raise BuildError(f"{name}: {function.__name__} failed: {words}")
    return values[0] if values else None


def _create(hiprtc: Any, source: str, name: str) -> Any:
    return _call(hiprtc, name, hiprtc.hiprtcCreateProgram, source.encode(), f"{name}.hip".encode(), 0, None, None)


def _compile(source: str, options: Sequence[str], name: str) -> tuple[bytes | None, str]:
    """The binary, or None if the compiler refuses, and what it said."""
    hiprtc = _load()
    program = _create(hiprtc, source, name)
    try:
        refusal = ""
        try:
            _call(hiprtc, name, hiprtc.hiprtcCompileProgram, program, len(options), [option.encode() for option in options])
        except BuildError as error:
            refusal = str(error)
        log = bytearray(_call(hiprtc, name, hiprtc.hiprtcGetProgramLogSize, program) + 1)
        _call(hiprtc, name, hiprtc.hiprtcGetProgramLog, program, log)
        said = log.rstrip(b"\0").decode("utf-8", "replace")
        if refusal:
            return None, f"{refusal}\n{said}"
        binary = bytearray(_call(hiprtc, name, hiprtc.hiprtcGetCodeSize, program))
        if binary:
            _call(hiprtc, name, hiprtc.hiprtcGetCode, program, binary)
        return bytes(binary), said
    finally:
        hiprtc.hiprtcDestroyProgram(program.createRef())


def _keep(source: str, name: str, keep_dir: str | os.PathLike[str] | None) -> Path:
    """The source of a failed compile, in a file of its own; raises BuildError if it cannot be written."""
    try:
        path = Path(tempfile.mkdtemp(prefix=f"mlagen-{name}-", dir=keep_dir), f"{name}.hip").absolute()
        path.write_text(source, encoding="utf-8")
    except OSError as error:
        raise BuildError(f"{name}: the source of a failed compile cannot be kept: {error}") from error
    return path
