"""Where a graph prepares a query: absorb, concatenation and quantisation, before them perhaps a rotation."""

import operator
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import fx

from mlagen.fx.index import Index, OtherForm, Size, Unreadable
from mlagen.fx.known import KNOWN, keeps_within
from mlagen.fx.mutation import functional_call
from mlagen.fx.operators import FP8_TYPES
from mlagen.fx.reader import Place, Reader, argument, is_call, value_of
from mlagen.fx.slab import Slab, find_slab
from mlagen.fx.values import CASTS, Factor, Quant, Rotation, Values, find_rotation

aten = torch.ops.aten
MODEL_TYPES = (torch.bfloat16, torch.float16)
ENDS = (aten.cat.default, aten.slice_scatter.default, *CASTS)
"""What the last operator of a query is: a cast to fp8, or what puts its two parts together."""
PRODUCTS = (aten.bmm.default, aten.baddbmm.default)
VIEWS = (aten.view.default, aten.reshape.default, aten._unsafe_view.default)


@dataclass(frozen=True)
class Weights:
    """W_UK [H,P,L] in the storage of a tensor that comes into the graph, `offset` after its first element; `view` shows it."""

    node: fx.Node
    view: Slab | None
    size: tuple[int, int, int]
    stride: tuple[int, int, int]
    offset: int


@dataclass(frozen=True)
class Query:
    """q_out [T,H,L+R] = quant([q_nope @ W_UK | q_pe]), the value of `node`; R may be 0, and `q_pe` then None.

    q_pe is the rotary part as it is concatenated; `rotated` what it was before the rotation, where one was recognised.  `inner` are
    the nodes that only this query should need.
    """

    node: fx.Node
    tokens: Size
    heads: int
    nope_dim: int
    lora_rank: int
    rope_dim: int
    dtype: torch.dtype
    q_nope: Slab
    q_pe: Slab | None
    weights: Weights
    quant: Quant | None
    rotation: Rotation | None
    rotated: Slab | None
    inner: frozenset[fx.Node]

    @property
    def token(self) -> Index:
        """The index that runs over the rows."""
        return Reader({"t": self.tokens if isinstance(self.tokens, int) else None}).variable("t")


def find_query(node: fx.Node) -> Query | None:
    """The query that a node is the end of; None where it looks like none at all.  Raises Unreadable where it is not quite one."""
    if not isinstance(node.meta.get("val"), torch.Tensor) or not _is_end(node):
        return None
    value = value_of(node)
    shape, kinds = value.shape, (*MODEL_TYPES, *FP8_TYPES)
    if value.dtype not in kinds or (node.target in CASTS and value.dtype not in FP8_TYPES):
        return None
    if value.dim() == 4 and _starts_with_product(node):
        raise Unreadable(f"a query of four dimensions {list(shape)}, expected [T,H,L+R]: view it so before the parts are joined")
    if value.dim() != 3 or not all(isinstance(each, int) for each in shape[1:]):
        return None
    return _Finder(node, shape[0], int(shape[1]), int(shape[2])).find()


def _is_end(node: fx.Node) -> bool:
    """Whether a node may be the end of a query: also what a library's operator wrote, and rows of codes that are seen as heads."""
    if is_call(node, operator.getitem):
        call = functional_call(node.args[0])
        return call is not None and call.name in KNOWN
    if is_call(node, *VIEWS):
        source = argument(node, 0, "self")
        return value_of(node).dtype in FP8_TYPES and isinstance(source, fx.Node) and value_of(source).dim() < 3
    return is_call(node, *ENDS)


def _starts_with_product(node: fx.Node) -> bool:
    """Whether the first of several columns, of whatever dimensions, is one of a bmm, and the last is none."""
    *rows, width = value_of(node).shape
    if not isinstance(width, int):
        return False
    values = Values(Reader({str(dim): rows[dim] if isinstance(rows[dim], int) else None for dim in range(len(rows))}))
    index = [values.reader.variable(str(dim)) for dim in range(len(rows))]
    try:
        ends = [values.quantization((node, (*index, Index(column))))[0] for column in (0, width - 1)]
        first, last = (values.chain(end)[-1][0] for end in ends)
    except Unreadable:
        return False
    return is_call(first, *PRODUCTS) and not is_call(last, *PRODUCTS)


class _Finder:
    def __init__(self, node: fx.Node, tokens: Size, heads: int, width: int) -> None:
        self.node, self.tokens, self.heads, self.width = node, tokens, heads, width
        self.sizes: dict[str, int | None] = {"t": tokens if isinstance(tokens, int) else None, "h": heads}
        self.reader = Reader(self.sizes)
        self.values = Values(self.reader)
        self.t, self.h = self.reader.variable("t"), self.reader.variable("h")
        self.quants: list[Quant | None] = []

    def find(self) -> Query | None:
        try:
            first = self._product(Index(0))
        except OtherForm:
            raise
        except Unreadable:
            return None
        if first is None:
            self._refuse_reversed()
            return None
        second = self._product(Index(1))
        moved = [] if second is None else [dim for dim in range(3) if second[1][dim] == first[1][dim] + 1]
        if second is None or second[0] is not first[0] or len(moved) != 1:
            raise Unreadable(f"{self.node.name}: its first two columns are not those of one product")
        rank = value_of(first[0]).shape[moved[0]]
        if not isinstance(rank, int) or not 0 < rank <= self.width:
            raise Unreadable(f"{self.node.name}: a product of {rank} columns in {self.width}")
        self.sizes["l"] = rank
        product = self._product(self.reader.variable("l"))
        if product is None:
            raise Unreadable(f"{self.node.name}: the columns up to {rank} are not those of one product")
        self.quants.clear()
        q_nope, weights, dtype = self._absorb(product, rank)
        latent = self._quantized(self.reader.variable("l"))
        self.values.follow(latent)
        return self._with_rotary(rank, q_nope, weights, dtype)

    def _refuse_reversed(self) -> None:
        """Raises Unreadable where the last column is what the first should be."""
        try:
            is_reversed = self._product(Index(self.width - 1)) is not None
        except Unreadable:
            return
        if is_reversed:
            raise Unreadable(f"{self.node.name}: other columns before those of the product, expected [q_nope @ W_UK | q_pe]")

    def _quantized(self, column: Index) -> Place:
        place, quant = self.values.quantization((self.node, (self.t, self.h, column)))
        self.quants.append(quant)
        return place

    def _product(self, column: Index) -> Place | None:
        """The element of a bmm that a latent column is."""
        node, index = self.values.chain(self._quantized(column))[-1]
        if is_call(node, aten.baddbmm.default) and argument(node, 3, "beta", 1) == 0 and argument(node, 4, "alpha", 1) == 1:
            return node, index
        return (node, index) if is_call(node, aten.bmm.default) else None

    def _absorb(self, product: Place, rank: int) -> tuple[Slab, Weights, torch.dtype]:
        node, (batch, row, column) = product
        places = (1, 2) if node.target is aten.baddbmm.default else (0, 1)
        left, right = (node.args[place] for place in places)
        assert isinstance(left, fx.Node)
        assert isinstance(right, fx.Node)
        depth = value_of(left).shape[2]
        if not isinstance(depth, int):
            raise Unreadable(f"{node.name}: a sum over a symbol's number of columns")
        self.sizes["p"] = depth
        p = self.reader.variable("p")
        chains = self.values.chain((left, (batch, row, p))), self.values.chain((right, (batch, p, column)))
        if any(name == "l" for each in chains[0][-1][1] for name, _ in each.terms):
            chains = chains[1], chains[0]
        query, weight = chains
        weights = find_weights(self.reader, weight, (self.heads, depth, rank))
        dtype = value_of(weights.node).dtype
        slab = find_slab([query], [(self.t, self.tokens), (self.h, self.heads)], [dtype], (p, depth))
        if slab is None:
            raise Unreadable(f"{node.name}: what it multiplies is no [T,H,{depth}] part of a tensor of {dtype}")
        self.values.record(query)
        self.values.record([product])
        return slab, weights, dtype

    def _with_rotary(self, rank: int, q_nope: Slab, weights: Weights, dtype: torch.dtype) -> Query:
        rope = self.width - rank
        places = [self._quantized(Index(rank + j)) for j in range(rope)]
        if any(quant != self.quants[0] for quant in self.quants):
            raise Unreadable(f"{self.node.name}: its columns are quantised in different ways")
        chains = [self.values.chain(place) for place in places]
        rows = [(self.t, self.tokens), (self.h, self.heads)]
        q_pe = find_slab(chains, rows, [dtype], (Index(), rope)) if rope else None
        rotation = rotated = None
        if rope:
            columns = [self.values.terms(place) for place in places]
            rotation = find_rotation(columns, self._is_table)
            if rotation is not None:
                self.values.record_turned(columns, self._is_table)
                rotated = find_slab([factor.chain for factor in rotation.x], rows, [dtype], (Index(), rope))
            if q_pe is None and rotated is None:
                raise Unreadable(f"{self.node.name}: its last {rope} columns are no part of a tensor of {dtype}")
        odd = [each for each in self.values.casts if each not in (dtype, torch.float32)]
        if odd:
            raise Unreadable(f"{self.node.name}: passes through {odd[0]}")
        expected = dtype if self.quants[0] is None else self.quants[0].dtype
        if value_of(self.node).dtype is not expected:
            raise Unreadable(f"{self.node.name}: {value_of(self.node).dtype}, expected {expected}")
        bounds = {each.node for each in (q_nope, rotated or q_pe) if each is not None}
        return Query(
            self.node, self.tokens, self.heads, q_nope.width, rank, rope, dtype, q_nope, q_pe, weights, self.quants[0], rotation,
            rotated, frozenset(self.values.seen) - behind(bounds),
        )  # fmt: skip

    def _is_table(self, factor: Factor) -> bool:
        """Cosines and sines are the same for all heads; with one head, they are what was looked up by a position."""
        if factor.row is not None:
            return True
        node, index = factor.chain[-1]
        if self.heads > 1:
            return not any(name == "h" for each in index for name, _ in each.terms)
        return is_gather(node)


def find_weights(reader: Reader, chain: Sequence[Place], size: tuple[int, int, int]) -> Weights:
    """W_UK of `size` from the way of its element (h, p, l).  Raises Unreadable where it is no part of a tensor from outside."""
    heads, depth, rank = size
    node, index = chain[-1]
    if node.op not in ("placeholder", "get_attr"):
        raise Unreadable(f"{node.name}: W_UK is computed in the graph")
    value = value_of(node)
    if value.dtype not in MODEL_TYPES:
        raise Unreadable(f"{node.name}: W_UK of {value.dtype}, expected one of {', '.join(map(str, MODEL_TYPES))}")
    if not all(isinstance(each, int) for each in (*value.stride(), *value.shape)):
        raise Unreadable(f"{node.name}: W_UK of a symbol's extents")
    place = Index()
    for each, stride in zip(index, value.stride(), strict=True):
        place = place + each.scaled(stride)
    terms = dict(place.terms)
    if not set(terms) <= {"h", "p", "l"} or (heads > 1 and not terms.get("h")) or not terms.get("p") or not terms.get("l"):
        raise Unreadable(f"{node.name}: what is multiplied is no W_UK [H,P,L]")
    stride_of = (terms.get("h", depth * rank), terms["p"], terms["l"])
    h, p, l = (reader.variable(name) for name in "hpl")
    view = find_slab([chain], [(h, heads), (p, depth)], [value.dtype], (l, rank))
    return Weights(node, view, (heads, depth, rank), stride_of, place.const)


def is_gather(node: fx.Node) -> bool:
    """Whether a node looks rows of a table up."""
    return is_call(node, aten.index.Tensor, aten.index_select.default, aten.embedding.default)


def behind(bounds: set[fx.Node]) -> set[fx.Node]:
    """The nodes, and all that they are made of."""
    found, left = set(bounds), list(bounds)
    while left:
        for each in left.pop().all_input_nodes:
            if each not in found:
                found.add(each)
                left.append(each)
    return found


def used_elsewhere(inner: frozenset[fx.Node], ends: Sequence[fx.Node]) -> fx.Node | None:
    """A node on the way that something else uses, too."""
    within = inner.union(ends)
    for node in inner:
        if node not in ends and not all(user in within or _is_on_the_way(user, node, within) for user in node.users):
            return node
    return None


def _is_on_the_way(user: fx.Node, node: fx.Node, within: Collection[fx.Node]) -> bool:
    call = functional_call(user)
    return call is not None and keeps_within(call, node, within)
