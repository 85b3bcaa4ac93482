"""RoPE in a graph of vLLM's: in ordinary operators, or one operator that turns query and key, and may write the cache, too."""

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch._higher_order_ops.auto_functionalize import auto_functionalized

from mlagen.fx.index import Index, Unreadable
from mlagen.fx.query import is_gather
from mlagen.fx.reader import Place, argument, is_call, value_of
from mlagen.fx.values import Factor, Rotation, Values, find_rotation

aten = torch.ops.aten

FUSED_UPDATE = "vllm::fused_rope_unified_mla_kv_cache_update"
"""What vLLM's pass fuse_rope_kvcache_cat_mla leaves: the rotation of both, and the write of the entries."""

TURNS = {
    "_C::rotary_embedding": ("query", "key"),
    "vllm::rocm_aiter_triton_rotary_embedding": ("query", "key"),
    FUSED_UPDATE: ("q_pe", "k_pe"),
}
"""Operators that turn two tensors [..., R] by the rows of cos_sin_cache [X,R] at positions [T], and their names of the two."""

NO_OPTION = (None, False, 0)
"""Values of a turning operator's further arguments with which it does no more than that."""


@dataclass(frozen=True)
class Turned:
    """Columns that are rotated: where they were before, a place for each of R, and by what.

    table: [X,R] = [cos | sin]; positions: its rows [T].
    """

    style: str
    table: fx.Node
    positions: fx.Node
    before: tuple[Place, ...]


def functional_call(node: object) -> tuple[str, Any] | None:
    """The name of the operator that a node calls in functional form, as vLLM's graphs have it, and its arguments."""
    if not is_call(node, auto_functionalized):
        return None
    assert isinstance(node, fx.Node)
    called: Any = node.args[0]
    return str(called.name()), node.kwargs


def find_turned(values: Values, node: fx.Node, rows: tuple[Index, Index], first: int, width: int) -> Turned:
    """How columns first .. first + width of a node [T,H,...] are rotated; rows are the indices of its tokens and heads.

    Raises Unreadable.
    """
    columns: list[Place] = [(node, (*rows, Index(first + j))) for j in range(width)]
    if is_call(values.reader.source(*columns[0])[0], operator.getitem):
        return _by_operator(values, columns)
    return _by_products(values, columns, rows[0])


def _by_products(values: Values, columns: list[Place], token: Index) -> Turned:
    name, terms = columns[0][0].name, [values.terms(place) for place in columns]
    rotation = find_rotation(terms, _is_looked_up)
    if rotation is None:
        raise Unreadable(f"{name}: its last {len(columns)} columns are not rotated in a known way")
    values.record_turned(terms, _is_looked_up)
    table, positions = _looked_up(rotation, token)
    return Turned(rotation.style, table, positions, tuple(factor.chain[-1] for factor in rotation.x))


def _is_looked_up(factor: Factor) -> bool:
    return is_gather(factor.chain[-1][0])


def _looked_up(rotation: Rotation, token: Index) -> tuple[fx.Node, fx.Node]:
    """The table whose first half of columns are the cosines and whose second half the sines, and its rows."""
    gather = rotation.cos[0].chain[-1][0]
    for column, factor in enumerate((*rotation.cos, *rotation.sin)):
        node, index = factor.chain[-1]
        if factor.part is not None or node is not gather or index != (token, Index(column)):
            raise Unreadable(f"{gather.name}: cosines and sines that are not the two halves of one row for each token")
    place, name = (2, "index") if gather.target is aten.index_select.default else (1, "indices")
    rows = argument(gather, place, name)
    if gather.target is aten.index.Tensor:
        rows = rows[0] if len(rows) == 1 else None
    elif gather.target is aten.index_select.default and argument(gather, 1, "dim") != 0:
        rows = None
    if not isinstance(rows, fx.Node):
        raise Unreadable(f"{gather.name}: a table that is not looked up by its rows")
    table = argument(gather, 0, "self" if gather.target is not aten.embedding.default else "weight")
    return table, rows


def _by_operator(values: Values, columns: list[Place]) -> Turned:
    result = values.reader.source(*columns[0])[0]
    turning: Any = result.args[0]
    number: Any = result.args[1]
    found = functional_call(turning)
    if found is None or found[0] not in TURNS or number not in (1, 2):
        raise Unreadable(f"{columns[0][0].name}: what {result.name} is rotated by is not known")
    given = dict(found[1])
    for known in ("layer_name", "kv_c", "kv_cache_dtype", "kv_cache_scale"):
        given.pop(known, None)
    names = TURNS[found[0]]
    source, table, positions, is_neox = (given.pop(name) for name in (names[number - 1], "cos_sin_cache", "positions", "is_neox"))
    del given[names[2 - number]]
    width = value_of(source).shape[-1]
    if given.pop("head_size", width) != width or width != len(columns):
        raise Unreadable(f"{result.name}: a rotation of other than its {width} columns")
    for name, value in given.items():
        if value not in NO_OPTION:
            raise Unreadable(f"{result.name}: rotated with {name}={value}")
    before = []
    for column, place in enumerate(columns):
        chain = values.reader.trace(*place)
        values.record(chain)
        node, index = chain[-1]
        if node is not result or index[0] != place[1][0] or index[-1] != Index(column):
            raise Unreadable(f"{place[0].name}: its rotated columns are not those of {result.name} in order")
        before.append(values.follow((source, index))[-1])
    return Turned("neox" if is_neox else "gptj", table, positions, tuple(before))
