"""doctor: what works on this machine, what is missing and how to get it.  It gathers facts and prints nothing."""

import contextlib
import difflib
import fcntl
import importlib
import importlib.metadata
import os
import platform
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlagen import __version__, cuda_toolchain, toolchain
from mlagen.binaries import bundle_folders, jit_allowed
from mlagen.cache import DiskCache, lock_timeout
from mlagen.errors import MlagenError, RequestError
from mlagen.integrations.vllm import plugin as vllm_plugin
from mlagen.manifest import damaged_files, read_manifest
from mlagen.tables import read_tables
from mlagen.target import TARGETS

PACKAGES = ("jinja2", "numpy", "filelock", "ziglang", "torch", "hip-python", "cuda-bindings")
HOST_COMPILER = "host C++"
PREFIX = "MLAGEN_"

_DEVICE_TRIAL = 'extern "C" __attribute__((global)) void mlagen_doctor(int* out) { *out = 1; }\n'
_HOST_TRIAL = 'extern "C" int mlagen_doctor() { return 1; }\n'


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at: whether it works, what it is or what is wrong, and how to get it where it does not."""

    name: str
    works: bool
    detail: str
    remedy: str = ""
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Report:
    compilers: list[Finding]
    drivers: list[Finding]
    devices: list[Finding]
    cache: list[Finding]
    bundles: list[Finding]
    integrations: list[Finding]
    environment: list[Finding]
    versions: dict[str, str | None]

    @property
    def builders(self) -> list[str]:
        """The compilers that work and make kernels for a GPU."""
        return [each.name for each in self.compilers if each.works and each.name != HOST_COMPILER]


def examine() -> Report:
    """Look at everything.  Takes a few seconds: compilers that are there compile a trial kernel.  Raises nothing."""
    return Report(_compilers(), _drivers(), _devices(), [_cache()], _bundles(), [_vllm()], _environment(), _versions())


def _finding(name: str, remedy: str, look: Callable[[], str]) -> Finding:
    """What `look` returns as the detail of a thing that works; what it raises as that of one that does not."""
    try:
        return Finding(name, True, look())
    except MlagenError as error:
        first, *rest = str(error).strip().splitlines()
        # Of a failed compile the compiler's last words matter; other messages end with a remedy of their own.
        return Finding(name, False, f"{first}: {rest[-1]}" if rest else first.partition(";")[0], remedy)
    except Exception as error:  # an installation can be broken in any way
        return Finding(name, False, f"{type(error).__name__}: {error}".strip(), remedy)


def _compilers() -> list[Finding]:
    def for_amd(kind: str) -> str:
        with tempfile.TemporaryDirectory(prefix="mlagen-doctor-") as folder:
            return toolchain.compile_device(_DEVICE_TRIAL, "gfx950", name="mlagen_doctor", toolchain=kind, keep_dir=folder).compiler

    def for_hiprtc() -> str:
        with contextlib.suppress(Exception):  # torch has a finding of its own
            importlib.import_module("torch")  # first, as in a program: it may bring a hiprtc of its own
        return for_amd("hiprtc")

    def for_host() -> str:
        identity = toolchain.host_compiler()
        if not identity.startswith("ziglang"):  # which would build its libc++ first: a minute
            with tempfile.TemporaryDirectory(prefix="mlagen-doctor-") as folder:
                toolchain.compile_host(_HOST_TRIAL, name="mlagen_doctor", keep_dir=folder)
        return identity

    return [
        _finding("ziglang", "pip install ziglang", lambda: for_amd("zig")),
        _finding("ROCm", "install ROCm's compiler; or use ziglang, which needs no ROCm", lambda: for_amd("rocm")),
        _finding("hiprtc", "pip install 'mlagen[rocm]', and install ROCm; or use ziglang, which needs neither", for_hiprtc),
        _finding("NVRTC", "pip install 'mlagen[cuda]' nvidia-cuda-nvrtc", cuda_toolchain.nvrtc_version),
        _finding("nvcc", "install the CUDA toolkit; or use NVRTC, which needs none", cuda_toolchain.nvcc_identity),
        _finding(HOST_COMPILER, "install g++ or clang++, or pip install ziglang; only the CPU run needs it", for_host),
    ]


def _drivers() -> list[Finding]:
    return [_hip(), _cuda()]


def _hip() -> Finding:
    def version() -> str:
        from mlagen.drivers.hip import open_bindings  # with torch, whose HIP runtime it must share

        hip = open_bindings()
        status, number = hip.hipRuntimeGetVersion()
        if status != hip.hipError_t.hipSuccess:
            raise MlagenError(f"hipRuntimeGetVersion: {status}")
        runtime = f"{number // 10_000_000}.{number // 100_000 % 100}.{number % 100_000}"
        return f"hip-python {_version('hip-python')}, HIP runtime {runtime}"

    return _finding("HIP", "pip install 'mlagen[torch,rocm]', and install ROCm; only AMD GPUs need it", version)


def _cuda() -> Finding:
    name = "CUDA"
    try:
        from cuda.bindings import driver as bindings
    except ImportError as error:
        return Finding(name, False, f"cuda-bindings: {error}", "pip install 'mlagen[cuda]'; only NVIDIA GPUs need it")

    driver: Any = bindings

    def version() -> str:
        (status,) = driver.cuInit(0)
        if status != driver.CUresult.CUDA_SUCCESS:
            raise MlagenError(f"cuInit: {status.name}")
        _, number = driver.cuDriverGetVersion()
        return f"cuda-bindings {_version('cuda-bindings')}, driver for CUDA {number // 1000}.{number % 1000 // 10}"

    return _finding(name, "install NVIDIA's driver; only NVIDIA GPUs need it", version)


def _devices() -> list[Finding]:
    """torch, and the GPUs that it sees."""
    try:
        import torch
    except ImportError as error:
        return [Finding("torch", False, str(error), "pip install 'mlagen[torch]'; building needs none, running does")]
    from mlagen.runtime import device_arch

    gpus = f"ROCm {torch.version.hip}" if torch.version.hip else f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU only"
    found = [Finding("torch", True, f"{torch.__version__}, {gpus}", facts={"version": torch.__version__})]
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        arch = device_arch(index)
        supported = "" if arch in TARGETS else f"supported are {', '.join(TARGETS)}"
        detail = f"{torch.cuda.get_device_name(index)}, {arch}"
        found.append(Finding(f"cuda:{index}", not supported, detail, supported, {"arch": arch}))
    if len(found) == 1:
        remedy = "install torch's build for CUDA or ROCm" if gpus == "CPU only" else "check the driver, and CUDA_VISIBLE_DEVICES"
        found.append(Finding("GPU", False, "torch sees none; the CPU run, device='cpu', works without", remedy))
    return found


def _cache() -> Finding:
    cache = DiskCache()
    sizes = [sum(file.stat().st_size for file in folder.iterdir()) for folder in cache.entries()]
    facts = {"path": str(cache.root), "exists": cache.root.exists(), "entries": len(sizes), "bytes": sum(sizes)}
    facts |= {"set_aside": len(list(cache.damaged())), "safe": False, "writable": False, "locks": None}
    try:
        cache.refuse_unsafe()
        facts["safe"] = True
        _try_writing(cache.root, facts)
    except (MlagenError, OSError) as error:
        reason = f"{cache.root}: {error.strerror}" if isinstance(error, OSError) else str(error)
        return Finding("cache", False, reason, "set MLAGEN_CACHE_DIR to a folder of your own", facts)
    detail = f"{cache.root}: {len(sizes)} kernel{'s' if len(sizes) != 1 else ''}, {sum(sizes) / 1e6:.1f} MB"
    return Finding("cache", True, detail if facts["exists"] else f"{cache.root}: made when it is needed", facts=facts)


def _try_writing(root: Path, facts: dict[str, Any]) -> None:
    """Fill in `writable` and `locks` by trying, of a folder that is not there yet by looking.  Raises OSError."""
    if not facts["exists"]:
        parent = next(folder for folder in root.absolute().parents if folder.exists())
        facts["writable"] = os.access(parent, os.W_OK | os.X_OK) and parent.is_dir()
        if not facts["writable"]:
            raise PermissionError(0, f"cannot be made in {parent}")
        return
    with tempfile.TemporaryFile(dir=root) as file:
        facts["writable"], facts["locks"] = True, False
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            facts["locks"] = True
        except OSError:
            pass  # works without: processes that start at once compile the same kernel


def _bundles() -> list[Finding]:
    found = []
    for folder in bundle_folders(None):
        try:
            kernels = read_manifest(folder)
        except RequestError as error:
            found.append(Finding(str(folder), False, str(error), "correct MLAGEN_BUNDLE_PATH"))
            continue
        damage = damaged_files(folder, kernels)
        detail = f"{len(kernels)} kernels" if not damage else damage[0]
        found.append(Finding(str(folder), not damage, detail, "build it again" if damage else "", {"damaged": damage}))
    return found


def _vllm() -> Finding:
    """Whether vLLM would decode through mlagen, as far as that can be known without importing it."""
    name, version = "vLLM", _version("vllm")
    if version is None:
        return Finding(name, False, "not installed", "pip install vllm, or its image for ROCm; only serving with it needs it")
    facts = {"version": version, "tested": vllm_plugin.is_tested(version)}
    if not facts["tested"]:
        remedy = f"versions that were: {', '.join(vllm_plugin.TESTED)}"
        return Finding(name, False, f"vLLM {version} was not tested with mlagen, which leaves it alone", remedy, facts)
    if "mlagen" not in importlib.metadata.entry_points(group=vllm_plugin.GROUP).names:
        return Finding(name, False, f"vLLM {version} does not find mlagen's entry point", "pip install mlagen", facts)
    allowed = os.environ.get("VLLM_PLUGINS")
    if allowed is not None and "mlagen" not in allowed.split(","):
        remedy = "unset VLLM_PLUGINS, or name mlagen in it"
        return Finding(name, False, f"vLLM {version} leaves mlagen out: VLLM_PLUGINS={allowed}", remedy, facts)
    try:
        facts["on"] = vllm_plugin.route_of({}) is not None
    except RequestError as error:
        return Finding(name, False, f"vLLM {version}, mlagen is off", str(error), {**facts, "on": False})
    detail = "on; its log says for each model whether decode is fused" if facts["on"] else "off; MLAGEN_VLLM=1 switches it on"
    if not facts["on"] and vllm_plugin.variable() != "0":
        detail += ", and so does --additional-config '{\"mlagen\": true}'"
    return Finding(name, True, f"vLLM {version}, mlagen is {detail}", facts=facts)


def _any(text: str) -> None:
    """For a variable that may have any value, or whose value shows elsewhere in the report."""


def _one_of(choices: tuple[str, ...]) -> Callable[[str], None]:
    def check(text: str) -> None:
        if text and text not in choices:
            raise RequestError(f"possible are {', '.join(choices)}")

    return check


VARIABLES: dict[str, Callable[[str], object]] = {
    "MLAGEN_BUNDLE_PATH": _any,
    "MLAGEN_CACHE_DIR": _any,
    "MLAGEN_CUDA_TOOLCHAIN": _one_of(cuda_toolchain.TOOLCHAINS),
    "MLAGEN_HOST_CXX": _any,
    "MLAGEN_JIT": lambda _: jit_allowed(),
    "MLAGEN_LOCK_TIMEOUT": lambda _: lock_timeout(),
    "MLAGEN_TABLES": read_tables,
    "MLAGEN_TOOLCHAIN": _one_of(toolchain.TOOLCHAINS),
    "MLAGEN_VLLM": lambda _: vllm_plugin.variable(),
}
"""Every environment variable that mlagen reads, with what raises MlagenError where its value will not do."""


def _environment() -> list[Finding]:
    """The variables in force, and those that look like ours but are not."""
    found = []
    for name, text in sorted(os.environ.items()):
        if name in VARIABLES:
            try:
                VARIABLES[name](text)
                found.append(Finding(name, True, text))
            except MlagenError as error:
                found.append(Finding(name, False, text, str(error)))
        elif name.startswith(PREFIX):
            close = difflib.get_close_matches(name[len(PREFIX) :], [known[len(PREFIX) :] for known in VARIABLES], n=1)
            remedy = f"did you mean {PREFIX}{close[0]}?" if close else f"those that are: {', '.join(VARIABLES)}"
            found.append(Finding(name, False, f"{text} (not a variable that mlagen reads)", remedy))
    return found


def _versions() -> dict[str, str | None]:
    system = {"mlagen": __version__, "python": platform.python_version(), "system": platform.platform()}
    return {**system, **{package: _version(package) for package in PACKAGES}}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
