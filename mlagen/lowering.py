"""Lowering: a verified Program becomes segments, each an independent slice of the outputs.

A segment follows one source tensor to its columns of one output: Concat dissolves into column offsets, Quantize and CacheWrite
become the segment's store.  Segments share nothing, so one launch runs them side by side on different workgroups.
"""

import functools
from dataclasses import dataclass, replace

from mlagen.dtypes import DType
from mlagen.errors import ProgramError
from mlagen.ir import CacheWrite, Concat, GroupScale, Program, QAbsorb, Quantize, Rope, RowScale, Types


@dataclass(frozen=True)
class Sink:
    """Where rows end: an output tensor, its type, and how a row is converted and addressed.

    `number` is its place among the program's results; `role` is "q" for rows [T,H,:] of the query, "kv" for rows [T,:] or [T,K,:]
    that go to the cache.  `width` and `stored` are those of the tensor's rows.  Where the rows have scales of their own, `groups`
    computes them and `scale_write` puts them in the cache.
    """

    number: int
    role: str
    tensor: str
    width: int
    stored: DType
    quantize: Quantize
    cache_write: CacheWrite | None
    groups: GroupScale | None = None
    scale_write: CacheWrite | None = None
    row_scale: RowScale | None = None

    @property
    def scale(self) -> str | None:
        """The input that is the scale of all rows, if there is one."""
        return None if self.groups or self.row_scale else self.quantize.scale

    @property
    def segmented(self) -> bool:
        """Whether a block of the cache holds a part of the row for all of its slots, and then the next part."""
        return self.cache_write is not None and self.cache_write.layout == "segmented"


@dataclass(frozen=True)
class Segment:
    """`source`, carried through at most one of `absorb` and `rope`, to columns [column, column + width) of a sink's rows.

    `carried` is the type to which the value is rounded before the sink's conversion; fp32 means that it is not rounded.  `heads`
    is the argument that says how many rows a token has, "heads" or "kv_heads"; None means one.  `weight` is the element of the
    absorb's W_UK, or else of the source, and `scale_block` says how many rows and columns of W_UK share a scale, where it has any.
    `beside` is the other part of the same rows, where one workgroup must see both because a row's scale is made of them.
    """

    name: str
    source: str
    source_width: int
    width: int
    column: int
    absorb: QAbsorb | None
    rope: Rope | None
    carried: DType
    sink: Sink
    heads: str | None
    weight: DType
    scale_block: tuple[int, int] | None
    beside: "Segment | None" = None


@dataclass(frozen=True)
class Lowered:
    """The segments in the order in which their workgroups start: the longest chain of dependent loads first."""

    model_dtype: DType
    segments: tuple[Segment, ...]

    @property
    def absorb(self) -> Segment | None:
        return next((segment for segment in self.segments if segment.absorb), None)

    @property
    def operand_dtype(self) -> DType:
        """What the absorb's matrix instruction multiplies."""
        activation = self.absorb.absorb.activation if self.absorb and self.absorb.absorb else None
        return activation or self.model_dtype

    @property
    def sinks(self) -> tuple[Sink, ...]:
        found: list[Sink] = []
        for segment in self.segments:
            if segment.sink not in found:
                found.append(segment.sink)
        return tuple(found)

    @property
    def queries(self) -> tuple[Sink, ...]:
        """The tensors of the query, in the order of the program's results."""
        return tuple(sorted((sink for sink in self.sinks if sink.role == "q"), key=lambda sink: sink.number))

    @property
    def cache(self) -> Sink | None:
        return next((sink for sink in self.sinks if sink.role == "kv"), None)

    @property
    def parts(self) -> tuple[Segment, ...]:
        """All segments, those beside another one too."""
        pairs = [(segment, segment.beside) for segment in self.segments]
        return tuple(part for pair in pairs for part in pair if part)

    @property
    def ropes(self) -> tuple[Rope, ...]:
        return tuple(part.rope for part in self.parts if part.rope)


@functools.cache
def lower(program: Program) -> Lowered:
    """Segments of `program`.  Raises ProgramError for one that is ill-formed or that no single launch can serve."""
    types = program.verify()
    segments: list[Segment] = []
    for number, result in enumerate(program.results):
        if not _is_of_scales(program, result):
            segments += _row_segments(program, types, _sink(program, types, number, result))
    _refuse_overlaps(program, types)
    used = {stage.output for stage in program.stages}
    kept = {name for segment in segments for name in _names(program, segment)}
    for name in sorted(used - kept):
        raise ProgramError(f"program {program.name!r}: {name!r} is computed but no result is made of it")
    dtypes = {types[segment.source].dtype for segment in segments}
    styles = {segment.rope.style for segment in segments if segment.rope}
    rotaries = {(segment.rope.cos_sin, segment.rope.positions, segment.width) for segment in segments if segment.rope}
    sources = [segment.source for segment in segments]
    caches = {segment.sink.tensor for segment in segments if segment.sink.role == "kv"}
    for what, found in (("model types", dtypes), ("RoPE styles", styles), ("rotary tables or widths", rotaries)):
        if len(found) > 1:
            raise ProgramError(f"program {program.name!r}: it mixes {what}: {', '.join(sorted(map(str, found)))}")
    if len(set(sources)) < len(sources) or len(caches) > 1:
        raise ProgramError(
            f"program {program.name!r}: two results have the same rows; each part of q in one, one cache write at most"
        )
    segments.sort(key=_order)
    scaled = [segment for segment in segments if segment.sink.row_scale]
    if len(scaled) == 2:  # one workgroup does both parts of a row, for the sake of its scale
        beside, first = scaled
        segments = [replace(each, beside=beside) if each is first else each for each in segments if each is not beside]
    return Lowered(dtypes.pop(), tuple(segments))


def _sink(program: Program, types: Types, number: int, result: str) -> Sink:
    stage = program.producer(result)
    if isinstance(stage, CacheWrite):
        quantize = program.producer(stage.x)
        if not isinstance(quantize, Quantize):
            raise stage.reject(f"{stage.x!r} must come from Quantize, which converts it to the cache's type")
        cache, groups, scale_write = types[stage.cache], None, None
        scale = program.producer(quantize.scale) if quantize.scale else None
        if isinstance(scale, GroupScale):
            groups = scale
            writes = (each for each in program.stages if isinstance(each, CacheWrite) and each.x == groups.output)
            scale_write = next(writes, None)
            if scale_write is None or scale_write.cache != stage.cache:
                raise groups.reject(f"{stage.cache!r} has the codes and not their scales: nobody could read it")
            if groups.x != quantize.x or program.producer(groups.x) is not None:
                raise groups.reject(f"the scales must be those of {quantize.x!r}, and that an input")
        return Sink(number, "kv", stage.cache, cache.width, cache.dtype, quantize, stage, groups, scale_write)
    if isinstance(stage, Quantize) and len(types[result].shape) == 3:
        scale = program.producer(stage.scale) if stage.scale else None
        row_scale = scale if isinstance(scale, RowScale) else None
        if row_scale and row_scale.output not in program.results:
            raise row_scale.reject("the scales are no result: nobody could read the codes")
        if row_scale and row_scale.x != stage.x:
            raise row_scale.reject(f"the scales must be those of {stage.x!r}")
        return Sink(number, "q", result, types[result].width, stage.dtype, stage, None, row_scale=row_scale)
    raise ProgramError(f"program {program.name!r}: its result {result!r} is neither a quantised [T,H,:] query nor a cache write")


def _is_of_scales(program: Program, result: str) -> bool:
    """Whether a result is made of scales, which go with their codes: the write of them, or those of rows."""
    stage = program.producer(result)
    return isinstance(stage, RowScale) or (isinstance(stage, CacheWrite) and isinstance(program.producer(stage.x), GroupScale))


def _refuse_overlaps(program: Program, types: Types) -> None:
    """Cache writes of one entry must take other bytes each: they are done side by side, in any order."""
    taken: dict[tuple[str, int], CacheWrite] = {}
    for stage in program.stages:
        if isinstance(stage, CacheWrite):
            for byte in stage.bytes_of(types[stage.x]):
                other = taken.setdefault((stage.cache, byte), stage)
                if other is not stage:
                    raise stage.reject(f"it writes byte {byte} of an entry of {stage.cache!r}, as CacheWrite {other.output!r} does")


def _row_segments(program: Program, types: Types, sink: Sink) -> list[Segment]:
    parts = [sink.quantize.x]
    concat = program.producer(sink.quantize.x)
    if isinstance(concat, Concat):
        parts = [concat.a, concat.b]
    segments, column = [], 0
    for part in parts:
        stage = program.producer(part)
        if isinstance(stage, QAbsorb):
            source, absorb, rope = stage.q_nope, stage, None
        elif isinstance(stage, Rope):
            source, absorb, rope = stage.x, None, stage
        elif stage is None:
            source, absorb, rope = part, None, None
        else:
            raise stage.reject("only an input, QAbsorb or Rope can feed a row of an output")
        if program.producer(source) is not None:
            raise ProgramError(f"program {program.name!r}: {source!r} passes through two of QAbsorb and Rope")
        verb = "absorb" if absorb else "rotate" if rope else "copy"
        width = types[part].width
        name = f"{verb}_{source}"
        heads = None if len(types[source].shape) == 2 else "heads" if sink.role == "q" else "kv_heads"
        weight = types[absorb.w_uk].dtype if absorb else types[source].dtype
        block = absorb.scale_block(types) if absorb and absorb.w_scale else None
        ends = sink, heads, weight, block
        segments.append(Segment(name, source, types[source].width, width, column, absorb, rope, types[part].dtype, *ends))
        column += width
    return segments


def _names(program: Program, segment: Segment) -> set[str]:
    sink = segment.sink
    stages = (segment.absorb, segment.rope, sink.quantize, sink.cache_write, sink.groups, sink.scale_write, sink.row_scale)
    names = {stage.output for stage in stages if stage}
    concat = program.producer(segment.sink.quantize.x)
    return names | ({concat.output} if isinstance(concat, Concat) else set())


def _order(segment: Segment) -> tuple[bool, bool, bool]:
    """Rotations wait for positions and then for cos and sin, cache writes for a slot; the absorb streams from its first load."""
    return (segment.absorb is not None, segment.rope is None, segment.sink.role == "q")
