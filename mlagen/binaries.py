"""Where a kernel's binary comes from: a bundle, the disk cache, or the compiler, in this order."""

import contextlib
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mlagen import cuda_toolchain, toolchain
from mlagen.abi import ABI_VERSION
from mlagen.cache import DiskCache, Entry, Key
from mlagen.codegen import GeneratedKernel
from mlagen.compilers import compile_device, fingerprint, read_resources, refuse_spills
from mlagen.errors import BuildError, MissingKernelError, MlagenError, RequestError, ToolchainError
from mlagen.manifest import read_manifest, sha256
from mlagen.models import PRESETS
from mlagen.spec import PrologueSpec
from mlagen.target import Target
from mlagen.template_cache import prepare_templates

BundlePath = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]

_log = logging.getLogger(__name__)


def jit_allowed() -> bool:
    """Whether the compiler may run: MLAGEN_JIT is 1 (the default) or 0.  Raises RequestError for anything else."""
    text = os.environ.get("MLAGEN_JIT") or "1"
    if text not in ("0", "1"):
        raise RequestError(f"MLAGEN_JIT={text!r}: expected 0 or 1")
    return text == "1"


def bundle_folders(bundle: BundlePath | None) -> list[Path]:
    """The folders to look in: `bundle` first, then MLAGEN_BUNDLE_PATH."""
    named = [] if bundle is None else [bundle] if isinstance(bundle, str | os.PathLike) else list(bundle)
    listed = [part for part in os.environ.get("MLAGEN_BUNDLE_PATH", "").split(os.pathsep) if part]
    return [Path(folder) for folder in (*named, *listed)]


def device_binary(spec: PrologueSpec, generated: GeneratedKernel, target: Target, bundle: BundlePath | None) -> bytes:
    """The kernel's code object or cubin.

    Raises RequestError for a bundle without a readable manifest, MissingKernelError where MLAGEN_JIT=0 and nothing is built,
    ToolchainError, BuildError, and MlagenError where the cache is not safe.
    """
    reasons = []
    folders = bundle_folders(bundle)
    if folders:
        with contextlib.suppress(MlagenError):  # of a cache that is not safe: a bundle needs none
            prepare_templates(DiskCache(), publish=False)
    for folder in folders:
        found = _from_bundle(folder, generated)
        if isinstance(found, bytes):
            return found
        reasons.append(found)
    cached = _from_cache(lambda: _device_keys(generated, target), lambda: _compile_device(spec, generated))
    if isinstance(cached, bytes):
        return cached
    raise MissingKernelError(
        f"kernel {generated.name} is not built, and MLAGEN_JIT=0 forbids the compiler ({'; '.join([*reasons, cached])}): "
        f"run `mlagen build {_options(spec, generated)} --out DIR` and set MLAGEN_BUNDLE_PATH=DIR"
    )


def host_library(spec: PrologueSpec, generated: GeneratedKernel) -> bytes:
    """The kernel's host build, which no bundle holds: it is for this machine.  Raises as device_binary does."""
    cached = _from_cache(lambda: iter((host_key(generated),)), lambda: _compile_host(spec, generated))
    if isinstance(cached, bytes):
        return cached
    raise MissingKernelError(
        f"kernel {generated.name} is not built for the CPU, and MLAGEN_JIT=0 forbids the compiler ({cached}): "
        f"run `MLAGEN_JIT=1 mlagen verify {_options(spec, generated)}`, which leaves it in the cache"
    )


def device_key(generated: GeneratedKernel, target: Target) -> Key:
    """What the kernel's code object or cubin depends on.  Raises ToolchainError."""
    return _key("device", generated.arch, generated.source, *fingerprint(target.arch))


def _device_keys(generated: GeneratedKernel, target: Target) -> Iterator[Key]:
    """Where a code object or cubin may be found: the key that is told the fastest comes first, the one to compile for last."""
    likely = cuda_toolchain.likely_fingerprint() if target.platform == "nvidia" else None
    if likely:
        yield _key("device", generated.arch, generated.source, *likely)
    yield device_key(generated, target)


def host_key(generated: GeneratedKernel) -> Key:
    """What the kernel's host build depends on.  Raises ToolchainError."""
    return _key("host", generated.arch, generated.host_source, *toolchain.host_fingerprint())


def _key(kind: str, arch: str, source: str, compiler: str, flags: tuple[str, ...]) -> Key:
    return Key(kind, arch, sha256(source.encode()), compiler, flags, ABI_VERSION)


def _from_cache(keys: Callable[[], Iterator[Key]], compile_: Callable[[], Entry]) -> bytes | str:
    """The binary from the disk cache or the compiler; where MLAGEN_JIT=0 and it is not there, why."""
    cache, jit = DiskCache(), jit_allowed()
    cache.refuse_unsafe()
    prepare_templates(cache, publish=jit)
    damage = ""
    try:
        for key in keys():
            found, damage = cache.read(key)
            if found:
                return found.binary
    except ToolchainError as error:
        if jit:
            raise
        return f"the cache is not asked, since what it holds depends on the compiler: {error}"
    if jit:
        return cache.get(key, compile_).binary
    return f"its entry in the cache {cache.root} is damaged: {damage}" if damage else f"it is not in the cache {cache.root}"


def _compile_device(spec: PrologueSpec, generated: GeneratedKernel) -> Entry:
    compiled = compile_device(generated.source, generated.arch, name=generated.name)
    meta = _meta(spec, generated, compiler=compiled.compiler, command=compiled.command)
    try:
        resources = read_resources(compiled, generated.name)
        if resources:
            meta["resources"] = asdict(resources)
            refuse_spills(resources, generated.name)
    except BuildError as error:
        _log.warning("%s", error)  # slow, but right: `mlagen build` refuses it, a running program goes on
    return Entry(compiled.binary, generated.source, meta)


def _compile_host(spec: PrologueSpec, generated: GeneratedKernel) -> Entry:
    library = toolchain.compile_host(generated.host_source, name=generated.name)
    return Entry(library, generated.host_source, _meta(spec, generated, compiler=toolchain.host_compiler()))


def _meta(spec: PrologueSpec, generated: GeneratedKernel, **more: Any) -> dict[str, Any]:
    """What an entry tells its reader; `spec` is one of those that the kernel serves: heads are a run-time argument."""
    return {"kernel": generated.name, "spec": asdict(spec), **more}


def _from_bundle(folder: Path, generated: GeneratedKernel) -> bytes | str:
    """The kernel's binary from a bundle, or why it cannot serve.  Raises RequestError where there is no bundle."""
    entry = read_manifest(folder).get(generated.name)
    if entry is None:
        return f"bundle {folder} does not have it"
    source, binary = entry["source"], entry["binary"]
    if entry.get("arch") != generated.arch:
        reason = f"has it for {entry.get('arch')}"
    elif entry.get("abi") != ABI_VERSION or source.get("sha256") != generated.source_sha256:
        reason = f"has it as another version of mlagen generated it ({entry.get('mlagen')})"
    elif "file" not in binary:
        reason = "has its source only"
    else:
        path = folder / str(binary["file"])
        try:
            data = path.read_bytes()
        except OSError as error:
            reason = f"is damaged: {path.name}: {error.strerror}"
        else:
            if sha256(data) == binary.get("sha256"):
                return data
            reason = f"is damaged: {path.name} is not what was built, its sha256 differs"
    reason = f"bundle {folder} {reason}"
    _log.warning("kernel %s: %s; build the bundle again", generated.name, reason)
    return reason


def _options(spec: PrologueSpec, generated: GeneratedKernel) -> str:
    """Model and options of a command line that builds the kernel; MODEL where no preset has its dimensions."""
    options = [_model(spec), f"--arch {generated.arch}", f"--q-dtype {spec.q_dtype}", f"--kv-dtype {spec.kv_dtype}"]
    options += [f"--weight {spec.weight}", f"--rounding {spec.rounding}"]
    options += [f"--fp8-max {spec.fp8_max!r}"] if spec.fp8_max is not None else []
    options += [] if spec.nope_first else ["--rope-first"]
    options += [] if spec.q_scaling == "static" else [f"--q-scaling {spec.q_scaling}"]
    options += ["--q-split"] if spec.q_split else []
    options += [] if spec.write_q else ["--no-write-q"]
    options += [] if spec.write_kv else ["--no-write-kv"]
    options += [f"--kv-heads {spec.kv_heads}"] if spec.kv_heads > 1 else []
    options += [f"--kv-layout {spec.kv_layout}"] if spec.kv_layout != "paged" else []
    return " ".join(options)


def _model(spec: PrologueSpec) -> str:
    fields = ("nope_dim", "lora_rank", "rope_dim", "rope_style", "dtype")
    for name, shape in PRESETS.items():
        if shape.heads % spec.heads == 0 and all(getattr(shape, field) == getattr(spec, field) for field in fields):
            return f"{name} --tp {shape.heads // spec.heads}"
    return "MODEL"
