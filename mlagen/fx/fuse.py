"""FuseProloguePass: the preparation of a query and the write of the cache's entries become one kernel."""

import dataclasses
import functools
import logging
import math
import operator
from dataclasses import dataclass

import torch
from torch import fx
from torch._higher_order_ops.auto_functionalize import auto_functionalized_v2
from torch._subclasses.fake_tensor import unset_fake_temporarily

from mlagen.errors import MlagenError
from mlagen.fx import packing
from mlagen.fx.config import FusionConfig
from mlagen.fx.gate import within_limit
from mlagen.fx.index import Index, Unreadable, may_be_same, same_extent
from mlagen.fx.lift import is_written_in_place, queries
from mlagen.fx.mutation import functional_call
from mlagen.fx.nodes import in_order
from mlagen.fx.pair import Pair, find_pair
from mlagen.fx.query import Query, behind, is_gather, used_elsewhere
from mlagen.fx.reader import argument, is_call, value_of
from mlagen.fx.report import tell
from mlagen.fx.rewrite import Writer, finish
from mlagen.fx.slab import Emit, find_slab
from mlagen.fx.update import KEEPS_ORDER, Update, find_update, is_write
from mlagen.fx.values import Factor, Quant, Rotation
from mlagen.ops import spec_to_str
from mlagen.runtime import load
from mlagen.spec import PrologueSpec
from mlagen.target import find_target
from mlagen.torch_types import torch_dtype

logger = logging.getLogger(__name__)
aten, prims = torch.ops.aten, torch.ops.prims
assert packing.WITH_WEIGHTS, "the operator that is put in place is registered with that module"
FUSED = torch.ops.mlagen.decode_prologue_weights.default
MODEL_NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16"}


@dataclass(frozen=True)
class Tables:
    """How the kernel is given its angles: tables and the rows of them, or a row for each token."""

    cos: fx.Node
    sin: fx.Node | None
    positions: fx.Node


class FuseProloguePass:
    """Pairs each query with the one cache update that is neither before nor after it, and replaces both by one operator."""

    def __init__(self, config: FusionConfig) -> None:
        self.config = config

    def __call__(self, graph: fx.Graph) -> int:
        """Change the graph; returns the number of prologues fused, of which none leaves the graph untouched."""
        if is_written_in_place(graph):
            return 0
        found = queries(graph, self.config)
        writes = [node for node in graph.nodes if is_write(node)]
        pairs = self._pairs(graph)
        if not found and not pairs:
            return 0
        before = _ancestors(graph, {node: number for number, node in enumerate([*writes, *(query.node for query in found)])})
        writer, unused, fused = Writer(graph), dict[fx.Node, None](), 0
        for query in found:
            update = self._update_of(query, writes, before)
            if update is not None and self._fuse(writer, query, update):
                unused.update((node, None) for node in (query.node, update.node, *update.after, *query.inner, *update.inner))
                writes.remove(update.node)
                _merge(before, query.node, update.node)
                fused += 1
        for pair in pairs:
            if self._fuse_pair(writer, pair):
                unused.update((node, None) for node in (pair.node, pair.update, *pair.inner))
                fused += 1
        if fused:
            finish(graph, unused)
        return fused

    def _pairs(self, graph: fx.Graph) -> list[Pair]:
        """The pairs of operators that may be fused."""
        found = []
        for node in graph.nodes:
            try:
                pair = find_pair(node)
            except Unreadable as reason:
                tell(logger, node, "left", reason)
                continue
            if pair is None:
                continue
            caches = {user for user in pair.update.users if is_call(user, operator.getitem) and user.args[1] == 1}
            if other := used_elsewhere(pair.inner, [pair.node, *caches]):
                tell(logger, node, "left", f"{other.name} is used elsewhere, too")
            elif not within_limit(pair.tokens, self.config):
                tell(logger, node, "left", f"{pair.tokens} rows, the limit is {self.config.token_limit}")
            else:
                found.append(pair)
        return found

    def _fuse_pair(self, writer: Writer, pair: Pair) -> bool:
        """Put the one operator in place of both; False, and nothing changed, where no kernel does it."""
        node, given = pair.node, pair.update.kwargs
        scale = argument(node, 3, "q_scale")
        sources = {pair.q_nope.node, *pair.update.all_input_nodes, *((scale,) if scale is not None else ())}
        if not {node, pair.update}.isdisjoint(behind(sources)):
            tell(logger, node, "left", "what it is made of is made of what the update returns")
            return False
        options = {name: argument(node, 9, name) for name in ("q_dtype", "fp8_max")}
        model = value_of(pair.weights.node).dtype
        bases = given["_all_bases"]
        assert isinstance(bases, list | tuple)
        (base,) = bases
        assert isinstance(base, fx.Node)
        codes = [
            Quant(dtype, None, float(limit if limit is not None else torch.finfo(dtype).max), False)  # type: ignore[arg-type]
            for dtype, limit in (
                (options["q_dtype"] or model, options["fp8_max"]),
                (given["kv_dtype"] or value_of(base).dtype, given["fp8_max"]),
            )
            if dtype is not model
        ]
        q_quant = codes[0] if options["q_dtype"] not in (None, model) else None
        kv_quant = codes[-1] if given["kv_dtype"] not in (None, model) or value_of(base).dtype is not model else None
        emit: Emit = functools.partial(writer.emit, node)
        passed = "q_pe", "kv_c", "k_pe", "slot_mapping", "positions", "cos_sin_cache", "sin", "k_scale"
        place = {name: value for name, value in given.items() if name.startswith("_")}
        heads, nope, rank = pair.weights.size
        widths = heads, nope, rank, int(value_of(node).shape[2]) - rank
        try:
            if len({each.limit for each in codes}) > 1:
                raise Unreadable("query and cache saturate at different magnitudes")
            device = value_of(node).device
            arch = self.config.arch_for(device)
            spec = self._loaded(self._kernel(arch, model, widths, str(given["rope_style"]), q_quant, kv_quant), device, arch)
            with writer.undoing():
                result = emit(
                    auto_functionalized_v2, FUSED, q=pair.q_nope.emit(emit), weight=pair.weights.node,
                    q_scale=scale, w_size=list(pair.weights.size), w_stride=list(pair.weights.stride),
                    w_offset=pair.weights.offset, spec=spec, arch=arch, **{name: given[name] for name in passed}, **place,
                )  # fmt: skip
        except (MlagenError, Unreadable) as reason:
            tell(logger, node, "left", reason, level=logging.WARNING)
            return False
        node.replace_all_uses_with(emit(operator.getitem, result, 0))
        cache = emit(operator.getitem, result, 1)
        for user in list(pair.update.users):
            if is_call(user, operator.getitem) and user.args[1] == 1:
                user.replace_all_uses_with(cache)
                writer.graph.erase_node(user)
        tell(logger, node, "fused", result.name, pair.update)
        return True

    def _update_of(self, query: Query, writes: list[fx.Node], before: "dict[fx.Node, set[fx.Node]]") -> Update | None:
        found: list[Update] = []
        for node in writes:
            if query.node in before[node] or (node in before[query.node] and not _turns(node, query)):
                continue
            try:
                update = find_update(node, query, self._fp8(query))
            except Unreadable as reason:
                tell(logger, node, "left", reason, query.node)
                continue
            unfit = self._unfit(query, update)
            if unfit:
                tell(logger, node, "left", unfit, query.node)
            else:
                found.append(update)
        if len(found) != 1:
            tell(logger, query.node, "left", f"{len(found)} cache updates belong to it, expected one")
        return found[0] if len(found) == 1 else None

    def _unfit(self, query: Query, update: Update) -> str | None:
        if other := used_elsewhere(update.inner, [update.node]):
            return f"{other.name} is used elsewhere, too"
        if update.quant is not None and update.quant.divides and not self.config.division_as_product:
            return "its codes are made by division, which may round otherwise: division_as_product allows it"
        limits = {each.limit for each in (query.quant, update.quant) if each is not None}
        if len(limits) > 1:
            return f"query and cache saturate at different magnitudes, {sorted(limits)}"
        given = (query.q_nope, query.rotated or query.q_pe, update.kv_c, update.k_pe)
        sources = {each.node for each in given if each is not None}
        if query.quant is not None and query.quant.scale is not None:
            sources.add(query.quant.scale)
        if update.node in behind(sources):
            return "what it is made of is made of what the update returns"
        if query.rotation is None and query.rope_dim and query.q_pe is None:
            return "its rotary columns are no part of a tensor"
        if query.rotation is not None and query.rotated is None:
            return f"what is rotated is no part of a tensor of {query.dtype}"
        return None

    def _fp8(self, query: Query) -> torch.dtype | None:
        """The arch's fp8 type; None where there is no arch for the query's device."""
        try:
            return torch_dtype(find_target(self.config.arch_for(value_of(query.node).device)).fp8)
        except MlagenError:
            return None

    def _spec(self, query: Query, update: Update, arch: str) -> PrologueSpec:
        """The kernel.  Raises SpecError or Unreadable where there is none."""
        widths = query.heads, query.nope_dim, query.lora_rank, query.rope_dim
        style = query.rotation.style if query.rotation else "none"
        return self._kernel(arch, query.dtype, widths, style, query.quant, update.quant)

    def _kernel(
        self, arch: str, dtype: torch.dtype, widths: tuple[int, int, int, int], style: str, query: Quant | None, cache: Quant | None
    ) -> PrologueSpec:
        target = find_target(arch)
        if dtype not in MODEL_NAMES:
            raise Unreadable(f"W_UK of {dtype}, expected one of {', '.join(map(str, MODEL_NAMES))}")
        model = MODEL_NAMES[dtype]
        quants = [each for each in (query, cache) if each is not None]
        for quant in quants:
            if quant.dtype is not torch_dtype(target.fp8):
                raise Unreadable(f"codes of {quant.dtype}, but {arch} has {target.fp8}")
        limit = quants[0].limit if quants and quants[0].limit != target.fp8.largest else None
        heads, nope, rank, rope = widths
        return PrologueSpec(
            heads=heads, nope_dim=nope, lora_rank=rank, rope_dim=rope, rope_style=style, dtype=model,
            q_dtype="fp8" if query else model, kv_dtype="fp8" if cache else model, rounding=self.config.rounding, fp8_max=limit,
        )  # fmt: skip

    def _fuse(self, writer: Writer, query: Query, update: Update) -> bool:
        """Put the operator in both places; False, and nothing changed, where no kernel does it."""
        emit: Emit = functools.partial(writer.emit, query.node)
        try:
            with writer.undoing():
                result = self._call(emit, query, update)
        except (MlagenError, Unreadable) as reason:
            tell(logger, query.node, "left", reason, level=logging.WARNING)
            return False
        query.node.replace_all_uses_with(emit(operator.getitem, result, 0))
        _replace_cache(emit, update, emit(operator.getitem, result, 1))
        tell(logger, query.node, "fused", result.name, update.node)
        return True

    def _loaded(self, spec: PrologueSpec, device: torch.device, arch: str) -> str:
        """The spec's text, its kernel loaded, so that what is missing for it is missed now.  Raises MlagenError."""
        with unset_fake_temporarily():
            load(spec, device, arch=arch)
        return spec_to_str(spec)

    def _call(self, emit: Emit, query: Query, update: Update) -> fx.Node:
        """The call that does both.  Raises Unreadable or MlagenError."""
        device = value_of(query.node).device
        arch = self.config.arch_for(device)
        spec = self._loaded(self._spec(query, update, arch), device, arch)
        shared: Emit = functools.partial(emit, shared=True)
        tables = self._tables(query.rotation, query, shared) if query.rotation else None
        rotary = query.rotated if query.rotation else query.q_pe
        base = value_of(update.base)
        skips = update.skips or self.config.assume_padded_slots_skip
        slots = self._from_start(shared, update.slots, (update.base, base.dim() - 1), skips)
        weights = query.weights
        return emit(
            auto_functionalized_v2, FUSED, q=query.q_nope.emit(emit), q_pe=rotary.emit(emit) if rotary else None,
            kv_c=update.kv_c.emit(emit), k_pe=update.k_pe.emit(emit) if update.k_pe else None, weight=weights.node,
            slot_mapping=slots, positions=tables.positions if tables else None, cos_sin_cache=tables.cos if tables else None,
            sin=tables.sin if tables else None, q_scale=query.quant.scale if query.quant else None,
            k_scale=update.quant.scale if update.quant else None, w_size=list(weights.size), w_stride=list(weights.stride),
            w_offset=weights.offset, spec=spec, arch=arch, _kv_cache_base_index=0, _all_bases=[update.base],
        )  # fmt: skip

    def _from_start(self, emit: Emit, vector: fx.Node, rows: tuple[fx.Node, int], is_known: bool) -> fx.Node:
        """An index vector whose negative entries count from the end, with all of them counted from the start.

        rows: a node, and how many of the first dimensions of its value the indices count through.
        """
        if is_known:
            return vector
        node, dims = rows
        factors = [size if isinstance(size, int) else emit(aten.sym_size.int, node, dim)
                   for dim, size in enumerate(value_of(node).shape[:dims])]  # fmt: skip
        extent: int | fx.Node = math.prod(each for each in factors if isinstance(each, int))
        for symbol in (each for each in factors if isinstance(each, fx.Node)):
            extent = symbol if extent == 1 else emit(operator.mul, extent, symbol)
        negative = emit(aten.lt.Scalar, vector, 0)
        return emit(aten.where.self, negative, emit(aten.add.Tensor, vector, extent), vector)

    def _tables(self, rotation: Rotation, query: Query, emit: Emit) -> Tables:
        """The rotation's tables and rows.  Raises Unreadable."""
        found = self._looked_up(rotation, query, emit)
        if found is not None:
            return found
        rows = [self._row(factors, query, emit) for factors in (rotation.cos, rotation.sin)]
        count = value_of(rows[0]).shape[0]
        if not isinstance(count, int):  # torch 2.11's Inductor takes no operator that gives a plain number
            count = emit(aten.sym_size.int, rows[0], 0)
        device = value_of(rows[0]).device
        positions = emit(prims.iota.default, count, start=0, step=1, dtype=torch.int64, device=device, requires_grad=False)
        return Tables(rows[0], rows[1], positions)

    def _looked_up(self, rotation: Rotation, query: Query, emit: Emit) -> Tables | None:
        """Both from one table [X,W] by one vector of positions, at columns that follow one another."""
        if rotation.cos[0].row is not None:
            return self._own_rows(rotation, query)
        gather = rotation.cos[0].chain[-1][0]
        if not is_gather(gather) or any(factor.part is not None for factor in rotation.cos):
            return None
        table, rows = argument(gather, 0, "self"), argument(gather, 1, "indices")
        if gather.target is aten.index_select.default:
            rows = argument(gather, 2, "index") if argument(gather, 1, "dim") == 0 else None
        elif gather.target is aten.index.Tensor:
            rows = rows[0] if len(rows) == 1 else None
        if rows is None or value_of(rows).dim() != 1 or not may_be_same(value_of(rows).shape[0], query.tokens):
            return None
        value, half = value_of(table), len(rotation.cos)
        if value.dim() != 2 or value.dtype not in (query.dtype, torch.float32):
            return None
        starts = []
        for factors in (rotation.cos, rotation.sin):
            places = [factor.chain[-1] for factor in factors]
            first = places[0][1][-1]
            if any(node is not gather or index[-1] != first + j for j, (node, index) in enumerate(places)) or first.terms:
                return None
            if any(index[0] != query.token for _, index in places):
                return None
            starts.append(first.const)
        known = gather.target is not aten.index.Tensor  # the others take no negative rows
        positions = self._from_start(emit, rows, (table, 1), known or self.config.assume_positions_valid)
        if starts == [0, half] and value.shape[1] == 2 * half and value.stride(1) == 1:
            return Tables(table, None, positions)
        if value.stride(1) != 1:
            return None
        cos, sin = (emit(aten.slice.Tensor, table, 1, start, start + half) for start in starts)
        return Tables(cos, sin, positions)

    def _own_rows(self, rotation: Rotation, query: Query) -> Tables:
        """What an operator looked up itself.  Raises Unreadable where that is no table that a kernel reads."""
        rows = [factor.row for factor in (*rotation.cos, *rotation.sin)]
        first = rows[0]
        assert first is not None
        value = value_of(first.table)
        if rows != [dataclasses.replace(first, column=column) for column in range(len(rows))] or value.shape[1] != len(rows):
            raise Unreadable("its cosines and sines are not [cos | sin] of one table")
        fits = value.dtype in (query.dtype, torch.float32) and value.stride(1) == 1
        if not fits or first.token != query.token or not may_be_same(value_of(first.positions).shape[0], query.tokens):
            raise Unreadable(f"its cosines and sines {list(value.shape)} of {value.dtype} are in no table that a kernel reads")
        return Tables(first.table, None, first.positions)

    def _row(self, factors: tuple[Factor, ...], query: Query, emit: Emit) -> fx.Node:
        """[T,R/2]: what a rotation multiplies a token's columns with, as a tensor of its own."""
        part = factors[0].part
        chains = [factor.chain if part is None else factor.chain[-1:] for factor in factors]
        kinds = [torch.complex64] if part is not None else [torch.float32, query.dtype]
        slab = find_slab(chains, [(query.token, query.tokens)], kinds, (Index(), len(factors)))
        if slab is None or any(factor.part != part for factor in factors):
            raise Unreadable("its cosines and sines are in no tensor [T,R/2]")
        rows = slab.emit(emit)
        if part is not None:
            rows = emit(aten.select.int, emit(aten.view_as_real.default, rows), 2, part)
        return emit(aten.clone.default, rows, memory_format=torch.contiguous_format)


def _ancestors(graph: fx.Graph, marked: dict[fx.Node, int]) -> dict[fx.Node, set[fx.Node]]:
    """For each marked node the marked nodes that it depends on."""
    masks: dict[fx.Node, int] = {}
    for node in in_order(graph):
        mask = 0
        for each in node.all_input_nodes:
            mask |= masks[each] | (1 << marked[each] if each in marked else 0)
        masks[node] = mask
    return {node: {other for other, number in marked.items() if masks[node] >> number & 1} for node in marked}


def _merge(before: dict[fx.Node, set[fx.Node]], one: fx.Node, other: fx.Node) -> None:
    """Two nodes are one from now on: what depends on either depends on what either depends on."""
    both = before[one] | before[other]
    for node, needs in before.items():
        if node in (one, other) or one in needs or other in needs:
            needs |= both if node in (one, other) else both | {one, other}


def _replace_cache(emit: Emit, update: Update, cache: fx.Node) -> None:
    """Have the cache after the write where the graph had the result of the write, or the whole cache seen through it."""
    views, node = [], update.target
    while node is not update.base:
        views.append(node)
        node = argument(node, 0, "self")
    seen = cache
    for view in reversed(views):
        seen = emit(view.target, seen, *view.args[1:], **view.kwargs)
    base = value_of(update.base)
    left = list(update.after)
    whole = []
    while left:
        for user in left.pop().users:
            if is_call(user, *KEEPS_ORDER):
                left.append(user)
                value = value_of(user)
                extents = zip((*value.shape, *value.stride()), (*base.shape, *base.stride()), strict=False)
                if value.dtype is base.dtype and value.dim() == base.dim() and all(same_extent(*each) for each in extents):
                    whole.append(user)
    for user in whole:
        user.replace_all_uses_with(cache)
    for each in update.after:
        each.replace_all_uses_with(seen)


def _turns(write: fx.Node, query: Query) -> bool:
    """Whether a write of entries is the call that rotates the query, too."""
    call = functional_call(write)
    return call is not None and any(is_call(each, operator.getitem) and each.args[0] is write for each in query.inner)
