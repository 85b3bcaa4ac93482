"""The kernel's arguments: one list that the generated signature, the host build and every driver's launch share.

Arguments that the first loads depend on come first: a target that preloads kernel arguments into registers takes them from the
front.  Strides are in elements.
"""

from dataclasses import dataclass

from mlagen.lowering import Lowered

ABI_VERSION = 2
"""Raised whenever the meaning or the order of the arguments changes; part of the identity of a compiled kernel."""


@dataclass(frozen=True)
class Argument:
    """One kernel argument.

    `kind` is "pointer", "int32", "int64" or "uint64", `cpp` its C++ type, `meaning` a remark for the reader.
    """

    name: str
    kind: str
    cpp: str
    meaning: str

    @property
    def word_format(self) -> str:
        """struct-module format of the value in a word of eight bytes, little endian."""
        return {"pointer": "<Q", "int32": "<i4x", "int64": "<q", "uint64": "<Q"}[self.kind]


def kernel_arguments(lowered: Lowered, *, absorb_first: bool = False, head_bytes: int | None = None) -> tuple[Argument, ...]:
    """The arguments of the kernel of a lowered program, in order; `absorb_first` says which workgroups of the grid come first.

    `head_bytes` is the size of a packed head where W_UK comes in codes.
    """
    element = lowered.model_dtype.value.cpp
    sources = {segment.source: segment for segment in lowered.parts}
    arguments: list[Argument] = []

    def pointer(name: str, cpp: str, meaning: str) -> None:
        arguments.append(Argument(name, "pointer", f"{cpp}*", meaning))

    def int32(name: str, meaning: str) -> None:
        arguments.append(Argument(name, "int32", "int32_t", meaning))

    def int64(name: str, meaning: str) -> None:
        arguments.append(Argument(name, "int64", "int64_t", meaning))

    def source(name: str) -> None:
        by_head = sources[name].heads is not None
        rows = {"heads": "T, H", "kv_heads": "T, K", None: "T"}[sources[name].heads]
        pointer(name, f"const {element}", f"[{rows}, {sources[name].source_width}]")
        int64(f"{name}_token_stride", f"of {name}, in elements")
        if by_head:
            int64(f"{name}_head_stride", f"of {name}, in elements")

    queries, kv = lowered.queries, lowered.cache
    if lowered.absorb:
        if head_bytes is None:
            pointer("w_uk", f"const {element}", "packed: [H, tiles, chunks, m, fragments, lanes, 8]")
        else:
            pointer("w_uk", "const uint8_t", f"packed: [H, {head_bytes}], codes and their scales")
    first = lowered.absorb.source if lowered.absorb else None
    if first:
        source(first)
    int32("tokens", "T")
    if queries:
        int32("heads", "H of this rank")
    if lowered.absorb:
        int32("token_tiles_per_workgroup", "how many token tiles an absorb workgroup takes")
    if lowered.absorb and len(lowered.segments) > 1:
        if absorb_first:
            int32("absorb_workgroups", "the first ones of the grid")
        else:
            int32("row_workgroups", "those before the first that absorbs")
    scales = [sink.scale for sink in (*queries, *([kv] if kv else []))]
    for scale in filter(None, dict.fromkeys(scales)):
        pointer(scale, "const float", "[1], dequantisation scale")
    if lowered.ropes:
        pointer("positions", "const void", "[T]")
        pointer("cos", "const void", "[max_position, R/2]")
        pointer("sin", "const void", "[max_position, R/2]")
        int64("cos_stride", "of a position, in elements")
        int64("sin_stride", "of a position, in elements")
        int64("max_position", "positions are clamped to [0, max_position)")
        int32("positions_int64", "1: positions are int64, 0: int32")
        int32("cos_sin_float", f"1: cos and sin are float, 0: {element}")
    for segment in sorted(lowered.parts, key=lambda segment: (segment.sink.number, segment.column)):
        if segment.source != first:
            source(segment.source)
    for q in queries:
        pointer(q.tensor, q.quantize.dtype.value.cpp, f"[T, >= H, {q.width}]")
        int64(f"{q.tensor}_token_stride", f"of {q.tensor}, in elements")
        int64(f"{q.tensor}_head_stride", f"of {q.tensor}, in elements")
        if q.row_scale:
            pointer(q.row_scale.output, "float", "[T, >= H], dequantisation scales")
            int64(f"{q.row_scale.output}_token_stride", f"of {q.row_scale.output}, in elements")
    if kv:
        pointer("slot_mapping", "const void", "[>= T], negative: leave the cache alone")
        several = any(segment.heads == "kv_heads" for segment in lowered.segments)
        slots = "block_size *" if kv.segmented else "block_size, K," if several else "block_size,"
        pointer(kv.tensor, kv.stored.value.cpp, f"[blocks, {slots} {kv.width}]")
        int64("block_stride", f"of {kv.tensor}, in elements")
        if not kv.segmented:
            int64("entry_stride", "of a slot within its block, in elements")
        if several:
            int32("kv_heads", "K of this rank")
            int64("kv_head_stride", "of a KV head within its slot, in elements")
        int32("block_size", "slots of a block")
        arguments.append(Argument("block_reciprocal", "uint64", "uint64_t", "2^63 / block_size + 1: divides slots"))
        int32("slots_int64", "1: slot_mapping is int64, 0: int32")
    return tuple(arguments)
