"""A layer's decode in a graph of vLLM's: RoPE, the write of the cache's entries, and attention, as the stock wrapper has them."""

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch._ops import OpOverload

from mlagen.fx.index import Index, Unreadable, may_be_same, same_extent
from mlagen.fx.query import behind, used_elsewhere
from mlagen.fx.reader import Place, Reader, argument, is_call, value_of
from mlagen.fx.values import Values
from mlagen.integrations.vllm.choice import MODEL_DTYPES
from mlagen.integrations.vllm.rotary import FUSED_UPDATE, Turned, find_turned, functional_call
from mlagen.integrations.vllm.splitting import STOCK_OPERATOR
from mlagen.spec import PrologueSpec

UPDATE = "vllm::unified_mla_kv_cache_update"

OUTPUT = 1
"""Which of a functional call's results is attention's output."""


@dataclass(frozen=True)
class Site:
    """A call of attention, `node`, and what comes before the rotation in front of it.

    q: [T,H,P+R]; kv_c: [T,L]; k_pe: [T,1,R] or [T,R]; positions: [T], None without RoPE; output: [T,H*V], not written yet.
    """

    node: fx.Node
    layer_name: Any
    q: fx.Node
    kv_c: fx.Node
    k_pe: fx.Node
    positions: fx.Node | None
    output: fx.Node


def layer_of(node: fx.Node) -> str | None:
    """The name of the layer whose attention a node is; None where it is none.  Raises Unreadable where the graph does not say it.

    From torch 2.11 on a name comes into the graph as an input, and one graph may run for several layers.
    """
    found = functional_call(node)
    if found is None or found[0] != STOCK_OPERATOR:
        return None
    given = found[1]["layer_name"]
    if isinstance(given, fx.Node):
        given = node_value(given)
    name = getattr(given, "value", given)
    if not isinstance(name, str):
        raise Unreadable(f"{node.name}: a layer without a name")
    return name


def is_input(node: object) -> bool:
    """Whether a node is a parameter or a buffer, which the operator takes from the layer itself."""
    return isinstance(node, fx.Node) and node.op in ("placeholder", "get_attr")


def node_value(node: fx.Node) -> Any:
    """The object that comes into a graph, for which the compiler has a stand-in."""
    stand_in = node.meta.get("val")
    return getattr(stand_in, "real_obj", None) if stand_in is not None else None


def find_site(node: fx.Node, spec: PrologueSpec, table_shape: Sequence[int]) -> Site:
    """The site of a layer that has a kernel of this spec, and cosines and sines in a table of this shape.

    Raises Unreadable, saying what keeps the graph from being what the wrapper makes for such a layer, and no more than that.
    """
    found = functional_call(node)
    assert found is not None
    given = dict(found[1])
    q, kv_c, k_pe, output, layer, update = (
        given.pop(name) for name in ("q", "kv_c_normed", "k_pe", "output", "layer_name", "kv_cache_dummy_dep")
    )
    for name, value in given.items():
        if value is not None:
            raise Unreadable(f"{node.name}: attention with {name}")
    for user in node.users:
        if not is_call(user, operator.getitem) or user.args[1] != OUTPUT:
            raise Unreadable(f"{node.name}: {user.name} uses more than attention's output")
    tokens = value_of(q).shape[0]
    width = spec.nope_dim + spec.rope_dim
    wanted = {"q": (q, (spec.heads, width)), "kv_c": (kv_c, (spec.lora_rank,)), "k_pe": (k_pe, (1, spec.rope_dim))}
    dtype = next(each for each, name in MODEL_DTYPES.items() if name == spec.dtype)
    for name, (each, shape) in wanted.items():
        value = value_of(each)
        if value.dtype is not dtype or value.shape[1:] != shape or not may_be_same(value.shape[0], tokens):
            raise Unreadable(f"{node.name}: {name} {list(value.shape)} of {value.dtype}, expected {['T', *shape]} of {dtype}")
    reader = Reader({"t": tokens if isinstance(tokens, int) else None, "h": spec.heads, "p": spec.nope_dim})
    values = Values(reader)
    written = _update(update, node, layer, kv_c, k_pe)
    t, h, p = (reader.variable(name) for name in "thp")
    if spec.rope_style == "none":
        _check_inner(written, node)
        return Site(node, layer, q, kv_c, k_pe, None, output)
    nope = values.follow((q, (t, h, p)))
    q_turned = find_turned(values, q, (t, h), spec.nope_dim, spec.rope_dim)
    k_turned = find_turned(values, k_pe, (t, Index()), 0, spec.rope_dim)
    _check_turned(values, node, spec, table_shape, q_turned, k_turned)
    columns = [Index(j) for j in range(spec.rope_dim)]
    rotary = [((t, h, j + spec.nope_dim), place) for j, place in zip(columns, q_turned.before, strict=True)]
    whole_q = _holder(values, q, [each for each, _ in nope], [((t, h, p), nope[-1]), *rotary])
    passed = list(values.seen)
    try:
        whole_k = _holder(
            values, k_pe, passed, [((t, Index(), j), place) for j, place in zip(columns, k_turned.before, strict=True)]
        )
    except Unreadable:  # vLLM's fused operator takes it without the middle dimension
        whole_k = _holder(values, k_pe, passed, [((t, j), place) for j, place in zip(columns, k_turned.before, strict=True)])
    odd = [each for each in values.casts if each not in (dtype, torch.float32)]
    if odd:
        raise Unreadable(f"{node.name}: passes through {odd[0]}")
    bounds = {whole_q, whole_k, kv_c, q_turned.positions, q_turned.table}
    inner = (frozenset(values.seen) | written) - behind(bounds)
    _check_inner(inner, node)
    return Site(node, layer, whole_q, kv_c, whole_k, q_turned.positions, output)


def _update(update: object, node: fx.Node, layer: object, kv_c: fx.Node, k_pe: fx.Node) -> frozenset[fx.Node]:
    """The nodes that write the entries of the same layer, kv_c and k_pe."""
    target: Any = update.target if isinstance(update, fx.Node) else None
    if isinstance(update, fx.Node) and isinstance(target, OpOverload) and str(target.name()) == UPDATE:  # type: ignore[no-untyped-call]
        given = [argument(update, place, name) for place, name in enumerate(("kv_c_normed", "k_pe", "layer_name"))]
        if given[0] is kv_c and given[1] is k_pe and given[2] == layer and is_input(argument(update, 4, "k_scale")):
            return frozenset({update})
    elif isinstance(update, fx.Node) and is_call(update, operator.getitem) and update.args[1] == 0:
        found = functional_call(update.args[0])
        given = [found[1][name] for name in ("kv_c", "layer_name")] if found is not None and found[0] == FUSED_UPDATE else []
        if found is not None and given and given[0] is kv_c and given[1] == layer and is_input(found[1]["kv_cache_scale"]):
            return frozenset({update, *update.all_input_nodes})
    raise Unreadable(f"{node.name}: no write of the entries that attention is given")


def _check_turned(
    values: Values, node: fx.Node, spec: PrologueSpec, table_shape: Sequence[int], q: Turned, k: Turned
) -> None:  # fmt: skip
    if (q.style, q.table, q.positions) != (k.style, k.table, k.positions):
        raise Unreadable(f"{node.name}: query and key are not rotated alike")
    if q.style != spec.rope_style:
        raise Unreadable(f"{node.name}: rotated as {q.style}, the layer's RoPE is {spec.rope_style}")
    positions, tokens = value_of(q.positions), value_of(node.kwargs["q"]).shape[0]  # type: ignore[arg-type]
    if positions.dim() != 1 or positions.dtype not in (torch.int64, torch.int32) or not may_be_same(positions.shape[0], tokens):
        raise Unreadable(f"{node.name}: positions {list(positions.shape)} of {positions.dtype}, expected [T] integers")
    if not is_input(values.chain((q.table, (Index(), Index())))[-1][0]):
        raise Unreadable(f"{node.name}: {q.table.name}, its table of cosines and sines, is computed in the graph")
    if list(value_of(q.table).shape) != list(table_shape):
        raise Unreadable(f"{node.name}: a table {list(value_of(q.table).shape)}, the layer's is {list(table_shape)}")


def is_dead(node: fx.Node) -> bool:
    """Whether nobody would miss a node: vLLM's own passes leave such ones behind."""
    return node.op == "call_function" and not node.users and not node.is_impure()


def _check_inner(inner: frozenset[fx.Node], node: fx.Node) -> None:
    dead = [user for each in inner for user in each.users if is_dead(user)]
    if other := used_elsewhere(inner, [node, *dead]):
        raise Unreadable(f"{node.name}: {other.name} is used elsewhere, too")


def _holder(values: Values, end: fx.Node, passed: Sequence[fx.Node], before: Sequence[tuple[tuple[Index, ...], Place]]) -> fx.Node:
    """The tensor, as large as `end` and passed on the way to it, that holds what was there before the rotation.

    before: each of its indices, and where that element came from.
    """
    wanted, rank = value_of(end), len(before[0][0])
    shape = wanted.shape if rank == wanted.dim() else (wanted.shape[0], wanted.shape[-1])
    for node in reversed(passed):
        value = node.meta.get("val")
        if not isinstance(value, torch.Tensor) or value.dtype is not wanted.dtype or value.dim() != rank:
            continue
        if all(map(same_extent, value.shape, shape)) and all(values.chain((node, i))[-1] == place for i, place in before):
            return node
    raise Unreadable(f"{end.name}: what it was before its rotation is no tensor of its shape")
