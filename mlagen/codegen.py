"""Codegen: a lowered Program, a Schedule and a Target become HIP source.  Pure: the same input gives the same bytes.

Python computes the numbers and chooses the text; the templates hold the code.  The platforms share the rendered kernel: a
target's own, "amd" or "nvidia", and "host", where the same text follows a library that runs the lanes on the CPU.
"""

import functools
import hashlib
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import numpy as np

from mlagen.abi import Argument, kernel_arguments
from mlagen.codes import LARGEST_EXPONENT, PackedCodes, packed_codes
from mlagen.dtypes import DType
from mlagen.errors import ScheduleError
from mlagen.ir import ACTIVATION_GROUP, LEAST_ACTIVATION, Program
from mlagen.layout import Layout
from mlagen.lowering import Lowered, Segment, Sink, lower
from mlagen.rendering import environment, template_texts
from mlagen.schedule import Pieces, Schedule, choose_schedule
from mlagen.spec import PrologueSpec
from mlagen.staging import Staging
from mlagen.tables import choose_ranges
from mlagen.target import Target
from mlagen.tiles import AbsorbTiles

FLOOR_THREADS = (128, 256, 512)
"""Lanes of a workgroup of each of the streaming floor's kernels."""

FP32_BIAS = 127

MARK = "// The kernel.  From here on the text is the same on every platform."
"""The line after which host and device source are the same bytes."""


@dataclass(frozen=True)
class GeneratedKernel:
    """A kernel as text, with what a driver needs to launch it.

    `texts` gives the text for "device" or "host": rendered when it is first asked for, since most who ask for a kernel need only
    one of them, or none.
    """

    name: str
    arch: str
    lowered: Lowered
    schedule: Schedule
    arguments: tuple[Argument, ...]
    dependent: bool
    codes: PackedCodes | None
    texts: Callable[[str], str] = field(repr=False)

    @property
    def source(self) -> str:
        """The text for the target's compiler."""
        return self.texts("device")

    @property
    def host_source(self) -> str:
        """The text of the host build."""
        return self.texts("host")

    @property
    def source_sha256(self) -> str:
        return hashlib.sha256(self.source.encode()).hexdigest()


@functools.cache
def generate(spec: PrologueSpec, target: Target, layout: Layout = Layout(), *, aligned: bool = True) -> GeneratedKernel:  # noqa: B008
    """The kernel of `spec` on `target`, laid out as `layout` says.

    `aligned` promises that all rows start at multiples of 16 bytes; a target with unaligned access does not care.
    """
    aligned = aligned or target.unaligned_access
    program = spec.program(target)
    lowered = lower(program)
    schedule = choose_schedule(lowered, target, waves_per_workgroup=layout.waves_per_workgroup, block=layout.block)
    name = kernel_name(spec, target) + layout.suffix + ("" if aligned else "_unaligned")
    return render(name, program, lowered, schedule, target, aligned=aligned, dependent=layout.dependent)


def variants(spec: PrologueSpec, target: Target) -> tuple[GeneratedKernel, ...]:
    """Every kernel that a call of `spec` on `target` may need: what a bundle has to hold to do without the compiler.

    On sm_90 the layouts, and so the kernels, depend on the number of heads; on all targets on MLAGEN_TABLES.
    """
    alignments = (True,) if target.unaligned_access else (True, False)
    launches = (False, True) if target.dependent_launch else (False,)
    layouts = [each.layout for dependent in launches for each in choose_ranges(spec, target, dependent=dependent)]
    return tuple(generate(spec, target, layout, aligned=aligned) for layout in dict.fromkeys(layouts) for aligned in alignments)


def kernel_name(spec: PrologueSpec, target: Target) -> str:
    """A name that tells apart all kernels that differ: specs that differ in heads only share a kernel."""
    product = f"p{spec.nope_dim}_w{spec.weight}".replace("-", "") if spec.absorbs else "absorbed"
    if spec.compute != "a16":
        product += f"_{spec.compute}"
    parts = [
        "mla_prologue",
        *([product] if spec.write_q else []),
        f"l{spec.lora_rank}",
        f"r{spec.rope_dim}",
        spec.rope_style,
        spec.dtype,
    ]
    q = f"q{spec.q_dtype}{'split' if spec.q_split else ''}" if spec.write_q else "noq"
    parts += [q, f"kv{spec.kv_dtype}" if spec.write_kv else "nokv", spec.rounding]
    if spec.fp8_max is not None and spec.fp8_max != target.fp8.largest:
        parts.append(f"max{spec.fp8_max:.10g}".replace(".", "p"))
    if not spec.nope_first:
        parts.append("ropefirst")
    if spec.kv_heads > 1:
        parts.append("kvheads")
    if spec.kv_layout != "paged":
        parts.append(spec.kv_layout)
    return "_".join([*parts, target.arch])


def render(
    name: str,
    program: Program,
    lowered: Lowered,
    schedule: Schedule,
    target: Target,
    *,
    aligned: bool = True,
    dependent: bool = False,
) -> GeneratedKernel:
    """Render a kernel called `name`.  `program` is only quoted in its head; the code comes from `lowered` and `schedule`.

    A `dependent` kernel may be started before the one before it has ended.  Raises ScheduleError where the target cannot.
    """
    if dependent and not target.dependent_launch:
        raise ScheduleError(f"{target.arch} starts no kernel before the one before it has ended: leave pdl out")
    codes = packed_codes(lowered, schedule, target)
    head_bytes = codes.head_bytes if codes else None
    arguments = kernel_arguments(lowered, absorb_first=schedule.staging is not None, head_bytes=head_bytes)

    @functools.cache
    def text(build: str) -> str:
        context = _context(name, program, lowered, schedule, target, arguments, codes)
        context |= {"aligned": aligned, "dependent": dependent}
        platform = "host" if build == "host" else target.platform
        rendered = environment().get_template("kernel.hip.j2").render(context, platform=_platform(platform, lowered, context))
        if build == "host":
            rendered += environment().get_template("host_entry.cpp.j2").render(context)
        return re.sub(r"\n{3,}", "\n\n", rendered)

    return GeneratedKernel(name, target.arch, lowered, schedule, arguments, dependent, codes, text)


def floor_arguments() -> tuple[Argument, ...]:
    """The arguments of the streaming floor: what it reads, then what it writes, in pieces of 16 bytes."""
    arguments = []
    for name, const in {"w_uk": "const ", "q": "const ", "kv_c": "const ", "k_pe": "const ", "q_out": "", "entries": ""}.items():
        arguments.append(Argument(name, "pointer", f"{const}uint8_t*", "read" if const else "written"))
        arguments.append(Argument(f"{name}_pieces", "int32", "uint32_t", f"of {name}"))
    return (*arguments, Argument("workgroups", "int32", "uint32_t", "of this launch"))


@functools.cache
def floor_source(target: Target, platform: str | None = None) -> str:
    """Kernels that a time is compared with: mlagen_empty, which does nothing, with workgroups of FLOOR_THREADS[0], and for each N
    of FLOOR_THREADS mlagen_stream_N, which only reads and writes.  `platform` is the target's own, or "host".
    """
    context = {"target": target, "aligned": True, "staging": None, "groups": None, "dependent": False, "codes": None}
    context["threads_choices"] = FLOOR_THREADS
    context["fp8_largest"] = _float_literal(target.fp8.largest)
    library = environment().get_template(f"lib/{platform or target.platform}.h").render(context)
    arguments = _argument_context(floor_arguments())
    return environment().get_template("bench/floor.hip.j2").render(context, platform=library, arguments=arguments)


def _platform(platform: str, lowered: Lowered, context: Mapping[str, Any]) -> str:
    """The device library of a platform: primitives, element types, conversions, memory access, the matrix product."""
    fp8, texts = context["target"].fp8.value.cpp, template_texts()
    parts = [
        environment().get_template(f"lib/{platform}.h").render(context),
        texts["lib/elements.h"],
        f"using target_fp8 = {fp8};  // the flavour of {context['target'].arch}\n",
        texts[f"lib/{platform}_convert.h"],
        texts["lib/access.h"],
    ]
    if lowered.absorb:
        if context["codes"]:
            parts.append(environment().get_template(f"lib/{platform}_codes.h.j2").render(context))
        parts.append(environment().get_template(f"lib/{platform}_multiply.h.j2").render(context))
    if platform == "host":
        parts.append(texts["lib/host_launch.h"])
    return "\n" + "\n".join(part.rstrip() + "\n" for part in parts)


def _context(
    name: str,
    program: Program,
    lowered: Lowered,
    schedule: Schedule,
    target: Target,
    arguments: tuple[Argument, ...],
    codes: PackedCodes | None,
) -> dict[str, Any]:
    queries, kv = lowered.queries, lowered.cache
    partials = []
    if lowered.ropes:
        partials.append("rope")
    if any(sink.quantize.dtype.is_fp8 for sink in lowered.sinks):
        partials.append("quantize")
    groups = next((sink.groups for sink in lowered.sinks if sink.groups), None)
    if groups:
        partials.append("group_scale")
    if queries:
        partials.append("concat")
    if kv:
        partials.append("cache_write")
    if lowered.absorb:
        partials.append("q_absorb")
        if codes:
            partials.append("weight_codes")
        partials.append("query_staged" if schedule.staging else "query_tile")
        if codes and codes.operand_codes:
            partials.append("query_codes")
    atom = target.atom(lowered.operand_dtype)
    segments = [
        _segment_context(segment, pieces, schedule, lowered)
        for segment, pieces in zip(lowered.segments, schedule.pieces, strict=True)
    ]
    return {
        "kernel": name,
        "target": target,
        "schedule": schedule,
        "program_lines": str(program).splitlines(),
        "arguments": _argument_context(arguments),
        "argument_rows": _rows([argument.name for argument in arguments]),
        "partials": [f"stages/{partial}.hip.j2" for partial in partials],
        "segments": segments,
        "absorb": next((segment for segment in segments if not segment["pieces"]), None),
        "rows": [segment for segment in segments if segment["pieces"]],
        "rope": lowered.ropes[0] if lowered.ropes else None,
        "model": lowered.model_dtype.value.cpp,
        "atom": atom,
        "fp8_largest": _float_literal(target.fp8.largest),
        "tiles": schedule.absorb,
        "staging": schedule.staging,
        "product": target.shared_product(lowered.model_dtype),
        "lanes": _lane_expressions(schedule.absorb) if schedule.absorb else None,
        "codes": codes,
        "operand_codes": codes is not None and codes.operand_codes,
        "activation": _activation(schedule.absorb, target) if codes and codes.operand_codes and schedule.absorb else None,
        "sum_scale": " * weight_scale" if codes and codes.row_blocks == 1 else "",
        "mx": _mx_numbers(target),
        "wgmma": _wgmma_operands(schedule.staging) if schedule.staging else None,
        "queries": [_sink_context(q, lowered) for q in queries],
        "kv": _sink_context(kv, lowered) if kv else None,
        "groups": groups,
        "least": _power_literal(groups.least) if groups else None,
        "divisor": _float_literal(groups.divisor) if groups else None,
    }


def _argument_context(arguments: tuple[Argument, ...]) -> list[dict[str, str]]:
    declarations = [f"{argument.cpp} {argument.name};" for argument in arguments]
    width = max(map(len, declarations))
    return [
        {"name": argument.name, "cpp": argument.cpp, "meaning": argument.meaning, "declaration": f"{declaration:<{width}}"}
        for argument, declaration in zip(arguments, declarations, strict=True)
    ]


def _rows(names: list[str], width: int = 116) -> list[str]:
    """The names joined by commas, broken into lines of at most `width` characters."""
    rows = [names[0]]
    for name in names[1:]:
        if len(rows[-1]) + 2 + len(name) > width:
            rows.append(name)
        else:
            rows[-1] += f", {name}"
    return rows


def _lane_expressions(tiles: AbsorbTiles) -> Mapping[str, str]:
    """The lane arithmetic of the absorb, from the atom's maps, as C++ expressions.

    k_first: first k of a lane's fragment of q; read_token: its token within a tile; sum_token: the first token of its sums;
    l_first: its first latent column within a tile; weight_group: number of the group of lanes that hold the same rows of weights;
    sum: the register of sum number i % l_held of token number `column`.
    """
    atom = tiles.atom
    return {
        "k_first": atom.b.lane_expression("k", scale=tiles.fragment_k),
        "read_token": atom.b.lane_expression("n"),
        "sum_token": atom.d.lane_expression("n"),
        "l_first": atom.d.lane_expression("m", scale=tiles.l_run),
        "weight_group": atom.a.lane_expression("m", scale=1),
        "sum": atom.d.held_number(m=f"i % {tiles.l_held}", n="column"),
    }


def _mx_numbers(target: Target) -> Mapping[str, int]:
    """How e2m1 codes are read as fp8: they mean 2^power times less there, and an e8m0 byte of a packed head, less `offset`, is
    the exponent of the fp32 factor that gives them their value and their scale."""
    power = 7 if target.fp8 is DType.E4M3FNUZ else 6  # the exponent bias of fp8 less that of e2m1
    return {"power": power, "offset": LARGEST_EXPONENT - FP32_BIAS - power}


def _activation(tiles: AbsorbTiles, target: Target) -> Mapping[str, Any]:
    """How the query is rounded to fp8: its groups, and between which lanes a group's largest magnitude is found.

    steps: the bits of a lane's number that tell apart those with the same token; reciprocal: of the largest code, in fp32;
    token_lane: which lane has the scale of a lane's token number `column`, "" where it is its own; column: that of sum number i.
    """
    b, d = tiles.atom.b, tiles.atom.d
    steps, below, token_stride = [], 1, 1
    for digit in b.lane:
        if digit.axis == "n":
            token_stride = below
        else:
            steps += [below << bit for bit in range(digit.size.bit_length() - 1)]
        below *= digit.size
    stays = tiles.tokens_per_lane == 1 and b.lane_expression("n") == d.lane_expression("n")
    token = f"({d.lane_expression('n')} + column)"
    return {
        "columns": ACTIVATION_GROUP,
        "groups": -(-tiles.nope_dim // ACTIVATION_GROUP),
        "chunks": ACTIVATION_GROUP // tiles.chunk,
        "steps": steps,
        "least": _float_literal(LEAST_ACTIVATION),
        "reciprocal": _float_literal(float(np.float32(1.0 / target.fp8.largest))),
        "token_lane": "" if stays else token if token_stride == 1 else f"{token} * {token_stride}",
        "column": d.register_expression("n", "i"),
    }


def _wgmma_operands(staging: Staging) -> Mapping[str, Any]:
    """The operand lists of one instruction that multiplies a block: its sums, 4 for each token tile, then the weights."""
    sums = staging.block_tiles * staging.tiles.atom.d.registers
    return {
        "sums": ", ".join(f"%{number}" for number in range(sums)),
        "weights": ", ".join(f"%{sums + number}" for number in range(4)),
        "operands": sums + 4,
        "outputs": [
            ", ".join(f'"+f"(sums[{tile}][m].sums[{i}])' for i in range(staging.tiles.atom.d.registers))
            for tile in range(staging.block_tiles)
        ],
    }


def _sink_context(sink: Sink, lowered: Lowered) -> Mapping[str, Any]:
    parts = [segment for segment in lowered.segments if segment.sink.tensor == sink.tensor]
    held = [(_columns(segment), _value_name(segment)) for segment in parts]
    if sink.stored is DType.UINT8:
        held += [(_scale_bytes(segment), "its scales") for segment in parts if segment.sink.groups]
        layout = ", ".join(f"{span.start} to {span.stop - 1} {what}" for span, what in sorted(held, key=_start))
        return {"tensor": sink.tensor, "cpp": sink.stored.value.cpp, "layout": f"bytes {layout}", "segmented": False, "heads": None}
    layout = ", ".join(f"columns {span.start} to {span.stop - 1} are {what}" for span, what in sorted(held, key=_start))
    return {
        "tensor": sink.tensor,
        "cpp": sink.stored.value.cpp,
        "layout": layout,
        "segmented": sink.segmented,
        "heads": parts[0].heads,
    }


def _start(held: tuple[range, str]) -> int:
    return held[0].start


def _columns(segment: Segment) -> range:
    """What a segment fills of the rows of its sink's tensor: columns, or bytes."""
    write = segment.sink.cache_write
    if write is None or segment.sink.stored is not DType.UINT8:
        return range(segment.column, segment.column + segment.width)
    return range(write.column, write.column + segment.width * segment.sink.quantize.dtype.bytes)


def _scale_bytes(segment: Segment) -> range:
    """The bytes of an entry that hold a segment's scales."""
    groups, write = segment.sink.groups, segment.sink.scale_write
    assert groups is not None, "only rows with scales of their own"
    assert write is not None, "scales go to the cache beside their codes"
    return range(write.column, write.column + segment.width // groups.group * DType.FP32.bytes)


def _value_name(segment: Segment) -> str:
    if segment.absorb:
        return segment.absorb.output
    return f"{segment.source}, rotated" if segment.rope else segment.source


def _segment_context(segment: Segment, pieces: Pieces | None, schedule: Schedule, lowered: Lowered) -> Mapping[str, Any]:
    """What the segment partials need to know."""
    sink = segment.sink
    out = sink.quantize.dtype
    is_query, by_head = sink.role == "q", segment.heads is not None
    steps = [segment.source]
    if segment.absorb:
        steps.append("q_absorb")
    if segment.rope:
        steps.append(f"rope ({segment.rope.style})")
    # Rounding to the output's own type again would change nothing.
    rounds = bool(segment.absorb or segment.rope) and segment.carried is not DType.FP32 and segment.carried is not out
    if rounds:
        steps.append(f"round to {segment.carried}")
    if sink.groups:
        steps.append(f"scale groups of {sink.groups.group}")
    steps.append(f"quantize to {out}" if out.is_fp8 else f"to {out}")
    columns = f"{_columns(segment).start}:{_columns(segment).stop}"
    place = f"{sink.tensor}[{':' if is_query else 'slot'}, {':, ' if by_head else ''}{columns}]"
    if sink.segmented:
        place = f"{sink.tensor}[block, block_size * {segment.column} + place * {segment.width}:]"
    chain = " -> ".join([*steps, place])
    options = ""
    if out.is_fp8:
        options = f", {'inverse_scale' if sink.quantize.scale else '1.0f'}, {_float_literal(sink.quantize.limit)}"
    column = "column" if segment.column == 0 else f"{segment.column} + column"
    row = f"{sink.tensor}_row(args, token, head)" if is_query else f"cache_entry(args, slot{', head' if by_head else ''})"
    if sink.segmented:
        row, column = f"cache_part(args, slot, {segment.column}, {segment.width})", "column"
    if sink.stored is DType.UINT8:
        first = _columns(segment).start
        row = f"reinterpret_cast<{out.value.cpp}*>({row}{f' + {first}' if first else ''})"
    rows = "uint32_t(args.tokens)" + (f" * args.{segment.heads}" if by_head else "")
    context: dict[str, Any] = {
        "name": segment.name,
        "source": segment.source,
        "template": f"stages/segment_{'absorb' if segment.absorb else 'rows'}.hip.j2",
        "chain": chain,
        "heads": segment.heads,
        "tensor": sink.tensor,
        "is_cache": sink.role == "kv",
        "rope": segment.rope,
        "round": rounds,
        "cpp": out.value.cpp,
        "verbatim": not segment.rope and out is lowered.model_dtype,
        "store": "quantize" if out.is_fp8 else "store",
        "store_options": options,
        "scale": sink.scale,
        "groups": sink.groups,
        "destination": f"{row} + {column}",
        "column_offset": f" + {segment.column}" if segment.column else "",
        "rows": rows,
        "head_offset": f" + head * args.{segment.source}_head_stride" if by_head else "",
        "pieces": pieces,
    }
    if pieces:
        context["pairs"] = pieces.run if pieces.runs == 2 else pieces.run // 2
        context["vectors"] = ["low", "high"] if pieces.runs == 2 else ["x"]
        runs = f"lane i of them owns {pieces.run} columns from {pieces.lane_stride} i"
        if pieces.runs == 2:
            runs += f" and their partners {pieces.run_distance} columns on"
        context["ownership"] = runs
        if sink.groups:
            context["group_lanes"] = sink.groups.group // pieces.run
            context["scale_place"] = f"{_scale_bytes(segment).start} + column / {sink.groups.group} * {DType.FP32.bytes}"
    return MappingProxyType(context)


def _float_literal(value: float) -> str:
    """`value` as an exact C++ float literal."""
    return f"{value:g}.0f" if value == int(value) and abs(value) < 1e6 else f"{value.hex()}f"


def _power_literal(value: float) -> str:
    """A power of two as a C++ float literal."""
    return f"0x1p{math.frexp(value)[1] - 1}f"
