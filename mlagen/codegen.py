"""Codegen: a lowered Program, a Schedule and a Target become HIP source.  Pure: the same input gives the same bytes.

Python computes the numbers and chooses the text; the templates hold the code.  The platforms share the rendered kernel: a
target's own, "amd" or "nvidia", and "host", where the same text follows a library that runs the lanes on the CPU.
"""

import functools
import hashlib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from mlagen.abi import Argument, kernel_arguments
from mlagen.codes import PackedCodes, packed_codes
from mlagen.dtypes import DType
from mlagen.errors import ScheduleError
from mlagen.expressions import activation, float_literal, lane_expressions, mx_numbers, power_literal, wgmma_operands
from mlagen.ir import LEAST_ROW_SCALE, Program
from mlagen.layout import Layout
from mlagen.lowering import Lowered, Segment, Sink, lower
from mlagen.rendering import environment, template_texts
from mlagen.schedule import Pieces, Schedule, cut, lay_out
from mlagen.spec import PrologueSpec
from mlagen.tables import choose_ranges
from mlagen.target import Target

FLOOR_THREADS = (128, 256, 512)
"""Lanes of a workgroup of each of the streaming floor's kernels."""

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
    schedule = lay_out(lowered, target, layout)
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
    form = "split" if spec.q_split else "token" if spec.q_scaling == "token" else ""
    q = f"q{spec.q_dtype}{form}" if spec.write_q else "noq"
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
    context = {"target": target, "aligned": True, "staging": None, "float_bits": False, "dependent": False, "codes": None}
    context["threads_choices"] = FLOOR_THREADS
    context["fp8_largest"] = float_literal(target.fp8.largest)
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
    if any(q.row_scale for q in queries):
        partials.append("row_scale")
    atom = target.atom(lowered.operand_dtype)
    segments = [
        _segment_context(segment, pieces, schedule, lowered)
        for segment, pieces in zip(lowered.segments, schedule.pieces, strict=True)
    ]
    scaled = next((segment for segment in segments if segment["row_scale"]), None)
    operand_codes = codes is not None and codes.operand_codes
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
        "scaled": scaled,
        "rows": [segment for segment in segments if segment["pieces"]],
        "rope": lowered.ropes[0] if lowered.ropes else None,
        "model": lowered.model_dtype.value.cpp,
        "atom": atom,
        "fp8_largest": float_literal(target.fp8.largest),
        "tiles": schedule.absorb,
        "staging": schedule.staging,
        "product": target.shared_product(lowered.model_dtype),
        "lanes": lane_expressions(schedule.absorb) if schedule.absorb else None,
        "codes": codes,
        "operand_codes": operand_codes,
        "activation": activation(schedule.absorb, target) if operand_codes and schedule.absorb else None,
        "sum_scale": " * weight_scale" if codes and codes.row_blocks == 1 else "",
        "mx": mx_numbers(target),
        "wgmma": wgmma_operands(schedule.staging) if schedule.staging else None,
        "queries": [_sink_context(q, lowered) for q in queries],
        "kv": _sink_context(kv, lowered) if kv else None,
        "groups": groups,
        "float_bits": bool(groups) or operand_codes or scaled is not None,
        "least": power_literal(groups.least) if groups else None,
        "divisor": float_literal(groups.divisor) if groups else None,
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


def _sink_context(sink: Sink, lowered: Lowered) -> Mapping[str, Any]:
    parts = [segment for segment in lowered.parts if segment.sink.tensor == sink.tensor]
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
    sink, by_head = segment.sink, segment.heads is not None
    out = sink.quantize.dtype
    options = ""
    if out.is_fp8:
        options = f", {'inverse_scale' if sink.quantize.scale else '1.0f'}, {float_literal(sink.quantize.limit)}"
    context: dict[str, Any] = {
        "name": segment.name,
        "source": segment.source,
        "template": f"stages/segment_{'absorb' if segment.absorb else 'rows'}.hip.j2",
        "chain": _chain(segment),
        "heads": segment.heads,
        "tensor": sink.tensor,
        "is_cache": sink.role == "kv",
        "rope": segment.rope,
        "round": _rounds(segment),
        "cpp": out.value.cpp,
        "verbatim": not segment.rope and out is lowered.model_dtype,
        "store": "quantize" if out.is_fp8 else "store",
        "store_options": options,
        "scale": sink.scale,
        "groups": sink.groups,
        "row_scale": sink.row_scale,
        "beside": None,
        "row_lanes": schedule.row_lanes(segment, pieces) if pieces else None,
        "destination": _destination(segment),
        "column_offset": f" + {segment.column}" if segment.column else "",
        "rows": "uint32_t(args.tokens)" + (f" * args.{segment.heads}" if by_head else ""),
        "head_offset": f" + head * args.{segment.source}_head_stride" if by_head else "",
        "pieces": pieces,
    }
    if pieces:
        context |= _pieces_context(segment, pieces)
    if sink.row_scale:
        beside = segment.beside and _segment_context(segment.beside, cut(segment.beside), schedule, lowered)
        context["beside"] = beside
        context["scale_parts"] = schedule.waves_per_workgroup + (beside["pieces"].lanes if beside else 0)
        context["scaled_parts"] = [part for part in (context if pieces else None, beside) if part]
        context["divisor"] = float_literal(sink.row_scale.divisor)
        context["least"] = power_literal(LEAST_ROW_SCALE)
        if pieces:
            context["template"] = "stages/segment_scaled.hip.j2"
    return MappingProxyType(context)


def _rounds(segment: Segment) -> bool:
    """Whether values are rounded before they are stored; to the output's own type, that would change nothing."""
    computed = bool(segment.absorb or segment.rope)
    return computed and segment.carried is not DType.FP32 and segment.carried is not segment.sink.quantize.dtype


def _chain(segment: Segment) -> str:
    """What happens to a segment's values, in words: from where through what to which elements of a tensor."""
    sink, out = segment.sink, segment.sink.quantize.dtype
    steps = [segment.source]
    if segment.absorb:
        steps.append("q_absorb")
    if segment.rope:
        steps.append(f"rope ({segment.rope.style})")
    if _rounds(segment):
        steps.append(f"round to {segment.carried}")
    if sink.groups:
        steps.append(f"scale groups of {sink.groups.group}")
    if sink.row_scale:
        steps.append("row_scale")
    steps.append(f"quantize to {out}" if out.is_fp8 else f"to {out}")
    if sink.segmented:
        place = f"block, block_size * {segment.column} + place * {segment.width}:"
    else:
        columns = _columns(segment)
        place = f"{':' if sink.role == 'q' else 'slot'}, {':, ' if segment.heads else ''}{columns.start}:{columns.stop}"
    return " -> ".join([*steps, f"{sink.tensor}[{place}]"])


def _destination(segment: Segment) -> str:
    """The address of an element, an expression of `column`."""
    sink = segment.sink
    if sink.segmented:
        return f"cache_part(args, slot, {segment.column}, {segment.width}) + column"
    row = f"cache_entry(args, slot{', head' if segment.heads else ''})"
    if sink.role == "q":
        row = f"{sink.tensor}_row(args, token, head)"
    if sink.stored is DType.UINT8:
        first = _columns(segment).start
        row = f"reinterpret_cast<{sink.quantize.dtype.value.cpp}*>({row}{f' + {first}' if first else ''})"
    return f"{row} + {f'{segment.column} + ' if segment.column else ''}column"


def _pieces_context(segment: Segment, pieces: Pieces) -> dict[str, Any]:
    """How the lanes of a row share its columns."""
    groups, halves = segment.sink.groups, pieces.runs == 2
    vectors = ["low", "high"] if halves else ["x"]
    partners = f" and their partners {pieces.run_distance} columns on" if halves else ""
    context = {
        "pairs": pieces.run if halves else pieces.run // 2,
        "vectors": vectors,
        "ownership": f"lane i of them owns {pieces.run} columns from {pieces.lane_stride} i{partners}",
        "piece_variables": ", ".join(f"{vector}[{pieces.run}]" for vector in vectors),
        "piece_parameters": "".join(f", float (&{vector})[{pieces.run}]" for vector in vectors),
    }
    if groups:
        context["group_lanes"] = groups.group // pieces.run
        context["scale_place"] = f"{_scale_bytes(segment).start} + column / {groups.group} * {DType.FP32.bytes}"
    return context
