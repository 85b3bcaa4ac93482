"""Where a graph writes a cache's entries: [kv_c | rotated k_pe], quantised, at the slots of a vector."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import fx

from mlagen.fx.index import Index, Unreadable, may_be_same, same_extent
from mlagen.fx.known import CacheWriter, meaning, turned, writes_cache
from mlagen.fx.mutation import Call, functional_call
from mlagen.fx.operators import FP8_TYPES
from mlagen.fx.query import Query, behind
from mlagen.fx.reader import Place, Reader, argument, is_call, value_of
from mlagen.fx.slab import Slab, find_slab
from mlagen.fx.values import Factor, Quant, Rotation, Term, Values, find_rotation

aten = torch.ops.aten

KEEPS_ORDER = (
    aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.unsqueeze.default, aten.squeeze.dim,
    aten.squeeze.dims, aten.squeeze.default, aten.alias.default, aten.view.dtype,
)  # fmt: skip
"""Views that show all elements in the order of what they show, each as wide as it was."""
QUANTIZED = ("fp8", "fp8_e4m3")
UNQUANTIZED = ("auto", "bfloat16", "float16", "half")
"""What vLLM calls the types of a cache whose numbers are, or are not, codes of one scale."""


@dataclass(frozen=True)
class Update:
    """kv_cache[slots] = quant([kv_c | k_pe]) by `node`, which saw the cache as `target`; `after` are the nodes that hold it then.

    base: the cache before the write, [blocks, block_size, L+R] or [slots, L+R]; slots: [>= T], negative ones counting from the end,
    or, with `skips`, left out.
    """

    node: fx.Node
    target: fx.Node
    after: tuple[fx.Node, ...]
    base: fx.Node
    slots: fx.Node
    kv_c: Slab
    k_pe: Slab | None
    quant: Quant | None
    rotation: Rotation | None
    inner: frozenset[fx.Node]
    skips: bool = False


def is_write(node: fx.Node) -> bool:
    """Whether a node may be a write of entries."""
    call = functional_call(node)
    return is_call(node, aten.index_put.default) or (call is not None and writes_cache(call))


def find_update(node: fx.Node, query: Query, fp8: torch.dtype | None = None) -> Update:
    """The write of the entries that belong to a query.  Raises Unreadable, saying what it is instead.

    fp8: what the bytes of a cache are where the graph does not say.
    """
    call = functional_call(node)
    if call is not None:
        return _written_by(call, query, fp8)
    target, indices, entry = (argument(node, place, name) for place, name in ((0, "self"), (1, "indices"), (2, "values")))
    if argument(node, 3, "accumulate", False):
        raise Unreadable(f"{node.name} adds to the cache")
    shape = value_of(entry).shape
    width = query.lora_rank + query.rope_dim
    if len(shape) == 1 and query.tokens == 1:
        shape = torch.Size((1, *shape))  # a single entry, without a dimension for it
    if len(shape) not in (2, 3) or shape[-1] != width or (len(shape) == 3 and shape[1] != 1):
        apart = shape and query.rope_dim and shape[-1] in (query.lora_rank, query.rope_dim)
        why = ": latent and rotary columns that go to caches of their own" if apart else ""
        raise Unreadable(f"{node.name} writes {list(shape)}, expected [T, {width}] or [T, 1, {width}]{why}")
    if not same_extent(shape[0], query.tokens):
        raise Unreadable(f"{node.name} writes {shape[0]} entries, expected one for each of {query.tokens} rows of the query")
    reader = Reader({"t": shape[0] if isinstance(shape[0], int) else None, "l": query.lora_rank})
    values = Values(reader)
    t = reader.variable("t")
    before = (t, Index())[: value_of(entry).dim() - 1]
    latent, quant = values.quantization((entry, (*before, reader.variable("l"))))
    rows = [(t, shape[0])]
    chain = values.follow(latent)
    kv_c = find_slab([chain], rows, [query.dtype], (reader.variable("l"), query.lora_rank))
    if kv_c is None:
        raise Unreadable(f"{node.name}: its first {query.lora_rank} columns are no part of a tensor of {query.dtype}")
    places: list[Place] = []
    for j in range(query.rope_dim):
        place, other = values.quantization((entry, (*before, Index(query.lora_rank + j))))
        if other != quant:
            raise Unreadable(f"{node.name}: its columns are quantised in different ways")
        places.append(place)
    k_pe, rotation = _rotary(node, values, places, query, rows)
    if any(each not in (query.dtype, torch.float32) for each in values.casts):
        raise Unreadable(f"{node.name}: passes through another type than {query.dtype} and fp32")
    base = _base(target, width, quant)
    slots = _slots(reader, node, target, indices, shape)
    bounds = {each.node for each in (kv_c, k_pe) if each is not None}
    inner = (frozenset(values.seen) | {entry}) - behind(bounds)
    return Update(node, target, (node,), base, slots, kv_c, k_pe, quant, rotation, inner)


def _written_by(call: Call, query: Query, fp8: torch.dtype | None) -> Update:
    """The write of an operator that is known."""
    node, found = call.node, meaning(call, CacheWriter)
    assert found is not None, "it is a write"
    names = ("kv_c", "k_pe", "kv_cache", "slot_mapping", found.scale)
    kv, pe, cache, slots, scale = (call.view(name) for name in names)
    if kv is None or pe is None or cache is None or slots is None or scale is None or not cache.is_whole:
        raise Unreadable(f"{node.name}: {call.name} without a tensor that it needs, or of a part of a cache")
    if len(kv.shape) != 2 or kv.shape[1] != query.lora_rank or not same_extent(kv.shape[0], query.tokens):
        raise Unreadable(f"{node.name} writes latents {list(kv.shape)}, expected [{query.tokens}, {query.lora_rank}]")
    tokens, *one = pe.shape[:-1]
    if pe.shape[-1] != query.rope_dim or one not in ([], [1]) or not same_extent(tokens, query.tokens):
        raise Unreadable(f"{node.name} writes rotary columns {list(pe.shape)}, expected [{query.tokens}, {query.rope_dim}]")
    reader = Reader({"t": tokens if isinstance(tokens, int) else None, "l": query.lora_rank})
    values, t, l = Values(reader), reader.variable("t"), reader.variable("l")
    rows = [(t, tokens)]
    chain = values.follow(call.element("kv_c", (t, l), reader.sizes))
    kv_c = find_slab([chain], rows, [query.dtype], (l, query.lora_rank))
    if kv_c is None:
        raise Unreadable(f"{node.name}: its latents are no part of a tensor of {query.dtype}")
    before = (t, Index())[: len(pe.shape) - 1]
    index = [(*before, Index(j)) for j in range(query.rope_dim)]
    if "k_pe" in call.written:
        products = [turned(call, "k_pe", each, reader.sizes) for each in index]
        columns = [values.products(each) for each in products if each is not None]
        k_pe: Slab | None
        rotation: Rotation | None
        k_pe, rotation = _turned(node, values, columns, query, rows)
    else:
        places = [call.element("k_pe", each, reader.sizes) for each in index]
        k_pe, rotation = _rotary(node, values, places, query, rows)
    quant = _cache_codes(call, values, value_of(cache.base).dtype, query, fp8, found)
    base = _base(cache.base, query.lora_rank + query.rope_dim, quant)
    if value_of(base).dim() != 3 or value_of(cache.base).dim() != 3:
        raise Unreadable(f"{node.name}: a cache {list(value_of(cache.base).shape)}, expected [blocks, block_size, L+R]")
    for name in set(call.written) - {"kv_cache"}:
        for result in call.results(call.result(name)):
            if any(user not in query.inner for user in result.users) and result not in query.inner:
                raise Unreadable(f"{node.name}: {name} is used afterwards")
    bounds = {each.node for each in (kv_c, k_pe) if each is not None}
    vector, after = _vector(slots.base, kv.shape[0]), tuple(call.results(call.result("kv_cache")))
    inner = frozenset(values.seen) - behind(bounds) - {node}
    return Update(node, cache.base, after, base, vector, kv_c, k_pe, quant, rotation, inner, skips=True)


def _cache_codes(
    call: Call, values: Values, held: torch.dtype, query: Query, fp8: torch.dtype | None, found: CacheWriter
) -> Quant | None:
    """How an operator makes the codes of a cache of type `held`."""
    kind = call.given("kv_cache_dtype")
    if kind in UNQUANTIZED and held is query.dtype:
        return None
    dtype = held if held in FP8_TYPES else fp8
    if kind not in QUANTIZED or dtype is None:
        raise Unreadable(f"{call.node.name}: kv_cache_dtype={kind!r} for a cache of {held} and numbers of {query.dtype}")
    scale = values.scale(call.given(found.scale))
    if scale is None:
        raise Unreadable(f"{call.node.name}: a scale of the cache that is no fp32 tensor of one number")
    return Quant(dtype, scale, torch.finfo(dtype).max, divides=True)


def _rotary(
    node: fx.Node, values: Values, places: Sequence[Place], query: Query, rows: Sequence[tuple[Index, object]]
) -> tuple[Slab | None, Rotation | None]:
    """k_pe before the rotation that the query has, too."""
    if not places:
        return None, None
    if query.rotation is None:
        chains = [values.follow(place) for place in places]
        k_pe, rotation = find_slab(chains, rows, [query.dtype], (Index(), len(places))), None
    else:
        return _turned(node, values, [values.terms(place) for place in places], query, rows)
    if k_pe is None:
        raise Unreadable(f"{node.name}: its last {len(places)} columns are no part of a tensor of {query.dtype}")
    return k_pe, rotation


def _turned(
    node: fx.Node, values: Values, columns: Sequence[list[Term]], query: Query, rows: Sequence[tuple[Index, object]]
) -> tuple[Slab, Rotation]:
    """What the products of rotary columns turn, as the query's are."""
    tables = {factor.key for factor in (*query.rotation.cos, *query.rotation.sin)} if query.rotation else set()

    def is_table(factor: Factor) -> bool:
        return factor.key in tables

    rotation = find_rotation(columns, is_table)
    if not rotation or not query.rotation or (rotation.style, _keys(rotation)) != (query.rotation.style, _keys(query.rotation)):
        raise Unreadable(f"{node.name}: its rotary columns are not turned as the query's are")
    values.record_turned(columns, is_table)
    k_pe = find_slab([factor.chain for factor in rotation.x], rows, [query.dtype], (Index(), len(columns)))
    if k_pe is None:
        raise Unreadable(f"{node.name}: its last {len(columns)} columns are no part of a tensor of {query.dtype}")
    return k_pe, rotation


def _keys(rotation: Rotation) -> list[object]:
    def key(factor: Factor) -> object:
        return factor.key

    return [key(factor) for factor in (*rotation.cos, *rotation.sin)]


def _base(target: fx.Node, width: int, quant: Quant | None) -> fx.Node:
    """The cache that a write through order-keeping views writes to."""
    base = target
    while is_call(base, *KEEPS_ORDER):
        source = base.args[0]
        assert isinstance(source, fx.Node)
        if value_of(source).dtype.itemsize != value_of(base).dtype.itemsize:
            break
        base = source
    value = value_of(base)
    if value.dim() not in (2, 3) or not same_extent(value.shape[-1], width):
        raise Unreadable(f"{base.name}: a cache {list(value.shape)}, expected [blocks, block_size, {width}] or [slots, {width}]")
    if not same_extent(value.stride(-1), 1):
        raise Unreadable(f"{base.name}: a cache of strides {list(value.stride())}, expected 1 as the last one")
    held = value_of(target).dtype
    if quant is not None and held not in (quant.dtype, torch.uint8):
        raise Unreadable(f"{base.name}: a cache of {held} for codes of {quant.dtype}")
    if quant is not None and value.dtype not in (quant.dtype, torch.uint8):
        raise Unreadable(f"{base.name}: a cache of {value.dtype} for codes of {quant.dtype}")
    if quant is None and (value.dtype is not held or value.dtype in (*FP8_TYPES, torch.uint8)):
        raise Unreadable(f"{base.name}: a cache of {value.dtype} for numbers that are not quantised")
    return base


def _slots(reader: Reader, node: fx.Node, target: fx.Node, indices: Sequence[fx.Node | None], entries: torch.Size) -> fx.Node:
    """The vector of slots that the indices of a write of `entries` [T, L+R] or [T, 1, L+R] are made of."""
    shape = value_of(target).shape
    if any(each is None for each in indices) or len(indices) not in (1, 2) or len(shape) != len(entries) - 1 + len(indices):
        raise Unreadable(f"{node.name}: an index that is not one slot for each entry")
    if len(indices) == 1:
        if len(shape) == 3 and shape[1] != 1:
            raise Unreadable(f"{node.name} writes whole blocks")
        return _vector(indices[0], entries[0])
    if any(value_of(each).dim() != 1 for each in indices if each is not None):
        raise Unreadable(f"{node.name}: blocks and places that are no vectors")
    block, place = (reader.source(each, (reader.variable("t"),)) for each in indices if each is not None)
    size = shape[1]
    divided = is_call(block[0], aten.div.Tensor_mode) and block[0].kwargs.get("rounding_mode") == "floor"
    divided = divided or is_call(block[0], aten.floor_divide.default)
    remains = is_call(place[0], aten.remainder.Scalar)
    divisors = {block[0].args[1], place[0].args[1]} if divided and remains else set()
    if not isinstance(size, int) or divisors != {size}:
        raise Unreadable(f"{node.name}: blocks and places that are not a slot divided by {size} and what remains")
    sources = [reader.operand(each, index, each.args[0]) for each, index in (block, place)]  # type: ignore[arg-type]
    if reader.source(*sources[0]) != reader.source(*sources[1]):
        raise Unreadable(f"{node.name}: blocks and places of different slots")
    return _vector(sources[0][0], entries[0])


def _vector(node: fx.Node | None, tokens: object) -> fx.Node:
    assert node is not None
    value = value_of(node)
    if value.dim() != 1 or value.dtype not in (torch.int32, torch.int64) or not may_be_same(value.shape[0], tokens):
        raise Unreadable(f"{node.name}: slots {list(value.shape)} of {value.dtype}, expected [{tokens}] integers")
    return node
