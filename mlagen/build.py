"""build: requests become a folder of sources, code objects and a manifest."""

import dataclasses
import difflib
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from mlagen import __version__
from mlagen.abi import ABI_VERSION
from mlagen.codegen import GeneratedKernel, generate
from mlagen.errors import RequestError
from mlagen.machine_code import read_instruction_mix, read_resources, refuse_spills
from mlagen.manifest import MANIFEST, Entries, check_writable, manifest_text, read_manifest, sha256, write_folder
from mlagen.shipped import Request
from mlagen.toolchain import compile_device

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
        generated = generate(each.spec, each.target)
        kernels.setdefault(generated.name, (generated, []))[1].append(each)
    return kernels


def compile_kernel(generated: GeneratedKernel, requests: Sequence[Request], toolchain: str) -> BuiltKernel:
    """Compile one kernel.  Raises ToolchainError, or BuildError where it does not compile, spills or needs scratch."""
    compiled = compile_device(generated.source, generated.arch, name=generated.name, toolchain=toolchain)
    resources = read_resources(compiled.assembly, generated.name)
    refuse_spills(resources, generated.name)
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
        },
        "source": {"file": f"{generated.name}.hip", "sha256": generated.source_sha256},
        "binary": {"file": f"{generated.name}.co", "sha256": sha256(compiled.binary), "compiler": compiled.compiler},
        "resources": dataclasses.asdict(resources),
        "instructions": dataclasses.asdict(read_instruction_mix(compiled.assembly, generated.name)),
    }
    return BuiltKernel(generated, compiled.binary, entry)


def compile_all(requests: Sequence[Request], toolchain: str, progress: Progress) -> list[BuiltKernel]:
    """Compile the distinct kernels of `requests`, in parallel over the cores, in a fixed order.  The first error ends it."""
    kernels = list(group_requests(requests).values())
    built: list[BuiltKernel] = []
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
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
    """Compile the requests and write NAME.hip, NAME.co and the manifest to `out`; kernels that are there already stay listed.

    With `sources_only` the code objects are not written, only described.  Raises RequestError where `out` cannot be used,
    ToolchainError, BuildError.
    """
    check_writable(out)
    kept = {} if sources_only or not (out / MANIFEST).exists() else read_manifest(out)
    built = compile_all(requests, toolchain, progress)
    files: dict[str, bytes] = {}
    for kernel in built:
        files[kernel.entry["source"]["file"]] = kernel.generated.source.encode()
        if not sources_only:
            files[kernel.entry["binary"]["file"]] = kernel.binary
    files[MANIFEST] = manifest_text({**kept, **_entries(built, kept, sources_only)}).encode()
    write_folder(out, files)
    return built


def _entries(built: Sequence[BuiltKernel], kept: Entries, sources_only: bool) -> Entries:
    """Manifest entries by name; a kernel that was there already goes on serving what it served."""
    entries = {}
    for kernel in built:
        entry = dict(kernel.entry)
        if sources_only:
            entry["binary"] = {key: value for key, value in entry["binary"].items() if key != "file"}
        served = kept.get(kernel.generated.name, {}).get("serves", [])
        entry["serves"] = [each for each in served if each not in entry["serves"]] + entry["serves"]
        entries[kernel.generated.name] = entry
    return entries


def check(requests: Sequence[Request], out: Path, *, exclusive: bool = False) -> list[str]:
    """How the sources in `out` differ from what would be generated now: lines of a report, none where all is the same.

    With `exclusive` a source that none of the requests asks for is a difference, too.
    """
    report: list[str] = []
    kernels = group_requests(requests)
    try:
        listed = read_manifest(out)
    except RequestError as error:
        return [str(error)]
    for name, (generated, _) in sorted(kernels.items()):
        path = out / f"{name}.hip"
        if not path.exists():
            report.append(f"{path}: missing")
            continue
        found = path.read_text(encoding="utf-8")
        if found != generated.source:
            diff = difflib.unified_diff(
                found.splitlines(), generated.source.splitlines(), str(path), "generated now", lineterm="", n=1
            )
            report += [f"{path}: differs", *diff]
        if listed.get(name, {}).get("source", {}).get("sha256") != generated.source_sha256:
            report.append(f"{out / MANIFEST}: its entry for {name} is missing or describes another source")
    if exclusive:
        report += [f"{path}: nothing asks for it any more" for path in sorted(out.glob("*.hip")) if path.stem not in kernels]
    return report
