"""Which element of which tensor an element of a node is: the way back through everything that only moves data."""

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from mlagen.fx.index import Index, Size, Unreadable, reshaped, within
from mlagen.fx.known import copied
from mlagen.fx.mutation import Call, functional_call
from mlagen.fx.nodes import Place, argument, is_call, value_of

__all__ = ["Place", "Reader", "argument", "is_call", "value_of"]

aten = torch.ops.aten


@dataclass(frozen=True)
class Reader:
    """Reads elements of a graph; `sizes` are the extents of the variables, None where it is a symbol."""

    sizes: Mapping[str, int | None]

    def variable(self, name: str) -> Index:
        """An index that runs over the whole of a variable; one of a single value is that value."""
        return Index() if self.sizes[name] == 1 else Index(0, ((name, 1),))

    def trace(self, node: fx.Node, index: Sequence[Index]) -> list[Place]:
        """The element, and where it came from, step by step, as far back as it was only moved.  Raises Unreadable."""
        places = [(node, tuple(index))]
        while (step := self._step(*places[-1])) is not None:
            places.append(step)
        return places

    def source(self, node: fx.Node, index: Sequence[Index]) -> Place:
        """Where the element was computed, or came into the graph."""
        return self.trace(node, index)[-1]

    def operand(self, node: fx.Node, index: Sequence[Index], operand: fx.Node) -> Place:
        """The element of an operand that an elementwise operator combines into its element at `index`."""
        shape = value_of(operand).shape
        if len(shape) > len(index):
            raise Unreadable(f"{node.name} has fewer dimensions than its operand")
        last = index[len(index) - len(shape) :]
        return operand, tuple(Index() if isinstance(e, int) and e == 1 else i for e, i in zip(shape, last, strict=True))

    def _step(self, node: fx.Node, index: tuple[Index, ...]) -> Place | None:
        if node.op != "call_function":
            return None
        if node.target is operator.getitem:
            return self._part(node, index)
        rule = _RULES.get(node.target)
        return None if rule is None else rule(self, node, index)

    def written(self, place: Place) -> tuple[Call, str, tuple[Index, ...]] | None:
        """The call of an operator that wrote an element, the argument that it wrote it to, and the index there."""
        node, index = place
        if not is_call(node, operator.getitem) or not isinstance(node.args[1], int):
            return None
        call = functional_call(node.args[0])
        shown = call.shown(node.args[1], index, self.sizes) if call is not None else None
        return None if call is None or shown is None else (call, *shown)

    def _part(self, node: fx.Node, index: tuple[Index, ...]) -> Place | None:
        """The piece of a split that a getitem takes; or what a call that writes to its arguments left as it was, or only copied."""
        whole, number = node.args
        if not isinstance(whole, fx.Node) or not isinstance(number, int):
            return None
        if (call := functional_call(whole)) is not None:
            shown = call.shown(number, index, self.sizes)
            return (call.before(number), index) if shown is None else copied(call, *shown, self.sizes)
        if whole.target not in (aten.split.Tensor, aten.split_with_sizes.default, aten.unbind.int):
            return None
        source = whole.args[0]
        assert isinstance(source, fx.Node)
        shape = value_of(source).shape
        if whole.target is aten.unbind.int:
            dim = argument(whole, 1, "dim", 0) % len(shape)
            return source, (*index[:dim], Index(number), *index[dim:])
        lengths, dim = argument(whole, 1, "split_sizes"), argument(whole, 2, "dim", 0) % len(shape)
        starts: list[Any] = list(lengths[:number]) if isinstance(lengths, list | tuple) else [lengths] * number
        if number < 0 or not all(isinstance(each, int) for each in starts):
            raise Unreadable(f"{node.name}: a piece that is counted from the end, or of a symbol's length")
        return source, (*index[:dim], index[dim] + sum(starts), *index[dim + 1 :])

    def _view(self, node: fx.Node, index: tuple[Index, ...]) -> Place:
        source = _input(node)
        return source, tuple(reshaped(index, value_of(node).shape, value_of(source).shape, self.sizes))

    def _same(self, node: fx.Node, index: tuple[Index, ...]) -> Place:
        return _input(node), index

    def _copy(self, node: fx.Node, index: tuple[Index, ...]) -> Place | None:
        source = argument(node, 1, "src")
        if value_of(source).dtype is not value_of(node).dtype:
            return None
        return self.operand(node, index, source)

    def _expand(self, node: fx.Node, index: tuple[Index, ...]) -> Place:
        return self.operand(node, index, _input(node))

    def _permute(self, node: fx.Node, index: tuple[Index, ...]) -> Place:
        rank = len(index)
        if node.target is aten.permute.default:
            order = [dim % rank for dim in argument(node, 1, "dims")]
        else:
            order = list(range(rank))
            one, other = (0, -1) if node.target is aten.t.default else (argument(node, 1, "dim0"), argument(node, 2, "dim1"))
            order[one], order[other] = order[other], order[one]
        moved = dict(zip(order, index, strict=True))
        return _input(node), tuple(moved[dim] for dim in range(rank))

    def _unsqueeze(self, node: fx.Node, index: tuple[Index, ...]) -> Place:
        dim = argument(node, 1, "dim") % len(index)
        return _input(node), (*index[:dim], *index[dim + 1 :])

    def _slice(self, node: fx.Node, index: tuple[Index, ...]) -> Place:
        source = _input(node)
        dim = argument(node, 1, "dim", 0) % len(index)
        start, step = self._start(node, value_of(source).shape[dim], 2), argument(node, 4, "step", 1)
        if not isinstance(step, int):
            raise Unreadable(f"{node.name} takes every so many rows as a symbol says")
        return source, (*index[:dim], index[dim].scaled(step) + start, *index[dim + 1 :])

    def _start(self, node: fx.Node, extent: Size, place: int) -> int:
        start = argument(node, place, "start") or 0
        if not isinstance(start, int) or (start and not isinstance(extent, int)):
            raise Unreadable(f"{node.name} starts at a symbol")
        return min(start + extent if start < 0 else start, extent) if isinstance(extent, int) else start

    def _select(self, node: fx.Node, index: tuple[Index, ...]) -> Place:
        source, dim, chosen = _input(node), argument(node, 1, "dim"), argument(node, 2, "index")
        shape = value_of(source).shape
        dim %= len(shape)
        if not isinstance(chosen, int) or (chosen < 0 and not isinstance(shape[dim], int)):
            raise Unreadable(f"{node.name} selects a symbol's place")
        return source, (*index[:dim], Index(chosen % shape[dim] if chosen < 0 else chosen), *index[dim:])

    def _cat(self, node: fx.Node, index: tuple[Index, ...]) -> Place:
        pieces = argument(node, 0, "tensors")
        dim = argument(node, 1, "dim", 0) % len(index)
        first = 0
        for piece in pieces:
            width = value_of(piece).shape[dim] if value_of(piece).dim() == len(index) else None
            if not isinstance(width, int):
                raise Unreadable(f"{node.name} joins along a symbol")
            inside = within(index[dim], first, first + width, self.sizes)
            if inside:
                return piece, (*index[:dim], index[dim] + -first, *index[dim + 1 :])
            first += width
        raise Unreadable(f"{node.name}: no piece holds the element")

    def _scatter(self, node: fx.Node, index: tuple[Index, ...]) -> Place:
        """slice_scatter and select_scatter: the source inside of the slice, the tensor written to outside."""
        target, source = _input(node), argument(node, 1, "src")
        dim = argument(node, 2, "dim", 0) % len(index)
        extent = value_of(target).shape[dim]
        start = argument(node, 3, "index") if node.target is aten.select_scatter.default else self._start(node, extent, 3)
        if node.target is aten.select_scatter.default:
            if not isinstance(start, int) or start < 0:
                raise Unreadable(f"{node.name} writes to a symbol's place")
            if within(index[dim], start, start + 1, self.sizes):
                return source, (*index[:dim], *index[dim + 1 :])
            return target, index
        rows = value_of(source).shape[dim]
        if argument(node, 5, "step", 1) != 1 or not isinstance(extent, int) or not isinstance(rows, int):
            raise Unreadable(f"{node.name} writes to every other row, or to rows of a symbol's number")
        if within(index[dim], start, start + rows, self.sizes):
            return source, (*index[:dim], index[dim] + -start, *index[dim + 1 :])
        return target, index


def _input(node: fx.Node) -> fx.Node:
    found = argument(node, 0, "self")
    if not isinstance(found, fx.Node):
        raise Unreadable(f"{node.name} has no tensor as its first argument")
    return found


Rule = Callable[[Reader, fx.Node, tuple[Index, ...]], Place | None]
_GROUPS: tuple[tuple[Rule, tuple[object, ...]], ...] = (
    (
        Reader._view,
        (
            aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.squeeze.dim, aten.squeeze.dims,
            aten.squeeze.default,
        ),
    ),
    (Reader._same, (aten.clone.default, aten.alias.default, aten.detach.default, aten.contiguous.default)),
    (Reader._copy, (aten.copy.default,)),
    (Reader._expand, (aten.expand.default,)),
    (Reader._permute, (aten.permute.default, aten.transpose.int, aten.t.default)),
    (Reader._unsqueeze, (aten.unsqueeze.default,)),
    (Reader._slice, (aten.slice.Tensor,)),
    (Reader._select, (aten.select.int,)),
    (Reader._cat, (aten.cat.default,)),
    (Reader._scatter, (aten.slice_scatter.default, aten.select_scatter.default)),
)  # fmt: skip
_RULES: dict[object, Rule] = {target: rule for rule, targets in _GROUPS for target in targets}
