"""What a compiled kernel costs, read from the assembly that the compiler wrote.

The numbers come from three places in that text: the `.amdhsa_` directives, which become the kernel descriptor that the hardware
obeys; the metadata at its end, which the HIP runtime reads; and the instructions themselves.
"""

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from mlagen.errors import BuildError
from mlagen.target import find_target

# A wave that needs more scalar registers than this has room for one wave fewer on each SIMD.
_SGPRS_OF_A_FULL_SIMD = 100

# Bits of one lane by the last word of a load or a store.
_WIDTHS = {
    "byte": "8",
    "ubyte": "8",
    "sbyte": "8",
    "short": "16",
    "ushort": "16",
    "sshort": "16",
    "dword": "32",
    "dwordx2": "64",
    "dwordx3": "96",
    "dwordx4": "128",
}
_MEMORY = re.compile(r"(?:global|buffer)_(load|store)_(?:lds_)?([a-z]+(?:x\d)?)(?:_d16)?(?:_hi)?")

# Scalar instructions that compute nothing.
_WAITS = re.compile(r"s_(?:wait|nop|sleep)")
_BRANCHES = re.compile(r"s_(?:c?branch|setpc)")
_CALLS = re.compile(r"s_(?:swappc|call)")
_CONTROL = re.compile(r"s_(?:endpgm|sethalt|setprio|sendmsg|trap|icache|dcache|code_end)")


@dataclass(frozen=True)
class Resources:
    """What a kernel occupies while it runs; registers are counted per lane (vgprs, agprs) or per wave (sgprs)."""

    vgprs: int  # of the unified file, accumulation registers included
    agprs: int  # of those, accumulation registers
    sgprs: int
    lds_bytes: int  # of a workgroup, as far as known when it was compiled
    scratch_bytes: int  # of a lane
    vgpr_spills: int
    sgpr_spills: int
    waves_per_simd: int  # that its registers, as reserved, leave room for; LDS may allow fewer
    kernarg_bytes: int
    kernarg_preload_sgprs: int  # dwords of leading arguments that arrive in registers


@dataclass(frozen=True)
class InstructionMix:
    """How many instructions of each kind a kernel holds: a static count, a loop's body counts once.

    The prologue for firmware that cannot preload arguments is left out: other firmware starts behind it.  Widths are the bits
    that one lane moves; they are strings, because JSON knows no other keys.  `total` is the sum of all the rest.
    """

    mfma: dict[str, int]  # by mnemonic
    global_loads: dict[str, int]  # by width; buffer loads and loads straight to LDS included
    global_stores: dict[str, int]  # by width
    lds: int  # ds_ instructions, moves between lanes included
    flat: int  # memory instructions that do not know which memory they address
    scratch: int
    scalar_loads: int
    barriers: int
    valu: int
    salu: int
    branches: int
    waits: int  # for memory and for hazards
    calls: int  # of functions that were not inlined, whose own instructions are in no count here
    other: int  # atomics, cache control, the end
    total: int


def read_resources(assembly: str, kernel: str) -> Resources:
    """The resources of `kernel`; raises BuildError if the assembly does not tell, TargetError for an unknown arch."""
    descriptor = _descriptor(assembly, kernel)
    metadata = _metadata(assembly, kernel)
    if metadata.get("uses_dynamic_stack") == "true":
        raise BuildError(
            f"{kernel}: its scratch memory has no known size: it recurses or calls through a pointer; inline every function"
        )

    def number(values: dict[str, str], key: str) -> int:
        if not re.fullmatch(r"\d+", values.get(key, "")):
            raise BuildError(f"{kernel}: cannot read its resources: {key} is {values.get(key, 'missing')!r} in the assembly")
        return int(values[key])

    vgprs, sgprs = number(metadata, "vgpr_count"), number(metadata, "sgpr_count")
    # The descriptor may reserve more than is used: where LDS or the workgroup's size limits the waves, the compiler gives what
    # registers are left to them.  Some compilers write an expression there for a kernel that calls functions.
    reserved = number(descriptor, "next_free_vgpr") if descriptor.get("next_free_vgpr", "").isdigit() else vgprs
    target = re.search(r'^\s*\.amdgcn_target\s+"[^"]*?(gfx[0-9a-f]+)', assembly, re.MULTILINE)
    waves = find_target(target.group(1) if target else "missing").waves_per_simd(max(vgprs, reserved))
    return Resources(
        vgprs=vgprs,
        agprs=number(metadata, "agpr_count"),
        sgprs=sgprs,
        lds_bytes=number(metadata, "group_segment_fixed_size"),
        scratch_bytes=number(metadata, "private_segment_fixed_size"),
        vgpr_spills=number(metadata, "vgpr_spill_count"),
        sgpr_spills=number(metadata, "sgpr_spill_count"),
        waves_per_simd=min(waves, 7) if sgprs > _SGPRS_OF_A_FULL_SIMD else waves,
        kernarg_bytes=number(metadata, "kernarg_segment_size"),
        kernarg_preload_sgprs=_preloaded(descriptor),
    )


def refuse_spills(resources: Resources, name: str) -> None:
    """Raises BuildError if the kernel keeps anything in scratch memory, a trip to HBM where registers were meant."""
    if resources.scratch_bytes or resources.vgpr_spills or resources.sgpr_spills:
        raise BuildError(
            f"{name}: {resources.scratch_bytes} bytes of scratch memory per lane, {resources.vgpr_spills} spilled VGPRs and "
            f"{resources.sgpr_spills} spilled SGPRs, of which a kernel may have none; it uses {resources.vgprs} VGPRs: "
            "take a schedule with a smaller tile, and index arrays by constants only"
        )


def read_instruction_mix(assembly: str, kernel: str) -> InstructionMix:
    """The instructions of `kernel`; raises BuildError if it is not in the assembly."""
    mfma: Counter[str] = Counter()
    moved: dict[str, Counter[str]] = {"load": Counter(), "store": Counter()}
    kinds: Counter[str] = Counter()
    for mnemonic in _instructions(assembly, kernel):
        kind = _kind(mnemonic)
        memory = _MEMORY.fullmatch(mnemonic)
        if kind == "mfma":
            mfma[mnemonic] += 1
        elif memory and memory.group(2) in _WIDTHS:
            moved[memory.group(1)][_WIDTHS[memory.group(2)]] += 1
        else:
            kinds[kind] += 1
    return InstructionMix(
        mfma=dict(sorted(mfma.items())),
        global_loads=_by_width(moved["load"]),
        global_stores=_by_width(moved["store"]),
        lds=kinds["lds"],
        flat=kinds["flat"],
        scratch=kinds["scratch"],
        scalar_loads=kinds["scalar_loads"],
        barriers=kinds["barriers"],
        valu=kinds["valu"],
        salu=kinds["salu"],
        branches=kinds["branches"],
        waits=kinds["waits"],
        calls=kinds["calls"],
        other=kinds["other"],
        total=sum(sum(counter.values()) for counter in (mfma, *moved.values(), kinds)),
    )


def _kind(mnemonic: str) -> str:
    """The field of InstructionMix in which `mnemonic` counts; loads and stores of global memory are sorted out elsewhere."""
    if mnemonic.startswith("v_"):
        return "mfma" if mnemonic.startswith(("v_mfma_", "v_smfmac_")) else "valu"
    if mnemonic.startswith("s_"):
        if mnemonic.startswith(("s_load_", "s_buffer_load_", "s_scratch_load_")):
            return "scalar_loads"
        if mnemonic.startswith("s_barrier"):
            return "barriers"
        kinds = {"waits": _WAITS, "branches": _BRANCHES, "calls": _CALLS, "other": _CONTROL}
        return next((kind for kind, pattern in kinds.items() if pattern.match(mnemonic)), "salu")
    prefixes = {"ds_": "lds", "flat_": "flat", "scratch_": "scratch"}
    return next((kind for prefix, kind in prefixes.items() if mnemonic.startswith(prefix)), "other")


def _by_width(counts: Counter[str]) -> dict[str, int]:
    return {width: counts[width] for width in sorted(counts, key=int)}


def _preloaded(descriptor: dict[str, str]) -> int:
    return int(descriptor.get("user_sgpr_kernarg_preload_length", "0"))


def _instructions(assembly: str, kernel: str) -> Iterator[str]:
    """The mnemonics of `kernel` in order, without the endings of their encodings, from where the hardware starts."""
    start = re.search(rf"^{re.escape(kernel)}:", assembly, re.MULTILINE)
    end = re.compile(r"^\.Lfunc_end\d+:", re.MULTILINE).search(assembly, start.end()) if start else None
    if not start or not end:
        raise _unknown(assembly, kernel)
    lines = assembly[start.end() : end.start()].splitlines()
    # The descriptor and a section switch stand between the last instruction and the end; they are directives, like others.
    statements = [match.group(1) for line in lines if (match := re.match(r"\s+([.a-z]\S*(?:\s+\d+)?)", line))]
    if _preloaded(_descriptor(assembly, kernel)) and ".p2align\t8" in statements:
        # Old firmware enters at the label, where the arguments are loaded after all; new firmware enters 256 bytes on.
        prologue = statements.index(".p2align\t8")
        if statements[prologue - 1].startswith("s_branch"):
            statements = statements[prologue:]
    for statement in statements:
        if not statement.startswith("."):
            yield re.sub(r"_(?:e32|e64|dpp|sdwa)$", "", statement.split()[0])


def _descriptor(assembly: str, kernel: str) -> dict[str, str]:
    """The `.amdhsa_` directives of `kernel`, by the rest of their names."""
    block = re.search(rf"^\s*\.amdhsa_kernel {re.escape(kernel)}\n(.*?)\.end_amdhsa_kernel", assembly, re.MULTILINE | re.DOTALL)
    if not block:
        raise _unknown(assembly, kernel)
    return dict(re.findall(r"\.amdhsa_(\w+)[ \t]+(.*\S)", block.group(1)))


def _metadata(assembly: str, kernel: str) -> dict[str, str]:
    """The scalars of the entry of `kernel` in the list `amdhsa.kernels`, which is YAML with two columns to a level."""
    kernels = re.search(r"^amdhsa\.kernels:[ \t]*\n((?:[ \t].*\n)*)", assembly, re.MULTILINE)
    for entry in re.split(r"^  - ", kernels.group(1), flags=re.MULTILINE)[1:] if kernels else ():
        values = dict(re.findall(r"^    \.(\w+):[ \t]+(.*\S)", "    " + entry, re.MULTILINE))
        if values.get("name", "").strip("'\"") == kernel:
            return values
    raise _unknown(assembly, kernel)


def _unknown(assembly: str, kernel: str) -> BuildError:
    known = ", ".join(re.findall(r"^\s*\.amdhsa_kernel (\S+)", assembly, re.MULTILINE)) or "none"
    return BuildError(f"no complete kernel {kernel} in the assembly; the kernels in it: {known}")
