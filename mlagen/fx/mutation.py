"""Calls of operators that write to their arguments, in a functional graph: their results are what was written to, afterwards.

torch makes such a call functional in one of two ways.  auto_functionalized has the arguments as they are, and a result for each
that is written.  auto_functionalized_v2 has the tensors that these are views of, its bases, what part of its base each is, and a
result for each base: elements of it that the view does not show are what they were.
"""

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch._higher_order_ops.auto_functionalize import auto_functionalized, auto_functionalized_v2

from mlagen.fx.index import Index, Unreadable, divide, same_extent, within
from mlagen.fx.nodes import Place, is_call, value_of

Sizes = Mapping[str, int | None]


@dataclass(frozen=True)
class View:
    """What an argument shows of its base: `strides` and `offset` count elements of the base's storage from its first element."""

    base: fx.Node
    shape: tuple[Any, ...]
    strides: tuple[Any, ...]
    offset: Any

    @property
    def is_whole(self) -> bool:
        """Whether an index in the view is one in the base, too."""
        value = value_of(self.base)
        same = len(self.shape) == value.dim() and all(map(same_extent, self.shape, value.shape))
        return same and self.offset == 0 and all(map(same_extent, self.strides, value.stride()))

    def in_base(self, index: Sequence[Index], sizes: Sizes) -> tuple[Index, ...]:
        """The index in the base of an element of the view.  Raises Unreadable."""
        if self.is_whole:
            return tuple(index)
        value = value_of(self.base)
        return self._divided(self._linear(index, self.strides) + self._first, value.shape, value.stride(), sizes)

    def shows(self, index: Sequence[Index], sizes: Sizes) -> tuple[Index, ...] | None:
        """The index in the view of an element of the base; None where the view does not show it.  Raises Unreadable."""
        if self.is_whole:
            return tuple(index)
        value = value_of(self.base)
        found = self._divided(self._linear(index, value.stride()), self.shape, self.strides, sizes)
        starts = self._divided(Index(self._first), self.shape, self.strides, sizes)
        shown = []
        for place, start, extent, stride in zip(found, starts, self.shape, self.strides, strict=True):
            if not isinstance(extent, int):
                rows = zip(value.shape, value.stride(), strict=True)
                if start.const or not any(same_extent(extent, size) and same_extent(stride, step) for size, step in rows):
                    raise Unreadable(f"{self.base.name}: a view of some rows of a symbol's number")
            elif not within(place, start.const, start.const + extent, sizes):
                return None
            shown.append(place + -start.const)
        return tuple(shown)

    @property
    def _first(self) -> int:
        if not isinstance(self.offset, int):
            raise Unreadable(f"{self.base.name}: a view that starts at a symbol")
        return self.offset

    def _linear(self, index: Sequence[Index], strides: Sequence[Any]) -> Index:
        total = Index()
        for place, stride in zip(index, strides, strict=True):
            if place != Index():
                if not isinstance(stride, int):
                    raise Unreadable(f"{self.base.name}: strides of a symbol")
                total = total + place.scaled(stride)
        return total

    def _divided(self, linear: Index, shape: Sequence[Any], strides: Sequence[Any], sizes: Sizes) -> tuple[Index, ...]:
        """The index with these strides of the element that is `linear` after the first; dimensions of one element hold none."""
        found = [Index()] * len(shape)
        several = [dim for dim, extent in enumerate(shape) if not (isinstance(extent, int) and extent == 1)]
        if not all(isinstance(strides[dim], int) and strides[dim] > 0 for dim in several):
            raise Unreadable(f"{self.base.name}: strides {list(strides)}")
        for dim in sorted(several, key=lambda each: strides[each], reverse=True):
            found[dim], linear = divide(linear, strides[dim], sizes)
        if linear != Index():
            raise Unreadable(f"{self.base.name}: an element between those of a view")
        return tuple(found)


@dataclass(frozen=True)
class Call:
    """A call that was made functional."""

    node: fx.Node

    @property
    def name(self) -> str:
        """The operator's, "library::operator"."""
        return str(self._operator.name())

    @property
    def _operator(self) -> Any:
        return self.node.args[0]

    @property
    def written(self) -> tuple[str, ...]:
        """The arguments that the operator writes to, by its schema."""
        return tuple(each.name for each in self._operator._schema.arguments if each.alias_info and each.alias_info.is_write)

    def given(self, name: str) -> Any:
        """An argument that is only read; what the schema says where the call does not."""
        if name in self.node.kwargs:
            return self.node.kwargs[name]
        return next((each.default_value for each in self._operator._schema.arguments if each.name == name), None)

    def view(self, name: str) -> View | None:
        """A tensor argument as a part of a node's value; None where the call has none.  Raises Unreadable."""
        if not is_call(self.node, auto_functionalized_v2) or name not in self.written:
            node = self.given(name)
            return _whole(node) if isinstance(node, fx.Node) else None
        options: Mapping[str, Any] = self.node.kwargs
        number = options[f"_{name}_base_index"]
        if number is None:
            return None
        base = options["_all_bases"][number]
        value = value_of(base)
        if f"_{name}_slice_dim" in options:
            dim, start, end = (options[f"_{name}_slice_{each}"] for each in ("dim", "start", "end"))
            if not all(isinstance(each, int) for each in (dim, start, end, value.stride()[dim])):
                raise Unreadable(f"{self.node.name}: {name} is a slice at a symbol")
            shape = (*value.shape[:dim], end - start, *value.shape[dim + 1 :])
            return View(base, shape, tuple(value.stride()), start * value.stride()[dim])
        if f"_{name}_size" in options:
            shape, strides, offset = (options[f"_{name}_{each}"] for each in ("size", "stride", "storage_offset"))
            known = [each.meta["val"] if isinstance(each, fx.Node) else each for each in (*shape, *strides)]
            return View(base, tuple(known[: len(shape)]), tuple(known[len(shape) :]), offset - value.storage_offset())
        return _whole(base)

    def result(self, name: str) -> int:
        """The number of the result that holds an argument afterwards; 0, which none is, for an argument that the call has not."""
        if is_call(self.node, auto_functionalized_v2):
            number: Any = self.node.kwargs[f"_{name}_base_index"]
            return 0 if number is None else 1 + int(number)
        return 1 + self.written.index(name)

    def results(self, number: int) -> list[fx.Node]:
        """The nodes that take a result."""
        return [user for user in self.node.users if is_call(user, operator.getitem) and user.args[1] == number]

    def element(self, name: str, index: Sequence[Index], sizes: Sizes) -> Place:
        """The element of an argument as it was before the call.  Raises Unreadable."""
        view = self.view(name)
        if view is None:
            raise Unreadable(f"{self.node.name} has no {name}")
        return view.base, view.in_base(index, sizes)

    def shown(self, number: int, index: Sequence[Index], sizes: Sizes) -> tuple[str, tuple[Index, ...]] | None:
        """The argument that shows an element of a result, and its index there; None where it is what it was.  Raises Unreadable."""
        found = []
        for name in self.written:
            view = self.view(name)
            place = view.shows(index, sizes) if view is not None and self.result(name) == number else None
            if place is not None:
                found.append((name, place))
        if len(found) > 1:
            raise Unreadable(f"{self.node.name}: {found[0][0]} and {found[1][0]} overlap")
        return found[0] if found else None

    def before(self, number: int) -> fx.Node:
        """What a result was before the call."""
        if is_call(self.node, auto_functionalized_v2):
            bases: Any = self.node.kwargs["_all_bases"]
            found: fx.Node = bases[number - 1]
        else:
            found = self.given(self.written[number - 1])
        return found


def _whole(node: fx.Node) -> View:
    value = value_of(node)
    return View(node, tuple(value.shape), tuple(value.stride()), 0)


def written_in_place(graph: fx.Graph) -> fx.Node | None:
    """The first node that writes to its arguments, if there is one; copies to what nothing reads afterwards do not count."""
    read: set[fx.Node] = set()
    found = None
    for node in reversed(graph.nodes):
        writes = isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable
        if writes and (node.target is not torch.ops.aten.copy_.default or node.args[0] in read):
            found = node
        if node.op != "output":
            read.update(node.all_input_nodes)
    return found


def functional_call(node: object) -> Call | None:
    """The call, where a node is one that was made functional of an operator that returns nothing else."""
    if not is_call(node, auto_functionalized, auto_functionalized_v2):
        return None
    assert isinstance(node, fx.Node)
    called = node.args[0]
    return Call(node) if isinstance(called, torch._ops.OpOverload) and not called._schema.returns else None
