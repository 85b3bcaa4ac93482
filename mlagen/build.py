"""build: requests become a folder of sources, binaries and a manifest."""

import dataclasses
import difflib
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from mlagen import __version__
from mlagen.abi import ABI_VERSION
from mlagen.codegen import GeneratedKernel, variants
from mlagen.compilers import compile_device, read_instruction_mix, read_resources, refuse_spills, refuse_unfit, suffix
from mlagen.errors import RequestError
from mlagen.manifest import MANIFEST, Entries, check_writable, read_manifest, sha256, write_folder
from mlagen.shipped import Request

Progress = Callable[[str, int, int], None]
"""Called with a kernel's name, how many are done and how many there are."""


@dataclasses.dataclass(frozen=True)
class BuiltKernel:
    """A compiled kernel and its manifest entry."""

    generated: GeneratedKernel
    binary: bytes
    entry: dict[str, Any]


def group_requests(requests: Sequence[Request]) -> dict[str, tuple[GeneratedKernel, list[Request]]]:
    """The distinct kernels by name, each with the requests that it serves."""
    kernels: dict[str, tuple[GeneratedKernel, list[Request]]] = {}
    for each in requests:
        for generated in variants(each.spec, each.target):
            kernels.setdefault(generated.name, (generated, []))[1].append(each)
    return kernels


def compile_kernel(generated: GeneratedKernel, requests: Sequence[Request], toolchain: str) -> BuiltKernel:
    """Compile one kernel.  Raises ToolchainError, or BuildError where it does not compile or spills registers to memory."""
    compiled = compile_device(generated.source, generated.arch, name=generated.name, toolchain=toolchain)
    resources = read_resources(compiled, generated.name)
    assert resources is not None, "compile_all refuses compilers that do not tell"
    refuse_spills(resources, generated.name)
    mix = read_instruction_mix(compiled, generated.name)
    schedule = generated.schedule
    entry = {
        "arch": generated.arch,
        "abi": ABI_VERSION,
        "mlagen": __version__,
        "spec": dataclasses.asdict(requests[0].spec),  # heads are a run-time argument: `serves` lists all that were asked for
        "serves": [{"model": each.model, "tp": each.tp, "heads": each.spec.heads} for each in requests],
        "schedule": {
            "waves_per_workgroup": schedule.waves_per_workgroup,
            "l_tile": schedule.absorb.l_tile if schedule.absorb else None,
            "token_tile": schedule.absorb.token_tile if schedule.absorb else None,
            "block": schedule.staging.block if schedule.staging else None,
            "dependent": generated.dependent,
        },
        "source": {"file": f"{generated.name}.hip", "sha256": generated.source_sha256},
        "binary": {
            "file": f"{generated.name}.{suffix(compiled)}",
            "sha256": sha256(compiled.binary),
            "compiler": compiled.compiler,
        },
        "resources": dataclasses.asdict(resources),
        "instructions": dataclasses.asdict(mix) if mix else {},
    }
    return BuiltKernel(generated, compiled.binary, entry)


def compile_all(requests: Sequence[Request], toolchain: str, progress: Progress) -> list[BuiltKernel]:
    """Compile the distinct kernels of `requests`, in parallel over the cores, in a fixed order.  The first error ends it.

    Raises RequestError for a toolchain that is not for every request's platform, or that does not tell what a kernel takes of the
    GPU, and what compile_kernel raises.
    """
    for arch in dict.fromkeys(each.target.arch for each in requests):
        refuse_unfit(arch, toolchain)
    kernels = list(group_requests(requests).values())
    built: list[BuiltKernel] = []
    with ThreadPoolExecutor(max_workers=len(os.sched_getaffinity(0))) as pool:
        waiting = [pool.submit(compile_kernel, generated, served, toolchain) for generated, served in kernels]
        try:
            for future in waiting:
                built.append(future.result())
                progress(built[-1].generated.name, len(built), len(kernels))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return built


def build(
    requests: Sequence[Request], out: Path, *, toolchain: str = "auto", sources_only: bool = False, progress: Progress
) -> list[BuiltKernel]:
    """Compile the requests and write sources, binaries and the manifest to `out`; kernels that are there already stay listed.

    A kernel called NAME becomes NAME.hip and NAME.co, for NVIDIA NAME.cubin.  With `sources_only` the binaries are described, not
    written.  Raises RequestError where `out` cannot be used, ToolchainError, BuildError.
    """
    check_writable(out)
    if not sources_only:
        _kernels_in(out)  # a manifest that is not ours is refused before anything is compiled
    built = compile_all(requests, toolchain, progress)
    files: dict[str, bytes] = {}
    for kernel in built:
        files[kernel.entry["source"]["file"]] = kernel.generated.source.encode()
        if not sources_only:
            files[kernel.entry["binary"]["file"]] = kernel.binary

    def entries() -> Entries:
        kept = {} if sources_only else _kernels_in(out)
        return {**kept, **_entries(built, kept, sources_only)}

    write_folder(out, files, entries)
    return built


def _kernels_in(out: Path) -> Entries:
    """What an earlier build left in `out`, if anything.  Raises RequestError."""
    return read_manifest(out) if (out / MANIFEST).exists() else {}


def _entries(built: Sequence[BuiltKernel], kept: Entries, sources_only: bool) -> Entries:
    """Manifest entries by name; a kernel that was there already goes on serving what it served."""
    entries = {}
    for kernel in built:
        entry = dict(kernel.entry)
        if sources_only:
            entry["binary"] = {key: value for key, value in entry["binary"].items() if key != "file"}
        served = kept.get(kernel.generated.name, {}).get("serves", []) + entry["serves"]
        entry["serves"] = [each for place, each in enumerate(served) if each not in served[:place]]
        entries[kernel.generated.name] = entry
    return entries


def check(requests: Sequence[Request], out: Path, *, exclusive: bool = False) -> list[str]:
    """How `out` differs from what `build` would write now, binaries aside: lines of a report, none where all is the same.

    With `exclusive` a file or an entry that none of the requests asks for is a difference, too.  Raises RequestError where `out`
    is no folder.
    """
    if not os.path.isdir(out):
        raise RequestError(f"{out}: no folder of that name; build it first, or name the one to check with --out")
    kernels = group_requests(requests)
    report: list[str] = []
    for name, (generated, _) in sorted(kernels.items()):
        report += _source_differences(out / f"{name}.hip", generated.source)
    try:
        listed = read_manifest(out)
    except RequestError as error:
        return [*report, str(error)]
    for name, (generated, _) in sorted(kernels.items()):
        if listed.get(name, {}).get("source", {}).get("sha256") != generated.source_sha256:
            report.append(f"{out / MANIFEST}: its entry for {name} is missing or describes another source")
    if exclusive:
        report += [f"{out / MANIFEST}: nothing asks for {name} any more" for name in sorted(listed.keys() - kernels.keys())]
        expected = {MANIFEST, *(f"{name}.hip" for name in kernels)}
        report += [
            f"{path}: nothing asks for it any more; delete it" for path in sorted(out.iterdir()) if path.name not in expected
        ]
    return report


def _source_differences(path: Path, expected: str) -> list[str]:
    """What a reviewer has to see of a file that should hold `expected`; nothing where it does."""
    try:
        found = path.read_bytes()
    except OSError as error:
        return [f"{path}: {error.strerror}"]
    if found == expected.encode():
        return []
    # Neither universal newlines nor splitlines(): a carriage return or a missing end of line is a difference.
    before, after = found.decode("utf-8", "backslashreplace").split("\n"), expected.split("\n")
    return [f"{path}: differs", *difflib.unified_diff(before, after, str(path), "generated now", lineterm="", n=1)]
