"""Compilers: HIP source text in, a linked code object out; host C++ source text in, a shared library out.

Three toolchains compile for the GPU.  "zig" is the clang and the lld inside the ziglang wheel and needs nothing else; "rocm" is
the compiler of a ROCm installation; "hiprtc" is its library, in this process and without assembly: see hiprtc_toolchain.  The
source is self-contained: zig finds no header at all, since any it found would be one of the machine it happens to run on.  Each
build, except hiprtc's, runs in a private folder, by relative names, without the environment variables that change what a compiler
does, so that the same source, arch and compiler give the same bytes anywhere.  The folder goes when the build succeeds; when the
compiler refuses, it stays, with nothing in it but the source.
"""

import contextlib
import functools
import importlib.metadata
import importlib.util
import logging
import os
import platform
import re
import shlex
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mlagen import hiprtc_toolchain
from mlagen.errors import BuildError, RequestError, TargetError, ToolchainError

TOOLCHAINS = ("auto", "zig", "rocm", "hiprtc")

# How many dwords of leading kernel arguments should arrive in SGPRs instead of memory.  16 registers can be filled at launch,
# and the pointer to the arguments takes two, so at most 14 come; scalars and pointers only, a struct by value ends the run.
KERNARG_PRELOAD_DWORDS = 16

# Mistakes that would compile to something: an attribute or a pragma silently dropped (launch bounds!), a value that does not
# fit, arithmetic that turns double unasked.
_ERRORS = (
    "unknown-attributes",
    "ignored-attributes",
    "unknown-pragmas",
    "return-type",
    "uninitialized",
    "array-bounds",
    "shift-count-overflow",
    "shift-count-negative",
    "division-by-zero",
    "constant-conversion",
    "literal-conversion",
    "double-promotion",
)

_CODE_FLAGS = (
    *("-O3", "-std=c++17", "-ffp-contract=off", "-fno-math-errno"),
    "-mcode-object-version=5",  # loads on ROCm 6 and 7
    "-fuse-cuid=none",  # otherwise the name of a symbol is a hash of the path and the options
    *("-mllvm", f"--amdgpu-kernarg-preload-count={KERNARG_PRELOAD_DWORDS}"),
)

_DEVICE_FLAGS = (
    *("-x", "hip", "--cuda-device-only", "-nogpulib"),
    *_CODE_FLAGS,
    "-fno-crash-diagnostics",  # a report would name files that are gone by then
    *("-Wall", "-Wextra", *(f"-Werror={warning}" for warning in _ERRORS)),
)

# A HIP compile takes macros and include folders from the host, even for device code: pin the former and close the latter.
_ZIG_DEVICE_FLAGS = ("-nogpuinc", "-nostdinc", "--target=x86_64-unknown-linux-gnu")

# The same bits from every compiler and CPU: nothing contracted, no -march=native, and char is signed, as it is on the GPU.
_HOST_FLAGS = (
    *("-O2", "-std=c++17", "-fPIC", "-shared", "-pthread", "-Wall", "-Wextra"),
    *("-ffp-contract=off", "-fno-fast-math", "-fno-math-errno", "-fsigned-char", "-U_FORTIFY_SOURCE"),
)
_MORE_HOST_FLAGS: dict[str, tuple[str, ...]] = {
    "gcc": ("-fno-gnu-unique",),  # without it, equally named statics of two libraries become one
    "zig": ("-mcpu=baseline", "-fno-sanitize=all", "-s"),  # its defaults: this CPU, traps, libc++ with debug information
}
_HOST_COMPILERS = ("g++", "clang++", "c++")

# Variables that add options, headers or outputs to a compile for the GPU.
_UNWANTED_VARIABLES = (
    *("CPATH", "C_INCLUDE_PATH", "CPLUS_INCLUDE_PATH", "CCC_OVERRIDE_OPTIONS", "SOURCE_DATE_EPOCH"),
    *("DEPENDENCIES_OUTPUT", "SUNPRO_DEPENDENCIES"),
    *("HIPCC_COMPILE_FLAGS_APPEND", "HIPCC_LINK_FLAGS_APPEND", "HIPCC_VERBOSE"),
)

_TIMEOUT_S = 900  # most compiles take a second; zig's first link of C++ builds libc++, a minute on two cores

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class DeviceBinary:
    """A kernel compiled for one arch."""

    binary: bytes  # a linked code object: an AMDGPU ELF shared object
    assembly: str  # what is in it, with resource counts as metadata; see mlagen.machine_code; from hiprtc ""
    compiler: str  # as compiler_identity() gives it
    command: str  # what makes it, in a folder with the source as NAME.hip
    warnings: str  # what the compiler said although it succeeded; mostly nothing


@dataclass(frozen=True)
class _Compiler:
    """A compiler that was found and has told its version."""

    kind: str  # "zig", "rocm", "gcc" or "other"
    identity: str
    program: tuple[str, ...]  # the words that start it
    shown: tuple[str, ...] = ()  # the same for a DeviceBinary, without a path of this machine
    settings: tuple[tuple[str, str], ...] = ()  # environment variables that it needs

    def command(self, step: Sequence[str]) -> str:
        """A step as a line for this machine's shell."""
        return " ".join([f"{key}={shlex.quote(value)}" for key, value in self.settings] + [shlex.join((*self.program, *step))])


class _StepFailed(Exception):
    """A step of a build failed: how, with what words, and how many steps were run."""

    def __init__(self, how: str, output: str, steps_run: int) -> None:
        super().__init__(how)
        self.how, self.output, self.steps_run = how, output, steps_run


def compile_device(
    source: str, arch: str, *, name: str, toolchain: str = "auto", keep_dir: str | os.PathLike[str] | None = None
) -> DeviceBinary:
    """Compile self-contained HIP `source` for `arch`, a plain name such as gfx942; `name` is the stem of its files.

    `keep_dir` is an existing folder in which the source of a failed compile is kept, by default the system's temporary one.

    Raises RequestError for an unknown toolchain or an unusable name, TargetError for an arch that is not an AMD GPU,
    ToolchainError if the compiler is missing, BuildError with the compiler's words if it fails or if a file cannot be written.
    """
    _check_name(name)
    if not re.fullmatch(r"gfx[0-9a-f]{3,5}", arch):
        raise TargetError(f"arch={arch!r} is not an AMD GPU architecture; gfx942 or gfx950, for example")
    if _toolchain_kind(toolchain) == "hiprtc":
        made = hiprtc_toolchain.compile_device(source, arch, _CODE_FLAGS, name=name, keep_dir=keep_dir)
        return DeviceBinary(made.binary, "", made.compiler, made.command, made.warnings)
    compiler = _device_compiler(toolchain)
    hip, asm, obj, code = (f"{name}.{suffix}" for suffix in ("hip", "s", "o", "co"))
    flags = (*_DEVICE_FLAGS, f"--offload-arch={arch}")
    steps: list[tuple[str, ...]]
    if compiler.kind == "zig":
        steps = [
            ("clang", *flags, *_ZIG_DEVICE_FLAGS, "-S", hip, "-o", asm),
            ("clang", "-target", "amdgcn-amd-amdhsa", f"-mcpu={arch}", "-c", asm, "-o", obj),
            ("ld.lld", "-m", "elf64_amdgpu", "--no-undefined", "-shared", obj, "-o", code),
        ]
    else:
        # hipcc adds a host link's options to whatever it does not take for HIP, so it cannot assemble: the same compile runs
        # twice, the second time as far as the linked object.  A bundle would hide that object from loaders and readers of ELF.
        flags = (*flags, "--no-gpu-bundle-output")
        steps = [(*flags, "-S", hip, "-o", asm), (*flags, hip, "-o", code)]
    (assembly, binary), warnings = _build(compiler, source, hip, steps, [asm, code], keep_dir)
    command = " && ".join(shlex.join((*compiler.shown, *step)) for step in steps)
    # e_type 3 is a shared object, e_machine 224 an AMD GPU.
    if binary[:4] != b"\x7fELF" or binary[16:20] != b"\x03\x00\xe0\x00":
        raise BuildError(f"{name}: {compiler.identity} wrote something other than a linked code object\ncommand: {command}")
    return DeviceBinary(binary, assembly.decode("utf-8", "replace"), compiler.identity, command, warnings)


def compiler_identity(toolchain: str = "auto") -> str:
    """Name and version of the compiler that compile_device would run, without a path: part of a cache's key.

    Raises RequestError for an unknown toolchain, ToolchainError if its compiler is missing or does not run.
    """
    if _toolchain_kind(toolchain) == "hiprtc":
        return hiprtc_toolchain.identity()
    return _device_compiler(toolchain).identity


def gives_assembly(toolchain: str = "auto") -> bool:
    """Whether compile_device's result tells what the kernel takes of the GPU.  Raises RequestError for an unknown toolchain."""
    return _toolchain_kind(toolchain) != "hiprtc"


def fingerprint(toolchain: str = "auto") -> tuple[str, tuple[str, ...]]:
    """Identity and flags of the compiler that compile_device would run: what of it moves a binary.

    For ziglang without starting it, since a cached kernel is to load in milliseconds: its version fixes its clang's.  Raises as
    compiler_identity does.
    """
    compiler_kind = _toolchain_kind(toolchain)
    if compiler_kind == "zig":
        _ziglang("compile with ROCm: MLAGEN_TOOLCHAIN=rocm")
        return f"ziglang {importlib.metadata.version('ziglang')}", (*_DEVICE_FLAGS, *_ZIG_DEVICE_FLAGS)
    if compiler_kind == "hiprtc":
        return hiprtc_toolchain.fingerprint(_CODE_FLAGS)
    return _rocm().identity, _DEVICE_FLAGS


def host_fingerprint() -> tuple[str, tuple[str, ...]]:
    """The same for compile_host.  Raises as host_compiler does."""
    compiler = _host_compiler()
    return compiler.identity, (*compiler.program[1:], *_HOST_FLAGS, *_MORE_HOST_FLAGS.get(compiler.kind, ()))


def compile_host(source: str, *, name: str, keep_dir: str | os.PathLike[str] | None = None) -> bytes:
    """Compile self-contained C++17 `source` to a shared library for this machine; `name` and `keep_dir` as for compile_device.

    The compiler is the one MLAGEN_HOST_CXX names ("zig" is ziglang's), else g++, clang++, c++ or ziglang's, whichever is there.
    Its warnings go to the log.

    Raises RequestError for an unusable name, ToolchainError if there is no compiler, BuildError with the compiler's words if it
    fails or if a file cannot be written.
    """
    _check_name(name)
    compiler = _host_compiler()
    step = (*_HOST_FLAGS, *_MORE_HOST_FLAGS.get(compiler.kind, ()), f"{name}.cpp", "-o", f"{name}.so")
    (library,), warnings = _build(compiler, source, f"{name}.cpp", [step], [f"{name}.so"], keep_dir)
    if warnings:
        _log.warning("%s: %s warns:\n%s", name, compiler.identity, warnings)
    return library


def host_compiler() -> str:
    """Name and version of the compiler that compile_host would run, and the kind of machine that it compiles for.

    Raises ToolchainError if there is none, or if the one that MLAGEN_HOST_CXX names is missing or does not run.
    """
    return _host_compiler().identity


def _check_name(name: str) -> None:
    """Raises RequestError unless `name` can be the stem of a file, and of an argument that is not an option."""
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.+-]*", name):
        raise RequestError(f"name={name!r} cannot name a file; letters, digits and _ . + - can, the first a letter, digit or _")


# Finding a compiler.


def _toolchain_kind(toolchain: str) -> str:
    """zig, rocm or hiprtc; raises RequestError for a name that is none of them nor auto."""
    origin = "toolchain"
    if toolchain == "auto":
        # Not whichever is installed: what else the machine has must not decide which compiler runs.
        origin, toolchain = "MLAGEN_TOOLCHAIN", os.environ.get("MLAGEN_TOOLCHAIN") or "auto"
    if toolchain not in TOOLCHAINS:
        raise RequestError(f"{origin}={toolchain!r} is not a toolchain for AMD GPUs; possible are {', '.join(TOOLCHAINS)}")
    return "zig" if toolchain == "auto" else toolchain


def _device_compiler(toolchain: str) -> _Compiler:
    """The compiler of `toolchain`, zig or rocm; raises RequestError or ToolchainError."""
    if _toolchain_kind(toolchain) == "rocm":
        return _rocm()
    program = _ziglang("compile with ROCm: MLAGEN_TOOLCHAIN=rocm")
    return _Compiler("zig", _zig_identity(program), program, ("python", *program[1:]))


def _ziglang(alternative: str) -> tuple[str, ...]:
    """The words that start ziglang's zig; raises ToolchainError, which offers `alternative`, if the package is missing."""
    if importlib.util.find_spec("ziglang") is None:
        raise ToolchainError(f"the Python package ziglang is not installed; run `pip install ziglang`, or {alternative}")
    return (sys.executable, "-m", "ziglang")


def _zig_identity(program: tuple[str, ...]) -> str:
    clang = re.search(r"clang version (\S+)", _probe((*program, "clang", "--version")))
    return f"ziglang {_probe((*program, 'version')).strip()} (clang {clang.group(1) if clang else 'of unknown version'})"


def _rocm() -> _Compiler:
    """ROCm's amdclang++, else its hipcc; raises ToolchainError if there is neither, or if it does not run."""
    # A ROCm that the user names comes before one that the PATH happens to hold.
    root = os.environ.get("ROCM_PATH")
    named = [f"{root}/bin", f"{root}/llvm/bin"] if root else []
    places = [*named, os.environ.get("PATH", os.defpath), "/opt/rocm/bin", "/opt/rocm/llvm/bin"]
    for tool in ("amdclang++", "hipcc"):
        found = shutil.which(tool, path=os.pathsep.join(places))
        if found:
            # HIP's version, which only hipcc tells, and clang's: the lines of --version that have no path in them.
            lines = re.findall(r"^.*(?:HIP version:|clang version) .*$", _probe((found, "--version")), re.MULTILINE)
            return _Compiler("rocm", f"{tool} ({'; '.join(line.strip() for line in lines)})", (found,), (tool,))
    looked = ", ".join([*(named or ["$ROCM_PATH (not set)"]), "the PATH", *places[-2:]])
    raise ToolchainError(
        f"no ROCm compiler: neither amdclang++ nor hipcc is in {looked}; install ROCm, set ROCM_PATH to where it is, or use "
        "toolchain zig, which is `pip install ziglang`"
    )


def _host_compiler() -> _Compiler:
    """The host C++ compiler; raises ToolchainError."""
    wanted = os.environ.get("MLAGEN_HOST_CXX", "").strip()
    program: tuple[str, ...] = ()
    if not wanted:
        program = next(((found,) for tool in _HOST_COMPILERS if (found := shutil.which(tool))), ())
    elif wanted != "zig":
        with contextlib.suppress(ValueError):  # an open quote
            program = tuple(shlex.split(wanted))
        found = shutil.which(program[0]) if program else None
        if found is None:
            raise ToolchainError(
                f"MLAGEN_HOST_CXX={wanted!r} is not a command; name a C++ compiler, such as g++, or zig for ziglang's"
            )
        program = (found, *program[1:])
    # A library runs only on the kind of machine it was made for, and caches are shared between machines.
    machine = f"{platform.machine()}-{sys.platform}"
    if program:
        version = _probe((*program, "--version"))
        kind = "gcc" if "Free Software Foundation" in version else "other"
        return _Compiler(kind, f"{version.partition(chr(10))[0].strip()} for {machine}", program)
    zig = _ziglang(f"a C++ compiler: {', '.join(_HOST_COMPILERS)}, or any that MLAGEN_HOST_CXX names")
    settings = (("ZIG_GLOBAL_CACHE_DIR", str(_zig_cache_dir())),)
    return _Compiler("zig", f"{_zig_identity(zig)} for {machine}", (*zig, "c++"), settings=settings)


def _zig_cache_dir() -> Path:
    """Where zig keeps the libc++ that it builds; raises ToolchainError if no folder will do.

    Writing is tried here because zig, where it cannot write, may spin for ever.
    """
    if os.environ.get("ZIG_GLOBAL_CACHE_DIR"):
        return Path(os.environ["ZIG_GLOBAL_CACHE_DIR"]).absolute()
    roots = [os.environ.get("MLAGEN_CACHE_DIR"), os.environ.get("XDG_CACHE_HOME"), os.path.expanduser("~/.cache")]
    last_resort = Path(tempfile.gettempdir(), f"mlagen-zig-{os.getuid()}")
    for folder in (*(Path(root, "zig").absolute() for root in roots if root), last_resort):
        try:
            folder.parent.mkdir(mode=0o700, parents=True, exist_ok=True)  # it may be mlagen's own cache
            folder.mkdir(mode=0o700, exist_ok=True)
            status = folder.lstat()
            # Anyone can make a folder where the last resort lies: take nothing from it that someone else put there.
            if folder == last_resort and not (stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid()):
                continue
            with tempfile.TemporaryFile(dir=folder):
                return folder
        except OSError:
            continue
    raise ToolchainError(f"zig has nowhere to keep its cache, not even {last_resort}; set ZIG_GLOBAL_CACHE_DIR to a folder")


@functools.cache
def _probe(command: tuple[str, ...]) -> str:
    """What `command`, which asks a compiler for its version, prints; raises ToolchainError if it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=60, env=_environment())
    except (OSError, subprocess.SubprocessError) as error:
        raise ToolchainError(f"a compiler does not run: `{shlex.join(command)}`: {error}") from error
    if done.returncode:
        raise ToolchainError(f"a compiler does not run: `{shlex.join(command)}` says: {(done.stderr or done.stdout).strip()}")
    return done.stdout


# Running it.


def _environment(*unwanted: str) -> dict[str, str]:
    """The environment of a compiler, without the variables `unwanted`, and with messages in English."""
    return {**{key: value for key, value in os.environ.items() if key not in unwanted}, "LC_ALL": "C"}


def _build(
    compiler: _Compiler,
    source: str,
    source_name: str,
    steps: Sequence[Sequence[str]],
    outputs: Sequence[str],
    keep_dir: str | os.PathLike[str] | None,
) -> tuple[list[bytes], str]:
    """Run `steps` on `source` in a folder of their own; the contents of `outputs`, and what the compiler said.

    Raises BuildError if a step fails, and then the folder stays with only the source in it, or if a file cannot be written, and
    then nothing stays; ToolchainError if the compiler does not start.
    """
    name = Path(source_name).stem
    where = ""
    try:
        where = os.path.abspath(keep_dir if keep_dir is not None else tempfile.gettempdir())
        folder = Path(tempfile.mkdtemp(prefix=f"mlagen-{name}-", dir=where))
        try:
            (folder / source_name).write_bytes(source.encode())
            # For what a compiler leaves behind when it is killed, and for zig, which insists on folders even to cache nothing.
            scratch = folder / "scratch"
            scratch.mkdir()
            environment = {**_environment(*_UNWANTED_VARIABLES), "TMPDIR": str(scratch), "ZIG_LOCAL_CACHE_DIR": str(scratch)}
            environment |= {"ZIG_GLOBAL_CACHE_DIR": str(scratch), **dict(compiler.settings)}
            said = _run(compiler, steps, folder, environment)
            contents = [(folder / output).read_bytes() for output in outputs]
        except _StepFailed as failure:
            for path in folder.iterdir():
                if path.is_dir():
                    shutil.rmtree(path, ignore_errors=True)
                elif path.name != source_name:
                    path.unlink()
            commands = " && ".join(compiler.command(step) for step in steps[: failure.steps_run])
            raise BuildError(
                f"{name}: {compiler.identity} {failure.how}\nsource: {folder / source_name}\n"
                f"command: cd {shlex.quote(str(folder))} && {commands}\n{failure.output}"
            ) from None
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        shutil.rmtree(folder, ignore_errors=True)
        return contents, said
    except OSError as error:
        remedy = "name another folder" if keep_dir is not None else "free some space, or set TMPDIR to another folder"
        raise BuildError(f"{name}: cannot build in {where or 'a temporary folder'}: {error}; {remedy}") from error


def _run(compiler: _Compiler, steps: Sequence[Sequence[str]], folder: Path, environment: dict[str, str]) -> str:
    """Run every step; what they said, the same thing once.  Raises _StepFailed, or ToolchainError if nothing starts."""
    said: list[str] = []
    for count, step in enumerate(steps, start=1):
        try:
            # In a session of its own, so that the processes which a compiler starts can be stopped along with it.
            process = subprocess.Popen(
                (*compiler.program, *step),
                cwd=folder,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        except OSError as error:
            raise ToolchainError(f"a compiler does not start: `{shlex.join(compiler.program)}`: {error}") from error
        try:
            output = process.communicate(timeout=_TIMEOUT_S)[0].decode("utf-8", "replace")
        except BaseException as error:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            if isinstance(error, subprocess.TimeoutExpired):
                raise _StepFailed(f"did not finish within {_TIMEOUT_S} s", "", count) from None
            raise
        status = process.returncode
        if status:
            how = f"failed with exit status {status}" if status > 0 else f"was killed by signal {-status}"
            raise _StepFailed(how, output, count)
        if output not in said:
            said.append(output)
    return "".join(said)
