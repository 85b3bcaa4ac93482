"""LiftQPrepPass: the preparation of a query, however it is written, becomes mlagen::mla_decode_q_prep."""

import functools
import logging
from typing import Any

import torch
from torch import fx

from mlagen.errors import MlagenError
from mlagen.fx.config import FusionConfig
from mlagen.fx.gate import within_limit
from mlagen.fx.index import Unreadable
from mlagen.fx.mutation import written_in_place
from mlagen.fx.nodes import in_order
from mlagen.fx.query import Query, find_query, used_elsewhere
from mlagen.fx.report import tell
from mlagen.fx.rewrite import Writer, finish
from mlagen.fx.slab import Emit, Slab

logger = logging.getLogger(__name__)
Q_PREP = torch.ops.mlagen.mla_decode_q_prep.default


def queries(graph: fx.Graph, config: FusionConfig) -> list[Query]:
    """The queries of a graph that the passes may change; why others may not be is logged at debug level."""
    found: list[Query] = []
    for node in reversed(in_order(graph)):
        try:
            query = find_query(node)
        except Unreadable as reason:
            tell(logger, node, "left", reason)
            continue
        if query is None or any(query.node in each.inner for each in found):
            continue
        unfit = _unfit(query, config)
        if unfit:
            tell(logger, node, "left", unfit)
        else:
            found.append(query)
    return found[::-1]


def _unfit(query: Query, config: FusionConfig) -> str | None:
    if not within_limit(query.tokens, config):
        return f"{query.tokens} rows, which may be more than {config.token_limit}"
    if other := used_elsewhere(query.inner, [query.node]):
        return f"{other.name} is used elsewhere, too"
    if query.quant is not None and query.quant.divides and not config.division_as_product:
        return "its codes are made by division, which may round otherwise: division_as_product allows it"
    if not query.node.meta["val"].is_contiguous():
        return f"strides {list(query.node.meta['val'].stride())}, not those of a contiguous tensor"
    return None


def is_written_in_place(graph: fx.Graph) -> bool:
    """Whether a node may change a tensor under what reads it, so that no pass can tell what an element is; it is told which."""
    node = written_in_place(graph)
    if node is not None:
        tell(logger, node, "left", f"{node.target} writes in place: the passes read graphs that are functional still")
    return node is not None


class LiftQPrepPass:
    """Replaces absorb, concatenation and quantisation by the operator that stands for them; a rotation before them stays."""

    def __init__(self, config: FusionConfig) -> None:
        self.config = config

    def __call__(self, graph: fx.Graph) -> int:
        """Change the graph; returns the number of queries lifted, of which none leaves the graph untouched."""
        if is_written_in_place(graph):
            return 0
        writer = Writer(graph)
        lifted = [query for query in queries(graph, self.config) if self._lift(writer, query)]
        if lifted:
            finish(graph, (node for query in lifted for node in (query.node, *query.inner)))
        return len(lifted)

    def _lift(self, writer: Writer, query: Query) -> bool:
        """Put the operator in its place; False, and nothing changed, where it cannot be given what it needs."""
        node = query.node
        if query.rope_dim and query.q_pe is None:
            tell(logger, node, "left", "its rotary columns are no part of a tensor")
            return False
        if query.weights.view is None:
            tell(logger, node, "left", "W_UK is seen nowhere as [H,P,L]")
            return False
        try:
            with writer.undoing():
                new = self._call(functools.partial(writer.emit, node), query, query.weights.view)
        except (MlagenError, Unreadable) as reason:
            tell(logger, node, "left", reason, level=logging.WARNING)
            return False
        node.replace_all_uses_with(new)
        tell(logger, node, "lifted", new.name)
        return True

    def _call(self, emit: Emit, query: Query, weights: Slab) -> fx.Node:
        quant = query.quant
        w_uk = weights.emit(emit)
        q_nope = query.q_nope.emit(emit)
        q_pe = query.q_pe.emit(emit) if query.q_pe else None
        options: dict[str, Any] = {"q_dtype": quant.dtype, "fp8_max": quant.limit} if quant else {}
        return emit(Q_PREP, q_nope, q_pe, w_uk, quant.scale if quant else None, **options)
