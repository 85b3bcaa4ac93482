"""The two operators of mlagen.fx.operators where a graph calls both: a query prepared from what the cache update rotated."""

import operator
from dataclasses import dataclass

import torch
from torch import fx
from torch._higher_order_ops.auto_functionalize import auto_functionalized_v2

from mlagen.fx.index import Index, Size, Unreadable
from mlagen.fx.query import Weights, behind, find_weights
from mlagen.fx.reader import Reader, argument, is_call, value_of
from mlagen.fx.slab import Slab, find_slab
from mlagen.fx.values import Values

Q_PREP = torch.ops.mlagen.mla_decode_q_prep.default
UPDATE = torch.ops.mlagen.rope_kv_cache_update.default


@dataclass(frozen=True)
class Pair:
    """A call of mla_decode_q_prep, `node`, and the functional call of rope_kv_cache_update whose q_pe it takes, `update`.

    q_nope is the part of q from before the rotated columns were written into it: a query that held them would make the one operator
    that is put in place of both depend on itself.
    """

    node: fx.Node
    update: fx.Node
    tokens: Size
    q_nope: Slab
    weights: Weights
    inner: frozenset[fx.Node]


def find_pair(node: fx.Node) -> Pair | None:
    """The pair that a query is the end of; None where it is no call of the operator.  Raises Unreadable where it is half of one."""
    if not is_call(node, Q_PREP):
        return None
    q, q_pe, w_uk = (argument(node, place, name) for place, name in enumerate(("q", "q_pe", "w_uk")))
    tokens, heads, _ = value_of(q).shape
    _, nope, rank = value_of(w_uk).shape
    if not all(isinstance(each, int) for each in (heads, nope, rank)):
        raise Unreadable(f"{node.name}: W_UK of a symbol's extents")
    reader = Reader({"t": tokens if isinstance(tokens, int) else None, "h": heads, "p": nope, "l": rank})
    values = Values(reader)
    t, h, p, l = (reader.variable(name) for name in "thpl")
    update = _update(values, (q, nope) if q_pe is None else (q_pe, 0), t, h)
    chain = reader.trace(q, (t, h, p))
    q_nope = find_slab([chain], [(t, tokens), (h, heads)], [value_of(q).dtype], (p, nope))
    if q_nope is None:
        raise Unreadable(f"{node.name}: q_nope is no [T,H,{nope}] part of a tensor")
    values.record(chain)
    weights = find_weights(reader, reader.trace(w_uk, (h, p, l)), (heads, nope, rank))
    inner = (frozenset(values.seen) | {update}) - behind({q_nope.node, *update.all_input_nodes})
    if q_nope.node is update or update in behind({q_nope.node}):
        raise Unreadable(f"{node.name}: q_nope is made of what the update returns")
    return Pair(node, update, tokens, q_nope, weights, inner)


def _update(values: Values, rotary: tuple[fx.Node, int], t: Index, h: Index) -> fx.Node:
    """The call whose first result all rotary columns are, in order."""
    holder, first = rotary
    found: fx.Node | None = None
    for j in range(int(value_of(holder).shape[2]) - first):
        chain = values.reader.trace(holder, (t, h, Index(first + j)))
        values.record(chain)
        node, index = chain[-1]
        if not is_call(node, operator.getitem) or node.args[1] != 0 or index != (t, h, Index(j)):
            raise Unreadable(f"{holder.name}: its rotary columns are not what rope_kv_cache_update returns")
        source = node.args[0]
        if not is_call(source, auto_functionalized_v2) or source.args[0] is not UPDATE or found not in (None, source):  # type: ignore[union-attr]
            raise Unreadable(f"{holder.name}: its rotary columns are not what one rope_kv_cache_update returns")
        found = source  # type: ignore[assignment]
    if found is None or len(found.kwargs["_all_bases"]) != 1:  # type: ignore[arg-type]
        raise Unreadable(f"{holder.name}: no rotary columns")
    return found
